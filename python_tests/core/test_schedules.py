"""SparsitySchedule reaches the sparsity that it was asked for, without any lam; PenaltySchedule ramps lam or beta."""

from __future__ import annotations

import copy
import gc
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rvsm_kernels as rk
from runner import same_bits
from rvsm_kernels.method.penalties import PENALTIES
from rvsm_kernels.method.selection import cut_among


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, bias=False),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24 * 16, 10),
    )


def train(model: nn.Module, optimizer: Any, schedule: Any, steps: range) -> None:
    for step in steps:
        gen = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 1, 8, 8, generator=gen), torch.randint(10, (8,), generator=gen)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        schedule.step()


def asked(t: float, target: float, power: float = 3.0) -> float:
    return target * (1 - (1 - min(max(t, 0.0), 1.0)) ** power)


# ---- the target ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [0.5, 0.9, 0.95])
@pytest.mark.parametrize("penalty", ["l0", "l1", "tl1"])
@pytest.mark.parametrize("cls", [rk.RVSM, rk.RVSMAdamW])
def test_elements(cls: type, penalty: str, target: float) -> None:
    """On the way and at the end, to a tenth of a point."""
    model = model_of()
    optimizer = cls(rk.param_groups(model, penalty=penalty, beta=1.0, a=0.5), lr=0.01)
    schedule = rk.SparsitySchedule(optimizer, target, begin=4, end=24, every=4)
    for step in range(32):
        train(model, optimizer, schedule, range(step, step + 1))
        done = schedule.last_step
        if done >= 4 and (done - 4) % 4 == 0:
            assert optimizer.sparsity().share == pytest.approx(asked((done - 4) / 20, target), abs=1e-3)
        assert schedule.sparsity == pytest.approx(asked((done - 4) / 20, target))
    assert optimizer.sparsity().share == pytest.approx(target, abs=1e-3)


GROUPS: list[dict[str, Any]] = [
    {"structure": "out_channels"},
    {"structure": "in_channels", "group_scale": True},
    {"structure": "kernels", "method": "admm"},
    {"group_dim": 0, "method": "rvsm-delayed", "group_scale": True},
]


@pytest.mark.parametrize("options", GROUPS, ids=repr)
@pytest.mark.parametrize("penalty", ["l0", "l1", "tl1"])
@pytest.mark.parametrize("of", ["groups", "elements"])
def test_groups(of: str, penalty: str, options: dict[str, Any]) -> None:
    """To the nearest group."""
    model = model_of()
    optimizer = rk.RVSM(rk.param_groups(model, penalty=penalty, beta=1.0, a=2.0, **options), lr=0.01)
    schedule = rk.SparsitySchedule(optimizer, 0.5, end=8, every=4, of=of)
    train(model, optimizer, schedule, range(8))
    found = optimizer.sparsity().total
    if of == "groups":
        assert abs(found.zero_groups - 0.5 * found.groups) <= 1
    else:
        largest = max(
            p.numel() // row.groups for p, row in zip(_weights(model), optimizer.sparsity().rows, strict=True)
        )
        assert abs(found.zeros - 0.5 * found.numel) <= largest


def _weights(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.dim() >= 2]


def test_group_scale_is_divided_out() -> None:
    """Groups of 4 and of 64 elements whose rms are alike lose the same share; without the scale the small ones go."""
    for scale in (True, False):
        gen = torch.Generator().manual_seed(0)
        small, large = (nn.Parameter(torch.randn(200, n, generator=gen)) for n in (4, 64))
        optimizer = rk.RVSM([small, large], lr=0.1, penalty="l1", beta=1.0, group_dim=0, group_scale=scale)
        schedule = rk.SparsitySchedule(optimizer, 0.3, end=1, of="groups")
        schedule.step()
        a, b = (row.group_share for row in optimizer.sparsity().rows)
        assert (a + b) / 2 == pytest.approx(0.3, abs=0.01)
        assert (b > 0.05) == scale


def test_topk_sets_density() -> None:
    model = model_of()
    optimizer = rk.RVSM(rk.param_groups(model, penalty="topk", density=1.0, beta=1.0), lr=0.01)
    schedule = rk.SparsitySchedule(optimizer, 0.8, end=10, scope="tensor")
    train(model, optimizer, schedule, range(10))
    assert optimizer.param_groups[0]["density"] == pytest.approx(0.2)
    assert all(row.share == pytest.approx(0.8, abs=0.01) for row in optimizer.sparsity().rows)


