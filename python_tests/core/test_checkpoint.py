"""Saving, loading, copying, and the promise that nothing about it, or about a second run, changes a bit."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from builds import generator, quick_in_all
from torch import nn

import rvsm_kernels as rk
from models import Small, backward, small, train
from runner import checked_step, same_bits

SPLITS: list[dict[str, Any]] = [
    {"penalty": "l0", "lam": 2e-3, "beta": 0.5},
    {"penalty": "tl1", "lam": 2e-2, "beta": 0.5, "a": 0.7},
    {"penalty": "l1", "lam": 5e-2, "beta": 0.5, "group_dim": 1, "group_scale": True, "group_lasso": 1e-3},
    {"penalty": "l0", "lam": 9e-2, "beta": 0.5, "group_dim": (0,), "decoupled": False},
]
BASE: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}


def pair(engine: str, split: dict[str, Any], seed: int = 0, **options: Any) -> tuple[Small, rk.RVSM]:
    """A model and its optimizer."""
    model = small(seed=seed)
    return model, rk.RVSM(rk.param_groups(model, **split), **{**BASE, **options}, engine=engine)


def assert_same(a: tuple[nn.Module, torch.optim.Optimizer], b: tuple[nn.Module, torch.optim.Optimizer]) -> None:
    """Bit for bit: weights, buffers, momentum."""
    for (name, x), y in zip(a[0].state_dict().items(), b[0].state_dict().values(), strict=True):
        assert torch.equal(x, y) if x.dtype == torch.int64 else same_bits(x, y), f"{name} differs"
    for (name, p), q in zip(a[0].named_parameters(), b[0].parameters(), strict=True):
        assert same_bits(a[1].state[p]["momentum_buffer"], b[1].state[q]["momentum_buffer"]), f"momentum of {name}"


# ---- bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_two_runs_are_bit_identical(engine: str, split: dict[str, Any]) -> None:
    runs = [pair(engine, split) for _ in range(2)]
    losses = [train(*run, range(8)) for run in runs]
    assert losses[0] == losses[1]
    assert_same(*runs)


@pytest.mark.parametrize(
    ("group_dim", "channels_last", "penalty"),
    [
        pytest.param(None, False, "tl1", id="elements"),
        pytest.param(None, False, "l0", id="elements, a count in penalty_value"),
        *(pytest.param(dims, False, "tl1", id=f"{dims}") for dims in (0, 1, (0, 1), ())),
        pytest.param((0, 1), True, "l0", id="(0, 1), channels-last"),
        *(pytest.param(dims, True, "l0", id=f"{dims}, channels-last", marks=pytest.mark.slow) for dims in (0, 1, ())),
    ],
)
def test_the_number_of_threads_changes_no_bit(
    on_cpu: None, native: str, threads: int, group_dim: Any, channels_last: bool, penalty: str
) -> None:
    """Tensors that are divided among threads, alone and many together; also what is read from the optimizer.

    Not the reference: where torch divides a tensor decides which elements it computes in vectors, and its vector sine
    is not its scalar one.
    """
    if channels_last and group_dim == (0, 1):
        group_dim = (1, 0, 2, 3)
    results = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        gen = generator(5)
        shapes = [(65, 33, 5, 5), (6, 5, 100, 100), (1, 1, 1, 1), (7, 3, 3, 3), (3, 4001, 3, 1)] + [(2, 3, 1, 1)] * 20
        params = [nn.Parameter(torch.randn(shape, generator=gen)) for shape in shapes]
        if channels_last:
            for p in params:
                p.data = p.data.to(memory_format=torch.channels_last)
        options: dict[str, Any] = {"group_dim": group_dim, "group_lasso": 0.0 if group_dim is None else 1e-3}
        options.update({"penalty": penalty, "lam": 0.2, "beta": 0.4, "group_scale": True})
        optimizer = rk.RVSM(params, **BASE, **options, engine=native)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=gen)
            optimizer.step()
        value = optimizer.penalty_value()
        with optimizer.sparse_weights():
            us = [p.detach().clone() for p in params]
        ms = [optimizer.state[p]["momentum_buffer"].clone() for p in params]
        results.append([*(p.detach().clone() for p in params), *us, *ms, value])
    for count, other in zip((2, 3, 7), results[1:], strict=True):
        for k, (x, y) in enumerate(zip(results[0], other, strict=True)):
            assert same_bits(x, y), f"{count} threads, tensor {k}: off by {(x - y).abs().max().item()}"


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_resume_from_a_file(engine: str, split: dict[str, Any], tmp_path: Path) -> None:
    """Through torch.load(weights_only=True) into an optimizer that was built with other numbers."""
    model, optimizer = pair(engine, split)
    train(model, optimizer, range(5))
    optimizer.param_groups[0]["lam"] *= 1.5
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    train(model, optimizer, range(5, 10))

    other, resumed = pair(engine, {**split, "lam": 1.0, "beta": 3.0}, seed=1, lr=7.0)
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    other.load_state_dict(checkpoint["model"])
    resumed.load_state_dict(checkpoint["optimizer"])
    train(other, resumed, range(5, 10))
    assert_same((model, optimizer), (other, resumed))
    for ours, theirs in zip(optimizer.param_groups, resumed.param_groups, strict=True):
        assert {k: v for k, v in ours.items() if k != "params"} == {k: v for k, v in theirs.items() if k != "params"}


def test_every_option_is_a_plain_value_of_the_group(engine: str) -> None:
    _, optimizer = pair(engine, SPLITS[2])
    options = "lr momentum dampening weight_decay nesterov maximize penalty lam beta a density group_dim group_scale"
    for group in optimizer.state_dict()["param_groups"]:
        assert set(f"{options} group_lasso decoupled method unit_norm".split()) <= set(group)
        for key, value in group.items():
            plain = value is None or isinstance(value, (bool, int, float, str, tuple, list))
            assert plain, f"{key} is a {type(value).__name__}"


def test_state_is_the_momentum_buffer_only(engine: str) -> None:
    """No memory beyond what torch.optim.SGD keeps, in the parameter's dtype and layout."""
    model, optimizer = pair(engine, SPLITS[2])
    model.to(memory_format=torch.channels_last)
    train(model, optimizer, range(2))
    for p in model.parameters():
        assert set(optimizer.state[p]) == {"momentum_buffer"}
        m = optimizer.state[p]["momentum_buffer"]
        assert (m.dtype, m.stride()) == (p.dtype, p.stride()) and not m.requires_grad
    plain = rk.RVSM(small().parameters(), lr=0.1, engine=engine)
    train(small(), plain, range(1))
    assert not any(plain.state.values())


