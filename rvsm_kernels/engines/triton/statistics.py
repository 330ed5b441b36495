"""The statistics of a launch: its programs have stored rows of sums (``sums.py``), and launches after it add them.

One program adds the rows of one tensor, or of a piece of them where there are many, and makes the numbers of
``method/statistics.py`` of the sum. What depends on options stands in a table, numbers on the device are read there:
no host waits, and a captured graph makes the statistics too.
"""

from __future__ import annotations

import itertools
import struct
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...method.split import strength_of_size
from ...method.statistics import COLUMNS
from ...method.step_options import StepOptions
from .calls import Grid
from .device_numbers import NUMBER_OF_TYPE, factor_at
from .sums import GAP, GRAD, NONFINITE, SUMS, VALUE, ZERO_GROUPS, ZEROS
from .table import Table, upload

# Fields of an entry, in int64.
ROW = tl.constexpr(0)  # address of the numbers of its parameter, or 0
STRENGTHS = tl.constexpr(1)  # where lam and beta of it begin
GROUPED = tl.constexpr(2)
FIRST = tl.constexpr(3)  # its first row of sums over elements
COUNT = tl.constexpr(4)
FIRST_OF_GROUPS = tl.constexpr(5)  # its first row of sums over groups
COUNT_OF_GROUPS = tl.constexpr(6)
ENTRY = tl.constexpr(7)
# What follows from options: lam, beta and the strength of P(u), which is 0 where u follows from no lam, then the
# tensors on the device that lam and beta are to be multiplied by, each as its address and the number of its type.
LAM = tl.constexpr(0)
BETA = tl.constexpr(1)
VALUED = tl.constexpr(2)
TENSORS = tl.constexpr(3)
WORDS = 7

AT_ONCE = tl.constexpr(256)  # rows that a program reads
WIDTH = tl.constexpr(8)  # a power of 2 that a row fits
NUMBERS = tl.constexpr(len(COLUMNS))
MANY, PIECE = 2048, 512
"""Rows of a tensor above which they are added in pieces, and the rows of a piece."""

assert COLUMNS == ("zeros", "nonfinite", "gap", "grad", "quadratic", "zero_groups", "penalty")


@triton.jit
def sum_of_rows(rows, first, count):
    """The sum of some rows, in a fixed order: a block of WIDTH."""
    r, c = tl.arange(0, AT_ONCE)[:, None], tl.arange(0, WIDTH)[None, :]
    acc = tl.zeros([AT_ONCE, WIDTH], tl.float64)
    for i in range(0, count, AT_ONCE):
        acc += tl.load(rows + (first + i + r) * SUMS + c, (i + r < count) & (c < SUMS), 0.0)
    return tl.sum(acc, 0)


@triton.jit
def piece_kernel(pieces, rows, sums):
    """The sum of the rows of each piece."""
    piece = pieces + tl.program_id(0) * 2
    c = tl.arange(0, WIDTH)
    total = sum_of_rows(rows, tl.load(piece), tl.load(piece + 1))
    tl.store(sums + tl.program_id(0) * SUMS + c, total, c < SUMS)


@triton.jit
def column(sums, K: tl.constexpr):
    """One of the sums."""
    return tl.sum(tl.where(tl.arange(0, WIDTH) == K, sums, 0.0), 0)


@triton.jit(do_not_specialize_on_alignment=["found_inf"])
def row_kernel(entries, strengths, rows, found_inf):
    """The numbers of each parameter; they stay as they are where found_inf is above 0."""
    entry = entries + tl.program_id(0) * ENTRY
    row = tl.load(entry + ROW)
    if (row == 0) | (tl.load(found_inf) > 0):
        return
    grouped = tl.load(entry + GROUPED) != 0
    sums = sum_of_rows(rows, tl.load(entry + FIRST), tl.load(entry + COUNT))
    sums += sum_of_rows(rows, tl.load(entry + FIRST_OF_GROUPS), tl.load(entry + COUNT_OF_GROUPS))
    strength = strengths + tl.load(entry + STRENGTHS)
    numbers = strength.to(tl.pointer_type(tl.float64))
    lam = tl.load(numbers + LAM) * factor_at(strength + TENSORS, True)
    beta = tl.load(numbers + BETA) * factor_at(strength + TENSORS + 2, True)
    is_split = (lam > 0) & (beta > 0)
    is_valued = is_split & (tl.load(numbers + VALUED) != 0)
    zeros, gap = column(sums, ZEROS), column(sums, GAP)
    of_groups = tl.where(grouped, column(sums, ZERO_GROUPS), zeros)
    made = (
        zeros,
        column(sums, NONFINITE),
        tl.where(is_split, gap, 0.0),
        column(sums, GRAD),
        tl.where(is_split, beta / 2 * gap, 0.0),
        tl.where(is_split, of_groups, 0.0),
        tl.where(is_valued, lam * column(sums, VALUE), 0.0),
    )
    for k in tl.static_range(NUMBERS):
        tl.store(row.to(tl.pointer_type(tl.float64)) + k, made[k])


class Rows(NamedTuple):
    """The rows of sums of a tensor, each as the first one and how many there are.

    Attributes:
        key: the place of its record among those of the launch.
        of_elements, of_groups: the sums over elements, and over groups, None without groups.
    """

    key: int
    of_elements: tuple[int, int]
    of_groups: tuple[int, int] | None


