"""The optimizer in backward: one for each parameter, which steps as soon as the gradient of its parameter is there."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .baselines import start
from .cases import Case
from .config import Effort
from .problems import build
from .timing import Quartiles, Step, clock_for, interleave

COUNT = 50
"""Parameters, each with an optimizer."""


def _step(optimizer: torch.optim.Optimizer, p: Tensor) -> None:
    optimizer.step()
    optimizer.zero_grad()


def backward(name: str, case: Case, device: str) -> Step:
    """backward() of a model of :data:`COUNT` parameters of a case, each with a contender's optimizer in its hook."""
    params, grads = [], []
    for _ in range(COUNT):
        problem = build(case, device)
        optimizer: Any = start(name, problem).__self__  # type: ignore[attr-defined]  # the step is its method
        (p,) = (p for group in optimizer.param_groups for p in group["params"])
        p.grad = None
        p.register_post_accumulate_grad_hook(partial(_step, optimizer))
        params.append(p)
        grads += problem.grads
    return lambda: torch.autograd.backward([p.view_as(p) for p in params], grads)


def measure(case: Case, names: tuple[str, str], device: str, effort: Effort, more: int = 1) -> Quartiles:
    """Seconds a parameter that the first of two contenders takes more than the second, which may be negative."""
    steps = {name: backward(name, case, device) for name in names}
    rounds = interleave(steps, clock_for(device, host=True), effort, more).rounds
    first, second = (rounds[name] for name in names)
    return Quartiles.of([(first[i] - second[i]) / COUNT for i in first if i in second])
