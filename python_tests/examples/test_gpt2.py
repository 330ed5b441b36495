"""examples/gpt2.py under torchrun: two ranks over gloo, stopped, resumed on the same number of ranks and on another."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]


def torchrun(ranks: int, *arguments: str) -> str:
    """The output of the example on so many ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*command, "examples/gpt2.py", "--smoke", *arguments],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def numbers(output: str) -> dict[str, float]:
    """What the example prints of the trained model."""
    return {name: float(value) for name, value in re.findall(r"(\w+) (\d+\.\d+)", output)}


def of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(torch.load(folder / "sparse.pt"))


@pytest.mark.slow
def test_stop_and_resume(tmp_path: Path, on_cpu: None) -> None:
    straight = torchrun(2, "--out", str(tmp_path / "straight"))
    found = numbers(straight)
    assert found["bits_w"] < 6.5 and found["zeros"] > 0.3 and 0 < found["zero_neurons"] < 1, straight
    whole = of(tmp_path / "straight")
    weights = whole["transformer.h.0.attn.c_attn.weight"]
    assert 0.3 < (weights == 0).float().mean() < 1
    neurons = whole["transformer.h.1.mlp.c_fc.weight"]  # (inputs, neurons)
    assert (neurons == 0).all(dim=0).any()

    torchrun(2, "--out", str(tmp_path / "stopped"), "--stop-after", "20")
    torchrun(2, "--out", str(tmp_path / "stopped"), "--resume")
    resumed = of(tmp_path / "stopped")
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    # From the checkpoint of step 20 on one rank: the same, but for the order of some sums.
    (tmp_path / "stopped" / "newest").write_text("step-20\n")
    torchrun(1, "--out", str(tmp_path / "stopped"), "--resume")
    alone = of(tmp_path / "stopped")
    for name, value in whole.items():
        torch.testing.assert_close(alone[name], value, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("--offload",), ("--optimizer", "adamw")], ids=" ".join)
def test_other_ways(arguments: tuple[str, ...], on_cpu: None) -> None:
    assert "of the time is the optimizer's" in torchrun(2, *arguments)
