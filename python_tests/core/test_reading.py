"""What can be read (docs/method.md, section 4): u, its value, its zeros, those of a model, the engines of the build."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from builds import generator, on_device, quick_in_all
from torch import Tensor, nn

import definition
import rvsm_kernels as rk
from cases import Layout
from models import backward, small
from runner import bits, check_reading, check_u, checked_step, real, same_bits
from rvsm_kernels.engines import native as native_engine
from rvsm_kernels.engines.registry import engine_name_for

SPLITS: list[dict[str, Any]] = [
    {"penalty": "l0", "lam": 0.2, "beta": 0.5},
    {"penalty": "l1", "lam": 0.2, "beta": 0.5},
    {"penalty": "tl1", "lam": 0.2, "beta": 0.5, "a": 0.7},
    {"penalty": "l0", "lam": 4.0, "beta": 0.5, "group_dim": 0},
    {"penalty": "l1", "lam": 1.0, "beta": 0.5, "group_dim": 1, "group_scale": True},
    {"penalty": "tl1", "lam": 2.0, "beta": 0.5, "a": 3.0, "group_dim": (0, 1)},
    {"penalty": "tl1", "lam": 20.0, "beta": 0.5, "a": 1.0, "group_dim": ()},
]
each_split = pytest.mark.parametrize(
    ("split", "dtype"),
    [
        *((split, torch.float32) for split in SPLITS),
        pytest.param(SPLITS[2], torch.float64, id="elements of float64"),
        pytest.param(SPLITS[4], torch.float64, id="norms of float64"),
        pytest.param(SPLITS[0], torch.bfloat16, id="elements of bfloat16"),
        pytest.param(SPLITS[5], torch.bfloat16, id="norms of bfloat16"),
        pytest.param(SPLITS[1], torch.float16, id="elements of float16"),
        pytest.param(SPLITS[3], torch.float16, id="norms of float16"),
    ],
)


def params_of(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Weights of several sizes and layouts, some groups of them scaled down."""
    gen = generator(6)
    params = []
    orders = {(9, 7, 3, 3): (0, 1, 2, 3), (8, 6, 3, 3): (0, 2, 3, 1), (12, 17): (1, 0), (2, 0): (0, 1)}
    for shape, order in orders.items():
        w = torch.randn(shape, generator=gen, dtype=torch.float64)
        w *= torch.rand(w.shape[:2], generator=gen, dtype=torch.float64).reshape(w.shape[:2] + (1,) * (w.dim() - 2))
        params.append(nn.Parameter(Layout(order).place(w.to(dtype))[0]))
    return params


# ---- sparse_weights --------------------------------------------------------------------------------------------------


@each_split
def test_sparse_weights_hold_u_and_come_back(engine: str, split: dict[str, Any], dtype: torch.dtype) -> None:
    params = params_of(dtype)
    with torch.no_grad():
        params[0][0, 0, 0, 0] = -0.0
    optimizer = rk.RVSM(params, lr=0.1, **split, engine=engine)
    before, pointers = [bits(p) for p in params], [p.data_ptr() for p in params]
    wide = [real(p) for p in params]
    with optimizer.sparse_weights() as nothing:
        assert nothing is None
        for p, w in zip(params, wide, strict=True):
            check_u(p, w, optimizer.param_groups[0])
        assert not all(torch.equal(bits(p), old) for p, old in zip(params, before, strict=True))
        assert [p.data_ptr() for p in params] == pointers, "u is not in the parameters' own memory"
    for p, old in zip(params, before, strict=True):
        assert torch.equal(bits(p), old)
    assert [p.data_ptr() for p in params] == pointers
    assert all(p.requires_grad and p.grad is None and p.is_leaf for p in params)


