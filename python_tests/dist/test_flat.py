"""Flat parameters of FSDP1 and DeepSpeed: elements are stepped, groups cannot be told and are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import model_of, on_ranks
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

import rvsm_kernels as rk
from runner import same_bits

ELEMENTS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "penalty": "l1", "lam": 0.05, "beta": 0.5}


def flat(use_orig_params: bool) -> nn.Module:
    return FullyShardedDataParallel(model_of(), device_id=torch.device("cpu"), use_orig_params=use_orig_params)


def elements_follow_one_process(folder: Path) -> None:
    for use_orig_params in (False, True):
        model, plain = flat(use_orig_params), model_of()
        ours, theirs = rk.RVSM(model.parameters(), **ELEMENTS), rk.RVSM(plain.parameters(), **ELEMENTS)
        x = torch.randn(4, 7, generator=torch.Generator().manual_seed(1))
        for _ in range(3):
            for m, optimizer in ((model, ours), (plain, theirs)):
                optimizer.zero_grad()
                m(x).square().mean().backward()
                optimizer.step()
        for _ in range(2):  # FSDP1 keeps what it has gathered for a forward pass
            torch.testing.assert_close(model(x), plain(x))
            with ours.sparse_weights(model), theirs.sparse_weights():
                torch.testing.assert_close(model(x), plain(x))
            torch.testing.assert_close(model(x), plain(x))
        with pytest.raises(RuntimeError, match=r"needs the model.*sparse_weights\(model\)"), ours.sparse_weights():
            pass
        with pytest.raises(RuntimeError, match=r"cannot tell FullyShardedDataParallel.*FSDP2"):
            ours.sparsify_()
        if use_orig_params:
            with FullyShardedDataParallel.summon_full_params(model):
                for p, q in zip(model.parameters(), plain.parameters(), strict=True):
                    torch.testing.assert_close(p, q)


def groups_are_refused(folder: Path) -> None:
    for use_orig_params in (False, True):
        model = flat(use_orig_params)
        for dims in (0, ()):
            with pytest.raises(ValueError, match=r"flattened by FullyShardedDataParallel.*fully_shard"):
                rk.RVSM(model.parameters(), lr=0.1, group_dim=dims)
        with pytest.raises(ValueError, match=r"has 1 dimension .*fully_shard"):
            rk.RVSM(model.parameters(), lr=0.1, group_dim=1)
        for options in ({}, {"structure": "in_channels"}):
            with pytest.raises(ValueError, match=r"flattened the parameters.*fully_shard"):
                rk.param_groups(model, **options)
        assert "flattened" in rk.describe(model)


def all_checks(folder: Path) -> None:
    elements_follow_one_process(folder)
    groups_are_refused(folder)


def test_fsdp1(tmp_path: Path, on_cpu: None) -> None:
    on_ranks(all_checks, 2, tmp_path)


@pytest.mark.parametrize("dims", [0, (), 1])
def test_deepspeed(dims: Any) -> None:
    """It puts one long float32 vector in the place of a group's parameters, before the first step."""
    model = model_of()
    for options in ({"group_dim": dims}, {}):
        optimizer = rk.RVSM(rk.param_groups(model, lam=0.1, beta=0.5, **options), lr=0.1)
        for group in optimizer.param_groups:
            vector = nn.Parameter(torch.cat([p.detach().flatten() for p in group["params"]]))
            vector.grad = torch.ones_like(vector)
            group["params"] = [vector]
        before = optimizer.param_groups[0]["params"][0].detach().clone()
        if options:
            with pytest.raises(ValueError, match=r"Invalid group_dim.*fully_shard"):
                optimizer.step()
            assert same_bits(optimizer.param_groups[0]["params"][0].detach(), before)
        else:
            optimizer.step()
            assert not torch.equal(optimizer.param_groups[0]["params"][0], before)
