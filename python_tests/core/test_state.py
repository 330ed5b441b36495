"""State never goes stale silently: whatever a user changes between two steps takes effect at the next.

Every test trains a little, so that an engine may have kept whatever it keeps, changes one thing, and steps through
`checked_step`, which predicts the step from what a user sees: param groups, state and gradients as they are now.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from builds import generator, quick_in_all
from torch import Tensor, nn
from world import OPTIONS, World

import rvsm_kernels as rk
from cases import Layout
from runner import check_reading, checked_step

# ---- momentum --------------------------------------------------------------------------------------------------------


def test_momentum_buffer_replaced(trained: World) -> None:
    for p in trained.params()[::2]:
        trained.optimizer.state[p]["momentum_buffer"] = torch.full_like(p, 3.0)
    trained.go_on()


def test_momentum_buffer_replaced_in_another_layout(trained: World) -> None:
    p = trained.second[0]
    values = torch.randn(p.shape)
    trained.optimizer.state[p]["momentum_buffer"] = Layout((3, 1, 0, 2), gap=2, offset=1).place(values)[0]
    trained.go_on()


def test_momentum_buffer_shared_with_a_loaded_tensor(trained: World) -> None:
    """state_dict() and load_state_dict() share tensors: an edit of the shared one is an edit of the momentum."""
    state = trained.optimizer.state_dict()
    trained.optimizer.load_state_dict(state)
    with torch.no_grad():
        for entry in trained.optimizer.state_dict()["state"].values():
            entry["momentum_buffer"].mul_(-2.0)
    trained.go_on()


@pytest.mark.parametrize("edit", [lambda m: m.zero_(), lambda m: m.mul_(-3.0), lambda m: m.set_(torch.ones_like(m))])
def test_momentum_buffer_set_in_place(trained: World, edit: Callable[[Tensor], Any]) -> None:
    with torch.no_grad():
        for p in trained.params()[1:]:
            edit(trained.momentum(p))
    trained.go_on()


@pytest.mark.parametrize("how", ["data", "resize"])
def test_momentum_buffer_moved(trained: World, how: str) -> None:
    m = trained.momentum(trained.first[0])
    if how == "data":
        m.data = torch.full((40,), 2.0)
    else:
        m.resize_(100_000).resize_(40).fill_(2.0)
    trained.go_on()


def test_state_cleared(trained: World) -> None:
    """The next step is a first step: m is d."""
    trained.optimizer.state.clear()
    trained.go_on()


def test_state_of_one_parameter_removed(trained: World) -> None:
    del trained.optimizer.state[trained.second[1]]
    trained.optimizer.state[trained.first[2]].clear()
    trained.optimizer.state[trained.first[0]]["momentum_buffer"] = None
    trained.go_on()


def test_state_replaced_by_another_mapping(trained: World) -> None:
    optimizer = trained.optimizer
    fresh = copy.deepcopy({k: dict(v) for k, v in optimizer.state_dict()["state"].items()})
    optimizer.state = type(optimizer.state)(dict)
    for k, p in enumerate(trained.params()):
        optimizer.state[p]["momentum_buffer"] = fresh[k]["momentum_buffer"] * 2
    trained.go_on()


@quick_in_all
def test_momentum_switched_on_and_off(engine: str) -> None:
    world = World(engine, 2, momentum=0.0, nesterov=False)
    for momentum, nesterov in ((0.9, False), (0.9, True), (0.0, False), (0.5, False)):
        for group in world.optimizer.param_groups:
            group.update(momentum=momentum, nesterov=nesterov)
        world.go_on()


# ---- parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_changed(engine: str, dtype: torch.dtype) -> None:
    """model.to(dtype) before the first step and after it: the momentum follows."""
    model = nn.Sequential(nn.Linear(9, 7), nn.Linear(7, 3))
    for steps in (0, 2):
        optimizer = rk.RVSM(model.to(torch.float32).parameters(), **OPTIONS, engine=engine)
        gen = generator(0)

        def gradients(gen: torch.Generator = gen) -> None:
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=gen, dtype=torch.float64).to(p.dtype)

        for _ in range(steps):
            gradients()
            checked_step(optimizer)
        model.to(dtype)
        for state in optimizer.state.values():  # what the step will read is the momentum in the new dtype
            state["momentum_buffer"] = state["momentum_buffer"].to(dtype).to(torch.float32)
        for k in range(2):
            gradients()
            checked_step(optimizer, f"{dtype}, step {k}")
        check_reading(optimizer)


def test_memory_format_changed(world: World) -> None:
    """channels_last in mid-training: the momentum is still contiguous."""
    for p in (world.first[3], world.second[0]):
        p.data = p.data.to(memory_format=torch.channels_last)
    world.go_on()
    for p in (world.first[3], world.second[0]):
        p.data = p.data.contiguous()
    world.go_on()


def test_gradients_in_another_layout(trained: World) -> None:
    trained.set_gradients()
    for p in trained.params():
        order = tuple(reversed(range(p.dim())))
        p.grad = Layout(order, gap=2, pad=1, offset=3).place(p.grad)[0]
    trained.step("other strides", gradients=False)
    trained.go_on()


def test_data_replaced(world: World) -> None:
    """p.data = other: as torch's own load and quantisation code does."""
    for p in world.params():
        p.data = torch.randn(p.shape, generator=world.gen)
    world.go_on()


