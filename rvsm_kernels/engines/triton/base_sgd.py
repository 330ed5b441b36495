"""The step of torch.optim.SGD in Triton, the twin of ``csrc/math/base_sgd.h``."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sgd_step(w, states, d, numbers, STATES: tl.constexpr):
    """w <- w - lr * direction; returns the new w and the states, a tuple of none or of the momentum buffer.

    At the first step the buffer holds zeros, keep is 0 and add is 1.

    Args:
        numbers: address of (decay, keep, add, momentum, nesterov, lr).
        STATES: 1 with momentum, else 0.
    """
    decay, lr = tl.load(numbers), tl.load(numbers + 5)
    d = tl.where(decay != 0, d + decay * w, d)
    if STATES > 0:
        m = tl.load(numbers + 1) * states[0] + tl.load(numbers + 2) * d
        d = tl.where(tl.load(numbers + 4) != 0, d + tl.load(numbers + 3) * m, m)
        return w - lr * d, (m,)
    else:
        return w - lr * d, states


@triton.jit
def sgd_finished(x, K: tl.constexpr, lr, decay):
    """A number of a record, the K-th, with the factors that stand on the device."""
    if K == 0:
        x = x * decay
    elif K == 5:
        x = x * lr
    return x