def test_sparse_weights_evaluate_the_model(engine: str) -> None:
    """The model inside computes with u, also with gradients."""
    model, other = small(), small()
    optimizer = rk.RVSM(rk.param_groups(model, penalty="l0", lam=2e-3, beta=0.5), lr=0.1, engine=engine)
    x = torch.randn(4, 3, 6, 6)
    with torch.no_grad():
        for (name, q), p in zip(other.named_parameters(), model.parameters(), strict=True):
            if q.dim() >= 2:
                group = optimizer.param_groups[0]
                tau = definition.step_tau(group, p.shape)
                assert tau is not None, name
                q.copy_(on_device(definition.prox(real(p), "l0", tau, 1.0).astype("float32")))
    dense = model.eval()(x)
    with optimizer.sparse_weights():
        sparse = model(x)
        sparse.sum().backward()
    assert torch.equal(sparse, other.eval()(x)) and not torch.allclose(sparse, dense)
    assert torch.equal(model(x), dense)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_sparse_weights_come_back_after_an_exception(engine: str, error: type[BaseException]) -> None:
    params = params_of()
    optimizer = rk.RVSM(params, lr=0.1, **SPLITS[0], engine=engine)
    before = [bits(p) for p in params]
    with pytest.raises(error, match="in the middle"), optimizer.sparse_weights():
        raise error("in the middle")
    assert all(torch.equal(bits(p), b) for p, b in zip(params, before, strict=True))
    for p in params:
        p.grad = torch.ones_like(p)
    checked_step(optimizer, "the context is closed")


def test_sparse_weights_come_back_after_edits_inside(engine: str) -> None:
    """w is what was there at the start, whatever the body did to u."""
    params = params_of()
    optimizer = rk.RVSM(params, lr=0.1, **SPLITS[0], engine=engine)
    before = [bits(p) for p in params]
    with optimizer.sparse_weights(), torch.no_grad():
        for p in params:
            p.fill_(float("nan"))
    assert all(torch.equal(bits(p), b) for p, b in zip(params, before, strict=True))


