"""In the place of torch.optim.SGD: closures, hooks, schedulers, GradScaler, compiled models, the autograd engine."""

from __future__ import annotations

import concurrent.futures
import gc
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import rvsm_kernels as rk
from models import backward, batch, small, train
from runner import bits, checked_step, same_bits

SPLIT: dict[str, Any] = {"penalty": "l0", "lam": 2e-3, "beta": 0.5}
BASE: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}


def optimizer_of(model: nn.Module, engine: str, **options: Any) -> rk.RVSM:
    """RVSM over the weights of a model as a user sets it up."""
    return rk.RVSM(rk.param_groups(model, **SPLIT), **{**BASE, **options}, engine=engine)


def weights(model: nn.Module) -> list[Tensor]:
    """Copies of all parameters."""
    return [p.detach().clone() for p in model.parameters()]


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert same_bits(p, q), f"{name} differs by {(p - q).abs().max().item()}"


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
    (w * w).sum().backward(create_graph=True)
    assert w.grad is not None and w.grad.requires_grad
    optimizer.step()
    m = optimizer.state[w]["momentum_buffer"]
    assert not m.requires_grad and m.data_ptr() != w.grad.data_ptr() and w.is_leaf
    w.grad = torch.ones(40)
    checked_step(optimizer)


def test_many_tiny_parameters(engine: str) -> None:
    gen = torch.Generator().manual_seed(3)
    params = [nn.Parameter(torch.randn(1 + k % 5, generator=gen)) for k in range(400)]
    groups = [{"params": params[:150]}, {"params": params[150:], "group_dim": 0, "penalty": "tl1", "lam": 0.1}]
    optimizer = rk.RVSM(groups, **BASE, lam=0.3, beta=0.5, engine=engine)
    for k in range(2):
        for p in params:
            p.grad = torch.randn(p.shape, generator=gen)
        checked_step(optimizer, f"step {k}")


# ---- GradScaler ------------------------------------------------------------------------------------------------------


def test_grad_scaler(engine: str) -> None:
    """A power of two as scale changes no bit; the optimizer takes the scaled gradients as they are."""
    model, other = small(), small()
    ours, theirs = optimizer_of(model, engine), optimizer_of(other, engine)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for k in range(5):
        x, y = batch(k)
        ours.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        scaler.step(ours)
        scaler.update()
        backward(other, theirs, k)
        theirs.step()
        assert_same_weights(model, other)
    assert scaler.get_scale() == 4096.0
    assert getattr(ours, "grad_scale", None) is None and getattr(ours, "found_inf", None) is None


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_grad_scaler_skips_an_overflow(engine: str, unscale: bool, bad: float) -> None:
    """Weights and momentum stay as they were, bit for bit; the next step goes on from there."""
    model, other = small(), small()
    ours, theirs = optimizer_of(model, engine), optimizer_of(other, engine)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for k in range(4):
        backward(model, ours, k, scale=scaler.get_scale() if k else float(scaler.scale(torch.ones(())).item()))
        if k == 2:
            model.head.bias.grad[1] = bad
        before = [(bits(p), bits(ours.state[p]["momentum_buffer"])) for p in model.parameters() if p in ours.state]
        if unscale:
            scaler.unscale_(ours)
        scaler.step(ours)
        scaler.update()
        if k == 2:
            for (w, m), p in zip(before, model.parameters(), strict=True):
                assert torch.equal(bits(p), w) and torch.equal(bits(ours.state[p]["momentum_buffer"]), m)
            assert scaler.get_scale() == 32.0
            continue
        backward(other, theirs, k)
        theirs.step()
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert same_bits(p, q)


def test_overflow_at_the_first_step_leaves_no_state(engine: str) -> None:
    """The next step is then the first: m is d."""
    model = small()
    optimizer = optimizer_of(model, engine)
    backward(model, optimizer, 0)
    optimizer.found_inf = torch.tensor(1.0)
    checked_step(optimizer, "found_inf")
    assert all("momentum_buffer" not in optimizer.state[p] for p in list(optimizer.state))
    optimizer.found_inf = torch.tensor(0.0)
    checked_step(optimizer, "the first step that counts")


