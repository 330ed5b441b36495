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


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Groups of ``size`` consecutive indices of a dimension: a group_dim with a group_block."""

    dim: int
    size: int


Grouping = GroupDim | Blocks


def groups_of(options: Mapping[str, Any]) -> Grouping:
    """What makes the groups of a param group."""
    block, dims = options.get("group_block", 1), options["group_dim"]
    if block == 1:
        return dims  # type: ignore[no-any-return]
    return Blocks(dims if isinstance(dims, int) else dims[0], block)


def group_dims(group_dim: Grouping, ndim: int) -> set[int]:
    """The dimensions that index the groups, counted from the front."""
    assert group_dim is not None
    if isinstance(group_dim, Blocks):
        return {group_dim.dim % ndim}
    return {d % ndim for d in ([group_dim] if isinstance(group_dim, int) else group_dim)}


def group_indices(shape: Sequence[int], group_dim: Grouping) -> Iterator[tuple[Any, ...]]:
    """The index of every group: a number or a block for each dimension of group_dim, everything for the others."""
    dims = group_dims(group_dim, len(shape))

    def indices(n: int) -> Any:
        if isinstance(group_dim, Blocks):
            return [slice(k, k + group_dim.size) for k in range(0, n, group_dim.size)]
        return range(n)

    yield from itertools.product(*(indices(n) if d in dims else (slice(None),) for d, n in enumerate(shape)))


def group_size(shape: Sequence[int], group_dim: Grouping) -> int:
    """Elements of a group."""
    if group_dim is None:
        return 1
    dims = group_dims(group_dim, len(shape))
    block = group_dim.size if isinstance(group_dim, Blocks) else 1
    return block * math.prod(n for d, n in enumerate(shape) if d not in dims)


def magnitudes(w: Array, group_dim: Grouping) -> Array:
    """For every element |w_i|, or the norm of the group that it belongs to."""
    if group_dim is None:
        return np.abs(w)
    r = np.zeros_like(w)
    for index in group_indices(w.shape, group_dim):
        r[index] = np.sqrt(np.sum(np.square(w[index])))
    return r


def over_groups(values: Array, group_dim: Grouping) -> Array:
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

    Top-k is l0 whose cut is the largest magnitude that is dropped; where that is 0, or nothing is dropped, u is v. N:M
    has no tau: see `u_of`.
    """
    tau = step_tau(options, v.shape)
    if tau is None or options["penalty"] != "topk":
        return None if tau is None else (options["penalty"], tau)
    r = np.sort(over_groups(magnitudes(v, groups_of(options)), groups_of(options)))
    dropped = r.size - math.ceil(Fraction(str(options["density"])) * r.size)
    if dropped == 0 or r[dropped - 1] == 0:
        return None, REAL(0)
    # A few ulp above that magnitude, so that rounding cannot keep it; all that tie with it are dropped too.
    return "l0", r[dropped - 1] ** 2 / 2 * (1 + 8 * np.finfo(REAL).eps)


def largest_of_windows(v: Array, pattern: Sequence[int]) -> Array:
    """N:M sparsity: of every m elements along dimension 1 the n of largest magnitude, zeros for the others.

    A sort of each window by itself: NaN first, which always survives, then by magnitude, then by place.
    """
    n, m = pattern
    u = v.copy()
    for index in itertools.product(*(range(size) for d, size in enumerate(v.shape) if d != 1)):
        for first in range(0, v.shape[1], m):
            window = [(index[0], first + k, *index[1:]) for k in range(m)]
            order = sorted(range(m), key=lambda k: (not np.isnan(v[window[k]]), -abs(v[window[k]]), k))
            for k in order[n:]:
                if not np.isnan(v[window[k]]):
                    u[window[k]] = 0
    return u


def u_of(options: Mapping[str, Any], v: Array) -> Array | None:
    """u of what is thresholded; None where there is no splitting."""
    found = threshold(options, v)
    if found is None:
        return None
    if options["penalty"] == "nm":
        return largest_of_windows(v, options["pattern"])
    return prox(v, *found, options["a"], groups_of(options))


