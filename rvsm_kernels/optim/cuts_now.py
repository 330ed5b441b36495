"""The cuts of the weights of an optimizer as they are now, for people who look."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..method.penalties import PENALTIES
from ..method.selection import Candidates
from ..method.split import is_nm, is_topk, strength_of_size
from .sparse_view import SparseView
from .split_optimizer import SplitOptimizer


class CutNow(NamedTuple):
    """The cut of a parameter.

    Attributes:
        candidates: its elements or groups, of which those up to the cut are zero in u.
        cut: a magnitude or a norm, below 0 where nothing goes to zero.
    """

    name: str
    candidates: Candidates
    cut: float


@torch.no_grad()
def cuts_now(optimizer: SplitOptimizer) -> list[CutNow]:
    """The cuts of all parameters that have a u, in their order; waits for a GPU. Frozen ones have none: u is w."""
    with optimizer._lock:
        return list(_cuts(optimizer._view))


def _cuts(view: SparseView) -> Iterator[CutNow]:
    for part in view._split_params(frozen=True):  # without a warning where all of them are frozen
        group = part.group
        for p, name in zip(part.params, part.names, strict=True):
            if not p.requires_grad:
                continue
            candidates = dataclasses.replace(view.candidates(p, group), scale=1.0)
            cut: float | Tensor
            if is_topk(group):
                cut = view.topk_cut(p, view._weights(p, group), group, part.engine)
            elif is_nm(group):
                continue  # a window has no cut
            else:
                tau = strength_of_size(group, view.coupled.size_of_groups(p, group)) / float(group["beta"])
                cut = PENALTIES[group["penalty"]].cut(tau, float(group["a"]))
            yield CutNow(name, candidates, float(cut))
