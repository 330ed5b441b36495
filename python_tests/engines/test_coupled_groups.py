"""coupling: groups over slices of several weights, against the same groups in one matrix that holds them all."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from builds import DEVICE, generator, quick_in_all
from torch import Tensor, nn

import rvsm_kernels as rk

CHANNELS = 7
SPLIT: dict[str, Any] = {"penalty": "l0", "lam": 0.9, "beta": 0.5, "group_dim": 1}


def columns(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Weights that read the same channels, of which the first are small."""
    sizes = torch.linspace(0.1, 1.0, CHANNELS, device=DEVICE)
    drawn = [torch.randn(n, CHANNELS, generator=generator(n), device=DEVICE) for n in (4, 3, 9)]
    return [nn.Parameter((w * sizes[order]).to(dtype)) for w, order in zip(drawn, ORDERS, strict=True)]


ORDERS = [list(range(CHANNELS)), [3, 1, 0, 2, 6, 5, 4], list(range(CHANNELS))]


def coupled(weights: list[nn.Parameter], make: Callable[..., Any] = rk.RVSM, **options: Any) -> Any:
    groups = [{"params": [w], "coupling": tuple(order)} for w, order in zip(weights, ORDERS, strict=True)]
    return make(groups, **{**SPLIT, **options})


def together(weights: list[Tensor]) -> Tensor:
    """The weights as rows of one matrix, with the channels in one order."""
    rows = [w.detach()[:, torch.tensor(order).argsort()] for w, order in zip(weights, ORDERS, strict=True)]
    return torch.cat(rows)


def set_gradients(weights: list[nn.Parameter], whole: nn.Parameter, step: int) -> None:
    for k, w in enumerate(weights):
        w.grad = torch.randn(w.shape, generator=generator(100 * step + k), device=DEVICE).to(w.dtype)
    whole.grad = together([w.grad for w in weights if w.grad is not None])


METHODS = [
    {},
    {"penalty": "l1", "lam": 0.4},
    {"penalty": "tl1", "lam": 0.4, "a": 2.0},
    {"group_scale": True, "lam": 0.2},
    {"group_lasso": 0.05},
    {"decoupled": False},
    {"method": "rvsm-delayed"},
    {"method": "admm"},
    {"method": "admm", "group_lasso": 0.05},
    {"momentum": 0.9, "nesterov": True},
    {"penalty": "topk", "density": 0.5},
    {"penalty": "topk", "density": 0.5, "method": "admm", "group_lasso": 0.05},
    {"penalty": "topk", "density": 0.3, "budget": "global", "group_scale": True, "method": "rvsm-delayed"},
]


@quick_in_all
@pytest.mark.parametrize("options", METHODS, ids=str)
def test_one_matrix(engine: str, options: dict[str, Any]) -> None:
    """Steps, u, values and counts are those of the matrix that holds all slices."""
    weights = columns()
    whole = nn.Parameter(together(weights))
    ours = coupled(weights, lr=0.1, engine=engine, **options)
    theirs = rk.RVSM([whole], lr=0.1, engine=engine, **{**SPLIT, **options})
    for step in range(3):
        set_gradients(weights, whole, step)
        ours.step()
        theirs.step()
        torch.testing.assert_close(together(weights), whole.detach(), rtol=2e-6, atol=1e-7)
    assert float(ours.penalty_value()) == pytest.approx(float(theirs.penalty_value()), rel=1e-6)
    with ours.sparse_weights(), theirs.sparse_weights():
        u = together(weights)
        torch.testing.assert_close(u, whole.detach(), rtol=2e-6, atol=1e-7)
        assert torch.equal(u == 0, whole.detach() == 0)
        assert 0 < int((u == 0).all(0).sum()) < CHANNELS  # some channels are gone, some are not


