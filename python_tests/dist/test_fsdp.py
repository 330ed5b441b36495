"""FSDP2: gradients that it reduces, what it has gathered, and checkpoints that move between numbers of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import model_of, on_ranks, sharded_model, train, wholes
from torch import nn

import rvsm_kernels as rk
from runner import same_bits

OPTIMIZERS: dict[str, tuple[type, dict[str, Any]]] = {
    "sgd": (rk.RVSM, {"momentum": 0.9, "penalty": "l1", "lam": 0.05, "beta": 0.5, "lr": 0.1}),
    "adamw, groups, admm": (
        rk.RVSMAdamW,
        {"penalty": "l0", "lam": 0.1, "beta": 0.5, "lr": 0.1, "method": "admm", "structure": "in_channels"},
    ),
    "adamw, groups, delayed": (
        rk.RVSMAdamW,
        {"penalty": "l1", "lam": 0.1, "beta": 0.5, "lr": 0.1, "method": "rvsm-delayed", "structure": "out_channels"},
    ),
}


def optimizer_of(model: nn.Module, kind: str) -> Any:
    cls, options = OPTIMIZERS[kind]
    lr, momentum = options["lr"], {key: options[key] for key in ("momentum",) if key in options}
    penalty = {key: value for key, value in options.items() if key not in ("lr", "momentum")}
    return cls(rk.param_groups(model, **penalty), lr=lr, **momentum)


def as_saved(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, states = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": states}


def save_half_way(folder: Path) -> None:
    """Three steps, a checkpoint, three steps more; and what is there at the end."""
    import torch.distributed.checkpoint as dcp

    for kind in OPTIMIZERS:
        model = sharded_model()
        optimizer = optimizer_of(model, kind)
        train(model, optimizer, range(3))
        dcp.save(as_saved(model, optimizer), checkpoint_id=folder / kind)
        train(model, optimizer, range(3, 6))
        ends = wholes(model)
        if dist.get_rank() == 0:
            torch.save(ends, folder / f"{kind}.pt")


def go_on(folder: Path) -> None:
    """From that checkpoint on another number of ranks, on which the groups are divided otherwise."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_state_dict

    for kind in OPTIMIZERS:
        model = sharded_model()
        optimizer = optimizer_of(model, kind)
        saved = as_saved(model, optimizer)
        dcp.load(saved, checkpoint_id=folder / kind)
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
        train(model, optimizer, range(3, 6))
        for x, y in zip(wholes(model), torch.load(folder / f"{kind}.pt"), strict=True):
            if kind == "sgd":
                assert same_bits(x, y)
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_checkpoints_move_between_numbers_of_ranks(tmp_path: Path, on_cpu: None) -> None:
    on_ranks(save_half_way, 2, tmp_path)
    for ranks in (1, 3):
        (tmp_path / "store").unlink()
        on_ranks(go_on, ranks, tmp_path)


def train_with_fsdp(folder: Path) -> None:
    """Gradients that FSDP2 reduces from a backward pass, clipped, with groups across ranks; as one process does."""
    for kind in OPTIMIZERS:
        sharded, plain = sharded_model(), model_of()
        ours, theirs = optimizer_of(sharded, kind), optimizer_of(plain, kind)
        x = torch.randn(4, 7, generator=torch.Generator().manual_seed(1))
        for _ in range(4):
            for model, optimizer in ((sharded, ours), (plain, theirs)):
                optimizer.zero_grad()
                model(x).square().mean().backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
                optimizer.step()
        for a, b in zip(wholes(sharded), wholes(plain), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def evaluate_with_fsdp(folder: Path) -> None:
    """FSDP2 keeps what its root has gathered after a forward pass without gradients: u must not stay there, nor w."""
    from torch.distributed.fsdp import fully_shard

    sharded, plain = model_of(), model_of()
    fully_shard(sharded[0])
    fully_shard(sharded)
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(1))
    losses = []
    for model in (sharded, plain):
        optimizer = rk.RVSM(rk.param_groups(model, penalty="l0", lam=0.05, beta=1.0), lr=0.05)
        found = []

        def evaluate(model: nn.Module = model, found: list[float] = found) -> None:
            with torch.no_grad():
                found.append(model(x).square().mean().item())

        for epoch in range(4):
            for _ in range(2):
                optimizer.zero_grad()
                loss = model(x).square().mean()
                loss.backward()
                optimizer.step()
                found.append(loss.item())
            if epoch % 2:
                evaluate()
            with optimizer.sparse_weights(model if epoch < 2 else None):
                evaluate()
            evaluate()
        optimizer.sparsify_()
        evaluate()
        losses.append(found)
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=1e-6)
    assert abs(losses[1][2] - losses[1][3]) > 1e-3  # u is another network than w


def copies_of_u(folder: Path) -> None:
    """A state_dict of u has the ranks' shards; one rank's copy of the model would be a part only."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    model, plain = sharded_model(), model_of()
    optimizer, theirs = (rk.RVSM(rk.param_groups(m, penalty="l0", lam=0.05, beta=1.0), lr=0.05) for m in (model, plain))
    with pytest.raises(TypeError, match="sharded over ranks"):
        rk.sparse_copy(model, optimizer)
    before = wholes(model)
    state, wanted = rk.sparse_state_dict(model, optimizer), rk.sparse_state_dict(plain, theirs)
    assert (wanted["0.weight"] == 0).any()
    for name, value in state.items():
        assert same_bits(value.full_tensor(), wanted[name])
    with optimizer.sparse_weights(model):
        assert list(get_model_state_dict(model)) == list(state)
    assert all(same_bits(a, b) for a, b in zip(wholes(model), before, strict=True))


def with_fsdp(folder: Path) -> None:
    copies_of_u(folder)
    evaluate_with_fsdp(folder)
    train_with_fsdp(folder)


@pytest.mark.slow
def test_fsdp(tmp_path: Path, on_cpu: None) -> None:
    on_ranks(with_fsdp, 2, tmp_path)
