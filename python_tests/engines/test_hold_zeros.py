"""Zeros that stay (``hold_zeros``): an element that is 0 before a step is 0 after it, and so are its states."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from builds import DEVICE, quick_in_all
from torch import Tensor, nn

import rvsm_kernels as rk

SHAPES = [(48, 33), (7, 5, 3, 3), (130,), (8, 16)]
BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (rk.RVSM, {"lr": 0.05, "weight_decay": 0.01}),
    "momentum": (rk.RVSM, {"lr": 0.05, "momentum": 0.9, "dampening": 0.1}),
    "nesterov": (rk.RVSM, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "maximize": True}),
    "adamw": (rk.RVSMAdamW, {"lr": 0.01}),
    "amsgrad": (rk.RVSMAdamW, {"lr": 0.01, "amsgrad": True}),
}
SPLITS: dict[str, dict[str, Any]] = {
    "none": {"penalty": None},
    "l0": {"penalty": "l0"},
    "l1": {"penalty": "l1", "decoupled": False},
    "tl1": {"penalty": "tl1", "a": 0.7},
    "topk": {"penalty": "topk", "density": 0.5},
    "columns": {"penalty": "l0", "group_dim": -1, "lam": 0.5},
    "rows": {"penalty": "tl1", "group_dim": 0, "lam": 0.5, "group_lasso": 0.1},
    "tensors": {"penalty": "l1", "group_dim": (), "decoupled": False, "lam": 0.3},
}


def params_of(dtype: torch.dtype = torch.float32, share: float = 0.4) -> list[nn.Parameter]:
    """Parameters with zeros of both signs, and with gradients."""
    gen = torch.Generator().manual_seed(7)
    params = []
    for shape in SHAPES:
        w = torch.randn(shape, generator=gen)
        w[torch.rand(shape, generator=gen) < share] = 0.0
        w[torch.rand(shape, generator=gen) < 0.05] = -0.0
        p = nn.Parameter(w.to(dtype).to(DEVICE))
        p.grad = torch.randn(shape, generator=gen).to(dtype).to(DEVICE)
        params.append(p)
    return params


def with_states(optimizer: Any, params: list[nn.Parameter]) -> None:
    """States that are 0 nowhere: of a step without hold_zeros, and numbers of their own in the zeros' places."""
    start = [p.detach().clone() for p in params]
    optimizer.step()
    for p, w in zip(params, start, strict=True):
        for name, state in optimizer.state[p].items():
            if name != "master" and state.shape == p.shape and state.is_floating_point():
                state[w == 0] = 0.25
        p.data.copy_(w)
        if "low" in optimizer.state[p]:
            optimizer.state[p]["low"].zero_()
        if "master" in optimizer.state[p]:
            optimizer.state[p]["master"].copy_(w)


def check(params: list[nn.Parameter], others: list[nn.Parameter], ours: Any, theirs: Any) -> None:
    """One step: what was 0 is 0 with all of its states; all else has the bits that it has without hold_zeros."""
    zeros = [p.detach() == 0 for p in params]
    ours.step()
    theirs.step()
    for p, q, zero in zip(params, others, zeros, strict=True):
        assert zero.any() and not zero.all() and torch.equal(p.detach() == 0, zero)
        assert torch.equal(p.detach()[~zero], q.detach()[~zero]) and not torch.equal(q.detach()[zero], p.detach()[zero])
        for name, state in ours.state[p].items():
            if isinstance(state, Tensor) and state.shape == p.shape:
                other = theirs.state[q][name]
                assert (state[zero] == 0).all() and torch.equal(state[~zero], other[~zero]), name


