"""The step over elements whose tensors have several types: masters, stochastic rounding, states of another type.

The arithmetic is in float32 and that of ``elements.py``; what differs is how the planes of an entry are read and
written.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .bases import BEFORE, SEED, reads_gradient
from .elements import (
    CORRECTIONS,
    FIRST,
    NUMEL,
    STATE,
    G,
    W,
    arithmetic,
    entry_of,
    inverse_of,
    read,
    write,
    write_moving,
)
from .precision import LOW, joined, parted, random_bits, rounded
from .split import method_states

MIXED_BLOCK = 2048
"""Elements of a block: 16 bytes of a half type for each thread."""


class Planes(NamedTuple):
    """What the tensors of a parameter are stored in.

    Attributes:
        gradient, of_base, of_method: of the gradient and of the states.
        master: what stands behind the weights: 0 for nothing, else ``LOW`` or ``WHOLE`` of ``precision.py``.
        rounds: the weights are rounded stochastically.
    """

    gradient: torch.dtype
    of_base: torch.dtype
    of_method: torch.dtype
    master: int
    rounds: bool


@triton.jit
def plane(address, k, place, TYPE: tl.constexpr, WHOLE: tl.constexpr):
    """A pointer into the k-th tensor of an entry."""
    p = tl.load(address + k).to(tl.pointer_type(TYPE)) + place
    return tl.multiple_of(p, 16) if WHOLE else p


@triton.jit
def mixed_elements(
    entry, numbers, address, place, end, scale, totals,
    WEIGHT: tl.constexpr, GRADIENT: tl.constexpr, OF_BASE: tl.constexpr, OF_METHOD: tl.constexpr,
    MASTER: tl.constexpr, ROUNDS: tl.constexpr, BLOCK: tl.constexpr, BASE: tl.constexpr, METHOD: tl.constexpr,
    STATES: tl.constexpr, WRITES_GRADIENT: tl.constexpr, WITH_TL1: tl.constexpr, WITH_WINDOWS: tl.constexpr,
    REST: tl.constexpr, MEASURES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Load, arithmetic, store: the counterpart of ``step_elements``."""
    BASE_STATES: tl.constexpr = STATES - method_states(METHOD)
    BITS: tl.constexpr = tl.int16 if MASTER == LOW or ROUNDS else WEIGHT
    BEHIND: tl.constexpr = tl.int16 if MASTER == LOW else tl.float32
    i = tl.arange(0, BLOCK)
    mask = i < end - place
    w, g = plane(address, W, place, BITS, WHOLE) + i, plane(address, G, place, GRADIENT, WHOLE) + i
    behind = w
    if MASTER != 0:
        behind = plane(address, STATE + STATES, place, BEHIND, WHOLE) + i
        wi = joined(read(w, mask, WHOLE), read(behind, mask, WHOLE), MASTER)
    elif ROUNDS:
        wi = read(w, mask, WHOLE).to(WEIGHT, bitcast=True).to(tl.float32)
    else:
        wi = read(w, mask, WHOLE).to(tl.float32)
    d = tl.zeros_like(wi)
    if reads_gradient(BASE, WRITES_GRADIENT or MEASURES):
        d = read(g, mask, WHOLE).to(tl.float32)
    states = ()
    for k in tl.static_range(BASE_STATES):
        p = plane(address, STATE + k, place, OF_BASE, WHOLE) + i
        states = states + (read(p, mask, WHOLE).to(tl.float32),)  # type: ignore  # noqa: RUF005 - Triton reads no star
    of_method = wi
    if METHOD != 0:
        p = plane(address, STATE + BASE_STATES, place, OF_METHOD, WHOLE) + i
        of_method = read(p, mask, WHOLE).to(tl.float32)
    wi, d, states, of_method = arithmetic(
        entry, numbers, wi, d, states, of_method, place + i, mask, tl.minimum(end - place, BLOCK), scale, totals,
        BASE, METHOD, BASE_STATES, WITH_TL1, False, WITH_WINDOWS, MEASURES,
    )  # fmt: skip
    if MASTER == LOW:
        high, low = parted(wi)
        write(w, high, mask, WHOLE)
        write(behind, low, mask, WHOLE)
    elif ROUNDS:
        made = tl.load(entry + CORRECTIONS)
        seed = tl.load(made.to(tl.pointer_type(tl.int64)) + SEED)
        step = tl.load(made.to(tl.pointer_type(tl.float64)) + BEFORE).to(tl.int64)
        write(w, rounded(wi, random_bits(place, seed, step, BLOCK), WEIGHT), mask, WHOLE)
    else:
        write(w, wi, mask, WHOLE)
        if MASTER != 0:
            write(behind, wi, mask, WHOLE)
    if WRITES_GRADIENT:
        write(g, d, mask, WHOLE)
    for k in tl.static_range(BASE_STATES):
        write(plane(address, STATE + k, place, OF_BASE, WHOLE) + i, states[k], mask, WHOLE)
    if METHOD != 0:
        p = plane(address, STATE + BASE_STATES, place, OF_METHOD, WHOLE) + i
        write_moving(p, of_method, mask, numbers, REST, WHOLE)


@triton.jit(do_not_specialize_on_alignment=["grad_scale", "found_inf"])
def mixed_kernel(
    addresses, entries, records, owners, grad_scale, found_inf, totals,
    WEIGHT: tl.constexpr, GRADIENT: tl.constexpr, OF_BASE: tl.constexpr, OF_METHOD: tl.constexpr,
    MASTER: tl.constexpr, ROUNDS: tl.constexpr, BLOCK: tl.constexpr, BASE: tl.constexpr, METHOD: tl.constexpr,
    STATES: tl.constexpr, WRITES_GRADIENT: tl.constexpr, WITH_TL1: tl.constexpr, WITH_WINDOWS: tl.constexpr,
    REST: tl.constexpr, MEASURES: tl.constexpr,
):  # fmt: skip
    """One step of all entries; nothing where found_inf is above 0. See ``step_kernel``.

    STATES: of the base and the method; a master is a plane behind them.
    """
    if tl.load(found_inf) > 0:
        return
    PLANES: tl.constexpr = STATES + (MASTER > 0)
    entry, address, numbers = entry_of(addresses, entries, records, owners, PLANES, tl.float32)
    together = tl.load(address + W)
    if reads_gradient(BASE, WRITES_GRADIENT or MEASURES):
        together = together | tl.load(address + G)
    for k in tl.static_range(PLANES):
        together = together | tl.load(address + STATE + k)
    place = (tl.program_id(0) - tl.load(entry + FIRST)) * BLOCK
    end = tl.load(entry + NUMEL)
    scale = inverse_of(grad_scale, tl.float32)
    if (together % 16 == 0) & (place + BLOCK <= end):
        mixed_elements(
            entry, numbers, address, place, end, scale, totals, WEIGHT, GRADIENT, OF_BASE, OF_METHOD, MASTER, ROUNDS,
            BLOCK, BASE, METHOD, STATES, WRITES_GRADIENT, WITH_TL1, WITH_WINDOWS, REST, MEASURES, True,
        )  # fmt: skip
    else:
        mixed_elements(
            entry, numbers, address, place, end, scale, totals, WEIGHT, GRADIENT, OF_BASE, OF_METHOD, MASTER, ROUNDS,
            BLOCK, BASE, METHOD, STATES, WRITES_GRADIENT, WITH_TL1, WITH_WINDOWS, REST, MEASURES, False,
        )  # fmt: skip
