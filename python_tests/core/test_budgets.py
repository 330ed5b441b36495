"""budget='global': one cut over all tensors of a budget, held against the magnitudes of all of them in one list."""

from __future__ import annotations

import copy
import math
import pickle
import threading
from typing import Any

import pytest
import torch
from builds import generator, quick_in_all
from torch import Tensor, nn

import rvsm_kernels as rk
from rvsm_kernels.method import cuts
from rvsm_kernels.optim import sparse_view

TOPK: dict[str, Any] = {"density": 0.3, "penalty": "topk", "lam": 1.0, "beta": 0.5, "lr": 0.1, "budget": "global"}
SHAPES = ((30, 20), (7, 4, 3, 3), (50,), (1, 1))


def parameters(dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> list[nn.Parameter]:
    """Tensors of which one has much larger weights than another."""
    return [
        nn.Parameter((10.0 ** (k - 1) * torch.randn(shape, generator=generator(k))).to(dtypes[k % len(dtypes)]))
        for k, shape in enumerate(SHAPES)
    ]


def give_gradients(params: list[nn.Parameter], seed: int) -> None:
    for k, p in enumerate(params):
        p.grad = torch.randn(p.shape, generator=generator(100 * seed + k)).to(p.dtype)


def kept(params: list[Tensor], density: float) -> list[Tensor]:
    """Which elements are among the ceil(density * n) largest of all; no two magnitudes are the same."""
    flat = torch.cat([p.detach().double().abs().reshape(-1) for p in params])
    smallest = flat.sort(descending=True).values[math.ceil(density * len(flat) - 1e-9) - 1]
    return [p.detach().double().abs() >= smallest for p in params]


@quick_in_all
@pytest.mark.parametrize("density", [0.02, 0.3, 1.0])
def test_u_is_the_largest_of_all(engine: str, density: float) -> None:
    params = parameters()
    optimizer = rk.RVSM(params, **{**TOPK, "density": density}, engine=engine)
    for k in range(3):
        give_gradients(params, k)
        before = [p.detach().clone() for p in params]
        optimizer.step()
        for p, w, keep in zip(params, before, kept(before, density), strict=True):
            u = torch.where(keep, w, 0.0)
            want = w - 0.1 * 0.5 * (w - u) - 0.1 * p.grad
            torch.testing.assert_close(p.detach(), want, rtol=1e-5, atol=1e-6)
    with optimizer.sparse_weights():
        assert all(
            torch.equal(p.detach() != 0, keep)
            for p, keep in zip(params, kept([optimizer._view._dense[p] for p in params], density), strict=True)
        )
    report = optimizer.sparsity()
    alive = kept(list(params), density)
    assert sum(row.numel - row.zeros for row in report.rows) == sum(int(keep.sum()) for keep in alive)
    optimizer.sparsify_()
    assert [int((p == 0).sum()) for p in params] == [int((~keep).sum()) for keep in alive]


def test_groups_and_names() -> None:
    """Two budgets over three groups, beside a tensor with a cut of its own and one without a penalty."""
    params = parameters()
    groups = [
        {"params": [params[0]], "budget_name": "a", "density": 0.2},
        {"params": [params[1]], "budget_name": "b", "density": 0.5},
        {"params": [params[2]], "budget_name": "a", "density": 0.2},
        {"params": [params[3]], "penalty": None},
    ]
    optimizer = rk.RVSM(groups, **TOPK)
    with optimizer.sparse_weights():
        u = [p.detach().clone() for p in params]
    a, c = kept([params[0], params[2]], 0.2)
    (b,) = kept([params[1]], 0.5)
    assert all(torch.equal(x != 0, keep) for x, keep in zip(u[:3], (a, b, c), strict=True)) and torch.equal(
        u[3], params[3]
    )


@pytest.mark.parametrize("method", ["rvsm", "rvsm-delayed", "admm"])
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32,),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.float64),
    ],
    ids=lambda dtypes: "+".join(str(t).removeprefix("torch.") for t in dtypes),
)
def test_native_is_the_reference(method: str, dtypes: tuple[torch.dtype, ...]) -> None:
    start = parameters(dtypes)
    found = []
    for engine in (None, "reference"):
        params = copy.deepcopy(start)
        optimizer = rk.RVSM(params, engine=engine, momentum=0.9, method=method, **TOPK)
        for k in range(4):
            give_gradients(params, k)
            optimizer.step()
        with optimizer.sparse_weights():
            found.append([p.detach().clone() for p in params])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours == 0, theirs == 0)
        torch.testing.assert_close(
            ours, theirs, rtol=2e-2 if ours.dtype in (torch.bfloat16, torch.float16) else 1e-5, atol=1e-6
        )


