"""rk.recalibrate, and sparse_weights(model, recalibrate=loader): running statistics for the weights of now."""

from __future__ import annotations

import copy
from collections import UserDict
from typing import Any

import pytest
import torch
from builds import generator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import rvsm_kernels as rk
from models import batch, small
from runner import same_bits

SPLIT: dict[str, Any] = {"penalty": "l0", "lam": 0.02, "beta": 1.0}


def inputs(count: int = 4) -> list[Tensor]:
    return [batch(k)[0] for k in range(count)]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def modes_of(model: nn.Module) -> list[Any]:
    return [(m.training, getattr(m, "momentum", None)) for m in model.modules()]


def check_unchanged(model: nn.Module, state: dict[str, Tensor], modes: list[Any]) -> None:
    for name, value in model.state_dict().items():
        assert same_bits(value, state[name]), name
    assert modes_of(model) == modes
    assert not any(m._forward_pre_hooks for m in model.modules())


def expected(model: Any, batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean over the batches of the mean and of the unbiased variance, in float64."""
    made = [model.conv(x).double().transpose(0, 1).flatten(1) for x in batches]
    return torch.stack([m.mean(1) for m in made]).mean(0), torch.stack([m.var(1) for m in made]).mean(0)


FORMS = {
    "tensors": lambda: inputs(),
    "pairs": lambda: [batch(k) for k in range(4)],
    "lists": lambda: [list(batch(k)) for k in range(4)],
    "mappings": lambda: [{"x": x} for x in inputs()],
    "mappings of another class": lambda: [UserDict(x=x) for x in inputs()],
    "mappings in tuples": lambda: [({"x": x}, 0) for x in inputs()],
    "a generator": lambda: (x for x in inputs()),
    "a DataLoader": lambda: DataLoader(
        TensorDataset(torch.cat(inputs()), torch.cat([batch(k)[1] for k in range(4)])), batch_size=16
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_mean_over_batches_in_every_form(form: str) -> None:
    model = small()
    modes, state = modes_of(model), state_of(model)
    assert rk.recalibrate(model, FORMS[form]()) == 4
    mean, var = expected(model, inputs())
    torch.testing.assert_close(model.norm.running_mean.double(), mean)
    torch.testing.assert_close(model.norm.running_var.double(), var)
    assert model.norm.num_batches_tracked == 4
    assert modes_of(model) == modes
    for name, value in model.state_dict().items():
        assert same_bits(value, state[name]) or name.startswith("norm.running") or name == "norm.num_batches_tracked"
    assert all(p.grad is None for p in model.parameters())


def test_it_is_what_momentum_none_gives() -> None:
    model = small()
    other = copy.deepcopy(model)
    other.norm.momentum = None
    with torch.no_grad():
        for x in inputs():
            other(x)
    rk.recalibrate(model, inputs())
    assert same_bits(model.norm.running_var, other.norm.running_var)
    before = state_of(model)
    rk.recalibrate(model, inputs())  # from nothing on, not from what was there
    check_unchanged(model, before, modes_of(model))


def test_no_more_batches_than_asked_for() -> None:
    model = small()
    rest = iter(inputs())
    assert rk.recalibrate(model, rest, 3) == 3
    assert len(list(rest)) == 1
    torch.testing.assert_close(model.norm.running_mean.double(), expected(model, inputs(3))[0])


class Everything(nn.Module):
    """Norms of many kinds, dropout, and an override of train()."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm1d(3, momentum=0.3)
        self.twice = nn.BatchNorm1d(3, momentum=None, affine=False)
        self.without = nn.BatchNorm1d(3, track_running_stats=False)
        self.instance = nn.InstanceNorm1d(3, track_running_stats=True)
        self.sync = nn.SyncBatchNorm(3)
        self.never = nn.BatchNorm1d(3)
        self.dropout = nn.Dropout(0.5)
        self.seen: list[tuple[bool, ...]] = []
        self.out: Tensor = torch.empty(0)

    def train(self, mode: bool = True) -> Everything:
        raise AssertionError("train() of a model may do more than set a flag")

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(tuple(m.training for m in self.children()))
        dropped = self.dropout(x)
        assert (torch.equal(dropped, x) and not torch.is_grad_enabled()) or self.dropout.training
        x = self.without(self.twice(self.twice(self.first(x))))
        return self.sync(self.instance(x))


def test_norms_of_every_kind() -> None:
    model = Everything()
    model.never.running_mean.fill_(5)
    model.never.num_batches_tracked.fill_(7)
    model.twice.training = False  # frozen by hand
    modes = modes_of(model)
    gen = generator(3)
    xs = [torch.randn(6, 3, 5, generator=gen) * 3 + 2 for _ in range(3)]
    rk.recalibrate(model, xs)
    assert set(model.seen) == {(True, True, False, True, True, True, False)}
    assert modes_of(model) == modes
    torch.testing.assert_close(model.first.running_mean, torch.stack([x.mean((0, 2)) for x in xs]).mean(0))
    assert model.twice.num_batches_tracked == 6 and model.first.num_batches_tracked == 3
    assert model.never.running_mean.eq(5).all() and model.never.num_batches_tracked == 7
    assert not torch.equal(model.instance.running_var, torch.ones(3))
    assert not torch.equal(model.sync.running_var, torch.ones(3))
    assert model.without.running_mean is None


@pytest.mark.parametrize(
    ("loader", "batches", "error"),
    [
        ([], None, "no batch"),
        (iter(()), 3, "no batch"),
        ([()], None, "a batch is empty"),
        ([torch.full((2, 3, 6, 6), torch.nan)], None, "statistics of norm would not be finite"),
        ([batch(0)[0], torch.ones(2, 5)], None, None),
        (inputs(), 0, "batches must be"),
        (inputs(), True, "batches must be"),
        (inputs(), 1.5, "batches must be"),
    ],
    ids=["empty", "used up", "empty batch", "nan", "a wrong shape later", "0", "a bool", "a fraction"],
)
def test_errors_change_nothing(loader: Any, batches: Any, error: str | None) -> None:
    model = small().eval()
    model.conv.training = True
    rk.recalibrate(model, inputs(2))
    state, modes = state_of(model), modes_of(model)
    with pytest.raises((ValueError, RuntimeError), match=error):
        rk.recalibrate(model, loader, batches)
    check_unchanged(model, state, modes)
    optimizer = rk.RVSM(rk.param_groups(model, **SPLIT), lr=0.1)
    with (
        pytest.raises((ValueError, RuntimeError), match=error),
        optimizer.sparse_weights(model, recalibrate=loader, batches=batches),
    ):
        pass
    check_unchanged(model, state, modes)
    with optimizer.sparse_weights():  # it is not open any more
        pass


def test_interrupted() -> None:
    model = small()
    state, modes = state_of(model), modes_of(model)

    def loader() -> Any:
        yield batch(0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rk.recalibrate(model, loader())
    check_unchanged(model, state, modes)


def test_models_without_norms_and_other_things() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False))
    assert rk.recalibrate(model, [torch.ones(2, 4)]) == 0  # nothing is read: the shape would not fit
    with pytest.raises(TypeError, match="takes a module, but got a list"):
        rk.recalibrate([], [])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="1 is a lazy norm"):
        rk.recalibrate(nn.Sequential(nn.Linear(3, 3), nn.LazyBatchNorm1d()), [torch.ones(2, 3)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types(dtype: torch.dtype) -> None:
    model = small(dtype)
    rk.recalibrate(model, [x.to(dtype) for x in inputs()])
    assert model.norm.running_mean.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float64 else 0.02
    torch.testing.assert_close(
        model.norm.running_mean.double(), expected(model.double(), inputs_of(dtype))[0], rtol=tolerance, atol=tolerance
    )


def inputs_of(dtype: torch.dtype) -> list[Tensor]:
    return [x.to(dtype).double() for x in inputs()]


@pytest.mark.slow
def test_a_compiled_model() -> None:
    """Neither a graph of before nor one of inside is in the way, and none is compiled for it."""
    model, plain = small(), small()
    compiled = torch.compile(model, backend="eager")
    for net in (compiled, plain):
        net.train()
        net(batch(5)[0])
    rk.recalibrate(compiled, inputs())
    rk.recalibrate(plain, inputs())
    assert same_bits(model.norm.running_mean, plain.norm.running_mean)
    assert same_bits(model.norm.running_var, plain.norm.running_var)


def test_what_makes_a_batch_may_need_gradients() -> None:
    model = small()

    def attacked() -> Any:
        for x in inputs():
            x = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(model(x).sum(), x)
            yield (x + 0.1 * gradient.sign()).detach()

    assert rk.recalibrate(model, attacked()) == 4
    assert model.norm.num_batches_tracked == 8


# ---- inside sparse_weights() -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["with", "decorator"])
def test_statistics_of_u_inside_and_of_w_afterwards(how: str) -> None:
    model = small()
    optimizer = rk.RVSM(rk.param_groups(model, **SPLIT), lr=0.1, engine="reference")
    rk.recalibrate(model, inputs(2))
    state, modes = state_of(model), modes_of(model)
    sparse = optimizer.sparse_weights(model, recalibrate=inputs(), batches=3)
    seen = []

    def look() -> None:
        assert (model.conv.weight == 0).any()
        torch.testing.assert_close(model.norm.running_mean.double(), expected(model, inputs(3))[0])
        assert not same_bits(model.norm.running_mean, state["norm.running_mean"])
        model(batch(7)[0])  # in training mode: it goes too
        seen.append(True)

    if how == "with":
        with sparse:
            look()
    else:
        sparse(look)()
    assert seen
    check_unchanged(model, state, modes)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"recalibrate": [1]}, "recalibrate needs the model"),
        ({"batches": 3}, "give that too"),
    ],
    ids=["no model", "no loader"],
)
def test_what_must_be_given_together(arguments: dict[str, Any], error: str) -> None:
    model = small()
    optimizer = rk.RVSM(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=error):
        optimizer.sparse_weights(**arguments)
