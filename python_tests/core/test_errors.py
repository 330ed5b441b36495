"""Every error: its type, what it names, and that nothing has changed when it is raised."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from builds import generator, missing, on_device, quick_in_all
from torch import Tensor, nn

import rvsm_kernels as rk
from runner import bits, checked_step, same_bits

INF, NAN = float("inf"), float("nan")
Wrong = tuple[dict[str, Any], type[Exception], str]

OPTIONS: dict[str, Wrong] = {
    # what the row alone would catch: what is given, the error, a pattern of its text
    "lr, a bound": ({"lr": -0.1}, ValueError, r"learning rate.*-0\.1"),
    "lr, NaN is below no bound": ({"lr": NAN}, ValueError, r"learning rate.*nan"),
    "lr, inf is above every bound": ({"lr": INF}, ValueError, r"learning rate.*inf"),
    "lr, text": ({"lr": "0.1"}, TypeError, r"learning rate.*0\.1"),
    "lr, None": ({"lr": None}, TypeError, r"learning rate.*None"),
    "lr, a tensor of two": ({"lr": torch.tensor([0.1, 0.2])}, ValueError, r"1-element"),
    "lr, the value of a tensor": ({"lr": torch.tensor(-0.5)}, ValueError, r"learning rate.*-0\.5"),
    "momentum": ({"momentum": -0.9}, ValueError, r"momentum.*-0\.9"),
    "momentum, not finite": ({"momentum": NAN}, ValueError, r"momentum.*nan"),
    "dampening, not finite": ({"dampening": NAN}, ValueError, r"dampening.*nan"),
    "dampening, text": ({"dampening": "a"}, TypeError, r"dampening.*a"),
    "weight_decay": ({"weight_decay": -1e-4}, ValueError, r"weight_decay.*-0\.0001"),
    "weight_decay, not finite": ({"weight_decay": INF}, ValueError, r"weight_decay.*inf"),
    "nesterov without momentum": (
        {"nesterov": True},
        ValueError,
        r"Nesterov momentum requires a momentum and zero damp",
    ),
    "nesterov with dampening": ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, ValueError, r"Nesterov"),
    "lam": ({"lam": -1e-3}, ValueError, r"lam.*-0\.001"),
    "lam, not finite": ({"lam": NAN}, ValueError, r"lam.*nan"),
    "beta": ({"beta": -2.0}, ValueError, r"beta.*-2"),
    "beta, not finite": ({"beta": INF}, ValueError, r"beta.*inf"),
    "a, 0 itself": ({"a": 0.0}, ValueError, r"a value.*0\.0"),
    "a, not finite": ({"a": NAN}, ValueError, r"a value.*nan"),
    "density, 0 itself": ({"density": 0.0}, ValueError, r"density.*0\.0"),
    "density, above 1": ({"density": 1.5}, ValueError, r"density.*1\.5"),
    "topk without density": ({"penalty": "topk"}, ValueError, r"topk.*density"),
    "topk, a wrong density": ({"penalty": "topk", "density": 0}, ValueError, r"density.*0"),
    "penalty": ({"penalty": "l2"}, ValueError, r"penalty.*'l2'(?=.*'l0')(?=.*'l1')(?=.*'tl1')"),
    "penalty, empty is not None": ({"penalty": ""}, ValueError, r"penalty.*''"),
    "method": ({"method": "sgd"}, ValueError, r"method.*'sgd'.*rvsm"),
    "method, None": ({"method": None}, ValueError, r"method.*None"),
    "group_lasso without groups": ({"group_lasso": 0.1}, ValueError, r"group_lasso.*0\.1.*group_dim"),
    "group_lasso": ({"group_lasso": -0.1, "group_dim": 0}, ValueError, r"group_lasso.*-0\.1"),
    "group_lasso, not finite": ({"group_lasso": NAN, "group_dim": 0}, ValueError, r"group_lasso.*nan"),
    "group_dim, too large": ({"group_dim": 2}, ValueError, r"group_dim.*2.*parameter 0 of group \d.*2 dim"),
    "group_dim, too small": ({"group_dim": -3}, ValueError, r"group_dim.*-3"),
    "group_dim, one of several": ({"group_dim": (0, 5)}, ValueError, r"group_dim.*\(0, 5\)"),
    "group_dim, twice by two names": ({"group_dim": (0, -2)}, ValueError, r"group_dim.*\(0, -2\)"),
    "group_dim, text": ({"group_dim": "0"}, TypeError, r"group_dim.*'0'"),
    "group_dim, a float": ({"group_dim": 0.5}, TypeError, r"group_dim.*0\.5"),
    "group_dim, a float among integers": ({"group_dim": (0, 1.0)}, TypeError, r"group_dim.*1\.0"),
}
"""Options are checked in Python, before an engine is asked: one engine is enough for most rows."""


def two() -> list[nn.Parameter]:
    """Two matrices with gradients."""
    params = [nn.Parameter(torch.full((3, 4), 0.5)), nn.Parameter(torch.full((4, 3), -0.5))]
    for p in params:
        p.grad = torch.ones_like(p)
    return params


class Frozen:
    """What an optimizer holds, to be found unchanged after an error."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.params = [p for g in optimizer.param_groups for p in g["params"]]
        self.weights = [bits(p) for p in self.params]
        self.state = copy.deepcopy({k: dict(optimizer.state[p]) for k, p in enumerate(self.params)})
        self.versions = [p._version for p in self.params]

    def check(self) -> None:
        """Not a bit differs."""
        for k, p in enumerate(self.params):
            assert torch.equal(bits(p), self.weights[k]), f"parameter {k} changed before the error"
            assert p._version == self.versions[k], f"parameter {k} was written to before the error"
            now = self.optimizer.state[p]
            assert now.keys() == self.state[k].keys(), f"state of parameter {k} changed before the error"
            for key, value in now.items():
                old = self.state[k][key]
                assert value is None or same_bits(value, old), f"{key} of parameter {k} changed before the error"


