"""What a schedule counts: how many elements or groups parameters had when it began, and how many were removed since."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.parameter import is_lazy

from ..dist.coupled import CoupledWeight
from ..method.groups import group_count, group_size, grouping_of
from ..method.parameters import is_left_alone, param_name
from ..method.split import is_coupled
from .split_optimizer import SplitOptimizer


class _Had(NamedTuple):
    """What a parameter had when it was first counted: its members, and what decides about their number."""

    members: int
    shape: tuple[int, ...]
    grouping: str

    def became(self, now: _Had) -> bool:
        """Whether ``now`` is the same parameter with indices taken out, and not one whose groups were edited."""
        if (self.grouping, len(self.shape)) != (now.grouping, len(now.shape)) or now.members > self.members:
            return False
        fewer = all(n <= before for n, before in zip(now.shape, self.shape, strict=True))
        return fewer and (now.shape != self.shape or now.members == self.members)


def led(optimizer: SplitOptimizer) -> Iterator[tuple[int, Mapping[str, Any], str, Tensor]]:
    """(place of the group, group, name, parameter) of what a schedule of sparsity leads, each parameter once."""
    seen: set[int] = set()
    for i, group in enumerate(optimizer.param_groups):
        if group["penalty"] in (None, "nm"):
            continue
        for j, p in enumerate(group["params"]):
            if id(p) in seen or is_lazy(p) or is_left_alone(p) or not p.requires_grad or p.numel() == 0:
                continue
            seen.add(id(p))
            yield i, group, param_name(group, i, j), p


class Members:
    """The members of a schedule's competitions when it began, whatever is removed from the model afterwards.

    Args:
        of: "elements" or "groups"; top-k counts groups wherever it has them, as its density does.
    """

    def __init__(self, of: str) -> None:
        self._of = of
        self._had: dict[Tensor, _Had] = {}
        self._now: dict[Tensor, int] = {}
        self._names: dict[Tensor, str] = {}
        self._budgets: dict[int, Any] = {}  # of each group of top-k: what its density is a share of
        self._of_densities: dict[Any, tuple[int, int]] = {}  # of each such budget: how many are left, and removed
        self._seen: Any = None

    def stale(self, optimizer: SplitOptimizer) -> bool:
        """Whether groups have come or :func:`rvsm_kernels.shrink` has been there since the last count."""
        if self._seen is None:
            return True
        groups, view = self._seen
        return groups != len(optimizer.param_groups) or view() is not optimizer._view

    def count(self, optimizer: SplitOptimizer) -> None:
        """Count what there is. Parameters that are new, or whose groups were edited, begin with what they have."""
        self._seen = len(optimizer.param_groups), weakref.ref(optimizer._view)
        coupled = any(is_coupled(group) for group in optimizer.param_groups)
        weights = optimizer._couplings.find(optimizer.param_groups) if coupled else {}
        self._now, self._names, self._budgets, self._of_densities = {}, {}, {}, {}
        for i, group, name, p in led(optimizer):
            now = _Had(self._members(p, group, weights.get(p)), tuple(p.shape), repr(_grouping(group)))
            before = self._had.get(p)
            self._had[p] = before if before is not None and before.became(now) else now
            self._now[p], self._names[p] = now.members, name
            if group["penalty"] == "topk":
                budget = self._budgets[i] = _budget(i, group, weights.get(p))
                left_over, removed = self._of_densities.get(budget, (0, 0))
                self._of_densities[budget] = left_over + now.members, removed + self.removed(p)

    def _members(self, p: Tensor, group: Mapping[str, Any], weight: CoupledWeight | None) -> int:
        grouping = grouping_of(group)
        by_groups = self._of == "groups" or group["penalty"] == "topk"
        if weight is not None:
            slices = len(weight.firsts if by_groups else weight.slices)
        else:
            slices = p.numel() if grouping is None else group_count(p.shape, grouping)
        return slices if by_groups else slices * group_size(p.shape, grouping)

    def removed(self, p: Tensor) -> int:
        """How many of a parameter's members were removed before the last count."""
        return self._had[p].members - self._now[p] if p in self._now else 0

    def density(self, i: int, share: float) -> float:
        """The density of group ``i`` of top-k with which a share of what all of its tensors had is zero or removed."""
        now, removed = self._of_densities.get(self._budgets.get(i), (0, 0))
        if removed == 0 or now == 0:
            return max(1.0 - share, 1e-12)
        return min(1.0, max((now + removed) * (1.0 - share) / now, 1e-12))

    @property
    def share_removed(self) -> float:
        """The share of all members that were removed."""
        total = sum(self._had[p].members for p in self._now)
        return 1 - sum(self._now.values()) / total if total else 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": None}

    def state_dict(self) -> dict[str, Any]:
        """By name of a parameter, as plain values: what it had."""
        return {name: list(self._had[p]) for p, name in self._names.items()}

    def load_state_dict(self, state: Mapping[str, Any], optimizer: SplitOptimizer) -> None:
        """Go on with what parameters of these names had; those without an entry begin with what they have."""
        for _, _, name, p in led(optimizer):
            if name in state:
                members, shape, grouping = state[name]
                self._had[p] = _Had(int(members), tuple(shape), str(grouping))
        self.count(optimizer)


def left(share: float, had: int, removed: int) -> int:
    """How many of the members that are left have to be zero for a share of all that there were: the removed are."""
    return max(0, round(share * had) - removed)


def _budget(i: int, group: Mapping[str, Any], weight: CoupledWeight | None) -> Any:
    if group["budget"] == "global":
        return "budget", group["budget_name"]
    return i if weight is None else ("together", weight.leader)


def _grouping(group: Mapping[str, Any]) -> Any:
    """What tells an edit of the groups from a removal; a coupling is cut with its weight."""
    return group["group_dim"], group["group_block"], group["coupling_name"] if is_coupled(group) else None
