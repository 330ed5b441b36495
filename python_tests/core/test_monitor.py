"""rk.Monitor and rk.plot: what they write and draw is what the optimizer says."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rvsm_kernels as rk


class Scalars:
    """A writer that keeps what it is given."""

    def __init__(self) -> None:
        self.steps: dict[int, dict[str, float]] = {}

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        assert isinstance(scalar_value, float) and math.isfinite(scalar_value), tag
        self.steps.setdefault(global_step, {})[tag] = scalar_value


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 10))


def optimizer_of(model: nn.Module, **options: Any) -> rk.RVSM:
    return rk.RVSM(rk.param_groups(model, **{"penalty": "l0", "lam": 2e-3, "beta": 1.0, **options}), lr=0.1)


def give_gradients(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = torch.zeros_like(p)


OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"penalty": "l1", "method": "admm"},
    {"penalty": "tl1", "structure": "in_channels", "group_scale": True},
    {"penalty": "topk", "density": 0.4},
    {"penalty": "nm", "pattern": (1, 2)},
    {"penalty": "topk", "density": 0.4, "budget": "global", "structure": "out_channels", "group_scale": True},
)


@pytest.mark.parametrize("options", OPTIONS, ids=repr)
def test_what_is_written(options: dict[str, Any], tmp_path: Path) -> None:
    model, writer = model_of(), Scalars()
    optimizer = optimizer_of(model, **options)
    monitor = rk.Monitor(optimizer, writer, every=2)
    for _ in range(5):
        give_gradients(model)
        optimizer.step()
        report, value = optimizer.sparsity(), float(optimizer.penalty_value())
        monitor.step()
        if monitor.last_step in writer.steps:
            found = writer.steps[monitor.last_step]
            assert found["sparsity/total"] == report.share and found["L_beta/penalty"] == value
            assert {f"sparsity/{row.name}": row.share for row in report.rows}.items() <= found.items()
            assert found["options/pull_rate/group 0"] == pytest.approx(0.1)
    assert sorted(writer.steps) == [2, 4]
    with optimizer.sparse_weights():
        u = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        if f"cut/{name}" not in found:  # windows have no cut
            assert name.endswith("bias") or options.get("penalty") == "nm"
            continue
        monitor.write()
        cut = writer.steps[5][f"cut/{name}"]
        dims = {"in_channels": 0, "out_channels": 1}.get(options.get("structure", ""))
        v = p.detach() + (optimizer.state[p]["dual"] if options.get("method") == "admm" else 0)
        r = v.abs() if dims is None else v.double().norm(dim=dims, keepdim=True).expand_as(v)
        assert torch.equal(u[name] == 0, r <= cut), name


@pytest.mark.parametrize("options", OPTIONS, ids=repr)
def test_statistics_in_the_place_of_counts(options: dict[str, Any]) -> None:
    """The same tags; the numbers are those of the weights that the step found."""
    model, counted, gathered = model_of(), Scalars(), Scalars()
    optimizer = rk.RVSM(
        rk.param_groups(model, **{"penalty": "l0", "lam": 2e-3, "beta": 1.0, **options}), lr=0.1, statistics=True
    )
    for _ in range(2):
        optimizer.collect_statistics = False
        rk.Monitor(optimizer, counted).write()
        optimizer.collect_statistics = True
        give_gradients(model)
        optimizer.step()
        rk.Monitor(optimizer, gathered).write()
        want, found = counted.steps[0], gathered.steps[0]
        assert want.keys() == found.keys()
        for tag in want:
            if not tag.startswith("cut/"):
                assert found[tag] == pytest.approx(want[tag], rel=1e-5), tag


def test_a_schedule_and_a_resumed_monitor() -> None:
    model, writer = model_of(), Scalars()
    optimizer = optimizer_of(model)
    schedule = rk.SparsitySchedule(optimizer, 0.5, end=10)
    monitor = rk.Monitor(optimizer, writer, schedule=schedule, every=3)
    monitor.load_state_dict({"last_step": 8})
    for _ in range(5):
        schedule.step()
    monitor.step()
    assert writer.steps[9]["schedule/sparsity"] == schedule.sparsity and monitor.state_dict() == {"last_step": 9}


def test_a_frozen_model_is_no_reason_to_warn() -> None:
    """There is no frozen=True to give to a monitor."""
    model, writer = model_of(), Scalars()
    optimizer = optimizer_of(model, penalty="topk", density=0.4, budget="global")
    model.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rk.Monitor(optimizer, writer).write()
    assert writer.steps[0]["sparsity/total"] == 0 and not any(tag.startswith("cut/") for tag in writer.steps[0])


def test_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    optimizer = optimizer_of(model_of())
    monitor = rk.Monitor(optimizer, tmp_path / "runs", every=1)
    monitor.step()
    monitor.writer.flush()  # type: ignore[attr-defined]
    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    (event,) = events.Scalars("sparsity/total")
    assert event.step == 1 and event.value == pytest.approx(optimizer.sparsity().share)


def test_errors() -> None:
    optimizer = optimizer_of(model_of())
    with pytest.raises(ValueError, match="Invalid every value: 0"):
        rk.Monitor(optimizer, Scalars(), every=0)
    with pytest.raises(TypeError, match="SummaryWriter or into a folder, not to 3"):
        rk.Monitor(optimizer, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="no optimizer of rvsm_kernels"):
        rk.Monitor(torch.optim.SGD(model_of().parameters()), Scalars())
    with pytest.raises(TypeError, match="SparsityReport or an optimizer, not 3"):
        rk.plot(3)


# ---- figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=repr)
def test_figures(options: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    optimizer = optimizer_of(model_of(), **options)
    before = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    figure = rk.plot(optimizer)
    shares, magnitudes = figure.axes
    report = optimizer.sparsity()
    assert [bar.get_width() for bar in shares.patches] == pytest.approx([100 * row.share for row in report.rows])
    if options.get("penalty") == "nm":
        assert not magnitudes.patches
        return
    (steps,) = magnitudes.patches
    counts, edges = steps.get_data().values, steps.get_data().edges
    below = sum(n for n, right in zip(counts, edges[1:], strict=True) if right <= 1 + 1e-9)
    groups = sum(row.groups for row in report.rows)
    assert below == sum(row.zero_groups for row in report.rows) and sum(counts) == groups
    figure.savefig(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000
    after = [p for group in optimizer.param_groups for p in group["params"]]
    assert all(map(torch.equal, before, after))


def test_figures_of_reports_and_of_nothing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for what in (rk.sparsity(model_of()), optimizer_of(model_of(), lam=0.0), rk.RVSM([torch.zeros(3)], penalty=None)):
        rk.plot(what).savefig(tmp_path / "a.png")
    many = nn.ModuleList(nn.Linear(2, 2) for _ in range(90))
    rk.plot(rk.sparsity(many)).savefig(tmp_path / "a.png")


def test_figures_of_odd_weights_and_names(tmp_path: Path) -> None:
    """Infinite cuts and weights are at the ends of the histogram; a name is no formula."""
    pytest.importorskip("matplotlib")
    w = nn.Parameter(torch.tensor([0.0, 1.0, math.inf, math.nan, 3.0]))
    for lam, beta, left in ((1e-3, 1.0, 0), (1e300, 1e-300, 3)):
        optimizer = rk.RVSM([{"params": [("$a_$b$", w)]}], lr=0.1, lam=lam, beta=beta)
        figure = rk.plot(optimizer)
        counts = figure.axes[1].patches[0].get_data().values
        assert sum(counts) == 3 and sum(counts[: len(counts) // 2]) == left
        figure.savefig(tmp_path / "a.png")


def test_many_layers_are_one_outline(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = rk.sparsity(nn.ModuleList(nn.Linear(2, 2, bias=k % 2 == 0) for k in range(300)))
    (outline,) = rk.plot(report).axes[0].patches
    assert list(outline.get_data().values) == [100 * row.share for row in report.rows]
