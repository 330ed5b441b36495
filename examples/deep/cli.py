"""What ``train.py`` and ``robust.py`` share as scripts: the command line, the run from data to result, errors."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from deep import data, files, methods, plots, recipes
from deep.loop import CHECKPOINT, Interrupted, Perturb, Stopped, Training
from deep.settings import Settings, SettingsError, add_options, from_arguments

Result = dict[str, Any]
Test = Callable[[Training], Result]
"""What is measured on the test images in the end."""

NO_MEMORY = ("can't allocate memory", "Storage size calculation overflowed")
"""What torch says when an ordinary RuntimeError is about memory of the CPU."""
ERRORS = (data.DataError, files.FileError, SettingsError, Stopped)


SMOKE = {"threads": 1}
"""What --smoke stands for in every script: threads of a busy machine would wait for each other."""
SMOKE_METHOD = {"method": "rvsm", "penalty": "l0", "lam": 1e-5, "beta": 1e-2}
"""How --smoke trains where neither a recipe nor --method says it: sparsely, as the row table3.1/l0 does."""


def arguments(
    argv: Sequence[str] | None, description: str, kind: type[Settings], smoke: dict[str, Any], robust: bool
) -> tuple[Settings, argparse.Namespace]:
    """The settings of a command line, and the rest of it.

    Args:
        smoke: settings that --smoke stands for.
        robust: whether the script takes the recipes of robust or of natural training.
    """
    rows = recipes.recipes(robust)
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--recipe", metavar="ROW", help="settings of a row of the papers' tables; see --list")
    parser.add_argument("--list", action="store_true", help="print the recipes and what the papers print, and stop")
    parser.add_argument("--data-folder", type=Path, metavar="DIR", help="where the files of the data set are")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for checkpoint, JSON, plots (build/SCRIPT)")
    begin = parser.add_mutually_exclusive_group()
    begin.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    begin.add_argument("--overwrite", action="store_true", help="begin anew even if --out has a checkpoint")
    parser.add_argument("--tensorboard", action="store_true", help="log to --out/tensorboard")
    parser.add_argument(
        "--smoke", action="store_true", help="seconds: few images, two epochs, and RVSM unless told otherwise"
    )
    add_options(parser, kind)
    given = parser.parse_args(argv)
    if given.list:
        for name, row in rows.items():
            printed = ", ".join(recipes.columns(row.printed))
            print(f"{name:28} {'; '.join(text for text in (printed, row.note) if text)}")
        raise SystemExit(0)
    if given.recipe is not None and given.recipe not in rows:
        if given.recipe in recipes.recipes(not robust):
            parser.error(f"recipe {given.recipe} is a recipe of {'train' if robust else 'robust'}.py")
        near = [name for name in rows if name.startswith(given.recipe)]
        parser.error(f"no recipe {given.recipe!r}; there are {', '.join(near or rows)}")
    recipe = rows[given.recipe].settings if given.recipe else {}
    if given.smoke:
        smoke = {**SMOKE, **smoke, **({} if recipe or hasattr(given, "method") else SMOKE_METHOD)}
    try:
        settings = from_arguments(kind, given, recipe, smoke if given.smoke else {})
    except SettingsError as error:
        parser.error(str(error))
    if given.out is None:
        given.out = Path("build") / (Path(parser.prog).stem + ("-smoke" if given.smoke else ""))
        given.overwrite |= given.smoke and not given.resume
    # The printed numbers belong to the printed settings.
    same = all(getattr(settings, name) == value for name, value in recipe.items())
    given.printed = rows[given.recipe].printed if recipe and same else {}
    given.note = rows[given.recipe].note if recipe else ""
    return settings, given


class Logbook:
    """What an epoch came to: a line on the terminal and, if asked for, TensorBoard's scalars."""

    def __init__(self, folder: Path | None, first_epoch: int) -> None:
        self._writer = None
        if folder is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise SettingsError("--tensorboard needs its package: pip install tensorboard") from error
            try:
                # What was logged after the checkpoint that a run goes on from is not part of it any more.
                self._writer = SummaryWriter(folder, purge_step=first_epoch)
            except OSError as error:
                raise files.FileError(f"{folder} cannot be written to ({error.strerror or error})") from error

    def __call__(self, row: Result) -> None:
        """Log the row of an epoch."""
        u = row["u"]
        tqdm.write(
            f"epoch {row['epoch']:3}  loss {row['loss']:.4f}"
            f"  accuracy of w {row['accuracy_w']:.4f}  of u {row['accuracy_u']:.4f}"
            f"  zeros {u['zeros']:.3f}  zero channels {u['zero_channels']:.3f}  {row['seconds']:.1f} s"
        )
        sys.stdout.flush()  # a log file is to show each epoch when it is done
        if self._writer is None:
            return
        values = {"loss": row["loss"], "L_beta": row["lagrangian"], "lr": row["lr"]}
        values |= {"accuracy/w": row["accuracy_w"], "accuracy/u": row["accuracy_u"]}
        values |= {"sparsity/zeros": u["zeros"], "sparsity/channels": u["zero_channels"], "sparsity/small": u["small"]}
        for layer in row["layers"]:
            values[f"zeros/{layer['name']}"] = layer["zeros"] / layer["weights"]
            values[f"zero channels/{layer['name']}"] = layer["zero_channels"] / layer["channels"]
        try:
            for name, value in values.items():
                self._writer.add_scalar(name, value, row["epoch"])
            self._writer.flush()
        except OSError as error:  # a log is not worth a training
            tqdm.write(
                f"TensorBoard's log ends here ({error.strerror or error}); the training goes on", file=sys.stderr
            )
            self._writer = None


