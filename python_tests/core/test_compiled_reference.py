"""``engine="reference"`` under torch.compile: the step is in the graph, without a break, and gives the eager bits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import rvsm_kernels as rk
from runner import same_bits

L1 = {"penalty": "l1"}
OPTIONS: dict[str, tuple[type, dict[str, Any]]] = {
    "plain": (rk.RVSM, {"penalty": None}),
    "nesterov": (rk.RVSM, {**L1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}),
    "coupled admm, all of it": (
        rk.RVSM,
        {"penalty": "tl1", "method": "admm", "decoupled": False, "group_dim": 1, "group_lasso": 1e-2, "maximize": True},
    ),
    "unit norm": (rk.RVSM, {"penalty": "l0", "group_dim": (), "group_scale": True, "unit_norm": True}),
    "top-k": (rk.RVSM, {"penalty": "topk", "density": 0.5, "momentum": 0.5}),
    "split master": (rk.RVSM, {**L1, "momentum": 0.9, "master_weights": True, "dtype": torch.bfloat16}),
    "AdamW": (rk.RVSMAdamW, {**L1}),
    "AdamW, amsgrad, top-k of rows, admm": (
        rk.RVSMAdamW,
        {"penalty": "topk", "density": 0.5, "group_dim": 0, "method": "admm", "amsgrad": True},
    ),
    "AdamW, delayed": (rk.RVSMAdamW, {"penalty": "tl1", "method": "rvsm-delayed", "dtype": torch.float64}),
    "AdamW, master": (rk.RVSMAdamW, {**L1, "master_weights": True, "dtype": torch.float16}),
    "AdamW, zeros that stay": (rk.RVSMAdamW, {**L1, "hold_zeros": True, "method": "admm"}),
    "AdamW, stochastic": (rk.RVSMAdamW, {**L1, "rounding": "stochastic", "dtype": torch.bfloat16}),
}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def made(name: str = "nesterov", **more: Any) -> tuple[list[nn.Parameter], Any]:
    """Parameters in two groups, one of them without a penalty, and their optimizer."""
    cls, options = OPTIONS[name]
    options = {"lr": 0.1, "lam": 1e-2, "beta": 1.0, **options, **more}
    dtype = options.pop("dtype", torch.float32)
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((6, 4), (3, 5), (7,))]
    if options.get("hold_zeros"):
        for p in params:
            p.data[::2] = 0.0
    bias = {"params": params[2:], "penalty": None, "group_dim": None, "group_lasso": 0.0}
    return params, cls([{"params": params[:2]}, bias], **options, engine="reference")


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def all_of(params: list[nn.Parameter], optimizer: Any) -> dict[str, torch.Tensor]:
    """Parameters and states, by their names."""
    found = {f"p{i}": p.detach().clone() for i, p in enumerate(params)}
    for i, p in enumerate(params):
        found |= {f"{name} {i}": t.clone() for name, t in optimizer.state[p].items() if t is not None}
    return found


def same(a: tuple[list[nn.Parameter], Any], b: tuple[list[nn.Parameter], Any]) -> bool:
    one, other = all_of(*a), all_of(*b)
    return one.keys() == other.keys() and all(same_bits(one[name], other[name]) for name in one)


def run(
    params: list[nn.Parameter],
    optimizer: Any,
    step: Callable[[], Any],
    edit: Callable[[Any, int], None] = lambda optimizer, k: None,
    steps: int = 21,
) -> None:
    for k in range(steps):
        edit(optimizer, k)
        give_gradients(params, k)
        step()


def decay(optimizer: Any, k: int) -> None:
    """What a scheduler does with lr: a float is replaced, a tensor is filled."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(0.1 * 0.9**k)
        else:
            group["lr"] = 0.1 * 0.9**k


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_whole(backend: str, name: str) -> None:
    """One graph, and another when lr is edited first; whether the step is compiled or a function that steps."""
    eager, ours = made(name), made(name)
    counter = CompileCounterWithBackend(backend)
    function = ours[1].step if backend == "eager" else lambda: ours[1].step()
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    run(*eager, eager[1].step, decay)
    run(*ours, compiled, decay)
    assert same(ours, eager)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", ["AdamW", "unit norm", "AdamW, delayed"])
