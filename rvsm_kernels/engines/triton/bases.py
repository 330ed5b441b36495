"""The list of bases in Triton: a base is a file of its own and one case here (the order of ``method/bases.py``)."""

from __future__ import annotations

import triton
import triton.language as tl

from .base_adamw import adamw_corrections, adamw_finished, adamw_step
from .base_sgd import sgd_finished, sgd_step

SGD = tl.constexpr(0)
NONE = tl.constexpr(1)  # the pull alone: the weights stay as it has left them
ADAMW = tl.constexpr(2)
# What is made for each counter (``counts.py``), in 8 bytes each: the numbers of a base that follow from the count, the
# steps before this one in float64, and the seed of the rounding.
MOST_CORRECTIONS = tl.constexpr(2)
BEFORE = tl.constexpr(2)
SEED = tl.constexpr(3)
MADE_OF_COUNT = tl.constexpr(4)


@triton.constexpr_function
def reads_gradient(base, writes_gradient):
    """Whether a step looks at the gradient."""
    return base != 1 or writes_gradient


@triton.jit
def base_step(w, states, d, numbers, corrections, BASE: tl.constexpr, STATES: tl.constexpr):
    """The step of a base; returns the new w and its states, a tuple of STATES blocks.

    Args:
        d: the direction that the split has made of the gradient.
        numbers: address of the base's numbers.
        corrections: where the address stands of those of them that follow from the count of the steps, in float64; see
            ``counts.py``.
    """
    if BASE == SGD:
        w, states = sgd_step(w, states, d, numbers, STATES)
    elif BASE == ADAMW:
        w, states = adamw_step(w, states, d, numbers, corrections, STATES)
    return w, states


@triton.jit
def finished_number(x, K: tl.constexpr, lr, decay, BASE: tl.constexpr):
    """The K-th number of a base with the lr and the weight decay that stand on the device, factors of its own."""
    if BASE == SGD:
        x = sgd_finished(x, K, lr, decay)
    elif BASE == ADAMW:
        x = adamw_finished(x, K, lr, decay)
    return x


@triton.jit
def corrections_of(numbers, mask, lr, count, BASE: tl.constexpr):
    """The numbers of a base that follow from the count of the steps; a base without any is not asked."""
    tl.static_assert(BASE == ADAMW)
    return adamw_corrections(numbers, mask, lr, count)
