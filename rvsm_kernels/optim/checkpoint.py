"""Checkpoints between groupings: of torch.optim.SGD, of other param groups, and back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..method.bases import Base
from ..method.options import may_differ, names_of, snapshot

_PLACES = ("params", "param_names", "param_order")
_ADVICE = (
    "build both optimizers from the same groups: torch.optim.SGD takes the ones that"
    " rvsm_kernels.param_groups(model, ...) returns, and names (model.named_parameters()) map any others"
)

Groups = Sequence[Mapping[str, Any]]


def refuse_no_checkpoint(state_dict: Mapping[str, Any]) -> None:
    """Raise ValueError for a mapping without what every optimizer saves."""
    missing = [key for key in ("param_groups", "state") if key not in state_dict]
    if missing:
        has = ", ".join(map(str, list(state_dict)[:4])) or "nothing"
        raise ValueError(f"this is no optimizer's state_dict(): it has no {' and no '.join(missing)}, but {has}")


def _refuse_others(groups: Groups, base: Base, kind: str) -> None:
    """Raise ValueError for a checkpoint of another kind of optimizer: its options would stay in the groups."""
    for i, group in enumerate(groups):
        missing = [key for key in names_of(base.options) if key not in group]
        if missing:
            ours = names_of(base.all_options)
            strange = [key for key in group if key not in (*ours, *_PLACES)]
            raise ValueError(
                f"this is no checkpoint of {kind} or {base.torch_name}: its group {i} has no {', '.join(missing)}"
                + (f", but {', '.join(map(str, strange))}" if strange else "")
            )
        if group.get("decoupled_weight_decay") is False and group["weight_decay"] != 0:
            raise ValueError(
                f"this is a checkpoint of torch.optim.Adam, whose weight decay (group {i}) passes through the moments;"
                f" that of {kind} does not"
            )


def _names(groups: Groups) -> list[str] | None:
    """The names of all parameters; None where some have no name, or two have the same."""
    names: list[str] = []
    for group in groups:
        of_group = group.get("param_names")
        if of_group is None or len(of_group) != len(group["params"]):
            return None
        names += of_group
    return names if len(set(names)) == len(names) else None


def _order(groups: Groups) -> list[int] | None:
    """The place of each parameter in model.parameters(), None where that is not known."""
    places: list[int] = []
    for group in groups:
        of_group = group.get("param_order")
        if of_group is None or len(of_group) != len(group["params"]):
            return None
        places += of_group
    return places if sorted(places) == list(range(len(places))) else None


def regrouped(state_dict: Mapping[str, Any], groups: Groups, base: Base, kind: str) -> dict[str, Any] | None:
    """A checkpoint in the groups of an optimizer that has others.

    Args:
        state_dict: ``state`` and ``param_groups``, as torch.optim saves them.
        groups: the param groups of the optimizer.
        base: its base.
        kind: the name of its class.

    Returns:
        None where the checkpoint fits as it is. Parameters are found by their names where both sides have the same,
        else by their order in ``model.parameters()``: a checkpoint of one group has it, and groups of
        :func:`rvsm_kernels.param_groups` note it.

    Raises:
        ValueError: another kind of optimizer; parameters that cannot be mapped; options that differ within a group.
    """
    refuse_no_checkpoint(state_dict)
    saved = state_dict["param_groups"]
    _refuse_others(saved, base, kind)
    theirs, ours = _names(saved), _names(groups)
    same = [len(g["params"]) for g in saved] == [len(g["params"]) for g in groups]
    by_name = theirs is not None and ours is not None and set(theirs) == set(ours)
    params = [p for group in groups for p in group["params"]]
    keys = [key for group in saved for key in group["params"]]
    if same and (not by_name or theirs == ours):
        _check_states(keys, params, state_dict["state"], ours)
        return None
    count = sum(len(group["params"]) for group in groups)
    if by_name:
        assert theirs is not None and ours is not None
        at = {name: k for k, name in enumerate(theirs)}
        places = [at[name] for name in ours]
    else:
        if len(keys) != count:
            raise ValueError(
                f"the checkpoint has {len(keys)} parameters in {len(saved)} group(s), the optimizer {count} in"
                f" {len(groups)}: parameter groups of different models do not map; {_ADVICE}"
            )
        order = _order(groups)
        their_order = _order(saved) or (list(range(count)) if len(saved) == 1 else None)
        if order is None and len(groups) == 1:
            order = list(range(count))
        if order is None or their_order is None:
            raise ValueError(
                f"the checkpoint has {len(saved)} parameter group(s), the optimizer {len(groups)}, and neither names"
                f" nor the order of model.parameters() tell which parameter is which; {_ADVICE}"
            )
        at_place = {place: k for k, place in enumerate(their_order)}
        places = [at_place[place] for place in order]
    _check_states([keys[k] for k in places], params, state_dict["state"], ours)
    group_of = [i for i, group in enumerate(saved) for _ in group["params"]]
    new, begin = [], 0
    for i, group in enumerate(groups):
        taken = places[begin : begin + len(group["params"])]
        begin += len(taken)
        options = _options(i, [saved[k] for k in dict.fromkeys(group_of[k] for k in taken)], group)
        beside = {key: group[key] for key in _PLACES[1:] if key in group}
        new.append({**options, **beside, "params": [keys[k] for k in taken]})
    return {**state_dict, "param_groups": new}


def _check_states(keys: Sequence[Any], params: Sequence[Tensor], state: Mapping[Any, Any], names: Any) -> None:
    """Raise ValueError unless the states of a checkpoint have their parameters' shapes, and count steps from 0 on."""
    for k, (key, p) in enumerate(zip(keys, params, strict=True)):
        for what, value in (state.get(key) or {}).items():
            name = names[k] if names is not None else f"parameter {k}"
            # A tensor without values (meta, fake) counts nothing.
            readable = not isinstance(value, Tensor) or (type(value) is Tensor and not value.is_meta)
            if what == "step" and readable and not 0 <= float(value) < math.inf:
                raise ValueError(f"the checkpoint's step for {name} is {float(value):g}; it counts steps, from 0 on")
            if isinstance(value, Tensor) and value.dim() > 0 and value.shape != p.shape:
                raise ValueError(
                    f"the checkpoint's {what} for {name} has shape {list(value.shape)}, the parameter {list(p.shape)}:"
                    f" these are parameters of another model, or in another order; {_ADVICE}"
                )


