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


STATES_OF_METHODS = {"rvsm": "", "rvsm-delayed": "u", "admm": "dual"}
STATES_OF_BASES = {False: ("momentum_buffer",), True: ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")}
"""Of SGD and of AdamW."""


@dataclasses.dataclass
class Before:
    """What a step of one parameter starts from.

    Attributes:
        states: of the base, by name.
        bits: of the weights ("w"), what the method keeps ("kept"), and each state.
        count: of AdamW, the steps before this one.
    """

    w: Array
    grad: Array | None
    states: dict[str, Array]
    kept: Array | None
    bits: dict[str, Tensor]
    count: float | None


def states_of(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, Tensor]:
    """The states of the base of a parameter; creates none."""
    of_p = optimizer.state.get(p, {})
    names = STATES_OF_BASES[definition.is_adamw(optimizer.param_groups[0])]
    return {name: of_p[name] for name in names if of_p.get(name) is not None}


def count_of(optimizer: torch.optim.Optimizer, p: Tensor) -> float | None:
    """The count of the steps of a parameter, None where there is none."""
    counter = optimizer.state.get(p, {}).get("step")
    return None if counter is None else float(counter)


def kept_of(optimizer: torch.optim.Optimizer, p: Tensor, method: str) -> Tensor | None:
    """What a method keeps of a parameter; creates no state."""
    return optimizer.state.get(p, {}).get(STATES_OF_METHODS[method])


def before(optimizer: torch.optim.Optimizer, p: Tensor, method: str) -> Before:
    """Everything that the step of p may depend on, copied."""
    states, kept = states_of(optimizer, p), kept_of(optimizer, p, method)
    tensors = {"w": p, **states} | ({} if kept is None else {"kept": kept})
    return Before(
        w=real(p),
        grad=None if p.grad is None else real(p.grad),
        states={name: real(t) for name, t in states.items()},
        kept=None if kept is None else real(kept),
        bits={name: bits(t) for name, t in tensors.items()},
        count=count_of(optimizer, p),
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
    found, a, dims = definition.threshold(options, w) if w.size else None, options["a"], definition.groups_of(options)
    if found is None or found[0] is None:
        return [(w, w)]
    penalty, tau = found
    if penalty == "nm":
        u = definition.largest_of_windows(w, options["pattern"])
        return [(u, u)]
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
    states: Mapping[str, Tensor],
    kept: Tensor | None,
    count: float | None,
    b: Before,
    options: Mapping[str, Any],
    grad_scale: float | None,
) -> None:
    """One parameter after a step that it took part in."""
    assert b.grad is not None
    arithmetic = ARITHMETIC[p.dtype]
    share, floor = REAL(STEP[arithmetic]), underflow(arithmetic)
    wants: dict[str, list[tuple[Array, Array, Array]]] = {}
    old = b.kept
    if definition.step_tau(options, b.w.shape) is not None and options["method"] != "rvsm":
        assert kept is not None, "nothing is kept after a step of a method that keeps something"
        if old is None:  # u of the first weights, which the step has just found again, or 0
            old = real(kept) if options["method"] == "rvsm-delayed" else np.zeros_like(b.w)
    else:
        assert kept is None, "something is kept that no method keeps"
    adamw = definition.is_adamw(options)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        for us in right_u(argument(b.w, old, options, arithmetic), options, arithmetic):
            ends = []
            for u in us:
                made = definition.split(b.w, b.grad, options, grad_scale, u, old)
                if adamw:
                    made_by_base = definition.adamw_step(made, b.states, options, int(b.count or 0), share)
                else:
                    made_by_base = definition.sgd_step(made, b.states, options)
                ends.append(definition.held(made_by_base, b.w, options))
            for name, scale in ends[0].scales.items():
                if scale is not None:
                    values = [{"w": end.w, "kept": end.kept, **end.states}[name] for end in ends]
                    bound = share * np.maximum(scale, ends[1].scales[name]) + floor
                    wants.setdefault(name, []).append((np.minimum(*values), np.maximum(*values), bound))
    found = {"w": p, **states} | ({} if kept is None else {"kept": kept})
    for name, want in wants.items():
        assert name in found, f"no {name} after the step"
        assert (found[name].dtype, found[name].shape) == (p.dtype, p.shape), f"{name} is {found[name].dtype}"
        wrong = mismatch(found[name], want, p.dtype)
        assert wrong is None, f"{name}: {wrong}"
    for name in (states.keys() | b.states.keys()) - wants.keys():
        assert name in states and name in b.states, f"{name} came or went, which the step does not have"
        assert torch.equal(bits(states[name]), b.bits[name]), f"{name} changed, which the step does not have"
    assert count == ((b.count or 0) + 1 if adamw else b.count), f"the step is {count}"


def unchanged(optimizer: torch.optim.Optimizer, p: Tensor, b: Before, method: str) -> None:
    """One parameter after a step that it took no part in: not a bit differs."""
    now = before(optimizer, p, method)
    assert now.bits.keys() == b.bits.keys(), f"states came or went: {now.bits.keys() ^ b.bits.keys()}"
    for name, old in b.bits.items():
        assert torch.equal(now.bits[name], old), f"{name} changed"
    assert now.count == b.count, "a step was counted"


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
                    states, count = states_of(optimizer, p), count_of(optimizer, p)
                    check_weights(p, states, kept, count, old[p], options[i], scale)
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
    found, a, dims = definition.threshold(options, w) if w.size else None, options["a"], definition.groups_of(options)
    if found is None or found[0] is None:
        low, high = bracket(w, np.zeros_like(w), u.dtype)
        assert ((real(u) >= low) & (real(u) <= high)).all(), "u is not w without a splitting"
        return
    penalty, tau = found
    if penalty == "nm":
        low, high = bracket(definition.largest_of_windows(w, options["pattern"]), np.zeros_like(w), u.dtype)
        assert ((real(u) >= low) & (real(u) <= high)).all(), "u are not the largest elements of the windows"
        return
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
                assert torch.equal(bits(p), old[p].bits["w"]), f"sparse_weights() did not give w back, {where}"
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
