"""A sparsity that is reached in steps, without any lam."""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dist.gathered import has_flat_params
from ..method import device_numbers
from ..method.groups import group_size, grouping_of
from ..method.memory import kind_of, refuse
from ..method.options import is_number, shown, whole_number
from ..method.penalties import PENALTIES
from ..method.selection import Candidates, Room, Selection
from ..method.split import is_coupled
from ..method.warn import warn
from .hold import penalised_groups
from .members import Members, led, left
from .unwrap import optimizer_in


class _Population(NamedTuple):
    """Parameters whose elements or groups are compared with each other.

    Attributes:
        groups, sizes: of each parameter: its param group, and how many elements one of its groups has.
        scales: what ``group_scale`` takes for that number: of coupled groups another one.
        removed: how many of its elements or groups were removed since the schedule began.
    """

    params: list[Tensor]
    groups: list[Mapping[str, Any]]
    sizes: list[int]
    scales: list[float]
    removed: list[int]

    def those_of(self, wanted: Sequence[bool]) -> _Population:
        """The parameters that are wanted."""
        columns = [[x for x, keep in zip(column, wanted, strict=True) if keep] for column in self]
        return _Population(*columns)  # type: ignore[arg-type]


_Cut = float | Tensor | None
"""None where nothing goes to zero; a 0-dim tensor where nobody has read it from its device."""


