"""The heart of the suite: thousands of random configurations of a step against docs/method.md."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builds import ENGINES, few, generator, is_slow, quick_in_all, small_only
from torch import nn

import rvsm_kernels as rk
from cases import Built, Case, Layout, TensorCase, build, draw, gradient, over_adamw, tau_of_cut
from definition import Blocks, group_size, is_adamw, magnitudes
from runner import STATES_OF_BASES, bits, check_reading, checked_step, real

PER_TEST = 100
FAMILIES = {
    "float32": (torch.float32,),
    "float64": (torch.float64,),
    "half": (torch.bfloat16, torch.float16),
    "mixed": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
}
FAMILIES |= {f"methods, {name}": dtypes for name, dtypes in list(FAMILIES.items())}
FAMILIES |= {f"adamw, {name}": dtypes for name, dtypes in list(FAMILIES.items())}
COUNTS = {"float32": 8, "float64": 3, "half": 5, "mixed": 2}
COUNTS |= {"methods, float32": 4, "methods, float64": 2, "methods, half": 3, "methods, mixed": 1}
COUNTS |= {"adamw, float32": 4, "adamw, float64": 2, "adamw, half": 3, "adamw, mixed": 1}
COUNTS |= {"adamw, methods, float32": 2, "adamw, methods, float64": 1, "adamw, methods, half": 2}
COUNTS |= {"adamw, methods, mixed": 1}


def is_quick(engine: str, family: str, chunk: int) -> bool:
    """Whether a chunk is in the quick check: the first of the families that have every type and every method."""
    everywhere, elsewhere = ("mixed", "adamw, mixed"), ("float32", "methods, mixed", "adamw, methods, mixed")
    return chunk == 0 and (family in everywhere or (family in elsewhere and not is_slow(engine)))


CHUNKS = [
    pytest.param(engine, family, k, marks=[] if is_quick(engine, family, k) else pytest.mark.slow)
    for engine in ENGINES
    for family, n in COUNTS.items()
    for k in range(n)
]


def run(case: Case, engine: str) -> None:
    """Build the optimizer of a case, take its steps, read its u."""
    gen = generator(case.seed)
    built, groups = [], []
    for g in case.groups:
        bs = [build(t, g.options, gen) for t in g.tensors]
        lr = g.options["lr"] if g.lr is None else torch.tensor(g.options["lr"], dtype=g.lr)
        groups.append({**g.options, "params": [b.param for b in bs], "lr": lr})
        built += bs
    optimizer = (rk.RVSMAdamW if is_adamw(case.groups[0].options) else rk.RVSM)(groups, engine=engine)
    for b in built:
        if b.case.momentum is not None:
            for name in STATES_OF_BASES[is_adamw(case.groups[0].options)]:
                values = torch.randn(b.case.shape, generator=gen, dtype=torch.float64).to(b.case.dtype)
                values = values if "sq" not in name else values.square()
                optimizer.state[b.param][name] = b.case.momentum.place(values)[0]
            if is_adamw(case.groups[0].options):
                optimizer.state[b.param]["step"] = torch.tensor(float(case.seed % 5 + 1))
    if case.grad_scale is not None:
        optimizer.grad_scale = torch.tensor(case.grad_scale)
    for k in range(case.steps):
        for b in built:
            b.param.grad = gradient(b.case, gen, case.grad_scale)
        if case.found_inf is not None:
            optimizer.found_inf = torch.tensor(case.found_inf if k == 0 else 0.0)
        foreign = [bits(b.buffer[b.foreign]) for b in built]
        checked_step(optimizer, f"step {k} of {case}, engine {engine}")
        check_foreign(built, foreign)
    # Zeros that AdamW's first step has moved by the same amount are nearly ties, between which a norm cannot choose.
    ties = any(
        is_adamw(g.options) and g.options["penalty"] == "topk" and g.options["group_dim"] is not None
        for g in case.groups
    )
    # Moments of float16 overflow, as torch's do.
    if not ties and all(bool(torch.isfinite(b.param).all()) for b in built):
        check_reading(optimizer, f"{case}, engine {engine}")
        check_foreign(built, foreign)


def check_foreign(built: list[Built], before: list[torch.Tensor]) -> None:
    """What lies between and around the elements of a parameter belongs to others."""
    for b, old in zip(built, before, strict=True):
        assert torch.equal(bits(b.buffer[b.foreign]), old), f"memory outside a parameter changed: {b.case}"


@pytest.mark.parametrize(("engine", "family", "chunk"), CHUNKS, indirect=["engine"])
def test_random_configurations(engine: str, family: str, chunk: int) -> None:
    first = 10_000 * (1 + list(FAMILIES).index(family)) + chunk * PER_TEST
    failed: dict[int, AssertionError] = {}
    for seed in range(first, first + few(engine, PER_TEST)):
        try:
            case = draw(seed, FAMILIES[family], "methods" in family)
            run(over_adamw(case) if family.startswith("adamw") else case, engine)
        except AssertionError as error:
            failed[seed] = error
    first_error = next(iter(failed.values()), None)
    assert not failed, f"{len(failed)} of {few(engine, PER_TEST)} cases, seeds {list(failed)}; the first: {first_error}"


@pytest.mark.parametrize("setting", ["float64 is the default dtype", "uninitialised memory is NaN"])
def test_settings_of_torch(engine: str, setting: str) -> None:
    """The step depends on its tensors only; with the second, reading memory before it was written shows."""
    try:
        if setting.startswith("float64"):
            torch.set_default_dtype(torch.float64)
        else:
            torch.use_deterministic_algorithms(True)
            assert torch.utils.deterministic.fill_uninitialized_memory
        for seed in range(few(engine, 60)):
            run(draw(seed, FAMILIES["mixed"]), engine)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)


# ---- large tensors and extreme numbers -------------------------------------------------------------------------------

LARGE: list[tuple[tuple[int, ...], Any]] = [
    ((70_001,), None),
    ((70_001,), ()),
    ((257, 263), 0),
    ((257, 263), 1),
    ((3, 20_011), 0),
    ((4_099, 17), 0),
    ((20_011, 3), 1),
    ((5, 5_003), 1),
    ((3, 7, 300), 1),
    ((3, 300, 5, 5), (0, 1)),
    ((2, 4_001, 9), 1),
    ((64, 32, 3, 3), 0),
    ((64, 32, 3, 3), 1),
    ((64, 32, 3, 3), (0, 1)),
    ((64, 32, 3, 3), None),
    ((5, 130, 257), (0, 2)),
    ((3, 2_001, 9), (0, 2)),
    ((700, 24), Blocks(0, 70)),
    ((24, 700), Blocks(1, 70)),
    ((6, 9, 513), Blocks(1, 3)),
]


@pytest.mark.parametrize("penalty", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("l0", "l1")), "tl1"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_large_tensors(engine: str, threads: int, penalty: str, channels_last: bool) -> None:
    """Sizes that are divided among threads, in one optimizer, so that pieces of several tensors meet in a thread."""
    small_only(engine)
    gen = generator(7)
    groups: list[dict[str, Any]] = []
    for shape, group_dim in LARGE:
        if channels_last and len(shape) < 4:
            continue
        cut = 0.05 * group_size(shape, group_dim) ** 0.5
        options = {
            **{"penalty": penalty, "lam": 0.5 * tau_of_cut(penalty, cut, 1.0), "beta": 0.5, "a": 1.0},
            **{"group_dim": group_dim, "group_lasso": 0.01 if group_dim is not None else 0.0},
        }
        if isinstance(group_dim, Blocks):
            options |= {"group_dim": group_dim.dim, "group_block": group_dim.size}
        p = nn.Parameter(torch.randn(shape, generator=gen) * 0.05)
        if channels_last:
            p.data = p.data.to(memory_format=torch.channels_last)
        groups.append({"params": [p], **options})
    optimizer = rk.RVSM(groups, lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True, engine=engine)
    for group in groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=gen)
            optimizer.state[p]["momentum_buffer"] = torch.randn(p.shape, generator=gen)
    checked_step(optimizer)
    check_reading(optimizer)


HUGE_GROUPS = [
    # shape, group_dim, channels-last, dtype
    pytest.param((300_007,), (), False, torch.float32, id="one group"),
    pytest.param((140_001, 2), 1, False, torch.float32, id="columns"),
    pytest.param((2, 3, 220, 221), (0, 1), True, torch.float32, id="kernels whose dimensions are apart in memory"),
    pytest.param((2, 140_001), 0, False, torch.float32, id="rows", marks=pytest.mark.slow),
    pytest.param((3, 2, 50_001), 1, False, torch.float32, id="parts of several rows", marks=pytest.mark.slow),
    pytest.param((2, 3, 220, 221), 1, True, torch.float32, id="columns of several rows", marks=pytest.mark.slow),
    pytest.param((2, 140_001), 0, False, torch.bfloat16, id="rows of bfloat16", marks=pytest.mark.slow),
    pytest.param((140_001, 2), 1, False, torch.bfloat16, id="columns of bfloat16", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("shape", "group_dim", "channels_last", "dtype"), HUGE_GROUPS)
def test_huge_groups(native: str, threads: int, shape: Any, group_dim: Any, channels_last: bool, dtype: Any) -> None:
    """Norms that no single thread sums: on both sides of the cut, closer to it than a float32 sum would be right."""
    w = torch.randn(shape, generator=generator(8)).to(dtype)
    w = w.to(memory_format=torch.channels_last) if channels_last else w
    norms = magnitudes(real(w), group_dim)
    optimizer = rk.RVSM([nn.Parameter(w)], penalty="l0", beta=0.5, group_dim=group_dim, group_lasso=0.1, engine=native)
    for distance in (1e-5, -1e-5, 1e-6, -1e-6):
        optimizer.param_groups[0]["lam"] = float(0.25 * (norms.flat[0] * (1 + distance)) ** 2)
        check_reading(optimizer, f"{distance} from the cut")
    (p,) = optimizer.param_groups[0]["params"]
    p.grad = torch.ones_like(p)
    checked_step(optimizer)


@pytest.mark.parametrize(
    ("dtype", "group_dim"),
    [
        pytest.param(torch.float32, None, id="cubes of tl1"),
        pytest.param(torch.float32, 0, id="squares of a row"),
        pytest.param(torch.float32, 1, id="squares of a column"),
        pytest.param(torch.float32, (), id="squares of all"),
        pytest.param(torch.float64, None, id="cubes in double precision"),
        pytest.param(torch.float64, (), id="squares in double precision"),
        pytest.param(torch.bfloat16, 0, id="rows of bfloat16, which has float32's range"),
        pytest.param(torch.bfloat16, 1, id="columns of bfloat16"),
    ],
)
def test_extreme_magnitudes(engine: str, dtype: torch.dtype, group_dim: Any) -> None:
    """Weights whose squares leave the range of float32 (float64: whose cubes leave a comfortable range)."""
    gen = generator(3)
    spreads = (1e-80, 1e-30, 1e30, 1e80) if dtype == torch.float64 else (1e-36, 1e-30, 1e-22, 1e-12, 1e12, 1e18)
    groups = []
    for spread in spreads:
        for penalty in ("l0", "l1", "tl1"):
            for a in (0.01, 100.0):
                values = (torch.randn((9, 33), generator=gen, dtype=torch.float64) * spread).to(dtype)
                size = {None: 1, 0: 33, 1: 9, (): 297}[group_dim]
                tau = tau_of_cut(penalty, spread * size**0.5, a)
                options = {"penalty": penalty, "lam": tau * 0.25, "beta": 0.25, "a": a, "group_dim": group_dim}
                groups.append({"params": [nn.Parameter(values)], **options})
    optimizer = rk.RVSM(groups, lr=0.5, momentum=0.9, engine=engine)
    for group in groups:
        (p,) = group["params"]
        p.grad = (p.detach() * 0.1).flip(0)
    checked_step(optimizer)
    check_reading(optimizer)


TAUS = {
    "tau above float32": (1e30, 1e-30),
    "tau below float32": (1e-30, 1e30),
    "lam below float32": (1e-300, 1e-2),
    "lam above float32": (1e300, 1e-2),
    "lam below every normal number": (5e-324, 1.0),
}


@pytest.mark.parametrize(
    ("dtype", "group_dim", "lam", "beta"),
    [
        *(pytest.param(torch.float32, None, *tau, id=key) for key, tau in TAUS.items()),
        *(pytest.param(torch.float32, 0, *tau, id=f"{key}, groups") for key, tau in TAUS.items()),
        *(pytest.param(torch.float64, None, *tau, id=f"{key}, float64") for key, tau in TAUS.items() if "lam" in key),
        pytest.param(torch.float64, 0, *TAUS["lam above float32"], id="the square of tau in norms of float64"),
        pytest.param(torch.bfloat16, None, *TAUS["tau above float32"], id="0 * inf in bfloat16"),
        pytest.param(torch.float16, (), *TAUS["tau below float32"], id="a pull beyond float16"),
    ],
)
def test_extreme_tau(engine: str, dtype: torch.dtype, group_dim: Any, lam: float, beta: float) -> None:
    """A cut above every weight, or below: u is 0, or w; nothing becomes NaN on the way."""
    groups = []
    for penalty in ("l0", "l1", "tl1"):
        for a in (0.01, 1.0, 100.0):
            p = nn.Parameter(torch.linspace(-2, 2, 41).reshape(1, 41).repeat(3, 1).to(dtype))
            p.grad = torch.ones_like(p)
            groups.append({"params": [p], "penalty": penalty, "a": a})
    common = {"lam": lam, "beta": beta, "group_dim": group_dim}
    optimizer = rk.RVSM(groups, lr=0.1 if beta < 1e3 else 0.1 / beta, engine=engine, **common)
    checked_step(optimizer)
    with optimizer.sparse_weights():
        for group in groups:
            assert not torch.isnan(group["params"][0]).any(), group


# ---- the arithmetic by hand ------------------------------------------------------------------------------------------

HAND = {"lr": 0.5, "penalty": "l1", "lam": 0.5, "beta": 0.5}
BY_HAND = [
    # One weight w = 2 with gradient 1 and tau = 1, so that u = 1 and the pull is 1: (options, [w after each step]).
    ({}, [1.25]),  # 2 - .25 - .5
    ({"decoupled": False}, [1.25]),  # 2 - .5 (1 + .5)
    ({"weight_decay": 0.1}, [1.1625]),  # w' = 1.75; 1.75 - .5 (1 + .175)
    ({"weight_decay": 0.1, "decoupled": False}, [1.15]),  # 2 - .5 (1 + .2 + .5)
    ({"maximize": True}, [2.25]),  # 1.75 + .5: the pull keeps its sign
    ({"maximize": True, "decoupled": False}, [2.25]),  # 2 - .5 (-1 + .5)
    ({"momentum": 0.5}, [1.25, 0.25]),  # u = .25, w' = 1, m = 1.5: 1 - .75
    ({"momentum": 0.5, "dampening": 0.5}, [1.25, 0.5]),  # m = .5 + .5 = 1: 1 - .5
    ({"momentum": 0.5, "nesterov": True}, [1.0, -0.125]),  # d = 1.5: 1.75 - .75; then u = 0, w' = .75, d = 1.75
    ({"penalty": "l0"}, [1.5]),  # cut sqrt 2 < 2: u = w
    ({"penalty": "l0", "lam": 1.0}, [1.0]),  # cut 2 is a tie: u = 0, 2 - .5 - .5
    ({"penalty": "l1", "lam": 0.0}, [1.5]),
    ({"beta": 0.0}, [1.5]),
    ({"penalty": None}, [1.5]),
    ({"group_dim": (), "group_lasso": 0.5}, [1.0]),  # gradient 1 + .5 sign(w)
    ({"group_dim": (), "group_lasso": 0.5, "maximize": True}, [2.0]),  # gradient -1 + .5
    ({"penalty": "tl1", "lam": 4.0}, [1.0]),  # tau = 8: cut sqrt(32) - 1/2 > 2
]


@pytest.mark.parametrize(("options", "weights"), BY_HAND)
def test_by_hand(engine: str, options: dict[str, Any], weights: list[float]) -> None:
    p = nn.Parameter(torch.tensor([2.0]))
    optimizer = rk.RVSM([p], **{**HAND, **options}, engine=engine)
    for want in weights:
        p.grad = torch.tensor([1.0])
        checked_step(optimizer)
        assert p.item() == pytest.approx(want, rel=1e-6, abs=1e-7)


@quick_in_all
def test_group_scale_by_hand(engine: str) -> None:
    """l1 over a group of four: tau = .25 * sqrt 4 = .5; a norm of 2 shrinks to 1.5, each element to 3/4 of itself."""
    p = nn.Parameter(torch.full((4,), -1.0, dtype=torch.float64))
    optimizer = rk.RVSM([p], penalty="l1", lam=0.25, beta=1.0, group_dim=(), group_scale=True, engine=engine)
    with optimizer.sparse_weights():
        assert p.tolist() == [-0.75] * 4
    assert optimizer.penalty_value().item() == pytest.approx(0.5 * 1.5 + 0.5 * 4 * 0.25**2)


def test_layouts_are_what_they_say() -> None:
    """The suite's own tools: a placed tensor has the values, the strides and the misalignment asked for."""
    values = torch.arange(24.0).reshape(2, 3, 4)
    view, buffer = Layout((2, 0, 1), gap=2, pad=1, offset=3).place(values)
    assert torch.equal(view, values)
    assert view.stride() == (7, 2, 14)
    assert view.storage_offset() == 3 and buffer.numel() >= 3 + 4 * 14
    case = TensorCase(torch.float32, (2, 3, 4), Layout((0, 1, 2)), "negated", None, 1.0)
    grad = gradient(case, generator(0), None)
    assert grad is not None and grad.is_neg()
