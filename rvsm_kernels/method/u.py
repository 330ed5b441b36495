"""u of the weights of a group where it is more than their prox: with the dual of ADMM, or with the cut of top-k."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from .groups import grouping_of, magnitudes, once
from .methods import METHODS
from .penalties import PENALTIES
from .selection import keep_above, thresholded
from .split import is_nm, is_split, is_topk, strength


def is_more_than_prox(group: Mapping[str, Any]) -> bool:
    """Whether u follows not from w and the options alone: with ADMM from the dual too, with top-k from a cut."""
    return is_split(group) and (METHODS[group["method"]].adds_state or group["penalty"] == "topk")


def u_of(
    w: Tensor,
    dual: Tensor | None,
    group: Mapping[str, Any],
    prox_: Callable[[Sequence[Tensor], Any], None],
    cut: Tensor | None,
) -> Tensor:
    """u where it is more than the prox of w, as a new tensor in the type of the arithmetic.

    Args:
        prox_: puts the prox into tensors in place; an engine's.
        cut: of top-k; None for other penalties.
    """
    v = thresholded(w, dual)
    if cut is not None:
        return keep_above(v, magnitudes(v, grouping_of(group)), cut)
    v = v.clone() if dual is None else v
    prox_([v], group)
    return v


def value_of(w: Tensor, u: Tensor, group: Mapping[str, Any]) -> Tensor:
    """lam P(u) + beta/2 ||w - u||^2, 0-dim float64. P of top-k and of N:M is 0: u never keeps too many."""
    value = float(group["beta"]) / 2 * (w.double() - u.double()).square().sum()
    if is_topk(group) or is_nm(group):
        return value
    r = once(magnitudes(u.double(), grouping_of(group)), grouping_of(group))
    return value + strength(group, w.shape) * PENALTIES[group["penalty"]].value(r, float(group["a"])).sum()
