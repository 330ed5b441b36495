"""The Triton kernels over elements: step, prox and penalty over a table of pointers.

A launch serves all tensors of one storage type, base and method. Three arrays on the device tell it about them
(``table.py``): entries with all that stays as long as shapes do, the addresses of w, g and the states of each entry,
and records of numbers in the type of the arithmetic. ``owners`` says for each block which entry it works for. All that
an option changes is read from there, so that no edit compiles anything anew; what the compiler knows is the storage
type S, the type of the arithmetic T, base, method, the number of states, and which code may be needed at all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bases import base_step, reads_gradient
from .penalty import NONE, Prox, penalty_term, shrink
from .split import Split, gap_of, is_held, method_states, split_step, thresholded, unless_held
from .sums import measure_block

# ---- the table ------------------------------------------------------------------------------------------------------

# The addresses of an entry; those of its states follow, the base's first, then the method's.
W = tl.constexpr(0)
G = tl.constexpr(1)  # the gradient of a step; what a prox and a penalty read
STATE = tl.constexpr(2)

# Fields of an entry of a step, a prox or a penalty, in int64.
NUMEL = tl.constexpr(0)
FIRST = tl.constexpr(1)  # its first block
RECORD = tl.constexpr(2)  # where its numbers are, in int64
GROUPED = tl.constexpr(3)
RATIO = tl.constexpr(4)  # addresses of the factors of its groups
LENGTH = tl.constexpr(5)
COLUMNS = tl.constexpr(6)  # groups * inner
GROUPS = tl.constexpr(7)
BY_COLUMNS = tl.constexpr(8)  # dividers (``divider`` of ``table.py``)
BY_INNER = tl.constexpr(9)
BY_BATCH = tl.constexpr(10)
CUT = tl.constexpr(11)  # address of the cut of top-k, or 0
CORRECTIONS = tl.constexpr(12)  # address of the numbers of its base that follow from its count, or 0
KEPT = tl.constexpr(13)  # address of which elements survive N:M sparsity, a byte for each, or 0
ENTRY = tl.constexpr(14)

# Numbers of a record: a Prox, a Split, those of the base and, where the device finishes it (``device_numbers.py``),
# whether lr is 0; or a Prox, then lam and beta in double.
PROX = tl.constexpr(6)
SPLIT = tl.constexpr(5)


@triton.jit
def prox_of(numbers):
    """The Prox at an address of numbers."""
    return Prox(
        tl.load(numbers),
        tl.load(numbers + 1),
        tl.load(numbers + 2),
        tl.load(numbers + 3),
        tl.load(numbers + 4),
        tl.load(numbers + 5),
    )


@triton.jit
def split_of(numbers):
    """The Split after a Prox."""
    s = numbers + PROX
    return Split(tl.load(s), tl.load(s + 1), tl.load(s + 2), tl.load(s + 3), tl.load(s + 4))


@triton.jit
def with_cut(f: Prox, where, T: tl.constexpr):
    """A Prox with the cut at an address, or as it is where that is 0 or there is no penalty now."""
    cut = f.cut
    if (where != 0) & (f.penalty != NONE):
        cut = tl.load(where.to(tl.pointer_type(T)))
    return Prox(f.penalty, cut, f.tau, f.a, f.rho, f.edge)


@triton.jit
def divide(n, divider):
    """n / d for n < 2^31 by a product and a shift (Granlund & Montgomery), as ``Divider`` of ``csrc/cuda/table.h``."""
    factor = (divider & 0xFFFFFFFF).to(tl.uint32)
    shift = (divider >> 32).to(tl.uint32)
    return (tl.umulhi(n, tl.zeros_like(n) + factor) + n) >> shift


@triton.jit
def group_of(entry, at):
    """The numbers of the groups of elements at a place, as ``FactorPlace::group`` of ``csrc/cuda/table.h``."""
    columns, groups = tl.load(entry + COLUMNS).to(tl.uint32), tl.load(entry + GROUPS).to(tl.uint32)
    row = divide(at, tl.load(entry + BY_COLUMNS))
    return divide(at, tl.load(entry + BY_BATCH)) * groups + divide(at - row * columns, tl.load(entry + BY_INNER))


# ---- u of a block ---------------------------------------------------------------------------------------------------


@triton.jit
def with_sign(r, w):
    """r with the sign of w; a zero w, whose r is 0, and a NaN stay what they are."""
    return tl.where(w > 0, r, tl.where(w < 0, -r, w))


@triton.jit
def pull_of(
    v, w, f, entry, at, mask, WITH_TL1: tl.constexpr, WITH_GROUPS: tl.constexpr, WITH_WINDOWS: tl.constexpr
):  # fmt: skip
    """u = prox(v) and w_G / ||w_G|| of elements.

    With groups, by factors that launches before this one have made; with windows, by what such a launch has found to
    survive, all that a group with N:M sparsity is told of its elements.
    """
    unit = tl.zeros_like(w)
    if WITH_GROUPS:
        if tl.load(entry + GROUPED) != 0:
            group = group_of(entry, at.to(tl.uint32))
            u = v * tl.load(tl.load(entry + RATIO).to(tl.pointer_type(w.dtype)) + group, mask, 0.0)
            length = tl.load(entry + LENGTH)
            if length != 0:
                unit = w / tl.load(length.to(tl.pointer_type(w.dtype)) + group, mask, 1.0)
        else:
            u = with_sign(shrink(tl.abs(v), f, WITH_TL1), v)
    else:
        u = with_sign(shrink(tl.abs(v), f, WITH_TL1), v)
    if WITH_WINDOWS:
        kept = tl.load(entry + KEPT)
        if kept != 0:
            survives = tl.load(kept.to(tl.pointer_type(tl.int8)) + at, mask, 1) != 0
            u = tl.where(f.penalty == NONE, v, tl.where(survives, v, 0.0))
    return u, unit


@triton.jit
def entry_of(addresses, entries, records, owners, STATES: tl.constexpr, T: tl.constexpr):
    """The entry of a block, its addresses and its numbers."""
    owner = tl.load(owners + tl.program_id(0)).to(tl.int64)
    entry = entries + owner * ENTRY
    return entry, addresses + owner * (STATE + STATES), (records + tl.load(entry + RECORD)).to(tl.pointer_type(T))


@triton.jit
def span_of(entry, begin, BLOCK: tl.constexpr):
    """Where a block begins, and the elements [begin, end) of the entry, both counted from the same boundary."""
    return (tl.program_id(0) - tl.load(entry + FIRST)) * BLOCK, begin, begin + tl.load(entry + NUMEL)


@triton.jit
def lead_of(address, S: tl.constexpr):
    """Elements from the last 16-byte boundary to an address."""
    return (address & 15) // (S.primitive_bitwidth // 8)


@triton.jit
def read(p, mask, WHOLE: tl.constexpr):
    """Elements; all of them in accesses of 16 bytes, or those of the mask."""
    return tl.load(p) if WHOLE else tl.load(p, mask, 0.0)


@triton.jit
def write(p, x, mask, WHOLE: tl.constexpr):
    """The counterpart of :func:`read`."""
    if WHOLE:
        tl.store(p, x.to(p.dtype.element_ty))
    else:
        tl.store(p, x.to(p.dtype.element_ty), mask)


@triton.jit
def write_moving(p, x, mask, numbers, REST: tl.constexpr, WHOLE: tl.constexpr):
    """Write the state of a method, unless lr is 0 by the number at the place REST: then it stays."""
    if REST > 0:
        moves = tl.broadcast_to(tl.load(numbers + REST), x.shape) == 0
        # A mask, which is the same for all, and no branch: around that some variants spill.
        tl.store(p, x.to(p.dtype.element_ty), moves if WHOLE else mask & moves)
    else:
        write(p, x, mask, WHOLE)


# ---- the step -------------------------------------------------------------------------------------------------------


@triton.jit
def addresses_of_states(address, shift, STATES: tl.constexpr):
    """The addresses of the states of an entry, each ``shift`` bytes further on."""
    states = ()
    for k in tl.static_range(STATES):
        states = states + (tl.load(address + STATE + k) + shift,)  # type: ignore  # noqa: RUF005 - Triton reads no star
    return states


@triton.jit
def as_pointers(addresses, S: tl.constexpr, N: tl.constexpr, WHOLE: tl.constexpr):
    """Addresses as pointers to S; where blocks are whole they lie on boundaries of 16 bytes."""
    pointers = ()
    for k in tl.static_range(N):
        p = addresses[k].to(tl.pointer_type(S))
        pointers = pointers + (tl.multiple_of(p, 16) if WHOLE else p,)  # type: ignore  # noqa: RUF005
    return pointers


@triton.jit
def arithmetic(
    entry, numbers, w, d, states, of_method, at, mask, count, scale, totals,
    BASE: tl.constexpr, METHOD: tl.constexpr, BASE_STATES: tl.constexpr, WITH_TL1: tl.constexpr,
    WITH_GROUPS: tl.constexpr, WITH_WINDOWS: tl.constexpr, MEASURES: tl.constexpr,
):  # fmt: skip
    """The step of elements that were loaded; returns the new w and d, and the states of the base and of the method.

    Args:
        d: the gradient; what the base makes a step of comes back.
        at: the places of the elements in their entry.
        mask, count: which of them are there, and how many.
        totals: where the sums of the statistics go, if the step ``MEASURES``.
    """
    f, s = with_cut(prox_of(numbers), tl.load(entry + CUT), w.dtype), split_of(numbers)
    held = is_held(w, s)
    kept = ()
    for k in tl.static_range(BASE_STATES):
        kept = kept + (unless_held(held, states[k]),)  # type: ignore  # noqa: RUF005 - Triton reads no star
    d, of_method = unless_held(held, d), unless_held(held, of_method)
    v = thresholded(w, of_method, METHOD)
    u, unit = pull_of(v, w, f, entry, at, mask, WITH_TL1, WITH_GROUPS, WITH_WINDOWS)
    gap, of_method = gap_of(w, v, u, of_method, METHOD)
    found = w
    w, d = split_step(w, d * (scale * s.grad), gap, unit, f, s)  # grad is 1 or -1
    if MEASURES:
        grouped = tl.load(entry + GROUPED) if WITH_GROUPS else 0
        measure_block(totals, found, u, d, mask, count, f, grouped, WITH_TL1)
    w, states = base_step(w, kept, d, numbers + PROX + SPLIT, entry + CORRECTIONS, BASE, BASE_STATES)
    return w, d, states, of_method


@triton.jit
def inverse_of(grad_scale, T: tl.constexpr):
    """What the gradients are multiplied by."""
    one = tl.full((), 1.0, T)
    return tl.div_rn(one, tl.load(grad_scale)) if T.primitive_bitwidth == 32 else one / tl.load(grad_scale)


@triton.jit
def step_elements(
    entry, numbers, w, g, state_pointers, place, begin, end, scale, totals,
    T: tl.constexpr, BLOCK: tl.constexpr, BASE: tl.constexpr, METHOD: tl.constexpr, STATES: tl.constexpr,
    WRITES_GRADIENT: tl.constexpr, WITH_TL1: tl.constexpr, WITH_GROUPS: tl.constexpr, WITH_WINDOWS: tl.constexpr,
    REST: tl.constexpr, MEASURES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Load, arithmetic, store. The elements are those of [begin, end) among BLOCK from `place` on.

    Triton keeps the order of loads: all elements are loaded before any arithmetic, else more registers are needed.
    """
    BASE_STATES: tl.constexpr = STATES - method_states(METHOD)
    i = tl.arange(0, BLOCK)
    mask = (i >= begin - place) & (i < end - place)
    wi = read(w + i, mask, WHOLE).to(T)
    d = tl.zeros_like(wi)
    if reads_gradient(BASE, WRITES_GRADIENT or MEASURES):
        d = read(g + i, mask, WHOLE).to(T)
    states = ()
    for k in tl.static_range(BASE_STATES):
        states = states + (read(state_pointers[k] + i, mask, WHOLE).to(T),)  # type: ignore  # noqa: RUF005
    of_method = wi
    if METHOD != 0:
        of_method = read(state_pointers[BASE_STATES] + i, mask, WHOLE).to(T)
    at, count = place - begin + i, tl.minimum(end - place, BLOCK) - tl.maximum(begin - place, 0)
    wi, d, states, of_method = arithmetic(
        entry, numbers, wi, d, states, of_method, at, mask, count, scale, totals,
        BASE, METHOD, BASE_STATES, WITH_TL1, WITH_GROUPS, WITH_WINDOWS, MEASURES,
    )  # fmt: skip
    write(w + i, wi, mask, WHOLE)
    if WRITES_GRADIENT:
        write(g + i, d, mask, WHOLE)
    for k in tl.static_range(BASE_STATES):
        write(state_pointers[k] + i, states[k], mask, WHOLE)
    if METHOD != 0:
        write_moving(state_pointers[BASE_STATES] + i, of_method, mask, numbers, REST, WHOLE)


