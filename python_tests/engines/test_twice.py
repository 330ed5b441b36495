"""A parameter twice, memory twice, and a second thread beside a step."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

import pytest
import torch
from torch import nn

import rvsm_kernels as rk
from runner import same_bits

BASE: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@pytest.mark.parametrize("how", ["the same", "the same data", "a part"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("strided", [False, True])
def test_each_occurrence_is_one_update(engine: str, threads: int, how: str, momentum: float, strided: bool) -> None:
    """In their order: what torch.optim.SGD makes of it, tensor by tensor."""
    n = 300_000 if engine == "native" else 600

    def params() -> list[nn.Parameter]:
        gen = torch.Generator().manual_seed(1)
        data = torch.randn(n, 2, generator=gen)
        data = data[:, 0] if strided else data.reshape(-1)[:n].clone()
        p = nn.Parameter(data)
        if how == "the same":
            all_of_them = [p, nn.Parameter(torch.ones(3)), p]
        else:
            other = nn.Parameter(data.detach() if how == "the same data" else data.detach()[n // 3 :])
            all_of_them = [p, nn.Parameter(torch.ones(3)), other]
        for q in all_of_them:
            q.grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(q.numel()))
        return all_of_them

    ours, theirs = params(), params()
    base = {**BASE, "momentum": momentum}
    optimizer = rk.RVSM(ours, **base, penalty=None, engine=engine)
    sgd = torch.optim.SGD(theirs, **base, foreach=False)
    for _ in range(3):
        optimizer.step()
        sgd.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=2e-6, atol=2e-6)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@pytest.mark.parametrize("options", [{}, {"group_dim": 0}, {"method": "admm"}, {"method": "rvsm-delayed"}], ids=str)
def test_reading_takes_each_once(engine: str, options: dict[str, Any]) -> None:
    """u of u is not u."""
    single, double = (nn.Parameter(torch.linspace(-1, 1, 12).reshape(4, 3)) for _ in range(2))
    split = {"penalty": "l1", "lam": 0.1, "beta": 0.5, **options}
    one, two = rk.RVSM([single], **split, engine=engine), rk.RVSM([double, double], **split, engine=engine)
    with one.sparse_weights(), two.sparse_weights():
        assert same_bits(single.detach(), double.detach())
    double.grad = torch.ones(4, 3)
    two.step()
    two.sparsify_()


def test_memory_that_comes_together_later(native: str) -> None:
    """p.data of another parameter: they are no longer stepped at the same time."""
    p, q = (nn.Parameter(torch.zeros(300_000)) for _ in range(2))
    optimizer = rk.RVSM([p, q], lr=1.0, penalty=None, engine=native)
    for k in range(4):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        if k == 2:
            q.data = p.data
        before = float(p[0])
        optimizer.step()
        assert float(p[0]) == before - (1 if k < 2 else 2)
        assert torch.equal(p, torch.full_like(p, float(p[0])))


def test_ops_take_a_tensor_twice(native: str) -> None:
    w = torch.full((300_000,), 5.0)
    torch.ops.rvsm_kernels.prox_([w, w], "l1", 1.0, 1.0)  # each takes 1 off
    assert torch.equal(w, torch.full_like(w, 3.0))


# ---- threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "edit"),
    [
        pytest.param(2_000, "group_dim", id="a table made anew"),
        *(pytest.param(2_000, edit, marks=pytest.mark.slow) for edit in ("load", "data", "step", "read")),
        *(
            pytest.param(3_000_000, edit, marks=pytest.mark.slow)
            for edit in ("load", "group_dim", "data", "step", "read")
        ),
    ],
)
def test_a_second_thread(native: str, size: int, edit: str) -> None:
    """Misuse may give a strange result; it may not end the process.

    Not here: gradients that another thread sets to None. torch 2.13 itself then crashes in ``p.grad`` and in its own
    SGD.
    """
    params = [nn.Parameter(torch.randn(size // 100, 50)) for _ in range(2)]
    for p in params:
        p.grad = torch.ones_like(p)
    options: dict[str, Any] = {"penalty": "l0", "lam": 0.1, "beta": 0.5, "group_dim": 0}
    optimizer = rk.RVSM(params, **BASE, **options, engine=native)
    optimizer.step()
    saved = optimizer.state_dict()
    end = time.monotonic() + 1.0

    def other() -> None:
        k = 0
        while time.monotonic() < end:
            k += 1
            try:
                if edit == "load":
                    optimizer.load_state_dict(saved)
                    optimizer.state.clear()
                elif edit == "group_dim":
                    optimizer.param_groups[0]["group_dim"] = (0, 1, None)[k % 3]
                    optimizer.step()  # which makes the table anew, also while the other thread's step runs
                elif edit == "data":
                    for p in params:
                        p.data = torch.randn_like(p)
                elif edit == "step":
                    optimizer.step()
                else:
                    with optimizer.sparse_weights():
                        pass
                    optimizer.penalty_value()
            except (RuntimeError, ValueError, KeyError):
                pass

    thread = threading.Thread(target=other)
    thread.start()
    while time.monotonic() < end:
        with contextlib.suppress(RuntimeError, ValueError, KeyError):
            optimizer.step()
    thread.join()
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
