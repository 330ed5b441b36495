"""``python -m bench train --task targets``: what is asked for is got, and the table says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from . import cli, digits, report, targets_task, training


@pytest.mark.parametrize(
    "name", ["l0-0.9", *(pytest.param(name, marks=pytest.mark.slow) for name in ("topk-0.8", "channels-0.25"))]
)
def test_a_target(name: str) -> None:
    """Of a short training, whose accuracy says nothing."""
    method, target = targets_task.LEADS[name]
    row = targets_task.TASK.train(method, "reference", 0, digits.train_and_test(), {"epochs": 2})
    (end,) = row["curve"]
    assert end["got"] == pytest.approx(target.share, abs=0.01)
    assert 0 <= end["accuracy_u"] <= 1 and 0.3 < end["accuracy_made"] <= 1


@pytest.mark.slow
def test_command(tmp_path: Path) -> None:
    assert cli.main(["train", "--task", "targets", "--smoke", "--out", str(tmp_path), "--device", "cpu"]) == 0
    result = json.loads((tmp_path / "targets.json").read_text())
    assert result["complete"] and len(training.methods_of(result)) == len(targets_task.METHODS)
    table = report.render(tmp_path, "targets")
    assert "| RVSM l0 | 90% |" in table and "| RVSM l0 (input channels) | 25% |" in table
