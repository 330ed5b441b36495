"""Histograms of magnitudes, for cuts that are made of several ranks' counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..method.selection import Candidates
from .cuts import are_served, as_elements
from .registry import served_device_types


def magnitude_counts(candidates: Sequence[Candidates], low: int, high: int, like: Tensor) -> Tensor:
    """How many magnitudes lie in each of 2,048 bins of [low, high]: int64, on the device of ``like``.

    Args:
        low, high: bits of magnitudes in the type of ``like``; both ends belong to the range.
    """
    if like.device.type == "cpu" and "cpu" in served_device_types("native") and are_served(candidates, like):
        elements = [as_elements(c) for c in candidates]
        beside = [c.master for c in elements], [c.dual for c in elements]
        return torch.ops.rvsm_kernels.magnitude_counts([c.w for c in elements], *beside, low, high)
    counts = torch.zeros(2048, dtype=torch.int64, device=like.device)
    shift = max((high - low).bit_length() - 11, 0)
    for c in candidates:
        r = c.magnitudes().to(like).abs()
        bits = r.view(torch.int64 if r.dtype == torch.float64 else torch.int32).long()
        inside = bits[(bits >= low) & (bits <= high)]
        counts += torch.bincount((inside - low) >> shift, minlength=2048)
    return counts
