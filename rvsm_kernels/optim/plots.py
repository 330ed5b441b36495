"""Figures of what is sparse, for people who look; matplotlib is an extra, imported only here."""

from __future__ import annotations

from typing import Any

import torch

from ..method.options import shown
from ..model.sparsity import SparsityReport
from .cuts_now import cuts_now
from .unwrap import optimizer_in

_BINS = 80
_MOST = 40  # layers with a name each
_BLUE, _ORANGE = "#0072B2", "#E69F00"  # of Okabe and Ito, whom everyone can tell apart


def plot(what: Any) -> Any:
    """Draw the sparsity of each parameter and, of an optimizer, the magnitudes of its weights with their cuts.

    ::

        rk.plot(optimizer).savefig("sparsity.png")

    Args:
        what: a :class:`SparsityReport` (``optimizer.sparsity()``, ``rk.sparsity(model)``), or an optimizer. Of an
            optimizer the second picture has a histogram of |w|, or of ||w_G||, over the cut of each parameter: what
            lies left of 1 is 0 in u.

    Returns:
        A ``matplotlib.figure.Figure`` that belongs to no window.

    Raises:
        ImportError: no matplotlib (``pip install matplotlib``).
        TypeError: neither a report nor an optimizer.
    """
    from matplotlib.figure import Figure  # an extra

    if isinstance(what, SparsityReport):
        figure = Figure(figsize=(7, _height(what)), layout="constrained")
        _draw_shares(figure.subplots(), what)
        return figure
    if not hasattr(what, "param_groups"):
        raise TypeError(f"plot draws a SparsityReport or an optimizer, not {shown(what)}")
    optimizer = optimizer_in(what, "plot")
    report = optimizer.sparsity()
    figure = Figure(figsize=(12, _height(report)), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_shares(left, report)
    _draw_magnitudes(right, optimizer)
    return figure


def _height(report: SparsityReport) -> float:
    return 2 + 0.22 * min(len(report.rows), _MOST)


def _draw_shares(axes: Any, report: SparsityReport) -> None:
    """A bar a parameter, the first on top; of many parameters there is no room for names."""
    rows = report.rows
    places, shares = range(len(rows)), [100 * row.share for row in rows]
    if len(rows) <= _MOST:
        axes.barh(places, shares, color=_BLUE, label="zero elements")
    else:  # matplotlib takes a minute for thousands of bars
        edges = [k - 0.5 for k in range(len(rows) + 1)]
        axes.stairs(shares, edges, orientation="horizontal", fill=True, color=_BLUE, label="zero elements")
    if any(row.groups not in (0, row.numel) for row in rows):
        axes.plot([100 * row.group_share for row in rows], places, "D", color=_ORANGE, label="zero groups")
        axes.legend(loc="lower right")
    axes.axvline(100 * report.share, color="black", linewidth=1, linestyle="--")
    axes.set(xlim=(0, 100), xlabel="zeros of u, %", title=f"{report.share:.2%} of {report.total.numel:,} are zero")
    named = rows if len(rows) <= _MOST else []
    axes.set_yticks(range(len(named)), [row.name for row in named], parse_math=False)  # a name may have a $
    axes.invert_yaxis()


def _draw_magnitudes(axes: Any, optimizer: Any) -> None:
    """All magnitudes over the cuts of their parameters, in powers of ten; exact zeros are left out."""
    counts = torch.zeros(_BINS, dtype=torch.float64)
    for now in cuts_now(optimizer):
        if now.cut > 0:
            magnitudes = now.candidates.magnitudes().double().cpu()
            magnitudes = magnitudes[magnitudes > 0]  # without NaN, too
            ratios = (magnitudes / now.cut).log10()
            ratios[magnitudes == now.cut] = -1e-9  # what is as large as the cut goes to zero
            counts += torch.histc(ratios.clamp(-4, 4), _BINS, min=-4, max=4)
    edges = [8 * k / _BINS - 4 for k in range(_BINS + 1)]
    if float(counts.sum()) > 0:
        axes.stairs(counts.tolist(), [10**x for x in edges], fill=True, color=_BLUE)
        axes.axvline(1, color=_ORANGE, linewidth=2, label="cut")
        axes.legend(loc="upper right")
    axes.set(xscale="log", xlabel="magnitude / cut", ylabel="count", title="magnitudes of w; left of the cut u is 0")
