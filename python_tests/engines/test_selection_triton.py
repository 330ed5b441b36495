"""Triton's selection of top-k's cuts against torch's: the same numbers."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from builds import DEVICE, generator, is_slow, need
from torch import Tensor

from rvsm_kernels.engines.registry import served_device_types
from rvsm_kernels.method.precision import split
from rvsm_kernels.method.selection import Candidates, Room, Selection
from rvsm_kernels.method.selection import select as select_in_torch

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _needs_triton() -> None:
    need("triton")


def check(candidates: list[Candidates], survivors: int, between: bool = False) -> Tensor:
    """Triton's cut is torch's, bit for bit."""
    from rvsm_kernels.engines.triton.selection import Selecting  # imports Triton

    room = Room.like(*(c.w for c in candidates))
    s = Selection(*room, candidates, survivors, between)
    Selecting(served_device_types("triton")).select([s])
    want = dataclasses.replace(s, cut=torch.full_like(s.cut, 7))
    select_in_torch([want])
    assert torch.equal(s.cut, want.cut) or (s.cut.isnan() and want.cut.isnan()), (survivors, between, s.cut, want.cut)
    return s.cut


def drawn(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, generator=generator(count)).to(DEVICE, dtype)


def test_one_cut_over_several_tensors_in_brief() -> None:
    candidates = [Candidates(drawn(n)) for n in (1100, 3, 0)]
    assert check(candidates, 400) > 0
    assert check(candidates, 1103) == -1, "all survive"


@pytest.mark.skipif(is_slow("triton"), reason="the interpreter is slow")
def test_a_large_tensor() -> None:
    for between in (False, True):
        check([Candidates(drawn(3_000_001))], 300_000, between)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuts_are_those_of_a_sort(dtype: torch.dtype) -> None:
    ties = torch.randint(-3, 4, (300,), generator=generator(0)).to(DEVICE, dtype)
    wide = (drawn(1500) * 20).exp().to(dtype).clamp(max=torch.finfo(dtype).max)
    for w in (
        drawn(1, dtype),
        drawn(2, dtype),
        drawn(2050, dtype),
        ties,
        wide,
        ties.new_zeros(5),
        drawn(100) * 2.0**-135,
    ):
        for survivors in {0, 1, w.numel() // 3, w.numel() - 1}:
            for between in (False, True):
                check([Candidates(w)], survivors, between)


@pytest.mark.slow
def test_nan_counts_as_the_largest() -> None:
    w = drawn(200)
    w[::3], w[1::5] = math.nan, -math.inf
    for survivors in (10, 80, 100, 150):
        check([Candidates(w)], survivors, survivors == 100)


@pytest.mark.slow
def test_what_stands_beside_the_weights() -> None:
    w, y = drawn(600).reshape(20, 30), 0.3 * drawn(600).flip(0).reshape(20, 30)
    high, low = split(w)
    for dual in (None, y, y.t().contiguous().t()):
        check([Candidates(high, low, dual)], 100)
        check([Candidates(w.half(), w, dual)], 100)
        check([Candidates(w, None, dual), Candidates(high, low, dual)], 300)
    check([Candidates(w.half(), None, y.half())], 100)


@pytest.mark.slow
def test_layouts_and_groups() -> None:
    w = drawn(2000).reshape(40, 50)
    for view in (w.t(), w[::2], w[:, 3:9], w[:1].expand(8, 50), w.view(-1)[1:]):
        check([Candidates(view)], view.numel() // 3)
    check([Candidates(w, group_dim=0), Candidates(w, group_dim=1, scale=2.0)], 30, True)


@pytest.mark.slow
def test_several_cuts_in_one_call() -> None:
    from rvsm_kernels.engines.triton.selection import Selecting

    ws = [drawn(7), drawn(1030), drawn(9, torch.float64), drawn(0), drawn(50, torch.bfloat16)]
    wanted = [Selection.by_density(Room.like(w), [Candidates(w)], 0.3) for w in ws]
    wanted.append(dataclasses.replace(wanted[1], cut=torch.zeros_like(wanted[1].cut), between=True))
    selecting = Selecting(served_device_types("triton"))
    for edit in (lambda w: w, lambda w: w.mul_(-2)):
        for w in ws:
            edit(w)
        selecting.select(wanted)
        for s in wanted:
            other = dataclasses.replace(s, cut=torch.zeros_like(s.cut))
            select_in_torch([other])
            assert torch.equal(s.cut, other.cut)
