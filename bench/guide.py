"""``python -m bench.guide``: the pictures and figures of the site's guides, from short trainings on handwritten digits.

- docs/schedule.png: zeros over the training for three targets, and accuracy over it for five ways to pull.
- docs/u.md, block ``guide:statistics``: accuracy of u with the batch norms' statistics of w, and with its own.
- ``python -m bench.beta`` draws docs/beta.png.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rvsm_kernels as rk

from . import digits, markdown
from .config import ROOT, require
from .report import fill
from .results import environment
from .training import Method, Run

PICTURE = ROOT / "docs" / "schedule.png"
PAGE = ROOT / "docs" / "u.md"
EPOCHS = 24
TARGETS = (0.5, 0.8, 0.95)
PULLS: dict[str, tuple[dict[str, Any], float | None]] = {
    "pull_rate 0.002": ({}, 0.002),
    "pull_rate 0.02": ({}, 0.02),
    "pull_rate 0.2": ({}, 0.2),
    "pull_rate 1": ({}, 1.0),
    "beta 25: lr·β 2.5 at first": ({"beta": 25.0}, None),
}
"""How hard w is pulled: options of the group, and the schedule's pull rate."""

COLOURS = ("#000000", "#0072B2", "#009E73", "#E69F00", "#D55E00")

CHANNELS = {"structure": "coupled", "example_inputs": torch.zeros(2, 1, 8, 8)}
CASES: tuple[tuple[str, dict[str, Any], float, float | None], ...] = (
    ("l0, weights, `pull_rate=0.2`", {"penalty": "l0"}, 0.9, 0.2),
    ("l0, weights, `pull_rate=0.02`", {"penalty": "l0"}, 0.9, 0.02),
    ("l0, weights, `pull_rate=0.002`", {"penalty": "l0"}, 0.9, 0.002),
    ("l0, channels, `pull_rate=0.2`", {"penalty": "l0", **CHANNELS}, 0.75, 0.2),
    ("l0, channels, `pull_rate=0.002`", {"penalty": "l0", **CHANNELS}, 0.5, 0.002),
    ("l1, weights, `beta=6`", {"penalty": "l1", "beta": 6.0}, 0.8, None),
    ("l1, weights, `beta=6`", {"penalty": "l1", "beta": 6.0}, 0.9, None),
    ("tl1, weights, `beta=6`", {"penalty": "tl1", "beta": 6.0}, 0.9, None),
)
"""What is penalised, the options, the share that is asked for, and the schedule's pull rate."""


def led(target: float, rate: float | None) -> Callable[..., rk.SparsitySchedule]:
    """A schedule from an eighth of the steps to five eighths of them."""

    def lead(method: Method, optimizer: torch.optim.Optimizer, steps: int) -> rk.SparsitySchedule:
        groups = "structure" in method.options
        scope, of = ("tensor", "groups") if groups else ("global", "elements")
        span = {"begin": steps // 8, "end": steps * 5 // 8}
        return rk.SparsitySchedule(optimizer, target, **span, of=of, scope=scope, pull_rate=rate)

    return lead


def both(model: nn.Module, optimizer: Any, images: digits.Images, held_out: digits.Images) -> Run:
    """Accuracy of w, of u with the statistics of w, and of u with its own; zeros of u."""
    found = {"w": digits.accuracy(model, held_out)}
    with optimizer.sparse_weights(model):
        found["u"] = digits.accuracy(model, held_out)
    with optimizer.sparse_weights(model, recalibrate=images.batches(digits.BATCH, torch.Generator().manual_seed(0))):
        zeros = digits.zero_channels(model) if optimizer.param_groups[0]["group_dim"] else rk.sparsity(model).share
        return {**found, "own": digits.accuracy(model, held_out), "zeros": zeros}


def trained(options: dict[str, Any], target: float, rate: float | None, seed: int, data: Any, every: int) -> Run:
    """One training: what :func:`both` finds, every so many epochs."""
    method = Method("guide", "", 0.1, {"lam": 0.0, "beta": 1.0, **options})
    return digits.train(method, "native", seed, data, EPOCHS, every, led(target, rate), both)


@contextlib.contextmanager
def two_plots(path: Path, dpi: int) -> Iterator[tuple[Any, Any]]:
    """The axes to the left and to the right of a picture, which is written when they are drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.3))
    yield left, right
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=dpi, metadata={"Software": None})
    plt.close(figure)


def draw(targets: dict[float, Run], pulls: dict[str, Run], left: Any, right: Any) -> None:
    """Zeros over the epochs to the left, accuracy over them to the right."""
    begin, end = EPOCHS / 8, EPOCHS * 5 / 8
    for (target, run), colour in zip(targets.items(), COLOURS[1:], strict=False):
        epochs = [point["epoch"] for point in run["curve"]]
        left.plot(epochs, [100 * point["zeros"] for point in run["curve"]], "o", ms=3, color=colour)
        at = torch.linspace(1, EPOCHS, 200)
        left.plot(at, 100 * target * (1 - (1 - ((at - begin) / (end - begin)).clamp(0, 1)) ** 3), color=colour, lw=1)
        left.annotate(f"{target:.0%}", (EPOCHS, 100 * target), textcoords="offset points", xytext=(4, -3), fontsize=8)
    left.set(xlabel="epoch", ylabel="% zeros of u", ylim=(-3, 100))
    left.set_title("asked for (lines) and got (dots)", loc="left", fontsize=9)
    for (label, run), colour in zip(pulls.items(), COLOURS, strict=True):
        epochs = [point["epoch"] for point in run["curve"]]
        right.plot(epochs, [100 * point["own"] for point in run["curve"]], color=colour, label=label)
    right.set(xlabel="epoch", ylabel="accuracy with u, %")
    right.set_title("90 % asked for, pulled less and more", loc="left", fontsize=9)
    right.legend(fontsize=7, frameon=False)


def statistics_table(data: Any) -> str:
    """The Markdown table of accuracies before and after the statistics are estimated anew."""
    rows = []
    for label, options, target, rate in CASES:
        runs = [trained(options, target, rate, seed, data, EPOCHS)["curve"][-1] for seed in range(3)]
        cells = [markdown.spread([run[key] for run in runs], 1) for key in ("zeros", "w", "u", "own")]
        rows.append([label, *cells])
        print(rows[-1], flush=True)
    head = ("penalty", "zeros of u, %", "accuracy of w, %", "of u, w's statistics", "of u, its own")
    note = f"Three seeds: mean (least–greatest). {markdown.stamp(environment('cpu', 'python -m bench.guide'))}"
    return f"{markdown.table(head, rows)}\n\n{note}"


def main() -> None:
    """Train, draw, and fill in the table."""
    require("numpy", "sklearn", "matplotlib")
    data = digits.train_and_test()
    targets = {target: trained({"penalty": "l0"}, target, 0.2, 0, data, 1) for target in TARGETS}
    pulls = {
        label: trained({"penalty": "l0", **options}, 0.9, rate, 0, data, 1) for label, (options, rate) in PULLS.items()
    }
    for label, run in pulls.items():
        print(f"{label}: {run['curve'][-1]}", flush=True)
    with two_plots(PICTURE, dpi=120) as plots:
        draw(targets, pulls, *plots)
    found = statistics_table(data)
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), "guide", lambda name: found), encoding="utf-8")


if __name__ == "__main__":
    main()
