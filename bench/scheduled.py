"""What a SparsitySchedule adds to a step: the look for a cut once in so many steps, and the edits of lam."""

from __future__ import annotations

import rvsm_kernels as rk

from .baselines import optimizer_over
from .cases import Case
from .config import Effort
from .problems import build
from .timing import Quartiles, Step, clock_for, interleave

EVERY = 16


def _steps(case: Case, engine: str, device: str, with_schedule: bool) -> Step:
    """A call that does EVERY steps, in which the schedule looks once."""
    problem = build(case, device)
    optimizer = optimizer_over(problem.groups(problem.parameters()), case.base, engine)
    schedule = rk.SparsitySchedule(optimizer, 0.5, end=10**9, power=1e9, every=EVERY) if with_schedule else None

    def steps() -> None:
        for _ in range(EVERY):
            optimizer.step()
            if schedule is not None:
                schedule.step()

    steps()
    return steps


def measure(case: Case, engine: str, device: str, effort: Effort, more: int = 1) -> Quartiles:
    """Time of steps with a schedule over that of steps alone."""
    steps = {name: _steps(case, engine, device, name == "with") for name in ("with", "without")}
    return interleave(steps, clock_for(device), effort, more).ratio("with", "without")
