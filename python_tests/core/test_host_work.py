"""What a step does in Python: the same for ten parameters and for a thousand."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from builds import need
from torch import nn

import rvsm_kernels as rk

SPLIT: dict[str, Any] = {"penalty": "l0", "lam": 0.01, "beta": 0.5}


class Nothing(torch.optim.Optimizer):
    """Stands for an optimizer around which the splitting is wrapped."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        pass


def _wrapped(params: list[nn.Parameter], **options: Any) -> Any:
    return rk.RVSMWrapper(Nothing(params), **options)


MAKES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "plain": (rk.RVSM, {"lr": 0.1}),
    "momentum": (rk.RVSM, {"lr": 0.1, "momentum": 0.9}),
    "groups": (rk.RVSM, {"lr": 0.1, "momentum": 0.9, "group_dim": 0, "group_lasso": 0.1}),
    "scaled groups": (rk.RVSM, {"lr": 0.1, "group_dim": 0, "group_scale": True}),
    "dual": (rk.RVSM, {"lr": 0.1, "method": "admm", "decoupled": False}),
    "AdamW": (rk.RVSMAdamW, {"lr": 0.1}),
    "AdamW, u": (rk.RVSMAdamW, {"lr": 0.1, "amsgrad": True, "method": "rvsm-delayed"}),
    "the pull alone": (_wrapped, {}),
}

MASTER = "AdamW over bfloat16 with master weights"


def made(case: str, count: int, engine: str) -> Any:
    make, options = MAKES["AdamW"] if case == MASTER else MAKES[case]
    if case == MASTER:
        options = {**options, "master_weights": True}
    dtype = torch.bfloat16 if case == MASTER else torch.float32
    params = [nn.Parameter(torch.ones(2, 2, dtype=dtype)) for _ in range(count)]
    optimizer = make(params, **SPLIT, **options, engine=engine)
    for _ in range(3):
        new_gradients(optimizer)
        optimizer.step()
    return optimizer


def new_gradients(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)


def calls(call: Callable[[], object]) -> Counter[str]:
    """How often each function of Python and of C is called from Python."""
    found: Counter[str] = Counter()

    def watch(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            found[f"{frame.f_code.co_filename}:{frame.f_code.co_name}"] += 1
        elif event == "c_call":
            found[f"{argument.__module__}.{argument.__qualname__}"] += 1

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize("case", MAKES)
def test_a_repeated_step_does_nothing_for_each_tensor(native: str, case: str) -> None:
    """With the same options and gradients, with gradients at other addresses, and with another lr."""
    _compare_calls(case, native)


def test_nor_does_one_with_master_weights() -> None:
    need("native")
    _compare_calls(MASTER, "native")


def _compare_calls(case: str, engine: str) -> None:
    few, many = (made(case, count, engine) for count in (10, 1_000))
    for edit in ("nothing", "gradients", "lr"):
        for optimizer in (few, many):
            if edit == "gradients":
                new_gradients(optimizer)
            elif edit == "lr":
                optimizer.param_groups[0]["lr"] = 0.05
        counts = calls(few.step), calls(many.step)
        assert counts[0] == counts[1], counts[1] - counts[0]
        assert sum(counts[1].values()) < 300


def test_the_count_sees_what_is_done_for_each_tensor(native: str) -> None:
    """Another group_dim is checked against each parameter."""
    counts = []
    for count in (10, 1_000):
        optimizer = made("momentum", count, native)
        optimizer.param_groups[0]["group_dim"] = 0
        counts.append(sum(calls(optimizer.step).values()))
    assert counts[1] - counts[0] >= 990
