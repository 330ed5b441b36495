"""The one runner: does a step of an optimizer and holds every weight, momentum and u against the definition.

It knows the optimizer by what a user sees of it (param groups, state, gradients), reads that afresh before each step
and so also notices a step that used anything stale.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import definition
from definition import REAL, Array
from tolerances import (
    ARITHMETIC,
    PENALTY_VALUE,
    STEP,
    bracket,
    in_band,
    shrink_bound,
    underflow,
)


def real(t: Tensor) -> Array:
    """A tensor as an array of the widest reals; exact."""
    return t.detach().resolve_neg().double().cpu().numpy().astype(REAL)


def bits(t: Tensor) -> Tensor:
    """A copy of a tensor as integers, so that -0.0, 0.0 and every NaN are different things."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return t.detach().clone(memory_format=torch.contiguous_format).view(kind).cpu()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in shape, dtype and every bit."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


@dataclasses.dataclass
class Before:
    """What a step of one parameter starts from."""

    w: Array
    grad: Array | None
    m: Array | None
    w_bits: Tensor
    m_bits: Tensor | None
    kept: Array | None = None
    kept_bits: Tensor | None = None


def momentum_of(optimizer: torch.optim.Optimizer, p: Tensor) -> Tensor | None:
    """The momentum buffer of a parameter, if it has one; creates no state."""
    return optimizer.state[p].get("momentum_buffer") if p in optimizer.state else None


def kept_of(optimizer: torch.optim.Optimizer, p: Tensor, method: str) -> Tensor | None:
    """What a method keeps of a parameter; creates no state."""
    return optimizer.state.get(p, {}).get({"rvsm": "", "rvsm-delayed": "u", "admm": "dual"}[method])


def before(optimizer: torch.optim.Optimizer, p: Tensor, method: str) -> Before:
    """Everything that the step of p may depend on, copied."""
    m, kept = momentum_of(optimizer, p), kept_of(optimizer, p, method)
    return Before(
        w=real(p),
        grad=None if p.grad is None else real(p.grad),
        m=None if m is None else real(m),
        w_bits=bits(p),
        m_bits=None if m is None else bits(m),
        kept=None if kept is None else real(kept),
        kept_bits=None if kept is None else bits(kept),
    )


# ---- comparing -------------------------------------------------------------------------------------------------------


def mismatch(got: Tensor, wants: Sequence[tuple[Array, Array, Array]], dtype: torch.dtype) -> str | None:
    """None if every element of `got` is right, else the first that is not.

    Args:
        wants: the right answers, each as (low, high, bound): anything between low - bound and high + bound.
    """
    x = real(got)
    right = np.zeros(x.shape, bool)
    for low, high, bound in wants:
        with np.errstate(invalid="ignore"):
            floor, _ = bracket(low, bound, dtype)
            _, ceiling = bracket(high, bound, dtype)
            within = (x >= floor) & (x <= ceiling)
        finite = np.isfinite(low)
        right |= np.where(finite, within, (np.isnan(x) & np.isnan(low)) | (x == low))
    if right.all():
        return None
    index = tuple(int(i) for i in np.argwhere(~right)[0])
    answers = dict.fromkeys(f"{lo[index]:.12g} .. {hi[index]:.12g} +- {b[index]:.3g}" for lo, hi, b in wants)
    found = f"{np.count_nonzero(~right)} of {x.size} wrong, first at {index}: got {x[index]:.12g}"
    return f"{found}, expected {' or '.join(answers)}"


def argument(w: Array, kept: Array | None, options: Mapping[str, Any], arithmetic: type) -> Array:
    """What is thresholded: w, or w + dual, rounded as one addition rounds it."""
    if kept is None or options["method"] != "admm" or definition.step_tau(options, w.shape) is None:
        return w
    return (w.astype(arithmetic) + kept.astype(arithmetic)).astype(REAL)


def right_u(w: Array, options: Mapping[str, Any], arithmetic: type) -> list[tuple[Array, Array]]:
    """Every u that is right, as (low, high): the prox; near the cut both choices; near the critical tau a range."""
    found, a, dims = definition.threshold(options, w) if w.size else None, options["a"], options["group_dim"]
    if found is None or found[0] is None:
        return [(w, w)]
    penalty, tau = found
    us = [definition.prox(w, penalty, tau, a, dims)]
    r = definition.magnitudes(w, dims)
    tie = in_band(r, penalty, tau, a, arithmetic)
    if tie.any():
        for choice in (True, False):
            keep = np.where(tie, choice, us[0] != 0)
            us.append(definition.prox(w, penalty, tau, a, dims, keep=keep))
    if penalty != "tl1":
        return [(u, u) for u in us]
    # What a backward error of the allowed ulps may do to u; nothing where the derivative of shrink is moderate.
    bound = shrink_bound(r, penalty, tau, a, arithmetic)
    flat = shrink_bound(r, "l1", tau, a, arithmetic)
    with np.errstate(invalid="ignore", divide="ignore"):
        extra = np.where((r > 0) & (bound > flat), bound / np.where(r > 0, r, 1), 0) * np.abs(w)
    return [(u - np.where(u == 0, 0, extra), u + np.where(u == 0, 0, extra)) for u in us]


