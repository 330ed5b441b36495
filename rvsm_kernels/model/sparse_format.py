"""How the elements of a tensor are stored small: as they are, as a bitmask and values, or as CSR; int8 values.

All functions take and return flat tensors on the CPU, in the order of the indices (as ``t.flatten()`` has it).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DENSE, BITMASK, CSR = "dense", "bitmask", "csr"
FORMS = (DENSE, BITMASK, CSR)
"""``dense``: all elements. ``bitmask``: a bit for each element, and the elements that are not 0. ``csr``: the flat
tensor in rows of 256 or 65,536 elements: where each row begins, columns of one or two bytes, elements that are not 0.
"""

SPARSE_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""Types whose zeros can be left out."""

_ROWS = (1 << 8, 1 << 16)  # elements in a row, so that a column is one or two bytes
_HEADER = 96  # bytes that one more block costs in the header of a file, roughly
_MOST = 127  # the largest int8 value that is used: symmetric about 0


class Stored(NamedTuple):
    """A flat tensor in one of the forms.

    Attributes:
        form: one of FORMS.
        row: elements in a row of CSR, else 0.
        blocks: what is written, by name. dense: ``values``. bitmask: ``mask`` (uint8, element 8 i + k is bit k of byte
            i) and ``values``. csr: ``rows`` (unsigned, one more than there are rows), ``columns`` (uint8 or uint16) and
            ``values``.
    """

    form: str
    row: int
    blocks: dict[str, Tensor]


