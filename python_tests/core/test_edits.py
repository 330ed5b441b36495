"""Edits of options and gradients between two steps take effect at the next, and reading changes nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from builds import quick_in_all
from torch import nn
from world import World

import rvsm_kernels as rk
from runner import bits, checked_step, real, same_bits

# ---- options ---------------------------------------------------------------------------------------------------------

EDITS: list[dict[str, Any]] = [
    {"lr": 0.01},
    {"lr": torch.tensor(0.02)},
    {"lr": 0.0},
    {"lam": 0.5},
    {"lam": 0.0},
    {"beta": 0.05},
    {"beta": 0.0},
    {"a": 0.1},
    {"penalty": "l0"},
    {"penalty": "l1"},
    {"penalty": None},
    {"weight_decay": 0.0},
    {"weight_decay": 0.2},
    {"momentum": 0.5},
    {"nesterov": False},
    {"nesterov": False, "dampening": 0.3},
    {"maximize": True},
    {"decoupled": False},
    {"group_dim": 0},
    {"group_dim": (), "group_scale": True},
    {"group_dim": 0, "group_lasso": 0.5},
]


EARLY: list[dict[str, Any]] = [
    {"lr": 0.01},  # a number of the next step
    {"momentum": 0.5},  # what a first step leaves to the second
    {"group_dim": 0},  # what a table is built from
]
# Before anything was built, and after the first step only: the other edits find nothing there that these do not.


@pytest.mark.parametrize(
    ("world", "edit"),
    [
        *(pytest.param(3, edit, id=f"after three, {edit}") for edit in EDITS),
        *(pytest.param(1, edit, id=f"after one step, {edit}") for edit in EARLY),
        *(pytest.param(0, edit, id=f"before the first step, {edit}") for edit in EARLY),
    ],
    indirect=["world"],
)
def test_options_edited(world: World, edit: dict[str, Any]) -> None:
    """Of one group, then of both, then back."""
    groups = world.optimizer.param_groups
    old = [{key: group[key] for key in edit} for group in groups]
    groups[0].update(edit)
    world.go_on()
    if "group_lasso" not in edit:
        groups[1].update(edit if groups[1]["group_lasso"] == 0 or edit.get("group_dim", 1) is not None else {})
        world.go_on()
    for group, values in zip(groups, old, strict=True):
        group.update(values)
    world.go_on()


def test_group_dict_replaced(trained: World) -> None:
    """The list holds another dict of the same parameters."""
    groups = trained.optimizer.param_groups
    groups[0] = {**groups[0], "lam": 0.7, "lr": 0.03}
    trained.go_on()


def test_group_dim_as_a_list_edited_in_place(trained: World) -> None:
    """Checkpoints and JSON give lists, and a list can change without another object taking its place."""
    group = trained.optimizer.param_groups[1]
    group["group_dim"] = [0]
    trained.go_on()
    group["group_dim"].append(1)
    trained.go_on()
    group["group_dim"].append(7)
    before = [bits(p) for p in trained.params()]
    with pytest.raises(ValueError, match=r"group_dim.*\[0, 1, 7\]"):
        trained.optimizer.step()
    assert all(torch.equal(bits(p), b) for p, b in zip(trained.params(), before, strict=True))


# ---- gradients -------------------------------------------------------------------------------------------------------


def test_gradients_vanish_and_come_back(trained: World) -> None:
    for missing in ([0], [1, 4], [0, 1, 2, 3, 4, 5], [5], []):
        trained.set_gradients()
        for k in missing:
            trained.params()[k].grad = None
        trained.step(f"without {missing}", gradients=False)


@quick_in_all
def test_first_gradient_comes_late(engine: str) -> None:
    """A parameter's first step is a first step, whenever it comes: m is d, without dampening."""
    world = World(engine, 0, nesterov=False, dampening=0.5)
    for k in range(4):
        world.set_gradients()
        for p in world.params()[k + 1 :]:
            p.grad = None
        world.step(f"step {k}", gradients=False)


