"""The statistics of a step against their definition in float64, and what is counted of u without making it."""

from __future__ import annotations

import copy
import itertools
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builds import DEVICE, few, generator, is_slow, need, quick_in_all
from torch import Tensor, nn

import definition
import rvsm_kernels as rk
from rvsm_kernels.engines import measured

LAM, BETA, LASSO, SCALE = 3e-3, 0.5, 0.02, 8.0
RELATIVE = 1e-6
"""What a sum may be off by: terms are in the type of the arithmetic, their sum in float64. The gap is the difference of
w and a u that was rounded to that type, by at most ROUNDED of w + dual."""
ROUNDED = 8 * 2.0**-24

PENALTIES = (None, "l0", "l1", "tl1", "topk")
METHODS = ("rvsm", "rvsm-delayed", "admm")
GROUPS = (None, 0, 1, (0, 1), ())


def norms_of(v: Tensor, group_dim: Any) -> Tensor:
    """Magnitudes, or norms of groups that broadcast over v."""
    if group_dim is None:
        return v.abs()
    dims = (group_dim,) if isinstance(group_dim, int) else group_dim
    return v.square().sum([d for d in range(v.dim()) if d not in dims], keepdim=True).sqrt()


def expected(p: Tensor, w: Tensor, state: Tensor | None, scale: float, options: dict[str, Any]) -> dict[str, float]:
    """The row of a parameter by its definition; w are the weights of the step, in the type of the arithmetic."""
    assert p.grad is not None
    w, d = w.double(), p.grad.double() / scale
    penalty, groups, beta = options["penalty"], options["group_dim"], options["beta"]
    lam = options["lam"]
    if options.get("group_scale"):
        lam = lam * math.sqrt(w.numel() / norms_of(w, groups).numel())
    row: dict[str, float] = {"gap": 0.0, "zero_groups": 0, "penalty": 0.0, "quadratic": 0.0, "groups": 0}
    u = w
    if options.get("maximize"):
        d = -d
    if penalty is not None:
        method = options["method"]
        before = torch.zeros_like(w) if state is None else state.double()
        v = w + before if method == "admm" else w
        r = norms_of(v, groups)
        if penalty == "topk":
            kept = math.ceil(options["density"] * r.numel())
            least = r.flatten().sort().values[r.numel() - kept]
            s = torch.where(r < least, 0.0, r)
        else:
            s = torch.from_numpy(
                np.asarray(definition.shrink(penalty, r.cpu().numpy(), lam / beta, options["a"]), np.float64)
            ).to(r.device)
        u = v.sign() * s if groups is None else v * torch.where(r == 0, 0.0, s / torch.where(r == 0, 1.0, r))
        row["zero_groups"], row["groups"] = int((s == 0).sum()), r.numel()
        if penalty != "topk":
            value = definition.g(penalty, s.cpu().numpy().astype(np.longdouble), options["a"])
            row["penalty"] = lam * float(np.asarray(value).sum())
        row["gap"] = float((w - u).square().sum())
        row["quadratic"] = beta / 2 * row["gap"]
        row["slack of gap"] = 1e-30 + 2 * ROUNDED * float(v.norm() * (w - u).norm())
        row["slack of quadratic"] = beta / 2 * row["slack of gap"]
        pulls = {"rvsm": w - u, "rvsm-delayed": w - before, "admm": w - u + (v - u)}[method]
        if not options["decoupled"]:
            d = d + beta * pulls
    if options.get("group_lasso"):
        r = norms_of(w, groups)
        d = d + options["group_lasso"] * w / torch.where(r == 0, 1.0, r)
    row["zeros"] = int((u == 0).sum())
    row["grad"] = float(d.square().sum())
    row["nonfinite"] = int((~(w.isfinite() & d.isfinite())).sum())
    row["elements"] = w.numel()
    return row


