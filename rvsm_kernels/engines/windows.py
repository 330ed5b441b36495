"""u of N:M sparsity outside of a step, in torch operations: every engine's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..method.dtypes import to_opmath
from ..method.u import value_of
from ..method.windows import keep_largest


def keep_largest_(params: Sequence[Tensor], group: Mapping[str, Any]) -> None:
    """w <- u in place, for parameters of a split group with N:M sparsity."""
    for p in params:
        p.copy_(keep_largest(to_opmath(p), group["pattern"]))


def value_of_windows(params: Sequence[Tensor], group: Mapping[str, Any]) -> Tensor:
    """beta/2 ||w - u||^2 over parameters of a split group with N:M sparsity, 0-dim float64."""
    total = torch.zeros((), dtype=torch.float64, device=params[0].device)
    for p in params:
        w = to_opmath(p)
        total += value_of(w, keep_largest(w, group["pattern"]), group).to(total.device)
    return total
