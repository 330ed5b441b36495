"""The engine of sharded parameters: any engine, which is shown each rank's shards in the place of DTensors.

Elementwise work needs nothing else: a shard is stepped as the whole would be, bit for bit. The norms of groups that lie
on several ranks are made before (:mod:`rvsm_kernels.dist.norms`), in one all-reduce for each mesh.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..engines.interface import Engine, Group, Ready, StepInputs
from ..method.dtypes import to_opmath
from ..method.groups import Grouping, from_memory_order, group_size, grouping_of
from ..method.parameters import param_name
from ..method.prox import threshold
from ..method.selection import Selection
from ..method.split import is_nm, strength
from ..method.step_options import StepOptions
from ..method.windows import Pattern
from .norms import SharedNorms, rows_of
from .selection import select
from .shards import (
    gradient_of,
    note_writes,
    ranks_of_groups,
    refuse_cut_windows,
    refuse_partial,
    shard_of,
    sharded_like,
    shards_of,
)
from .sums import add_by_ranks, value_across


@dataclass(slots=True)
class _Seen:
    """A parameter as the last step has seen it.

    Attributes:
        place, name: its group and its place there, and how errors call it.
        ranks: the process groups over which its groups lie, by ``grouping``.
        pattern: of the windows that its shards hold whole, None without them.
        states: of the shard, as the engine sees them: the same dict in every step.
        whole: the states of the parameter that those are shards of.
    """

    p: Tensor
    shard: Tensor
    place: tuple[int, int]
    name: str
    grouping: Grouping
    ranks: tuple[Any, ...]
    pattern: Pattern | None
    states: dict[str, Any] = field(default_factory=dict)
    whole: dict[str, Any] = field(default_factory=dict)

    def take(self, whole: Mapping[str, Any] | None) -> None:
        """Take note of the states of the parameter, some of which may have been replaced since the last step."""
        if not _same(self.whole, whole or {}):
            self.whole = dict(whole or {})
            self.states.clear()
            self.states.update(shards_of(self.whole))


@dataclass(slots=True)
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
    statistics: dict[Tensor, Tensor] = field(default_factory=dict)
    _places: dict[tuple[int, int], int] = field(default_factory=dict)

    def group_of(self, i: int, group: Group, options: StepOptions) -> dict[str, Any]:
        """The group of shards for parameters of group ``i`` with these options."""
        place = self._places.setdefault((i, id(options)), len(self.groups))
        if place == len(self.groups):
            # A coupling has an integer for each slice of the whole weight; norms of such groups come with the step.
            self.groups.append({**group, "coupling": None, "params": [], "param_names": []})
            self.options.append(options)
        return self.groups[place]

    def inputs(self) -> StepInputs:
        """The inputs of the step."""
        states: Any = self.states
        return StepInputs(
            self.grad_scale,
            self.found_inf,
            self.options,
            states,
            self.instead,
            self.cuts,
            self.norms,
            self.statistics,
        )


class ShardEngine(Engine):
    """Serves DTensors by the shards that this rank has of them.

    Args:
        engine: steps the shards.
        serves: whether a parameter is a DTensor whose shards belong to that engine.
    """

    def __init__(self, engine: Engine, serves: Callable[[Tensor], bool]) -> None:
        self.name = f"{engine.name}, by shards"
        self._engine = engine
        self._serves = serves
        self._seen: dict[int, _Seen] = {}  # by the parameter's id
        # Of the step: the parameters that move, and their options.
        self._moved: list[tuple[_Seen, StepOptions]] = []
        self._norms = SharedNorms()
        self._inputs: StepInputs | None = None
        self._scaled: dict[tuple[int, int], tuple[StepOptions, StepOptions]] = {}

    # ---- the step ----------------------------------------------------------------------------------------------------

    def prepare(self, groups: Sequence[Group], inputs: StepInputs) -> Ready:
        self.drop()
        self._inputs = inputs
        ready = Ready.NO
        try:
            local = _Local(shard_or_none(inputs.grad_scale), shard_or_none(inputs.found_inf))
            if all(
                self._add(local, i, j, group, p)
                for i, group in enumerate(groups)
                for j, p in enumerate(group["params"])
                if p.grad is not None
            ):
                self._seen = {id(seen.p): seen for seen, _ in self._moved}
                for shard, room in self._norms.rooms():
                    if shard.numel() > 0:
                        local.norms[shard] = room
                ready = self._engine.prepare(local.groups, local.inputs())
        finally:
            if ready != Ready.YES:
                self.drop()
        return ready

    def _see(
        self, p: Tensor, shard: Tensor, place: tuple[int, int], group: Group, options: StepOptions
    ) -> _Seen | None:
        """A parameter that this engine has not seen as it is now; None where another engine serves it."""
        if not self._serves(p):
            return None
        name = param_name(group, *place)
        refuse_partial(p, name)
        wanted = getattr(p, "grad_dtype", p.dtype)  # of newer versions of torch: a gradient may have another type
        if wanted != shard.dtype:
            shard.grad_dtype = wanted
        groups, pattern = options.grouping, options.pattern
        if pattern is not None:
            refuse_cut_windows(p, pattern, name)
        return _Seen(p, shard, place, name, groups, ranks_of_groups(p, groups, name), pattern)

    def _add(self, local: _Local, i: int, j: int, group: Group, p: Tensor) -> bool:
        """What the engine is shown of a parameter with a gradient; False where another engine serves it."""
        assert self._inputs is not None
        inputs, options = self._inputs, self._inputs.options[i]
        shard, seen = shard_of(p), self._seen.get(id(p))
        known = seen is not None and seen.shard is shard and seen.place == (i, j)
        if seen is None or not known or (seen.grouping, seen.pattern) != (options.grouping, options.pattern):
            before, seen = seen, self._see(p, shard, (i, j), group, options)
            if seen is None:
                return False
            if before is not None and before.shard is shard:
                seen.states, seen.whole = before.states, before.whole
        grad = gradient_of(p, seen.name)
        made = inputs.norms.get(p) if inputs.norms else None  # of coupled groups
        if seen.ranks and made is None:
            options = self._options_for(i, options, p)
        of_group = local.group_of(i, group, options)
        of_group["params"].append(shard)
        of_group["param_names"].append(seen.name)
        shard.grad = grad
        self._moved.append((seen, options))
        seen.take(inputs.states.get(p))
        local.states[shard] = seen.states
        if inputs.instead and p in inputs.instead:
            local.instead[shard] = shards_of(inputs.instead[p])
        if inputs.cuts and p in inputs.cuts:
            local.cuts[shard] = shard_of(inputs.cuts[p])
        if inputs.statistics:
            local.statistics[shard] = inputs.statistics[p]
        if made is not None and shard.numel() > 0:
            local.norms[shard] = made
        elif seen.ranks and made is None:
            states = {**seen.states, **local.instead.get(shard, {})}
            self._norms.add(shard, seen.grouping, seen.ranks, rows_of(shard, options, states), options.norm_rows)
        return True

    def _options_for(self, i: int, options: StepOptions, p: Tensor) -> StepOptions:
        """The options of a parameter whose groups are larger than what this rank has of them: lam is scaled here.

        Numbers on a device are read for it, which waits for them.
        """
        if not options.scaled:
            return options
        size = group_size(p.shape, options.grouping)
        known = self._scaled.get((i, size))
        if known is None or known[0] is not options or options.on_device:  # what a tensor holds may have changed
            known = self._scaled[i, size] = options, options.for_size(size)
        return known[1]

    def launch(self) -> None:
        assert self._inputs is not None
        inputs, moved = self._inputs, self._moved
        try:
            self._norms.fill()
            self._engine.launch()
            for seen, options in moved:
                if seen.shard.numel() == 0 and seen.p.numel() > 0:
                    self._step_without_elements(seen, options, inputs)
                if seen.states.keys() != seen.whole.keys() or any(
                    shard_of(whole) is not seen.states[name] for name, whole in seen.whole.items()
                ):
                    self._put_states(seen, options, inputs)
            written = [seen.p for seen, _ in moved]
            written += [seen.p.grad for seen, options in moved if options.writes_gradient and seen.p.grad is not None]
            note_writes(written)
        finally:
            self.drop()

    def _put_states(self, seen: _Seen, options: StepOptions, inputs: StepInputs) -> None:
        """The states that the step has made of a shard become states of the parameter: DTensors like it."""
        of_shape = options.states_of(seen.p.dtype)
        whole = inputs.states[seen.p]
        for name, state in list(seen.states.items()):
            before = whole.get(name)
            if before is None and name not in of_shape and name != options.counter:
                del seen.states[name]  # the optimizer has dropped it since: no method needs it any more
            elif not isinstance(before, Tensor) or shard_of(before) is not state:
                whole[name] = sharded_like(state, seen.p) if name in of_shape else state
                seen.states[name] = shard_of(whole[name])  # the DTensor has an object of its own for it
        seen.whole = {name: whole[name] for name in seen.states}

    def _step_without_elements(self, seen: _Seen, options: StepOptions, inputs: StepInputs) -> None:
        """A rank without elements of a parameter has the states that the others have: a checkpoint is of all ranks."""
        shard, states, found_inf = seen.shard, seen.states, shard_or_none(inputs.found_inf)
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
        for seen, _ in self._moved:
            seen.shard.grad = None
        self._moved = []
        self._norms.begin()
        self._inputs = None
        self._engine.drop()

    # ---- u -----------------------------------------------------------------------------------------------------------

    def select(self, selections: Sequence[Selection]) -> None:
        select(selections, self._engine.select)

    def check(self, p: Tensor, group: Mapping[str, Any], name: str) -> None:
        ranks_of_groups(p, grouping_of(group), name)
        if is_nm(group):
            refuse_cut_windows(p, group["pattern"], name)

    def prox_(self, params: Sequence[Tensor], group: Mapping[str, Any]) -> None:
        norms, taus, groups = SharedNorms(), [], grouping_of(group)
        for p in params:
            shard = shard_of(p)
            ranks = ranks_of_groups(p, groups)
            if ranks:
                norms.add(shard, groups, ranks, [shard], 1)
                taus.append(strength(group, p.shape) / float(group["beta"]))
            elif shard.numel() > 0:
                self._engine.prox_([shard], group)
        penalty, a = group["penalty"], float(group["a"])
        rooms = norms.rooms()
        norms.fill()
        for (shard, room), tau in zip(rooms, taus, strict=True):
            v = to_opmath(shard)
            shard.copy_(threshold(v, from_memory_order(room, v, groups), penalty, tau, a, groups))
        note_writes(params)

    def penalty_value(self, params: Sequence[Tensor], group: Mapping[str, Any]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=shard_of(params[0]).device)
        of_shards = []
        for p in params:
            if ranks_of_groups(p, grouping_of(group)):
                total += value_across(p, group)
            else:
                shard = shard_of(p)
                value = self._engine.penalty_value([shard], group) if shard.numel() > 0 else torch.zeros_like(total)
                of_shards.append((p, value))
        return total + add_by_ranks(of_shards) if of_shards else total


def shard_or_none(t: Tensor | None) -> Tensor | None:
    """The shard of a tensor, None for None."""
    return None if t is None else shard_of(t)


def _same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two dicts hold the same objects by the same names."""
    return a.keys() == b.keys() and all(a[name] is b[name] for name in a)
