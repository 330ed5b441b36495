"""The penalties in Triton: g, cut and shrink of section 1 of docs/method.md, the twin of ``csrc/math/penalty.h``.

    shrink(r) = argmin_{s >= 0} (s - r)^2 / 2 + tau * g(s)

To add a penalty, see docs/architecture.md; no kernel is touched. Functions of a block have the names and the argument
order of their twins.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

# The order of method/penalties.py, behind none.
NONE = tl.constexpr(0)
L1 = tl.constexpr(1)
L0 = tl.constexpr(2)
TL1 = tl.constexpr(3)


class Prox(NamedTuple):
    """The numbers that thresholding one tensor needs; see ``csrc/math/numbers.h``."""

    penalty: float
    cut: float
    tau: float
    a: float
    rho: float
    edge: float


@triton.jit
def reciprocal(x):
    """1 / x, nearly always rounded correctly: a GPU's division may be off by 2 ulp, and an fma corrects it."""
    r = 1.0 / x
    if x.dtype == tl.float32:
        r = tl.fma(r, tl.fma(-x, r, 1.0), r)
    return r


@triton.jit
def quotient(x, y):
    """x / y, rounded once; 1 where x == y."""
    return tl.div_rn(x, y) if x.dtype == tl.float32 else x / y


# The fit of csrc/math/penalty.h (Tl1Fit): h(q) / q as a polynomial in sqrt(1 - q) - 1/2, the highest power first.
FIT32 = tl.constexpr(
    (
        *(0.007001707109, -0.01054071553, 0.0108922152, -0.01612910811, 0.02512946538, -0.03720012487),
        *(0.05468788162, -0.08003700405, 0.1156808752, -0.1625577292, 0.2079604951),
    )
)
FIT64 = tl.constexpr(
    (
        *(0.000079389272848332946149, -0.00012002373408239626801, 0.000065599213612447818802),
        *(-0.00009657338650801297071, 0.00021575995651860313924, -0.00032375005902092934507),
        *(0.00045888175056419396721, -0.00068585963253645795657, 0.0010309267834270926332),
        *(-0.0015405676144852858883, 0.0023001861496686058199, -0.003433699151695030433),
        *(0.005122436472741899082, -0.0076351400734247469777, 0.011368050653526537475),
        *(-0.016901839426389717233, 0.025080422334835032386, -0.037113296632759406843),
        *(0.054689696103204979263, -0.080040925579582148957, 0.11568086761813641223),
        *(-0.16255768012237946203, 0.20796049500535285768),
    )
)


@triton.jit
def tl1_shrink(r, f: Prox):
    """shrink of transformed l1 above its cut: R h(q) below r, with R = a + r (see ``csrc/math/penalty.h``)."""
    inv = reciprocal(f.a + r)
    x = f.rho * inv  # q = x^3
    # 1 - q = (1 - x)(1 + x + x^2), and 1 - x = (r - edge) / R without a difference of nearly equal numbers.
    rest = (r - f.edge) * inv * (1.0 + x + x * x)
    p = tl.sqrt(tl.where(rest < 0, 0.0, rest)) - 0.5
    if r.dtype == tl.float64:
        h = tl.zeros_like(p) + FIT64[0]
        for k in tl.static_range(1, 23):
            h = h * p + FIT64[k]
    else:
        h = tl.zeros_like(p) + FIT32[0]
        for k in tl.static_range(1, 11):
            h = h * p + FIT32[k]
    s = r - (f.a + r) * (x * x * x) * h
    # The slope of shrink is at least 1, so r - cut bounds it from below: rounding cannot reach 0 above the cut.
    least = r - f.cut
    return tl.where(s < least, least, s)


@triton.jit
def shrink(r, f: Prox, WITH_TL1: tl.constexpr):
    """Every penalty. Ties go to zero; NaN is not <= cut and so stays visible.

    WITH_TL1: whether transformed l1 may come; its code needs registers.
    """
    s = r - tl.where(f.penalty == L1, f.tau, 0.0)
    if WITH_TL1:  # noqa: SIM102 - one is known at compile time, one at run time
        if f.penalty == TL1:
            s = tl1_shrink(r, f)
    return tl.where(r <= f.cut, 0.0, s)


@triton.jit
def cut_of(penalty, tau, a):
    """The cut of every penalty in double precision, -1 without one; blocks."""
    near = tau * (a + 1.0) / a
    far = tl.sqrt(2.0 * tau * (a + 1.0)) - a / 2.0
    of_tl1 = tl.where(tau <= a * a / (2.0 * (a + 1.0)), near, far)
    cut = tl.where(penalty == L1, tau, tl.where(penalty == L0, tl.sqrt(2.0 * tau), of_tl1))
    return tl.where(penalty == NONE, -1.0, cut)


@triton.jit
def rho_of(tau, a):
    """The rho of transformed l1 in double precision; blocks.

    A cube root, for which Triton has no function: one of a few digits, and Newton's steps.
    """
    x = 6.75 * tau * a * (a + 1.0)
    safe = tl.where(x > 0, x, 1.0)
    root = tl.exp(tl.log(safe) / 3.0)
    for _ in tl.static_range(2):
        root = root - (root - safe / (root * root)) / 3.0
    return tl.where(x > 0, root, 0.0)


@triton.jit
def value(s, f: Prox, WITH_TL1: tl.constexpr):
    """g of every penalty, at s >= 0; see :func:`shrink`."""
    g = tl.where(f.penalty == L1, s, tl.where(s != 0, 1.0, 0.0).to(s.dtype))
    if WITH_TL1:
        g = tl.where(f.penalty == TL1, (f.a + 1.0) * s / (f.a + s), g)
    return tl.where(f.penalty == NONE, 0.0, g)


@triton.jit
def shrink_ratio(r, f: Prox):
    """shrink(r) / r, the factor of a group of norm r; 0 for the zero group."""
    return tl.where(r == 0, 0.0, quotient(shrink(r, f, True), tl.where(r == 0, 1.0, r)))


@triton.jit
def length_of(norm):
    """What divides the elements of a group of that norm; those of the zero group are 0 and stay 0."""
    return tl.where(norm == 0, 1.0, norm)


@triton.jit
def penalty_term(r, f: Prox, lam, beta):
    """What one r (an element's magnitude or a group's norm) adds to lam P(u) + beta/2 ||w - u||^2, in double.

    A group's w and u are collinear, so ||w_G - u_G|| = r - shrink(r).
    """
    s = shrink(r, f, True).to(tl.float64)
    gap = r.to(tl.float64) - s
    wide = Prox(f.penalty, f.cut, f.tau, tl.cast(f.a, tl.float64), f.rho, f.edge)
    return lam * value(s, wide, True) + beta / 2 * gap * gap
