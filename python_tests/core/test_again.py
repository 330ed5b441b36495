"""Weights that are u already, layers that are dead, contexts that are misused, options that do nothing."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import rvsm_kernels as rk
from runner import bits, same_bits

SPLITS: list[dict[str, Any]] = [
    {"penalty": "l1", "lam": 0.2, "beta": 0.5},
    {"penalty": "tl1", "lam": 0.2, "beta": 0.5},
    {"penalty": "l1", "lam": 0.4, "beta": 0.5, "group_dim": 0, "group_scale": True},
    {"penalty": "l1", "lam": 0.2, "beta": 0.5, "method": "admm"},
    {"penalty": "topk", "density": 0.4},
    {"penalty": "nm", "pattern": (2, 4)},
]


def made(engine: str, **options: Any) -> tuple[nn.Linear, rk.RVSM]:
    model = nn.Linear(8, 5)
    optimizer = rk.RVSM(rk.param_groups(model, **options), lr=0.1, momentum=0.9, engine=engine)
    model(torch.randn(3, 8)).square().sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_sparsify_twice(engine: str, split: dict[str, Any]) -> None:
    model, optimizer = made(engine, **split)
    optimizer.sparsify_()
    u = bits(model.weight)
    zeros = int((model.weight == 0).sum())
    for _ in range(2):
        optimizer.sparsify_()
        assert torch.equal(bits(model.weight), u)
        with optimizer.sparse_weights():
            assert torch.equal(bits(model.weight), u)
            assert optimizer.sparsity().total.zeros == zeros
        assert torch.equal(bits(model.weight), u)
        assert optimizer.sparsity().total.zeros == zeros == rk.sparsity(model).total.zeros
        float(optimizer.penalty_value())


@pytest.mark.parametrize("edit", ["step", "in place", "data", "new data", "loaded", "options", "inside"])
def test_until_something_changes(engine: str, edit: str) -> None:
    """Also what no version counter tells."""
    model, optimizer = made(engine, **SPLITS[0])
    optimizer.sparsify_()
    optimizer.sparsify_()
    w = model.weight
    if edit == "step":
        optimizer.step()
    elif edit == "in place":
        with torch.no_grad():
            w.mul_(2.0)
    elif edit == "data":
        w.data.mul_(-1.0)
    elif edit == "new data":
        w.data = w.data * 3.0
    elif edit == "loaded":
        model.load_state_dict({k: v * 0.9 for k, v in model.state_dict().items()})
    elif edit == "options":
        optimizer.param_groups[0]["lam"] = 0.01
    else:
        with optimizer.sparse_weights(), torch.no_grad():
            w.zero_()
        u = bits(w)
        optimizer.sparsify_()  # w is back, and it is u
        assert torch.equal(bits(w), u)
        return
    u = bits(w)
    optimizer.sparsify_()
    assert not torch.equal(bits(w), u)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "checkpoint"])
def test_marks_are_dropped_by_copies(engine: str, how: str) -> None:
    """A copy cannot know; it must not think that it does."""
    model, optimizer = made(engine, **SPLITS[0])
    optimizer.sparsify_()
    if how == "checkpoint":
        optimizer.load_state_dict(optimizer.state_dict())
        u = bits(model.weight)
        optimizer.sparsify_()
        assert torch.equal(bits(model.weight), u)
        return
    _, other = (
        copy.deepcopy((model, optimizer)) if how == "deepcopy" else pickle.loads(pickle.dumps((model, optimizer)))
    )
    assert not other._view._marks
    other.step()


def test_dead_layers(engine: str) -> None:
    """One warning by name, and a word in the report."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4))
    with torch.no_grad():
        model[1].weight.fill_(10.0)
    optimizer = rk.RVSM(rk.param_groups(model, penalty="l0", lam=9.0, beta=1.0), lr=0.1, engine=engine)
    with pytest.warns(UserWarning, match=r"0\.weight"), optimizer.sparse_weights():
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with optimizer.sparse_weights():
            pass
        optimizer.sparsify_()
    report = optimizer.sparsity()
    assert report.rows[0].all_zero and not report.rows[1].all_zero
    assert "all zero" in str(report) and report.to_dict()["parameters"][0]["all_zero"]
    assert "all zero" in str(rk.sparsity(model))


