"""Warnings that point at the line of the user."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

_NOT_THE_USERS = tuple(str(Path(file).parent) + os.sep for file in (Path(__file__).parent, torch.__file__))


def warn(text: str) -> None:
    """A UserWarning that points at the line of the user, however deep the call is."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, UserWarning, stacklevel=level)


def some(names: Sequence[str], most: int = 4) -> str:
    """The first of some names, and how many there are besides."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
