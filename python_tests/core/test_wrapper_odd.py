"""RVSMWrapper and what a user may do to it: odd parameters and options, edits behind its back, hooks, threads."""

from __future__ import annotations

import copy
import gc
import threading
from collections import defaultdict
from typing import Any

import pytest
import torch
from test_wrapper import SPLIT, T, apart, model_of, train
from torch import Tensor, nn

import rvsm_kernels as rk
from runner import bits


def odd(p: Any) -> nn.Parameter:
    return nn.Parameter(p, requires_grad=p.is_floating_point())


def gradients(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = torch.ones_like(p)


@pytest.mark.filterwarnings("error::UserWarning")
def test_options_of_the_optimizer_are_not_taken_for_misspelt_ones(engine: str) -> None:
    model = model_of()
    optimizer = rk.RVSMWrapper(T.NAdam(model[:1].parameters(), lr=0.01), penalty=None, engine=engine)
    optimizer.add_param_group({"params": [*model[1:].parameters()], "momentum_decay": 0.1})
    with pytest.warns(UserWarning, match="'lamda' is no option"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lamda": 0.1})


# ---- groups that are left to the optimizer ---------------------------------------------------------------------------


def test_a_group_without_a_penalty_may_hold_anything(engine: str, on_cpu: None) -> None:
    """Complex weights and sparse gradients; and such a group is penalised as soon as it says so."""
    model, table = model_of(), nn.Embedding(5, 4, sparse=True)
    spectral = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    groups = [
        {"params": [*table.parameters(), spectral], "penalty": None},
        {"params": [*model.parameters()], "penalty": "l1", "lam": 0.1},
    ]
    optimizer = rk.RVSMWrapper(T.SGD(groups, lr=0.1), **SPLIT, engine=engine)
    twin = model_of()
    alone = rk.RVSM([*twin.parameters()], lr=0.1, **{**SPLIT, "penalty": "l1", "lam": 0.1}, engine=engine)
    for _ in range(3):
        before = bits(table.weight)
        (table(torch.tensor([1])).sum() + (spectral * spectral.conj()).real.sum()).backward()
        gradients(model)
        gradients(twin)
        optimizer.step()
        alone.step()
        assert not torch.equal(bits(table.weight), before) and abs(spectral[0]) < 1
        assert apart(model, twin) < 1e-6
        optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.sparsity()
    optimizer.param_groups[0]["penalty"] = "l0"
    table(torch.tensor([1])).sum().backward()
    gradients(model)
    before = bits(next(model.parameters()))
    with pytest.raises((RuntimeError, TypeError), match=r"sparse gradients|complex"):
        optimizer.step()
    assert torch.equal(bits(next(model.parameters())), before)


def test_a_penalty_that_comes_and_goes(engine: str) -> None:
    """As RVSM does it: what the engines know of a group stays right."""
    ours, theirs = model_of(), model_of()
    groups = [[{"params": [p]} for p in m.parameters()] for m in (ours, theirs)]
    wrapper = rk.RVSMWrapper(T.SGD(groups[0], lr=0.1, momentum=0.9), **SPLIT, method="admm", engine=engine)
    rvsm = rk.RVSM(groups[1], lr=0.1, momentum=0.9, **SPLIT, method="admm", engine=engine)
    for k, penalty in enumerate([None, "l0", "l1", None, "l0"]):
        for optimizer, model in ((wrapper, ours), (rvsm, theirs)):
            optimizer.param_groups[k % 2]["penalty"] = penalty
            train(model, optimizer, range(2 * k, 2 * k + 2))
        assert apart(ours, theirs) < 1e-5
    duals = [len(wrapper._own_states[p]) for p in ours.parameters()]
    assert duals == [1, 0], "a dual is forgotten with the penalty"


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_frozen_parameters_of_other_dtypes(dtype: torch.dtype) -> None:
    model = model_of()
    frozen = nn.Parameter(torch.zeros(3, 3).to(dtype), requires_grad=False)
    optimizer = rk.RVSMWrapper(T.AdamW([*model.parameters(), frozen], lr=0.1), **SPLIT)
    train(model, optimizer, range(2))
    optimizer.sparsify_()
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.sparsity().total.numel == 72


def test_complex_parameters_are_refused_where_they_are_penalised() -> None:
    optimizer = T.SGD([nn.Parameter(torch.ones(3, dtype=torch.complex64))], lr=0.1)
    with pytest.raises(TypeError, match=r"dtype torch\.complex64"):
        rk.RVSMWrapper(optimizer, **SPLIT)
    assert "penalty" not in optimizer.param_groups[0]
    rk.RVSMWrapper(optimizer, penalty=None)


# ---- wrapping --------------------------------------------------------------------------------------------------------


def test_a_constructor_that_fails_leaves_the_optimizer_alone() -> None:
    model = model_of()
    adamw = T.AdamW(model.parameters())
    before = copy.deepcopy([list(group) for group in adamw.param_groups])
    for wrong in ({"engine": "cuda:7"}, {"lam": -1.0}, {"group_dim": 9}, {"penalty": "l3"}, {"lam": "many"}):
        with pytest.raises((ValueError, TypeError)):
            rk.RVSMWrapper(adamw, **wrong)
        assert [list(group) for group in adamw.param_groups] == before
    assert rk.RVSMWrapper(adamw, lam=0.5).param_groups[0]["lam"] == 0.5


def test_wrapping_twice() -> None:
    """The groups hold the options of the first wrapper, so that those of a second one would have no effect."""
    model = model_of()
    adamw = T.AdamW(model.parameters())
    wrapper = rk.RVSMWrapper(adamw, **SPLIT)
    with pytest.raises(TypeError, match="RVSMWrapper makes sparse weights already"):
        rk.RVSMWrapper(wrapper)
    again = copy.deepcopy(wrapper).optimizer
    for optimizer in (adamw, again):
        with pytest.raises(TypeError, match="this AdamW has a wrapper already"):
            rk.RVSMWrapper(optimizer, lam=1.0)
    del wrapper
    gc.collect()
    with pytest.raises(TypeError, match="this AdamW has a wrapper already"):
        rk.RVSMWrapper(adamw, lam=1.0)
    assert adamw.param_groups[0]["lam"] == SPLIT["lam"]


@pytest.mark.parametrize("what", [rk.RVSM, rk.RVSMAdamW])
def test_our_own_optimizers_are_refused(what: Any) -> None:
    with pytest.raises(TypeError, match=f"{what.__name__} makes sparse weights already"):
        rk.RVSMWrapper(what(model_of().parameters()))


@pytest.mark.parametrize("what", [nn.Linear(2, 2), 0.1, "adamw", None, [nn.Parameter(torch.ones(2))], T.AdamW])
def test_what_is_no_optimizer(what: Any) -> None:
    with pytest.raises(TypeError, match="RVSMWrapper takes a torch optimizer"):
        rk.RVSMWrapper(what)


def test_differentiable() -> None:
    """The pull is not part of the graph, and so it is refused; without a pull the optimizer may do it."""
    model = model_of()
    with pytest.raises(RuntimeError, match="does not support `differentiable`"):
        rk.RVSMWrapper(T.SGD(model.parameters(), lr=0.1, differentiable=True), **SPLIT)
    lr = torch.tensor(0.1, requires_grad=True)
    w = nn.Parameter(torch.ones(3))
    weight = w.clone()
    optimizer = rk.RVSMWrapper(T.SGD([weight], lr=0.1, differentiable=True), penalty=None)
    weight.grad = lr * w
    optimizer.step()
    weight.sum().backward()
    assert w.grad is not None and float(lr.grad or 0) != 0


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["foreach", "fused", "for loop", "amsgrad"])
def test_options_of_the_optimizer(kind: str) -> None:
    options: dict[str, Any] = {"for loop": {"foreach": False}}.get(kind, {kind: True})
    ours, theirs = model_of(), model_of()
    train(ours, rk.RVSMWrapper(T.AdamW(ours.parameters(), lr=0.01, **options), **SPLIT), range(5))
    amsgrad = kind == "amsgrad"
    train(theirs, rk.RVSMAdamW(theirs.parameters(), lr=0.01, amsgrad=amsgrad, **SPLIT), range(5))
    assert apart(ours, theirs) < 1e-6


@pytest.mark.parametrize("lr", [0.0, 0.05, torch.tensor(0.05), torch.tensor([0.05])], ids=str)
def test_kinds_of_lr(lr: Any) -> None:
    """A tensor is read at each step; with 0 nothing is pulled."""
    ours, theirs, twin = model_of(), model_of(), model_of()
    optimizer = rk.RVSMWrapper(T.SGD(ours.parameters(), lr=lr), **SPLIT, method="admm")
    other = rk.RVSM(theirs.parameters(), lr=float(lr), **SPLIT, method="admm")
    for k in range(3):
        train(ours, optimizer, [k])
        train(theirs, other, [k])
        if isinstance(lr, Tensor):
            optimizer.param_groups[0]["lr"].mul_(0.5)
            other.param_groups[0]["lr"] *= 0.5
    assert apart(ours, theirs) < 1e-6
    assert (apart(ours, twin) == 0) == (lr == 0.0)
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="Invalid learning rate"):
        optimizer.step()