def test_without_with(engine: str) -> None:
    model, optimizer = made(engine, **SPLITS[0])
    before = bits(model.weight)
    with pytest.warns(UserWarning, match="with"):
        optimizer.sparse_weights()
    assert torch.equal(bits(model.weight), before)

    @optimizer.sparse_weights()
    def zeros() -> int:
        return int((model.weight == 0).sum())

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert zeros() == zeros() > 0


def test_batch_norms_in_training_mode(engine: str) -> None:
    """Warned about once, or given back with the model."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = rk.RVSM(rk.param_groups(model, penalty="l1", lam=0.01, beta=0.5), lr=0.1, engine=engine)
    x = torch.randn(2, 3, 5, 5)
    with pytest.warns(UserWarning, match="batch norms"), optimizer.sparse_weights():
        model(x)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with optimizer.sparse_weights(model):
            model(x)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        model.eval()
        with optimizer.sparse_weights():
            model(x)
    with pytest.raises(TypeError, match="module"):
        optimizer.sparse_weights(0.5)  # type: ignore[arg-type]


# ---- lr 0 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"unit_norm": True}, {"method": "admm"}, {"method": "rvsm-delayed"}], ids=str)
@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("started", [0, 2])
def test_a_step_with_lr_0_changes_nothing(engine: str, options: dict[str, Any], decoupled: bool, started: int) -> None:
    """torch.distributed.checkpoint makes states so: two optimizers go on alike, one of which took such a step."""
    params = [nn.Parameter(torch.linspace(-2, 2, 12).reshape(3, 4)) for _ in range(2)]
    split = {"penalty": "l0", "lam": 0.3, "beta": 0.5, "decoupled": decoupled, **options}
    optimizers = [rk.RVSM([p], lr=0.1, **split, engine=engine) for p in params]

    def steps(optimizer: rk.RVSM, p: nn.Parameter, count: int) -> None:
        for k in range(count):
            p.grad = torch.full_like(p, 0.1 * (k + 1))
            optimizer.step()

    for optimizer, p in zip(optimizers, params, strict=True):
        steps(optimizer, p, started)
    ours, p = optimizers[0], params[0]
    kept = {k: v.clone() for k, v in ours.state[p].items()}
    w = bits(p)
    p.grad = torch.zeros_like(p)
    ours.param_groups[0]["lr"] = 0.0
    ours.step()
    assert torch.equal(bits(p), w)
    assert all(same_bits(ours.state[p][k], v) for k, v in kept.items())
    assert "method" not in options or ours.state[p].keys() & {"u", "dual"}
    ours.param_groups[0]["lr"] = 0.1
    for optimizer, q in zip(optimizers, params, strict=True):
        steps(optimizer, q, 2)
    assert same_bits(params[0].detach(), params[1].detach())


# ---- GradScaler ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["sparse_weights", "pre hook", "bad option"])
def test_a_scaled_step_that_raises(engine: str, where: str) -> None:
    """Nothing of the scaler stays, and the next step has its own scale."""
    params = [nn.Parameter(torch.ones(4)) for _ in range(2)]
    ours, theirs = (rk.RVSM([p], lr=0.1, penalty=None, engine=engine) for p in params)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(params[0].sum()).backward()
    if where == "sparse_weights":
        with ours.sparse_weights(), pytest.raises(RuntimeError):
            scaler.step(ours)
    elif where == "pre hook":
        hook = ours.register_step_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            scaler.step(ours)
        hook.remove()
    else:
        ours.param_groups[0]["lr"] = -1.0
        with pytest.raises(ValueError, match="learning rate"):
            scaler.step(ours)
        ours.param_groups[0]["lr"] = 0.1
    assert not hasattr(ours, "grad_scale") and not hasattr(ours, "found_inf")
    scaler.update()
    scaler.step(ours)
    params[1].grad = torch.ones(4)
    theirs.step()
    assert same_bits(params[0].detach(), params[1].detach())


@pytest.mark.parametrize("make", [rk.RVSM, rk.reference.RVSM])
def test_amp_scaling_off(engine: str, make: Any) -> None:
    """As plain SGD: the scaler unscales the gradients before the step, and clipping sees true norms."""
    p = nn.Parameter(torch.ones(4))
    optimizer = make([p], lr=0.1, penalty=None, amp_scaling=False, engine=engine)
    for o in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert not o._step_supports_amp_scaling
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(p.sum()).backward()
    scaler.step(optimizer)
    assert torch.equal(p.grad, torch.ones(4))
    torch.testing.assert_close(p.detach(), torch.full((4,), 0.9))
    with pytest.raises(TypeError, match="amp_scaling"):
        make([p], amp_scaling="no")


# ---- options ---------------------------------------------------------------------------------------------------------


def heard(call: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught]


def test_a_pull_that_overshoots(engine: str) -> None:
    p = nn.Parameter(torch.randn(4, 4))
    p.grad = torch.zeros(4, 4)
    texts = heard(lambda: made_with(p, 0.1, 25.0, engine))
    (text,) = texts
    assert "0.1 * 25 = 2.5" in text
    optimizer = made_with(p, 0.1, 5.0, engine)
    assert heard(optimizer.step) == []
    optimizer.param_groups[0]["beta"] = 15.0
    assert len(heard(optimizer.step)) == 1
    assert heard(optimizer.step) == []
    optimizer.param_groups[0]["lr"] = 0.11
    assert len(heard(optimizer.step)) == 1
    optimizer.param_groups[0]["lr"] = 0.01
    assert heard(optimizer.step) == []
    optimizer.param_groups[0]["lam"] = 0.0
    optimizer.param_groups[0]["lr"] = 9.0
    assert heard(optimizer.step) == []


def made_with(p: nn.Parameter, lr: float, beta: float, engine: str) -> rk.RVSM:
    return rk.RVSM([p], lr=lr, penalty="l0", lam=0.1, beta=beta, engine=engine)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_a_pull_that_half_types_lose(engine: str, dtype: torch.dtype, limit: float) -> None:
    p = nn.Parameter(torch.randn(4, 4).to(dtype))
    p.grad = torch.zeros_like(p)
    (text,) = heard(lambda: made_with(p, 0.1, limit * 9, engine))
    assert str(dtype).removeprefix("torch.") in text
    assert heard(lambda: made_with(p, 0.1, limit * 10.1, engine)) == []
    q = nn.Parameter(torch.randn(4, 4))
    assert heard(lambda: made_with(q, 0.1, limit * 9, engine)) == []
    optimizer = made_with(p, 0.1, limit * 11, engine)  # a float16 group that is below bfloat16's limit already
    optimizer.param_groups[0]["lr"] = 0.05
    assert len(heard(optimizer.step)) == 1
    assert heard(optimizer.step) == []


def test_schedulers_are_not_a_stream_of_warnings(engine: str) -> None:
    p = nn.Parameter(torch.randn(4, 4))
    p.grad = torch.zeros(4, 4)
    optimizer = made_with(p, 0.01, 30.0, engine)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 + k)

    def run() -> None:
        for _ in range(12):
            optimizer.step()
            scheduler.step()

    assert len(heard(run)) == 2


SILENT: list[tuple[dict[str, Any], str]] = [
    ({"penalty": "l0", "density": 0.5}, "density"),
    ({"penalty": "topk", "density": 0.5, "lam": 0.0}, "lam=0"),
    ({"group_scale": True}, "group_scale"),
]


@pytest.mark.parametrize(("options", "text"), SILENT)
def test_options_without_effect(engine: str, options: dict[str, Any], text: str) -> None:
    params = [nn.Parameter(torch.ones(3, 3))]
    for call in (
        lambda: rk.RVSM(params, **options, engine=engine),
        lambda: rk.RVSM([{"params": params, **options}], engine=engine),
    ):
        (said,) = heard(call)
        assert text in said


def test_quiet_where_nothing_is_wrong(engine: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    for options in ({"penalty": "topk", "density": 0.3}, {"structure": "in_channels"}, {"penalty": None}):
        groups = rk.param_groups(model, **options)
        assert heard(lambda groups=groups: rk.RVSM(groups, lr=0.1, engine=engine)) == []
    assert heard(lambda: rk.RVSM([nn.Parameter(torch.ones(3))], engine=engine)) == []
    assert heard(lambda: rk.AdaptiveHardThreshold([nn.Parameter(torch.ones(3, 2))], density=0.5, engine=engine)) == []


def test_group_dims_from_the_end(engine: str) -> None:
    params = [nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3, 2, 2))]
    (said,) = heard(lambda: rk.RVSM(params, group_dim=-1, engine=engine))
    assert "group_dim=-1" in said
    assert heard(lambda: rk.RVSM(params[:1], group_dim=-1, engine=engine)) == []


def test_biases_among_the_penalised(engine: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    (said,) = heard(lambda: rk.RVSM(model.named_parameters(), engine=engine))
    assert "0.bias" in said and "param_groups" in said
    # The two groups that many training scripts make: with weight decay, and without.
    weights = {"params": [model[0].weight]}
    for more, count in (({}, 1), ({"penalty": None}, 0), ({"penalty": "l1"}, 0)):
        biases = {"params": [model[0].bias, *model[1].parameters()], "weight_decay": 0.0, **more}
        said = heard(lambda biases=biases: rk.RVSM([weights, biases], engine=engine))
        assert len(said) == count and all("group 1 penalises biases and norms as the group before" in s for s in said)


def test_options_set_on_the_optimizer(engine: str) -> None:
    optimizer = rk.RVSM([nn.Parameter(torch.ones(3))], engine=engine)
    for name in ("lam", "lr", "penalty", "group_dim"):
        with pytest.raises(AttributeError, match="param_groups"):
            setattr(optimizer, name, 1.0)
        assert not hasattr(optimizer, name)


@pytest.mark.parametrize(
    ("options", "text"),
    [({"lamda": 1.0}, "'lam'"), ({"structure": "in_channels"}, "param_groups"), ({"momentun": 0.9}, "'momentum'")],
)
def test_unknown_options(engine: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(TypeError, match="RVSM has no option") as info:
        rk.RVSM([nn.Parameter(torch.ones(3))], **options, engine=engine)
    assert text in str(info.value)
    (said,) = heard(lambda: rk.RVSM([{"params": [nn.Parameter(torch.ones(3))], **options}], engine=engine))
    assert text.strip("'") in said


def test_numbers_of_numpy(engine: str, tmp_path: Any) -> None:
    """They are stored as Python's own, so that the checkpoint loads; so are later edits."""
    p = nn.Parameter(torch.ones(3, 3))
    p.grad = torch.ones(3, 3)
    options = {"lr": np.float64(0.1), "lam": np.float32(0.5), "beta": np.int64(1), "nesterov": np.bool_(False)}
    optimizer = rk.RVSM([{"params": [p], "a": np.float64(2.0)}], **options, group_dim=(np.int64(0),), engine=engine)
    optimizer.step()
    optimizer.param_groups[0]["lam"] = np.float64(0.25)
    torch.save(optimizer.state_dict(), tmp_path / "o.pt")
    loaded = torch.load(tmp_path / "o.pt", weights_only=True)["param_groups"][0]
    assert {type(v) for v in loaded.values()} <= {float, int, bool, str, tuple, list, type(None)}
    assert loaded["lam"] == 0.25 and loaded["group_dim"] == (0,)
    optimizer.step()


