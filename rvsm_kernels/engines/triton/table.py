"""What a Triton launch is told: entries, records, blocks, and the way of a table to the device.

No torch tensor is looked at here but the tables themselves. The fields are those of ``elements.py`` and
``norms.py``.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...method.groups import GroupView

NARROW = 1 << 31
"""A tensor in groups with fewer elements is one entry, a larger one several: index arithmetic is in 32 bits."""
FILL, FEWEST = 512, 32768
"""Programs that fill a device, and elements below which a program is not worth its start (``kFill``, ``kFewest``)."""
SHORT_ROW = 64
"""Elements of a row of a group below which rows of several groups are summed as one strip."""
STRIP, SHORT, TEAM, LONG = range(4)
"""Shapes of a tile, as in ``norms.py``."""
TILE_GROUPS = {SHORT: 64, TEAM: 8, LONG: 1}
"""Groups of a tile (``tile_groups`` of ``norms.py``)."""
STRIP_COLUMNS = 256
FACTOR_TILE, PARTS_AT_ONCE = 64, 32
"""Groups whose factors a program makes, and the sums of parts of each that it reads at once."""
_LARGEST32 = 3.4028234663852886e38


def divider(d: int) -> int:
    """Division of numbers below 2^31 by d as a product and a shift (Granlund & Montgomery): factor + (shift << 32)."""
    shift = (d - 1).bit_length()
    return (((1 << 32) * ((1 << shift) - d)) // d + 1) % (1 << 32) | shift << 32


def pieces(v: GroupView, limit: int = NARROW) -> Iterator[tuple[int, GroupView, int]]:
    """A tensor in groups as pieces with fewer than `limit` elements: (offset, view, first group) of each."""
    batch, outer, groups, inner = v
    columns = groups * inner
    size = outer * columns
    if size < limit:
        most = (limit - 1) // size
        for b in range(0, batch, most):
            yield b * size, GroupView(min(most, batch - b), outer, groups, inner), b * groups
        return
    for b in range(batch):
        first = b * groups
        if columns < limit:
            most = (limit - 1) // columns
            for o in range(0, outer, most):
                yield b * size + o * columns, GroupView(1, min(most, outer - o), groups, inner), first
            continue
        for o in range(outer):
            row = b * size + o * columns
            if inner < limit:
                most = (limit - 1) // inner
                for g in range(0, groups, most):
                    yield row + g * inner, GroupView(1, 1, min(most, groups - g), inner), first + g
                continue
            for g in range(groups):
                for i in range(0, inner, limit - 1):
                    yield row + g * inner + i, GroupView(1, 1, 1, min(limit - 1, inner - i)), first + g


def grouped_fields(v: GroupView, ratio: int, length: int) -> list[int]:
    """The fields of an entry from GROUPED on."""
    columns = v.groups * v.inner
    return [1, ratio, length, columns, v.groups, divider(columns), divider(v.inner), divider(v.outer * columns)]


NO_GROUPS = [0] * 8


@dataclass(frozen=True)
class Division:
    """How the sums of a tensor are divided among programs."""

    tile: int
    tiles: int
    parts: int
    parts_are_rows: bool
    shape: int
    blocks: int


def divide_sums(v: GroupView, width: int) -> Division:
    """Tiles are made narrow first; groups have parts, which need memory, only where there are still too few tiles.

    Args:
        width: elements of 16 bytes.
    """
    batch, outer, groups, inner = v
    wanted = min(max(math.prod(v) // FEWEST, 1), FILL)
    if outer > 1 and inner < SHORT_ROW:
        row = groups * inner
        unit = math.lcm(inner, width)
        if unit > STRIP_COLUMNS:
            unit = inner
        units = max(1, min(STRIP_COLUMNS // unit, -(-row // unit)))
        while units > 1 and units // 2 * unit >= 2 * width and -(-row // (units * unit)) * batch < wanted:
            units //= 2
        tile, shape, parts_are_rows = units * unit // inner, STRIP, True
    else:
        shape = LONG if inner >= 2048 else TEAM if inner >= SHORT_ROW else SHORT
        tile, parts_are_rows = TILE_GROUPS[shape], outer > inner
    tiles = -(-groups // tile)
    parts = min(max(-(-wanted // (tiles * batch)), 1), outer if parts_are_rows else -(-inner // width))
    return Division(tile, tiles, parts, parts_are_rows, shape, tiles * parts * batch)


def record_of(numbers: Sequence[float], double: bool, narrow: int) -> bytes:
    """A record, as a whole number of int64.

    Args:
        double: opmath is float64, else float32.
        narrow: how many of the numbers, from the first on, are in opmath; the others are in float64.
    """
    code, limit = ("d", math.inf) if double else ("f", _LARGEST32)
    first = [math.copysign(math.inf, x) if abs(x) > limit else x for x in numbers[:narrow]]
    rest = numbers[narrow:]
    packed = struct.pack(f"<{len(first)}{code}{len(rest)}d", *first, *rest)
    return packed + bytes(-len(packed) % 8)


def record_words(numbers: int, double: bool, narrow: int) -> int:
    """The length of a record in int64; see :func:`record_of`."""
    return len(record_of([0.0] * numbers, double, narrow)) // 8


def owners_of(blocks: Sequence[int]) -> Tensor:
    """For each block the entry it works for, from the number of blocks of each entry; int32 on the CPU."""
    counts = torch.tensor(blocks, dtype=torch.int64, device="cpu")
    return torch.repeat_interleave(torch.arange(len(blocks), dtype=torch.int32, device="cpu"), counts)


def stream_of(device: torch.device) -> Any:
    """The current stream of a device; None on the CPU."""
    return None if device.type == "cpu" else torch.get_device_module(device).current_stream(device)


def pinned(like: Tensor, device: torch.device) -> Tensor:
    """Memory of the host that a device can read while the host goes on; its allocator keeps it until that is done."""
    return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=device.type != "cpu")


_sources_of_graphs: list[Tensor] = []
"""Memory of the host from which captured graphs copy whenever they are replayed. It is never freed: nothing tells when
a graph is gone."""


def upload(source: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device, without waiting."""
    if device.type == "cpu":
        return source
    host = pinned(source, device).copy_(source)
    if capturing(device):
        _sources_of_graphs.append(host)
    return host.to(device, non_blocking=True)