@pytest.mark.parametrize("scaled", [False, True])
def test_norms_of_groups(scaled: bool) -> None:
    """Norms of all tensors are compared, with group_scale after each is divided by the root of its group's size."""
    params = parameters()[:2]
    optimizer = rk.RVSM(params, **{**TOPK, "density": 0.25}, group_dim=0, group_scale=scaled)
    norms = [p.detach().double().flatten(1).norm(dim=1) / (math.sqrt(p[0].numel()) if scaled else 1) for p in params]
    keep = kept(norms, 0.25)
    for k in range(2):  # before a step, and in it
        with optimizer.sparse_weights():
            alive = [p.detach().flatten(1).norm(dim=1) != 0 for p in params]
        assert all(map(torch.equal, alive, keep)), k
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        moved = [(p.detach() != w).flatten(1).any(dim=1) for p, w in zip(params, before, strict=True)]
        assert all(torch.equal(m, ~k) for m, k in zip(moved, keep, strict=True)), "the pull moves what does not survive"
        norms = [
            p.detach().double().flatten(1).norm(dim=1) / (math.sqrt(p[0].numel()) if scaled else 1) for p in params
        ]
        keep = kept(norms, 0.25)


def test_parameters_without_a_gradient_count() -> None:
    """u of a step and u of an evaluation have one cut, whichever parameters have a gradient; frozen ones do not."""
    params = parameters()
    params[2].requires_grad_(False)
    optimizer = rk.RVSM(params, **TOPK)
    keep = kept([params[0], params[1], params[3]], 0.3)
    before = params[0].detach().clone()
    params[0].grad = torch.zeros_like(params[0])
    optimizer.step()
    assert torch.equal(params[0].detach() == before, keep[0])
    assert torch.equal(params[2], parameters()[2]) and [row.zeros for row in optimizer.sparsity().rows][2] == 0


def test_frozen_parameters_with_a_gradient() -> None:
    """A step moves what has a gradient: by the cut of the budget, which is of others, or by its own without others."""
    params = parameters()
    params[0] = nn.Parameter(params[0].detach().double())  # the others cannot share the room of its cut
    optimizer = rk.RVSM(params, **TOPK)
    give_gradients(params, 1)
    params[1].requires_grad_(False)
    for frozen, counted in ((1, [0, 2, 3]), (0, None), (2, None), (3, None)):
        params[frozen].requires_grad_(False)
        for p in params:
            p.grad = torch.zeros_like(p)
        before = [p.detach().clone() for p in params]
        optimizer.step()
        if counted is not None:
            smallest = min(p[keep].abs().min().item() for p, keep in _with_kept([before[k] for k in counted]))
            largest = max(p[~keep].abs().max().item() for p, keep in _with_kept([before[k] for k in counted]))
            stays = params[frozen].detach() == before[frozen]
            assert not stays[before[frozen].abs() <= largest].any() and stays[before[frozen].abs() >= smallest].all()
    (own,) = kept([before[0]], TOPK["density"])
    assert torch.equal(params[0].detach() == before[0], own)


