"""What it costs to look at u: statistics in the step, values and counts between steps, u in the place of w."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .baselines import optimizer_over
from .cases import Case
from .config import Effort
from .problems import build
from .throughput import COPY
from .timing import Quartiles, Step, clock_for, interleave


def _statistics(optimizer: Any) -> Step:
    optimizer.collect_statistics = True
    return optimizer.step  # type: ignore[no-any-return]


def _in_and_out(optimizer: Any) -> Step:
    def enter_and_leave() -> None:
        with optimizer.sparse_weights():
            pass

    return enter_and_leave


READINGS: dict[str, Callable[[Any], Step]] = {
    "statistics": _statistics,
    "penalty_value": lambda optimizer: optimizer.penalty_value,
    "sparsity": lambda optimizer: optimizer.sparsity,
    "sparse_weights": _in_and_out,
}
"""Name to what is timed of an optimizer: a step with statistics, a method, sparse_weights() entered and left."""


def measure(name: str, case: Case, engine: str, device: str, effort: Effort, more: int, copies: int) -> Quartiles:
    """Time of a reading over that of a plain step of another optimizer on the same case, or over copies of its weights.

    Args:
        copies: how many times all weights are copied; 0 for a step.
    """
    problem = build(case, device)
    read, plain = (optimizer_over(problem.groups(problem.parameters()), case.base, engine) for _ in range(2))
    plain.step()
    read.step()
    targets = [[w.clone() for w in problem.weights] for _ in range(copies)]

    def copy() -> None:
        for target in targets:
            for to, w in zip(target, problem.weights, strict=True):
                to.copy_(w)

    steps = {"read": READINGS[name](read), COPY: copy if copies else plain.step}
    return interleave(steps, clock_for(device), effort, more).ratio("read", COPY)
