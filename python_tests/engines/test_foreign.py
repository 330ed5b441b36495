"""Tensors without memory, traced code, and parameters that no optimizer trains: served or refused, never a crash."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import rvsm_kernels as rk
from runner import bits, same_bits
from rvsm_kernels.engines import native as native_engine

SPLIT: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "penalty": "l1", "lam": 0.1, "beta": 0.5}
METHODS: list[dict[str, Any]] = [
    {},
    {"method": "admm"},
    {"method": "rvsm-delayed"},
    {"penalty": "topk", "density": 0.3},
    {"group_dim": 0, "lam": 0.5, "group_lasso": 0.1},
    {"decoupled": False, "unit_norm": True},
]


@pytest.fixture(scope="module")
def mesh() -> Iterator[Any]:
    """A mesh of one process."""
    from torch.distributed.device_mesh import init_device_mesh

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


class Wrapper(Tensor):
    """A subclass that holds another tensor, as quantised weights do."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def unwrap(x: Any) -> Any:
            return x.inner if isinstance(x, Wrapper) else x

        values = torch.utils._pytree.tree_map(unwrap, args)
        out = func(*values, **torch.utils._pytree.tree_map(unwrap, kwargs or {}))
        if func._schema.is_mutable or not isinstance(out, Tensor):
            return args[0] if func._schema.is_mutable else out
        return Wrapper(out)


MODE = FakeTensorMode(allow_non_fake_inputs=True)


def fake(w: Tensor) -> Tensor:
    return MODE.from_tensor(w)


