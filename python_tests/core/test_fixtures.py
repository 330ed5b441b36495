"""Checkpoints and pickled optimizers of earlier code load and go on."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from builds import DEVICE
from tools import checkpoints, releases
from torch import Tensor, nn

import rvsm_kernels as rk
from runner import same_bits


def resumed(method: str, engine: str) -> tuple[torch.optim.Optimizer, dict[str, Any]]:
    """An optimizer that took the checkpoint's further steps, and the checkpoint."""
    saved = torch.load(checkpoints.FIXTURES / f"checkpoint_{method}.pt", weights_only=True, map_location=DEVICE)
    params = [[nn.Parameter(w) for w in group] for group in saved["params"]]
    optimizer = checkpoints.make(params, method, engine)
    optimizer.load_state_dict(saved["state_dict"])
    for grads in saved["grads"]:
        checkpoints.step(optimizer, grads)
    return optimizer, saved


def pairs(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> list[tuple[str, Tensor, Tensor]]:
    """(what it is, a tensor of the optimizer, the recorded one)."""
    found = []
    got, state = checkpoints.values(optimizer), checkpoints.states(optimizer)
    for i, group in enumerate(saved["expected_params"]):
        for j, want in enumerate(group):
            found.append((f"parameter {j} of group {i}", got[i][j], want))
            assert state[i][j].keys() == saved["expected_state"][i][j].keys()
            for key, kept in saved["expected_state"][i][j].items():
                found.append((f"{key} of parameter {j} of group {i}", state[i][j][key], kept))
    return found


@pytest.mark.parametrize("method", checkpoints.METHODS)
def test_training_goes_on_from_a_checkpoint(method: str, engine: str, request: pytest.FixtureRequest) -> None:
    optimizer, saved = resumed(method, engine)
    found = pairs(optimizer, saved)
    names = {"rvsm": set(), "rvsm-delayed": {"u"}, "admm": {"dual"}}[method] | {"momentum_buffer"}
    assert {what.split(" of ")[0] for what, _, _ in found if not what.startswith("parameter")} == names
    exact = request.node.callspec.params["engine"] == "native" and DEVICE == "cpu"
    for what, got, want in found:
        if exact:
            assert same_bits(got, want), what
        else:
            torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6, msg=lambda text, w=what: f"{w}: {text}")


@pytest.mark.parametrize("method", checkpoints.METHODS)
def test_what_a_checkpoint_holds_decides_the_steps_after_it(method: str, engine: str) -> None:
    """Without the state_dict the steps end elsewhere: the test above cannot pass by chance."""
    _, saved = resumed(method, engine)
    optimizer = checkpoints.make([[nn.Parameter(w) for w in group] for group in saved["params"]], method, engine)
    for grads in saved["grads"]:
        checkpoints.step(optimizer, grads)
    for got, want in zip(checkpoints.values(optimizer), saved["expected_params"], strict=True):
        assert not any(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("name", ["optimizer_0_1_0", "optimizer_after_0_1_0"])
def test_a_pickled_optimizer_loads_and_steps_as_one_that_loads_its_state_dict(name: str, on_cpu: None) -> None:
    loaded = pickle.loads((checkpoints.FIXTURES / f"{name}.pkl").read_bytes())
    assert type(loaded).__name__ == "RVSM"
    assert [group["penalty"] for group in loaded.param_groups] == ["l1", "tl1"]
    assert [group["group_dim"] for group in loaded.param_groups] == [None, 1]
    assert loaded._step_supports_amp_scaling is (name == "optimizer_0_1_0")  # torch's GradScaler asks for it
    params = [[nn.Parameter(w) for w in group] for group in checkpoints.values(loaded)]
    other = checkpoints.make(params, "admm", None)
    other.load_state_dict(checkpoints.clone(loaded.state_dict()))
    before = checkpoints.values(loaded)
    kept = checkpoints.states(loaded)
    assert all(set(s) == {"momentum_buffer", "dual"} and s["dual"].any() for group in kept for s in group)
    gen = torch.Generator().manual_seed(3)
    for _ in range(2):
        grads = [[torch.randn(w.shape, generator=gen) for w in group] for group in before]
        checkpoints.step(loaded, grads)
        checkpoints.step(other, grads)
    for got, want, old in zip(checkpoints.values(loaded), checkpoints.values(other), before, strict=True):
        for a, b, w in zip(got, want, old, strict=True):
            assert same_bits(a, b)
            assert not same_bits(a, w)
    for got, want in zip(checkpoints.states(loaded), checkpoints.states(other), strict=True):
        for a, b in zip(got, want, strict=True):
            assert a.keys() == b.keys() and all(same_bits(a[key], b[key]) for key in a)


RELEASES = sorted(checkpoints.FIXTURES.glob("release_*.pt"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", releases.KINDS)
@pytest.mark.parametrize("path", RELEASES, ids=lambda path: path.stem)
def test_what_a_release_saved_loads_and_goes_on(path: Path, kind: str, on_cpu: None) -> None:
    """Bit for bit, without a pickle."""
    file = torch.load(path, weights_only=True)[kind]
    optimizer = releases.resumed(kind, file)
    assert any(saved.keys() for group in file["expected_state"] for saved in group)
    for got, want in zip(checkpoints.values(optimizer), file["expected"], strict=True):
        assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))
    for got, want in zip(checkpoints.states(optimizer), file["expected_state"], strict=True):
        for a, b in zip(got, want, strict=True):
            assert a.keys() == b.keys() and all(same_bits(a[key], b[key]) for key in b)
    # It could not pass by chance: without the states the steps end elsewhere.
    empty = {**file, "optimizer": {**file["optimizer"], "state": {}}}
    ends = checkpoints.values(releases.resumed(kind, empty))
    assert not all(
        same_bits(a, b) for x, y in zip(ends, file["expected"], strict=True) for a, b in zip(x, y, strict=True)
    )


def test_this_release_is_among_them() -> None:
    assert f"release_{rk.__version__.replace('.', '_')}" in [path.stem for path in RELEASES]
