"""The step of torch.optim.AdamW in Triton, the twin of ``csrc/math/base_adamw.h``."""

from __future__ import annotations

import triton
import triton.language as tl

from .penalty import quotient


@triton.jit
def adamw_step(w, states, d, numbers, STATES: tl.constexpr):
    """w <- keep * w - step_size * m / (sqrt(v) * correction + eps); returns the new w and the states.

    In another order of these lines some variants spill on sm_90 (``python -m bench.static_triton``).

    Args:
        states: exp_avg, exp_avg_sq and, with amsgrad, max_exp_avg_sq.
        numbers: address of (keep, add, keep_sq, add_sq, step_size, correction, eps).
        STATES: 3 with amsgrad, else 2.
    """
    m = states[0] + tl.load(numbers + 1) * (d - states[0])
    v = tl.load(numbers + 2) * states[1] + tl.load(numbers + 3) * (d * d)
    if STATES > 2:
        largest = tl.maximum(states[2], v, propagate_nan=tl.PropagateNan.ALL)  # as torch.maximum: a NaN stays
        states = (m, v, largest)
        v = largest
    else:
        states = (m, v)
    denominator = tl.sqrt(v) * tl.load(numbers + 5) + tl.load(numbers + 6)
    return tl.load(numbers) * w - quotient(tl.load(numbers + 4) * m, denominator), states