def compare(found: dict[str, Any], want: dict[str, float], where: Any, relative: float = RELATIVE) -> None:
    want = dict(want)
    slack = {name: want.pop(f"slack of {name}", 1e-30) for name in ("gap", "quadratic")}
    for name, value in want.items():
        if name in ("gap", "penalty", "quadratic", "grad"):
            assert found[name] == pytest.approx(value, rel=relative, abs=slack.get(name, 1e-30)), (name, where)
        else:
            assert found[name] == value, (name, where)


def cases() -> list[dict[str, Any]]:
    """Options of every kind of step."""
    made = []
    for penalty, method, group_dim, decoupled in itertools.product(PENALTIES, METHODS, GROUPS, (True, False)):
        if penalty is None and (method != "rvsm" or not decoupled):
            continue
        lasso = LASSO if group_dim is not None and len(made) % 3 == 0 else 0.0
        options = {"penalty": penalty, "method": method, "group_dim": group_dim, "decoupled": decoupled}
        if penalty == "topk":
            options["density"] = 0.4
        if group_dim is not None and len(made) % 2:
            options["group_scale"] = True
        made.append(
            {**options, "lam": LAM, "beta": BETA, "a": 0.7, "group_lasso": lasso, "maximize": len(made) % 5 == 0}
        )
    return made


def weights(shape: tuple[int, ...], dtype: torch.dtype, g: torch.Generator) -> nn.Parameter:
    """Zeros among them, and whole groups of zeros."""
    w = torch.randn(shape, generator=g, device=DEVICE) * 0.1
    w[torch.rand(shape, generator=g, device=DEVICE) < 0.1] = 0
    if w.dim() > 1 and w.numel():
        w[0] = 0
        w[:, -1] *= 0.01
    p = nn.Parameter(w.to(dtype))
    p.grad = torch.randn(shape, generator=g, device=DEVICE).to(dtype)
    return p


@quick_in_all
@pytest.mark.parametrize("method", METHODS)
def test_windows_and_budgets(engine: str, method: str) -> None:
    """N:M, and a cut over several tensors: u is not of one tensor's magnitudes."""
    g = generator(5)
    for options in ({"penalty": "nm", "pattern": (2, 4)}, {"penalty": "topk", "density": 0.3, "budget": "global"}):
        params = [nn.Parameter(torch.randn(shape, generator=g, device=DEVICE)) for shape in ((8, 12), (3, 4, 3, 3))]
        optimizer = rk.RVSM(
            params, lr=0.1, lam=1.0, beta=BETA, method=method, engine=engine, statistics=True, **options
        )
        for _ in range(2):
            w = [p.detach().double() for p in params]
            with optimizer.sparse_weights():
                u = [p.detach().double() for p in params]
            for p in params:
                p.grad = torch.randn(p.shape, generator=g, device=DEVICE)
            optimizer.step()
            for row, before, x, p in zip(optimizer.statistics().rows, w, u, params, strict=True):
                found = row.to_dict()
                assert found["zeros"] == found["zero_groups"] == int((x == 0).sum()) > 0, options
                assert found["gap"] == pytest.approx(float((before - x).square().sum()), rel=1e-5)
                assert found["penalty"] == 0 and found["grad"] == pytest.approx(float(p.grad.double().square().sum()))


@quick_in_all
def test_every_kind_of_step(engine: str) -> None:
    """Counts to the last integer, sums within RELATIVE, over SGD and AdamW; w, u and d are those of the step."""
    g = generator(0)
    every = cases()
    for k in torch.randperm(len(every), generator=torch.Generator().manual_seed(0))[: few(engine, len(every))].tolist():
        options = every[k]
        p = weights((6, 5, 3, 3) if is_slow(engine) else (37, 19, 3, 3), torch.float32, g)
        kind = rk.RVSMAdamW if k % 2 else rk.RVSM
        optimizer = kind([("p", p)], lr=0.01, engine=engine, statistics=True, **options)
        for _ in range(1 if is_slow(engine) else 3):
            state = optimizer.state[p].get({"rvsm-delayed": "u", "admm": "dual"}.get(options["method"], ""))
            state = None if state is None else state.clone()
            if state is None and options["method"] == "rvsm-delayed" and options["penalty"] is not None:
                first = copy.deepcopy(optimizer)
                first.sparsify_()
                state = first.param_groups[0]["params"][0].detach()
            w = p.detach().clone()
            optimizer.grad_scale = torch.tensor(SCALE)
            optimizer.step()
            found = optimizer.statistics()
            compare(found["p"].to_dict(), expected(p, w, state, SCALE, options), options)
            assert found["p"].to_dict() | {"name": "total"} == found.total.to_dict()


