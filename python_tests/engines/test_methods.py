"""The methods beside rvsm, top-k, unit norm and adaptive hard thresholding: written out again, and by hand."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from builds import DEVICE, generator, quick_in_all
from torch import Tensor, nn

import rvsm_kernels as rk
from runner import bits, check_reading, checked_step, same_bits
from rvsm_kernels.method.selection import cut_of, survivors

LR, BETA, LAM = 0.1, 0.4, 0.03
TAU = LAM / BETA
Vector = list[float]


def shrink(r: float, penalty: str) -> float:
    """The prox of one magnitude, by its textbook formula; a = 1 for tl1."""
    if penalty == "l1":
        return max(r - TAU, 0.0)
    if penalty == "l0":
        return r if r > math.sqrt(2 * TAU) else 0.0
    cut = 2 * TAU if TAU <= 0.25 else 2 * math.sqrt(TAU) - 0.5
    if r <= cut:
        return 0.0
    phi = math.acos(1 - 27 * TAU / (1 + r) ** 3)
    return 2 / 3 * (1 + r) * math.cos(phi / 3) - 2 / 3 + r / 3


def prox(v: Vector, penalty: str, groups: int | None) -> Vector:
    """u of a vector: element by element, or in groups of so many elements that follow one another."""
    size = 1 if groups is None else groups
    out: Vector = []
    for i in range(0, len(v), size):
        r = math.sqrt(sum(x * x for x in v[i : i + size]))
        factor = shrink(r, penalty) / r if r > 0 else 0.0
        out += [factor * x for x in v[i : i + size]]
    return out


def algorithm(
    method: str, w: Vector, penalty: str, groups: int | None, target: Vector, steps: int, unit_norm: bool
) -> Vector:
    """The algorithms of the papers on f(w) = |w - target|^2 / 2, on plain lists of floats.

    With unit_norm: Algorithm 1 of arXiv 1812.05719, and RVSCGD, whose gradient is another. Without: that of the later
    papers. rvsm: u = prox(w). rvsm-delayed: as it is printed, the u that was made one step earlier. admm: with a
    gradient step in w in the place of its minimisation, and the scaled multiplier.
    """
    u, y = prox(w, penalty, groups), [0.0] * len(w)
    for _ in range(steps):
        grad = [a - b for a, b in zip(w, target, strict=True)]
        if method == "rvsm":
            u = prox(w, penalty, groups)
            pull = [a - b for a, b in zip(w, u, strict=True)]
        elif method == "rvsm-delayed":
            pull = [a - b for a, b in zip(w, u, strict=True)]
            u = prox(w, penalty, groups)
        else:
            u = prox([a + b for a, b in zip(w, y, strict=True)], penalty, groups)
            y = [c + a - b for a, b, c in zip(w, u, y, strict=True)]
            pull = [a - b + c for a, b, c in zip(w, u, y, strict=True)]
        w = [a - LR * g - LR * BETA * p for a, g, p in zip(w, grad, pull, strict=True)]
        if unit_norm:
            norm = math.sqrt(sum(a * a for a in w))
            w = [a / norm for a in w]
    return w


@pytest.mark.parametrize(
    ("penalty", "groups", "unit_norm"),
    [
        pytest.param("l0", None, False, id="l0 as printed in 2018, without its norm"),
        pytest.param("l1", None, True, id="normalised after each step"),
        pytest.param("tl1", None, False, id="tl1 of elements"),
        pytest.param("tl1", 3, False, id="tl1 of groups"),
        pytest.param("l0", 3, True, id="groups of a normalised tensor"),
    ],
)
@pytest.mark.parametrize("method", ["rvsm", "rvsm-delayed", "admm"])
def test_the_algorithms_as_printed(engine: str, method: str, penalty: str, groups: int | None, unit_norm: bool) -> None:
    """Forty steps on a quadratic, in float64; both couplings are the same without momentum and weight decay."""
    gen = generator(4)
    start, target = (torch.randn(12, generator=gen, dtype=torch.float64) * 0.6 for _ in range(2))
    want = algorithm(method, start.tolist(), penalty, groups, target.tolist(), 40, unit_norm)
    shape = (12,) if groups is None else (12 // groups, groups)
    for decoupled in (True, False):
        p = nn.Parameter(start.clone().reshape(shape))
        options = {"penalty": penalty, "lam": LAM, "beta": BETA, "group_dim": None if groups is None else 0}
        options["unit_norm"] = unit_norm
        optimizer = rk.RVSM([p], lr=LR, method=method, decoupled=decoupled, **options, engine=engine)
        for _ in range(40):
            p.grad = p.detach() - target.reshape(shape)
            optimizer.step()
        torch.testing.assert_close(p.detach().reshape(-1).cpu(), torch.tensor(want, dtype=torch.float64, device="cpu"))


# ---- what is kept ----------------------------------------------------------------------------------------------------


def started(engine: str, method: str, steps: int = 2, **options: Any) -> tuple[nn.Parameter, Any]:
    """One matrix in training."""
    gen = generator(11)
    p = nn.Parameter(torch.randn(6, 5, generator=gen))
    keyword = {"lr": 0.1, "momentum": 0.9, "penalty": "l1", "lam": 0.1, "beta": 0.5, "method": method, **options}
    optimizer = rk.RVSM([p], **keyword, engine=engine)
    for k in range(steps):
        go(p, optimizer, k)
    return p, optimizer


def go(p: nn.Parameter, optimizer: Any, k: int) -> None:
    """A step against the definition, with the gradient of a number."""
    p.grad = torch.randn(p.shape, generator=generator(100 + k)).to(p.dtype)
    checked_step(optimizer, f"step {k}")


@pytest.mark.parametrize(("method", "name"), [("rvsm-delayed", "u"), ("admm", "dual")])
@pytest.mark.parametrize("group_dim", [None, 1])
def test_checkpoints_change_no_bit(engine: str, method: str, name: str, group_dim: int | None) -> None:
    p, optimizer = started(engine, method, group_dim=group_dim)
    assert name in optimizer.state[p]
    file = io.BytesIO()
    torch.save({"p": p.detach(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    q = nn.Parameter(saved["p"].clone())
    other = rk.RVSM([q], lr=0.5, engine=engine)
    other.load_state_dict(saved["optimizer"])
    assert same_bits(other.state[q][name], optimizer.state[p][name])
    for k in range(2, 5):
        go(p, optimizer, k)
        go(q, other, k)
        assert same_bits(p, q) and same_bits(other.state[q][name], optimizer.state[p][name])
    third = copy.deepcopy(optimizer)
    assert third.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()


@pytest.mark.parametrize(("method", "name"), [("rvsm-delayed", "u"), ("admm", "dual")])
def test_a_checkpoint_without_what_is_kept(engine: str, method: str, name: str) -> None:
    """Refused before anything is changed; a checkpoint of a method of its own is not concerned."""
    p, optimizer = started(engine, method)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][0][name]
    before, weights = bits(optimizer.state[p][name]), bits(p)
    with pytest.raises(ValueError, match=rf"no {name} for parameter 0 of group 0.*{method}"):
        optimizer.load_state_dict(saved)
    assert torch.equal(bits(optimizer.state[p][name]), before) and torch.equal(bits(p), weights)
    sgd = torch.optim.SGD([p], lr=0.1, momentum=0.9)
    sgd.step()
    with pytest.raises(ValueError, match=f"no {name}.*edit the method after that"):
        optimizer.load_state_dict(sgd.state_dict())
    loaded = rk.RVSM([p], lr=0.1, penalty="l1", lam=0.1, beta=0.5, engine=engine)
    loaded.load_state_dict(sgd.state_dict())
    loaded.param_groups[0]["method"] = method
    go(p, loaded, 6)
    _, plain = started(engine, "rvsm")
    optimizer.load_state_dict(plain.state_dict())  # which brings its method along
    assert optimizer.param_groups[0]["method"] == "rvsm"
    go(p, optimizer, 7)


@pytest.mark.parametrize(("method", "name"), [("rvsm-delayed", "u"), ("admm", "dual")])
def test_what_does_not_fit_is_refused(engine: str, method: str, name: str) -> None:
    p, optimizer = started(engine, method)
    good = optimizer.state[p][name]
    for wrong in (good[:3].clone(), good.long(), "text"):
        optimizer.state[p][name] = wrong
        weights = bits(p)
        with pytest.raises(RuntimeError, match=f"the {name} of parameter 0 of group 0"):
            optimizer.step()
        assert torch.equal(bits(p), weights)
    optimizer.state[p][name] = good.clone(memory_format=torch.contiguous_format)
    go(p, optimizer, 5)
    optimizer.state[p][name] = torch.empty(5, 6).t().copy_(good)  # another layout is staged
    go(p, optimizer, 6)


@pytest.mark.parametrize(("method", "name"), [("rvsm-delayed", "u"), ("admm", "dual")])
def test_switched_off_and_on(engine: str, method: str, name: str) -> None:
    """Nothing stale survives: without a splitting, or with another method, what was kept is dropped."""
    p, optimizer = started(engine, method)
    group = optimizer.param_groups[0]
    for change in ({"lam": 0.0}, {"beta": 0.0}, {"method": "rvsm"}, {"penalty": None}):
        old = {key: group[key] for key in change}
        group.update(change)
        go(p, optimizer, 20)
        assert name not in optimizer.state[p]
        group.update(old)
        go(p, optimizer, 21)  # the definition begins anew
        go(p, optimizer, 22)
        assert name in optimizer.state[p]
    group["method"] = "admm" if method == "rvsm-delayed" else "rvsm-delayed"
    go(p, optimizer, 23)
    go(p, optimizer, 24)
    check_reading(optimizer)


@pytest.mark.parametrize("method", ["rvsm-delayed", "admm"])
@pytest.mark.parametrize(
    ("edit", "shape"),
    [
        pytest.param({"lam": 0.0}, (40, 3), id="short groups"),
        pytest.param({"lam": 0.0}, (40, 64), id="lam"),
        pytest.param({"beta": 0.0}, (40, 64), id="beta"),
        pytest.param({"penalty": None}, (40, 64), id="penalty"),
    ],
)
def test_switched_on_beside_group_lasso(engine: str, method: str, edit: dict[str, Any], shape: tuple[int, int]) -> None:
    """The norms were wanted before, but not those of another argument, nor anything kept."""
    p = nn.Parameter(torch.randn(shape) * 0.3)
    final = {"penalty": "l0", "lam": 0.05, "beta": 0.5}
    options = {"group_dim": 0, "group_lasso": 0.1, "method": method, **final, **edit}
    optimizer = rk.RVSM([p], lr=0.1, **options, engine=engine)
    go(p, optimizer, 0)
    optimizer.param_groups[0].update(final)
    go(p, optimizer, 1)
    go(p, optimizer, 2)
    optimizer.param_groups[0].update(edit)
    go(p, optimizer, 3)


@pytest.mark.parametrize("method", ["rvsm-delayed", "admm"])
def test_saved_between_an_edit_and_a_step(engine: str, method: str) -> None:
    """The next step would begin anew, and so does that of a loaded optimizer."""
    p, optimizer = started(engine, method, lam=0.0)
    optimizer.param_groups[0]["lam"] = 0.1
    q = nn.Parameter(p.detach().clone())
    other = rk.RVSM([q], lr=0.1, engine=engine)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for k in range(3):
        go(p, optimizer, k)
        go(q, other, k)
        assert same_bits(p, q)


@quick_in_all
def test_moved_to_another_group(engine: str) -> None:
    p, optimizer = started(engine, "admm")
    q = nn.Parameter(torch.randn(3, 4))
    optimizer.add_param_group({"params": [q], "method": "rvsm"})
    q.grad = torch.ones_like(q)
    first, second = optimizer.param_groups
    first["params"], second["params"] = second["params"], first["params"]
    go(p, optimizer, 4)
    assert "dual" not in optimizer.state[p] and "dual" in optimizer.state[q]


@pytest.mark.parametrize("wrong", ["text", torch.ones(5), torch.ones(2, 6, 5), torch.zeros(1).expand(6, 5)])
def test_reading_with_a_dual_that_does_not_fit(engine: str, wrong: Any) -> None:
    p, optimizer = started(engine, "admm")
    good, weights = optimizer.state[p]["dual"], bits(p)
    optimizer.state[p]["dual"] = wrong.to(p.device) if isinstance(wrong, Tensor) else wrong
    calls = [optimizer.penalty_value, optimizer.sparsity, optimizer.sparsify_, optimizer.step]
    for call in [*calls, optimizer.sparse_weights().__enter__]:
        with pytest.raises(RuntimeError, match="the dual of parameter 0 of group 0"):
            call()
        assert torch.equal(bits(p), weights)
    optimizer.state[p]["dual"] = good
    check_reading(optimizer)


@pytest.mark.parametrize("penalty", ["l0", "l1"])
def test_sparsified_for_good(engine: str, penalty: str) -> None:
    """What is read afterwards is what the parameters hold."""
    p, optimizer = started(engine, "admm", penalty=penalty)
    optimizer.sparsify_()
    u = p.detach().clone()
    with optimizer.sparse_weights():
        assert torch.equal(p == 0, u == 0)
        torch.testing.assert_close(p.detach(), u)
    go(p, optimizer, 9)


@pytest.mark.parametrize("method", ["rvsm-delayed", "admm"])
def test_a_first_step_with_an_inf(engine: str, method: str) -> None:
    p, optimizer = started(engine, method, 0)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    go(p, optimizer, 0)
    assert not optimizer.state[p]
    optimizer.found_inf = torch.tensor(0.0)
    go(p, optimizer, 1)
    optimizer.found_inf = torch.tensor(1.0)
    go(p, optimizer, 2)


@pytest.mark.parametrize("method", ["rvsm-delayed", "admm"])
def test_moved_to_another_dtype(engine: str, method: str) -> None:
    p, optimizer = started(engine, method)
    p.data, p.grad = p.data.double(), None
    p.grad = torch.ones_like(p)
    optimizer.step()
    (kept,) = (optimizer.state[p][key] for key in ("u", "dual") if key in optimizer.state[p])
    assert kept.dtype == torch.float64
    go(p, optimizer, 5)


@pytest.mark.parametrize("method", ["rvsm-delayed", "admm"])
def test_gradients_that_come_and_go(engine: str, method: str) -> None:
    params = [nn.Parameter(torch.randn(s)) for s in ((4, 3), (7,), (0,), (2, 2))]
    optimizer = rk.RVSM(params, lr=0.1, momentum=0.5, lam=0.1, beta=0.5, method=method, engine=engine)
    for present in ((0, 1, 2), (0, 1, 2, 3), (1,), (0, 3), ()):
        for k, p in enumerate(params):
            p.grad = torch.randn_like(p) if k in present else None
        checked_step(optimizer, present)
    check_reading(optimizer)


def test_admm_closes_the_gap(engine: str) -> None:
    """On a quadratic the multiplier brings w to u, where rvsm stops at a distance."""
    target = torch.linspace(-1, 1, 9, dtype=torch.float64)
    gaps = {}
    for method in ("rvsm", "admm"):
        p = nn.Parameter(torch.zeros(9, dtype=torch.float64))
        optimizer = rk.RVSM([p], lr=0.2, penalty="l1", lam=0.1, beta=0.5, method=method, engine=engine)
        for _ in range(1000 if engine != "triton" or DEVICE != "cpu" else 300):
            p.grad = p.detach() - target
            optimizer.step()
        with optimizer.sparse_weights():
            u = p.detach().clone()
        gaps[method] = (p.detach() - u).abs().max().item()
    assert gaps["admm"] < 1e-6 < 0.05 < gaps["rvsm"]


# ---- top-k -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("density", "group_dim"),
    [
        pytest.param(0.05, None, id="10.5 are 11"),
        pytest.param(0.3, None, id="63 of 210"),
        pytest.param(0.999, None, id="all"),
        pytest.param(1.0, None, id="nothing is cut"),
        pytest.param(0.1, 0, id="3 of 30 rows"),
        pytest.param(0.5, 1, id="4 of 7 columns"),
        pytest.param(0.05, (), id="the only group"),
    ],
)
def test_topk_keeps_so_many(engine: str, density: float, group_dim: Any) -> None:
    p = nn.Parameter(torch.randn(30, 7, generator=generator(3)))
    options = {"penalty": "topk", "density": density, "lam": 1.0, "beta": 0.5, "group_dim": group_dim}
    optimizer = rk.RVSM([p], lr=0.1, momentum=0.9, **options, engine=engine)
    for k in range(2):
        go(p, optimizer, k)
        check_reading(optimizer)
    with optimizer.sparse_weights():
        u = p.detach().clone()
    count = {None: 210, 0: 30, 1: 7, (): 1}[group_dim]
    dims = {None: (), 0: (1,), 1: (0,), (): (0, 1)}[group_dim]
    alive = (u != 0) if group_dim is None else (u != 0).any(dims[0]) if len(dims) == 1 else (u != 0).any()
    assert int(alive.sum()) == math.ceil(round(density * count, 9))
    assert torch.equal(u[u != 0], p.detach()[u != 0])


@quick_in_all
def test_topk_where_magnitudes_tie(engine: str) -> None:
    """All magnitudes that tie with the largest one that is dropped are dropped too; a zero does not survive either."""
    w = torch.tensor([3.0, -2.0, 2.0, 2.0, 1.0, 0.0])
    for density, want in (
        (1 / 6, [3, 0, 0, 0, 0, 0]),
        (2 / 6, [3, 0, 0, 0, 0, 0]),  # -2, 2 and 2 tie for the second place
        (3 / 6, [3, 0, 0, 0, 0, 0]),
        (4 / 6, [3, -2, 2, 2, 0, 0]),
        (1.0, [3, -2, 2, 2, 1, 0]),
    ):
        p = nn.Parameter(w.clone())
        optimizer = rk.RVSM([p], lr=0.1, penalty="topk", density=density, engine=engine)
        optimizer.sparsify_()
        assert p.tolist() == want, density
    assert [survivors(0.1, 30), survivors(0.1, 31), survivors(1e-9, 5), survivors(1.0, 5)] == [3, 4, 1, 5]
    assert cut_of(w, 0.5).item() == 2 and cut_of(w, 1.0).item() == -1
    nan = torch.tensor([1.0, math.nan, 2.0])
    assert cut_of(nan, 0.5).item() == 1, "a NaN counts as large, and stays visible"


def test_neighbours_are_no_tie(engine: str) -> None:
    """Norms one ulp apart: halfway between them there is nothing."""
    eps = torch.finfo(torch.float32).eps
    p = nn.Parameter(torch.tensor([[1 + eps], [1 + 2 * eps]]))
    rk.RVSM([p], lr=0.1, penalty="topk", density=0.5, group_dim=0, engine=engine).sparsify_()
    assert p.flatten().tolist() == [0, 1 + 2 * eps]


def test_topk_after_inference_mode(engine: str) -> None:
    p = nn.Parameter(torch.randn(9))
    optimizer = rk.RVSM([p], lr=0.1, penalty="topk", density=0.5, lam=1.0, engine=engine)
    p.grad = torch.ones_like(p)
    with torch.inference_mode():
        optimizer.step()
    go(p, optimizer, 1)


def test_density_is_read_at_each_step(engine: str) -> None:
    p = nn.Parameter(torch.randn(40, generator=generator(8)))
    optimizer = rk.RVSM([p], lr=0.1, penalty="topk", density=0.5, lam=1.0, beta=0.9, engine=engine)
    for density in (0.5, 0.25, 1.0, 0.75):
        optimizer.param_groups[0]["density"] = density
        go(p, optimizer, 3)
        zeros = int(optimizer.sparsity().to_dict()["total"]["zeros"])
        assert zeros == 40 - round(40 * density)
    optimizer.param_groups[0]["penalty"] = "l0"
    go(p, optimizer, 4)


# ---- unit norm -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_unit_norm(engine: str, dtype: torch.dtype) -> None:
    """The step of a twin without it, divided by the norm; a tensor of zeros stays one, and so do groups of zeros."""

    def made(unit_norm: bool) -> tuple[list[nn.Parameter], Any]:
        gen = generator(5)
        params = [nn.Parameter(torch.randn(s, generator=gen).to(dtype)) for s in ((4, 6), (9,), (3,), (0,))]
        params[2].data.zero_()
        params[0].data[1] = 0
        options = {"penalty": "l1", "lam": 0.05, "beta": 0.5, "unit_norm": unit_norm}
        groups = [{"params": params[:1], "group_dim": 0}, {"params": params[1:]}]
        return params, rk.RVSM(groups, lr=0.1, **options, engine=engine)

    (params, optimizer), (twins, twin) = made(True), made(False)
    for k in range(3):
        for j, (p, q) in enumerate(zip(params, twins, strict=True)):
            q.data.copy_(p.data)
            p.grad = torch.randn(p.shape, generator=generator(50 + k)).to(dtype) * (j != 2)
            if j == 0:
                p.grad[1] = 0
            q.grad = p.grad.clone()
        optimizer.step()
        twin.step()
        for p, q in zip(params, twins, strict=True):
            norm = q.double().norm()
            want = q.double() / norm if norm > 0 else q.double()
            torch.testing.assert_close(p.double(), want, rtol=2 * torch.finfo(dtype).eps, atol=0)
        assert not params[2].any() and not params[0][1].any()


@pytest.mark.parametrize(("value", "dtype"), [(3e38, torch.float32), (1e-44, torch.float32), (3e200, torch.float64)])
def test_unit_norm_of_numbers_out_of_range(engine: str, value: float, dtype: torch.dtype) -> None:
    p = nn.Parameter(torch.full((4,), value, dtype=dtype))
    p.grad = torch.zeros_like(p)
    rk.RVSM([p], lr=0.1, penalty=None, unit_norm=True, engine=engine).step()
    torch.testing.assert_close(p.detach(), torch.full((4,), 0.5, dtype=dtype))


def test_unit_norm_and_an_inf(engine: str) -> None:
    p = nn.Parameter(torch.randn(5) * 3)
    p.grad = torch.ones(5)
    optimizer = rk.RVSM([p], lr=0.1, unit_norm=True, engine=engine)
    optimizer.found_inf = torch.tensor(1.0)
    before = bits(p)
    optimizer.step()
    assert torch.equal(bits(p), before)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert abs(p.double().norm().item() - 1) < 1e-6


# ---- adaptive hard thresholding --------------------------------------------------------------------------------------


def largest(w: Tensor, s: int) -> set[int]:
    """The indices of the s largest magnitudes."""
    return set(sorted(range(len(w)), key=lambda i: -abs(w[i].item()))[:s])


@pytest.mark.parametrize("of", ["engine", "reference"])
def test_adaptive_hard_thresholding(engine: str, of: str) -> None:
    """Algorithm 2 of the 2018 paper, once more with sets of indices."""
    gen = generator(6)
    w = torch.randn(12, generator=gen, dtype=torch.float64)
    p = nn.Parameter(w.clone())
    if of == "engine":
        optimizer = rk.AdaptiveHardThreshold([p], lr=0.3, density=0.25, engine=engine)
    else:
        optimizer = rk.reference.AdaptiveHardThreshold([p], lr=0.3, density=0.25)
    optimizer.sparsify_()
    w = torch.where(torch.tensor([i in largest(w, 3) for i in range(12)]), w, 0)
    assert torch.equal(p.detach(), w)
    applied = 0
    for _ in range(25):
        grad = torch.randn(12, generator=gen, dtype=torch.float64)
        p.grad = grad.clone()
        optimizer.step()
        before, new = largest(w, 3), w - 0.3 * grad
        if largest(new, 3) != before:
            new = torch.where(torch.tensor([i in largest(new, 3) for i in range(12)]), new, 0)
            applied += 1
        torch.testing.assert_close(p.detach(), new)
        w = p.detach().clone()
    assert 0 < applied < 25
    assert int(optimizer.sparsity().to_dict()["total"]["zeros"]) == 9


def test_adaptive_hard_thresholding_is_checked(engine: str) -> None:
    p = nn.Parameter(torch.ones(4))
    with pytest.raises(ValueError, match="density"):
        rk.AdaptiveHardThreshold([p], lr=0.1, engine=engine)
    for density in (0.0, 1.5):
        with pytest.raises(ValueError, match="density"):
            rk.AdaptiveHardThreshold([p], lr=0.1, density=density, engine=engine)
    q = nn.Parameter(torch.randn(6, 4))
    optimizer = rk.AdaptiveHardThreshold([{"params": [p]}, {"params": [q], "group_dim": 0}], density=0.5, engine=engine)
    for _ in range(3):
        p.grad, q.grad = torch.randn_like(p), torch.randn_like(q)
        optimizer.step()
    optimizer.sparsify_()
    assert int((q != 0).any(1).sum()) == 3
    copied = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(copied)


def test_adaptive_thresholding_leaves_the_rest_alone(engine: str) -> None:
    """Biases and norms stay dense, and a NaN stays where it came from, visible."""
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    optimizer = rk.AdaptiveHardThreshold(rk.param_groups(model, penalty="topk"), lr=0.5, density=0.25, engine=engine)
    for k in range(5):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator(k))
        optimizer.step()
    assert all((p != 0).all() for p in (model[0].bias, model[1].weight, model[1].bias))
    p = nn.Parameter(torch.tensor([1.0, 2, 3, 4]))
    optimizer = rk.AdaptiveHardThreshold([p], lr=0.1, density=0.5, engine=engine)
    p.grad = torch.tensor([math.nan, 0, 0, 0])
    optimizer.step()
    assert math.isnan(p[0].item()) and p[3].item() == 4


def test_adaptive_thresholding_knows_one_penalty(engine: str) -> None:
    p, rvsm = started(engine, "rvsm")
    optimizer = rk.AdaptiveHardThreshold([p], lr=0.1, density=0.5, engine=engine)
    with pytest.raises(ValueError, match=r"penalty.*'l1'.*topk"):
        optimizer.load_state_dict(rvsm.state_dict())
    optimizer.param_groups[0]["penalty"] = "l0"
    with pytest.raises(ValueError, match=r"penalty.*'l0'.*topk"):
        optimizer.step()
