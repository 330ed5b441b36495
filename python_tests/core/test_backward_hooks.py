"""The optimizer in backward: one for each parameter, stepped by a hook as soon as the gradient is there."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from builds import DEVICE
from torch import Tensor, nn

import rvsm_kernels as rk
from runner import same_bits


def model_of(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to(DEVICE, dtype)


def loss_of(model: nn.Module, k: int) -> Tensor:
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(k))
    return model(x.to(DEVICE, next(model.parameters()).dtype)).square().mean()


def in_hooks(groups: list[dict[str, Any]], cls: type, options: dict[str, Any]) -> dict[Tensor, Any]:
    """An optimizer for each parameter, stepped in backward(); the gradient is gone afterwards."""
    optimizers: dict[Tensor, Any] = {}

    def hook(p: Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()
        assert p.grad is None

    for group in groups:
        for name, p in group["params"]:
            optimizers[p] = cls([{**group, "params": [(name, p)]}], **options)
            p.register_post_accumulate_grad_hook(hook)
    return optimizers


CASES: list[tuple[type, dict[str, Any], dict[str, Any], torch.dtype]] = [
    (rk.RVSM, {"penalty": "l1"}, {"momentum": 0.9, "weight_decay": 1e-2}, torch.float32),
    (rk.RVSM, {"penalty": "l0", "group_dim": 1, "method": "admm"}, {"momentum": 0.9}, torch.float32),
    (rk.RVSM, {"penalty": "topk", "density": 0.5}, {"unit_norm": True}, torch.float32),
    (rk.RVSM, {"penalty": "l1"}, {"momentum": 0.9}, torch.bfloat16),
    (rk.RVSM, {"penalty": "l1", "master_weights": True}, {"momentum": 0.9}, torch.bfloat16),
    (rk.RVSMAdamW, {"penalty": "tl1", "method": "rvsm-delayed"}, {}, torch.float32),
    (rk.RVSMAdamW, {"penalty": "l0", "group_dim": 0}, {"amsgrad": True}, torch.float32),
    (rk.RVSMAdamW, {"penalty": "l1", "rounding": "stochastic"}, {}, torch.bfloat16),
]


@pytest.mark.parametrize(("cls", "split", "options", "dtype"), CASES)
def test_as_one_optimizer(
    engine: str, cls: type, split: dict[str, Any], options: dict[str, Any], dtype: torch.dtype
) -> None:
    """The same bits, weights and states, as one optimizer for all parameters; lr is edited on the way."""
    options = {"lr": 0.05, "engine": engine, **options}
    split = {"lam": 1e-2, "beta": 1.0, **split}
    together, apart = model_of(dtype), model_of(dtype)
    one = cls(rk.param_groups(together, **split), **options)
    many = in_hooks(rk.param_groups(apart, **split), cls, options)
    for k in range(5):
        loss_of(together, k).backward()
        one.step()
        one.zero_grad()
        loss_of(apart, k).backward()
        for optimizer in (one, *many.values()):
            for group in optimizer.param_groups:
                group["lr"] *= 0.9
    for p, q in zip(together.parameters(), apart.parameters(), strict=True):
        assert same_bits(p.detach(), q.detach())
        states, others = one.state[p], many[q].state[q]
        assert states.keys() == others.keys()
        assert all(same_bits(states[name], others[name]) for name in states)


def test_sparse_weights_of_all(engine: str) -> None:
    """u of every parameter inside, w bit for bit afterwards; a backward() in between raises, as a step does."""
    model = model_of()
    many = in_hooks(rk.param_groups(model, penalty="l1", lam=0.05, beta=1.0), rk.RVSM, {"lr": 0.1, "engine": engine})
    loss_of(model, 0).backward()
    before = [p.detach().clone() for p in model.parameters()]
    with contextlib.ExitStack() as stack:
        for optimizer in many.values():
            stack.enter_context(optimizer.sparse_weights())
        assert all((p == 0).any() for p in model.parameters() if p.dim() == 2)
        with pytest.raises(RuntimeError, match=r"step\(\)"):
            loss_of(model, 1).backward()
    assert all(same_bits(p.detach(), w) for p, w in zip(model.parameters(), before, strict=True))
    model.zero_grad()
    loss_of(model, 1).backward()
    assert not any(same_bits(p.detach(), w) for p, w in zip(model.parameters(), before, strict=True))
