"""Half types that learn, in Triton: the twin of ``method/precision.py`` and ``csrc/math/precision.h``, bit for bit."""

from __future__ import annotations

import triton
import triton.language as tl

# What stands behind a parameter.
WHOLE = tl.constexpr(2)  # float32 weights (float16)
LOW = tl.constexpr(1)  # the rest of their bits (bfloat16)

ELEMENTS_OF_CALL = tl.constexpr(8)  # a call gives 128 bits: 16 for each
ROUNDS_OF_PHILOX = tl.constexpr(7)


@triton.jit
def bits_of(w):
    """The bits of float32 numbers as int32; a NaN becomes the canonical one."""
    bits = w.to(tl.int32, bitcast=True)
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, bits)


@triton.jit
def joined(p, master, MASTER: tl.constexpr):
    """The float32 weights behind a parameter, as far as it rounds to what its master says.

    Args:
        p: the bits of a bfloat16 parameter as int16, or a float16 parameter.
        master: int16 or float32.
    """
    if MASTER == LOW:
        high, low = p.to(tl.int32), master.to(tl.int32)
        magnitude = high & 0x7FFF
        low = tl.where((magnitude == 0) & (low < 0), 0, low)
        low = tl.where((magnitude == 0x7F80) & (low > 0), 0, low)
        w = ((high << 16) + low).to(tl.float32, bitcast=True)  # the sign stands above: no carry reaches it
    else:
        same = master.to(tl.float16).to(tl.int16, bitcast=True) == p.to(tl.int16, bitcast=True)
        w = tl.where(same, master, p.to(tl.float32))
    return w


@triton.jit
def parted(w):
    """float32 weights as the bits of a bfloat16 parameter, rounded half away from zero, and the int16 rest."""
    bits = bits_of(w)
    magnitude = bits & 0x7FFFFFFF
    high = (magnitude + 0x8000) >> 16
    low = magnitude - (high << 16)
    return tl.where(bits < 0, high - 0x8000, high).to(tl.int16), low.to(tl.int16)


@triton.jit
def random_bits(first, seed, step, BLOCK: tl.constexpr):
    """16 random bits for each of BLOCK elements from the first on, a multiple of 8, as int32.

    Args:
        first, seed, step: int64.
    """
    call = first // ELEMENTS_OF_CALL + tl.arange(0, BLOCK // ELEMENTS_OF_CALL)
    low, high = (call & 0xFFFFFFFF).to(tl.uint32), (call >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    a, b, c, d = tl.philox(seed, low, high, zero + step.to(tl.uint32), zero, ROUNDS_OF_PHILOX)
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (BLOCK // 2,))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (BLOCK,)).to(tl.int32)


@triton.jit
def rounded(w, random, TYPE: tl.constexpr):
    """The bits of float32 weights in a half type, up or down with the probabilities that make them right in the mean.

    What is above the largest number of the type is rounded to nearest.
    """
    bits = bits_of(w)
    magnitude = bits & 0x7FFFFFFF
    if tl.bfloat16 == TYPE:
        near = (magnitude + tl.where(magnitude > 0x7F7F0000, 0x8000, random)) >> 16
    else:
        is_tiny = magnitude < (113 << 23)
        scaled = tl.where(is_tiny, tl.abs(w), 0.0) * 16777216.0  # multiples of the smallest number
        whole = scaled.to(tl.int32)
        up = random.to(tl.float32) + 0.5 < (scaled - whole.to(tl.float32)) * 65536.0
        near = tl.where(is_tiny, whole + up.to(tl.int32), (magnitude - (112 << 23) + (random >> 3)) >> 13)
        above = tl.where(magnitude < 0x477FF000, 0x7BFF, tl.where(magnitude > 0x7F800000, 0x7E00, 0x7C00))
        near = tl.where(magnitude > 0x477FE000, above, near)
    return tl.where(bits < 0, near - 0x8000, near).to(tl.int16)
