"""Room for the sums of squares that a step adds up of its new weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .memory import kind_of, turns_of
from .parameters import with_gradient


class NewSquares:
    """One number for each parameter with a unit norm on the CPU, in memory that stays where it is from step to step."""

    def __init__(self) -> None:
        self._all = torch.empty(0, dtype=torch.float64, device="cpu")
        self._rooms: dict[Tensor, Tensor] = {}

    def rooms(self, groups: Iterable[Mapping[str, Any]]) -> dict[Tensor, Tensor]:
        """The numbers of a step over these param groups; each is -1, which stands for not known."""
        wanted = self._wanted(groups)
        if len(wanted) != len(self._rooms) or any(a is not b for a, b in zip(wanted, self._rooms, strict=True)):
            self._all = torch.empty(len(wanted), dtype=torch.float64, device="cpu")
            self._rooms = dict(zip(wanted, self._all.split(1), strict=True))
        self._all.fill_(-1)
        return self._rooms

    def _wanted(self, groups: Iterable[Mapping[str, Any]]) -> Sequence[Tensor]:
        moved = [(p, group.get("unit_norm")) for group in groups for _, p in with_gradient(group)]
        if any(turns_of([p for p, _ in moved])):  # what shares memory is written to once more before it is divided
            return []
        return [p for p, unit_norm in moved if unit_norm and p.device.type == "cpu" and kind_of(p) is None]
