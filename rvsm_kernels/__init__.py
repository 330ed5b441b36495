"""Relaxed variable splitting (RVSM, RGSM) as fused kernels behind a drop-in ``torch.optim`` optimizer."""

from . import reference
from .checkpoint import to_torch_state_dict
from .engines.registry import engines
from .modules import describe, param_groups
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
    "describe",
    "engines",
    "param_groups",
    "prox",
    "reference",
    "sparsity",
    "to_torch_state_dict",
]
