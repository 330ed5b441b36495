"""The optimizers. Their classes are exported here, where pickles of rvsm_kernels 0.1.0 look for them."""

from .adamw import RVSMAdamW
from .adaptive import AdaptiveHardThreshold
from .rvsm import RVSM
from .wrapper import RVSMWrapper

__all__ = ["RVSM", "AdaptiveHardThreshold", "RVSMAdamW", "RVSMWrapper"]
