"""Groups of weights: which elements share a norm, and which dimension that is for a module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

GroupDim = int | Sequence[int] | None
"""The dimensions that index the groups (docs/method.md, section 2): None is elementwise, () the whole tensor."""

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

STRUCTURES: dict[str, tuple[GroupDim, GroupDim]] = {
    # structure: (group_dim of Conv and Linear, group_dim of a transposed convolution)
    "in_channels": (1, 0),
    "out_channels": (0, 1),
    "kernels": ((0, 1), (0, 1)),
    "layers": ((), ()),
}


NOT_WHOLE = "no whole dimension of this weight indexes"
"""How a reason begins why a weight cannot express a structure."""


def structure_dim(
    module: nn.Module, structure: str | None, name: str = "weight", swapped: bool = False
) -> tuple[GroupDim, str | None]:
    """The ``group_dim`` that a structure means for a weight of a module: its groups are channels of the network.

    Args:
        name: the weight's own name in the module.
        swapped: the weight is (inputs, outputs), as a transposed convolution's.

    Returns:
        (group_dim, None), or (None, why the weight cannot express the structure).

    Raises:
        ValueError: an unknown structure.
    """
    if structure is None:
        return None, None
    if structure not in STRUCTURES:
        raise ValueError(f"Invalid structure: {structure!r} (choose one of None, {', '.join(map(repr, STRUCTURES))})")
    transposed = isinstance(module, _TRANSPOSED)
    dim = STRUCTURES[structure][transposed or swapped]
    groups = getattr(module, "groups", 1) if isinstance(module, nn.modules.conv._ConvNd) else 1
    if groups > 1 and (structure, transposed) in (("in_channels", False), ("out_channels", True)):
        inputs, outputs = module.in_channels, module.out_channels
        if groups == inputs == outputs:  # depthwise: channel i is filter i
            return 0, None
        return None, f"{NOT_WHOLE} its {structure.replace('_', ' ')}, for it has {groups} groups"
    if isinstance(module, nn.Bilinear) and structure == "in_channels":
        return None, f"{NOT_WHOLE} its input channels, for it has two inputs"
    gated = isinstance(module, (nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell)) and not name.startswith("weight_hr")
    if gated and structure == "out_channels":
        return None, f"{NOT_WHOLE} its units, for each gate has a row of its own"
    return dim, None


def kept_dims(group_dim: GroupDim, ndim: int, name: str = "the tensor") -> tuple[int, ...] | None:
    """``group_dim`` as a sorted tuple of dimensions in [0, ndim), or None for elementwise.

    Raises:
        TypeError: not None, an int or a sequence of ints.
        ValueError: a dimension that the tensor does not have, or one named twice.
    """
    if group_dim is None:
        return None
    dims = (group_dim,) if isinstance(group_dim, int) else group_dim
    if isinstance(dims, (str, bytes)) or not isinstance(dims, Sequence):
        raise TypeError(f"group_dim must be None, an int or a tuple of ints, but got {group_dim!r}")
    kept = []
    for d in dims:
        if isinstance(d, bool) or not isinstance(d, int):
            raise TypeError(f"group_dim must be None, an int or a tuple of ints, but got {group_dim!r}")
        if not -ndim <= d < ndim:
            has = f"{name} has {ndim} dimension{'' if ndim == 1 else 's'}"
            hint = (
                " (rvsm_kernels.param_groups puts biases and norms into a group without a penalty)"
                if ndim < 2
                else f", 0 to {ndim - 1}: 0 indexes the outputs of a Linear or Conv weight, 1 its inputs"
            )
            raise ValueError(f"Invalid group_dim value: {group_dim!r}: {has}{hint}")
        kept.append(d % ndim)
    if len(set(kept)) != len(kept):
        raise ValueError(f"Invalid group_dim value: {group_dim!r}: a dimension is named twice for {name}")
    return tuple(sorted(kept))


def group_size(shape: torch.Size, group_dim: GroupDim) -> int:
    """The number of elements of one group (1 for elementwise)."""
    kept = kept_dims(group_dim, len(shape))
    if kept is None:
        return 1
    size = 1
    for d, n in enumerate(shape):
        size *= 1 if d in kept else n
    return size


class GroupView(NamedTuple):
    """A tensor in memory order as batch x outer x groups x inner elements; see ``csrc/types.h``."""

    batch: int
    outer: int
    groups: int
    inner: int


def group_view(sizes: Sequence[int], strides: Sequence[int], kept: Sequence[int]) -> GroupView:
    """The view of a dense tensor whose dimensions `kept` (in [0, n)) index the groups: ``csrc/group_view.h`` in Python.

    Raises:
        ValueError: the kept dimensions do not collapse in memory.
    """
    order = sorted((d for d, n in enumerate(sizes) if n != 1), key=lambda d: -strides[d])
    runs: list[list[int]] = []  # [kept?, number of elements]
    for d in order:
        if not runs or runs[-1][0] != (d in kept):
            runs.append([d in kept, 1])
        runs[-1][1] *= sizes[d]
    kept_runs = sum(run[0] for run in runs)
    if kept_runs == 0:
        return GroupView(1, 1, 1, math.prod(sizes))
    neighbours = max(kept) - min(kept) + 1 == len(kept)
    two = kept_runs == 2 and bool(runs[0][0]) and neighbours
    if kept_runs > 1 and not two:
        raise ValueError(
            f"the dimensions ({', '.join(map(str, sorted(kept)))}) of group_dim do not collapse in memory into one"
            " index; permute the parameter so that they are neighbours (or make it contiguous), or use"
            ' engine="reference"'
        )
    batch = runs.pop(0)[1] if two else 1
    outer = 1 if runs[0][0] else runs.pop(0)[1]
    groups = runs.pop(0)[1]
    return GroupView(batch, outer, groups, runs[0][1] if runs else 1)


def magnitudes(w: Tensor, group_dim: GroupDim) -> Tensor:
    """|w_i|, or the norms ||w_G||_2 with reduced dimensions of size 1, so that they broadcast over w.

    Norms of float32 are summed in float64 and rounded once: a float32 sum over a large group is off by more than
    the few ulp that may decide whether the group lives.
    """
    kept = kept_dims(group_dim, w.dim())
    if kept is None:
        return w.abs()
    reduced = [d for d in range(w.dim()) if d not in kept]
    if not reduced:  # every element is its own group; an empty dim list would mean "reduce all"
        return w.abs()
    if w.numel() == 0:
        return w.new_zeros([w.shape[d] if d in kept else 1 for d in range(w.dim())])
    return torch.linalg.vector_norm(w, dim=reduced, keepdim=True, dtype=torch.float64).to(w.dtype)
