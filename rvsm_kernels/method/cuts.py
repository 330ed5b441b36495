"""The cuts of the parameters with top-k: one for each tensor, or one for all tensors of a budget."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .groups import group_size, grouping_of
from .memory import kind_of, refuse
from .parameters import is_left_alone, param_name, with_gradient
from .selection import Candidates, Room, Select, Selection, states_beside
from .split import is_coupled, is_topk
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
        candidates: those of a parameter, from (the place of its group, its place there, the parameter); may raise.

    Raises:
        ValueError: groups of one budget that differ in density, or of which one has a ``group_dim`` alone.
    """
    budgets: Budgets = {}
    coupled: set[Budget] = set()
    seen: set[int] = set()
    for i, (group, of_group) in enumerate(zip(groups, values, strict=True)):
        key = budget_of(of_group)
        if key is None:
            continue
        if is_coupled(of_group):  # their cuts are made of norms over several weights: dist/coupled_cuts.py
            coupled.add(key)
            continue
        members = budgets.setdefault(key, [])
        if members:
            check_budget(members[0].group, of_group)
        for j, p in enumerate(group["params"]):
            if p.requires_grad and not is_lazy(p) and not is_left_alone(p) and p.numel() > 0 and id(p) not in seen:
                seen.add(id(p))
                members.append(Member(p, of_group, candidates(i, j, p)))
    for key in coupled & budgets.keys():
        raise ValueError(
            f"a group of a budget (budget_name={key[0]!r}) has a coupling and another one has none: give them another"
            " budget_name each"
        )
    return {key: members for key, members in budgets.items() if members}


def check_budget(first: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Raise ValueError for two param groups that cannot share a cut."""
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


_ULPS = 4  # the product below is so near to what is looked for: three roundings lie between, and two numbers a rounding


def put_cut(to: Tensor, cut: Tensor, scale: float) -> None:
    """Write a budget's cut for one tensor: the largest magnitude that, divided by its scale, is not above the cut.

    So the tensor loses what was counted, also where magnitudes tie and all of them are to go.
    """
    if scale == 1 and to.dtype == cut.dtype:
        to.copy_(cut)
        return
    cut = cut.to(to.device)
    product = (cut.to(torch.float64) * scale).to(to.dtype)
    bits = product.view(torch.int64 if to.dtype == torch.float64 else torch.int32)
    near = (bits + torch.arange(-_ULPS, _ULPS + 1, dtype=bits.dtype, device=bits.device)).clamp_(min=0).view(to.dtype)
    compared = near if scale == 1 else near / scale  # as Candidates.magnitudes divides
    to.copy_(torch.where(compared.to(cut.dtype) <= cut, near, -1.0).amax())  # -1 where nothing goes to zero


class Cuts:
    """The cuts of parameters with top-k, each in memory that stays where it is from step to step."""

    def __init__(self) -> None:
        self._own: dict[Tensor, Room] = {}
        self._of_budgets: dict[Budget, Room] = {}
        # Of the step: the budgets, and the rooms of tensors that cannot share that of their budget: (the tensor's cut,
        # the budget's, what the budget's is multiplied by).
        self._budgets: Budgets = {}
        self._apart: list[tuple[Tensor, Tensor, float]] = []

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
            RuntimeError: a parameter of a budget whose memory was freed.
        """

        def candidates(i: int, j: int, p: Tensor) -> Candidates:
            step = options[i]
            if p.grad is None and kind_of(p) is None:  # no engine looks at it
                refuse(p, param_name(groups[i], i, j))
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
        own: dict[Tensor, Room] = {}
        cuts: dict[Tensor, Tensor] = {}
        self._apart = []
        for group, step in zip(groups, options, strict=True):
            shared = self._shared_room(step)
            for _, p in with_gradient(group) if step.topk else ():
                scale = 1.0 if shared is None else scale_of(step.values, p)
                if shared is not None and scale == 1 and shared.serves(p):
                    cuts[p] = shared.cut
                    continue
                room = self._own.get(p)
                own[p] = room if room is not None and room.serves(p) else Room.like(p)
                cuts[p] = own[p].cut
                if shared is not None:
                    self._apart.append((own[p].cut, shared.cut, scale))
        self._own = own
        return cuts

    def _shared_room(self, step: StepOptions) -> Room | None:
        """The room of a group's budget; None where it has none here, or where all parameters of it are frozen."""
        key = budget_of(step.values)
        return None if key is None or step.coupled else self._of_budgets.get(key)

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
            if step.topk and not step.coupled and self._shared_room(step) is None:
                for _, p in with_gradient(group):
                    beside = states_beside(p, step, functools.partial(state_of, p))
                    candidates = [Candidates(p.detach(), *beside, grouping_of(step.values))]
                    selections.append(Selection.by_density(self._own[p], candidates, step.values["density"]))
        select(selections)

    def select_budgets(self, select_for: Callable[[Sequence[Tensor]], Select]) -> None:
        """Fill the cuts of budgets.

        Args:
            select_for: the selection of the engine that serves the parameters of a budget.
        """
        for key, members in self._budgets.items():
            select_budget(self._of_budgets[key], members, select_for([member.p for member in members]))
        for to, cut, scale in self._apart:
            put_cut(to, cut, scale)
        self._budgets, self._apart = {}, []


def select_budget(room: Room, members: Sequence[Member], select: Select) -> None:
    """Fill the cut of a budget."""
    select([Selection.by_density(room, [member.candidates for member in members], members[0].group["density"])])
