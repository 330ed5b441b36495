"""The peak memory of one contender, measured in a process of its own: ``python -m bench.peak '{...}'``.

Prints JSON: ``bytes`` is the peak over a few steps above the parameters and their gradients, so it holds the
optimizer's states and what a step needs for a while.
"""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
from typing import Any

import torch

from .baselines import Unavailable, start, without_paths
from .cases import Case
from .config import ROOT
from .problems import build

RSS_RESOLUTION = 256 * 1024
"""Smaller differences mean nothing: pages of the allocator and of the threads' stacks come and go."""

_STEPS = 3
_WARM_UP = "512x512"  # large enough for every thread to start


def _status_bytes(key: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        found = re.search(rf"^{key}:\s+(\d+) kB", file.read(), re.MULTILINE)
    if found is None:
        raise Unavailable(f"/proc/self/status has no {key}")
    return 1024 * int(found[1])


def _reset(device: str) -> int:
    """Bytes in use now; the peak starts again from here."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return _requested("current")
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")  # resets VmHWM, the peak of the resident set
    except OSError as error:
        raise Unavailable(f"the peak of the resident set cannot be reset here ({error.strerror})") from error
    return _status_bytes("VmRSS")


def _requested(which: str) -> int:
    """Bytes that were asked of the GPU's allocator; what it hands out also holds the rest of its blocks."""
    return torch.cuda.memory_stats()[f"requested_bytes.all.{which}"]


def _peak(device: str) -> int:
    return _requested("peak") if device == "cuda" else _status_bytes("VmHWM")


def measure(case: Case, contender: str, device: str) -> int:
    """Peak bytes of a contender's first steps above parameters and gradients."""
    # Code pages, threads and the allocator's own pages are touched before counting.
    start(contender, build(Case(_WARM_UP, case.penalty, case.group_dim, case.dtype), device))()
    problem = build(case, device)
    problem.reuse = True
    before = _reset(device)
    step = start(contender, problem)
    for _ in range(_STEPS):
        step()
    return _peak(device) - before


def in_child(case: Case, contender: str, device: str) -> dict[str, Any]:
    """:func:`measure` in a new process: ``{"bytes": n}`` or ``{"unavailable": reason}``."""
    request = {
        "shape": case.shape,
        "penalty": case.penalty,
        "group_dim": case.group_dim,
        "dtype": case.dtype,
        "contender": contender,
        "device": device,
        "threads": torch.get_num_threads(),
    }
    # glibc then returns every block of 64 KiB and more to the system at once, so the resident set follows the use.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.peak", json.dumps(request)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode < 0:  # a signal; the system ends a process so when memory runs out
        return {"unavailable": f"its process was ended by signal {-done.returncode}"}
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"measuring the memory of {contender} failed: {without_paths(last)}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Answer one request on the command line."""
    request = json.loads(sys.argv[1])
    contender, device = request.pop("contender"), request.pop("device")
    torch.set_num_threads(request.pop("threads"))
    dim = request.pop("group_dim")
    case = Case(**request, group_dim=tuple(dim) if isinstance(dim, list) else dim)
    try:
        answer: dict[str, Any] = {"bytes": measure(case, contender, device)}
    except Unavailable as error:
        answer = {"unavailable": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
