"""Every option of a param group, once: its name, its default, its check and what it means."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch

from .device_numbers import is_on_device
from .groups import as_dims, grouping_of
from .methods import METHODS
from .penalties import PENALTIES
from .precision import STATE_TYPES
from .windows import NO_PATTERN, check_pattern

PENALTY_NAMES = (*PENALTIES, "topk", "nm")


@dataclass(frozen=True)
class Option:
    """One option of a param group.

    Attributes:
        name: its key in the group and its keyword in a constructor.
        default: its value where none is given.
        check: raises for a value that the option cannot have, in torch.optim's wording; given (name, value). None for
            a switch: any value counts as true or false.
        doc: what it means, in a sentence.
    """

    name: str
    default: Any
    check: Callable[[str, Any], None] | None
    doc: str


# ---- checks of one value ---------------------------------------------------------------------------------------------


def shown(value: Any) -> str:
    """A value that does not belong where it stands, in a few words: never a screen of weights."""
    text = repr(value) if not isinstance(value, (torch.Tensor, list, tuple, dict, set)) or len(str(value)) < 40 else ""
    return text if 0 < len(text) <= 60 else f"a {type(value).__name__}"


def _to_number(name: str, value: Any, what: str) -> float:
    """A number or a 1-element tensor as a float; raises for anything else."""
    if type(value) is float:
        return value
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise ValueError(f"Tensor {name} must be 1-element")
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"Invalid {what}: {shown(value)} (a number is needed)")
    return float(value)


def _number(what: str, *, above: float | None = None, most: float = math.inf) -> Callable[[str, Any], None]:
    """A check for a finite number >= 0 (or > above) and <= most."""

    def check(name: str, value: Any) -> None:
        number = _to_number(name, value, what)
        in_range = number >= 0.0 if above is None else number > above
        if not (in_range and number <= most and math.isfinite(number)):
            raise ValueError(f"Invalid {what}: {value.item() if isinstance(value, torch.Tensor) else value}")

    return check


def _any_finite(what: str) -> Callable[[str, Any], None]:
    """A check for a finite number of any sign; a tensor is refused."""

    def check(name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"Invalid {what}: {shown(value)} (a number is needed)")
        if not math.isfinite(value):
            raise ValueError(f"Invalid {what}: {value}")

    return check


def _switch(name: str, value: Any) -> None:
    """A check for True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"Invalid {name} value: {shown(value)} (True or False is needed)")


def _betas(name: str, value: Any) -> None:
    """A check for the two decay rates of AdamW's moments."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"Invalid betas value: {shown(value)} (a pair of numbers is needed)")
    for index, beta in enumerate(value):
        number = _to_number(f"betas[{index}]", beta, f"beta parameter at index {index}")
        if not 0.0 <= number < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {number}")


def _seed(name: str, value: Any) -> None:
    """A check for the key of a generator."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"Invalid {name} value: {shown(value)} (an integer is needed)")
    if not 0 <= int(value) < 2**63:
        raise ValueError(f"Invalid {name} value: {value}")


def _optional(check: Callable[[str, Any], None]) -> Callable[[str, Any], None]:
    """The check of an option that may also be None."""
    return lambda name, value: None if value is None else check(name, value)


def choice(names: tuple[str, ...], *, or_none: bool = False) -> Callable[[str, Any], None]:
    """A check for one of some names."""
    known = ", ".join(["None"] * or_none + [repr(name) for name in names])

    def check(name: str, value: Any) -> None:
        if not (or_none and value is None) and value not in names:
            raise ValueError(f"Invalid {name}: {shown(value)} (choose one of {known})")

    return check


def at_least_one(name: str, value: Any) -> None:
    """A check for an integer >= 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"Invalid {name} value: {shown(value)} (an integer is needed)")
    if value < 1:
        raise ValueError(f"Invalid {name} value: {value}")


def _name(name: str, value: Any) -> None:
    """A check for a name, or None."""
    if value is not None and not isinstance(value, str):
        raise TypeError(f"Invalid {name} value: {shown(value)} (a string is needed)")


def is_number(value: Any) -> bool:
    """Whether a value is a finite number; True and False are none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def whole_number(name: str, value: Any, least: int) -> int:
    """A number of steps as an int; raises ValueError for anything else."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"Invalid {name} value: {shown(value)} (a whole number of steps >= {least} is needed)")
    return int(value)


def _dims(name: str, value: Any) -> None:
    """A check for the type of ``group_dim``; whether a parameter has the dimensions, only its shape tells."""
    as_dims(value)


def _coupling(name: str, value: Any) -> None:
    """A check for the numbers of coupled groups, or None."""
    if value is None:
        return
    if not isinstance(value, (tuple, list)) or any(type(k) is not int for k in value):
        raise TypeError(f"Invalid {name} value: {shown(value)} (a tuple of ints is needed, one an index of group_dim)")


# ---- the table -------------------------------------------------------------------------------------------------------

LR = Option("lr", 1e-3, _number("learning rate"), "learning rate, a number or a 1-element tensor, >= 0")

SGD_OPTIONS = (
    LR,
    Option("momentum", 0.0, _number("momentum value"), "as torch.optim.SGD, >= 0"),
    Option("dampening", 0.0, _any_finite("dampening value"), "as torch.optim.SGD"),
    Option("weight_decay", 0.0, _number("weight_decay value"), "as torch.optim.SGD, >= 0"),
    Option("nesterov", False, None, "as torch.optim.SGD; needs a momentum and no dampening"),
)
"""The options of ``torch.optim.SGD``'s step."""

