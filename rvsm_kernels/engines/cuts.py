"""The cuts of top-k by the compiled selection, which reads the weights once and sorts nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..method.dtypes import DTYPES, opmath_type
from ..method.groups import group_count, group_dims, size_of_block
from ..method.memory import kind_of, tracer
from ..method.selection import Selection, survivors
from ..method.selection import select as select_in_torch


def select(selections: Sequence[Selection]) -> None:
    """Fill cuts: those of tensors on the CPU by ``rvsm_kernels::cuts_``, others by torch's selection."""
    served = [s for s in selections if _is_served(s)]
    if len(served) < len(selections):
        select_in_torch([s for s in selections if not _is_served(s)])
    for between in (False, True):
        alike = [s for s in served if (s.group_dim is not None) == between]
        if alike:
            tensors = list(_norms(alike)) if between else [s.w for s in alike]
            nothing = [None] * len(alike)  # norms have no states beside them
            torch.ops.rvsm_kernels.cuts_(
                [s.cut for s in alike],
                [s.last for s in alike],
                tensors,
                nothing if between else [s.master for s in alike],
                nothing if between else [s.dual for s in alike],
                [survivors(s.density, t.numel()) for s, t in zip(alike, tensors, strict=True)],
                between,
            )


def _is_served(s: Selection) -> bool:
    """Whether the compiled selection can work on everything that it would read and write."""
    tensors = [t for t in (s.w, s.master, s.dual, s.cut, s.last) if t is not None]
    in_memory = all(t.device.type == "cpu" and kind_of(t) is None for t in tensors)
    return in_memory and s.w.dtype in DTYPES and tracer() is None


def _norms(selections: Sequence[Selection]) -> Iterator[Tensor]:
    """The norms of the groups of each tensor, each once; :func:`rvsm_kernels.method.groups.magnitudes` rounds alike."""
    for s in selections:
        w = s.w if s.master is None and s.dual is None else s.thresholded()
        if group_count(w.shape, s.group_dim) == w.numel():  # a group is one element, whose square may be out of range
            yield w
        else:
            dims = group_dims(s.group_dim, w.dim()) or ()
            (squares,) = torch.ops.rvsm_kernels.squares([w], dims, size_of_block(s.group_dim))
            yield squares.sqrt_().to(opmath_type(w.dtype))
