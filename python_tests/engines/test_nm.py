"""N:M sparsity: what survives in each window, on every engine, for every layout, type, method and base."""

from __future__ import annotations

import itertools
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builds import DEVICE, few, generator, need, on_device, quick_in_all, small_only
from torch import Tensor, nn

import definition
import rvsm_kernels as rk
from cases import Layout
from runner import bits, check_reading, checked_step, real, same_bits
from rvsm_kernels.method.windows import keep_largest
from rvsm_kernels.model.sparsity import follows

PATTERNS = ((2, 4), (1, 4), (3, 4), (1, 2), (4, 8), (1, 3), (5, 7), (2, 16), (15, 16))
"""Those that a vector of a thread can hold, and others up to the longest."""
SPLIT = {"penalty": "nm", "lam": 1.0, "beta": 0.5}


def kept(engine: str, w: Tensor, pattern: tuple[int, int], **options: Any) -> Tensor:
    """u as the step of an engine makes it: the state of rvsm-delayed after a step holds it."""
    p = nn.Parameter(w)
    p.grad = torch.zeros_like(w)
    told = {"lr": 0.5, **SPLIT, "pattern": pattern, "method": "rvsm-delayed", **options}
    optimizer = rk.RVSM([p], engine=engine, **told)
    optimizer.step()
    return optimizer.state[p]["u"]


def as_definition(w: Tensor, pattern: tuple[int, int]) -> Tensor:
    """u of the definition in the type of w."""
    return on_device(definition.largest_of_windows(real(w), pattern).astype(np.float64)).to(w.dtype)


def assert_equal(u: Tensor, want: Tensor) -> None:
    """Equal numbers; a zero may have either sign, NaN equals NaN."""
    torch.testing.assert_close(u, want, rtol=0, atol=0, equal_nan=True)


# ---- what survives ---------------------------------------------------------------------------------------------------


@quick_in_all
@pytest.mark.parametrize("pattern", [(1, 2), (1, 3), (2, 4), (3, 4)], ids=repr)
def test_every_window_of_a_grid(engine: str, pattern: tuple[int, int]) -> None:
    """All m-tuples of numbers with ties, zeros of both signs, subnormal numbers, infinities and NaN."""
    numbers = [0.0, -0.0, 1.0, -1.0, 2.0, 1e-40, -1e-40, math.inf, -math.inf, math.nan]
    if pattern[1] == 4 and few(engine, 10) < 10:
        numbers = [0.0, -1.0, 1.0, math.inf, math.nan]
    w = on_device(np.array(list(itertools.product(numbers, repeat=pattern[1])), np.float32))
    u = kept(engine, w.clone(), pattern)
    assert_equal(u, as_definition(w, pattern))
    finite = w.isfinite().all(1)
    assert ((u != 0).sum(1)[finite] <= pattern[0]).all()
    nothing_ties_with_zero = finite & (w != 0).all(1)
    assert ((u != 0).sum(1)[nothing_ties_with_zero] == pattern[0]).all(), "exactly n survive"


@quick_in_all
def test_nan_stays_visible(engine: str) -> None:
    w = torch.tensor([[math.nan, math.nan, math.nan, 5.0], [1.0, math.nan, 2.0, 3.0]], device=DEVICE)
    u = kept(engine, w.clone(), (2, 4))
    assert u[0, :3].isnan().all() and u[0, 3] == 0, "three NaNs survive though n is 2, and take every place"
    assert u[1].tolist()[0] == 0 and u[1, 1].isnan() and u[1, 2:].tolist() == [0.0, 3.0]


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_types_and_patterns(engine: str, pattern: tuple[int, int], dtype: torch.dtype) -> None:
    """Half types have many ties. Shapes around vectors, pieces and blocks."""
    m = pattern[1]
    shapes = [(1, m), (3, 5 * m), (7, 16 * m)] if few(engine, 10) < 10 else [(1, m), (3, m), (5, 33 * m), (67, 40 * m)]
    for k, shape in enumerate(shapes):
        w = (torch.randn(shape, generator=generator(k), device=DEVICE) * 3).to(dtype)
        if dtype in (torch.float32, torch.float64):
            w = (w * 4).round() / 4  # ties
        assert_equal(kept(engine, w.clone(), pattern), as_definition(w, pattern))


