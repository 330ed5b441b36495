"""The list of bases in Triton: a base is a file of its own and one case here (the order of ``method/bases.py``)."""

from __future__ import annotations

import triton
import triton.language as tl

from .base_adamw import adamw_step
from .base_sgd import sgd_step

SGD = tl.constexpr(0)
NONE = tl.constexpr(1)  # the pull alone: the weights stay as it has left them
ADAMW = tl.constexpr(2)


@triton.constexpr_function
def reads_gradient(base, writes_gradient):
    """Whether a step looks at the gradient."""
    return base != 1 or writes_gradient


@triton.jit
def base_step(w, states, d, numbers, BASE: tl.constexpr, STATES: tl.constexpr):
    """The step of a base; returns the new w and its states, a tuple of STATES blocks.

    Args:
        d: the direction that the split has made of the gradient.
        numbers: address of the base's numbers.
    """
    if BASE == SGD:
        w, states = sgd_step(w, states, d, numbers, STATES)
    elif BASE == ADAMW:
        w, states = adamw_step(w, states, d, numbers, STATES)
    return w, states