def refused(optimizer: Any, error: type[Exception], text: str, call: Callable[[], Any] | None = None) -> None:
    """A step raises, says why, and has changed nothing."""
    frozen = Frozen(optimizer)
    with pytest.raises(error, match=text):
        (optimizer.step if call is None else call)()
    frozen.check()


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", OPTIONS)
def test_constructor(row: str) -> None:
    options, error, text = OPTIONS[row]
    with pytest.raises(error, match=text):
        rk.RVSM(two(), **options, engine="reference")


@pytest.mark.parametrize("row", ["lr, a bound", "group_dim, too large", "group_dim, text"])
def test_options_of_a_group(engine: str, row: str) -> None:
    """In the constructor's list, and in add_param_group, which then adds nothing.

    A row for each place that checks: the options, the parameters, and the type of a dimension.
    """
    options, error, text = OPTIONS[row]
    with pytest.raises(error, match=text):
        rk.RVSM([{"params": two()}, {"params": two(), **options}], engine=engine)
    optimizer = rk.RVSM(two(), engine=engine)
    with pytest.raises(error, match=text):
        optimizer.add_param_group({"params": two(), **options})
    assert len(optimizer.param_groups) == 1
    checked_step(optimizer, "after a group that was refused")


def edited(engine: str, row: str, stepped: int) -> None:
    """The edit is to the last group: the first must not have been stepped when the error is raised."""
    options, error, text = OPTIONS[row]
    optimizer = rk.RVSM([{"params": two()}, {"params": two()}], lr=0.1, momentum=0.0, engine=engine)
    for _ in range(stepped):
        optimizer.step()
    good = {key: optimizer.param_groups[1][key] for key in options}
    optimizer.param_groups[1].update(options)
    refused(optimizer, error, text)
    refused(optimizer, error, text)  # and again: a refused edit is not taken for checked
    optimizer.param_groups[1].update(good)
    checked_step(optimizer, "after the edit was taken back")


