"""The cuts of top-k in Triton, without a sort: the simpler counterpart of ``csrc/cuda/selection.h``.

Histograms of eleven bits of the magnitudes narrow the range that holds a cut until one magnitude is left: three reads,
in float64 six. Integers are added, so that the cut does not depend on the order. The host waits for nothing.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...method.memory import kind_of
from ...method.selection import Candidates, Selection
from ...method.selection import select as select_in_torch
from ..cuts import are_served
from .calls import WARP_SIZE, options_for
from .launch import STORAGE
from .precision import LOW, WHOLE
from .split import ADMM
from .staging import Staged, on_device
from .table import Table, capturing
from .windows import keys_of

# Fields of an entry, in int64.
W = tl.constexpr(0)  # addresses of the weights, their master and their dual, 0 for those that are missing
BEHIND = tl.constexpr(1)
DUAL = tl.constexpr(2)
NUMEL = tl.constexpr(3)
FIRST = tl.constexpr(4)  # its first block
CUT = tl.constexpr(5)  # the place of its cut
SELECT_ENTRY = tl.constexpr(6)
# What is known of a cut, in int64.
BEGIN = tl.constexpr(0)  # of the range that holds it
ABOVE = tl.constexpr(1)  # elements above the range
NEXT = tl.constexpr(2)  # the smallest magnitude above the cut
LARGER = tl.constexpr(3)  # elements that stand before the cut in descending order
ADDRESS = tl.constexpr(4)  # where it goes
CUT_STATE = tl.constexpr(5)

BIN_BITS = 11
BINS = tl.constexpr(1 << BIN_BITS)
SELECT_BLOCK = 1024
"""Elements that a program reads at a time."""
READS = 16
"""How often it does: few programs add their bins to those of a cut."""
NONE = tl.constexpr(0x7FFFFFFFFFFFFFFF)


@triton.jit(do_not_specialize=["shift", "used"])
def histogram_kernel(
    entries, blocks, states, bins, shift, used, S: tl.constexpr, T: tl.constexpr, OF_METHOD: tl.constexpr,
    METHOD: tl.constexpr, MASTER: tl.constexpr, BLOCK: tl.constexpr, READS: tl.constexpr,
):  # fmt: skip
    """Adds the magnitudes of all entries to the bins of their cuts, 2^shift magnitudes each.

    Args:
        blocks: the entry of each program.
        bins: int64, BINS for each cut.
        used: how many of them belong to the range.
    """
    entry = entries + tl.load(blocks + tl.program_id(0)) * SELECT_ENTRY
    w, behind, dual = tl.load(entry + W), tl.load(entry + BEHIND), tl.load(entry + DUAL)
    cut, numel = tl.load(entry + CUT), tl.load(entry + NUMEL)
    begin = tl.load(states + cut * CUT_STATE + BEGIN)
    at = (tl.program_id(0) - tl.load(entry + FIRST)) * (BLOCK * READS)
    number = tl.arange(0, BINS)
    counts = tl.zeros([BINS], tl.int32)
    for k in range(tl.minimum(tl.cdiv(numel - at, BLOCK), READS)):
        i = at + k * BLOCK + tl.arange(0, BLOCK)
        mask = i < numel
        key = keys_of(w, behind, dual, i, mask, S, T, OF_METHOD, METHOD, MASTER).to(tl.int64)
        place = (key - begin) >> shift
        inside = mask & (place >= 0) & (place < used)
        outside = tl.sum(1 - inside.to(tl.int32))  # counted in bin 0, and taken away again
        found = tl.histogram(tl.where(inside, place, 0).to(tl.int32), BINS)
        counts += found - tl.where(number == 0, outside, 0)
    tl.atomic_add(bins + cut * BINS + number, counts.to(tl.int64), counts > 0, sem="relaxed")


@triton.jit(do_not_specialize=["shift"])
def bin_kernel(states, bins, shift):
    """The range of each cut becomes that of the bin which holds it; the bins are empty again."""
    state = states + tl.program_id(0) * CUT_STATE
    number = tl.arange(0, BINS)
    p = bins + tl.program_id(0).to(tl.int64) * BINS + number
    counts = tl.load(p)
    larger = tl.load(state + LARGER)
    above = tl.load(state + ABOVE) + tl.sum(counts) - tl.cumsum(counts, 0)
    holds = (above <= larger) & (larger < above + counts)  # one of them
    place = tl.sum(tl.where(holds, number, 0)).to(tl.int64)
    tl.store(state + BEGIN, tl.load(state + BEGIN) + (place << shift))
    tl.store(state + ABOVE, tl.sum(tl.where(holds, above, 0)))
    tl.store(p, tl.zeros([BINS], tl.int64))


@triton.jit
def next_kernel(
    entries, blocks, states, S: tl.constexpr, T: tl.constexpr, OF_METHOD: tl.constexpr, METHOD: tl.constexpr,
    MASTER: tl.constexpr, BLOCK: tl.constexpr, READS: tl.constexpr,
):  # fmt: skip
    """The smallest magnitude above each cut."""
    entry = entries + tl.load(blocks + tl.program_id(0)) * SELECT_ENTRY
    w, behind, dual = tl.load(entry + W), tl.load(entry + BEHIND), tl.load(entry + DUAL)
    state = states + tl.load(entry + CUT) * CUT_STATE
    numel, begin = tl.load(entry + NUMEL), tl.load(state + BEGIN)
    at = (tl.program_id(0) - tl.load(entry + FIRST)) * (BLOCK * READS)
    least = tl.full([BLOCK], NONE, tl.int64)
    for k in range(tl.minimum(tl.cdiv(numel - at, BLOCK), READS)):
        i = at + k * BLOCK + tl.arange(0, BLOCK)
        mask = i < numel
        key = keys_of(w, behind, dual, i, mask, S, T, OF_METHOD, METHOD, MASTER).to(tl.int64)
        least = tl.where(mask & (key > begin) & (key < least), key, least)
    tl.atomic_min(state + NEXT, tl.min(least, 0), sem="relaxed")


@triton.jit
def number_of(key, T: tl.constexpr):
    """The number whose magnitude has these bits."""
    if tl.float64 == T:  # noqa: SIM108 - the types of the two differ
        x = key.to(tl.float64, bitcast=True)
    else:
        x = key.to(tl.int32).to(tl.float32, bitcast=True)
    return x


@triton.jit
def write_kernel(states, T: tl.constexpr, BETWEEN: tl.constexpr):
    """Writes the cuts, halfway to the next magnitude where there is a number between."""
    state = states + tl.program_id(0) * CUT_STATE
    begin, larger = tl.load(state + BEGIN), tl.load(state + LARGER)
    cut = number_of(begin, T)
    if BETWEEN:
        # Fewer above than before it: another one ties with the cut.
        after = tl.where(tl.load(state + ABOVE) < larger, begin, tl.load(state + NEXT))
        infinity: tl.constexpr = 0x7FF0000000000000 if tl.float64 == T else 0x7F800000
        high = number_of(tl.where(after < infinity, after, begin), T)
        middle = cut + (high - cut) * 0.5
        cut = tl.where((larger > 0) & (middle < high), middle, cut)
    tl.store(tl.load(state + ADDRESS).to(tl.pointer_type(T)), cut)


KERNELS = histogram_kernel, bin_kernel, next_kernel, write_kernel
OPTIONS = {"enable_fp_fusion": False}
"""torch rounds each operation of what is halfway."""


class Selecting:
    """Selections of one optimizer. What the kernels are told stays where captured graphs read it.

    Args:
        device_types: that the kernels serve.
    """

    def __init__(self, device_types: Sequence[str]) -> None:
        self._served = tuple(device_types)
        self._tables: dict[Hashable, Table] = {}

    def select(self, selections: Sequence[Selection]) -> None:
        """Fill cuts: those whose candidates are on one device by the kernels, others by torch."""
        served = [s for s in selections if s.cut.device.type in self._served and _is_served(s)]
        if len(served) < len(selections):
            select_in_torch([s for s in selections if not any(s is other for other in served)])
        kinds: dict[tuple[torch.device, torch.dtype, bool], list[Selection]] = {}
        for s in served:
            if s.survivors >= sum(c.count() for c in s.candidates):
                s.cut.fill_(-1)
            else:
                kinds.setdefault((s.cut.device, s.cut.dtype, s.between), []).append(s)
        for (device, dtype, between), alike in kinds.items():
            with on_device(device):
                self._select(alike, device, dtype, between)
            torch.autograd.graph.increment_version([s.cut for s in alike if not s.cut.is_inference()])

    def _put(self, rows: Sequence[int], device: torch.device, *key: Hashable) -> Tensor:
        """Numbers on the device, without waiting."""
        table = self._tables.setdefault((device, *key), Table(device))
        table.data = array("q", rows).tobytes()
        with torch.inference_mode(False):  # a later step writes to it
            return table.put(capturing(device))

    def _select(self, selections: Sequence[Selection], device: torch.device, dtype: torch.dtype, between: bool) -> None:
        """The cuts of one device and type."""
        kinds: dict[_Kind, list[_Entry]] = {}
        entries = [_Entry(c, k) for k, s in enumerate(selections) for c in s.candidates]
        for e in entries:
            if e.numel > 0:
                kinds.setdefault(e.kind, []).append(e)
        start = [x for s in selections for x in (0, 0, NONE.value, s.survivors, s.cut.data_ptr())]
        states = self._put(start, device, "states", dtype, between).clone()
        bins = torch.zeros(len(selections) * BINS.value, dtype=torch.int64, device=device)
        options: dict[str, Any] = {**options_for(WARP_SIZE), **OPTIONS}
        passes = []
        for kind, of_kind in kinds.items():
            weight, master, dual = kind
            fields: list[int] = []
            blocks: list[int] = []
            for k, e in enumerate(of_kind):
                fields += [*e.addresses, e.numel, len(blocks), e.cut]
                blocks += [k] * e.blocks
            tables = [self._put(rows, device, what, kind, between) for what, rows in (("e", fields), ("b", blocks))]
            types = STORAGE[weight], STORAGE[dtype], STORAGE[dtype if dual is None else dual]
            constants = *types, 0 if dual is None else ADMM.value, master, SELECT_BLOCK, READS
            passes.append((len(blocks), tables, constants))

        def read(kernel: Any, *arguments: Any) -> None:
            for programs, tables, constants in passes:
                kernel[programs, 1, 1](*tables, states, *arguments, *constants, **options)

        grid = len(selections), 1, 1
        shift = 63 if dtype == torch.float64 else 31
        while shift > 0:
            bits = min(shift, BIN_BITS)
            shift -= bits
            read(histogram_kernel, bins, shift, 1 << bits)
            bin_kernel[grid](states, bins, shift, **options)
        if between:
            read(next_kernel)
        write_kernel[grid](states, STORAGE[dtype], between, **options)


def _is_served(s: Selection) -> bool:
    return kind_of(s.cut) is None and are_served(s.candidates, s.cut)


_Kind = tuple[torch.dtype, int, torch.dtype | None]
"""The type of the weights, what stands behind them, the type of their dual."""


class _Entry:
    """A tensor that is selected from, as the kernels need it."""

    def __init__(self, c: Candidates, cut: int) -> None:
        if c.group_dim is not None:
            c = Candidates(c.magnitudes())
        w = Staged(c.w.detach(), c.w.dtype)
        self.held = [w]
        master = 0
        if c.master is not None:
            low = c.w.dtype == torch.bfloat16
            master = LOW.value if low else WHOLE.value
            self.held.append(Staged(c.master, torch.int16 if low else torch.float32, w.dense))
        if c.dual is not None:
            self.held.append(Staged(c.dual, c.dual.dtype, w.dense))
        for staged in self.held:
            staged.load()
        self.kind: _Kind = c.w.dtype, master, None if c.dual is None else c.dual.dtype
        behind = self.held[1].dense.data_ptr() if master else 0
        dual = self.held[-1].dense.data_ptr() if c.dual is not None else 0
        self.numel, self.cut = c.w.numel(), cut
        self.addresses = w.dense.data_ptr(), behind, dual
        self.blocks = -(-self.numel // (SELECT_BLOCK * READS))
