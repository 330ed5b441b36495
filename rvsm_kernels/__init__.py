"""Relaxed variable splitting (RVSM, RGSM) as fused kernels behind a drop-in ``torch.optim`` optimizer."""

from . import reference
from .engines import engines
from .modules import param_groups
from .optim import RVSM, AdaptiveHardThreshold, RVSMAdamW, RVSMWrapper
from .proximal import prox
from .sparsity import SparsityReport, sparsity
from .version import __version__

__all__ = [
    "RVSM",
    "AdaptiveHardThreshold",
    "RVSMAdamW",
    "RVSMWrapper",
    "SparsityReport",
    "__version__",
    "engines",
    "param_groups",
    "prox",
    "reference",
    "sparsity",
]