def load(settings: Settings, folder: Path | None) -> data.Dataset:
    """The data set of some settings."""
    found = data.load(settings.data, folder, settings.pad, settings.pool)
    return replace(found, train=found.train.first(settings.train_images), test=found.test.first(settings.test_images))


def run(
    settings: Settings,
    dataset: data.Dataset,
    out: Path,
    test: Test,
    *,
    command: str,
    perturb: Perturb | None = None,
    printed: dict[str, float] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    tensorboard: bool = False,
) -> Result:
    """Train, test, write out/result.json and the plots.

    Raises:
        SettingsError, FileError, Stopped: see :mod:`deep.loop`.
    """
    checkpoint = out / CHECKPOINT
    files.prepare(out)
    if checkpoint.exists() and not (resume or overwrite):
        raise SettingsError(f"{checkpoint} is of an earlier run: --resume goes on with it, --overwrite begins anew")
    if resume and not checkpoint.exists():
        raise SettingsError(f"nothing to resume: there is no {checkpoint}")
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    training = Training(settings, dataset, perturb)
    if resume:
        training.load(files.load_checkpoint(checkpoint), checkpoint)
    training.fit(out, Logbook(out / "tensorboard" if tensorboard else None, training.epoch + 1))
    epoch = training.use_best()
    try:
        tested = test(training)
    except KeyboardInterrupt:
        raise Interrupted(f"stopped in the final test; {checkpoint} holds all epochs: --resume tests again") from None
    result = {
        "command": command,
        "settings": settings.to_dict(),
        "printed": printed or {},
        "versions": versions(),
        "tested_epoch": epoch,
        "seconds_per_epoch": _mean(training.history, "seconds"),
        "step_seconds_per_epoch": _mean(training.history, "step_seconds"),
        "test": tested,
        "history": training.history,
    }
    print(f"\n{summary(result)}\n", flush=True)  # before a full disk can lose it
    files.write_json(out / "result.json", result)
    pictures(training, result, out)
    print(f"wrote {out / 'result.json'} and plots beside it")
    return result


def _mean(history: list[Result], key: str) -> float:
    return sum(row[key] for row in history) / max(1, len(history))


def versions() -> dict[str, str]:
    """What a result was made with."""
    import rvsm_kernels as rk

    return {"rvsm_kernels": rk.__version__, "torch": torch.__version__}


