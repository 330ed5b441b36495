"""The tensors of a step and the launches that were made for them: made once, then only refreshed."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...method.dtypes import HALF_TYPES
from ...method.groups import GroupView, view_of
from ...method.memory import kind_of, refuse, turns_of
from ...method.parameters import param_name
from ...method.precision import has_master
from ...method.step_options import StepOptions
from ...method.windows import inner_of
from ..checks import check_device_numbers, check_entry, check_groups, check_norms
from ..interface import Group, StepInputs
from .kinds import StepKind, TensorArgs
from .launch import STORAGE, Launch
from .mixed import Planes
from .precision import LOW, WHOLE
from .staging import Staged, StagedWeights

try:  # one call compares types, dtypes, devices, sizes and strides of all tensors
    from torch._C._dynamo import guards as _guards
except ImportError:  # every step is then prepared as if it were the first
    _guards = None  # type: ignore[assignment]


class LaunchPart(NamedTuple):
    """A launch of a step, and the tensors of the step that it works on.

    Attributes:
        turn: launches of later turns have parameters that share memory with those of earlier ones.
        params: places among the parameters that move, None for all in their order.
        states: for each state of a parameter, places among all states of the step.
        counters: places among all counters of the step.
    """

    launch: Launch
    turn: int
    params: list[int] | None
    states: list[list[int]]
    counters: list[int]


class ParamSlot(NamedTuple):
    """A parameter that a step moves: its group's place and options, and its states, None for a missing state."""

    p: Tensor
    group: int
    options: StepOptions
    view: GroupView | None
    states: list[Tensor | None]
    counter: Tensor | None


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two lists hold the same objects; == would compare tensors."""
    return len(a) == len(b) and all(map(is_, a, b))


def _places_of_numbers(options: Sequence[StepOptions]) -> list[tuple[int, torch.dtype]]:
    """Where the numbers on the device are, and what they are; their tensors may be given other memory."""
    return [(t.data_ptr(), t.dtype) for of_group in options for t in of_group.on_device if t is not None]


class StepTable:
    """What a step over these tensors needs; made by :meth:`build`, which looks at everything and changes nothing.

    Attributes:
        launches: in the order of their turns.
        copies: of tensors that the kernels cannot take as they are; whether a step writes to them, and in which turn.
        new_states: (parameter, name, tensor) that ``optimizer.state`` gets when the step is launched.
        changed: what a step writes, for the version counters.
        turns: of the parameters that move.
    """

    def __init__(self) -> None:
        self.launches: list[LaunchPart] = []
        self.copies: list[tuple[Staged | StagedWeights, bool, int]] = []
        self.new_states: list[tuple[Tensor, str, Tensor]] = []
        self.changed: list[Tensor] = []
        self.turns: list[int] = []
        self._params: list[Tensor] = []
        self._lengths: list[int] = []  # of the param groups
        self._active: list[bool] = []
        self._all_active = False
        self._state_keys: list[Tensor] = []
        self._state_values: list[Any] = []
        self._state_places: list[tuple[Any, str]] = []  # the dict of each state, and its name there
        self._states: list[Tensor] = []
        self._counters: list[Tensor] = []  # the tensors that count the steps of the parameters, where these are counted
        self._any_shared = False  # whether some parameters share memory
        self._numbers_at: list[tuple[int, torch.dtype]] = []  # where the numbers on the device are
        self._with_cut: list[Tensor] = []  # the parameters that move and have top-k
        self._cuts_and_norms: list[Any] = []  # whose addresses stand in the tables
        self._measured: list[Tensor] = []  # the parameters whose statistics are made
        self._rooms: list[Tensor] = []  # and where they go
        self._guards: Any = None
        self._addresses: list[int] = []
        self.held: Any = None  # the tensors of a step that was prepared: other threads may take them away

    # ---- refreshing --------------------------------------------------------------------------------------------------

    def refresh(self, groups: Sequence[Group], inputs: StepInputs) -> bool:
        """Addresses of the tensors that are known; False where they are others, or lie otherwise."""
        if self._guards is None or inputs.instead:
            return False
        params: list[Tensor] = []
        for group in groups:
            params += group["params"]
        if not _same(params, self._params) or [len(group["params"]) for group in groups] != self._lengths:
            return False
        grads: list[Any] = [p.grad for p in params]
        if [g is not None for g in grads] != self._active:  # also where one has no elements: it may get some
            return False
        tensors: list[Tensor] = params + grads
        if not self._all_active:
            tensors = [t for t, active in zip(tensors, self._active * 2, strict=True) if active]
        if self._state_places:
            # Walking the state compares every key and value by identity; a look-up would hash every parameter.
            state = inputs.states
            if not (_same(list(state), self._state_keys) and _same(list(state.values()), self._state_values)):
                return False
            states = [of_p.get(name) for of_p, name in self._state_places]
            if not (
                _same(states[: len(self._states)], self._states) and _same(states[len(self._states) :], self._counters)
            ):
                return False
            tensors += states
        if not _same(self._find_cuts_and_norms(inputs), self._cuts_and_norms) or not self._guards.check(*tensors):
            return False
        addresses = list(map(Tensor.data_ptr, tensors))
        if addresses != self._addresses:
            count = sum(self._active)
            if 0 in addresses or (
                addresses[:count] != self._addresses[:count] and turns_of(tensors[:count]) != self.turns
            ):
                return False
            self._move(addresses)
        self.measure(inputs)
        self.held = tensors
        return True

    def _find_cuts_and_norms(self, inputs: StepInputs) -> list[Any]:
        """The cuts of the parameters with top-k, and all parameters that norms are given for, with these."""
        return [*map(inputs.cuts.get, self._with_cut), *inputs.norms, *inputs.norms.values()]

    def _move(self, addresses: list[int]) -> None:
        """`addresses`: of all parameters that move, of their gradients, of all states, of all counters."""
        self._addresses = addresses
        n = (len(addresses) - len(self._states) - len(self._counters)) // 2
        w, g, states = addresses[:n], addresses[n : 2 * n], addresses[2 * n :]
        for launch, _, params, states_of_params, counters in self.launches:
            launch.move(
                w if params is None else [w[k] for k in params],
                g if params is None else [g[k] for k in params],
                *([states[k] for k in places] for places in states_of_params),
            )
            if launch.counting is not None:
                launch.counting.move([states[len(self._states) + k] for k in counters])

    def set_numbers(self, options: Sequence[StepOptions]) -> None:
        """The numbers of every launch; their keys are the place of the group, the size of its groups, the count."""
        for part in self.launches:
            keys = part.launch.keys
            numbers = {(i, size, count): options[i].numbers(size, count) for i, size, count in keys}
            part.launch.set(numbers, options)
        self._numbers_at = _places_of_numbers(options)

    def numbers_moved(self, options: Sequence[StepOptions]) -> bool:
        """Whether a number on the device lies elsewhere than it did, in the same tensor."""
        return bool(self._numbers_at) and self._numbers_at != _places_of_numbers(options)

    def measure(self, inputs: StepInputs) -> None:
        """Tell every launch where its statistics go, if that is elsewhere than in the last step."""
        rooms = inputs.statistics
        if not rooms and not self._rooms:
            return
        if _same(list(rooms), self._measured) and _same(list(rooms.values()), self._rooms):
            return
        self._measured, self._rooms = list(rooms), list(rooms.values())
        moved = [p for p, active in zip(self._params, self._active, strict=True) if active]
        for part in self.launches:
            params = moved if part.params is None else [moved[k] for k in part.params]
            part.launch.measure([rooms.get(p) for p in params], inputs.options)

    # ---- building ----------------------------------------------------------------------------------------------------

    def find(self, groups: Sequence[Group], inputs: StepInputs, served: Sequence[str]) -> list[ParamSlot] | None:
        """The parameters that the step moves, all of them checked; None where one is not served.

        Args:
            served: types of devices.
        """
        slots = []
        for i, (group, options) in enumerate(zip(groups, inputs.options, strict=True)):
            for j, p in enumerate(group["params"]):
                moves = p.grad is not None
                if moves:
                    if p.device.type not in served or kind_of(p) is not None:
                        return None
                    states = {name: inputs.state_of(p, name) for name in options.states_of(p.dtype)}
                    counter = None if options.counter is None else inputs.state_of(p, options.counter)
                    check_entry(p, group, i, j, states, counter)
                    check_device_numbers(p, i, options)
                    if counter is not None:
                        refuse(counter, f"the step of {param_name(group, i, j)}")
                    moves = p.numel() > 0
                self._params.append(p)
                self._active.append(moves)
                if moves:
                    if options.grouping is not None:
                        check_groups(p, group, param_name(group, i, j))
                        if p in inputs.norms:
                            check_norms(inputs.norms[p], p, options)
                    slots.append(ParamSlot(p, i, options, view_of(p, options.grouping), list(states.values()), counter))
        self._lengths = [len(group["params"]) for group in groups]
        self._all_active = all(self._active)
        return slots

    def build(self, slots: Sequence[ParamSlot], inputs: StepInputs) -> None:
        """Tables and launches for these parameters."""
        kinds: dict[tuple[Any, ...], tuple[list[TensorArgs], list[int], list[list[int]], list[int]]] = {}
        tl1 = set()  # the kinds that need the code of transformed l1
        weights, gradients, states = [], [], []
        masters: list[Tensor] = []
        self.turns = turns_of([slot.p for slot in slots])
        self._any_shared = any(self.turns)
        for k, slot in enumerate(slots):
            p, options, turn = slot.p, slot.options, self.turns[k]
            grad = p.grad
            assert grad is not None
            counter = self._counter_of(slot)
            types = list(options.states_of(p.dtype).values())
            own_states = self._states_of(slot, types)
            planes, staged = self._planes_of(slot, types, grad), None
            if planes is not None:
                dtype, count = p.dtype, len(own_states)
                w = self._stage(p, dtype, None, True, turn)
            else:
                dtype, count = self._common_type(slot, types, grad), len(options.states)
                staged = self._stage_weights(slot, own_states, counter, turn)
                w = self._stage(p, dtype, None, True, turn) if staged is None else staged
            g = self._stage(grad, dtype if planes is None else planes.gradient, w, options.writes_gradient, turn)
            weights.append(w.data_ptr())
            gradients.append(g.data_ptr())
            base, method = options.base.number, options.method.number
            kind = turn, p.device, dtype, count, base, method, options.writes_gradient, planes
            args, params, states_of_params, counters = kinds.setdefault(kind, ([], [], [[] for _ in range(count)], []))
            for state, places, plane in zip(own_states[:count], states_of_params, types, strict=False):
                places.append(len(self._states))
                self._states.append(state)
                states.append(self._stage(state, dtype if planes is None else plane, w, True, turn).data_ptr())
            masters += own_states[count:]
            if counter is not None:
                counters.append(len(self._counters))
                self._counters.append(counter)
            size = slot.view.outer * slot.view.inner if slot.view is not None and options.scaled else 1
            cut = inputs.cuts[p].data_ptr() if options.topk else 0
            norms = inputs.norms[p].data_ptr() if slot.view is not None and p in inputs.norms else 0
            # What follows from a count is made on the device; a base without a counter asks whether its states are new.
            begun = not options.counts and all(state is not None for state in slot.states[: options.base_states])
            key = slot.group, size, int(begun)
            windows = None if options.pattern is None else (*options.pattern, inner_of(w))
            args.append(TensorArgs(w, g, slot.view, key, cut, norms, options.lasso, counter is not None, windows))
            params.append(k)
            if options.values["penalty"] == "tl1":
                tl1.add(kind)
        for kind, (args, params, states_of_params, counters) in sorted(kinds.items(), key=lambda item: item[0][0]):
            turn, device, dtype, count, base, method, writes_gradient, planes = kind
            of_groups = [inputs.options[i] for i in dict.fromkeys(key[0] for key in (of.key for of in args))]
            numbers, finishes = len(of_groups[0].numbers(1, 0)), any(options.on_device for options in of_groups)
            corrects, kept = of_groups[0].counts, count - (planes is not None and planes.master > 0)
            step_kind = StepKind(base, method, kept, numbers, writes_gradient, finishes, corrects, planes)
            launch = Launch("step", dtype, device, args, kind in tl1, step_kind)
            all_of_them = len(params) == len(slots)
            self.launches.append(LaunchPart(launch, turn, None if all_of_them else params, states_of_params, counters))
        self._move(weights + gradients + states + [counter.data_ptr() for counter in self._counters])
        for part in self.launches:
            for tensor in part.launch.tensors:  # the tensors are found by address from now on
                tensor.w = tensor.g = None  # type: ignore[assignment]
        written = [slot.p for slot in slots] + self._states + masters + self._counters
        written += [slot.p.grad for slot in slots if slot.options.writes_gradient and slot.p.grad is not None]
        self.changed = [t for t in written if not t.is_inference()]
        self.measure(inputs)
        self._remember(slots, inputs)

    def _planes_of(self, slot: ParamSlot, types: Sequence[torch.dtype], grad: Tensor) -> Planes | None:
        """What the tensors of a parameter are stored in, where a kernel takes them although their types differ."""
        p, options = slot.p, slot.options
        rounds, has_behind = options.rounds(p.dtype), has_master(options.values, p.dtype)
        if slot.view is not None or p.dtype == torch.float64 or not (rounds or any(t != p.dtype for t in types)):
            return None
        narrow = grad.dtype if grad.dtype in STORAGE and grad.dtype != torch.float64 else torch.float32
        of_base, kept = types[: options.base_states], types[options.base_states : len(options.states)]
        master = (LOW.value if p.dtype == torch.bfloat16 else WHOLE.value) if has_behind else 0
        return Planes(narrow, next(iter(of_base), torch.float32), next(iter(kept), torch.float32), master, rounds)

    def _common_type(self, slot: ParamSlot, types: Sequence[torch.dtype], grad: Tensor) -> torch.dtype:
        """The type of all tensors of a parameter as a kernel of one type takes them."""
        p = slot.p
        mixed = slot.options.rounds(p.dtype) or any(t != p.dtype for t in types)
        return torch.float32 if p.dtype in HALF_TYPES and (mixed or grad.dtype != p.dtype) else p.dtype

    def _stage_weights(
        self, slot: ParamSlot, states: Sequence[Tensor], counter: Tensor | None, turn: int
    ) -> Tensor | None:
        """A float32 copy of weights that have a master or are rounded stochastically; None for others."""
        p, options = slot.p, slot.options
        has_behind = has_master(options.values, p.dtype)
        if not (options.rounds(p.dtype) or has_behind):
            return None
        random = (options.seed, counter) if options.rounds(p.dtype) and counter is not None else None
        staged = StagedWeights(p.detach(), states[-1] if has_behind else None, random)
        self.copies.append((staged, True, turn))
        return staged.dense

    def _counter_of(self, slot: ParamSlot) -> Tensor | None:
        """The counter of a parameter on its device: where it is missing 0, of another type or elsewhere its conversion.

        None where the parameter's steps are not counted.
        """
        p, name, counter = slot.p, slot.options.counter, slot.counter
        if name is None:
            return None
        if counter is not None and counter.dtype == torch.float32 and counter.device == p.device:
            return counter
        made = self._made_before(p, name) if self._any_shared else None
        if made is None:
            made = torch.zeros((), dtype=torch.float32, device=p.device)
            if counter is not None:
                made.copy_(counter.detach().reshape(()), non_blocking=True)
            self.new_states.append((p, name, made))
        return made

    def _made_before(self, p: Tensor, name: str) -> Tensor | None:
        """The new state that an earlier occurrence of a parameter has in this step."""
        return next((made for q, key, made in self.new_states if q is p and key == name), None)

    def _states_of(self, slot: ParamSlot, types: Sequence[torch.dtype]) -> list[Tensor]:
        """The states of a parameter as the step needs them."""
        names = slot.options.states_of(slot.p.dtype)
        of_each = zip(names, slot.states, types, strict=True)
        return [self._new_state(slot.p, name, state, dtype, slot.options.counts) for name, state, dtype in of_each]

    def _new_state(self, p: Tensor, name: str, state: Tensor | None, dtype: torch.dtype, counts: bool) -> Tensor:
        """A state in the type that it is stored in: where it is missing zeros; of another dtype, its conversion.

        Args:
            counts: the base counts its steps: a second occurrence of a parameter goes on from the first one's state,
                as in torch.optim.AdamW; torch.optim.SGD begins a buffer for each occurrence.
        """
        if state is not None and state.dtype == dtype:
            return state
        made = self._made_before(p, name) if counts and self._any_shared else None
        if made is not None:
            return made
        new = torch.zeros_like(p, dtype=dtype)
        if state is not None:
            new.copy_(state)
        self.new_states.append((p, name, new))
        return new

    def _remember(self, slots: Sequence[ParamSlot], inputs: StepInputs) -> None:
        """What the next step is compared with; nothing where it has to be built anew."""
        grads = [slot.p.grad for slot in slots]
        self.held = [*(slot.p for slot in slots), *grads, *self._states, *self._counters]
        if _guards is None or self.copies or self.new_states or inputs.instead or not slots:
            return
        self._state_keys, self._state_values = list(inputs.states), list(inputs.states.values())
        self._state_places = [(inputs.states[s.p], name) for s in slots for name in s.options.states_of(s.p.dtype)]
        self._state_places += [(inputs.states[s.p], s.options.counter) for s in slots if s.options.counter is not None]
        self._with_cut = [slot.p for slot in slots if slot.options.topk]
        self._cuts_and_norms = self._find_cuts_and_norms(inputs)
        self._guards = _guards.TensorGuards(*self.held, dynamic_dims_sizes=None, dynamic_dims_strides=None)

    def _stage(self, tensor: Tensor, dtype: torch.dtype, like: Tensor | None, writes: bool, turn: int) -> Tensor:
        staged = Staged(tensor.detach(), dtype, like)
        if staged.is_copy:
            self.copies.append((staged, writes, turn))
        return staged.dense
