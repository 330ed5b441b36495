"""Half types that learn, on every engine: masters that follow float32, stochastic rounding, states of another type."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import random
from typing import Any

import pytest
import torch
from builds import DEVICE, few, quick_in_all, small_only
from torch import Tensor, nn

import rvsm_kernels as rk
from runner import same_bits
from rvsm_kernels.method.precision import join, rounded, split

HALF_TYPES = (torch.bfloat16, torch.float16)
MASTERS = {torch.bfloat16: "low", torch.float16: "master"}
SHAPES = ((9, 133), (300,), (3, 4, 3, 3), ())


def params_of(dtype: torch.dtype, seed: int = 0) -> list[nn.Parameter]:
    """Of several shapes, and one that is not contiguous."""
    gen = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(s, generator=gen).to(DEVICE, dtype) for s in SHAPES]
    return [nn.Parameter(t) for t in (*tensors, torch.randn(40, 7, generator=gen).to(DEVICE, dtype).t())]


def set_gradients(k: int, *of: list[nn.Parameter]) -> None:
    """The same gradients, numbers of bfloat16, for several lists of parameters; one of the second is missing."""
    gen = torch.Generator().manual_seed(100 + k)
    for place, same in enumerate(zip(*of, strict=True)):
        grad = torch.randn(same[0].shape, generator=gen).bfloat16()
        for p in same:
            p.grad = None if place == 1 and k == 1 else torch.empty_like(p).copy_(grad)


def behind(optimizer: Any, p: Tensor) -> Tensor:
    """The float32 weights of a parameter."""
    return join(p.detach(), optimizer.state[p][MASTERS[p.dtype]])


def drawn_options(rng: random.Random, cls: type) -> dict[str, Any]:
    """Options of a random configuration for tensors of every shape."""
    penalty = rng.choice(["l0", "l1", "tl1", "topk", None])
    options: dict[str, Any] = {"lr": rng.choice([0.0, 1e-3, 0.05]), "penalty": penalty, "lam": 0.3, "beta": 2.0}
    options |= {"decoupled": rng.random() < 0.7, "method": rng.choice(["rvsm", "rvsm-delayed", "admm"])}
    options |= {"weight_decay": rng.choice([0.0, 0.1]), "maximize": rng.random() < 0.2}
    if penalty == "topk":
        options["density"] = 0.4
    if rng.random() < 0.4:
        options |= {"group_dim": (), "group_scale": rng.random() < 0.5, "group_lasso": rng.choice([0.0, 0.1])}
    if cls is rk.RVSMAdamW:
        options["amsgrad"] = rng.random() < 0.3
    else:
        options |= {"momentum": rng.choice([0.0, 0.9]), "unit_norm": rng.random() < 0.2}
    return options


# ---- master weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [rk.RVSM, rk.RVSMAdamW])
@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_masters_follow_float32_bit_for_bit(engine: str, cls: type, dtype: torch.dtype) -> None:
    rng = random.Random(7)
    for case in range(few(engine, 40)):
        options = drawn_options(rng, cls)
        half, full = params_of(dtype, case), []
        full = [nn.Parameter(p.detach().float()) for p in half]
        ours = cls(half, master_weights=True, engine=engine, **options)
        twin = cls(full, engine=engine, **options)
        for k in range(4):
            set_gradients(k, half, full)
            ours.step()
            twin.step()
        for p, q in zip(half, full, strict=True):
            assert same_bits(behind(ours, p), q.detach()), options
            kept = {name: s for name, s in ours.state[p].items() if name != MASTERS[dtype]}
            assert kept.keys() == twin.state[q].keys()
            assert all(s.dtype == torch.float32 and same_bits(s, twin.state[q][name]) for name, s in kept.items())
            nearest = split(q.detach())[0] if dtype == torch.bfloat16 else q.detach().half()
            assert same_bits(p.detach(), nearest)
        assert str(ours.sparsity()) == str(twin.sparsity())
        assert float(ours.penalty_value()) == float(twin.penalty_value())
        before = [p.detach().clone() for p in half]
        with ours.sparse_weights(), twin.sparse_weights():
            assert all(torch.equal(p == 0, q == 0) for p, q in zip(half, full, strict=True))
        assert all(same_bits(p.detach(), w) for p, w in zip(half, before, strict=True))
        assert all(same_bits(behind(ours, p), q.detach()) for p, q in zip(half, full, strict=True))
        ours.sparsify_()
        twin.sparsify_()
        assert all(same_bits(behind(ours, p), q.detach()) for p, q in zip(half, full, strict=True))


def test_sparsify_before_the_first_step(engine: str) -> None:
    p = nn.Parameter(torch.randn(64).bfloat16())
    q = nn.Parameter(p.detach().float())
    options = {"penalty": "l1", "lam": 0.1, "beta": 1.0, "engine": engine}
    ours, twin = rk.RVSM([p], master_weights=True, **options), rk.RVSM([q], **options)
    ours.sparsify_()
    twin.sparsify_()
    assert same_bits(behind(ours, p), q.detach())


@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_a_parameter_that_was_edited_counts(engine: str, dtype: torch.dtype) -> None:
    """Nothing is trusted from before: the weights are what the parameter holds, within what its master can know."""
    p = nn.Parameter(torch.randn(500).to(DEVICE, dtype))
    optimizer = rk.RVSM([p], lr=0.1, penalty=None, master_weights=True, engine=engine)
    p.grad = torch.randn(500).to(DEVICE, dtype)
    optimizer.step()
    new = torch.randn(500).to(DEVICE, dtype)
    new[:9] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1.0, 2.0**-133, 3e4, -1.0]).to(dtype)
    p.data.copy_(new)
    p.grad.zero_()
    optimizer.step()
    assert torch.equal(p.isnan(), new.isnan())
    unit = {torch.bfloat16: 2.0**-8, torch.float16: 0.0}[dtype]
    there = ~new.isnan() & ~new.isinf()
    assert ((p - new).abs()[there].float() <= unit * new.abs()[there].float() + 1e-38).all()
    assert torch.equal(p[2:4], new[2:4]) or dtype == torch.bfloat16


def test_float32_parameters_have_no_master(engine: str) -> None:
    p = nn.Parameter(torch.randn(50))
    q = nn.Parameter(p.detach().clone())
    ours = rk.RVSMAdamW([p], master_weights=True, rounding="stochastic", engine=engine)
    plain = rk.RVSMAdamW([q], engine=engine)
    for k in range(3):
        set_gradients(k, [p], [q])
        ours.step()
        plain.step()
    assert same_bits(p.detach(), q.detach()) and ours.state[p].keys() == plain.state[q].keys()


def test_masters_come_and_go(engine: str) -> None:
    p = nn.Parameter(torch.randn(50).bfloat16())
    optimizer = rk.RVSM([p], lr=1e-3, momentum=0.9, engine=engine)
    for k, master in enumerate((False, True, True, False, True)):
        optimizer.param_groups[0]["master_weights"] = master
        set_gradients(k, [p])
        optimizer.step()
        assert ("low" in optimizer.state[p]) is master
        assert optimizer.state[p]["momentum_buffer"].dtype == (torch.float32 if master else torch.bfloat16)


def test_gradients_of_another_type(engine: str) -> None:
    """A float32 gradient beside half-type weights is used unrounded."""
    p, q = nn.Parameter(torch.randn(77).bfloat16()), nn.Parameter(torch.empty(77))
    q.data.copy_(p.data)
    grad = torch.randn(77)
    ours, twin = (
        rk.RVSMAdamW([x], lr=0.1, master_weights=x is p, engine=engine, penalty="l0", lam=0.1, beta=0.5) for x in (p, q)
    )
    for _ in range(3):
        p.grad_dtype = None  # torch checks the types of gradients that are set by hand
        p.grad, q.grad = grad.clone(), grad.clone()
        ours.step()
        twin.step()
    assert same_bits(behind(ours, p), q.detach())


# ---- stochastic rounding ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_the_mean_of_roundings_is_the_number(native: str, dtype: torch.dtype) -> None:
    """10,000 roundings of each of some numbers; within four standard errors."""
    spacing = 2.0 ** (-7 if dtype == torch.bfloat16 else -10)
    for part in (0.03, 0.25, 0.5, 0.9):
        for start in (1.0, -1.0):
            p = nn.Parameter(torch.full((10_000,), start).to(DEVICE, dtype))
            optimizer = rk.RVSM([p], lr=1.0, penalty=None, rounding="stochastic", seed=3, engine=native)
            p.grad_dtype = None
            p.grad = torch.full((10_000,), -part * spacing * start)
            optimizer.step()
            up = (p.detach().abs().float() - 1).sum().item() / spacing
            assert abs(up - 10_000 * part) <= 4 * (10_000 * part * (1 - part)) ** 0.5


@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_bits_do_not_depend_on_threads(native: str, dtype: torch.dtype) -> None:
    """Nor on the engine: the same as in plain torch where the arithmetic is exact."""
    weights, grad = torch.rand(200_003).to(DEVICE, dtype), (torch.rand(200_003) / 64).to(DEVICE, dtype)
    results = []
    for threads, engine in ((1, native), (2, native), (5, native), (1, "reference")):
        torch.set_num_threads(threads)
        p = nn.Parameter(weights.clone())
        optimizer = rk.RVSM([p], lr=1.0, penalty=None, rounding="stochastic", seed=2**45 + 9, engine=engine)
        for _ in range(2):
            p.grad = grad.clone()
            optimizer.step()
        results.append(p.detach())
    assert all(same_bits(r, results[0]) for r in results)


def test_seeds_steps_and_elements_differ(engine: str) -> None:
    def stepped(seed: int, steps: int) -> Tensor:
        p = nn.Parameter(torch.ones(512).to(DEVICE, torch.bfloat16))
        optimizer = rk.RVSM([p], lr=1.0, penalty=None, rounding="stochastic", seed=seed, engine=engine)
        for _ in range(steps):
            p.data.fill_(1.0)
            p.grad_dtype = None
            p.grad = torch.full((512,), -0.5 * 2**-7)
            optimizer.step()
        return p.detach()

    one, other, later = stepped(0, 1), stepped(1, 1), stepped(0, 2)
    for result in (one, other, later):
        assert 0.4 < float((result > 1).float().mean()) < 0.6
    assert 0.4 < float((one != other).float().mean()) < 0.6 and 0.4 < float((one != later).float().mean()) < 0.6
    assert same_bits(one, stepped(0, 1))


def test_what_cannot_be_rounded_stays(engine: str) -> None:
    """lr 0 moves nothing, whatever the seed; neither does a gradient of 0."""
    p = nn.Parameter(torch.randn(300).bfloat16())
    before = p.detach().clone()
    optimizer = rk.RVSMAdamW([p], lr=0.0, rounding="stochastic", seed=1, engine=engine)
    p.grad = torch.randn(300).bfloat16()
    optimizer.step()
    assert same_bits(p.detach(), before) and float(optimizer.state[p]["step"]) == 1


def test_rounding_agrees_with_the_definition() -> None:
    """Up or down to a neighbour, by the random number against the fraction, in double precision."""
    gen = torch.Generator().manual_seed(0)
    for dtype in HALF_TYPES:
        scale = 10.0 ** torch.empty(20_000).uniform_(-9, 4, generator=gen)
        w = torch.randn(20_000, generator=gen) * scale
        bits = torch.randint(0, 65536, w.shape, generator=gen, dtype=torch.int32)
        got = rounded(w, dtype, bits).double()
        nearest = w.to(dtype)
        inward = nearest.double().abs() <= w.double().abs()
        other = torch.nextafter(nearest, torch.where(inward, torch.inf, 0.0).to(dtype) * w.sign().to(dtype))
        low = torch.where(inward, nearest.double().abs(), other.double().abs())
        high = torch.where(inward, other.double().abs(), nearest.double().abs())
        finite = high.isfinite() & (high > low)
        share = (w.double().abs() - low) / (high - low)
        # The random bits are added to those that fall away; below the normal numbers of float16 they are compared.
        up = bits >= 65536 * (1 - share) if dtype == torch.bfloat16 else (bits >> 3) >= 8192 * (1 - share)
        compared = (dtype == torch.float16) & (w.abs() < 2.0**-14)
        up = torch.where(compared, bits + 0.5 < 65536 * share, up)
        want = torch.where(up, high, low) * w.sign()
        assert torch.equal(got[finite], want[finite]) and int(finite.sum()) > 19_000


# ---- states of another type ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF_TYPES])
def test_states_are_stored_in_their_type(engine: str, dtype: torch.dtype, state_dtype: str) -> None:
    p = nn.Parameter(torch.randn(9, 33).to(DEVICE, dtype))
    optimizer = rk.RVSMAdamW([p], state_dtype=state_dtype, amsgrad=True, method="admm", engine=engine)
    for k in range(3):
        set_gradients(k, [p])
        optimizer.step()
    names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    assert {optimizer.state[p][name].dtype for name in names} == {getattr(torch, state_dtype)}
    assert optimizer.state[p]["dual"].dtype == dtype


def test_float32_moments_of_bfloat16_weights(engine: str) -> None:
    """The moments of a bfloat16 parameter with float32 states are those of a float32 run."""
    p, q = nn.Parameter(torch.randn(200).bfloat16()), nn.Parameter(torch.randn(200))
    ours = rk.RVSMAdamW([p], state_dtype="float32", penalty=None, engine=engine)
    twin = rk.RVSMAdamW([q], penalty=None, engine=engine)
    for k in range(4):
        set_gradients(k, [p], [q])
        ours.step()
        twin.step()
    for name in ("exp_avg", "exp_avg_sq"):
        assert same_bits(ours.state[p][name], twin.state[q][name])


# ---- what meets them -------------------------------------------------------------------------------------------------

PRECISIONS: tuple[dict[str, Any], ...] = (
    {"master_weights": True},
    {"rounding": "stochastic", "seed": 5},
    {"state_dtype": "float32"},
    {"rounding": "stochastic", "state_dtype": "float32"},
    {"master_weights": True, "state_dtype": "bfloat16"},
)


def net(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(9, 21), nn.Linear(21, 3)).to(DEVICE, dtype)


def train(model: nn.Module, optimizer: Any, first: int, count: int) -> None:
    for k in range(first, first + count):
        gen = torch.Generator().manual_seed(k)
        x = torch.randn(5, 9, generator=gen).to(DEVICE, next(model.parameters()).dtype)
        optimizer.zero_grad()
        model(x).float().square().sum().backward()
        optimizer.step()


def optimizer_of(cls: type, model: nn.Module, engine: str, options: dict[str, Any], method: str = "rvsm") -> Any:
    return cls(model.parameters(), lr=0.02, penalty="l1", lam=1e-2, beta=1.0, method=method, engine=engine, **options)


@quick_in_all
@pytest.mark.parametrize("cls", [rk.RVSM, rk.RVSMAdamW])
@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_a_checkpoint_resumes_bit_for_bit(engine: str, cls: type, dtype: torch.dtype) -> None:
    for options, method in itertools.product(PRECISIONS, ("rvsm", "rvsm-delayed")):
        model = net(dtype)
        optimizer = optimizer_of(cls, model, engine, options, method)
        train(model, optimizer, 0, 3)
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        others = [(copy.deepcopy(model), None), (net(dtype), None), (net(dtype), {})]
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        optimizers = []
        for place, (other, kind) in enumerate(others):
            made = optimizer_of(cls, other, engine, options if kind is None else kind, method)
            other.load_state_dict(saved["model"])
            if place == 0:
                made.load_state_dict(pickle.loads(pickle.dumps(optimizer)).state_dict())
            else:
                made.load_state_dict(copy.deepcopy(saved["optimizer"]))  # torch does not copy what it loads
            optimizers.append(made)
        train(model, optimizer, 3, 3)
        for (other, _), made in zip(others, optimizers, strict=True):
            train(other, made, 3, 3)
            for p, q in zip(model.parameters(), other.parameters(), strict=True):
                assert same_bits(p.detach(), q.detach()), options
                assert optimizer.state[p].keys() == made.state[q].keys()
                for name, state in optimizer.state[p].items():
                    assert same_bits(state, made.state[q][name]) and state.dtype == made.state[q][name].dtype


def test_the_model_alone_serves_inference(engine: str) -> None:
    model = net(torch.bfloat16)
    train(model, optimizer_of(rk.RVSMAdamW, model, engine, {"master_weights": True}), 0, 3)
    other = net(torch.bfloat16)
    other.load_state_dict(model.state_dict())
    x = torch.randn(4, 9).to(DEVICE, torch.bfloat16)
    assert same_bits(model(x).detach(), other(x).detach())


@pytest.mark.parametrize("options", PRECISIONS)
def test_found_inf_changes_nothing(engine: str, options: dict[str, Any]) -> None:
    model = net(torch.bfloat16)
    optimizer = optimizer_of(rk.RVSM, model, engine, options)
    for started in (False, True):
        before = copy.deepcopy((list(model.parameters()), optimizer.state_dict()["state"]))
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.grad_scale, optimizer.found_inf = torch.ones(1), torch.ones(1)
        optimizer.step()
        after = list(model.parameters()), optimizer.state_dict()["state"]
        assert all(same_bits(p.detach(), q.detach()) for p, q in zip(before[0], after[0], strict=True))
        assert before[1].keys() == after[1].keys()
        for k, states in after[1].items():
            assert all(same_bits(states[name], before[1][k][name]) for name in states)
        if not started:
            optimizer.step()


def test_grad_scale(engine: str) -> None:
    """A scale that a GradScaler hands over leaves the float32 run's bits: it is a power of two."""
    p, q = nn.Parameter(torch.randn(99).half()), nn.Parameter(torch.empty(99))
    q.data.copy_(p.data)
    ours = rk.RVSM([p], lr=0.1, momentum=0.9, master_weights=True, engine=engine)
    twin = rk.RVSM([q], lr=0.1, momentum=0.9, engine=engine)
    for k in range(3):
        set_gradients(k, [p], [q])
        for optimizer, x in ((ours, p), (twin, q)):
            x.grad.mul_(64)
            optimizer.grad_scale, optimizer.found_inf = torch.full((1,), 64.0), torch.zeros(1)
            optimizer.step()
    assert same_bits(behind(ours, p), q.detach())


