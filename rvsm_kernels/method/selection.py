"""What is taken from a whole tensor before or after its step: the cut of top-k, and the unit norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dtypes import opmath_type, to_opmath
from .groups import Grouping, group_count, grouping_of, magnitudes, once
from .memory import kind_of, tracer, turns_of, whole
from .precision import Stored, join, master_name
from .step_options import StepOptions

_BELOW_1 = 1 - 2**-50  # a density of 0.1 keeps 3 of 30, though 0.1 * 30 is above 3 in floating point


def survivors(density: float, count: int) -> int:
    """ceil(density * count)."""
    return math.ceil(density * count * _BELOW_1)


def cut_of(v: Tensor, density: float, group_dim: Grouping = None) -> Tensor:
    """The magnitude up to which elements (or groups) go to zero, so that ceil(density * n) survive.

    Args:
        v: what is thresholded, float32 or float64.

    Returns:
        A 0-dim tensor on the device of ``v``: the largest magnitude that goes to zero, or -1 where none does.
        Magnitudes that tie with it go to zero too, as ties do under l0, so that fewer survive. Between norms of groups
        it is halfway to the smallest survivor: another order of summation cannot move a group across.
    """
    r = once(whole(magnitudes(v, group_dim)), group_dim).reshape(-1)
    return cut_among([r], survivors(density, r.numel()), group_dim is not None)


def cut_among(magnitudes: Sequence[Tensor], survivors: int, between: bool) -> Tensor:
    """The cut that ``survivors`` of all the magnitudes of several tensors survive: see :func:`cut_of`.

    Args:
        magnitudes: flat, of one device and one dtype.
        between: halfway to the smallest survivor, where there is a number between; nothing then is moved across by the
            rounding of what follows from the cut.
    """
    dropped = sum(m.numel() for m in magnitudes) - survivors
    if dropped == 0:
        return magnitudes[0].new_full((), -1.0)
    low, high = _neighbours(magnitudes, dropped, both=between and survivors > 0)
    return low if high is None else halfway(low, high)


def halfway(low: Tensor, high: Tensor) -> Tensor:
    """The number halfway between two magnitudes; the lower one where the other is not finite, or none is between."""
    middle = low + (high - low) / 2
    # The middle of two neighbouring floats may be rounded up to high.
    return torch.where(high.isfinite() & (middle < high), middle, low)


_SAMPLE = 1 << 16
_MARGIN = 4.0
"""A bracket reaches so many standard deviations of a sample's quantile to each side of it."""


def _neighbours(magnitudes: Sequence[Tensor], k: int, both: bool) -> tuple[Tensor, Tensor | None]:
    """The k-th smallest of all magnitudes and, if both are wanted, the next one in order; NaN is above all numbers."""
    n = sum(m.numel() for m in magnitudes)
    if n > 16 * _SAMPLE and all(m.device.type == "cpu" and kind_of(m) is None for m in magnitudes) and tracer() is None:
        # A bracket from a sample is counted, and where it misses, all magnitudes are looked at.
        step = n // _SAMPLE
        sample = torch.cat([m[::step] for m in magnitudes])
        share, size = k / n, sample.numel()
        width = _MARGIN * math.sqrt(share * (1 - share) * size) + 2
        first, last = (min(max(round(share * size + d), 1), size) for d in (-width, width))
        lo, hi = (float(torch.kthvalue(sample, place).values) for place in (first, last))
        below = sum(int((m < lo).sum()) for m in magnitudes)
        inside = torch.cat([m[(m >= lo) & (m <= hi)] for m in magnitudes])
        if below < k < below + inside.numel():  # the next one lies inside too
            return _two(inside, k - below, both)
    return _two(magnitudes[0] if len(magnitudes) == 1 else torch.cat(list(magnitudes)), k, both)


def _two(values: Tensor, k: int, both: bool) -> tuple[Tensor, Tensor | None]:
    low = torch.kthvalue(values, k).values
    return low, torch.kthvalue(values, k + 1).values if both else None


def keep_above(v: Tensor, r: Tensor, cut: Tensor) -> Tensor:
    """The l0 rule: v where its magnitude (or its group's norm) r is above the cut, else 0. NaN stays visible."""
    return torch.where(r <= cut, torch.zeros_like(v), v)


def thresholded(w: Tensor, dual: Tensor | None) -> Tensor:
    """What a method thresholds, in the type of the arithmetic: w, or w + dual. It may be w itself."""
    v = to_opmath(w)
    return v if dual is None else v + dual.to(v.dtype)


@dataclass(frozen=True)
class Candidates:
    """The elements of a tensor, or its groups, among which a cut selects.

    Attributes:
        w: a parameter, or weights in the type of the arithmetic.
        master, dual: the states beside w that say what is thresholded, or None.
        scale: what the norms of its groups are divided by before they are compared with those of other tensors.
    """

    w: Tensor
    master: Tensor | None = None
    dual: Tensor | None = None
    group_dim: Grouping = None
    scale: float = 1.0

    def thresholded(self) -> Tensor:
        """What the magnitudes are of, in the type of the arithmetic; it may be w itself."""
        return thresholded(join(self.w, self.master), self.dual)

    def count(self) -> int:
        """How many there are."""
        return self.w.numel() if self.group_dim is None else group_count(self.w.shape, self.group_dim)

    def magnitudes(self) -> Tensor:
        """What is compared, flat and in the type of the arithmetic."""
        r = once(whole(magnitudes(self.thresholded(), self.group_dim)), self.group_dim).reshape(-1)
        return r if self.scale == 1 else r / self.scale


