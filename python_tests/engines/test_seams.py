"""The seams between the parts of a step: a base that is none, and norms of groups that come from elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rvsm_kernels as rk
from rvsm_kernels.engines.interface import Ready, StepInputs
from rvsm_kernels.engines.registry import make_engine
from rvsm_kernels.method.bases import NONE, SGD, Base
from rvsm_kernels.method.options import OPTIONS
from rvsm_kernels.method.step_options import StepOptions
from rvsm_kernels.optim.split_optimizer import SplitOptimizer

# ---- a base that is none: the splitting alone, for another optimizer that steps afterwards ----------------------


class Pull(SplitOptimizer):
    """Relaxed variable splitting without a step."""

    _base = NONE

    def __init__(self, params: Any, lr: float = 1e-3, *, engine: str | None = None, **options: Any) -> None:
        super().__init__(params, {"lr": lr, **options}, amp_scaling=True, engine=engine)


SHAPE = (6, 5, 3)
SPLITS = [
    {"penalty": "l0"},
    {"penalty": "tl1", "group_dim": 1},
    {"penalty": "l1", "group_dim": 0, "group_scale": True, "method": "admm"},
    {"penalty": "topk", "density": 0.4, "method": "rvsm-delayed"},
]
NUMBERS = {"lr": 0.125, "lam": 0.02, "beta": 0.5}


def twins(count: int = 2) -> list[nn.Parameter]:
    """Parameters with the same weights and gradients."""
    w, g = torch.randn(SHAPE), torch.randn(SHAPE)
    params = [nn.Parameter(w.clone()) for _ in range(count)]
    for p in params:
        p.grad = g.clone()
    return params


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_the_splitting_then_sgd_is_rvsm(engine: str, split: dict[str, Any], decoupled: bool) -> None:
    """Also where the gradient between them is the sum that the splitting has left in p.grad."""
    split = {**split, **NUMBERS, "decoupled": decoupled}
    p, q = twins()
    pull, sgd = Pull([p], engine=engine, **split), torch.optim.SGD([p], lr=0.125, momentum=0.5, weight_decay=0.25)
    whole = rk.RVSM([q], momentum=0.5, weight_decay=0.25, engine=engine, **split)
    for _ in range(4):
        p.grad, q.grad = (torch.cos(t.detach()) for t in (p, q))
        pull.step()
        sgd.step()
        whole.step()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    key = {"rvsm": None, "rvsm-delayed": "u", "admm": "dual"}[split.get("method", "rvsm")]
    assert list(pull.state.get(p, {})) == ([] if key is None else [key])
    if key is not None:
        torch.testing.assert_close(pull.state[p][key], whole.state[q][key], rtol=1e-6, atol=1e-7)


def test_a_pull_does_not_read_the_gradient(engine: str) -> None:
    p, q = twins()
    p.grad = torch.full(SHAPE, torch.nan)
    for x in (p, q):
        Pull([x], engine=engine, group_dim=1, **NUMBERS).step()
    assert p.isfinite().all() and torch.equal(p, q)
    assert p.grad is not None and p.grad.isnan().all()


def test_the_gradient_holds_the_terms_of_the_splitting(engine: str) -> None:
    """Scale, group lasso and coupling, these with the other sign under maximize: who takes it turns it around. The
    weights stay."""
    p, q = twins()
    scale = torch.tensor(4.0)
    options = {**NUMBERS, "group_dim": 1, "decoupled": False, "group_lasso": 0.75, "maximize": True}
    optimizer = Pull([p], engine=engine, **options)
    optimizer.grad_scale = scale
    optimizer.step()
    assert torch.equal(p, q) and q.grad is not None
    w = q.detach()
    unit = w / w.square().sum(dim=(0, 2), keepdim=True).sqrt()
    gap = w - rk.reference.prox(w, "l0", 0.04, group_dim=1)
    torch.testing.assert_close(p.grad, q.grad / scale - 0.75 * unit - 0.5 * gap)
    optimizer.found_inf = torch.tensor(1.0)
    before = p.grad.clone()  # type: ignore[union-attr]
    optimizer.step()
    assert torch.equal(p, q) and torch.equal(p.grad, before)  # type: ignore[arg-type]


def test_options_of_the_base() -> None:
    """An optimizer has the options of its base and of the splitting, and no others."""
    (group,) = Pull([nn.Parameter(torch.ones(3))]).param_groups
    assert "lr" in group and "lam" in group and "momentum" not in group and "weight_decay" not in group
    with pytest.raises(ValueError, match="Invalid learning rate"):
        Pull([nn.Parameter(torch.ones(3))], lr=-1.0)


# ---- norms that come from elsewhere: another rank, or several tensors ------------------------------------------------


def options_of(base: Base = SGD, **options: Any) -> tuple[dict[str, Any], StepOptions]:
    """A param group without parameters, and what an engine is told of it."""
    group = {option.name: option.default for option in OPTIONS} | options
    return group, StepOptions.of(group, base)


def step(engine: str, p: nn.Parameter, states: dict[Tensor, Any], norms: Tensor | None, **options: Any) -> None:
    group, told = options_of(**options)
    group["params"] = [p]
    inputs = StepInputs(None, None, [told], states, norms={} if norms is None else {p: norms})
    with torch.no_grad():
        assert make_engine(engine).step([group], inputs) == Ready.YES


def in_memory_order(w: Tensor, group_dim: Any) -> Tensor:
    """The norms of the groups of w, in the order in which a walk through its memory meets them first."""
    dims = {group_dim} if isinstance(group_dim, int) else set(group_dim)
    order = sorted(range(w.dim()), key=lambda d: -w.stride(d))
    first = w.permute(order)
    return first.double().square().sum(dim=[k for k, d in enumerate(order) if d not in dims]).sqrt().reshape(-1)


LAYOUTS = [((0, 1, 2), 1), ((0, 1, 2), (0, 1)), ((2, 1, 0), 0), ((1, 0, 2), (0, 1)), ((1, 0, 2), (0, 2))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("order", "group_dim"), LAYOUTS)
@pytest.mark.parametrize("method", ["rvsm", "admm"])
def test_norms_from_elsewhere(
    engine: str, dtype: torch.dtype, order: tuple[int, ...], group_dim: Any, method: str
) -> None:
    """The right norms change nothing; others decide which groups live, and what a unit vector is."""
    places = [order.index(d) for d in range(3)]
    w = torch.randn([SHAPE[d] for d in order], dtype=dtype).permute(places).requires_grad_()
    dual = torch.randn_like(w).detach()
    options = {"lam": 1.0, "beta": 0.5, "lr": 0.5, "method": method, "group_dim": group_dim, "group_lasso": 0.25}
    own = in_memory_order(w.detach().double() + (dual.double() if method == "admm" else 0), group_dim)
    both = torch.stack([own, in_memory_order(w.detach(), group_dim)]) if method == "admm" else own
    results = []
    for norms in (None, both, both * torch.where(torch.arange(own.numel()) % 2 == 0, 0.125, 8.0)):
        p = nn.Parameter(w.detach().clone())
        p.grad = torch.zeros_like(p)
        states: dict[Tensor, Any] = {p: {"dual": dual.clone()}} if method == "admm" else {}
        step(engine, p, states, norms, **options)
        results.append(p.detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
    v = w.detach().double() + (dual.double() if method == "admm" else 0)
    given = both * torch.where(torch.arange(own.numel()) % 2 == 0, 0.125, 8.0)
    dims = [group_dim] if isinstance(group_dim, int) else list(group_dim)
    in_memory = sorted(dims, key=lambda d: -w.stride(d))
    shape = [w.shape[d] if d in dims else 1 for d in range(3)]

    def by_dim(flat: Tensor) -> Tensor:
        return flat.reshape([w.shape[d] for d in in_memory]).permute([in_memory.index(d) for d in sorted(dims)])

    of_v, of_w = (by_dim(row).reshape(shape) for row in (given if method == "admm" else torch.stack([given] * 2)))
    u = torch.where(of_v > 2.0, v, 0)  # the cut of l0: sqrt(2 lam / beta)
    gap = w.detach().double() - u + (v - u if method == "admm" else 0)
    expected = w.detach().double() - 0.25 * gap - 0.5 * 0.25 * w.detach().double() / of_w
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(results[2].double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("wrong", ["short", "long", "float32", "gaps"])
def test_norms_that_do_not_fit(engine: str, wrong: str) -> None:
    """An error before anything changes; the kernels would read beyond them."""
    p = twins(1)[0]
    before = p.detach().clone()
    norms = {
        "short": torch.ones(5, dtype=torch.float64),
        "long": torch.ones(2, 6, dtype=torch.float64),
        "float32": torch.ones(6),
        "gaps": torch.ones(12, dtype=torch.float64)[::2],
    }[wrong]
    with pytest.raises(ValueError, match="made elsewhere must be 6 contiguous float64 numbers"):
        step(engine, p, {}, norms, group_dim=0, lam=1.0, lr=0.5, beta=0.5)
    assert torch.equal(p, before)


def test_norms_of_another_parameter_are_noticed(engine: str) -> None:
    """The same numbers for another parameter, in a step that is else the same as the one before it."""
    results = []
    for turns in ((0, 1), (1,)):
        params = [nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4, 3))]
        group, told = options_of(group_dim=0, lam=0.5, lr=0.5, beta=0.5)
        group["params"] = params
        acting = make_engine(engine)
        norms = torch.tensor([1.0, 2.0, 0.5, 4.0], dtype=torch.float64)
        for turn in turns:
            for p in params:
                p.grad = torch.zeros_like(p)
                p.data.fill_(1.0)
            inputs = StepInputs(None, None, [told], {}, norms={params[turn]: norms})
            inputs.changed = None if turn == turns[0] else set()
            with torch.no_grad():
                assert acting.step([group], inputs) == Ready.YES
        results.append([p.detach() for p in params])
    for p, q in zip(*results, strict=True):
        assert torch.equal(p, q)
    assert not torch.equal(*results[0])
