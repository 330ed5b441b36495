"""Half types that learn: float32 weights behind a half-type parameter, and stochastic rounding.

The twin of ``csrc/math/precision.h``; the bits are the same in every engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .dtypes import HALF_TYPES, to_opmath

STATE_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""What ``state_dtype`` may name."""

MASTER_STATES = {torch.bfloat16: ("low", torch.int16), torch.float16: ("master", torch.float32)}
"""The state that holds the rest of the float32 weights, and its type, by the dtype of the parameter."""

PHILOX_ROUNDS = 7
"""The fewest that pass the tests of the generator's paper."""

_MAGNITUDE = 0x7FFFFFFF
_NAN, _INF = 0x7FC00000, 0x7F800000
_MASK = 0xFFFFFFFF


def has_master(group: Mapping[str, Any], dtype: torch.dtype) -> bool:
    """Whether a parameter of a dtype has float32 weights behind it."""
    return bool(group.get("master_weights")) and dtype in HALF_TYPES


def is_stochastic(group: Mapping[str, Any], dtype: torch.dtype) -> bool:
    """Whether a step rounds a parameter of a dtype stochastically."""
    return group.get("rounding") == "stochastic" and dtype in HALF_TYPES and not has_master(group, dtype)


def master_name(group: Mapping[str, Any], dtype: torch.dtype) -> str | None:
    """The name of the state behind a parameter of a dtype, None where there is none."""
    return MASTER_STATES[dtype][0] if has_master(group, dtype) else None


def master_of(p: Tensor, group: Mapping[str, Any], states: Mapping[str, Any] | None) -> Tensor | None:
    """The state beside a parameter that holds the rest of its weights, None where there is none (yet).

    Args:
        states: of the parameter, by name.
    """
    name = master_name(group, p.dtype)
    return states.get(name) if states and name is not None else None


# ---- the weights behind a parameter ----------------------------------------------------------------------------------


def join(p: Tensor, master: Tensor | None) -> Tensor:
    """The weights of a parameter in the type of the arithmetic; ``p`` itself where it has that type.

    What the master says is taken only as far as the parameter rounds to it, so that an edit of ``p.data`` counts: of
    bfloat16 within half a unit in the last place, of float16 wholly.

    Args:
        master: the state ``low`` of a bfloat16 parameter, ``master`` of a float16 one, or None.
    """
    if master is None:
        return to_opmath(p)
    if p.dtype == torch.float16:
        same = master.half().view(torch.int16) == p.view(torch.int16)
        return torch.where(same, master, p.float())
    high = p.view(torch.int16).int()
    magnitude, low = high & 0x7FFF, master.int()
    # What a magnitude of 0 or of infinity cannot have beside it was left there by an edit.
    low = torch.where(magnitude == 0, low.clamp(min=0), low)
    low = torch.where(magnitude == _INF >> 16, low.clamp(max=0), low)
    # Not `high << 16`, which does nothing to a DTensor. The sign stands above: no carry reaches it.
    return (torch.bitwise_left_shift(high, 16) + low).view(torch.float32)


def split(w: Tensor) -> tuple[Tensor, Tensor]:
    """float32 weights as a bfloat16 parameter, rounded half away from zero, and the int16 rest of their bits.

    :func:`join` gives every weight back bit for bit; a NaN becomes the canonical one.
    """
    bits = w.view(torch.int32)
    magnitude = bits & _MAGNITUDE
    high = torch.bitwise_right_shift(magnitude + 0x8000, 16)
    low = magnitude - torch.bitwise_left_shift(high, 16)
    is_nan = magnitude > _INF
    high = torch.where(is_nan, _NAN >> 16, torch.where(bits < 0, high - 0x8000, high))
    return high.to(torch.int16).view(torch.bfloat16), torch.where(is_nan, 0, low).to(torch.int16)


def store(p: Tensor, w: Tensor, master: Tensor | None) -> None:
    """Write weights into a parameter, and what it cannot hold of them into its master, where it has one.

    Args:
        w: float32 where there is a master.
    """
    if master is None:
        p.copy_(w)
    elif p.dtype == torch.float16:
        master.copy_(w)
        p.copy_(w)
    else:
        high, low = split(w)
        p.copy_(high)
        master.copy_(low)


def as_parameter(w: Tensor, dtype: torch.dtype, group: Mapping[str, Any]) -> Tensor:
    """What :func:`store` would write into a parameter of a dtype."""
    return split(w)[0] if dtype == torch.bfloat16 and has_master(group, dtype) else w.to(dtype)