@pytest.mark.parametrize("base", [{"lr": 0.05, "momentum": 0.9}, BASE, {"lr": 0.05, "momentum": 0.5, "dampening": 0.2}])
def test_checkpoints_of_sgd_load_and_go_on(engine: str, base: dict[str, Any]) -> None:
    """SGD -> RVSM(penalty=None) -> SGD in mid-training; the trajectory is SGD's own."""
    whole, first = small(), small()
    uninterrupted, sgd = (torch.optim.SGD(m.parameters(), **base) for m in (whole, first))
    train(whole, uninterrupted, range(12))

    train(first, sgd, range(4))
    second = copy.deepcopy(first)
    ours = rk.RVSM(second.parameters(), lr=9.0, penalty=None, engine=engine)
    ours.load_state_dict(copy.deepcopy(sgd.state_dict()))
    assert ours.param_groups[0]["momentum"] == base["momentum"] and ours.param_groups[0]["penalty"] is None
    for k in range(4, 8):
        backward(second, ours, k)
        checked_step(ours, f"step {k}")

    third = copy.deepcopy(second)
    again = torch.optim.SGD(third.parameters(), lr=9.0)
    again.load_state_dict(copy.deepcopy(ours.state_dict()))
    train(third, again, range(8, 12))
    for p, q in zip(whole.parameters(), third.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-4, atol=1e-6)
    for p, q in zip(whole.parameters(), third.parameters(), strict=True):
        m, n = uninterrupted.state[p]["momentum_buffer"], again.state[q]["momentum_buffer"]
        assert torch.allclose(m, n, rtol=1e-3, atol=1e-5)


@quick_in_all
def test_a_checkpoint_of_sgd_keeps_the_penalty_of_the_optimizer(engine: str) -> None:
    model = small()
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    train(model, sgd, range(2))
    split = {"penalty": "tl1", "lam": 1e-2, "beta": 0.3, "a": 2.0}  # of the group; the defaults are others
    ours = rk.RVSM([{"params": model.parameters(), **split}], lr=1.0, engine=engine)
    ours.load_state_dict(sgd.state_dict())
    group = ours.param_groups[0]
    assert [group[k] for k in ("lr", "momentum", "penalty", "lam", "beta", "a")] == [0.05, 0.9, "tl1", 1e-2, 0.3, 2.0]
    backward(model, ours, 2)
    checked_step(ours)


