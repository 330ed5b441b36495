"""The register arithmetic of one step in Triton (section 3 of docs/method.md), the twin of ``csrc/update.h``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .methods import is_topk
from .options import is_split
from .triton_prox import Prox, make_prox, shrink, value


class Step(NamedTuple):
    """The numbers of one step of one tensor; see ``csrc/types.h``. Those of its penalty come before them."""

    split: float
    nesterov: float
    grad: float
    pull: float
    coupling: float
    decay: float
    lasso: float
    keep: float
    add: float
    look: float
    lr: float


def make_step(group: Mapping[str, Any], lam: float, first: bool) -> tuple[float, ...]:
    """A Prox and a Step after one another, from the options of a param group, in double precision.

    Args:
        lam: the strength of the tensor, times sqrt(group size) with ``group_scale``.
        first: the step has no momentum yet; its buffer holds zeros.
    """
    lr, beta, momentum = float(group["lr"]), float(group["beta"]), float(group["momentum"])
    split, decoupled = is_split(group), bool(group["decoupled"])
    penalty = "l0" if is_topk(group) else group["penalty"]  # its cut comes from elsewhere
    prox = make_prox(penalty if split else None, lam / beta if split else 0.0, float(group["a"]))
    return (
        *prox,
        *Step(
            split=float(split),
            nesterov=float(bool(group["nesterov"])),
            grad=-1.0 if group["maximize"] else 1.0,  # over grad_scale, which the kernel reads
            pull=lr * beta if split and decoupled else 0.0,
            coupling=beta if split and not decoupled else 0.0,
            decay=float(group["weight_decay"]),
            lasso=float(group["group_lasso"]),
            keep=0.0 if first else momentum,
            add=1.0 if first else 1.0 - float(group["dampening"]),
            look=momentum,
            lr=lr,
        ),
    )


# The order of csrc/types.h.
DELAYED = tl.constexpr(1)
ADMM = tl.constexpr(2)


@triton.jit
def argument(w, kept, METHOD: tl.constexpr):
    """What a method thresholds: w, or w + dual."""
    return w + kept if METHOD == ADMM else w


@triton.jit
def gap_of(w, v, u, kept, METHOD: tl.constexpr):
    """The gap that pulls, from v = argument(w, kept) and u = prox(v), and what is kept from now on.

    rvsm: w - u. delayed: w - kept, and kept = u. admm: kept = v - u, and then w - u + kept.
    """
    gap = w - u
    if METHOD == DELAYED:
        gap = w - kept
        kept = u
    elif METHOD == ADMM:
        kept = v - u
        gap += kept
    return gap, kept


@triton.jit
def sgd_step(w, m, grad, gap, unit, s: Step, MOMENTUM: tl.constexpr):
    """Elements of one tensor; returns the new w and m.

    ``gap`` is w - u and ``unit`` is w_G / ||w_G||, both of the weights that the forward pass used. Terms that are off
    are left out, not multiplied by 0, so that an Inf goes where torch.optim.SGD would let it go.
    """
    d = grad * s.grad
    split = s.split != 0
    w = tl.where(split, w - s.pull * gap, w)
    d = tl.where(s.lasso != 0, d + s.lasso * unit, d)
    d = tl.where(s.decay != 0, d + s.decay * w, d)
    d = tl.where(split, d + s.coupling * gap, d)
    if MOMENTUM:
        m = s.keep * m + s.add * d
        d = tl.where(s.nesterov != 0, d + s.look * m, m)
    return w - s.lr * d, m


@triton.jit
def penalty_term(r, f: Prox, lam, beta):
    """What one r (an element's magnitude or a group's norm) adds to lam P(u) + beta/2 ||w - u||^2, in double.

    A group's w and u are collinear, so ||w_G - u_G|| = r - shrink(r).
    """
    s = shrink(r, f, True).to(tl.float64)
    gap = r.to(tl.float64) - s
    wide = Prox(f.penalty, f.cut, f.tau, tl.cast(f.a, tl.float64), f.rho, f.edge)
    return lam * value(s, wide) + beta / 2 * gap * gap
