"""Micro-benchmarks under pytest-benchmark: ``pytest bench --benchmark-only``.

For comparing two commits on one machine (``--benchmark-autosave``, ``--benchmark-compare``); the numbers that are
quoted come from ``python -m bench``, which takes contenders in turns.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import rvsm_kernels as rk

from .baselines import Unavailable, start
from .cases import Case
from .config import available_engines
from .problems import A, build

pytest.importorskip("pytest_benchmark")

CASES = (
    Case("1K"),
    Case("1M"),
    Case("1M", "l1"),
    Case("1M", "tl1"),
    Case("1000x1000", "l0", 0),
    Case("1000x1000", "l0", 1),
    Case("ResNet-20"),
    Case("ResNet-20", "l0", 1),
    Case("1000 of 1"),
)
CONTENDERS = (*available_engines("cpu"), "reference", "fused_sgd")


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_step(benchmark: Any, case: Case, contender: str) -> None:
    """One step of an optimizer."""
    benchmark.group = f"step: {case.name}"
    try:
        step = start(contender, build(case, "cpu"))
    except Unavailable as reason:
        pytest.skip(str(reason))
    benchmark(step)


@pytest.mark.parametrize("prox", [rk.prox, rk.reference.prox], ids=["rk.prox", "reference.prox"])
@pytest.mark.parametrize("group_dim", [None, 0, 1])
@pytest.mark.parametrize("penalty", ["l0", "l1", "tl1"])
def test_prox(benchmark: Any, penalty: str, group_dim: int | None, prox: Any) -> None:
    """u of one matrix, out of place."""
    benchmark.group = f"prox: 1000x1000 {penalty}, group_dim {group_dim}"
    w = build(Case("1000x1000", penalty, group_dim), "cpu").weights[0]
    with torch.no_grad():
        benchmark(prox, w, penalty, 1e-3, A, group_dim)
