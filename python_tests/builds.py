"""Which engines the suite covers, and what this build lacks."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import rvsm_kernels as rk
from rvsm_kernels.engines import native as native_engine

DEVICE = os.environ.get("RVSM_TEST_DEVICE", "cpu")
"""The device that tensors of the suite are on."""

ENGINES = ("native", "interpreted", "triton", "reference") if DEVICE == "cpu" else ("native", "triton", "reference")
"""``interpreted``: the native engine, with its CUDA plan and kernels run on CPU tensors by the host's interpreter."""

if DEVICE == "cpu" and "triton" not in sys.modules:  # Triton reads it when it is imported
    os.environ["TRITON_INTERPRET"] = "1"


def missing(engine: str, device: str) -> str | None:
    """Why this build has no such engine for a device, or None."""
    table = rk.engines()[engine]
    state = table.get(device, table.get("any", f"does not serve {device}"))
    return None if state == "available" else state


def need(engine: str, device: str = DEVICE) -> None:
    """Skip, with the reason, a test whose engine this build lacks; fail if the build was to have it."""
    reason = missing(engine, device)
    if reason is None:
        return
    if engine == "native" and os.environ.get("RVSM_REQUIRE_NATIVE") == "1":
        pytest.fail(f"RVSM_REQUIRE_NATIVE=1, but the native engine is missing for {device}: {reason}")
    pytest.skip(f"engine {engine} on {device}: {reason}")


def is_slow(engine: str) -> bool:
    """Whether the engine is interpreted by Python, about a millisecond for each operation on a block."""
    return engine == "triton" and DEVICE == "cpu"


MARKED_ENGINES = [pytest.param(name, marks=pytest.mark.slow) if is_slow(name) else name for name in ENGINES]
"""The engines as parameters of a test; those that `is_slow` names have the marker `slow`."""

quick_in_all = pytest.mark.parametrize("engine", ENGINES, indirect=True)
"""For a test with the fixture `engine`: the quick check runs it on every engine, also on those that `is_slow` names."""


@contextlib.contextmanager
def shared_folder(factory: pytest.TempPathFactory, name: str) -> Iterator[Path]:
    """A folder for what the processes that share the tests make once: one of them at a time is inside."""
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    with open(base / f"{name}.lock", "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield base / name


def few(engine: str, count: int) -> int:
    """How many of so many random cases an engine does."""
    return max(2, count // 10) if is_slow(engine) else count


def small_only(engine: str) -> None:
    """Skip a test of large tensors where it would take minutes."""
    if is_slow(engine):
        pytest.skip("large tensors are too slow in Triton's interpreter")


def generator(seed: int) -> torch.Generator:
    """A generator of random numbers on the device of the suite."""
    return torch.Generator(DEVICE).manual_seed(seed)


def on_device(array: np.ndarray) -> Tensor:
    """The tensor of an array; on the CPU they share their memory."""
    return torch.from_numpy(array).to(DEVICE)


@functools.cache
def round_in_the_interpreter() -> None:
    """float32 and bfloat16 are converted as on a GPU: Triton's interpreter cuts digits off, and mistakes subnormals."""
    from triton.runtime import interpreter

    plain = interpreter._convert_float

    def convert(x: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source.name, target.name) == ("fp32", "bf16"):
            values = torch.from_numpy(np.array(x, dtype=np.float32))
            return values.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
        if (source.name, target.name) == ("bf16", "fp32"):
            return x.astype(np.uint32) << 16
        return plain(x, source, target, mode)

    interpreter._convert_float = convert


def start(engine: str) -> Iterator[str]:
    """The name that an optimizer knows the engine by; while the test runs, the engine is what it says."""
    interpreted = engine == "interpreted"
    name = "native" if interpreted else engine
    need(name)
    if name == "triton" and DEVICE == "cpu":
        round_in_the_interpreter()
    if interpreted:
        native_engine._C.interpret_cuda(True)
    yield name
    if interpreted:
        native_engine._C.interpret_cuda(False)
