"""Schedules of the penalty: a sparsity that is reached in steps, without any lam, and plain ramps of lam or beta."""

from __future__ import annotations

import dataclasses
import math
import numbers
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..method import device_numbers
from ..method.groups import group_size, grouping_of
from ..method.memory import kind_of, refuse
from ..method.options import shown, whole_number
from ..method.parameters import is_left_alone, param_name
from ..method.penalties import PENALTIES
from ..method.selection import Candidates, Room, Selection
from ..method.warn import warn
from .unwrap import optimizer_in


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


class _Population(NamedTuple):
    """Parameters whose elements or groups are compared with each other.

    Attributes:
        groups, sizes: of each parameter: its param group, and how many elements one of its groups has.
    """

    params: list[Tensor]
    groups: list[Mapping[str, Any]]
    sizes: list[int]


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
            ``"tensor"``: the target for each tensor, of groups with one tensor each or with top-k.
        pull_rate: rho: keeps lr * beta = rho, whatever schedule lr has, by setting ``beta``; (first, last): rho goes
            from one to the other between ``begin`` and ``end``. None leaves beta alone. For l0 and top-k: the pull of
            l1 and tl1 on the weights that survive would grow as lr falls, which is warned about.

    Raises:
        ValueError, TypeError: an argument out of range; top-k whose ``budget`` is not the scope; ``scope="tensor"``
            with several tensors in a group, for they share a lam; a group whose beta is 0.
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
    ) -> None:
        self._optimizer = optimizer_in(optimizer, "SparsitySchedule")
        if not _is_number(target) or not 0 <= target < 1:
            raise ValueError(f"Invalid target value: {shown(target)} (a share of zeros in [0, 1) is needed)")
        self.target = float(target)
        self.begin, self.every = whole_number("begin", begin, 0), whole_number("every", every, 1)
        self.end = whole_number("end", end, self.begin + 1)
        if not _is_number(power) or power <= 0:
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
            if len(rates) != 2 or not all(_is_number(r) and 0 < r <= 1 for r in rates):
                raise ValueError(f"Invalid pull_rate value: {shown(pull_rate)} (in (0, 1], or two such numbers)")
            self.pull_rate = rates
        self.last_step = 0
        self._handle: Any = None
        self._cuts: dict[str, _Cut] = {}  # of each kind, or of each group
        self._rooms: dict[str, Room] = {}
        for i, group in self._groups():
            self._check(i, group)
        self._checked = len(self._optimizer.param_groups)
        self._apply()

    def _groups(self) -> Iterator[tuple[int, dict[str, Any]]]:
        return ((i, group) for i, group in enumerate(self._optimizer.param_groups) if group["penalty"] is not None)

    def _check(self, i: int, group: Mapping[str, Any]) -> None:
        topk = group["penalty"] == "topk"
        budget = "global" if topk and group["budget"] == "global" else "tensor"
        if topk and self.scope != budget:
            raise ValueError(
                f"group {i}: top-k has budget={group['budget']!r}: scope={budget!r} is needed, or another budget"
            )
        if topk and self.scope == "global" and group["group_dim"] is not None and self.of == "elements":
            raise ValueError(f"group {i}: the density of a global budget is a share of groups: of='groups' is needed")
        if self.scope == "tensor" and not topk and len(group["params"]) > 1:
            raise ValueError(
                f"group {i} has {len(group['params'])} tensors, which share one lam: scope='tensor' needs groups of one"
                " tensor each, or penalty='topk'"
            )
        if self.pull_rate is not None and not topk and not PENALTIES[group["penalty"]].keeps_survivors:
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
        """The share of zeros that the schedule asks for now."""
        return self.target * (1 - (1 - self._progress) ** self.power)

    def __repr__(self) -> str:
        cuts = ", ".join(f"{key} {cut:.4g}" for key, cut in self._cuts.items() if cut is not None)
        return (
            f"SparsitySchedule(step {self.last_step} of {self.begin} to {self.end}: {self.sparsity:.2%} of"
            f" {self.target:.2%} {self.of} zero, scope {self.scope!r}" + (f"; cuts: {cuts})" if cuts else ")")
        )

    # ---- the step ----------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Go on by one step; call it after ``optimizer.step()``."""
        self.last_step += 1
        due = self.last_step - self.begin
        if due >= 0 and (due % self.every == 0 or self.last_step == self.end):
            self._select()
        self._apply()

    @torch.no_grad()
    def _select(self) -> None:
        """Look up the cuts that give the share of this step."""
        found = {key: self._cut(key, population) for key, population in self._populations().items()}
        for key, cut in found.items():
            if isinstance(cut, float) and not math.isfinite(cut):
                warn(f"SparsitySchedule: {key} are not finite, NaN or infinite: no cut can be found, and lam stays")
                found[key] = self._cuts.get(key)
        self._cuts = found

    def _populations(self) -> dict[str, _Population]:
        populations: dict[str, _Population] = {}
        seen: set[int] = set()
        for i, group in self._groups():
            if i >= self._checked:
                self._check(i, group)
                self._checked = i + 1
            if group["penalty"] == "topk":
                continue
            for j, p in enumerate(group["params"]):
                if id(p) in seen or is_lazy(p) or is_left_alone(p) or not p.requires_grad or p.numel() == 0:
                    continue
                if kind_of(p) is None:
                    refuse(p, param_name(group, i, j))
                seen.add(id(p))
                population = populations.setdefault(self._key(i, group), _Population([], [], []))
                population.params.append(p)
                population.groups.append(group)
                population.sizes.append(group_size(p.shape, grouping_of(group)))
        return populations

    def _key(self, i: int, group: Mapping[str, Any]) -> str:
        if self.scope == "tensor":
            return f"group {i}"
        if _is_scaled(group):
            return f"groups by scale, {group['penalty']} of a {group['a']}"
        return "elements" if group["group_dim"] is None else "groups"

    def _cut(self, key: str, population: _Population) -> _Cut:
        """The cut of a population; where its groups are scaled, the lam / beta at which that share of them goes.

        It stays on the device where every lam is read there.
        """
        of_each = zip(population.params, population.groups, strict=True)
        found = [self._optimizer._view.candidates(p, group) for p, group in of_each]
        candidates = [dataclasses.replace(c, scale=1.0) for c in found]  # see _taus
        select = self._optimizer._view.select_for(population.params)
        of_elements = self.of == "elements" and set(population.sizes) != {1}
        if of_elements or any(map(_is_scaled, population.groups)):
            candidates, zeros = self._by_size(population, candidates)
        else:
            zeros = round(self.sparsity * sum(c.count() for c in candidates))
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

    def _by_size(self, population: _Population, candidates: Sequence[Candidates]) -> tuple[list[Candidates], int]:
        """What is compared of groups of several sizes, and how many of them go to zero."""
        scaled = [
            _taus(c.magnitudes(), g, n) if _is_scaled(g) else c.magnitudes()
            for c, g, n in zip(candidates, population.groups, population.sizes, strict=True)
        ]
        first = scaled[0]
        if self.of == "groups":
            return [Candidates(r) for r in scaled], round(self.sparsity * sum(r.numel() for r in scaled))
        together = torch.cat([r.to(first.device, torch.float64) for r in scaled])
        sizes = torch.cat(
            [
                torch.full(r.shape, n, dtype=torch.int64, device=first.device)
                for r, n in zip(scaled, population.sizes, strict=True)
            ]
        )
        zeros = sizes[together.argsort()].cumsum(0)  # elements that are zero if so many groups are
        wanted = self.sparsity * float(zeros[-1])
        k = int((zeros <= wanted).sum())
        if k < len(zeros) and float(zeros[k]) - wanted < wanted - (float(zeros[k - 1]) if k > 0 else 0.0):
            k += 1
        return [Candidates(together)], k

    def _apply(self) -> None:
        """Set lam, density and beta of every group."""
        self._watch()
        for i, group in self._groups():
            if self.pull_rate is not None:
                first, last = self.pull_rate
                rate, lr = first + (last - first) * self._progress, group["lr"]
                if device_numbers.is_positive(lr):  # lr 0 moves nothing, whatever beta is
                    _set(group, "beta", rate / lr)
            if group["penalty"] == "topk":
                group["density"] = max(1.0 - self.sparsity, 1e-12)
                continue
            key = self._key(i, group)
            if self._cuts and key not in self._cuts:
                continue  # it came or was edited after the last look, and is led from the next one on
            cut = self._cuts.get(key)
            tau: Any = 0.0
            if cut is None:
                pass
            elif _is_scaled(group):
                tau = cut  # what was looked up: see _magnitudes
            else:
                tau = PENALTIES[group["penalty"]].tau(torch.as_tensor(cut, dtype=torch.float64), float(group["a"]))
            if isinstance(cut, Tensor):  # NaN and infinity are not waited for: lam stays
                lam = group["beta"] * tau
                tau = torch.where(torch.isfinite(lam), lam, group["lam"]) / group["beta"]
            _set(group, "lam", group["beta"] * (tau if isinstance(group["lam"], Tensor) else float(tau)))

    def _watch(self) -> None:
        """With a pull_rate: set beta from lr once more when a step begins; a scheduler may have moved lr by then."""
        if self.pull_rate is None or self._handle is not None:
            return
        me = weakref.ref(self)  # the optimizer must not keep the schedule

        def before_step(optimizer: Any, args: Any, kwargs: Any) -> None:
            schedule = me()
            if schedule is not None:
                schedule._apply()

        self._handle = self._optimizer.register_step_pre_hook(before_step)

    def __getstate__(self) -> dict[str, Any]:
        # Hooks are no part of an optimizer's copy, and what the rooms remember must not matter.
        return {**self.__dict__, "_handle": None, "_rooms": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({"_rooms": {}, **state})  # 0.1.0 pickled none
        self._watch()

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule is, as plain values; what was given to the constructor is not in it."""
        cuts = {key: None if cut is None else float(cut) for key, cut in self._cuts.items()}
        return {"last_step": self.last_step, "cuts": cuts}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from there; the optimizer's lam and beta are those of that step then."""
        self.last_step, self._cuts = int(state_dict["last_step"]), dict(state_dict["cuts"])
        self._apply()


def _taus(norms: Tensor, group: Mapping[str, Any], size: int) -> Tensor:
    """The lam / beta at which each group goes to zero with ``group_scale``."""
    return PENALTIES[group["penalty"]].tau(norms.double(), float(group["a"])) / math.sqrt(size)


def _is_scaled(group: Mapping[str, Any]) -> bool:
    return bool(group["group_scale"]) and group["group_dim"] is not None


def _set(group: dict[str, Any], name: str, value: Any) -> None:
    """Set an option; where it is a tensor, what the tensor holds. A number that is not finite sets nothing."""
    if isinstance(group[name], Tensor):
        group[name].copy_(torch.as_tensor(value), non_blocking=True)
    elif math.isfinite(value):
        group[name] = float(value)


SHAPES = {
    "constant": lambda t: 1.0 if t >= 1 else 0.0,
    "linear": lambda t: t,
    "cosine": lambda t: (1 - math.cos(math.pi * t)) / 2,
}


class PenaltySchedule:
    """Lead lam or beta from one multiple of its value to another, in the style of ``torch.optim.lr_scheduler``.

    ::

        warm_up = rk.PenaltySchedule(optimizer, "lam", steps=1000)  # from 0 to the lam of each group
        ...
        optimizer.step()
        warm_up.step()

    Args:
        optimizer: RVSM, RVSMAdamW, RVSMWrapper or a wrapper around one of them. Every group with a penalty is led.
        option: ``"lam"`` or ``"beta"``.
        steps: how many steps it takes.
        begin: steps before it begins, in which the option has ``first`` times its value.
        first, last: what the option's value is multiplied by at the beginning and at the end.
        shape: ``"linear"``, ``"cosine"``, or ``"constant"``: ``first`` up to the end, then ``last``.

    Raises:
        ValueError, TypeError: an argument out of range.
    """

    def __init__(
        self,
        optimizer: Any,
        option: str = "lam",
        *,
        steps: int,
        begin: int = 0,
        first: float = 0.0,
        last: float = 1.0,
        shape: str = "linear",
    ) -> None:
        self._optimizer = optimizer_in(optimizer, "PenaltySchedule")
        for name, value, choices in (("option", option, ("lam", "beta")), ("shape", shape, tuple(SHAPES))):
            if value not in choices:
                raise ValueError(
                    f"Invalid {name} value: {shown(value)} (choose one of {', '.join(map(repr, choices))})"
                )
        for name, number in (("first", first), ("last", last)):
            if not _is_number(number) or number < 0:
                raise ValueError(f"Invalid {name} value: {shown(number)} (a number >= 0 is needed)")
        self.option, self.shape, self.first, self.last = option, shape, float(first), float(last)
        self.steps, self.begin = whole_number("steps", steps, 1), whole_number("begin", begin, 0)
        self.last_step = 0
        self.base_values: list[float] = []
        for i, group in enumerate(self._optimizer.param_groups):
            if group["penalty"] is not None and float(group[option]) == 0:
                warn(f"PenaltySchedule: {option} of group {i} is 0, and so is every multiple of it")
        self._apply()

    @property
    def factor(self) -> float:
        """What the option's value is multiplied by now."""
        t = min(max((self.last_step - self.begin) / self.steps, 0.0), 1.0)
        return self.first + (self.last - self.first) * SHAPES[self.shape](t)

    def step(self) -> None:
        """Go on by one step; call it after ``optimizer.step()``."""
        self.last_step += 1
        self._apply()

    def _apply(self) -> None:
        groups = self._optimizer.param_groups
        self.base_values += [float(group[self.option]) for group in groups[len(self.base_values) :]]
        for group, base in zip(groups, self.base_values, strict=True):
            if group["penalty"] is not None:
                _set(group, self.option, base * self.factor)

    def __repr__(self) -> str:
        return f"PenaltySchedule(step {self.last_step}: {self.factor:.4g} times {self.option})"

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule is, and the values that it multiplies."""
        return {"last_step": self.last_step, "base_values": list(self.base_values)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from there. Groups that the checkpoint does not have keep the values that they had at the beginning.

        Raises:
            ValueError: a checkpoint of more groups than there are.
        """
        saved = [float(value) for value in state_dict["base_values"]]
        if len(saved) > len(self._optimizer.param_groups):
            raise ValueError(
                f"the checkpoint of the schedule has {len(saved)} groups, the optimizer"
                f" {len(self._optimizer.param_groups)}"
            )
        self.last_step, self.base_values = int(state_dict["last_step"]), saved + self.base_values[len(saved) :]
        self._apply()