EDITS = {next(iter(options)): row for row, (options, _, _) in reversed(OPTIONS.items())}
"""One row of each option: an optimizer that does not compare an option with its last value misses the edit."""


@pytest.mark.parametrize("row", EDITS.values(), ids=EDITS)
def test_edits_are_checked_at_the_next_step(row: str) -> None:
    edited("reference", row, 2)


@pytest.mark.parametrize("row", ["lam", "group_dim, too large"], ids=["a number", "what a table depends on"])
@pytest.mark.parametrize("stepped", [0, 2], ids=["nothing is built yet", "a table is there"])
def test_edits_are_checked_before_an_engine_steps(engine: str, row: str, stepped: int) -> None:
    edited(engine, row, stepped)


def test_unknown_arguments() -> None:
    with pytest.raises(TypeError, match="eps"):
        rk.RVSM(two(), eps=1.0)


# ---- engines ---------------------------------------------------------------------------------------------------------


def test_unknown_engine() -> None:
    with pytest.raises(ValueError, match=r"engine.*'cuda'.*native.*triton.*reference"):
        rk.RVSM(two(), engine="cuda")


@pytest.mark.parametrize("name", ["native", "triton"])
def test_missing_engine_says_what_to_do(name: str) -> None:
    """It is refused where the optimizer is made, with the reason."""
    if missing(name, "cpu") is None:
        rk.RVSM(two(), engine=name).step()
        return
    with pytest.raises(RuntimeError, match=name) as info:
        rk.RVSM(two(), engine=name)
    text = str(info.value)
    assert "engine=None" in text or "install" in text, text


# ---- gradients -------------------------------------------------------------------------------------------------------


def sparse(p: Tensor) -> None:
    p.grad = torch.ones_like(p).to_sparse()


def complex_gradient(p: Tensor) -> None:
    p.grad = torch.ones_like(p)
    p.data = p.data.to(torch.complex64)
    p.grad = torch.ones_like(p)


def other_shape(p: Tensor) -> None:
    p.grad = torch.ones_like(p)
    p.data = p.data[:, :2].clone()


def other_rank(p: Tensor) -> None:
    p.grad = torch.ones_like(p)
    p.data = p.data.reshape(-1).clone()


BAD_GRADIENTS: dict[str, tuple[Callable[[Tensor], None], str]] = {
    "layout": (sparse, "sparse"),
    "dtype": (complex_gradient, "complex"),
    "another number of elements": (other_shape, "shape"),
    "as many elements in another shape": (other_rank, "shape"),
}


@pytest.mark.parametrize(
    ("kind", "named"),
    [*(pytest.param(kind, False, id=kind) for kind in BAD_GRADIENTS), pytest.param("layout", True, id="names")],
)
@pytest.mark.parametrize("stepped", [0, 2], ids=["nothing is built yet", "a table is there"])
def test_bad_gradients(engine: str, kind: str, stepped: int, named: bool) -> None:
    """The last parameter of the last group has it; no other may have been touched, and the message says which it is."""
    spoil, text = BAD_GRADIENTS[kind]
    first, second = two(), two()
    names = ("alpha", "omega")
    last = list(zip(names, second, strict=True)) if named else second
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "lam": 1e-2, "group_dim": 0, "group_lasso": 0.1}
    groups = [{"params": [(f"first {k}", p) for k, p in enumerate(first)] if named else first}, {"params": last}]
    optimizer = rk.RVSM(groups, **options, engine=engine)
    for _ in range(stepped):
        optimizer.step()
    spoil(second[1])
    where = "omega" if named else r"1 of group 1"
    refused(optimizer, (RuntimeError, TypeError, ValueError), text)  # type: ignore[arg-type]
    refused(optimizer, (RuntimeError, TypeError, ValueError), where)  # type: ignore[arg-type]