def test_a_checkpoint_of_sgd_without_momentum(engine: str) -> None:
    """SGD then stores nothing, or None."""
    model = small()
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    train(model, sgd, range(2))
    state = sgd.state_dict()
    state["state"] = {k: {"momentum_buffer": None} for k in range(len(list(model.parameters())))}
    ours = rk.RVSM(model.parameters(), lr=1.0, engine=engine)
    ours.load_state_dict(state)
    ours.param_groups[0]["momentum"] = 0.9
    for k in range(2):
        backward(model, ours, k)
        ours.step() if k else None
    for p in model.parameters():
        assert ours.state[p]["momentum_buffer"].shape == p.shape


@pytest.mark.parametrize("split", SPLITS)
def test_load_in_mid_training(engine: str, split: dict[str, Any]) -> None:
    """Going back to an earlier checkpoint repeats what followed it."""
    model, optimizer = pair(engine, split)
    train(model, optimizer, range(3))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(3, 6))
    once = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(copy.deepcopy(saved[1]))
    train(model, optimizer, range(3, 6))
    for x, y in zip(once[0].values(), model.state_dict().values(), strict=True):
        assert torch.equal(x, y)
    for k, state in optimizer.state_dict()["state"].items():
        assert same_bits(state["momentum_buffer"], once[1]["state"][k]["momentum_buffer"])


def test_load_of_an_invalid_checkpoint_changes_nothing(engine: str) -> None:
    model, optimizer = pair(engine, SPLITS[0])
    train(model, optimizer, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    for key, value, text in (("lam", -1.0, "-1"), ("penalty", "l7", "l7"), ("lr", float("nan"), "nan")):
        bad = copy.deepcopy(before)
        bad["param_groups"][1][key] = value
        bad["state"].clear()
        with pytest.raises(ValueError, match=text):
            optimizer.load_state_dict(bad)
        assert optimizer.state_dict()["param_groups"] == before["param_groups"]
        assert len(optimizer.state_dict()["state"]) == len(before["state"]) > 0
    bad = copy.deepcopy(before)
    bad["state"][1]["momentum_buffer"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"momentum_buffer for .* has shape \[3\]"):
        optimizer.load_state_dict(bad)
    fewer = {**before, "param_groups": before["param_groups"][:1]}
    with pytest.raises(ValueError, match="param"):
        optimizer.load_state_dict(fewer)
    backward(model, optimizer, 2)
    checked_step(optimizer)


@pytest.mark.parametrize("step", [-5.0, float("nan"), float("inf")])
def test_a_count_of_steps_that_cannot_be(step: float) -> None:
    model = small()
    optimizer = rk.RVSMAdamW(rk.param_groups(model, penalty="l0", lam=1e-4, beta=1.0), lr=1e-3)
    train(model, optimizer, range(1))
    bad = copy.deepcopy(optimizer.state_dict())
    bad["state"][0]["step"] = torch.tensor(step)
    with pytest.raises(ValueError, match="counts steps, from 0 on"):
        optimizer.load_state_dict(bad)
    train(model, optimizer, range(1, 2))
    assert optimizer.state[next(model.parameters())]["step"] == 2


# ---- copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("trained", [0, 3])
def test_copies_train_on_their_own(engine: str, how: str, trained: int) -> None:
    """A copy goes on bit for bit as the original does, and neither touches the other."""
    model, optimizer = pair(engine, SPLITS[2])
    train(model, optimizer, range(trained))
    original = (model, optimizer)
    duplicate = copy.deepcopy(original) if how == "deepcopy" else pickle.loads(pickle.dumps(original))
    before = [p.detach().clone() for p in duplicate[0].parameters()]
    train(*original, range(trained, trained + 3))
    for p, w in zip(duplicate[0].parameters(), before, strict=True):
        assert same_bits(p, w), "the original writes into its copy"
    train(*duplicate, range(trained, trained + 3))
    assert_same(original, duplicate)


def test_copies_inside_sparse_weights_are_refused(engine: str) -> None:
    """The weights that must come back would be lost."""
    _, optimizer = pair(engine, SPLITS[0])
    with optimizer.sparse_weights():
        with pytest.raises(RuntimeError, match="sparse_weights"):
            pickle.dumps(optimizer)
        with pytest.raises(RuntimeError, match="sparse_weights"):
            optimizer.load_state_dict(optimizer.state_dict())
