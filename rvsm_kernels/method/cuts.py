"""The cuts of the parameters with top-k: one for each tensor, or one for all tensors of a budget."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .groups import group_size, grouping_of
from .parameters import is_left_alone, with_gradient
from .selection import Candidates, Room, Select, Selection, states_beside
from .split import is_topk
from .step_options import StepOptions

Budget = tuple[str | None]
"""What the groups of one budget share: their ``budget_name``."""


def budget_of(group: Mapping[str, Any]) -> Budget | None:
    """The budget of a group of top-k, None where each of its tensors has a cut of its own."""
    return (group["budget_name"],) if group["budget"] == "global" and is_topk(group) else None


class Member(NamedTuple):
    """A parameter of a budget."""

    p: Tensor
    group: Mapping[str, Any]
    candidates: Candidates


Budgets = dict[Budget, list[Member]]


def find_budgets(
    groups: Sequence[Mapping[str, Any]], values: Sequence[Mapping[str, Any]], candidates: Callable[..., Candidates]
) -> Budgets:
    """The parameters of every budget, each once, with a gradient or without; frozen ones belong to none.

    Args:
        values: the options of each group.
        candidates: those of a parameter, from (its place among the groups, the parameter).

    Raises:
        ValueError: groups of one budget that differ in density, or of which one has a ``group_dim`` alone.
    """
    budgets: Budgets = {}
    seen: set[int] = set()
    for i, (group, of_group) in enumerate(zip(groups, values, strict=True)):
        key = budget_of(of_group)
        if key is None:
            continue
        members = budgets.setdefault(key, [])
        if members:
            _check_alike(members[0].group, of_group)
        for p in group["params"]:
            if p.requires_grad and not is_lazy(p) and not is_left_alone(p) and p.numel() > 0 and id(p) not in seen:
                seen.add(id(p))
                members.append(Member(p, of_group, candidates(i, p)))
    return {key: members for key, members in budgets.items() if members}


def _check_alike(first: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    where = f"budget_name={first['budget_name']!r}"
    if first["density"] != other["density"]:
        raise ValueError(
            f"the groups of one budget ({where}) have densities {first['density']} and {other['density']}: give them"
            " one, or another budget_name each"
        )
    if (first["group_dim"] is None) != (other["group_dim"] is None):
        raise ValueError(
            f"a group of a budget ({where}) has a group_dim and another one has none: elements and groups are not"
            " compared with each other, give them another budget_name each"
        )


def scale_of(group: Mapping[str, Any], p: Tensor) -> float:
    """What the norms of a parameter's groups are divided by where they are compared with those of other tensors."""
    return math.sqrt(group_size(p.shape, grouping_of(group))) if group["group_scale"] else 1.0


def put_cut(to: Tensor, cut: Tensor, scale: float) -> None:
    """Write a budget's cut for one tensor: times its scale, and never rounded up, where it might meet a survivor."""
    wide = cut.to(torch.float64) * scale
    narrow = wide.to(to.dtype)
    below = torch.nextafter(narrow, torch.full_like(narrow, -math.inf))
    to.copy_(torch.where(narrow.double() > wide, below, narrow))


class Cuts:
    """The cuts of parameters with top-k, each in memory that stays where it is from step to step."""

    def __init__(self) -> None:
        self._rooms: dict[Tensor, Room] = {}
        self._of_budgets: dict[Budget, Room] = {}
        self._budgets: Budgets = {}  # of the step

    def find(
        self,
        groups: Sequence[Mapping[str, Any]],
        options: Sequence[StepOptions],
        state_of: Callable[[Tensor, str], Tensor | None],
    ) -> dict[Tensor, Tensor]:
        """Room for the cuts of a step, by parameter; :meth:`select` and :meth:`select_budgets` fill it.

        Args:
            state_of: a state of a parameter by its name, None where it is missing.

        Raises:
            ValueError: groups that cannot have one budget.
        """

        def candidates(i: int, p: Tensor) -> Candidates:
            step = options[i]
            beside = states_beside(p, step, functools.partial(state_of, p))
            return Candidates(p.detach(), *beside, grouping_of(step.values), scale_of(step.values, p))

        self._budgets = {}
        if any(budget_of(step.values) is not None for step in options):
            self._budgets = find_budgets(groups, [step.values for step in options], candidates)
        of_budgets = {}
        for key, members in self._budgets.items():
            tensors, room = [member.p for member in members], self._of_budgets.get(key)
            of_budgets[key] = room if room is not None and room.serves(*tensors) else Room.like(*tensors)
        self._of_budgets = of_budgets
        rooms: dict[Tensor, Room] = {}
        for group, step in zip(groups, options, strict=True):
            if step.topk:
                shared = of_budgets.get(budget_of(step.values))  # type: ignore[arg-type]
                for _, p in with_gradient(group):
                    if shared is not None and shared.serves(p) and scale_of(step.values, p) == 1:
                        rooms[p] = shared
                    else:
                        room = self._rooms.get(p)
                        rooms[p] = room if room is not None and _is_own(room, shared, p) else Room.like(p)
        self._rooms = rooms
        return {p: room.cut for p, room in rooms.items()}

    def select(
        self,
        groups: Sequence[Mapping[str, Any]],
        options: Sequence[StepOptions],
        state_of: Callable[[Tensor, str], Tensor | None],
        select: Select,
    ) -> None:
        """Fill the cuts of tensors from the weights of this step.

        Args:
            state_of: a state of a parameter by its name, None where it is missing.
            select: an engine's.
        """
        selections = []
        for group, step in zip(groups, options, strict=True):
            if step.topk and budget_of(step.values) is None:
                for _, p in with_gradient(group):
                    beside = states_beside(p, step, functools.partial(state_of, p))
                    candidates = [Candidates(p.detach(), *beside, grouping_of(step.values))]
                    selections.append(Selection.by_density(self._rooms[p], candidates, step.values["density"]))
        select(selections)

    def select_budgets(self, select_for: Callable[[Sequence[Tensor]], Select]) -> None:
        """Fill the cuts of budgets.

        Args:
            select_for: the selection of the engine that serves the parameters of a budget.
        """
        for key, members in self._budgets.items():
            room = self._of_budgets[key]
            select_budget(room, members, select_for([member.p for member in members]))
            for p, to in self._not_shared(room, members):
                put_cut(to, room.cut, scale_of(p.group, p.p))
        self._budgets = {}

    def _not_shared(self, room: Room, members: Sequence[Member]) -> Iterator[tuple[Member, Tensor]]:
        for member in members:
            own = self._rooms.get(member.p)
            if own is not None and own.cut is not room.cut:
                yield member, own.cut


def _is_own(room: Room, shared: Room | None, p: Tensor) -> bool:
    return room.serves(p) and (shared is None or room.cut is not shared.cut)


def select_budget(room: Room, members: Sequence[Member], select: Select) -> None:
    """Fill the cut of a budget."""
    select([Selection.by_density(room, [member.candidates for member in members], members[0].group["density"])])