def layouts(rng: random.Random, ndim: int) -> Iterator[Layout]:
    """Every order of the dimensions, some of them with gaps or misaligned."""
    for order in itertools.permutations(range(ndim)):
        yield Layout(order, offset=rng.choice((0, 0, 1, 3)))
    yield Layout(tuple(range(ndim)), gap=2)
    yield Layout(tuple(range(ndim)), pad=3, offset=1)


@pytest.mark.parametrize("pattern", [(2, 4), (2, 16), (1, 3), (4, 8)], ids=repr)
def test_layouts(engine: str, pattern: tuple[int, int]) -> None:
    """Convolutions contiguous (windows have a stride), channels_last (consecutive), transposed, with gaps."""
    m, rng = pattern[1], random.Random(0)
    for shape in ((6, 2 * m), (3, m, 5), (4, 2 * m, 3, 3)):
        for k, layout in enumerate(layouts(rng, len(shape))):
            if k >= few(engine, 100):
                break
            w = torch.randn(shape, generator=generator(k), device=DEVICE)
            placed, _ = layout.place(w.cpu())
            p = nn.Parameter(placed.to(DEVICE) if DEVICE != "cpu" else placed)
            p.grad = torch.zeros_like(w)
            optimizer = rk.RVSM([p], lr=0.5, **SPLIT, pattern=pattern, method="rvsm-delayed", engine=engine)
            optimizer.step()
            assert_equal(optimizer.state[p]["u"], as_definition(w, pattern))


LONG_ROWS = [((8, 700, 1), (2, 4)), ((9, 4, 900), (2, 4)), ((2, 16, 70), (2, 16)), ((2, 16, 2100), (2, 16))]
LONG_ROWS += [((3, 8, 20000), (4, 8)), ((1, 6, 40001), (1, 3)), ((2, 32, 1030), (7, 16))]


@pytest.mark.parametrize(("shape", "pattern"), LONG_ROWS, ids=repr)
def test_windows_longer_than_pieces(engine: str, shape: tuple[int, ...], pattern: tuple[int, int]) -> None:
    """Elements of a window that are far apart in memory: more than a piece, than a task and than a block."""
    small_only(engine)
    w = torch.randn(shape, generator=generator(1), device=DEVICE)
    assert_equal(kept(engine, w.clone(), pattern), keep_largest(w, pattern))


def test_torch_operations_follow_the_definition() -> None:
    """What the other tests of large tensors are held against."""
    for seed, pattern in enumerate(PATTERNS):
        shape = (3, 2 * pattern[1], 2)
        w = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).round(decimals=0)
        assert_equal(
            keep_largest(w, pattern), torch.from_numpy(definition.largest_of_windows(real(w), pattern).astype(float))
        )


# ---- whole steps -----------------------------------------------------------------------------------------------------


def draw(seed: int) -> tuple[type[Any], list[dict[str, Any]], float | None]:
    """(optimizer, param groups with gradients in place, grad_scale) of a seed."""
    rng = random.Random(seed)
    optimizer = rng.choice((rk.RVSM, rk.RVSM, rk.RVSMAdamW))
    groups = []
    for _ in range(rng.choice((1, 2))):
        pattern = rng.choice(PATTERNS)
        m = pattern[1]
        options: dict[str, Any] = {
            "penalty": "nm", "pattern": pattern, "lam": 1.0, "beta": 10 ** rng.uniform(-2, 1), "a": 1.0,
            "lr": rng.choice((0.1, 0.01, 0.0)), "method": rng.choice(("rvsm", "rvsm", "rvsm-delayed", "admm")),
            "decoupled": rng.random() < 0.5, "maximize": rng.random() < 0.2, "weight_decay": rng.choice((0.0, 0.1)),
        }  # fmt: skip
        if optimizer is rk.RVSM:
            options |= {"momentum": rng.choice((0.0, 0.9))}
        else:
            options |= {"amsgrad": rng.random() < 0.3}
        params = []
        for _ in range(rng.choice((1, 2, 3))):
            shape = rng.choice(((3, m), (5, 3 * m), (2, 2 * m, 3), (2, m, 3, 3), (4, 4 * m), (0, m), (2, 0)))
            order = list(range(len(shape)))
            rng.shuffle(order)
            layout = Layout(tuple(order) if rng.random() < 0.5 else tuple(range(len(shape))), offset=rng.choice((0, 1)))
            dtype = rng.choice((torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16))
            gen = torch.Generator().manual_seed(rng.randrange(1 << 30))
            w = torch.randn(shape, generator=gen, dtype=torch.float64).mul(2).to(dtype)
            p = nn.Parameter(layout.place(w)[0].to(DEVICE) if DEVICE == "cpu" else w.to(DEVICE))
            p.grad = torch.randn(shape, generator=gen, dtype=torch.float64).to(dtype).to(DEVICE)
            params.append(p)
        groups.append({"params": params, **options})
    return optimizer, groups, rng.choice((None, None, 1024.0))