def test_statistics_are_those_of_the_weights_before_the_step(engine: str) -> None:
    """What penalty_value() and sparsity() say before a step is what its statistics say after it."""
    g = generator(1)
    first, second = weights((12, 7), torch.float32, g), weights((5, 3), torch.float32, g)
    groups = [
        {"params": [("first", first)], "penalty": "l0", "lam": LAM, "beta": BETA},
        {"params": [("second", second)], "penalty": "tl1", "lam": 2 * LAM, "beta": 2 * BETA, "group_dim": 1},
        {"params": [("plain", weights((4,), torch.float32, g))], "penalty": None},
    ]
    optimizer = rk.RVSM(groups, lr=0.1, momentum=0.9, engine=engine, statistics=True)
    for _ in range(2):
        value, counts = optimizer.penalty_value(), optimizer.sparsity()
        optimizer.step()
        found = optimizer.statistics()
        assert float(found.total.value) == pytest.approx(float(value), rel=RELATIVE)
        assert list(found) == ["first", "second", "plain"]
        for row in counts.rows:
            assert (int(found[row.name].zeros), int(found[row.name].zero_groups)) == (row.zeros, row.zero_groups)
            assert (found[row.name].elements, found[row.name].groups) == (row.numel, row.groups)
        assert int(found.split.zeros) == counts.total.zeros
        assert int(found.total.zeros) == counts.total.zeros + int(found["plain"].zeros)
        assert not found["plain"].split
        assert found.total.elements == 12 * 7 + 5 * 3 + 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_types(engine: str, dtype: torch.dtype) -> None:
    """The arithmetic is that of the step; behind half types with masters it is that of the masters."""
    if is_slow(engine) and dtype == torch.float64:
        pytest.skip("float32 is what Triton's interpreter is tried with")
    for master, group_dim in itertools.product((False, True), (None, 1)):
        g = generator(2)
        options: dict[str, Any] = {"penalty": "l0", "lam": LAM, "beta": BETA, "a": 1.0, "group_dim": group_dim}
        options |= {"method": "rvsm", "decoupled": False}
        p = weights((23, 11), dtype, g)
        optimizer = rk.RVSM(
            [("p", p)], lr=0.01, momentum=0.9, engine=engine, statistics=True, master_weights=master, **options
        )
        for _ in range(2):
            w = p.detach().clone()
            if master and "low" in optimizer.state[p]:
                w = ((w.view(torch.int16).int() << 16) + optimizer.state[p]["low"].int()).view(torch.float32)
            elif master and "master" in optimizer.state[p]:
                w = optimizer.state[p]["master"].clone()
            optimizer.step()
            compare(optimizer.statistics()["p"].to_dict(), expected(p, w, None, 1.0, options), (master, group_dim))


def test_what_is_not_finite_is_counted_once(engine: str) -> None:
    p = weights((4, 6), torch.float32, generator(3))
    assert p.grad is not None
    p.data[1, 1], p.data[2, 2], p.grad[1, 1], p.grad[3, 3] = math.nan, math.inf, math.inf, -math.inf
    optimizer = rk.RVSM([p], lr=0.1, lam=LAM, beta=BETA, engine=engine, statistics=True)
    want = int((torch.nan_to_num(p.detach(), nan=1.0).abs() <= math.sqrt(2 * LAM / BETA)).sum()) - int(
        math.sqrt(2 * LAM / BETA) >= 1
    )
    optimizer.step()
    total = optimizer.statistics().total
    assert int(total.nonfinite) == 3
    assert int(total.zeros) == want  # NaN and Inf are no zeros
    assert total.gap.isnan() and not total.grad.isfinite()


