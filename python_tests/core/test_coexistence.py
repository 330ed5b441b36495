"""Beside the rest of torch: GradScaler, compiled models, autograd, the garbage collector, threads."""

from __future__ import annotations

import concurrent.futures
import gc
import weakref
from typing import Any

import pytest
import torch
from builds import DEVICE, generator, quick_in_all, small_only
from torch import Tensor, nn

import rvsm_kernels as rk
from models import BASE, SPLIT, assert_same_weights, backward, batch, optimizer_of, small, train
from runner import bits, checked_step, same_bits

# ---- GradScaler ------------------------------------------------------------------------------------------------------


def test_grad_scaler(engine: str) -> None:
    """A power of two as scale changes no bit; the optimizer takes the scaled gradients as they are."""
    model, other = small(), small()
    ours, theirs = optimizer_of(model, engine), optimizer_of(other, engine)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0, growth_interval=2)
    for k in range(5):
        x, y = batch(k)
        ours.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        scaled = [bits(p.grad) for p in model.parameters()]
        scaler.step(ours)
        assert all(torch.equal(bits(p.grad), g) for p, g in zip(model.parameters(), scaled, strict=True))
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
    scaler = torch.amp.GradScaler(DEVICE, init_scale=64.0)
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


@quick_in_all
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


@pytest.mark.parametrize("cls", [rk.RVSM, rk.RVSMAdamW])
@pytest.mark.parametrize("options", [{"penalty": "l1"}, {"penalty": "topk", "density": 0.5}], ids=repr)
def test_compiled_training(engine: str, cls: type, options: dict[str, Any]) -> None:
    """A whole training step under torch.compile: the step is called as it is, in one piece, whatever lr is."""
    from torch._dynamo.utils import counters

    ends = []
    for compiled in (False, True):
        torch._dynamo.reset()
        counters.clear()
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to(DEVICE)
        optimizer = cls(rk.param_groups(model, lam=1e-3, beta=1.0, **options), lr=0.1, engine=engine)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

        def train_step(x: torch.Tensor, model: nn.Module = model, optimizer: Any = optimizer) -> None:
            model(x).square().mean().backward()
            optimizer.step()

        step = torch.compile(train_step, backend="eager") if compiled else train_step
        for _ in range(20):
            step(torch.randn(3, 8, device=DEVICE))
            scheduler.step()
            optimizer.zero_grad()
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(same_bits(p, q) for p, q in zip(*ends, strict=True))
    # The function, what goes on behind backward(), which torch does not trace, and behind the step; nothing again.
    assert 1 <= counters["frames"]["total"] <= 5, counters
    torch._dynamo.reset()


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
    """Each thread steps its own large optimizer; what it gets is bit for bit what it would get alone."""
    small_only(engine)  # nor can the interpreter be used by several threads

    def job(seed: int) -> Tensor:
        gen = generator(seed)
        p = nn.Parameter(torch.randn(1_100_003, generator=gen, device=DEVICE))
        optimizer = rk.RVSM([p], **BASE, penalty="l0", lam=0.2, beta=0.5, engine=engine)
        for _ in range(4):
            p.grad = p.detach() * 0.3 + 1
            optimizer.step()
        return p.detach()

    alone = [job(seed) for seed in range(4)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        together = list(pool.map(job, range(4)))
    assert all(same_bits(p, q) for p, q in zip(alone, together, strict=True))


def group_of(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, Any]:
    """The options of the group that a parameter is in."""
    group = next(g for g in optimizer.param_groups if any(p is q for q in g["params"]))
    return {k: v for k, v in group.items() if k not in ("params", "param_names")}
