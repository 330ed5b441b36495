"""Engines and devices as fixtures."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

import rvsm_kernels as rk

ENGINES = ("native", "reference")
DEVICES = ("cpu",)


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


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Every device type that the suite covers."""
    return request.param


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    """Every engine of this build."""
    need(request.param)
    return request.param


@pytest.fixture
def native() -> str:
    """The native engine only."""
    need("native")
    return "native"


@pytest.fixture
def threads() -> Iterator[None]:
    """Gives the number of torch's threads back afterwards."""
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Each test starts from the same random state."""
    torch.manual_seed(0)