@quick_in_all
def test_momentum_that_does_not_fit(engine: str) -> None:
    for spoiled in (torch.zeros(3), torch.zeros(4, 3, dtype=torch.int64), torch.zeros(3, 4)):
        optimizer = rk.RVSM(two(), lr=0.1, momentum=0.9, engine=engine)
        optimizer.step()
        optimizer.state[optimizer.param_groups[0]["params"][1]]["momentum_buffer"] = spoiled
        refused(optimizer, RuntimeError, "momentum_buffer.*1 of group 0")


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.int64, id="trained without requires_grad"),
        pytest.param(torch.complex64, id="complex"),
        pytest.param(torch.float8_e4m3fn, id="a floating type without a kernel"),
    ],
)
def test_parameters_of_other_dtypes(dtype: torch.dtype) -> None:
    """Refused where they would be trained; test_foreign.py has the frozen ones."""
    p = nn.Parameter(torch.zeros(3, 3).to(dtype), requires_grad=dtype.is_floating_point or dtype.is_complex)
    if not p.requires_grad:
        p.grad = torch.zeros_like(p)
    name = re.escape(str(dtype).removeprefix("torch."))
    with pytest.raises(TypeError, match=name):
        rk.RVSM([("odd one", p)], lr=0.1)


def test_expanded_parameters(engine: str) -> None:
    """Several elements are one in memory: torch's own optimizers refuse to write there, and so the others stay too."""
    first, p = two()[0], nn.Parameter(torch.ones(1, 3).expand(4, 3))
    p.grad = torch.ones(4, 3)
    optimizer = rk.RVSM([{"params": [first]}, {"params": [p], "penalty": None}], lr=0.1, engine=engine)
    refused(optimizer, RuntimeError, "expand|single memory location")


def test_group_dim_of_a_bias(engine: str) -> None:
    """The most likely mistake: model.parameters() with a group_dim; the message tells what to do."""
    with pytest.raises(ValueError, match=r"group_dim.*1.*bias.*param_groups"):
        rk.RVSM(nn.Linear(3, 4).named_parameters(), lr=0.1, group_dim=1, engine=engine)


# ---- NaN and Inf -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "options"),
    [
        pytest.param(NAN, {}, id="NaN beside its neighbours in a vector"),
        pytest.param(-INF, {}, id="an infinity does not become NaN elsewhere"),
        pytest.param(NAN, {"group_dim": 0, "group_lasso": 0.1}, id="NaN in no norm of a group"),
        pytest.param(NAN, {"group_dim": (), "decoupled": False}, id="NaN in no norm of a tensor"),
    ],
)
def test_a_broken_gradient_breaks_its_own_parameter_only(engine: str, bad: float, options: dict[str, Any]) -> None:
    """As in torch.optim.SGD: it propagates into that element; its neighbours and the other parameters train on."""
    gen = generator(1)
    params = [nn.Parameter(torch.randn(5, 7, generator=gen)) for _ in range(5)]
    lost: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "lam": 0.1, "beta": 0.5}
    optimizer = rk.RVSM([{"params": params[:3]}, {"params": params[3:]}], **lost, **options, engine=engine)
    for p in params:
        p.grad = torch.randn(5, 7, generator=gen)
    params[2].grad[3, 4] = bad
    checked_step(optimizer)
    assert not math.isfinite(params[2][3, 4].item())
    assert int((~torch.isfinite(params[2])).sum()) == 1
    for k, p in enumerate(params):
        if k != 2:
            assert torch.isfinite(p).all(), f"parameter {k}"
            assert torch.isfinite(optimizer.state[p]["momentum_buffer"]).all()