@quick_in_all
def test_steps_follow_the_definition(engine: str) -> None:
    for seed in range(few(engine, 60)):
        optimizer_type, groups, scale = draw(seed)
        optimizer = optimizer_type(groups, engine=engine)
        if scale is not None:
            optimizer.grad_scale = torch.tensor(scale, device=DEVICE)
            optimizer.found_inf = torch.tensor(0.0, device=DEVICE)
        for _ in range(2):
            checked_step(optimizer, f"seed {seed}")
        check_reading(optimizer, f"seed {seed}")


@pytest.mark.parametrize("precision", [{"master_weights": True}, {"rounding": "stochastic"}], ids=repr)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", ["rvsm", "admm"])
def test_precision(engine: str, precision: dict[str, Any], dtype: torch.dtype, method: str) -> None:
    """Masters follow a float32 run bit for bit; with stochastic rounding a pull of the whole gap gives exactly u."""
    for pattern, shape in (((2, 4), (6, 16)), ((2, 4), (4, 8, 3, 3)), ((1, 3), (5, 9))):
        w = torch.randn(shape, generator=generator(3), device=DEVICE).to(dtype)
        told = {"lr": 0.25, **SPLIT, "pattern": pattern, "method": method, "engine": engine}
        p = nn.Parameter(w.clone())
        if "rounding" in precision:
            p.grad = torch.zeros_like(p)
            rk.RVSM([p], **{**told, "lr": 2.0, "method": "rvsm"}, **precision).step()
            assert_equal(p.detach(), as_definition(w, pattern))
            continue
        wide = nn.Parameter(w.float())
        half, full = rk.RVSM([p], momentum=0.5, **told, **precision), rk.RVSM([wide], momentum=0.5, **told)
        for k in range(3):
            p.grad = torch.randn(shape, generator=generator(k), device=DEVICE).to(dtype)
            wide.grad = p.grad.float()
            half.step()
            full.step()
        with half.sparse_weights():
            u = p.detach().clone()
        with full.sparse_weights():
            assert same_bits((u != 0).byte().to(torch.float32), (wide != 0).byte().to(torch.float32))
        for name in ("momentum_buffer", *(["dual"] if method == "admm" else [])):
            assert same_bits(half.state[p][name], full.state[wide][name]), name


def test_numbers_on_the_device(engine: str) -> None:
    """lam that a tensor holds: 0 switches the pull off, and the step is dense."""
    w = torch.randn(4, 8, generator=generator(0), device=DEVICE)
    for lam, want in ((1.0, as_definition(w, (2, 4))), (0.0, w)):
        p = nn.Parameter(w.clone())
        p.grad = torch.zeros_like(p)
        number = torch.tensor(lam, device=DEVICE)
        rk.RVSM([p], lr=1.0, penalty="nm", pattern=(2, 4), lam=number, beta=1.0, engine=engine).step()
        assert_equal(p.detach(), want)


def test_edits(engine: str) -> None:
    """The pattern and the penalty of a group change between steps; nothing that was kept for the others is used."""
    w = torch.randn(4, 16, generator=generator(0), device=DEVICE)
    p = nn.Parameter(w.clone())
    optimizer = rk.RVSM([p], lr=1.0, penalty="nm", pattern=(2, 4), lam=1.0, beta=1.0, engine=engine)
    group = optimizer.param_groups[0]
    for edit in (
        {},
        {"pattern": (1, 4)},
        {"pattern": [3, 8]},
        {"penalty": None},
        {"penalty": "l0", "lam": 0.1},
        {"penalty": "nm"},
    ):
        group.update(edit)
        p.data = w.clone()
        p.grad = torch.zeros_like(p)
        optimizer.step()
        if group["penalty"] == "nm":
            assert_equal(p.detach(), as_definition(w, tuple(group["pattern"])))
        elif group["penalty"] is None:
            assert_equal(p.detach(), w)
        else:
            assert_equal(p.detach(), torch.where(w.abs() <= math.sqrt(0.2), 0.0, w))
    group["pattern"] = (1, 3)
    with pytest.raises(ValueError, match="16 indices, no multiple of 3"):
        optimizer.step()
    group["pattern"] = (2, 4)
    p.data = w[:, :6].clone()
    p.grad = torch.zeros_like(p)
    with pytest.raises(ValueError, match="6 indices, no multiple of 4"):
        optimizer.step()


