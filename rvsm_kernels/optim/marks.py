"""Marks of parameters that hold u, so that u is not taken of u.

``sparsify_()`` marks a parameter after it has written u into it. While the mark holds (the same version, memory, bits
and options), its weights are u already.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..method.memory import kind_of

_OPTIONS = (
    *("penalty", "lam", "beta", "a", "density", "budget", "budget_name", "pattern"),
    *("group_dim", "group_block", "coupling", "coupling_name", "group_scale", "method"),
)
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PIECE = 1 << 20  # elements that are added up at a time, so that no copy of the tensor is made


class Mark(NamedTuple):
    """What a parameter was when u was written into it.

    Attributes:
        version: its version counter, None for an inference tensor.
        address: the address of its memory, None for a tensor without memory.
        bits: two sums over the bits of its elements, for an edit through ``p.data`` changes no version counter.
        options: those that decide about u, and the identity of ADMM's dual.
    """

    version: int | None
    address: int | None
    bits: tuple[int, int] | None
    options: tuple[Any, ...]


NEVER = Mark(-1, None, None, ())
"""A mark that holds for no parameter."""


def _bits_of(p: Tensor) -> tuple[int, int]:
    """The sum of the bit patterns of all elements, and the sum of their squares, both modulo 2^64."""
    flat = p.detach().reshape(-1).view(_BITS[p.element_size()])
    total, squares = (torch.zeros((), dtype=torch.int64, device=p.device) for _ in range(2))
    for piece in flat.split(_PIECE):
        wide = piece.long()
        total += wide.sum()
        squares += (wide * wide).sum()
    return int(total), int(squares)


def _version_and_address(p: Tensor) -> tuple[int | None, int | None]:
    return None if p.is_inference() else p._version, p.data_ptr() if kind_of(p) is None else None


def _options_of(group: Mapping[str, Any], dual: Tensor | None) -> tuple[Any, ...]:
    values = [group[key] for key in _OPTIONS]
    plain = [float(v) if isinstance(v, Tensor) else tuple(v) if isinstance(v, list) else v for v in values]
    return (*plain, None if dual is None else (id(dual), None if dual.is_inference() else dual._version))


def of(p: Tensor, group: Mapping[str, Any], dual: Tensor | None) -> Mark:
    """The mark of a parameter that holds u now."""
    return Mark(*_version_and_address(p), _bits_of(p) if kind_of(p) is None else None, _options_of(group, dual))


def holds(mark: Mark, p: Tensor, group: Mapping[str, Any], dual: Tensor | None) -> bool:
    """Whether a parameter, its options and its dual are what they were when it was marked."""
    if (mark.version, mark.address) != _version_and_address(p) or mark.options != _options_of(group, dual):
        return False
    return mark.bits is None or mark.bits == _bits_of(p)


def renewed(mark: Mark, p: Tensor) -> Mark:
    """The mark of a parameter after a write that put the same bits into it: version and address may be others."""
    version, address = _version_and_address(p)
    return mark._replace(version=version, address=address)
