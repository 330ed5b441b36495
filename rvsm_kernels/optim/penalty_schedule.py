"""Plain ramps of lam or beta."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..method import device_numbers
from ..method.options import is_number, shown, whole_number
from ..method.warn import warn
from .unwrap import optimizer_in

SHAPES = {
    "constant": lambda t: 1.0 if t >= 1 else 0.0,
    "linear": lambda t: t,
    "cosine": lambda t: (1 - math.cos(math.pi * t)) / 2,
}


class PenaltySchedule:
    """Lead lam or beta from one multiple of its value to another, in the style of ``torch.optim.lr_scheduler``.

    ::

        warm_up = rk.PenaltySchedule(optimizer, "lam", steps=1000)  # from 0 to the lam of each group
        ...
        optimizer.step()
        warm_up.step()

    Args:
        optimizer: RVSM, RVSMAdamW, RVSMWrapper or a wrapper around one of them. Every group with a penalty is led.
        option: ``"lam"`` or ``"beta"``.
        steps: how many steps it takes.
        begin: steps before it begins, in which the option has ``first`` times its value.
        first, last: what the option's value is multiplied by at the beginning and at the end.
        shape: ``"linear"``, ``"cosine"``, or ``"constant"``: ``first`` up to the end, then ``last``.

    Raises:
        ValueError, TypeError: an argument out of range.
    """

    def __init__(
        self,
        optimizer: Any,
        option: str = "lam",
        *,
        steps: int,
        begin: int = 0,
        first: float = 0.0,
        last: float = 1.0,
        shape: str = "linear",
    ) -> None:
        self._optimizer = optimizer_in(optimizer, "PenaltySchedule")
        for name, value, choices in (("option", option, ("lam", "beta")), ("shape", shape, tuple(SHAPES))):
            if value not in choices:
                raise ValueError(
                    f"Invalid {name} value: {shown(value)} (choose one of {', '.join(map(repr, choices))})"
                )
        for name, number in (("first", first), ("last", last)):
            if not is_number(number) or number < 0:
                raise ValueError(f"Invalid {name} value: {shown(number)} (a number >= 0 is needed)")
        self.option, self.shape, self.first, self.last = option, shape, float(first), float(last)
        self.steps, self.begin = whole_number("steps", steps, 1), whole_number("begin", begin, 0)
        self.last_step = 0
        self.base_values: list[float] = []
        for i, group in enumerate(self._optimizer.param_groups):
            if group["penalty"] is not None and float(group[option]) == 0:
                warn(f"PenaltySchedule: {option} of group {i} is 0, and so is every multiple of it")
        self._apply()

    @property
    def factor(self) -> float:
        """What the option's value is multiplied by now."""
        t = min(max((self.last_step - self.begin) / self.steps, 0.0), 1.0)
        return self.first + (self.last - self.first) * SHAPES[self.shape](t)

    def step(self) -> None:
        """Go on by one step; call it after ``optimizer.step()``."""
        self.last_step += 1
        self._apply()

    def _apply(self) -> None:
        groups = self._optimizer.param_groups
        self.base_values += [float(group[self.option]) for group in groups[len(self.base_values) :]]
        for group, base in zip(groups, self.base_values, strict=True):
            if group["penalty"] is not None:
                device_numbers.put(group, self.option, base * self.factor)

    def __repr__(self) -> str:
        return f"PenaltySchedule(step {self.last_step}: {self.factor:.4g} times {self.option})"

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule is, and the values that it multiplies."""
        return {"last_step": self.last_step, "base_values": list(self.base_values)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from there. Groups that the checkpoint does not have keep the values that they had at the beginning.

        Raises:
            ValueError: a checkpoint of more groups than there are.
        """
        saved = [float(value) for value in state_dict["base_values"]]
        if len(saved) > len(self._optimizer.param_groups):
            raise ValueError(
                f"the checkpoint of the schedule has {len(saved)} groups, the optimizer"
                f" {len(self._optimizer.param_groups)}"
            )
        self.last_step, self.base_values = int(state_dict["last_step"]), saved + self.base_values[len(saved) :]
        self._apply()
