"""The dispatcher ops: schemas that tell the truth, fake tensors, torch.compile, the numbers of the optimizer."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from builds import generator
from torch import Tensor, nn

import rvsm_kernels as rk
from runner import check_u, real, same_bits
from rvsm_kernels.method.groups import to_memory_order

SCHEMAS = {
    "prox": "(Tensor w, str? penalty, float tau, float a, int[]? group_dim) -> Tensor",
    "prox_": "(Tensor(a!)[] w, str? penalty, float lam, float beta, float a, int[]? group_dim, bool group_scale) -> ()",
    "penalty_value": "(Tensor[] w, str? penalty, float lam, float beta, float a, int[]? group_dim, bool group_scale)"
    " -> Tensor",
    "squares": "(Tensor[] w, int[] group_dim) -> Tensor[]",
}
PENALTIES = [("l0", None), ("l1", [0]), ("tl1", [1]), ("tl1", []), ("l0", [0, 1]), (None, None)]
each_kind = pytest.mark.parametrize(
    ("penalty", "dims"),
    [
        pytest.param("l0", None, id="elements"),
        pytest.param("tl1", [1], id="groups"),
        pytest.param(None, None, id="nothing to do"),
    ],
)
"""For opcheck, which looks at schemas and at what is written, not at numbers."""


@pytest.fixture(autouse=True)
def compiled(native: str) -> None:
    """Every test here runs on the compiled engines."""


def op(name: str) -> Any:
    """The only overload of an op."""
    return getattr(torch.ops.rvsm_kernels, name).default


def weights(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Contiguous, channels-last, matrix and transposed."""
    gen = generator(8)
    shapes = [(5, 4, 3, 3), (6, 4, 3, 3), (9, 17), (3, 8)]
    tensors = [torch.randn(s, generator=gen, dtype=torch.float64).to(dtype) for s in shapes]
    tensors[1] = tensors[1].to(memory_format=torch.channels_last)
    tensors[3] = tensors[3].t()
    return tensors


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema(name: str) -> None:
    """Mutation is visible in it. Defaults are a convenience beside it."""
    assert re.sub(r"=[^,)]+", "", str(op(name)._schema)) == f"rvsm_kernels::{name}{SCHEMAS[name]}"


# ---- opcheck ---------------------------------------------------------------------------------------------------------


@each_kind
def test_opcheck_prox(penalty: str | None, dims: list[int] | None) -> None:
    for w in weights():
        torch.library.opcheck(op("prox"), (w, penalty, 0.4, 2.0, dims))


@each_kind
def test_opcheck_prox_(penalty: str | None, dims: list[int] | None) -> None:
    torch.library.opcheck(op("prox_"), (weights(), penalty, 0.2, 0.5, 2.0, dims, True))


@each_kind
def test_opcheck_penalty_value(penalty: str | None, dims: list[int] | None) -> None:
    torch.library.opcheck(op("penalty_value"), (weights(), penalty, 0.2, 0.5, 2.0, dims, False))


