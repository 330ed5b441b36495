"""The penalties: one scalar function each (docs/method.md: every prox is v * shrink(|v|) / |v|).

A penalty is g(r) for r >= 0. Its prox with step tau is

    shrink(r) = argmin_{s >= 0}  (s - r)^2 / 2 + tau * g(s),

which is 0 for r <= cut and a smooth function above. The same shrink serves elementwise penalties
(r = |w_i|) and group penalties (r = ||w_G||_2). To add a penalty, see docs/architecture.md; no kernel is touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Penalty:
    """One penalty as plain functions.

    Attributes:
        value: g(r), elementwise on a tensor of any shape; ``value(r, a)``.
        cut: the largest r that goes to zero, on the host in double precision; ``cut(tau, a)``.
        tau: the tau with a certain cut, the inverse of ``cut``, elementwise on a tensor; ``tau(cut, a)``.
        shrink: the prox above the cut; ``shrink(r, tau, a)``. Its value below the cut has no meaning.
        curvature: g''(s) for s > 0, from which the derivative of shrink follows
            (1 / (1 + tau * g''(s))); ``curvature(s, a)``.
        keeps_survivors: shrink(r) = r above the cut, so that nothing pulls what is not on its way to zero.
    """

    value: Callable[[Tensor, float], Tensor]
    cut: Callable[[float, float], float]
    tau: Callable[[Tensor, float], Tensor]
    shrink: Callable[[Tensor, float, float], Tensor]
    curvature: Callable[[Tensor, float], Tensor]
    keeps_survivors: bool = False


def _tl1_cut(tau: float, a: float) -> float:
    if tau <= a * a / (2 * (a + 1)):
        return tau * (a + 1) / a
    return math.sqrt(2 * tau * (a + 1)) - a / 2


def _tl1_tau(cut: Tensor, a: float) -> Tensor:
    return torch.where(cut <= a / 2, cut * a / (a + 1), (cut + a / 2) ** 2 / (2 * (a + 1)))


def _tl1_shrink(r: Tensor, tau: float, a: float) -> Tensor:
    # Zhang & Xin's closed form without its cancellation: with q = 27 tau a (a + 1) / (4 (a + r)^3) in [0, 1],
    # r - s = 4/3 (a + r) sin^2(asin(sqrt q) / 3), a product of well-conditioned factors. q is x^3, and near the
    # critical point 1 - q = (1 - x)(1 + x + x^2) keeps its digits where 1 - x = (r - edge) / (a + r); rho and edge are
    # formed in double precision.
    rho = (6.75 * tau * a * (a + 1)) ** (1 / 3)
    x = rho / (a + r)
    rest = ((r - (rho - a)) / (a + r) * (1 + x + x * x)).clamp(min=0.0)
    angle = torch.atan2(x * x.sqrt(), rest.sqrt())  # asin(sqrt q)
    s = r - (4 / 3) * (a + r) * torch.sin(angle / 3) ** 2
    # Once through the condition it solves, s = r - tau g'(s) = r - 4/27 rho^3 / (a + s)^2, takes off most of the
    # rounding so far. The slope of shrink is at least 1, so r - cut bounds it from below: rounding cannot reach 0 above
    # the cut.
    s = r - (4 / 27 * rho) * (rho / (a + s)) ** 2
    return torch.maximum(s, r - _tl1_cut(tau, a))


PENALTIES: dict[str, Penalty] = {
    "l1": Penalty(
        value=lambda r, a: r,
        cut=lambda tau, a: tau,
        tau=lambda cut, a: cut,
        shrink=lambda r, tau, a: r - tau,
        curvature=lambda s, a: torch.zeros_like(s),
    ),
    "l0": Penalty(
        value=lambda r, a: (r != 0).to(r.dtype),
        cut=lambda tau, a: math.sqrt(2 * tau),
        tau=lambda cut, a: cut * cut / 2,
        shrink=lambda r, tau, a: r,
        curvature=lambda s, a: torch.zeros_like(s),
        keeps_survivors=True,
    ),
    "tl1": Penalty(
        value=lambda r, a: (a + 1) * r / (a + r),
        cut=_tl1_cut,
        tau=_tl1_tau,
        shrink=_tl1_shrink,
        curvature=lambda s, a: -2 * a * (a + 1) / (a + s) ** 3,
    ),
}
"""Every penalty by its name in a param group."""


def shrink(r: Tensor, penalty: str, tau: float, a: float) -> Tensor:
    """argmin_{s >= 0} (s - r)^2 / 2 + tau * g(s), elementwise on r >= 0.

    Args:
        r: magnitudes or group norms, any shape.
        penalty: a key of :data:`PENALTIES`.
        tau: lam / beta, in the unit of r^2 per unit of g.
        a: the parameter of tl1; ignored by the others.

    Ties (r == cut) go to zero. NaN stays NaN: the comparison asks for "not above", so that a broken weight
    is not hidden behind a zero.
    """
    p = PENALTIES[penalty]
    return torch.where(r <= p.cut(tau, a), torch.zeros_like(r), p.shrink(r, tau, a))
