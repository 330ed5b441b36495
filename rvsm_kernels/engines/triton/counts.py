"""The steps of parameters, counted on the device: the counterpart of ``csrc/cuda/counts.h``.

A small launch before a step adds 1 to the counter of each parameter and makes the numbers of its base that follow from
the count. So no host waits for a count, and none is in a captured graph.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bases import BEFORE, MADE_OF_COUNT, MOST_CORRECTIONS, SEED, corrections_of
from .calls import Grid
from .device_numbers import TENSORS, factor_at, source_words
from .elements import PROX, SPLIT
from .table import Table

# Fields of an entry, in int64.
COUNTER = tl.constexpr(0)  # address; 0 for an entry that only fills the last block
SOURCE = tl.constexpr(1)  # where the source of its numbers begins
MADE = tl.constexpr(2)  # address of what is made
COUNT_ENTRY = tl.constexpr(3)
COUNTERS = tl.constexpr(128)  # of a program
THREADS = 128


@triton.jit(do_not_specialize_on_alignment=["found_inf"])
def count_kernel(
    entries, sources, found_inf, BASE: tl.constexpr, NUMBERS: tl.constexpr, CORRECTS: tl.constexpr, ROUNDS: tl.constexpr
):
    """One step more of each counter, unless found_inf is above 0, and what follows from that many steps."""
    entry = entries + (tl.program_id(0) * COUNTERS + tl.arange(0, COUNTERS)) * COUNT_ENTRY
    address = tl.load(entry + COUNTER)
    mask = address != 0
    counter = address.to(tl.pointer_type(tl.float32))
    before = tl.load(counter, mask, 0.0)
    tl.store(counter, before + tl.where(tl.load(found_inf) > 0, 0.0, 1.0), mask)
    source = sources + tl.load(entry + SOURCE)
    made = tl.load(entry + MADE).to(tl.pointer_type(tl.float64))
    if CORRECTS:
        numbers = source.to(tl.pointer_type(tl.float64)) + PROX + SPLIT
        values = corrections_of(numbers, mask, factor_at(source + NUMBERS, mask), before + 1.0, BASE)
        for k in tl.static_range(MOST_CORRECTIONS):
            tl.store(made + k, values[k], mask)
    if ROUNDS:
        seed = tl.load(source + NUMBERS + 2 * TENSORS, mask, 0)
        tl.store(made + BEFORE, before.to(tl.float64), mask)
        tl.store(made.to(tl.pointer_type(tl.int64)) + SEED, seed, mask)


class Counting:
    """The counters of a launch.

    Args:
        sources: for each counter which of the launch's sources is that of its tensor.
        numbers: of a source; see :class:`.device_numbers.Sources`.
        base: its number.
        corrects: whether the base has numbers that follow from the count.
        rounds: whether the kernel of the step rounds stochastically.
    """

    def __init__(
        self,
        device: torch.device,
        sources: Sequence[int],
        numbers: int,
        base: int,
        corrects: bool,
        rounds: bool,
    ) -> None:
        self.table = Table(device)
        self.made = torch.empty(MADE_OF_COUNT.value * len(sources), dtype=torch.float64, device=device)
        self._constants = base, numbers, corrects, rounds
        blocks = -(-len(sources) // COUNTERS.value)
        self._entries = array("q", bytes(8 * COUNT_ENTRY.value * blocks * COUNTERS.value))
        self._end = COUNT_ENTRY.value * len(sources)
        self._put(SOURCE.value, [source * source_words(numbers) for source in sources])
        self._put(MADE.value, [self.made_at(k) for k in range(len(sources))])
        self._grid = Grid(blocks, THREADS)

    def made_at(self, k: int) -> int:
        """The address of what is made for the k-th counter."""
        return self.made.data_ptr() + k * MADE_OF_COUNT.value * self.made.element_size()

    def _put(self, place: int, values: Sequence[int]) -> None:
        """One field of every entry."""
        self._entries[place : self._end : COUNT_ENTRY.value] = array("q", values)

    def move(self, counters: Sequence[int]) -> None:
        """The addresses of the counters."""
        self._put(COUNTER.value, counters)
        self.table.data = self._entries.tobytes()

    def run(self, sources: Tensor, found_inf: Tensor, captured: bool) -> tuple[Tensor, ...]:
        """Count, on the current stream; returns what lies on the device for that.

        Args:
            sources: on the device.
        """
        entries = self.table.put(captured)
        self._grid(count_kernel, entries, sources, found_inf, *self._constants, kind=found_inf.dtype)
        return entries, self.made
