"""Launches of the Triton kernels: rows of tensors become tables, scratch and calls.

A :class:`Launch` serves the rows of one device, one storage type and one kind of step. It is made when shapes or
groupings change; afterwards only addresses and numbers are refreshed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .groups import GroupView
from .triton_kernels import penalty_kernel, prox_kernel, step_kernel
from .triton_sums import join_kernel, sum_kernel
from .triton_table import (
    JOIN_GROUPS,
    NO_GROUPS,
    Division,
    Numbers,
    Table,
    divide_sums,
    grouped_fields,
    owners_of,
    pieces,
    table_bytes,
)

THREADS = 256
PROX_NUMBERS = 6
"""What a record begins with; lam and beta of a penalty's value come after it in float64."""
STORAGE = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
# The default of the fusion of multiplications and additions differs between versions of Triton.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}


def options_for(warp_size: int) -> dict[str, Any]:
    """How a kernel is compiled for a device with warps of that size."""
    return {**OPTIONS, "num_warps": THREADS // warp_size}


_HERE = options_for(32 if torch.version.hip is None else 64)


def arithmetic_type(dtype: torch.dtype) -> torch.dtype:
    """The type that a storage type is computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def block_of(dtype: torch.dtype) -> int:
    """Elements of a block: one or two accesses of 16 bytes for each thread."""
    return 1024 if dtype == torch.float64 else 2048


@dataclass
class Row:
    """One dense tensor of a launch: w, what stands beside it, how it is grouped.

    Attributes:
        key: what its numbers follow from; rows with equal keys share a record.
    """

    w: Tensor
    g: Tensor
    m: Tensor | None
    view: GroupView | None
    key: tuple[Any, ...]


@dataclass
class Launch:
    """Launches of one action over rows that share device, storage type and kind."""

    action: str  # "step", "prox" or "penalty"
    dtype: torch.dtype
    device: torch.device
    rows: list[Row]
    lasso: bool = False
    with_tl1: bool = True
    momentum: bool = False
    scratch: list[Tensor] = field(default_factory=list)
    entries: list[list[int]] = field(default_factory=list)
    sources: list[tuple[int, int]] = field(default_factory=list)  # of each entry: its row, and bytes into it
    sums: list[list[int]] = field(default_factory=list)
    sum_rows: list[int] = field(default_factory=list)
    joins: list[list[int]] = field(default_factory=list)
    grids: dict[str, tuple[Tensor, tuple[int]]] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)
    data: dict[str, bytes] = field(default_factory=dict)
    records: dict[tuple[Any, ...], tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Divide the rows among blocks and find scratch for the groups."""
        self.arithmetic = arithmetic_type(self.dtype)
        width = 16 // self.dtype.itemsize
        self.grouped = any(row.view is not None for row in self.rows)
        # Made first, so that one allocation serves all: factors in the arithmetic type, sums of parts in double.
        divisions = [None if row.view is None else divide_sums(row.view, width) for row in self.rows]
        blocks: list[int] = []
        sum_blocks: list[int] = []
        join_blocks: list[int] = []
        norms: list[tuple[Tensor, Row]] = []
        for k, (row, d) in enumerate(zip(self.rows, divisions, strict=True)):
            size = row.w.element_size()
            if row.view is None or d is None:
                self._add(row.w.numel(), 0, k, NO_GROUPS, blocks, width)
                continue
            ratio, length = self._factors(row, d, k, sum_blocks, join_blocks)
            if self.action == "penalty":
                assert length is not None
                norms.append((length, row))
                continue
            for offset, piece, group in pieces(row.view):
                skip = group * self.arithmetic.itemsize
                fields = grouped_fields(
                    piece,
                    0 if ratio is None else ratio.data_ptr() + skip,
                    0 if length is None else length.data_ptr() + skip,
                )
                self._add(math.prod(piece), offset * size, k, fields, blocks, width)
        self.norms = norms
        for name, counts in (("main", blocks), ("sums", sum_blocks), ("joins", join_blocks)):
            if counts:
                self.grids[name] = (owners_of(counts, self.device), (sum(counts),))
                self.tables[name] = Table(self.device)
        if self.action == "penalty" and blocks:
            self.totals = torch.empty(sum(blocks), dtype=torch.float64, device=self.device)

    def _add(self, numel: int, offset: int, k: int, grouped: list[int], blocks: list[int], width: int) -> None:
        first = sum(blocks[-1:]) + (self.entries[-1][4] if self.entries else 0)
        self.entries.append([0, 0, 0, numel, first, 0, *grouped])
        self.sources.append((k, offset))
        # The tensor may begin up to width - 1 elements after a boundary.
        blocks.append(-(-(numel + width - 1) // block_of(self.dtype)))

    def _factors(
        self, row: Row, d: Division, k: int, sum_blocks: list[int], join_blocks: list[int]
    ) -> tuple[Tensor | None, Tensor | None]:
        """The scratch of a row in groups, and the entries that fill it."""
        v = row.view
        assert v is not None
        count, value = v.batch * v.groups, self.action == "penalty"

        def take(n: int, dtype: torch.dtype) -> Tensor:
            self.scratch.append(torch.empty(n, dtype=dtype, device=self.device))
            return self.scratch[-1]

        ratio = None if value else take(count, self.arithmetic)
        length = take(count, self.arithmetic) if value or self.lasso else None
        partials = take(d.parts * count, torch.float64) if d.parts > 1 else None
        out = 0 if partials is None else partials.data_ptr()
        first = self.sums[-1][1] + sum_blocks[-1] if self.sums else 0
        addresses = [0 if t is None else t.data_ptr() for t in (ratio, length)]
        shape = [v.outer, v.groups, v.inner, count, d.tile, d.tiles, d.parts, int(d.cut_rows), d.shape, int(value)]
        self.sums.append([0, first, 0, *addresses, out, *shape])
        self.sum_rows.append(k)
        sum_blocks.append(d.blocks)
        if partials is not None:
            first = self.joins[-1][1] + join_blocks[-1] if self.joins else 0
            self.joins.append([k, first, 0, *addresses, out, *shape])
            join_blocks.append(-(-count // JOIN_GROUPS))
        return ratio, length

    # ---- what changes from step to step ------------------------------------------------------------------------------

    def fill(self, addresses: Sequence[Sequence[int]], records: dict[tuple[Any, ...], tuple[float, ...]]) -> None:
        """Put addresses and numbers into the tables.

        Args:
            addresses: of w, g and m of each row; 0 where there is none.
            records: the numbers of each key.
        """
        double = self.arithmetic == torch.float64
        numbers = Numbers(double, PROX_NUMBERS) if self.action == "penalty" else Numbers(double)
        for entry, (k, offset) in zip(self.entries, self.sources, strict=True):
            w, g, m = addresses[k]
            entry[0], entry[1], entry[2] = w + offset, g + offset, m + offset if m else 0
            entry[5] = numbers.add(records[self.rows[k].key])
        if self.entries:
            self.data["main"] = table_bytes(self.entries, 5, numbers)
        if not self.sums:
            return
        source = 1 if self.action == "prox" else 0
        numbers = Numbers(double)
        for entry, k in zip(self.sums, self.sum_rows, strict=True):
            entry[0], entry[2] = addresses[k][source], numbers.add(records[self.rows[k].key])
        self.data["sums"] = table_bytes(self.sums, 2, numbers)
        if self.joins:
            numbers = Numbers(double)
            for entry in self.joins:
                entry[2] = numbers.add(records[self.rows[entry[0]].key])
            self.data["joins"] = table_bytes(self.joins, 2, numbers)

    # ---- the calls ---------------------------------------------------------------------------------------------------

    def run(self, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        """Put the work on the current stream of the device, which is the current one."""
        S, T = STORAGE[self.dtype], STORAGE[self.arithmetic]
        tables = {name: table.put(self.data[name]) for name, table in self.tables.items()}
        if self.sums:
            owners, grid = self.grids["sums"]
            sum_kernel[grid](tables["sums"], owners, S, T, **_HERE)
        if self.joins:
            owners, grid = self.grids["joins"]
            join_kernel[grid](tables["joins"], owners, T, 32, JOIN_GROUPS, **_HERE)
        if not self.entries:
            return
        owners, grid = self.grids["main"]
        block = block_of(self.dtype)
        if self.action == "step":
            step_kernel[grid](
                tables["main"],
                owners,
                grad_scale,
                found_inf,
                S,
                T,
                block,
                self.momentum,
                self.with_tl1,
                self.grouped,
                **_HERE,
            )
        elif self.action == "prox":
            prox_kernel[grid](tables["main"], owners, S, T, block, **_HERE)
        else:
            penalty_kernel[grid](tables["main"], owners, self.totals, S, T, block, **_HERE)
