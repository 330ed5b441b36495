"""The statistics of the last step: what its kernels have counted and added up on their way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dist.shards import is_sharded, shard_of
from ..dist.sums import add_rows
from ..method.groups import Grouping, group_count, grouping_of
from ..method.memory import kind_of, refuse, tracer
from ..method.parameters import param_name
from ..method.statistics import COLUMNS, COUNTS, OF_ELEMENTS
from ..method.step_options import StepOptions


class StatisticsRow:
    """The statistics of one parameter in one step, or of several together.

    w are the weights as the step found them, u = prox(w) with the options of that step (ADMM: prox(w + dual)), and d
    the gradient that the split hands to the base: +-grad / grad_scale, with the terms of a group lasso and of a coupled
    pull. Numbers are 0-dim tensors on the parameter's device; none of them is waited for. Without a splitting u is w,
    there are no groups, and ``gap``, ``quadratic`` and ``penalty`` are 0.

    Attributes:
        name: the parameter's name, or its place in the optimizer.
        elements, groups: how many there are (int); elementwise, a group is an element.
        split: whether there is a splitting.
    """

    __slots__ = ("_numbers", "elements", "groups", "name", "split")

    def __init__(self, name: str, elements: int, groups: int, split: bool, numbers: Tensor) -> None:
        self.name = name
        self.elements = elements
        self.groups = groups
        self.split = split
        self._numbers = numbers

    def _column(self, name: str) -> Tensor:
        number = self._numbers[COLUMNS.index(name)]
        return number.long() if name in COUNTS else number

    @property
    def zeros(self) -> Tensor:
        """Elements of u that are 0, int64."""
        return self._column("zeros")

    @property
    def zero_groups(self) -> Tensor:
        """Groups with ||u_G||_2 < 1e-15, int64; elementwise ``zeros``."""
        return self._column("zero_groups")

    @property
    def nonfinite(self) -> Tensor:
        """Elements where w or d is NaN or infinite, int64."""
        return self._column("nonfinite")

    @property
    def gap(self) -> Tensor:
        """||w - u||^2, float64."""
        return self._column("gap")

    @property
    def grad(self) -> Tensor:
        """||d||^2, float64."""
        return self._column("grad")

    @property
    def penalty(self) -> Tensor:
        """lam P(u), float64; 0 for top-k."""
        return self._column("penalty")

    @property
    def quadratic(self) -> Tensor:
        """beta/2 ||w - u||^2, float64."""
        return self._column("quadratic")

    @property
    def value(self) -> Tensor:
        """lam P(u) + beta/2 ||w - u||^2, float64: what ``penalty_value()`` was before the step."""
        return self.penalty + self.quadratic

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; waits for the device."""
        counted = {
            name: int(x) if name in COUNTS else x for name, x in zip(COLUMNS, self._numbers.tolist(), strict=True)
        }
        return {"name": self.name, "elements": self.elements, "groups": self.groups, "split": self.split, **counted}


class Statistics(Mapping[str, StatisticsRow]):
    """The statistics of the parameters that a step has moved, by name.

    Attributes:
        rows: of each parameter, in the order of the param groups.
        total: of all of them.
        split: of those with a splitting.
    """

    def __init__(self, rows: Sequence[StatisticsRow]) -> None:
        self.rows = list(rows)
        self.total = _sum("total", self.rows)
        self.split = _sum("split", [row for row in self.rows if row.split])
        self._by_name = {row.name: row for row in self.rows}

    def __getitem__(self, name: str) -> StatisticsRow:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def to_dict(self) -> dict[str, Any]:
        """``{"total": row, "split": row, "parameters": [row, ...]}`` of plain values; waits for the device."""
        rows = [row.to_dict() for row in self.rows]
        return {"total": self.total.to_dict(), "split": self.split.to_dict(), "parameters": rows}