def test_u_for_a_while_and_for_good(engine: str) -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4)).to(DEVICE)
    optimizer = rk.RVSM(rk.param_groups(model, penalty="nm", pattern=(2, 4), beta=0.5), lr=0.1, engine=engine)
    before = [bits(p) for p in model.parameters()]
    with optimizer.sparse_weights():
        assert all(follows(layer.weight, (2, 4)) for layer in model)
    assert all(torch.equal(bits(p), b) for p, b in zip(model.parameters(), before, strict=True))
    gaps = [
        p.detach().double() - as_definition(p.detach(), (2, 4)).double() for p in (model[0].weight, model[1].weight)
    ]
    value = sum(float(gap.square().sum()) for gap in gaps) * 0.25
    assert float(optimizer.penalty_value()) == pytest.approx(value, rel=1e-6)
    report = optimizer.sparsity()
    assert report.share == 0.5 and [row.pattern for row in report.rows] == [(2, 4), (2, 4)] and " 2:4" in str(report)
    assert [row.pattern for row in rk.sparsity(model, pattern=(2, 4)).rows] == [None, None]
    optimizer.sparsify_()
    assert all(follows(layer.weight, (2, 4)) for layer in model)
    assert float(optimizer.penalty_value()) == 0
    assert [row.pattern for row in rk.sparsity(model, pattern=(2, 4)).rows] == [(2, 4), (2, 4)]
    assert [row.pattern for row in rk.sparsity(model, pattern=(1, 4)).rows] == [None, None]
    assert [row.pattern for row in rk.sparsity(model, pattern=(2, 3)).rows] == [None, None], "no whole windows"


# ---- the same bits ---------------------------------------------------------------------------------------------------

_DIGEST = """
import hashlib, sys, torch, rvsm_kernels as rk
torch.set_num_threads(int(sys.argv[1]))
digest = hashlib.sha256()
cases = ((300, 512), (2, 4)), ((64, 48, 3, 3), (1, 3)), ((3, 16, 9000), (2, 16)), ((40, 4, 900), (2, 4))
for shape, pattern in cases:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for method in ("rvsm", "admm"):
            g = torch.Generator().manual_seed(0)
            p = torch.nn.Parameter(torch.randn(shape, generator=g).to(dtype))
            o = rk.RVSM([p], lr=.1, momentum=.9, penalty="nm", pattern=pattern, lam=1., beta=.5, method=method)
            for _ in range(2):
                p.grad = torch.randn(shape, generator=g).to(dtype)
                o.step()
            digest.update(p.detach().view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def test_same_bits_for_every_processor_and_number_of_threads() -> None:
    need("native", "cpu")

    def run(isa: str, threads: int) -> str:
        environment = {**os.environ, "RVSM_ISA": isa, "PYTHONPATH": str(Path(rk.__file__).parents[1])}
        arguments = [sys.executable, "-c", _DIGEST, str(threads)]
        return subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True).stdout

    found = {run(isa, threads) for isa, threads in (("", 1), ("", 3), ("avx2", 2), ("base", 1))}
    assert len(found) == 1


# ---- what a GPU makes of it ------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="sparse tensor cores are a GPU's")
def test_semi_structured() -> None:
    """The weights of sparsify_() are what torch's sparse kernels take, and the layer computes the same."""
    layer = nn.Linear(128, 128, bias=False).cuda().half()
    optimizer = rk.RVSM(rk.param_groups(layer, penalty="nm", pattern=(2, 4)), lr=0.1)
    optimizer.sparsify_()
    x = torch.randn(128, 128, device="cuda", dtype=torch.float16)
    want = layer(x)
    layer.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(layer.weight.detach()))
    torch.testing.assert_close(layer(x), want, rtol=1e-2, atol=1e-2)
