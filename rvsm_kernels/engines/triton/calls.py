"""Calls of Triton kernels: a grid, and what Triton has compiled for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .norms import THREADS
from .table import owners_of, upload

# The default of the fusion of multiplications and additions differs between versions of Triton.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}


def options_for(warp_size: int, threads: int = THREADS.value) -> dict[str, Any]:
    """How a kernel is compiled for a device with warps of that size."""
    return {**OPTIONS, "num_warps": max(threads // warp_size, 1)}


WARP_SIZE = 32 if torch.version.hip is None else 64


class Grid:
    """One kernel's grid, and what Triton compiled for it.

    Args:
        programs: how many run.
        threads: of a program.
    """

    def __init__(self, programs: int, threads: int = THREADS.value) -> None:
        self.programs = programs
        self._grid = programs, 1, 1
        self._options = options_for(WARP_SIZE, threads)
        self._compiled: dict[Any, Any] = {}

    def __call__(self, kernel: Any, *arguments: Any, kind: Any = None) -> None:
        """Launch.

        Looking up what was compiled is most of the host's time in a launch, and the answer cannot change: all tables
        are whole allocations, and no kernel looks at the alignment of other tensors.

        Args:
            kind: what differs from call to call and what was compiled depends on: the types of the arguments that are
                other tensors in each call, constants.
        """
        compiled = self._compiled.get(kind)
        if compiled is not None:
            compiled[self._grid](*arguments)
            return
        compiled = kernel[self._grid](*arguments, **self._options)
        if compiled is not None:  # else the interpreter has run it
            self._compiled[kind] = compiled


class Call(Grid):
    """A grid whose blocks are divided among entries."""

    def __init__(self, entries: Sequence[Sequence[int]], blocks: Sequence[int], device: torch.device) -> None:
        super().__init__(sum(blocks))
        self.entries = upload(torch.tensor(entries, dtype=torch.int64, device="cpu"), device)
        self.owners = upload(owners_of(blocks), device)
