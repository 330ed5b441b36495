"""N:M sparsity: of each m consecutive elements along dimension 1, a window, the n of largest magnitude survive.

Dimension 1 holds the inputs of Linear and Conv weights. Elements are consecutive in the order of its indices, however
the tensor lies in memory.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .memory import is_dense

Pattern = tuple[int, int]
"""(n, m): how many of how many survive."""

DIM = 1
"""The dimension of the windows."""
MOST = 16
"""The longest window."""

NO_PATTERN = "penalty='nm' needs a pattern: (n, m), so that n of every m elements survive, as in (2, 4)"

_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


def check_pattern(name: str, value: Any) -> None:
    """A check for the option ``pattern``: (n, m) with 1 <= n < m <= 16.

    Raises:
        TypeError: something else than a pair of integers.
        ValueError: a pair out of range.
    """
    pair = isinstance(value, (tuple, list)) and len(value) == 2
    if not pair or any(isinstance(k, bool) or not isinstance(k, numbers.Integral) for k in value):
        text = repr(value) if len(repr(value)) <= 60 else f"a {type(value).__name__}"
        raise TypeError(f"Invalid {name} value: {text} (a pair (n, m) of integers is needed, such as (2, 4))")
    n, m = value
    if not 1 <= n < m <= MOST:
        raise ValueError(f"Invalid {name} value: {tuple(value)} ((n, m) with 1 <= n < m <= {MOST} is needed)")


def why_not(shape: Sequence[int], pattern: Pattern) -> str | None:
    """Why a tensor of a shape has no whole windows, None where it has."""
    m = pattern[1]
    if len(shape) <= DIM:
        return f"it has {len(shape)} dimension{'' if len(shape) == 1 else 's'}, and windows lie along dimension {DIM}"
    if shape[DIM] % m != 0:
        return f"dimension {DIM} has {shape[DIM]} indices, no multiple of {m}"
    return None


def check_windows(shape: Sequence[int], pattern: Pattern, name: str) -> None:
    """Raise ValueError for a tensor that has no whole windows.

    Args:
        name: what the error calls it.
    """
    reason = why_not(shape, pattern)
    if reason is not None:
        raise ValueError(
            f"penalty='nm' with pattern={tuple(pattern)} does not fit {name}: {reason}; leave it in a group without a"
            " penalty, as rvsm_kernels.param_groups(model, penalty='nm', pattern=...) does"
        )


def inner_of(t: Tensor) -> int:
    """Elements in memory from an element of a window to the next, of a tensor or of its dense copy.

    Every m * inner elements of the memory hold whole windows then; the twin of ``windows_of`` in
    ``csrc/math/windows.h``.
    """
    if t.numel() == 0:
        return 1
    dense = t if is_dense(t) else torch.empty_like(t, device="meta")
    return dense.stride(DIM)


def _magnitude_keys(v: Tensor) -> Tensor:
    """Integers in the order of the magnitudes, NaN above infinity; no flushing of subnormal numbers touches them."""
    kind = _BITS[v.dtype]
    return v.view(kind) & torch.iinfo(kind).max


def keep_largest(v: Tensor, pattern: Pattern) -> Tensor:
    """u: the n largest magnitudes of each window of v, and zeros; a new tensor.

    Among equal magnitudes the earlier element survives, so that exactly n do. A NaN is above every number, infinity
    included, and always survives, also where a window has more than n of them: no zero hides it.

    Args:
        v: what is thresholded, float32 or float64, with dimensions that :func:`check_windows` passes.
    """
    n, m = pattern
    if v.numel() == 0:
        return v.clone()
    keys = _magnitude_keys(v).unflatten(DIM, (v.shape[DIM] // m, m))
    parts = []
    for k in range(m):
        key = keys.narrow(DIM + 1, k, 1)
        before, after = keys.narrow(DIM + 1, 0, k), keys.narrow(DIM + 1, k + 1, m - 1 - k)
        above = (before >= key).sum(DIM + 1, keepdim=True) + (after > key).sum(DIM + 1, keepdim=True)
        parts.append(above < n)
    kept = torch.cat(parts, DIM + 1).flatten(DIM, DIM + 1) | v.isnan()
    return torch.where(kept, v, torch.zeros_like(v))


def broken(w: Tensor, pattern: Pattern) -> Tensor:
    """How many windows of a tensor have more than n elements that are not 0; a 0-dim tensor on its device.

    Args:
        w: with dimensions that :func:`check_windows` passes.
    """
    n, m = pattern
    if w.numel() == 0:
        return torch.zeros((), dtype=torch.int64, device=w.device)
    return ((w != 0).unflatten(DIM, (w.shape[DIM] // m, m)).sum(DIM + 1) > n).sum()
