"""Loops of Accelerate, which need nothing of ours but ``rk.unwrap``; and what the package itself does not import."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import rvsm_kernels as rk
from runner import bits

accelerate = pytest.importorskip("accelerate")
from accelerate.optimizer import AcceleratedOptimizer  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("on_cpu")]
SPLIT: dict[str, Any] = {"penalty": "l0", "lam": 1.25e-3, "beta": 1.0}  # what is below 0.05 is zero
OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "SGD": lambda groups: rk.RVSM(groups, lr=0.1, momentum=0.9),
    "AdamW": lambda groups: rk.RVSMAdamW(groups, lr=0.05, method="rvsm-delayed"),
    "wrapper": lambda groups: rk.RVSMWrapper(torch.optim.NAdam(groups, lr=0.05), method="admm"),
}


@pytest.fixture(autouse=True)
def new_process() -> Iterator[None]:
    """Accelerate keeps the precision of the first Accelerator for the rest of the process."""
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


class Run:
    """Four batches, of which every second one is a step."""

    def __init__(self, make: Callable[[Any], Any], precision: str = "no", seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
        net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
        optimizer = make(rk.param_groups(net, **SPLIT))
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(2))
        batches = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), 8)
        self.model, self.optimizer, self.batches = self.accelerator.prepare(net, optimizer, batches)
        self.scheduler = self.accelerator.prepare(torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9))

    def train(self, epochs: int) -> None:
        for _ in range(epochs):
            for x, y in self.batches:
                with self.accelerator.accumulate(self.model):
                    self.accelerator.backward(nn.functional.cross_entropy(self.model(x), y))
                    if self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()

    def states(self) -> dict[str, Tensor]:
        """The bits of the weights, statistics and states of the optimizer."""
        found = {name: bits(p) for name, p in self.model.state_dict().items()}
        for i, of_p in self.optimizer.state_dict()["state"].items():
            found |= {f"{i} {name}": bits(v) for name, v in of_p.items() if isinstance(v, Tensor)}
        return found


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_resumes_bit_for_bit(tmp_path: Path, name: str, precision: str) -> None:
    straight = Run(OPTIMIZERS[name], precision)
    straight.train(3)
    ours = rk.unwrap(straight.optimizer)
    with ours.sparse_weights(straight.model):
        straight.model(torch.randn(4, 8))
    straight.accelerator.save_state(str(tmp_path))
    before = straight.states()
    straight.train(3)
    resumed = Run(OPTIMIZERS[name], precision, seed=1)
    resumed.accelerator.load_state(str(tmp_path))
    assert equal(resumed.states(), before)
    resumed.train(3)
    assert equal(straight.states(), resumed.states()) and not equal(straight.states(), before)
    assert 0 < rk.unwrap(resumed.optimizer).sparsity().share < 1


def test_it_steps_as_without() -> None:
    """The optimizer that is prepared does the steps of the optimizer inside, one for two batches."""
    run = Run(OPTIMIZERS["SGD"])
    assert isinstance(run.optimizer, AcceleratedOptimizer) and not hasattr(run.optimizer, "sparse_weights")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
    plain = OPTIMIZERS["SGD"](rk.param_groups(net, **SPLIT))
    batches = list(run.batches)
    for i, (x, y) in enumerate(batches):
        (nn.functional.cross_entropy(net(x), y) / 2).backward()
        if i % 2:
            nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            plain.step()
            plain.zero_grad()
    run.scheduler.scheduler.gamma = 1.0
    run.train(1)
    assert all(torch.equal(bits(p), bits(q)) for p, q in zip(net.parameters(), run.model.parameters(), strict=True))


def test_u_is_saved(tmp_path: Path) -> None:
    """``save_model()`` copies to a file, and so holds what the weights are at that moment."""
    load_file = pytest.importorskip("safetensors.torch").load_file
    run = Run(OPTIMIZERS["SGD"])
    run.train(3)
    before = run.states()
    ours = rk.unwrap(run.optimizer)
    with ours.sparse_weights(run.model):
        run.accelerator.save_model(run.model, str(tmp_path))
    assert equal(run.states(), before)
    saved = load_file(tmp_path / "model.safetensors")
    total = ours.sparsity().total
    assert sum(int((t == 0).sum()) for name, t in saved.items() if name in ("0.weight", "3.weight")) == total.zeros > 0


def test_statistics_of_u() -> None:
    """In the middle of a training, from a loader that is not prepared; the training is the same."""
    found = []
    for recalibrates in (False, True):
        run = Run(OPTIMIZERS["SGD"])
        run.train(2)
        norm, ours = run.model[1], rk.unwrap(run.optimizer)
        w = norm.running_mean.clone()
        loader = DataLoader(run.batches.dataset, 8) if recalibrates else None
        with ours.sparse_weights(run.model, recalibrate=loader, batches=2 if recalibrates else None):
            assert torch.equal(norm.running_mean, w) != recalibrates
        assert torch.equal(norm.running_mean, w)
        run.train(2)
        found.append(run.states())
    assert equal(*found)


@pytest.mark.parametrize("amp_scaling", [True, False])
def test_scaler(amp_scaling: bool) -> None:
    """Accelerate makes a GradScaler on a GPU only; its optimizer takes any. An infinite gradient changes nothing.

    Where the optimizer gets the scale, as torch's fused ones do, Accelerate does not see that a step was skipped.
    """
    accelerate.Accelerator(cpu=True)
    w = nn.Parameter(torch.ones(4, 4))
    optimizer = AcceleratedOptimizer(
        rk.RVSM([w], lr=0.1, amp_scaling=amp_scaling, **SPLIT), scaler=torch.amp.GradScaler("cpu", init_scale=4.0)
    )
    optimizer.scaler.scale(torch.zeros(()))
    w.grad = torch.full((4, 4), 4.0)
    optimizer.step()
    assert torch.allclose(w, torch.tensor(0.9)) and not optimizer.step_was_skipped
    w.grad = torch.full((4, 4), float("inf"))
    optimizer.step()
    assert torch.allclose(w, torch.tensor(0.9)) and optimizer.step_was_skipped != amp_scaling


def test_frameworks_are_imported_on_request_only() -> None:
    code = "import sys, rvsm_kernels, rvsm_kernels.integrations; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"transformers", "accelerate", "lightning"} & set(loaded) and "rvsm_kernels.integrations" in loaded
