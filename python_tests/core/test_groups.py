"""rk.param_groups: which weights of a model are penalised, along which dimension, and what is left dense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import rvsm_kernels as rk
from models import small


class Zoo(nn.Module):
    """Modules of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(2, 3, 3)
        self.conv2 = nn.Conv2d(3, 4, 3, bias=False)
        self.conv3 = nn.Conv3d(2, 2, 1)
        self.up1 = nn.ConvTranspose1d(2, 3, 2)
        self.up2 = nn.ConvTranspose2d(3, 5, 2)
        self.linear = nn.Linear(4, 6)
        self.embedding = nn.Embedding(10, 4)
        self.norm = nn.LayerNorm([4, 6])
        self.free = nn.Parameter(torch.ones(3, 3))


PENALISED = ["conv1.weight", "conv2.weight", "conv3.weight", "up1.weight", "up2.weight", "linear.weight"]


def names(group: dict[str, Any]) -> list[str]:
    """The names in a group."""
    return [name for name, _ in group["params"]]


def assert_complete(model: nn.Module, groups: list[dict[str, Any]]) -> None:
    """Every parameter of the model exactly once, under its own name."""
    own = dict(model.named_parameters())
    found = [(name, p) for group in groups for name, p in group["params"]]
    assert sorted(name for name, _ in found) == sorted(own)
    assert all(own[name] is p for name, p in found)


def test_penalised_and_dense() -> None:
    model = Zoo()
    groups = rk.param_groups(model, penalty="tl1", lam=1e-3, beta=0.2, a=3.0, lr=0.7)
    assert_complete(model, groups)
    assert [names(g) for g in groups[:-1]] == [PENALISED]
    assert {k: v for k, v in groups[0].items() if k != "params"} == {
        **{"penalty": "tl1", "lam": 1e-3, "beta": 0.2, "a": 3.0, "lr": 0.7}
    }
    assert groups[-1]["penalty"] is None and "lam" not in groups[-1]
    assert {"embedding.weight", "norm.weight", "free", "linear.bias"} <= set(names(groups[-1]))
    optimizer = rk.RVSM(groups, lr=0.1, momentum=0.9)
    assert [g["lr"] for g in optimizer.param_groups] == [0.7, 0.1]
    assert optimizer.param_groups[0]["param_names"] == PENALISED
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


@pytest.mark.parametrize(
    ("structure", "plain", "transposed"),
    [("in_channels", 1, 0), ("out_channels", 0, 1), ("kernels", (0, 1), (0, 1)), ("layers", (), ())],
)
def test_structures(structure: str, plain: Any, transposed: Any) -> None:
    """A transposed convolution has its input channels in dimension 0."""
    model = Zoo()
    groups = rk.param_groups(model, structure=structure, lam=1e-2)
    assert_complete(model, groups)
    dims = {name: g["group_dim"] for g in groups[:-1] for name in names(g)}
    assert sorted(dims) == sorted(PENALISED)
    assert {n: d for n, d in dims.items() if n.startswith("up")} == {"up1.weight": transposed, "up2.weight": transposed}
    assert all(d == plain for n, d in dims.items() if not n.startswith("up"))
    assert all(g["lam"] == 1e-2 for g in groups[:-1])
    assert groups[-1]["group_dim"] is None
    counts = {r.name: r.groups for r in rk.RVSM(groups, lr=0.1).sparsity().rows}
    assert counts["up2.weight"] == {"in_channels": 3, "out_channels": 5, "kernels": 15, "layers": 1}[structure]
    assert counts["conv2.weight"] == {"in_channels": 3, "out_channels": 4, "kernels": 12, "layers": 1}[structure]


def test_group_options_do_not_reach_the_dense_rest() -> None:
    """Options of the constructor's defaults included: a bias has no dimension 1."""
    model = small()
    groups = rk.param_groups(model, group_dim=1, group_scale=True, group_lasso=0.1, lam=0.1)
    optimizer = rk.RVSM(groups, lr=0.1, group_dim=1, group_lasso=0.2)
    dense = optimizer.param_groups[-1]
    assert (dense["penalty"], dense["group_dim"], dense["group_lasso"]) == (None, None, 0.0)
    bias = model.head.bias
    before = bias.detach().clone()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(bias, before)


def test_include() -> None:
    model = Zoo()
    groups = rk.param_groups(model, include=(nn.Conv2d,), lam=0.1)
    assert_complete(model, groups)
    assert names(groups[0]) == ["conv2.weight"]
    groups = rk.param_groups(model, include=(nn.Linear, nn.ConvTranspose1d), structure="in_channels")
    assert {name: g["group_dim"] for g in groups[:-1] for name in names(g)} == {"up1.weight": 0, "linear.weight": 1}
    for nothing in ((), (nn.Bilinear,)):
        with pytest.raises(ValueError, match="no weight of the model is penalised"):
            rk.param_groups(model, include=nothing)


def test_weights_below_two_dimensions_stay_dense() -> None:
    model = Zoo()
    with pytest.warns(UserWarning, match="BatchNorm2d"):
        groups = rk.param_groups(model, include=(nn.LayerNorm, nn.BatchNorm2d))
    assert names(groups[0]) == ["norm.weight"], "a weight of two dimensions of an included module is penalised"
    with pytest.raises(ValueError, match="no weight"):
        rk.param_groups(nn.Sequential(nn.BatchNorm2d(3)), include=(nn.BatchNorm2d,))


def test_tied_weights_are_named_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    groups = rk.param_groups(model)
    assert_complete(model, groups)
    assert names(groups[0]) == ["a.weight"]
    assert len(rk.sparsity(model).rows) == 1


def test_a_weight_tied_to_an_embedding_stays_dense() -> None:
    """Input and output layer of a language model."""
    model = nn.ModuleDict({"embed": nn.Embedding(7, 3), "hidden": nn.Linear(3, 3), "out": nn.Linear(3, 7)})
    model["out"].weight = model["embed"].weight
    groups = rk.param_groups(model)
    assert_complete(model, groups)
    assert names(groups[0]) == ["hidden.weight"]


def test_frozen_weights() -> None:
    """They are not penalised, and no step moves them."""
    model = small()
    model.conv.weight.requires_grad_(False)
    groups = rk.param_groups(model, lam=0.1)
    assert names(groups[0]) == ["hidden.weight", "head.weight"]
    assert "conv.weight" in names(groups[-1])


def test_a_single_module_and_a_module_without_parameters() -> None:
    layer = nn.Linear(3, 2)
    groups = rk.param_groups(layer)
    assert [names(g) for g in groups] == [["weight"], ["bias"]]
    assert [names(g) for g in rk.param_groups(nn.Linear(3, 2, bias=False))] == [["weight"]]
    with pytest.raises(ValueError, match="ReLU has no weights"):
        rk.param_groups(nn.ReLU())


def test_errors() -> None:
    model = small()
    with pytest.raises(ValueError, match=r"structure.*'rows'.*in_channels"):
        rk.param_groups(model, structure="rows")
    with pytest.raises(ValueError, match="group_dim"):
        rk.param_groups(model, structure="kernels", group_dim=1)
    with pytest.raises(TypeError, match="lamda"):
        rk.param_groups(model, lamda=0.1)
    with pytest.raises(ValueError, match="structure"):
        rk.param_groups(nn.ReLU(), structure="rows")
