"""Tables 1-3 of arXiv 1812.05719, measured beside the printed values.

The paper does not say when an iteration stops. Each run is therefore read at three moments:

- ``converged``: ||w^{t+1} - w^t|| <= 1e-12 for every run of the ensemble;
- ``fixed``: after FIXED_STEPS steps;
- ``printed angle``: each run as soon as the angle between w and w* has come down to the printed one. This takes the
  moment from the first row of the printed table; the other rows can then be compared.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from one_layer_model import angle, population_loss
from one_layer_runs import CONVERGED, PENALTIES, Ensemble, K, random_directions

LR = 0.1
FIXED_STEPS = 100
MOMENTS = {
    "converged": "at convergence",
    "fixed": f"after {FIXED_STEPS} steps",
    "printed angle": "at the printed angle",
}
VARIANTS = {"unit norm": True, "plain": False}
DIMENSIONS = (10, 20, 30, 40, 50)
TITLES = {"l0": "Table 1 (l0)", "tl1": "Table 2 (transformed l1, a = 1)", "l1": "Table 3 (l1)"}

QUANTITIES = ("angle_w", "loss_w", "angle_u", "loss_u", "loss_unit_u", "zeros")
LABELS = dict(
    zip(QUANTITIES, ("θ(w̄,w*)", "f(w̄)", "θ(ū,w*)", "f(ū)", "f(ū/‖ū‖)", "d − ‖ū‖₀"), strict=True),
)
MISSING = math.nan
PRINTED: dict[str, dict[str, tuple[float, ...]]] = {
    "l0": {
        "angle_w": (8.75685e-03, 6.68412e-03, 6.04336e-03, 5.32728e-03, 4.94954e-03),
        "loss_w": (1.91348e-05, 1.11535e-05, 9.11881e-06, 7.08694e-06, 6.11803e-06),
        "angle_u": (3.37294e-01, 5.28306e-01, 6.58853e-01, 7.03679e-01, 8.68654e-01),
        "loss_u": (2.57150e-02, 5.83579e-02, 8.56018e-02, 9.56203e-02, 1.34753e-01),
        "loss_unit_u": (2.61605e-02, 6.05623e-02, 9.01282e-02, 1.01181e-01, 1.44854e-01),
        "zeros": (MISSING, 6, 15, 25, 34),
    },
    "tl1": {
        "angle_w": (2.89468e-02, 2.03823e-02, 2.03790e-02, 1.64539e-02, 1.37370e-02),
        "loss_w": (2.08177e-04, 1.03407e-04, 1.03373e-04, 6.74448e-05, 4.70379e-05),
        "angle_u": (1.05764e-01, 1.42955e-01, 1.70723e-01, 1.93306e-01, 2.09155e-01),
        "loss_u": (3.94756e-03, 8.38579e-03, 1.25855e-02, 1.74556e-02, 2.18136e-02),
        "loss_unit_u": (2.73123e-03, 4.94569e-03, 7.00566e-03, 8.93097e-03, 1.04133e-02),
        "zeros": (MISSING, 1, 4, 9, 10),
    },
    "l1": {
        "angle_w": (5.57468e-02, 3.98867e-02, 3.57740e-02, 2.95779e-02, 2.56507e-02),
        "loss_w": (7.67536e-04, 3.94319e-04, 3.17482e-04, 2.17325e-04, 1.63585e-04),
        "angle_u": (7.52479e-02, 9.48354e-02, 1.00794e-01, 1.01500e-01, 1.02384e-01),
        "loss_u": (2.51967e-03, 4.44921e-03, 5.79414e-03, 7.15888e-03, 8.44975e-03),
        "loss_unit_u": (1.39230e-03, 2.20154e-03, 2.48343e-03, 2.51794e-03, 2.56144e-03),
        "zeros": (MISSING, 0, 1, 2, 4),
    },
}
"""As in the text that we have, where the last row has four numbers and no entry for d = 10. Moved one column to the
left, to d = 10 ... 40, these numbers fit: :func:`deviations` measures both readings."""

Cell = dict[str, float | int]


def printed_value(penalty: str, quantity: str, d: int) -> float:
    """A printed value, NaN where there is none."""
    return PRINTED[penalty][quantity][DIMENSIONS.index(d)]


def quantities(w: Tensor, u: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The rows of a table for each run, ``(rows,)``; where u = 0, NaN for what has no meaning."""
    unit = u / u.norm(dim=1, keepdim=True)
    loss_unit = population_loss(unit.nan_to_num(0.0), target, K)
    return {
        "angle_w": angle(w, target),
        "loss_w": population_loss(w, target, K),
        "angle_u": angle(u, target),
        "loss_u": population_loss(u, target, K),
        "loss_unit_u": torch.where(unit.isnan().any(1), math.nan, loss_unit),
        "zeros": (u == 0).sum(1).to(w.dtype),
    }


