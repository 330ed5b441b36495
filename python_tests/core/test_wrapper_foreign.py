"""RVSMWrapper over tensors without memory, and in code that torch.compile or make_fx has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_wrapper import T, apart, model_of
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import rvsm_kernels as rk

SPLIT: dict[str, Any] = {"penalty": "l1", "lam": 0.1, "beta": 0.5}
METHODS: list[dict[str, Any]] = [{}, {"method": "admm"}, {"decoupled": False}, {"group_dim": 0, "group_lasso": 0.1}]


@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize("options", METHODS, ids=str)
def test_shapes_alone(kind: str, options: dict[str, Any]) -> None:
    """A step and a view without values; the states have the shapes that a real run would have."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    w = torch.ones(4, 3)
    p = nn.Parameter(mode.from_tensor(w) if kind == "fake" else w.to("meta"))
    p.grad = torch.ones_like(p)
    optimizer = rk.RVSMWrapper(T.AdamW([("odd", p)], lr=0.1), **SPLIT, **options)
    for _ in range(2):
        optimizer.step()
    with optimizer.sparse_weights():
        pass
    optimizer.sparsify_()
    assert optimizer.state[p]["exp_avg"].shape == (4, 3)
    assert ("dual" in optimizer.state_dict()["state"][0]) == (options.get("method") == "admm")


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_named_engines_refuse(native: str, kind: str) -> None:
    """Before anything changes: the optimizer's own step is not reached."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    w, other = torch.ones(4, 3), nn.Parameter(torch.ones(3))
    p = nn.Parameter(mode.from_tensor(w) if kind == "fake" else w.to("meta"))
    p.grad, other.grad = torch.ones_like(p), torch.ones(3)
    optimizer = rk.RVSMWrapper(T.AdamW([("other", other), ("odd", p)], lr=0.1), **SPLIT, engine=native)
    with pytest.raises(TypeError, match="odd"):
        optimizer.step()
    assert not optimizer.state and torch.equal(other.detach(), torch.ones(3))


@pytest.mark.parametrize("options", METHODS, ids=str)
def test_compiled(engine: str, options: dict[str, Any]) -> None:
    """torch.compile of a function that steps: eager and compiled give the same."""
    torch._dynamo.reset()  # else the limit of recompilations makes the later cases eager
    models = [model_of(), model_of()]
    for m in models:
        for p in m.parameters():
            p.grad = torch.full_like(p, 0.5)
    optimizers = [T.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in models]
    eager, ours = (rk.RVSMWrapper(o, **SPLIT, **options, engine=engine) for o in optimizers)
    compiled = torch.compile(lambda: ours.step(), backend="eager")
    for _ in range(3):
        eager.step()
        compiled()
    assert apart(*models) == 0 and apart(models[0], model_of()) > 0


def test_traced() -> None:
    """The pull is in the graph that make_fx records, beside the optimizer's step."""

    def nodes_of(penalty: str | None) -> int:
        p = nn.Parameter(torch.ones(4))
        p.grad = torch.ones(4)
        optimizer = rk.RVSMWrapper(T.SGD([p], lr=0.1), **{**SPLIT, "penalty": penalty})

        def step(x: torch.Tensor) -> torch.Tensor:
            p.grad = x * 2
            optimizer.step()
            return x + 0

        return len(list(make_fx(step)(torch.ones(4)).graph.nodes))

    assert nodes_of("l1") > nodes_of(None) + 2
