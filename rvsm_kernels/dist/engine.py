"""The engine of sharded parameters: any engine, which is shown each rank's shards in the place of DTensors.

Elementwise work needs nothing else: a shard is stepped as the whole would be, bit for bit. The norms of groups that lie
on several ranks are made before (:mod:`rvsm_kernels.dist.norms`), in one all-reduce for each mesh.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..engines.interface import Engine, Group, Ready, StepInputs
from ..method.dtypes import to_opmath
from ..method.groups import from_memory_order, group_dims, group_size
from ..method.parameters import param_name
from ..method.prox import threshold
from ..method.split import strength, strength_of_size
from ..method.step_options import StepOptions
from .norms import SharedNorms, only, rows_of
from .shards import gradient_of, note_writes, ranks_of_groups, refuse_partial, shard_of, sharded_like, shards_of
from .sums import add_by_ranks, value_across


@dataclass
class _Local:
    """What an engine is shown of a step over DTensors: groups of shards, and what stands beside them."""

    grad_scale: Tensor | None
    found_inf: Tensor | None
    groups: list[dict[str, Any]] = field(default_factory=list)
    options: list[StepOptions] = field(default_factory=list)
    states: dict[Tensor, dict[str, Any]] = field(default_factory=dict)
    instead: dict[Tensor, dict[str, Any]] = field(default_factory=dict)
    cuts: dict[Tensor, Tensor] = field(default_factory=dict)
    norms: dict[Tensor, Tensor] = field(default_factory=dict)
    _places: dict[tuple[int, int], int] = field(default_factory=dict)

    def group_of(self, i: int, group: Group, options: StepOptions) -> dict[str, Any]:
        """The group of shards for parameters of group ``i`` with these options."""
        place = self._places.setdefault((i, id(options)), len(self.groups))
        if place == len(self.groups):
            self.groups.append({**group, "params": [], "param_names": []})
            self.options.append(options)
        return self.groups[place]

    def inputs(self) -> StepInputs:
        """The inputs of the step."""
        states: Any = self.states
        return StepInputs(
            self.grad_scale, self.found_inf, self.options, states, self.instead, self.cuts, self.norms
        )


class ShardEngine(Engine):
    """Serves DTensors by the shards that this rank has of them.

    Args:
        engine: steps the shards.
    """

    def __init__(self, engine: Engine) -> None:
        self.name = f"{engine.name}, by shards"
        self._engine = engine
        self._states: dict[Tensor, dict[str, Any]] = {}  # of each shard
        # Of the step: the parameters that move, their shards and options.
        self._params: list[tuple[Tensor, Tensor, StepOptions]] = []
        self._norms = SharedNorms()
        self._inputs: StepInputs | None = None
        self._scaled: dict[tuple[int, int], tuple[StepOptions, StepOptions]] = {}

    # ---- the step ----------------------------------------------------------------------------------------------------

    def prepare(self, groups: Sequence[Group], inputs: StepInputs) -> Ready:
        self.drop()
        self._inputs = inputs
        try:
            local = _Local(shard_or_none(inputs.grad_scale), shard_or_none(inputs.found_inf))
            for i, group in enumerate(groups):
                for j, p in enumerate(group["params"]):
                    self._add(local, i, group, p, param_name(group, i, j))
            self._states = local.states
            ready = self._engine.prepare(local.groups, local.inputs())
        except BaseException:
            self.drop()
            raise
        if ready != Ready.YES:
            self.drop()
        return ready

    def _add(self, local: _Local, i: int, group: Group, p: Tensor, name: str) -> None:
        """What the engine is shown of one parameter of group ``i``, if it has a gradient."""
        assert self._inputs is not None
        inputs, options = self._inputs, self._inputs.options[i]
        refuse_partial(p, name)
        grad = gradient_of(p, name)
        if grad is None:
            return
        shard = shard_of(p)
        dims = group_dims(options.dims, p.dim(), name)
        ranks = () if dims is None else ranks_of_groups(p, dims)
        if ranks:
            options = self._options_for(i, options, p)
        of_group = local.group_of(i, group, options)
        of_group["params"].append(shard)
        of_group["param_names"].append(name)
        shard.grad = grad
        self._params.append((p, shard, options))
        # The same dict in every step, so that an engine finds what it has seen before.
        states = local.states[shard] = self._states.get(shard, {})
        found = shards_of(inputs.states[p]) if p in inputs.states else {}
        if not _same(states, found):
            states.clear()
            states.update(found)
        if p in inputs.instead:
            local.instead[shard] = shards_of(inputs.instead[p])
        if p in inputs.cuts:
            local.cuts[shard] = shard_of(inputs.cuts[p])
        if ranks:
            rows = partial(rows_of, shard, options, {**states, **local.instead.get(shard, {})})
            room = self._norms.room_for(shard, options.dims, ranks, rows, options.norm_rows)
            if shard.numel() > 0:
                local.norms[shard] = room

    def _options_for(self, i: int, options: StepOptions, p: Tensor) -> StepOptions:
        """The options of a parameter whose groups are larger than what this rank has of them: lam is scaled here.

        Numbers on a device are read for it, which waits for them.
        """
        if not options.scaled:
            return options
        size = group_size(p.shape, options.dims)
        known = self._scaled.get((i, size))
        if known is None or known[0] is not options or options.on_device:  # what a tensor holds may have changed
            on_host = options.on_host()
            values = {**on_host.values, "lam": strength_of_size(on_host.values, size), "group_scale": False}
            known = self._scaled[i, size] = options, StepOptions.of({**values, "params": []}, options.base)
        return known[1]

    def launch(self) -> None:
        assert self._inputs is not None
        inputs, params = self._inputs, self._params
        try:
            self._norms.fill()
            self._engine.launch()
            for p, shard, options in params:
                self._put_states(p, shard, options, inputs)
            written = [p for p, _, _ in params]
            note_writes(written + [p.grad for p, _, options in params if options.writes_gradient and p.grad is not None])
        finally:
            self.drop()

    def _put_states(self, p: Tensor, shard: Tensor, options: StepOptions, inputs: StepInputs) -> None:
        """The states that the step has made of a shard become states of the parameter: DTensors like it."""
        of_shape = options.states_of(p.dtype)
        if shard.numel() == 0 and p.numel() > 0:
            self._step_without_elements(shard, options, inputs)
        for name, state in self._states[shard].items():
            before = inputs.states[p].get(name) if p in inputs.states else None
            if not isinstance(before, Tensor) or shard_of(before) is not state:
                inputs.states[p][name] = sharded_like(state, p) if name in of_shape else state

    def _step_without_elements(self, shard: Tensor, options: StepOptions, inputs: StepInputs) -> None:
        """A rank without elements of a parameter has the states that the others have: a checkpoint is of all ranks."""
        states, found_inf = self._states[shard], shard_or_none(inputs.found_inf)
        missing = {name: t for name, t in options.states_of(shard.dtype).items() if states.get(name) is None}
        counter = None if options.counter is None else states.get(options.counter)
        is_first = bool(missing) or (options.counter is not None and counter is None)
        # As everywhere, a first step waits here for found_inf: what it skips has no states.
        if is_first and found_inf is not None and found_inf.item() > 0:
            return
        for name, dtype in missing.items():
            states[name] = torch.zeros_like(shard, dtype=dtype)
        if options.counter is not None:
            counter = torch.zeros((), dtype=torch.float32, device=shard.device) if counter is None else counter
            states[options.counter] = counter
            counter.add_(1 if found_inf is None else (found_inf <= 0).to(counter.device, counter.dtype).reshape(()))

    def drop(self) -> None:
        for _, shard, _ in self._params:
            shard.grad = None
        self._params = []
        self._norms = SharedNorms()
        self._inputs = None
        self._engine.drop()

    # ---- u -----------------------------------------------------------------------------------------------------------

    def prox_(self, params: Sequence[Tensor], group: Mapping[str, Any]) -> None:
        norms, across = SharedNorms(), []
        for p in params:
            shard, ranks = shard_of(p), _ranks_of(p, group)
            if ranks:
                dims = group_dims(group["group_dim"], p.dim())
                room = norms.room_for(shard, dims, ranks, partial(only, shard), 1)
                across.append((shard, strength(group, p.shape) / float(group["beta"]), room))
            elif shard.numel() > 0:
                self._engine.prox_([shard], group)
        norms.fill()
        penalty, a, dims = group["penalty"], float(group["a"]), group["group_dim"]
        for shard, tau, room in across:
            v = to_opmath(shard)
            shard.copy_(threshold(v, from_memory_order(room, v, dims), penalty, tau, a, dims))
        note_writes(params)

    def penalty_value(self, params: Sequence[Tensor], group: Mapping[str, Any]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=shard_of(params[0]).device)
        of_shards = []
        for p in params:
            if _ranks_of(p, group):
                total += value_across(p, group)
            else:
                shard = shard_of(p)
                value = self._engine.penalty_value([shard], group) if shard.numel() > 0 else torch.zeros_like(total)
                of_shards.append((p, value))
        return total + add_by_ranks(of_shards) if of_shards else total


def _ranks_of(p: Tensor, group: Mapping[str, Any]) -> tuple[Any, ...]:
    """The process groups over which the groups of a parameter lie."""
    dims = group_dims(group["group_dim"], p.dim())
    return () if dims is None else ranks_of_groups(p, dims)


def shard_or_none(t: Tensor | None) -> Tensor | None:
    """The shard of a tensor, None for None."""
    return None if t is None else shard_of(t)


def _same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two dicts hold the same objects by the same names."""
    return a.keys() == b.keys() and all(a[name] is b[name] for name in a)
