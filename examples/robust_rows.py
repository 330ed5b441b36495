"""Rows of the papers' robust tables that only a GPU can train, in seconds: do they build, train, prune, and test?

    python examples/robust_rows.py             # EnResNet5, ResNet-38, and the nets without skip connections
    python examples/robust_rows.py table4.8    # the rows whose names begin so

Each row keeps its net (depth, members, skip connections), its method and its strengths, and goes through the steps of
``robust.py --recipe ROW``; the net is two channels wide, the images are 7 x 7, and there are two batches of them. What
comes out says nothing about the row's accuracy: that takes 200 epochs on CIFAR, on a GPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from deep.missing import explain

try:
    import torch

    import robust
    from bench.markdown import table
    from deep import cli, models, recipes
    from deep.loop import Training
    from robust import RobustSettings
except ModuleNotFoundError as error:
    explain(error, __name__)
    raise

ROWS = ("table4.5/en5resnet20", "table4.6", "table002-5", "table002-6")
"""What their names begin with."""

TINY: dict[str, Any] = {
    **{"data": "digits", "pool": 4, "train_images": 72, "test_images": 16, "validation": 8, "batch": 32},
    **{"epochs": 1, "milestones": (), "width": 2, "threads": 1},
    **{"adversarial": 1, "ifgsm_steps": 1, "cw_steps": 1},
}

Row = dict[str, Any]


def chosen(beginnings: Sequence[str]) -> dict[str, recipes.Row]:
    """The rows of robust training whose names begin with one of some words.

    Raises:
        ValueError: no name begins with one of them.
    """
    rows = recipes.recipes(robust=True)
    for word in beginnings:
        if not any(name.startswith(word) for name in rows):
            raise ValueError(f"no row begins with {word!r}; robust.py --list has their names")
    return {name: row for name, row in rows.items() if name.startswith(tuple(beginnings))}


def tiny(row: recipes.Row) -> RobustSettings:
    """A row's settings at a size that takes a second."""
    settings = replace(RobustSettings(**row.settings), **TINY)
    settings.check()
    return settings


def smoke(row: recipes.Row) -> Row:
    """Train a row for an epoch and test it as ``robust.py`` does.

    Returns:
        ``model``; ``parameters`` of the printed net on colour images; ``loss``; the tests of ``robust.test``.
    """
    settings = tiny(row)
    printed = RobustSettings(**row.settings)
    classes = 100 if printed.data == "cifar100" else 10
    with torch.device("meta"):
        net = models.build(printed.model, 3, classes, width=printed.width)
    torch.set_num_threads(settings.threads or 1)
    training = Training(settings, cli.load(settings, None), robust.perturbation(settings))
    found = training.train_epoch()
    training.keep_best(training.measure(training.validation)["accuracy_u"])
    training.use_best()
    return {
        "model": settings.model,
        "parameters": sum(p.numel() for p in net.parameters()),
        "loss": found["loss"],
        **robust.test(training),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Train the rows and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", default=ROWS, help="what the names begin with")
    given = parser.parse_args(argv)
    try:
        rows = chosen(given.rows)
    except ValueError as error:
        parser.error(str(error))
    lines = []
    for name, row in rows.items():
        start = time.perf_counter()
        found = smoke(row)
        attacks = ", ".join(key for key in found["robust_u"] if key != "natural")
        seconds = f"{time.perf_counter() - start:.1f}"
        lines.append([name, found["model"], f"{found['parameters']:,}", f"{found['loss']:.2f}", attacks, seconds])
        print(f"{name}: {seconds} s", flush=True)
    print(f"\n{table(['', 'net', 'parameters as printed', 'loss', 'tested under', 'seconds'], lines)}")


if __name__ == "__main__":
    cli.guarded(main)