def test_what_a_step_leaves_out(engine: str) -> None:
    """Parameters without a gradient are not there, empty ones have zeros everywhere."""
    g = generator(4)
    p, q, empty = weights((5, 4), torch.float32, g), weights((3, 3), torch.float32, g), nn.Parameter(torch.empty(0, 3))
    empty.grad = torch.empty(0, 3)
    optimizer = rk.RVSM([("p", p), ("q", q), ("empty", empty)], lr=0.1, lam=LAM, engine=engine, statistics=True)
    optimizer.step()
    q.grad = None
    optimizer.step()
    found = optimizer.statistics()
    assert list(found) == ["p", "empty"]
    assert found["empty"].elements == found["empty"].groups == int(found["empty"].zeros) == 0
    assert found.total.elements == 20


def test_off_and_on(engine: str) -> None:
    """Off by default, an error then; turned on and off between steps, and statistics change no bit of a step."""
    g = generator(5)
    p = weights((9, 8), torch.float32, g)
    plain = rk.RVSM([p], lr=0.1, momentum=0.9, lam=LAM, beta=BETA, group_dim=1, engine=engine)
    with pytest.raises(RuntimeError, match="statistics=True"):
        plain.statistics()
    other = copy.deepcopy(plain)
    other.collect_statistics = True
    with pytest.raises(RuntimeError, match="no step has been done"):
        other.statistics()
    q = other.param_groups[0]["params"][0]
    q.grad = p.grad.clone()
    for on in (True, False, True):
        other.collect_statistics = on
        before = None if on else other.statistics().to_dict()
        plain.step()
        other.step()
        assert torch.equal(p, q)
        if before is not None:
            assert other.statistics().to_dict() == before
    with pytest.raises(TypeError, match="statistics"):
        rk.RVSM([p], lr=0.1, statistics=1)  # type: ignore[arg-type]


def test_reports_are_copies(engine: str) -> None:
    p = weights((9, 8), torch.float32, generator(6))
    optimizer = rk.RVSM([p], lr=0.5, lam=LAM, beta=BETA, engine=engine, statistics=True)
    optimizer.step()
    first = optimizer.statistics()
    kept = first.to_dict()
    optimizer.step()
    assert first.to_dict() == kept != optimizer.statistics().to_dict()


def test_found_inf_keeps_the_last_numbers(engine: str) -> None:
    p = weights((9, 8), torch.float32, generator(7))
    optimizer = rk.RVSM([p], lr=0.5, momentum=0.9, lam=LAM, beta=BETA, engine=engine, statistics=True)
    optimizer.step()
    kept = optimizer.statistics().to_dict()
    p.grad *= 3
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert optimizer.statistics().to_dict() == kept
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    assert optimizer.statistics().to_dict() != kept


