"""Figures 2, 4, 5, 6 and 7 of arXiv 1812.05719 as PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import rvsm_kernels as rk
from one_layer_model import angle
from one_layer_runs import PENALTIES, Ensemble, penalty_of, random_directions, trace

# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = {"l0": "#D55E00", "tl1": "#009E73", "l1": "#0072B2"}
NAMES = {"l0": "ℓ0", "tl1": "TL1, a = 1", "l1": "ℓ1"}


def _save(figure: Figure, path: Path) -> str:
    figure.savefig(path, dpi=130, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return path.name


def level_lines(out: Path) -> str:
    """Figure 2: level lines of l1 and of TL1 with a = 100, 1 and 0.01 on the plane."""
    x = torch.linspace(-1, 1, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(x, x)
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.3))
    panels = [
        ("l1", 1.0, "ℓ1"),
        ("tl1", 100.0, "TL1, a = 100"),
        ("tl1", 1.0, "TL1, a = 1"),
        ("tl1", 0.01, "TL1, a = 0.01"),
    ]
    for panel, (penalty, a, title) in zip(axes, panels, strict=True):
        values = penalty_of(grid, penalty, a).reshape(len(x), len(x))
        # With a = 0.01 every value off the axes is near 2: lines at even steps of the value would all be at the axes.
        panel.contour(
            x, x, values, levels=np.quantile(values, np.linspace(0.05, 0.95, 10)), cmap="viridis", linewidths=1
        )
        panel.set_title(title, fontsize=10)
        panel.set_aspect("equal")
    return _save(figure, out / "figure2_level_lines.png")


def thresholding(out: Path) -> str:
    """Figure 4: soft, hard and TL1 thresholding at lambda = 1/2, TL1 below and above its critical point.

    The text does not say which a; lambda = a^2/(2(a+1)) at a = 1.618, so a = 2 is sub-critical (continuous) and a = 1
    super-critical (it jumps).
    """
    x = torch.linspace(-2.5, 2.5, 2001, dtype=torch.float64)
    panels = [
        ("l1", 1.0, "soft (ℓ1)"),
        ("l0", 1.0, "hard (ℓ0)"),
        ("tl1", 2.0, "TL1, a = 2"),
        ("tl1", 1.0, "TL1, a = 1"),
    ]
    figure, axes = plt.subplots(2, 2, figsize=(7, 6), sharex=True, sharey=True)
    for panel, (penalty, a, title) in zip(axes.flat, panels, strict=True):
        y = rk.prox(x, penalty, 0.5, a)
        jumps = y.diff().abs() > 0.1  # no line where the function jumps
        panel.plot(x, torch.where(torch.cat([jumps, jumps[-1:]]), torch.nan, y), color=COLOURS[penalty])
        panel.plot(x, x, color="#7F7F7F", linewidth=0.6, linestyle=":")
        panel.set_title(title, fontsize=10)
    figure.suptitle("Thresholding at λ = 1/2", fontsize=11)
    return _save(figure, out / "figure4_thresholding.png")


def huber(x: Tensor, penalty: str, lam: float, a: float = 1.0) -> Tensor:
    """min over y of (y - x)^2/2 + lam P(y) for each entry of x, by the prox; for l1 it is Huber's function."""
    y = rk.prox(x, penalty, lam, a)
    return (y - x).square() / 2 + lam * penalty_of(y.reshape(-1, 1), penalty, a).reshape(x.shape)


def huber_functions(out: Path, lam: float = 0.05) -> str:
    """Figure 5: the Huber functions of l0, l1 and TL1 at lambda = 0.05. The text gives no a; here a = 1."""
    x = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    figure, axes = plt.subplots(figsize=(5.5, 3.6))
    for penalty in PENALTIES:
        axes.plot(x, huber(x, penalty, lam), color=COLOURS[penalty], label=NAMES[penalty])
    axes.set(xlabel="x", ylabel="f(x)", title=f"Huber functions, λ = {lam:g}")
    _plain(axes)
    return _save(figure, out / "figure5_huber.png")


def gamma_angles(out: Path, generator: torch.Generator, d: int = 10, count: int = 100) -> tuple[str, dict[str, Any]]:
    """Figure 6: the angle between X and its thresholded self, X uniform on the sphere, lambda/beta = 0.05.

    The text gives no d. With l0 a larger d leaves many X without any entry above the cut, and so without an angle.
    """
    x = random_directions(count, d, generator)
    figure, axes = plt.subplots(figsize=(7, 3.6))
    numbers: dict[str, Any] = {"d": d, "realizations": count}
    for penalty in PENALTIES:
        gamma = angle(x, rk.prox(x, penalty, 0.05, 1.0))
        mean, undefined = gamma.nanmean().item(), int(gamma.isnan().sum())
        numbers[penalty] = {"mean": mean, "undefined": undefined}
        axes.plot(gamma, color=COLOURS[penalty], linewidth=1, label=f"{NAMES[penalty]}: mean {mean:.3f}")
    axes.set(xlabel="realization of X", ylabel="γ = θ(X, T(X))", title=f"λ/β = 0.05, d = {d}")
    _plain(axes)
    return _save(figure, out / "figure6_gamma.png"), numbers


def lagrangian(out: Path, generator: torch.Generator, d: int = 30, lr: float = 0.1) -> tuple[str, dict[str, Any]]:
    """Figure 7: L_beta over the iterations, one run for each penalty from the same start, unit norm."""
    target, start = random_directions(1, d, generator), random_directions(1, d, generator)
    runs = Ensemble(target, start, [{"penalty": penalty, "unit_norm": True, "lr": lr} for penalty in PENALTIES])
    values = trace(runs, 150).lagrangian
    figure, axes = plt.subplots(figsize=(7, 3.6))
    for penalty, line in zip(PENALTIES, values.T, strict=True):
        axes.plot(line, color=COLOURS[penalty], label=NAMES[penalty])
    axes.set(yscale="log", xlabel=f"iteration (lr = {lr:g})", ylabel="L_β(w, u)", title=f"d = {d}, λ = 1e-4, β = 4e-3")
    _plain(axes)
    last = dict(zip(PENALTIES, values[-1].tolist(), strict=True))
    return _save(figure, out / "figure7_lagrangian.png"), {"d": d, "lr": lr, "start": values[0].tolist(), "last": last}


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
