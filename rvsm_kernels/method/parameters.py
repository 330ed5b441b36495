"""The parameters of a group: their names, which of them a step moves, and which are left alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .dtypes import DTYPES


def param_name(group: Mapping[str, Any], group_index: int, param_index: int) -> str:
    """The name that a parameter was given, else its place in the param groups."""
    names = group.get("param_names")
    if names is None or param_index >= len(names):
        return f"parameter {param_index} of group {group_index}"
    return names[param_index]


def is_left_alone(p: Tensor) -> bool:
    """Whether a parameter is frozen and of a kind that no optimizer could train (int8, bool, complex, sparse, ...)."""
    return not p.requires_grad and p.grad is None and (p.dtype not in DTYPES or p.layout != torch.strided)


def is_flattened(p: Tensor) -> bool:
    """Whether FSDP1 (``FullyShardedDataParallel``) has made a parameter a piece of a long vector, without its shape."""
    return getattr(p, "_fsdp_flattened", False) or getattr(p, "_is_flat_param", False)


def with_gradient(group: Mapping[str, Any]) -> Iterator[tuple[int, Tensor]]:
    """The parameters of a group that a step moves, with their places: those that have a gradient and elements."""
    for j, p in enumerate(group["params"]):
        if p.grad is not None and p.numel() > 0:
            yield j, p
