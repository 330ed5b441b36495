"""Where H_s of a tensor is not 0, before and after a step, for the algorithm that thresholds when it changes."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from .dtypes import to_opmath
from .groups import Grouping, magnitudes
from .selection import cut_of


class Support(ABC):
    """The support of H_s(w) as it was when the object was made; H_s is that of :func:`cut_of`."""

    @abstractmethod
    def threshold_where_changed_(self) -> None:
        """w <- H_s(w) where its support is another one now, else nothing."""


class TorchSupport(Support):
    """In torch operations, for every tensor that torch serves. No host waits for a device.

    Args:
        density: the share of elements or groups that survive.
    """

    def __init__(self, p: Tensor, density: float, grouping: Grouping) -> None:
        self._p, self._density, self._grouping = p, density, grouping
        self._before = self._now()

    def _now(self) -> Tensor:
        w = to_opmath(self._p.detach())
        # Not "above": NaN is above nothing, and must stay visible.
        return ~(magnitudes(w, self._grouping) <= cut_of(w, self._density, self._grouping))

    def threshold_where_changed_(self) -> None:
        p, support = self._p, self._now()
        changed = (support != self._before).any()
        p.copy_(torch.where(changed & ~support, torch.zeros((), dtype=p.dtype, device=p.device), p))
