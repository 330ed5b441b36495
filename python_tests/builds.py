"""Which engines the suite covers, and what this build lacks."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

import rvsm_kernels as rk

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


def generator(seed: int) -> torch.Generator:
    """A generator of random numbers on the device of the suite."""
    return torch.Generator(DEVICE).manual_seed(seed)


def on_device(array: np.ndarray) -> Tensor:
    """The tensor of an array; on the CPU they share their memory."""
    return torch.from_numpy(array).to(DEVICE)
