"""The prox and the optimizers in plain PyTorch: the specification that every engine is tested against."""

from __future__ import annotations

from .method.prox import prox
from .optim import adamw, adaptive, rvsm

__all__ = ["RVSM", "AdaptiveHardThreshold", "RVSMAdamW", "prox"]


class RVSM(rvsm.RVSM):
    """:class:`rvsm_kernels.RVSM` in plain PyTorch: the same signature, options and state."""

    _only_engine = "reference"


class AdaptiveHardThreshold(adaptive.AdaptiveHardThreshold):
    """:class:`rvsm_kernels.AdaptiveHardThreshold` in plain PyTorch: the same signature, options and state."""

    _only_engine = "reference"


class RVSMAdamW(adamw.RVSMAdamW):
    """:class:`rvsm_kernels.RVSMAdamW` in plain PyTorch: the same signature, options and state."""

    _only_engine = "reference"