def test_opcheck_squares() -> None:
    torch.library.opcheck(op("squares"), (weights(), [1]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_opcheck_other_dtypes(dtype: torch.dtype) -> None:
    w = weights(dtype)
    torch.library.opcheck(op("prox"), (w[0], "tl1", 0.4, 2.0, [1]))
    torch.library.opcheck(op("prox_"), (w, "l0", 0.2, 0.5, 2.0, [0], True))


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("penalty", "dims"), PENALTIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_ops_are_the_optimizer(penalty: str | None, dims: list[int] | None, dtype: torch.dtype) -> None:
    """Bit for bit: the penalty, u."""
    params, ws = [nn.Parameter(w) for w in weights(dtype)], weights(dtype)
    split: dict[str, Any] = {"penalty": penalty, "lam": 0.2, "beta": 0.5, "a": 2.0, "group_dim": dims}
    optimizer = rk.RVSM(params, lr=0.1, **split, group_scale=True, engine="native")
    value = op("penalty_value")(ws, penalty, 0.2, 0.5, 2.0, dims, True)
    assert value.dtype == torch.float64 and value.shape == ()
    assert penalty is None or value == optimizer.penalty_value()
    op("prox_")(ws, penalty, 0.2, 0.5, 2.0, dims, True)
    with optimizer.sparse_weights():
        assert all(same_bits(p, w) for p, w in zip(params, ws, strict=True))


def test_prox_op_is_rk_prox() -> None:
    for w in weights():
        u = op("prox")(w, "tl1", 0.4, 2.0, [1])
        assert same_bits(u, rk.prox(w, "tl1", 0.4, 2.0, 1)) and u.stride() == w.stride()
        options = {"penalty": "tl1", "lam": 0.4, "beta": 1.0, "a": 2.0, "group_dim": (1,), "group_scale": False}
        check_u(u, real(w), options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dims", [[0], [1], [0, 1], []])
def test_squares(dims: list[int], dtype: torch.dtype) -> None:
    """Sums in float64, in the order of memory; also of groups so long that they are summed in parts, and of none."""
    gen = generator(5)
    long = [torch.randn(shape, generator=gen).to(dtype) for shape in ((3, 300_000), (300_000, 3), (70, 5000))]
    tensors = [*weights(dtype), *long, torch.randn(8, 12, generator=gen).to(dtype)[:, ::2], torch.zeros(0, 4).to(dtype)]
    for w, sums in zip(tensors, op("squares")(tensors, dims), strict=True):
        reduced = [d for d in range(w.dim()) if d not in dims]
        exact = w.double().square().sum(dim=reduced) if reduced else w.double().square()
        assert sums.dtype == torch.float64
        torch.testing.assert_close(sums, to_memory_order(exact, w, dims), rtol=1e-13, atol=0)
    fakes = [w.to("meta") for w in tensors]
    assert [s.shape for s in op("squares")(fakes, dims)] == [s.shape for s in op("squares")(tensors, dims)]


def test_what_is_written_has_a_new_version() -> None:
    ws = weights()
    versions = [t._version for t in ws]
    op("penalty_value")(ws, "l0", 0.2, 0.5, 2.0, None, False)
    assert [t._version for t in ws] == versions
    op("prox_")(ws, "l0", 0.2, 0.5, 2.0, None, False)
    assert all(t._version > v for t, v in zip(ws, versions, strict=True))


# ---- fake tensors and torch.compile ----------------------------------------------------------------------------------


def test_fake_tensors() -> None:
    """Shapes, dtypes and strides without any arithmetic."""
    with torch._subclasses.FakeTensorMode() as mode:
        for w in weights():
            fake = mode.from_tensor(w)
            u = op("prox")(fake, "l0", 0.4, 2.0, [1])
            assert (u.shape, u.dtype, u.stride()) == (w.shape, w.dtype, w.stride())
        fakes = [mode.from_tensor(w) for w in weights()]
        value = op("penalty_value")(fakes, "l0", 0.2, 0.5, 2.0, None, False)
        assert value.shape == () and value.dtype == torch.float64
        assert op("prox_")(fakes, "l0", 0.2, 0.5, 2.0, None, False) is None


@pytest.mark.parametrize("group_dim", [None, [1]])
def test_compiled_functions(group_dim: list[int] | None) -> None:
    """One graph, and what it computes is what eager computes; mutation is not lost between the ops."""

    def some(ws: list[Tensor]) -> tuple[Tensor, Tensor]:
        value = torch.ops.rvsm_kernels.penalty_value(ws, "tl1", 0.2, 0.5, 2.0, group_dim, True)
        u = torch.ops.rvsm_kernels.prox(ws[0] * 2, "l0", 0.4, 2.0, group_dim)
        torch.ops.rvsm_kernels.prox_(ws, "l0", 0.2, 0.5, 2.0, group_dim, False)
        return value, u + ws[0]

    compiled = torch.compile(some, backend="aot_eager", fullgraph=True)
    eager_ws, compiled_ws = weights(), weights()
    for _ in range(2):
        want, got = some(eager_ws), compiled(compiled_ws)
        for x, y in zip((*want, *eager_ws), (*got, *compiled_ws), strict=True):
            assert same_bits(x, y)


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_errors_change_nothing() -> None:
    """A wrong last tensor, and the first is not touched."""
    good = weights()
    wrong: list[tuple[Any, type[Exception]]] = [
        (lambda ws: op("prox_")([*ws, torch.zeros(3, dtype=torch.int32)], "l0", 9.0, 0.5, 2.0, None, False), TypeError),
        (lambda ws: op("prox_")([*ws, torch.ones(3)], "l0", 9.0, 0.5, 2.0, [1], False), ValueError),
        (lambda ws: op("prox_")(ws, "l3", 9.0, 0.5, 2.0, None, False), ValueError),
    ]
    for call, error in wrong:
        ws = weights()
        with pytest.raises(error):
            call(ws)
        assert all(same_bits(w, g) for w, g in zip(ws, good, strict=True))
