"""One cut over sharded parameters, and over plain ones beside them: magnitudes are counted, nothing is gathered."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pairs import SHAPES, Pair, mesh_of, placements
from ranks import on_ranks
from torch import nn

import rvsm_kernels as rk

BUDGET = {"penalty": "topk", "density": 0.3, "lam": 1.0, "budget": "global"}
GROUPS = {**BUDGET, "density": 0.5, "group_dim": 1}


def follow_one_process(folder: Path) -> None:
    """Bit for bit where elements are compared; some ranks have no elements of a tensor."""
    for placement in placements():
        for options, shapes, exact in (
            (BUDGET, SHAPES, True),
            ({**BUDGET, "method": "admm"}, SHAPES, True),
            ({**BUDGET, "method": "rvsm-delayed"}, SHAPES, True),
            (GROUPS, SHAPES, False),
            ({**GROUPS, "group_scale": True}, SHAPES, False),
            ({**BUDGET, "density": 1.0}, SHAPES, True),
        ):
            pair = Pair(rk.RVSM, mesh_of(), [placement], shapes=shapes, **options)
            pair.step(3)
            pair.check(exact=exact)
            assert str(pair.ours.sparsity()) == str(pair.theirs.sparsity())
            with pair.ours.sparse_weights(), pair.theirs.sparse_weights():
                for p, q in zip(pair.sharded, pair.whole, strict=True):
                    assert torch.equal(p.full_tensor() == 0, q == 0)
            torch.testing.assert_close(pair.ours.penalty_value(), pair.theirs.penalty_value())
            pair.ours.sparsify_()
            pair.theirs.sparsify_()
            assert str(pair.ours.sparsity()) == str(pair.theirs.sparsity())
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            masters = dtype != torch.float64
            pair = Pair(rk.RVSM, mesh_of(), [placement], dtype, master_weights=masters, **BUDGET)
            pair.step(3)
            pair.check(exact=True)


def beside_plain_ones(folder: Path) -> None:
    """A budget of DTensors and of a parameter that every rank has whole."""
    for placement in placements():
        pair = Pair(rk.RVSM, mesh_of(), [placement], **BUDGET)
        plain = [nn.Parameter(0.5 * torch.ones(4, 6).cumsum(1)) for _ in range(2)]
        for optimizer, p in zip((pair.ours, pair.theirs), plain, strict=True):
            optimizer.add_param_group({"params": [p]})
            p.grad = torch.zeros_like(p)
        pair.step(3)
        pair.check(exact=True)
        assert torch.equal(*plain)
        assert str(pair.ours.sparsity()) == str(pair.theirs.sparsity())


def gather_nothing(folder: Path) -> None:
    """Messages of counts; for groups across ranks their norms too."""
    from torch.distributed.tensor.debug import CommDebugMode

    for options in (BUDGET, GROUPS, {"penalty": "topk", "density": 0.3, "lam": 1.0}):
        for placement in placements():
            pair = Pair(rk.RVSM, mesh_of(), [placement], **options)
            pair.step()
            pair.give_gradients()
            with CommDebugMode() as messages:
                pair.ours.step()
            assert {str(name) for name in messages.get_comm_counts()} <= {"c10d.allreduce_"}


def a_schedule_over_shards(folder: Path) -> None:
    """A schedule counts too, and finds the cuts of one process."""
    from torch.distributed.tensor.debug import CommDebugMode

    for placement in placements():
        pair = Pair(rk.RVSM, mesh_of(), [placement], lam=0.0)
        ours, theirs = (rk.SparsitySchedule(o, 0.5, end=2, every=1) for o in (pair.ours, pair.theirs))
        for _ in range(2):
            pair.step()
            theirs.step()
            with CommDebugMode() as messages:
                ours.step()
            assert {str(name) for name in messages.get_comm_counts()} <= {"c10d.allreduce_"}
        assert pair.ours.param_groups[0]["lam"] == pair.theirs.param_groups[0]["lam"] > 0


def all_of_them(folder: Path) -> None:
    for check in (follow_one_process, beside_plain_ones, gather_nothing, a_schedule_over_shards):
        check(folder)


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_budgets_across_ranks(ranks: int, tmp_path: Path, on_cpu: None) -> None:
    on_ranks(all_of_them, ranks, tmp_path)
