"""Groups of weights: which elements of a tensor share a norm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .memory import is_dense

GroupDim = int | Sequence[int] | None
"""The dimensions that index the groups (docs/method.md, section 2): None is elementwise, () the whole tensor."""


@dataclass(frozen=True)
class Blocks:  # no tuple, which would equal a group_dim of two dimensions
    """Groups that are blocks of one dimension: ``group_dim`` with a ``group_block`` above 1.

    Attributes:
        dim: the dimension, as it was given.
        size: how many consecutive indices make a group; their number is a multiple of it.
    """

    dim: int
    size: int


Grouping = GroupDim | Blocks
"""What indexes the groups. Every function here that takes a ``group_dim`` takes blocks too."""


def as_dims(group_dim: Grouping) -> tuple[int, ...] | None:
    """``group_dim`` as a tuple of dimensions as they were given, or None for elementwise.

    Raises:
        TypeError: not None, an int or a sequence of ints.
    """
    if group_dim is None:
        return None
    if isinstance(group_dim, Blocks):
        return (group_dim.dim,)
    dims = (group_dim,) if isinstance(group_dim, int) else group_dim
    sequence = isinstance(dims, Sequence) and not isinstance(dims, (str, bytes))
    if not sequence or any(isinstance(d, bool) or not isinstance(d, int) for d in dims):
        raise TypeError(f"group_dim must be None, an int or a tuple of ints, but got {group_dim!r}")
    return tuple(dims)


def size_of_block(group_dim: Grouping) -> int:
    """``group_block``: how many consecutive indices of the dimension make a group."""
    return group_dim.size if isinstance(group_dim, Blocks) else 1


def grouping(group_dim: GroupDim, group_block: int) -> Grouping:
    """The two options as one value, which functions hand on.

    Raises:
        TypeError: a ``group_dim`` that is not None, an int or a sequence of ints.
        ValueError: blocks of no dimension or of several.
    """
    if group_block == 1:
        return group_dim
    dims = as_dims(group_dim)
    if dims is None or len(dims) != 1:
        raise ValueError(
            f"Invalid group_block value: {group_block}: it needs one dimension in group_dim, not {group_dim!r}"
        )
    return Blocks(dims[0], int(group_block))


def grouping_of(group: Mapping[str, Any]) -> Grouping:
    """What indexes the groups of a param group."""
    return grouping(group["group_dim"], group["group_block"])


def group_dims(group_dim: Grouping, ndim: int, name: str = "the tensor") -> tuple[int, ...] | None:
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
                " (rvsm_kernels.param_groups puts biases and norms into a group without a penalty; what FSDP1 or"
                " DeepSpeed has flattened has no groups left: fully_shard, FSDP2, keeps them)"
                if ndim < 2
                else f", 0 to {ndim - 1}: 0 indexes the outputs of a Linear or Conv weight, 1 its inputs"
            )
            raise ValueError(f"Invalid group_dim value: {_shown(group_dim)}: {has}{hint}")
    in_range = {d % ndim for d in dims}
    if len(in_range) != len(dims):
        raise ValueError(f"Invalid group_dim value: {group_dim!r}: a dimension is named twice for {name}")
    return tuple(sorted(in_range))


def _shown(group_dim: Grouping) -> str:
    return repr(group_dim.dim if isinstance(group_dim, Blocks) else group_dim)


def check_grouping(shape: Sequence[int], group_dim: Grouping, name: str = "the tensor") -> None:
    """Raise as :func:`group_dims`, and ValueError for a dimension that is no whole number of blocks."""
    dims, block = group_dims(group_dim, len(shape), name), size_of_block(group_dim)
    if dims is not None and block > 1 and shape[dims[0]] % block != 0:
        raise ValueError(
            f"Invalid group_block value: {block}: dimension {dims[0]} of {name} has {shape[dims[0]]} indices, no"
            " multiple of it"
        )


def group_size(shape: torch.Size, group_dim: Grouping) -> int:
    """The number of elements of one group (1 for elementwise)."""
    dims = group_dims(group_dim, len(shape))
    return (
        1 if dims is None else size_of_block(group_dim) * math.prod([n for d, n in enumerate(shape) if d not in dims])
    )


def group_count(shape: torch.Size, group_dim: Grouping) -> int:
    """The number of groups of a tensor with a ``group_dim``, also where it has no elements."""
    return math.prod(shape[d] for d in group_dims(group_dim, len(shape)) or ()) // size_of_block(group_dim)


class GroupView(NamedTuple):
    """A tensor in memory order as batch x outer x groups x inner elements; see ``csrc/math/group_view.h``."""

    batch: int
    outer: int
    groups: int
    inner: int


def group_view(
    sizes: Sequence[int], strides: Sequence[int], group_dims: Sequence[int], group_block: int = 1
) -> GroupView:
    """The view of a dense tensor whose dimensions ``group_dims`` (in [0, n)) index the groups.

    The twin of ``csrc/math/group_view.h``.

    Raises:
        ValueError: the dimensions do not collapse in memory, or a block does not divide its dimension.
    """
    if group_block != 1:
        grouping(group_dims, group_block)
        check_grouping(sizes, Blocks(group_dims[0], group_block))
    order = sorted((d for d, n in enumerate(sizes) if n != 1), key=lambda d: -strides[d])
    runs: list[list[int]] = []  # neighbours in memory: [whether they index the groups, number of elements]
    for d in order:
        if not runs or runs[-1][0] != (d in group_dims):
            runs.append([d in group_dims, 1])
        runs[-1][1] *= sizes[d]
    group_runs = sum(run[0] for run in runs)
    if group_runs == 0:
        return GroupView(1, 1, 1, math.prod(sizes))
    two = group_runs == 2 and bool(runs[0][0])
    if group_runs > 1 and not two:
        raise ValueError(
            f"the dimensions ({', '.join(map(str, sorted(group_dims)))}) of group_dim do not collapse in memory into"
            " one index; permute the parameter so that they are neighbours (or make it contiguous), or use"
            ' engine="reference"'
        )
    batch = runs.pop(0)[1] if two else 1
    outer = 1 if runs[0][0] else runs.pop(0)[1]
    groups = runs.pop(0)[1]
    return GroupView(batch, outer, groups // group_block, group_block * (runs[0][1] if runs else 1))


def view_of(t: Tensor, group_dim: Grouping) -> GroupView | None:
    """The view of the groups of a tensor, or of its dense copy where it is not dense.

    None for elementwise, and for a tensor without elements.

    Raises:
        ValueError: the dimensions do not collapse in memory.
    """
    dims = group_dims(group_dim, t.dim())
    if dims is None or t.numel() == 0:
        return None
    strides = (t if is_dense(t) else torch.empty_like(t, device="meta")).stride()
    return group_view(t.shape, strides, dims, size_of_block(group_dim))


def _apart(w: Tensor, group_dim: Grouping) -> tuple[Tensor, list[int]]:
    """w with the indices of a block in a dimension of its own, and the dimensions that the groups are summed over."""
    dims = group_dims(group_dim, w.dim()) or ()
    if size_of_block(group_dim) == 1:
        return w, [d for d in range(w.dim()) if d not in dims]
    (dim,) = dims
    apart = w.unflatten(dim, (w.shape[dim] // size_of_block(group_dim), size_of_block(group_dim)))
    return apart, [d for d in range(apart.dim()) if d != dim]


def _beside(numbers: Tensor, w: Tensor, group_dim: Grouping) -> Tensor:
    """A number for each group, with reduced dimensions of size 1, so that it broadcasts over w.

    Args:
        numbers: of :func:`_apart`. Where groups are blocks, every index of a block gets the block's number.
    """
    block = size_of_block(group_dim)
    if block == 1:
        return numbers
    (dim,) = group_dims(group_dim, w.dim()) or (0,)
    shape = [block if d == dim + 1 else n for d, n in enumerate(numbers.shape)]
    return numbers.expand(shape).flatten(dim, dim + 1)


def once(numbers: Tensor, group_dim: Grouping) -> Tensor:
    """What broadcasts over a tensor (:func:`magnitudes`), with the number of each group once."""
    block = size_of_block(group_dim)
    if block == 1:
        return numbers
    (dim,) = group_dims(group_dim, numbers.dim()) or (0,)
    return numbers.unflatten(dim, (numbers.shape[dim] // block, block)).select(dim + 1, 0)


def sums(t: Tensor, group_dim: Grouping) -> Tensor:
    """The sum of t over each group, in the shape of :func:`magnitudes`."""
    apart, reduced = _apart(t, group_dim)
    return _beside(apart.sum(dim=reduced, keepdim=True) if reduced else apart, t, group_dim)


def magnitudes(w: Tensor, group_dim: Grouping) -> Tensor:
    """|w_i|, or the norms ||w_G||_2 with reduced dimensions of size 1, so that they broadcast over w.

    Where groups are blocks of indices, the norm of a block stands at each of them: :func:`once` takes it once.

    Norms of float32 are summed in float64 and rounded once: a float32 sum over a large group is off by more than
    the few ulp that may decide whether the group lives.
    """
    dims = group_dims(group_dim, w.dim())
    if dims is None:
        return w.abs()
    if w.numel() == 0:
        return w.new_zeros([w.shape[d] if d in dims else 1 for d in range(w.dim())])
    apart, reduced = _apart(w, group_dim)
    if not reduced:  # a group is one element; an empty list of dimensions would mean all of them
        return w.abs()
    norms = torch.linalg.vector_norm(apart, dim=reduced, keepdim=True, dtype=torch.float64).to(w.dtype)
    return _beside(norms, w, group_dim)


def from_memory_order(norms: Tensor, w: Tensor, group_dim: Grouping) -> Tensor:
    """Norms of the groups of w, one after the other in memory, in the shape and dtype of :func:`magnitudes`.

    Args:
        norms: float64, one number for each group in the order of the :class:`GroupView` (batch * groups + group).
        w: the tensor whose groups they are of.
    """
    dims = group_dims(group_dim, w.dim()) or ()
    in_memory = _in_memory_order(dims, w)
    if size_of_block(group_dim) > 1:  # the blocks of one dimension are in its order
        norms = norms.repeat_interleave(size_of_block(group_dim))
    by_dim = norms.reshape([w.shape[d] for d in in_memory]).permute([in_memory.index(d) for d in dims])
    return by_dim.reshape([n if d in dims else 1 for d, n in enumerate(w.shape)]).to(w.dtype)


def to_memory_order(numbers: Tensor, w: Tensor, group_dim: Grouping) -> Tensor:
    """Numbers of the groups of w, one after the other in memory: the order of :func:`from_memory_order`.

    Args:
        numbers: in the shape of :func:`magnitudes`.
    """
    dims = group_dims(group_dim, w.dim()) or ()
    if size_of_block(group_dim) > 1:
        return once(numbers, group_dim).reshape(-1)
    by_dim = numbers.reshape([w.shape[d] for d in dims])
    return by_dim.permute([dims.index(d) for d in _in_memory_order(dims, w)]).reshape(-1)


def _in_memory_order(dims: Sequence[int], w: Tensor) -> list[int]:
    strides = (w if is_dense(w) else torch.empty_like(w, device="meta")).stride()
    return sorted(dims, key=lambda d: -strides[d])