def rows_of(
    entries: Mapping[str, Sequence[Sequence[int]]],
    programs: Sequence[int],
    sources: Sequence[tuple[int, int]],
    made_by: Mapping[int, tuple[str, int]],
    keys: Sequence[int],
) -> list[Rows]:
    """Where the programs of a launch store the sums of each tensor.

    Args:
        entries: of each call, that of the elements first; their rows are in this order.
        programs: how many each call has.
        sources: the tensor of each entry of the elements.
        made_by: the call and the entry that make factors of the groups of a tensor.
        keys: of each tensor the place of its record.
    """
    spans: dict[str, list[tuple[int, int]]] = {}
    begin = 0
    for (name, of_call), count in zip(entries.items(), programs, strict=True):
        firsts = [*(entry[1] for entry in of_call), count]
        spans[name] = [(begin + first, end - first) for first, end in itertools.pairwise(firsts)]
        begin += count
    made = [
        Rows(key, (0, 0), spans[made_by[k][0]][made_by[k][1]] if k in made_by else None) for k, key in enumerate(keys)
    ]
    for (k, _), (first, count) in zip(sources, spans[next(iter(entries))], strict=True):
        before, n = made[k].of_elements  # those of a tensor follow one another
        made[k] = made[k]._replace(of_elements=(before if n else first, n + count))
    return made


def _words(options: StepOptions, size: int) -> bytes:
    """The words of a key; see LAM."""
    values = options.values
    lam = strength_of_size(values, size) if options.split else 0.0
    valued = options.split and not options.topk and options.pattern is None
    tensors = options.on_device[1:3] or (None, None)  # lam and beta
    words = [x for t in tensors for x in ((0, 0) if t is None else (t.data_ptr(), NUMBER_OF_TYPE[t.dtype]))]
    return struct.pack("<3d4q", lam, float(values["beta"]), float(valued), *words)


class Measuring:
    """What a launch needs to make statistics.

    Args:
        rows: of each tensor.
        programs: of each call that stores rows, in their order.

    Attributes:
        totals: the rows of each call.
    """

    def __init__(self, device: torch.device, rows: Sequence[Rows], programs: Sequence[int]) -> None:
        # Programs that make factors of groups write to other columns than those of elements: the rest stays 0.
        self._rows = torch.zeros(sum(programs) * SUMS.value, dtype=torch.float64, device=device)
        self.totals = self._rows.split([n * SUMS.value for n in programs])
        self._sums = self._rows
        self._pieces: Tensor | None = None
        if max(n for of in rows for _, n in (of.of_elements, of.of_groups or (0, 0))) > MANY:
            rows = self._in_pieces(device, rows)
        self._fields = array("q")
        for of in rows:
            self._fields.extend([0, of.key * WORDS, of.of_groups is not None, *of.of_elements])
            self._fields.extend(of.of_groups or (0, 0))
        self._entries, self._strengths = Table(device), Table(device)
        self._grid = Grid(len(rows))
        self._rooms: Sequence[Tensor | None] = ()
        self._tensors: list[Tensor] = []
        self._tables: tuple[Tensor, ...] = ()
        self._of_graphs: list[Any] = []  # they go on writing to the rooms and reading the numbers

    def _in_pieces(self, device: torch.device, rows: Sequence[Rows]) -> list[Rows]:
        """Divide the rows among programs; returns where the sums of the pieces are."""
        pieces: list[int] = []

        def divided(span: tuple[int, int]) -> tuple[int, int]:
            first, begin = len(pieces) // 2, span[0]
            for at in range(begin, begin + span[1], PIECE):
                pieces.extend((at, min(PIECE, begin + span[1] - at)))
            return first, len(pieces) // 2 - first

        made = [Rows(of.key, divided(of.of_elements), of.of_groups and divided(of.of_groups)) for of in rows]
        self._pieces = upload(torch.tensor(pieces, dtype=torch.int64, device="cpu"), device)
        self._sums = torch.empty(len(pieces) // 2 * SUMS.value, dtype=torch.float64, device=device)
        self._add = Grid(len(pieces) // 2)
        return made

    def move(self, rooms: Sequence[Tensor | None]) -> None:
        """Where the numbers of each tensor go; None for those without."""
        self._rooms = rooms
        self._fields[ROW.value :: ENTRY.value] = array("q", [0 if t is None else t.data_ptr() for t in rooms])
        self._entries.data = self._fields.tobytes()

    def set(self, keys: Sequence[tuple[int, int, int]], told: Sequence[StepOptions]) -> None:
        """What follows from the options of each key: the place of its group, the size of its groups, the count."""
        of_keys = [told[key[0]] for key in keys]
        self._strengths.data = b"".join(_words(options, key[1]) for options, key in zip(of_keys, keys, strict=True))
        self._tensors = [t for options in of_keys for t in options.on_device if t is not None]

    def put(self, captured: bool) -> tuple[Tensor, ...]:
        """Send the tables; returns what lies on the device for the statistics. See :meth:`Table.put`."""
        self._tables = self._entries.put(captured), self._strengths.put(captured)
        if captured:
            self._of_graphs.append((self._rooms, self._tensors))
        return *self._tables, self._rows, self._sums, *(() if self._pieces is None else (self._pieces,))

    def run(self, found_inf: Tensor) -> None:
        """Make the numbers of the sums, on the current stream."""
        if self._pieces is not None:
            self._add(piece_kernel, self._pieces, self._rows, self._sums)
        self._grid(row_kernel, *self._tables, self._sums, found_inf, kind=found_inf.dtype)
