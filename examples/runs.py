"""The runs that examples/README.md reports: train them, measure the loop, fill the README's tables.

    python examples/runs.py a b c d e f   # train; what is in examples/results already is not trained again
    python examples/runs.py time          # seconds per epoch by engine
    python examples/runs.py a --check     # train again and compare with examples/results
    python examples/runs.py --readme      # fill the tables from examples/results

A run that is stopped goes on where it was when the command is given again.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from deep.missing import explain

try:
    import torch

    import robust
    import train
    from bench.markdown import spread, stamp, table
    from bench.report import fill
    from bench.results import environment
    from deep import cli, files, plots
    from deep.loop import CHECKPOINT, Training
    from robust import RobustSettings
    from runs_sets import SETS, SWEPT_NETS, TIMED, Run, seeded
except ModuleNotFoundError as error:
    explain(error, __name__)
    raise

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / "build" / "runs"
RESULTS = HERE / "results"
README = HERE / "README.md"

Result = dict[str, Any]


ENGINES = ("native", "reference", "loop")
DENSE = {"method": "dense", "group_lasso": 0.0, "recalibrate": 0}


def trained(run: Run, out: Path) -> Result:
    """Train, or go on with what is in the folder; the row of the result."""
    s = run.settings
    perturb, test = None, train.test
    if isinstance(s, RobustSettings):
        perturb, test = robust.perturbation(s), robust.test
    resume = (out / CHECKPOINT).exists()
    result = cli.run(s, cli.load(s, None), out, test, command=run.command, perturb=perturb, resume=resume)
    curve = [[row["accuracy_u"], row["u"]["zeros"], row["u"]["zero_channels"]] for row in result["history"]]
    seconds = {key: result[key] for key in ("seconds_per_epoch", "step_seconds_per_epoch")}
    return {
        "label": run.label,
        "seed": s.seed,
        "command": run.command,
        **seconds,
        "test": result["test"],
        "curve": curve,
    }


def train_set(name: str, out: Path, smoke: bool) -> None:
    """Train what is missing in out/NAME.json; the file is written after each run."""
    path = out / f"{name}.json"
    result = files.read_json(path) or {**environment("cpu", f"python examples/runs.py {name}"), "rows": []}
    done = {row["command"] for row in result["rows"]}
    # Runs of two sets may be the same one.
    others = [files.read_json(out / f"{other}.json") or EMPTY for other in SETS if other != name]
    known = {row["command"]: row for other in others for row in other["rows"]}
    runs = list(seeded(name, smoke))
    for i, run in enumerate(runs, 1):
        if run.command in done:
            continue
        print(f"({name}) {i}/{len(runs)}: {run.label}, seed {run.settings.seed}", flush=True)
        if run.command in known:
            row = {**known[run.command], "label": run.label}
        else:
            row = trained(run, BUILD / ("smoke" if smoke else "full") / name / slug(run))
            result["threads"] = torch.get_num_threads()  # of the settings, not of the process as it began
        result["rows"].append(row)
        files.write_json(path, result)


EMPTY: Result = {"rows": []}


def slug(run: Run) -> str:
    """A folder's name for a run."""
    words = "".join(c if c.isalnum() and c.isascii() else "-" for c in f"{run.label}-{run.settings.seed}")
    return "-".join(word for word in words.split("-") if word)


# ---- run again, and compare ------------------------------------------------------------------------------------------

ALLOWED = {"accuracy": 0.02, "zeros": 0.05, "zero_channels": 1 / 7 + 1e-9}
"""How far a run on another machine may lie from the committed one: its sums are rounded otherwise, and training
amplifies that. The last is one of LeNet's seven channels."""


def check_set(name: str) -> bool:
    """Train the first seed of a set again; returns whether there is something to compare, and all within ALLOWED."""
    committed = {row["command"]: row["test"] for row in (files.read_json(RESULTS / f"{name}.json") or EMPTY)["rows"]}
    good = bool(committed)
    for run in seeded(name, smoke=False):
        if run.settings.seed != 0 or run.command not in committed:
            continue
        with tempfile.TemporaryDirectory() as folder:
            again = trained(run, Path(folder))["test"]
        for key, mine, theirs in compared(again, committed[run.command]):
            near = abs(mine - theirs) <= ALLOWED[key.split(" ")[0]]
            good &= near
            print(f"{'ok ' if near else 'FAR'} {run.label}: {key} {mine:.4f}, committed {theirs:.4f}", flush=True)
    return good


def compared(again: Result, committed: Result) -> Iterator[tuple[str, float, float]]:
    """(what, value now, value committed) of two tests of a run."""
    for which in ("w", "u"):
        yield f"accuracy of {which}", again[f"accuracy_{which}"], committed[f"accuracy_{which}"]
    for key in ("zeros", "zero_channels"):
        yield key, again["u"][key], committed["u"][key]


