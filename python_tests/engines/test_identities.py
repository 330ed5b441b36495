"""What the step is in terms of torch.optim.SGD (docs/method.md, section 3), and one engine in terms of another."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from builds import generator, on_device
from torch import Tensor, nn

import definition
import rvsm_kernels as rk
from models import backward, small, train
from runner import check_u, real
from tolerances import ARITHMETIC, SAME_LOSS, STEP

BASES: dict[str, dict[str, Any]] = {
    "plain": {"lr": 0.1},
    "decay": {"lr": 0.1, "weight_decay": 0.01},
    "momentum": {"lr": 0.05, "momentum": 0.9},
    "nesterov": {"lr": 0.05, "momentum": 0.9, "nesterov": True},
    "nesterov, decay": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
    "dampening": {"lr": 0.05, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.01},
    "maximize": {"lr": 0.02, "momentum": 0.9, "maximize": True},
    "maximize, decay": {"lr": 0.02, "momentum": 0.9, "maximize": True, "nesterov": True, "weight_decay": 0.01},
}
SPLITS: dict[str, dict[str, Any]] = {
    "l0": {"penalty": "l0", "lam": 2e-3, "beta": 0.5},
    "l1": {"penalty": "l1", "lam": 2e-2, "beta": 0.5},
    "tl1": {"penalty": "tl1", "lam": 1e-2, "beta": 0.5, "a": 0.7},
    "rows": {"penalty": "l0", "lam": 9e-2, "beta": 0.5, "group_dim": 0},
    "columns": {"penalty": "tl1", "lam": 1e-2, "beta": 0.5, "a": 3.0, "group_dim": 1, "group_scale": True},
}
FULL = "nesterov, decay"
"""The base with the most addends."""
SHAPES = [(37,), (9, 21), (6, 5, 3, 3)]


class Pair:
    """The same parameters twice, and gradients that depend on the weights as those of a smooth loss do."""

    def __init__(self, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> None:
        gen = generator(11)
        self.gen, self.dtype = gen, dtype
        self.ours = [nn.Parameter((torch.randn(s, generator=gen, dtype=torch.float64) * 0.1).to(dtype)) for s in shapes]
        self.theirs = copy.deepcopy(self.ours)
        self.targets = [torch.randn(s, generator=gen, dtype=torch.float64).to(dtype) * 0.1 for s in shapes]

    def set_gradients(self) -> None:
        """The gradient of a noisy quadratic at our weights, for both."""
        for p, q, target in zip(self.ours, self.theirs, self.targets, strict=True):
            noise = torch.randn(p.shape, generator=self.gen, dtype=torch.float64).to(self.dtype)
            p.grad = p.detach() - target + 0.1 * noise
            q.grad = p.grad.clone()

    def align(self, ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> None:
        """Give their copy our weights and momentum."""
        with torch.no_grad():
            for p, q in zip(self.ours, self.theirs, strict=True):
                q.copy_(p)
                if "momentum_buffer" in ours.state[p]:
                    theirs.state[q]["momentum_buffer"] = ours.state[p]["momentum_buffer"].clone()

    def compare(
        self, ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer, scale: list[Tensor], what: str
    ) -> None:
        """Weights and momentum within the bound of a step; both sides may use it up."""
        share = 2 * STEP[ARITHMETIC[self.dtype]]
        for p, q, s in zip(self.ours, self.theirs, scale, strict=True):
            assert ((p - q).abs() <= share * s).all(), f"{what}: weights differ by {(p - q).abs().max().item()}"
            m, n = (o.state[x].get("momentum_buffer") for o, x in ((ours, p), (theirs, q)))
            assert (m is None) == (n is None)
            if m is not None and n is not None:
                assert ((m - n).abs() <= share * s / min(1.0, ours.param_groups[0]["lr"])).all(), f"{what}: momentum"


def u_of(p: Tensor, split: dict[str, Any]) -> Tensor:
    """prox(w) by the definition."""
    group = {"a": 1.0, "group_dim": None, "group_scale": False, **split}
    tau = definition.step_tau(group, p.shape)
    assert tau is not None
    u = definition.prox(real(p), group["penalty"], tau, group["a"], definition.groups_of(group))
    return on_device(u.astype(np.float64)).to(p.dtype)


each_split = pytest.mark.parametrize(
    ("split", "dtype"),
    [
        *(pytest.param(split, torch.float32, id=key) for key, split in SPLITS.items()),
        pytest.param(SPLITS["tl1"], torch.float64, id="tl1 in double precision"),
        pytest.param(SPLITS["rows"], torch.float64, id="rows in double precision"),
    ],
)


@pytest.mark.parametrize(
    ("base", "split", "dtype"),
    [
        # Where each addend of the step goes, then each kind of pull.
        *(pytest.param(BASES[key], SPLITS["l0"], torch.float32, id=key) for key in BASES),
        *(pytest.param(BASES[FULL], SPLITS[key], torch.float32, id=key) for key in SPLITS if key != "l0"),
        pytest.param(BASES[FULL], SPLITS["tl1"], torch.float64, id="tl1 in double precision"),
        pytest.param(BASES[FULL], SPLITS["rows"], torch.float64, id="rows in double precision"),
    ],
)
@pytest.mark.parametrize("decoupled", [True, False], ids=["decoupled", "coupled"])
def test_a_step_is_a_pull_and_sgd(
    engine: str, dtype: torch.dtype, base: dict[str, Any], split: dict[str, Any], decoupled: bool
) -> None:
    """decoupled: w -= lr beta (w - u), then SGD.step(). Else: grad += beta (w - u), then SGD.step()."""
    pair = Pair(SHAPES[1:] if "group_dim" in split else SHAPES, dtype)
    ours = rk.RVSM(pair.ours, **base, **split, decoupled=decoupled, engine=engine)
    theirs = torch.optim.SGD(pair.theirs, **base)
    for k in range(4):
        pair.set_gradients()
        pulls = [p.detach() - u_of(p, split) for p in pair.ours]
        scale = []
        with torch.no_grad():
            for q, pull in zip(pair.theirs, pulls, strict=True):
                m = theirs.state[q].get("momentum_buffer", torch.zeros(()))
                assert q.grad is not None
                scale.append(q.abs() + base["lr"] * 2 * (q.grad.abs() + q.abs() + m.abs()))
                if decoupled:
                    q -= base["lr"] * split["beta"] * pull
                else:
                    # Under maximize SGD turns all of its gradient around, and the pull keeps its sign.
                    q.grad += split["beta"] * (-pull if base.get("maximize") else pull)
        ours.step()
        theirs.step()
        pair.compare(ours, theirs, scale, f"step {k}")
        pair.align(ours, theirs)


@pytest.mark.parametrize(
    ("base", "off", "dtype"),
    [
        *(pytest.param(BASES[key], {"penalty": None}, torch.float32, id=key) for key in BASES),
        pytest.param(BASES[FULL], {"penalty": "l0", "lam": 0.0}, torch.float32, id="lam 0"),
        pytest.param(BASES[FULL], {"penalty": "tl1", "beta": 0.0}, torch.float32, id="beta 0"),
        pytest.param(BASES[FULL], {"penalty": None}, torch.float64, id="double precision"),
    ],
)
def test_without_a_splitting_it_is_sgd(
    engine: str, dtype: torch.dtype, base: dict[str, Any], off: dict[str, Any]
) -> None:
    """Sixty steps on their own, on a problem that forgets: rounding errors do not add up to more than a few."""
    pair = Pair(SHAPES, dtype)
    ours, theirs = rk.RVSM(pair.ours, **base, **off, engine=engine), torch.optim.SGD(pair.theirs, **base)
    steps = 5 if base.get("maximize") else 60
    for k in range(steps):
        pair.set_gradients()
        ours.step()
        theirs.step()
        share = (k + 1) * STEP[ARITHMETIC[dtype]]
        for p, q in zip(pair.ours, pair.theirs, strict=True):
            assert p.grad is not None
            scale = 1 + p.abs() + p.grad.abs()
            assert ((p - q).abs() <= share * scale).all(), f"step {k}: {(p - q).abs().max().item()}"


# ---- engines among themselves ----------------------------------------------------------------------------------------

TRAINING: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}


@each_split
def test_engines_agree_step_by_step(native: str, dtype: torch.dtype, split: dict[str, Any]) -> None:
    """A model in training on the native engine; the reference repeats each step from the same weights and momentum."""
    model, other = small(dtype), small(dtype)
    ours, theirs = (
        rk.RVSM(rk.param_groups(m, **split), **TRAINING, engine=e) for m, e in ((model, native), (other, "reference"))
    )
    share = 2 * STEP[ARITHMETIC[dtype]]
    for k in range(15):
        other.load_state_dict(model.state_dict())
        theirs.load_state_dict(copy.deepcopy(ours.state_dict()))  # torch shares the tensors of what it loads
        backward(model, ours, k)
        old = {}
        for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
            assert p.grad is not None
            q.grad = p.grad.clone()
            m = ours.state[p].get("momentum_buffer", torch.zeros(()))
            old[name] = p.detach().abs() + 0.05 * 2 * (p.grad.abs() + p.detach().abs() + m.abs())
        ours.step()
        theirs.step()
        for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
            assert ((p - q).abs() <= share * old[name]).all(), f"step {k}, {name}"
    for optimizer in (ours, theirs):
        with optimizer.sparse_weights():
            us = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
        for p, u in zip(optimizer.param_groups[0]["params"], us, strict=True):
            check_u(u, real(p), optimizer.param_groups[0])


@pytest.mark.slow
@each_split
def test_engines_train_to_the_same_loss(native: str, dtype: torch.dtype, split: dict[str, Any]) -> None:
    """Three hundred steps, each engine on its own."""
    losses = {}
    for engine in (native, "reference"):
        model = nn.Sequential(nn.Flatten(), nn.Linear(108, 24), nn.Tanh(), nn.Linear(24, 4)).to(dtype)
        with torch.no_grad():
            for k, p in enumerate(model.parameters()):
                p.copy_(torch.randn(p.shape, generator=generator(k)) * 0.1)
        optimizer = rk.RVSM(rk.param_groups(model, **split), lr=0.02, momentum=0.5, weight_decay=5e-4, engine=engine)
        losses[engine] = train(model, optimizer, range(300))
        assert 0 < optimizer.sparsity().share < 1
    last = {engine: float(np.mean(values[-20:])) for engine, values in losses.items()}
    assert last["reference"] < 0.7 * losses["reference"][0], "the problem is not trained at all"
    assert abs(last[native] - last["reference"]) <= SAME_LOSS[dtype] * last["reference"], last
