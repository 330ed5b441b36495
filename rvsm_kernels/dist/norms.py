"""The norms of groups that lie on several ranks: one all-reduce of all of them together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..method.groups import GroupDim, group_dims, to_memory_order
from ..method.precision import join, master_name
from ..method.selection import thresholded
from ..method.step_options import StepOptions


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
            flat = torch.cat([_squares(row, part.group_dim) for part in parts for row in part.rows()])
            for group in ranks:
                torch.distributed.all_reduce(flat, group=group)
            flat.sqrt_()
            for part, norms in zip(parts, flat.split([part.room.numel() for part in parts]), strict=True):
                part.room.copy_(norms.reshape(part.room.shape))


def _squares(row: Tensor, group_dim: GroupDim) -> Tensor:
    """The sum of squares of each group of a shard, in the order of its memory."""
    dims = group_dims(group_dim, row.dim()) or ()
    reduced = [d for d in range(row.dim()) if d not in dims]
    squares = row.double().square()
    return to_memory_order(squares.sum(dim=reduced) if reduced else squares, row, group_dim)


def rows_of(shard: Tensor, options: StepOptions, states: Mapping[str, Any]) -> list[Tensor]:
    """The tensors whose norms a step of a shard needs: what is thresholded and, where that is not w, w for a lasso."""
    name = master_name(options.values, shard.dtype)
    w = join(shard.detach(), None if name is None else states.get(name))
    dual = states.get(options.method.state) if options.method.adds_state and options.method.state else None
    return [thresholded(w, dual), w][: options.norm_rows]
