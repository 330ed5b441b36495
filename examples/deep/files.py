"""Files that are there whole or not at all, and checkpoints."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

FORMAT = 1
"""The number of this form of a checkpoint."""


class FileError(Exception):
    """A file that could not be written or read, in one line."""


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: a full disk or an interruption leaves the previous one as it was.

    Raises:
        FileError: the file could not be written.
    """
    name = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # else the name could come to the disk before the content
        os.chmod(name, 0o644)  # mkstemp's files are for their owner only
        os.replace(name, path)
    except OSError as error:
        kept = "; the previous one is as it was" if path.exists() else ""
        raise FileError(f"{path} could not be written ({error.strerror or error}){kept}") from error
    finally:
        if name is not None:
            with contextlib.suppress(OSError):
                os.unlink(name)


def prepare(folder: Path) -> None:
    """Make a folder, and see that it can be written to: before hours of work, not after them.

    Raises:
        FileError: it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        why = "is a file, not a folder" if folder.is_file() else f"cannot be written to ({error.strerror or error})"
        raise FileError(f"{folder} {why}: choose another folder") from error


def read_json(path: Path) -> Any:
    """The value in a JSON file; None if there is none.

    Raises:
        FileError: it cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise FileError(f"{path} could not be read as JSON ({error})".split("\n")[0]) from error


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all; NaN is an error.

    Raises:
        FileError: the file could not be written.
    """
    write(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Save a state of tensors and plain values.

    Raises:
        FileError: the file could not be written; a previous checkpoint is intact.
    """
    # To memory first: torch's own writer reports a full disk as an internal error.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    write(path, buffer.getvalue())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state that :func:`save_checkpoint` saved; nothing in the file is executed.

    Raises:
        FileError: no such file, or not a checkpoint of this form.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise FileError(f"{path} could not be read ({error.strerror or error})") from error
    except Exception as error:  # zip, pickle and torch have many kinds for a damaged file
        raise FileError(f"{path} is not a checkpoint, or a damaged one ({type(error).__name__})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise FileError(f"{path} is not a checkpoint of this script (format {FORMAT})")
    return state
