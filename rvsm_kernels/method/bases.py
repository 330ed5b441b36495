"""The bases: the step that follows the splitting. Each is one struct here, its twin is ``csrc/math/base_*.h``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim.sgd import sgd

from .options import LR, SGD_OPTIONS, SPLIT_OPTIONS, Option, check_sgd, check_split, check_values

State = list[Tensor | None]
"""One state of several parameters; None where it is not there yet."""


@dataclass(frozen=True)
class Base:
    """One base.

    Attributes:
        name: its name, for messages and tables.
        number: its number in the kernels (``BaseKind`` in ``csrc/math/types.h``).
        options: those of a param group that the base reads.
        check: raises ValueError for options of a group that exclude each other.
        states: of a group, the names of the states that the base has in ``optimizer.state[p]``; zeros at first.
        number_names: what the numbers are, in the kernels' order.
        numbers: of (group, fresh), the numbers of a step in double precision; fresh: the states hold their first zeros.
        step: (weights, gradients, states, group): one step in plain torch, in the type of the arithmetic; the weights
            are written in place. Of ``states``, in the order of their names, each None is replaced by a new tensor
            that holds the state after the step.
        writes_gradient: where the splitting has terms in the gradient, the step leaves their sum in ``p.grad`` for
            another optimizer.
    """

    name: str
    number: int
    options: tuple[Option, ...]
    check: Callable[[Mapping[str, Any]], None]
    states: Callable[[Mapping[str, Any]], tuple[str, ...]]
    number_names: tuple[str, ...]
    numbers: Callable[[Mapping[str, Any], bool], tuple[float, ...]]
    step: Callable[[list[Tensor], list[Tensor], Sequence[State], Mapping[str, Any]], None]
    writes_gradient: bool = False

    @functools.cached_property
    def all_options(self) -> tuple[Option, ...]:
        """Every option of a param group of an optimizer over this base: the base's, then those of the splitting."""
        return (*self.options, *SPLIT_OPTIONS)


# ---- sgd: torch.optim.SGD --------------------------------------------------------------------------------------------


def _sgd_states(group: Mapping[str, Any]) -> tuple[str, ...]:
    return ("momentum_buffer",) if group["momentum"] != 0 else ()


def _sgd_numbers(group: Mapping[str, Any], fresh: bool) -> tuple[float, ...]:
    momentum = float(group["momentum"])
    return (
        float(group["weight_decay"]),
        0.0 if fresh else momentum,
        1.0 if fresh else 1.0 - float(group["dampening"]),
        momentum,
        float(bool(group["nesterov"])),
        float(group["lr"]),
    )


def _sgd_step(w: list[Tensor], g: list[Tensor], states: Sequence[State], group: Mapping[str, Any]) -> None:
    """torch's functional SGD in its foreach form."""
    if group["nesterov"] and not group["weight_decay"]:
        g = [x.clone() for x in g]  # torch writes the Nesterov direction into the gradients otherwise
    buffers: State = states[0] if states else [None] * len(w)  # type: ignore[assignment]
    sgd(
        w,
        g,
        buffers,
        lr=float(group["lr"]),
        weight_decay=float(group["weight_decay"]),
        momentum=float(group["momentum"]),
        dampening=float(group["dampening"]),
        nesterov=bool(group["nesterov"]),
        maximize=False,
        foreach=True,
    )


SGD = Base(
    name="sgd",
    number=0,
    options=SGD_OPTIONS,
    check=check_sgd,
    states=_sgd_states,
    number_names=("weight_decay", "keep", "add", "momentum", "nesterov", "lr"),
    numbers=_sgd_numbers,
    step=_sgd_step,
)


# ---- none: the splitting alone, for another optimizer that steps afterwards ------------------------------------------

NONE = Base(
    name="none",
    number=1,
    options=(LR,),  # the pull is lr * beta
    check=lambda group: None,
    states=lambda group: (),
    number_names=(),
    numbers=lambda group, fresh: (),
    step=lambda w, g, states, group: None,
    writes_gradient=True,
)

BASES: dict[str, Base] = {base.name: base for base in (SGD, NONE)}
"""Every base by its name."""


def validate(group: Mapping[str, Any], base: Base = SGD) -> None:
    """Check every option of a param group; nothing is changed.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range, an unknown name, or options that exclude each other.
    """
    check_values(base.options, group)
    base.check(group)
    check_values(SPLIT_OPTIONS, group)
    check_split(group)