# ---- seconds per epoch by engine -------------------------------------------------------------------------------------


def time_loop(out: Path, rounds: int, smoke: bool) -> None:
    """Seconds of an epoch and of the steps in it: dense SGD and the engines in turn, one epoch each, in one process."""
    result = {**environment("cpu", "python examples/runs.py time"), "rounds": rounds, "rows": []}
    for name, settings in TIMED.items():
        images = {"train_images": 256, "test_images": 10} if smoke else {"test_images": 10}
        kinds = {"dense": replace(settings, **DENSE, **images)}
        kinds |= {engine: replace(settings, engine=engine, **images) for engine in ENGINES}
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        dataset = cli.load(kinds["native"], None)
        trainings = {
            engine: Training(s, dataset, robust.perturbation(s) if isinstance(s, RobustSettings) else None)
            for engine, s in kinds.items()
        }
        epochs: dict[str, list[Result]] = {engine: [] for engine in kinds}
        for _ in range(rounds):
            for engine, training in trainings.items():
                epochs[engine].append(training.train_epoch())
        for engine, rows in epochs.items():
            seconds, steps = (statistics.median(row[key] for row in rows) for key in ("seconds", "step_seconds"))
            result["rows"].append({"set": name, "engine": engine, "seconds": seconds, "step_seconds": steps})
            print(f"({name}) {engine}: {seconds:.2f} s per epoch, {steps:.3f} s in step()", flush=True)
    result["threads"] = torch.get_num_threads()  # of the settings, not of the process as it began
    files.write_json(out / "time.json", result)


# ---- tables and figures ----------------------------------------------------------------------------------------------

Get = Callable[[Result], float]

ACCURACY: dict[str, Get] = {"accuracy of w, %": lambda t: t["accuracy_w"], "of u, %": lambda t: t["accuracy_u"]}
ZEROS: dict[str, Get] = {"zero weights of u, %": lambda t: t["u"]["zeros"]}
CHANNELS: dict[str, Get] = {"zero channels of u, %": lambda t: t["u"]["zero_channels"]}


def zero_channels_of(test: Result, kernel: int) -> float:
    """The share of u's zero input channels among those of the convolutions with kernels of that height."""
    layers = [layer for layer in test["u"]["layers"] if len(layer["shape"]) == 4 and layer["shape"][2] == kernel]
    return sum(layer["zero_channels"] for layer in layers) / sum(layer["channels"] for layer in layers)


COLUMNS: dict[str, dict[str, Get]] = {
    "a": {**ACCURACY, **CHANNELS, **ZEROS},
    "b": {**ACCURACY, **ZEROS},
    "c": {
        **ACCURACY,
        **ZEROS,
        **CHANNELS,
        "zero weights of w, %": lambda t: t["w"]["zeros"],
        "zero channels of w, %": lambda t: t["w"]["zero_channels"],
    },
    "e": {**ACCURACY, **CHANNELS, **ZEROS},
    "f": {
        **CHANNELS,
        "zero channels of 1×1 shortcuts, %": lambda t: zero_channels_of(t, 1),
        "of 3×3 convolutions, %": lambda t: zero_channels_of(t, 3),
        "A1 of w, %": lambda t: t["robust_w"]["natural"],
        **{
            f"{name} of u, %": lambda t, key=key: t["robust_u"][key]
            for name, key in (("A1", "natural"), ("A2", "FGSM"), ("A3", "IFGSM^20"))
        },
    },
    "d": {
        "weights of w below 1e-3, %": lambda t: t["w"]["small"],
        **CHANNELS,
        **{
            f"{name} of {which}, %": lambda t, key=key, which=which: t[f"robust_{which}"][key]
            for which in ("w", "u")
            for name, key in (("A1", "natural"), ("A2", "FGSM"), ("A3", "IFGSM^20"), ("A4", "C&W"))
        },
    },
}


def by_label(result: Result) -> dict[str, list[Result]]:
    """The tests of a result, those of one label together, in the order of the sets."""
    order = [run.label for runs in SETS.values() for run in runs()]
    groups: dict[str, list[Result]] = {}
    for row in sorted(result["rows"], key=lambda row: order.index(row["label"])):
        groups.setdefault(row["label"], []).append(row["test"])
    return groups


def training_table(name: str, result: Result) -> str:
    """The Markdown table of a set: one line for each label, median or mean (least–greatest) over the seeds.

    A median, for a LeNet-5 without batch norm dies now and then at the papers' learning rate.
    """
    columns = COLUMNS[name]
    middle, word = (statistics.fmean, "mean") if name == "f" else (statistics.median, "median")
    lines = [
        [label, *(spread([get(test) for test in tests], 1, middle) for get in columns.values())]
        for label, tests in by_label(result).items()
    ]
    seeds = len({row["seed"] for row in result["rows"]})
    note = f"{seeds} seed{f's: {word} (least–greatest)' if seeds > 1 else ''}."
    return f"{table(['', *columns], lines)}\n\n{note} {stamp(result)}"


