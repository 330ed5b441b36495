"""The prox of a tensor in plain torch, its derivative, and the numbers that the kernels need for it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .dtypes import to_opmath
from .groups import Grouping, magnitudes, sums
from .penalties import PENALTIES, shrink

PROX_NUMBERS = ("penalty", "cut", "tau", "a", "rho", "edge")
"""The numbers of :func:`prox_numbers`, in the kernels' order."""

PENALTY_NUMBER: dict[str | None, int] = {name: k for k, name in enumerate((None, *PENALTIES))}
"""The kernels' number of a penalty: 0 for none, then 1, 2, ... in the order of the table."""


def _cbrt(x: float) -> float:
    """The cube root of x >= 0; Python before 3.11 has none, and its power may be off in the last bit."""
    return math.cbrt(x) if hasattr(math, "cbrt") else x ** (1 / 3)


def prox_numbers(penalty: str | None, tau: float, a: float) -> tuple[float, ...]:
    """(penalty, cut, tau, a, rho, edge) in double precision, the twin of ``make_prox`` in ``csrc/math/penalty.h``.

    Without a penalty the cut is -1, below every magnitude. ``rho`` and ``edge`` are those of transformed l1.
    """
    cut = -1.0 if penalty is None else PENALTIES[penalty].cut(tau, a)
    rho = _cbrt(6.75 * tau * a * (a + 1))
    return float(PENALTY_NUMBER[penalty]), cut, tau, a, rho, rho - a


def threshold(v: Tensor, r: Tensor, penalty: str, tau: float, a: float, group_dim: Grouping) -> Tensor:
    """The prox of v, in the type of the arithmetic, from its magnitudes (or the norms of its groups) r."""
    if tau == 0:
        return v.clone()
    s = shrink(r, penalty, tau, a)
    return torch.copysign(s, v) if group_dim is None else v * torch.where(r == 0, torch.zeros_like(r), s / r)


def prox(w: Tensor, penalty: str | None, tau: float, a: float = 1.0, group_dim: Grouping = None) -> Tensor:
    """u = argmin_u ||u - w||^2 / 2 + tau * P(u), out of place; shape, dtype and layout of ``w``.

    P(u) = sum over elements (or groups, see ``group_dim``) of g(|u_i|) (or g(||u_G||_2)).
    """
    if penalty is None or tau == 0:
        return w.clone()
    v = to_opmath(w)
    return threshold(v, magnitudes(v, group_dim), penalty, tau, a, group_dim).to(w.dtype)


def prox_derivative(w: Tensor, direction: Tensor, penalty: str, tau: float, a: float, group_dim: Grouping) -> Tensor:
    """The derivative of :func:`prox` at w, applied to a direction; a new tensor like w.

    With r = |v| (or the group's norm) and s = shrink(r), u = v s / r and
    du = (s / r) dv + (s' - s / r) v <v, dv> / r^2, a symmetric Jacobian. On the cut, where it does not exist, it is 0.
    """
    v, dv = to_opmath(w), to_opmath(direction)
    r = magnitudes(v, group_dim)
    s = shrink(r, penalty, tau, a)
    alive = s > 0
    slope = torch.where(alive, 1 / (1 + tau * PENALTIES[penalty].curvature(s, a)), 0)
    if group_dim is None:
        return (slope * dv).to(w.dtype)
    safe = torch.where(alive, r, 1)
    ratio = torch.where(alive, s, 0) / safe
    along = sums(v * dv, group_dim)
    dw = ratio * dv + torch.where(alive, slope - ratio, 0) * (along / safe) * (v / safe)
    return dw.to(w.dtype)
