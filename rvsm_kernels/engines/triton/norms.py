"""The sums of squares of groups in Triton and what follows from them: the counterpart of ``csrc/cuda/norms.h``.

Sums are in double precision along a fixed order, so they need no atomics and give the same bits in every run. A program
sums the groups of one tile. Where a group is long, or there are too few groups for all multiprocessors, it is summed in
parts, and a second launch sums the parts. Factors follow from norms in one function (:func:`store_factors`), wherever
the norms were made: in this launch, or elsewhere.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .elements import prox_of, with_cut
from .penalty import length_of, shrink, shrink_ratio
from .sums import measure_groups

# Fields of an entry, in int64.
SOURCE = tl.constexpr(0)  # the place, among the addresses, of the tensor whose groups are summed
FIRST = tl.constexpr(1)  # its first block
RECORD = tl.constexpr(2)
RATIO = tl.constexpr(3)  # addresses of what is made: shrink(norm) / norm, or 0
LENGTH = tl.constexpr(4)  # the norm, or 0
PARTIALS = tl.constexpr(5)  # address of the sums of parts, or 0 where a group is one part
OUTER = tl.constexpr(6)
GROUPS = tl.constexpr(7)
INNER = tl.constexpr(8)
COUNT = tl.constexpr(9)  # groups of all batches
TILE = tl.constexpr(10)  # groups of a program
TILES = tl.constexpr(11)
PARTS = tl.constexpr(12)
PARTS_ARE_ROWS = tl.constexpr(13)  # a part is some rows of a group, else a piece of each row
SHAPE = tl.constexpr(14)  # of a tile
BARE_NORMS = tl.constexpr(15)  # LENGTH gets 0 for the zero group, not 1
DUAL = tl.constexpr(16)  # the place, among the addresses, of what is added to the source, or -1
CUT = tl.constexpr(17)  # address of the cut of top-k, or 0
ARE_NORMS = tl.constexpr(18)  # PARTIALS holds norms that were made elsewhere, not sums of squares
SUM_ENTRY = tl.constexpr(19)

# Shapes of a tile: groups x elements of a row that a program has at once; a strip is rows x columns.
STRIP = tl.constexpr(0)
SHORT = tl.constexpr(1)
TEAM = tl.constexpr(2)
LONG = tl.constexpr(3)
STRIP_COLUMNS = tl.constexpr(256)
THREADS = tl.constexpr(256)  # of a program


@triton.constexpr_function
def tile_groups(shape):
    """Groups of a tile (``TILE_GROUPS`` of ``table.py``)."""
    return 64 if shape == 1 else 8 if shape == 2 else 1


@triton.jit
def finish(entry, numbers, part, group, sums, mask, totals, T: tl.constexpr, MEASURES: tl.constexpr):
    """Store the sums of groups, or the factors that follow from them."""
    partials = tl.load(entry + PARTIALS)
    if partials != 0:
        tl.store(partials.to(tl.pointer_type(tl.float64)) + part * tl.load(entry + COUNT) + group, sums, mask)
    else:
        store_factors(entry, numbers, group, sums, mask, totals, T, MEASURES)


@triton.jit
def store_factors(entry, numbers, group, sums, mask, totals, T: tl.constexpr, MEASURES: tl.constexpr):
    """ratio = shrink(norm) / norm and length = norm (1 for the zero group, unless bare norms are asked for).

    Args:
        sums: the sums of squares of the groups; their norms where the entry says so.
        totals: where the statistics of the groups of a program go, if it ``MEASURES``.
    """
    norm = tl.where(tl.load(entry + ARE_NORMS) != 0, sums, tl.sqrt(sums)).to(T)
    ratio, length = tl.load(entry + RATIO), tl.load(entry + LENGTH)
    if ratio != 0:
        f = with_cut(prox_of(numbers), tl.load(entry + CUT), T)
        tl.store(ratio.to(tl.pointer_type(T)) + group, shrink_ratio(norm, f).to(T), mask)
        if MEASURES:
            measure_groups(totals, shrink(norm, f, True), f, mask)
    if length != 0:
        bare = tl.load(entry + BARE_NORMS) != 0
        tl.store(length.to(tl.pointer_type(T)) + group, tl.where(bare, norm, length_of(norm)), mask)


@triton.jit
def load_sum(x, y, at, mask, T: tl.constexpr, DUAL_OF: tl.constexpr):
    """x, or x + y as a step with a dual thresholds it, in double precision."""
    v = tl.load(x + at, mask, 0.0).to(T)
    if DUAL_OF:
        v += tl.load(y + at, mask, 0.0).to(T)
    return v.to(tl.float64)


@triton.jit
def sum_team(
    x, y, rows, groups, columns, inner, length,
    T: tl.constexpr, DUAL_OF: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """G groups, K elements of a row of each at once."""
    g, k = tl.arange(0, G)[:, None], tl.arange(0, K)[None, :]
    at = g * inner
    acc = tl.zeros([G, K], tl.float64)
    for _ in range(0, rows):
        for i in range(0, length, K):
            v = load_sum(x, y, at + (i + k), (g < groups) & (i + k < length), T, DUAL_OF)
            acc += v * v
        at += columns
    return tl.sum(acc, 1)


@triton.jit
def sum_strip(
    x, y, rows, columns, width, inner, T: tl.constexpr, DUAL_OF: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):
    """Rows of several whole groups, `width` columns in all; the sum of a group is in its place of C."""
    r, c = tl.arange(0, R)[:, None], tl.arange(0, C)[None, :]
    acc = tl.zeros([R, C], tl.float64)
    for row in range(0, rows, R):
        v = load_sum(x, y, (row + r) * columns + c, (row + r < rows) & (c < width), T, DUAL_OF)
        acc += v * v
    by_column = tl.sum(acc, 0)
    first = tl.arange(0, C) * inner.to(tl.int32)
    sums = tl.zeros([C], tl.float64)
    for i in range(0, inner.to(tl.int32)):
        sums += tl.gather(by_column, tl.minimum(first + i, C - 1), 0)
    return sums


@triton.jit
def multiple(n, W: tl.constexpr):
    """n, which is known to be a multiple of W; the compiler sees it by the product."""
    return n // W * W


@triton.jit
def sum_shape(
    x, y, rows, groups, columns, inner, length,
    SHAPE_OF: tl.constexpr, T: tl.constexpr, DUAL_OF: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Sums of squares of the groups of a tile: at a time 16 bytes, W elements, for each thread."""
    ELEMENTS: tl.constexpr = THREADS * W
    if SHAPE_OF == STRIP:
        sums = sum_strip(x, y, rows, columns, length, inner, T, DUAL_OF, ELEMENTS // STRIP_COLUMNS, STRIP_COLUMNS)
    else:
        G: tl.constexpr = tile_groups(SHAPE_OF)
        sums = sum_team(x, y, rows, groups, columns, inner, length, T, DUAL_OF, G, ELEMENTS // G)
    return sums


@triton.jit
def sum_tile(
    entry, numbers, address, dual, rows, groups, columns, inner, length, part, group, totals,
    SHAPE_OF: tl.constexpr, S: tl.constexpr, T: tl.constexpr, DUAL_OF: tl.constexpr, W: tl.constexpr,
    MEASURES: tl.constexpr,
):  # fmt: skip
    """One tile of a shape. Where every row begins on a boundary of 16 bytes, accesses are as wide."""
    if SHAPE_OF == STRIP:
        length = groups * inner
        aligned = (address % 16 == 0) & (columns % W == 0) & (length % W == 0)
    else:
        aligned = (address % 16 == 0) & (columns % W == 0) & (length % W == 0) & (inner % W == 0)
    aligned = aligned & (dual % 16 == 0)
    if aligned:
        y = tl.multiple_of(dual.to(tl.pointer_type(S)), 16)
        x = tl.multiple_of(address.to(tl.pointer_type(S)), 16)
        wide = inner if SHAPE_OF == STRIP else multiple(inner, W)
        sums = sum_shape(x, y, rows, groups, multiple(columns, W), wide, multiple(length, W), SHAPE_OF, T, DUAL_OF, W)
    else:
        x, y = address.to(tl.pointer_type(S)), dual.to(tl.pointer_type(S))
        sums = sum_shape(x, y, rows, groups, columns, inner, length, SHAPE_OF, T, DUAL_OF, W)
    g = tl.arange(0, STRIP_COLUMNS if SHAPE_OF == STRIP else tile_groups(SHAPE_OF))
    finish(entry, numbers, part, group + g, sums, g < groups, totals, T, MEASURES)


@triton.jit
def sum_any(
    entry, numbers, x, y, rows, groups, columns, inner, length, part, group, totals,
    S: tl.constexpr, T: tl.constexpr, DUAL_OF: tl.constexpr, W: tl.constexpr, MEASURES: tl.constexpr,
):  # fmt: skip
    """One tile, of the entry's shape."""
    shape = tl.load(entry + SHAPE)
    if shape == STRIP:
        sum_tile(
            entry, numbers, x, y, rows, groups, columns, inner, length, part, group, totals,
            STRIP, S, T, DUAL_OF, W, MEASURES,
        )  # fmt: skip
    elif shape == TEAM:
        sum_tile(
            entry, numbers, x, y, rows, groups, columns, inner, length, part, group, totals,
            TEAM, S, T, DUAL_OF, W, MEASURES,
        )  # fmt: skip
    elif shape == LONG:
        sum_tile(
            entry, numbers, x, y, rows, groups, columns, inner, length, part, group, totals,
            LONG, S, T, DUAL_OF, W, MEASURES,
        )  # fmt: skip
    else:
        sum_tile(
            entry, numbers, x, y, rows, groups, columns, inner, length, part, group, totals,
            SHORT, S, T, DUAL_OF, W, MEASURES,
        )  # fmt: skip


@triton.jit
def sum_kernel(
    addresses, entries, records, owners, totals, S: tl.constexpr, T: tl.constexpr, WITH_DUAL: tl.constexpr,
    MEASURES: tl.constexpr,
):  # fmt: skip
    """Sums of squares of the groups of all entries, or factors where a group is one part.

    WITH_DUAL: an entry may have a dual.
    MEASURES: see ``step_kernel``.
    """
    block = tl.program_id(0)
    entry = entries + tl.load(owners + block).to(tl.int64) * SUM_ENTRY
    numbers = (records + tl.load(entry + RECORD)).to(tl.pointer_type(T))
    outer, all_groups, inner = tl.load(entry + OUTER), tl.load(entry + GROUPS), tl.load(entry + INNER)
    tile, tiles, parts = tl.load(entry + TILE), tl.load(entry + TILES), tl.load(entry + PARTS)
    # Numbers of blocks fit 32 bits; 64-bit divisions are calls.
    index, narrow, wide = block - tl.load(entry + FIRST).to(tl.int32), parts.to(tl.int32), tiles.to(tl.int32)
    whole = index // narrow
    part, batch = (index - whole * narrow).to(tl.int64), whole // wide
    first = (whole - batch * wide).to(tl.int64) * tile
    parts_are_rows = tl.load(entry + PARTS_ARE_ROWS) != 0
    W: tl.constexpr = 128 // S.primitive_bitwidth
    pieces = tl.where(parts_are_rows, outer, tl.cdiv(inner, W))
    start = pieces * part // parts
    count = pieces * (part + 1) // parts - start
    row = batch * outer + tl.where(parts_are_rows, start, 0)
    skip = tl.where(parts_are_rows, 0, start * W)
    rows = tl.where(parts_are_rows, count, outer)
    length = tl.where(parts_are_rows, inner, tl.minimum(count * W, inner - skip))
    groups = tl.minimum(tile, all_groups - first)
    columns = all_groups * inner
    size: tl.constexpr = S.primitive_bitwidth // 8
    begin = ((row * all_groups + first) * inner + skip) * size
    x = tl.load(addresses + tl.load(entry + SOURCE)) + begin
    group = batch * all_groups + first
    if WITH_DUAL:
        dual = tl.load(entry + DUAL)
        if dual >= 0:
            y = tl.load(addresses + dual) + begin
            sum_any(
                entry, numbers, x, y, rows, groups, columns, inner, length, part, group, totals,
                S, T, True, W, MEASURES,
            )  # fmt: skip
        else:
            sum_any(
                entry, numbers, x, x, rows, groups, columns, inner, length, part, group, totals,
                S, T, False, W, MEASURES,
            )  # fmt: skip
    else:
        sum_any(
            entry, numbers, x, x, rows, groups, columns, inner, length, part, group, totals, S, T, False, W, MEASURES
        )


@triton.jit
def factor_kernel(
    entries, records, owners, totals, T: tl.constexpr, P: tl.constexpr, G: tl.constexpr, MEASURES: tl.constexpr
):
    """The sums of parts, or norms that were made elsewhere, become factors: tiles of G groups, P parts at once."""
    block = tl.program_id(0)
    entry = entries + tl.load(owners + block).to(tl.int64) * SUM_ENTRY
    numbers = (records + tl.load(entry + RECORD)).to(tl.pointer_type(T))
    count, parts = tl.load(entry + COUNT), tl.load(entry + PARTS)
    p, g = tl.arange(0, P)[:, None], tl.arange(0, G)
    group = (block - tl.load(entry + FIRST)) * G + g
    sums = tl.load(entry + PARTIALS).to(tl.pointer_type(tl.float64))
    acc = tl.zeros([P, G], tl.float64)
    for i in range(0, parts, P):
        acc += tl.load(sums + (i + p) * count + group[None, :], (i + p < parts) & (group[None, :] < count), 0.0)
    store_factors(entry, numbers, group, tl.sum(acc, 0), group < count, totals, T, MEASURES)
