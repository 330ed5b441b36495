"""What only a GPU shows: launches, graphs, streams, devices, and no waiting. RVSM_TEST_DEVICE=cuda runs them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from builds import DEVICE, generator, need
from torch import Tensor, nn

import rvsm_kernels as rk
from bench.timing import launched
from models import assert_same_weights, backward, optimizer_of, small
from runner import check_reading, checked_step, same_bits
from rvsm_kernels.engines.registry import make_engine
from rvsm_kernels.method.selection import Candidates, Room, Selection, cut_among

pytestmark = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU, and RVSM_TEST_DEVICE=cuda")

BASE: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}
SPLITS: list[dict[str, Any]] = [
    {"penalty": "tl1", "lam": 0.05, "beta": 0.5, "a": 2.0},
    {"penalty": "l0", "lam": 0.6, "beta": 0.5, "group_dim": 0, "group_lasso": 0.05},
    {"penalty": "l1", "lam": 0.6, "beta": 0.5, "group_dim": 1, "group_scale": True},
    {"penalty": "l0", "lam": 0.6, "beta": 0.5, "group_dim": ()},
    {"penalty": "l1", "lam": 0.05, "beta": 0.5, "method": "rvsm-delayed"},
    {"penalty": "tl1", "lam": 0.6, "beta": 0.5, "group_dim": 1, "method": "admm", "group_lasso": 0.05},
]
SHAPES = [(64, 3, 7, 7), (300, 257), (64, 64, 3, 3), (33, 5), (40000, 2), (1, 1)]
LAUNCHES = {None: 1, 0: 3, 1: 3, (): 3}


@pytest.fixture(params=["native", "triton"])
def engine(request: pytest.FixtureRequest) -> str:
    """Every engine that launches kernels of ours."""
    need(request.param)
    return request.param


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def parameters(device: str = "cuda") -> list[nn.Parameter]:
    """All kinds of shapes, one of them channels-last."""
    gen = torch.Generator(device).manual_seed(3)
    params = [nn.Parameter(torch.randn(shape, generator=gen, device=device)) for shape in SHAPES]
    params[2].data = params[2].data.to(memory_format=torch.channels_last)
    return params


def set_gradients(params: list[nn.Parameter], seed: int) -> None:
    """The gradients of a step, in memory that stays where it is."""
    gen = torch.Generator(params[0].device).manual_seed(seed)
    for p in params:
        values = torch.randn(p.shape, generator=gen, device=p.device)
        if p.grad is None:
            p.grad = torch.empty_like(p)
        p.grad.copy_(values)


@pytest.mark.parametrize("split", SPLITS)
def test_launches(split: dict[str, Any], engine: str) -> None:
    """One for elements, three at most for groups, and not one copy."""
    params = parameters()
    optimizer = rk.RVSM(params, **BASE, **split, engine=engine)
    for seed in range(3):
        set_gradients(params, seed)
        optimizer.step()
    names = launched(optimizer.step)
    assert 1 <= len(names) <= LAUNCHES[split.get("group_dim")], names
    assert not any(name.startswith(("Memcpy", "Memset")) for name in names), names


@pytest.mark.parametrize("split", SPLITS)
def test_nothing_waits(split: dict[str, Any], engine: str) -> None:
    """A step with GradScaler's numbers, and everything that reads u."""
    params = parameters()
    optimizer = rk.RVSM(params, **BASE, **split, engine=engine)
    set_gradients(params, 0)
    optimizer.step()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    with no_waiting():
        optimizer.step()
        value = optimizer.penalty_value()
        with optimizer.sparse_weights():
            pass
        optimizer.sparsify_()
        rk.prox(params[0].detach(), "l0", 0.1)
    assert value.device == params[0].device and value.item() >= 0


@pytest.mark.parametrize("group_dim", [None, 0])
def test_nothing_waits_for_a_selection(group_dim: int | None, engine: str) -> None:
    """Top-k takes its cut on the device; unit norm and adaptive thresholding decide there."""
    params = parameters()
    options = {"penalty": "topk", "density": 0.3, "lam": 1.0, "beta": 0.5, "group_dim": group_dim, "unit_norm": True}
    optimizers = [
        rk.RVSM(params, **BASE, **options, engine=engine),
        rk.AdaptiveHardThreshold(params, lr=0.1, density=0.3, group_dim=group_dim, engine=engine),
    ]
    set_gradients(params, 0)
    for optimizer in optimizers:
        optimizer.step()
        with no_waiting():
            optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("between", [False, True])
