"""examples/shipped.py: files of trained networks, read back and tested."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import shipped
import torch

from deep import data
from deep.loop import Training
from deep.settings import Settings

DIGITS = Settings(model="lenet5", method="rvsm", penalty="l0", lam=2e-3, beta=1.0, epochs=2, lr=0.05)


def test_what_comes_out_of_the_files(tmp_path: Path) -> None:
    """u comes back with its accuracy, smaller by its zeros, and in int8 four times smaller again or nearly so."""
    training = Training(DIGITS, data.load("digits"))
    for _ in range(2):
        training.train_epoch()
    measured = training.measure(training.test_images)
    rows = {row["form"]: row for row in shipped.shipped(training, tmp_path)}
    assert set(rows) >= {"w, dense", "w, dense, int8", "u", "u, int8"}
    assert rows["w, dense"]["accuracy"] == measured["accuracy_w"] and rows["u"]["accuracy"] == measured["accuracy_u"]
    assert measured["u"]["zeros"] > 0.5
    assert rows["u"]["bytes"] < 0.7 * rows["w, dense"]["bytes"]
    assert rows["u, int8"]["bytes"] < 0.55 * rows["u"]["bytes"]
    assert abs(rows["u, int8"]["accuracy"] - rows["u"]["accuracy"]) < 0.05


def test_zero_channels_leave(tmp_path: Path) -> None:
    training = Training(replace(DIGITS, method="rgsm", penalty="l1", lam=0.1), data.load("digits"))
    with torch.no_grad():  # conv2 lets go of two channels of conv1, whose filters go
        weight = next(w for w in training.model.parameters() if w.dim() == 4 and w.shape[1] > 1)
        weight[:, :2] = 0
    rows = {row["form"]: row for row in shipped.shipped(training, tmp_path)}
    whole, less = rows["u"], rows["u without zero channels"]
    assert less["parameters"] < whole["parameters"] and less["bytes"] < whole["bytes"]
    assert less["accuracy"] == whole["accuracy"]


def test_the_smoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shipped, "BUILD", tmp_path)
    small = tuple(replace(run, settings=replace(run.settings, data="digits")) for run in shipped.RUNS[1:2])
    monkeypatch.setattr(shipped, "RUNS", small)
    shipped.main(["--smoke"])
    assert "| u, int8 |" in capsys.readouterr().out
    rows = json.loads((tmp_path / "smoke" / "shipped" / "shipped.json").read_text())["rows"]
    assert [row["label"] for row in rows] == ["LeNet-5, RVSM ℓ0"]
    with pytest.raises(SystemExit):
        shipped.main(["--smoke", "--record"])