def test_scope_tensor() -> None:
    """Each group of one tensor has a lam of its own."""
    weights = [nn.Parameter(torch.randn(50, 20) * s) for s in (0.1, 10.0)]
    optimizer = rk.RVSM([{"params": [w]} for w in weights], lr=0.1, penalty="l1", beta=2.0)
    rk.SparsitySchedule(optimizer, 0.4, end=1, scope="tensor").step()
    assert [row.share for row in optimizer.sparsity().rows] == [pytest.approx(0.4, abs=1e-3)] * 2
    assert optimizer.param_groups[1]["lam"] > 50 * optimizer.param_groups[0]["lam"]


def test_kinds_are_not_compared() -> None:
    """Norms of groups are larger than elements; each kind reaches the target."""
    a, b = nn.Parameter(torch.randn(64, 64)), nn.Parameter(torch.randn(64, 64))
    optimizer = rk.RVSM([{"params": [a]}, {"params": [b], "group_dim": 0}], lr=0.1, penalty="l0", beta=1.0)
    rk.SparsitySchedule(optimizer, 0.25, end=1).step()
    assert [row.share for row in optimizer.sparsity().rows] == [pytest.approx(0.25, abs=1e-3)] * 2


def test_half_types_with_masters_and_frozen_parameters() -> None:
    w = nn.Parameter(torch.randn(100, 30, dtype=torch.bfloat16))
    frozen = nn.Parameter(torch.ones(10, 10), requires_grad=False)
    optimizer = rk.RVSMAdamW([w, frozen], lr=0.01, penalty="l0", beta=1.0, master_weights=True)
    schedule = rk.SparsitySchedule(optimizer, 0.6, end=4, every=1)
    for _ in range(4):
        w.grad = torch.randn_like(w)
        optimizer.step()
        schedule.step()
    assert optimizer.sparsity().rows[0].share == pytest.approx(0.6, abs=1e-3)
    assert (frozen == 1).all()


# ---- pull_rate, wrappers, checkpoints --------------------------------------------------------------------------------


def test_pull_rate() -> None:
    """lr * beta stays, whatever lr does, or goes from one number to another; the cut stays where it was put."""
    for rate in (0.2, (0.1, 0.4)):
        model = model_of()
        optimizer = rk.RVSM(rk.param_groups(model, penalty="l0", beta=0.0), lr=0.1)
        decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        schedule = rk.SparsitySchedule(optimizer, 0.7, end=12, every=6, pull_rate=rate)
        first, last = rate if isinstance(rate, tuple) else (rate, rate)
        for step in range(16):
            gen = torch.Generator().manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=gen)
            optimizer.step()
            decay.step()
            schedule.step()
            group, t = optimizer.param_groups[0], min(1.0, (step + 1) / 12)
            assert group["lr"] * group["beta"] == pytest.approx(first + (last - first) * t)
        cut = math.sqrt(2 * group["lam"] / group["beta"])
        assert cut == pytest.approx(schedule._cuts["elements"])


def test_pull_rate_follows_a_scheduler_that_is_stepped_afterwards() -> None:
    """beta is set again when a step begins: lr may have been raised by then. Copies do so too."""
    w = nn.Parameter(torch.randn(100) * 0.1)
    optimizer = rk.RVSM([w], lr=0.1, beta=1.0)
    schedule = rk.SparsitySchedule(optimizer, 0.5, end=10, every=1, pull_rate=0.2)
    restarts = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 5, eta_min=1e-5)
    seen = []

    def watch(optimizer: Any, args: Any, kwargs: Any) -> None:
        seen.append(optimizer.param_groups[0]["lr"] * optimizer.param_groups[0]["beta"])

    for copied in (False, True):
        if copied:
            optimizer, schedule, restarts = copy.deepcopy((optimizer, schedule, restarts))
            w = optimizer.param_groups[0]["params"][0]
        optimizer.register_step_post_hook(watch)
        for _ in range(12):
            w.grad = torch.zeros_like(w)
            optimizer.step()
            schedule.step()
            restarts.step()
    assert len(seen) == 24 and seen == [pytest.approx(0.2)] * 24