def _cell(x: Tensor) -> Cell:
    """Mean and standard deviation over the runs where the value has a meaning."""
    known = x[~x.isnan()]
    return {"mean": known.mean().item(), "std": known.std().item(), "runs": len(known)}


def measure(d: int, seeds: int, generator: torch.Generator) -> dict[str, Any]:
    """One column of all tables, both variants: random unit w* and w^0, the three moments.

    Returns:
        ``cells[variant][penalty][moment][quantity]``, ``steps`` until the last run has converged, and
        ``steps_to_printed[variant][penalty]``, the mean number of steps until the printed angle is reached.
    """
    target, start = random_directions(seeds, d, generator), random_directions(seeds, d, generator)
    keys = [(variant, penalty) for variant in VARIANTS for penalty in PENALTIES]
    runs = Ensemble(
        target, start, [{"penalty": penalty, "unit_norm": VARIANTS[variant], "lr": LR} for variant, penalty in keys]
    )
    goals = [printed_value(penalty, "angle_w", d) for _, penalty in keys]
    goal = torch.tensor(goals, dtype=torch.float64).repeat_interleave(seeds)
    reached = torch.full_like(goal, math.nan)
    weights = {moment: torch.full_like(runs.w, math.nan) for moment in MOMENTS}
    change, steps = math.inf, 0
    while change > CONVERGED or steps < FIXED_STEPS:
        change = runs.step().max().item()
        steps += 1
        now = reached.isnan() & (angle(runs.w, runs.target) <= goal)
        reached[now] = steps
        weights["printed angle"][now] = runs.w[now]
        if steps == FIXED_STEPS:
            weights["fixed"] = runs.w.clone()
        if steps > 100_000:
            raise RuntimeError(f"d = {d}: not converged, ||w^(t+1) - w^t|| is {change:.1e} after {steps} steps")
    weights["converged"] = runs.w

    cells: dict[str, Any] = {variant: {penalty: {} for penalty in PENALTIES} for variant in VARIANTS}
    for moment, w in weights.items():
        rows = quantities(w, runs.u(w), runs.target)
        parts = {name: runs.split(x) for name, x in rows.items()}
        for j, (variant, penalty) in enumerate(keys):
            cells[variant][penalty][moment] = {name: _cell(parts[name][j]) for name in QUANTITIES}
    until: dict[str, dict[str, float]] = {variant: {} for variant in VARIANTS}
    for (variant, penalty), part in zip(keys, runs.split(reached), strict=True):
        until[variant][penalty] = part.nanmean().item()
    return {"d": d, "seeds": seeds, "steps": steps, "cells": cells, "steps_to_printed": until}


def deviations(columns: list[dict[str, Any]], moment: str, variant: str = "unit norm") -> dict[str, dict[str, float]]:
    """(printed - mean) / standard deviation, the largest absolute value over d, by penalty and quantity.

    A printed row of zeros holds whole numbers, so a printed value is one run and the measured spread of single runs
    is its sampling error. ``zeros, moved`` reads the last row one column to the left.
    """
    worst: dict[str, dict[str, float]] = {}
    for penalty in PENALTIES:
        worst[penalty] = {}
        for name in (*QUANTITIES, "zeros, moved"):
            quantity, shift = name.split(",")[0], int(name != name.split(",")[0])
            values = []
            for column in columns:
                i = DIMENSIONS.index(column["d"]) + shift
                printed = PRINTED[penalty][quantity][i] if i < len(DIMENSIONS) else math.nan
                cell = column["cells"][variant][penalty][moment][quantity]
                values.append(abs(printed - cell["mean"]) / cell["std"])
            worst[penalty][name] = max((v for v in values if not math.isnan(v)), default=math.nan)
    return worst


def _text(cell: Cell, quantity: str) -> str:
    return (
        f"{cell['mean']:.1f} ± {cell['std']:.1f}" if quantity == "zeros" else f"{cell['mean']:.3g} ± {cell['std']:.2g}"
    )


def render(columns: list[dict[str, Any]], penalty: str, variant: str) -> str:
    """One table as Markdown: for each quantity the printed row and one row for each moment."""
    lines = [
        f"{TITLES[penalty]}, {variant}: mean ± standard deviation of {columns[0]['seeds']} runs",
        "",
        "| | read | " + " | ".join(f"d = {column['d']}" for column in columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for quantity in QUANTITIES:
        values = [printed_value(penalty, quantity, column["d"]) for column in columns]
        texts = ["" if math.isnan(v) else f"{v:.3g}" for v in values]
        lines.append(f"| {LABELS[quantity]} | printed | " + " | ".join(texts) + " |")
        for moment, label in MOMENTS.items():
            texts = [_text(column["cells"][variant][penalty][moment][quantity], quantity) for column in columns]
            lines.append(f"| | {label} | " + " | ".join(texts) + " |")
    steps = [f"{column['steps_to_printed'][variant][penalty]:.0f}" for column in columns]
    lines.append("| steps to the printed angle | mean | " + " | ".join(steps) + " |")
    return "\n".join(lines)
