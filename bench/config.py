"""What one run of the harness was asked for."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from pathlib import Path

import rvsm_kernels as rk

ROOT = Path(__file__).resolve().parent.parent
"""The root of the repository."""

RESULTS = ROOT / "bench" / "results"
"""Results that are committed; a run writes to RESULTS/local, which git ignores, unless told otherwise."""


def shown(path: Path) -> str:
    """A path for a message: relative where that is shorter for the reader, below the current folder."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


_PACKAGES = {"sklearn": "scikit-learn"}
"""The name under which pip knows a module, where the two names differ."""


class MissingPackage(Exception):
    """A Python package that a part of the harness needs is not installed; the message is a sentence for the user."""


def require(*modules: str) -> None:
    """Check that every module can be imported.

    Raises:
        MissingPackage: a module cannot be imported.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            # The module is there, but a module that it needs may be missing: numpy under scikit-learn.
            found = (error.name or module).partition(".")[0] if isinstance(error, ModuleNotFoundError) else module
            name = _PACKAGES.get(found, found)
            remedy = f"`pip install {name}`, or `make bench` in the clone, installs it"
            raise MissingPackage(f"{name} cannot be imported: {remedy}") from error


@dataclass(frozen=True)
class Effort:
    """How much time a run may take.

    Attributes:
        budget_s: seconds of timed steps per case, divided over the contenders.
        min_samples: samples of even the slowest contender; they may exceed its share of the budget.
        max_samples: enough for a median, however cheap a sample is.
        copy_elements: float32 elements of the copy that gives the bandwidth.
        compile_up_to: torch.compile is measured for cases of at most so many tensors; it compiles for longer than
            everything else takes.
    """

    name: str
    budget_s: float
    min_samples: int
    max_samples: int
    copy_elements: int
    compile_up_to: int


SMOKE = Effort("smoke", budget_s=0.2, min_samples=2, max_samples=5, copy_elements=4_000_000, compile_up_to=0)
QUICK = Effort("quick", budget_s=2.0, min_samples=5, max_samples=101, copy_elements=100_000_000, compile_up_to=1)
FULL = Effort("full", budget_s=20.0, min_samples=11, max_samples=301, copy_elements=100_000_000, compile_up_to=200)


@dataclass(frozen=True)
class Config:
    """One run.

    Attributes:
        engines: the engines under test; the first is the one that floors and headlines are about.
        command: the command line that gives this run again, without paths.
    """

    out: Path
    device: str
    engines: tuple[str, ...]
    effort: Effort
    command: str


def available_engines(device: str) -> tuple[str, ...]:
    """The compiled engines that this build has for a device, the preferred first."""
    table = rk.engines()
    return tuple(name for name in ("native", "triton") if table[name].get(device) == "available")


def missing_engines(device: str) -> str:
    """Why there is no compiled engine for a device, for a message."""
    table = rk.engines()
    return "; ".join(f"{name}: {table[name].get(device, f'does not serve {device}')}" for name in ("native", "triton"))