def check_weights(
    p: Tensor,
    m: Tensor | None,
    kept: Tensor | None,
    b: Before,
    options: Mapping[str, Any],
    grad_scale: float | None,
) -> None:
    """One parameter after a step that it took part in."""
    assert b.grad is not None
    arithmetic = ARITHMETIC[p.dtype]
    share, floor = REAL(STEP[arithmetic]), underflow(arithmetic)
    weights, momenta, keeps = [], [], []
    old = b.kept
    if definition.step_tau(options, b.w.shape) is not None and options["method"] != "rvsm":
        assert kept is not None, "nothing is kept after a step of a method that keeps something"
        if old is None:  # u of the first weights, which the step has just found again, or 0
            old = real(kept) if options["method"] == "rvsm-delayed" else np.zeros_like(b.w)
    else:
        assert kept is None, "something is kept that no method keeps"
    with np.errstate(invalid="ignore", over="ignore"):
        for us in right_u(argument(b.w, old, options, arithmetic), options, arithmetic):
            ends = [definition.step(b.w, b.grad, b.m, options, grad_scale, u, old) for u in us]
            if ends[0].kept is not None:
                low, high = (f(ends[0].kept, ends[1].kept) for f in (np.minimum, np.maximum))
                keeps.append((low, high, share * ends[0].kept_scale + floor))
            low, high = (f(ends[0].w, ends[1].w) for f in (np.minimum, np.maximum))
            weights.append((low, high, share * ends[0].w_scale + floor))
            if ends[0].m is not None:
                low, high = (f(ends[0].m, ends[1].m) for f in (np.minimum, np.maximum))
                momenta.append((low, high, share * ends[0].m_scale + floor))
    wrong = mismatch(p, weights, p.dtype)
    assert wrong is None, f"weights: {wrong}"
    if keeps:
        assert kept is not None and (kept.dtype, kept.shape) == (p.dtype, p.shape)
        wrong = mismatch(kept, keeps, p.dtype)
        assert wrong is None, f"what is kept: {wrong}"
    if momenta:
        assert m is not None, "no momentum_buffer after a step with momentum"
        assert (m.dtype, m.shape) == (p.dtype, p.shape), f"momentum is {m.dtype} {list(m.shape)}"
        wrong = mismatch(m, momenta, p.dtype)
        assert wrong is None, f"momentum: {wrong}"
    else:
        assert (m is None) == (b.m is None), "a momentum_buffer came or went without momentum"
        assert m is None or torch.equal(bits(m), b.m_bits), "the momentum_buffer changed without momentum"


def unchanged(optimizer: torch.optim.Optimizer, p: Tensor, b: Before, method: str) -> None:
    """One parameter after a step that it took no part in: not a bit differs."""
    assert torch.equal(bits(p), b.w_bits), "weights changed"
    m = momentum_of(optimizer, p)
    assert (m is None) == (b.m_bits is None), "a momentum_buffer came or went"
    assert m is None or torch.equal(bits(m), b.m_bits), "momentum changed"
    kept = kept_of(optimizer, p, method)
    assert (kept is None) == (b.kept_bits is None), "what is kept came or went"
    assert kept is None or torch.equal(bits(kept), b.kept_bits), "what is kept changed"