FOREIGN: dict[str, Callable[[Tensor], Tensor]] = {
    "meta": lambda w: w.to("meta"),
    "fake": fake,
    "functional": torch._to_functional_tensor,
    "wrapper": Wrapper,
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("place", ["parameter", "gradient", "momentum_buffer", "u", "dual"])
def test_named_engines_refuse(native: str, kind: str, place: str) -> None:
    """By name and kind; nothing has changed, and after a repair the optimizer goes on."""
    w, other = torch.randn(4, 3), nn.Parameter(torch.randn(5))
    p = nn.Parameter(FOREIGN[kind](w.clone()) if place == "parameter" else w)
    other.grad = torch.ones(5)
    p.grad = FOREIGN[kind](torch.ones(4, 3)) if place == "parameter" else torch.ones(4, 3)
    method = {"u": "rvsm-delayed", "dual": "admm"}.get(place, "rvsm")
    optimizer = rk.RVSM([("other", other), ("odd", p)], **SPLIT, method=method, engine=native)
    if place in ("momentum_buffer", "u", "dual"):
        optimizer.step()
        good = optimizer.state[p][place]
        optimizer.state[p][place] = FOREIGN[kind](good.detach().clone())
    elif place == "gradient":
        good = p.grad
        if kind == "meta":
            with pytest.raises(RuntimeError):
                p.grad = FOREIGN[kind](torch.ones(4, 3))
            return
        try:
            p.grad = FOREIGN[kind](torch.ones(4, 3))
        except RuntimeError:
            return  # torch does not take it either
    before = bits(other)
    with pytest.raises((TypeError, RuntimeError), match="odd"):
        optimizer.step()
    assert torch.equal(bits(other), before)
    if place == "gradient":
        p.grad = good
    elif place != "parameter":
        optimizer.state[p][place] = good
    if place != "parameter":
        optimizer.step()


@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize("options", METHODS, ids=str)
def test_the_default_engine_serves(kind: str, options: dict[str, Any]) -> None:
    """Shapes and types alone: a step, and what can be read without values."""
    p = nn.Parameter(FOREIGN[kind](torch.randn(4, 3)))
    p.grad = FOREIGN[kind](torch.ones(4, 3))
    optimizer = rk.RVSM([("odd", p)], **{**SPLIT, **options})
    for _ in range(2):
        optimizer.step()
    with optimizer.sparse_weights():
        pass
    optimizer.sparsify_()
    for read in (optimizer.sparsity, optimizer.penalty_value):
        try:
            read()
        except TypeError as error:
            assert "odd" in str(error)  # noqa: PT017
        except Exception as error:
            assert kind == "meta" and "meta" in str(error), error  # noqa: PT017


def test_freed_memory(native: str) -> None:
    """FSDP1 frees the storage of its parameters."""
    p = nn.Parameter(torch.randn(1000))
    p.grad = torch.ones(1000)
    optimizer = rk.RVSM([("gone", p)], **SPLIT, engine=native)
    optimizer.step()
    p.untyped_storage().resize_(0)
    for call in (optimizer.step, optimizer.sparsify_, optimizer.penalty_value):
        with pytest.raises(RuntimeError, match=r"gone.*freed"):
            call()
    p.untyped_storage().resize_(4000)
    with torch.no_grad():
        p.fill_(1.0)
    optimizer.step()


@pytest.mark.parametrize("kind", ["meta", "wrapper"])
def test_prox_and_ops(kind: str) -> None:
    w = FOREIGN[kind](torch.randn(4, 3))
    assert rk.prox(w, "l1", 0.1).shape == (4, 3)
    if kind == "meta":
        with pytest.raises((TypeError, RuntimeError)):
            torch.ops.rvsm_kernels.prox_([torch.randn(3), w], "l1", 0.1, 1.0)


@pytest.mark.parametrize("options", METHODS, ids=str)
def test_dtensors(mesh: Any, options: dict[str, Any]) -> None:
    """A mesh of one: what the plain tensor does."""
    from torch.distributed.tensor import Shard, distribute_tensor

    w, g = torch.randn(6, 4), torch.randn(6, 4)
    sharded = nn.Parameter(distribute_tensor(w, mesh, [Shard(0)]))
    plain = nn.Parameter(w.clone())
    ours, theirs = rk.RVSM([sharded], **{**SPLIT, **options}), rk.RVSM([plain], **{**SPLIT, **options})
    for _ in range(3):
        sharded.grad, plain.grad = distribute_tensor(g, mesh, [Shard(0)]), g.clone()
        ours.step()
        theirs.step()
        torch.testing.assert_close(sharded.full_tensor(), plain.detach())
    assert ours.sparsity().to_dict()["total"] == theirs.sparsity().to_dict()["total"]
    torch.testing.assert_close(ours.penalty_value(), theirs.penalty_value())
    ours.sparsify_()
    theirs.sparsify_()
    once = sharded.full_tensor()
    torch.testing.assert_close(once, plain.detach())
    ours.sparsify_()
    assert same_bits(sharded.full_tensor(), once)
    assert rk.prox(sharded.detach(), "l1", 0.1).full_tensor().shape == (6, 4)


def test_fsdp2_and_tensor_parallel(mesh: Any) -> None:
    """fully_shard and a mix of sharded and plain layers train."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    for wrap in (
        lambda m: fully_shard(m, mesh=mesh),
        lambda m: parallelize_module(m, mesh, {"0": ColwiseParallel()}),
    ):
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
        wrap(model)
        optimizer = rk.RVSM(rk.param_groups(model, penalty="l0", lam=1e-3, beta=0.5), lr=0.1, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(4, 6)).square().mean().backward()
            optimizer.step()
        assert optimizer.sparsity().total.numel == 64
        with optimizer.sparse_weights():
            model(torch.randn(4, 6))


# ---- traced code -----------------------------------------------------------------------------------------------------


def traced(trace: str, call: Callable[[Tensor], Any]) -> Any:
    """The same call under another tracer."""
    x = torch.ones(4)
    if trace == "make_fx":
        return make_fx(call)(x)
    if trace == "pre-dispatch":
        return make_fx(call, pre_dispatch=True)(x)
    return torch.func.functionalize(call)(x)


def test_functional_gradients_of_plain_parameters() -> None:
    """torch mixes them nowhere; here a sentence says so."""
    p = nn.Parameter(torch.ones(4))
    optimizer = rk.RVSM([("w", p)], lr=0.1)

    def step(x: Tensor) -> Tensor:
        p.grad = x.clone()
        optimizer.step()
        return x + 0

    with pytest.raises(TypeError, match="the gradient of w"):
        torch.func.functionalize(step)(torch.ones(4))
    p.grad = torch.ones(4)
    optimizer.step()


@pytest.mark.parametrize("trace", ["make_fx", "pre-dispatch", "functionalize"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_traced_steps(trace: str, momentum: float) -> None:
    """The default engine is seen by the tracer; a named one says that it is not."""
    p = nn.Parameter(torch.ones(4))

    def step(x: Tensor) -> Tensor:
        if trace != "functionalize":  # torch lets nobody mix functional tensors with others
            p.grad = x * 2
        optimizer.step()
        return x + 0

    for engine in (None, "native"):
        if engine is not None and native_engine.load_error is not None:
            continue
        optimizer = rk.RVSM([p], lr=0.1, momentum=momentum, penalty="l1", lam=0.1, beta=0.5, engine=engine)
        p.grad = torch.ones(4)
        if engine is None:
            before = p.detach().clone()
            graph = traced(trace, step)
            assert not torch.equal(p.detach(), before)
            assert trace == "functionalize" or len(list(graph.graph.nodes)) > 6, "the update is not in the graph"
            p.grad = None
            optimizer.state.clear()
            p.grad = torch.ones(4)
            optimizer.step()
        else:
            with pytest.raises((RuntimeError, TypeError), match="engine"):
                traced(trace, step)
        p.grad = None


def test_compiled_step(engine: str) -> None:
    """torch.compile of a function that steps: eager and compiled give the same."""
    params = [nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4)) for _ in range(2)]
    for p in params:
        p.grad = torch.ones(3, 4)
    eager, ours = (rk.RVSM([p], **SPLIT, engine=engine) for p in params)
    compiled = torch.compile(lambda: ours.step(), backend="eager")
    for _ in range(3):
        eager.step()
        compiled()
    assert same_bits(params[0].detach(), params[1].detach())


# ---- parameters that are not trained ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_frozen_parameters_of_other_dtypes(engine: str, dtype: torch.dtype) -> None:
    odd = nn.Parameter(torch.zeros(3, 3).to(dtype), requires_grad=False)
    model = nn.Linear(3, 3)
    model.register_parameter("odd", odd)
    for groups in ([*model.parameters()], rk.param_groups(model, penalty="l1", lam=0.1, beta=0.5)):
        optimizer = rk.RVSM(groups, lr=0.1, momentum=0.9, engine=engine)
        for _ in range(2):
            model(torch.ones(2, 3)).sum().backward()
            optimizer.step()
        with optimizer.sparse_weights():
            pass
        optimizer.sparsify_()
        optimizer.penalty_value()
        assert not any(r.name == "odd" for r in optimizer.sparsity().rows)
        optimizer.load_state_dict(optimizer.state_dict())


def test_engines_are_asked_about_what_is_stepped(engine: str) -> None:
    """A parameter without a gradient may be anywhere."""
    frozen = nn.Parameter(torch.empty(3, device="meta"), requires_grad=False)
    idle = nn.Parameter(torch.empty(2, 2, device="meta"))
    p = nn.Parameter(torch.ones(4))
    optimizer = rk.RVSM([frozen, p, idle], **{**SPLIT, "penalty": None}, engine=engine)
    for _ in range(3):
        p.grad = torch.ones(4)
        optimizer.step()
    assert p[0] < 1


def test_frozen_after_construction(engine: str) -> None:
    """A frozen layer is u of nothing: read as it is, by everything but an explicit argument."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    optimizer = rk.RVSM(rk.param_groups(model, penalty="l1", lam=0.1, beta=0.5), lr=0.1, engine=engine)
    model[0].requires_grad_(False)
    before = bits(model[0].weight)
    with optimizer.sparse_weights():
        assert torch.equal(bits(model[0].weight), before)
        assert (model[1].weight == 0).any()
    assert optimizer.sparsity().rows[0].zeros == 0
    with optimizer.sparse_weights(frozen=True):
        assert (model[0].weight == 0).any()
    optimizer.sparsify_()
    assert torch.equal(bits(model[0].weight), before) and (model[1].weight == 0).any()
    optimizer.sparsify_(frozen=True)
    assert (model[0].weight == 0).any()
    model.requires_grad_(False)
    with pytest.warns(UserWarning, match="frozen"), optimizer.sparse_weights():
        pass