def test_data_is_a_view_of_a_flat_buffer(world: World) -> None:
    """All parameters moved into one buffer, one after the other, as sharding libraries do."""
    flat, at = torch.zeros(sum(p.numel() for p in world.params())), 0
    for p in world.params():
        piece = flat[at : at + p.numel()].view(p.shape)
        piece.copy_(p.detach())
        p.data, at = piece, at + p.numel()
    world.go_on()
    assert torch.equal(flat[:40], world.first[0].detach()), "the step did not write into the flat buffer"


def test_data_of_another_shape(engine: str) -> None:
    """A layer that was pruned for good: new shape, new gradient, momentum dropped."""
    world = World(engine, 2)
    p = world.second[0]
    p.data = torch.randn((5, 4, 3, 3), generator=world.gen)
    p.grad = None
    del world.optimizer.state[p]
    q = world.first[0]
    q.data, q.grad = torch.randn(23, generator=world.gen), None
    del world.optimizer.state[q]
    world.go_on()


def test_data_of_another_shape_without_momentum(engine: str) -> None:
    world = World(engine, 2, momentum=0.0, nesterov=False)
    for p, shape in ((world.second[1], (6, 4)), (world.first[1], (30,)), (world.first[2], (1, 1))):
        p.data, p.grad = torch.randn(shape, generator=world.gen), None
    world.go_on()


def test_data_became_empty_and_grew(engine: str) -> None:
    world = World(engine, 2, momentum=0.0, nesterov=False)
    for shape in ((0, 9), (5, 9)):
        world.second[1].data, world.second[1].grad = torch.ones(shape), None
        world.go_on()


def test_weights_edited_in_place(trained: World) -> None:
    """Clipping, weight surgery, a loaded model: norms of groups kept from the last step would be old."""
    with torch.no_grad():
        for p in trained.params():
            p.mul_(0.3)
    trained.go_on()
    with torch.no_grad():
        trained.second[0][:, 1] = 0.0
        trained.second[1].data[:, 2] *= 10.0
    trained.go_on()


def test_weights_edited_behind_the_version_counter(trained: World) -> None:
    """p.data.mul_() and other libraries that share the memory bump no version counter of p."""
    for p in trained.params():
        p.data.mul_(0.3)
    trained.go_on()
    for p in trained.params():
        torch.from_dlpack(p.detach()).mul_(-2.0)
    trained.go_on()


def test_parameters_swapped(trained: World) -> None:
    """torch.utils.swap_tensors: the same Python object, another tensor inside; refused if an engine holds on to it."""
    for p in trained.params():
        p.grad = None
    for p, shape in ((trained.first[0], (40,)), (trained.second[0], (8, 6, 3, 3))):
        torch.utils.swap_tensors(p, nn.Parameter(torch.randn(shape, generator=trained.gen)))
    trained.go_on()


def test_parameter_replaced_in_its_group(world: World) -> None:
    fresh = nn.Parameter(torch.randn((8, 6, 3, 3), generator=world.gen))
    world.optimizer.param_groups[1]["params"][0] = fresh
    world.go_on()
    shorter = nn.Parameter(torch.randn(13, generator=world.gen))
    world.optimizer.param_groups[0]["params"][0] = shorter
    world.go_on()


def test_parameters_of_a_group_replaced_removed_and_added(world: World) -> None:
    groups = world.optimizer.param_groups
    groups[0]["params"] = [groups[0]["params"][2], groups[0]["params"][0]]
    world.go_on()
    groups[0]["params"].append(nn.Parameter(torch.randn(17, generator=world.gen)))
    world.go_on()
    groups[1]["params"].clear()
    world.go_on()


def test_parameter_moved_to_another_group(world: World) -> None:
    groups = world.optimizer.param_groups
    groups[0]["params"].append(groups[1]["params"].pop(0))
    world.go_on()


def test_groups_added_removed_and_swapped(world: World) -> None:
    more = [nn.Parameter(torch.randn(s, generator=world.gen)) for s in ((6, 6), (300,))]
    world.optimizer.add_param_group({"params": more, "penalty": "l1", "lam": 0.3, "momentum": 0.5, "nesterov": False})
    world.go_on()
    world.optimizer.param_groups.reverse()
    world.go_on()
    world.optimizer.param_groups.pop(0)
    world.go_on()