@pytest.mark.parametrize(
    ("penalty", "group_dim"),
    [
        pytest.param("l0", None, id="l0 compares"),
        pytest.param("l1", None, id="l1 subtracts"),
        pytest.param("tl1", None, id="tl1 takes the larger of two"),
        pytest.param("tl1", 0, id="a norm of a row"),
        pytest.param("l0", 1, id="a norm of a column"),
        pytest.param("l1", (), id="a norm of all"),
    ],
)
def test_a_broken_weight_stays_in_its_group(engine: str, penalty: str, group_dim: Any) -> None:
    """NaN in a weight shows in u and in the next weights, in its own group and nowhere else."""
    gen = generator(2)
    whole, other = nn.Parameter(torch.randn(6, 8, generator=gen)), nn.Parameter(torch.randn(6, 8, generator=gen))
    with torch.no_grad():
        whole[2, 5] = NAN
    optimizer = rk.RVSM([whole, other], lr=0.1, penalty=penalty, lam=0.1, beta=0.5, group_dim=group_dim, engine=engine)
    for p in (whole, other):
        p.grad = torch.ones(6, 8)
    with optimizer.sparse_weights():
        assert whole[2, 5].isnan()
        broken = whole.isnan()
    optimizer.step()
    broken |= whole.isnan()
    mine = torch.zeros(6, 8, dtype=torch.bool)
    mine[{None: (2, 5), 0: (2, slice(None)), 1: (slice(None), 5), (): (slice(None), slice(None))}[group_dim]] = True
    assert broken[2, 5] and not (broken & ~mine).any()
    assert torch.isfinite(other).all()


# ---- group_dim in memory ---------------------------------------------------------------------------------------------

SCATTERED = [
    pytest.param((2, 3, 4, 5), (1, 3), False, id="a summed dimension between"),
    pytest.param((4, 3, 2, 5), (1, 2), True, id="neighbours by name, in memory 0 2 3 1"),
    pytest.param((2, 3, 4, 5, 6), (0, 2, 4), False, id="three runs"),
]


def scattered(shape: tuple[int, ...], channels_last: bool) -> nn.Parameter:
    """A weight with a gradient."""
    values = on_device(np.random.default_rng(0).standard_normal(shape)).float()
    p = nn.Parameter(values.to(memory_format=torch.channels_last) if channels_last else values)
    p.grad = torch.ones_like(p)
    return p


@pytest.mark.parametrize(("shape", "group_dim", "channels_last"), SCATTERED)
def test_group_dims_that_do_not_collapse(
    native: str, shape: tuple[int, ...], group_dim: tuple[int, ...], channels_last: bool
) -> None:
    """ValueError, before anything is touched, and what to do about it."""
    first, p = scattered(shape, False), scattered(shape, channels_last)
    groups = [{"params": [first]}, {"params": [p], "group_dim": group_dim}]
    optimizer = rk.RVSM(groups, lr=0.1, momentum=0.9, lam=0.1, beta=0.5, engine=native)
    remedy = r"contiguous|permute|engine=.reference|memory"
    refused(optimizer, ValueError, f"group_dim.*({remedy})")
    refused(optimizer, ValueError, "0 of group 1")

    refused(optimizer, ValueError, "group_dim", optimizer.sparsify_)
    refused(optimizer, ValueError, "group_dim", optimizer.penalty_value)
    refused(optimizer, ValueError, "group_dim", optimizer.sparsity)
    with pytest.raises(ValueError, match="group_dim"):
        rk.prox(p, "l0", 0.1, 1.0, group_dim)
    before = [bits(first), bits(p)]
    with pytest.raises(ValueError, match="group_dim"), optimizer.sparse_weights():
        pytest.fail("sparse_weights() was entered")
    assert torch.equal(bits(first), before[0]) and torch.equal(bits(p), before[1])
    p.grad = None
    checked_step(optimizer, "nothing is left open: a step without that parameter's gradient works")


@pytest.mark.parametrize(("shape", "group_dim", "channels_last"), SCATTERED)
def test_the_remedy_works(shape: tuple[int, ...], group_dim: tuple[int, ...], channels_last: bool) -> None:
    """The reference takes any group_dim."""
    p = scattered(shape, channels_last)
    optimizer = rk.RVSM([p], lr=0.1, lam=0.1, beta=0.5, group_dim=group_dim, engine="reference")
    checked_step(optimizer)