@triton.jit(do_not_specialize_on_alignment=["grad_scale", "found_inf"])
def step_kernel(
    addresses, entries, records, owners, grad_scale, found_inf, totals,
    S: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr, BASE: tl.constexpr, METHOD: tl.constexpr,
    STATES: tl.constexpr, WRITES_GRADIENT: tl.constexpr, WITH_TL1: tl.constexpr, WITH_GROUPS: tl.constexpr,
    WITH_WINDOWS: tl.constexpr, REST: tl.constexpr, MEASURES: tl.constexpr,
):  # fmt: skip
    """One step of all entries; nothing where found_inf is above 0.

    REST: the place of the number of a record that says whether lr is 0; 0 where there is none.
    MEASURES: each block adds up its statistics (``sums.py``) and stores them among ``totals``.
    """
    if tl.load(found_inf) > 0:
        return
    entry, address, numbers = entry_of(addresses, entries, records, owners, STATES, T)
    w, g = tl.load(address + W), tl.load(address + G)
    # Where all tensors of the entry are equally far from a boundary of 16 bytes, blocks begin on such boundaries. The
    # elements from the first boundary to the tensor are masked.
    lead = lead_of(w, S)
    aligned = lead == lead  # true, as a value at run time
    if reads_gradient(BASE, WRITES_GRADIENT or MEASURES):
        aligned = aligned & (lead == lead_of(g, S))
    for k in tl.static_range(STATES):
        aligned = aligned & (lead == lead_of(tl.load(address + STATE + k), S))
    place, begin, end = span_of(entry, tl.where(aligned, lead, 0), BLOCK)
    size: tl.constexpr = S.primitive_bitwidth // 8
    shift = (place - begin) * size
    scale = inverse_of(grad_scale, T)
    states = addresses_of_states(address, shift, STATES)
    if aligned & (place >= begin) & (place + BLOCK <= end):
        wg = as_pointers((w + shift, g + shift), S, 2, True)
        step_elements(
            entry, numbers, wg[0], wg[1], as_pointers(states, S, STATES, True), place, begin, end, scale, totals,
            T, BLOCK, BASE, METHOD, STATES, WRITES_GRADIENT, WITH_TL1, WITH_GROUPS, WITH_WINDOWS, REST, MEASURES, True,
        )  # fmt: skip
    else:
        wg = as_pointers((w + shift, g + shift), S, 2, False)
        step_elements(
            entry, numbers, wg[0], wg[1], as_pointers(states, S, STATES, False), place, begin, end, scale, totals,
            T, BLOCK, BASE, METHOD, STATES, WRITES_GRADIENT, WITH_TL1, WITH_GROUPS, WITH_WINDOWS, REST, MEASURES, False,
        )  # fmt: skip


