"""What trained networks weigh when they are shipped: zeros, channels that leave, and 8 bits.

    python examples/shipped.py            # LeNet-5 and ResNet-8 of examples/runs.py on Fashion-MNIST
    python examples/shipped.py --smoke    # seconds
    python examples/shipped.py --record   # the table of examples/README.md and results/shipped.json

The dissertation ends with 3x by RGSM and 4x more by 8 bits: 12 times smaller. Here each network is trained as in
runs.py; then u goes into a file of its own by ``rk.save_sparse``, as it is and with int8 values, and again after
``rk.shrink`` has removed the channels that are zero. Each file is read back, and the network that comes out is tested.
A training that is stopped goes on where it was when the command is given again.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from deep.missing import explain

try:
    import torch
    from torch import nn

    import robust
    import rvsm_kernels as rk
    import train
    from bench.markdown import stamp, table
    from bench.report import fill
    from bench.results import environment
    from deep import cli, files
    from deep.loop import CHECKPOINT, EVALUATION_BATCH, Training, to_float
    from robust import RobustSettings
    from runs import BUILD, README, RESULTS, slug
    from runs_sets import LENET, PRUNING, RGSM, SMALL_ROBUST, TABLE_3_1, Run
except ModuleNotFoundError as error:
    explain(error, __name__)
    raise

RUNS = (
    Run("LeNet-5, dense", LENET),
    Run("LeNet-5, RVSM ℓ0", replace(TABLE_3_1, penalty="l0")),
    Run("LeNet-5, RGSM group lasso, λ = 0.1", replace(RGSM, penalty="l1", lam=0.1)),
    Run("ResNet-8, natural, RGSM", replace(SMALL_ROBUST, adversarial=0, **PRUNING)),
)
SHORT = {"epochs": 1, "milestones": (), "train_images": 256, "test_images": 200, "width": 4}

Row = dict[str, Any]


@torch.no_grad()
def accuracy(model: nn.Module, training: Training) -> float:
    """The share of right answers on the test images, in evaluation mode."""
    model.eval()
    right = 0
    for x, y in training.test_images.batches(EVALUATION_BATCH):
        right += int((model(to_float(x, training.settings.device)).argmax(1).cpu() == y).sum())
    return right / len(training.test_images)


def shipped(training: Training, folder: Path) -> list[Row]:
    """The files of a trained network, each with what comes out of it.

    Returns:
        By file: ``form``, ``parameters`` of the network that is read from it, ``bytes``, ``accuracy``.
    """

    def rows(model: nn.Module, form: str, **options: Any) -> Iterator[Row]:
        count = sum(p.numel() for p in model.parameters())
        for words, int8 in (("", False), (", int8", True)):
            path = folder / "net.safetensors"
            size = rk.save_sparse(model, path, int8=int8, **options).file_bytes
            again = rk.load_sparse(copy.deepcopy(model), path)
            yield {"form": form + words, "parameters": count, "bytes": size, "accuracy": accuracy(again, training)}

    found = list(rows(copy.deepcopy(training.model), "w, dense", forms=("dense",)))
    if not training.has_u:
        return found
    with training.sparse_weights():
        u = copy.deepcopy(training.model)
    found += rows(u, "u")
    before = sum(p.numel() for p in u.parameters())
    rk.shrink(u.eval(), example_inputs=training.example)
    if sum(p.numel() for p in u.parameters()) < before:
        found += rows(u, "u without zero channels")
    return found


def trained(run: Run, out: Path) -> Row:
    """Train, or go on with what is in the folder; the row of the result."""

    def test(training: Training) -> Row:
        return {**train.test(training), "shipped": shipped(training, out)}

    s = run.settings
    perturb = robust.perturbation(s) if isinstance(s, RobustSettings) else None
    resume = (out / CHECKPOINT).exists()
    result = cli.run(s, cli.load(s, None), out, test, command=run.command, perturb=perturb, resume=resume)
    return {"label": run.label, "command": run.command, "shipped": result["test"]["shipped"]}


def as_table(result: Row) -> str:
    """The Markdown table: one line for each file."""
    lines = []
    for row in result["rows"]:
        dense = row["shipped"][0]["bytes"]
        for k, of in enumerate(row["shipped"]):
            sizes = [f"{of['parameters']:,}", f"{of['bytes'] / 1e3:.1f} KB", f"{dense / of['bytes']:.1f}x"]
            lines.append(["" if k else row["label"], of["form"], *sizes, f"{100 * of['accuracy']:.2f}"])
    return table(["", "file", "parameters", "bytes", "smaller", "accuracy, %"], lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, ship, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="a few images for an epoch, into build/runs")
    parser.add_argument("--record", action="store_true", help="write examples/results and the README's table")
    given = parser.parse_args(argv)
    if given.smoke and given.record:
        parser.error("argument --record: the README's table is that of the full size")
    out = BUILD / ("smoke" if given.smoke else "full") / "shipped"
    result: Row = {**environment("cpu", "python examples/shipped.py"), "rows": []}
    for run in RUNS:
        small = replace(run, settings=replace(run.settings, **SHORT)) if given.smoke else run
        result["rows"].append(trained(small, out / slug(run)))
    result["threads"] = torch.get_num_threads()  # of the settings, not of the process as it began
    files.write_json((RESULTS if given.record else out) / "shipped.json", result)
    text = as_table(result)
    print(f"\n{text}")
    if given.record:
        note = f"{text}\n\n1 seed. {stamp(result)}"
        README.write_text(fill(README.read_text(encoding="utf-8"), "shipped", lambda name: note), encoding="utf-8")


if __name__ == "__main__":
    cli.guarded(main)
