"""Every tolerance of the suite, with its reason. Nothing here may be widened to make a test pass."""

from __future__ import annotations

import numpy as np
import torch

from definition import REAL, Array, cut, shrink

ARITHMETIC = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.bfloat16: np.float32,
    torch.float16: np.float32,
}
"""The type a storage type is computed in (docs/method.md, section 3). Half types are computed in float32 and rounded
once on store, so their bound is float32's before that one rounding; `bracket` does the rounding."""

STEP = {np.float32: 1e-6, np.float64: 1e-14}
"""The error of a step as a share of |w| + lr |d|: about 16 (45) roundings of half an ulp, a step has about ten.

|d| is taken as the sum of the absolute addends of d. Where they cancel, |d| can be any number of times smaller than
the terms it comes from, and each of those has been rounded already: an error relative to the result is then not
reachable in any order of summation. The pull beta |w - u| counts as an addend for both values of `decoupled`
(with lr * beta > 1 it is larger than |w|), and so do w and u inside it, unless u is 0 or w, when w - u is exact."""

SUPPORT_ULPS = 4
"""The supports of u are equal unless |r - cut| is within this many ulp. The cut is rounded to the type of
the arithmetic and so is a norm; inside the band both sides of the cut are right and both are accepted."""

SHRINK_ULPS = 8
"""docs/method.md, section 1: |error of shrink(r)| <= 8 ulp(r) in float32, away from the critical tau of tl1."""

NEAR_CRITICAL = 4.0
"""Near the critical tau of tl1 the derivative of shrink at the cut grows without bound, so that rounding r or tau
once moves u by any number of ulp. "Away" means a derivative of at most this; beyond it u is held to what an error of
8 ulp in r itself would do (a backward error), which is as much as a number format can promise."""

FLOAT64_SHRINK_ULPS = 45
"""The same for float64: 1e-14, the bound of a step, is 45 ulp."""

UNDERFLOW_ULPS = 4
"""Products below the smallest normal number are rounded to a multiple of the smallest subnormal: that many such
roundings are added to every bound, so that a bound relative to a subnormal number is not below one rounding."""

PENALTY_VALUE = {np.float32: 1e-6, np.float64: 1e-13}
"""Relative. u minimises the value, so an error e in u changes it by O(e^2): what is left is the rounding of w - u and
of the sum, whose terms are all positive."""

SAME_LOSS = {torch.float32: 1e-3, torch.float64: 1e-9}
"""Relative difference of the losses of two engines that train on their own for hundreds of steps. Rounding differences
grow by a bounded factor per step on a smooth problem; a support that flips once is smaller than this."""


def ulp(x: Array, arithmetic: type) -> Array:
    """The spacing of numbers of the arithmetic's type at |x|."""
    return np.spacing(np.abs(x).astype(arithmetic)).astype(REAL)


def underflow(arithmetic: type) -> REAL:
    """The absolute floor of every bound."""
    return UNDERFLOW_ULPS * REAL(np.finfo(arithmetic).smallest_subnormal)


def in_band(r: Array, penalty: str, tau: float, a: float, arithmetic: type) -> Array:
    """Where both sides of the cut are right."""
    c = cut(penalty, tau, a)
    return np.abs(r - c) <= SUPPORT_ULPS * ulp(np.maximum(r, c), arithmetic)


def shrink_bound(r: Array, penalty: str, tau: float, a: float, arithmetic: type) -> Array:
    """The error that shrink(r) may have."""
    ulps = SHRINK_ULPS if arithmetic is np.float32 else FLOAT64_SHRINK_ULPS
    flat = ulps * ulp(r, arithmetic)
    if penalty != "tl1":
        return flat
    s = shrink(penalty, r, tau, a, keep=True)
    steep = 1 - 2 * REAL(tau) * a * (REAL(a) + 1) / (a + s) ** 3 < 2 / NEAR_CRITICAL  # 1 / (the derivative of shrink)
    bound, (r, s, step) = np.array(flat), (np.asarray(x)[steep] for x in (r, s, flat))
    ends = [shrink(penalty, np.maximum(x, 0), tau, a, keep=True) for x in (r - step, r + step)]
    moved = np.maximum(*(np.abs(end - s) for end in ends))
    bound[steep] = np.where(moved > NEAR_CRITICAL * step, moved, step)
    return bound


def bracket(want: Array, bound: Array, dtype: torch.dtype) -> tuple[Array, Array]:
    """The smallest and the largest number of a storage type that the bound allows.

    For half types: every float32 within the bound, rounded once to the storage type. Rounding is monotone, so the
    ends are enough.
    """
    low, high = want - bound, want + bound
    if dtype in (torch.float32, torch.float64):
        return low, high
    with np.errstate(over="ignore"):
        low32, high32 = low.astype(np.float32), high.astype(np.float32)
    low32 = np.where(low32 > low, np.nextafter(low32, np.float32(-np.inf)), low32)
    high32 = np.where(high32 < high, np.nextafter(high32, np.float32(np.inf)), high32)
    return _stored(low32, dtype), _stored(high32, dtype)


def _stored(x: Array, dtype: torch.dtype) -> Array:
    """float32 rounded once to the storage type."""
    return torch.from_numpy(np.array(x, np.float32)).to(dtype).double().numpy().astype(REAL)