# ---- beside the rest of torch ----------------------------------------------------------------------------------------


def test_compiled_model(engine: str) -> None:
    """torch.compile of the model; the graph sees the new weights after each step."""
    model, other = small(), small()
    ours, theirs = optimizer_of(model, engine), optimizer_of(other, engine)
    compiled = torch.compile(model, backend="aot_eager")
    for k in range(4):
        loss = backward(compiled, ours, k)
        expected = backward(other, theirs, k)
        assert torch.allclose(loss, expected, rtol=1e-5)
        ours.step()
        theirs.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-4, atol=1e-6)


def test_version_counters(engine: str) -> None:
    """Autograd notices a step between the forward and the backward pass."""
    p, idle = nn.Parameter(torch.full((9,), 2.0)), nn.Parameter(torch.ones(3))
    optimizer = rk.RVSM([p, idle], lr=0.1, momentum=0.9, engine=engine)
    for _ in range(3):
        p.grad = torch.ones(9)
        loss = (p * p).sum()
        version, untouched = p._version, idle._version
        optimizer.step()
        assert p._version > version and idle._version == untouched
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    m = optimizer.state[p]["momentum_buffer"]
    version = m._version
    optimizer.step()
    assert m._version > version, "the momentum buffer's version counter was not bumped"


@pytest.mark.parametrize("read", ["sparse_weights", "sparsify_"])
def test_version_counters_of_reading(engine: str, read: str) -> None:
    p = nn.Parameter(torch.full((9,), 2.0))
    optimizer = rk.RVSM([p], lr=0.1, engine=engine)
    loss = (p * p).sum()
    if read == "sparse_weights":
        with optimizer.sparse_weights(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    else:
        optimizer.sparsify_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


class Refers:
    """A hook that does nothing and holds an optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def __call__(self, p: Tensor) -> None:
        pass


@pytest.mark.parametrize("cycle", [None, "hook", "attribute"])
def test_optimizer_is_garbage_collected(engine: str, cycle: str | None) -> None:
    """Also when a parameter refers to the optimizer, in the ways in which torch.optim.SGD is collected."""
    model = small()
    optimizer = optimizer_of(model, engine)
    for p in model.parameters():
        if cycle == "hook":
            p.register_hook(Refers(optimizer))
        elif cycle == "attribute":
            p.optimizer = optimizer
    del p
    train(model, optimizer, range(2))
    ours, theirs = weakref.ref(optimizer), weakref.ref(model.conv.weight)
    del optimizer, model
    gc.collect()
    assert ours() is None, "the optimizer outlives its last reference"
    assert theirs() is None, "a parameter outlives its last reference"


def test_step_in_the_backward_pass(engine: str) -> None:
    """One optimizer per parameter, stepped from a hook as soon as the gradient is there."""
    model, other = small(), small()
    theirs = optimizer_of(other, engine)
    ours = {p: rk.RVSM([{"params": [p], **SPLIT, **group_of(theirs, q)}], engine=engine)
            for p, q in zip(model.parameters(), other.parameters(), strict=True)}  # fmt: skip

    def hook(p: Tensor) -> None:
        ours[p].step()
        p.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(hook)
    for k in range(3):
        x, y = batch(k)
        nn.functional.cross_entropy(model(x), y).backward()
        backward(other, theirs, k)
        theirs.step()
    assert_same_weights(model, other)


def test_optimizers_in_several_threads(engine: str) -> None:
    """Each thread trains its own model; what it gets is what it would get alone."""
    alone = [small(seed=k) for k in range(4)]
    together = [small(seed=k) for k in range(4)]
    for model in alone:
        train(model, optimizer_of(model, engine), range(4))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(train, model, optimizer_of(model, engine), range(4)) for model in together]
        losses = [job.result() for job in jobs]
    assert all(len(values) == 4 for values in losses)
    for one, other in zip(alone, together, strict=True):
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.allclose(p, q, rtol=1e-4, atol=1e-6)  # torch's own convolutions may differ in rounding


def group_of(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, Any]:
    """The options of the group that a parameter is in."""
    group = next(g for g in optimizer.param_groups if any(p is q for q in g["params"]))
    return {k: v for k, v in group.items() if k not in ("params", "param_names")}
