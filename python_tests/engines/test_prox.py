"""The thresholding: rk.prox against the argmin that defines it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from builds import generator, on_device, quick_in_all
from torch import Tensor

import definition
import rvsm_kernels as rk
from cases import Layout, tau_of_cut
from definition import REAL
from runner import bits, check_u, real, same_bits
from rvsm_kernels.engines import proximal
from tolerances import SHRINK_ULPS, shrink_bound, ulp

PENALTIES = ("l0", "l1", "tl1")
SHAPES_OF_TL1 = [
    pytest.param(0.01, id="a far below the weights"),
    pytest.param(1.0, id="a like the weights"),
    pytest.param(100.0, id="a far above the weights, where digits cancel"),
]
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
Prox = Callable[..., Tensor]


@pytest.fixture
def prox(engine: str, monkeypatch: pytest.MonkeyPatch) -> Prox:
    """rk.prox by way of an engine; the reference has its own."""
    if engine == "reference":
        return rk.reference.prox
    monkeypatch.setattr(
        proximal, "engine_name_for", torch.compiler.assume_constant_result(lambda requested, device_type: engine)
    )
    return rk.prox


def options(penalty: str, tau: float, a: float = 1.0, group_dim: definition.GroupDim = None) -> dict[str, Any]:
    """A param group with this tau."""
    return {"penalty": penalty, "lam": tau, "beta": 1.0, "a": a, "group_dim": group_dim, "group_scale": False}


def critical(a: float) -> float:
    """The tau above which tl1's shrink jumps."""
    return a * a / (2 * (a + 1))


# ---- the definition's own tools --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("penalty", "a", "tau"),
    [
        pytest.param("l0", 1.0, 0.1, id="l0"),
        pytest.param("l1", 1.0, 0.1, id="l1"),
        pytest.param("tl1", 1.0, 0.1, id="tl1 below the critical tau"),
        pytest.param("tl1", 1.0, 1.0, id="tl1 above the critical tau"),
        pytest.param("tl1", 0.01, 1e-6, id="a small a, below"),
        pytest.param("tl1", 0.01, 30.0, id="a small a, far above"),
        pytest.param("tl1", 100.0, 30.0, id="a large a, near the critical tau"),
    ],
)
def test_the_cut_is_where_the_argmin_leaves_zero(penalty: str, a: float, tau: float) -> None:
    """Bisection on the argmin finds the formula of the table in docs/method.md."""
    low, high = REAL(0), REAL(4) * (tau + np.sqrt(REAL(tau)) + 1) * (1 + 1 / a)
    assert definition.shrink(penalty, high, tau, a) > 0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if definition.shrink(penalty, middle, tau, a) == 0 else (low, middle)
    want = definition.cut(penalty, tau, a)
    assert abs(low - want) <= 1e-12 * want