@pytest.mark.parametrize(("backend", "dtype"), [("eager", torch.float64), ("aot_eager", torch.float32)])
def test_lr_in_a_tensor(name: str, backend: str, dtype: torch.dtype) -> None:
    """It is read by the graph, which never changes."""
    eager, ours = (made(name, lr=torch.tensor(0.1, dtype=dtype)) for _ in range(2))
    counter = CompileCounterWithBackend(backend)
    run(*eager, eager[1].step, decay)
    run(*ours, torch.compile(ours[1].step, backend=counter, fullgraph=True), decay)
    assert same(ours, eager)
    assert counter.frame_count == 1


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=repr)
@pytest.mark.parametrize("name", ["coupled admm, all of it", "AdamW, delayed", "unit norm"])
def test_lr_0(name: str, lr: Any) -> None:
    """Neither the weights nor the states of methods move."""
    eager, ours = made(name), made(name)

    def rest(optimizer: Any, k: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = lr if k in (0, 2) else 0.1

    run(*eager, eager[1].step, rest, steps=4)
    run(*ours, torch.compile(ours[1].step, backend="eager", fullgraph=True), rest, steps=4)
    assert same(ours, eager)


def edit_much(optimizer: Any, k: int) -> None:
    group = optimizer.param_groups[0]
    if k == 1:
        group["lam"] = 0.02
    elif k == 2:
        group["method"] = "admm"
    elif k == 3:
        group["penalty"], group["beta"] = "l0", 0.5
    elif k == 4:
        group["lam"] = 0.0  # no splitting, so the dual goes
    elif k == 5:
        group["lam"], group["method"] = 0.02, "rvsm-delayed"


@pytest.mark.parametrize("name", ["nesterov", "AdamW"])
def test_edits(name: str) -> None:
    """Other options than lr are in the graph, so another one is made; it does what the eager step does."""
    eager, ours = made(name), made(name)
    run(*eager, eager[1].step, edit_much, steps=7)
    run(*ours, torch.compile(ours[1].step, backend="eager", fullgraph=True), edit_much, steps=7)
    assert "u" in ours[1].state[ours[0][0]] and "dual" not in ours[1].state[ours[0][0]]
    assert same(ours, eager)


def test_gradients_that_come_and_go() -> None:
    eager, ours = made(), made()
    compiled = torch.compile(ours[1].step, backend="eager", fullgraph=True)
    for k in range(6):
        for (params, _), step in ((eager, eager[1].step), (ours, compiled)):
            give_gradients(params, k)
            params[k % 3].grad = None
            step()
    assert same(ours, eager)


def test_parameters_that_share_memory() -> None:
    """They are stepped in their order."""
    ends = []
    for compiled in (False, True):
        memory = torch.linspace(-1, 1, 12)
        params = [nn.Parameter(memory[:8]), nn.Parameter(memory[4:])]
        optimizer = rk.RVSM(params, lr=0.1, penalty="l1", lam=0.1, beta=1.0, engine="reference")
        step = torch.compile(optimizer.step, backend="eager", fullgraph=True) if compiled else optimizer.step
        for _ in range(3):
            for p in params:
                p.grad = torch.ones(8)
            step()
        ends.append(memory.clone())
    assert same_bits(*ends)


def test_between_eager_steps() -> None:
    """Compiled and eager steps take turns, a checkpoint is loaded in between, and hooks are called."""
    eager, ours = made("AdamW"), made("AdamW")
    calls: list[str] = []
    ours[1].register_step_pre_hook(lambda *args: calls.append("before"))
    ours[1].register_step_post_hook(lambda *args: calls.append("after"))
    counter = CompileCounterWithBackend("eager")
    steps = itertools.cycle([torch.compile(ours[1].step, backend=counter), ours[1].step])
    for k in range(6):
        decay(eager[1], k)
        decay(ours[1], k)
        give_gradients(eager[0], k)
        give_gradients(ours[0], k)
        eager[1].step()
        next(steps)()
        if k == 2:
            ours[1].load_state_dict(ours[1].state_dict())
    assert same(ours, eager)
    assert calls == ["before", "after"] * 6
    assert counter.frame_count <= 3  # other states are there after load_state_dict


def test_errors_of_the_eager_step() -> None:
    """They are raised while torch traces, and nothing has changed."""
    params, optimizer = made()
    give_gradients(params, 0)
    compiled = torch.compile(optimizer.step, backend="eager")
    before = all_of(params, optimizer)
    with optimizer.sparse_weights(), pytest.raises(RuntimeError, match=r"step\(\)"):
        compiled()
    optimizer.param_groups[0]["lam"] = -1.0
    with pytest.raises(Exception, match=r"Invalid lam value: -1\.0"):
        compiled()
    optimizer.param_groups[0]["lam"] = 0.1
    after = all_of(params, optimizer)
    assert before.keys() == after.keys() and all(same_bits(before[name], after[name]) for name in before)
    compiled()
    assert not same_bits(all_of(params, optimizer)["p0"], before["p0"])


def test_with_a_scaler() -> None:
    """What a GradScaler hands over may call the step off, so that this step is no graph."""
    params, optimizer = made()
    compiled = torch.compile(optimizer.step, backend="eager")
    for found in (1.0, 0.0):
        give_gradients(params, 0)
        before = all_of(params, optimizer)["p0"]
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(found)
        compiled()
        assert same_bits(all_of(params, optimizer)["p0"], before) == bool(found)
        assert not hasattr(optimizer, "found_inf")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nesterov", "AdamW"])
def test_inductor(name: str) -> None:
    """Fused C++ rounds differently, and lr is as free there."""
    eager, ours = made(name), made(name)
    counter = CompileCounterWithBackend("inductor")
    run(*eager, eager[1].step, decay)
    run(*ours, torch.compile(ours[1].step, backend=counter, fullgraph=True), decay)
    for p, q in zip(eager[0], ours[0], strict=True):
        assert torch.allclose(p, q, rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2