def test_a_schedule_that_nobody_holds_ends() -> None:
    w = nn.Parameter(torch.randn(9))
    optimizer = rk.RVSM([w], lr=0.1, beta=1.0)
    rk.SparsitySchedule(optimizer, 0.5, end=10, pull_rate=0.2)
    gc.collect()
    optimizer.param_groups[0]["beta"] = 3.0
    w.grad = torch.zeros_like(w)
    optimizer.step()
    assert optimizer.param_groups[0]["beta"] == 3.0


def test_an_edit_between_two_looks() -> None:
    """A group whose groups are others now keeps its lam until the next look."""
    w = nn.Parameter(torch.randn(20, 20))
    optimizer = rk.RVSM([w], lr=0.1, beta=1.0)
    schedule = rk.SparsitySchedule(optimizer, 0.5, end=4, every=4)
    for _ in range(4):
        schedule.step()
    lam = optimizer.param_groups[0]["lam"]
    optimizer.param_groups[0]["group_dim"] = 0
    schedule.step()
    assert optimizer.param_groups[0]["lam"] == lam > 0
    for _ in range(3):
        schedule.step()
    assert optimizer.sparsity().group_share == 0.5


def test_weights_that_are_not_finite() -> None:
    w = nn.Parameter(torch.randn(100))
    optimizer = rk.RVSM([w], lr=0.1, beta=1.0)
    schedule = rk.SparsitySchedule(optimizer, 0.5, end=2, every=1)
    schedule.step()
    lam = optimizer.param_groups[0]["lam"]
    with torch.no_grad():
        w[:80] = float("nan")
    with pytest.warns(UserWarning, match="elements are not finite"):
        schedule.step()
    assert optimizer.param_groups[0]["lam"] == lam
    optimizer.sparsity()


@pytest.mark.parametrize("penalty", ["l1", "tl1"])
def test_a_growing_pull_on_survivors_is_warned_about(penalty: str) -> None:
    optimizer = rk.RVSM(rk.param_groups(model_of(), penalty=penalty, beta=1.0), lr=0.01)
    with pytest.warns(UserWarning, match=r"group 0: .*pulls the weights that survive"):
        rk.SparsitySchedule(optimizer, 0.5, end=10, pull_rate=0.2)


def test_wrapper_and_a_group_that_comes_later() -> None:
    model = model_of()
    weights = _weights(model)
    inner = torch.optim.NAdam([{"params": weights[:1]}], lr=0.01)
    optimizer = rk.RVSMWrapper(inner, penalty="l0", beta=1.0)
    schedule = rk.SparsitySchedule(optimizer, 0.5, end=4, every=1)
    for p in weights:
        p.grad = torch.ones_like(p)
    optimizer.step()
    schedule.step()
    optimizer.add_param_group({"params": weights[1:]})
    for _ in range(3):
        optimizer.step()
        schedule.step()
    assert optimizer.sparsity().share == pytest.approx(0.5, abs=1e-3)
    assert len(optimizer.sparsity().rows) == 3


def test_resume_gives_the_same_bits() -> None:
    def start() -> tuple[nn.Module, Any, Any]:
        model = model_of()
        optimizer = rk.RVSM(rk.param_groups(model, penalty="l0", beta=1.0), lr=0.01, momentum=0.9)
        return model, optimizer, rk.SparsitySchedule(optimizer, 0.8, end=12, every=4, pull_rate=0.1)

    straight, first, second = start(), start(), start()
    train(*straight, range(12))
    train(*first, range(6))
    saved = copy.deepcopy([part.state_dict() for part in first])
    for part, state in zip(second, saved, strict=True):
        part.load_state_dict(state)
    assert second[2].state_dict() == saved[2]
    train(*second, range(6, 12))
    for p, q in zip(straight[0].parameters(), second[0].parameters(), strict=True):
        assert same_bits(p.detach(), q.detach())
    assert repr(second[2]) == repr(straight[2]) and "12 of 0 to 12" in repr(second[2]) and "80.00%" in repr(second[2])


