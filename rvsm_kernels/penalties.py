"""The penalties: one scalar function each (design: every prox is v * shrink(|v|) / |v|).

A penalty is g(r) for r >= 0. Its prox with step tau is

    shrink(r) = argmin_{s >= 0}  (s - r)^2 / 2 + tau * g(s),

which is 0 for r <= cut and a smooth function above. The same shrink serves elementwise penalties
(r = |w_i|) and group penalties (r = ||w_G||_2). A penalty is added here and in ``csrc/prox.h``; no kernel
is touched.
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
        shrink: the prox above the cut; ``shrink(r, tau, a)``. Its value below the cut has no meaning.
        curvature: g''(s) for s > 0, from which the derivative of shrink follows
            (1 / (1 + tau * g''(s))); ``curvature(s, a)``.
    """

    value: Callable[[Tensor, float], Tensor]
    cut: Callable[[float, float], float]
    shrink: Callable[[Tensor, float, float], Tensor]
    curvature: Callable[[Tensor, float], Tensor]


def _tl1_cut(tau: float, a: float) -> float:
    if tau <= a * a / (2 * (a + 1)):
        return tau * (a + 1) / a
    return math.sqrt(2 * tau * (a + 1)) - a / 2


def _tl1_shrink(r: Tensor, tau: float, a: float) -> Tensor:
    # Zhang & Xin's closed form without its cancellation: with q in [0, 1],
    # r - s = 4/3 (a + r) sin^2(asin(sqrt q) / 3), a product of well-conditioned factors.
    q = (27 * tau * a * (a + 1) / 4 / (a + r) ** 3).clamp(max=1.0)
    return (r - (4 / 3) * (a + r) * torch.sin(torch.asin(q.sqrt()) / 3) ** 2).clamp(min=0.0)


PENALTIES: dict[str, Penalty] = {
    "l1": Penalty(
        value=lambda r, a: r,
        cut=lambda tau, a: tau,
        shrink=lambda r, tau, a: r - tau,
        curvature=lambda s, a: torch.zeros_like(s),
    ),
    "l0": Penalty(
        value=lambda r, a: (r != 0).to(r.dtype),
        cut=lambda tau, a: math.sqrt(2 * tau),
        shrink=lambda r, tau, a: r,
        curvature=lambda s, a: torch.zeros_like(s),
    ),
    "tl1": Penalty(
        value=lambda r, a: (a + 1) * r / (a + r),
        cut=_tl1_cut,
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