def checked_step(optimizer: Any, what: object = "", step: Callable[[], Any] | None = None) -> None:
    """Do a step; hold every parameter against the definition applied to what there was just before it.

    Args:
        optimizer: an RVSM with all its gradients in place.
        what: goes into the message.
        step: what to call instead of optimizer.step().
    """
    old = {p: before(optimizer, p, group["method"]) for group in optimizer.param_groups for p in group["params"]}
    grads = {p: None if p.grad is None else bits(p.grad) for p in old}
    options = [{k: copied(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    grad_scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    (optimizer.step if step is None else step)()
    for i, group in enumerate(optimizer.param_groups):
        for j, p in enumerate(group["params"]):
            try:
                if p.grad is None or p.numel() == 0 or (found_inf is not None and float(found_inf) > 0):
                    unchanged(optimizer, p, old[p], group["method"])
                else:
                    scale = None if grad_scale is None else float(grad_scale)
                    kept = kept_of(optimizer, p, group["method"])
                    check_weights(p, momentum_of(optimizer, p), kept, old[p], options[i], scale)
                    strange = {"u", "dual"} & optimizer.state.get(p, {}).keys()
                    assert len(strange) == (kept is not None), f"the state has {strange}"
                assert p.grad is None or torch.equal(bits(p.grad), grads[p]), "the step wrote into the gradient"
            except AssertionError as error:
                text = f"{error}\ngroup {i}, parameter {j}: {p.dtype} {tuple(p.shape)} {p.stride()}\n"
                raise AssertionError(f"{text}options {options[i]}\n{what}") from None


def copied(value: Any) -> Any:
    """An option as it is now; a tensor lr may change in place."""
    return value.item() if isinstance(value, Tensor) else value


# ---- reading u -------------------------------------------------------------------------------------------------------


def check_u(u: Tensor, w: Array, options: Mapping[str, Any]) -> None:
    """u as read from an optimizer, of w (or w + dual): within the bound of shrink, zeros exactly where they belong."""
    arithmetic = ARITHMETIC[u.dtype]
    found, a, dims = definition.threshold(options, w) if w.size else None, options["a"], options["group_dim"]
    if found is None or found[0] is None:
        low, high = bracket(w, np.zeros_like(w), u.dtype)
        assert ((real(u) >= low) & (real(u) <= high)).all(), "u is not w without a splitting"
        return
    penalty, tau = found
    r = definition.magnitudes(w, dims)
    with np.errstate(invalid="ignore", divide="ignore"):
        relative = np.where(r > 0, shrink_bound(r, penalty, tau, a, arithmetic) / np.where(r > 0, r, 1), 0)
    bound = relative * np.abs(w) + underflow(arithmetic)
    wants = [(low, high, bound) for low, high in right_u(w, options, arithmetic)]
    wrong = mismatch(u, wants, u.dtype)
    assert wrong is None, f"u: {wrong}"

    want = wants[0][0] / 2 + wants[0][1] / 2
    tie = in_band(r, penalty, tau, a, arithmetic)
    zero = real(u) == 0
    low, high = bracket(want, bound, u.dtype)
    # float32 holds what the storage type of half the width may not.
    may_underflow = (low <= 0) & (high >= 0) & (np.abs(want) <= torch.finfo(u.dtype).smallest_normal)
    may_underflow &= u.element_size() == 2
    must_live = (want != 0) & ~tie & ~may_underflow & (np.abs(want) > 2 * underflow(arithmetic))
    assert not (zero & must_live).any(), f"u is 0 above the cut at {np.argwhere(zero & must_live)[0]}"
    must_die = (want == 0) & ~tie
    assert not (~zero & must_die).any(), f"u is not an exact 0 below the cut at {np.argwhere(~zero & must_die)[0]}"
    if dims is not None and tie.any():
        for index in definition.group_indices(w.shape, dims):
            alive = ~zero[index][w[index] != 0]
            assert may_underflow[index].any() or not alive.any() or alive.all(), f"half of group {index} is zero"


def check_reading(optimizer: Any, what: object = "") -> None:
    """sparse_weights() and penalty_value() of an optimizer against the definition."""
    old = {p: before(optimizer, p, group["method"]) for group in optimizer.param_groups for p in group["params"]}
    value = optimizer.penalty_value()
    with optimizer.sparse_weights():
        us = {p: p.detach().clone() for p in old}
    want, loosest = REAL(0), np.float64
    try:
        for i, group in enumerate(optimizer.param_groups):
            for j, p in enumerate(group["params"]):
                where = f"group {i}, parameter {j}: {p.dtype} {tuple(p.shape)} {p.stride()}"
                assert torch.equal(bits(p), old[p].w_bits), f"sparse_weights() did not give w back, {where}"
                try:
                    v = argument(old[p].w, old[p].kept, group, ARITHMETIC[p.dtype])
                    check_u(us[p], v, group)
                except AssertionError as error:
                    options = {k: v for k, v in group.items() if k != "params"}
                    raise AssertionError(f"{error}\n{where}\noptions {options}") from None
                want += definition.penalty_value(old[p].w, group, v)
                loosest = np.float32 if ARITHMETIC[p.dtype] is np.float32 else loosest
        assert value.dtype == torch.float64 and value.dim() == 0, f"penalty_value() is {value.dtype} {value.shape}"
        error = abs(REAL(value.item()) - want)
        assert error <= PENALTY_VALUE[loosest] * want, f"penalty_value() is {value.item()!r}, expected {want!r}"
    except AssertionError as error:
        raise AssertionError(f"{error}\n{what}") from None