def test_a_pickle_goes_on_and_one_of_an_earlier_version_too() -> None:
    def finished(change: Any) -> Any:
        optimizer = rk.RVSM([nn.Parameter(torch.linspace(-1, 1, 30))], lr=0.1, beta=1.0)
        schedule = rk.SparsitySchedule(optimizer, 0.5, end=4, every=1)
        for step in range(6):
            schedule = change(schedule) if step == 3 else schedule
            schedule.step()
        return schedule._optimizer.param_groups[0]["lam"]

    def earlier(schedule: Any) -> Any:
        del schedule.__dict__["_rooms"]
        new = object.__new__(type(schedule))
        new.__setstate__(dict(schedule.__dict__))
        return new

    want = finished(lambda schedule: schedule)
    for change in (copy.deepcopy, lambda schedule: pickle.loads(pickle.dumps(schedule)), earlier):
        assert finished(change) == want > 0


def test_lazy_parameters_come_when_they_have_a_shape() -> None:
    model = nn.Sequential(nn.LazyLinear(20), nn.Linear(20, 3))
    optimizer = rk.RVSM([layer.weight for layer in model], lr=0.1, beta=1.0)
    schedule = rk.SparsitySchedule(optimizer, 0.5, end=2, every=1)
    schedule.step()
    model(torch.ones(1, 7))
    schedule.step()
    assert optimizer.sparsity().share == 0.5 and len(optimizer.sparsity().rows) == 2


def test_before_begin_nothing_pulls() -> None:
    w, plain = nn.Parameter(torch.randn(20, 20)), nn.Parameter(torch.empty(20, 20))
    with torch.no_grad():
        plain.copy_(w)
    optimizer, dense = rk.RVSM([w], lr=0.1, lam=5.0, beta=1.0), torch.optim.SGD([plain], lr=0.1)
    schedule = rk.SparsitySchedule(optimizer, 0.5, begin=3, end=9)
    for _ in range(3):
        w.grad = plain.grad = torch.randn(20, 20)
        optimizer.step()
        dense.step()
        schedule.step()
    torch.testing.assert_close(w, plain)
    assert optimizer.sparsity().share == 0


# ---- the cut ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["normal", "ties", "sorted", "equal", "outlier"])
def test_cut_among_many(kind: str) -> None:
    """The bracket of a sample finds what a sort finds, on data that a sample tells little about, too."""
    gen = torch.Generator().manual_seed(0)
    n = 1_200_000
    values = {
        "normal": torch.randn(n, generator=gen).abs(),
        "ties": torch.randint(0, 5, (n,), generator=gen).float(),
        "sorted": torch.arange(n).float(),
        "equal": torch.full((n,), 0.5),
        "outlier": torch.cat([torch.zeros(n - 1), torch.tensor([1e30])]),
    }[kind]
    parts = list(values.split([7, 500_000, n - 500_007]))
    ordered = values.sort().values.double()
    for k in (1, 17, n // 10, n // 2, n - 1, n):
        high = ordered[k] if k < n else ordered[k - 1]
        assert float(cut_among(parts, n - k, True)) == pytest.approx(float((ordered[k - 1] + high) / 2), rel=1e-7)
        assert cut_among(parts, n - k, False) == ordered[k - 1]
    assert cut_among(parts, n, True) == -1


@pytest.mark.parametrize("penalty", PENALTIES)
def test_tau_is_the_inverse_of_the_cut(penalty: str) -> None:
    for a in (0.1, 1.0, 7.0):
        for tau in (1e-9, 1e-3, 0.1, a * a / (2 * (a + 1)), 3.0, 1e4):
            cut = PENALTIES[penalty].cut(tau, a)
            assert float(PENALTIES[penalty].tau(torch.tensor(cut, dtype=torch.float64), a)) == pytest.approx(tau)


# ---- PenaltySchedule -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "values"),
    [
        ("linear", [0, 0, 0.25, 0.5, 0.75, 1, 1]),
        ("constant", [0, 0, 0, 0, 0, 1, 1]),
        ("cosine", [0, 0, 0.146, 0.5, 0.854, 1, 1]),
    ],
)
@pytest.mark.parametrize("option", ["lam", "beta"])
def test_penalty_schedule(option: str, shape: str, values: list[float]) -> None:
    w, dense = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3))
    groups = [{"params": [w], "lam": 0.2, "beta": 4.0}, {"params": [dense], "penalty": None, "lam": 0.7, "beta": 0.7}]
    optimizer = rk.RVSM(groups, lr=0.1)
    schedule = rk.PenaltySchedule(optimizer, option, steps=4, begin=1, shape=shape)
    base = {"lam": 0.2, "beta": 4.0}[option]
    found = []
    for k in range(len(values)):
        found.append(optimizer.param_groups[0][option] / base)
        if k == 3:  # stop and go on
            saved = schedule.state_dict()
            schedule = rk.PenaltySchedule(optimizer, option, steps=4, begin=1, shape=shape)
            schedule.load_state_dict(saved)
        schedule.step()
    assert found == [pytest.approx(v, abs=1e-3) for v in values]
    assert optimizer.param_groups[1][option] == 0.7
    assert option in repr(schedule)


