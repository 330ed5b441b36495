"""What compiled kernels do to whole tensors before and after a step, against torch's operations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from builds import generator
from torch import Tensor, nn

import rvsm_kernels as rk
from rvsm_kernels.engines import native, whole
from rvsm_kernels.engines.interface import Engine
from rvsm_kernels.method.groups import Blocks, Grouping
from rvsm_kernels.method.precision import Stored
from rvsm_kernels.method.selection import Room
from rvsm_kernels.method.selection import normalize_ as normalize_in_torch_
from rvsm_kernels.method.support import TorchSupport

pytestmark = [
    pytest.mark.skipif(native.load_error is not None, reason=str(native.load_error)),
    pytest.mark.usefixtures("on_cpu"),
]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda w: w,
    "transposed": lambda w: w.t().contiguous().t(),
    "every other row": lambda w: torch.stack((w, w), 1).reshape(2 * len(w), -1)[::2],
    "beside a vector": lambda w: torch.cat((w.new_zeros(1), w.reshape(-1)))[1:].view(w.shape),
}
SHAPES = ((1, 1), (3, 5), (1, 513), (2, 32768), (401, 331))


def made(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous", seed: int = 0) -> Tensor:
    return LAYOUTS[layout](torch.randn(shape, generator=generator(seed)).to(dtype))


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.uint8)


def is_compiled(p: Tensor, grouping: Grouping) -> bool:
    return not isinstance(whole.support_of(p, 0.5, grouping, Room.like(p)), TorchSupport)


# ---- the unit norm ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_quotient_is_rounded_once(dtype: torch.dtype, layout: str, threads: int) -> None:
    """Bit for bit the quotient by the norm, in the type of the arithmetic, and rounded to the type that is stored."""
    tensors = [made(shape, dtype, layout, k) for k, shape in enumerate(SHAPES)]
    wanted, norms = [], []
    for w in tensors:
        arithmetic = w.double() if dtype == torch.float64 else w.float()
        norms.append(w.double().square().sum().sqrt().to(arithmetic.dtype))
        wanted.append((arithmetic / norms[-1]).to(dtype))
    whole.normalize_([Stored(w) for w in tensors], None, None, {})
    for w, want, norm in zip(tensors, wanted, norms, strict=True):
        if dtype == torch.float64:  # another order of summation
            torch.testing.assert_close(w, want, rtol=1e-14, atol=0)
        else:
            assert torch.equal(bits(w), bits(want)), (w.shape, norm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_one_division_cannot_do(dtype: torch.dtype) -> None:
    """Zeros, infinities, NaN and norms out of range are as torch's operations leave them; the others are divided."""
    tiny = 2.0**-149 if dtype == torch.float32 else 2.0**-1074
    rows = [[0.0, -0.0], [math.inf, 1], [math.nan, 1], [tiny, 2 * tiny], [torch.finfo(dtype).max] * 2, [3, 4]]
    tensors = [torch.tensor(row, dtype=dtype) for row in rows]
    wanted = [t.clone() for t in tensors]
    whole.normalize_([Stored(t) for t in (*tensors, torch.zeros(0, 2, dtype=dtype))], None, None, {})
    normalize_in_torch_([Stored(t) for t in wanted], None)
    for got, want in zip(tensors, wanted, strict=True):
        torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-6, atol=0)
    assert (
        tensors[0][1].signbit() and tensors[5].tolist() == [0.6000000238418579, 0.800000011920929]
    ) or dtype.itemsize == 8


def test_norms_where_nothing_is_to_move() -> None:
    w = made((3, 5), torch.float32)
    before = w.clone()
    for found_inf, lr in ((torch.tensor(1.0), None), (torch.tensor([2.0]), None), (None, torch.tensor(0.0))):
        whole.normalize_([Stored(w)], found_inf, lr, {})
        assert torch.equal(w, before)
    whole.normalize_([Stored(w)], torch.tensor(0.0), torch.tensor(0.1), {})
    assert abs(w.double().norm().item() - 1) < 1e-6


