"""Launches of the Triton kernels: tensors become tables, scratch and calls.

A :class:`Launch` serves the tensors of one device, one storage type and one kind of step. It is made when shapes or
groupings change; afterwards only addresses and numbers are refreshed, each of them alone.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ...method.dtypes import opmath_type
from ...method.step_options import StepOptions
from .calls import Call
from .counts import Counting
from .device_numbers import Sources
from .elements import penalty_kernel, prox_kernel, step_kernel
from .kinds import ADDRESSES, NO_STEP, StepKind, TensorArgs
from .mixed import MIXED_BLOCK, mixed_kernel
from .norms import THREADS, factor_kernel, sum_kernel
from .penalty import Prox
from .split import ADMM
from .statistics import Measuring, rows_of
from .table import (
    FACTOR_TILE,
    NO_GROUPS,
    PARTS_AT_ONCE,
    Division,
    Table,
    divide_sums,
    grouped_fields,
    pieces,
    record_of,
    record_words,
    stream_of,
)
from .windows import WINDOW_BLOCK, window_kernel

_PROX = len(Prox._fields)
STORAGE = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
_ADMM = ADMM.value


def block_of(dtype: torch.dtype, grouped: bool) -> int:
    """Elements of a block: one or two accesses of 16 bytes for each thread, one where indices need the registers."""
    one = THREADS.value * 16 // dtype.itemsize
    return one if grouped or dtype in (torch.bfloat16, torch.float16) else 2 * one


@dataclass
class Launch:
    """Launches of one action over tensors that share device, storage type and kind."""

    action: str  # "step", "prox" or "penalty"
    dtype: torch.dtype
    device: torch.device
    tensors: list[TensorArgs]
    with_tl1: bool = True
    kind: StepKind = NO_STEP
    scratch: list[Tensor] = field(default_factory=list)
    entries: list[list[int]] = field(default_factory=list)
    sources: list[tuple[int, int]] = field(default_factory=list)  # of each entry: its tensor, and bytes into it
    sums: list[list[int]] = field(default_factory=list)
    factors: list[list[int]] = field(default_factory=list)
    windows: list[list[int]] = field(default_factory=list)
    made_by: dict[int, tuple[str, int]] = field(default_factory=dict)  # the call and the entry of a tensor's ratio
    norms: list[tuple[Tensor, TensorArgs]] = field(default_factory=list)  # of a penalty's groups, for a later launch
    calls: dict[str, Call] = field(default_factory=dict)
    measuring: Measuring | None = None  # while the step makes statistics
    _measuring: Measuring | None = None  # for when it does so again

    def __post_init__(self) -> None:
        """Divide the tensors among blocks and find scratch for the groups."""
        self.opmath = opmath_type(self.dtype)
        width = 16 // self.dtype.itemsize
        double = self.opmath == torch.float64
        # lam and beta of a penalty's value are in float64.
        numbers = {"step": self.kind.numbers, "prox": _PROX, "penalty": _PROX + 2}[self.action]
        self.width = self.kind.width
        narrow = numbers if double or self.action != "penalty" else numbers - 2
        self.record_format = double, narrow + self.kind.finishes
        words = record_words(numbers + self.kind.finishes, *self.record_format)
        self.keys = {key: at * words for at, key in enumerate(dict.fromkeys(args.key for args in self.tensors))}
        self.addresses, self.records = Table(self.device), Table(self.device)
        self._prepare_sources(numbers, words)
        self.grouped = any(args.view is not None for args in self.tensors)
        grouped = self.grouped or self.action == "prox"
        self.block = MIXED_BLOCK if self.kind.planes is not None else block_of(self.dtype, grouped)
        divisions = [None if args.view is None else divide_sums(args.view, width) for args in self.tensors]
        blocks: list[int] = []
        sum_blocks: list[int] = []
        factor_blocks: list[int] = []
        window_blocks: list[int] = []
        for k, (args, d) in enumerate(zip(self.tensors, divisions, strict=True)):
            size = args.w.element_size()
            if args.view is None or d is None:
                kept = 0 if args.windows is None else self._kept(args, window_blocks)
                self._add(args.w.numel(), 0, k, NO_GROUPS, blocks, width, args.cut, kept)
                continue
            before = len(self.sums), len(self.factors)
            ratio, length = self._factors(args, d, sum_blocks, factor_blocks)
            # The first entry is that of the ratio, and what is thresholded; in parts a second launch makes factors.
            self.made_by[k] = ("sums", before[0]) if len(self.factors) == before[1] else ("factors", before[1])
            if self.action == "penalty":
                assert length is not None
                self.norms.append((length, args))
                # An entry without elements: the sums read the tensor's address from it.
                self._add(0, 0, k, NO_GROUPS, blocks, width)
                continue
            for offset, piece, group in pieces(args.view):
                skip = group * self.opmath.itemsize
                fields = grouped_fields(
                    piece,
                    0 if ratio is None else ratio.data_ptr() + skip,
                    0 if length is None else length.data_ptr() + skip,
                )
                self._add(math.prod(piece), offset * size, k, fields, blocks, width)
        for name, entries, counts in (
            ("main", self.entries, blocks),
            ("sums", self.sums, sum_blocks),
            ("factors", self.factors, factor_blocks),
            ("windows", self.windows, window_blocks),
        ):
            if sum(counts):
                self.calls[name] = Call(entries, counts, self.device)
        self.home = stream_of(self.device)  # the scratch was allocated on it
        self.whole = all(source == (k, 0) for k, source in enumerate(self.sources))
        self.totals = torch.empty(sum(blocks) * (self.action == "penalty"), dtype=torch.float64, device=self.device)

    def _prepare_sources(self, numbers: int, words: int) -> None:
        """What the device makes of records in double precision: finished ones, numbers that follow from counts."""
        counted = [k for k, args in enumerate(self.tensors) if args.counts]
        self.on_device: Sources | None = None
        self.counting: Counting | None = None
        if self.kind.finishes or counted:
            self.on_device = Sources(self.device, len(self.keys), numbers, words, self.kind.finishes)
        if counted:
            kind, places = self.kind, {key: place for place, key in enumerate(self.keys)}
            of_each = [places[self.tensors[k].key] for k in counted]
            self.counting = Counting(self.device, of_each, numbers, kind.base, kind.corrects, kind.rounds)

    def _add(
        self,
        numel: int,
        offset: int,
        k: int,
        grouped: list[int],
        blocks: list[int],
        width: int,
        cut: int = 0,
        kept: int = 0,
    ) -> None:
        first = self.entries[-1][1] + blocks[-1] if self.entries else 0
        # Where the kernel reads what is made of counts, all tensors of the launch have one.
        reads = self.kind.corrects or self.kind.rounds
        made = self.counting.made_at(k) if self.counting is not None and reads else 0
        self.entries.append([numel, first, self.keys[self.tensors[k].key], *grouped, cut, made, kept])
        self.sources.append((k, offset))
        # The tensor may begin up to width - 1 elements after a boundary.
        blocks.append(-(-(numel + width - 1) // self.block) if numel else 0)

    def _kept(self, args: TensorArgs, blocks: list[int]) -> int:
        """The address of the bytes that say which elements survive, and the entry that fills them."""
        assert args.windows is not None
        n, m, inner = args.windows
        numel = args.w.numel()
        self.scratch.append(torch.empty(numel, dtype=torch.int8, device=self.device))
        kept, addresses = self.scratch[-1].data_ptr(), self.width * len(self.entries)
        states = addresses + ADDRESSES
        dual = states + self.kind.states - 1 if self.kind.method == _ADMM else -1
        master = states + self.kind.states if self.kind.width > ADDRESSES + self.kind.states else -1
        first = self.windows[-1][1] + blocks[-1] if self.windows else 0
        self.windows.append([addresses, first, numel, inner, n, m, kept, dual, master])
        blocks.append(-(-numel // WINDOW_BLOCK))
        return kept

    def _factors(
        self, args: TensorArgs, d: Division, sum_blocks: list[int], factor_blocks: list[int]
    ) -> tuple[Tensor | None, Tensor | None]:
        """The scratch of a tensor in groups, and the entries that fill it."""
        v = args.view
        assert v is not None
        count, value = v.batch * v.groups, self.action == "penalty"

        def take(n: int, dtype: torch.dtype) -> Tensor:
            self.scratch.append(torch.empty(n, dtype=dtype, device=self.device))
            return self.scratch[-1]

        ratio = None if value else take(count, self.opmath)
        length = take(count, self.opmath) if value or args.lasso else None
        made = [0 if t is None else t.data_ptr() for t in (ratio, length)]
        # Where what is thresholded is not w, a group lasso needs norms of w beside those of what is thresholded.
        dual = self.kind.method == _ADMM
        rows = [([made[0], 0], True), ([0, made[1]], False)] if dual and args.lasso else [(made, dual)]
        for row, (factors, with_dual) in enumerate(rows):
            if args.norms != 0:
                norms = args.norms + row * count * torch.float64.itemsize
                self._add_factors(args, d, factors, norms, 1, 1, factor_blocks)
                continue
            partials = take(d.parts * count, torch.float64) if d.parts > 1 else None
            self._add_sums(args, d, factors, with_dual, partials, sum_blocks, factor_blocks)
        return ratio, length

    def _add_sums(
        self,
        args: TensorArgs,
        d: Division,
        factors: list[int],
        with_dual: bool,
        partials: Tensor | None,
        sum_blocks: list[int],
        factor_blocks: list[int],
    ) -> None:
        """The sums of squares of a tensor's groups; without ``partials`` factors are made of them at once."""
        out = 0 if partials is None else partials.data_ptr()
        addresses = self.width * len(self.entries)
        source = addresses + (1 if self.action != "step" else 0)
        dual = addresses + ADDRESSES + self.kind.states - 1 if with_dual else -1
        first = self.sums[-1][1] + sum_blocks[-1] if self.sums else 0
        self.sums.append([source, first, *self._shape_fields(args, d, factors, out, d.parts), dual, args.cut, 0])
        sum_blocks.append(d.blocks)
        if partials is not None:
            self._add_factors(args, d, factors, out, d.parts, 0, factor_blocks)

    def _add_factors(
        self,
        args: TensorArgs,
        d: Division,
        factors: list[int],
        partials: int,
        parts: int,
        are_norms: int,
        blocks: list[int],
    ) -> None:
        """Factors of what stands at the address ``partials``: sums of parts, or norms that were made elsewhere."""
        assert args.view is not None
        first = self.factors[-1][1] + blocks[-1] if self.factors else 0
        shape = self._shape_fields(args, d, factors, partials, parts)
        self.factors.append([0, first, *shape, -1, args.cut, are_norms])
        blocks.append(-(-args.view.batch * args.view.groups // FACTOR_TILE))

    def _shape_fields(self, args: TensorArgs, d: Division, factors: list[int], partials: int, parts: int) -> list[int]:
        """The fields of a sum from RECORD to BARE_NORMS."""
        v = args.view
        assert v is not None
        count, value = v.batch * v.groups, self.action == "penalty"
        shape = [v.outer, v.groups, v.inner, count, d.tile, d.tiles, parts, int(d.parts_are_rows), d.shape, int(value)]
        return [self.keys[args.key], *factors, partials, *shape]

    # ---- what changes from step to step ------------------------------------------------------------------------------

    def move(self, *addresses: Sequence[int]) -> None:
        """The addresses of w, of g, and of each state: of each a list over all tensors."""
        flat = [0] * (self.width * len(self.sources))
        for place, starts in enumerate(addresses):
            flat[place :: self.width] = starts if self.whole else [starts[k] + offset for k, offset in self.sources]
        self.addresses.data = array("q", flat).tobytes()

    def set(self, numbers: Mapping[tuple[Any, ...], Sequence[float]], told: Sequence[StepOptions] = ()) -> None:
        """The numbers of each key.

        Args:
            told: what the groups are told, where the device makes anything of the numbers or the step makes statistics;
                a key begins with the place of its group.
        """
        if not self.kind.finishes:
            self.records.data = b"".join(record_of(numbers[key], *self.record_format) for key in self.keys)
        if self.on_device is not None:
            self.on_device.set([numbers[key] for key in self.keys], [told[key[0]] for key in self.keys])
        if self.measuring is not None:
            self.measuring.set(list(self.keys), told)

    def measure(self, rooms: Sequence[Tensor | None], told: Sequence[StepOptions]) -> None:
        """Make statistics from the next step on, or none where there are no rooms.

        Args:
            rooms: where those of each tensor go.
            told: as :meth:`set` is told it.
        """
        self.measuring = None
        if all(room is None for room in rooms):
            return
        if self._measuring is None:
            entries = {"main": self.entries, "sums": self.sums, "factors": self.factors}
            programs = [self.calls[name].programs if name in self.calls else 0 for name in entries]
            places = {key: place for place, key in enumerate(self.keys)}
            rows = rows_of(entries, programs, self.sources, self.made_by, [places[args.key] for args in self.tensors])
            self._measuring = Measuring(self.device, rows, programs)
        self.measuring = self._measuring
        self.measuring.move(rooms)
        self.measuring.set(list(self.keys), told)

    # ---- the calls ---------------------------------------------------------------------------------------------------

    def run(self, grad_scale: Tensor | None = None, found_inf: Tensor | None = None, *, captured: bool = False) -> None:
        """Put the work on the current stream of the device, which must be the current device.

        Args:
            captured: the stream is being captured into a graph, which needs this launch as long as it is replayed.
        """
        S, T = STORAGE[self.dtype], STORAGE[self.opmath]
        k, calls = self.kind, self.calls
        addresses = self.addresses.put(captured)
        used: tuple[Tensor, ...] = ()
        measuring, measures = self.measuring, self.measuring is not None
        of_main, of_sums, of_factors = (self.totals,) * 3 if measuring is None else measuring.totals
        if self.on_device is not None and found_inf is not None:
            sources = self.on_device.put(captured)
            counted = () if self.counting is None else self.counting.run(sources, found_inf, captured)
            used = sources, *counted
        if measuring is not None:
            used = *used, *measuring.put(captured)
        if self.on_device is not None and k.finishes:
            records = self.on_device.finish(sources, T, k.base)
        else:
            records = self.records.put(captured)
        stream = stream_of(self.device)
        if stream != self.home and not captured:
            # The allocator must not hand this memory on before another stream is done with it.
            of_calls = (t for call in calls.values() for t in (call.entries, call.owners))
            for t in (addresses, records, self.totals, *used, *self.scratch, *of_calls):
                t.record_stream(stream)
        if "sums" in calls:
            call = calls["sums"]
            tables = addresses, call.entries, records, call.owners
            call(sum_kernel, *tables, of_sums, S, T, k.method == _ADMM, measures, kind=measures)
        if "factors" in calls:
            call = calls["factors"]
            tile = PARTS_AT_ONCE, FACTOR_TILE
            call(factor_kernel, call.entries, records, call.owners, of_factors, T, *tile, measures, kind=measures)
        if "windows" in calls:
            call, planes = calls["windows"], k.planes
            of_method, master = (S, 0) if planes is None else (STORAGE[planes.of_method], planes.master)
            call(window_kernel, addresses, call.entries, call.owners, S, T, of_method, k.method, master, WINDOW_BLOCK)
        if "main" not in calls:
            return
        call = calls["main"]
        tables = addresses, call.entries, records, call.owners
        block = self.block
        if self.action == "step":
            assert grad_scale is not None and found_inf is not None
            rest = k.numbers if k.finishes and k.method != 0 else 0, measures
            windows = "windows" in calls
            scaling, kind = (grad_scale, found_inf, of_main), (grad_scale.dtype, found_inf.dtype, measures)
            shape = block, k.base, k.method, k.states, k.writes_gradient, self.with_tl1
            if k.planes is not None:
                types = S, *(STORAGE[t] for t in k.planes[:3]), *k.planes[3:]
                call(mixed_kernel, *tables, *scaling, *types, *shape, windows, *rest, kind=kind)
            else:
                call(step_kernel, *tables, *scaling, S, T, *shape, self.grouped, windows, *rest, kind=kind)
            if measuring is not None:
                measuring.run(found_inf)
        elif self.action == "prox":
            call(prox_kernel, *tables, S, T, block)
        else:
            call(penalty_kernel, *tables, self.totals, S, T, block)
