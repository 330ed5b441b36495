"""Results as JSON: where and with what they were measured, and the rows, written whole after every row."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

import rvsm_kernels as rk

from .config import ROOT, Config, shown

Row = dict[str, Any]
Result = dict[str, Any]

BUSY = 0.1
"""From this share on, other programs on the machine are worth a word beside the numbers."""

_LOOK_S = 0.3


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not on this platform
        return None


def machine(device: str) -> dict[str, Any]:
    """The hardware, and nothing that says whose it is."""
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": _memory_bytes(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = properties.name
        found["gpu_memory_bytes"] = properties.total_memory
        found["gpu_capability"] = f"{properties.major}.{properties.minor}"
    return found


def versions() -> dict[str, str | None]:
    """What was measured with."""
    found: dict[str, str | None] = {
        "rvsm_kernels": rk.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
    }
    for package in ("torchao", "onnxruntime"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def commit() -> str | None:
    """The commit, with "-dirty" when the tree differs from it; None outside git.

    Results and Markdown do not count: a run writes them itself.
    """
    head = _git("rev-parse", "HEAD")
    if head is None:
        return None
    changes = _git("status", "--porcelain", "--", ".", ":(exclude)bench/results", ":(exclude)*.md")
    return f"{head}-dirty" if changes else head


def _cpu_ticks() -> tuple[int, int] | None:
    """(busy, all) clock ticks of all cores since the machine started."""
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()
        ticks = [int(field) for field in fields[1:9]]
    except (OSError, ValueError):
        return None
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)  # idle, and waiting for a disk


def busy_share() -> float | None:
    """The share of the cores that other programs use now, while this one sleeps; None where it cannot be read."""
    before = _cpu_ticks()
    time.sleep(_LOOK_S)
    after = _cpu_ticks()
    if before is None or after is None or after[1] == before[1]:
        return None
    return (after[0] - before[0]) / (after[1] - before[1])


def write_json(path: Path, value: Any) -> None:
    """Write a file whole or not at all: an interrupted run or a full disk leaves the previous one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=1, allow_nan=False)
            file.write("\n")
        os.chmod(name, 0o644)  # mkstemp's files are for their owner only
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def read_json(path: Path) -> Result | None:
    """A result file, or None if there is none.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:  # not JSON, or not even text
        raise ValueError(f"{shown(path)} is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{shown(path)} holds no result: its JSON is not an object")
    return value


def digest(result: Result) -> str:
    """A short name of what a result says; a plot carries it, so that one of other numbers is found."""
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()[:16]


def environment(device: str, command: str) -> Result:
    """The head of every result file."""
    return {
        "machine": machine(device),
        "versions": versions(),
        "commit": commit(),
        "device": device,
        "threads": torch.get_num_threads(),
        "busy_share": busy_share(),
        "command": command,
    }


class Results:
    """One result file in the making: ``with Results(...) as results: results.add(row)``.

    ``complete`` in the file says whether the run came to its end.
    """

    def __init__(self, kind: str, config: Config) -> None:
        self._path = config.out / f"{kind}.json"
        self._value: Result = {
            **environment(config.device, config.command),
            "effort": config.effort.name,
            "engines": list(config.engines),
            "complete": False,
            "rows": [],
        }
        busy = self._value["busy_share"]
        if busy is not None and busy > BUSY:
            print(f"{kind}: other programs keep {busy:.0%} of the cores busy; the numbers will suffer")

    @property
    def rows(self) -> list[Row]:
        return self._value["rows"]

    def add(self, row: Row) -> None:
        self.rows.append(row)
        write_json(self._path, self._value)

    def __enter__(self) -> Results:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._value["complete"] = True
            write_json(self._path, self._value)
