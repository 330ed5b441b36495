"""lr, lam, beta and weight_decay as tensors on the device: no host reads them; a step is that of plain numbers."""

from __future__ import annotations

import contextlib
import copy
import io
import random
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from builds import DEVICE, is_slow, start
from torch import Tensor, nn

import rvsm_kernels as rk
from runner import checked_step, same_bits
from rvsm_kernels.engines.checks import check_device_numbers
from rvsm_kernels.method import bases, device_numbers
from rvsm_kernels.method.step_options import StepOptions

NUMBERS = {"lr": 0.0625, "lam": 0.375, "beta": 0.75, "weight_decay": 0.03125}
"""What bfloat16 and float16 hold too."""

TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SGD, ADAMW = rk.RVSM, rk.RVSMAdamW
MOMENTUM: dict[str, Any] = {"momentum": 0.75}


ENGINES = ("interpreted", "triton") if DEVICE == "cpu" else ("native", "triton")
"""The engines whose kernels read numbers."""

quick = pytest.mark.parametrize("engine", ENGINES, indirect=True)
"""For a test that the quick check runs on every engine, also on those that are slow."""


@pytest.fixture(params=[pytest.param(n, marks=pytest.mark.slow) if is_slow(n) else n for n in ENGINES])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The engines whose kernels read numbers; here they read those on the CPU too."""
    monkeypatch.setattr(device_numbers, "HOST_TYPES", set())
    yield from start(request.param)


def params_of(dtype: torch.dtype) -> list[nn.Parameter]:
    """Of several shapes, one of them with another order of its dimensions in memory."""
    gen = torch.Generator().manual_seed(5)
    shapes = ((7, 5), (3, 4, 2, 2), (1, 30))
    tensors = [torch.randn(shape, generator=gen).to(DEVICE, dtype) for shape in shapes]
    tensors[1] = tensors[1].to(memory_format=torch.channels_last)
    return [nn.Parameter(t) for t in tensors]


def set_gradients(k: int, *of: Sequence[nn.Parameter]) -> None:
    gen = torch.Generator().manual_seed(100 + k)
    for same in zip(*of, strict=True):
        grad = torch.randn(same[0].shape, generator=gen)
        for p in same:
            p.grad = torch.empty_like(p).copy_(grad)


@contextlib.contextmanager
def no_reading() -> Iterator[None]:
    """Whatever brings a number of a tensor to the host raises; Triton's interpreter may, inside of a kernel."""
    names = ("item", "tolist", "numpy", "__float__", "__int__", "__bool__", "__index__")
    inside = [False]

    def refusing(plain: Callable[..., Any]) -> Callable[..., Any]:
        def read(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            assert inside[0], "a number on the device was read"
            return plain(self, *args, **kwargs)

        return read

    def interpreting(plain: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            inside[0] = True
            try:
                return plain(*args, **kwargs)
            finally:
                inside[0] = False

        return run

    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(Tensor, name, refusing(getattr(Tensor, name)))
        if "triton.runtime.interpreter" in sys.modules:
            executor = sys.modules["triton.runtime.interpreter"].GridExecutor
            patch.setattr(executor, "__call__", interpreting(executor.__call__))
        yield


def tensors_of(numbers: dict[str, float], types: Sequence[torch.dtype] = TYPES) -> dict[str, Any]:
    """The numbers as tensors of these types, of shapes () and (1,)."""
    made = {}
    for k, (name, number) in enumerate(numbers.items()):
        made[name] = torch.tensor(number, dtype=types[k % len(types)], device=DEVICE).reshape((1,) * (k % 2))
    return made


class Twins:
    """An optimizer with numbers on the device and one with plain numbers, which get the same gradients."""

    def __init__(
        self, engine: str, cls: type, dtype: torch.dtype = torch.float32, on_device: Sequence[str] = tuple(NUMBERS),
        types: Sequence[torch.dtype] = TYPES, **options: Any,
    ) -> None:  # fmt: skip
        numbers = {**NUMBERS, **{name: options.pop(name) for name in NUMBERS if name in options}}
        self.tensors = tensors_of({name: numbers[name] for name in on_device}, types)
        self.params, self.theirs = params_of(dtype), params_of(dtype)
        self.optimizer = cls(self.params, **{**numbers, **self.tensors, **options}, engine=engine)
        self.plain = cls(self.theirs, **numbers, **options, engine=engine)
        self.steps = 0

    def fill(self, **numbers: float) -> None:
        """Other numbers, in place."""
        for name, number in numbers.items():
            self.tensors[name].fill_(number)
            self.plain.param_groups[0][name] = number

    def step(self, steps: int = 1, *, unread: bool = True) -> None:
        """Steps of both; but for the first, in which states are made, nothing is read on the host."""
        for _ in range(steps):
            set_gradients(self.steps, self.params, self.theirs)
            with no_reading() if unread and self.steps > 0 else contextlib.nullcontext():
                self.optimizer.step()
            self.plain.step()
            self.steps += 1

    def check(self, ulps: float = 4) -> None:
        """Weights and states are alike; the same states are there."""
        for p, q in zip(self.params, self.theirs, strict=True):
            close(p, q, ulps)
            ours, theirs = self.optimizer.state.get(p, {}), self.plain.state.get(q, {})
            assert ours.keys() == theirs.keys()
            for name in ours:
                close(ours[name], theirs[name], ulps)


def close(x: Tensor, y: Tensor, ulps: float) -> None:
    """A few ulp of each element, and of the largest where it came from a difference."""
    assert x.dtype == y.dtype and x.shape == y.shape
    if not x.is_floating_point():
        return  # the rest of a weight that `low` holds follows its bits: one ulp of float32 is any number of it
    bound = ulps * torch.finfo(x.dtype).eps
    a, b = x.detach().double(), y.detach().double()
    torch.testing.assert_close(a, b, rtol=bound, atol=bound * max(1.0, float(b.abs().max())), equal_nan=True)


CASES: dict[str, tuple[type, dict[str, Any]]] = {
    "l1": (SGD, {"penalty": "l1", **MOMENTUM}),
    "l0, coupled": (SGD, {"penalty": "l0", "decoupled": False, "nesterov": True, **MOMENTUM}),
    "tl1": (SGD, {"penalty": "tl1", "a": 2.0}),
    "tl1 beyond its critical tau, maximize": (SGD, {"penalty": "tl1", "a": 0.5, "lam": 2.0, "maximize": True}),
    "topk": (SGD, {"penalty": "topk", "density": 0.4, **MOMENTUM}),
    "no penalty": (SGD, {"penalty": None, **MOMENTUM}),
    "delayed": (SGD, {"penalty": "l1", "method": "rvsm-delayed"}),
    "delayed, coupled": (SGD, {"penalty": "tl1", "method": "rvsm-delayed", "decoupled": False, **MOMENTUM}),
    "admm": (SGD, {"penalty": "l0", "method": "admm", **MOMENTUM}),
    "groups": (SGD, {"penalty": "l0", "group_dim": 0, "lam": 2.0, **MOMENTUM}),
    "groups, scaled, lasso": (SGD, {"penalty": "tl1", "group_dim": 1, "group_scale": True, "group_lasso": 0.1}),
    "whole tensors, admm, lasso": (SGD, {"penalty": "l1", "group_dim": (), "method": "admm", "group_lasso": 0.1}),
    "groups, topk": (SGD, {"penalty": "topk", "density": 0.5, "group_dim": 0, "decoupled": False}),
    "unit norm": (SGD, {"penalty": "l1", "unit_norm": True}),
    "adamw": (ADAMW, {"penalty": "l1"}),
    "adamw, amsgrad, admm": (ADAMW, {"penalty": "tl1", "amsgrad": True, "method": "admm"}),
    "adamw, groups, coupled": (ADAMW, {"penalty": "l0", "group_dim": 0, "lam": 2.0, "decoupled": False}),
    "adamw, delayed": (ADAMW, {"penalty": "l0", "method": "rvsm-delayed"}),
}


@quick
def test_a_step_of_each_base(engine: str) -> None:
    """The numbers change in place between the steps; in the last one lr is 0."""
    for case in ("groups, scaled, lasso", "adamw, amsgrad, admm"):
        cls, options = CASES[case]
        twins = Twins(engine, cls, **options)
        twins.step(2)
        twins.fill(lr=0.125, lam=0.25, beta=0.5, weight_decay=0.0)
        twins.step()
        twins.fill(lr=0.0)
        twins.step()
        twins.check()


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_that_of_plain_numbers(engine: str, case: str) -> None:
    """The numbers change in place between the steps."""
    cls, options = CASES[case]
    twins = Twins(engine, cls, **options)
    twins.step(2)
    twins.fill(lr=0.125, lam=2 * options.get("lam", NUMBERS["lam"]), weight_decay=0.0)
    twins.step(2)
    twins.fill(beta=0.5, weight_decay=0.25)
    twins.step()
    twins.check()


@pytest.mark.parametrize("case", CASES)
def test_statistics_are_those_of_plain_numbers(engine: str, case: str) -> None:
    """The numbers that a row is multiplied by are read on the device too; where lam is 0, u is w."""
    if engine == "triton":
        pytest.skip("torch's operators make its statistics, and read the numbers")
    cls, options = CASES[case]
    twins = Twins(engine, cls, statistics=True, **options)
    for k in range(4):
        twins.step()
        ours, theirs = twins.optimizer.statistics().rows, twins.plain.statistics().rows
        for x, y in zip(ours, theirs, strict=True):
            told = ("name", "split", "groups")  # a lam on the device may become positive at any time
            found, want = ({k: v for k, v in row.to_dict().items() if k not in told} for row in (x, y))
            assert found == pytest.approx(want, rel=1e-4, abs=1e-9), (case, k)
            assert k < 3 or found["penalty"] == found["gap"] == 0
        twins.fill(beta=0.5, lam=[0.25, 0.5, 0.0, 0.0][k])


@pytest.mark.parametrize("cls", [SGD, ADAMW])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_types_of_parameters(engine: str, cls: type, dtype: torch.dtype) -> None:
    twins = Twins(engine, cls, dtype, penalty="tl1", method="admm")
    twins.step(2)
    twins.fill(lr=0.125, lam=0.25, beta=0.5, weight_decay=0.25)
    twins.step()
    twins.check()


@pytest.mark.parametrize("on_device", [("lr",), ("lam",), ("beta",), ("weight_decay",), ("lr", "beta")], ids=repr)
@pytest.mark.parametrize("cls", [SGD, ADAMW])
def test_some_numbers_are_plain(engine: str, cls: type, on_device: Sequence[str]) -> None:
    """Of any type of float; here of one that is not exact."""
    for dtype in (torch.float32, torch.float64):
        twins = Twins(engine, cls, dtype, on_device, [torch.float64], lr=0.07, lam=0.3, beta=0.7, weight_decay=0.011)
        twins.step(2)
        twins.fill(**{name: 1.3 * NUMBERS[name] for name in on_device})
        twins.step()
        twins.check()


@pytest.mark.parametrize("options", [{"master_weights": True}, {"rounding": "stochastic", "seed": 3}], ids=repr)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", [SGD, ADAMW])
def test_half_types_that_learn(engine: str, cls: type, dtype: torch.dtype, options: dict[str, Any]) -> None:
    twins = Twins(engine, cls, dtype, penalty="l1", method="admm", **options)
    twins.step(2)
    twins.fill(lr=0.125, lam=0.25)
    twins.step()
    twins.check()


def test_groups_of_both_kinds(engine: str) -> None:
    """Numbers of one group on the device, plain ones of another, in one launch."""
    params, theirs = params_of(torch.float32), params_of(torch.float32)
    lam = torch.tensor(0.375)
    for k, (ps, value) in enumerate(((params, lam), (theirs, 0.375))):
        groups = [{"params": ps[:2], "lam": value}, {"params": ps[2:], "lam": 0.5, "penalty": "l1", "lr": 0.0}]
        optimizer = rk.RVSM(groups, lr=0.1, beta=0.75, penalty="tl1", method="admm", engine=engine)
        for step in range(3):
            set_gradients(step, ps)
            optimizer.step()
            if k == 0 and step == 0:
                before = [p.detach().clone() for p in ps[2:]], [optimizer.state[p]["dual"].clone() for p in ps[2:]]
        if k == 0:
            assert same_bits(params[2], before[0][0]) and same_bits(optimizer.state[params[2]]["dual"], before[1][0])
    for p, q in zip(params, theirs, strict=True):
        close(p, q, 4)


@pytest.mark.parametrize("method", ["rvsm", "rvsm-delayed", "admm"])
@pytest.mark.parametrize("name", ["lam", "beta"])
@pytest.mark.parametrize("split", [{"penalty": "l1"}, {"penalty": "topk", "density": 0.5, "group_dim": 0}], ids=repr)
def test_0_switches_the_splitting_off(engine: str, split: dict[str, Any], name: str, method: str) -> None:
    """While it is off the step is the base's alone; it can be switched on again."""
    twins = Twins(engine, SGD, method=method, decoupled=method != "admm", **split, **MOMENTUM)
    twins.step()
    twins.fill(**{name: 0.0})
    twins.step(2)
    for p, q in zip(twins.params, twins.theirs, strict=True):
        close(p, q, 4)
        close(twins.optimizer.state[p]["momentum_buffer"], twins.plain.state[q]["momentum_buffer"], 4)
        if method == "admm":  # as a dual that begins anew
            assert not twins.optimizer.state[p]["dual"].any()
        if method == "rvsm-delayed":  # u is w where nothing is thresholded
            assert twins.optimizer.state[p]["u"].count_nonzero() == p.numel()
    twins.fill(**{name: NUMBERS[name]})
    before = [p.detach().clone() for p in twins.params]
    twins.step()
    assert not any(same_bits(p, q) for p, q in zip(twins.params, before, strict=True))
    if method != "rvsm-delayed":  # whose u of the step before is that of a step without a splitting
        twins.check()


@pytest.mark.parametrize("method", ["rvsm", "rvsm-delayed", "admm"])
@pytest.mark.parametrize("cls", [SGD, ADAMW])
def test_lr_0_moves_nothing(engine: str, cls: type, method: str) -> None:
    """Neither the weights nor what the method keeps; momentum, the moments and the steps go on, as with a plain 0."""
    for coupled, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        options = {"method": method, "decoupled": not coupled, **(MOMENTUM if cls is SGD else {})}
        twins = Twins(engine, cls, dtype, penalty="tl1", **options)
        twins.step(2)
        kept = {"u", "dual"}
        before = [(p.detach().clone(), copy.deepcopy(twins.optimizer.state[p])) for p in twins.params]
        twins.fill(lr=0.0)
        twins.step(2)
        for p, (w, states) in zip(twins.params, before, strict=True):
            assert same_bits(p, w)
            for name, state in twins.optimizer.state[p].items():
                assert same_bits(state, states[name]) == (name in kept), name
        twins.check()
        twins.fill(lr=0.0625)
        twins.step()
        twins.check()


def test_replaced_tensors(engine: str) -> None:
    """Another object, a number in the place of a tensor, and another memory in the same object."""
    twins = Twins(engine, SGD, penalty="l1", method="admm", **MOMENTUM)
    twins.step(2)
    for name, number in (("lr", 0.125), ("beta", 0.5)):
        twins.tensors[name] = torch.tensor(number, dtype=torch.float64)
        twins.optimizer.param_groups[0][name] = twins.tensors[name]
        twins.fill(**{name: number})
        twins.step(unread=False)  # the check of a new object reads it
        twins.check()
    twins.tensors["lr"].data = torch.tensor(0.03125, dtype=torch.float64)
    twins.plain.param_groups[0]["lr"] = 0.03125
    twins.step(2)
    twins.check()
    for o in (twins.optimizer, twins.plain):
        o.param_groups[0]["lr"] = 0.1
    twins.step(unread=False)
    twins.check()


def test_other_options_that_change(engine: str) -> None:
    """An edit of a plain option reads no tensor that was there before; what is edited is checked."""
    twins = Twins(engine, SGD, on_device=("lr", "lam"), penalty="l1", **MOMENTUM)
    twins.step(2)
    for name, value in (("momentum", 0.5), ("beta", 0.25), ("penalty", "l0")):
        for o in (twins.optimizer, twins.plain):
            o.param_groups[0][name] = value
        twins.step(2)
        twins.check()
    twins.optimizer.param_groups[0]["beta"] = -1.0
    with pytest.raises(ValueError, match="beta"):
        twins.optimizer.step()
    twins.optimizer.param_groups[0] |= {"beta": 0.25, "lr": torch.tensor(-1.0)}
    with pytest.raises(ValueError, match="learning rate"):
        twins.optimizer.step()


def test_parameters_that_leave_their_numbers(engine: str) -> None:
    """A kernel must not read the memory of another device: the words of the refusal."""
    twins = Twins(engine, SGD, penalty="l1")
    twins.step()
    (options,) = twins.optimizer._options
    check_device_numbers(twins.params[0], 0, options)
    with pytest.raises(RuntimeError, match=r"group 0 is a tensor on .*, but a parameter of the group is on meta"):
        check_device_numbers(torch.empty(3, device="meta"), 0, options)


def test_gradients_elsewhere(engine: str) -> None:
    """Other gradients and other numbers at once, with what a GradScaler hands over."""
    for cls in (SGD, ADAMW):
        twins = Twins(engine, cls, penalty="l0", group_dim=0, lam=2.0)
        twins.step(2)
        for found in (1.0, 0.0, 0.0):
            for o in (twins.optimizer, twins.plain):
                o.grad_scale, o.found_inf = torch.tensor(4.0), torch.tensor(found)
            twins.fill(lr=0.25 if found else 0.125)
            before = [p.detach().clone() for p in twins.params]
            twins.step()
            assert all(same_bits(p, w) for p, w in zip(twins.params, before, strict=True)) == (found == 1)
            twins.check()


@pytest.mark.parametrize("how", ["state_dict", "torch.save", "deepcopy"])
def test_checkpoints(engine: str, how: str) -> None:
    """The tensors are in the checkpoint, and the copy has tensors of its own."""
    twins = Twins(engine, ADAMW, penalty="l1", method="admm")
    twins.step(2)
    if how == "deepcopy":
        other = copy.deepcopy(twins.optimizer)
    else:
        state = twins.optimizer.state_dict()
        if how == "torch.save":
            torch.save(state, file := io.BytesIO())
            file.seek(0)
            state = torch.load(file, weights_only=True)
        params = [nn.Parameter(p.detach().clone()) for p in twins.params]
        other = rk.RVSMAdamW(params, engine=engine)
        other.load_state_dict(copy.deepcopy(state))
    params = other.param_groups[0]["params"]
    for name, tensor in twins.tensors.items():
        copied = other.param_groups[0][name]
        assert isinstance(copied, Tensor) and copied is not tensor and same_bits(copied, tensor)
    twins.fill(lr=0.25)
    other.param_groups[0]["lr"].fill_(0.25)
    for k in range(2):
        set_gradients(twins.steps + k, params)
        other.step()
    twins.step(2)
    for p, q in zip(twins.params, params, strict=True):
        assert same_bits(p, q)


def test_the_wrapper(engine: str) -> None:
    """The optimizer's own lr, which it reads on the device itself."""
    for decoupled in (True, False):
        ends = []
        for on_device in (True, False):
            params = params_of(torch.float32)
            lr: Any = torch.tensor(0.0625) if on_device else 0.0625
            lam: Any = torch.tensor(0.375, dtype=torch.float64) if on_device else 0.375
            inner = torch.optim.SGD(params, lr=lr, foreach=False)
            options = {"penalty": "l1", "lam": lam, "beta": 0.75, "method": "admm", "decoupled": decoupled}
            optimizer = rk.RVSMWrapper(inner, **options, engine=engine)
            for k in range(4):
                set_gradients(k, params)
                if k == 2 and on_device:
                    lr.fill_(0.0)
                elif k == 2:
                    inner.param_groups[0]["lr"] = 0.0
                optimizer.step()
            ends.append([p.detach() for p in params] + [optimizer._states[p]["dual"] for p in params])
        for x, y in zip(*ends, strict=True):
            close(x, y, 4)


def test_the_reference_serves_them(engine: str) -> None:
    """Which waits for them."""
    for case in ("groups, scaled, lasso", "admm", "adamw"):
        cls, options = CASES[case]
        twins = Twins("reference", cls, **options)
        for k in range(3):
            set_gradients(k, twins.params, twins.theirs)
            twins.optimizer.step()
            twins.plain.step()
            twins.fill(lr=0.125, lam=0.25)
        twins.check()


def test_against_the_definition(engine: str) -> None:
    optimizer = Twins(engine, SGD, penalty="tl1", method="admm", **MOMENTUM).optimizer
    for k in range(3):
        set_gradients(k, optimizer.param_groups[0]["params"])
        # The definition takes plain numbers.
        group = optimizer.param_groups[0]
        tensors = {name: group[name] for name in NUMBERS}

        def step(group: dict[str, Any] = group, tensors: dict[str, Any] = tensors) -> None:
            numbers = {name: group[name] for name in NUMBERS}
            group.update(tensors)
            optimizer.step()
            group.update(numbers)

        group.update({name: float(t) for name, t in tensors.items()})
        checked_step(optimizer, step=step)
        group.update(tensors)


# ---- what only Triton's engine has -----------------------------------------------------------------------------------


@pytest.fixture
def triton_engine(engine: str) -> None:
    """For tests that look into it."""
    if engine != "triton":
        pytest.skip("looks into the Triton engine")


def random_numbers(rng: random.Random) -> dict[str, Any]:
    """Of any size; each is on the device or not, and 0 now and then."""
    numbers: dict[str, Any] = {}
    for name in NUMBERS:
        value = 0.0 if rng.random() < 0.15 else 10 ** rng.uniform(-5, 1)
        numbers[name] = torch.tensor(value, dtype=torch.float64) if rng.random() < 0.7 else value
    return numbers


@quick
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("base", [bases.SGD, bases.ADAMW, bases.NONE], ids=lambda base: base.name)
def test_finished_records(triton_engine: None, base: bases.Base, dtype: torch.dtype) -> None:
    """Every number of a record against those that the host makes, over many sizes; 100 records at once."""
    import triton.language as tl

    from rvsm_kernels.engines.triton.device_numbers import Sources
    from rvsm_kernels.engines.triton.table import record_words

    rng = random.Random(4)
    told = []
    for _ in range(100):
        options = {option.name: option.default for option in base.all_options} | {"params": [torch.ones(1)]}
        options |= {name: value for name, value in random_numbers(rng).items() if name in options}
        options |= {"penalty": rng.choice(["l1", "l0", "tl1", "tl1", None]), "a": 10 ** rng.uniform(-2, 2)}
        options |= {"decoupled": rng.random() < 0.5, "group_dim": 0, "group_scale": rng.random() < 0.5}
        told.append(StepOptions.of(options, base))
    made = [options.numbers(9, 1) for options in told]
    length = len(made[0])
    words = record_words(length + 1, dtype == torch.float64, length + 1)
    sources = Sources(torch.device(DEVICE), len(told), length, words, True)
    sources.set(made, told)
    opmath = tl.float64 if dtype == torch.float64 else tl.float32
    records = sources.finish(sources.put(False), opmath, base.number).view(dtype).reshape(len(told), -1)
    for options, record in zip(told, records[:, : length + 1].double().tolist(), strict=True):
        on_host = options.on_host()
        rest = options.on_device[:1] != () and float(on_host.values["lr"]) == 0 and options.values["lr"] != 0
        want = (*on_host.numbers(9, 1), float(rest))
        eps = torch.finfo(dtype).eps
        scales = [abs(x) for x in want]
        scales[5] += 2 * abs(want[3])  # edge is rho - a
        for k, (x, y, scale) in enumerate(zip(record, want, scales, strict=True)):
            assert abs(x - y) <= 6 * eps * scale + torch.finfo(dtype).tiny, (k, x, y, options)


@quick
def test_a_repeated_step_prepares_nothing(triton_engine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a table is made anew where a tensor is filled; the numbers cost one launch, and none where they are plain."""
    from rvsm_kernels.engines.triton import calls, step_table

    prepared: list[str] = []
    launched: list[str] = []
    for name in ("build", "set_numbers", "_move"):
        plain = getattr(step_table.StepTable, name)
        monkeypatch.setattr(
            step_table.StepTable, name, lambda self, *a, n=name, f=plain: (prepared.append(n), f(self, *a))[1]
        )
    call = calls.Grid.__call__
    monkeypatch.setattr(
        calls.Grid,
        "__call__",
        lambda self, kernel, *a, **k: (launched.append(kernel.fn.__name__), call(self, kernel, *a, **k))[1],
    )
    for cls, kernels in ((SGD, ["step_kernel"]), (ADAMW, ["count_kernel", "step_kernel"])):
        twins = Twins("triton", cls, penalty="l1")
        twins.step(3)
        for optimizer, names in ((twins.optimizer, sorted([*kernels, "finish_kernel"])), (twins.plain, kernels)):
            prepared.clear()
            launched.clear()
            twins.tensors["lr"].fill_(0.5)
            with no_reading():
                optimizer.step()
            assert prepared == [] and sorted(launched) == names


@quick
def test_steps_are_counted_on_the_device(engine: str) -> None:
    """A counter is float32 on the parameter's device, whatever it was; nothing reads it, also beside a found_inf."""
    params = params_of(torch.float32)
    optimizer = rk.RVSMAdamW(params, lr=0.1, engine=engine)
    set_gradients(0, params)
    optimizer.step()
    optimizer.state[params[0]]["step"] = torch.tensor([3.0], dtype=torch.float64)
    optimizer.step()
    steps = [optimizer.state[p]["step"] for p in params]
    assert all(s.dtype == torch.float32 and s.device == params[0].device for s in steps)
    assert [float(s) for s in steps] == [4.0, 2.0, 2.0]
    optimizer.step()
    optimizer.grad_scale = torch.tensor(1.0)
    for found in (0.0, 1.0, 0.0):
        optimizer.found_inf = torch.tensor(found)
        with no_reading():
            optimizer.step()
    assert all(x is optimizer.state[p]["step"] for x, p in zip(steps, params, strict=True))
    assert [float(s) for s in steps] == [7.0, 5.0, 5.0]


def test_a_graph_keeps_its_numbers(triton_engine: None) -> None:
    """The tensors that a captured launch reads live on, also when the options have others."""
    from rvsm_kernels.engines.triton.device_numbers import Sources
    from rvsm_kernels.engines.triton.table import record_words

    def options_of(lr: Tensor) -> StepOptions:
        options = {option.name: option.default for option in bases.SGD.all_options}
        return StepOptions.of({**options, "lr": lr, "params": [torch.ones(1)]}, bases.SGD)

    first, second = torch.tensor(0.5), torch.tensor(0.25)
    sources = Sources(torch.device(DEVICE), 1, 16, record_words(17, False, 17), True)
    alive = weakref.ref(first)
    for lr, captured in ((first, True), (second, False)):
        told = options_of(lr)
        sources.set([told.numbers(1, 1)], [told])
        sources.put(captured)
    del first, lr, told
    assert alive() is not None
