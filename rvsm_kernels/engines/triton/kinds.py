"""What the host knows of a launch: its tensors, and what their steps have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...method.groups import GroupView
from .elements import STATE
from .mixed import Planes

ADDRESSES = STATE.value
"""The addresses of an entry before those of its states."""


@dataclass
class TensorArgs:
    """One dense tensor of a launch: w, the gradient or what is read in its place, and how it is grouped.

    Attributes:
        key: what its numbers follow from; tensors with equal keys share a record.
        cut: the address of the cut of top-k, or 0.
        norms: the address of norms of its groups that were made elsewhere, or 0.
        lasso: whether it has a group lasso, which needs the norms of w.
        counts: whether the steps of its parameter are counted.
        windows: (n, m, inner) of N:M sparsity, as ``Windows`` of ``csrc/math/types.h``; None for other penalties.
    """

    w: Tensor
    g: Tensor
    view: GroupView | None
    key: tuple[Any, ...]
    cut: int = 0
    norms: int = 0
    lasso: bool = False
    counts: bool = False
    windows: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class StepKind:
    """What the compiler knows of a step.

    Attributes:
        base, method: their numbers in ``method/bases.py`` and ``method/methods.py``.
        states: how many each tensor has, the base's and the method's.
        numbers: length of a record.
        writes_gradient: the step leaves its direction in the gradient.
        finishes: some of the records have numbers in them that stand on the device.
        corrects: numbers of the base follow from the count of the steps.
        planes: where the tensors have several types, these; then a master is behind the states.
    """

    base: int = 0
    method: int = 0
    states: int = 0
    numbers: int = 0
    writes_gradient: bool = False
    finishes: bool = False
    corrects: bool = False
    planes: Planes | None = None

    @property
    def rounds(self) -> bool:
        """Whether the kernel rounds stochastically."""
        return self.planes is not None and self.planes.rounds

    @property
    def width(self) -> int:
        """The addresses of an entry."""
        return ADDRESSES + self.states + (self.planes is not None and self.planes.master > 0)


NO_STEP = StepKind()
"""Of a launch that makes u or the value of a penalty."""
