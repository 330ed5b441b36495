"""Coupled groups of DTensors: one process's groups, whatever each rank has of the weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pairs import mesh_of, placements
from ranks import on_ranks
from torch import nn
from torch.distributed.tensor import distribute_tensor

import rvsm_kernels as rk

CHANNELS = 6
ORDERS = [list(range(CHANNELS)), [3, 1, 0, 2, 5, 4], [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]]
SPLIT: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "lam": 2.0, "beta": 0.5, "group_dim": 1}


def optimizers(placed: list[Any], **options: Any) -> tuple[Any, Any, Callable[[int], None]]:
    """An optimizer of sharded weights, each with its placement, one of whole weights, and what gives both gradients."""
    mesh, gen = mesh_of(), torch.Generator().manual_seed(3)
    sizes = torch.linspace(0.1, 1.0, CHANNELS)
    whole = [
        nn.Parameter(torch.randn(rows, len(order), generator=gen) * sizes[order])
        for rows, order in zip((5, 4, 3), ORDERS, strict=True)
    ]

    def share(k: int, t: torch.Tensor) -> torch.Tensor:
        return t.detach().clone() if placed[k] is None else distribute_tensor(t.detach().clone(), mesh, [placed[k]])

    sharded = [nn.Parameter(share(k, w)) for k, w in enumerate(whole)]
    both = [
        rk.RVSM(
            [{"params": [w], "coupling": tuple(o)} for w, o in zip(ws, ORDERS, strict=True)], **{**SPLIT, **options}
        )
        for ws in (sharded, whole)
    ]

    def give_gradients(step: int) -> None:
        for k, (p, q) in enumerate(zip(sharded, whole, strict=True)):
            q.grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(10 * step + k))
            p.grad = share(k, q.grad)

    return both[0], both[1], give_gradients


def full(p: torch.Tensor) -> torch.Tensor:
    return p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach()


def weights(optimizer: Any) -> list[torch.Tensor]:
    return [full(group["params"][0]) for group in optimizer.param_groups]


def follow_one_process(folder: Path) -> None:
    rows, columns, copies = placements()
    for engine, placed, options in itertools.product(
        ["native", "reference"],
        [[rows] * 3, [columns] * 3, [copies] * 3, [rows, columns, None], [None, copies, rows]],
        [
            {},
            {"method": "admm", "group_lasso": 0.1},
            {"group_scale": True, "penalty": "l1", "lam": 0.2},
            {"penalty": "topk", "density": 0.4},
        ],
    ):
        ours, theirs, give_gradients = optimizers(placed, engine=engine, **options)
        for step in range(3):
            give_gradients(step)
            ours.step()
            theirs.step()
        for p, q in zip(weights(ours), weights(theirs), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ours.penalty_value().double(), theirs.penalty_value(), rtol=1e-6, atol=1e-6)
        with ours.sparse_weights(), theirs.sparse_weights():
            zeros = [u == 0 for u in weights(theirs)]
            assert any(z.all(0).any() for z in zeros)
            assert all(torch.equal(p == 0, z) for p, z in zip(weights(ours), zeros, strict=True))
        for of in ("groups", "elements") if ours.param_groups[0]["penalty"] != "topk" else ():
            schedules = [rk.SparsitySchedule(optimizer, 0.5, end=1, every=1, of=of) for optimizer in (ours, theirs)]
            for schedule in schedules:
                schedule.step()
            lams = [optimizer.param_groups[0]["lam"] for optimizer in (ours, theirs)]
            assert lams[0] == pytest.approx(lams[1], rel=1e-5)
            # The same of a small model, whose schedule began with one more channel that was removed before sharding.
            state = schedules[1].state_dict()
            state["members"] = {
                name: [had + (had > 0) * (1 if of == "groups" else shape[0]), [shape[0], shape[1] + 1], grouping]
                for name, (had, shape, grouping) in state["members"].items()
            }
            for schedule in schedules:
                schedule.load_state_dict(state)
                schedule.step()
            assert schedules[0].removed == schedules[1].removed > 0
            fewer = [optimizer.param_groups[0]["lam"] for optimizer in (ours, theirs)]
            assert fewer[0] == pytest.approx(fewer[1], rel=1e-5)


def one_message(folder: Path) -> None:
    """A step sends the sums of all coupled groups together."""
    from torch.distributed.tensor.debug import CommDebugMode

    rows = placements()[0]
    ours, _, give_gradients = optimizers([rows] * 3)
    give_gradients(0)
    ours.step()
    with CommDebugMode() as messages:
        ours.step()
    assert messages.get_total_counts() == 1, messages.get_comm_counts()


def all_checks(folder: Path) -> None:
    follow_one_process(folder)
    dist.barrier()
    one_message(folder)


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks(ranks: int, tmp_path: Path, on_cpu: None) -> None:
    on_ranks(all_checks, ranks, tmp_path)
