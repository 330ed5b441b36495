"""suggest: the options that it names give the zeros that were asked for, and a pull that closes what it promises."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import rvsm_kernels as rk


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(16 * 36, 20), nn.Linear(20, 10)
    )


@pytest.mark.parametrize("penalty", ["l0", "l1", "tl1"])
@pytest.mark.parametrize("cls", [rk.RVSM, rk.RVSMAdamW])
def test_an_optimizer(cls: type, penalty: str) -> None:
    optimizer = cls(rk.param_groups(model_of(), penalty=penalty, a=0.7), lr=0.02)
    before = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
    found = rk.suggest(optimizer, 0.9, steps=2_000)
    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == before
    assert len(found) == 1 and found[0].zeros == pytest.approx(0.9, abs=1e-3)
    assert found.apply() is optimizer.param_groups
    group = optimizer.param_groups[0]
    assert optimizer.sparsity().share == pytest.approx(0.9, abs=1e-3)
    assert 1 - (1 - group["lr"] * group["beta"]) ** 200 == pytest.approx(0.95)
    assert optimizer.param_groups[1]["penalty"] is None and optimizer.param_groups[1]["lam"] == before[1]["lam"]
    assert found.to_dict()[0]["lam"] == group["lam"] and found[0].cut > 0


def test_the_pull_closes_the_gap() -> None:
    """With no gradient to work against it; the first n steps close the share that was named."""
    w = nn.Parameter(torch.randn(1000) * 0.1)
    optimizer = rk.RVSM([w], lr=0.5, penalty="l0")
    found = rk.suggest(optimizer, 0.6, steps=400, within=0.25, closed=0.8)
    found.apply()
    small = w.detach().abs() <= found[0].cut
    before = w.detach().clone()
    for _ in range(100):
        w.grad = torch.zeros_like(w)
        optimizer.step()
    torch.testing.assert_close(w[small], 0.2 * before[small], rtol=1e-3, atol=1e-8)
    assert torch.equal(w[~small], before[~small]) and small.float().mean() == pytest.approx(0.6, abs=1e-3)


def test_a_model() -> None:
    model = model_of()
    found = rk.suggest(
        model, 0.8, steps=1_000, lr=0.1, penalty="l1", structure="in_channels", of="groups", scope="global"
    )
    optimizer = rk.RVSM(found.apply(), lr=0.1, momentum=0.9)
    assert optimizer.sparsity().group_share == pytest.approx(0.8, abs=0.01)
    assert optimizer.param_groups[0]["beta"] == pytest.approx((1 - 0.05**0.01) / 0.1)
    assert [name for g in optimizer.param_groups for name in g["param_names"]]
    topk = rk.suggest(model, 0.75, steps=10, lr=0.1, penalty="topk", scope="tensor")
    assert rk.RVSM(topk.apply(), lr=0.1).sparsity().share == pytest.approx(0.75, abs=0.01)
    assert topk[0].density == 0.25 and topk[0].cut is None and "density 0.25" in repr(topk)
    scaled = rk.suggest(model, 0.5, steps=10, lr=0.1, group_dim=0, group_scale=True, of="groups")
    assert scaled[0].cut is None and scaled[0].zeros == pytest.approx(0.5, abs=0.03)


def test_each_group_has_its_own_lr() -> None:
    weights = [nn.Parameter(torch.randn(40, 40)) for _ in range(3)]
    groups = [{"params": weights[:1], "lr": 0.1}, {"params": weights[1:2], "penalty": None}, {"params": weights[2:]}]
    optimizer = rk.RVSMWrapper(torch.optim.NAdam(groups, lr=0.01), penalty="l0")
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)  # begins at 0, as a warm-up does
    found = rk.suggest(optimizer, 0.5, steps=100)
    assert [row.group for row in found] == [0, 2] and [row.lr for row in found] == [0.1, 0.01]
    assert found[1].beta == pytest.approx(10 * found[0].beta) and found[0].lr * found[0].beta < 1
    assert (
        found[0].cut
        == pytest.approx(found[1].cut, rel=1e-3)
        == pytest.approx((2 * found[0].lam / found[0].beta) ** 0.5)
    )
    text = repr(found).splitlines()
    assert text[0].split()[:3] == ["group", "penalty", "lr"] and len(text) == 4
    assert "95% of a gap is closed within 10% of 100 steps" in text[-1]
    assert [row.lr for row in rk.suggest(optimizer, 0.5, steps=100, lr=0.4)] == [0.4, 0.4]


def test_options_in_tensors() -> None:
    w, lam, beta = nn.Parameter(torch.randn(30, 30)), torch.tensor(0.5), torch.tensor(2.0)
    optimizer = rk.RVSM([w], lr=torch.tensor(0.1), lam=lam, beta=beta)
    found = rk.suggest(optimizer, 0.5, steps=100)
    assert float(lam) == 0.5 and float(beta) == 2.0
    found.apply()
    assert optimizer.param_groups[0]["lam"] is lam and float(lam) == pytest.approx(found[0].lam)
    assert optimizer.sparsity().share == pytest.approx(0.5, abs=2e-3)


def test_few_steps_and_nothing_to_lose() -> None:
    found = rk.suggest(rk.RVSM(rk.param_groups(model_of()), lr=0.1), 0.0, steps=1)
    assert found[0].lr * found[0].beta == pytest.approx(0.95) and found[0].lam == found[0].zeros == 0


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"target": 1.0}, ValueError, "Invalid target"),
        ({"steps": 0}, ValueError, "Invalid steps"),
        ({"steps": 1.5}, ValueError, "Invalid steps"),
        ({"within": 0}, ValueError, "Invalid within"),
        ({"closed": 1.0}, ValueError, "Invalid closed"),
        ({"lr": 0.0}, ValueError, "Invalid lr"),
        ({"of": "channels"}, ValueError, "Invalid of"),
        ({"scope": "tensor"}, ValueError, "share one lam"),
        ({"penalty": "l1"}, TypeError, "suggest takes penalty for a model"),
    ],
)
def test_errors(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    optimizer = rk.RVSM(rk.param_groups(model_of(), lam=0.3, beta=0.7), lr=0.1)
    with pytest.raises(error, match=match):
        rk.suggest(optimizer, **{"target": 0.5, "steps": 10, **arguments})
    assert (optimizer.param_groups[0]["lam"], optimizer.param_groups[0]["beta"]) == (0.3, 0.7)


def test_other_errors() -> None:
    model = model_of()
    with pytest.raises(TypeError, match="needs the lr"):
        rk.suggest(model, 0.5, steps=10)
    with pytest.raises(TypeError, match="finds lam and beta; leave them out"):
        rk.suggest(model, 0.5, steps=10, lr=0.1, beta=1.0, lam=1.0)
    with pytest.raises(TypeError, match="no optimizer of rvsm_kernels"):
        rk.suggest(torch.optim.SGD(model.parameters()), 0.5, steps=10)
    with pytest.raises(ValueError, match="group 0: lr is 0, from which no beta follows"):
        rk.suggest(rk.RVSM(model.parameters(), lr=0.0), 0.5, steps=10)
