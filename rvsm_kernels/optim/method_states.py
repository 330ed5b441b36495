"""The states of the methods (u, dual) that an optimizer makes, copies or forgets; the engines do the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..engines.checks import check_state
from ..engines.interface import StepInputs
from ..method.methods import STATES
from ..method.parameters import param_name, with_gradient
from ..method.precision import MASTER_STATES, master_name
from ..method.split import state_name
from ..method.step_options import StepOptions

Groups = Sequence[Mapping[str, Any]]
FirstU = Callable[[Tensor, Mapping[str, Any], str], Tensor]
"""Makes u of the weights of (parameter, its group, its name), in the parameter's type and layout."""


class NewStates:
    """States of methods that a step begins with and that ``optimizer.state`` does not have yet.

    A step reads and writes ``inputs.instead`` first; nothing is in ``optimizer.state`` before the step goes on.
    """

    def __init__(self, inputs: StepInputs, first_u: FirstU) -> None:
        self._inputs, self._first_u = inputs, first_u
        self._instead: dict[Tensor, dict[str, Tensor]] = {}
        self._new: dict[Tensor, tuple[str, Tensor]] = {}
        inputs.instead = self._instead

    def __bool__(self) -> bool:
        return bool(self._new)

    def add_first_u(self, groups: Groups, options: Sequence[StepOptions]) -> None:
        """Make the first u of every parameter whose method starts from u, and that has no u yet.

        Args:
            options: of the groups.
        """
        for i, (group, step) in enumerate(zip(groups, options, strict=True)):
            key = step.method.state
            if key is not None and step.method.starts_from_u:
                for j, p in with_gradient(group):
                    if self._inputs.state_of(p, key) is None:
                        u = self._first_u(p, group, param_name(group, i, j))
                        self._new[p] = key, u
                        self._instead[p] = {key: u}

    def copy_where_lr_is_0(self, groups: Groups) -> None:
        """Copies for the step to write to where lr is 0: neither w nor the state of its method moves then.

        Raises:
            RuntimeError, TypeError: a state that does not fit its parameter.
        """
        for i, (group, options) in enumerate(zip(groups, self._inputs.options, strict=True)):
            key = options.method.state
            if key is None or options.values["lr"] != 0:
                continue
            for j, p in with_gradient(group):
                name = param_name(group, i, j)
                state = self._inputs.state_of(p, key)
                if state is not None:
                    check_state(state, p, name, key)
                else:
                    starts_from_u = options.method.starts_from_u
                    state = self._first_u(p, group, name) if starts_from_u else zeros_for(p, options, key)
                    self._new[p] = key, state
                self._instead[p] = {key: state.to(options.states_of(p.dtype)[key], copy=True)}

    def put(self) -> None:
        """Put the new states into ``optimizer.state``."""
        for p, (key, state) in self._new.items():
            self._inputs.states[p][key] = state


def zeros_for(p: Tensor, options: StepOptions, name: str) -> Tensor:
    """A state that begins with zeros, in its type and the parameter's layout."""
    return torch.zeros_like(p, dtype=options.states_of(p.dtype)[name])


_MASTERS = tuple(name for name, _ in MASTER_STATES.values())


def drop_obsolete(groups: Groups, states: MutableMapping[Tensor, Any]) -> None:
    """Forget states that no method and no master has any more: they would be stale if it were switched on again."""
    for group in groups:
        name = state_name(group)
        for p in group["params"]:
            of_p = states.get(p)
            for key in (*STATES, *_MASTERS):
                if of_p and key in of_p and key not in (name, master_name(group, p.dtype)):
                    del of_p[key]


def check_loaded(groups: Groups, states: Mapping[Any, Any]) -> None:
    """Raise ValueError for a checkpoint that has state for a parameter, but not the state of its method.

    Args:
        groups: as they will be, with ids or tensors in ``params``.
        states: by the same ids or tensors.
    """
    for i, group in enumerate(groups):
        name = state_name(group)
        if name is None:
            continue
        for j, key in enumerate(group["params"]):
            of_p = states.get(key) or {}
            if name not in of_p and any(value is not None for value in of_p.values()):
                raise ValueError(
                    f"the checkpoint has no {name} for {param_name(group, i, j)}, which"
                    f" method={group['method']!r} keeps (it has {', '.join(of_p)}); to begin with a new one, load it"
                    " with method='rvsm' and edit the method after that"
                )
