"""RVSMWrapper over FSDP2's parameters, in two processes: what one process does, and torch's distributed checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import model_of, on_ranks, sharded_model, train, wholes
from torch import nn

import rvsm_kernels as rk
from runner import same_bits

RANKS = 2
SPLIT: dict[str, Any] = {"penalty": "l1", "lam": 0.05, "beta": 0.5, "engine": None}
METHODS: list[dict[str, Any]] = [
    {},
    {"decoupled": False},
    {"method": "admm"},
    {"method": "rvsm-delayed", "penalty": "l0"},
]


def wrapper_of(model: nn.Module, options: dict[str, Any]) -> rk.RVSMWrapper:
    return rk.RVSMWrapper(torch.optim.AdamW(model.parameters(), lr=0.1), **{**SPLIT, **options})


def same_model(a: nn.Module, b: nn.Module) -> None:
    for x, y in zip(wholes(a), wholes(b), strict=True):
        assert same_bits(x, y)


def follows_one_process(folder: Path) -> None:
    for options in METHODS:
        sharded, plain = sharded_model(), model_of()
        ours, theirs = wrapper_of(sharded, options), wrapper_of(plain, options)
        train(sharded, ours, range(4))
        train(plain, theirs, range(4))
        same_model(sharded, plain)
        assert ours.sparsity().to_dict()["total"] == theirs.sparsity().to_dict()["total"]
        torch.testing.assert_close(ours.penalty_value(), theirs.penalty_value())
        with ours.sparse_weights(), theirs.sparse_weights():
            same_model(sharded, plain)
        same_model(sharded, plain)
        ours.sparsify_()
        theirs.sparsify_()
        same_model(sharded, plain)
        assert any((x == 0).any() for x in wholes(plain))


def trains_with_fsdp(folder: Path) -> None:
    """Gradients that FSDP2 reduces, from a backward pass."""
    sharded, plain = sharded_model(), model_of()
    ours, theirs = wrapper_of(sharded, {}), wrapper_of(plain, {})
    x = torch.randn(4, 7)
    for _ in range(3):
        for model, optimizer in ((sharded, ours), (plain, theirs)):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    for a, b in zip(wholes(sharded), wholes(plain), strict=True):
        torch.testing.assert_close(a, b)


def moves_through_checkpoints(folder: Path) -> None:
    """get_optimizer_state_dict, and files of torch.distributed.checkpoint; also into an optimizer without a state."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    for k, options in enumerate(METHODS):
        straight, first = sharded_model(), sharded_model()
        train(straight, wrapper_of(straight, options), range(6))
        optimizer = wrapper_of(first, options)
        train(first, optimizer, range(3))
        saved = get_optimizer_state_dict(first, optimizer)
        name = {"admm": "dual", "rvsm-delayed": "u"}.get(options.get("method", ""))
        assert name is None or name in saved["state"]["0.weight"]
        dcp.save({"optimizer": saved}, checkpoint_id=folder / str(k))
        for way in ("memory", "files", "whole"):
            second = sharded_model()
            with torch.no_grad():
                for p, q in zip(second.parameters(), first.parameters(), strict=True):
                    p.copy_(q)
            resumed = wrapper_of(second, options)
            before = wholes(second)
            loaded, whole = copy.deepcopy(saved), StateDictOptions()
            if way == "files":
                loaded = get_optimizer_state_dict(second, resumed)
                assert all(same_bits(x, y) for x, y in zip(before, wholes(second), strict=True))
                dcp.load({"optimizer": loaded}, checkpoint_id=folder / str(k))
            elif way == "whole":
                whole = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
                loaded = get_optimizer_state_dict(first, optimizer, options=StateDictOptions(full_state_dict=True))
            set_optimizer_state_dict(second, resumed, loaded, options=whole)
            train(second, resumed, range(3, 6))
            same_model(second, straight)


SLOW = [pytest.param(work, marks=pytest.mark.slow) for work in (trains_with_fsdp, moves_through_checkpoints)]


@pytest.mark.parametrize("work", [follows_one_process, *SLOW])
def test_two_ranks(work: Callable[[Path], None], tmp_path: Path, on_cpu: None) -> None:
    on_ranks(work, RANKS, tmp_path)
