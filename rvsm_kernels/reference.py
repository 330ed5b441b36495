"""The prox and the optimizers in plain PyTorch: the specification that every engine is tested against."""

from __future__ import annotations

from torch import Tensor

from .method.groups import GroupDim, grouping
from .method.prox import prox as _prox
from .optim import adamw, adaptive, rvsm

__all__ = ["RVSM", "AdaptiveHardThreshold", "RVSMAdamW", "prox"]


def prox(
    w: Tensor, penalty: str | None, tau: float, a: float = 1.0, group_dim: GroupDim = None, group_block: int = 1
) -> Tensor:
    """:func:`rvsm_kernels.prox` in plain PyTorch, without its checks."""
    return _prox(w, penalty, tau, a, grouping(group_dim, group_block))


class RVSM(rvsm.RVSM):
    """:class:`rvsm_kernels.RVSM` in plain PyTorch: the same signature, options and state."""

    _only_engine = "reference"


class AdaptiveHardThreshold(adaptive.AdaptiveHardThreshold):
    """:class:`rvsm_kernels.AdaptiveHardThreshold` in plain PyTorch: the same signature, options and state."""

    _only_engine = "reference"


class RVSMAdamW(adamw.RVSMAdamW):
    """:class:`rvsm_kernels.RVSMAdamW` in plain PyTorch: the same signature, options and state."""

    _only_engine = "reference"
