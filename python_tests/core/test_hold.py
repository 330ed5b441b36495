"""SparsitySchedule(hold=True): from the end on what is zero stays zero, and what survives goes on as if dense."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from builds import missing
from torch import Tensor, nn

import rvsm_kernels as rk
from runner import same_bits

END = 8
ENGINES = [name for name in ("reference", "native") if missing(name, "cpu") is None]
BASES: dict[str, tuple[type, dict[str, Any]]] = {
    "plain": (rk.RVSM, {"lr": 0.05, "weight_decay": 0.01}),
    "momentum": (rk.RVSM, {"lr": 0.05, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}),
    "nesterov": (rk.RVSM, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "maximize": True}),
    "adamw": (rk.RVSMAdamW, {"lr": 0.01, "weight_decay": 0.01}),
    "amsgrad": (rk.RVSMAdamW, {"lr": 0.01, "amsgrad": True}),
}
GROUPS: dict[str, dict[str, Any]] = {
    "elements": {},
    "coupled": {"decoupled": False},
    "channels": {"group_dim": 1, "group_scale": True, "group_lasso": 0.01},
}


def weights_of(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    gen = torch.Generator().manual_seed(0)
    conv = torch.randn(12, 6, 3, 3, generator=gen).to(memory_format=torch.channels_last)
    plain = [torch.randn(20, 30, generator=gen), conv, torch.randn(16, 8, generator=gen).t()]
    return [nn.Parameter((w * 0.1).to(dtype)) for w in plain]


def give_gradients(weights: list[nn.Parameter], step: int) -> None:
    for i, w in enumerate(weights):
        gen = torch.Generator().manual_seed(100 * step + i)
        w.grad = torch.randn(w.shape, generator=gen).to(w.dtype)


def train(weights: list[nn.Parameter], optimizer: Any, schedule: Any, steps: range) -> None:
    for step in steps:
        give_gradients(weights, step)
        optimizer.step()
        schedule.step()


def start(
    base: str = "momentum",
    engine: str | None = None,
    hold: bool = True,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[list[nn.Parameter], Any, Any]:
    cls, settings = BASES[base]
    weights = weights_of(dtype)
    options = {"penalty": "l0", "beta": 2.0, **options}
    scope = {"scope": "tensor"} if options["penalty"] == "topk" else {}
    if scope:
        options["density"] = 1.0
    optimizer = cls(weights, **settings, **options, engine=engine)
    of = "groups" if options.get("group_dim") is not None else "elements"
    return weights, optimizer, rk.SparsitySchedule(optimizer, 0.5, end=END, every=2, of=of, hold=hold, **scope)


def zeros_of(weights: list[nn.Parameter]) -> list[Tensor]:
    return [w.detach() == 0 for w in weights]


def holds(weights: list[nn.Parameter], optimizer: Any, schedule: Any) -> None:
    """The same zeros after every step, states of 0 there, and survivors that move."""
    zeros, before = zeros_of(weights), [w.detach().clone() for w in weights]
    share = sum(int(z.sum()) for z in zeros) / sum(z.numel() for z in zeros)
    by_groups = schedule.of == "groups"
    assert share == pytest.approx(0.5, abs=0.3 if by_groups else 0.02) and optimizer.sparsity().share == share
    for step in range(END, END + 6):
        train(weights, optimizer, schedule, range(step, step + 1))
        for w, z, old in zip(weights, zeros, before, strict=True):
            assert torch.equal(w == 0, z)
            assert (w != old)[~z].float().mean() > 0.9 and w.isfinite().all()
            for name, state in optimizer.state[w].items():
                if isinstance(state, Tensor) and state.shape == w.shape:
                    assert (state[z] == 0).all(), name
    assert schedule.holds and "held" in repr(schedule) and optimizer.sparsity().share == share
    assert all(group["lam"] == 0 for group in optimizer.param_groups)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("method", ["rvsm", "rvsm-delayed", "admm"])
@pytest.mark.parametrize("base", BASES)
def test_zeros_stay(base: str, method: str, groups: str, engine: str) -> None:
    run = start(base, engine, method=method, **GROUPS[groups])
    train(*run, range(END))
    holds(*run)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("penalty", ["l1", "tl1", "topk"])
def test_penalties(penalty: str, engine: str) -> None:
    run = start("adamw", engine, penalty=penalty)
    train(*run, range(END))
    holds(*run)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "precision", [{}, {"master_weights": True}, {"rounding": "stochastic"}, {"state_dtype": "float32"}]
)
@pytest.mark.parametrize("base", ["momentum", "adamw"])
def test_half_types(base: str, precision: dict[str, Any], dtype: torch.dtype, engine: str) -> None:
    run = start(base, engine, dtype=dtype, **precision)
    train(*run, range(END))
    holds(*run)


def test_without_hold_they_come_back() -> None:
    """So that the tests above can fail."""
    weights, optimizer, schedule = start(hold=False)
    train(weights, optimizer, schedule, range(END))
    optimizer.sparsify_()
    for group in optimizer.param_groups:
        group["lam"] = 0.0
    give_gradients(weights, 0)
    optimizer.step()
    assert sum(int(z.sum()) for z in zeros_of(weights)) == 0 and not schedule.holds


@pytest.mark.parametrize("base", ["plain", "momentum", "adamw"])
def test_survivors_go_on_as_without_a_penalty(base: str) -> None:
    """The dense optimizer of the same class, from the same weights and states, with masked gradients."""
    run = start(base)
    weights, optimizer, _ = run
    train(*run, range(END))
    cls, settings = BASES[base]
    others = [nn.Parameter(w.detach().clone(memory_format=torch.preserve_format)) for w in weights]
    dense = cls(others, **settings, penalty=None)
    for w, other in zip(weights, others, strict=True):
        dense.state[other] = copy.deepcopy({k: v for k, v in optimizer.state[w].items() if k not in ("u", "dual")})
    zeros = zeros_of(weights)
    train(*run, range(END, END + 5))
    for step in range(END, END + 5):
        give_gradients(others, step)
        for other, z in zip(others, zeros, strict=True):
            other.grad.mul_(~z)
        dense.step()
    for w, other in zip(weights, others, strict=True):
        assert torch.equal(w.detach(), other.detach())  # but for the sign of a zero


def test_resume_gives_the_same_bits() -> None:
    """From before the end and from after it; the schedule's own checkpoint says whether zeros are held."""
    for stop in (END - 3, END + 2):
        straight, first, second = start("adamw"), start("adamw"), start("adamw")
        train(*straight, range(END + 5))
        train(*first, range(stop))
        for w, other in zip(second[0], first[0], strict=True):
            w.data.copy_(other)
        for part, of in zip(second[1:], first[1:], strict=True):
            part.load_state_dict(copy.deepcopy(of.state_dict()))
        assert second[2].holds == (stop >= END)
        train(*second, range(stop, END + 5))
        for w, other in zip(straight[0], second[0], strict=True):
            assert same_bits(w.detach(), other.detach())
        holds(*copy.deepcopy(second))