GATHERS: dict[str, dict[str, Any]] = {
    "l0": {"penalty": "l0"},
    "momentum": {"penalty": "l1", "momentum": 0.9, "statistics": True},
    "input channels": {"penalty": "l0", "group_dim": 1, "group_lasso": 0.01},
    "blocks": {"penalty": "l1", "group_dim": 0, "group_block": 2},
    "top-k": {"penalty": "topk", "density": 0.5},
    "2:4": {"penalty": "nm", "pattern": (2, 4)},
    "admm": {"penalty": "l0", "method": "admm"},
    "no penalty": {"penalty": None},
    "masters": {"penalty": "l0", "master_weights": True, "momentum": 0.9},
    "stochastic": {"penalty": "l0", "rounding": "stochastic"},
    "float32 momentum": {"penalty": "l0", "momentum": 0.9, "state_dtype": "float32"},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", GATHERS.values(), ids=GATHERS)
def test_the_step_adds_up_the_squares_of_its_new_weights(
    options: dict[str, Any], dtype: torch.dtype, threads: int
) -> None:
    """Those that a step without the division leaves; of a tensor that is stepped as a copy nothing is known.

    The first step, which makes states, may know nothing.
    """
    shapes = [(2, 4), (4, 8), (2, 32772), (402, 332)]

    def stepped(unit_norm: bool) -> tuple[rk.RVSM, list[nn.Parameter]]:
        params = [nn.Parameter(made(shape, dtype, seed=k)) for k, shape in enumerate(shapes)]
        params += [nn.Parameter(made((402, 332), dtype, layout, 9)) for layout in ("transposed", "every other row")]
        for k, p in enumerate(params):
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator(100 + k)))
        optimizer = rk.RVSM(params, lr=0.1, lam=0.1, beta=2.0, engine="native", **options)
        optimizer.step()
        optimizer.param_groups[0]["unit_norm"] = unit_norm
        optimizer.step()
        return optimizer, params

    optimizer, _ = stepped(True)
    twin, moved = stepped(False)
    gathered = [room.item() for room in optimizer._squares._rooms.values()]
    assert gathered[-1] == -1
    if dtype == torch.float64 and "state_dtype" in options:  # its states are copies, and so is it
        assert set(gathered) == {-1.0}
        return
    for p, got in zip(moved[:-1], gathered, strict=False):
        want = Stored.of(p, twin.param_groups[0], twin.state.get(p)).load().double().square().sum().item()
        assert abs(got - want) <= 1e-12 * want, p.shape


@pytest.mark.parametrize("of_second", [True, False])
def test_squares_of_parameters_that_share_memory(of_second: bool) -> None:
    """In groups of their own: what the second one does comes between the squares of the first and their use."""
    results = []
    for engine in ("native", "reference"):
        w = made((6, 4), torch.float32)
        params = [nn.Parameter(w), nn.Parameter(w[1:3])]
        assert params[0].data_ptr() == w.data_ptr()
        groups = [{"params": [params[0]], "unit_norm": True}, {"params": [params[1]], "unit_norm": of_second}]
        optimizer = rk.RVSM(groups, lr=0.1, penalty="l0", lam=0.01, beta=1.0, engine=engine)
        for _ in range(2):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
        results.append(w)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


def test_norms_of_tensors_that_share_memory() -> None:
    """In their order: the second one sees what the first has done."""
    start = made((6, 4), torch.float32)
    results = []
    for normalize in (lambda tensors, *rest: whole.normalize_(tensors, *rest, {}), normalize_in_torch_):
        w = start.clone()
        normalize([Stored(w[1:]), Stored(w[:3]), Stored(w[5])], None, None)
        results.append(w)
    assert torch.equal(*results)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{"master_weights": True}, {"rounding": "stochastic"}], ids=str)
def test_norms_of_weights_that_are_not_stored_as_they_are(options: dict[str, Any], half: torch.dtype) -> None:
    """Their arithmetic is that of the reference engine."""
    results = []
    for engine in ("native", "reference"):
        p = nn.Parameter(made((40, 30), half))
        optimizer = rk.RVSM([p], lr=0.1, penalty=None, unit_norm=True, engine=engine, **options)
        for k in range(3):
            p.grad = made((40, 30), half, seed=k)
            optimizer.step()
        results.append(p.detach().clone())
    torch.testing.assert_close(*results, rtol=2 * torch.finfo(half).eps, atol=0)
    assert abs(results[0].double().norm().item() - 1) < 0.01


def test_an_optimizer_of_several_engines_norms_each_tensor() -> None:
    """One that no kernel serves beside one that they do."""
    p, fake = nn.Parameter(made((3, 5), torch.float32)), nn.Parameter(torch.ones(4, device="meta"))
    optimizer = rk.RVSM([p, fake], lr=0.1, penalty=None, unit_norm=True)
    p.grad, fake.grad = torch.ones_like(p), torch.ones_like(fake)
    optimizer.step()
    assert abs(p.double().norm().item() - 1) < 1e-6


# ---- the support -----------------------------------------------------------------------------------------------------

EDITS: dict[str, Callable[[Tensor], Any]] = {
    "nothing": lambda w: None,
    "a factor": lambda w: w.mul_(-2),
    "the last element": lambda w: w[-1, -1:].fill_(100),
    "the first element": lambda w: w[0, :1].zero_(),
    "all": lambda w: w.copy_(w.flip(0, 1) * 1.1),
    "noise": lambda w: w.add_(made(tuple(w.shape), w.dtype, seed=9) * 0.01),
    "zeros": lambda w: w.zero_(),
    "ties": lambda w: w.copy_(torch.where(w.abs() > 0.5, 0.5, -0.25)),
    "NaN": lambda w: w[::2, ::3].fill_(math.nan),
    "inf": lambda w: w[::2, ::3].fill_(-math.inf),
}