@dataclass(frozen=True)
class Selection:
    """A cut that is wanted: among what, and where it goes.

    Attributes:
        cut: 0-dim, in the type of the arithmetic: where the cut goes.
        last: two int64 numbers beside the cut, for an engine that looks around the last cut first; -1 at the
            beginning. What they are must not matter to the result.
        candidates: of one tensor, or of several that share the cut.
        survivors: how many of them survive.
        between: whether the cut is halfway to the smallest survivor.
    """

    cut: Tensor
    last: Tensor
    candidates: Sequence[Candidates]
    survivors: int
    between: bool

    @classmethod
    def by_density(cls, room: Room, candidates: Sequence[Candidates], density: float) -> Selection:
        """The cut that a share of all candidates survives."""
        count = sum(c.count() for c in candidates)
        between = any(c.group_dim is not None for c in candidates)
        return cls(*room, candidates, survivors(density, count), between)


Select = Callable[[Sequence[Selection]], None]
"""Fills cuts: :func:`select`, or what an engine has in its place."""


def select(selections: Sequence[Selection]) -> None:
    """Fill cuts by torch's own selection."""
    for s in selections:
        # Candidates of several types are compared in that of the cut, and so are those of several devices.
        s.cut.copy_(cut_among([c.magnitudes().to(s.cut) for c in s.candidates], s.survivors, s.between))


def _widest(tensors: Sequence[Tensor]) -> torch.dtype:
    types = {opmath_type(t.dtype) for t in tensors}
    return torch.float64 if torch.float64 in types else torch.float32


class Room(NamedTuple):
    """Where a cut and what an engine remembers of it stay from step to step; see :class:`Selection`."""

    cut: Tensor
    last: Tensor

    @classmethod
    def like(cls, *tensors: Tensor) -> Room:
        """Room for the cut of tensors: on the device of the first one, in the widest type of their arithmetic."""
        device = tensors[0].device
        last = torch.full((2,), -1, dtype=torch.int64, device=device)
        return cls(torch.zeros((), dtype=_widest(tensors), device=device), last)

    def serves(self, *tensors: Tensor) -> bool:
        """Whether the room of an earlier step serves this one: not on another device, nor left by a traced step."""
        writable = torch.is_inference_mode_enabled() or not self.cut.is_inference()
        here = self.cut.device == tensors[0].device and self.cut.dtype == _widest(tensors)
        return writable and here and kind_of(self.cut) is None


def cut_by(select: Select, candidates: Candidates, density: float) -> Tensor:
    """The cut of one tensor by an engine, where it can work on the tensor: see :func:`cut_of`."""
    if kind_of(candidates.w) is not None or tracer() is not None:
        return cut_of(candidates.thresholded(), density, candidates.group_dim)
    room = Room.like(candidates.w)
    select([Selection.by_density(room, [candidates], density)])
    return room.cut


def states_beside(
    p: Tensor, step: StepOptions, state_of: Callable[[str], Tensor | None]
) -> tuple[Tensor | None, Tensor | None]:
    """(master, dual): what says beside a parameter what is thresholded."""
    master, dual = (
        None if name is None else state_of(name) for name in (master_name(step.values, p.dtype), step.method.state)
    )
    return master, dual if step.method.adds_state else None


def fresh_cut(p: Tensor, step: StepOptions, state_of: Callable[[str], Tensor | None]) -> Tensor:
    """The cut of the weights of a parameter as they are now; see :func:`cut_of`.

    Args:
        state_of: a state of the parameter by its name, None where it is missing.
    """
    master, dual = states_beside(p, step, state_of)
    return cut_of(thresholded(join(p.detach(), master), dual), step.values["density"], grouping_of(step.values))


def normalize_(tensors: Sequence[Stored], found_inf: Tensor | None, lr: Any = None) -> None:
    """w <- w / ||w||_2 of each whole tensor; a zero tensor stays zero, and so does everything after a found_inf.

    Args:
        lr: a tensor on the device that holds 0 where nothing is to move; any other value changes nothing.
    """
    params = [t.p for t in tensors]
    turns = turns_of(params)
    kinds = [(turn, p.device, p.dtype, kind_of(p)) for turn, p in zip(turns, params, strict=True)]
    for kind in sorted(dict.fromkeys(kinds), key=lambda kind: kind[0]):
        normalize_together_([t for t, other in zip(tensors, kinds, strict=True) if other == kind], found_inf, lr)


def normalize_together_(members: Sequence[Stored], found_inf: Tensor | None, lr: Any = None) -> None:
    """:func:`normalize_` of tensors of one kind, dtype and device that share no memory."""
    device = members[0].p.device
    ws = [t.load() for t in members]
    # ||w|| = largest * ||w / largest||, whose squares neither overflow nor vanish.
    largest = torch.stack(torch._foreach_norm(ws, torch.inf)).double()
    largest = torch.where(largest == 0, 1.0, largest)
    scaled = torch._foreach_div(ws, list(largest.unbind()))
    rest = torch.stack(torch._foreach_norm(scaled, 2, dtype=torch.float64))
    unchanged = rest == 0
    if found_inf is not None:
        unchanged |= found_inf.to(device).reshape(()) > 0
    if isinstance(lr, Tensor):
        unchanged |= lr.to(device).reshape(()) == 0
    # One division, unless the norm itself is out of range.
    norms = torch.where(unchanged, 1.0, largest * rest)
    once = norms.to(ws[0].dtype).isfinite() & (norms >= torch.finfo(ws[0].dtype).tiny)
    for factors in (torch.where(once, norms, largest), torch.where(once, 1.0, rest)):
        torch._foreach_div_(ws, list(factors.unbind()))
    for t, w in zip(members, ws, strict=True):
        t.store(w)
