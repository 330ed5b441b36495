"""RVSMWrapper around the optimizers of other libraries; those that are not installed are skipped."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import rvsm_kernels as rk
from runner import bits

pytestmark = pytest.mark.usefixtures("on_cpu")
SPLIT: dict[str, Any] = {"penalty": "l0", "lam": 2e-4, "beta": 0.5}
OPTIMIZERS: dict[str, tuple[str, Callable[[Any, Any], torch.optim.Optimizer]]] = {
    "bnb Adam8bit": ("bitsandbytes", lambda lib, params: lib.optim.Adam8bit(params, lr=0.01)),
    "bnb AdamW": ("bitsandbytes", lambda lib, params: lib.optim.AdamW(params, lr=0.01)),
    "bnb Lion8bit": ("bitsandbytes", lambda lib, params: lib.optim.Lion8bit(params, lr=0.01)),
    "ao AdamW8bit": ("torchao.optim", lambda lib, params: lib.AdamW8bit(params, lr=0.01)),
    "ao AdamW4bit": ("torchao.optim", lambda lib, params: lib.AdamW4bit(params, lr=0.01)),
    "ao AdamWFp8": ("torchao.optim", lambda lib, params: lib.AdamWFp8(params, lr=0.01)),
    "SGDScheduleFree": ("schedulefree", lambda lib, params: lib.SGDScheduleFree(params, lr=0.1)),
    "AdamWScheduleFree": ("schedulefree", lambda lib, params: lib.AdamWScheduleFree(params, lr=0.01, warmup_steps=4)),
    "RAdamScheduleFree": ("schedulefree", lambda lib, params: lib.RAdamScheduleFree(params, lr=0.01)),
}
FREE = [name for name, (library, _) in OPTIMIZERS.items() if library == "schedulefree"]


def make(name: str, model: nn.Module) -> torch.optim.Optimizer:
    library, of = OPTIMIZERS[name]
    return of(pytest.importorskip(library), model.parameters())


def model_of() -> nn.Module:
    """Large enough for states of eight bits."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64, bias=False), nn.Tanh(), nn.Linear(64, 64))


def give_gradients(model: nn.Module, optimizer: Any, step: int) -> None:
    if hasattr(optimizer, "train"):
        optimizer.train()
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(step))
    optimizer.zero_grad()
    (model(x) - x.sign()).square().mean().backward()


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        give_gradients(model, optimizer, step)
        optimizer.step()