def strength(options: Mapping[str, Any], shape: Sequence[int]) -> REAL:
    """lambda of a tensor, with group_scale."""
    root = np.sqrt(REAL(group_size(shape, groups_of(options)))) if options["group_scale"] else REAL(1)
    return REAL(options["lam"]) * root


def prox(
    w: Array, penalty: str | None, tau: float, a: float, group_dim: Grouping = None, keep: Array | None = None
) -> Array:
    """u = v shrink(||v||) / ||v|| for every group v."""
    w = np.asarray(w, REAL)
    r = magnitudes(w, group_dim)
    s = shrink(penalty, r, tau, a, keep)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(s == r, w, np.where(r == 0, 0, w * (s / r)))


def penalty_value(w: Array, options: Mapping[str, Any], v: Array | None = None) -> REAL:
    """lambda P(u) + beta / 2 ||w - u||^2 of one tensor, with u = prox(v), v = w unless it is given.

    P of top-k and of N:M is 0.
    """
    v = w if v is None else v
    found = threshold(options, v) if w.size else None
    if found is None:
        return REAL(0)
    u = u_of(options, v)
    assert u is not None
    norms = over_groups(magnitudes(u, groups_of(options)), groups_of(options))
    kind = None if options["penalty"] in ("topk", "nm") else options["penalty"]
    penalty = strength(options, w.shape) * np.sum(g(kind, norms, options["a"]))
    return penalty + REAL(options["beta"]) / 2 * np.sum(np.square(w - u))


@dataclasses.dataclass
class Split:
    """What the splitting makes of the weights and the gradient; the scales are the sums of the absolute addends."""

    w: Array
    d: Array
    w_scale: Array
    d_scale: Array
    kept: Array | None
    kept_scale: Array | None


def split(
    w: Array,
    grad: Array,
    options: Mapping[str, Any],
    grad_scale: float | None = None,
    u: Array | None = None,
    kept: Array | None = None,
) -> Split:
    """The splitting of one parameter, line by line as section 3 of docs/method.md has it; the step of the base follows.

    `u` replaces the prox where it is given. `kept`: u of the step before, or the dual.
    """
    lr, beta, lasso = (REAL(float(options[key])) for key in ("lr", "beta", "group_lasso"))
    w_scale = np.abs(w)
    d = grad / REAL(1 if grad_scale is None else grad_scale)
    if options["maximize"]:
        d = -d
    d_scale = np.abs(d)

    method = options.get("method", "rvsm")
    v = w + kept if method == "admm" and kept is not None else w
    found, new_kept, kept_scale = threshold(options, v), None, None
    if found is None:
        pull = pull_scale = np.zeros_like(w)
    else:
        u = u_of(options, v) if u is None else u
        assert u is not None
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
        norms = magnitudes(w, groups_of(options))
        unit = np.where(norms == 0, 0, w / np.where(norms == 0, 1, norms))
        d = d + lasso * unit
        d_scale = d_scale + np.abs(lasso * unit)
    if options["decoupled"]:
        w, w_scale = w - lr * beta * pull, w_scale + lr * pull_scale
    else:
        d, d_scale = d + beta * pull, d_scale + pull_scale
    return Split(w, d, w_scale, d_scale, kept if lr == 0 else new_kept, kept_scale)


@dataclasses.dataclass
class Step:
    """What a step gives.

    Attributes:
        w: the new weights.
        states: the new states of the base by their names in ``optimizer.state``.
        kept: the new u or dual (None without either).
        scales: of "w", "kept" and each state, the sums of the absolute addends that it was made of, for error bounds.
    """

    w: Array
    states: dict[str, Array]
    kept: Array | None
    scales: dict[str, Array | None]


