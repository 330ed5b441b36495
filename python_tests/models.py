"""Small problems to train on, and the loop that trains."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from builds import generator
from torch import Tensor, nn

import rvsm_kernels as rk
from runner import same_bits


class Small(nn.Module):
    """A convolution, a norm and two linear layers: every kind of parameter that a user has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 7, 3, padding=1)
        self.norm = nn.BatchNorm2d(7)
        self.hidden = nn.Linear(7 * 36, 13)
        self.head = nn.Linear(13, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images of 6 by 6."""
        x = torch.tanh(self.norm(self.conv(x)))
        return self.head(torch.tanh(self.hidden(x.flatten(1))))


def small(dtype: torch.dtype = torch.float32, seed: int = 0) -> Small:
    """The model of a seed."""
    torch.manual_seed(seed)
    return Small().to(dtype)


BATCHES = 10


@functools.cache
def batch(k: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """One of ten batches: images of four classes that differ in their mean."""
    gen = generator(1000 + k)
    y = torch.randint(4, (16,), generator=gen)
    x = torch.randn(16, 3, 6, 6, generator=gen, dtype=torch.float64)
    x[:, 0] += (y[:, None, None] - 1.5) * 0.4
    return x.to(dtype), y


def backward(model: nn.Module, optimizer: torch.optim.Optimizer, k: int, scale: float = 1.0) -> Tensor:
    """The gradients of the k-th batch; returns the loss."""
    dtype = next(model.parameters()).dtype
    x, y = batch(k % BATCHES, dtype)
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    (loss * scale).backward()
    return loss.detach()


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    after: Callable[[], Any] = lambda: None,
) -> list[float]:
    """Train on the batches of `steps`, one each; returns the losses."""
    losses = []
    for k in steps:
        losses.append(backward(model, optimizer, k).item())
        optimizer.step()
        after()
    return losses


SPLIT: dict[str, Any] = {"penalty": "l0", "lam": 2e-3, "beta": 0.5}
BASE: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}


def optimizer_of(model: nn.Module, engine: str, **options: Any) -> rk.RVSM:
    """RVSM over the weights of a model as a user sets it up."""
    return rk.RVSM(rk.param_groups(model, **SPLIT), **{**BASE, **options}, engine=engine)


def weights(model: nn.Module) -> list[Tensor]:
    """Copies of all parameters."""
    return [p.detach().clone() for p in model.parameters()]


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    """Bit for bit."""
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert same_bits(p, q), f"{name} differs by {(p - q).abs().max().item()}"


def assert_same_state(model: nn.Module, other: nn.Module) -> None:
    """Every element of the state_dicts, bit for bit; zeros of either sign are equal."""
    a, b = model.state_dict(), other.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert same_bits(a[name], b[name]) or torch.equal(a[name], b[name]), name


def run_afresh(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A fresh process, in a folder."""
    path = os.pathsep.join([str(Path(__file__).parents[0]), str(Path(__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200, check=False
    )


# ---- for param_groups ------------------------------------------------------------------------------------------------


class Conv1D(nn.Module):
    """transformers' linear layer: (inputs, outputs)."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))


Conv1D.__module__ = "transformers.pytorch_utils"


def dims_of(model: nn.Module, structure: str) -> dict[str, Any]:
    """The group_dim of what is penalised, by name."""
    groups = rk.param_groups(model, structure=structure)
    return {name: g["group_dim"] for g in groups for name, _ in g["params"] if g.get("penalty", "l0") is not None}