def apart(a: nn.Module, b: nn.Module) -> float:
    return max(float((p - q).detach().abs().max()) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# ---- every library ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("options", [{}, {"method": "admm", "decoupled": False}], ids=["rvsm", "admm"])
def test_it_resumes_bit_for_bit(name: str, options: dict[str, Any]) -> None:
    """Through a file, 20 and 20 steps are 40."""
    straight, first = model_of(), model_of()
    train(straight, rk.RVSMWrapper(make(name, straight), **SPLIT, **options), range(40))
    optimizer = rk.RVSMWrapper(make(name, first), **SPLIT, **options)
    train(first, optimizer, range(20))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    second = model_of()
    second.load_state_dict(first.state_dict())
    resumed = rk.RVSMWrapper(make(name, second))
    resumed.load_state_dict(torch.load(file, weights_only=True))
    train(second, resumed, range(20, 40))
    assert apart(straight, second) == 0 and apart(straight, first) > 0


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("decoupled", [True, False])
def test_the_pull_then_the_step(name: str, decoupled: bool) -> None:
    """Against the splitting by hand in front of the library's step; without a penalty it is the step alone."""
    for penalty in (None, "l0"):
        ours, theirs = model_of(), model_of()
        plain = make(name, theirs)
        optimizer = rk.RVSMWrapper(make(name, ours), **{**SPLIT, "penalty": penalty}, decoupled=decoupled)
        for step in range(5):
            train(ours, optimizer, range(step, step + 1))
            give_gradients(theirs, plain, step)
            lr = float(plain.param_groups[0]["lr"])
            for p in theirs.parameters() if penalty else ():
                with torch.no_grad():
                    gap = p - rk.prox(p.detach(), "l0", SPLIT["lam"] / SPLIT["beta"])
                    if decoupled:
                        p.sub_(gap, alpha=lr * SPLIT["beta"])
                    elif p.grad is not None:
                        p.grad.add_(gap, alpha=SPLIT["beta"])
            plain.step()
        # An element within a rounding of the cut may fall to the other side, and quantised states round it up.
        differs = [(p - q).abs() > 1e-5 for p, q in zip(ours.parameters(), theirs.parameters(), strict=True)]
        assert apart(ours, theirs) == 0 if penalty is None else sum(int(d.sum()) for d in differs) <= 8
        assert apart(ours, model_of()) > 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_u(name: str) -> None:
    model = model_of()
    optimizer = rk.RVSMWrapper(make(name, model), **{**SPLIT, "decoupled": False})
    train(model, optimizer, range(20))
    if hasattr(optimizer, "eval"):
        optimizer.eval()
    before = [bits(p) for p in model.parameters()]
    with optimizer.sparse_weights():
        zeros = sum(int((p == 0).sum()) for p in model.parameters())
    assert all(torch.equal(bits(p), b) for p, b in zip(model.parameters(), before, strict=True))
    total = optimizer.sparsity().total
    assert 0 < zeros == total.zeros < total.numel and optimizer.penalty_value() > 0
    optimizer.sparsify_()
    assert sum(int((p == 0).sum()) for p in model.parameters()) == zeros
    train(model, optimizer, range(20, 22))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_schedulers_and_scalers(name: str) -> None:
    """The library's step sees the scheduled rate; a step with an infinite gradient does nothing."""
    model = model_of()
    optimizer = rk.RVSMWrapper(make(name, model), **SPLIT)
    lr = float(optimizer.param_groups[0]["lr"])
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    for step in range(2):
        train(model, optimizer, range(step, step + 1))
        scheduler.step()
    assert float(optimizer.optimizer.param_groups[0]["lr"]) == pytest.approx(lr / 2)
    before, state = copy.deepcopy(model), len(optimizer.state)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    for p in model.parameters():
        p.grad = torch.full_like(p, float("inf"))
    scaler.step(optimizer)
    scaler.update()
    assert apart(before, model) == 0 and len(optimizer.state) == state
    extra = nn.Parameter(torch.ones(3, 3))
    optimizer.add_param_group({"params": [extra], "penalty": None})
    train(model, optimizer, range(2, 3))
    assert apart(before, model) > 0


# ---- schedulefree ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FREE)
def test_copies(name: str) -> None:
    """The other libraries keep attributes that torch.optim's copies leave behind, with and without the wrapper."""
    model = model_of()
    optimizer = rk.RVSMWrapper(make(name, model), **SPLIT, method="admm")
    train(model, optimizer, range(3))
    twin, other = copy.deepcopy((model, optimizer))
    train(model, optimizer, range(3, 6))
    before = copy.deepcopy(twin)
    train(twin, other, range(3, 6))
    assert apart(model, twin) == 0 and apart(before, twin) > 0


@pytest.mark.parametrize("name", FREE)
def test_modes(name: str) -> None:
    """train() and eval() are those of the library; what would mix u into the weights is refused."""
    model = model_of()
    optimizer = rk.RVSMWrapper(make(name, model), **SPLIT, decoupled=False)
    train(model, optimizer, range(9))  # RAdam's y and x are the same for the first five
    y = copy.deepcopy(model)
    with optimizer.sparse_weights():
        optimizer.train()
        with pytest.raises(RuntimeError, match=r"eval\(\) inside sparse_weights\(\)"):
            optimizer.eval()
    assert apart(model, y) == 0 and optimizer.param_groups[0]["train_mode"]
    optimizer.eval()
    x = copy.deepcopy(model)
    assert apart(x, y) > 0
    with pytest.raises(RuntimeError, match=rf"eval mode, where {name} holds averaged weights"):
        optimizer.step()
    with optimizer.sparse_weights():
        optimizer.eval()
        with pytest.raises(RuntimeError, match=r"train\(\) inside sparse_weights\(\)"):
            optimizer.train()
    assert apart(model, x) == 0
    optimizer.train()
    assert apart(model, y) < 1e-6


def test_coupled_terms_move_both_points() -> None:
    """Coupled, the shipped average is sparse and fits; decoupled, z pulls it back, and a warning says so."""

    def error_and_sparsity(decoupled: bool) -> tuple[float, int]:
        gen = torch.Generator().manual_seed(0)
        x = torch.randn(256, 40, generator=gen)
        truth = torch.cat([torch.randn(6, generator=gen) * 2, torch.zeros(34)])
        y = x @ truth
        w = nn.Parameter(torch.zeros(40))
        free = pytest.importorskip("schedulefree").SGDScheduleFree([w], lr=0.05)
        optimizer = rk.RVSMWrapper(free, penalty="l1", lam=0.2, beta=5.0, decoupled=decoupled)
        optimizer.train()
        for _ in range(300):
            optimizer.zero_grad()
            (x @ w - y).square().mean().backward()
            optimizer.step()
        optimizer.eval()
        with optimizer.sparse_weights():
            return float((x @ w - y).detach().square().mean()), int((w == 0).sum())

    error, zeros = error_and_sparsity(False)
    assert zeros == 34 and error < 0.2
    with pytest.warns(UserWarning, match="decoupled=False, which moves both"):
        worse, _ = error_and_sparsity(True)
    assert worse > 5 * error
