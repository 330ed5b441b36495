"""The norms of groups that lie on several ranks: one all-reduce of all of them together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..engines.squares import squares
from ..method.groups import GroupDim, group_dims
from ..method.precision import Stored, join, master_name
from ..method.selection import thresholded
from ..method.step_options import StepOptions
from .shards import note_writes, ranks_of_groups, shard_of


class _Part(NamedTuple):
    """The norms of one shard's groups.

    Attributes:
        ranks: the process groups over which the groups lie.
        rows: gives the tensors whose norms are wanted, like the shard.
        room: rows x groups in float64, for the norms.
    """

    ranks: tuple[Any, ...]
    rows: Callable[[], Sequence[Tensor]]
    group_dim: GroupDim
    room: Tensor


class SharedNorms:
    """Norms of the groups of several shards. First room is made for them, then all of it is filled at once."""

    def __init__(self) -> None:
        self._parts: list[_Part] = []

    def room_for(
        self, shard: Tensor, group_dim: GroupDim, ranks: tuple[Any, ...], rows: Callable[[], Sequence[Tensor]], count: int
    ) -> Tensor:
        """Room for the norms of a shard's groups, in the form of :attr:`StepInputs.norms`; it holds nothing yet.

        Args:
            ranks: the process groups over which the groups lie.
            rows: gives the tensors whose norms are wanted, when the room is filled.
            count: how many these are.
        """
        groups = 1
        for d in group_dims(group_dim, shard.dim()) or ():
            groups *= shard.shape[d]
        room = torch.empty(count, groups, dtype=torch.float64, device=shard.device)
        self._parts.append(_Part(ranks, rows, group_dim, room))
        return room

    def fill(self) -> None:
        """Sum the squares of every shard, add the sums of all ranks, take the roots.

        Every rank takes part with the same parameters in the same order, also with shards that have no elements.
        """
        by_ranks: dict[Any, list[_Part]] = {}
        for part in self._parts:
            by_ranks.setdefault((part.ranks, part.room.device), []).append(part)
        for (ranks, _), parts in by_ranks.items():
            flat = torch.cat(squares([(row, part.group_dim) for part in parts for row in part.rows()]))
            for group in ranks:
                torch.distributed.all_reduce(flat, group=group)
            flat.sqrt_()
            for part, norms in zip(parts, flat.split([part.room.numel() for part in parts]), strict=True):
                part.room.copy_(norms.reshape(part.room.shape))


def only(shard: Tensor) -> list[Tensor]:
    """The rows of a shard of which nothing but its own norms is wanted."""
    return [shard]


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
    shards = [
        Stored(shard_of(t.p), None if t.master is None else shard_of(t.master), t.seed, t.step) for t in tensors
    ]
    rooms = [
        norms.room_for(s.p, (), ranks_of_groups(t.p, ()), partial(_loaded, s), 1)
        for t, s in zip(tensors, shards, strict=True)
    ]
    norms.fill()
    for t, s, room in zip(tensors, shards, rooms, strict=True):
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


def _loaded(stored: Stored) -> list[Tensor]:
    return [stored.load()]
