"""What is taken from a whole tensor before or after its step: the cut of top-k, and the unit norm."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dtypes import opmath_type, to_opmath
from .groups import Grouping, grouping_of, magnitudes, once
from .memory import kind_of, tracer, turns_of, whole
from .parameters import with_gradient
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
    n = r.numel()
    dropped = n - survivors(density, n)
    if dropped == 0:
        return r.new_full((), -1.0)
    low = torch.kthvalue(r, dropped).values
    if group_dim is None:
        return low
    high = torch.kthvalue(r, dropped + 1).values
    middle = low + (high - low) / 2
    # The middle of two neighbouring floats may be rounded up to high.
    return torch.where(high.isfinite() & (middle < high), middle, low)


_SAMPLE = 1 << 16
_MARGIN = 4.0
"""A bracket reaches so many standard deviations of a sample's quantile to each side of it."""


def cut_among(magnitudes: Sequence[Tensor], zeros: int) -> float | None:
    """The cut that takes the ``zeros`` smallest of all the magnitudes of several tensors; None for 0.

    It lies halfway to the smallest one that stays, so that no rounding of what follows from it moves one across. Exact:
    a bracket from a sample is counted, and where it misses, all magnitudes are looked at.

    Args:
        magnitudes: flat, of one device, at least ``zeros`` in all.
    """
    if zeros <= 0:
        return None
    low, high = _neighbours(magnitudes, zeros)
    return low if math.isinf(high) else (low + high) / 2


def _neighbours(magnitudes: Sequence[Tensor], k: int) -> tuple[float, float]:
    """The k-th smallest of all magnitudes and the next larger one that is not in it, infinity where there is none."""
    n = sum(m.numel() for m in magnitudes)
    if n > 16 * _SAMPLE:
        step = n // _SAMPLE
        sample = torch.cat([m[::step] for m in magnitudes])
        share, size = k / n, sample.numel()
        width = _MARGIN * math.sqrt(share * (1 - share) * size) + 2
        first, last = (min(max(round(share * size + d), 1), size) for d in (-width, width))
        lo, hi = (float(torch.kthvalue(sample, place).values) for place in (first, last))
        below = sum(int((m < lo).sum()) for m in magnitudes)
        inside = torch.cat([m[(m >= lo) & (m <= hi)] for m in magnitudes])
        if below < k < below + inside.numel():  # the next larger one lies inside too
            return _two(inside, k - below)
    return _two(torch.cat(list(magnitudes)), k)


def _two(values: Tensor, k: int) -> tuple[float, float]:
    low = float(torch.kthvalue(values, k).values)
    high = float(torch.kthvalue(values, k + 1).values) if k < values.numel() else math.inf
    return low, high


def keep_above(v: Tensor, r: Tensor, cut: Tensor) -> Tensor:
    """The l0 rule: v where its magnitude (or its group's norm) r is above the cut, else 0. NaN stays visible."""
    return torch.where(r <= cut, torch.zeros_like(v), v)


def thresholded(w: Tensor, dual: Tensor | None) -> Tensor:
    """What a method thresholds, in the type of the arithmetic: w, or w + dual. It may be w itself."""
    v = to_opmath(w)
    return v if dual is None else v + dual.to(v.dtype)


@dataclass(frozen=True)
class Selection:
    """A cut that is wanted: from which tensor, and where it goes.

    Attributes:
        cut: 0-dim, in the type of the arithmetic: where the cut goes.
        last: two int64 numbers beside the cut, for an engine that looks around the last cut first; -1 at the
            beginning. What they are must not matter to the result.
        w: a parameter, or weights in the type of the arithmetic.
        master, dual: the states beside w that say what is thresholded, or None.
    """

    cut: Tensor
    last: Tensor
    w: Tensor
    master: Tensor | None
    dual: Tensor | None
    density: float
    group_dim: Grouping

    def thresholded(self) -> Tensor:
        """What the magnitudes are of, in the type of the arithmetic; it may be w itself."""
        return thresholded(join(self.w, self.master), self.dual)


Select = Callable[[Sequence[Selection]], None]
"""Fills cuts: :func:`select`, or what an engine has in its place."""


def select(selections: Sequence[Selection]) -> None:
    """Fill cuts by torch's own selection."""
    for s in selections:
        s.cut.copy_(cut_of(s.thresholded(), s.density, s.group_dim))


class Room(NamedTuple):
    """Where a cut and what an engine remembers of it stay from step to step; see :class:`Selection`."""

    cut: Tensor
    last: Tensor

    @classmethod
    def like(cls, p: Tensor) -> Room:
        """Room for the cut of a parameter."""
        last = torch.full((2,), -1, dtype=torch.int64, device=p.device)
        return cls(torch.zeros((), dtype=opmath_type(p.dtype), device=p.device), last)

    def serves(self, p: Tensor) -> bool:
        """Whether the room of an earlier step serves this one: not on another device, nor left by a traced step."""
        writable = torch.is_inference_mode_enabled() or not self.cut.is_inference()
        here = self.cut.device == p.device and self.cut.dtype == opmath_type(p.dtype)
        return writable and here and kind_of(self.cut) is None


def cut_by(select: Select, v: Tensor, density: float, group_dim: Grouping) -> Tensor:
    """:func:`cut_of` by an engine, for a tensor that it can work on."""
    if kind_of(v) is not None or tracer() is not None:
        return cut_of(v, density, group_dim)
    room = Room.like(v)
    select([Selection(*room, v, None, None, density, group_dim)])
    return room.cut


def _states_beside(
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
    master, dual = _states_beside(p, step, state_of)
    return cut_of(thresholded(join(p.detach(), master), dual), step.values["density"], grouping_of(step.values))


class Cuts:
    """The cuts of parameters with top-k, each in memory that stays where it is from step to step."""

    def __init__(self) -> None:
        self._rooms: dict[Tensor, Room] = {}

    def find(self, groups: Sequence[Mapping[str, Any]], options: Sequence[StepOptions]) -> dict[Tensor, Tensor]:
        """Room for the cuts of a step, by parameter; :meth:`select` fills it."""
        rooms: dict[Tensor, Room] = {}
        for group, step in zip(groups, options, strict=True):
            if step.topk:
                for _, p in with_gradient(group):
                    room = self._rooms.get(p)
                    rooms[p] = room if room is not None and room.serves(p) else Room.like(p)
        self._rooms = rooms
        return {p: room.cut for p, room in rooms.items()}

    def select(
        self,
        groups: Sequence[Mapping[str, Any]],
        options: Sequence[StepOptions],
        state_of: Callable[[Tensor, str], Tensor | None],
        select: Select,
    ) -> None:
        """Fill the cuts from the weights of this step.

        Args:
            state_of: a state of a parameter by its name, None where it is missing.
            select: an engine's.
        """
        selections = []
        for group, step in zip(groups, options, strict=True):
            if step.topk:
                for _, p in with_gradient(group):
                    beside = _states_beside(p, step, functools.partial(state_of, p))
                    wanted = step.values["density"], grouping_of(step.values)
                    selections.append(Selection(*self._rooms[p], p.detach(), *beside, *wanted))
        select(selections)


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
