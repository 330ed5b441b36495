"""What a program of a step adds up for the statistics, the counterpart of ``csrc/cpu/sums.h``.

Each program stores a row of sums at its own place, and launches after the step add the rows of each tensor in a fixed
order (``statistics.py``): no atomics, and the same bits in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...method import statistics
from .penalty import L0, NONE, Prox, value

# Columns of a row of sums, in float64.
ZEROS = tl.constexpr(0)  # elements of u that are 0
NONFINITE = tl.constexpr(1)  # elements where w or d is NaN or infinite
GAP = tl.constexpr(2)  # |w - u|^2
GRAD = tl.constexpr(3)  # |d|^2
ZERO_GROUPS = tl.constexpr(4)
VALUE = tl.constexpr(5)  # g of every element's or group's u
SUMS = tl.constexpr(6)

ZERO_NORM = tl.constexpr(statistics.ZERO_NORM)
UNIT = tl.constexpr(1 << 16)  # more than a block has elements: two counts are one sum of 32 bits
SHORT = tl.constexpr(8)
"""Elements whose terms are added up in float32: what rounds there stays within what is promised."""
# Outside of these a sum in float32 may have lost terms that are smaller or larger than any number.
VANISHING = tl.constexpr(2.0**-80)
LARGEST32 = tl.constexpr(3.4028234663852886e38)
LARGEST64 = tl.constexpr(1.7976931348623157e308)


@triton.jit
def square_sum(x, y):
    """|x - y|^2 of a block, in double precision: exact also where terms are out of the range of float32."""
    difference = x - y
    squares = difference * difference
    if x.dtype == tl.float64:
        total = tl.sum(squares, 0)
    else:
        short = tl.sum(tl.reshape(squares, (x.shape[0] // SHORT, SHORT)), 1)
        total = tl.sum(short.to(tl.float64), 0)
        if (total < VANISHING) | (total > LARGEST32) | (total != total):
            wide = x.to(tl.float64) - y.to(tl.float64)
            total = tl.sum(wide * wide, 0)
    return total


@triton.jit
def measure_block(totals, w, u, d, mask, count, f: Prox, grouped, WITH_TL1: tl.constexpr):
    """Store the sums of a block of a step.

    Args:
        totals: rows of sums, one for each program.
        w, u, d: the weights as the step found them, u of them, and the gradient that the split hands to the base.
        mask, count: which of the elements are there, and how many.
        grouped: whether u is that of groups, whose g is no sum over elements.
    """
    tl.static_assert(w.shape[0] < 1 << 15)
    on = f.penalty != NONE
    u = tl.where(mask, tl.where(on, u, w), w)  # without a penalty now, it is not w + dual
    d = tl.where(mask, d, 0.0)
    most: tl.constexpr = LARGEST64 if w.dtype == tl.float64 else LARGEST32
    is_finite = (tl.abs(w) <= most) & (tl.abs(d) <= most)
    is_zero = mask & (u == 0)
    counts = tl.sum(is_zero.to(tl.int32) + tl.where(is_finite, 0, UNIT), 0)
    zeros, nonfinite = counts % UNIT, counts // UNIT
    gap, of_u = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
    if on:
        gap = square_sum(w, u)
    if on & (grouped == 0):
        if f.penalty == L0:
            of_u = (count - zeros).to(tl.float64)
        else:
            of_u = tl.sum(value(tl.abs(u), f, WITH_TL1).to(tl.float64), 0)
    row = totals + tl.program_id(0).to(tl.int64) * SUMS
    tl.store(row + ZEROS, zeros.to(tl.float64))
    tl.store(row + NONFINITE, nonfinite.to(tl.float64))
    tl.store(row + GAP, gap)
    tl.store(row + GRAD, square_sum(d, tl.zeros_like(d)))
    tl.store(row + VALUE, of_u)


@triton.jit
def measure_groups(totals, s, f: Prox, mask):
    """Store the sums of the groups of a program, from the norms s of their u."""
    s = s.to(tl.float64)
    wide = Prox(f.penalty, f.cut, f.tau, tl.cast(f.a, tl.float64), f.rho, f.edge)
    row = totals + tl.program_id(0).to(tl.int64) * SUMS
    tl.store(row + ZERO_GROUPS, tl.sum((mask & (s < ZERO_NORM)).to(tl.int32), 0).to(tl.float64))
    tl.store(row + VALUE, tl.sum(tl.where(mask, value(s, wide, True), 0.0), 0))