def sgd_step(made: Split, states: Mapping[str, Array], options: Mapping[str, Any]) -> Step:
    """The step of torch.optim.SGD after the splitting; a missing buffer begins with the first direction."""
    lr, wd, mu, dampening = (REAL(float(options[key])) for key in ("lr", "weight_decay", "momentum", "dampening"))
    w, d = made.w, made.d + wd * made.w
    d_scale = made.d_scale + wd * made.w_scale
    scales: dict[str, Array | None] = {"kept": made.kept_scale}
    new: dict[str, Array] = {}
    if mu != 0:
        m, m_scale, old = d, d_scale, states.get("momentum_buffer")
        if old is not None:
            m = mu * old + (1 - dampening) * d
            m_scale = np.abs(mu * old) + np.abs(1 - dampening) * d_scale
        new["momentum_buffer"], scales["momentum_buffer"] = m, m_scale
        d = d + mu * m if options["nesterov"] else m
        d_scale = d_scale + mu * m_scale if options["nesterov"] else m_scale
    scales["w"] = made.w_scale + lr * d_scale
    return Step(w - lr * d, new, made.kept, scales)


def adamw_step(made: Split, states: Mapping[str, Array], options: Mapping[str, Any], count: int, share: REAL) -> Step:
    """The step of torch.optim.AdamW after the splitting; missing moments begin with zeros.

    Args:
        count: the steps before this one.
        share: the rounding that the scales are to be multiplied with: a quotient of two numbers that are not exact has
            no bound that is linear in it.
    """
    lr, wd, eps = (REAL(float(options[key])) for key in ("lr", "weight_decay", "eps"))
    beta1, beta2 = (REAL(float(beta)) for beta in options["betas"])
    t, zeros = count + 1, np.zeros_like(made.w)
    old_m, old_v = states.get("exp_avg", zeros), states.get("exp_avg_sq", zeros)
    w = made.w * (1 - lr * wd)
    m = beta1 * old_m + (1 - beta1) * made.d
    v = beta2 * old_v + (1 - beta2) * made.d**2
    scales: dict[str, Array | None] = {"kept": made.kept_scale}
    scales["exp_avg"] = np.abs(old_m) + (1 - beta1) * (made.d_scale + np.abs(old_m))
    scales["exp_avg_sq"] = v_scale = beta2 * old_v + (1 - beta2) * 3 * made.d_scale**2
    new = {"exp_avg": m, "exp_avg_sq": v}
    if options["amsgrad"]:
        v = np.maximum(v, states.get("max_exp_avg_sq", zeros))
        new["max_exp_avg_sq"], scales["max_exp_avg_sq"] = v, np.maximum(v_scale, v)
        v_scale = np.maximum(v_scale, v)
    correction, rate = 1 / np.sqrt(1 - beta2**t), lr / (1 - beta1**t)
    quotient = m / (np.sqrt(v) * correction + eps)
    least = np.sqrt(np.maximum(v - share * v_scale, 0)) * correction * (1 - share) + eps * (1 - share)
    m_scale = scales["exp_avg"]
    assert m_scale is not None
    slack = np.where(np.isfinite(v), (np.abs(m) + share * m_scale) / least - np.abs(quotient), 0)
    scales["w"] = made.w_scale + np.abs(w) + rate * (np.abs(quotient) + 2 * slack / share)
    return Step(w - rate * quotient, new, made.kept, scales)


def held(step: Step, w: Array, options: Mapping[str, Any]) -> Step:
    """The step with ``hold_zeros``: where a weight was 0, it and its states are 0; with lr 0 the method's stays."""
    if not options.get("hold_zeros"):
        return step
    zero = w == 0

    def clear(x: Array | None) -> Array | None:
        return None if x is None else np.where(zero, 0, x)

    states = {name: np.where(zero, 0, state) for name, state in step.states.items()}
    kept = step.kept if float(options["lr"]) == 0 else clear(step.kept)
    return Step(np.where(zero, 0, step.w), states, kept, {name: clear(x) for name, x in step.scales.items()})


def is_adamw(options: Mapping[str, Any]) -> bool:
    """Whether the options of a param group are AdamW's."""
    return "betas" in options
