"""A sparse model in a small file, and back: ``save_sparse`` and ``load_sparse``."""

from __future__ import annotations

import dataclasses
import math
import os
from collections import OrderedDict
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..method.groups import as_dims
from ..method.memory import kind_of
from . import sparse_file
from .sparse_file import Entry
from .sparse_format import DENSE, FORMS, SPARSE_TYPES, decode, dequantize, encode, quantize, scales_of
from .structures import structure_dim
from .wrappers import memory_key, unwrapped

_STORED = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *SPARSE_TYPES,
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
        *(torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2),
    )
}
"""The types that a file can hold, by their names."""

_SIGNED = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclasses.dataclass(frozen=True)
class SavedTensor:
    """What a tensor has become in a file.

    Attributes:
        name, shape, dtype: those of the model.
        form: ``dense``, ``bitmask`` or ``csr``; ``as NAME`` for a tensor that is another one too (tied weights).
        int8: whether its values are int8.
        zeros, numel: elements that are 0 in the file, and all.
        dense_bytes, bytes: in memory, and of its blocks in the file (0 for a tied one).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    form: str
    int8: bool
    zeros: int
    numel: int
    dense_bytes: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """What :func:`save_sparse` wrote. ``print`` gives a table, ``to_dict`` plain values for JSON.

    Attributes:
        tensors: one for each entry of the state_dict.
        file_bytes: of the whole file, its header included.
    """

    tensors: tuple[SavedTensor, ...]
    file_bytes: int

    @property
    def dense_bytes(self) -> int:
        """Of all tensors in memory, tied ones once."""
        return sum(t.dense_bytes for t in self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**dataclasses.asdict(self), "dense_bytes": self.dense_bytes}

    def __str__(self) -> str:
        width = max((len(t.name) for t in self.tensors), default=0)
        width = max(width, len("all, with the header"))
        lines = [f"{'tensor':<{width}} {'zeros':>8} {'dense bytes':>13} {'bytes':>13}  stored"]
        for t in self.tensors:
            share = t.zeros / t.numel if t.numel else 0.0
            how = t.form + (", int8" if t.int8 else "")
            lines.append(f"{t.name:<{width}} {share:>8.2%} {t.dense_bytes:>13,} {t.bytes:>13,}  {how}")
        times = f"{self.dense_bytes / self.file_bytes:.3g} times smaller"
        lines.append(
            f"{'all, with the header':<{width}} {'':>8} {self.dense_bytes:>13,} {self.file_bytes:>13,}  {times}"
        )
        return "\n".join(lines)


@torch.no_grad()
def save_sparse(
    model: nn.Module, path: str | os.PathLike[str], *, int8: bool = False, forms: Collection[str] = FORMS
) -> SavedModel:
    """Save the state_dict of a model small: what is zero takes a bit of a mask, or nothing.

    ::

        net = rk.sparse_copy(model, optimizer)  # or after optimizer.sparsify_(), or inside sparse_weights()
        print(rk.save_sparse(net, "net.safetensors"))
        net = rk.load_sparse(Net(), "net.safetensors")  # in another process

    Each tensor of floats is stored dense, as a bitmask and values, or as CSR, whichever takes fewest bytes; all other
    tensors are stored dense, and tied ones once. Every element that is not zero comes back bit for bit, also NaN and
    infinity; in what is stored sparse a zero of either sign comes back as +0. The file is one of safetensors, with a
    checksum and no pickle. It is written beside its place and renamed: an older file is replaced whole or not at all.

    Args:
        model: any module; DDP, ``nn.DataParallel`` and what ``torch.compile`` returned are left away. Weights may be
            sparse tensors of any layout.
        path: of the file.
        int8: store the floating parameters of two dimensions or more, biases excepted, as int8 with a float32 scale for
            each output channel (of dimension 0 where no dimension holds the outputs): no element is off by more than
            half of its scale, max|w|/127 over the channel, and the rounding to its type. Zeros stay exact, and small
            elements become zeros.
        forms: those to choose from: ``"dense"``, ``"bitmask"``, ``"csr"``.

    Returns:
        What each tensor takes, as a table to print.

    Raises:
        ImportError: safetensors is not installed (``pip install safetensors``).
        TypeError: something else than a module; an entry that cannot be saved (sharded, quantized, of torchao, on the
            meta device, lazy, or no tensor), by name.
        ValueError: unknown forms; with ``int8``, a weight with NaN or infinity.
        OSError: the file cannot be written. The older one is still there then, as after any error.
    """
    net = unwrapped(model, "save_sparse")
    sparse_file.check_installed()
    if isinstance(forms, str) or not forms or not set(forms) <= set(FORMS):
        raise ValueError(f"forms are some of {', '.join(FORMS)}, not {forms!r}")
    state = net.state_dict()
    for name, value in state.items():
        _check_entry(name, value, _SAVE)
    dims = _output_dims(net) if int8 else {}
    entries: list[Entry] = []
    rows: list[SavedTensor] = []
    blocks: dict[str, Tensor] = {}
    first: dict[Hashable, tuple[Entry, SavedTensor]] = {}
    for name, value in state.items():
        key = memory_key(value)
        if key in first:
            entry, row = first[key]
            entries.append(dataclasses.replace(entry, name=name, same=entry.name))
            rows.append(dataclasses.replace(row, name=name, form=f"as {row.name}", dense_bytes=0, bytes=0))
            continue
        dense = value if value.layout == torch.strided else value.to_dense()
        entry, found = _encoded(name, dense.detach().cpu(), dims.get(name), forms)
        row = SavedTensor(
            name=name,
            shape=entry.shape,
            dtype=entry.dtype,
            form=entry.form,
            int8=entry.int8 is not None,
            zeros=value.numel() - _nonzeros(found["values"]),
            numel=value.numel(),
            dense_bytes=value.numel() * value.element_size(),
            bytes=sum(block.numel() * block.element_size() for block in found.values()),
        )
        first[key] = entry, row
        entries.append(entry)
        rows.append(row)
        blocks |= {f"{kind}/{name}": block for kind, block in found.items()}
    return SavedModel(tuple(rows), sparse_file.write(path, entries, blocks))


_SAVE = "save_sparse cannot store it: save before the model is sharded or quantized (int8=True stores int8)"
_LOAD = "load_sparse cannot fill it: load before the model is sharded or quantized, and give it memory (to_empty())"


def _check_entry(name: str, value: Any, what: str) -> None:
    """Raise TypeError for an entry of a state_dict that a file cannot hold.

    Args:
        what: the end of the message.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is no tensor but a {type(value).__name__}, and a file of save_sparse holds tensors")
    if is_lazy(value):
        raise TypeError(f"{name} is lazy and has no elements yet: call the model once before")
    kind = kind_of(value)
    if kind is None and (value.is_quantized or _name_of(value.dtype) not in _STORED):
        kind = f"of {value.dtype}"
    if kind is not None:
        raise TypeError(f"{name} is {kind}; {what}")