def _options(index: int, sources: Groups, group: Mapping[str, Any]) -> dict[str, Any]:
    """The options that the groups of a checkpoint agree on; they become those of one group."""
    if not sources:  # a group without parameters
        return {key: value for key, value in group.items() if key not in _PLACES}
    options = {key: value for key, value in sources[0].items() if key not in _PLACES}
    for other in sources[1:]:
        for key, value in options.items():
            if key in other and may_differ((other[key],), snapshot((value,))):
                raise ValueError(
                    f"group {index} takes its parameters from groups of the checkpoint with {key}={value!r} and"
                    f" {key}={other[key]!r}; {_ADVICE}"
                )
    return options


def to_torch_state_dict(optimizer: Any, model: nn.Module) -> dict[str, Any]:
    """The state of an optimizer as torch's own loads it, over ``model.parameters()``: one group, in the model's order.

    Args:
        optimizer: an RVSM (for ``torch.optim.SGD``) or RVSMAdamW (for ``torch.optim.AdamW``) over the parameters of the
            model. The states of its methods (``u``, ``dual``) and the penalties stay behind.
        model: gives the order of the parameters.

    Returns:
        A state dict. Tensors are shared with the optimizer, as in ``optimizer.state_dict()``.

    Raises:
        ValueError: the parameters are not those of the model, or lr, weight_decay, ... differ between groups: build
            torch's optimizer from the same groups then, and load ``optimizer.state_dict()``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"to_torch_state_dict takes the optimizer, then the model, but got a {type(model).__name__}")
    names = {id(p): name for name, p in model.named_parameters()}
    groups = optimizer.param_groups
    held = {id(p): group for group in groups for p in group["params"]}
    missing = [name for i, name in names.items() if i not in held]
    if missing or len(held) != len(names):
        what = f"{missing[0]} is not in the optimizer" if missing else "the optimizer has parameters that are not in it"
        raise ValueError(f"the optimizer's parameters are not those of the model: {what}")
    options: dict[str, Any] = {}
    base = optimizer._base
    for key in (*names_of(base.options), "maximize"):
        values = [group[key] for group in groups]
        if any(_as_numbers(value) != _as_numbers(values[0]) for value in values[1:]):
            raise ValueError(
                f"the groups differ in {key} ({_listed(values)}), which one group of {base.torch_name} cannot hold;"
                f" build {base.torch_name.split('.')[-1]} from the same groups, and load optimizer.state_dict()"
            )
        options[key] = values[0]
    state = {}
    for k, p in enumerate(model.parameters()):
        of_p = optimizer.state.get(p, {})
        kept = (*base.states(options), base.counter)
        found = {key: of_p[key] for key in kept if of_p.get(key) is not None}
        if found:
            state[k] = found
    beside = {"foreach": None, "differentiable": False, "fused": None}
    if base.counter is not None:
        beside |= {"capturable": False, "decoupled_weight_decay": True}
    return {"state": state, "param_groups": [{**options, **beside, "params": list(range(len(held)))}]}


def _as_numbers(value: Any) -> Any:
    return tuple(map(float, value)) if isinstance(value, (tuple, list)) else float(value)


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(str(v) for v in dict.fromkeys(map(_as_numbers, values)))
