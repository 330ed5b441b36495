"""The statistics of the Triton engine: made by the kernels of a step, of every kind of step, and by nothing else."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from builds import DEVICE, generator, need, round_in_the_interpreter
from torch import Tensor, nn

import rvsm_kernels as rk

pytest.importorskip("triton")

LAM, BETA = 3e-3, 0.5
SIZES = [(37, 20, 3), (0, 5), (1,), (2048,), (2049,), (5, 1000), (8, 4, 2)]
"""No element, one, a whole block, one more than that, several blocks."""


@pytest.fixture(autouse=True)
def here() -> None:
    """The Triton engine, interpreted on the CPU."""
    need("triton")
    if DEVICE == "cpu":
        round_in_the_interpreter()


@pytest.fixture
def only_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever makes statistics by torch's operators raises."""

    def refuse(*_: Any) -> None:
        raise AssertionError("statistics were made by torch's operators")

    from rvsm_kernels.engines import measured

    monkeypatch.setattr(measured, "_row", refuse)


def params_of(
    shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32, layout: str = "contiguous", seed: int = 0
) -> list[nn.Parameter]:
    """With zeros among them, and whole groups of zeros; the tensors of one seed have the same numbers."""
    gen, made = torch.Generator().manual_seed(seed), []
    for shape in shapes:
        w = torch.randn(shape, generator=gen) * 0.1
        w[torch.rand(shape, generator=gen) < 0.1] = 0
        if w.numel() > 1:
            w[0] = 0
        g = torch.randn(shape, generator=gen)
        if layout == "transposed" and w.dim() > 1:
            w, g = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (w, g))
        elif layout == "strided":
            w = torch.stack([w, w], -1)[..., 0]
        elif layout == "other gradient" and w.dim() > 1:
            g = g.transpose(0, 1).contiguous().transpose(0, 1)
        made.append(nn.Parameter(w.to(DEVICE, dtype)))
        made[-1].grad = g.to(DEVICE, dtype)
    return made


def compare(found: rk.RVSM, want: rk.RVSM, relative: float = 1e-6) -> None:
    """Counts to the last integer, sums within what is promised; a difference of w and u is that of rounded numbers."""
    for x, y in zip(found.statistics().rows, want.statistics().rows, strict=True):
        a, b = x.to_dict(), y.to_dict()
        for name, number in b.items():
            if isinstance(number, float):
                slack = 1e-6 * math.sqrt(b["gap"] * b["elements"]) if name in ("gap", "quadratic") else 0.0
                assert a[name] == pytest.approx(number, rel=relative, abs=slack + 1e-300, nan_ok=True), (name, a, b)
            else:
                assert a[name] == number, (name, a, b)


CASES: list[dict[str, Any]] = [
    {"penalty": "l0", "momentum": 0.9},
    {"penalty": "l1", "method": "admm", "decoupled": False},
    {"penalty": "tl1", "a": 0.7, "method": "rvsm-delayed", "maximize": True},
    {"penalty": "tl1", "group_dim": 0, "group_lasso": 0.02, "method": "admm"},
    {"penalty": "l1", "group_dim": (), "decoupled": False},
    {"penalty": "l0", "group_dim": 0, "group_scale": True, "method": "rvsm-delayed", "group_lasso": 0.03},
    {"penalty": "topk", "density": 0.3},
    {"penalty": "topk", "density": 0.3, "group_dim": 0, "method": "admm"},
    {"penalty": None, "group_dim": 0, "group_lasso": 0.05},
    {"penalty": None},
    {"penalty": "l0", "lam": 0.0, "method": "admm"},
]


