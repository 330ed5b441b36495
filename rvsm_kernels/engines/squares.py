"""The squares of the norms of groups, for norms that are made of several ranks' sums."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..method.dtypes import DTYPES
from ..method.groups import GroupDim, group_dims, to_memory_order
from .registry import served_device_types


def squares(tensors: Sequence[tuple[Tensor, GroupDim]]) -> list[Tensor]:
    """||w_G||_2^2 of each group of several tensors.

    The compiled kernels make them where they serve the device: one read of each tensor. In torch the conversion to
    float64 and the squares are tensors too.

    Args:
        tensors: (a tensor in memory, its ``group_dim``, which is not None).

    Returns:
        For each tensor its sums, float64, one after the other in memory as in
        :func:`rvsm_kernels.method.groups.to_memory_order`.
    """
    served = served_device_types("native")
    by_dims: dict[tuple[int, ...], list[int]] = {}
    sums: list[Tensor] = [torch.empty(0)] * len(tensors)
    for i, (w, group_dim) in enumerate(tensors):
        dims = group_dims(group_dim, w.dim()) or ()
        if w.device.type in served and w.dtype in DTYPES:
            by_dims.setdefault(dims, []).append(i)
        else:
            sums[i] = _in_torch(w, dims)
    for dims, places in by_dims.items():
        found = torch.ops.rvsm_kernels.squares([tensors[i][0] for i in places], dims)
        for i, of_tensor in zip(places, found, strict=True):
            sums[i] = of_tensor
    return sums


def _in_torch(w: Tensor, dims: tuple[int, ...]) -> Tensor:
    reduced = [d for d in range(w.dim()) if d not in dims]
    all_squares = w.double().square()
    return to_memory_order(all_squares.sum(dim=reduced) if reduced else all_squares, w, dims)
