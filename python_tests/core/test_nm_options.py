"""N:M sparsity around the step: options that exclude each other, param_groups, schedules, checkpoints, compilation."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from builds import generator, quick_in_all
from torch import nn

import rvsm_kernels as rk
from runner import bits, same_bits
from rvsm_kernels.model.sparsity import follows

NM: dict[str, Any] = {"penalty": "nm", "pattern": (2, 4), "lam": 1.0, "beta": 0.5}


def weight(*shape: int) -> nn.Parameter:
    p = nn.Parameter(torch.randn(shape, generator=generator(0)))
    p.grad = torch.randn(shape, generator=generator(1))
    return p


WRONG = {
    "no pattern": ({"pattern": None}, ValueError, r"penalty='nm' needs a pattern"),
    "a number": ({"pattern": 2}, TypeError, r"pattern value: 2 \(a pair"),
    "three numbers": ({"pattern": (2, 4, 8)}, TypeError, r"pattern.*pair"),
    "floats": ({"pattern": (2.0, 4)}, TypeError, r"pattern.*integers"),
    "a string": ({"pattern": "2:4"}, TypeError, r"pattern.*'2:4'"),
    "true": ({"pattern": (True, 4)}, TypeError, r"pattern.*integers"),
    "none survive": ({"pattern": (0, 4)}, ValueError, r"pattern value: \(0, 4\)"),
    "all survive": ({"pattern": (4, 4)}, ValueError, r"pattern value: \(4, 4\)"),
    "too long": ({"pattern": (2, 17)}, ValueError, r"m <= 16"),
    "groups": ({"group_dim": 1}, ValueError, r"group_dim value: 1: penalty='nm'"),
    "the whole tensor": ({"group_dim": ()}, ValueError, r"group_dim value: \(\)"),
    "blocks": ({"group_dim": 0, "group_block": 2}, ValueError, r"group_dim value: 0: penalty='nm'"),
    "scaled": ({"group_scale": True}, ValueError, r"group_scale value: True: penalty='nm'"),
    "a density": ({"density": 0.5}, ValueError, r"density value: 0\.5: penalty='nm'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options(name: str) -> None:
    options, error, text = WRONG[name]
    for make in (rk.RVSM, rk.RVSMAdamW, rk.reference.RVSM):
        with pytest.raises(error, match=text):
            make([weight(4, 8)], **{**NM, **options})
    with pytest.raises(error, match=text):
        rk.RVSMWrapper(torch.optim.SGD([weight(4, 8)], lr=0.1), **{**NM, **options})
    optimizer = rk.RVSM([weight(4, 8)], lr=0.1, **NM)
    before = bits(optimizer.param_groups[0]["params"][0])
    optimizer.param_groups[0].update(options)
    with pytest.raises(error, match=text):
        optimizer.step()
    assert torch.equal(bits(optimizer.param_groups[0]["params"][0]), before)


WITHOUT_WINDOWS = [((8,), "1 dimension"), ((), "0 dimensions"), ((4, 6), "6 indices"), ((4, 3, 4, 4), "3 indices")]


@pytest.mark.parametrize(("shape", "text"), WITHOUT_WINDOWS)
def test_parameters_without_windows(shape: tuple[int, ...], text: str) -> None:
    """The error names the parameter and says what to do, before anything changes."""
    good, bad = weight(4, 8), weight(*shape)
    with pytest.raises(ValueError, match=rf"fit first\.bad: .*{text}.*without a penalty"):
        rk.RVSM([("good", good), ("first.bad", bad)], lr=0.1, **NM)
    optimizer = rk.RVSM([{"params": [("good", good)]}], lr=0.1, **NM)
    with pytest.raises(ValueError, match=r"first\.bad"):
        optimizer.add_param_group({"params": [("first.bad", bad)]})
    assert len(optimizer.param_groups) == 1
    optimizer = rk.RVSM([{"params": [good]}, {"params": [bad], "penalty": None}], lr=0.1, **NM)
    optimizer.step()
    before = bits(good)
    optimizer.param_groups[1]["penalty"] = "nm"
    with pytest.raises(ValueError, match=text):
        optimizer.step()
    assert torch.equal(bits(good), before)


def test_frozen_and_lazy_parameters_are_left_alone() -> None:
    frozen = nn.Parameter(torch.ones(3, dtype=torch.int64), requires_grad=False)
    rk.RVSM([weight(4, 8), frozen], lr=0.1, **NM).step()
    lazy = nn.LazyLinear(4, bias=False)
    optimizer = rk.RVSM(lazy.parameters(), lr=0.1, **NM)
    lazy(torch.randn(2, 6)).sum().backward()
    with pytest.raises(ValueError, match="6 indices"):
        optimizer.step()


def test_param_groups() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8),
        nn.ConvTranspose2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 12), nn.Linear(12, 6), nn.Linear(6, 4),
    )  # fmt: skip
    groups = rk.param_groups(model, penalty="nm", pattern=(2, 4))
    assert [name for name, _ in groups[0]["params"]] == ["1.weight", "6.weight", "7.weight"]
    assert groups[1]["penalty"] is None and "0.weight" in dict(groups[1]["params"])
    assert {"4.weight", "2.weight", "8.weight"} <= dict(groups[1]["params"]).keys(), "no whole windows of inputs"
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rk.RVSM(groups, lr=0.1).step()
    with pytest.raises(ValueError, match="needs a pattern"):
        rk.param_groups(model, penalty="nm")
    with pytest.raises(ValueError, match="structure='in_channels'"):
        rk.param_groups(model, penalty="nm", pattern=(2, 4), structure="in_channels")
    with pytest.raises(ValueError, match=r"0\.weight is without windows for 2:4.*3 indices.*all others"):
        rk.param_groups(nn.Sequential(nn.Conv2d(3, 8, 3)), penalty="nm", pattern=(2, 4))


def test_param_groups_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    rk.param_groups(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 4)), penalty="nm", pattern=(1, 4), verbose=True)
    text = capsys.readouterr().out
    assert "without windows for 1:4: dimension 1 has 3 indices" in text and "penalised" in text


def test_warnings() -> None:
    with pytest.warns(UserWarning, match="pattern has no effect with penalty='l0'"):
        rk.RVSM([weight(4, 8)], lr=0.1, penalty="l0", pattern=(2, 4))
    with pytest.warns(UserWarning, match="penalty='nm' with lam=0 has no effect"):
        rk.RVSM([weight(4, 8)], lr=0.1, **{**NM, "lam": 0.0})


@pytest.mark.parametrize("off", [{"lam": 0.0}, {"beta": 0.0}], ids=repr)
@pytest.mark.filterwarnings("ignore:.*has no effect")
def test_off(engine: str, off: dict[str, float]) -> None:
    p = weight(4, 8)
    want = (p - 0.1 * p.grad).detach()
    optimizer = rk.RVSM([p], lr=0.1, engine=engine, **{**NM, **off})
    optimizer.step()
    torch.testing.assert_close(p.detach(), want)
    assert optimizer.sparsity().share == 0 and float(optimizer.penalty_value()) == 0


def test_prox_has_no_windows() -> None:
    with pytest.raises(ValueError, match="'nm' has no tau"):
        rk.prox(torch.ones(4, 4), "nm", 0.1)


def test_schedule() -> None:
    """A schedule leads the other groups; beta of windows follows a pull_rate."""
    first, second = weight(4, 8), weight(16, 16)
    groups = [{"params": [first], **NM}, {"params": [second], "penalty": "l0"}]
    optimizer = rk.RVSM(groups, lr=0.1)
    schedule = rk.SparsitySchedule(optimizer, 0.75, end=4, every=1, pull_rate=0.2)
    for _ in range(4):
        optimizer.step()
        schedule.step()
    options = optimizer.param_groups[0]
    assert options["lam"] == 1.0 and options["pattern"] == (2, 4) and options["beta"] == pytest.approx(2.0)
    rows = optimizer.sparsity().rows
    assert rows[0].share == 0.5 and rows[1].share == pytest.approx(0.75, abs=0.01)
    with pytest.raises(ValueError, match=r"SparsitySchedule has nothing to lead.*pattern"):
        rk.SparsitySchedule(rk.RVSM([weight(4, 8)], lr=0.1, **NM), 0.5, end=10)


@quick_in_all
def test_checkpoints(engine: str) -> None:
    """A run goes on bit for bit; checkpoints without the option load; numbers of numpy are made plain."""
    p, q = weight(4, 8), weight(4, 8)
    pattern = np.array([1, 4])
    optimizer = rk.RVSM([p], lr=0.1, momentum=0.9, engine=engine, **{**NM, "method": "admm", "pattern": tuple(pattern)})
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    q.data.copy_(p.data)
    other = rk.RVSM([q], lr=0.5, penalty=None, engine=engine)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.param_groups[0]["pattern"] == (1, 4) and type(other.param_groups[0]["pattern"][0]) is int
    twin = copy.deepcopy(optimizer)
    for o in (optimizer, other, twin):
        o.param_groups[0]["params"][0].grad = torch.ones(4, 8)
        o.step()
    assert same_bits(p.detach(), q.detach()) and same_bits(p.detach(), twin.param_groups[0]["params"][0].detach())
    old = optimizer.state_dict()
    for group in old["param_groups"]:
        del group["pattern"]
    rk.RVSM([weight(4, 8)], lr=0.1, engine=engine, **NM).load_state_dict(old)
    plain = rk.RVSM([weight(4, 8)], lr=0.1, engine=engine)
    with pytest.raises(ValueError, match="needs a pattern"):
        plain.load_state_dict(old)
    assert plain.param_groups[0]["penalty"] == "l0"


def test_wrapper(engine: str) -> None:
    p, q = weight(4, 8), weight(4, 8)
    wrapped = rk.RVSMWrapper(torch.optim.SGD([p], lr=0.1), engine=engine, **NM)
    plain = rk.RVSM([q], lr=0.1, engine=engine, **NM)
    for _ in range(3):
        wrapped.step()
        plain.step()
    torch.testing.assert_close(p.detach(), q.detach())
    wrapped.sparsify_()
    assert follows(p.detach(), (2, 4))


def test_compiled_step_of_the_reference() -> None:
    torch._dynamo.reset()
    p, q = weight(4, 8), weight(4, 8)
    compiled = rk.RVSM([p], lr=0.1, momentum=0.9, engine="reference", **NM)
    eager = rk.RVSM([q], lr=0.1, momentum=0.9, engine="reference", **NM)
    step = torch.compile(compiled.step, backend="eager", fullgraph=True)
    for _ in range(3):
        step()
        eager.step()
    assert same_bits(p.detach(), q.detach())


def test_tensors_without_memory() -> None:
    p = nn.Parameter(torch.randn(4, 8, device="meta"))
    p.grad = torch.randn(4, 8, device="meta")
    optimizer = rk.RVSM([p], lr=0.1, **NM)
    optimizer.step()
    optimizer.sparsify_()
    q = nn.Parameter(torch.randn(4, 6, device="meta"))
    with pytest.raises(ValueError, match="6 indices"):
        rk.RVSM([q], lr=0.1, **NM)
