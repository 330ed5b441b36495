"""What the Triton engine has beside the suite: compilation, tables under graphs, views and divisions on the host."""

from __future__ import annotations

import importlib
import math
import os
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from builds import DEVICE, need
from torch import nn

import rvsm_kernels as rk
from runner import checked_step, same_bits
from rvsm_kernels.engines import native as native_engine
from rvsm_kernels.engines import proximal
from rvsm_kernels.engines.registry import engine_name_for
from rvsm_kernels.method.groups import GroupView, group_view

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]


def program(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, where Triton is not interpreted unless it is asked for."""
    whole = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    whole |= {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), **environment}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        env=whole,
        timeout=500,
        check=False,
    )


# ---- imports and choices ---------------------------------------------------------------------------------------------


def test_importing_the_package_does_not_import_triton() -> None:
    command = [sys.executable, "-X", "importtime", "-c", "import rvsm_kernels; rvsm_kernels.engines()"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100, check=False)
    assert result.returncode == 0, result.stderr
    modules = [line.rsplit("|", 1)[-1].strip() for line in result.stderr.splitlines()]
    assert "rvsm_kernels.engines" in modules
    assert not [m for m in modules if m == "triton" or m.startswith(("triton.", "rvsm_kernels.engines.triton"))]


def test_none_takes_triton_where_native_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU without the compiled engine; never on a CPU, where Triton is interpreted."""
    monkeypatch.setattr(native_engine, "missing_cuda", lambda: "not built")
    module = importlib.import_module("rvsm_kernels.engines.registry")
    monkeypatch.setattr(module, "missing_triton", lambda device_type: None)
    assert engine_name_for(None, "cuda") == "triton" and engine_name_for(None, "xpu") == "triton"
    assert engine_name_for(None, "cpu") != "triton"
    monkeypatch.setattr(module, "missing_triton", lambda device_type: "not installed")
    assert engine_name_for(None, "cuda") == "reference"
    with pytest.raises(RuntimeError, match="not installed"):
        engine_name_for("triton", "cuda")


@pytest.mark.slow
def test_refused_on_a_cpu() -> None:
    """Without the interpreter, at construction if no device is served, else at the first step."""
    code = "import torch, rvsm_kernels as rk; rk.RVSM([torch.nn.Parameter(torch.ones(3))], engine='triton').sparsify_()"
    result = program(code)
    assert result.returncode != 0 and "RuntimeError" in result.stderr and "triton" in result.stderr
    assert "interpreter" in result.stderr or "C compiler" in result.stderr


def test_prox_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """rk.prox by way of the Triton engine, forward and backward, against the reference."""
    need("triton")
    monkeypatch.setattr(proximal, "engine_name_for", lambda requested, device_type: "triton")
    for dtype in (torch.float32, torch.float64):
        for group_dim, block in ((None, 1), (0, 1), (1, 1), ((0, 1), 1), ((0, 2), 1), ((), 1), (0, 3), (1, 4), (-1, 3)):
            w = torch.randn(6, 8, 3, dtype=dtype)
            for x in (w, w.permute(0, 2, 1).contiguous().permute(0, 2, 1), w[:, ::2]):
                leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
                u = rk.prox(leaf, "tl1", 0.3, 1.5, group_dim, block)
                torch.testing.assert_close(u, rk.reference.prox(x, "tl1", 0.3, 1.5, group_dim, block))
                u.sum().backward()
                assert leaf.grad is not None
    with pytest.raises(ValueError, match="group_dim"):
        rk.prox(torch.randn(3, 4, 5, 6), "l0", 0.1, group_dim=(1, 3))


# ---- the compiler ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_kernel_compiles_without_spills() -> None:
    """For sm_80, sm_90 and gfx942; streams are read and written 16 bytes at a time."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "bench.static_triton"],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


COUNT = """
import torch, triton
from triton.runtime.driver import driver
from bench.host_triton import OnCpu, StandIn

driver.set_active(StandIn())
compiled = []
triton.knobs.runtime.jit_post_compile_hook = lambda *args, **kwargs: compiled.append(kwargs["repr"])
params = [torch.nn.Parameter(torch.randn(s)) for s in ((8, 6, 3, 3), (70,), (5, 9), (2500, 3))]
groups = [{"params": params[:1], "group_dim": 1, "penalty": "l0"}, {"params": params[1:], "penalty": "tl1"}]
optimizer = OnCpu(groups, lr=0.1, momentum=0.9, weight_decay=0.01, lam=0.0, beta=0.5)
counts = []
for k in range(20):
    for group in optimizer.param_groups:
        group["lr"] = 0.1 / (k + 1)
        group["lam"] = 0.01 * k
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    counts.append(len(compiled))
print("COUNTS", *counts)
"""


@pytest.mark.slow
@pytest.mark.skipif(DEVICE != "cpu", reason="stands in for a GPU")
def test_edits_of_lr_and_lam_compile_nothing() -> None:
    """A step and a sum are compiled when they first run; not for any value of lr or lam after it, 0 included."""
    result = program(COUNT)
    assert result.returncode == 0, result.stderr[-3000:]
    counts = [int(n) for n in result.stdout.split("COUNTS")[1].split()]
    assert len(counts) == 20 and counts[1] >= 1
    assert counts[2:] == [counts[2]] * 18, counts
    assert counts[2] <= 3, counts


# ---- the host side ---------------------------------------------------------------------------------------------------


def test_group_view_is_that_of_cpp() -> None:
    """Random shapes, layouts and group dimensions: the same view, or refused by both."""
    if native_engine.load_error is not None:
        pytest.skip(native_engine.load_error)
    draw, agreed, refused = random.Random(1), 0, 0
    for _ in range(2000):
        n = draw.randint(1, 5)
        shape = [draw.choice((1, 2, 3, 5)) for _ in range(n)]
        order = draw.sample(range(n), n)
        w = torch.empty([shape[d] for d in order]).permute([order.index(d) for d in range(n)])
        dims = draw.sample(range(n), draw.randint(0, n))
        block = draw.choice((1, 1, 2, 3, 5))
        try:
            want = native_engine._C.group_view(list(w.shape), list(w.stride()), dims, block)
        except ValueError:
            with pytest.raises(ValueError, match="collapse" if block == 1 else "group_block"):
                group_view(w.shape, w.stride(), dims, block)
            refused += 1
            continue
        assert tuple(group_view(w.shape, w.stride(), dims, block)) == tuple(want), (shape, order, dims, block)
        agreed += 1
    assert agreed > 500 and refused > 50


def test_dividers() -> None:
    from rvsm_kernels.engines.triton.table import divider

    draw = random.Random(2)
    for d in [*range(1, 300), *(draw.randrange(1, 1 << 31) for _ in range(500)), (1 << 31) - 1, 1 << 30]:
        code = divider(d)
        factor, shift = code & 0xFFFFFFFF, code >> 32
        for n in [0, 1, d - 1, d, min(d + 1, (1 << 31) - 1), (1 << 31) - 1, draw.randrange(1 << 31)]:
            if n < 1 << 31:
                assert ((n * factor >> 32) + n) >> shift == n // d, (n, d)


def test_pieces_cover_every_element_once() -> None:
    from rvsm_kernels.engines.triton.table import pieces

    for view in (GroupView(2, 3, 5, 7), GroupView(1, 1, 4, 50), GroupView(3, 1, 2, 1), GroupView(1, 30, 3, 4)):
        shape = (view.batch, 1, view.groups, 1)
        numbers = torch.arange(view.batch * view.groups).reshape(shape).expand(*view).reshape(-1)
        for limit in (2, 3, 8, 11, 40, 1000):
            seen = torch.full((math.prod(view),), -1)
            for offset, v, first in pieces(view, limit):
                own = torch.arange(v.batch * v.groups).reshape(v.batch, 1, v.groups, 1).expand(*v).reshape(-1) + first
                assert own.numel() < limit and (seen[offset : offset + own.numel()] == -1).all()
                seen[offset : offset + own.numel()] = own
            assert torch.equal(seen, numbers), (view, limit)


def test_given_norms_are_read_within_their_tensor() -> None:
    """Two rows of norms where ADMM meets a group lasso, one row of the other tensors of the same launch."""
    from rvsm_kernels.engines.triton import kinds, launch, norms

    w = [torch.ones(6, 5), torch.ones(4, 3), torch.ones(7, 2)]
    given = [torch.ones(2, 6, dtype=torch.float64), torch.ones(4, dtype=torch.float64)]
    tensors = [
        kinds.TensorArgs(w[0], w[0], GroupView(1, 1, 6, 5), ("lasso",), norms=given[0].data_ptr(), lasso=True),
        kinds.TensorArgs(w[1], w[1], GroupView(1, 1, 4, 3), ("plain",), norms=given[1].data_ptr()),
        kinds.TensorArgs(w[2], w[2], GroupView(1, 1, 7, 2), ("plain",)),
    ]
    kind = kinds.StepKind(method=2, states=1, numbers=16)
    made = launch.Launch("step", torch.float32, torch.device("cpu"), tensors, with_tl1=False, kind=kind)
    read = [
        entry[norms.PARTIALS.value] + 8 * group
        for entry in made.factors
        if entry[norms.ARE_NORMS.value]
        for group in range(entry[norms.COUNT.value])
    ]
    assert sorted(read) == sorted(t.data_ptr() + 8 * k for t in given for k in range(t.numel()))
    assert len(made.sums) == 1, "the third tensor is summed here, once: it has no group lasso"


def test_a_graph_keeps_its_table() -> None:
    """What a captured launch reads is never rewritten, neither by eager steps nor by other captures."""
    from rvsm_kernels.engines.triton.table import Table

    state = {"capturing": False}
    table = Table(torch.device("cpu"))
    data = [struct.pack("<4q", *range(k, k + 4)) for k in range(6)]

    def put(to_be: bytes) -> torch.Tensor:
        table.data = to_be
        return table.put(state["capturing"])

    first = put(data[0])
    assert put(data[0]) is first and first.tolist() == [0, 1, 2, 3]
    assert put(data[1]) is first, "rewritten in place while no graph has it"
    state["capturing"] = True
    assert put(data[1]) is first, "nothing is copied into a graph where the table is up to date"
    other = put(data[2])
    assert other is not first
    state["capturing"] = False
    later = put(data[3])
    assert later is not first and later is not other
    assert (first.tolist(), other.tolist()) == ([1, 2, 3, 4], [2, 3, 4, 5])
    # A replay would copy the graph's bytes into the graph's table: what eager steps read is another.
    other.fill_(-1)
    assert put(data[3]).tolist() == [3, 4, 5, 6]


@pytest.mark.slow
def test_one_launch_for_elements_three_for_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of parameters."""
    need("triton")
    from rvsm_kernels.engines.triton import launch

    counts: list[str] = []

    class Counted:
        def __init__(self, kernel: Any, name: str) -> None:
            self.kernel, self.name = kernel, name

        def __getitem__(self, grid: Any) -> Any:
            counts.append(self.name)
            return self.kernel[grid]

    for name in ("step_kernel", "sum_kernel", "factor_kernel"):
        monkeypatch.setattr(launch, name, Counted(getattr(launch, name), name))
    for options, most in (({}, 1), ({"group_dim": 0}, 3), ({"group_dim": 1}, 3), ({"group_dim": ()}, 3)):
        params = [nn.Parameter(torch.randn(s)) for s in ((7, 5), (40, 3), (1, 1), (300, 257))]
        optimizer = rk.RVSM(params, lr=0.1, momentum=0.9, lam=0.1, beta=0.5, **options, engine="triton")
        for _ in range(2):
            for p in params:
                p.grad = torch.randn_like(p)
            counts.clear()
            checked_step(optimizer)
            assert 1 <= len(counts) <= most, counts


def test_addresses_that_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual step prepares nothing anew: gradients at other addresses and another lr go into the tables."""
    need("triton")
    from rvsm_kernels.engines.triton.engine import TritonEngine

    built: list[int] = []
    build = TritonEngine._build
    monkeypatch.setattr(TritonEngine, "_build", lambda self, *args: (built.append(1), build(self, *args))[1])
    params = [nn.Parameter(torch.randn(s)) for s in ((7, 5), (40, 3))]
    optimizer = rk.RVSM(params, lr=0.1, momentum=0.9, lam=0.1, beta=0.5, engine="triton")
    keep = []
    for k in range(6):
        for p in params:
            keep.append(torch.randn_like(p))
            p.grad = keep[-1]
        optimizer.param_groups[0]["lr"] = 0.1 / (k + 1)
        optimizer.param_groups[0]["lam"] = 0.1 * k
        checked_step(optimizer)
    assert len(built) <= 3, "the first step, the one after it, and lam above 0"
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert not any(same_bits(p, q) for p, q in zip(params, before, strict=True))