def new_master(p: Tensor) -> Tensor:
    """The state behind a half-type parameter before the first step: the weights are what the parameter holds."""
    return torch.zeros_like(p, dtype=MASTER_STATES[p.dtype][1])


# ---- stochastic rounding ---------------------------------------------------------------------------------------------


def random_bits(count: int, seed: int, step: int | Tensor, stream: int, device: torch.device) -> Tensor:
    """16 random bits for each of the elements 0 .. count - 1, as int32: Philox4x32-7 (Salmon et al., SC 2011).

    A call gives 128 bits, for eight elements. Its counter is (element / 8, step, stream), its key the seed.

    Args:
        step: a number, or a 1-element tensor on the device, which no host waits for.
    """
    call = torch.arange((count + 7) // 8, dtype=torch.int64, device=device)
    if isinstance(step, Tensor):
        steps = step.detach().to(device, torch.int64).reshape(1).expand_as(call)
    else:
        steps = torch.full_like(call, step)
    x = [call & _MASK, call >> 32, steps, torch.full_like(call, stream)]
    key = [seed & _MASK, seed >> 32 & _MASK]
    for _ in range(PHILOX_ROUNDS):
        a, b = x[0] * 0xD2511F53, x[2] * 0xCD9E8D57  # the low 64 bits of the products, which wrap
        x = [b >> 32 & _MASK ^ x[1] ^ key[0], b & _MASK, a >> 32 & _MASK ^ x[3] ^ key[1], a & _MASK]
        key = [key[0] + 0x9E3779B9 & _MASK, key[1] + 0xBB67AE85 & _MASK]
    words = torch.stack(x, 1)
    return torch.stack((words & 0xFFFF, words >> 16), 2).reshape(-1)[:count].int()


def rounded(w: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """float32 weights in a half type, up or down with the probabilities that make the rounding unbiased.

    What is above the largest number of the type is rounded to nearest.

    Args:
        random: :func:`random_bits` of each element, in the shape of ``w``.
    """
    bits = w.view(torch.int32)
    magnitude = bits & _MAGNITUDE
    if dtype == torch.bfloat16:
        largest, near = 0x7F7F0000, (magnitude + random) >> 16
    else:
        largest = 0x477FE000
        normal = (magnitude - (112 << 23) + (random >> 3)) >> 13
        scaled = w.abs() * 2.0**24  # multiples of the smallest number
        whole = scaled.floor()
        tiny = whole.int() + (random + 0.5 < (scaled - whole) * 65536)
        near = torch.where(magnitude < 113 << 23, tiny, normal)
    near = torch.where(bits < 0, near - 0x8000, near).to(torch.int16).view(dtype)
    return torch.where(magnitude <= largest, near, w.to(dtype))


def store_rounded(p: Tensor, w: Tensor, seed: int, step: int | Tensor, stream: int = 0) -> None:
    """Write float32 weights into a half-type parameter by stochastic rounding.

    Element i of the parameter's memory (of a dense tensor with the order of its strides) gets the random bits of i.

    Args:
        step: how many steps the parameter has seen; see :func:`random_bits`.
        stream: another number for a second rounding in the same step.
    """
    bits = random_bits(p.numel(), seed, step, stream, p.device)
    p.copy_(rounded(w, p.dtype, bits.as_strided(p.shape, torch.empty_like(p, device="meta").stride())))


@dataclass(frozen=True)
class Stored:
    """A parameter as code that works on whole tensors between the kernels reads and writes it.

    Attributes:
        p: the parameter.
        master: the state behind it, or None.
        seed, step: of its stochastic rounding; step is None where it is rounded to nearest.
    """

    p: Tensor
    master: Tensor | None = None
    seed: int = 0
    step: int | Tensor | None = None

    @classmethod
    def of(cls, p: Tensor, group: Mapping[str, Any], states: Mapping[str, Any] | None) -> Stored:
        """A parameter of a param group with these states by name."""
        counter = states.get("step") if states and is_stochastic(group, p.dtype) else None
        step = int(counter) if isinstance(counter, Tensor) and counter.device.type == "cpu" else counter
        return cls(p, master_of(p, group, states), int(group.get("seed", 0)), step)

    def load(self) -> Tensor:
        """The weights in the type of the arithmetic; they may be the parameter itself."""
        return join(self.p.detach(), self.master)

    def store(self, w: Tensor) -> None:
        """Write what :meth:`load` gave and somebody changed; nothing to do where that is the parameter itself."""
        if self.step is not None:
            store_rounded(self.p, w, self.seed, self.step, stream=1)  # the step itself has used stream 0
        elif w.dtype != self.p.dtype:
            store(self.p, w, self.master)
