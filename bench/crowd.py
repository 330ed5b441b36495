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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .baselines import Unavailable, start
from .cases import Case
from .config import ROOT, Effort
from .problems import build
from .timing import Step

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
    return found_of(ask("bench.crowd", [request] * PROCESSES, THREADS))


def ask(module: str, requests: Sequence[dict[str, Any]], threads: int) -> list[dict[str, Any]]:
    """What processes answer that run a module of the bench, one for each request, all at the same time.

    A process reads its request, answers that it is ready, waits for a line, and answers with what it has found.

    Args:
        threads: of each process.

    Raises:
        Unavailable: what one of them needs is not here.
    """
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    children = [
        subprocess.Popen(
            [sys.executable, "-m", module],
            cwd=ROOT,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in requests
    ]
    try:
        for child, request in zip(children, requests, strict=True):
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
        return [_answer(child) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()


def found_of(answers: Sequence[dict[str, Any]]) -> Found:
    """The medians of what processes have found."""
    ratios, seconds = ([answer[key] for answer in answers] for key in ("ratio", "seconds"))
    return Found(statistics.median(ratios), statistics.median(seconds))


def _answer(child: subprocess.Popen[str]) -> dict[str, Any]:
    assert child.stdout is not None
    line = child.stdout.readline()
    if not line:
        raise RuntimeError(f"a process of the bench ended with {child.wait()}")
    return dict(json.loads(line))


def case_of(request: dict[str, Any]) -> Case:
    """The case of a request."""
    case = request["case"]
    dims = case["group_dim"]
    return Case(**{**case, "group_dim": tuple(dims) if isinstance(dims, list) else dims})


def say(answer: dict[str, Any]) -> None:
    """Answer a request, or that the process is ready."""
    print(json.dumps(answer), flush=True)


def taking_turns(first: Step, second: Step, goes_on: Callable[[int], bool]) -> dict[str, Any]:
    """Time two steps in turns: the median of the ratios, and of the seconds of the first.

    Args:
        goes_on: whether there is another turn, after so many; there are at least three.
    """
    times: list[tuple[float, float]] = []
    while len(times) < 3 or goes_on(len(times)):
        at = time.perf_counter()
        first()
        middle = time.perf_counter()
        second()
        times.append((middle - at, time.perf_counter() - middle))
    return {"ratio": statistics.median(a / b for a, b in times), "seconds": statistics.median(a for a, _ in times)}


def main() -> None:
    """Answer one request: ready, and after the next line of input the result."""
    request = json.loads(sys.stdin.readline())
    torch.set_num_threads(THREADS)
    problem = build(case_of(request), "cpu")
    try:
        first, second = (start(name, problem) for name in request["contenders"])
    except Unavailable as error:
        say({"unavailable": str(error)})
        return
    say({"ready": 1})
    sys.stdin.readline()
    end = time.perf_counter() + request["seconds"]
    say(taking_turns(first, second, lambda _: time.perf_counter() < end))


if __name__ == "__main__":
    main()