@pytest.mark.parametrize("penalty", PENALTIES)
def test_the_definition_is_the_argmin(penalty: str) -> None:
    """Nothing on a dense grid is better than the definition's shrink."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        a, at = 10 ** rng.uniform(-2, 2), 10 ** rng.uniform(-2, 1)
        assert_no_better(penalty, tau_of_cut(penalty, at, a), a, at * rng.uniform(0.2, 3, size=8))


def assert_no_better(penalty: str, tau: float, a: float, r: Any, s: Any = None, slack: float = 1e-15) -> None:
    """Nothing on a dense grid has a smaller objective than s (by default the definition's)."""
    r = np.asarray(r, REAL)
    s = definition.shrink(penalty, r, tau, a) if s is None else np.asarray(s, REAL)
    grid = np.linspace(REAL(0), REAL(1.25), 4001)[:, None] * r
    best = np.min(objective(penalty, grid, r, tau, a), axis=0)
    worse = objective(penalty, s, r, tau, a) - best
    assert (worse <= slack * (r * r + tau)).all(), f"{penalty} tau={tau} a={a}: r={r}, s={s} is worse by {worse}"


def objective(penalty: str, s: Any, r: Any, tau: float, a: float) -> Any:
    """What shrink minimises over s."""
    return np.square(s - r) / 2 + REAL(tau) * definition.g(penalty, s, a)


# ---- against the argmin ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", PENALTIES)
def test_no_point_is_better(prox: Prox, penalty: str) -> None:
    """Brute force: u beats every point of a grid, for weights of both signs."""
    rng = np.random.default_rng(1)
    for _ in range(40):
        a, at = 10 ** rng.uniform(-2, 2), 10 ** rng.uniform(-2, 1)
        tau = tau_of_cut(penalty, at, a)
        r = at * rng.uniform(0.2, 3, size=24)
        signs = rng.choice((-1.0, 1.0), size=24)
        u = prox(on_device(signs * r), penalty, tau, a).cpu().numpy()
        assert ((u == 0) | (np.sign(u) == signs)).all()
        assert_no_better(penalty, tau, a, r, np.abs(u), slack=1e-14)


@pytest.mark.parametrize(
    ("penalty", "a", "dtype"),
    [
        pytest.param("l0", 1.0, F32, id="the comparison with the cut"),
        pytest.param("l1", 1.0, F32, id="the subtraction above the cut"),
        pytest.param("tl1", 0.01, F32, id="the fit of float32, a small a"),
        pytest.param("tl1", 1.0, F32, id="the fit of float32"),
        pytest.param("tl1", 100.0, F32, id="the fit of float32, a large a"),
        pytest.param("tl1", 0.01, F64, id="the fit of float64, a small a"),
        pytest.param("tl1", 1.0, F64, id="the fit of float64"),
        pytest.param("tl1", 100.0, F64, id="the fit of float64, a large a"),
        pytest.param("tl1", 1.0, BF16, id="rounding to bfloat16"),
        pytest.param("tl1", 1.0, F16, id="rounding to float16"),
    ],
)
def test_dense_scan(prox: Prox, penalty: str, a: float, dtype: torch.dtype) -> None:
    """From far below the cut to far above, and closely around it; tau below, at and above the critical one."""
    rng = np.random.default_rng(2)
    for ratio in (1e-3, 0.1, 0.3, 0.6, 0.9, 0.999, 1.0, 1.001, 1.1, 2.0, 10.0, 1e3):
        tau = critical(a) * ratio
        at = float(definition.cut(penalty, tau, a))
        away = 10 ** rng.uniform(-8, 1.5, size=150)
        r = np.concatenate([at * (1 + away), at * (1 - np.minimum(away, 1)), at * rng.uniform(0, 4, size=60), [at]])
        w = on_device(r * rng.choice((-1.0, 1.0), size=r.size)).to(dtype)
        if dtype == torch.float16:
            w = w.clamp(-6e4, 6e4)
        u = prox(w, penalty, tau, a)
        check_u(u, real(w), options(penalty, tau, a))
        assert (u.abs() <= w.abs()).all(), "u is farther from zero than w"
        assert (u * w >= 0).all(), "u has the other sign"


@pytest.mark.parametrize("a", SHAPES_OF_TL1)
def test_eight_ulp_away_from_the_critical_tau(prox: Prox, a: float) -> None:
    """SHRINK_ULPS holds everywhere: a factor of two or more away from the critical tau nothing is ill-conditioned."""
    rng = np.random.default_rng(3)
    for ratio in np.concatenate([10 ** rng.uniform(-4, np.log10(0.5), size=40), 10 ** rng.uniform(0.6, 4, size=20)]):
        tau = critical(a) * ratio
        at = float(definition.cut("tl1", tau, a))
        w = on_device(at * (1 + 10 ** rng.uniform(-5, 1.5, size=400))).float()
        r = real(w)
        r = r[r > at * (1 + 1e-6)]
        s = real(prox(on_device(r.astype(np.float32)), "tl1", tau, a))
        error = np.abs(s - definition.shrink("tl1", r, tau, a)) / ulp(r, np.float32)
        k = int(np.argmax(error))
        assert error[k] <= SHRINK_ULPS, f"{error[k]:.2f} ulp at tau={tau!r} ({ratio:.3g} critical), a={a}, r={r[k]!r}"


@quick_in_all
def test_large_a_keeps_its_digits(prox: Prox) -> None:
    """At a = 100 the textbook form of tl1 loses 1.2e-5 absolute and may return the wrong sign above the cut."""
    a, tau = 100.0, 1e-3
    at = float(definition.cut("tl1", tau, a))
    w = torch.tensor([at * (1 + k * 1e-5) for k in range(1, 200)])
    u = prox(w, "tl1", tau, a)
    bound = shrink_bound(real(w), "tl1", tau, a, np.float32)
    assert bound.max() < 1e-9
    assert (np.abs(real(u) - definition.shrink("tl1", real(w), tau, a)) <= bound).all()
    assert (u > 0).all()


# ---- the cut ---------------------------------------------------------------------------------------------------------

EXACT_CUTS: dict[str, tuple[str, float, float, float]] = {
    # penalty, tau, a, a cut that floats hold exactly
    "l1": ("l1", 0.25, 1.0, 0.25),
    "l0": ("l0", 0.5, 1.0, 1.0),
    "tl1, below": ("tl1", 0.125, 1.0, 0.25),
    "tl1, critical": ("tl1", 0.25, 1.0, 0.5),
    "tl1, above": ("tl1", 1.0, 1.0, 1.5),
}


@pytest.mark.parametrize(
    ("row", "dtype", "n"),
    [
        *(pytest.param(row, F32, 33, id=row) for row in EXACT_CUTS),  # whole vectors, and one element after them
        pytest.param("tl1, critical", F32, 1, id="less than a vector"),
        pytest.param("l0", F64, 33, id="a cut in double precision"),
        pytest.param("tl1, critical", F64, 33, id="the fit of float64 on the cut"),
        pytest.param("tl1, above", BF16, 33, id="the next bfloat16 lives"),
        pytest.param("l1", F16, 33, id="the next float16 lives"),
    ],
)
def test_ties_go_to_zero(prox: Prox, row: str, dtype: torch.dtype, n: int) -> None:
    """On the cut and one number below it u is 0; from 5 ulp above (half types: the next number) it is not."""
    penalty, tau, a, at = EXACT_CUTS[row]
    tie = torch.full((n,), at, dtype=dtype)
    assert (prox(tie, penalty, tau, a) == 0).all()
    assert (prox(-tie, penalty, tau, a) == 0).all()
    assert (prox(neighbours(tie, -1), penalty, tau, a) == 0).all()
    above = neighbours(tie, 5 if dtype in (torch.float32, torch.float64) else 1)
    u = prox(above, penalty, tau, a)
    assert (u > 0).all()
    check_u(u, real(above), options(penalty, tau, a))


def neighbours(x: Tensor, count: int) -> Tensor:
    """Positive numbers, that many steps of their own type further up."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return (x.view(kind) + count).view(x.dtype)


@pytest.mark.parametrize(("penalty", "tau", "a", "at"), EXACT_CUTS.values(), ids=EXACT_CUTS)
def test_ties_of_groups_go_to_zero(prox: Prox, penalty: str, tau: float, a: float, at: float) -> None:
    """Norms that are exact: (3, 4) / 5 of the cut, times a power of two."""
    v = torch.tensor([[3.0, 4.0], [-3.0, 4.0], [3.0, 4.0]], dtype=torch.float64) * (at / 5)
    r = v.norm(dim=1)
    v = torch.where((r > at)[:, None], v * (1 - 2**-50), v)
    v[2] *= 1.001
    u = prox(v, penalty, tau, a, 0)
    assert (u[:2] == 0).all()
    assert (u[2] != 0).all()


@pytest.mark.parametrize(
    ("penalty", "group_dim"),
    [
        pytest.param("l0", None, id="tau 0 of elements"),
        pytest.param("tl1", 0, id="tau 0 of groups"),
        pytest.param(None, None, id="no penalty"),
    ],
)
def test_no_strength_means_no_change(prox: Prox, penalty: str | None, group_dim: Any) -> None:
    """tau = 0: u is w bit for bit, and not w itself."""
    w = torch.tensor([[0.0, -0.0, 1e-45], [1.5, -2.5, 1e30]])
    u = prox(w, penalty, 0.0 if penalty else 3.0, 1.0, group_dim)
    assert same_bits(u, w)
    assert u.data_ptr() != w.data_ptr()


@pytest.mark.parametrize("group_dim", [None, 0], ids=["elements", "0 / 0 of a group"])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_zeros_stay_zero(prox: Prox, penalty: str, group_dim: Any) -> None:
    for dtype in (F32, F64, BF16, F16):
        for tau in (1e-30, 1.0, 1e30):
            u = prox(torch.zeros(5, 7, dtype=dtype), penalty, tau, 1.0, group_dim)
            assert (u == 0).all(), f"{dtype} tau={tau}"


# ---- groups ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("penalty", "group_dim", "dtype"),
    [
        pytest.param("tl1", 0, F32, id="runs in memory"),
        pytest.param("tl1", 1, F32, id="summed on both sides"),
        pytest.param("tl1", -1, F32, id="columns, counted from the end"),
        pytest.param("tl1", (0, 1), F32, id="short runs"),
        pytest.param("tl1", (1, 0), F32, id="dimensions in another order"),
        pytest.param("tl1", (), F32, id="one group"),
        pytest.param("tl1", (2, 3), F32, id="two dimensions of columns"),
        pytest.param("tl1", (0, 1, 2, 3), F32, id="groups of one element"),
        pytest.param("l0", 1, F32, id="a ratio of 0 or 1"),
        pytest.param("l1", 1, F32, id="a ratio by subtraction"),
        pytest.param("tl1", 0, F64, id="norms in double precision"),
        pytest.param("tl1", 1, BF16, id="norms of bfloat16"),
        pytest.param("l0", (), F16, id="norms of float16"),
    ],
)
def test_groups(prox: Prox, penalty: str, group_dim: Any, dtype: torch.dtype) -> None:
    gen = generator(4)
    w = torch.randn(6, 5, 3, 2, generator=gen, dtype=torch.float64)
    w *= 10 ** (torch.rand(6, 5, 1, 1, generator=gen, dtype=torch.float64) - 0.5)
    size = definition.group_size(w.shape, group_dim)
    tau = tau_of_cut(penalty, size**0.5, 1.0)
    for order in ((0, 1, 2, 3), (1, 0, 2, 3), (2, 3, 0, 1)):
        placed, _ = Layout(order, offset=1).place(w.to(dtype))
        u = prox(placed, penalty, tau, 1.0, group_dim)
        check_u(u, real(placed), options(penalty, tau, 1.0, group_dim))


@pytest.mark.parametrize("group_dim", [None, 0, 1])
def test_channels_last_in_channels_last_out(prox: Prox, group_dim: Any) -> None:
    w = torch.randn(4, 6, 3, 3).to(memory_format=torch.channels_last)
    u = prox(w, "l0", 0.5, 1.0, group_dim)
    assert u.stride() == w.stride()
    assert same_bits(u, prox(w.contiguous(), "l0", 0.5, 1.0, group_dim)) or group_dim is not None
    check_u(u, real(w), options("l0", 0.5, 1.0, group_dim))


# ---- broken and empty tensors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("penalty", "dtype"),
    [
        pytest.param("l0", F32, id="the comparison with the cut"),
        pytest.param("l1", F32, id="the subtraction"),
        pytest.param("tl1", F32, id="the larger of two bounds"),
        pytest.param("tl1", F64, id="the fit of float64"),
        pytest.param("l0", BF16, id="NaN rounded to bfloat16"),
        pytest.param("l1", F16, id="NaN rounded to float16"),
    ],
)
def test_nan_stays_nan(prox: Prox, penalty: str, dtype: torch.dtype) -> None:
    """A broken weight is not hidden behind a zero, in no place of a vector, and touches no neighbour."""
    for n in (1, 9, 40):
        for k in range(n):
            w = torch.linspace(-3, 3, n, dtype=torch.float64).to(dtype)
            clean = prox(w, penalty, 0.4)
            w[k] = float("nan")
            u = prox(w, penalty, 0.4)
            assert u[k].isnan()
            keep = torch.arange(n) != k
            assert same_bits(u[keep], clean[keep])


@pytest.mark.parametrize("penalty", ["l0", "tl1"], ids=["a ratio of NaN", "a bound beside NaN"])
def test_nan_stays_in_its_group(prox: Prox, penalty: str) -> None:
    w = torch.randn(5, 4, 3, 3)
    for group_dim in (0, 1, (0, 1)):
        clean, broken = prox(w, penalty, 0.4, 1.0, group_dim), w.clone()
        broken[2, 1, 0, 2] = float("nan")
        u = prox(broken, penalty, 0.4, 1.0, group_dim)
        assert u[2, 1, 0, 2].isnan()
        mine = torch.zeros(5, 4, 3, 3, dtype=torch.bool)
        mine[tuple(k if d in definition.group_dims(group_dim, 4) else slice(None) for d, k in enumerate((2, 1)))] = True
        assert torch.equal(bits(u)[~mine], bits(clean)[~mine])


@pytest.mark.parametrize("shape", [(3, 0), (2, 0, 3, 3)], ids=["empty groups", "no group in the middle"])
def test_empty_tensors(prox: Prox, shape: tuple[int, ...]) -> None:
    for group_dim in (None, 0, 1, -1, (), tuple(range(len(shape)))):
        u = prox(torch.empty(shape), "tl1", 0.3, 1.0, group_dim)
        assert u.shape == shape and u.dtype == torch.float32


@pytest.mark.parametrize(("penalty", "group_dim"), [("l1", None), ("tl1", ())], ids=["an element", "a group"])
def test_zero_dim_tensors(prox: Prox, penalty: str, group_dim: Any) -> None:
    tau = tau_of_cut(penalty, 1.0, 1.0)
    for value in (-3.0, -0.5, 0.0, 0.5, 3.0):
        u = prox(torch.tensor(value), penalty, tau, 1.0, group_dim)
        assert u.shape == ()
        check_u(u, np.array(value, REAL), options(penalty, tau, 1.0, group_dim))


# ---- derivatives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("penalty", "group_dim", "a"),
    [
        pytest.param("l0", None, 1.0, id="l0, slope 1"),
        pytest.param("l1", None, 1.0, id="l1, slope 1"),
        pytest.param("tl1", None, 0.5, id="tl1, steep"),
        pytest.param("tl1", None, 30.0, id="tl1, flat"),
        pytest.param("l0", 1, 1.0, id="l0, a constant ratio"),
        pytest.param("l1", 1, 1.0, id="l1, slope and ratio differ"),
        pytest.param("tl1", 0, 1.0, id="sums over the last dimensions"),
        pytest.param("tl1", 1, 1.0, id="sums on both sides"),
        pytest.param("tl1", (0, 1), 0.5, id="sums over one dimension"),
        pytest.param("tl1", (), 1.0, id="one group"),
        pytest.param("tl1", (0, 1, 2), 1.0, id="sums over nothing"),
        pytest.param(None, None, 1.0, id="no penalty"),
    ],
)
def test_gradcheck(penalty: str | None, group_dim: Any, a: float) -> None:
    """Below the critical tau and above; no weight lies within gradcheck's step of the cut."""
    for scale in (0.3, 3.0):
        w = torch.randn(4, 3, 2, dtype=torch.float64) * 2
        tau = critical(a) * scale
        if penalty is not None:
            r = definition.magnitudes(real(w), group_dim)
            assert (np.abs(r - definition.cut(penalty, tau, a)) > 1e-4).all()
        assert torch.autograd.gradcheck(lambda x, t=tau: rk.prox(x, penalty, t, a, group_dim), w.requires_grad_())


def test_derivative_is_zero_below_and_on_the_cut() -> None:
    w = torch.tensor([0.0, 0.2, 1.0, -1.0, 1.5], requires_grad=True)
    rk.prox(w, "l0", 0.5).sum().backward()
    assert w.grad is not None and w.grad.tolist() == [0.0, 0.0, 0.0, 0.0, 1.0]


# ---- errors ----------------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"penalty": "l2"}, ValueError, "l2"),
    ({"tau": -0.5}, ValueError, "-0.5"),
    ({"tau": float("nan")}, ValueError, "nan"),
    ({"a": 0.0}, ValueError, "0"),
    ({"group_dim": 2}, ValueError, "2"),
    ({"group_dim": (0, 0)}, ValueError, "twice"),
    ({"group_dim": "0"}, TypeError, "0"),
    ({"w": torch.zeros(2, 2, dtype=torch.int64)}, TypeError, "int64"),
    ({"w": torch.zeros(2, 2, dtype=torch.complex64)}, TypeError, "complex64"),
    ({"w": torch.zeros(2, 2).to_sparse()}, TypeError, "sparse"),
]


@pytest.mark.parametrize(("change", "error", "text"), WRONG, ids=[f"{next(iter(row[0]))}: {row[2]}" for row in WRONG])
def test_errors(change: dict[str, Any], error: type[Exception], text: str) -> None:
    arguments = {"w": torch.ones(2, 2), "penalty": "tl1", "tau": 0.1, "a": 1.0, "group_dim": None, **change}
    with pytest.raises(error, match=text):
        rk.prox(**arguments)


@pytest.mark.parametrize("group_dim", [None, 0])
def test_one_graph_under_compile(prox: Prox, engine: str, group_dim: definition.GroupDim) -> None:
    """torch.compile needs no break for it, forward and backward."""

    def function(x: Tensor) -> Tensor:
        return prox(2 * x, "l1", 0.3, group_dim=group_dim)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    x, y = (torch.linspace(-1, 1, 70).reshape(10, 7).requires_grad_() for _ in range(2))
    want, got = function(x), compiled(y)
    assert same_bits(want, got)
    want.sum().backward()
    got.sum().backward()
    assert x.grad is not None and y.grad is not None and same_bits(x.grad, y.grad)
