"""docs/method.md in numpy: the mathematics only, in the widest real there is, written to be read.

Independent of the package: shrink is the minimiser of its objective (found by Newton's method from the right, where it
cannot fail), groups are loops over indices, the step is the lines of section 3 of docs/method.md.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

REAL = np.longdouble
"""80 bits where the machine has them, so that float64 tensors are also compared with something more exact."""

Array = np.ndarray[Any, Any]
GroupDim = int | Sequence[int] | None


# ---- one scalar function per penalty (section 1) ---------------------------------------------------------------------


def g(penalty: str | None, r: Array, a: float) -> Array:
    """The penalty of a magnitude."""
    match penalty:
        case None:
            return np.zeros_like(r)
        case "l1":
            return r.copy()
        case "l0":
            return (r != 0).astype(r.dtype)
        case "tl1":
            return (REAL(a) + 1) * r / (a + r)
    raise ValueError(penalty)


def cut(penalty: str, tau: float, a: float) -> REAL:
    """The largest r that goes to zero: the table's formula, which `test_prox.py` checks against the argmin."""
    t, b = REAL(tau), REAL(a)
    match penalty:
        case "l1":
            return t
        case "l0":
            return np.sqrt(2 * t)
        case "tl1":
            return t * (b + 1) / b if t <= b * b / (2 * (b + 1)) else np.sqrt(2 * t * (b + 1)) - b / 2
    raise ValueError(penalty)


def shrink(penalty: str | None, r: Array, tau: float, a: float, keep: Array | bool | None = None) -> Array:
    """argmin_{s >= 0} (s - r)^2 / 2 + tau g(s) for every r; ties go to zero, NaN stays NaN.

    The minimum is at 0 or at the largest stationary point s. `keep` overrides the choice between the two (for weights
    so near the cut that either is right).
    """
    r = np.asarray(r, REAL)
    if penalty is None or tau == 0:
        return r.copy()
    t, b = REAL(tau), REAL(a)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if penalty == "l1":
            s = np.maximum(r - t, 0)
            rate = np.ones_like(r)
        elif penalty == "l0":
            s = r.copy()
            rate = np.where(s > 0, 1 / s, np.inf)
        else:
            s = _tl1_stationary(r, t, b)
            rate = (b + 1) / (b + s)
        if keep is None:
            # objective(0) - objective(s), divided by s
            keep = r - s / 2 - t * rate > 0
    return np.where(np.isnan(r), r, np.where(keep, s, 0))


def _tl1_stationary(r: Array, t: REAL, b: REAL) -> Array:
    """The largest root s of F'(s) = s - r + t b (b+1) / (b+s)^2 in [0, r], or where F' is smallest if there is none.

    F' is convex. To the right of its minimum it increases, so Newton's method from s = r >= the root comes down to it
    without passing it.
    """
    product = t * b * (b + 1)
    lowest = np.maximum(np.cbrt(2 * product) - b, 0)
    s = np.maximum(r, lowest)
    for _ in range(200):
        slope = 1 - 2 * product / (b + s) ** 3
        residual = s - r + product / (b + s) ** 2
        new = np.maximum(np.where(slope > 0, s - residual / np.where(slope > 0, slope, 1), lowest), lowest)
        if not (new < s).any():
            return s
        s = np.minimum(s, new)
    raise AssertionError("Newton's method did not converge")


# ---- groups (section 2) ----------------------------------------------------------------------------------------------


def group_dims(group_dim: GroupDim, ndim: int) -> set[int]:
    """The dimensions that index the groups, counted from the front."""
    assert group_dim is not None
    return {d % ndim for d in ([group_dim] if isinstance(group_dim, int) else group_dim)}


def group_indices(shape: Sequence[int], group_dim: GroupDim) -> Iterator[tuple[Any, ...]]:
    """The index of every group: a number for each dimension of group_dim, everything for the others."""
    dims = group_dims(group_dim, len(shape))
    yield from itertools.product(*(range(n) if d in dims else (slice(None),) for d, n in enumerate(shape)))


def group_size(shape: Sequence[int], group_dim: GroupDim) -> int:
    """Elements of a group."""
    if group_dim is None:
        return 1
    dims = group_dims(group_dim, len(shape))
    return math.prod(n for d, n in enumerate(shape) if d not in dims)


def magnitudes(w: Array, group_dim: GroupDim) -> Array:
    """For every element |w_i|, or the norm of the group that it belongs to."""
    if group_dim is None:
        return np.abs(w)
    r = np.zeros_like(w)
    for index in group_indices(w.shape, group_dim):
        r[index] = np.sqrt(np.sum(np.square(w[index])))
    return r


def over_groups(values: Array, group_dim: GroupDim) -> Array:
    """One value per group, from values that are equal inside each group."""
    if group_dim is None:
        return values.ravel()
    return np.array([values[index].flat[0] for index in group_indices(values.shape, group_dim)], REAL)


# ---- prox, penalty, step (sections 1 and 3) --------------------------------------------------------------------------


def step_tau(options: Mapping[str, Any], shape: Sequence[int]) -> REAL | None:
    """tau = lambda / beta of a tensor; None where there is no splitting (penalty None, lambda = 0 or beta = 0)."""
    if options["penalty"] is None or options["lam"] == 0 or options["beta"] == 0:
        return None
    return strength(options, shape) / REAL(options["beta"])


