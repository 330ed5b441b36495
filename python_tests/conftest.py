"""Engines as fixtures, and what every test starts from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from builds import DEVICE, ENGINES, MARKED_ENGINES, start
from world import World


@pytest.fixture(params=MARKED_ENGINES)
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every engine of this build; in the quick check the interpreted ones only where `builds.quick_in_all` says so."""
    yield from start(request.param)


@pytest.fixture(params=[name for name in ENGINES if name not in ("reference", "triton")])
def native(request: pytest.FixtureRequest) -> Iterator[str]:
    """The compiled engines only."""
    yield from start(request.param)


@pytest.fixture
def on_cpu() -> None:
    """For tests of what only a CPU has."""
    if DEVICE != "cpu":
        pytest.skip("a test of the CPU")


@pytest.fixture(scope="session", autouse=True)
def device() -> Iterator[None]:
    """Tensors are on the device of the suite; convolutions give the same bits in every run."""
    if DEVICE == "cuda":
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = False
    torch.set_default_device(None if DEVICE == "cpu" else DEVICE)
    yield
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """Each test starts from the same random state, on one thread: its tensors are too small to share."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(count)


@pytest.fixture
def threads(alone: None) -> int:
    """For tests of large tensors: more threads than divide anything evenly. They may set another number."""
    torch.set_num_threads(3)
    return 3


@pytest.fixture(params=[0, 1, 3], ids=["before the first step", "after one step", "after three"])
def world(request: pytest.FixtureRequest, engine: str) -> World:
    """Changes come before anything was built from the parameters, and after."""
    return World(engine, request.param)


@pytest.fixture
def trained(engine: str) -> World:
    """An optimizer with momentum."""
    return World(engine, 2)