def time_table(result: Result) -> str:
    """The Markdown table of ``runs.py time``."""
    labels = {"dense": "dense, torch.optim.SGD(fused=True)", "native": "RGSM, rvsm_kernels (native)"}
    labels |= {"reference": "RGSM, PyTorch reference", "loop": "RGSM, channel-by-channel loop"}
    dense = {row["set"]: row["step_seconds"] for row in result["rows"] if row["engine"] == "dense"}
    lines = [
        [
            f"({row['set']}) {labels[row['engine']]}",
            f"{row['seconds']:.2f}",
            f"{row['step_seconds']:.3f}",
            f"{100 * row['step_seconds'] / row['seconds']:.1f}",
            f"{row['step_seconds'] / dense[row['set']]:.2f}",
        ]
        for row in result["rows"]
    ]
    header = ["", "seconds per epoch", "of them in step()", "share of the optimizer, %", "step() over dense"]
    return f"{table(header, lines)}\n\nMedians of {result['rounds']} epochs each, the engines in turn. {stamp(result)}"


def content(name: str) -> str:
    """What a block of the README says."""
    result = files.read_json(RESULTS / f"{name}.json")
    if result is None:
        return "*Not measured yet.*"
    return time_table(result) if name == "time" else training_table(name, result)


def figures(out: Path) -> None:
    """Accuracy against sparsity of the sets, and the sweep of (f), as far as they were trained."""
    for name, of, what in (("a", "zero_channels", "zero input channels of u"), ("b", "zeros", "zero weights of u")):
        result = files.read_json(out / f"{name}.json")
        if result is not None:
            points = {
                label: [(test["u"][of], test["accuracy_u"]) for test in tests]
                for label, tests in by_label(result).items()
            }
            plots.accuracy_sparsity(out / f"{name}.png", points, what, line=False)
    result = files.read_json(out / "f.json")
    if result is not None:
        plots.sweep(out / "f.png", swept(result), "λ₁")


SWEPT_PANELS = {
    "zero channels of u": CHANNELS["zero channels of u, %"],
    "natural accuracy (A1)": lambda t: t["robust_u"]["natural"],
    "under FGSM (A2)": lambda t: t["robust_u"]["FGSM"],
    "under IFGSM²⁰ (A3)": lambda t: next(x for key, x in t["robust_u"].items() if key.startswith("IFGSM")),
}


def swept(result: Result) -> dict[str, dict[str, dict[float, list[float]]]]:
    """What the figure of (f) shows: by quantity, net and lambda_1 the values of the runs; no pruning stands at 0."""
    tests = by_label(result)
    runs = [run for run in SETS["f"]() if run.label in tests]
    return {
        quantity: {
            net: {
                run.settings.lam if run.settings.method == "rgsm" else 0.0: [get(test) for test in tests[run.label]]
                for run in runs
                if run.settings.model == model
            }
            for model, net in SWEPT_NETS.items()
        }
        for quantity, get in SWEPT_PANELS.items()
    }


def rounds(text: str) -> int:
    """A number of epochs, for argparse."""
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError("a median needs at least 1 epoch")
    return count


def main(argv: Sequence[str] | None = None) -> None:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"{', '.join(SETS)}, time")
    parser.add_argument("--check", action="store_true", help="train the first seed again and compare")
    parser.add_argument("--readme", action="store_true", help="fill the tables of examples/README.md")
    parser.add_argument("--smoke", action="store_true", help="all of it in seconds, into build/runs")
    parser.add_argument("--rounds", type=rounds, default=5, help="time: epochs of each engine (default: %(default)s)")
    given = parser.parse_args(argv)
    unknown = set(given.sets) - {*SETS, "time"}
    if unknown:
        parser.error(f"no set {', '.join(sorted(unknown))}; there are {', '.join(SETS)}, time")
    if given.check and "time" in given.sets:
        parser.error("--check trains again and compares accuracy and zeros; there is nothing to compare in time")
    out = BUILD / "smoke" if given.smoke else RESULTS
    torch.manual_seed(0)
    if given.check:
        far = [name for name in given.sets or SETS if name in SETS and not check_set(name)]
        raise SystemExit(1 if far else 0)
    for name in given.sets or ([*SETS, "time"] if given.smoke else []):
        if name == "time":
            time_loop(out, 1 if given.smoke else given.rounds, given.smoke)
        else:
            train_set(name, out, given.smoke)
    figures(out)
    if given.readme:
        README.write_text(fill(README.read_text(encoding="utf-8"), "runs", content), encoding="utf-8")
    for name in given.sets:
        print(f"\n{content(name)}")


if __name__ == "__main__":
    cli.guarded(main)
