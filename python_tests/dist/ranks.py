"""Functions that run on several processes, each a rank of a gloo group on this machine, and a model for them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn


def _a_rank(rank: int, ranks: int, folder: str, work: Callable[[Path], None]) -> None:
    """One process of the group."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    try:
        work(Path(folder))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def on_ranks(work: Callable[[Path], None], ranks: int, folder: Path, seconds: float = 150) -> None:
    """Run a function of a module on every rank; an error on one of them is raised here, and none outlives the call.

    Args:
        folder: for the ranks' files; the function is given it.
    """
    context = mp.spawn(_a_rank, args=(ranks, str(folder), work), nprocs=ranks, join=False)
    end = time.monotonic() + seconds
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < end, "the ranks did not end"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()


# ---- a model ---------------------------------------------------------------------------------------------------------


def model_of() -> nn.Module:
    """Five and three rows, which two ranks cannot share evenly, and one that only the first rank has."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3), nn.Linear(3, 1, bias=False))


def give_gradients(model: nn.Module, step: int) -> None:
    """The same numbers in one process and in two."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    gen = torch.Generator().manual_seed(step)
    for p in model.parameters():
        g = torch.randn(p.shape, generator=gen)
        p.grad = distribute_tensor(g, p.device_mesh, p.placements) if isinstance(p, DTensor) else g


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        give_gradients(model, step)
        optimizer.step()


def wholes(model: nn.Module) -> list[torch.Tensor]:
    return [getattr(p, "full_tensor", p.detach)().detach() for p in model.parameters()]


def sharded_model() -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    model = model_of()
    fully_shard(model)
    return model