def test_cuts_are_those_of_a_sort(between: bool, dtype: torch.dtype, engine: str) -> None:
    """Around the last cut too, and after an edit; of small tensors, large ones, ties and several at a time."""
    shapes = (5,), (9000,), (1001, 1003)
    ws = [torch.randn(shape, generator=generator(1), device="cuda").to(dtype) for shape in shapes]
    ws.append(torch.randint(-2, 3, (70000,), generator=generator(2), device="cuda").to(dtype))
    of_all = [[Candidates(w)] for w in ws] + [[Candidates(w) for w in ws]]
    counts = [sum(c.count() for c in candidates) for candidates in of_all]
    wanted = [Selection(*Room.like(ws[0]), c, n // 3, between) for c, n in zip(of_all, counts, strict=True)]
    serving = make_engine(engine)
    for factor in (1, 1, 1.0001, -3):
        for w in ws:
            w.mul_(factor)
        with no_waiting():
            serving.select(wanted)
        for s in wanted:
            assert torch.equal(s.cut, cut_among([c.magnitudes() for c in s.candidates], s.survivors, between))


@pytest.mark.parametrize("split", [*SPLITS, {"penalty": "topk", "density": 0.3, "lam": 1.0, "beta": 0.5}])
def test_graph_replay(split: dict[str, Any], engine: str) -> None:
    """A captured step, replayed with other gradients, is the step that eager execution does."""
    params, twins = parameters(), parameters()
    optimizer = rk.RVSM(params, **BASE, **split, engine=engine)
    twin = rk.RVSM(twins, **BASE, **split, engine=engine)
    for seed in range(3):
        for ps, o in ((params, optimizer), (twins, twin)):
            set_gradients(ps, seed)
            o.step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    twin.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for seed in range(5, 9):
        set_gradients(params, seed)
        set_gradients(twins, seed)
        graph.replay()
        twin.step()
        for p, q in zip(params, twins, strict=True):
            assert same_bits(p, q)
            assert optimizer.state[p].keys() == twin.state[q].keys()
            assert all(same_bits(optimizer.state[p][key], twin.state[q][key]) for key in optimizer.state[p])


@pytest.mark.parametrize("precision", [{}, {"master_weights": True}, {"rounding": "stochastic"}], ids=repr)
@pytest.mark.parametrize("cls", [rk.RVSM, rk.RVSMAdamW])
def test_a_graph_follows_numbers_on_the_device(cls: type, precision: dict[str, Any], engine: str) -> None:
    """lr, lam, beta and weight_decay are filled between two replays, and AdamW's steps are counted in them."""
    numbers = {"lr": 0.0625, "lam": 0.375, "beta": 0.75, "weight_decay": 0.03125}
    tensors = {name: torch.tensor(value, device="cuda") for name, value in numbers.items()}
    options = {"penalty": "tl1", "method": "admm", "engine": engine, **precision}
    params, twins = parameters(), parameters()
    if precision:
        for p in (*params, *twins):
            p.data = p.data.bfloat16()
    optimizer, twin = cls(params, **tensors, **options), cls(twins, **numbers, **options)
    for seed in range(3):
        set_gradients(params, seed)
        set_gradients(twins, seed)
        with no_waiting() if seed > 0 else contextlib.nullcontext():
            optimizer.step()
        twin.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for seed in range(3, 7):
        numbers = {name: value * 0.5 for name, value in numbers.items()} | {"lr": 0.0 if seed == 5 else 0.125}
        for name, value in numbers.items():
            tensors[name].fill_(value)
            twin.param_groups[0][name] = value
        set_gradients(params, seed)
        set_gradients(twins, seed)
        graph.replay()
        twin.step()
        for p, q in zip(params, twins, strict=True):
            assert optimizer.state[p].keys() == twin.state[q].keys()
            pairs = [(p, q)] + [(optimizer.state[p][k], twin.state[q][k]) for k in twin.state[q] if k != "low"]
            for x, y in pairs:
                torch.testing.assert_close(
                    x, y.to(x.device), rtol=1e-5 if x.dtype == torch.float32 else 2e-2, atol=1e-6
                )


@pytest.mark.parametrize("split", SPLITS)
def test_a_hundred_steps_twice(split: dict[str, Any], engine: str) -> None:
    """Bit for bit the same weights, while another stream keeps the device busy in one of the runs."""
    results = []
    for busy in (False, True):
        params = parameters()
        optimizer = rk.RVSM(params, **BASE, **split, engine=engine)
        other, noise = torch.cuda.Stream(), torch.randn(1_000_000)
        for seed in range(100):
            set_gradients(params, seed)
            if busy:
                with torch.cuda.stream(other):
                    noise.mul_(1.000001)
            optimizer.step()
        results.append([p.detach().clone() for p in params] + [optimizer.penalty_value()])
        other.synchronize()
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("split", SPLITS)
def test_the_current_stream(split: dict[str, Any], engine: str) -> None:
    """A step on a side stream comes after what that stream does before it."""
    params, twins = parameters(), parameters()
    optimizer = rk.RVSM(params, **BASE, **split, engine=engine)
    twin = rk.RVSM(twins, **BASE, **split, engine=engine)
    for ps, o in ((params, optimizer), (twins, twin)):
        set_gradients(ps, 0)
        o.step()
    gradients = [torch.randn(p.shape) for p in params]
    for q, g in zip(twins, gradients, strict=True):
        q.grad.copy_(g)
    twin.step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for p, g in zip(params, gradients, strict=True):
            p.grad.copy_(g)
        optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    assert all(same_bits(p, q) for p, q in zip(params, twins, strict=True))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("second", ["cpu", "cuda:1"])
def test_parameters_on_two_devices(split: dict[str, Any], second: str, engine: str) -> None:
    """One optimizer; every parameter is held against the definition."""
    if second == "cuda:1" and torch.cuda.device_count() < 2:
        pytest.skip("one GPU here")
    if (engine, second) == ("triton", "cpu"):
        pytest.skip("Triton serves no CPU beside a GPU")
    params = parameters() + parameters(second)
    optimizer = rk.RVSM(params, **BASE, **split, engine=engine)
    for seed in range(3):
        set_gradients(params[: len(SHAPES)], seed)
        set_gradients(params[len(SHAPES) :], seed + 100)
        checked_step(optimizer, f"step {seed}")
    check_reading(optimizer)


def test_grad_scaler_skips_without_waiting(engine: str) -> None:
    """found_inf is read on the device: nothing changes, and nobody waits."""
    model = small()
    optimizer = optimizer_of(model, engine)
    for k in range(2):
        backward(model, optimizer, k)
        optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(1.0)
    with no_waiting():
        optimizer.step()
    assert all(same_bits(p, b) for p, b in zip(model.parameters(), before, strict=True))
    twin = small()
    other = optimizer_of(twin, engine)
    for k in range(2):
        backward(twin, other, k)
        other.step()
    assert_same_weights(model, twin)


def test_more_elements_than_an_int_holds(engine: str) -> None:
    """A bfloat16 tensor of more than 2^31 elements, in elements and in groups; its first and last elements."""
    n = 2**31 + 1_000_003
    if torch.cuda.mem_get_info()[0] < 8 * 2 * n:
        pytest.skip("needs 35 GB")
    for group_dim in (None, 0, 1):
        shape = (n,) if group_dim is None else (3, n // 3)
        p = nn.Parameter(torch.full(shape, 0.5, dtype=torch.bfloat16))
        p.grad = torch.full(shape, 0.25, dtype=torch.bfloat16)
        optimizer = rk.RVSM([p], lr=0.5, penalty="l1", lam=0.125, beta=1.0, group_dim=group_dim, engine=engine)
        optimizer.step()
        size = {None: 1, 0: n // 3, 1: 3}[group_dim]
        gap = 0.125 / size**0.5  # of every element: tau w / ||w_G||
        want = torch.tensor(0.5 - 0.5 * gap - 0.5 * 0.25).to(torch.bfloat16)
        flat = p.detach().view(-1)
        assert (
            (flat[:1000] == want).all() and (flat[-1000:] == want).all() and (flat[2**31 - 9 : 2**31 + 9] == want).all()
        )
        assert flat.min() == flat.max(), "an element was left out or done twice"
        del p, optimizer, flat
        torch.cuda.empty_cache()


def test_random_numbers_come_from_the_device() -> None:
    """The suite's own helper."""
    values: Tensor = torch.randn(4, generator=generator(1))
    assert values.is_cuda
