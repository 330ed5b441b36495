"""RVSMAdamW beside torch.optim.AdamW: the identities, its state, its count of steps."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rvsm_kernels as rk
from runner import same_bits

SHAPES = ((7, 5), (300,), (3, 4, 3, 3), ())
BASES: dict[str, dict[str, Any]] = {
    "plain": {"lr": 1e-2},
    "decay": {"lr": 1e-2, "weight_decay": 0.3, "betas": (0.8, 0.9), "eps": 1e-5},
    "amsgrad": {"lr": 1e-2, "amsgrad": True},
    "maximize": {"lr": 1e-2, "maximize": True, "amsgrad": True, "weight_decay": 0.0},
    "no first moment": {"lr": 1e-2, "betas": (0.0, 0.9)},
}
SPLIT = {"penalty": "l0", "lam": 2e-2, "beta": 0.5}


def params_of(dtype: torch.dtype = torch.float64, seed: int = 0) -> list[nn.Parameter]:
    gen = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=gen, dtype=torch.float64).to(dtype)) for s in SHAPES]


def set_gradients(k: int, *of: list[nn.Parameter], missing: bool = True) -> None:
    """The same gradients for several lists of parameters; of the second parameter one in three is missing."""
    gen = torch.Generator().manual_seed(100 + k)
    for place, same in enumerate(zip(*of, strict=True)):
        grad = torch.randn(same[0].shape, generator=gen, dtype=torch.float64)
        for p in same:
            p.grad = None if missing and place == 1 and k % 3 == 1 else grad.to(p.dtype, copy=True)


def closest(ours: list[nn.Parameter], theirs: list[nn.Parameter], bound: float) -> None:
    for p, q in zip(ours, theirs, strict=True):
        assert float((p - q).abs().max()) <= bound * max(1.0, float(q.abs().max()))


@pytest.mark.parametrize("base", BASES)
def test_without_a_penalty_it_is_adamw(engine: str, on_cpu: None, base: str) -> None:
    ours, theirs = params_of(), params_of()
    optimizer = rk.RVSMAdamW(ours, penalty=None, engine=engine, **BASES[base])
    torchs = torch.optim.AdamW(theirs, **BASES[base])
    for k in range(10 if engine == "triton" else 50):
        set_gradients(k, ours, theirs)
        optimizer.step()
        torchs.step()
    closest(ours, theirs, 1e-14)
    for p, q in zip(ours, theirs, strict=True):
        assert optimizer.state[p].keys() == torchs.state[q].keys()
        for name, state in torchs.state[q].items():
            own = optimizer.state[p][name]
            assert (own.dtype, own.shape, own.device) == (state.dtype, state.shape, state.device)
            assert torch.allclose(own, state, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("base", ["decay", "maximize"])
def test_it_is_a_pull_and_then_adamw(engine: str, on_cpu: None, base: str, decoupled: bool) -> None:
    ours, theirs = params_of(), params_of()
    optimizer = rk.RVSMAdamW(ours, **SPLIT, decoupled=decoupled, engine=engine, **BASES[base])
    torchs = torch.optim.AdamW(theirs, **BASES[base])
    for k in range(5):
        set_gradients(k, ours, theirs)
        with torch.no_grad():
            for q in theirs:
                gap = q - rk.reference.prox(q, "l0", SPLIT["lam"] / SPLIT["beta"])
                if q.grad is not None and decoupled:
                    q -= BASES[base]["lr"] * SPLIT["beta"] * gap
                elif q.grad is not None:
                    sign = -1 if torchs.defaults["maximize"] else 1  # torch turns the whole gradient around
                    q.grad += sign * SPLIT["beta"] * gap
        optimizer.step()
        torchs.step()
    closest(ours, theirs, 1e-13)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_states_go_to_torch_and_come_back(engine: str, on_cpu: None, fused: bool, amsgrad: bool) -> None:
    model, other = nn.Linear(5, 3), nn.Linear(5, 3)
    other.load_state_dict(model.state_dict())
    torchs = torch.optim.AdamW(model.parameters(), lr=1e-2, amsgrad=amsgrad, fused=fused)
    plain = torch.optim.AdamW(other.parameters(), lr=1e-2, amsgrad=amsgrad)
    ours = rk.RVSMAdamW(model.parameters(), penalty=None, engine=engine)

    def go(optimizer: torch.optim.Optimizer) -> None:
        for k in range(3):
            set_gradients(k, list(model.parameters()), list(other.parameters()), missing=False)
            optimizer.step()
            plain.step()

    go(torchs)
    ours.load_state_dict(torchs.state_dict())
    assert ours.param_groups[0]["amsgrad"] is amsgrad and ours.param_groups[0]["lr"] == 1e-2
    go(ours)
    torchs.load_state_dict(rk.to_torch_state_dict(ours, model))
    go(torchs)
    assert [float(torchs.state[p]["step"]) for p in model.parameters()] == [9.0, 9.0]
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)


def test_a_step_in_spite_of_inf_counts_nothing(engine: str, on_cpu: None) -> None:
    ours = params_of(torch.float32)
    optimizer = rk.RVSMAdamW(ours, **SPLIT, engine=engine)
    for k, found in enumerate((1.0, 0.0, 1.0, 0.0)):
        set_gradients(k, ours, missing=False)
        before = [p.detach().clone() for p in ours]
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(found)
        optimizer.step()
        assert all(same_bits(p.detach(), w) for p, w in zip(ours, before, strict=True)) == (found == 1)
        steps = [float(optimizer.state[p]["step"]) if p in optimizer.state else 0.0 for p in ours]
        assert steps == [float((k + 1) // 2)] * len(ours)


def test_a_grad_scaler(engine: str, on_cpu: None) -> None:
    """With its scale in the step or before it, as without it."""
    results = []
    for amp_scaling in (None, True, False):
        model = nn.Linear(6, 4)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.linspace(-1, 1, p.numel()).reshape(p.shape))
        optimizer = rk.RVSMAdamW(model.parameters(), **SPLIT, engine=engine, amp_scaling=bool(amp_scaling))
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=amp_scaling is not None)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(model(torch.ones(2, 6)).square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(results[0], results[1], atol=1e-6) and torch.allclose(results[0], results[2], atol=1e-6)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
@pytest.mark.parametrize("method", ["rvsm", "rvsm-delayed", "admm"])
def test_it_resumes_bit_for_bit(engine: str, on_cpu: None, method: str, how: str) -> None:
    ours = params_of(torch.float32)
    optimizer = rk.RVSMAdamW(ours, **SPLIT, method=method, amsgrad=True, engine=engine)
    for k in range(4):
        set_gradients(k, ours)
        optimizer.step()
    if how == "state_dict":
        theirs = [nn.Parameter(p.detach().clone()) for p in ours]
        other = rk.RVSMAdamW(theirs, engine=engine)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        other = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
        theirs = other.param_groups[0]["params"]
    for k in range(4, 8):
        set_gradients(k, ours, theirs)
        optimizer.step()
        other.step()
    for p, q in zip(ours, theirs, strict=True):
        assert same_bits(p.detach(), q.detach())
        assert float(optimizer.state[p]["step"]) == float(other.state[q]["step"])


def test_a_count_that_somebody_sets_counts(engine: str, on_cpu: None) -> None:
    """The count is read in every step: from a tensor of another dtype too, and of one that was put in its place."""
    ours, theirs = params_of(), params_of()
    optimizer, torchs = rk.RVSMAdamW(ours, penalty=None, engine=engine), torch.optim.AdamW(theirs)
    for k in range(6):
        set_gradients(k, ours, theirs, missing=False)
        if k in (2, 4):
            for o, params in ((optimizer, ours), (torchs, theirs)):
                o.state[params[0]]["step"].fill_(10.0 + k)
                o.state[params[1]]["step"] = torch.tensor(20.0 + k, dtype=torch.float64)
        optimizer.step()
        torchs.step()
    closest(ours, theirs, 1e-14)


@pytest.mark.parametrize("wrong", [3, "many", torch.zeros(2), torch.tensor(3)], ids=repr)
def test_a_count_that_is_none(engine: str, on_cpu: None, wrong: Any) -> None:
    ours = params_of(torch.float32)
    optimizer = rk.RVSMAdamW(ours, **SPLIT, engine=engine)
    set_gradients(0, ours, missing=False)
    optimizer.step()
    before = [p.detach().clone() for p in ours]
    optimizer.state[ours[2]]["step"] = wrong
    with pytest.raises(RuntimeError, match="step of parameter 2 of group 0"):
        optimizer.step()
    assert all(same_bits(p.detach(), w) for p, w in zip(ours, before, strict=True))


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_parameter_that_occurs_twice_counts_twice(engine: str, on_cpu: None, amsgrad: bool) -> None:
    """One update after the other, as torch.optim.AdamW(foreach=False) does them."""
    gen = torch.Generator().manual_seed(3)
    ours = [nn.Parameter(torch.randn(40, generator=gen)), nn.Parameter(torch.ones(3))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    optimizer = rk.RVSMAdamW([ours[0], ours[1], ours[0]], lr=0.1, amsgrad=amsgrad, penalty=None, engine=engine)
    torchs = torch.optim.AdamW([theirs[0], theirs[1], theirs[0]], lr=0.1, amsgrad=amsgrad, foreach=False)
    for k in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=gen)
            q.grad = p.grad.clone()
        optimizer.step()
        torchs.step()
        assert [float(optimizer.state[p]["step"]) for p in ours] == [2.0 * (k + 1), k + 1.0]
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_lr_0_moves_no_weight(engine: str, on_cpu: None) -> None:
    ours = params_of(torch.float32)
    optimizer = rk.RVSMAdamW(ours, lr=0.0, **SPLIT, engine=engine)
    before: list[Tensor] = [p.detach().clone() for p in ours]
    set_gradients(0, ours, missing=False)
    optimizer.step()
    assert all(same_bits(p.detach(), w) for p, w in zip(ours, before, strict=True))
    assert all(float(optimizer.state[p]["step"]) == 1 for p in ours)


def test_u_of_a_trained_model(engine: str, on_cpu: None) -> None:
    """What follows from the split alone is that of any base: u, zeros, the penalty's value."""
    ours = params_of(torch.float32)
    optimizer = rk.RVSMAdamW(ours, **SPLIT, engine=engine)
    set_gradients(0, ours, missing=False)
    optimizer.step()
    twin = rk.RVSM(ours, **SPLIT, engine=engine)
    assert float(optimizer.penalty_value()) == float(twin.penalty_value())
    assert str(optimizer.sparsity()) == str(twin.sparsity())
    with optimizer.sparse_weights():
        assert any((p == 0).any() for p in ours)


def test_groups_of_param_groups_take_its_options() -> None:
    model = nn.Linear(5, 3)
    groups = rk.param_groups(model, penalty="l1", lam=1e-3, betas=(0.5, 0.9), amsgrad=True)
    optimizer = rk.RVSMAdamW(groups)
    assert optimizer.param_groups[0]["betas"] == (0.5, 0.9) and optimizer.param_groups[0]["amsgrad"] is True
