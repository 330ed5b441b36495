"""The step of torch.optim.AdamW in Triton, the twin of ``csrc/math/base_adamw.h``."""

from __future__ import annotations

import triton
import triton.language as tl

from .penalty import quotient


@triton.jit
def adamw_step(w, states, d, numbers, corrections, STATES: tl.constexpr):
    """w <- keep * w - step_size * m / (sqrt(v) * correction + eps); returns the new w and the states.

    In another order of these lines some variants spill on sm_90 (``python -m bench.static_triton``): in float64 where
    the numerator comes last, else where it comes first.

    Args:
        states: exp_avg, exp_avg_sq and, with amsgrad, max_exp_avg_sq.
        numbers: address of (keep, add, keep_sq, add_sq, step_size, correction, eps, lr, beta1).
        corrections: where the address stands of what :func:`adamw_corrections` has made, which takes the place of
            step_size and correction.
        STATES: 3 with amsgrad, else 2.
    """
    made = tl.load(corrections).to(tl.pointer_type(tl.float64))
    m = states[0] + tl.load(numbers + 1) * (d - states[0])
    v = tl.load(numbers + 2) * states[1] + tl.load(numbers + 3) * (d * d)
    if STATES > 2:
        largest = tl.maximum(states[2], v, propagate_nan=tl.PropagateNan.ALL)  # as torch.maximum: a NaN stays
        states = (m, v, largest)
        v = largest
    else:
        states = (m, v)
    if w.dtype == tl.float64:
        numerator = tl.load(made).to(w.dtype) * m
        denominator = tl.sqrt(v) * tl.load(made + 1).to(w.dtype) + tl.load(numbers + 6)
    else:
        denominator = tl.sqrt(v) * tl.load(made + 1).to(w.dtype) + tl.load(numbers + 6)
        numerator = tl.load(made).to(w.dtype) * m
    return tl.load(numbers) * w - quotient(numerator, denominator), states


@triton.jit
def adamw_finished(x, K: tl.constexpr, lr, decay):
    """A number of a record, the K-th, with the factors that stand on the device."""
    if K == 0:
        x = 1.0 - (1.0 - x) * lr * decay
    elif K == 4 or K == 7:
        x = x * lr
    return x


@triton.jit
def adamw_corrections(numbers, mask, lr, count):
    """step_size = lr / (1 - beta1^t) and correction = 1 / sqrt(1 - beta2^t) of step t, in double precision; blocks.

    Args:
        numbers: addresses of numbers as :func:`adamw_step` takes them.
        lr: a factor of the lr among them.
        count: t, a float.
    """
    x, y = tl.load(numbers + 8, mask, 0.0), tl.load(numbers + 2, mask, 0.0)
    by_x, by_y = tl.full(x.shape, 1.0, tl.float64), tl.full(x.shape, 1.0, tl.float64)
    rest = count.to(tl.int64)
    for _ in range(32):  # powers by squarings
        by_x = tl.where(rest % 2 != 0, by_x * x, by_x)
        by_y = tl.where(rest % 2 != 0, by_y * y, by_y)
        x, y, rest = x * x, y * y, rest // 2
    return tl.load(numbers + 7, mask, 0.0) * lr / (1.0 - by_x), 1.0 / tl.sqrt(1.0 - by_y)
