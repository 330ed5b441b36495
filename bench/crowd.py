"""Several processes that step at the same time, with more threads than there are cores, as where ranks share a machine.

``python -m bench.crowd`` is one of these processes: it answers the request on its standard input.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from .baselines import Unavailable, start
from .cases import Case
from .config import ROOT, Effort
from .problems import build

PROCESSES, THREADS = 4, 2


@dataclass(frozen=True)
class Found:
    """Medians over the processes: of the ratio of the first contender's time to the second's, and of its seconds."""

    ratio: float
    seconds: float


def measure(case: Case, contenders: Sequence[str], effort: Effort, more: int = 1) -> Found:
    """Two contenders take turns in each of the processes, which all begin at the same time.

    Raises:
        Unavailable: a contender that does not run here.
    """
    request = {"case": asdict(case), "contenders": list(contenders), "seconds": effort.budget_s * more}
    env = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "MKL_NUM_THREADS": str(THREADS)}
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "bench.crowd"],
            cwd=ROOT,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(PROCESSES)
    ]
    try:
        for child in children:
            assert child.stdin is not None
            child.stdin.write(json.dumps(request) + "\n")
            child.stdin.flush()
        answers = [_answer(child) for child in children]
        if any("unavailable" in answer for answer in answers):
            raise Unavailable(next(answer["unavailable"] for answer in answers if "unavailable" in answer))
        for child in children:  # all are ready
            assert child.stdin is not None
            child.stdin.write("\n")
            child.stdin.flush()
        answers = [_answer(child) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    ratios, seconds = ([answer[key] for answer in answers] for key in ("ratio", "seconds"))
    return Found(statistics.median(ratios), statistics.median(seconds))


def _answer(child: subprocess.Popen[str]) -> dict[str, float | str]:
    assert child.stdout is not None
    line = child.stdout.readline()
    if not line:
        raise RuntimeError(f"a process of the crowd ended with {child.wait()}")
    return dict(json.loads(line))


def main() -> None:
    """Answer one request: ready, and after the next line of input the result."""
    request = json.loads(sys.stdin.readline())
    torch.set_num_threads(THREADS)
    case = request["case"]
    dims = case["group_dim"]
    problem = build(Case(**{**case, "group_dim": tuple(dims) if isinstance(dims, list) else dims}), "cpu")
    try:
        first, second = (start(name, problem) for name in request["contenders"])
    except Unavailable as error:
        print(json.dumps({"unavailable": str(error)}), flush=True)
        return
    print(json.dumps({"ready": 1}), flush=True)
    sys.stdin.readline()
    times: list[tuple[float, float]] = []
    end = time.perf_counter() + request["seconds"]
    while time.perf_counter() < end or len(times) < 3:
        at = time.perf_counter()
        first()
        middle = time.perf_counter()
        second()
        times.append((middle - at, time.perf_counter() - middle))
    ratio, seconds = statistics.median(a / b for a, b in times), statistics.median(a for a, _ in times)
    print(json.dumps({"ratio": ratio, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