def test_a_checkpoint_of_a_schedule_without_hold() -> None:
    """Holding begins with the next step; the other way round it ends, and lam comes back."""
    plain, held = start(hold=False), start()
    train(*plain, range(END + 2))
    saved = plain[2].state_dict()
    for state in (saved, {key: saved[key] for key in ("last_step", "cuts")}):
        run = copy.deepcopy(plain)
        schedule = rk.SparsitySchedule(run[1], 0.5, end=END, every=2, hold=True)
        schedule.load_state_dict(state)
        assert not schedule.holds and run[1].param_groups[0]["lam"] > 0
        train(run[0], run[1], schedule, range(1))
        holds(run[0], run[1], schedule)
    train(*held, range(END + 2))
    other = rk.SparsitySchedule(held[1], 0.5, end=END, every=2)
    other.load_state_dict(held[2].state_dict())
    assert held[1].param_groups[0]["lam"] > 0


def test_a_copy_holds_by_itself() -> None:
    run = start()
    train(*run, range(END + 1))
    copied = copy.deepcopy(run)
    del run
    holds(*copied)


def test_found_inf_changes_nothing() -> None:
    weights, optimizer, schedule = start("adamw")
    train(weights, optimizer, schedule, range(END))
    before = [w.detach().clone() for w in weights]
    give_gradients(weights, 0)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(1.0)
    optimizer.step()
    assert all(same_bits(w.detach(), old) for w, old in zip(weights, before, strict=True))
    del optimizer.grad_scale, optimizer.found_inf
    holds(weights, optimizer, schedule)


def test_a_closure() -> None:
    """It makes the gradients after the hooks before a step."""
    weights, optimizer, schedule = start()
    train(weights, optimizer, schedule, range(END))
    zeros, losses = zeros_of(weights), iter(range(9))

    def closure() -> int:
        give_gradients(weights, 7)
        return next(losses)

    assert optimizer.step(closure) == 0 and optimizer.step(closure=closure) == 1
    assert all(torch.equal(w == 0, z) for w, z in zip(weights, zeros, strict=True))