def test_compiled_kernels_make_them(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No operator of torch makes a row of the compiled engines."""
    if engine not in ("native", "interpreted"):
        pytest.skip("the compiled engines")

    def refuse(*args: Any) -> Tensor:
        raise AssertionError("torch's operators have made statistics")

    monkeypatch.setattr(measured, "_row", refuse)
    g = generator(13)
    for dtype, group_dim in itertools.product((torch.float32, torch.bfloat16, torch.float64), (None, 0, 1)):
        p = weights((16, 8, 2, 2), dtype, g)
        optimizer = rk.RVSM([p], lr=0.1, lam=LAM, beta=BETA, group_dim=group_dim, engine=engine, statistics=True)
        optimizer.found_inf = torch.zeros((), device=DEVICE)  # prepares and launches apart
        for _ in range(2):
            w = p.detach().clone()
            optimizer.step()
            assert int(optimizer.statistics().total.elements) == p.numel()
            assert float(optimizer.statistics().total.grad) > 0
            assert not torch.equal(p.detach(), w)


@quick_in_all
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_no_bit_of_a_step_depends_on_them(engine: str, dtype: torch.dtype) -> None:
    """Also of groups whose norms the step has no need of elsewhere: those that are consecutive in memory."""
    if is_slow(engine) and dtype != torch.float32:
        pytest.skip("float32 is what Triton's interpreter is tried with")
    g = generator(14)
    for shape, group_dim, method in itertools.product(
        ((16, 8, 2, 2), (5, 7)), (None, 0, 1), METHODS[:1] if is_slow(engine) else METHODS
    ):
        p = weights(shape, dtype, g)
        plain = rk.RVSM(
            [p], lr=0.1, momentum=0.9, lam=LAM, beta=BETA, group_dim=group_dim, method=method, engine=engine
        )
        other = copy.deepcopy(plain)
        other.collect_statistics = True
        q = other.param_groups[0]["params"][0]
        for _ in range(3):
            p.grad = torch.randn(shape, generator=g, device=DEVICE).to(dtype)
            q.grad = p.grad.clone()
            plain.step()
            other.step()
            assert torch.equal(p, q), (shape, group_dim, method)


def test_pickle_and_deepcopy(engine: str) -> None:
    p = weights((9, 8), torch.float32, generator(8))
    wrapper = rk.RVSMWrapper(torch.optim.SGD([weights((9, 8), torch.float32, generator(8))], lr=0.1), engine=engine)
    wrapper.collect_statistics = True
    for optimizer in (rk.RVSM([p], lr=0.1, engine=engine, statistics=True), wrapper):
        for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            assert copied.collect_statistics is True
            for q in copied.param_groups[0]["params"]:
                q.grad = torch.ones_like(q)
            copied.step()
            assert copied.statistics().total.elements == 72
        assert "statistics" not in str(optimizer.state_dict())


def test_wrapper(engine: str) -> None:
    """d is what the wrapped optimizer finds in p.grad; parameters without a penalty are not there."""
    for decoupled in (True, False):
        p, q = weights((9, 8), torch.float32, generator(9)), weights((4,), torch.float32, generator(9))
        groups = [{"params": [("p", p)]}, {"params": [("q", q)], "penalty": None}]
        options = {"penalty": "l0", "lam": LAM, "beta": BETA, "decoupled": decoupled}
        optimizer = rk.RVSMWrapper(torch.optim.SGD(groups, lr=0.1), engine=engine, statistics=True, **options)
        w, of_loss = p.detach().clone(), p.grad.clone()
        optimizer.step()
        found = optimizer.statistics()
        assert list(found) == ["p"]
        assert float(found["p"].grad) == pytest.approx(float(p.grad.double().square().sum()), rel=RELATIVE)
        p.grad = of_loss
        want = expected(p, w, None, 1.0, {**options, "group_dim": None, "method": "rvsm", "a": 1.0})
        compare(found["p"].to_dict(), want, decoupled)


@pytest.mark.parametrize("group_dim", [None, 0, 1, (0, 1), ()])
@pytest.mark.parametrize("penalty", ["l0", "l1", "tl1", "topk"])
def test_any_number_of_threads_gives_the_same_bits(on_cpu: None, penalty: str, group_dim: Any) -> None:
    need("native")
    found = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        p = weights((300, 120, 3, 3), torch.float32, generator(10))
        kept = {"density": 0.3} if penalty == "topk" else {}
        options = {"penalty": penalty, "lam": LAM, "beta": BETA, "group_dim": group_dim, **kept}
        optimizer = rk.RVSM([p], lr=0.1, engine="native", statistics=True, **options)
        w = p.detach().clone()
        optimizer.step()
        found.append(optimizer.statistics().total.to_dict())
        value, counts = optimizer.penalty_value(), optimizer.sparsity().total
        found[-1] |= {"after": float(value), "counted": counts.to_dict()}
    assert all(x == found[0] for x in found)
    compare(found[0], expected(p, w, None, 1.0, {**options, "method": "rvsm", "decoupled": True, "a": 1.0}), "")


@pytest.mark.slow
def test_any_instruction_set_gives_the_same_bits(on_cpu: None) -> None:
    """Each in a process of its own, which chooses its kernels when it loads."""
    need("native")
    program = """
import sys
import torch
import rvsm_kernels as rk
torch.manual_seed(0)
for penalty in ("l0", "l1", "tl1"):
    for dims in (None, 0, 1, (0, 1)):
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            p = torch.nn.Parameter((torch.randn(70, 50, 3, 3) * 0.1).to(dtype))
            p.grad = torch.randn(p.shape).to(dtype)
            o = rk.RVSM([p], lr=0.1, penalty=penalty, lam=3e-3, beta=0.5, group_dim=dims, statistics=True)
            o.step()
            print(o.statistics().total.to_dict(), float(o.penalty_value()), o.sparsity().total)
"""
    root = str(Path(rk.__file__).parents[1])
    said = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "RVSM_ISA": isa},
            cwd=root,
            capture_output=True,
            check=True,
        ).stdout
        for isa in ("base", "avx2", "avx512")
    ]
    assert len(said[0].splitlines()) == 48 and said[1] == said[0] and said[2] == said[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_dim", [None, 0, 1, (0, 1)])
@pytest.mark.parametrize("penalty", ["l0", "l1", "tl1", "topk"])
def test_counting_u_is_making_it(native: str, penalty: str, group_dim: Any, dtype: torch.dtype) -> None:
    """sparsity() and penalty_value() against u as sparse_weights() makes it."""
    for layout in ("contiguous", "transposed", "strided"):
        w = weights((40, 24, 3, 2), dtype, generator(11)).detach()
        if layout == "transposed" and group_dim != (0, 1):
            w = w.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)
        if layout == "strided":
            w = torch.cat([w, w])[::2]
        p = nn.Parameter(w)
        kept = {"density": 0.3} if penalty == "topk" else {}
        options = {"penalty": penalty, "lam": LAM, "beta": BETA, "group_dim": group_dim, "engine": native, **kept}
        optimizer = rk.RVSM([p], lr=0.1, **options)
        found, value = optimizer.sparsity().total, float(optimizer.penalty_value())
        w = p.detach().clone()
        with optimizer.sparse_weights():
            u = p.detach().clone()
        assert found.zeros == int((u == 0).sum())
        assert found.zero_groups == int((norms_of(u.double(), group_dim) < 1e-15).sum())
        assert found.groups == norms_of(u, group_dim).numel()
        if dtype in (torch.float32, torch.float64):
            want = BETA / 2 * float((w.double() - u.double()).square().sum())
            if penalty != "topk":
                r = norms_of(u.double(), group_dim).cpu().numpy().astype(np.longdouble)
                want += LAM * float(np.asarray(definition.g(penalty, r, 1.0)).sum())
            assert value == pytest.approx(want, rel=RELATIVE)


def test_a_parameter_that_occurs_twice_is_there_once(engine: str) -> None:
    p = weights((9, 8), torch.float32, generator(12))
    optimizer = rk.RVSM([{"params": [p]}], lr=0.1, lam=LAM, beta=BETA, engine=engine, statistics=True)
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": [p]})
    optimizer.step()
    assert len(optimizer.statistics()) == 1
    assert optimizer.statistics().total.elements == 72


def test_under_torch_compile_the_step_is_called_as_it_is() -> None:
    p = weights((9, 8), torch.float32, generator(13))
    optimizer = rk.RVSM([p], lr=0.1, lam=LAM, beta=BETA, engine="reference", statistics=True)
    torch.compile(optimizer.step, backend="eager")()
    assert optimizer.statistics().total.elements == 72
