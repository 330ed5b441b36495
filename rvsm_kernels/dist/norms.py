"""The norms of groups that lie on several ranks: one all-reduce of all of them together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..engines.squares import squares
from ..method.groups import Grouping, group_count
from ..method.memory import turns_of
from ..method.precision import Stored, join, master_name
from ..method.selection import thresholded
from ..method.step_options import StepOptions
from .shards import note_writes, ranks_of_groups, shard_of


class _Part(NamedTuple):
    """The norms of one shard's groups.

    Attributes:
        ranks: the process groups over which the groups lie.
        norms: how many norms each group has.
    """

    shard: Tensor
    grouping: Grouping
    ranks: tuple[Any, ...]
    norms: int


class SharedNorms:
    """Norms of the groups of several shards: parts are added, then get room, then all of them are filled at once.

    The room of one round is that of the next one, if the same parts are added.
    """

    def __init__(self) -> None:
        self._parts: list[_Part] = []
        self._rows: list[Sequence[Tensor]] = []  # of each part: the tensors whose norms are wanted
        self._has_room_for: list[_Part] = []
        self._rooms: list[Tensor] = []
        self._together: list[tuple[tuple[Any, ...], Tensor, list[int]]] = []  # ranks, the room of parts, their places

    def begin(self) -> None:
        """Begin a new round."""
        self._parts, self._rows = [], []

    def add(
        self, shard: Tensor, grouping: Grouping, ranks: tuple[Any, ...], rows: Sequence[Tensor], count: int
    ) -> None:
        """Add the norms of a shard's groups.

        Args:
            ranks: the process groups over which the groups lie.
            rows: ``count`` tensors like the shard, whose norms are wanted; read when the norms are filled.
        """
        self._parts.append(_Part(shard, grouping, ranks, count))
        self._rows.append(rows)

    def rooms(self) -> list[tuple[Tensor, Tensor]]:
        """(shard, room for its norms) of every part, in the form of :attr:`StepInputs.norms`; it holds nothing yet."""
        if not _same_parts(self._parts, self._has_room_for):
            self._make_rooms()
        return [(part.shard, room) for part, room in zip(self._parts, self._rooms, strict=True)]

    def _make_rooms(self) -> None:
        if any(turns_of([part.shard for part in self._parts])):
            raise ValueError(
                "a parameter whose groups lie on several ranks occurs twice in the optimizer, or shares its memory with"
                " another one: the second update would need norms that are made after the first"
            )
        by_ranks: dict[Any, list[int]] = {}
        for i, part in enumerate(self._parts):
            by_ranks.setdefault((part.ranks, part.shard.device), []).append(i)
        self._rooms, self._together = [torch.empty(0)] * len(self._parts), []
        for (ranks, device), places in by_ranks.items():
            counts = [group_count(self._parts[i].shard.shape, self._parts[i].grouping) for i in places]
            sizes = [self._parts[i].norms * n for i, n in zip(places, counts, strict=True)]
            flat = torch.empty(sum(sizes), dtype=torch.float64, device=device)
            for i, n, room in zip(places, counts, flat.split(sizes), strict=True):
                self._rooms[i] = room.view(self._parts[i].norms, n)
            self._together.append((ranks, flat, places))
        self._has_room_for = self._parts

    def fill(self) -> None:
        """Sum the squares of every shard, add the sums of all ranks, take the roots.

        Every rank takes part with the same parameters in the same order, also with shards that have no elements.
        """
        if not self._parts:
            return
        for ranks, flat, places in self._together:
            rows = [(row, self._parts[i].grouping) for i in places for row in self._rows[i]]
            torch.cat(squares(rows), out=flat)
            for group in ranks:
                torch.distributed.all_reduce(flat, group=group)
            flat.sqrt_()


def _same_parts(a: Sequence[_Part], b: Sequence[_Part]) -> bool:
    """Whether the room of one list is right for the other; tensors are compared as objects."""
    return len(a) == len(b) and all(x.shard is y.shard and x[1:] == y[1:] for x, y in zip(a, b, strict=True))


def rows_of(shard: Tensor, options: StepOptions, states: Mapping[str, Any]) -> list[Tensor]:
    """The tensors whose norms a step of a shard needs: what is thresholded and, where that is not w, w for a lasso."""
    name = master_name(options.values, shard.dtype)
    w = join(shard.detach(), None if name is None else states.get(name))
    dual = states.get(options.method.state) if options.method.adds_state and options.method.state else None
    return [thresholded(w, dual), w][: options.norm_rows]


def normalize_(tensors: Sequence[Stored], found_inf: Tensor | None, lr: Any = None) -> None:
    """w <- w / ||w||_2 of each whole DTensor, the twin of :func:`rvsm_kernels.method.selection.normalize_`.

    Squares of float32 are within the range of float64; those of float64 are not looked after here.
    """
    norms = SharedNorms()
    shards = [Stored(shard_of(t.p), None if t.master is None else shard_of(t.master), t.seed, t.step) for t in tensors]
    for t, s in zip(tensors, shards, strict=True):
        norms.add(s.p, (), ranks_of_groups(t.p, ()), [s.load()], 1)
    rooms = norms.rooms()
    norms.fill()
    for s, (_, room) in zip(shards, rooms, strict=True):
        norm = room.reshape(())
        unchanged = norm == 0
        if found_inf is not None:
            unchanged |= shard_of(found_inf).to(norm.device).reshape(()) > 0
        if isinstance(lr, Tensor):
            unchanged |= lr.to(norm.device).reshape(()) == 0
        w = s.load()
        w.div_(torch.where(unchanged, 1.0, norm))
        s.store(w)
    note_writes([t.p for t in tensors])
