"""What an engine is told of a param group: numbers, names of states, and what decides about tables."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import nn

import rvsm_kernels as rk
from rvsm_kernels.engines import native
from rvsm_kernels.engines.interface import StepInputs
from rvsm_kernels.engines.reference import ReferenceEngine
from rvsm_kernels.method.bases import ADAMW, BASES, NONE, SGD
from rvsm_kernels.method.options import OPTIONS
from rvsm_kernels.method.penalties import PENALTIES
from rvsm_kernels.method.step_options import StepOptions


def told(**options: Any) -> StepOptions:
    return StepOptions.of({option.name: option.default for option in OPTIONS} | options, SGD)


@pytest.mark.parametrize("decoupled", [True, False])
def test_numbers(decoupled: bool) -> None:
    options = told(
        lr=0.5, momentum=0.75, dampening=0.25, weight_decay=0.125, maximize=True, penalty="tl1", lam=2.0, beta=4.0,
        a=3.0, group_dim=1, group_scale=True, group_lasso=0.0625, decoupled=decoupled, hold_zeros=True,
    )  # fmt: skip
    tau = 2.0 * math.sqrt(9) / 4.0
    rho = math.pow(6.75 * tau * 3.0 * 4.0, 1 / 3)
    prox = (3.0, PENALTIES["tl1"].cut(tau, 3.0), tau, 3.0, rho, rho - 3.0)
    split = (-1.0, 2.0, 0.0, 0.0625, 1.0) if decoupled else (-1.0, 0.0, 4.0, 0.0625, 1.0)
    assert options.numbers(9, 1) == pytest.approx((*prox, *split, 0.125, 0.75, 0.75, 0.75, 0.0, 0.5), rel=1e-15)
    assert options.numbers(9, 0)[11:] == (0.125, 0.0, 1.0, 0.75, 0.0, 0.5)
    assert options.numbers(1, 1)[2] == 0.5


@pytest.mark.parametrize("off", [{"penalty": None}, {"lam": 0.0}, {"beta": 0.0}])
def test_numbers_without_a_splitting(off: dict[str, Any]) -> None:
    options = told(**{"penalty": "l1", "lam": 1.0, "beta": 1.0, "a": 2.0, "method": "admm", "group_dim": 0, **off})
    assert options.numbers(5, 1)[:11] == (0.0, -1.0, 0.0, 2.0, 0.0, -2.0, 1.0, 0.0, 0.0, 0.0, 0.0)
    assert not options.split and options.method.name == "rvsm" and options.states == () and options.dims is None


def test_top_k_thresholds_as_l0() -> None:
    options = told(penalty="topk", density=0.5, lam=2.0, beta=1.0)
    assert options.topk and options.numbers(1, 1)[:2] == (2.0, 2.0)


def test_windows_keep_as_l0() -> None:
    options = told(penalty="nm", pattern=[2, 4], lam=2.0, beta=1.0)
    assert options.pattern == (2, 4) and options.numbers(1, 1)[0] == 2.0
    assert (
        told(penalty="nm", pattern=(2, 4), lam=0.0).pattern is None
        and told(penalty="l0", pattern=(2, 4)).pattern is None
    )


def test_states() -> None:
    """The base's first, then the method's."""
    for momentum, method, states in (
        (0.0, "rvsm", ()),
        (0.9, "rvsm", ("momentum_buffer",)),
        (0.0, "admm", ("dual",)),
        (0.9, "rvsm-delayed", ("momentum_buffer", "u")),
    ):
        options = told(momentum=momentum, method=method)
        assert options.states == states and options.base_states == (momentum != 0)


def test_snapshots() -> None:
    """A group can be edited in place afterwards."""
    group = {option.name: option.default for option in OPTIONS}
    group |= {"group_dim": [0, -1], "lr": torch.tensor(0.5), "penalty": "l1"}
    options = StepOptions.of(group, SGD)
    group["group_dim"].append(1)  # type: ignore[union-attr]
    group["lr"].fill_(2.0)  # type: ignore[union-attr]
    assert options.dims == (0, -1) and options.values["group_dim"] == (0, -1) and options.values["lr"] == 0.5


def test_structure() -> None:
    """What tables and launches follow from, and nothing that is only a number."""
    same = [{"lr": 0.5}, {"lam": 1.0}, {"beta": 1.0}, {"weight_decay": 0.5}, {"dampening": 0.5}, {"maximize": True}]
    other = [
        *({"penalty": None}, {"penalty": "tl1"}, {"method": "admm"}, {"momentum": 0.5}),
        *({"group_dim": 0}, {"group_dim": 0, "group_lasso": 0.5}, {"group_dim": 0, "group_scale": True}),
        {"penalty": "topk", "density": 0.5},
        *(
            {"penalty": "nm", "pattern": (2, 4)},
            {"penalty": "nm", "pattern": (1, 4)},
            {"penalty": "nm", "pattern": (2, 8)},
        ),
    ]
    structures = [told(**options).structure for options in other]
    assert all(told(**options).structure == told().structure for options in same)
    assert told(lam=0.0).structure == told(beta=0.0).structure == told(penalty=None).structure
    assert len({told().structure, *structures}) == 1 + len(other)
    coupled = [StepOptions.of(dict(told(decoupled=d).values), NONE) for d in (True, False)]
    assert [options.writes_gradient for options in coupled] == [False, True]
    assert coupled[0].structure != coupled[1].structure


def test_the_compiled_module_counts_alike() -> None:
    """Numbers pass between Python and C++ by their order alone."""
    if native.load_error is not None:
        pytest.skip(native.load_error)
    lengths = {"prox": 6, "split": 5, "sgd": len(told().numbers(1, 1)) - 11, "none": len(NONE.number_names)}
    lengths |= {"adamw": len(ADAMW.number_names)}
    assert list(native._C.numbers.items()) == list(lengths.items())
    assert [base.number for base in BASES.values()] == [0, 1, 2]
    assert tuple(PENALTIES) == native._C.penalties


# ---- who is told, and when -------------------------------------------------------------------------------------------


class Listening(ReferenceEngine):
    """The reference under another name: an optimizer asks it at once whether it serves a step."""

    name = "listening"

    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.fails = False

    def prepare(self, groups: Any, inputs: StepInputs) -> Any:
        self.heard.append(None if inputs.changed is None else set(inputs.changed))
        if self.fails:
            raise RuntimeError("not now")
        return super().prepare(groups, inputs)


@pytest.fixture
def listening(monkeypatch: pytest.MonkeyPatch) -> Listening:
    engine = Listening()
    monkeypatch.setattr("rvsm_kernels.optim.chosen_engines.make_engine", lambda name: engine)
    return engine


def optimizer_of_two_groups() -> rk.RVSM:
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    for p in params:
        p.grad = torch.ones(3)
    return rk.RVSM([{"params": [p]} for p in params], lr=0.5)


def test_an_engine_hears_of_the_groups_that_changed(listening: Listening) -> None:
    optimizer = optimizer_of_two_groups()
    optimizer.step()
    optimizer.step()
    assert listening.heard == [None, None]  # the first steps: of divided groups, then of all
    optimizer.step()
    optimizer.param_groups[1]["lr"] = 0.25
    optimizer.step()
    optimizer.step()
    assert listening.heard[2:] == [set(), {1}, set()]


def test_an_error_loses_no_change(listening: Listening) -> None:
    optimizer = optimizer_of_two_groups()
    for _ in range(3):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.25
    listening.fails = True
    with pytest.raises(RuntimeError, match="not now"):
        optimizer.step()
    listening.fails = False
    optimizer.param_groups[1]["lr"] = 0.125
    optimizer.step()
    assert listening.heard[-2:] == [{0}, {0, 1}]


def test_options_are_compared_once(listening: Listening) -> None:
    """A step whose options are those of the last makes nothing anew; nor does a tensor that holds the same number."""
    optimizer = optimizer_of_two_groups()
    optimizer.param_groups[0]["lr"] = torch.tensor(0.5)
    for _ in range(3):
        optimizer.step()
    told_before = list(optimizer._options)
    optimizer.step()
    assert all(a is b for a, b in zip(told_before, optimizer._options, strict=True))
    assert listening.heard[-1] == set()
    optimizer.param_groups[0]["lr"].fill_(0.25)
    optimizer.step()
    assert listening.heard[-1] == {0} and optimizer._options[0].values["lr"] == 0.25


@pytest.mark.parametrize("made", [rk.RVSM, rk.AdaptiveHardThreshold])
def test_the_signature_is_that_of_the_table(made: type) -> None:
    """Every option is a keyword with the default of the table; AdaptiveHardThreshold leaves some out."""
    table = {option.name: option.default for option in OPTIONS}
    parameters = inspect.signature(made).parameters
    others = ("params", "amp_scaling", "engine", "statistics")
    given = {name: p.default for name, p in parameters.items() if name not in others}
    assert given == {name: table[name] for name in given}
    assert made is not rk.RVSM or set(given) == set(table)


def test_a_subclass_of_a_user() -> None:
    """It has its defaults and attributes as any Python class."""

    class Mine(rk.RVSM):
        beta = "mine"

        def __init__(self, params: Any, lr: float = 0.5) -> None:
            super().__init__(params, lr, penalty="l1")

    optimizer = Mine([nn.Parameter(torch.ones(3))])
    assert optimizer.beta == "mine" and optimizer.param_groups[0]["lr"] == 0.5
    with pytest.raises(AttributeError, match="lam is an option of the param groups"):
        optimizer.lam  # noqa: B018


def test_an_error_and_an_edit_that_is_taken_back(listening: Listening) -> None:
    """What was found out of one group before the error of another stays known."""
    optimizer = optimizer_of_two_groups()
    for _ in range(3):
        optimizer.step()
    optimizer.param_groups[0]["unit_norm"] = True
    optimizer.param_groups[1]["lr"] = -1.0
    with pytest.raises(ValueError, match="Invalid learning rate"):
        optimizer.step()
    optimizer.param_groups[1]["lr"] = 0.5
    optimizer.step()
    (p,) = optimizer.param_groups[0]["params"]
    assert p.norm().item() == pytest.approx(1.0) and listening.heard[-1] == {0}