ADAMW_OPTIONS = (
    LR,
    Option("betas", (0.9, 0.999), _betas, "decay rates of the two moments, as torch.optim.AdamW, in [0, 1)"),
    Option("eps", 1e-8, _number("epsilon value"), "as torch.optim.AdamW, >= 0"),
    Option("weight_decay", 1e-2, _number("weight_decay value"), "as torch.optim.AdamW, >= 0"),
    Option("amsgrad", False, None, "as torch.optim.AdamW"),
)
"""The options of ``torch.optim.AdamW``'s step."""

SPLIT_OPTIONS = (
    Option(
        "penalty",
        "l0",
        choice(PENALTY_NAMES, or_none=True),
        "the penalty P. 'l0', 'l1', 'tl1' (transformed l1): what is small goes to zero. 'topk': the share density"
        " survives. 'nm': pattern[0] of every pattern[1] elements survive. None: no penalty, the plain optimizer",
    ),
    Option(
        "lam",
        1e-6,
        _number("lam value"),
        "strength of the penalty, in units of the loss; 0 switches it off. With beta it fixes the cut, below which u is"
        " zero: sqrt(2 lam / beta) of l0, lam / beta of l1",
    ),
    Option(
        "beta",
        1e-2,
        _number("beta value"),
        "strength of the coupling; 0 switches the splitting off. A step closes the share lr * beta of the"
        " gap between w and u",
    ),
    Option("a", 1.0, _number("a value", above=0.0), "shape of transformed l1, > 0"),
    Option(
        "density",
        None,
        _optional(_number("density value", above=0.0, most=1.0)),
        "the share of elements or groups that survive top-k, in (0, 1]",
    ),
    Option("budget", "tensor", choice(("tensor", "global")), "what a density is a share of: of each tensor, or of all"),
    Option("budget_name", None, _name, "groups of top-k with budget='global' and the same name share one cut"),
    Option("pattern", None, _optional(check_pattern), "(n, m) of N:M sparsity: how many of how many survive"),
    Option(
        "group_dim",
        None,
        _dims,
        "the dimensions that index the groups. None: elements. 1: input channels of a Conv or Linear weight. 0: output"
        " channels. (0, 1): kernels. (): the tensor",
    ),
    Option(
        "group_block",
        1,
        at_least_one,
        "how many consecutive indices of group_dim make one group, such as the rows of an attention head, >= 1",
    ),
    Option(
        "coupling",
        None,
        _coupling,
        "the coupled group of each index of group_dim, a tuple of ints: equal ones are one group, also across weights;"
        " a negative one belongs to none",
    ),
    Option("coupling_name", "coupled", _name, "equal integers of coupling under one name are one group"),
    Option("group_scale", False, None, "multiply lam by sqrt(group size)"),
    Option("group_lasso", 0.0, _number("group_lasso value"), "strength of group_lasso * sum ||w_G||, >= 0"),
    Option(
        "decoupled",
        True,
        None,
        "the gap pulls the weights before the step (True) or is added to the gradient, through momentum (False)",
    ),
    Option(
        "method",
        "rvsm",
        choice(tuple(METHODS)),
        "'rvsm': w is pulled to u = prox(w). 'rvsm-delayed': to the u of the step before. 'admm': with its multiplier."
        " The last two keep a state as large as the weight",
    ),
    Option("hold_zeros", False, _switch, "an element that is 0 stays 0, and so do its states"),
    Option("maximize", False, None, "turn the gradient of the loss around"),
)
"""The options of the splitting, whatever the base."""

UNIT_NORM = Option("unit_norm", False, None, "w <- w / ||w|| of each whole tensor at the end of the step")

PRECISION_OPTIONS = (
    Option(
        "master_weights",
        False,
        None,
        "float32 weights behind parameters of a half type: 2 bytes more of bfloat16, 4 of float16",
    ),
    Option(
        "rounding",
        "nearest",
        choice(("nearest", "stochastic")),
        "how a half-type parameter without a master is rounded; 'stochastic' is right in the mean",
    ),
    Option("seed", 0, _seed, "of the random bits of rounding, an integer >= 0"),
    Option("state_dtype", None, choice(tuple(STATE_TYPES), or_none=True), "of the base's states; None: as torch"),
)
"""What weights and states are stored in; see :mod:`rvsm_kernels.method.precision`."""