def test_what_a_mistake_prints(engine: str) -> None:
    p = nn.Parameter(torch.randn(100, 100))
    for call, text in (
        (lambda: rk.RVSM(0.1, [p], engine=engine), "first"),
        (lambda: rk.RVSM([p], [p], engine=engine), "a list"),
        (lambda: rk.RVSM([p], p, engine=engine), "1-element"),
        (lambda: rk.RVSM(nn.Linear(2, 2), engine=engine), "param_groups"),
        (lambda: rk.RVSM([nn.Parameter(torch.ones(1, 1, 2, 2))], group_dim=4, engine=engine), "4 dimensions"),
        (lambda: rk.prox(np.ones(3), "l1", 0.1), "torch.as_tensor"),
        (lambda: rk.sparsity(rk.RVSM([p], engine=engine)), "optimizer.sparsity"),
        (lambda: rk.param_groups(nn.Linear(2, 2).parameters()), "module"),
        (lambda: rk.param_groups(nn.Linear(2, 2), include=["Linear"]), "module types"),
        (lambda: rk.param_groups(nn.Linear(2, 2), lamda=1.0), "'lam'"),
    ):
        with pytest.raises((TypeError, ValueError), match=text) as info:
            call()
        assert len(str(info.value)) < 300 and "biases" not in str(info.value)


def test_groups_beside_named_ones(engine: str) -> None:
    optimizer = rk.RVSM(rk.param_groups(nn.Linear(2, 2)), engine=engine)
    with pytest.raises(ValueError, match="named_parameters"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