def _encoded(
    name: str, value: Tensor, dims: tuple[int, ...] | None, forms: Collection[str]
) -> tuple[Entry, dict[str, Tensor]]:
    """The entry of a strided tensor on the CPU, and its blocks.

    Args:
        dims: those of its int8 scales, None where it is stored in its own type.
    """
    flat = value.resolve_conj().resolve_neg().contiguous().reshape(-1)
    scales: dict[str, Tensor] = {}
    if dims is not None:
        try:
            values, of_dims = quantize(value, dims)
        except ValueError as error:
            raise ValueError(f"{name} {error}: it cannot be stored in int8") from error
        flat, scales = values.reshape(-1), {"scales": of_dims}
    sparse = dims is not None or value.dtype in SPARSE_TYPES
    stored = encode(flat, forms if sparse else (DENSE,))
    entry = Entry(name, tuple(value.shape), _name_of(value.dtype), stored.form, stored.row, dims)
    return entry, {**stored.blocks, **scales}


def _nonzeros(values: Tensor) -> int:
    """How many elements are not zero; torch does not count every type."""
    if values.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        values = values.float()
    elif values.dtype in (torch.uint16, torch.uint32, torch.uint64):
        values = values.view(_SIGNED[values.element_size()])
    return int(torch.count_nonzero(values))


