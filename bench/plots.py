"""PNG plots from results: speed-up bars, and the share of copy bandwidth over size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .baselines import LABELS
from .results import Result, Row
from .tables import device_name

# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = {
    "native": "#D55E00",
    "triton": "#E69F00",
    "reference": "#7F7F7F",
    "compiled": "#56B4E9",
    "fused_sgd": "#0072B2",
    "channel_loop": "#000000",
    "pat": "#CC79A7",
}
_DPI = 130
_MOST_CASES = 14
_LINEAR_UP_TO = 3.0
"""A CPU's caches are several times as fast as the memory that a large copy uses."""


def _caption(result: Result) -> str:
    return f"{device_name(result)}, torch {result['versions']['torch']}"


def _finish(figure: Figure, axes: Axes, path: Path) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=_DPI, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


def _bar_rows(result: Result) -> list[Row]:
    """The cases worth a bar: one tensor of 25 M elements, layers and models, in float32."""
    small = {"1K", "10K", "100K", "1M", "10M", "100M"}
    rows = [row for row in result["rows"] if "skipped" not in row and row["dtype"] == "float32"]
    chosen = [row for row in rows if row["shape"] not in small] or rows
    # A full run has every penalty of every shape: l0 and the groups tell the story.
    l0 = [row for row in chosen if row["penalty"] == "l0"]
    return (chosen if len(chosen) <= _MOST_CASES else l0)[:_MOST_CASES]


def _bars(rows: list[Row]) -> list[tuple[float, str, float]]:
    """(place, contender, speed-up over the reference); contenders that a case does not have leave no gap."""
    bars: list[tuple[float, str, float]] = []
    place = 0.0
    for row in rows:
        for name in COLOURS:
            if name != "reference" and name in row["contenders"]:
                bars.append((place, name, 1 / row["contenders"][name]["over_reference"]))
                place += 1
        place += 1
    return bars


def _ticks(rows: list[Row]) -> list[float]:
    """The middle of each case's bars."""
    middles, place = [], 0
    for row in rows:
        count = sum(name in row["contenders"] for name in COLOURS if name != "reference")
        middles.append(place + (count - 1) / 2)
        place += count + 1
    return middles


def speed_up_bars(result: Result, path: Path) -> bool:
    """Times faster than the PyTorch reference, by case and contender. Returns whether there was anything to draw."""
    rows = _bar_rows(result)
    bars = _bars(rows)
    if not bars:
        return False
    figure, axes = plt.subplots(figsize=(8.5, 1.2 + 0.17 * (len(bars) + len(rows))))
    for name in COLOURS:
        places = [place for place, of, _ in bars if of == name]
        # Bars start at 1, so that "slower than the reference" points to the left.
        lengths = [value - 1 for _, of, value in bars if of == name]
        if places:
            axes.barh(places, lengths, 0.95, left=1, color=COLOURS[name], label=LABELS[name])
    for place, _, value in bars:
        faster = value >= 1
        axes.annotate(
            f"{value:.3g}×",
            (value, place),
            xytext=(3 if faster else -3, 0),
            textcoords="offset points",
            ha="left" if faster else "right",
            va="center",
            fontsize=6.5,
        )
    axes.axvline(1, color=COLOURS["reference"], linewidth=1)
    axes.set_xscale("log")
    axes.margins(x=0.12, y=0.01)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.set_yticks(_ticks(rows), [row["case"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as the vectorised PyTorch reference (log scale)", fontsize=9)
    axes.set_title(f"One optimizer step\n{_caption(result)}", fontsize=10, loc="left")
    axes.legend(fontsize=7.5, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    _finish(figure, axes, path)
    return True


def share_over_size(result: Result, path: Path) -> bool:
    """Share of the copy bandwidth over the size of one tensor, l0. Returns whether there was anything to draw."""
    rows = [
        row
        for row in result["rows"]
        if "skipped" not in row
        and row["tensors"] == 1
        and (row["penalty"], row["group_dim"], row["dtype"]) == ("l0", None, "float32")
    ]
    rows.sort(key=lambda row: row["elements"])
    if len(rows) < 2:
        return False
    figure, axes = plt.subplots(figsize=(7, 4))
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
    axes.legend(fontsize=7.5, frameon=False)
    _finish(figure, axes, path)
    return True


PLOTS: dict[str, Any] = {"speedup.png": speed_up_bars, "bandwidth.png": share_over_size}
"""File name to function, each from throughput.json."""