def test_missing_and_frozen() -> None:
    """No gradient, no step; a frozen parameter, a bias that is 0 and a dense group are left alone."""
    weights, frozen, bias = (
        weights_of(),
        nn.Parameter(torch.zeros(4, 4), requires_grad=False),
        nn.Parameter(torch.zeros(5)),
    )
    groups = [{"params": [*weights, frozen, weights[0]]}, {"params": [bias], "penalty": None}]
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = rk.RVSM(groups, lr=0.1, momentum=0.9, beta=1.0)
    schedule = rk.SparsitySchedule(optimizer, 0.5, end=1, every=1, hold=True)
    for step in range(4):
        give_gradients(weights, step)
        weights[1].grad, bias.grad = None, torch.ones(5)
        optimizer.step()
        schedule.step()
        if step == 0:
            zeros = zeros_of(weights)
    assert all(torch.equal(w == 0, z) for w, z in zip(weights, zeros, strict=True))
    assert (bias != 0).all() and (frozen == 0).all() and zeros[0].float().mean() > 0.3


@pytest.mark.parametrize(
    "inner",
    [
        lambda p: torch.optim.NAdam(p, lr=0.01, weight_decay=0.1),
        lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
        lambda p: torch.optim.Adagrad(p, lr=0.01),
        lambda p: torch.optim.Rprop(p, lr=0.01),
    ],
)
def test_wrapper(inner: Any) -> None:
    weights = weights_of()
    optimizer = rk.RVSMWrapper(inner(weights), penalty="l0", beta=5.0, method="admm")
    schedule = rk.SparsitySchedule(optimizer, 0.5, end=END, every=2, hold=True)
    train(weights, optimizer, schedule, range(END))
    zeros = zeros_of(weights)
    train(weights, optimizer, schedule, range(END, END + 4))
    assert all(torch.equal(w == 0, z) for w, z in zip(weights, zeros, strict=True))
    assert sum(int(z.sum()) for z in zeros) == pytest.approx(0.5 * sum(z.numel() for z in zeros), rel=0.01)


class _Stubborn(torch.optim.SGD):
    """Moves what has no gradient."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(0.01)


def test_a_wrapped_optimizer_that_moves_zeros() -> None:
    weights = weights_of()
    optimizer = rk.RVSMWrapper(_Stubborn(weights, lr=0.1), penalty="l0", beta=5.0)
    schedule = rk.SparsitySchedule(optimizer, 0.5, end=2, every=1, hold=True)
    train(weights, optimizer, schedule, range(2))
    zeros, before = zeros_of(weights), [w.detach().clone() for w in weights]
    train(weights, optimizer, schedule, range(2, 5))
    for w, z, old in zip(weights, zeros, before, strict=True):
        assert torch.equal(w == 0, z)
        torch.testing.assert_close(w[~z], old[~z] + 0.03)


def test_options_in_tensors() -> None:
    weights = weights_of()
    lam, beta = torch.tensor(0.0), torch.tensor(2.0)
    optimizer = rk.RVSM(weights, lr=0.05, momentum=0.9, lam=lam, beta=beta, method="admm")
    schedule = rk.SparsitySchedule(optimizer, 0.5, end=END, every=2, hold=True)
    train(weights, optimizer, schedule, range(END))
    zeros = zeros_of(weights)
    train(weights, optimizer, schedule, range(END, END + 4))
    assert float(lam) == 0 and all(torch.equal(w == 0, z) for w, z in zip(weights, zeros, strict=True))


def test_groups_that_come_later_are_not_led() -> None:
    weights, optimizer, schedule = start()
    train(weights, optimizer, schedule, range(END))
    late = nn.Parameter(torch.zeros(7))
    optimizer.add_param_group({"params": [late], "lam": 1e-9})
    late.grad = torch.ones(7)
    train(weights, optimizer, schedule, range(END, END + 2))
    assert optimizer.param_groups[-1]["lam"] == 1e-9 and (late != 0).all()
    optimizer.param_groups[0]["hold_zeros"] = False  # and it stays so
    schedule.step()
    assert optimizer.param_groups[0]["hold_zeros"] is False


def test_an_earlier_state_releases_the_zeros() -> None:
    weights, optimizer, schedule = start()
    train(weights, optimizer, schedule, range(END - 2))
    before = schedule.state_dict()
    train(weights, optimizer, schedule, range(END - 2, END))
    assert optimizer.param_groups[0]["hold_zeros"] is True
    schedule.load_state_dict(before)
    assert not schedule.holds and optimizer.param_groups[0]["hold_zeros"] is False


def test_errors() -> None:
    weights = weights_of()
    with pytest.raises(ValueError, match="Invalid hold"):
        rk.SparsitySchedule(rk.RVSM(weights, lr=0.1), 0.5, end=4, hold=1)
    with pytest.raises(ValueError, match="hold_zeros=True needs an eps above 0"):
        rk.SparsitySchedule(rk.RVSMAdamW(weights, lr=0.1, eps=0.0), 0.5, end=4, hold=True)
    weights[0]._fsdp_flattened = True
    optimizer = rk.RVSM(weights, lr=0.1)
    with pytest.raises(ValueError, match="take FSDP2"):
        rk.SparsitySchedule(optimizer, 0.5, end=4, hold=True)
