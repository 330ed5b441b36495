"""What is done to whole tensors before and after their step, by compiled kernels on the CPU."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..method.dtypes import DTYPES, opmath_type
from ..method.groups import Grouping, from_memory_order, group_count, group_dims, size_of_block
from ..method.memory import kind_of, tracer, turns_of
from ..method.precision import Stored
from ..method.selection import Candidates, Room, Selection, survivors
from ..method.selection import normalize_ as normalize_in_torch_
from ..method.support import Support, TorchSupport
from . import cuts

_NORMS_OF_FLOAT64 = (1e-140, 1e150)
"""Between these the squares of float64 that matter to a sum neither overflow nor vanish."""


def _is_served(p: Tensor) -> bool:
    """Whether the kernels can work on a tensor."""
    return p.device.type == "cpu" and kind_of(p) is None and p.dtype in DTYPES and tracer() is None


# ---- the unit norm ---------------------------------------------------------------------------------------------------


def normalize_(tensors: Sequence[Stored], found_inf: Tensor | None, lr: Any, squares: Mapping[Tensor, Tensor]) -> None:
    """:func:`rvsm_kernels.method.selection.normalize_`: one division of each tensor in memory of its own with a norm in
    the range of its type; torch's operations for the others.

    Weights behind masters, and those that are rounded stochastically, are divided in float32 as float32 weights are.

    Args:
        squares: the sums of squares that the step has added up. Where one is missing or negative the weights are read
            for it.
    """
    served = [t for t in tensors if t.p.numel() > 0 and _is_served(t.p)]
    if not served or isinstance(lr, Tensor) or any(turns_of([t.p for t in tensors])):
        normalize_in_torch_(tensors, found_inf, lr)
        return
    ours = {t.p for t in served}
    rest = [t for t in tensors if t.p not in ours and t.p.numel() > 0]
    if rest:
        normalize_in_torch_(rest, found_inf, lr)
    if found_inf is not None and found_inf.item() > 0:
        return
    weights = [t.p.detach() if _is_stored_as_it_is(t) else t.load() for t in served]
    found = [(t, w, math.sqrt(s)) for t, w, s in zip(served, weights, _squares(served, weights, squares), strict=True)]
    in_range = [(t, w, norm) for t, w, norm in found if _is_in_range(norm, w.dtype)]
    if in_range:
        torch.ops.rvsm_kernels.divide_([w for _, w, _ in in_range], [norm for _, _, norm in in_range])
    for t, w, _ in in_range:
        if not _is_stored_as_it_is(t):
            t.store(w)
    out_of_range = [t for t, w, norm in found if not _is_in_range(norm, w.dtype)]
    if out_of_range:
        normalize_in_torch_(out_of_range, None, lr)


def _squares(tensors: Sequence[Stored], weights: Sequence[Tensor], known: Mapping[Tensor, Tensor]) -> list[float]:
    """The sum of squares of each tensor."""
    sums = [known[t.p].item() if t.p in known else -1.0 for t in tensors]
    unknown = [i for i, s in enumerate(sums) if s < 0]
    if unknown:
        found = torch.cat(torch.ops.rvsm_kernels.squares([weights[i] for i in unknown], (), 1)).tolist()
        for i, s in zip(unknown, found, strict=True):
            sums[i] = s
    return sums


def _is_stored_as_it_is(t: Stored) -> bool:
    return t.master is None and t.step is None


def _is_in_range(norm: float, dtype: torch.dtype) -> bool:
    """Whether one division by the norm does it; not so where it is 0, subnormal, infinite or no number."""
    if dtype == torch.float64:
        low, high = _NORMS_OF_FLOAT64
    else:
        low, high = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    return low <= norm <= high


# ---- the support -----------------------------------------------------------------------------------------------------


def support_of(p: Tensor, density: float, grouping: Grouping, room: Room) -> Support:
    """The support of H_s of a parameter, by the compiled selection where it serves the tensor.

    Args:
        room: where the cut goes, and what is remembered of it from call to call.
    """
    if p.numel() == 0 or not (_is_served(p) and room.serves(p)):
        return TorchSupport(p, density, grouping)
    if grouping is None or group_count(p.shape, grouping) == p.numel():
        return _ElementSupport(p, density, room)
    return _GroupSupport(p, density, grouping, room)


class _ElementSupport(Support):
    """A bit for each element.

    Before a step the weights mostly are as the last step has left them, and the cut is known: 0 where that step has
    thresholded, else the cut after it. Where as many elements as survive lie above it, they are the support, whatever
    the weights have become; else the cut is selected.
    """

    def __init__(self, p: Tensor, density: float, room: Room) -> None:
        self._w, self._room = p.detach(), room
        self._selection = Selection.by_density(room, [Candidates(self._w)], density)
        self._before = torch.empty((p.numel() + 7) // 8, dtype=torch.uint8)
        if self._mark() != survivors(density, p.numel()):
            cuts.select([self._selection])
            self._mark()

    def _mark(self) -> int:
        count: int = torch.ops.rvsm_kernels.support_(self._before, self._w, self._room.cut)
        return count

    def threshold_where_changed_(self) -> None:
        cuts.select([self._selection])
        if torch.ops.rvsm_kernels.threshold_where_changed_(self._w, self._room.cut, self._before):
            self._room.cut.zero_()


class _GroupSupport(Support):
    """A bool for each group, in the order of memory. The norms are summed once for the cut and the support."""

    def __init__(self, p: Tensor, density: float, grouping: Grouping, room: Room) -> None:
        self._w, self._room, self._grouping = p.detach(), room, grouping
        self._survivors = survivors(density, group_count(p.shape, grouping))
        self._before = self._now()

    def _now(self) -> Tensor:
        dims = group_dims(self._grouping, self._w.dim()) or ()
        (sums,) = torch.ops.rvsm_kernels.squares([self._w], dims, size_of_block(self._grouping))
        norms = sums.sqrt_().to(opmath_type(self._w.dtype))
        torch.ops.rvsm_kernels.cuts_(
            [self._room.cut], [self._room.last], [norms], [None], [None], [self._survivors], True
        )
        return ~(norms <= self._room.cut)

    def threshold_where_changed_(self) -> None:
        support = self._now()
        if not torch.equal(support, self._before):
            self._w.masked_fill_(from_memory_order(support, self._w, self._grouping) == 0, 0)
