"""The file of ``save_sparse``: safetensors with a checksum over all that it says, written whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

FORMAT = "rvsm_kernels.sparse"
VERSION = 1


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a model in a file. Its blocks are called ``block/name``.

    Attributes:
        name: its name in the state_dict.
        shape, dtype: of the tensor of the model; "float32", not "torch.float32".
        form, row: see :class:`rvsm_kernels.model.sparse_format.Stored`.
        int8: the dimensions of the scales where the values are int8, else None.
        same: the name of the entry whose elements it shares (tied weights), and then it has no blocks; else None.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    form: str
    row: int = 0
    int8: tuple[int, ...] | None = None
    same: str | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for what no file of ours says."""
        numbers = [*self.shape, self.row, *(self.int8 or ())]
        words = [self.name, self.dtype, self.form, *([] if self.same is None else [self.same])]
        sound = all(type(n) is int and n >= 0 for n in numbers) and all(isinstance(text, str) for text in words)
        if not sound or any(d >= len(self.shape) for d in self.int8 or ()):
            raise ValueError(f"it has an entry that is none: {self.name!r}")

    def to_json(self) -> dict[str, Any]:
        """What is not the default."""
        fields = dataclasses.fields(self)
        return {f.name: value for f in fields if (value := getattr(self, f.name)) != f.default}

    @classmethod
    def from_json(cls, raw: Any) -> Entry:
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError, TypeError: it is none.
        """
        int8 = raw.get("int8")
        return cls(**{**raw, "shape": tuple(raw["shape"]), "int8": None if int8 is None else tuple(int8)})


def check_installed() -> None:
    """Raise ImportError without the packages of the extra ``ship``."""
    try:
        import numpy  # noqa: F401
        import safetensors.torch  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"save_sparse and load_sparse need safetensors and numpy: pip install safetensors numpy ({error})"
        ) from error


def _digest(entries: str, blocks: Mapping[str, Tensor]) -> str:
    """SHA-256 over the entries, and name, type, shape and bytes of every block."""
    found = hashlib.sha256(f"{FORMAT} {VERSION} {entries}".encode())
    for key in sorted(blocks):
        block = blocks[key]
        found.update(f"\0{key}\0{block.dtype}\0{tuple(block.shape)}\0".encode())
        found.update(block.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def write(path: str | os.PathLike[str], entries: Sequence[Entry], blocks: Mapping[str, Tensor]) -> int:
    """Write a file whole or not at all; returns its bytes.

    It is written beside its place and renamed, when it is on the disk: a full disk, an error or Ctrl-C leaves what was
    there before. A link is followed.

    Args:
        blocks: contiguous tensors on the CPU that share no memory.

    Raises:
        OSError: it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    text = json.dumps([entry.to_json() for entry in entries], separators=(",", ":"))
    metadata = {"format": FORMAT, "version": str(VERSION), "tensors": text, "sha256": _digest(text, blocks)}
    folder, name = os.path.split(os.path.realpath(os.fspath(path)))
    beside = os.path.join(folder, f".{name[:32]}.{secrets.token_hex(8)}.tmp")
    try:
        try:
            save_file(dict(blocks), beside, metadata)
        except SafetensorError as error:
            raise OSError(f"{os.fspath(path)} cannot be written: {error}") from error
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
            size = file.seek(0, os.SEEK_END)
        os.replace(beside, os.path.join(folder, name))
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise
    with contextlib.suppress(OSError):  # the new name too; there are systems that open no folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    return size


def read(path: str | os.PathLike[str]) -> tuple[list[Entry], dict[str, Tensor]]:
    """The entries of a file and its blocks, once the checksum has been found right.

    Raises:
        ValueError: the file is damaged or truncated, of another version, or none of ``save_sparse``.
        OSError: it cannot be read.
    """
    from safetensors import safe_open

    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            blocks = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, MemoryError):
        raise
    except Exception as error:  # safetensors raises errors of many kinds for a damaged header
        raise ValueError(f"{os.fspath(path)} is damaged, or was not written by save_sparse: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{os.fspath(path)} was not written by save_sparse, or is damaged")
    if metadata.get("version") != str(VERSION):
        raise ValueError(
            f"{os.fspath(path)} is of version {metadata.get('version')!r} of its format; this release reads"
            f" {VERSION} (or the file is damaged)"
        )
    text = metadata.get("tensors", "")
    if metadata.get("sha256") != _digest(text, blocks):
        raise ValueError(f"{os.fspath(path)} is damaged: its checksum is not that of its content")
    try:
        return [Entry.from_json(raw) for raw in json.loads(text)], blocks
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)} is damaged: {error}") from error
