"""N:M sparsity in Triton: a launch before a step finds out which elements survive.

The counterpart of ``csrc/cuda/windows.h``, for every layout: a program has no whole windows in general, and what others
have stepped already it must not read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .precision import LOW, joined
from .split import ADMM, thresholded

# Fields of an entry, in int64.
SOURCE = tl.constexpr(0)  # the place, among the addresses, of w
FIRST = tl.constexpr(1)  # its first block
NUMEL = tl.constexpr(2)
INNER = tl.constexpr(3)  # elements from an element of a window to the next
KEEP = tl.constexpr(4)
WINDOW = tl.constexpr(5)
KEPT = tl.constexpr(6)  # address of a byte for each element
DUAL = tl.constexpr(7)  # the place, among the addresses, of what is added to w, or -1
BEHIND = tl.constexpr(8)  # the place of its master, or -1
WINDOW_ENTRY = tl.constexpr(9)

WINDOW_BLOCK = 1024
"""Elements of a block."""


@triton.jit
def key_of(v):
    """Integers in the order of the magnitudes, NaN above infinity."""
    if v.dtype == tl.float64:
        key = v.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        key = v.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return key


@triton.jit
def is_nan_key(key):
    """Whether a key is that of a NaN."""
    return key > (0x7FF0000000000000 if key.dtype == tl.int64 else 0x7F800000)


@triton.jit
def keys_of(
    w, behind, dual, i, mask, S: tl.constexpr, T: tl.constexpr, OF_METHOD: tl.constexpr, METHOD: tl.constexpr,
    MASTER: tl.constexpr,
):  # fmt: skip
    """The keys of what a method thresholds of elements i of a tensor; addresses that are not needed are not read."""
    if MASTER == LOW:
        p = behind.to(tl.pointer_type(tl.int16))
        v = joined(tl.load(w.to(tl.pointer_type(tl.int16)) + i, mask, 0), tl.load(p + i, mask, 0), MASTER)
    elif MASTER != 0:
        p = behind.to(tl.pointer_type(tl.float32))
        v = joined(tl.load(w.to(tl.pointer_type(S)) + i, mask, 0.0), tl.load(p + i, mask, 0.0), MASTER)
    else:
        v = tl.load(w.to(tl.pointer_type(S)) + i, mask, 0.0).to(T)
    if METHOD == ADMM:
        v = thresholded(v, tl.load(dual.to(tl.pointer_type(OF_METHOD)) + i, mask, 0.0).to(T), METHOD)
    return key_of(v)


@triton.jit
def keys_at(
    addresses, entry, i, mask, S: tl.constexpr, T: tl.constexpr, OF_METHOD: tl.constexpr, METHOD: tl.constexpr,
    MASTER: tl.constexpr,
):  # fmt: skip
    """The same of an entry."""
    w = tl.load(addresses + tl.load(entry + SOURCE))
    behind, dual = w, w
    if MASTER != 0:
        behind = tl.load(addresses + tl.load(entry + BEHIND))
    if METHOD == ADMM:
        dual = tl.load(addresses + tl.load(entry + DUAL))
    return keys_of(w, behind, dual, i, mask, S, T, OF_METHOD, METHOD, MASTER)


@triton.jit
def window_kernel(
    addresses, entries, owners, S: tl.constexpr, T: tl.constexpr, OF_METHOD: tl.constexpr, METHOD: tl.constexpr,
    MASTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Which elements of all entries survive: a byte for each."""
    entry = entries + tl.load(owners + tl.program_id(0)).to(tl.int64) * WINDOW_ENTRY
    i = (tl.program_id(0) - tl.load(entry + FIRST)) * BLOCK + tl.arange(0, BLOCK)
    mask = i < tl.load(entry + NUMEL)
    inner, window = tl.load(entry + INNER), tl.load(entry + WINDOW)
    place = (i // inner) % window
    key = keys_at(addresses, entry, i, mask, S, T, OF_METHOD, METHOD, MASTER)
    before = tl.zeros_like(i)
    for j in range(window):
        other = keys_at(addresses, entry, i + (j - place) * inner, mask, S, T, OF_METHOD, METHOD, MASTER)
        before += tl.where((other > key) | ((other == key) & (j < place)), 1, 0)
    survives = (before < tl.load(entry + KEEP)) | is_nan_key(key)
    tl.store(tl.load(entry + KEPT).to(tl.pointer_type(tl.int8)) + i, survives.to(tl.int8), mask)
