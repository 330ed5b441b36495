"""The split in Triton, the twin of ``csrc/math/split.h``: what stands before every base step."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .penalty import NONE, Prox

# The order of method/methods.py.
DELAYED = tl.constexpr(1)
ADMM = tl.constexpr(2)


class Split(NamedTuple):
    """The numbers of the split beside those of the prox; see ``csrc/math/numbers.h``."""

    grad: float
    pull: float
    coupling: float
    lasso: float
    hold: float


@triton.constexpr_function
def method_states(method):
    """States that a method has beside each weight: u of the step before (delayed), the dual (ADMM)."""
    return 0 if method == 0 else 1


@triton.jit
def thresholded(w, state, METHOD: tl.constexpr):
    """What a method thresholds: w, or w + dual."""
    return w + state if METHOD == ADMM else w


@triton.jit
def gap_of(w, v, u, state, METHOD: tl.constexpr):
    """The gap that pulls, from v = thresholded(w, state) and u = prox(v), and the state of the method from now on.

    rvsm: gap = w - u. delayed: gap = w - state, state' = u. admm: state' = v - u, gap = w - u + state'.
    """
    gap = w - u
    if METHOD == DELAYED:
        gap = w - state
        state = u
    elif METHOD == ADMM:
        state = v - u
        gap += state
    return gap, state


@triton.jit
def split_step(w, d, gap, unit, f: Prox, s: Split):
    """Pulls w, and turns d from the gradient into the direction for the base; returns both.

    ``gap`` and ``unit`` = w_G / ||w_G|| are of the weights that the forward pass used. Terms that are off are left out,
    not multiplied by 0, so that an Inf spreads no further than in torch.optim.
    """
    on = f.penalty != NONE
    d = tl.where(s.lasso != 0, d + s.lasso * unit, d)
    w = tl.where(on, w - s.pull * gap, w)
    d = tl.where(on, d + s.coupling * gap, d)
    return w, d


@triton.jit
def is_held(w, s: Split):
    """Which elements with these weights, as the step finds them, are held: with hold_zeros those that are 0."""
    return tl.where(s.hold != 0, w, 1.0) == 0


@triton.jit
def unless_held(held, loaded):
    """Gradients or states of elements as the step takes them: 0 where these are held."""
    return tl.where(held, 0.0, loaded)
