"""N:M sparsity of DTensors: windows inside a shard are those of one process, shards that cut a window are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from test_shards import Pair, mesh_of, placements
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

import rvsm_kernels as rk

SHAPES = ((5, 8), (1, 16), (3, 8, 2, 2))


def follow_one_process(folder: Path) -> None:
    """Every bit of weights and states; u, the value and the report too."""
    for method in ("rvsm", "rvsm-delayed", "admm"):
        for placement in placements():
            options = {"penalty": "nm", "pattern": (2, 4), "method": method, "shapes": SHAPES}
            pair = Pair(rk.RVSM, mesh_of(), [placement], **options)
            pair.step(3)
            pair.check(exact=True)
            with pair.ours.sparse_weights(), pair.theirs.sparse_weights():
                for p, q in zip(pair.sharded, pair.whole, strict=True):
                    assert torch.equal(p.full_tensor(), q)
            torch.testing.assert_close(pair.ours.penalty_value(), pair.theirs.penalty_value())
            assert str(pair.ours.sparsity()) == str(pair.theirs.sparsity())
            pair.ours.sparsify_()
            assert [row.pattern for row in pair.ours.sparsity().rows] == [(2, 4)] * len(SHAPES)


def a_window_on_two_ranks(folder: Path) -> None:
    """Dimension 1 of 12 on two ranks is 6 and 6: refused by the step and by u, and nothing changes."""
    p = nn.Parameter(distribute_tensor(torch.randn(3, 12), mesh_of(), [Shard(1)]))
    p.grad = distribute_tensor(torch.ones(3, 12), mesh_of(), [Shard(1)])
    optimizer = rk.RVSM([("w", p)], lr=0.1, penalty="nm", pattern=(2, 4))
    before = p.full_tensor().clone()
    for call in (optimizer.step, optimizer.sparsify_, optimizer.sparsity, optimizer.penalty_value):
        with pytest.raises(ValueError, match=r"pattern value: 4: dimension 1 of w is divided.*two ranks"):
            call()
    assert torch.equal(p.full_tensor(), before)


def both(folder: Path) -> None:
    follow_one_process(folder)
    a_window_on_two_ranks(folder)


def test_ranks(tmp_path: Path, on_cpu: None) -> None:
    on_ranks(both, 2, tmp_path)
