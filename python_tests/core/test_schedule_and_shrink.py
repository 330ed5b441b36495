"""A schedule's target stays a share of what was there when it began, whatever shrink removes on the way."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from test_coupled_training import Net, batch, train
from torch import nn

import rvsm_kernels as rk
from runner import same_bits


def coupled(net: nn.Module, make: Any = rk.RVSM, **options: Any) -> Any:
    options = {"penalty": "l0", "lam": 0.0, "beta": 1.0, **options}
    return make(rk.param_groups(net, structure="coupled", example_inputs=batch(0)[0], **options), lr=0.01)


def widths(net: Any) -> tuple[int, ...]:
    """The streams and the inner channels, and what the classifier reads."""
    blocks = net.blocks
    return net.stem.out_channels, blocks[0].first.out_channels, blocks[1].first.out_channels, net.head.in_features


@pytest.mark.parametrize("make", [rk.RVSM, rk.RVSMAdamW], ids=["sgd", "adamw"])
@pytest.mark.parametrize(
    "options",
    [{}, {"penalty": "l1"}, {"penalty": "tl1", "group_scale": True}, {"penalty": "topk", "lam": 1.0, "density": 1.0}],
    ids=str,
)
def test_two_removals_on_the_way_to_half(make: Any, options: dict[str, Any]) -> None:
    """In the end half of the channels of each layer are gone, as without a removal on the way."""
    net = Net()
    optimizer = coupled(net, make, **options)
    schedule = rk.SparsitySchedule(optimizer, 0.5, of="groups", scope="tensor", end=12, every=1, power=1.0)
    done = 0
    for stop in (5, 9, 12):
        train(net, optimizer, range(done, stop), schedule)
        done = stop
        report = rk.shrink(net, optimizer, example_inputs=batch(0)[0])
        assert report.groups > 0
        assert schedule.removed == pytest.approx(schedule.sparsity, abs=0.06) and schedule.sparsity_left < 0.06
    assert widths(net) == (4, 4, 8, 8)
    assert schedule.removed == 0.5 and schedule.sparsity_left == 0
    before = [p.detach().clone() for p in net.parameters()]
    train(net, optimizer, range(12, 16), schedule)
    penalised = [group for group in optimizer.param_groups if group["penalty"] is not None]
    assert all(group["lam"] == 0 or group["density"] == 1 for group in penalised)
    assert optimizer.sparsity().total.zeros == 0
    assert not any(torch.equal(p, w) for p, w in zip(net.parameters(), before, strict=True))


def test_one_cut_for_all_layers() -> None:
    """scope="global": the share is of all groups together."""
    net = Net()
    optimizer = coupled(net)
    schedule = rk.SparsitySchedule(optimizer, 0.5, of="groups", end=10, every=1)
    total = 8 + 8 + 16 + 16
    gone = 0
    for stop in (4, 10):
        train(net, optimizer, range(schedule.last_step, stop), schedule)
        gone += rk.shrink(net, optimizer, example_inputs=batch(0)[0]).groups
    assert gone == 0.5 * total or min(widths(net)) == 1


def cut_rows(p: nn.Parameter, optimizer: Any, keep: int, dim: int = 0) -> None:
    """What shrink does to a parameter and its optimizer, of a model that is two lines."""
    from rvsm_kernels.model.slices import cut_states, replace_data, take

    kept = {dim: torch.arange(keep)}
    writes = cut_states([optimizer], {p: ("p", kept)})
    replace_data(p, take(p, kept))
    p.grad = None
    for container, key, value in writes:
        container[key] = value
    optimizer._begin_anew()


def steps(schedule: Any, weights: list[nn.Parameter], count: int) -> None:
    for _ in range(count):
        for p in weights:
            p.grad = torch.zeros_like(p)
        schedule._optimizer.step()
        schedule.step()


KINDS: dict[str, dict[str, Any]] = {
    "l0": {"penalty": "l0"},
    "l1": {"penalty": "l1"},
    "tl1": {"penalty": "tl1", "a": 2.0},
    "channels": {"penalty": "l0", "group_dim": 1},
    "scaled": {"penalty": "l1", "group_dim": 1, "group_scale": True},
    "topk": {"penalty": "topk", "density": 1.0},
    "topk-channels": {"penalty": "topk", "density": 1.0, "group_dim": 1},
    "topk-global": {"penalty": "topk", "density": 1.0, "budget": "global"},
}


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("of", ["elements", "groups"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_asked_of_the_rest(kind: str, of: str, scope: str) -> None:
    """A quarter is removed on the way to three quarters: two thirds of the rest. Then more than all: nothing."""
    options = KINDS[kind]
    if options["penalty"] == "topk" and (options.get("budget") == "global") != (scope == "global"):
        pytest.skip("another scope for this budget")
    p, late = nn.Parameter(torch.randn(40, 40)), nn.Parameter(torch.randn(40, 40))
    optimizer = rk.RVSM([{"params": [p]}], lr=0.1, beta=1.0, **options)
    schedule = rk.SparsitySchedule(optimizer, 0.75, end=4, every=1, of=of, scope=scope)
    steps(schedule, [p], 1)
    assert schedule.removed == 0 and schedule.sparsity_left == schedule.sparsity
    cut_rows(p, optimizer, 30, dim=1)
    assert schedule.removed == 0.25
    steps(schedule, [p], 3)
    share = lambda row: row.group_share if "group_dim" in options else row.share  # noqa: E731
    assert share(optimizer.sparsity().rows[0]) == pytest.approx(2 / 3, abs=1e-3)
    assert schedule.sparsity_left == pytest.approx(2 / 3) and schedule.sparsity == 0.75
    cut_rows(p, optimizer, 8, dim=1)
    steps(schedule, [p], 1)
    assert optimizer.sparsity().rows[0].zeros == 0
    if options.get("budget") == "global":
        return
    optimizer.add_param_group({"params": [late]})  # it counts with what it has when it comes
    steps(schedule, [p, late], 1)
    zeros = sum(row.zeros for row in optimizer.sparsity().rows)
    of_late = 1600 if scope == "tensor" else 3200 - (1600 - 8 * 40) / 0.75
    assert zeros == pytest.approx(0.75 * of_late, abs=41)


def test_topk_has_another_density_at_the_first_step_after_a_removal() -> None:
    p = nn.Parameter(torch.randn(40, 40))
    optimizer = rk.RVSM([p], lr=0.1, beta=1.0, penalty="topk", density=1.0)
    schedule = rk.SparsitySchedule(optimizer, 0.5, end=1, scope="tensor")
    steps(schedule, [p], 1)
    cut_rows(p, optimizer, 20)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert optimizer.param_groups[0]["density"] == 1.0


def test_an_edit_of_the_groups_is_no_removal() -> None:
    p = nn.Parameter(torch.randn(40, 30))
    optimizer = rk.RVSM([p], lr=0.1, beta=1.0)
    schedule = rk.SparsitySchedule(optimizer, 0.5, end=2, every=1, of="groups")
    optimizer.param_groups[0]["group_dim"] = 0
    steps(schedule, [p], 2)
    assert schedule.removed == 0 and optimizer.sparsity().rows[0].group_share == 0.5


def test_held_zeros_stay_across_a_removal() -> None:
    net = Net()
    optimizer = coupled(net)
    schedule = rk.SparsitySchedule(optimizer, 0.5, of="groups", scope="tensor", end=6, every=1, hold=True)
    train(net, optimizer, range(3), schedule)
    rk.shrink(net, optimizer, example_inputs=batch(0)[0])
    train(net, optimizer, range(3, 8), schedule)
    assert schedule.holds
    zeros = [p == 0 for p in net.parameters()]
    train(net, optimizer, range(8, 10), schedule)
    assert all(torch.equal(p == 0, z) for p, z in zip(net.parameters(), zeros, strict=True) if p.dim() > 1)
    rk.shrink(net, optimizer, example_inputs=batch(0)[0])
    assert widths(net) == (4, 4, 8, 8)
    train(net, optimizer, range(10, 12), schedule)


@pytest.mark.parametrize("how", ["state", "pickle", "deepcopy"])
def test_a_resumed_run_gives_the_same_bits(how: str) -> None:
    net = Net()
    optimizer = coupled(net)
    options: dict[str, Any] = {"of": "groups", "scope": "tensor", "end": 12, "every": 2, "pull_rate": 0.05}
    schedule = rk.SparsitySchedule(optimizer, 0.5, **options)
    train(net, optimizer, range(6), schedule)
    rk.shrink(net, optimizer, example_inputs=batch(0)[0])
    train(net, optimizer, range(6, 7), schedule)
    if how == "state":
        other = copy.deepcopy(net)
        resumed = coupled(other)
        again = rk.SparsitySchedule(resumed, 0.5, **options)
        saved = pickle.loads(pickle.dumps((optimizer.state_dict(), schedule.state_dict())))
        resumed.load_state_dict(saved[0])
        again.load_state_dict(saved[1])
    elif how == "pickle":
        other, resumed, again = pickle.loads(pickle.dumps((net, optimizer, schedule)))
    else:
        other, resumed, again = copy.deepcopy((net, optimizer, schedule))
    assert again.removed == schedule.removed > 0 and again.state_dict() == schedule.state_dict()
    for model, ours, its in ((net, optimizer, schedule), (other, resumed, again)):
        train(model, ours, range(7, 12), its)
        rk.shrink(model, ours, example_inputs=batch(0)[0])
        train(model, ours, range(12, 14), its)
        assert widths(model) == (4, 4, 8, 8)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert same_bits(p.detach(), q.detach())
    assert again.state_dict() == schedule.state_dict()


def test_an_old_state_dict_counts_what_is_there() -> None:
    p = nn.Parameter(torch.randn(40, 40))
    optimizer = rk.RVSM([p], lr=0.1, beta=1.0)
    schedule = rk.SparsitySchedule(optimizer, 0.5, end=2, every=1)
    state = schedule.state_dict()
    del state["members"]
    schedule.load_state_dict(state)
    cut_rows(p, optimizer, 30)
    steps(schedule, [p], 2)
    assert optimizer.sparsity().share == pytest.approx(1 / 3, abs=1e-3)


def test_the_monitor_says_what_is_a_share_of_what() -> None:
    class Written:
        def __init__(self) -> None:
            self.tags: dict[str, float] = {}

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            self.tags[tag] = value

    p = nn.Parameter(torch.randn(40, 40))
    optimizer = rk.RVSM([p], lr=0.1, beta=1.0)
    schedule = rk.SparsitySchedule(optimizer, 0.75, end=2, every=1)
    monitor = rk.Monitor(optimizer, written := Written(), schedule=schedule)
    monitor.write()
    assert "schedule/removed" not in written.tags
    cut_rows(p, optimizer, 20)
    steps(schedule, [p], 2)
    monitor.write()
    tags = written.tags
    assert tags["schedule/sparsity"] == 0.75 and tags["schedule/removed"] == 0.5
    assert tags["sparsity/total"] == pytest.approx(tags["schedule/sparsity_left"]) == 0.5