def threshold(options: Mapping[str, Any], v: Array) -> tuple[str | None, REAL] | None:
    """The penalty and the tau that v is thresholded with; None where there is no splitting.

    Top-k is l0 whose cut is the largest magnitude that is dropped; where that is 0, or nothing is dropped, u is v.
    """
    tau = step_tau(options, v.shape)
    if tau is None or options["penalty"] != "topk":
        return None if tau is None else (options["penalty"], tau)
    r = np.sort(over_groups(magnitudes(v, options["group_dim"]), options["group_dim"]))
    dropped = r.size - math.ceil(Fraction(str(options["density"])) * r.size)
    if dropped == 0 or r[dropped - 1] == 0:
        return None, REAL(0)
    # A few ulp above that magnitude, so that rounding cannot keep it; all that tie with it are dropped too.
    return "l0", r[dropped - 1] ** 2 / 2 * (1 + 8 * np.finfo(REAL).eps)


def strength(options: Mapping[str, Any], shape: Sequence[int]) -> REAL:
    """lambda of a tensor, with group_scale."""
    root = np.sqrt(REAL(group_size(shape, options["group_dim"]))) if options["group_scale"] else REAL(1)
    return REAL(options["lam"]) * root


def prox(
    w: Array, penalty: str | None, tau: float, a: float, group_dim: GroupDim = None, keep: Array | None = None
) -> Array:
    """u = v shrink(||v||) / ||v|| for every group v."""
    w = np.asarray(w, REAL)
    r = magnitudes(w, group_dim)
    s = shrink(penalty, r, tau, a, keep)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(s == r, w, np.where(r == 0, 0, w * (s / r)))


def penalty_value(w: Array, options: Mapping[str, Any], v: Array | None = None) -> REAL:
    """lambda P(u) + beta / 2 ||w - u||^2 of one tensor, with u = prox(v), v = w unless it is given; P of top-k is 0."""
    v = w if v is None else v
    found = threshold(options, v) if w.size else None
    if found is None:
        return REAL(0)
    u = prox(v, *found, options["a"], options["group_dim"])
    norms = over_groups(magnitudes(u, options["group_dim"]), options["group_dim"])
    kind = None if options["penalty"] == "topk" else options["penalty"]
    penalty = strength(options, w.shape) * np.sum(g(kind, norms, options["a"]))
    return penalty + REAL(options["beta"]) / 2 * np.sum(np.square(w - u))


@dataclasses.dataclass
class Step:
    """What a step gives.

    Attributes:
        w, m: the new weights and momentum (None without momentum).
        kept: the new u or dual (None without either).
        m_scale, w_scale, kept_scale: the sums of the absolute addends they were made of, for the error bounds.
    """

    w: Array
    m: Array | None
    w_scale: Array
    m_scale: Array
    kept: Array | None = None
    kept_scale: Array | None = None


def step(
    w: Array,
    grad: Array,
    m: Array | None,
    options: Mapping[str, Any],
    grad_scale: float | None = None,
    u: Array | None = None,
    kept: Array | None = None,
) -> Step:
    """One step of one parameter, line by line as section 3 of docs/method.md has it.

    `u` replaces the prox where it is given. `kept`: u of the step before, or the dual.
    """
    lr, beta, wd = (REAL(float(options[key])) for key in ("lr", "beta", "weight_decay"))
    mu, dampening, lasso = (REAL(float(options[key])) for key in ("momentum", "dampening", "group_lasso"))
    size = np.abs(w)
    grad = grad / REAL(1 if grad_scale is None else grad_scale)
    if options["maximize"]:
        grad = -grad
    d_scale = np.abs(grad)

    method = options.get("method", "rvsm")
    v = w + kept if method == "admm" and kept is not None else w
    found, new_kept, kept_scale = threshold(options, v), None, None
    if found is None:
        pull = pull_scale = np.zeros_like(w)
    else:
        u = prox(v, *found, options["a"], options["group_dim"]) if u is None else u
        if method == "rvsm-delayed":
            assert kept is not None
            pull, new_kept = w - kept, u
            pull_scale, kept_scale = beta * (np.abs(w) + np.abs(kept)), np.abs(v) + np.abs(u)
        elif method == "admm":
            assert kept is not None
            new_kept = v - u
            pull = w - u + new_kept
            kept_scale = np.abs(w) + np.abs(kept) + np.abs(u)
            pull_scale = beta * (np.abs(w) + np.abs(u) + kept_scale)
        else:
            pull = w - u
            pull_scale = beta * np.where((u == 0) | (u == w), np.abs(pull), np.abs(w) + np.abs(u))
    if lasso != 0:
        norms = magnitudes(w, options["group_dim"])
        unit = np.where(norms == 0, 0, w / np.where(norms == 0, 1, norms))
        grad = grad + lasso * unit
        d_scale = d_scale + np.abs(lasso * unit)

    if options["decoupled"]:
        w = w - lr * beta * pull
        w_scale = size + lr * pull_scale
        d = grad + wd * w
        d_scale = d_scale + wd * w_scale
    else:
        d = grad + wd * w + beta * pull
        w_scale = size
        d_scale = d_scale + wd * size + pull_scale

    if lr == 0:
        new_kept = kept
    m_scale = d_scale
    if mu == 0:
        m = None
    else:
        if m is None:
            m = d
        else:
            m_scale = np.abs(mu * m) + np.abs(1 - dampening) * d_scale
            m = mu * m + (1 - dampening) * d
        d = d + mu * m if options["nesterov"] else m
        d_scale = d_scale + mu * m_scale if options["nesterov"] else m_scale
    return Step(w - lr * d, m, w_scale + lr * d_scale, m_scale, new_kept, kept_scale)
