"""The methods: what is thresholded, what pulls, and what is remembered of it from step to step (docs/method.md, 3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = list[Tensor]


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        name: as in a param group.
        number: its number in the kernels (``Method`` in ``csrc/math/types.h``).
        state: the name of its state in ``optimizer.state[p]``, None where it has none.
        starts_from_u: the state begins with u of the first weights; else it begins with zeros.
        adds_state: what is thresholded is w + state; else it is w.
        gap: (w, v, u, state) -> (gap, new state), lists of tensors of the same shapes; v is what was thresholded
            and u what came of it. The gap is what pulls. ``state`` is empty where the method has none, and then the
            new state is too.
    """

    name: str
    number: int
    state: str | None
    starts_from_u: bool
    adds_state: bool
    gap: Callable[[Tensors, Tensors, Tensors, Tensors], tuple[Tensors, Tensors]]


def _rvsm_gap(w: Tensors, v: Tensors, u: Tensors, state: Tensors) -> tuple[Tensors, Tensors]:
    return list(torch._foreach_sub(w, u)), []


def _delayed_gap(w: Tensors, v: Tensors, u: Tensors, state: Tensors) -> tuple[Tensors, Tensors]:
    return list(torch._foreach_sub(w, state)), u


def _admm_gap(w: Tensors, v: Tensors, u: Tensors, state: Tensors) -> tuple[Tensors, Tensors]:
    dual = list(torch._foreach_sub(v, u))
    return list(torch._foreach_add(torch._foreach_sub(w, u), dual)), dual


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("rvsm", 0, None, False, False, _rvsm_gap),
        Method("rvsm-delayed", 1, "u", True, False, _delayed_gap),
        Method("admm", 2, "dual", False, True, _admm_gap),
    )
}
"""Every method by its name in a param group."""

STATES = tuple(method.state for method in METHODS.values() if method.state is not None)
"""The names of the states of all methods."""
