"""The step of shards, on several ranks, over the step of plain tensors of their size.

``python -m bench.shards`` is one of the ranks: it answers the request on its standard input.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn

from .baselines import optimizer_over, start
from .cases import Case
from .config import Effort
from .crowd import Found, ask, case_of, found_of, say, taking_turns
from .problems import Problem, build

RANKS = 2
_MINUTES = timedelta(minutes=2)


def measure(case: Case, engine: str, effort: Effort, more: int = 1) -> tuple[Found, int]:
    """(the time of a sharded step over that of a plain one, the messages of a step).

    Args:
        case: the shards of one rank.
    """
    with tempfile.TemporaryDirectory() as folder:
        request = {"case": asdict(case), "engine": engine, "store": str(Path(folder) / "store")}
        turns = max(3, min(effort.max_samples, 15 * more))
        answers = ask("bench.shards", [{**request, "rank": rank, "turns": turns} for rank in range(RANKS)], threads=1)
    return found_of(answers), answers[0]["messages"]


def _sharded(problem: Problem) -> list[nn.Parameter]:
    """Parameters of which each rank has as many rows as the problem's tensors have."""
    from torch.distributed.tensor import (  # imports numpy: the bench reads results without
        DTensor,
        Shard,
        init_device_mesh,
    )

    mesh = init_device_mesh("cpu", (RANKS,))
    params = []
    for w in problem.parameters():
        p = nn.Parameter(DTensor.from_local(w.detach(), mesh, [Shard(0)]))
        assert w.grad is not None
        p.grad = DTensor.from_local(w.grad, mesh, [Shard(0)])
        params.append(p)
    return params


def main() -> None:
    """Answer one request: ready, and after the next line of input the result."""
    import torch.distributed as dist
    from torch.distributed.tensor.debug import CommDebugMode

    request = json.loads(sys.stdin.readline())
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(request["store"], RANKS)
    dist.init_process_group("gloo", store=store, rank=request["rank"], world_size=RANKS, timeout=_MINUTES)
    problem = build(case_of(request), "cpu")
    sharded = optimizer_over(problem.groups(_sharded(problem)), problem.case.base, request["engine"]).step
    plain = start(request["engine"], problem)
    for _ in range(2):
        sharded()
        plain()
    with CommDebugMode() as messages:
        sharded()
    say({"ready": 1})
    sys.stdin.readline()
    found = taking_turns(sharded, plain, lambda turns: turns < request["turns"])
    dist.barrier()  # who asked ends the processes when it has all answers
    dist.destroy_process_group()
    say({**found, "messages": messages.get_total_counts()})


if __name__ == "__main__":
    main()