def pair(cls: Any, options: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Two optimizers in the same state; the first holds zeros."""
    made = []
    for hold in (True, False):
        params = params_of(dtype)
        optimizer = cls(params, **{"lam": 0.05, "beta": 0.5, **options})
        with_states(optimizer, params)
        optimizer.param_groups[0]["hold_zeros"] = hold
        made += [params, optimizer]
    return made[0], made[2], made[1], made[3]


@pytest.mark.parametrize("method", ["rvsm", "rvsm-delayed", "admm"])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("base", BASES)
def test_every_base_method_and_penalty(base: str, split: str, method: str, engine: str) -> None:
    cls, settings = BASES[base]
    check(*pair(cls, {**settings, **SPLITS[split], "method": method, "engine": engine}))


@quick_in_all
@pytest.mark.parametrize("method", ["rvsm", "rvsm-delayed", "admm"])
@pytest.mark.parametrize("pattern", [(2, 4), (1, 3)])
def test_windows(pattern: tuple[int, int], method: str, engine: str) -> None:
    """Also with states that are not 0 where the weights are."""
    made = []
    for hold in (True, False):
        gen = torch.Generator().manual_seed(3)
        w = torch.randn(16, 24, generator=gen)
        w[torch.rand(w.shape, generator=gen) < 0.3] = 0.0
        p = nn.Parameter(w.to(DEVICE))
        p.grad = torch.randn(w.shape, generator=gen).to(DEVICE)
        options = {"penalty": "nm", "pattern": pattern, "lam": 1.0, "beta": 0.5, "method": method}
        optimizer = rk.RVSM([p], lr=0.1, momentum=0.9, engine=engine, **options)
        with_states(optimizer, [p])
        optimizer.param_groups[0]["hold_zeros"] = hold
        made += [[p], optimizer]
    check(made[0], made[2], made[1], made[3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "precision",
    [{}, {"master_weights": True}, {"rounding": "stochastic"}, {"state_dtype": "float32"}],
    ids=["plain", "master", "stochastic", "state"],
)
@pytest.mark.parametrize("base", ["momentum", "adamw"])
def test_every_type_and_rounding(base: str, precision: dict[str, Any], dtype: torch.dtype, engine: str) -> None:
    cls, settings = BASES[base]
    for split in ("l0", "columns"):
        check(*pair(cls, {**settings, **SPLITS[split], **precision, "engine": engine}, dtype))


@quick_in_all
def test_whatever_the_gradient_is(engine: str) -> None:
    """NaN and Inf in the gradients of zeros, and in their states."""
    for base in BASES:
        params = params_of()
        optimizer = BASES[base][0](params, **BASES[base][1], lam=0.05, beta=0.5, hold_zeros=True, engine=engine)
        for p in params:
            assert p.grad is not None
            p.grad[p == 0] = float("nan")
            p.grad.view(-1)[::2][p.detach().view(-1)[::2] == 0] = float("inf")
        zeros = [p.detach() == 0 for p in params]
        for _ in range(3):
            optimizer.step()
            assert all(torch.equal(p == 0, z) for p, z in zip(params, zeros, strict=True))
            assert all(p.isfinite().all() for p in params)


@quick_in_all
def test_a_master_below_the_half_type_is_no_zero(engine: str) -> None:
    """float16 holds 0 where the weight behind it is 1e-9: that one learns."""
    p = nn.Parameter(torch.tensor([0.0, 1.0, 2.0], dtype=torch.float16)).to(DEVICE)
    p.grad = torch.full((3,), 0.5, dtype=torch.float16).to(DEVICE)
    optimizer = rk.RVSM([p], lr=0.1, penalty=None, master_weights=True, hold_zeros=True, engine=engine)
    optimizer.step()
    assert p[0] == 0 and p[1] < 1
    optimizer.state[p]["master"][0] = 1e-9
    optimizer.step()
    assert p[0] < 0


@quick_in_all
def test_lr_0_moves_nothing(engine: str) -> None:
    for method in ("rvsm-delayed", "admm"):
        params = params_of()
        optimizer = rk.RVSM(params, lr=0.1, lam=0.05, beta=0.5, method=method, engine=engine)
        optimizer.step()
        name = "u" if method == "rvsm-delayed" else "dual"
        before = [(p.detach().clone(), optimizer.state[p][name].clone()) for p in params]
        optimizer.param_groups[0].update(lr=0.0, hold_zeros=True)
        optimizer.step()
        for p, (w, state) in zip(params, before, strict=True):
            assert torch.equal(p.detach(), w) and torch.equal(optimizer.state[p][name], state)


@quick_in_all
def test_edited_between_steps_and_by_group(engine: str) -> None:
    first, second = params_of()[:2], params_of()[2:]
    groups = [{"params": first, "hold_zeros": True}, {"params": second}]
    optimizer = rk.RVSM(groups, lr=0.1, momentum=0.9, lam=0.05, beta=0.5, engine=engine)
    zeros = [p.detach() == 0 for p in first + second]
    optimizer.step()
    for p, z in zip(first, zeros[:2], strict=True):
        assert torch.equal(p == 0, z)
    assert not any((p[z] == 0).any() for p, z in zip(second, zeros[2:], strict=True))
    optimizer.param_groups[0]["hold_zeros"] = False
    optimizer.step()
    assert not any((p[z] == 0).any() for p, z in zip(first, zeros[:2], strict=True))


@quick_in_all
def test_copies_and_checkpoints_carry_it(engine: str) -> None:
    params = params_of()
    optimizer = rk.RVSM(params, lr=0.1, momentum=0.9, hold_zeros=True, engine=engine)
    copied = copy.deepcopy(optimizer)
    loaded = rk.RVSM(params_of(), lr=0.3, momentum=0.9, engine=engine)
    loaded.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    for other in (copied, loaded):
        mine = other.param_groups[0]["params"]
        zeros = [p.detach() == 0 for p in mine]
        for p, q in zip(mine, params, strict=True):
            p.grad = None if q.grad is None else q.grad.clone()
        other.step()
        assert other.param_groups[0]["hold_zeros"] is True
        assert all(torch.equal(p == 0, z) for p, z in zip(mine, zeros, strict=True))


@quick_in_all
def test_sparsify_and_hold(engine: str) -> None:
    """On penalised groups alone: a bias that begins with 0 learns; states of zeros are 0 at once."""
    w, bias = params_of()[0], nn.Parameter(torch.zeros(5)).to(DEVICE)
    bias.grad = torch.ones(5).to(DEVICE)
    optimizer = rk.RVSM(
        [{"params": [w]}, {"params": [bias], "penalty": None}], lr=0.1, momentum=0.9, lam=0.05, beta=0.5, engine=engine
    )
    optimizer.step()
    optimizer.sparsify_(hold=True)
    zero = w.detach() == 0
    assert zero.float().mean() > 0.3 and (optimizer.state[w]["momentum_buffer"][zero] == 0).all()
    assert [group["hold_zeros"] for group in optimizer.param_groups] == [True, False]
    for _ in range(3):
        optimizer.step()
    assert torch.equal(w.detach() == 0, zero) and (bias != 0).all()


@quick_in_all
def test_grad_scaler(engine: str) -> None:
    """The scale is taken off in the same pass; a step that is called off changes nothing."""
    params = params_of()
    optimizer = rk.RVSM(params, lr=0.1, momentum=0.9, lam=0.05, beta=0.5, hold_zeros=True, engine=engine)
    zeros = [p.detach() == 0 for p in params]
    optimizer.grad_scale, optimizer.found_inf = (torch.tensor(x, device=DEVICE) for x in (4.0, 0.0))
    optimizer.step()
    before = [p.detach().clone() for p in params]
    optimizer.grad_scale, optimizer.found_inf = (torch.tensor(x, device=DEVICE) for x in (4.0, 1.0))
    optimizer.step()
    for p, zero, w in zip(params, zeros, before, strict=True):
        assert torch.equal(p == 0, zero) and torch.equal(p.detach(), w)


@quick_in_all
def test_a_parameter_twice(engine: str) -> None:
    p = params_of()[0]
    zero = p.detach() == 0
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = rk.RVSM([p, p], lr=0.1, momentum=0.9, lam=0.05, beta=0.5, hold_zeros=True, engine=engine)
    for _ in range(2):
        optimizer.step()
    assert torch.equal(p == 0, zero)


@quick_in_all
@pytest.mark.parametrize("split", ["none", "l0", "l1"])
def test_around_another_optimizer(split: str, engine: str) -> None:
    """Its gradients are 0 there, in p.grad, with a penalty and without, and a closure is no way around."""
    params = params_of()
    options = {"lam": 0.05, "beta": 0.5, **SPLITS[split], "hold_zeros": True}
    optimizer = rk.RVSMWrapper(torch.optim.Adam(params, lr=0.01, weight_decay=0.1), **options, engine=engine)
    assert not optimizer._step_supports_amp_scaling  # the pull writes gradients
    zeros, gradients = [p.detach() == 0 for p in params], [p.grad.clone() for p in params if p.grad is not None]

    def closure() -> float:
        for p, g in zip(params, gradients, strict=True):
            p.grad = g.clone()
        return 1.0

    for step in (optimizer.step, optimizer.step, lambda: optimizer.step(closure)):
        step()
        for p, zero, g in zip(params, zeros, gradients, strict=True):
            assert p.grad is not None and torch.equal(p == 0, zero) and (p.grad[zero] == 0).all()
            assert (optimizer.state[p]["exp_avg"][zero] == 0).all()
            assert split == "l1" or torch.equal(p.grad[~zero], g[~zero])


def test_a_repeated_closure_pulls_once() -> None:
    """LBFGS evaluates again and again: what is decoupled pulls once a step, what is held has no gradient each time."""
    found = []
    for hold in (False, True):
        p = nn.Parameter(torch.tensor([0.0, 0.5, 2.0]))
        optimizer = rk.RVSMWrapper(
            torch.optim.LBFGS([p], lr=0.1, max_iter=3), penalty="l0", lam=1.0, beta=1.0, hold_zeros=hold
        )
        calls = []

        def closure(p: nn.Parameter = p, calls: list[Tensor] = calls) -> Tensor:
            calls.append(p.detach().clone())
            p.grad = torch.zeros(3)
            p.grad[0] = 1.0
            return p.detach().sum()

        optimizer.step(closure)
        assert len(calls) > 1
        found.append(p.detach().clone())
    assert torch.equal(found[0][1:], found[1][1:]) and found[1][0] == 0 != found[0][0]


def test_a_counter_is_no_state_of_elements() -> None:
    p = nn.Parameter(torch.tensor(0.0))
    optimizer = rk.RVSMAdamW([p], lr=0.1, lam=1.0, beta=1.0)
    p.grad = torch.tensor(1.0)
    optimizer.step()
    p.data.zero_()
    optimizer.sparsify_(hold=True)
    assert optimizer.state[p]["step"] == 1 and optimizer.state[p]["exp_avg"] == 0


def test_errors() -> None:
    with pytest.raises(ValueError, match="hold_zeros=True needs an eps above 0"):
        rk.RVSMAdamW(params_of(), eps=0.0, hold_zeros=True)
    adamw = rk.RVSMAdamW(params_of(), eps=0.0)
    with pytest.raises(ValueError, match="hold_zeros=True needs an eps above 0"):
        adamw.sparsify_(hold=True)
    assert adamw.param_groups[0]["hold_zeros"] is False
    with pytest.raises(ValueError, match="hold_zeros=True needs an eps above 0"):  # float32 rounds it to 0
        rk.RVSMAdamW(params_of(), eps=1e-50, hold_zeros=True)
    with pytest.raises(TypeError, match="Invalid hold_zeros value: 'no'"):
        rk.RVSM(params_of(), lr=0.1, hold_zeros="no")
    optimizer = rk.RVSM(params_of(), lr=0.1)
    with pytest.raises(TypeError, match="Invalid hold value: 1"):
        optimizer.sparsify_(hold=1)
    assert optimizer.param_groups[0]["hold_zeros"] is False
    with optimizer.sparse_weights(), pytest.raises(RuntimeError, match="sparsify_"):
        optimizer.sparsify_(hold=True)
    assert optimizer.param_groups[0]["hold_zeros"] is False