def encode(flat: Tensor, forms: Iterable[str] = FORMS) -> Stored:
    """The smallest of some forms; a zero of either sign is a zero, and comes back as +0.

    Args:
        flat: of one of SPARSE_TYPES, or int8. NaN is not zero.
    """
    nonzero = flat != 0
    count = int(torch.count_nonzero(nonzero))
    size, values = flat.numel(), count * flat.element_size()
    bytes_of = {(DENSE, 0): size * flat.element_size(), (BITMASK, 0): -(-size // 8) + values + _HEADER}
    for row in _ROWS:
        rows = -(-size // row)
        pointers = (rows + 1) * _unsigned(count).itemsize
        bytes_of[CSR, row] = pointers + count * _unsigned(row - 1).itemsize + values + 2 * _HEADER
    form, row = min((key for key in bytes_of if key[0] in forms), key=bytes_of.__getitem__)
    if form == DENSE:
        return Stored(DENSE, 0, {"values": flat.clone()})
    if form == BITMASK:
        mask = _packed(nonzero)
        return Stored(BITMASK, 0, {"mask": mask, "values": flat[nonzero]})
    index = nonzero.nonzero().flatten()
    pointers_at = torch.zeros(-(-size // row) + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(index // row, minlength=len(pointers_at) - 1), 0, out=pointers_at[1:])
    blocks = {
        "rows": pointers_at.to(_unsigned(count)),
        "columns": (index % row).to(_unsigned(row - 1)),
        "values": flat[index],
    }
    return Stored(CSR, row, blocks)


def decode(form: str, row: int, blocks: Mapping[str, Tensor], size: int, dtype: torch.dtype) -> Tensor:
    """The flat tensor again; the inverse of :func:`encode`.

    Args:
        size, dtype: of the flat tensor.

    Raises:
        ValueError: a block is missing, or does not fit the others; an index is out of bounds, or stands there twice.
    """
    values = _block(blocks, "values", dtype)
    if form == DENSE:
        _check(len(values) == size, f"{len(values)} values for {size} elements")
        return values
    flat = torch.zeros(size, dtype=dtype)
    if form == BITMASK:
        mask = _block(blocks, "mask", torch.uint8)
        _check(len(mask) == -(-size // 8), f"a mask of {len(mask)} bytes for {size} elements")
        bits = _unpacked(mask)
        _check(not bool(bits[size:].any()), "the mask has bits beyond the last element")
        bits = bits[:size]
        _check(int(bits.sum()) == len(values), f"{int(bits.sum())} bits for {len(values)} values")
        return flat.masked_scatter_(bits, values)
    _check(form == CSR and row in _ROWS, f"no form {form!r} with rows of {row!r}")
    pointers = _block(blocks, "rows", _unsigned(len(values))).long()
    columns = _block(blocks, "columns", _unsigned(row - 1)).long()
    counts = pointers.diff()
    _check(
        len(counts) == -(-size // row)
        and int(pointers[0]) == 0
        and int(pointers[-1]) == len(values) == len(columns)
        and bool((counts >= 0).all()),
        "the rows do not fit the elements",
    )
    index = torch.repeat_interleave(torch.arange(len(counts)) * row, counts).add_(columns)
    # A column is at most row - 1 by its type, so that an increasing index also stays in its row.
    _check(bool((index.diff() > 0).all()), "columns that do not increase")
    _check(len(index) == 0 or int(index[-1]) < size, "a column beyond the last element")
    flat[index] = values
    return flat


def _packed(bits: Tensor) -> Tensor:
    import numpy as np  # an extra

    return torch.from_numpy(np.packbits(bits.numpy(), bitorder="little"))


def _unpacked(mask: Tensor) -> Tensor:
    import numpy as np  # an extra

    return torch.from_numpy(np.unpackbits(mask.numpy(), bitorder="little").view(bool))


def _block(blocks: Mapping[str, Tensor], name: str, dtype: torch.dtype) -> Tensor:
    block = blocks.get(name)
    if block is None or block.dim() != 1 or block.dtype != dtype:
        raise ValueError(f"no {name} of {dtype}")
    return block


def _check(right: bool, what: str) -> None:
    if not right:
        raise ValueError(what)


def _unsigned(most: int) -> torch.dtype:
    """The narrowest type for numbers from 0 to ``most``."""
    for dtype in (torch.uint8, torch.uint16, torch.uint32):
        if most <= torch.iinfo(dtype).max:
            return dtype
    return torch.int64


# ---- int8 ------------------------------------------------------------------------------------------------------------


def quantize(w: Tensor, dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    """int8 values with one scale for each index of some dimensions: w is about values · scale.

    The scale is max|w|/127 over the elements that share it, so that no element is off by more than half of it (and the
    rounding to the type of w). Zeros stay exact; small elements become zeros too.

    Args:
        w: floating, of two dimensions or more.
        dims: those of the output channels.

    Returns:
        Values in the shape of w, and a flat float32 tensor of scales: 0 where all elements are 0.

    Raises:
        ValueError: an element is not finite, or too large for a float32 scale.
    """
    wide = w.double() if w.dtype == torch.float64 else w.float()
    others = [d for d in range(w.dim()) if d not in dims]
    most = wide.abs() if not others or w.numel() == 0 else wide.abs().amax(others, keepdim=True)
    scales = (most / _MOST).float()
    if not bool(scales.isfinite().all()):
        raise ValueError("has elements that are not finite, or too large for a float32 scale")
    # The least normal number: below, a scale would lose its digits.
    scales = torch.where(most > 0, scales.clamp(min=torch.finfo(torch.float32).tiny), torch.zeros(()))
    divisor = torch.where(scales > 0, scales, torch.ones(())).to(wide.dtype)
    values = (wide / divisor).round_().clamp_(-_MOST, _MOST).to(torch.int8)
    return values, scales.flatten()


def dequantize(values: Tensor, scales: Tensor, dims: Sequence[int], dtype: torch.dtype) -> Tensor:
    """values · scale in a floating type; the arithmetic is float32, of float64 float64."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    shape = [n if d in dims else 1 for d, n in enumerate(values.shape)]
    return (values.to(wide) * scales.to(wide).reshape(shape)).to(dtype)


def scales_of(shape: Sequence[int], dims: Sequence[int]) -> int:
    """How many scales :func:`quantize` gives for a tensor."""
    return math.prod(shape[d] for d in dims)
