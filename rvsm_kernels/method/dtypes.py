"""The types that weights are stored in, and the type that they are computed in."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""Every dtype of a parameter that can be trained."""

HALF_TYPES = (torch.bfloat16, torch.float16)


def opmath_type(dtype: torch.dtype) -> torch.dtype:
    """The type of the arithmetic on tensors of a floating dtype: float32 for half types, else the same."""
    return torch.float32 if dtype in HALF_TYPES else dtype


def to_opmath(t: Tensor) -> Tensor:
    """The tensor in the type of its arithmetic; the tensor itself where it has that type already."""
    return t.float() if t.dtype in HALF_TYPES else t
