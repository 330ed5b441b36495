"""Groups of weights: which elements of a tensor share a norm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .memory import is_dense

GroupDim = int | Sequence[int] | None
"""The dimensions that index the groups (docs/method.md, section 2): None is elementwise, () the whole tensor."""


def as_dims(group_dim: GroupDim) -> tuple[int, ...] | None:
    """``group_dim`` as a tuple of dimensions as they were given, or None for elementwise.

    Raises:
        TypeError: not None, an int or a sequence of ints.
    """
    if group_dim is None:
        return None
    dims = (group_dim,) if isinstance(group_dim, int) else group_dim
    sequence = isinstance(dims, Sequence) and not isinstance(dims, (str, bytes))
    if not sequence or any(isinstance(d, bool) or not isinstance(d, int) for d in dims):
        raise TypeError(f"group_dim must be None, an int or a tuple of ints, but got {group_dim!r}")
    return tuple(dims)


def group_dims(group_dim: GroupDim, ndim: int, name: str = "the tensor") -> tuple[int, ...] | None:
    """``group_dim`` as a sorted tuple of dimensions in [0, ndim), or None for elementwise.

    Raises:
        TypeError: not None, an int or a sequence of ints.
        ValueError: a dimension that the tensor does not have, or one named twice.
    """
    dims = as_dims(group_dim)
    if dims is None:
        return None
    for d in dims:
        if not -ndim <= d < ndim:
            has = f"{name} has {ndim} dimension{'' if ndim == 1 else 's'}"
            hint = (
                " (rvsm_kernels.param_groups puts biases and norms into a group without a penalty)"
                if ndim < 2
                else f", 0 to {ndim - 1}: 0 indexes the outputs of a Linear or Conv weight, 1 its inputs"
            )
            raise ValueError(f"Invalid group_dim value: {group_dim!r}: {has}{hint}")
    in_range = {d % ndim for d in dims}
    if len(in_range) != len(dims):
        raise ValueError(f"Invalid group_dim value: {group_dim!r}: a dimension is named twice for {name}")
    return tuple(sorted(in_range))


def group_size(shape: torch.Size, group_dim: GroupDim) -> int:
    """The number of elements of one group (1 for elementwise)."""
    dims = group_dims(group_dim, len(shape))
    return 1 if dims is None else math.prod([n for d, n in enumerate(shape) if d not in dims])


class GroupView(NamedTuple):
    """A tensor in memory order as batch x outer x groups x inner elements; see ``csrc/math/group_view.h``."""

    batch: int
    outer: int
    groups: int
    inner: int


def group_view(sizes: Sequence[int], strides: Sequence[int], group_dims: Sequence[int]) -> GroupView:
    """The view of a dense tensor whose dimensions ``group_dims`` (in [0, n)) index the groups.

    The twin of ``csrc/math/group_view.h``.

    Raises:
        ValueError: the dimensions do not collapse in memory.
    """
    order = sorted((d for d, n in enumerate(sizes) if n != 1), key=lambda d: -strides[d])
    runs: list[list[int]] = []  # neighbours in memory: [whether they index the groups, number of elements]
    for d in order:
        if not runs or runs[-1][0] != (d in group_dims):
            runs.append([d in group_dims, 1])
        runs[-1][1] *= sizes[d]
    group_runs = sum(run[0] for run in runs)
    if group_runs == 0:
        return GroupView(1, 1, 1, math.prod(sizes))
    neighbours = max(group_dims) - min(group_dims) + 1 == len(group_dims)
    two = group_runs == 2 and bool(runs[0][0]) and neighbours
    if group_runs > 1 and not two:
        raise ValueError(
            f"the dimensions ({', '.join(map(str, sorted(group_dims)))}) of group_dim do not collapse in memory into"
            " one index; permute the parameter so that they are neighbours (or make it contiguous), or use"
            ' engine="reference"'
        )
    batch = runs.pop(0)[1] if two else 1
    outer = 1 if runs[0][0] else runs.pop(0)[1]
    groups = runs.pop(0)[1]
    return GroupView(batch, outer, groups, runs[0][1] if runs else 1)


def view_of(t: Tensor, group_dim: GroupDim) -> GroupView | None:
    """The view of the groups of a tensor, or of its dense copy where it is not dense.

    None for elementwise, and for a tensor without elements.

    Raises:
        ValueError: the dimensions do not collapse in memory.
    """
    dims = group_dims(group_dim, t.dim())
    if dims is None or t.numel() == 0:
        return None
    return group_view(t.shape, (t if is_dense(t) else torch.empty_like(t, device="meta")).stride(), dims)


def magnitudes(w: Tensor, group_dim: GroupDim) -> Tensor:
    """|w_i|, or the norms ||w_G||_2 with reduced dimensions of size 1, so that they broadcast over w.

    Norms of float32 are summed in float64 and rounded once: a float32 sum over a large group is off by more than
    the few ulp that may decide whether the group lives.
    """
    dims = group_dims(group_dim, w.dim())
    if dims is None:
        return w.abs()
    reduced = [d for d in range(w.dim()) if d not in dims]
    if not reduced:  # a group is one element; an empty list of dimensions would mean all of them
        return w.abs()
    if w.numel() == 0:
        return w.new_zeros([w.shape[d] if d in dims else 1 for d in range(w.dim())])
    return torch.linalg.vector_norm(w, dim=reduced, keepdim=True, dtype=torch.float64).to(w.dtype)


def from_memory_order(norms: Tensor, w: Tensor, group_dim: GroupDim) -> Tensor:
    """Norms of the groups of w, one after the other in memory, in the shape and dtype of :func:`magnitudes`.

    Args:
        norms: float64, one number for each group in the order of the :class:`GroupView` (batch * groups + group).
        w: the tensor whose groups they are of.
    """
    dims = group_dims(group_dim, w.dim()) or ()
    in_memory = _in_memory_order(dims, w)
    by_dim = norms.reshape([w.shape[d] for d in in_memory]).permute([in_memory.index(d) for d in dims])
    return by_dim.reshape([n if d in dims else 1 for d, n in enumerate(w.shape)]).to(w.dtype)


def to_memory_order(numbers: Tensor, w: Tensor, group_dim: GroupDim) -> Tensor:
    """Numbers of the groups of w, one after the other in memory: the order of :func:`from_memory_order`.

    Args:
        numbers: one for each group, with the dimensions of w that index the groups, or with all of them.
    """
    dims = group_dims(group_dim, w.dim()) or ()
    by_dim = numbers.reshape([w.shape[d] for d in dims])
    return by_dim.permute([dims.index(d) for d in _in_memory_order(dims, w)]).reshape(-1)


def _in_memory_order(dims: Sequence[int], w: Tensor) -> list[int]:
    strides = (w if is_dense(w) else torch.empty_like(w, device="meta")).stride()
    return sorted(dims, key=lambda d: -strides[d])