# ---- u --------------------------------------------------------------------------------------------------------------


@triton.jit
def prox_elements(entry, numbers, u, w, place, begin, end, T: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """u <- prox(w), which may be the same memory."""
    i = tl.arange(0, BLOCK)
    mask = (i >= begin - place) & (i < end - place)
    at = place - begin + i
    wi = read(w + i, mask, WHOLE).to(T)
    ui, _ = pull_of(wi, wi, prox_of(numbers), entry, at, mask, True, True, False)
    write(u + i, ui, mask, WHOLE)


@triton.jit
def prox_kernel(addresses, entries, records, owners, S: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr):
    """u of all entries."""
    entry, address, numbers = entry_of(addresses, entries, records, owners, 0, T)
    u, w = tl.load(address + W), tl.load(address + G)
    lead = lead_of(u, S)
    aligned = lead == lead_of(w, S)
    place, begin, end = span_of(entry, tl.where(aligned, lead, 0), BLOCK)
    size: tl.constexpr = S.primitive_bitwidth // 8
    shift = (place - begin) * size
    if aligned & (place >= begin) & (place + BLOCK <= end):
        up, wp = (u + shift).to(tl.pointer_type(S)), (w + shift).to(tl.pointer_type(S))
        prox_elements(entry, numbers, tl.multiple_of(up, 16), tl.multiple_of(wp, 16), place, begin, end, T, BLOCK, True)
    else:
        up, wp = (u + shift).to(tl.pointer_type(S)), (w + shift).to(tl.pointer_type(S))
        prox_elements(entry, numbers, up, wp, place, begin, end, T, BLOCK, False)


# ---- the penalty's value --------------------------------------------------------------------------------------------


@triton.jit
def penalty_elements(numbers, w, place, begin, end, T: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """lam P(u) + beta/2 |w - u|^2 over elements, which are weights or norms of groups."""
    i = tl.arange(0, BLOCK)
    mask = (i >= begin - place) & (i < end - place)
    r = tl.abs(read(w + i, mask, WHOLE).to(T))
    strengths = (numbers + PROX).to(tl.pointer_type(tl.float64))
    term = penalty_term(r, prox_of(numbers), tl.load(strengths), tl.load(strengths + 1))
    return tl.sum(term if WHOLE else tl.where(mask, term, 0.0), 0)


@triton.jit
def penalty_kernel(addresses, entries, records, owners, totals, S: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr):
    """The value over each block: totals[block]."""
    entry, address, numbers = entry_of(addresses, entries, records, owners, 0, T)
    w = tl.load(address + G)
    place, begin, end = span_of(entry, lead_of(w, S), BLOCK)
    size: tl.constexpr = S.primitive_bitwidth // 8
    p = (w + (place - begin) * size).to(tl.pointer_type(S))
    if (place >= begin) & (place + BLOCK <= end):
        total = penalty_elements(numbers, tl.multiple_of(p, 16), place, begin, end, T, BLOCK, True)
    else:
        total = penalty_elements(numbers, p, place, begin, end, T, BLOCK, False)
    tl.store(totals + tl.program_id(0), total)