def test_an_optimizer_that_keeps_maximize_for_itself() -> None:
    """Coupled terms take the sign that the optimizer will turn around."""

    class Ascent(T.Optimizer):
        def __init__(self, params: Any, lr: float, maximize: bool) -> None:
            super().__init__(params, {"lr": lr})
            self.maximize = maximize

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(p.grad, alpha=group["lr"] * (-1.0 if self.maximize else 1.0))

    for maximize in (True, False):
        ours, theirs = model_of(), model_of()
        gradients(ours)
        gradients(theirs)
        rk.RVSMWrapper(Ascent(ours.parameters(), 0.1, maximize), **SPLIT, decoupled=False).step()
        rk.RVSM(theirs.parameters(), lr=0.1, **SPLIT, decoupled=False, maximize=maximize).step()
        assert apart(ours, theirs) < 1e-6 and apart(ours, model_of()) > 0


def test_attributes() -> None:
    """Options belong to the groups, private names to each object, all other names to the optimizer."""
    adamw = T.AdamW(model_of().parameters())
    adamw.notes, adamw._private = "mine", 1  # type: ignore[attr-defined]
    optimizer = rk.RVSMWrapper(adamw, **SPLIT)
    assert optimizer.notes == "mine" and optimizer.defaults["betas"] == (0.9, 0.999)
    assert not hasattr(optimizer, "_private") and not hasattr(optimizer, "train") and not hasattr(optimizer, "nothing")
    with pytest.raises(AttributeError, match="'AdamW' object has no attribute 'nothing'"):
        _ = optimizer.nothing
    with pytest.raises(AttributeError, match="lam is an option of the param groups"):
        _ = optimizer.lam
    with pytest.raises(AttributeError, match="only while a GradScaler"):
        _ = optimizer.found_inf
    empty = rk.RVSMWrapper.__new__(rk.RVSMWrapper)
    for name in ("optimizer", "param_groups", "state", "train", "__deepcopy__"):
        assert not hasattr(empty, name)