@pytest.mark.parametrize(
    "make", [rk.RVSMAdamW, lambda p, **o: rk.RVSMWrapper(torch.optim.Adam(p, lr=o.pop("lr")), **o)]
)
def test_other_bases(engine: str, make: Callable[..., Any]) -> None:
    weights = columns()
    whole = nn.Parameter(together(weights))
    ours, theirs = coupled(weights, make, lr=0.01, engine=engine), make([whole], lr=0.01, engine=engine, **SPLIT)
    for step in range(3):
        set_gradients(weights, whole, step)
        ours.step()
        theirs.step()
    torch.testing.assert_close(together(weights), whole.detach(), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("precision", [{}, {"master_weights": True}], ids=str)
def test_types(engine: str, dtype: torch.dtype, precision: dict[str, Any]) -> None:
    weights = columns(dtype)
    whole = nn.Parameter(together(weights))
    ours = coupled(weights, lr=0.1, engine=engine, **precision)
    theirs = rk.RVSM([whole], lr=0.1, engine=engine, **SPLIT, **precision)
    for step in range(3):
        set_gradients(weights, whole, step)
        ours.step()
        theirs.step()
    with ours.sparse_weights(), theirs.sparse_weights():
        assert torch.equal(together(weights) == 0, whole.detach() == 0)
        torch.testing.assert_close(together(weights), whole.detach(), rtol=1e-2, atol=1e-3)


def test_blocks_and_repeats(engine: str) -> None:
    """An integer may occur several times in one weight: a channel that is flattened into a block of columns."""
    w = nn.Parameter(torch.randn(5, 12, generator=generator(0), device=DEVICE))
    v = nn.Parameter(w.detach().clone())
    block = nn.Parameter(w.detach().clone())
    options = {"lam": 3.0, "beta": 0.5, "penalty": "l0", "group_dim": 1, "lr": 0.1, "engine": engine}
    repeated = rk.RVSM([v], coupling=tuple(k // 3 for k in range(12)), **options)
    of_blocks = rk.RVSM([block], coupling=(0, 1, 2, 3), group_block=3, **options)
    plain = rk.RVSM([w], group_block=3, **options)
    for p in (w, v, block):
        p.grad = torch.ones_like(p)
    for optimizer in (plain, repeated, of_blocks):
        optimizer.step()
        optimizer.sparsify_()
    assert 0 < int((w == 0).sum()) < w.numel()
    torch.testing.assert_close(v, w)
    torch.testing.assert_close(block, w)
    plain, repeated = (rk.RVSM([p], **{**options, "lam": 0.0}) for p in (w, v))  # the marks are of the others


def test_a_missing_gradient_and_a_frozen_weight(engine: str) -> None:
    """The norm is that of all slices, whichever of the weights moves."""
    weights = columns()
    weights[2].requires_grad_(False)
    optimizer = coupled(weights, lr=0.1, engine=engine)
    weights[0].grad = torch.zeros_like(weights[0])
    before = together(weights)
    dead = before.norm(dim=0) <= (2 * SPLIT["lam"] / SPLIT["beta"]) ** 0.5
    optimizer.step()
    moved = (weights[0] != before[:4]).any(0)
    assert torch.equal(moved, dead)
    assert torch.equal(weights[1].detach(), before[4:7][:, ORDERS[1]])


def test_statistics(engine: str) -> None:
    weights = columns()
    optimizer = coupled(weights, lr=0.1, engine=engine, statistics=True, penalty="l1", lam=0.4)
    for w in weights:
        w.grad = torch.ones_like(w)
    value = float(optimizer.penalty_value())
    optimizer.step()
    total = optimizer.statistics().total
    assert float(total.value) == pytest.approx(value, rel=1e-5)
    dead = int((together(weights).norm(dim=0) <= 0.8).sum())
    assert int(total.zero_groups) <= 3 * CHANNELS
    assert dead <= CHANNELS


@pytest.mark.parametrize("of", ["groups", "elements"])
@pytest.mark.parametrize("options", [{}, {"group_scale": True}, {"penalty": "l1"}], ids=str)
def test_schedule(engine: str, of: str, options: dict[str, Any]) -> None:
    """Leads to a share of channels, each counted once."""
    shapes, orders = [(4, 40), (6, 20), (5, 20)], [range(40), range(20), range(20, 40)]
    weights = [nn.Parameter(torch.randn(s, generator=generator(k), device=DEVICE)) for k, s in enumerate(shapes)]
    groups = [{"params": [w], "coupling": tuple(order)} for w, order in zip(weights, orders, strict=True)]
    optimizer = rk.RVSM(groups, lr=0.0, engine=engine, **{**SPLIT, **options})
    schedule = rk.SparsitySchedule(optimizer, 0.25, end=1, of=of)
    for w in weights:
        w.grad = torch.zeros_like(w)
    optimizer.step()
    schedule.step()
    optimizer.sparsify_()
    dead = (weights[0] == 0).all(0)
    assert torch.equal(dead[:20], (weights[1] == 0).all(0))
    assert torch.equal(dead[20:], (weights[2] == 0).all(0))
    if of == "groups":
        assert int(dead.sum()) == 10
    else:
        zeros = sum(int((w == 0).sum()) for w in weights)
        assert zeros / sum(w.numel() for w in weights) == pytest.approx(0.25, abs=0.03)


def test_shares_of_channels(engine: str) -> None:
    """Top-k keeps a share of what hangs together, or of all of a budget; slices of no group always stay."""
    names = ("a", "a", "b")
    for budget, densities in (("tensor", (0.5, 0.5, 0.25)), ("global", (0.5, 0.5, 0.5))):
        weights = [nn.Parameter(torch.randn(3, 20, generator=generator(k), device=DEVICE)) for k in range(3)]
        with torch.no_grad():
            weights[2] *= 0.1
        orders = [tuple(range(20)), tuple(reversed(range(20))), (*range(16), -1, -2, -3, -4)]
        groups = [
            {"params": [w], "coupling": order, "coupling_name": name, "density": density}
            for w, order, name, density in zip(weights, orders, names, densities, strict=True)
        ]
        split = {"penalty": "topk", "density": 1.0, "budget": budget, "lam": 1.0, "beta": 0.5, "group_dim": 1}
        optimizer = rk.RVSM(groups, lr=0.1, engine=engine, **split)
        for w in weights:
            w.grad = torch.zeros_like(w)
        optimizer.step()
        optimizer.sparsify_()
        alive = [int((w != 0).any(0).sum()) for w in weights]
        assert torch.equal((weights[0] != 0).any(0), (weights[1] != 0).any(0).flip(0))
        assert alive == ([10, 10, 4 + 4] if budget == "tensor" else [18, 18, 4])
    optimizer.param_groups[2]["density"] = 0.4
    with pytest.raises(ValueError, match=r"densities 0\.5 and 0\.4"):
        optimizer.step()
    plain = nn.Parameter(torch.randn(3, 4, device=DEVICE))
    plain.grad = torch.zeros_like(plain)
    optimizer.param_groups[2]["density"] = 0.5
    optimizer.add_param_group({"params": [plain], "density": 0.5})
    with pytest.raises(ValueError, match="a coupling and another one has none"):
        optimizer.step()


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_a_schedule_of_topk(engine: str, scope: str) -> None:
    weights = columns()
    optimizer = coupled(weights, lr=0.0, engine=engine, penalty="topk", density=1.0, budget=scope)
    schedule = rk.SparsitySchedule(optimizer, 3 / 7, end=1, of="groups", scope=scope)
    schedule.step()
    optimizer.sparsify_()
    assert int((together(weights) == 0).all(0).sum()) == 3


def test_resumes_bit_for_bit_and_loads_plain_values(engine: str) -> None:
    def trained(steps: range, optimizer: Any, weights: list[nn.Parameter]) -> None:
        for step in steps:
            for k, w in enumerate(weights):
                w.grad = torch.randn(w.shape, generator=generator(10 * step + k), device=DEVICE)
            optimizer.step()

    weights = columns()
    optimizer = coupled(weights, lr=0.1, momentum=0.9, engine=engine)
    trained(range(2), optimizer, weights)
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), [w.detach() for w in weights]], file)
    trained(range(2, 4), optimizer, weights)
    file.seek(0)
    state, kept = torch.load(file, weights_only=True)
    again = [nn.Parameter(w) for w in kept]
    resumed = coupled(again, lr=0.1, momentum=0.9, engine=engine)
    resumed.load_state_dict(state)
    trained(range(2, 4), resumed, again)
    assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert copied.param_groups[1]["coupling"] == tuple(ORDERS[1])
        for group in copied.param_groups:
            group["params"][0].grad = torch.ones_like(group["params"][0])
        copied.step()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"coupling": (0, 1)}, ValueError, "2 integers"),
        ({"coupling": tuple(range(CHANNELS)), "group_dim": None}, ValueError, "group_dim of one dimension"),
        ({"coupling": tuple(range(CHANNELS)), "group_dim": (0, 1)}, ValueError, "group_dim of one dimension"),
        ({"coupling": ["a"] * CHANNELS}, TypeError, "tuple of ints"),
        ({"coupling": 3}, TypeError, "tuple of ints"),
    ],
    ids=str,
)
def test_refused_when_built(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        rk.RVSM([columns()[0]], **{**SPLIT, **options})


@pytest.mark.parametrize("option", [{"lam": 0.3}, {"penalty": "l1"}, {"beta": 0.1}, {"group_scale": True}], ids=str)
def test_options_of_one_group_that_differ(engine: str, option: dict[str, Any]) -> None:
    weights = columns()
    optimizer = coupled(weights, lr=0.1, engine=engine)
    optimizer.param_groups[1].update(option)
    before = [w.detach().clone() for w in weights]
    for w in weights:
        w.grad = torch.ones_like(w)
    for what in (optimizer.step, optimizer.penalty_value, optimizer.sparsify_):
        with pytest.raises(ValueError, match="differ in"):
            what()
    assert all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))


