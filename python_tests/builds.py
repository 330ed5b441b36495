"""Which engines the suite covers, and what this build lacks."""

from __future__ import annotations

import os

import pytest

import rvsm_kernels as rk

ENGINES = ("native", "interpreted", "reference")
"""``interpreted``: the native engine, with its CUDA plan and kernels run on CPU tensors by the host's interpreter."""


def missing(engine: str, device: str) -> str | None:
    """Why this build has no such engine for a device, or None."""
    table = rk.engines()[engine]
    state = table.get(device, table.get("any", f"does not serve {device}"))
    return None if state == "available" else state


def need(engine: str, device: str = "cpu") -> None:
    """Skip, with the reason, a test whose engine this build lacks; fail if the build was to have it."""
    reason = missing(engine, device)
    if reason is None:
        return
    if engine == "native" and os.environ.get("RVSM_REQUIRE_NATIVE") == "1":
        pytest.fail(f"RVSM_REQUIRE_NATIVE=1, but the native engine is missing for {device}: {reason}")
    pytest.skip(f"engine {engine} on {device}: {reason}")