def check_support(w: Tensor, density: float, grouping: Grouping) -> None:
    """The kernels leave what torch's operations leave, bit for bit, edit after edit with what is remembered."""
    room, want = Room.like(w), w.clone()
    for name, edit in EDITS.items():
        ours, theirs = whole.support_of(w, density, grouping, room), TorchSupport(want, density, grouping)
        edit(w)
        edit(want)
        before = want.clone()
        ours.threshold_where_changed_()
        theirs.threshold_where_changed_()
        assert torch.equal(bits(w), bits(want)), (name, density, w.shape)
        if name in ("nothing", "a factor"):
            assert torch.equal(bits(want), bits(before)), "the support is the same"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_elements(dtype: torch.dtype, layout: str, threads: int) -> None:
    for k, shape in enumerate(SHAPES):
        for density in (0.01, 0.5, 1.0):
            w = made(shape, dtype, layout, k)
            assert is_compiled(w, None)
            check_support(w, density, None)


@pytest.mark.parametrize("grouping", [0, 1, (0, 1), (), Blocks(0, 2), Blocks(1, 3)], ids=repr)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups(dtype: torch.dtype, grouping: Grouping, threads: int) -> None:
    for layout in LAYOUTS:
        for density in (0.2, 1.0):
            w = made((40, 66), dtype, layout, 1)
            assert is_compiled(w, grouping)
            check_support(w, density, grouping)


def test_nothing_is_written_where_the_support_is_the_same() -> None:
    w = made((300, 300), torch.float32)
    support = whole.support_of(w, 0.3, None, Room.like(w))
    w.mul_(1.5)
    version = w._version
    support.threshold_where_changed_()
    assert w._version == version and bool((w != 0).all())
    support = whole.support_of(w, 0.3, None, Room.like(w))
    w[299, 299] = 50
    version = w._version
    support.threshold_where_changed_()
    assert w._version > version and int((w != 0).sum()) == math.ceil(0.3 * 300 * 300)


@pytest.mark.parametrize("group_dim", [None, 0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_optimizer_with_the_kernels_and_with_torch(
    dtype: torch.dtype, group_dim: int | None, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """The same bits after every step, while some thresholds come and some do not."""

    def run() -> list[Tensor]:
        params = [nn.Parameter(made(shape, dtype, seed=k)) for k, shape in enumerate(((30, 8), (257, 129)))]
        params += [nn.Parameter(torch.zeros(0, 3, dtype=dtype)), nn.Parameter(torch.ones(2, 2, dtype=dtype))]
        options = {"density": 0.25, "momentum": 0.9, "group_dim": group_dim, "unit_norm": True}
        optimizer = rk.AdaptiveHardThreshold(params, lr=0.02, engine="native", **options)
        seen = []
        for k in range(8):
            for j, p in enumerate(params[:3]):
                p.grad = made(tuple(p.shape), dtype, seed=10 * k + j) * (k % 3 > 0)
            optimizer.step()
            seen += [p.detach().clone() for p in params]
        return seen

    ours = run()
    monkeypatch.setattr(native.NativeEngine, "support_of", Engine.support_of)
    theirs = run()
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(ours, theirs, strict=True))
    zeros = [int((w == 0).sum()) for w in ours[1::4]]
    assert any(zeros) and len(set(zeros)) > 1, "some steps zero, some do not"


def test_tensors_that_share_memory_are_looked_at_in_turn() -> None:
    """The second one is compared with what the first has made of it."""
    results = []
    for engine in ("native", "reference"):
        base = made((8, 8), torch.float32)
        params = [nn.Parameter(base[:5]), nn.Parameter(base[3:])]
        optimizer = rk.AdaptiveHardThreshold(params, lr=0.5, density=0.3, engine=engine)
        for k in range(4):
            for p in params:
                p.grad = made(tuple(p.shape), torch.float32, seed=k)
            optimizer.step()
        results.append(base)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda op, w, cut, bits: op.support_(bits, w, cut.double()), "a cut is one number"),
        (lambda op, w, cut, bits: op.support_(bits[:1], w, cut), "is 2 bytes"),
        (lambda op, w, cut, bits: op.threshold_where_changed_(w.int(), cut, bits), "dtype int"),
        (lambda op, w, cut, bits: op.divide_([w], [1.0, 2.0]), "a norm for each"),
    ],
)
def test_ops_refuse_what_does_not_fit(call: Callable[..., Any], message: str) -> None:
    w, cut, packed = torch.randn(12), torch.tensor(0.5), torch.zeros(2, dtype=torch.uint8)
    with pytest.raises((RuntimeError, TypeError), match=message):
        call(torch.ops.rvsm_kernels, w, cut, packed)