@pytest.mark.parametrize("options", PRECISIONS)
def test_odd_parameters(engine: str, options: dict[str, Any]) -> None:
    """Strided, empty, frozen, without a gradient, twice in the optimizer's groups by views of the same memory."""
    base = torch.randn(20, 12).to(DEVICE, torch.bfloat16)
    strided = nn.Parameter(base[:, ::3])
    frozen = nn.Parameter(torch.randn(4).to(DEVICE, torch.bfloat16), requires_grad=False)
    without, empty = (nn.Parameter(torch.randn(n).to(DEVICE, torch.bfloat16)) for n in (5, 0))
    params = [strided, frozen, without, empty]
    optimizer = rk.RVSMAdamW(params, lr=0.1, engine=engine, **options)
    dense = nn.Parameter(strided.detach().clone())
    twin = rk.RVSMAdamW([dense], lr=0.1, engine=engine, **options)
    beside = base[:, 1::3].clone()
    for k in range(3):
        set_gradients(k, [strided], [dense])
        empty.grad = torch.zeros_like(empty)
        optimizer.step()
        twin.step()
    assert same_bits(strided.detach(), dense.detach()) and same_bits(base[:, 1::3], beside)
    assert optimizer.state[strided].keys() == twin.state[dense].keys() and without not in optimizer.state


