"""Timing: contenders take turns in one process, and the median of many samples counts.

Turns (A B C A B C ...) let a change of the machine (clock, other load) hit all contenders alike, so a ratio is the
median of the ratios within a round, not the ratio of two medians.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from .config import Effort

Step = Callable[[], object]
Clock = Callable[[Step, int], float]

_MIN_SAMPLE_S = 2e-3  # far above the clock's resolution and a context switch
_LEAD_BELOW_S = 20e-3
_SURE_ABOVE_S = 0.1
_HOST_INNER = 10  # a GPU's launch queue holds about 1,000 launches; when it is full the host waits for the device


@dataclass(frozen=True)
class Quartiles:
    """The middle of a sample and how wide it is."""

    median: float
    q25: float
    q75: float
    samples: int

    @classmethod
    def of(cls, values: list[float]) -> Quartiles:
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        q25, median, q75 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, q25, q75, len(values))


class Timings:
    """Seconds per step by contender and round."""

    def __init__(self, rounds: Mapping[str, Mapping[int, float]]) -> None:
        self.rounds = rounds

    def seconds(self, name: str) -> Quartiles:
        return Quartiles.of(list(self.rounds[name].values()))

    def ratio(self, name: str, over: str) -> Quartiles:
        """Time of one contender over another's, round by round."""
        a, b = self.rounds[name], self.rounds[over]
        return Quartiles.of([a[i] / b[i] for i in a if i in b])


def wall_clock(step: Step, inner: int) -> float:
    """Seconds per step; on a GPU this is the time that the host spends."""
    start = time.perf_counter()
    for _ in range(inner):
        step()
    return (time.perf_counter() - start) / inner


def event_clock(step: Step, inner: int) -> float:
    """Seconds per step between two events on the GPU's stream."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(inner):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / inner


def host_clock(step: Step, inner: int) -> float:
    """Seconds per step that the host spends on a GPU's work, with an empty queue at the start."""
    torch.cuda.synchronize()
    seconds = wall_clock(step, min(inner, _HOST_INNER))
    torch.cuda.synchronize()
    return seconds


def clock_for(device: str, host: bool = False) -> Clock:
    if device == "cpu":
        return wall_clock
    return host_clock if host else event_clock


@dataclass(frozen=True)
class _Plan:
    """How one contender is sampled."""

    inner: int
    lead: bool
    samples: int


def _plan(step: Step, clock: Clock, share_s: float, effort: Effort) -> _Plan:
    """Samples that fit the share of the budget, each long enough to be measured."""
    seconds = clock(step, 1)
    if seconds < _SURE_ABOVE_S:
        seconds = min(seconds, clock(step, 1))
    inner = max(1, min(10_000, math.ceil(_MIN_SAMPLE_S / seconds)))
    # Short steps live in caches that the contender before has filled with its own tensors: one untimed step first.
    lead = seconds < _LEAD_BELOW_S
    samples = int(share_s / (seconds * (inner + lead)))
    return _Plan(inner, lead, max(effort.min_samples, min(effort.max_samples, samples)))


def interleave(steps: Mapping[str, Step], clock: Clock, effort: Effort, more: int = 1) -> Timings:
    """Time warmed-up contenders in turns.

    Args:
        steps: one step of each contender.
        clock: how to time; see :func:`clock_for`.
        effort: the budget; a contender too slow for every round takes part in every second, fourth, ... one, so
            that any two contenders meet in all rounds of the slower.
        more: multiplies the numbers of samples, for a second, more careful measurement.
    """
    plans = {name: _plan(step, clock, effort.budget_s / len(steps), effort) for name, step in steps.items()}
    most = max(plan.samples for plan in plans.values())
    every = {name: 2 ** int(math.log2(most / plan.samples)) for name, plan in plans.items()}
    rounds: dict[str, dict[int, float]] = {name: {} for name in steps}
    for i in range(more * most):
        for name, step in steps.items():
            if i % every[name]:
                continue
            if plans[name].lead:
                step()
            rounds[name][i] = clock(step, plans[name].inner)
    return Timings(rounds)


def launched(call: Step) -> list[str]:
    """The names of the kernels and copies that a call puts on the GPU, by torch's profiler."""
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities):  # the first of a process may lose events
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    events = profile.events() or []
    on_device = [event.name for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    # torch marks the span of every optimizer's step on the device too; a mark is not a launch.
    return [name for name in on_device if not name.startswith("Optimizer.step#")]