def test_what_is_refused_inside(engine: str) -> None:
    """Nested use and step() raise; both leave u where it is, and w comes back."""
    params = params_of()
    optimizer = rk.RVSM(params, lr=0.1, momentum=0.9, **SPLITS[0], engine=engine)
    before = [bits(p) for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    with optimizer.sparse_weights():
        inside = [bits(p) for p in params]
        with pytest.raises(RuntimeError, match="sparse_weights"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="sparse_weights"), optimizer.sparse_weights():
            pytest.fail("nested use was not refused")
        with pytest.raises(RuntimeError, match="sparse_weights"):
            optimizer.sparsify_()
        assert all(torch.equal(bits(p), b) for p, b in zip(params, inside, strict=True))
    assert all(torch.equal(bits(p), b) for p, b in zip(params, before, strict=True))
    assert not any(optimizer.state.values())
    checked_step(optimizer)


def test_two_optimizers_do_not_mind_each_other(engine: str) -> None:
    first, second = (rk.RVSM(params_of(), lr=0.1, **SPLITS[0], engine=engine) for _ in range(2))
    with first.sparse_weights(), second.sparse_weights():
        pass
    check_reading(first)


def test_reading_inside_sparse_weights_is_about_w(engine: str) -> None:
    params = params_of()
    optimizer = rk.RVSM(params, lr=0.1, **SPLITS[5], engine=engine)
    value, report = optimizer.penalty_value(), optimizer.sparsity().to_dict()
    with optimizer.sparse_weights():
        assert optimizer.penalty_value() == value
        assert optimizer.sparsity().to_dict() == report


def test_groups_without_a_splitting_are_left_alone(engine: str) -> None:
    """penalty None, lam 0 or beta 0: u is w, no report, no value."""
    params = params_of()
    off = ({"penalty": None}, {"lam": 0.0}, {"beta": 0.0})
    groups = [{"params": [p], **o} for p, o in zip(params, off, strict=False)]
    optimizer = rk.RVSM(groups, lr=0.1, engine=engine)
    before = [bits(p) for p in params]
    with optimizer.sparse_weights():
        assert all(torch.equal(bits(p), b) for p, b in zip(params, before, strict=True))
    optimizer.sparsify_()
    assert all(torch.equal(bits(p), b) for p, b in zip(params, before, strict=True))
    value = optimizer.penalty_value()
    assert value.item() == 0 and value.dtype == torch.float64 and value.shape == ()


@pytest.mark.parametrize("split", SPLITS)
def test_sparsify(engine: str, split: dict[str, Any]) -> None:
    """w becomes the u that sparse_weights() shows, bit for bit; hard thresholding is idempotent."""
    params = params_of()
    optimizer = rk.RVSM(params, lr=0.1, momentum=0.9, **split, engine=engine)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    momenta = [bits(optimizer.state[p]["momentum_buffer"]) for p in params if p.numel()]
    with optimizer.sparse_weights():
        us = [p.detach().clone() for p in params]
    assert optimizer.sparsify_() is None
    assert all(same_bits(p, u) for p, u in zip(params, us, strict=True))
    kept = [bits(optimizer.state[p]["momentum_buffer"]) for p in params if p.numel()]
    assert all(torch.equal(m, n) for m, n in zip(momenta, kept, strict=True))
    if split["penalty"] == "l0":
        optimizer.sparsify_()
        assert all(same_bits(p, u) for p, u in zip(params, us, strict=True))


# ---- penalty_value ---------------------------------------------------------------------------------------------------


@each_split
def test_penalty_value(engine: str, split: dict[str, Any], dtype: torch.dtype) -> None:
    """A 0-dim float64 tensor, against the definition (in the runner); L_beta(w, u) is loss + penalty_value()."""
    params = params_of(dtype)
    optimizer = rk.RVSM(params, lr=0.1, **split, engine=engine)
    check_reading(optimizer)
    value = optimizer.penalty_value()
    assert value.shape == () and value.dtype == torch.float64 and not value.requires_grad
    assert value > 0 and isinstance(torch.ones((), requires_grad=True) + value, Tensor)


@quick_in_all
def test_penalty_value_by_hand(engine: str) -> None:
    """l0 with tau = 1/2: cut 1. w = (3, 0.5, -2, 0): two survivors, lam * 2 + beta / 2 * 0.25."""
    p = nn.Parameter(torch.tensor([3.0, 0.5, -2.0, 0.0]))
    optimizer = rk.RVSM([p], penalty="l0", lam=0.2, beta=0.4, engine=engine)
    assert optimizer.penalty_value().item() == pytest.approx(0.4 + 0.2 * 0.25, rel=1e-12)
    group = optimizer.param_groups[0]
    group.update(penalty="l1")  # tau = .5: u = (2.5, 0, -1.5, 0)
    assert optimizer.penalty_value().item() == pytest.approx(0.2 * 4.0 + 0.2 * 0.75, rel=1e-6)
    group.update(group_dim=(), group_scale=True, lam=0.1)  # norm sqrt 13.25, tau = .1 * 2 / .4 = .5
    norm = 13.25**0.5
    assert optimizer.penalty_value().item() == pytest.approx(0.2 * (norm - 0.5) + 0.2 * 0.25, rel=1e-6)


def test_sum_of_many_terms_is_in_float64(engine: str) -> None:
    """A float32 sum of a million terms of 1e-3 would be off in the fourth digit."""
    p = nn.Parameter(torch.full((1_000_000,), 1.0))
    optimizer = rk.RVSM([p], penalty="l0", lam=1e-3, beta=1.0, engine=engine)
    assert optimizer.penalty_value().item() == pytest.approx(1e3, rel=1e-9)


# ---- sparsity --------------------------------------------------------------------------------------------------------


def test_sparsity_counts(engine: str) -> None:
    """Zeros of u and groups with a norm of zero, per parameter and in total."""
    w = torch.ones(4, 3, 2)
    w[1] = 0.01
    w[2, 0] = 0.0
    v = torch.tensor([[0.01, 0.01], [0.01, 0.01]])
    groups = [
        {"params": [("w", nn.Parameter(w)), ("v", nn.Parameter(v))], "group_dim": 0},
        {"params": [("x", nn.Parameter(torch.tensor([0.01, 1.0, -0.01, 2.0, 0.0])))]},
        {"params": [("bias", nn.Parameter(torch.zeros(3)))], "penalty": None},
    ]
    optimizer = rk.RVSM(groups, lr=0.1, penalty="l0", lam=0.005, beta=1.0, engine=engine)
    report = optimizer.sparsity()
    rows = {r.name: r for r in report.rows}
    assert list(rows) == ["w", "v", "x"]
    assert (rows["w"].zeros, rows["w"].numel, rows["w"].zero_groups, rows["w"].groups) == (8, 24, 1, 4)
    assert (rows["v"].zeros, rows["v"].numel, rows["v"].zero_groups, rows["v"].groups) == (4, 4, 2, 2)
    assert (rows["x"].zeros, rows["x"].numel, rows["x"].zero_groups, rows["x"].groups) == (3, 5, 3, 5)
    assert rows["w"].shape == (4, 3, 2)
    assert (report.total.zeros, report.total.numel) == (15, 33)
    assert (report.total.zero_groups, report.total.groups) == (6, 11)
    assert report.share == pytest.approx(15 / 33) and report.group_share == pytest.approx(6 / 11)
    assert rows["w"].share == pytest.approx(1 / 3) and rows["w"].group_share == 0.25


def test_sparsity_is_a_table_and_plain_values(engine: str) -> None:
    optimizer = rk.RVSM(rk.param_groups(small(), penalty="l0", lam=2e-3, beta=0.5), lr=0.1, engine=engine)
    report = optimizer.sparsity()
    values = report.to_dict()
    assert json.loads(json.dumps(values)) == json.loads(json.dumps(report.to_dict()))
    assert [row["name"] for row in values["parameters"]] == ["conv.weight", "hidden.weight", "head.weight"]
    assert sum(row["zeros"] for row in values["parameters"]) == values["total"]["zeros"] > 0
    for row in (*values["parameters"], values["total"]):
        assert 0 <= row["share"] <= 1 and isinstance(row["zeros"], int)
    text = str(report)
    assert len(text.splitlines()) >= 5
    assert "conv.weight" in text and "total" in text and "7x3x3x3" in text


def test_sparsity_without_names_and_without_parameters(engine: str) -> None:
    optimizer = rk.RVSM(params_of(), lr=0.1, engine=engine)
    report = optimizer.sparsity()
    assert len({r.name for r in report.rows}) == 4
    assert report.rows[3].numel == 0 and report.rows[3].share == 0
    nothing = rk.RVSM([{"params": params_of(), "penalty": None}], lr=0.1, engine=engine).sparsity()
    assert nothing.rows == [] and nothing.share == 0 and str(nothing)


def test_sparsity_changes_nothing(engine: str) -> None:
    params = params_of()
    optimizer = rk.RVSM(params, lr=0.1, **SPLITS[3], engine=engine)
    before, versions = [bits(p) for p in params], [p._version for p in params]
    optimizer.sparsity()
    optimizer.penalty_value()
    assert all(torch.equal(bits(p), b) for p, b in zip(params, before, strict=True))
    assert [p._version for p in params] == versions


@pytest.mark.parametrize("group_dim", [None, 0, 1, (0, 1), ()])
def test_sparsity_agrees_with_sparse_weights(engine: str, group_dim: Any) -> None:
    size = {None: 1, 0: 60, 1: 60, (0, 1): 9, (): 500}[group_dim]
    params = params_of()[:2]
    optimizer = rk.RVSM(params, lr=0.1, penalty="l0", lam=0.1 * size, beta=0.5, group_dim=group_dim, engine=engine)
    report = optimizer.sparsity()
    with optimizer.sparse_weights():
        for row, p in zip(report.rows, params, strict=True):
            assert row.zeros == int((p == 0).sum())
            norms = definition.over_groups(definition.magnitudes(real(p), group_dim), group_dim)
            assert (row.zero_groups, row.groups) == (int((norms < 1e-15).sum()), norms.size)
    assert group_dim == () or 0 < report.total.zero_groups < report.total.groups


def test_sparsity_of_a_model_as_it_is() -> None:
    model = small()
    with torch.no_grad():
        model.conv.weight[:, 1] = 0.0
        model.head.weight[2] = 1e-17
    report = rk.sparsity(model)
    assert [r.name for r in report.rows] == ["conv.weight", "hidden.weight", "head.weight"]
    assert [r.zeros for r in report.rows] == [63, 0, 0]
    rows = {r.name: r for r in rk.sparsity(model, group_dim=1).rows}
    assert (rows["conv.weight"].zero_groups, rows["conv.weight"].groups) == (1, 3)
    rows = {r.name: r for r in rk.sparsity(model, group_dim=0).rows}
    assert (rows["head.weight"].zero_groups, rows["head.weight"].groups, rows["head.weight"].zeros) == (1, 4, 0)
    with pytest.raises(ValueError, match=r"3.*hidden|hidden.*3"):
        rk.sparsity(model, group_dim=3)


def test_reading_after_training_shows_the_trained_weights(engine: str) -> None:
    model = small()
    optimizer = rk.RVSM(rk.param_groups(model, penalty="l0", lam=2e-3, beta=0.5), lr=0.05, momentum=0.9, engine=engine)
    for k in range(4):
        backward(model, optimizer, k)
        optimizer.step()
        check_reading(optimizer, f"after step {k}")


# ---- the build -------------------------------------------------------------------------------------------------------


def test_engines() -> None:
    """Which engines this build has, and a reason for each that is missing."""
    table = rk.engines()
    assert {"native", "triton", "reference"} <= set(table)
    json.dumps(table)
    for devices in table.values():
        assert devices
        for state in devices.values():
            assert isinstance(state, str) and state
    assert "available" in table["reference"].values()
    table["native"]["cpu"] = "edited"
    assert rk.engines()["native"]["cpu"] != "edited"


def test_a_gpu_that_the_kernels_do_not_run_on(on_cpu: None, native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another architecture or an older driver: said by engines(), and engine=None goes on to the next engine."""
    if not native_engine._C.has_cuda:
        pytest.skip("a build without CUDA")
    assert rk.engines()["native"]["cuda"] == "available", "asked of a process that has no CUDA tensors"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU 9000")
    monkeypatch.setattr(native_engine._C, "probe_cuda", lambda device: "no kernel image")
    native_engine._probe.cache_clear()
    try:
        assert "GPU 9000" in rk.engines()["native"]["cuda"] and "no kernel image" in rk.engines()["native"]["cuda"]
        assert engine_name_for(None, "cuda") == "reference" and engine_name_for(None, "cpu") == "native"
        with pytest.raises(RuntimeError, match="GPU 9000"):
            engine_name_for("native", "cuda")
    finally:
        native_engine._probe.cache_clear()


def test_engine_none_takes_the_fastest(native: str) -> None:
    """What engine=None trains is bit for bit what engine="native" trains."""
    one, other = params_of(), params_of()
    for params, engine in ((one, None), (other, native)):
        optimizer = rk.RVSM(params, lr=0.1, momentum=0.9, **SPLITS[5], engine=engine)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert all(same_bits(p, q) for p, q in zip(one, other, strict=True))


def test_module_as_a_program() -> None:
    """python -m rvsm_kernels: versions, threads and engines for a bug report."""
    root = str(Path(rk.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "rvsm_kernels"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    text = result.stdout
    assert rk.__version__ in text and torch.__version__ in text and "threads" in text
    for name, devices in rk.engines().items():
        for device, state in devices.items():
            assert any(name in line and device in line and state in line for line in text.splitlines()), (name, device)
