"""The splitting of a group: whether there is any, how strong it is, and its numbers for the kernels.

The twin of ``csrc/math/split.h``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from .device_numbers import is_positive
from .groups import group_size, grouping_of
from .methods import METHODS

SPLIT_NUMBERS = ("grad", "pull", "coupling", "lasso", "hold")
"""The numbers of :func:`split_numbers`, in the kernels' order."""


def is_split(group: Mapping[str, Any]) -> bool:
    """Whether the group has a splitting at all: with no penalty, lam = 0 or beta = 0, u is w.

    Numbers on a device count as more than 0: see :func:`rvsm_kernels.method.device_numbers.read`.
    """
    return group["penalty"] is not None and is_positive(group["lam"]) and is_positive(group["beta"])


def is_topk(group: Mapping[str, Any]) -> bool:
    """Whether the cut of a group's parameters comes from their magnitudes."""
    return group["penalty"] == "topk" and is_split(group)


def is_nm(group: Mapping[str, Any]) -> bool:
    """Whether u keeps the largest elements of windows."""
    return group["penalty"] == "nm" and is_split(group)


def is_coupled(group: Mapping[str, Any]) -> bool:
    """Whether groups span several slices or weights, so that no tensor alone knows their norms."""
    return group["coupling"] is not None


def state_name(group: Mapping[str, Any]) -> str | None:
    """The name of the state of the group's method, None where it has none or there is no splitting."""
    return METHODS[group["method"]].state if is_split(group) else None


def strength_of_size(group: Mapping[str, Any], size: float) -> float:
    """lam of a tensor whose groups have ``size`` elements: lam, or lam * sqrt(size) with ``group_scale``."""
    lam = float(group["lam"])
    return lam * math.sqrt(size) if group["group_scale"] else lam


def strength(group: Mapping[str, Any], shape: torch.Size) -> float:
    """:func:`strength_of_size` of one tensor of the group."""
    return strength_of_size(group, group_size(shape, grouping_of(group)) if group["group_scale"] else 1)


def split_numbers(group: Mapping[str, Any], split: bool) -> tuple[float, ...]:
    """(grad, pull, coupling, lasso, hold) of a step, in double precision.

    ``grad`` is the sign of the gradient (1 / grad_scale comes in the kernel), ``pull`` = lr * beta moves the weights,
    ``coupling`` = beta is added to the gradient, ``lasso`` is the strength of the group lasso,
    ``hold`` 1 where zeros stay.
    """
    lr, beta = float(group["lr"]), float(group["beta"])
    decoupled = bool(group["decoupled"])
    return (
        -1.0 if group["maximize"] else 1.0,
        lr * beta if split and decoupled else 0.0,
        beta if split and not decoupled else 0.0,
        float(group["group_lasso"]),
        1.0 if group["hold_zeros"] else 0.0,
    )