def test_a_master_that_does_not_fit_is_refused(engine: str) -> None:
    p = nn.Parameter(torch.randn(6).bfloat16())
    optimizer = rk.RVSM([p], master_weights=True, engine=engine)
    p.grad = torch.ones_like(p)
    optimizer.step()
    for wrong in (torch.zeros(7, dtype=torch.int16), torch.zeros(6), torch.zeros(6, dtype=torch.int32), 3):
        optimizer.state[p]["low"] = wrong
        before = p.detach().clone()
        with pytest.raises(RuntimeError, match="the low of parameter 0"):
            optimizer.step()
        assert same_bits(p.detach(), before)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"rounding": "up"}, ValueError, "Invalid rounding: 'up'"),
        ({"state_dtype": "float64"}, ValueError, "Invalid state_dtype: 'float64'"),
        ({"state_dtype": torch.bfloat16}, ValueError, "Invalid state_dtype"),
        ({"seed": -1}, ValueError, "Invalid seed value: -1"),
        ({"seed": 1.5}, TypeError, "Invalid seed value: 1.5"),
        ({"seed": 2**63}, ValueError, "Invalid seed value"),
    ],
)
def test_invalid_options(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        rk.RVSM([nn.Parameter(torch.ones(2))], **options)


def test_the_adaptive_algorithm_refuses_them() -> None:
    for options in ({"master_weights": True}, {"rounding": "stochastic"}):
        with pytest.raises(ValueError, match="neither master_weights nor another rounding"):
            rk.AdaptiveHardThreshold([{"params": [nn.Parameter(torch.ones(2))], **options}], density=0.5)


# ---- what they are for -----------------------------------------------------------------------------------------------


def test_a_small_pull_is_not_rounded_away(engine: str) -> None:
    """Below the cut a pull of 0.08 % shrinks float32 weights to 0.20 of themselves in 2,000 steps; bfloat16 alone
    does not move at all."""
    steps, cut = 2000, 0.158
    small_only(engine)
    start = torch.linspace(0.02, 0.15, 64)

    def shrunk(dtype: torch.dtype, **options: Any) -> Tensor:
        p = nn.Parameter(start.to(DEVICE, dtype, copy=True))
        beta = 0.08
        optimizer = rk.RVSM([p], lr=0.01, penalty="l0", lam=beta * cut**2 / 2, beta=beta, engine=engine, **options)
        p.grad = torch.zeros_like(p)
        for _ in range(steps):
            optimizer.step()
        return p.detach().float() / start.to(dtype).float()

    with pytest.warns(UserWarning, match="is rounded away"):
        assert torch.equal(shrunk(torch.bfloat16), torch.ones(64))
    for options in ({"master_weights": True}, {"rounding": "stochastic"}):
        ratio = shrunk(torch.bfloat16, **options)
        assert abs(float(ratio.mean()) - 0.2019) < 0.01, options
    assert abs(float(shrunk(torch.float32).mean()) - 0.2019) < 1e-3


def test_digits_are_learnt_in_bfloat16() -> None:
    """Tiny steps: bfloat16 weights stall, with masters or stochastic rounding they learn as float32 ones do."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    x, y = torch.tensor(raw.data, dtype=torch.float32) / 16, torch.tensor(raw.target)

    def loss_after(dtype: torch.dtype, **options: Any) -> float:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10)).to(dtype)
        optimizer = rk.RVSM(model.parameters(), lr=5e-4, momentum=0.9, penalty=None, **options)
        gen = torch.Generator().manual_seed(1)
        for _ in range(12):
            for part in torch.randperm(len(y), generator=gen).split(16):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[part].to(dtype)).float(), y[part]).backward()
                optimizer.step()
        return float(nn.functional.cross_entropy(model.float()(x), y))

    full, plain = loss_after(torch.float32), loss_after(torch.bfloat16)
    gained = 2.303 - full
    assert gained > 0.3 and 2.303 - plain < 0.5 * gained, (full, plain)
    for options in ({"master_weights": True}, {"rounding": "stochastic"}):
        assert abs(loss_after(torch.bfloat16, **options) - full) < 0.1 * gained, options