def capturing(device: torch.device) -> bool:
    """Whether the current stream is being captured into a graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Table:
    """One table on a device: sent when it changed, asynchronously, and never changed under a graph that reads it.

    A graph keeps the table that it was captured with: what is sent during a capture comes from pinned memory and goes
    to a table of its own, which stay as they are; and a table that a captured launch read is given up to the graph,
    so that later changes go to another one.
    """

    SPARES = 2
    """Pinned buffers in reserve for captures, when none can be made."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.data = b""
        """What is to be there."""
        self._sent: bytes | None = None
        self._tensor: Tensor | None = None
        self._spares: list[Tensor] = []
        self._of_graphs: list[Tensor] = []

    def put(self, captured: bool) -> Tensor:
        """The table with its data, on the device.

        Args:
            captured: the current stream is being captured into a graph.
        """
        data, words = self.data, len(self.data) // 8
        if captured:
            if data == self._sent:
                assert self._tensor is not None
                self._of_graphs.append(self._tensor)
                tensor, self._tensor, self._sent = self._tensor, None, None
                return tensor
            tensor = torch.empty(words, dtype=torch.int64, device=self.device)
            fit = [s for s in self._spares if s.numel() >= words]
            host = fit[0] if fit else pinned(tensor, self.device)
            self._spares = [s for s in self._spares if s is not host]
            host[:words].copy_(torch.frombuffer(bytearray(data), dtype=torch.int64))
            tensor.copy_(host[:words], non_blocking=True)
            _sources_of_graphs.append(host)
            self._of_graphs.append(tensor)
            return tensor
        if data != self._sent or self._tensor is None:
            source = torch.frombuffer(bytearray(data), dtype=torch.int64)
            if self._tensor is None or self._tensor.numel() != words:
                self._tensor = torch.empty(words, dtype=torch.int64, device=self.device)
                self._spares = [pinned(source, self.device) for _ in range(self.SPARES)]
            if self.device.type == "cpu":
                self._tensor.copy_(source)
            else:
                self._tensor.copy_(pinned(source, self.device).copy_(source), non_blocking=True)
            self._sent = data
        return self._tensor
