"""Engines as fixtures, and what every test starts from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from builds import ENGINES, need
from world import World


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