def _sum(name: str, rows: Sequence[StatisticsRow]) -> StatisticsRow:
    """Several rows as one."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for row in rows:
        by_device.setdefault(row._numbers.device, []).append(row._numbers)
    sums = [torch.stack(numbers).sum(0) for numbers in by_device.values()]
    total = torch.zeros(len(COLUMNS), dtype=torch.float64) if not sums else sums[0]
    for other in sums[1:]:
        total = total + other.to(total.device)
    elements, groups = sum(row.elements for row in rows), sum(row.groups for row in rows)
    return StatisticsRow(name, elements, groups, any(row.split for row in rows), total)


class _Stepped(NamedTuple):
    """A parameter that a step has moved."""

    p: Tensor
    group: Mapping[str, Any]
    place: tuple[int, int]
    split: bool
    grouping: Grouping


class StepStatistics:
    """The statistics of one optimizer: the rows that its steps write, which stay where they are from step to step.

    Args:
        on: whether steps write any.
    """

    def __init__(self, on: bool) -> None:
        self.on = on
        self._rooms: dict[Tensor, Tensor] = {}
        self._last: list[_Stepped] | None = None

    def rooms(self, groups: Sequence[Mapping[str, Any]]) -> dict[Tensor, Tensor]:
        """Where a step over these param groups writes the rows of its parameters: zeros at first.

        Raises:
            TypeError, RuntimeError: a parameter without memory of its own, code that is being traced.
        """
        moved = [p for group in groups for p in group["params"] if p.grad is not None]
        by_device: dict[torch.device, list[Tensor]] = {}
        for p in moved:
            room = self._rooms.get(p)
            device = shard_of(p).device
            if room is None or room.device != device:
                _refuse(p)
                by_device.setdefault(device, []).append(p)
        for device, params in by_device.items():
            table = torch.zeros(len(params), len(COLUMNS), dtype=torch.float64, device=device)
            self._rooms.update(zip(params, table.unbind(), strict=True))
        if len(self._rooms) > len(moved):  # keep those of parameters that miss a step, not of those that are gone
            here = {p for group in groups for p in group["params"]}
            self._rooms = {p: room for p, room in self._rooms.items() if p in here}
        return self._rooms

    def note(self, groups: Sequence[Mapping[str, Any]], options: Sequence[StepOptions]) -> None:
        """Take note of what a step has moved."""
        self._last = [
            _Stepped(p, group, (i, j), of_group.split, grouping_of(of_group.values) if of_group.split else None)
            for i, (group, of_group) in enumerate(zip(groups, options, strict=True))
            for j, p in enumerate(group["params"])
            if p.grad is not None
        ]

    def report(self) -> Statistics:
        """See :meth:`SplitOptimizer.statistics`."""
        if self._last is None:
            why = (
                "no step has been done yet"
                if self.on
                else "they are off: statistics=True, or collect_statistics = True"
            )
            raise RuntimeError(f"there are no statistics of a step: {why}")
        stepped = [s for s in self._last if s.p in self._rooms]
        last_of = {id(s.p): s for s in stepped}  # the row of a parameter that occurs twice is of the last occurrence
        stepped = list(last_of.values())
        by_device: dict[torch.device, list[_Stepped]] = {}
        for s in stepped:
            by_device.setdefault(self._rooms[s.p].device, []).append(s)
        numbers: dict[int, Tensor] = {}  # copies: the next step writes to the rooms again
        for of_device in by_device.values():
            rows = torch.stack([self._rooms[s.p] for s in of_device]).unbind()
            numbers.update((id(s.p), row) for s, row in zip(of_device, rows, strict=True))
        add_rows([(s.p, s.grouping, numbers[id(s.p)]) for s in stepped if is_sharded(s.p)], OF_ELEMENTS)
        return Statistics([_row_of(s, numbers[id(s.p)]) for s in stepped])


def _row_of(s: _Stepped, numbers: Tensor) -> StatisticsRow:
    elements = s.p.numel()
    groups = 0 if not s.split else elements if s.grouping is None else group_count(s.p.shape, s.grouping)
    return StatisticsRow(param_name(s.group, *s.place), elements, groups, s.split, numbers)


def _refuse(p: Tensor) -> None:
    """Raise for a parameter whose statistics no kernel can write."""
    by = tracer()
    if by is not None:
        raise RuntimeError(f"{by} would not see the statistics of a step: turn them off for code that is traced")
    if kind_of(shard_of(p)) is not None:
        refuse(shard_of(p), "a parameter whose statistics are wanted")
