"""Counts and values of DTensors: each rank looks at its shard, and the sums of all ranks are added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..method.dtypes import to_opmath
from ..method.groups import Grouping, from_memory_order, group_dims, grouping_of
from ..method.penalties import PENALTIES, shrink
from ..method.prox import threshold
from ..method.split import strength
from .norms import SharedNorms
from .shards import dividing_ranks, ranks_of_groups, shard_of


def group_norms(t: Tensor, group_dim: Grouping, of: Tensor | None = None) -> Tensor:
    """||w_G|| of the groups that this rank's shard has a part of, float64, in the order of the shard's memory.

    A group that lies on several ranks is whole here, and on each of them.

    Args:
        of: what the norms are of in the place of the shard, like it.
    """
    norms = SharedNorms()
    shard = shard_of(t)
    norms.add(shard, group_dim, ranks_of_groups(t, group_dim), [shard if of is None else of], 1)
    ((_, room),) = norms.rooms()
    norms.fill()
    return room.reshape(-1)


def add_ranks(numbers: Tensor, t: Tensor, group_dim: Grouping) -> Tensor:
    """(a sum over elements, a sum over groups) of the whole of a DTensor, from those of this rank's shard; in place.

    Args:
        numbers: the two sums on the shard's device. Every rank that has a part of a group counts that group.
    """
    dims = group_dims(group_dim, t.dim())
    for ranks, dim in dividing_ranks(t):
        torch.distributed.all_reduce(numbers if dims is None or dim in dims else numbers[:1], group=ranks)
    return numbers


def zeros_of(t: Tensor, group_dim: Grouping, zero_norm: float) -> tuple[int, int]:
    """(zero elements, groups with a norm below ``zero_norm``) of a DTensor, on every rank."""
    shard = shard_of(t)
    zeros = shard.numel() - torch.count_nonzero(shard)
    zero_groups = zeros if group_dim is None else (group_norms(t, group_dim) < zero_norm).sum()
    of_elements, of_groups = add_ranks(torch.stack([zeros, zero_groups]), t, group_dim).tolist()
    return of_elements, of_groups


def value_across(p: Tensor, group: Mapping[str, Any]) -> Tensor:
    """lam P(u) + beta/2 ||w - u||^2 of a DTensor whose groups lie on several ranks: 0-dim float64, on every rank."""
    dims, penalty = grouping_of(group), group["penalty"]
    a, beta, lam = float(group["a"]), float(group["beta"]), strength(group, p.shape)
    shard, norms = to_opmath(shard_of(p)), group_norms(p, dims)
    u = threshold(shard, from_memory_order(norms, shard, dims), penalty, lam / beta, a, dims)
    of_u = norms if lam == 0 else shrink(norms.to(shard.dtype), penalty, lam / beta, a).double()
    gap = (shard.double() - u.double()).square().sum()
    gap, value = add_ranks(torch.stack([gap, PENALTIES[penalty].value(of_u, a).sum()]), p, dims).unbind()
    return lam * value + beta / 2 * gap


def add_rows(rows: Sequence[tuple[Tensor, Grouping, Tensor]], of_elements: int) -> None:
    """Add the numbers of all ranks to those of this rank's shards, in place: a message for each set of ranks.

    Args:
        rows: (a DTensor, what its groups are, numbers of its shard).
        of_elements: the first so many numbers are sums over elements, the others over groups. Every rank that has a
            part of a group counts that group.
    """
    by_ranks: dict[Any, list[Tensor]] = {}
    for t, grouping, numbers in rows:
        dims = group_dims(grouping, t.dim())
        key = tuple((ranks, dims is None or dim in dims) for ranks, dim in dividing_ranks(t)), numbers.device
        by_ranks.setdefault(key, []).append(numbers)
    for (all_ranks, _), alike in by_ranks.items():
        table = torch.stack(alike)
        for ranks, of_groups_too in all_ranks:
            part = table if of_groups_too else table[:, :of_elements].contiguous()
            torch.distributed.all_reduce(part, group=ranks)
            table[:, : part.shape[1]] = part
            if not of_groups_too:  # all ranks count the same groups, but one without elements counts none
                part = table[:, of_elements:].contiguous()
                torch.distributed.all_reduce(part, torch.distributed.ReduceOp.MAX, group=ranks)
                table[:, of_elements:] = part
        for numbers, total in zip(alike, table.unbind(), strict=True):
            numbers.copy_(total)


def add_by_ranks(values: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The sum of numbers of several DTensors, whose shards have a part of it each: one message for each set of ranks.

    Args:
        values: (a DTensor, what this rank's shard adds: 0-dim float64).
    """
    by_ranks: dict[Any, Tensor] = {}
    for t, value in values:
        key = tuple(ranks for ranks, _ in dividing_ranks(t)), value.device
        by_ranks[key] = by_ranks[key] + value if key in by_ranks else value.clone()
    for (all_ranks, _), total in by_ranks.items():
        for ranks in all_ranks:
            torch.distributed.all_reduce(total, group=ranks)
    totals = list(by_ranks.values())
    return torch.stack([total.to(totals[0].device) for total in totals]).sum()