def _output_dims(net: nn.Module) -> dict[str, tuple[int, ...]]:
    """The dimensions of the output channels of every parameter that int8 is for, by its name."""
    found: dict[str, tuple[int, ...]] = {}
    for prefix, module in net.named_modules(remove_duplicate=False):
        for local, p in module.named_parameters(recurse=False, remove_duplicate=False):
            if p.dim() >= 2 and p.numel() > 0 and p.dtype in SPARSE_TYPES and "bias" not in local:
                dims = as_dims(structure_dim(module, "out_channels", local)[0]) or (0,)
                fitting = dims if all(d < p.dim() for d in dims) else (0,)
                found[f"{prefix}.{local}" if prefix else local] = fitting
    return found


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- back ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def load_sparse(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Fill a model from a file of :func:`save_sparse`.

    All is checked before anything changes: the checksum, every index, and that the file is of a model with the same
    names, shapes and types, and with the same tied weights. Each tensor keeps its own layout (channels_last, strides)
    and device. A parameter that is a sparse tensor is replaced by a new one in its layout: make the optimizer
    afterwards.

    Args:
        model: of the architecture that was saved, in memory: any module; wrappers as in :func:`save_sparse`.
        path: of the file. It is read, never executed.

    Returns:
        The model.

    Raises:
        ImportError: safetensors is not installed.
        TypeError: something else than a module; a model that cannot be filled (sharded, quantized, on the meta
            device, lazy).
        ValueError: the file is damaged, truncated or none of ``save_sparse``, or it is of another model.
        OSError: the file cannot be read.
    """
    net = unwrapped(model, "load_sparse")
    sparse_file.check_installed()
    entries, blocks = sparse_file.read(path)
    state = net.state_dict()
    for name, value in state.items():
        _check_entry(name, value, _LOAD)
    where = os.fspath(path)
    wrong = _differences(entries, state)
    if wrong:
        shown = "; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise ValueError(f"{where} is of another model: {shown}")
    values = _decoded(where, entries, blocks)
    _fill(net, state, values)
    return model


def _differences(entries: Sequence[Entry], state: Mapping[str, Tensor]) -> list[str]:
    """What a file and a model do not agree about."""
    by_name = {entry.name: entry for entry in entries}
    wrong = [f"it has no {name}" for name in state if name not in by_name]
    wrong += [f"the model has no {name}" for name in by_name if name not in state]
    first: dict[Hashable, str] = {}
    for name, value in state.items():
        entry = by_name.get(name)
        if entry is None:
            continue
        dtype = _name_of(value.dtype)
        if entry.shape != tuple(value.shape):
            wrong.append(f"{name} is {list(entry.shape)} there and {list(value.shape)} in the model")
        if entry.dtype != dtype:
            wrong.append(
                f"{name} is {entry.dtype} there and {dtype} in the model (model.to(torch.{entry.dtype}) first)"
            )
        tied = first.setdefault(memory_key(value), name)
        if tied in by_name and (entry.same or name) != (by_name[tied].same or tied):
            wrong.append(f"{name} is {tied} in the model, but another tensor there")
    return wrong


def _decoded(where: str, entries: Sequence[Entry], blocks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file by name; tied ones are one tensor.

    Raises:
        ValueError: a block is missing, left over, or is not what its entry says.
    """
    left = dict(blocks)
    values: dict[str, Tensor] = {}
    name = ""
    try:
        for entry in entries:
            name = entry.name
            if name in values:
                raise ValueError("it stands there twice")
            if entry.same is not None:
                if entry.same not in values or tuple(values[entry.same].shape) != entry.shape:
                    raise ValueError(f"it is to be {entry.same}, which is not there before it")
                values[name] = values[entry.same]
                continue
            kinds = [kind for kind in ("values", "mask", "rows", "columns", "scales") if f"{kind}/{name}" in left]
            values[name] = _tensor(entry, {kind: left.pop(f"{kind}/{name}") for kind in kinds})
        if left:
            raise ValueError(f"it has {sorted(left)[0]}, which belongs to no tensor")
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{where} is damaged: {name}: {error}") from error
    return values


def _tensor(entry: Entry, blocks: Mapping[str, Tensor]) -> Tensor:
    """The tensor of an entry."""
    dtype = _STORED[entry.dtype]  # the model's, which was checked
    stored = dtype if entry.int8 is None else torch.int8
    values = decode(entry.form, entry.row, blocks, math.prod(entry.shape), stored).reshape(entry.shape)
    if entry.int8 is None:
        return values
    scales = blocks.get("scales")
    if scales is None or scales.dtype != torch.float32 or tuple(scales.shape) != (scales_of(entry.shape, entry.int8),):
        raise ValueError("its scales do not fit its shape")
    return dequantize(values, scales, entry.int8, dtype)


def _fill(net: nn.Module, state: dict[str, Any], values: Mapping[str, Tensor]) -> None:
    """Copy tensors into those of a model; a sparse one is replaced, for it has no room for other elements."""
    sparse = {name: value for name, value in state.items() if value.layout != torch.strided}
    # The versions of the modules' entries come along, so that no module takes them for old ones.
    dense: Any = OrderedDict((name, value) for name, value in values.items() if name not in sparse)
    dense._metadata = getattr(state, "_metadata", {})
    net.load_state_dict(dense, strict=not sparse)
    made: dict[int, Any] = {}
    for name, old in sparse.items():
        prefix, _, local = name.rpartition(".")
        owner = net.get_submodule(prefix)
        here: Any = getattr(owner, local)
        if id(here) not in made:
            new = _in_layout(values[name].to(old.device), old)
            made[id(here)] = nn.Parameter(new, here.requires_grad) if isinstance(here, nn.Parameter) else new
        setattr(owner, local, made[id(here)])


def _in_layout(dense: Tensor, like: Tensor) -> Tensor:
    """A dense tensor in the sparse layout of another one."""
    if like.layout == torch.sparse_coo:
        return dense.to_sparse(like.sparse_dim())
    blocks = {torch.sparse_bsr: 1, torch.sparse_bsc: 1}
    size = tuple(like.values().shape[1:3]) if like.layout in blocks else None
    return dense.to_sparse(layout=like.layout, blocksize=size)
