"""The bases: the step that follows the splitting. Each is one struct here, its twin is ``csrc/math/base_*.h``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from .options import (
    ADAMW_OPTIONS,
    LR,
    PRECISION_OPTIONS,
    SGD_OPTIONS,
    SPLIT_OPTIONS,
    UNIT_NORM,
    Option,
    check_sgd,
    check_split,
    check_values,
)

State = list[Tensor | None]
"""One state of several parameters; None where it is not there yet."""


@dataclass(frozen=True)
class Base:
    """One base.

    Attributes:
        name: its name, for messages and tables.
        number: its number in the kernels (``BaseKind`` in ``csrc/math/types.h``).
        torch_name: the optimizer of torch.optim whose step it is, for messages; None if there is none.
        options: those of a param group that the base reads.
        more_options: those that only optimizers over this base have, beside the splitting's.
        check: raises ValueError for options of a group that exclude each other.
        states: of a group, the names of the states that the base has in ``optimizer.state[p]``; zeros at first.
        number_names: what the numbers are, in the kernels' order.
        numbers: of (group, count), the numbers of a step in double precision; count: how many steps the states of the
            parameter have seen, 0 where they hold their first zeros. Without a counter any later step has count 1.
        step: (weights, gradients, states, group, counts): one step in plain torch, in the type of the arithmetic; the
            weights are written in place. Of ``states``, in the order of their names, each None is replaced by a new
            tensor that holds the state after the step. ``counts``: of each parameter, as in ``numbers``.
        counter: the name of the 1-element tensor in ``optimizer.state[p]`` that counts the steps of a parameter, None
            where the base counts none. An engine adds 1 to it in each step.
        writes_gradient: where the splitting has terms in the gradient, the step leaves their sum in ``p.grad`` for
            another optimizer.
    """

    name: str
    number: int
    options: tuple[Option, ...]
    check: Callable[[Mapping[str, Any]], None]
    states: Callable[[Mapping[str, Any]], tuple[str, ...]]
    number_names: tuple[str, ...]
    numbers: Callable[[Mapping[str, Any], int], tuple[float, ...]]
    step: Callable[[list[Tensor], list[Tensor], Sequence[State], Mapping[str, Any], Sequence[int]], None]
    torch_name: str | None = None
    more_options: tuple[Option, ...] = ()
    counter: str | None = None
    writes_gradient: bool = False

    @functools.cached_property
    def all_options(self) -> tuple[Option, ...]:
        """Every option of a param group of an optimizer over this base: the base's, the splitting's, others."""
        return (*self.options, *SPLIT_OPTIONS, *self.more_options)


# ---- sgd: torch.optim.SGD --------------------------------------------------------------------------------------------


def _sgd_states(group: Mapping[str, Any]) -> tuple[str, ...]:
    return ("momentum_buffer",) if group["momentum"] != 0 else ()


def _sgd_numbers(group: Mapping[str, Any], count: int) -> tuple[float, ...]:
    momentum = float(group["momentum"])
    return (
        float(group["weight_decay"]),
        momentum if count else 0.0,
        1.0 - float(group["dampening"]) if count else 1.0,
        momentum,
        float(bool(group["nesterov"])),
        float(group["lr"]),
    )


def _sgd_step(
    w: list[Tensor], g: list[Tensor], states: Sequence[State], group: Mapping[str, Any], counts: Sequence[int]
) -> None:
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
    torch_name="torch.optim.SGD",
    more_options=(UNIT_NORM, *PRECISION_OPTIONS),
)


# ---- none: the splitting alone, for another optimizer that steps afterwards ------------------------------------------

NONE = Base(
    name="none",
    number=1,
    options=(LR,),  # the pull is lr * beta
    check=lambda group: None,
    states=lambda group: (),
    number_names=(),
    numbers=lambda group, count: (),
    step=lambda w, g, states, group, counts: None,
    writes_gradient=True,
)

# ---- adamw: torch.optim.AdamW ----------------------------------------------------------------------------------------


def _adamw_states(group: Mapping[str, Any]) -> tuple[str, ...]:
    moments = "exp_avg", "exp_avg_sq"
    return (*moments, "max_exp_avg_sq") if group["amsgrad"] else moments


def _adamw_numbers(group: Mapping[str, Any], count: int) -> tuple[float, ...]:
    lr, (beta1, beta2) = float(group["lr"]), map(float, group["betas"])
    step = count + 1
    return (
        1 - lr * float(group["weight_decay"]),
        1 - beta1,
        beta2,
        1 - beta2,
        lr / (1 - beta1**step),
        1 / (1 - beta2**step) ** 0.5,
        float(group["eps"]),
        lr,
        beta1,
    )


def _adamw_step(
    w: list[Tensor], g: list[Tensor], states: Sequence[State], group: Mapping[str, Any], counts: Sequence[int]
) -> None:
    """torch's AdamW in its foreach form.

    Its function is not called, for where torch.compile traces it, it takes the corrections of the bias in float32.
    """
    lr, (beta1, beta2) = float(group["lr"]), map(float, group["betas"])
    moments: list[list[Tensor]] = []
    for state in states:
        moments.append([torch.zeros_like(x) if s is None else s for s, x in zip(state, w, strict=True)])
        state[:] = moments[-1]
    first, second, largest = moments[0], moments[1], moments[-1]  # without amsgrad the largest is the second
    if group["weight_decay"] != 0:
        torch._foreach_mul_(w, 1 - lr * float(group["weight_decay"]))
    torch._foreach_lerp_(first, g, 1 - beta1)
    torch._foreach_mul_(second, beta2)
    torch._foreach_addcmul_(second, g, g, 1 - beta2)
    if group["amsgrad"]:
        torch._foreach_maximum_(largest, second)
    root = torch._foreach_sqrt(largest)
    torch._foreach_div_(root, [(1 - beta2 ** (count + 1)) ** 0.5 for count in counts])
    torch._foreach_add_(root, float(group["eps"]))
    torch._foreach_addcdiv_(w, first, root, [-(lr / (1 - beta1 ** (count + 1))) for count in counts])


def _check_adamw(group: Mapping[str, Any]) -> None:
    if group["hold_zeros"] and group["eps"] < 1e-30:  # which float32 may round to 0
        raise ValueError(
            "hold_zeros=True needs an eps above 0, 1e-30 or more: the step is 0 / eps where the moments are 0"
        )


ADAMW = Base(
    name="adamw",
    number=2,
    options=ADAMW_OPTIONS,
    check=_check_adamw,
    states=_adamw_states,
    number_names=("keep", "add", "keep_sq", "add_sq", "step_size", "correction", "eps", "lr", "beta1"),
    numbers=_adamw_numbers,
    step=_adamw_step,
    torch_name="torch.optim.AdamW",
    more_options=PRECISION_OPTIONS,
    counter="step",
)

BASES: dict[str, Base] = {base.name: base for base in (SGD, NONE, ADAMW)}
"""Every base by its name."""


def validate(group: Mapping[str, Any], base: Base = SGD) -> None:
    """Check every option of a param group; nothing is changed.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range, an unknown name, or options that exclude each other.
    """
    check_values(base.options, group)
    base.check(group)
    check_values((*SPLIT_OPTIONS, *base.more_options), group)
    check_split(group)