# ---- behind its back -------------------------------------------------------------------------------------------------


def test_stepped_by_hand() -> None:
    """The optimizer's own step pulls nothing, and the wrapper goes on from there."""
    ours, theirs = model_of(), model_of()
    optimizer = rk.RVSMWrapper(T.SGD(ours.parameters(), lr=0.1), **SPLIT)
    gradients(ours)
    optimizer.optimizer.step()
    gradients(theirs)
    T.SGD(theirs.parameters(), lr=0.1).step()
    assert apart(ours, theirs) == 0
    optimizer.step()
    assert apart(ours, theirs) > 0


@pytest.mark.parametrize("how", ["add", "load"])
def test_groups_that_came_without_the_wrapper(how: str) -> None:
    """They have no options of the splitting: nothing moves, and the error says what to do."""
    model, extra = model_of(), nn.Parameter(torch.ones(2, 2))
    plain = T.SGD([*model_of().parameters()], lr=0.1).state_dict()
    optimizer = rk.RVSMWrapper(T.SGD(model.parameters(), lr=0.1), **SPLIT)
    train(model, optimizer, range(2))
    if how == "add":
        optimizer.optimizer.add_param_group({"params": [extra]})
    else:
        optimizer.optimizer.load_state_dict(plain)
    before = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    for call in (optimizer.step, optimizer.sparsity, optimizer.state_dict, lambda: scaler.step(optimizer)):
        with pytest.raises(ValueError, match=r"group \d of SGD has no penalty.* through the wrapper"):
            call()
    assert apart(model, before) == 0
    if how == "load":
        optimizer.load_state_dict(plain)
        train(model, optimizer, range(2))
        assert optimizer.param_groups[0]["lam"] == SPLIT["lam"]