def pictures(training: Training, result: Result, out: Path) -> None:
    """Accuracy against sparsity over the epochs, channel norms (Figure 5 of 002), weights (1), a map of one layer."""
    part = "zero_channels" if training.settings.groups else "zeros"
    points = [(row["u"][part], row["accuracy_u"]) for row in training.history]
    plots.accuracy_sparsity(out / "accuracy.png", {"u, epoch by epoch": points}, part.replace("_", " "))
    norms = {"w": methods.channel_norms(training.model)}
    weights = {"w": methods.all_weights(training.model)}
    maps = {"before": training.first_map, "w": methods.map_layer(training.model)}
    if training.has_u:
        with training.sparse_weights():
            norms["u"] = methods.channel_norms(training.model)
            weights["u"] = methods.all_weights(training.model)
            maps["u"] = methods.map_layer(training.model)
    plots.channel_norms(out / "channel_norms.png", norms)
    plots.weights(out / "weights.png", weights)
    plots.weight_maps(out / "weight_maps.png", maps)


def summary(result: Result) -> str:
    """A result in a few lines."""
    test = result["test"]
    lines = []
    for which in ("w", "u"):
        s = test[which]
        lines.append(
            f"{which}: accuracy {100 * test[f'accuracy_{which}']:.2f} %, zero weights {100 * s['zeros']:.2f} %,"
            f" zero input channels {100 * s['zero_channels']:.2f} %, |weights| < 1e-3: {100 * s['small']:.2f} %"
        )
        robust = test.get(f"robust_{which}", {})
        if robust:
            lines.append("   under attack: " + ", ".join(f"{name} {100 * x:.2f} %" for name, x in robust.items()))
        queries = test.get(f"queries_{which}", {})
        if queries:
            lines.append("   queries an image: " + ", ".join(f"{name} {x:,.0f}" for name, x in queries.items()))
    if result["printed"]:
        lines.append(f"printed in the paper: {', '.join(recipes.columns(result['printed'], ' %'))}")
    share = result["step_seconds_per_epoch"] / max(result["seconds_per_epoch"], 1e-12)
    lines.append(f"{result['seconds_per_epoch']:.2f} s per epoch, {100 * share:.1f} % of it in the optimizer's step")
    return "\n".join(lines)


def script(
    argv: Sequence[str] | None,
    path: str,
    description: str,
    kind: type[Settings],
    smoke: dict[str, Any],
    test: Test,
    perturbation: Callable[[Any], Perturb | None] | None = None,
) -> None:
    """A script: one run from its command line.

    Args:
        path: the script's, for the recorded command.
        kind, smoke: its settings, and what --smoke stands for.
        test: what is measured in the end.
        perturbation: from settings to what is done to the images; with it, the recipes are those of robust training.
    """
    settings, given = arguments(argv, description, kind, smoke, robust=perturbation is not None)
    if given.note:
        print(f"{given.recipe}: {given.note}", flush=True)
    run(
        settings,
        load(settings, given.data_folder),
        given.out,
        test,
        command=settings.command(path),
        perturb=None if perturbation is None else perturbation(settings),
        printed=given.printed,
        resume=given.resume,
        overwrite=given.overwrite,
        tensorboard=given.tensorboard,
    )


def guarded(main: Callable[[], None]) -> None:
    """Run a script; what it was told wrongly, or what stopped it, ends with one line and status 1 (130: Ctrl-C).

    A request to terminate is treated as Ctrl-C, so that what was begun is put in order.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    script = Path(sys.argv[0]).name
    try:
        main()
    except ERRORS as error:
        print(f"{script}: {error}", file=sys.stderr)
        raise SystemExit(getattr(error, "status", 1)) from None
    except (MemoryError, RuntimeError) as error:
        if not (
            isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in NO_MEMORY)
        ):
            raise
        print(f"{script}: the memory is not enough: choose a smaller model, batch or number", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print(f"{script}: stopped", file=sys.stderr)
        raise SystemExit(130) from None