class SparsitySchedule:
    """Lead the share of zeros of u to a target: name the sparsity, not lam.

    ::

        optimizer = rk.RVSM(rk.param_groups(model, penalty="l0", beta=1.0), lr=0.1, momentum=0.9)
        schedule = rk.SparsitySchedule(optimizer, 0.9, begin=200, end=2000)
        ...
        optimizer.step()
        schedule.step()

    The share follows s(t) = target * (1 - (1 - t')^power), t' = (t - begin) / (end - begin) (Zhu & Gupta, arXiv
    1710.01878, for power 3): 0 before ``begin``, the target from ``end`` on. Every few steps the cut that gives s(t) is
    looked up among the magnitudes, and ``lam`` is set to what has that cut: beta * cut^2 / 2 for l0, beta * cut for l1,
    the inverse of its cut for transformed l1; for top-k ``density`` is set to 1 - s(t). Nothing else is edited. With
    ``group_scale`` norms are compared after each group's scale is divided out.

    The share is one of what was there when the schedule was made. What :func:`rvsm_kernels.shrink` has removed since
    counts as zero, so that the rest alone is asked for of what is left, or nothing. Parameters that come later count
    with what they have then.

    Groups with ``penalty="nm"`` are left alone, but for ``pull_rate``: the pattern says how many of their elements are
    zero.

    Elements and groups are not compared with each other: of an optimizer that has both, each kind has a cut of its
    own, with the same target.

    Args:
        optimizer: RVSM, RVSMAdamW, RVSMWrapper or a wrapper around one of them (:func:`rvsm_kernels.unwrap`). Its
            groups with a penalty are led, those that are added later too; their lam is 0 until ``begin``.
        target: the share of zeros at the end, in [0, 1).
        end, begin: steps of the schedule.
        power: 1 for a straight line; 3: fast at first, slow in the end.
        every: steps from one look at the weights to the next.
        of: what is counted: ``"elements"``, those of zero groups where the penalty is on groups; or ``"groups"``.
        scope: ``"global"``: one cut for all tensors, so that a layer with small weights loses more of them;
            ``"tensor"``: the target for each tensor, of groups with one tensor each or with top-k, or for the weights
            whose coupled groups hang together.
        pull_rate: rho: keeps lr * beta = rho, whatever schedule lr has, by setting ``beta``; (first, last): rho goes
            from one to the other between ``begin`` and ``end``. None leaves beta alone. For l0 and top-k: the pull of
            l1 and tl1 on the weights that survive would grow as lr falls, which is warned about.
        hold: at ``end`` w becomes u for good (``sparsify_(hold=True)``), and from then on what is 0 stays 0, its states
            too, and nothing is pulled any more: the weights that survive are trained on with a fixed support. Groups
            that are added later are not led then.

    Raises:
        ValueError, TypeError: an argument out of range; top-k whose ``budget`` is not the scope; ``scope="tensor"``
            with several tensors in a group, for they share a lam; a group whose beta is 0; no group with another
            penalty than ``"nm"``, whose sparsity is that of its pattern; ``hold`` under FSDP1,
            and where zeros cannot be held (AdamW with an eps of 0).
    """

    def __init__(
        self,
        optimizer: Any,
        target: float,
        *,
        end: int,
        begin: int = 0,
        power: float = 3.0,
        every: int = 16,
        of: str = "elements",
        scope: str = "global",
        pull_rate: float | tuple[float, float] | None = None,
        hold: bool = False,
    ) -> None:
        self._optimizer = optimizer_in(optimizer, "SparsitySchedule")
        if not is_number(target) or not 0 <= target < 1:
            raise ValueError(f"Invalid target value: {shown(target)} (a share of zeros in [0, 1) is needed)")
        self.target = float(target)
        self.begin, self.every = whole_number("begin", begin, 0), whole_number("every", every, 1)
        self.end = whole_number("end", end, self.begin + 1)
        if not is_number(power) or power <= 0:
            raise ValueError(f"Invalid power value: {shown(power)} (a number above 0 is needed)")
        self.power = float(power)
        for name, value, choices in (("of", of, ("elements", "groups")), ("scope", scope, ("global", "tensor"))):
            if value not in choices:
                raise ValueError(
                    f"Invalid {name} value: {shown(value)} (choose one of {', '.join(map(repr, choices))})"
                )
        self.of, self.scope = of, scope
        self.pull_rate: tuple[float, float] | None = None
        if pull_rate is not None:
            rates = tuple(pull_rate) if isinstance(pull_rate, (tuple, list)) else (pull_rate, pull_rate)
            if len(rates) != 2 or not all(is_number(r) and 0 < r <= 1 for r in rates):
                raise ValueError(f"Invalid pull_rate value: {shown(pull_rate)} (in (0, 1], or two such numbers)")
            self.pull_rate = rates
        if not isinstance(hold, bool):
            raise ValueError(f"Invalid hold value: {shown(hold)} (True or False is needed)")
        if hold and has_flat_params(self._optimizer.param_groups):
            raise ValueError(
                "hold=True: FullyShardedDataParallel cannot be told to gather weights anew: take FSDP2 (fully_shard)"
            )
        if hold:
            penalised_groups(self._optimizer)
        self.hold = hold
        self.holds = False  # whether zeros are held already
        self._held_groups = 0  # how many param groups there were then
        self.last_step = 0
        self._handles: list[Any] = []
        self._members = Members(of)
        self._cuts: dict[str, _Cut] = {}  # of each kind, or of each group
        self._rooms: dict[str, Room] = {}
        for i, group in self._groups():
            self._check(i, group)
        penalties = {group["penalty"] for _, group in self._groups()}
        if penalties == {"nm"}:
            raise ValueError(
                "SparsitySchedule has nothing to lead: penalty='nm' zeroes what its pattern says, from the first step"
                " on; take penalty='topk' or 'l0' for a sparsity that grows, or PenaltySchedule for a ramp of beta"
            )
        self._checked = len(self._optimizer.param_groups)
        self._apply()

    def _groups(self) -> Iterator[tuple[int, dict[str, Any]]]:
        return ((i, group) for i, group in enumerate(self._optimizer.param_groups) if group["penalty"] is not None)

    def _check(self, i: int, group: Mapping[str, Any]) -> None:
        topk, nm = (group["penalty"] == name for name in ("topk", "nm"))
        budget = "global" if topk and group["budget"] == "global" else "tensor"
        if topk and self.scope != budget:
            raise ValueError(
                f"group {i}: top-k has budget={group['budget']!r}: scope={budget!r} is needed, or another budget"
            )
        if topk and self.scope == "global" and group["group_dim"] is not None and self.of == "elements":
            raise ValueError(f"group {i}: the density of a global budget is a share of groups: of='groups' is needed")
        if self.scope == "tensor" and not (topk or nm or is_coupled(group)) and len(group["params"]) > 1:
            raise ValueError(
                f"group {i} has {len(group['params'])} tensors, which share one lam: scope='tensor' needs groups of one"
                " tensor each, or penalty='topk'"
            )
        if self.pull_rate is not None and not (topk or nm) and not PENALTIES[group["penalty"]].keeps_survivors:
            warn(
                f"group {i}: {group['penalty']} pulls the weights that survive too; with a pull_rate that pull grows as"
                " lr falls, until it shrinks the network away: leave pull_rate=None and set beta, or take l0"
            )
        if self.pull_rate is None and not device_numbers.is_positive(group["beta"]):
            raise ValueError(f"group {i}: beta is 0, so that nothing pulls; set beta, or give a pull_rate")

    # ---- where the schedule is ---------------------------------------------------------------------------------------

    @property
    def _progress(self) -> float:
        return min(max((self.last_step - self.begin) / (self.end - self.begin), 0.0), 1.0)

    @property
    def sparsity(self) -> float:
        """The share of zeros that the schedule asks for now, of what was there when it began; removed ones count."""
        return self.target * (1 - (1 - self._progress) ** self.power)

    @property
    def removed(self) -> float:
        """The share of what was there when the schedule began that :func:`rvsm_kernels.shrink` has removed since."""
        if self._members.stale(self._optimizer):
            self._members.count(self._optimizer)
        return self._members.share_removed

    @property
    def sparsity_left(self) -> float:
        """The share of zeros that the schedule asks for of what is left: what ``optimizer.sparsity()`` can be held to.

        Over all competitions together. Without a removal it is :attr:`sparsity`.
        """
        removed = self.removed
        return max(0.0, (self.sparsity - removed) / (1 - removed)) if 0 < removed < 1 else self.sparsity

    def __repr__(self) -> str:
        cuts = ", ".join(f"{key} {cut:.4g}" for key, cut in self._cuts.items() if cut is not None)
        return (
            f"SparsitySchedule(step {self.last_step} of {self.begin} to {self.end}: {self.sparsity:.2%} of"
            f" {self.target:.2%} {self.of} zero{', held' if self.holds else ''}, scope {self.scope!r}"
            + (f"; cuts: {cuts})" if cuts else ")")
        )

    # ---- the step ----------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Go on by one step; call it after ``optimizer.step()``."""
        self.last_step += 1
        due = self.last_step - self.begin
        holds_from_now = self.hold and not self.holds and self.last_step >= self.end
        if holds_from_now or (due >= 0 and (due % self.every == 0 or self.last_step == self.end) and not self.holds):
            self._select()
        self._apply()
        if holds_from_now:
            self._optimizer.sparsify_(hold=True)
            self.holds, self._held_groups = True, len(self._optimizer.param_groups)
            self._apply()

    @torch.no_grad()
    def _select(self) -> None:
        """Look up the cuts that give the share of this step."""
        self._optimizer._view.forget_cuts()
        self._members.count(self._optimizer)
        found = {key: self._cut(key, population) for key, population in self._populations().items()}
        for key, cut in found.items():
            if isinstance(cut, float) and not math.isfinite(cut):
                warn(f"SparsitySchedule: {key} are not finite, NaN or infinite: no cut can be found, and lam stays")
                found[key] = self._cuts.get(key)
        self._cuts = found

    def _populations(self) -> dict[str, _Population]:
        for i, added in self._groups():
            if i >= self._checked:
                self._check(i, added)
                self._checked = i + 1
        populations: dict[str, _Population] = {}
        for i, group, name, p in led(self._optimizer):
            if group["penalty"] == "topk":
                continue
            if kind_of(p) is None:
                refuse(p, name)
            population = populations.setdefault(self._key(i, group), _Population([], [], [], [], []))
            population.params.append(p)
            population.groups.append(group)
            population.sizes.append(group_size(p.shape, grouping_of(group)))
            population.scales.append(self._optimizer._view.coupled.size_of_groups(p, group))
            population.removed.append(self._members.removed(p))
        return populations

    def _key(self, i: int, group: Mapping[str, Any]) -> str:
        if self.scope == "tensor":
            return f"group {self._optimizer._view.coupled.leading_group(i, group)}"
        if _is_scaled(group):
            return f"groups by scale, {group['penalty']} of a {group['a']}"
        return "elements" if group["group_dim"] is None else "groups"

    def _cut(self, key: str, population: _Population) -> _Cut:
        """The cut of a population; where its groups are scaled, the lam / beta at which that share of them goes.

        It stays on the device where every lam is read there.
        """
        of_each = zip(population.params, population.groups, strict=True)
        found = [self._optimizer._view.candidates(p, group, self.of == "groups") for p, group in of_each]
        removed = sum(population.removed)  # also of weights that have nothing left
        population = population.those_of([c.count() > 0 for c in found])
        found = [c for c in found if c.count() > 0]
        if not found:
            return None
        candidates = [dataclasses.replace(c, scale=1.0) for c in found]  # see _taus
        select = self._optimizer._view.select_for(population.params)
        of_elements = self.of == "elements" and set(population.sizes) != {1}
        if of_elements or any(map(_is_scaled, population.groups)):
            candidates, zeros = self._by_size(population, candidates, removed)
        else:
            zeros = left(self.sparsity, sum(c.count() for c in candidates) + removed, removed)
        if zeros == 0:
            return None
        tensors = [c.w for c in candidates]
        room = self._rooms.get(key)
        if room is None or not room.serves(*tensors):
            room = self._rooms[key] = Room.like(*tensors)
        # Halfway to the smallest one that stays, so that no rounding of what follows from the cut moves it across.
        select([Selection(*room, candidates, sum(c.count() for c in candidates) - zeros, between=True)])
        on_device = room.cut.device.type != "cpu" and all(isinstance(g["lam"], Tensor) for g in population.groups)
        return room.cut.clone() if on_device else float(room.cut)

    def _by_size(
        self, population: _Population, candidates: Sequence[Candidates], removed: int
    ) -> tuple[list[Candidates], int]:
        """What is compared of groups of several sizes, and how many of them go to zero beside the removed."""
        scaled = [
            _taus(c.magnitudes(), g, n) if _is_scaled(g) else c.magnitudes()
            for c, g, n in zip(candidates, population.groups, population.scales, strict=True)
        ]
        first = scaled[0]
        if self.of == "groups":
            had = sum(r.numel() for r in scaled) + removed
            return [Candidates(r) for r in scaled], left(self.sparsity, had, removed)
        together = torch.cat([r.to(first.device, torch.float64) for r in scaled])
        sizes = torch.cat(
            [
                torch.full(r.shape, n, dtype=torch.int64, device=first.device)
                for r, n in zip(scaled, population.sizes, strict=True)
            ]
        )
        zeros = sizes[together.argsort()].cumsum(0)  # elements that are zero if so many groups are
        wanted = max(0.0, self.sparsity * (float(zeros[-1]) + removed) - removed)
        k = int((zeros <= wanted).sum())
        if k < len(zeros) and float(zeros[k]) - wanted < wanted - (float(zeros[k - 1]) if k > 0 else 0.0):
            k += 1
        return [Candidates(together)], k

    def _apply(self) -> None:
        """Set lam, density and beta of every group."""
        self._watch()
        if self._members.stale(self._optimizer):
            self._members.count(self._optimizer)
        for i, group in self._groups():
            if self.pull_rate is not None:
                first, last = self.pull_rate
                rate, lr = first + (last - first) * self._progress, group["lr"]
                if device_numbers.is_positive(lr):  # lr 0 moves nothing, whatever beta is
                    device_numbers.put(group, "beta", rate / lr)
            if group["penalty"] == "topk":
                group["density"] = self._members.density(i, self.sparsity)
            if self.holds:
                if i < self._held_groups:
                    device_numbers.put(group, "lam", 0.0)
                continue
            if group["penalty"] in ("topk", "nm"):
                continue
            key = self._key(i, group)
            if self._cuts and key not in self._cuts:
                continue  # it came or was edited after the last look, and is led from the next one on
            cut = self._cuts.get(key)
            tau: Any = 0.0
            if cut is None:
                pass
            elif _is_scaled(group):
                tau = cut  # what was looked up: see _taus
            else:
                tau = PENALTIES[group["penalty"]].tau(torch.as_tensor(cut, dtype=torch.float64), float(group["a"]))
            if isinstance(cut, Tensor):  # NaN and infinity are not waited for: lam stays
                lam = group["beta"] * tau
                tau = torch.where(torch.isfinite(lam), lam, group["lam"]) / group["beta"]
            device_numbers.put(group, "lam", group["beta"] * (tau if isinstance(group["lam"], Tensor) else float(tau)))

    def _watch(self) -> None:
        """When a step begins: beta anew, for a scheduler may have moved lr, and densities, after a removal."""
        topk = any(group["penalty"] == "topk" for _, group in self._groups())
        if (self.pull_rate is None and not topk) or self._handles:
            return
        me = weakref.ref(self)  # the optimizer must not keep the schedule

        def before_step(optimizer: Any, args: Any, kwargs: Any) -> None:
            schedule = me()
            if schedule is None:
                return
            if schedule.pull_rate is not None or schedule._members.stale(schedule._optimizer):
                schedule._apply()

        self._handles = [self._optimizer.register_step_pre_hook(before_step)]

    def __getstate__(self) -> dict[str, Any]:
        # Hooks are no part of an optimizer's copy, and what the rooms remember must not matter.
        return {**self.__dict__, "_handles": [], "_rooms": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        earlier = {"_rooms": {}, "hold": False, "holds": False, "_held_groups": 0, "_handles": []}
        state = {key: value for key, value in state.items() if key != "_hold"}
        self.__dict__.update({**earlier, "_members": Members(state["of"]), **state})  # what 0.1.0 did not pickle
        self._watch()

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule is, as plain values; what was given to the constructor is not in it."""
        cuts = {key: None if cut is None else float(cut) for key, cut in self._cuts.items()}
        return {
            "last_step": self.last_step,
            "cuts": cuts,
            "holds": self.holds,
            "held_groups": self._held_groups,
            "members": self._members.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from there; the optimizer's lam and beta are those of that step then.

        What parameters had when the schedule began is found by their names, or their places where they have none. A
        checkpoint without it (of an earlier version) leaves what they have had here.
        """
        self.last_step, self._cuts = int(state_dict["last_step"]), dict(state_dict["cuts"])
        held = self._held_groups
        self.holds = self.hold and bool(state_dict.get("holds", False))  # 0.1.0 does not say
        count = int(state_dict.get("held_groups", len(self._optimizer.param_groups)))
        self._held_groups = count if self.holds else 0
        # The optimizer may have loaded a checkpoint that does not say which zeros are held.
        for group in self._optimizer.param_groups[: max(held, self._held_groups)]:
            if group["penalty"] is not None:
                group["hold_zeros"] = self.holds
        self._members.load_state_dict(state_dict.get("members", {}), self._optimizer)
        self._apply()


def _taus(norms: Tensor, group: Mapping[str, Any], size: float) -> Tensor:
    """The lam / beta at which each group goes to zero with ``group_scale``."""
    return PENALTIES[group["penalty"]].tau(norms.double(), float(group["a"])) / math.sqrt(size)


def _is_scaled(group: Mapping[str, Any]) -> bool:
    return bool(group["group_scale"]) and group["group_dim"] is not None