def test_new_state_and_new_groups() -> None:
    """Setting them sets those of the optimizer; new state is a new beginning, also for u and dual."""
    model = model_of()
    optimizer = rk.RVSMWrapper(T.AdamW(model.parameters()), **SPLIT, method="admm")
    train(model, optimizer, range(2))
    optimizer.state = defaultdict(dict)
    assert not optimizer.optimizer.state and not any("dual" in s for s in optimizer.state_dict()["state"].values())
    optimizer.param_groups = [{**optimizer.param_groups[0], "lr": 0.5}]
    assert optimizer.optimizer.param_groups[0]["lr"] == 0.5
    train(model, optimizer, range(2))
    assert all("dual" in s for s in optimizer.state_dict()["state"].values())


# ---- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoupled", [True, False])
def test_an_optimizer_that_calls_the_closure_again(decoupled: bool) -> None:
    """As SAM does: the first call is known, each later one has the coupled terms in its gradients."""

    class Twice(T.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            assert closure is not None
            with torch.enable_grad():
                loss = closure()
            for p in self.param_groups[0]["params"]:
                p.add_(0.1)
            with torch.enable_grad():
                closure()
            for p in self.param_groups[0]["params"]:
                p.sub_(0.1)
            super().step()
            return loss

    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = rk.RVSMWrapper(Twice([w], lr=0.5), penalty="l1", lam=0.1, beta=1.0, decoupled=decoupled)
    losses: list[float] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = w.square().sum() / 2
        loss.backward()
        losses.append(float(loss.detach()))
        return loss

    assert float(optimizer.step(closure).detach()) == losses[0] and len(losses) == 2
    pulled = torch.tensor([1.0, 2.0]) - (0.05 if decoupled else 0.0)
    expected = pulled - 0.5 * (pulled + 0.1 + (0.0 if decoupled else 0.1))
    torch.testing.assert_close(w.detach(), expected)


def test_missing_gradients_and_closures() -> None:
    model = model_of()
    first, last = model.parameters()
    optimizer = rk.RVSMWrapper(T.SGD(model.parameters(), lr=0.1), **SPLIT)
    before = bits(last)
    assert optimizer.step() is None
    first.grad = torch.ones_like(first)
    assert optimizer.step(lambda: 3.5) == 3.5
    assert torch.equal(bits(last), before) and apart(model, model_of()) > 0
    before = bits(first)
    for wrong in (3, "closure", torch.ones(())):
        with pytest.raises(TypeError, match="takes a closure"):
            optimizer.step(wrong)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert torch.equal(bits(first), before)


def test_the_same_parameter_twice(engine: str) -> None:
    """torch warns of it within a group and refuses it between groups; each place is pulled and stepped."""
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = rk.RVSMWrapper(T.SGD([p, p], lr=0.1), penalty="l0", lam=5.0, beta=1.0, engine=engine)
    optimizer.add_param_group({"params": [q]})
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [q]})
    p.grad = torch.zeros(3)
    q.grad = torch.zeros(3)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.81))
    torch.testing.assert_close(q.detach(), torch.full((3,), 0.9))


def test_two_threads() -> None:
    """One step at a time, the optimizer's part included."""
    inside, most = [], []

    class Slow(T.SGD):
        def step(self, closure: Any = None) -> Any:
            inside.append(1)
            most.append(len(inside))
            super().step(closure)
            inside.pop()

    model = model_of()
    gradients(model)
    optimizer = rk.RVSMWrapper(Slow(model.parameters(), lr=1e-3), **SPLIT)
    threads = [threading.Thread(target=lambda: [optimizer.step() for _ in range(50)]) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 100 and max(most) == 1
