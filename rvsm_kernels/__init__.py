"""Relaxed variable splitting (RVSM, RGSM) as fused kernels behind a drop-in ``torch.optim`` optimizer."""

from . import reference
from .engines.proximal import prox
from .engines.registry import engines
from .model.param_groups import describe, param_groups
from .model.recalibrate import recalibrate
from .model.semi_structured import SemiStructuredReport, to_semi_structured
from .model.ship import load_sparse, save_sparse
from .model.sparsity import SparsityReport, sparsity
from .model.surgery import ShrinkReport, shrink
from .optim import RVSM, AdaptiveHardThreshold, RVSMAdamW, RVSMWrapper
from .optim.checkpoint import to_torch_state_dict
from .optim.monitor import Monitor
from .optim.penalty_schedule import PenaltySchedule
from .optim.plots import plot
from .optim.schedules import SparsitySchedule
from .optim.sparse_copies import sparse_copy, sparse_state_dict
from .optim.suggest import suggest
from .optim.unwrap import unwrap
from .version import __version__

__all__ = [
    "RVSM",
    "AdaptiveHardThreshold",
    "Monitor",
    "PenaltySchedule",
    "RVSMAdamW",
    "RVSMWrapper",
    "SemiStructuredReport",
    "ShrinkReport",
    "SparsityReport",
    "SparsitySchedule",
    "__version__",
    "describe",
    "engines",
    "load_sparse",
    "param_groups",
    "plot",
    "prox",
    "recalibrate",
    "reference",
    "save_sparse",
    "shrink",
    "sparse_copy",
    "sparse_state_dict",
    "sparsity",
    "suggest",
    "to_semi_structured",
    "to_torch_state_dict",
    "unwrap",
]