def test_gradients_set_in_place_and_replaced(trained: World) -> None:
    trained.set_gradients()
    trained.step("new tensors", gradients=False)
    for p in trained.params():
        p.grad.mul_(-0.5)
    trained.step("the same tensors, other values", gradients=False)
    for p in trained.params():
        p.grad.data = torch.full_like(p, 0.25)
    trained.step("the same tensors, other memory", gradients=False)


@pytest.mark.parametrize(
    ("dtype", "momentum", "group_dim"),
    [
        pytest.param(torch.bfloat16, 0.0, None, id="a gradient wider than bfloat16"),
        pytest.param(torch.bfloat16, 0.9, None, id="a first momentum of bfloat16 from it"),
        pytest.param(torch.bfloat16, 0.0, 0, id="beside rows"),
        pytest.param(torch.bfloat16, 0.9, 1, id="beside columns, with momentum"),
        pytest.param(torch.float16, 0.9, (), id="a gradient wider than float16"),
        pytest.param(torch.float64, 0.0, None, id="a gradient narrower than float64"),
        pytest.param(torch.float64, 0.9, 0, id="a first momentum of float64 from it"),
    ],
)
def test_gradient_of_another_dtype(engine: str, dtype: torch.dtype, momentum: float, group_dim: Any) -> None:
    """p.data of another dtype, the gradient left behind: it is used as it is, unrounded, as torch.optim.SGD does.

    With momentum the buffer has the parameter's dtype all the same.
    """
    p = nn.Parameter(torch.randn(21, 16))
    options = {"momentum": momentum, "group_dim": group_dim}
    optimizer = rk.RVSM([p], lr=0.1, lam=0.1 if group_dim is None else 4.0, beta=0.5, **options, engine=engine)
    p.grad = torch.randn(21, 16)
    if not momentum:
        checked_step(optimizer, "float32")
    p.data = p.data.to(dtype)
    assert p.grad.dtype == torch.float32
    checked_step(optimizer, "a float32 gradient of another parameter")
    checked_step(optimizer, "and again")
    p.grad = None
    p.grad = torch.randn(21, 16, dtype=dtype)
    checked_step(optimizer, "a gradient of its own dtype")


# ---- sparse_weights and sparsify_ between steps ----------------------------------------------------------------------


def test_reading_between_steps_changes_no_bit(engine: str) -> None:
    quiet, read = World(engine, 2), World(engine, 2)
    for k in range(3):
        with read.optimizer.sparse_weights():
            pass
        read.optimizer.penalty_value()
        read.optimizer.sparsity()
        for world in (quiet, read):
            world.step(f"step {k}")
    for p, q in zip(quiet.params(), read.params(), strict=True):
        assert same_bits(p, q)


def test_sparsify_between_steps(trained: World) -> None:
    """The step goes on from u; momentum is left alone."""
    before = {p: bits(trained.momentum(p)) for p in trained.params()}
    trained.optimizer.sparsify_()
    for p in trained.params():
        assert torch.equal(bits(trained.momentum(p)), before[p])
    assert (real(trained.first[0]) == 0).any()
    trained.go_on()


def test_load_state_dict_in_mid_training(world: World) -> None:
    """Other numbers and other momentum from one step to the next."""
    other = World(world.engine, 4, lr=0.02, lam=0.3, momentum=0.7, penalty="l0")
    world.optimizer.load_state_dict(copy.deepcopy(other.optimizer.state_dict()))
    assert world.optimizer.param_groups[0]["lr"] == 0.02
    for p, q in zip(world.params(), other.params(), strict=True):
        assert same_bits(world.momentum(p), other.momentum(q))
    world.go_on()


def test_a_plain_group_is_added_to_a_plain_one(engine: str) -> None:
    """Without momentum and penalty nothing tells the options of the new group from no options at all."""
    first, second = (nn.Parameter(torch.ones(5)) for _ in range(2))
    optimizer = rk.RVSM([first], lr=0.1, penalty=None, engine=engine)
    first.grad = second.grad = torch.ones(5)
    optimizer.step()
    optimizer.add_param_group({"params": [second]})
    optimizer.step()
    torch.testing.assert_close((first, second), (torch.full((5,), 0.8), torch.full((5,), 0.9)), check_dtype=False)