@pytest.mark.parametrize(
    "options",
    [pytest.param(case, id=str(case), marks=[pytest.mark.slow] if k > 4 else []) for k, case in enumerate(CASES)],
)
def test_every_kind_of_step(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the reference engine, over one or two steps, tensors of all sizes, with several pieces of rows."""
    from rvsm_kernels.engines.triton import statistics

    monkeypatch.setattr(statistics, "MANY", 2)
    monkeypatch.setattr(statistics, "PIECE", 2)
    options = {"lam": LAM, "beta": BETA, **options}
    for kind, layout in ((rk.RVSM, "contiguous"), (rk.RVSMAdamW, "other gradient"), (rk.RVSM, "strided")):
        of_kind = {k: v for k, v in options.items() if kind is rk.RVSM or k != "momentum"}
        both = [
            kind(params_of(SIZES, layout=layout), lr=0.1, engine=engine, statistics=True, **of_kind)
            for engine in ("triton", "reference")
        ]
        for _ in range(2 if layout == "contiguous" else 1):
            for optimizer in both:
                optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.zeros(())
            both[0].step()
            both[1].step()
            compare(*both, relative=1e-5)  # in the second step the engines' weights differ by their rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_types(dtype: torch.dtype) -> None:
    """Masters, stochastic rounding and states of other types; groups of half types are stepped in copies."""
    kinds: list[dict[str, Any]] = [{}]
    if dtype != torch.float64:
        kinds += [{"master_weights": True}, {"rounding": "stochastic"}, {"state_dtype": "float32"}]
    for precision in kinds:
        for options in ({"group_dim": 0}, {"method": "admm", "penalty": "tl1"}):
            both = [
                rk.RVSMAdamW(
                    params_of(SIZES[:5], dtype), lr=0.1, lam=LAM, beta=BETA, decoupled=False, engine=engine,
                    statistics=True, **precision, **options,
                )
                for engine in ("triton", "reference")
            ]  # fmt: skip
            for optimizer in both:
                optimizer.step()
            compare(*both)


def test_blocks_of_indices() -> None:
    """A group is counted once, not once for each of its indices."""
    options: dict[str, Any] = {"penalty": "tl1", "lam": 10 * LAM, "beta": BETA, "group_dim": 0, "group_block": 2}
    both = [
        rk.RVSM(params_of([(8, 6), (4, 3, 5)]), lr=0.1, engine=engine, statistics=True, **options)
        for engine in ("triton", "reference")
    ]
    for optimizer in both:
        optimizer.step()
    compare(*both)
    assert both[0].statistics().total.groups == 6


def test_windows() -> None:
    for method in ("rvsm", "admm"):
        options: dict[str, Any] = {"penalty": "nm", "pattern": (2, 4), "method": method, "decoupled": False}
        both = [
            rk.RVSM(params_of([(6, 8), (3, 4, 2)]), lr=0.1, beta=BETA, engine=engine, statistics=True, **options)
            for engine in ("triton", "reference")
        ]
        for optimizer in both:
            optimizer.step()
        compare(*both)
        assert float(both[0].statistics().total.zeros) >= 36


def test_wrapper() -> None:
    """The gradient is read for the statistics, also where the step leaves it as it is."""
    for options in ({"decoupled": True}, {"decoupled": False, "maximize": True}, {"group_dim": 0, "group_lasso": 0.1}):
        maximize, options = bool(options.get("maximize")), {k: v for k, v in options.items() if k != "maximize"}
        both = []
        for engine in ("triton", "reference"):
            base = torch.optim.SGD(params_of(SIZES), lr=0.1, maximize=maximize)
            wrapper = rk.RVSMWrapper(base, lam=LAM, beta=BETA, engine=engine, statistics=True, **options)  # type: ignore[arg-type]
            wrapper.step()
            both.append(wrapper)
        compare(*both)  # type: ignore[arg-type]


def test_by_no_operators_of_torch(only_kernels: None) -> None:
    """Neither before a step nor behind it: for elements, groups, copies, masters and several turns."""
    p = params_of([(6, 5)])[0]
    groups: list[dict[str, Any]] = [
        {"params": [p]},
        {"params": params_of([(6, 5)]), "group_dim": 1},
        {"params": params_of([(6, 5)], torch.bfloat16), "group_dim": 0, "master_weights": True},
        {"params": params_of([(6, 5)], torch.bfloat16), "rounding": "stochastic"},
        {"params": params_of([(6, 5)], layout="strided"), "penalty": "topk", "density": 0.5},
    ]
    optimizer = rk.RVSM(groups, lr=0.1, lam=LAM, beta=BETA, engine="triton", statistics=True)
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": [p]})
    optimizer.step()
    assert optimizer.statistics().total.elements == 150
    assert all(float(row.grad) > 0 for row in optimizer.statistics().rows)
    with pytest.raises(AssertionError, match="torch's operators"):
        rk.RVSM(params_of([(3,)]), lr=0.1, engine="reference", statistics=True).step()


def test_numbers_on_the_device(only_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read where they stand, when the kernels run: to the last bit the statistics of plain numbers."""
    from rvsm_kernels.method import device_numbers

    monkeypatch.setattr(device_numbers, "HOST_TYPES", set())
    numbers = {"lr": 0.0625, "lam": 0.0078125, "beta": 0.75}
    types = {"lr": torch.float32, "lam": torch.bfloat16, "beta": torch.float64}
    for options in ({}, {"group_dim": 0, "group_scale": True}, {"penalty": "l1", "method": "admm"}):
        tensors = {name: torch.tensor(x, dtype=types[name], device=DEVICE) for name, x in numbers.items()}
        plain = rk.RVSM(params_of(SIZES[1:]), **numbers, engine="triton", statistics=True, **options)  # type: ignore[arg-type]
        other = rk.RVSM(params_of(SIZES[1:]), **tensors, engine="triton", statistics=True, **options)  # type: ignore[arg-type]
        for lam in (numbers["lam"], 2 * numbers["lam"], 0.0):
            tensors["lam"].fill_(lam)
            plain.param_groups[0]["lam"] = lam
            plain.step()
            other.step()
            assert plain.statistics().total.to_dict() | {"split": 0, "groups": 0} == (
                other.statistics().total.to_dict() | {"split": 0, "groups": 0}  # these say what may become so
            )
        assert float(other.statistics().total.gap) == 0 == int(other.statistics().total.zero_groups)


def test_the_same_bits_in_every_run() -> None:
    """And those of a tensor do not depend on the tensors beside it."""
    found = []
    for shapes in (SIZES, SIZES, SIZES[:1] + SIZES[3:]):
        optimizer = rk.RVSM(params_of(shapes), lr=0.1, lam=LAM, penalty="tl1", engine="triton", statistics=True)
        optimizer.step()
        found.append([row.to_dict() for row in optimizer.statistics().rows])
    assert found[0] == found[1] and found[2][0] == found[0][0]


@pytest.mark.parametrize("size", [1e-25, 1e-43, 1e25])
def test_terms_that_float32_does_not_hold(size: float) -> None:
    """Squares that vanish or overflow in float32, among blocks whose sums are neither."""
    w, g = torch.full((5000,), size), torch.full((5000,), -2 * size)
    w[::2] = 0
    p, q = nn.Parameter(w.to(DEVICE)), params_of([(3000,)])[0]
    p.grad = g.to(DEVICE)
    for lam, zeros, gap in ((8.0 * size**2, 5000, float(w.double().square().sum())), (size**2 / 8, 2500, 0.0)):
        optimizer = rk.RVSM([p, q], lr=0.0, lam=lam, beta=1.0, engine="triton", statistics=True)
        optimizer.step()
        row, other = optimizer.statistics().rows
        assert int(row.zeros) == zeros and int(row.nonfinite) == 0
        assert float(row.gap) == pytest.approx(gap, rel=1e-6, abs=0)
        assert float(row.grad) == pytest.approx(float(g.double().square().sum()), rel=1e-6, abs=0) != 0
        assert q.grad is not None
        assert float(other.grad) == pytest.approx(float(q.grad.double().square().sum()), rel=1e-6)


def test_nothing_is_built_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """While statistics are made, turned off and on again, with gradients at other addresses and other numbers."""
    from rvsm_kernels.engines.triton.engine import TritonEngine

    built: list[int] = []
    build = TritonEngine._build
    monkeypatch.setattr(TritonEngine, "_build", lambda self, *args: (built.append(1), build(self, *args))[1])
    params = params_of([(6, 5), (40,)])
    optimizer = rk.RVSM(params, lr=0.1, momentum=0.9, lam=LAM, beta=BETA, engine="triton")
    plain = rk.RVSM(params_of([(6, 5), (40,)]), lr=0.1, momentum=0.9, lam=LAM, beta=BETA, engine="reference")
    kept: list[Tensor] = []
    for k, on in enumerate((False, False, True, True, False, True, True)):
        for p, q in zip(params, plain.param_groups[0]["params"], strict=True):
            kept.append(torch.randn(p.shape, generator=generator(k), device=DEVICE))
            p.grad, q.grad = kept[-1], kept[-1].clone()
        for each in (optimizer, plain):
            each.collect_statistics = on
            each.param_groups[0]["lam"] = LAM * (1 + k)
            each.step()
        if on:
            compare(optimizer, plain, 1e-5)
    assert len(built) == 2, "the first step, and the one after it"


def test_a_step_that_is_called_off(only_kernels: None) -> None:
    """Its kernels leave the numbers of the last one."""
    p = params_of([(9, 8)])[0]
    optimizer = rk.RVSM([p], lr=0.5, momentum=0.9, lam=LAM, beta=BETA, group_dim=0, engine="triton", statistics=True)
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    kept = optimizer.statistics().to_dict()
    assert p.grad is not None
    p.grad *= 3
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert optimizer.statistics().to_dict() == kept
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    assert optimizer.statistics().total.to_dict()["grad"] > 8.9 * kept["total"]["grad"]
