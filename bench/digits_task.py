"""The main job on real data: a small convolutional net learns handwritten digits, dense and sparse.

``python -m bench train`` trains it with dense SGD (torch's fused step) and with every penalty (the native engine), on
a fixed split with a fixed seed: about a minute. ``--full`` trains it with three seeds and with the plain PyTorch engine
too, which makes the committed markdown. ``python -m bench.digits_task --search`` repeats the search for the settings.

How the settings were chosen: every setting of :func:`grid` was trained on four fifths of the training images and
judged on the last fifth, with three divisions; the test images had no part in it. Chosen was the setting with the most
zeros (zero channels for RGSM) whose accuracy with u stays within ``ALLOWANCE`` of the best dense run's, on average and
within twice that in each division; see :func:`choose`.

What to expect beyond the numbers:

- The cut has to fit the weights. Weights below the cut at the start are pulled to zero together, and batch norm hides
  it: it scales a small layer up again, so w keeps its accuracy while u loses everything. l0 has a narrow band of cuts
  between "few zeros" and that.
- l1 shrinks the weights that survive as well: u differs from w by lam / beta everywhere, and the running statistics of
  batch norm, gathered with w, do not fit u. At the same lam a larger beta makes the difference smaller. l0 keeps the
  survivors as they are.
- tl1 with a = 1 is nearly 2 l1 for weights this small (its slope at 0 is (a + 1) / a), so it shares the bias.
- The group penalty alone does not choose: the channels of a layer start with nearly equal norms and fall below the cut
  all or none. RGSM's group lasso (``group_lasso``) first spreads the norms.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

from . import digits, markdown, training
from .config import RESULTS, MissingPackage, require
from .results import Result, environment, write_json
from .training import (
    SEEDS,
    STEP_MEDIAN,
    STEP_SECONDS,
    Method,
    Panel,
    Run,
    Task,
    last,
    percent,
    percent_axis,
    rows_of,
    sparse_results,
)

EPOCHS = 30

METHODS = (
    Method("dense", "dense SGD", 0.05),
    Method("l0", "RVSM l0", 0.1, {"penalty": "l0", "lam": 1.8e-3, "beta": 3.0}),
    Method("l1", "RVSM l1", 0.1, {"penalty": "l1", "lam": 6e-3, "beta": 6.0}),
    Method("tl1", "RVSM TL1 (a = 1)", 0.1, {"penalty": "tl1", "lam": 3e-3, "beta": 6.0, "a": 1.0}),
    Method(
        "rgsm",
        "RGSM l0 (input channels)",
        0.05,
        {
            "penalty": "l0",
            "structure": "in_channels",
            "lam": 2.7e-3,
            "beta": 6.0,
            "group_scale": True,
            "group_lasso": 1.05e-2,
        },
    ),
)
"""Dense first; what was tried is in bench/NOTES.md and :func:`grid`."""


# ---- the job ---------------------------------------------------------------------------------------------------------


def _check() -> None:
    require("numpy", "sklearn")


def _head(smoke: bool) -> dict[str, Any]:
    return {"epochs": 2 if smoke else EPOCHS, "batch": digits.BATCH}


def _train(method: Method, engine: str, seed: int, data: Any, head: dict[str, Any]) -> Run:
    return digits.train(method, engine, seed, data, head["epochs"])


def _outcome(row: Run) -> str:
    end = row["curve"][-1]
    return f"accuracy with u {end['accuracy_u']:>6.1%}   zeros {end['zeros']:>4.0%}"


def _against_dense(result: Result) -> list[str]:
    """One line per sparse method: what its zeros cost."""
    dense = last(rows_of(result, "dense"), "accuracy_w")
    lines = []
    for method, rows in sparse_results(result):
        loss = statistics.fmean(dense) - statistics.fmean(last(rows, "accuracy_u"))
        share = statistics.fmean(last(rows, "zeros"))
        channels = statistics.fmean(last(rows, "zero_channels"))
        cost = f"u costs {100 * loss:.1f} points" if loss >= 5e-4 else f"u gains {-100 * loss + 0:.1f} points"
        lines.append(
            f"- {method.label} ({method.setting}): {cost} of accuracy for {share:.0%} zeros"
            f" and {channels:.0%} zero channels."
        )
    return lines


_COLUMNS = (
    percent("test accuracy with w, %", "accuracy_w"),
    percent("with u, %", "accuracy_u"),
    percent("zero weights, %", "zeros"),
    percent("zero channels, %", "zero_channels"),
    STEP_SECONDS,
    STEP_MEDIAN,
)


def table(result: Result) -> str:
    """The Markdown table of a result."""
    steps = max((row["steps"] for row in result["rows"]), default=0)
    note = (
        f"{result['epochs']} epochs, {steps} steps of {result['batch']} images."
        " Channels: input channels of the convolutions."
    )
    doubt = "accuracies that differ by less than a point"
    return training.table(result, _COLUMNS, note, _against_dense(result), doubt, "python -m bench train")


TASK = Task("train", METHODS, _check, _head, digits.train_and_test, _train, _outcome, table)


# ---- the plot --------------------------------------------------------------------------------------------------------

_ACCURACY_TICKS = (0, 50, 80, 90, 95, 98, 99, 99.5, 99.8)
_LEAST_ERROR = 1e-3
"""Where the axis of the accuracy ends; less than half an image of the test set."""


def _accuracy_axis(axes: Any) -> None:
    """What is missing to 100 %, on a log scale upside down: differences near the top can be seen, and up is better."""
    axes.set_yscale("log")
    axes.set_ylim(100, 100 * _LEAST_ERROR)
    axes.set_yticks([100 - accuracy for accuracy in _ACCURACY_TICKS])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 - value:g}%")


_PANELS = (
    Panel("test accuracy with u", lambda point: 100 * max(1 - point["accuracy_u"], _LEAST_ERROR), _accuracy_axis),
    Panel("zero weights in u", lambda point: 100 * point["zeros"], percent_axis),
    Panel("zero input channels in u", lambda point: 100 * point["zero_channels"], percent_axis),
)


def plot(result: Result, path: Path) -> bool:
    """Accuracy with u, zero weights and zero channels over the epochs. Returns whether there was anything to draw."""
    return training.plot(result, path, "Handwritten digits", "epoch", _PANELS)


# ---- the search ------------------------------------------------------------------------------------------------------

ALLOWANCE = 0.005
"""What u may lose against the best dense run on the validation images; half of what is asked on the test images."""


def grid() -> Iterator[Method]:
    """Every setting that was tried. The cut depends on lam / beta, so the grid is in beta and lam / beta."""
    by_name = {method.name: method for method in METHODS}
    for lr in (0.02, 0.05, 0.1, 0.2):
        yield replace(by_name["dense"], lr=lr)
    for name, betas, ratios in (
        ("l0", (1, 3, 6), (5e-4, 6e-4, 7e-4)),
        ("l1", (3, 6, 10), (6e-4, 1e-3, 1.6e-3)),
        ("tl1", (3, 6, 10), (3e-4, 5e-4, 8e-4)),
    ):
        for lr, beta, ratio in product((0.05, 0.1), betas, ratios):
            yield _changed(by_name[name], lr, beta, ratio)
    # lam is per group, or times the square root of the group's size with group_scale: 17 or 24 here.
    for scale, lasso, ratios in (
        (True, (0.0,), (5e-3, 7e-3)),
        (False, (0.0,), (8e-2, 1.2e-1)),
        (True, (2e-3, 2.5e-3, 3e-3), (4.5e-4, 1.2e-3)),
        (False, (2e-3, 2.5e-3, 3e-3), (1e-2, 2e-2)),
    ):
        for beta, group_lasso, ratio in product((1, 3), lasso, ratios):
            yield _changed(by_name["rgsm"], 0.1, beta, ratio, group_scale=scale, group_lasso=group_lasso)


def _changed(method: Method, lr: float, beta: float, ratio: float, **options: Any) -> Method:
    lam = float(f"{beta * ratio:.3g}")
    return replace(method, lr=lr, options={**method.options, "lam": lam, "beta": float(beta), **options})


def choose(rows: Sequence[Run]) -> dict[str, Run]:
    """The best setting of each method by the rule at the head of this file; a method without one is left out."""
    dense = max((row for row in rows if row["name"] == "dense"), key=lambda row: statistics.fmean(row["accuracy_u"]))
    chosen = {"dense": dense}
    for row in rows:
        losses = [d - u for d, u in zip(dense["accuracy_u"], row["accuracy_u"], strict=True)]
        if row["name"] == "dense" or statistics.fmean(losses) > ALLOWANCE or max(losses) > 2 * ALLOWANCE:
            continue
        best = chosen.get(row["name"])
        if best is None or _aim(row) > _aim(best):
            chosen[row["name"]] = row
    return chosen


def _aim(row: Run) -> float:
    return statistics.fmean(row["zero_channels" if row["name"] == "rgsm" else "zeros"])


def search(out: Path) -> Result:
    """Train every setting of :func:`grid`, print what came of it and write out/train_search.json."""
    require("numpy", "sklearn")
    from tqdm import tqdm

    engine = training.engines()[-1]
    divisions = [(seed, digits.train_and_validation(seed)) for seed in SEEDS]
    result: Result = {**environment("cpu", "python -m bench.digits_task --search"), "complete": False, "rows": []}
    for method in tqdm(list(grid()), desc="search", unit="setting"):
        runs = [digits.train(method, engine, seed, data, EPOCHS, every=EPOCHS) for seed, data in divisions]
        values = {key: last(runs, key) for key in ("accuracy_w", "accuracy_u", "zeros", "zero_channels")}
        result["rows"].append({**asdict(method), "setting": method.setting, **values})
        write_json(out / "train_search.json", result)
    result["complete"] = True
    write_json(out / "train_search.json", result)
    print(f"\n{search_table(result)}\n\nwrote {out / 'train_search.json'}")
    return result


def search_table(result: Result) -> str:
    """The Markdown table of a search, in the order of the grid; the chosen settings are bold."""
    chosen = choose(result["rows"])
    lines = []
    for row in result["rows"]:
        percents = [markdown.spread(row[key]) for key in ("accuracy_w", "accuracy_u", "zeros", "zero_channels")]
        setting = f"**{row['setting']}**" if row is chosen.get(row["name"]) else row["setting"]
        lines.append([f"{row['label']}: {setting}", *percents])
    header = ["tried", "validation accuracy with w, %", "with u, %", "zero weights, %", "zero channels, %"]
    return "\n\n".join([markdown.table(header, lines), markdown.stamp(result)])


def main() -> None:
    """``python -m bench.digits_task --search``."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.digits_task",
        description="Search for the settings. The main job itself: python -m bench train.",
    )
    parser.add_argument("--search", action="store_true", required=True, help="a quarter of an hour")
    parser.add_argument("--out", type=Path, metavar="DIR", default=RESULTS / "local", help="default: %(default)s")
    given = parser.parse_args()
    try:
        search(given.out)
    except (MissingPackage, OSError) as error:
        sys.exit(f"python -m bench.digits_task: {error}")


if __name__ == "__main__":
    main()
