"""Cuts of top-k among DTensors: each rank counts the magnitudes of its shards, and the counts of all ranks are added.

Three histograms find a magnitude of 31 bits, six one of 63 bits: messages of 16 KB in the place of a gathered copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..engines.histograms import magnitude_counts
from ..method.groups import group_dims
from ..method.selection import Candidates, Select, Selection, halfway
from .shards import dividing_ranks, is_of_shards, is_sharded, shard_of
from .sums import group_norms

_BITS = 11
"""A histogram tells so many bits of a magnitude."""


class _Part(NamedTuple):
    """What this rank has of the candidates of a tensor, and the process groups that have the rest."""

    ranks: tuple[Any, ...]
    candidates: Candidates


def select(selections: Sequence[Selection], local: Select) -> None:
    """Fill cuts; every rank has the same ones.

    Args:
        local: fills those that need no other rank.
    """
    across = [any(is_sharded(c.w) for c in s.candidates) for s in selections]
    local([s for s, other_ranks in zip(selections, across, strict=True) if not other_ranks])
    for s, other_ranks in zip(selections, across, strict=True):
        if other_ranks:
            s.cut.copy_(_cut(s))


def _cut(s: Selection) -> Tensor:
    count = sum(c.count() for c in s.candidates)
    if s.survivors >= count:
        return s.cut.new_full((), -1.0)
    search = _Search([_part_of(c) for c in s.candidates], s.cut)
    low = search.magnitude(s.survivors)
    if not s.between or s.survivors == 0:
        return low
    return halfway(low, search.magnitude(s.survivors - 1))


def _part_of(c: Candidates) -> _Part:
    if not is_sharded(c.w):
        return _Part((), c)
    if not is_of_shards(c.w):
        raise TypeError(f"a DTensor with placements {list(c.w.placements)} has no shards to select from")  # type: ignore[attr-defined]
    dims = group_dims(c.group_dim, c.w.dim())
    ranks = tuple(group for group, dim in dividing_ranks(c.w) if dims is None or dim in dims)
    master, dual = (None if t is None else shard_of(t) for t in (c.master, c.dual))
    shard = Candidates(shard_of(c.w), master, dual)
    if dims is None:
        return _Part(ranks, shard)
    v = shard.thresholded()
    r = group_norms(c.w, c.group_dim, v).to(v.dtype)
    return _Part(ranks, Candidates(r if c.scale == 1 else r / c.scale))


class _Search:
    """Magnitudes of given ranks among what all parts have on all ranks."""

    def __init__(self, parts: Sequence[_Part], like: Tensor) -> None:
        self._by_ranks: dict[Any, list[Candidates]] = {}
        for part in parts:
            self._by_ranks.setdefault(part.ranks, []).append(part.candidates)
        self._like = like
        self._bits = 63 if like.dtype == torch.float64 else 31
        self._known: dict[tuple[int, int], list[int]] = {}  # counts by (the low end, the width in bits)

    def magnitude(self, larger: int) -> Tensor:
        """The magnitude with ``larger`` others before it in descending order, NaN first: 0-dim."""
        low, left, above = 0, self._bits, 0
        while left > 0:
            counts = self._counts(low, left)
            place = len(counts) - 1
            while place > 0 and above + counts[place] <= larger:
                above += counts[place]
                place -= 1
            left = max(left - _BITS, 0)
            low += place << left
        of_bits = torch.int64 if self._bits == 63 else torch.int32
        return torch.tensor(low, dtype=of_bits).view(self._like.dtype).to(self._like.device)

    def _counts(self, low: int, width: int) -> list[int]:
        """How many magnitudes lie in each of the 2^11 bins of [low, low + 2^width), or of fewer if it is narrower."""
        if (low, width) not in self._known:
            total = torch.zeros(1 << _BITS, dtype=torch.int64)
            for ranks, candidates in self._by_ranks.items():
                counts = magnitude_counts(candidates, low, low + (1 << width) - 1, self._like)
                for group in ranks:
                    torch.distributed.all_reduce(counts, group=group)
                total += counts.cpu()
            self._known[low, width] = total[: 1 << min(width, _BITS)].tolist()
        return self._known[low, width]
