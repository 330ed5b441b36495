"""The optimizer of this library inside the wrapper that a framework has put around it."""

from __future__ import annotations

import sys
from typing import Any

from .split_optimizer import SplitOptimizer
from .zero import ZeroShares

# Accelerate, DeepSpeed and most others; Lightning; ZeroRedundancyOptimizer and PostLocalSGDOptimizer.
_INSIDE = ("optimizer", "_optimizer", "optim")


def unwrap(optimizer: Any) -> SplitOptimizer | ZeroShares:
    """The optimizer of this library inside any wrapper: Accelerate's, Lightning's, DeepSpeed's, ZeRO's.

    ::

        with rk.unwrap(trainer.optimizer).sparse_weights(model):
            validate(model)

    Args:
        optimizer: ours, or an object that keeps it as ``optimizer``, ``_optimizer`` or ``optim``, however deep.

    Returns:
        The optimizer itself. Inside ``torch.distributed.optim.ZeroRedundancyOptimizer`` each rank has an optimizer of
        some of the parameters; what is returned then has the methods that read u, and acts on the models of all ranks
        (see :class:`rvsm_kernels.optim.zero.ZeroShares`).

    Raises:
        TypeError: no optimizer of this library is inside.
    """
    seen: set[int] = set()
    here = optimizer
    while here is not None and id(here) not in seen:
        seen.add(id(here))
        if _is_zero(here):
            return ZeroShares(here, unwrap(here.optim))
        inside = [x for name in _INSIDE if (x := getattr(here, "__dict__", {}).get(name)) is not None]
        ours = [x for x in inside if isinstance(x, SplitOptimizer)]
        # Lightning makes its wrapper a subclass of what it wraps, so the class of an object alone says nothing.
        if isinstance(here, SplitOptimizer) and not ours:
            return here
        here = next(iter(ours or inside), None)
    raise TypeError(
        f"unwrap found no optimizer of rvsm_kernels in a {type(optimizer).__name__}: give it RVSM, RVSMAdamW,"
        " RVSMWrapper or AdaptiveHardThreshold, or a wrapper around one of them"
    )


def optimizer_in(optimizer: Any, name: str) -> SplitOptimizer:
    """:func:`unwrap` for what needs the weights of all parameters; ``name`` is how an error calls it."""
    ours = unwrap(optimizer)
    if not isinstance(ours, SplitOptimizer):
        raise TypeError(f"{name} does not know the weights of other ranks that a ZeroRedundancyOptimizer has divided")
    return ours


def _is_zero(optimizer: Any) -> bool:
    """Whether this is torch's ZeroRedundancyOptimizer; without importing it."""
    module = sys.modules.get("torch.distributed.optim")
    zero = getattr(module, "ZeroRedundancyOptimizer", None)
    return zero is not None and isinstance(optimizer, zero)
