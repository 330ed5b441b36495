"""The options of a param group: their names, their checks, and the numbers that follow from them."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Collection, Mapping, MutableMapping
from typing import Any

import torch

from .method.groups import group_size, kept_dims
from .method.penalties import PENALTIES

OPTIONS = (
    "lr momentum dampening weight_decay nesterov maximize "
    "penalty lam beta a density group_dim group_scale group_lasso decoupled method unit_norm"
).split()
"""Every key of a param group that the step reads, ``params`` aside."""

METHODS = ("rvsm", "rvsm-delayed", "admm")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def snapshot(values: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Options to compare with later ones by :func:`differ`: a list is copied, for it can be edited in place."""
    types = set(map(type, values))
    if any(issubclass(t, torch.Tensor) for t in types):
        return None
    return tuple([list(v) if isinstance(v, list) else v for v in values]) if list in types else values


def differ(values: tuple[Any, ...], seen: tuple[Any, ...] | None) -> bool:
    """Whether options may have changed since their snapshot. A tensor can change in place, so it always may."""
    return seen is None or torch.Tensor in map(type, values) or values != seen


def shown(value: Any) -> str:
    """A value that does not belong where it stands, in a few words: never a screen of weights."""
    text = repr(value) if not isinstance(value, (torch.Tensor, list, tuple, dict, set)) or len(str(value)) < 40 else ""
    return text if 0 < len(text) <= 60 else f"a {type(value).__name__}"


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


def make_plain(group: MutableMapping[str, Any]) -> None:
    """Replace the numbers of numpy and of other libraries in a group by Python's own.

    They compute alike, but ``torch.load(weights_only=True)`` refuses a checkpoint that has them.
    """
    for key in OPTIONS:
        if key in group:
            group[key] = _plain(group[key])


def unknown_option(key: str, known: Collection[str], where: str) -> str:
    """What to say of an option that does not exist.

    Args:
        where: who was given it.
    """
    if key == "structure":
        return f"{where} has no option 'structure': it belongs to rvsm_kernels.param_groups(model, structure=...)"
    near = difflib.get_close_matches(key, known, 1, 0.6)
    return f"{where} has no option {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def _number(group: Mapping[str, Any], key: str, what: str, *, above: float | None = None) -> float:
    """The option as a finite float >= 0 (or > above), or an error in torch.optim's wording."""
    value = group[key]
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise ValueError(f"Tensor {key} must be 1-element")
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"Invalid {what}: {shown(value)} (a number is needed)")
    number = float(value)
    in_range = number >= 0.0 if above is None else number > above
    if not (in_range and math.isfinite(number)):
        raise ValueError(f"Invalid {what}: {value}")
    return number


def validate(group: Mapping[str, Any]) -> None:
    """Check every option of a param group; nothing is changed.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range, an unknown name, or options that exclude each other.
    """
    _number(group, "lr", "learning rate")
    momentum = _number(group, "momentum", "momentum value")
    _number(group, "weight_decay", "weight_decay value")
    dampening = group["dampening"]
    if isinstance(dampening, bool) or not isinstance(dampening, numbers.Real):
        raise TypeError(f"Invalid dampening value: {shown(dampening)} (a number is needed)")
    if not math.isfinite(dampening):
        raise ValueError(f"Invalid dampening value: {dampening}")
    if group["nesterov"] and (momentum <= 0 or dampening != 0):
        raise ValueError("Nesterov momentum requires a momentum and zero dampening")

    penalty = group["penalty"]
    known = (*PENALTIES, "topk")
    if penalty is not None and penalty not in known:
        raise ValueError(f"Invalid penalty: {shown(penalty)} (choose one of None, {', '.join(map(repr, known))})")
    _number(group, "lam", "lam value")
    _number(group, "beta", "beta value")
    _number(group, "a", "a value", above=0.0)
    lasso = _number(group, "group_lasso", "group_lasso value")
    if lasso != 0 and group["group_dim"] is None:
        raise ValueError(f"Invalid group_lasso value: {lasso}: group_lasso needs a group_dim")
    if group["density"] is not None and _number(group, "density", "density value", above=0.0) > 1:
        raise ValueError(f"Invalid density value: {group['density']}")
    if group["method"] not in METHODS:
        raise ValueError(f"Invalid method: {shown(group['method'])} (choose one of {', '.join(map(repr, METHODS))})")

    if penalty == "topk" and group["density"] is None:
        raise ValueError("penalty='topk' needs a density: the share of elements or groups that survive")


def is_left_alone(p: torch.Tensor) -> bool:
    """Whether a parameter is frozen and of a kind that no optimizer could train (int8, bool, complex, sparse, ...)."""
    return not p.requires_grad and p.grad is None and (p.dtype not in DTYPES or p.layout != torch.strided)


def validate_param(p: torch.Tensor, group: Mapping[str, Any], name: str) -> None:
    """Check that a parameter can be trained with the options of its group.

    Raises:
        TypeError: a dtype or layout without a kernel, of a parameter that is trained.
        ValueError: a ``group_dim`` that the tensor does not have.
    """
    if torch.nn.parameter.is_lazy(p) or is_left_alone(p):
        return  # it has no shape and no gradient yet, or never will
    if p.layout != torch.strided:
        raise TypeError(f"RVSM does not support parameters of layout {p.layout} ({name})")
    if p.dtype not in DTYPES:
        raise TypeError(f"RVSM does not support parameters of dtype {p.dtype} ({name})")
    kept_dims(group["group_dim"], p.dim(), name)


def refuse_expanded(p: torch.Tensor, name: str) -> None:
    """Raise RuntimeError for a parameter that cannot be written element by element."""
    if p.numel() > 0 and any(n > 1 and stride == 0 for n, stride in zip(p.shape, p.stride(), strict=True)):
        raise RuntimeError(f"{name} is expanded: several of its elements are one in memory")


def param_name(group: Mapping[str, Any], group_index: int, param_index: int) -> str:
    """A parameter's own name where it was given, else its place."""
    names = group.get("param_names")
    if names is None or param_index >= len(names):
        return f"parameter {param_index} of group {group_index}"
    return names[param_index]


def is_split(group: Mapping[str, Any]) -> bool:
    """Whether the group has a splitting at all: with no penalty, lam = 0 or beta = 0, u is w."""
    return group["penalty"] is not None and group["lam"] > 0 and group["beta"] > 0


def strength(group: Mapping[str, Any], shape: torch.Size) -> float:
    """lam of one tensor: lam, or lam * sqrt(group size) with ``group_scale``."""
    lam = float(group["lam"])
    return lam * math.sqrt(group_size(shape, group["group_dim"])) if group["group_scale"] else lam
