"""The cuts of top-k by the compiled selection, which reads the weights once and sorts nothing."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..method.dtypes import DTYPES, opmath_type, to_opmath
from ..method.groups import group_count, group_dims, size_of_block
from ..method.memory import kind_of, tracer
from ..method.selection import Candidates, Selection
from ..method.selection import select as select_in_torch


def select(selections: Sequence[Selection]) -> None:
    """Fill cuts by ``rvsm_kernels::cuts_`` where it can read everything, others by torch's selection.

    One call for the cuts of a device: a GPU works for all of them at the same time.
    """
    served = [s for s in selections if _is_served(s)]
    if len(served) < len(selections):
        select_in_torch([s for s in selections if not _is_served(s)])
    for between, device in dict.fromkeys((s.between, s.cut.device) for s in served):
        alike = [s for s in served if s.between == between and s.cut.device == device]
        candidates = [as_elements(c) for s in alike for c in s.candidates]
        torch.ops.rvsm_kernels.cuts_(
            [s.cut for s in alike],
            [s.last for s in alike],
            [c.w for c in candidates],
            [c.master for c in candidates],
            [c.dual for c in candidates],
            [s.survivors for s in alike],
            between,
            [len(s.candidates) for s in alike],
        )


def _is_served(s: Selection) -> bool:
    """Whether the compiled selection can work on everything that it would read and write."""
    known = s.last.device == s.cut.device and _selects_on(s.cut.device.type)
    return known and kind_of(s.cut) is None and kind_of(s.last) is None and are_served(s.candidates, s.cut)


@functools.cache
def _selects_on(device_type: str) -> bool:
    """Whether the build has a selection for a type of device."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key("rvsm_kernels::cuts_", key)


def are_served(candidates: Sequence[Candidates], like: Tensor) -> bool:
    """Whether compiled kernels of the device of ``like`` can read the candidates, and their arithmetic has its type."""
    tensors = [t for c in candidates for t in (c.w, c.master, c.dual) if t is not None]
    in_memory = all(t.device == like.device and kind_of(t) is None for t in (like, *tensors))
    types = {opmath_type(c.w.dtype) if c.w.dtype in DTYPES else None for c in candidates}
    return in_memory and types == {like.dtype} and tracer() is None


def as_elements(c: Candidates) -> Candidates:
    """Candidates as elements of a tensor: the norms of groups, each once.

    :func:`rvsm_kernels.method.groups.magnitudes` rounds alike.
    """
    if c.group_dim is None:
        return c
    w = c.w if c.master is None and c.dual is None else c.thresholded()
    if group_count(w.shape, c.group_dim) != w.numel():
        dims = group_dims(c.group_dim, w.dim()) or ()
        (squares,) = torch.ops.rvsm_kernels.squares([w], dims, size_of_block(c.group_dim))
        w = squares.sqrt_().to(opmath_type(w.dtype))
    # else a group is one element, whose square may be out of range
    return Candidates(w if c.scale == 1 else to_opmath(w) / c.scale)
