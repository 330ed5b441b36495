"""RVSMWrapper around torch's optimizers: one pull, then their own step."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn

import rvsm_kernels as rk

T = torch.optim
SPLIT: dict[str, Any] = {"penalty": "l0", "lam": 2e-2, "beta": 0.5}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda params: T.SGD(params, lr=0.01, momentum=0.9),
    "AdamW": lambda params: T.AdamW(params, lr=0.01, amsgrad=True),
    "AdamW, fused": lambda params: T.AdamW(params, lr=0.01, fused=True),
    "NAdam": lambda params: T.NAdam(params),
    "RAdam": lambda params: T.RAdam(params),
    "Adafactor": lambda params: T.Adafactor(params),
    "Muon": lambda params: T.Muon(params, lr=0.01),
    "ASGD": lambda params: T.ASGD(params),
    "RMSprop": lambda params: T.RMSprop(params),
    "Rprop": lambda params: T.Rprop(params),
    "LBFGS": lambda params: T.LBFGS(params, lr=0.1),
}


def model_of() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False))
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=gen) * 0.3)
    return model


def train(model: nn.Module, optimizer: Any, steps: Iterable[int], scaler: Any = None) -> None:
    """Steps over batches of their own; LBFGS, which needs a closure, over one."""
    lbfgs = isinstance(getattr(optimizer, "optimizer", optimizer), T.LBFGS)
    for k in steps:
        gen = torch.Generator().manual_seed(0 if lbfgs else k)
        x, y = torch.randn(16, 6, generator=gen), torch.randn(16, 3, generator=gen)

        def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            (loss if scaler is None else scaler.scale(loss)).backward()
            return loss

        if lbfgs:
            optimizer.step(closure)
        elif scaler is not None:
            closure()
            scaler.step(optimizer)
            scaler.update()
        else:
            closure()
            optimizer.step()


def apart(a: nn.Module, b: nn.Module) -> float:
    return max(float((p - q).detach().abs().max()) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("lasso", [0.0, 0.1])
@pytest.mark.parametrize("maximize", [True, False])
def test_around_adamw_it_is_rvsm_adamw(
    engine: str, on_cpu: None, decoupled: bool, lasso: float, maximize: bool
) -> None:
    ours, theirs = model_of(), model_of()
    options = {**SPLIT, "decoupled": decoupled, "group_dim": 0, "group_lasso": lasso, "engine": engine}
    train(ours, rk.RVSMAdamW(ours.parameters(), lr=0.01, maximize=maximize, **options), range(8))
    wrapped = T.AdamW(theirs.parameters(), lr=0.01, maximize=maximize)
    train(theirs, rk.RVSMWrapper(wrapped, **options), range(8))
    assert apart(model_of(), ours) > 0 and apart(ours, theirs) < 1e-6


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("method", ["rvsm", "admm"])
@pytest.mark.parametrize("decoupled", [True, False])
def test_it_resumes_bit_for_bit(name: str, method: str, decoupled: bool) -> None:
    options = {**SPLIT, "method": method, "decoupled": decoupled}
    straight, first = model_of(), model_of()
    train(straight, rk.RVSMWrapper(OPTIMIZERS[name](straight.parameters()), **options), range(12))
    optimizer = rk.RVSMWrapper(OPTIMIZERS[name](first.parameters()), **options)
    train(first, optimizer, range(6))
    second = model_of()
    second.load_state_dict(first.state_dict())
    resumed = rk.RVSMWrapper(OPTIMIZERS[name](second.parameters()))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.param_groups[0]["method"] == method and resumed.optimizer.param_groups is resumed.param_groups
    train(second, resumed, range(6, 12))
    assert all(torch.isfinite(p).all() for p in straight.parameters())
    assert apart(straight, second) == 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_a_penalty_it_is_the_optimizer(name: str) -> None:
    ours, theirs = model_of(), model_of()
    train(ours, rk.RVSMWrapper(OPTIMIZERS[name](ours.parameters()), penalty=None), range(5))
    train(theirs, OPTIMIZERS[name](theirs.parameters()), range(5))
    if name == "LBFGS":  # the closure is evaluated once more
        assert apart(ours, theirs) < 1e-5
    else:
        assert apart(ours, theirs) == 0


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("decoupled", [True, False])
def test_a_grad_scaler(fused: bool, decoupled: bool) -> None:
    """A scale in the step or before it, as without one; a step that is skipped pulls nothing."""
    ours, theirs = model_of(), model_of()
    optimizer = rk.RVSMWrapper(T.AdamW(ours.parameters(), lr=0.01, fused=fused), **SPLIT, decoupled=decoupled)
    assert optimizer._step_supports_amp_scaling == (fused and decoupled)
    train(ours, optimizer, range(4), torch.amp.GradScaler("cpu", init_scale=1024.0))
    train(theirs, rk.RVSMWrapper(T.AdamW(theirs.parameters(), lr=0.01), **SPLIT, decoupled=decoupled), range(4))
    assert apart(ours, theirs) < 1e-5
    before = copy.deepcopy(ours)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    for p in ours.parameters():
        p.grad = torch.full_like(p, float("inf"))
    scaler.step(optimizer)
    assert apart(before, ours) == 0
    assert not hasattr(optimizer.optimizer, "found_inf") and not hasattr(optimizer, "found_inf")


def test_u_is_that_of_rvsm() -> None:
    ours = model_of()
    optimizer = rk.RVSMWrapper(T.SGD(ours.parameters(), lr=0.1), **SPLIT)
    train(ours, optimizer, range(3))
    twin = rk.RVSM(ours.parameters(), **SPLIT)
    assert float(optimizer.penalty_value()) == float(twin.penalty_value())
    assert str(optimizer.sparsity()) == str(twin.sparsity())
    with optimizer.sparse_weights():
        zeros = sum(int((p == 0).sum()) for p in ours.parameters())
        with pytest.raises(RuntimeError, match="sparse_weights"):
            optimizer.step()
    assert zeros > 0
    optimizer.sparsify_()
    assert sum(int((p == 0).sum()) for p in ours.parameters()) == zeros


def test_groups_schedulers_and_hooks() -> None:
    model = model_of()
    groups = rk.param_groups(model, penalty="l1", lam=1e-3, beta=0.1, group_dim=1)
    optimizer = rk.RVSMWrapper(T.RMSprop(groups, lr=0.1), **SPLIT)
    assert optimizer.param_groups[0]["penalty"] == "l1" and optimizer.param_groups[0]["group_dim"] == 1
    assert isinstance(optimizer, torch.optim.Optimizer)
    called: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: called.append("ours"))
    optimizer.optimizer.register_step_post_hook(lambda *_: called.append("theirs"))
    scheduler = T.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    train(model, optimizer, range(2))
    scheduler.step()
    assert called == ["ours", "theirs"] * 2 and optimizer.optimizer.param_groups[0]["lr"] == 0.05
    extra = nn.Parameter(torch.ones(3, 2))
    optimizer.add_param_group({"params": [("extra", extra)], "lr": 0.01})
    assert (
        optimizer.optimizer.param_groups[-1]["lam"] == SPLIT["lam"] and len(optimizer.param_groups) == len(groups) + 1
    )
    with pytest.raises(ValueError, match="Invalid lam value"):
        optimizer.add_param_group({"params": [("another", nn.Parameter(torch.ones(2)))], "lam": -1.0})
    assert len(optimizer.param_groups) == len(groups) + 1


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies(how: str) -> None:
    model = model_of()
    optimizer = rk.RVSMWrapper(T.NAdam(model.parameters()), **SPLIT, method="admm")
    train(model, optimizer, range(3))
    other = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    theirs = model_of()
    for p, q in zip(other.param_groups[0]["params"], model.parameters(), strict=True):
        assert p is not q and torch.equal(p, q)
    for module, p in zip((theirs[0], theirs[2]), other.param_groups[0]["params"], strict=True):  # type: ignore[index]
        module.weight = p
    train(model, optimizer, range(3, 6))
    train(theirs, other, range(3, 6))
    assert apart(model, theirs) == 0


def test_what_cannot_be_wrapped() -> None:
    params = list(model_of().parameters())
    with pytest.raises(TypeError, match="is no torch optimizer"):
        rk.RVSMWrapper(params)
    with pytest.raises(TypeError, match="makes sparse weights already"):
        rk.RVSMWrapper(rk.RVSM(params))
    with pytest.raises(ValueError, match="Invalid beta value"):
        rk.RVSMWrapper(T.SGD(params), beta=-1.0)
    with pytest.raises(TypeError, match="no option 'unit_norm'"):
        rk.RVSMWrapper(T.SGD(params), unit_norm=True)
    without_lr = T.SGD(params)
    del without_lr.param_groups[0]["lr"]
    with pytest.raises(ValueError, match="group 0 of SGD has no lr"):
        rk.RVSMWrapper(without_lr)
    assert "penalty" not in without_lr.param_groups[0]
    with pytest.raises(TypeError, match="needs a closure"):
        rk.RVSMWrapper(T.LBFGS(params)).step()
    sparse = rk.RVSMWrapper(T.SparseAdam(params), **SPLIT)
    params[0].grad = torch.ones_like(params[0]).to_sparse()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        sparse.step()
