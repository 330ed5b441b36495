"""The figures of a run, and of several."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from torch import Tensor

from deep import files

# Okabe and Ito's colours, which colour-blind readers tell apart; markers say the same again.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
MARKERS = "o^sDvPX"


def _save(path: Path, figure: Any) -> None:
    for axes in figure.axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130, metadata={"Software": None})
    plt.close(figure)
    files.write(path, picture.getvalue())


def accuracy_sparsity(
    path: Path, points: dict[str, Sequence[tuple[float, float]]], what: str, line: bool = True
) -> None:
    """Accuracy against sparsity.

    Args:
        points: by label, pairs of shares (sparsity, accuracy).
        what: of which sparsity, for the axis.
        line: whether the points of a label follow each other.
    """
    figure, axes = plt.subplots(figsize=(5.2, 4))
    for i, (label, pairs) in enumerate(points.items()):
        x, y = ([100 * value for value in values] for values in zip(*pairs, strict=True))
        axes.plot(
            x,
            y,
            MARKERS[i % 7] + ("-" if line else ""),
            color=COLOURS[i % 7],
            alpha=0.8,
            markersize=5,
            linewidth=0.8,
            label=label,
        )
    axes.set_xlabel(f"{what}, %")
    axes.set_ylabel("accuracy, %")
    axes.legend(frameon=False, fontsize=8)
    _save(path, figure)


def sweep(path: Path, panels: dict[str, dict[str, dict[float, Sequence[float]]]], what: str) -> None:
    """Quantities over a parameter: means over several runs, with bars from the least to the greatest.

    Args:
        panels: by quantity, one panel each; in it by label, by value of the parameter, the shares that its runs gave.
        what: the parameter, for the axis. The values take even places there, for they may differ by decades.
    """
    figure, all_axes = plt.subplots(1, len(panels), figsize=(3.1 * len(panels), 3.2), squeeze=False)
    for axes, (quantity, labels) in zip(all_axes[0], panels.items(), strict=True):
        values = sorted({value for runs in labels.values() for value in runs})
        for i, (label, runs) in enumerate(labels.items()):
            # A little aside, so that the bars of two labels do not hide each other.
            x = [values.index(value) + 0.12 * (i - (len(labels) - 1) / 2) for value in runs]
            y = [100 * sum(shares) / len(shares) for shares in runs.values()]
            down, up = (
                [abs(100 * end(shares) - mean) for shares, mean in zip(runs.values(), y, strict=True)]
                for end in (min, max)
            )
            style = {"color": COLOURS[i % 7], "marker": MARKERS[i % 7], "linestyle": ("-", "--", ":")[i % 3]}
            axes.errorbar(x, y, (down, up), markersize=5, linewidth=1, capsize=3, label=label, **style)
        axes.set_xticks(range(len(values)), [f"{value:g}" for value in values])
        axes.set_title(f"{quantity}, %", loc="left", fontsize=10)
        axes.set_xlabel(what)
    all_axes[0][0].legend(frameon=False, fontsize=8)
    _save(path, figure)


def _histogram(path: Path, values: dict[str, Tensor], what: str, many: str, log: bool) -> None:
    figure, all_axes = plt.subplots(1, len(values), figsize=(4.4 * len(values), 3.4), squeeze=False, sharex=True)
    for i, (axes, (label, x)) in enumerate(zip(all_axes[0], values.items(), strict=True)):
        axes.hist(x.numpy(), bins=100 if log else 40, color=COLOURS[i % 7], log=log)
        axes.set_title(label, loc="left", fontsize=10)
        axes.set_xlabel(what)
        axes.set_ylabel(many)
    _save(path, figure)


def channel_norms(path: Path, norms: dict[str, Tensor]) -> None:
    """Histograms of ||w_g||_2 of the input channels, side by side (Figure 5 of 002)."""
    _histogram(path, norms, "norm of an input channel", "channels", log=False)


def weights(path: Path, values: dict[str, Tensor]) -> None:
    """Histograms of the weights, side by side; the counts on a log scale (Figure 1 of 002)."""
    _histogram(path, values, "weight", "weights", log=True)


def weight_maps(path: Path, maps: dict[str, Tensor]) -> None:
    """One convolution's weights as pictures, outputs by inputs, for each place of its kernel (dissertation, A.1).

    Args:
        maps: by label, outputs x inputs x height x width; of a larger kernel the middle 3 x 3 is shown.
    """
    places = []
    for weight in maps.values():
        top, left = (max(0, (n - 3) // 2) for n in weight.shape[2:])
        places.append(weight[:, :, top : top + 3, left : left + 3].flatten(2).unbind(2))
    most = max(float(weight.abs().quantile(0.995)) for weight in maps.values()) or 1.0
    shape = len(maps), max(map(len, places))
    figure, all_axes = plt.subplots(*shape, figsize=(1.3 * shape[1], 1.5 * shape[0]), squeeze=False)
    for label, row, pictures in zip(maps, all_axes, places, strict=True):
        for axes, picture in zip(row, pictures, strict=False):
            axes.imshow(picture.numpy(), cmap="RdBu", vmin=-most, vmax=most, aspect="auto", interpolation="nearest")
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(label)
    _save(path, figure)
