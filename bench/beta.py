"""``python -m bench.beta``: the picture of docs/targets.md that shows what beta does, from a few short trainings.

Handwritten digits (bench/digits.py). After three dense epochs ``rk.suggest`` gives the lam of 90 % zeros and the beta
that closes 95 % of a gap within several shares of the steps to come; both then stay as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rvsm_kernels as rk

from . import digits
from .config import ROOT, require
from .guide import COLOURS, two_plots

TARGET = 0.9
DENSE, EPOCHS = 3, 20
WITHIN = (1.0, 0.3, 0.1, 0.03, 0.01)
"""Shares of the steps."""


def train(within: float, data: tuple[digits.Images, digits.Images]) -> dict[str, Any]:
    """What came of a training: lr * beta, |w| over the cut, accuracy with w and with u."""
    images, held_out = data
    torch.manual_seed(0)
    model, order, loss_of = digits.Net(), torch.Generator().manual_seed(0), nn.CrossEntropyLoss()
    optimizer = rk.RVSM(rk.param_groups(model, penalty="l0", lam=0.0), lr=0.1, momentum=0.9, weight_decay=5e-4)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, DENSE + EPOCHS)
    found = None
    for epoch in range(DENSE + EPOCHS):
        if epoch == DENSE:
            found = rk.suggest(optimizer, TARGET, steps=EPOCHS * -(-len(images) // digits.BATCH), within=within)
            found.apply()
        for x, y in images.batches(digits.BATCH, order):
            optimizer.zero_grad()
            loss_of(model(x), y).backward()
            optimizer.step()
        decay.step()
    assert found is not None
    weights: Tensor = torch.cat([p.detach().abs().flatten() for p in model.parameters() if p.dim() >= 2])
    row = {"rate": found[0].lr * found[0].beta, "sizes": weights / found[0].cut, "w": digits.accuracy(model, held_out)}
    with optimizer.sparse_weights(model):
        digits.make_statistics(model, images, digits.BATCH)
        return {**row, "u": digits.accuracy(model, held_out), "zeros": rk.sparsity(model).share}


def draw(rows: list[dict[str, Any]], left: Any, right: Any) -> None:
    """Sizes of the weights to the left, what the network is worth to the right."""
    for row, within, colour in zip(rows, WITHIN, COLOURS, strict=True):
        sizes = row["sizes"].clamp(1e-4, 30).sort().values[::50]
        share = torch.arange(len(sizes)) / len(sizes) * 100
        left.plot(sizes, share, color=colour, label=f"{within:.0%}: lr·β {row['rate']:.2g}")
    left.axvline(1, color="#888888", linestyle=":")
    left.set(xscale="log", xlabel="|w| over the cut", ylabel="% of the weights that are smaller")
    left.set_title("after training: what is below the cut", loc="left", fontsize=9)
    left.legend(title="95 % of a gap within", title_fontsize=7, fontsize=7, frameon=False, loc="upper left")
    rates = [row["rate"] for row in rows]
    for key, marker, dashes in (("w", "s", ":"), ("u", "o", "-")):
        values = [100 * row[key] for row in rows]
        right.plot(rates, values, marker=marker, linestyle=dashes, color="#0072B2", label=f"accuracy with {key}")
    zeros = [100 * row["zeros"] for row in rows]
    right.plot(rates, zeros, marker="^", linestyle="--", color="#D55E00", label="zeros of u")
    right.set(xscale="log", xlabel="lr·β at first", ylabel="%")
    right.set_title("what it is worth", loc="left", fontsize=9)
    right.legend(fontsize=7, frameon=False)


def main(path: Path = ROOT / "docs" / "beta.png") -> None:
    """Train and draw."""
    require("numpy", "sklearn", "matplotlib")
    data, rows = digits.train_and_test(), []
    for within in WITHIN:
        rows.append(train(within, data))
        told = {key: round(value, 4) for key, value in rows[-1].items() if key != "sizes"}
        small = (rows[-1]["sizes"] < 0.01).float().mean().item()
        print(f"within {within:g}: {told}, below a hundredth of the cut {small:.1%}", flush=True)
    with two_plots(path, dpi=80) as plots:
        draw(rows, *plots)


if __name__ == "__main__":
    main()
