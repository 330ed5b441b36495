"""Models of very many tensors: a step is right, and takes time in proportion."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from builds import DEVICE, few, is_slow
from torch import nn

import rvsm_kernels as rk
from runner import same_bits

MANY = 21_000


def tensors(flat: torch.Tensor, count: int) -> list[nn.Parameter]:
    """Some parameters of three elements with the numbers of a flat tensor, and gradients."""
    params = [nn.Parameter(t.clone()) for t in flat.split(3)]
    for p, grad in zip(params, (flat * 0.1).split(3), strict=True):
        p.grad = grad.clone()
    return params[:count]


@pytest.mark.parametrize("cls", [rk.RVSM, rk.RVSMAdamW])
def test_many_tensors_are_stepped_as_one(engine: str, cls: Any) -> None:
    """Tables of every size: 21,000 tensors get the bits of one tensor with all of their elements."""
    count = few(engine, MANY) if is_slow(engine) else MANY
    flat = torch.randn(3 * count, generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE)
    options = {"lr": 0.1, "penalty": "l0", "lam": 0.05, "beta": 1.0, "engine": engine}
    params, whole = tensors(flat, count), nn.Parameter(flat.clone())
    whole.grad = flat * 0.1
    many, one = cls(params, **options), cls([whole], **options)
    for _ in range(2):
        many.step()
        one.step()
    assert same_bits(torch.cat([p.detach() for p in params]), whole.detach())
    with many.sparse_weights(), one.sparse_weights():
        assert same_bits(torch.cat([p.detach() for p in params]), whole.detach())


def seconds(optimizer: Any, action: str) -> float:
    """The time of one call of a method."""
    start = time.perf_counter()
    result = getattr(optimizer, action)()
    if action == "sparse_weights":
        with result:
            pass
    return time.perf_counter() - start


@pytest.mark.slow
@pytest.mark.parametrize("cls", [rk.RVSM, rk.RVSMAdamW])
def test_time_is_linear(native: str, cls: Any) -> None:
    """Sixteen times the tensors take sixteen times as long, within the noise and the caches; by squares it is 256."""
    optimizers = []
    for count in (MANY // 16, MANY):
        flat = torch.randn(3 * count, device=DEVICE)
        optimizer = cls(tensors(flat, count), lr=0.1, penalty="l0", lam=0.05, beta=1.0, engine=native)
        optimizer.step()
        optimizers.append(optimizer)
    for action in ("step", "state_dict", "sparsity", "penalty_value", "sparse_weights", "sparsify_"):
        # In turns, so that a phase of another process slows down both.
        few, many = zip(*([seconds(optimizer, action) for optimizer in optimizers] for _ in range(9)), strict=True)
        assert min(many) / min(few) < 80, (action, min(many) / min(few))
