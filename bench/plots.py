"""PNG plots from results: speed-up bars, and the share of copy bandwidth over size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import digits_task, text_task
from .baselines import LABELS
from .markdown import count, device_name, group_label
from .results import Result, Row, digest
from .tables import base_of, overview_rows

# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = {
    "native": "#D55E00",
    "triton": "#E69F00",
    "reference": "#7F7F7F",
    "compiled": "#56B4E9",
    "fused_sgd": "#0072B2",
    "fused_adamw": "#117733",
    "cpu_adam": "#F0E442",
    "channel_loop": "#000000",
    "pat": "#CC79A7",
}
_DPI = 200
"""Twice the pixels of a page: a figure of 8.3 inches is shown 830 pixels wide, and a point is 1.4 of them."""
_WIDTH = 8.3
_SMALLEST = 8.5
"""Points of the smallest letters: 12 pixels on a page."""
_BAR = 0.19
"""Inches from a bar to the next one."""
_LINEAR_UP_TO = 3.0
"""Shares above this need a logarithmic axis: a CPU's caches are several times as fast as the memory of a large copy."""


def _caption(result: Result) -> str:
    return f"{device_name(result)}, torch {result['versions']['torch']}"


def _finish(figure: Figure, axes: Axes, result: Result, path: Path) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=_DPI, metadata={"Software": None, "Source": digest(result)})
    plt.close(figure)


def _names(row: Row) -> list[str]:
    """The contenders that have a bar, in the order of their bars."""
    return [name for name in COLOURS if name != "reference" and name in row["contenders"]]


def _bars(rows: list[Row]) -> list[tuple[float, str, float]]:
    """(place, contender, speed-up over the reference); contenders that a case does not have leave no gap."""
    bars: list[tuple[float, str, float]] = []
    place = 0.0
    for row in rows:
        for name in _names(row):
            bars.append((place, name, 1 / row["contenders"][name]["over_reference"]))
            place += 1
        place += 0.7
    return bars


def _ticks(rows: list[Row]) -> list[float]:
    """The middle of each case's bars."""
    middles, place = [], 0.0
    for row in rows:
        bars = len(_names(row))
        middles.append(place + (bars - 1) / 2)
        place += bars + 0.7
    return middles


def _tick_label(row: Row) -> str:
    """A case in two lines, in words."""
    vector = row["tensors"] == 1 and "x" not in row["shape"]
    shape = f"{count(row['elements'])} weights" if vector else row["shape"]
    groups = group_label(row["group_dim"]).partition(" (")[0]
    base = {"sgd": "", "adamw": ", AdamW"}.get(base_of(row), f", {base_of(row)}")
    return f"{shape.replace('x', ' × ')}{base}\n{row['penalty']}, {groups}"


def speed_up_bars(result: Result, path: Path) -> bool:
    """Times faster than the PyTorch reference, by case and contender: the picture of the front page.

    Returns whether there was anything to draw.
    """
    rows = [row for row in overview_rows(result) if _names(row)]
    bars = _bars(rows)
    if not bars:
        return False
    figure, axes = plt.subplots(figsize=(_WIDTH, 1.75 + _BAR * (bars[-1][0] + 1)), layout="constrained")
    for name in COLOURS:
        places = [place for place, of, _ in bars if of == name]
        # Bars start at 1, so that "slower than the reference" points to the left.
        lengths = [value - 1 for _, of, value in bars if of == name]
        if places:
            axes.barh(places, lengths, 0.92, left=1, color=COLOURS[name], label=LABELS[name])
    for place, name, value in bars:
        faster = value >= 1
        axes.annotate(
            f"{value:.3g}×",
            (value, place),
            xytext=(3 if faster else -3, 0),
            textcoords="offset points",
            ha="left" if faster else "right",
            va="center",
            fontsize=_SMALLEST,
            fontweight="bold" if name in result["engines"] else "normal",
        )
    axes.axvline(1, color=COLOURS["reference"], linewidth=1)
    axes.set_xscale("log")
    axes.margins(x=0.1, y=0.01)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.tick_params(axis="x", labelsize=_SMALLEST)
    axes.set_yticks(_ticks(rows), [_tick_label(row) for row in rows], fontsize=_SMALLEST)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as the vectorised PyTorch reference (log scale)", fontsize=9.5)
    legend = figure.legend(
        title=f"One optimizer step: {_caption(result)}",
        title_fontsize=10.5,
        fontsize=9,
        loc="outside upper left",
        alignment="left",
        ncols=3,
        frameon=False,
    )
    for label in legend.get_texts():
        if label.get_text() in (LABELS["fused_sgd"], LABELS["fused_adamw"], LABELS["cpu_adam"]):
            label.set_text(f"{label.get_text()}, dense")
    _finish(figure, axes, result, path)
    return True


def share_over_size(result: Result, path: Path) -> bool:
    """Share of the copy bandwidth over the size of one tensor, l0. Returns whether there was anything to draw."""
    rows = [
        row
        for row in result["rows"]
        if "skipped" not in row
        and row["tensors"] == 1
        and row.get("method", "rvsm") == "rvsm"
        and (row["penalty"], row["group_dim"], row["dtype"], base_of(row)) == ("l0", None, "float32", "sgd")
    ]
    rows.sort(key=lambda row: row["elements"])
    if len(rows) < 2:
        return False
    figure, axes = plt.subplots(figsize=(_WIDTH, 4), layout="constrained")
    highest = 1.0
    for name, colour in COLOURS.items():
        points = [(r["elements"], r["contenders"][name]["share_of_copy"]) for r in rows if name in r["contenders"]]
        if points:
            sizes, shares = zip(*points, strict=True)
            highest = max(highest, *shares)
            axes.plot(sizes, shares, marker="o", markersize=4, color=colour, label=LABELS[name])
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    if highest > _LINEAR_UP_TO:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    axes.set_xlabel("elements of one float32 tensor")
    axes.set_ylabel("counted bytes per second,\nshare of a large copy's")
    axes.set_title(f"Share of copy bandwidth, l0\n{_caption(result)}", fontsize=10, loc="left")
    axes.legend(fontsize=_SMALLEST, frameon=False)
    _finish(figure, axes, result, path)
    return True


PLOTS: dict[str, Callable[[Result, Path], bool]] = {
    "speedup": speed_up_bars,
    "bandwidth": share_over_size,
    "train": digits_task.plot,
    "text": text_task.plot,
}
"""Plot to the function that draws it from a result into a file and returns whether there was anything to draw."""
