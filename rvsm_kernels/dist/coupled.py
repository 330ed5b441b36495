"""Coupled groups: the slices of several weights that read one channel share a norm, and so one shrink factor.

A param group's ``coupling`` has an integer for each index of ``group_dim`` (each block of ``group_block`` indices).
Equal integers under one ``coupling_name``, in one weight or in several, are one group: ||w_G||^2 is the sum over all
of its slices (docs/method.md, section 2). A slice with a negative integer belongs to none, and is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..engines.squares import squares
from ..method.device_numbers import is_on_device
from ..method.dtypes import opmath_type
from ..method.groups import Grouping, group_dims, group_size, grouping_of, size_of_block
from ..method.memory import kind_of
from ..method.parameters import is_left_alone, param_name
from ..method.penalties import PENALTIES, shrink
from ..method.statistics import COLUMNS
from ..method.step_options import StepOptions
from .coupled_cuts import coupled_cuts, populations
from .norms import rows_of as of_weights
from .shards import dividing_ranks, first_index_here, is_sharded, refuse_cut_blocks, shard_of

_PENALTY = COLUMNS.index("penalty")
_FREE = 1e30
"""What stands for the norm of slices of no group: no penalty moves a group so large, nor does a group lasso."""
_ALIKE = ("penalty", "lam", "beta", "a", "group_scale")
"""What weights that hang together must agree on."""
_ALIKE_OF_TOPK = (*_ALIKE, "density", "budget", "budget_name")


class CoupledWeight(NamedTuple):
    """A weight of coupled groups.

    Attributes:
        place: that of its param group.
        slices: the coupled group of each of its slices that belongs to one, int64, on its device.
        here: the same of all slices that this rank has a part of; those of no group have the number behind the last.
        firsts: the coupled groups that it has the first slice of, int64.
        leader: the place of the group and the name of the first weight that hangs together with it: that has a group
            with it, directly or through others.
        share: 1 / (how many slices the coupled group of each slice here has), float64; 0 for those of no group.
        size: the mean number of elements of the groups that hang together with its own: what ``group_scale`` takes.
    """

    p: Tensor
    place: int
    name: str
    grouping: Grouping
    slices: Tensor
    here: Tensor
    firsts: Tensor
    leader: tuple[int, str]
    share: Tensor
    size: float


class Norms(NamedTuple):
    """Norms of the groups of a CoupledWeight, float64: of its slices, of those here, of its firsts."""

    slices: Tensor
    here: Tensor
    firsts: Tensor


class _Sums(NamedTuple):
    """Members whose slices lie on the same ranks.

    Attributes:
        ranks: the process groups over which the elements of a slice or the slices lie; empty for plain tensors.
        order: the slices here of all members, those of a coupled group one after the other.
        lengths: how many slices here each coupled group has.
    """

    ranks: tuple[Any, ...]
    members: list[CoupledWeight]
    order: Tensor
    lengths: Tensor

    def add(self, total: Tensor, rows_of: Callable[[CoupledWeight], Sequence[Tensor]]) -> None:
        """Add the squares of the coupled groups to (rows, groups) numbers, which are those of all ranks then."""
        tensors = [(rows_of(member), member.grouping) for member in self.members]
        of_rows = []
        for row in range(len(total)):
            sums = squares([(of_member[min(row, len(of_member) - 1)], dims) for of_member, dims in tensors])
            of_rows.append(torch.segment_reduce(torch.cat(sums)[self.order], "sum", lengths=self.lengths, unsafe=True))
        part = torch.stack(of_rows)
        for group in self.ranks:
            torch.distributed.all_reduce(part, group=group)
        total += part


class _Device(NamedTuple):
    """The members on one device, in the order of the param groups, and how their sums are added.

    Attributes:
        groups: how many coupled groups there are.
    """

    members: list[CoupledWeight]
    sums: list[_Sums]
    groups: int
    device: torch.device

    def norms(self, rows_of: Callable[[CoupledWeight], Sequence[Tensor]], rows: int) -> Tensor:
        """The norms of all coupled groups and one for slices of none, float64 (rows, groups + 1), along a fixed order.

        Args:
            rows_of: tensors like what a rank has of a weight, whose norms are wanted; where there are fewer than
                ``rows``, the last counts.
        """
        total = torch.zeros(rows, self.groups + 1, dtype=torch.float64, device=self.device)
        for sums in self.sums:
            sums.add(total, rows_of)
        total.sqrt_()[:, self.groups] = _FREE
        return total


class _Rooms(NamedTuple):
    """Room for the norms of the weights that a step moves, which stays where it is from step to step.

    Attributes:
        wanted: the weights, and how many norms each group of them needs.
        by_param: the room of each weight, float64 of shape (norms, slices here).
        of_devices: for each device all of its rooms as one tensor, and which of the norms stands where.
    """

    wanted: Sequence[tuple[Tensor, int]] = ()
    by_param: Mapping[Tensor, Tensor] = MappingProxyType({})
    of_devices: Sequence[tuple[Tensor, Tensor]] = ()

    @classmethod
    def of(cls, wanted: Sequence[tuple[Tensor, int]], devices: Sequence[_Device]) -> _Rooms:
        rows_of, by_param, of_devices = dict(wanted), {}, []
        for members, _, groups, device in devices:
            moved = [member for member in members if member.p in rows_of]
            places = [torch.cat([m.here + k * (groups + 1) for k in range(rows_of[m.p])]) for m in moved]
            flat = torch.empty(sum(map(len, places)), dtype=torch.float64, device=device)
            for member, room in zip(moved, flat.split([len(of_member) for of_member in places]), strict=True):
                by_param[member.p] = room.view(rows_of[member.p], len(member.here))
            of_devices.append((flat, torch.cat(places) if places else torch.empty(0, dtype=torch.int64, device=device)))
        return cls(wanted, by_param, of_devices)


class Couplings:
    """The coupled groups of the param groups of one optimizer; looked for anew where these have changed."""

    def __init__(self) -> None:
        self._seen: list[Any] = []
        self._devices: list[_Device] = []
        self._by_param: dict[Tensor, CoupledWeight] = {}
        self._rooms = _Rooms()
        self._sized: dict[int, tuple[StepOptions, float, StepOptions]] = {}

    def find(self, groups: Sequence[Mapping[str, Any]]) -> Mapping[Tensor, CoupledWeight]:
        """The weights of coupled groups, with a gradient or without, frozen ones too.

        Raises:
            ValueError: weights of one coupled group with other options, or on other devices; shards that cut a block.
            TypeError: a tensor without memory of its own.
        """
        seen = _seen(groups)
        if seen != self._seen:
            self._devices, self._by_param, self._rooms = _couple(list(_members(groups))), {}, _Rooms()
            for device in self._devices:
                self._by_param.update((member.p, member) for member in device.members)
            self._seen = seen
        for device in self._devices:
            _check_alike(device, groups)
        return self._by_param

    def size_of(self, p: Tensor) -> float:
        """The mean number of elements of the groups that hang together with those of a weight."""
        return self._by_param[p].size

    def sized(self, groups: Sequence[Mapping[str, Any]], options: Sequence[StepOptions]) -> Sequence[StepOptions]:
        """The options of a step, with lam scaled by the size of coupled groups where it is to be: no engine knows it.

        Numbers on a device are read for it, which waits for them.
        """
        sizes = {member.place: member.size for member in self.find(groups).values()}
        found: Sequence[StepOptions] = options
        for i, size in sizes.items():
            step = options[i]
            if not (step.coupled and step.scaled):
                continue
            known = self._sized.get(i)
            if known is None or known[:2] != (step, size) or step.on_device:  # what a tensor holds may have changed
                known = self._sized[i] = step, size, step.for_size(size)
            found = [*found[:i], known[2], *found[i + 1 :]]
        return found

    def rooms(self, groups: Sequence[Mapping[str, Any]], options: Sequence[StepOptions]) -> Mapping[Tensor, Tensor]:
        """Room for the norms of the weights that a step moves, in the form of :attr:`StepInputs.norms`.

        It holds nothing yet, and is that of the last step, if that had the same weights.
        """
        wanted = []
        populations(self.find(groups).values(), [step.values for step in options])  # which may raise
        for p, member in self._by_param.items():
            step = options[member.place]
            if step.grouping is not None and p.grad is not None:
                wanted.append((p, step.norm_rows))
        if not _same(wanted, self._rooms.wanted):
            self._rooms = _Rooms.of(wanted, self._devices)
        return self._rooms.by_param

    def fill(
        self,
        options: Sequence[StepOptions],
        state_of: Callable[[Tensor, str], Tensor | None],
        cuts: Mapping[Tensor, Tensor],
    ) -> None:
        """Fill the rooms with the norms of the weights as they are now, and of the duals beside them.

        Args:
            cuts: the room of the cut of each parameter with top-k; those of weights with a coupling are filled too.
        """

        def rows_of(member: CoupledWeight) -> Sequence[Tensor]:
            return of_weights(shard_of(member.p), options[member.place], _States(member.p, state_of))

        rows = max((rows for _, rows in self._rooms.wanted), default=0)
        totals: dict[torch.device, Tensor] = {}
        for device, (flat, places) in zip(self._devices, self._rooms.of_devices, strict=True):
            totals[device.device] = device.norms(rows_of, rows)
            torch.index_select(totals[device.device].view(-1), 0, places, out=flat)
        values = [step.values for step in options]
        found = coupled_cuts(self._by_param.values(), values, lambda m: totals[shard_of(m.p).device][0][m.firsts])
        for p, cut in cuts.items():
            if p in found:
                cut.copy_(found[p])

    def correct(self, rows: Mapping[Tensor, Tensor], options: Sequence[StepOptions]) -> None:
        """Replace lam P(u) in the statistics of a step, to which engines add every slice of a group.

        Each slice of a coupled group has an equal share of the group's. Numbers on a device are read for it.
        """
        for p, room in self._rooms.by_param.items():
            member, step = self._by_param[p], options[self._by_param[p].place]
            if p in rows and step.split and not step.topk:  # nor do engines add any of top-k
                values = step.on_host().values
                lam, a = float(values["lam"]), float(values["a"])
                s = shrink(room[0].to(opmath_type(p.dtype)), values["penalty"], lam / float(values["beta"]), a)
                shares = PENALTIES[values["penalty"]].value(s.double(), a) * member.share
                rows[p][_PENALTY] = lam * shares.sum()

    def norms(self, rows_of: Callable[[CoupledWeight], Sequence[Tensor]]) -> dict[Tensor, Norms]:
        """The norms of the coupled groups of every weight that :meth:`find` has found: of the first of ``rows_of``."""
        found: dict[Tensor, Norms] = {}
        for device in self._devices:
            (norms,) = device.norms(rows_of, 1)
            for m in device.members:
                found[m.p] = Norms(norms[m.slices], norms[m.here], norms[m.firsts])
        return found

    def value_of(
        self, u_of: Callable[[CoupledWeight], Tensor], value: Callable[[CoupledWeight, Tensor], Tensor]
    ) -> Tensor | None:
        """The sum of a value of every coupled group over its norm of u, 0-dim float64; None without coupled groups.

        Args:
            value: of (a member, norms of u): those of the groups that this member is the first of.
        """
        total: Tensor | None = None
        norms = self.norms(lambda member: [u_of(member)])
        for member in self._by_param.values():
            of_member = value(member, norms[member.p].firsts)
            total = of_member if total is None else total + of_member.to(total.device)
        return total


class _States(Mapping[str, Any]):
    """The states of a parameter as a step finds them, by name."""

    def __init__(self, p: Tensor, state_of: Callable[[Tensor, str], Tensor | None]) -> None:
        self._p, self._state_of = p, state_of

    def __getitem__(self, name: str) -> Any:
        state = self._state_of(self._p, name)
        if state is None:
            raise KeyError(name)
        return shard_of(state) if isinstance(state, Tensor) else state

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


# ---- which slices are one group --------------------------------------------------------------------------------------


def _members(groups: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, str, Tensor, Mapping[str, Any]]]:
    """(place of the group, name, parameter, group) of every weight with a coupling."""
    for i, group in enumerate(groups):
        if group["coupling"] is None:
            continue
        for j, p in enumerate(group["params"]):
            if not is_lazy(p) and not is_left_alone(p) and p.numel() > 0:
                yield i, param_name(group, i, j), p, group


def _same(a: Sequence[tuple[Tensor, int]], b: Sequence[tuple[Tensor, int]]) -> bool:
    """Whether two lists hold the same; tensors are compared as objects."""
    return len(a) == len(b) and all(x[0] is y[0] and x[1] == y[1] for x, y in zip(a, b, strict=True))


def _seen(groups: Sequence[Mapping[str, Any]]) -> list[Any]:
    """What decides about the coupled groups of param groups, to be compared with what it was."""
    seen: list[Any] = []
    for i, group in enumerate(groups):
        if group["coupling"] is not None:
            seen += i, group["coupling"], group["coupling_name"], group["group_dim"], group["group_block"]
            for p in group["params"]:
                seen += id(p), p.shape, p.device
    return seen


def _couple(found: Sequence[tuple[int, str, Tensor, Mapping[str, Any]]]) -> list[_Device]:
    """The members by device, with the numbers of their groups."""
    seen: set[int] = set()
    by_device: dict[torch.device, list[tuple[int, str, Tensor, Mapping[str, Any]]]] = {}
    names: dict[Any, torch.device] = {}
    for entry in found:
        _, name, p, group = entry
        if is_sharded(p):
            refuse_cut_blocks(p, grouping_of(group), name, "group_block")
        kind = kind_of(shard_of(p))
        if kind is not None:
            raise TypeError(f"{name} is {kind}: weights with a coupling need memory of their own")
        if id(p) in seen:
            raise ValueError(f"{name} occurs twice in the optimizer: its slices would belong to their groups twice")
        seen.add(id(p))
        device = shard_of(p).device
        if names.setdefault(group["coupling_name"], device) != device:
            raise ValueError(
                f"{name} is on {device}, other weights with coupling_name={group['coupling_name']!r} are on"
                f" {names[group['coupling_name']]}: a coupled group must lie on one device"
            )
        by_device.setdefault(device, []).append(entry)
    return [_couple_on(device, entries) for device, entries in by_device.items()]


def _couple_on(device: torch.device, entries: Sequence[tuple[int, str, Tensor, Mapping[str, Any]]]) -> _Device:
    number: dict[tuple[str | None, int], int] = {}  # of each coupled group
    numbers = [
        [number.setdefault((group["coupling_name"], k), len(number)) if k >= 0 else -1 for k in group["coupling"]]
        for _, _, _, group in entries
    ]
    none = len(number)  # the number of slices of no group
    indices = [torch.tensor([none if k < 0 else k for k in of_weight], dtype=torch.int64) for of_weight in numbers]
    sizes = [len(index) for index in indices]
    flat = torch.cat(indices)
    lengths = torch.bincount(flat, minlength=none + 1)
    order = flat.argsort(stable=True)
    first = torch.zeros(len(flat), dtype=torch.bool)
    first[order[(lengths.cumsum(0) - lengths)[:none]]] = True
    firsts = [index[of_weight] for index, of_weight in zip(indices, first.split(sizes), strict=True)]
    together = _hanging_together([index[index < none] for index in indices])
    shares = torch.where(torch.arange(none + 1) < none, 1.0 / lengths.double(), 0.0)
    elements, counts = [0] * len(entries), [0] * len(entries)  # of the weights that hang together, at the first of them
    for k, (_, _, p, group) in enumerate(entries):
        elements[together[k]] += int((indices[k] < none).sum()) * group_size(p.shape, grouping_of(group))
        counts[together[k]] += len(firsts[k])
    members = []
    by_ranks: dict[tuple[Any, ...], list[CoupledWeight]] = {}
    for k, (place, name, p, group) in enumerate(entries):
        here = indices[k][_slices_here(p, grouping_of(group))]
        member = CoupledWeight(
            p=p,
            place=place,
            name=name,
            grouping=grouping_of(group),
            slices=indices[k][indices[k] < none].to(device),
            here=here.to(device),
            firsts=firsts[k].to(device),
            leader=entries[together[k]][:2],
            share=shares[here].to(device),
            size=elements[together[k]] / max(counts[together[k]], 1),
        )
        members.append(member)
        ranks = tuple(ranks for ranks, _ in dividing_ranks(p)) if is_sharded(p) else ()
        by_ranks.setdefault(ranks, []).append(member)
    sums = []
    for ranks, alike in by_ranks.items():
        here = torch.cat([member.here for member in alike])
        sums.append(_Sums(ranks, alike, here.argsort(stable=True), torch.bincount(here, minlength=none + 1)))
    return _Device(members, sums, none, device)


def _slices_here(p: Tensor, grouping: Grouping) -> slice:
    """Which slices of a weight this rank has a part of."""
    if not is_sharded(p):
        return slice(None)
    (dim,), block = group_dims(grouping, p.dim()) or (0,), size_of_block(grouping)
    begin = first_index_here(p, dim)
    return slice(begin // block, (begin + shard_of(p).shape[dim]) // block)


def _hanging_together(indices: Sequence[Tensor]) -> list[int]:
    """For each weight the first one that it shares a group with, directly or through others."""
    leader = list(range(len(indices)))

    def find(k: int) -> int:
        while leader[k] != k:
            k = leader[k]
        return k

    first_of: dict[int, int] = {}
    for k, index in enumerate(indices):
        for group in index.unique().tolist():
            a, b = find(first_of.setdefault(group, k)), find(k)
            leader[max(a, b)] = min(a, b)
    return [find(k) for k in range(len(indices))]


def _check_alike(device: _Device, groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError for weights that hang together and whose options make different shrink factors of one norm."""
    for member in device.members:
        place, first = member.leader
        if place == member.place:
            continue
        group, other = groups[member.place], groups[place]
        for option in _ALIKE_OF_TOPK if group["penalty"] == "topk" else _ALIKE:
            mine, theirs = group[option], other[option]
            if is_on_device(mine) or is_on_device(theirs):  # to compare them would wait
                continue
            if mine is not theirs and not bool(mine == theirs):
                raise ValueError(
                    f"{first} and {member.name} have coupled groups (coupling_name={group['coupling_name']!r}) and"
                    f" differ in {option} ({theirs} and {mine}): the weights of a coupled group need the same"
                )