def test_a_weight_twice(engine: str) -> None:
    w = columns()[0]
    groups = [{"params": [w, w], "coupling": tuple(range(CHANNELS))}]
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = rk.RVSM(groups, lr=0.1, engine=engine, **SPLIT)
    w.grad = torch.ones_like(w)
    with pytest.raises(ValueError, match="twice"):
        optimizer.step()


def test_a_step_that_is_called_off(engine: str) -> None:
    weights = columns()
    optimizer = coupled(weights, lr=0.1, engine=engine)
    before = [w.detach().clone() for w in weights]
    for w in weights:
        w.grad = torch.ones_like(w)
    optimizer.found_inf = torch.ones((), device=DEVICE)
    optimizer.grad_scale = torch.ones((), device=DEVICE)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))


@pytest.mark.parametrize("options", [{}, {"penalty": "l1"}, {"penalty": "tl1"}, {"group_lasso": 0.1}], ids=str)
def test_slices_of_no_group(engine: str, options: dict[str, Any]) -> None:
    """A negative integer: no penalty, no pull, no lasso, and no share of a schedule."""
    w = nn.Parameter(torch.randn(4, CHANNELS, generator=generator(0), device=DEVICE) * 0.1)
    free = nn.Parameter(w.detach()[:, 5:].clone())
    optimizer = rk.RVSM(
        [w], lr=0.1, engine=engine, coupling=(0, 1, 2, 3, 4, -1, -2), statistics=True, **{**SPLIT, **options}
    )
    plain = rk.RVSM([free], lr=0.1, engine=engine, penalty=None)
    w.grad = torch.ones_like(w)
    free.grad = torch.ones_like(free)
    value = float(optimizer.penalty_value())
    optimizer.step()
    plain.step()
    torch.testing.assert_close(w.detach()[:, 5:], free.detach())
    assert float(optimizer.statistics().total.value) == pytest.approx(value, rel=1e-5)
    schedule = rk.SparsitySchedule(optimizer, 0.4, end=1, of="groups")
    schedule.step()
    with optimizer.sparse_weights():
        assert int((w == 0).all(0).sum()) == 2
        torch.testing.assert_close(w.detach()[:, 5:], free.detach())
