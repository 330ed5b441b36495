"""The reference engine: the method in plain PyTorch, short enough to be read as its specification.

``decoupled=True`` is: pull the weights, then the step of the base (``torch.optim.SGD``); ``decoupled=False`` is: add
beta * (w - u) to the gradient, then the step of the base. Half types are computed in float32 and stored in their type,
as the kernels do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..method.dtypes import to_opmath
from ..method.groups import grouping_of, magnitudes, once
from ..method.memory import kind_of, named, turns_of, whole
from ..method.parameters import param_name, with_gradient
from ..method.penalties import PENALTIES
from ..method.precision import MASTER_STATES, has_master, join, new_master, store, store_rounded
from ..method.prox import prox, threshold
from ..method.selection import keep_above
from ..method.split import is_nm, strength
from ..method.step_options import StepOptions
from ..method.windows import keep_largest
from .checks import check_entry, check_norms
from .counters import advance, counts_of
from .interface import Engine, Group, Ready, StepInputs
from .measured import norms_for, write_statistics
from .windows import keep_largest_, value_of_windows

States = dict[str, Tensor | None]
"""The states of a parameter by name, None for one that begins with zeros."""


def _batches(group: Mapping[str, Any]) -> Iterator[list[Tensor]]:
    """The parameters of a group that a step moves, divided so that torch can step each list by one foreach call.

    Tensors that share memory come in different lists, in their order; torch does not mix kinds of tensors in one call,
    nor DTensors of different meshes.
    """
    params = [p for _, p in with_gradient(group)]
    batches: dict[Any, list[Tensor]] = {}
    for p, turn in zip(params, turns_of(params), strict=True):
        batches.setdefault((turn, kind_of(p), getattr(p, "device_mesh", None)), []).append(p)
    yield from (batches[key] for key in sorted(batches, key=lambda key: key[0]))


def find_states(p: Tensor, options: StepOptions, inputs: StepInputs) -> States:
    """The states of a parameter; one of another dtype is replaced by its conversion."""
    types = options.states_of(p.dtype)
    states: States = {name: inputs.state_of(p, name) for name in types}
    for name, state in states.items():
        if state is not None and state.dtype != types[name]:
            states[name] = inputs.states[p][name] = state.to(types[name])
    return states


def _find_masters(params: Sequence[Tensor], states: Sequence[States], options: StepOptions) -> list[Tensor | None]:
    """The state behind each half-type parameter with master weights, None for the others; zeros where it is missing."""
    masters: list[Tensor | None] = []
    for p, of_p in zip(params, states, strict=True):
        if has_master(options.values, p.dtype):
            found = of_p[MASTER_STATES[p.dtype][0]]
            masters.append(new_master(p) if found is None else found)
        else:
            masters.append(None)
    return masters


def step_params(
    params: Sequence[Tensor],
    states: Sequence[States],
    counts: Sequence[int],
    options: StepOptions,
    inputs: StepInputs,
    moves: bool,
) -> None:
    """One step of parameters of one param group: section 3 of docs/method.md, line by line.

    Args:
        states, counts: of each parameter.
        moves: whether lr is not 0; else neither w nor the state of the method moves.
    """
    values, method = options.values, options.method
    lr, beta, groups = values["lr"], values["beta"], grouping_of(values)
    masters = _find_masters(params, states, options)
    w = [join(p.detach(), master) for p, master in zip(params, masters, strict=True)]
    g = [p.grad.detach().to(x.dtype) for p, x in zip(params, w, strict=True) if p.grad is not None]
    if inputs.grad_scale is not None:
        g = [x * inputs.grad_scale.to(x.device, x.dtype).reciprocal() for x in g]
    held = [x == 0 for x in w] if values["hold_zeros"] else None
    g = _unless_held(g, held)
    sign = -1.0 if options.turns_terms else 1.0
    if values["maximize"] and not options.turns_terms:
        g = list(torch._foreach_neg(g))

    if options.lasso:
        norms = [norms_for(p, x, options, inputs, row=1) for p, x in zip(params, w, strict=True)]
        unit = [x / torch.where(r == 0, torch.ones_like(r), r) for x, r in zip(w, norms, strict=True)]
    if options.split:
        method_states = [] if method.state is None else _or_zeros(params, states, method.state, options)
        before = [to_opmath(x) for x in method_states]
        v = list(torch._foreach_add(w, before)) if method.adds_state else w
        found = v
        if method.state is not None:
            before, v = _unless_held(before, held), _unless_held(v, held)
        # Norms of groups are of what was found, also where that is held.
        of_each = zip(params, v if groups is None else found, strict=True)
        norms = [norms_for(p, x, options, inputs, row=0) for p, x in of_each]
        if options.pattern is not None:
            u = _unless_held([keep_largest(x, options.pattern) for x in found], held)
        elif options.topk:
            u = [keep_above(x, r, inputs.cuts[p]) for x, r, p in zip(v, norms, params, strict=True)]
        else:
            taus = [strength(values, x.shape) / beta for x in v]
            u = [
                threshold(x, r, values["penalty"], tau, values["a"], groups)
                for x, r, tau in zip(v, norms, taus, strict=True)
            ]
        gap, after = method.gap(w, v, u, before)
        if moves:
            for x, new_x in zip(method_states, after, strict=True):
                x.copy_(new_x)
        if values["decoupled"]:
            torch._foreach_add_(w, gap, alpha=-lr * beta)
        else:
            g = list(torch._foreach_add(g, gap, alpha=sign * beta))
    if options.lasso:
        g = list(torch._foreach_add(g, unit, alpha=sign * float(values["group_lasso"])))

    names = options.states[: options.base_states]
    stored = [[of_p[name] for of_p in states] for name in names]
    computed = [[s if s is None else s.to(x.dtype) for s, x in zip(state, w, strict=True)] for state in stored]
    computed = [_unless_held(state, held) for state in computed]
    options.base.step(w, g, computed, values, counts)

    for p, of_p, x, d, master, steps in zip(params, states, w, g, masters, counts, strict=True):
        if options.rounds(p.dtype):
            store_rounded(p, x, values["seed"], steps)
        elif x.dtype != p.dtype:  # else x is p: the step was in place
            store(p, x, master)
        if master is not None and of_p[MASTER_STATES[p.dtype][0]] is None:
            inputs.states[p][MASTER_STATES[p.dtype][0]] = master
        if options.writes_gradient and p.grad is not None:
            p.grad.copy_(d)
    for name, old, new in zip(names, stored, computed, strict=True):
        for p, state, value in zip(params, old, new, strict=True):
            assert value is not None  # the base has filled it in
            if state is None:
                inputs.states[p][name] = torch.empty_like(p, dtype=options.states_of(p.dtype)[name]).copy_(value)
            elif state is not value:  # else the step was in place
                state.copy_(value)
    if options.split and method.state is not None:
        for p, of_p, used in zip(params, states, method_states, strict=True):
            if of_p[method.state] is None:
                of_p[method.state] = inputs.states[p][method.state] = used


def _unless_held(loaded: Sequence[Any], held: Sequence[Tensor] | None) -> list[Any]:
    """Gradients or states with 0 where an element is held; a state that begins with zeros is None, and stays so."""
    if held is None:
        return list(loaded)
    return [x if x is None else x.masked_fill(zeros, 0) for x, zeros in zip(loaded, held, strict=True)]


def _or_zeros(params: Sequence[Tensor], states: Sequence[States], name: str, options: StepOptions) -> list[Tensor]:
    """One state of some parameters, zeros where it is missing."""
    found = [of_p[name] for of_p in states]
    return [
        torch.zeros_like(p, dtype=options.states_of(p.dtype)[name]) if x is None else x
        for p, x in zip(params, found, strict=True)
    ]


class ReferenceEngine(Engine):
    """Serves every device that torch serves."""

    name = "reference"
    _prepared: tuple[Sequence[Group], StepInputs] | None = None

    def prepare(self, groups: Sequence[Group], inputs: StepInputs) -> Ready:
        lacks_u = False
        inputs = dataclasses.replace(inputs, options=[options.on_host() for options in inputs.options])
        for i, (group, options) in enumerate(zip(groups, inputs.options, strict=True)):
            for j, p in enumerate(group["params"]):
                if p.grad is not None:
                    states = {name: inputs.state_of(p, name) for name in options.states_of(p.dtype)}
                    counter = None if options.counter is None else inputs.state_of(p, options.counter)
                    check_entry(p, group, i, j, states, counter)
                    if p in inputs.norms and options.grouping is not None and p.numel() > 0:
                        check_norms(inputs.norms[p], p, options)
                    starts_from_u = options.method.starts_from_u and p.numel() > 0
                    lacks_u |= starts_from_u and states[options.states[-1]] is None
        if lacks_u:
            return Ready.LACKS
        self._prepared = groups, inputs
        return Ready.YES

    def launch(self) -> None:
        assert self._prepared is not None
        groups, inputs = self._prepared
        self.drop()
        if inputs.found_inf is not None and inputs.found_inf.item() > 0:
            return
        for i, (group, options) in enumerate(zip(groups, inputs.options, strict=True)):
            states = {p: find_states(p, options, inputs) for _, p in with_gradient(group)}
            for params in _batches(group):
                try:
                    if options.counter is not None:  # of a parameter that occurs twice, as its last turn has left them
                        states = {p: find_states(p, options, inputs) for p in params}
                    counts = counts_of(params, options, inputs)
                    moves = options.values["lr"] != 0
                    if inputs.statistics:
                        write_statistics(params, options, inputs)
                    step_params(params, [states[p] for p in params], counts, options, inputs, moves)
                    advance(params, options, inputs)
                except (AssertionError, NotImplementedError, RuntimeError) as error:
                    j = next(j for j, p in enumerate(group["params"]) if p is params[0])
                    raise named(error, params[0], param_name(group, i, j)) from error

    def drop(self) -> None:
        self._prepared = None

    def prox_(self, params: Sequence[Tensor], group: Mapping[str, Any]) -> None:
        if is_nm(group):
            keep_largest_(params, group)
            return
        for p in params:
            tau = strength(group, p.shape) / group["beta"]
            p.copy_(prox(p, group["penalty"], tau, group["a"], grouping_of(group)))

    def penalty_value(self, params: Sequence[Tensor], group: Mapping[str, Any]) -> Tensor:
        if is_nm(group):
            return value_of_windows(params, group)
        total = torch.zeros((), dtype=torch.float64, device=params[0].device)
        groups = grouping_of(group)
        for p in params:
            w, lam = to_opmath(whole(p)), strength(group, p.shape)
            u = prox(w, group["penalty"], lam / group["beta"], group["a"], groups)
            value = PENALTIES[group["penalty"]].value(once(magnitudes(u.double(), groups), groups), group["a"])
            total += lam * value.sum() + group["beta"] / 2 * (w.double() - u.double()).square().sum()
        return total
