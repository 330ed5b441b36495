"""The squares of the norms of groups, for norms that are made of several ranks' sums."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..method.dtypes import DTYPES
from ..method.groups import Grouping, group_dims, size_of_block, sums, to_memory_order
from .registry import served_device_types


def squares(tensors: Sequence[tuple[Tensor, Grouping]]) -> list[Tensor]:
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
    alike: dict[tuple[tuple[int, ...], int], list[int]] = {}
    found: list[Tensor] = [torch.empty(0)] * len(tensors)
    for i, (w, group_dim) in enumerate(tensors):
        if w.device.type in served and w.dtype in DTYPES:
            alike.setdefault((group_dims(group_dim, w.dim()) or (), size_of_block(group_dim)), []).append(i)
        else:
            found[i] = to_memory_order(sums(w.double().square(), group_dim), w, group_dim)
    for (dims, block), places in alike.items():
        for i, of_tensor in zip(
            places, torch.ops.rvsm_kernels.squares([tensors[i][0] for i in places], dims, block), strict=True
        ):
            found[i] = of_tensor
    return found