OPTIONS = (*SGD_OPTIONS, *SPLIT_OPTIONS, UNIT_NORM, *PRECISION_OPTIONS)
"""Every option of :class:`rvsm_kernels.RVSM`: each key of a param group that its step reads, ``params`` aside."""


def names_of(options: Iterable[Option]) -> tuple[str, ...]:
    """The names of some options, in their order."""
    return tuple(option.name for option in options)


OPTION_NAMES = tuple(dict.fromkeys(names_of((*OPTIONS, *ADAMW_OPTIONS))))
"""The name of every option of any optimizer."""


# ---- a whole group ---------------------------------------------------------------------------------------------------


def check_values(options: Iterable[Option], group: Mapping[str, Any]) -> None:
    """Check each of some options in a group by itself.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range, or an unknown name.
    """
    for option in options:
        if option.check is not None:
            option.check(option.name, group[option.name])


def check_sgd(group: Mapping[str, Any]) -> None:
    """Raise ValueError for options of SGD that exclude each other."""
    if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
        raise ValueError("Nesterov momentum requires a momentum and zero dampening")


def check_split(group: Mapping[str, Any]) -> None:
    """Raise ValueError for options of the splitting that need each other."""
    if group["group_lasso"] != 0 and group["group_dim"] is None:
        lasso = float(group["group_lasso"])
        raise ValueError(f"Invalid group_lasso value: {lasso}: group_lasso needs a group_dim")
    grouping_of(group)
    if group["coupling"] is not None:
        _check_coupling(group)
    if group["penalty"] == "topk" and group["density"] is None:
        raise ValueError("penalty='topk' needs a density: the share of elements or groups that survive")
    if group["penalty"] == "nm":
        if group["pattern"] is None:
            raise ValueError(NO_PATTERN)
        for name, nothing in (("group_dim", None), ("group_block", 1), ("group_scale", False), ("density", None)):
            if group[name] != nothing:
                raise ValueError(
                    f"Invalid {name} value: {shown(group[name])}: penalty='nm' keeps elements of windows along"
                    f" dimension 1, and takes no {name}"
                )


def _check_coupling(group: Mapping[str, Any]) -> None:
    dims = as_dims(group["group_dim"])
    if dims is None or len(dims) != 1:
        raise ValueError(f"coupling needs a group_dim of one dimension, not {group['group_dim']!r}")


def unknown_option(key: str, names: Collection[str], where: str) -> str:
    """What to say of an option that does not exist.

    Args:
        names: those that exist.
        where: who was given it.
    """
    if key == "structure":
        return f"{where} has no option 'structure': it belongs to rvsm_kernels.param_groups(model, structure=...)"
    near = difflib.get_close_matches(key, names, 1, 0.6)
    return f"{where} has no option {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")


PLAIN_TYPES = (float, bool, str, type(None), int)
"""What most values are: they need no conversion, and asking for their type costs less than isinstance()."""


def _plain(value: Any) -> Any:
    if type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0:
        return value.item()
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value
    if isinstance(value, (bool, torch.Tensor)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def make_plain(group: MutableMapping[str, Any], names: Iterable[str] = OPTION_NAMES) -> None:
    """Replace the numbers of numpy and of other libraries in a group by Python's.

    They compute alike, but ``torch.load(weights_only=True)`` refuses a checkpoint that has them.
    """
    for key in names:
        if key in group and type(group[key]) not in PLAIN_TYPES:
            group[key] = _plain(group[key])


# ---- has an option changed? ------------------------------------------------------------------------------------------


def snapshot(values: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Values to compare with later ones by :func:`may_differ`, None for values that only their reader can compare.

    A list is copied, for it can be edited in place; a tensor can be too. What a tensor on a device holds is the
    kernels' affair: only another tensor in its place is a change.
    """
    types = set(map(type, values))
    if any(issubclass(t, torch.Tensor) for t in types) and any(map(_can_change_unseen, values)):
        return None
    return tuple([list(v) if isinstance(v, list) else v for v in values]) if list in types else values


def may_differ(values: tuple[Any, ...], before: tuple[Any, ...] | None) -> bool:
    """Whether values may have changed since their :func:`snapshot`; with a host's tensor among them they always may."""
    if before is None:
        return True
    if torch.Tensor in map(type, values) or torch.Tensor in map(type, before):
        return any(map(_can_change_unseen, values)) or any(map(_is_other, values, before))
    return values != before


def _can_change_unseen(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not is_on_device(value)


def _is_other(value: Any, before: Any) -> bool:
    """Whether a value differs from an earlier one; tensors are compared as objects."""
    either = isinstance(value, torch.Tensor) or isinstance(before, torch.Tensor)
    return value is not before if either else value != before
