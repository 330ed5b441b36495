"""In the place of torch.optim.SGD: its signature, closures, hooks, schedulers, and every kind of parameter list."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from builds import generator, quick_in_all
from torch import Tensor, nn
from torch.optim import lr_scheduler

import rvsm_kernels as rk
from models import BASE, assert_same_weights, backward, batch, optimizer_of, small, train, weights
from runner import checked_step, same_bits

# ---- the signature ---------------------------------------------------------------------------------------------------


def test_signature_starts_as_sgd() -> None:
    """One line changes: what is positional in torch.optim.SGD is positional here, with the same names."""
    ours = list(inspect.signature(rk.RVSM.__init__).parameters.values())
    theirs = list(inspect.signature(torch.optim.SGD.__init__).parameters.values())
    positional = [p.name for p in theirs if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD] == positional
    defaults = {p.name: p.default for p in ours}
    assert {k: defaults[k] for k in ("lr", "momentum", "dampening", "weight_decay", "nesterov")} == {
        **{"lr": 1e-3, "momentum": 0, "dampening": 0, "weight_decay": 0, "nesterov": False}
    }
    options = ("penalty", "lam", "beta", "a", "density", "group_dim", "group_scale", "group_lasso", "decoupled")
    assert {k: defaults[k] for k in (*options, "method", "unit_norm", "maximize", "engine")} == {
        **{"penalty": "l0", "lam": 1e-6, "beta": 1e-2, "a": 1.0, "density": None, "group_dim": None},
        **{"group_scale": False, "group_lasso": 0.0, "decoupled": True, "method": "rvsm", "unit_norm": False},
        **{"maximize": False, "engine": None},
    }
    assert inspect.signature(rk.reference.RVSM.__init__) == inspect.signature(rk.RVSM.__init__)
    assert issubclass(rk.RVSM, torch.optim.Optimizer)


# ---- step ------------------------------------------------------------------------------------------------------------


def test_closure(engine: str) -> None:
    """Called once, with gradients enabled also when the caller has switched them off; its loss is returned."""
    model, calls = small(), []
    optimizer = optimizer_of(model, engine)

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = model(batch(0)[0]).square().mean()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True] and isinstance(loss, Tensor)
    other = small()
    plain = optimizer_of(other, engine)
    other(batch(0)[0]).square().mean().backward()
    assert plain.step() is None
    assert_same_weights(model, other)


def test_zero_grad(engine: str) -> None:
    model = small()
    optimizer = optimizer_of(model, engine, weight_decay=0.0, nesterov=False)
    train(model, optimizer, range(2))
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    before = weights(model)
    optimizer.step()  # no gradients: no parameter takes part
    assert all(same_bits(p, w) for p, w in zip(model.parameters(), before, strict=True))
    backward(model, optimizer, 2)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    checked_step(optimizer, "zero gradients: pull, weight decay and momentum go on")


def test_gradients_are_not_kept_alive(engine: str) -> None:
    """zero_grad() gives the memory of the gradients back."""
    model = small()
    optimizer = optimizer_of(model, engine)
    for k in range(2):
        backward(model, optimizer, k)
        optimizer.step()
        grads = [weakref.ref(p.grad) for p in model.parameters()]
        optimizer.zero_grad()
        assert all(ref() is None for ref in grads), "something holds a gradient after zero_grad()"


def test_hooks(engine: str) -> None:
    """Pre-hooks see the weights before the step, post-hooks after, and each is called once."""
    model, seen = small(), []
    optimizer = optimizer_of(model, engine)
    backward(model, optimizer, 0)
    before = weights(model)
    optimizer.register_step_pre_hook(lambda o, a, k: seen.append(("pre", weights(model))))
    optimizer.register_step_post_hook(lambda o, a, k: seen.append(("post", weights(model))))
    optimizer.step()
    assert [name for name, _ in seen] == ["pre", "post"]
    for old, pre, post, p in zip(before, seen[0][1], seen[1][1], model.parameters(), strict=True):
        assert same_bits(old, pre) and same_bits(post, p.detach()) and not same_bits(pre, post)


def test_pre_hook_may_edit_what_the_step_uses(engine: str) -> None:
    model, other = small(), small()
    ours, theirs = optimizer_of(model, engine), optimizer_of(other, engine, lr=0.01)

    def edit(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.01
            for p in group["params"]:
                p.grad.mul_(0.5)

    backward(model, ours, 0)
    backward(other, theirs, 0, scale=0.5)
    ours.register_step_pre_hook(edit)
    ours.step()
    theirs.step()
    assert_same_weights(model, other)


SCHEDULERS: list[tuple[str, Callable[[Any], Any]]] = [
    ("StepLR", lambda o: lr_scheduler.StepLR(o, 2, 0.3)),
    ("OneCycleLR", lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=12)),  # also moves momentum
    ("LambdaLR", lambda o: lr_scheduler.LambdaLR(o, lambda k: 1 / (1 + k))),
    ("CosineAnnealingLR", lambda o: lr_scheduler.CosineAnnealingLR(o, 8)),
]


@pytest.mark.parametrize("make", [s[1] for s in SCHEDULERS], ids=[s[0] for s in SCHEDULERS])
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_schedulers(engine: str, make: Callable[[Any], Any], tensor_lr: bool) -> None:
    """The numbers that a scheduler sets are the numbers of the next step, and those of SGD under it."""
    model = small()
    optimizer = optimizer_of(model, engine, lr=torch.tensor(0.05) if tensor_lr else 0.05)
    scheduler, seen = make(optimizer), []
    sgd = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.05, momentum=0.9)
    theirs = make(sgd)
    for k in range(6):
        backward(model, optimizer, k)
        checked_step(optimizer, f"step {k}")
        sgd.step()
        seen.append(float(optimizer.param_groups[0]["lr"]))
        assert seen[-1] == pytest.approx(sgd.param_groups[0]["lr"], rel=1e-6)
        assert optimizer.param_groups[0]["momentum"] == pytest.approx(sgd.param_groups[0]["momentum"])
        scheduler.step()
        theirs.step()
    assert len(set(seen)) > 1


def test_tensor_lr_changes_in_place(engine: str) -> None:
    model, lr = small(), torch.tensor(0.05)
    optimizer = optimizer_of(model, engine, lr=lr)
    for k, value in enumerate((0.05, 0.01, 0.2)):
        optimizer.param_groups[0]["lr"].fill_(value)
        backward(model, optimizer, k)
        checked_step(optimizer, f"lr {value}")


def test_add_param_group(engine: str) -> None:
    model = small()
    optimizer = rk.RVSM([{"params": model.conv.parameters(), "penalty": "l1"}], lr=0.1, lam=1e-3, engine=engine)
    train(model, optimizer, range(1))
    head = {"params": [model.head.weight], "lr": 0.01, "momentum": 0.9, "penalty": "tl1", "lam": 1e-2, "group_dim": 0}
    optimizer.add_param_group(head)
    assert optimizer.param_groups[1]["beta"] == 1e-2
    for k in range(3):
        backward(model, optimizer, k)
        before = weights(model.head)
        checked_step(optimizer, f"step {k}")
        assert not same_bits(model.head.weight.detach(), before[0])


def test_named_parameters(engine: str) -> None:
    """Names are taken as torch takes them, survive state_dict, and appear in the report."""
    model = small()
    optimizer = rk.RVSM(model.named_parameters(), lr=0.1, engine=engine)
    assert optimizer.state_dict()["param_groups"][0]["param_names"][0] == "conv.weight"
    train(model, optimizer, range(2))
    assert [r.name for r in optimizer.sparsity().rows] == [name for name, _ in model.named_parameters()]
    plain = rk.RVSM(small().named_parameters(), lr=0.1, engine=engine)
    train_again = small()
    plain = rk.RVSM(train_again.parameters(), lr=0.1, engine=engine)
    train(train_again, plain, range(2))
    assert_same_weights(model, train_again)


@quick_in_all
def test_what_has_no_gradient_is_skipped(engine: str) -> None:
    """Parameters without a gradient, empty parameters, empty groups."""
    empty, used, idle = nn.Parameter(torch.empty(0, 3)), nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(2, 2))
    empty_too = nn.Parameter(torch.empty(3, 0))
    groups = [
        {"params": [empty, used, idle], "momentum": 0.9},
        {"params": []},
        {"params": [empty_too], "group_dim": 0, "group_scale": True, "group_lasso": 0.1},
    ]
    optimizer = rk.RVSM(groups, lr=0.1, lam=0.1, weight_decay=0.1, engine=engine)
    optimizer.step()
    assert not optimizer.state
    for k in range(2):
        empty.grad, empty_too.grad = torch.empty(0, 3), torch.empty(3, 0)
        used.grad = torch.full((5,), 0.25)
        checked_step(optimizer, f"step {k}")
        assert torch.equal(idle, torch.ones(2, 2)) and idle not in optimizer.state
        assert not torch.equal(used, torch.ones(5))
    with optimizer.sparse_weights():
        assert empty.shape == (0, 3)
    assert optimizer.penalty_value() > 0
    assert str(optimizer.sparsity())


def test_plain_tensors_and_generators(engine: str) -> None:
    w = torch.randn(9, requires_grad=True)
    optimizer = rk.RVSM((x for x in [w]), lr=0.1, momentum=0.9, engine=engine)
    for k in range(2):
        (w * w).sum().backward()
        checked_step(optimizer, f"step {k}")
    with pytest.raises(ValueError, match="empty parameter list"):
        rk.RVSM([], lr=0.1, engine=engine)


def test_first_momentum_is_a_copy_of_the_gradient(engine: str) -> None:
    """Also of one that is still part of a graph."""
    w = torch.randn(40, requires_grad=True)
    optimizer = rk.RVSM([w], lr=0.1, momentum=0.9, penalty=None, engine=engine)
    (w.grad,) = torch.autograd.grad((w * w).sum(), w, create_graph=True)
    assert w.grad.requires_grad
    optimizer.step()
    m = optimizer.state[w]["momentum_buffer"]
    assert not m.requires_grad and m.data_ptr() != w.grad.data_ptr() and w.is_leaf
    w.grad = torch.ones(40)
    checked_step(optimizer)


def test_many_tiny_parameters(engine: str) -> None:
    gen = generator(3)
    params = [nn.Parameter(torch.randn(1 + k % 5, generator=gen)) for k in range(400)]
    groups = [{"params": params[:150]}, {"params": params[150:], "group_dim": 0, "penalty": "tl1", "lam": 0.1}]
    optimizer = rk.RVSM(groups, **BASE, lam=0.3, beta=0.5, engine=engine)
    for k in range(2):
        for p in params:
            p.grad = torch.randn(p.shape, generator=gen)
        checked_step(optimizer, f"step {k}")