def _with_kept(tensors: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Each tensor of a budget, and which of its elements survive; of those that lose some and keep some."""
    pairs = zip(tensors, kept(tensors, TOPK["density"]), strict=True)
    return [(p, keep) for p, keep in pairs if keep.any() and not keep.all()]


@pytest.mark.parametrize("size", [5, 6, 7, 10, 11])
def test_scaled_norms_that_tie_all_go(size: int, engine: str) -> None:
    """norm / sqrt(size) and back is not always the norm, and all groups here have one norm."""
    params = [nn.Parameter(torch.ones(4, size)) for _ in range(2)]
    optimizer = rk.RVSM(params, **{**TOPK, "density": 0.5}, group_dim=0, group_scale=True, engine=engine)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all((p < 1).all() for p in params)
    with pytest.warns(UserWarning, match="all zero"):
        optimizer.sparsify_()
    assert not any(p.any() for p in params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, math.sqrt(5), math.sqrt(768)])
def test_a_cut_of_one_tensor_drops_what_was_counted(dtype: torch.dtype, scale: float) -> None:
    """Of the numbers around it exactly those whose share is not above the cut, in whatever type that was taken."""
    norms = torch.rand(500, generator=generator(3), dtype=dtype) * 10 ** torch.linspace(-6, 6, 500, dtype=dtype)
    for cut in (*(norms / scale)[::25].double(), *(norms / scale)[::25].float()):
        if cut.dtype == torch.float32 and dtype == torch.float64:
            continue  # the cut has the widest type
        to = torch.zeros((), dtype=dtype)
        cuts.put_cut(to, cut, scale)
        above = torch.nextafter(to, torch.tensor(math.inf, dtype=dtype))
        compared = torch.stack([to, above]) if scale == 1 else torch.stack([to, above]) / scale
        assert (compared.to(cut.dtype) <= cut).tolist() == [True, False]
    for cut in (-1.0, math.nan, math.inf, 0.0):
        cuts.put_cut(to, torch.tensor(cut, dtype=dtype), scale)
        for norm in (0.0, 1.0, torch.finfo(dtype).max, math.inf, math.nan):
            assert (norm <= float(to)) == (norm <= cut), (cut, norm)


def test_a_parameter_twice_counts_once() -> None:
    params = parameters()
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = rk.RVSM([{"params": [params[0], params[0], params[1]]}], **TOPK)
    with optimizer.sparse_weights():
        u = [p.detach().clone() for p in params[:2]]
    assert all(torch.equal(x != 0, keep) for x, keep in zip(u, kept(params[:2], 0.3), strict=True))


def test_edits_are_seen_and_nothing_else_changes_the_cut() -> None:
    params = parameters()
    optimizer = rk.RVSM(params, **TOPK)
    for edit in (lambda: None, lambda: params[2].data.mul_(1000), lambda: params[0].data.zero_()):
        give_gradients(params, 1)
        edit()
        before = [p.detach().clone() for p in params]
        again = copy.deepcopy(optimizer)
        give_gradients([p for group in again.param_groups for p in group["params"]], 1)
        optimizer.step()
        again.step()
        ours, theirs = params, [p for group in again.param_groups for p in group["params"]]
        assert all(map(torch.equal, ours, theirs)), "a copy, which knows no last cut, makes the same step"
        keep = kept(before, 0.3)
        for p, w, k in zip(params, before, keep, strict=True):
            want = w - 0.05 * torch.where(k, 0.0, w) - 0.1 * p.grad
            torch.testing.assert_close(p.detach(), want, rtol=1e-5, atol=1e-5)


def test_budgets_that_are_edited_between_steps() -> None:
    """No tensor goes on with the room of a cut that it once shared."""
    params = parameters()
    optimizer = rk.RVSM([{"params": [p]} for p in params], **TOPK)
    groups = optimizer.param_groups

    def survivors() -> list[Tensor]:
        for p in params:
            p.grad = torch.zeros_like(p)
        before = [p.detach().clone() for p in params]
        optimizer.step()
        weights[:] = before
        return [p.detach() == w for p, w in zip(params, before, strict=True)]

    def same(found: list[Tensor], *budgets: list[int]) -> bool:
        want = [(k, keep) for of in budgets for k, keep in zip(of, kept([weights[k] for k in of], 0.3), strict=True)]
        return all(torch.equal(found[k], keep) for k, keep in want)

    weights: list[Tensor] = []
    assert same(survivors(), [0, 1, 2, 3])
    for group in groups:
        group["budget"] = "tensor"
    assert same(survivors(), [0], [1], [2], [3])
    for group in groups:
        group["budget"] = "global"
    assert same(survivors(), [0, 1, 2, 3])
    groups[1]["budget_name"] = groups[2]["budget_name"] = "b"
    assert same(survivors(), [0, 3], [1, 2])
    groups[2]["budget"] = "tensor"
    assert same(survivors(), [0, 3], [1], [2])
    groups[1]["lam"] = 0.0
    found = survivors()
    assert same(found, [0, 3], [2]) and found[1].all()


def test_a_room_that_was_shared_is_no_tensors_own() -> None:
    """One that comes into another budget, with a scale, does not write its cut over that of the first."""
    params = parameters()[:2]
    groups = [{"params": [p], "group_dim": 0, "budget_name": "a"} for p in params]
    optimizer = rk.RVSM(groups, **TOPK)
    for _ in range(2):
        for p in params:
            p.grad = torch.zeros_like(p)
        before = params[0].detach().clone()
        optimizer.step()
        optimizer.param_groups[1]["budget_name"], optimizer.param_groups[1]["group_scale"] = "b", True
    (keep,) = kept([before.norm(dim=1)], 0.3)
    assert torch.equal((params[0].detach() == before).all(dim=1), keep)


def test_a_step_of_another_thread_waits_for_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters()
    optimizer = rk.RVSM(params, **TOPK)
    give_gradients(params, 1)
    before, threads = [p.detach().clone() for p in params], []
    real = sparse_view.select_budget

    def select(*args: Any) -> None:
        threads.append(threading.Thread(target=optimizer.step))
        threads[-1].start()
        threads[-1].join(0.3)
        assert all(map(torch.equal, params, before))
        real(*args)

    monkeypatch.setattr(sparse_view, "select_budget", select)
    alive = optimizer.sparsity()
    threads[0].join()
    assert alive.total.numel - alive.total.zeros == math.ceil(0.3 * alive.total.numel)
    assert not torch.equal(params[0], before[0])


def test_older_pickles() -> None:
    """Of optimizers that knew no budgets."""
    for cls in (rk.RVSM, lambda params, **options: rk.RVSMWrapper(torch.optim.Adam(params), **options)):
        optimizer = cls(parameters(), penalty="topk", density=0.3, beta=1.0)
        for options in (*optimizer.param_groups, optimizer.defaults):
            del options["budget"], options["budget_name"]
        loaded = pickle.loads(pickle.dumps(optimizer))
        give_gradients(loaded.param_groups[0]["params"], 1)
        loaded.step()
        assert loaded.param_groups[0]["budget"] == "tensor" and "budget" in loaded.state_dict()["param_groups"][0]


def test_checkpoints_and_older_ones() -> None:
    params = parameters()
    optimizer = rk.RVSM(params, momentum=0.9, **TOPK)
    give_gradients(params, 1)
    optimizer.step()
    saved = optimizer.state_dict()
    other = rk.RVSM(parameters(), lr=0.1, momentum=0.9)
    other.load_state_dict(saved)
    assert other.param_groups[0]["budget"] == "global" and other.param_groups[0]["budget_name"] is None
    for group in saved["param_groups"]:
        del group["budget"], group["budget_name"]
    old = rk.RVSM(parameters(), lr=0.1, momentum=0.9)
    old.load_state_dict(saved)
    assert old.param_groups[0]["budget"] == "tensor"


def test_errors_come_before_a_change() -> None:
    params = parameters()
    for options, error, match in (
        ({"budget": "all"}, ValueError, "Invalid budget"),
        ({"budget_name": 3}, TypeError, "Invalid budget_name"),
    ):
        with pytest.raises(error, match=match):
            rk.RVSM(params, **{**TOPK, **options})
    for other, match in (({"density": 0.4}, "densities 0.3 and 0.4"), ({"group_dim": 0}, "elements and groups")):
        groups = [{"params": [params[0]], "density": 0.3}, {"params": [params[1]], "density": 0.3, **other}]
        optimizer = rk.RVSM(groups, **TOPK)
        give_gradients(params, 1)
        before = [p.detach().clone() for p in params]
        for call in (optimizer.step, optimizer.sparsify_, optimizer.sparsity, optimizer.penalty_value):
            with pytest.raises(ValueError, match=match):
                call()
        assert all(map(torch.equal, params, before)) and not optimizer.state
    with pytest.warns(UserWarning, match="budget has no effect"):
        rk.RVSM(params, lr=0.1, penalty="l0", budget="global")
    with pytest.raises(ValueError, match="each tensor"):
        rk.AdaptiveHardThreshold([{"params": params, "budget": "global"}], density=0.3)


def test_freed_memory_of_a_parameter_without_a_gradient(engine: str) -> None:
    """No engine looks at it before a step, but its budget reads it: an error with its name, not a crash."""
    params = parameters()
    optimizer = rk.RVSM([(f"w{k}", p) for k, p in enumerate(params)], **TOPK, engine=engine)
    led = rk.RVSM([(f"w{k}", p) for k, p in enumerate(params)], lr=0.1, beta=1.0, engine=engine)
    give_gradients(params, 1)
    params[1].grad = None
    params[1].untyped_storage().resize_(0)
    before = params[0].detach().clone()
    schedule = rk.SparsitySchedule(led, 0.5, end=4, every=1)
    for call in (optimizer.step, schedule.step, optimizer.sparsity, optimizer.sparsify_, optimizer.penalty_value):
        with pytest.raises(RuntimeError, match="memory of w1 was freed"):
            call()
    assert torch.equal(params[0], before) and not optimizer.state


def test_many_tensors_are_one_selection() -> None:
    """One call of the engine, however many tensors there are."""
    params = [nn.Parameter(torch.randn(1, generator=generator(k))) for k in range(300)]
    optimizer = rk.RVSM(params, **{**TOPK, "density": 0.25})
    for p in params:
        p.grad = torch.zeros_like(p)
    before = [p.detach().clone() for p in params]
    optimizer.step()
    stayed = sum(int((p == w).all()) for p, w in zip(params, before, strict=True))
    assert stayed == 75