def test_penalty_schedule_with_other_groups() -> None:
    """A group that came later keeps its value; a checkpoint of more groups is refused, and changes nothing."""

    def start(groups: int) -> tuple[Any, Any]:
        lams = [0.1, 0.2, 0.4][:groups]
        optimizer = rk.RVSM([{"params": [nn.Parameter(torch.ones(2))], "lam": lam} for lam in lams], lr=0.1)
        return optimizer, rk.PenaltySchedule(optimizer, steps=4)

    _, two = start(2)
    for _ in range(2):
        two.step()
    optimizer, three = start(3)
    three.load_state_dict(two.state_dict())
    assert [group["lam"] for group in optimizer.param_groups] == [pytest.approx(v) for v in (0.05, 0.1, 0.2)]
    with pytest.raises(ValueError, match="has 3 groups, the optimizer 2"):
        two.load_state_dict(three.state_dict())
    assert two.last_step == 2 and len(two.base_values) == 2
    for group in optimizer.param_groups:
        group["lam"] = 0.0
    with pytest.warns(UserWarning, match="lam of group 0 is 0"):
        rk.PenaltySchedule(optimizer, steps=4)


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"target": 1.0}, "Invalid target"),
        ({"target": True}, "Invalid target"),
        ({"end": 0}, "Invalid end"),
        ({"begin": -1}, "Invalid begin"),
        ({"begin": 5, "end": 5}, "Invalid end"),
        ({"every": 0}, "Invalid every"),
        ({"power": 0}, "Invalid power"),
        ({"of": "channels"}, "Invalid of"),
        ({"scope": "layer"}, "Invalid scope"),
        ({"scope": "tensor"}, "share one lam"),
        ({"pull_rate": 2.0}, "Invalid pull_rate"),
        ({"pull_rate": (0.1,)}, "Invalid pull_rate"),
    ],
)
def test_errors(arguments: dict[str, Any], match: str) -> None:
    optimizer = rk.RVSM(rk.param_groups(model_of(), lam=0.3), lr=0.1)
    with pytest.raises(ValueError, match=match):
        rk.SparsitySchedule(optimizer, **{"target": 0.5, "end": 10, **arguments})
    assert optimizer.param_groups[0]["lam"] == 0.3


def test_other_errors() -> None:
    model = model_of()
    with pytest.raises(TypeError, match="no optimizer of rvsm_kernels"):
        rk.SparsitySchedule(torch.optim.SGD(model.parameters()), 0.5, end=10)
    topk = {"penalty": "topk", "density": 0.5}
    with pytest.raises(ValueError, match="scope='tensor' is needed"):
        rk.SparsitySchedule(rk.RVSM(rk.param_groups(model, **topk)), 0.5, end=10)
    with pytest.raises(ValueError, match="scope='global' is needed"):
        rk.SparsitySchedule(rk.RVSM(rk.param_groups(model, budget="global", **topk)), 0.5, end=10, scope="tensor")
    channels = rk.param_groups(model, structure="out_channels", budget="global", **topk)
    with pytest.raises(ValueError, match="of='groups' is needed"):
        rk.SparsitySchedule(rk.RVSM(channels), 0.5, end=10)
    with pytest.raises(ValueError, match="beta is 0"):
        rk.SparsitySchedule(rk.RVSM(rk.param_groups(model, beta=0.0)), 0.5, end=10)
    for arguments in ({"option": "lr"}, {"shape": "cubic"}, {"steps": 0}, {"first": -1.0}):
        with pytest.raises(ValueError, match="Invalid"):
            rk.PenaltySchedule(rk.RVSM(model.parameters()), **{"steps": 5, **arguments})
