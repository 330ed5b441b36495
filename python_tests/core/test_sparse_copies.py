"""rk.sparse_copy and rk.sparse_state_dict: u in memory of its own, while the training of w goes on."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import rvsm_kernels as rk
from models import backward, batch, small
from runner import same_bits

SPLIT: dict[str, Any] = {"penalty": "l0", "lam": 0.02, "beta": 1.0}


def trained(model: nn.Module | None = None, cls: Any = rk.RVSM, **options: Any) -> tuple[Any, Any]:
    model = small() if model is None else model
    momentum = {"momentum": 0.9} if cls is rk.RVSM else {}
    optimizer = cls(rk.param_groups(model, **{**SPLIT, **options}), lr=0.1, **momentum)
    for k in range(2):
        backward(model, optimizer, k)
        optimizer.step()
    return model, optimizer


def u_of(model: nn.Module, optimizer: Any, **options: Any) -> dict[str, Tensor]:
    with optimizer.sparse_weights(model, **options):
        return {name: value.clone() for name, value in model.state_dict().items()}


def check_same(a: Any, b: Any) -> None:
    assert list(a) == list(b)
    for name in a:
        assert same_bits(a[name], b[name]), name


def tensors_of(state: Any) -> dict[str, Tensor]:
    return {f"{k}.{name}": t for k, of in state["state"].items() for name, t in of.items() if isinstance(t, Tensor)}


def memory_of(tensors: Any) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors}


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "adamw": {"cls": rk.RVSMAdamW},
    "channels": {"structure": "in_channels", "lam": 1.0},
    "admm": {"method": "admm"},
    "budget": {"penalty": "topk", "density": 0.3, "budget": "global"},
    "sharp l1": {"penalty": "l1", "lam": 0.05},
}


@pytest.mark.parametrize("options", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_u_of_its_own_and_nothing_else_changes(options: dict[str, Any]) -> None:
    model, optimizer = trained(**options)
    twin_model, twin_optimizer = trained(**options)
    u = u_of(model, optimizer)
    weights, states = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    net, state = rk.sparse_copy(model, optimizer), rk.sparse_state_dict(model, optimizer)
    assert type(net) is type(model) and rk.sparsity(net).share > 0.1
    check_same(net.state_dict(), u)
    check_same(state, u)
    check_same(model.state_dict(), weights)
    check_same(tensors_of(optimizer.state_dict()), tensors_of(states))
    assert str(optimizer.state_dict()) == str(states)
    shared = memory_of([*net.state_dict().values(), *state.values()])
    assert not shared & memory_of([*model.state_dict().values(), *optimizer.param_groups[0]["params"]])
    assert all(p.grad is None for p in net.parameters()) and net.training == model.training
    for k in range(2, 5):  # w goes on as if nothing had been, and u stays
        for m, o in ((model, optimizer), (twin_model, twin_optimizer)):
            backward(m, o, k)
            o.step()
    check_same(model.state_dict(), twin_model.state_dict())
    check_same(net.state_dict(), u)
    check_same(state, u)


def test_a_state_dict_loads_and_keeps_its_metadata() -> None:
    model, optimizer = trained()
    state = rk.sparse_state_dict(model, optimizer)
    assert state._metadata == model.state_dict()._metadata  # type: ignore[attr-defined]
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other = small(seed=5)
    other.load_state_dict(torch.load(file))
    check_same(other.state_dict(), u_of(model, optimizer))


def test_inside_sparse_weights_it_is_what_the_model_holds() -> None:
    model, optimizer = trained()
    with optimizer.sparse_weights(model, recalibrate=[batch(k) for k in range(3)]):
        inside = copy.deepcopy(model.state_dict())
        net, state = rk.sparse_copy(model, optimizer), rk.sparse_state_dict(model, optimizer)
    check_same(net.state_dict(), inside)
    check_same(state, inside)
    assert not same_bits(inside["norm.running_mean"], model.norm.running_mean)


def test_after_sparsify_it_is_a_plain_copy() -> None:
    model, optimizer = trained(penalty="l1", lam=0.05)
    optimizer.sparsify_()
    check_same(rk.sparse_copy(model, optimizer).state_dict(), model.state_dict())
    report = optimizer.sparsity().share  # u is not taken of u
    optimizer.sparsify_()
    assert optimizer.sparsity().share == report


def test_frozen_parameters() -> None:
    model, optimizer = trained()
    model.hidden.weight.requires_grad_(False)
    assert same_bits(rk.sparse_copy(model, optimizer).hidden.weight, model.hidden.weight)
    net = rk.sparse_copy(model, optimizer, frozen=True)
    assert (net.hidden.weight == 0).any() and not net.hidden.weight.requires_grad
    check_same(rk.sparse_state_dict(model, optimizer, frozen=True), net.state_dict())


class Tied(nn.Module):
    """Layers that are one, weights that are one parameter, and two parameters that are one memory."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))
        self.same = self.a
        self.b.weight = self.a.weight
        self.c.weight = nn.Parameter(self.a.weight.data)


def test_what_is_tied_stays_tied() -> None:
    model = Tied()
    optimizer = rk.RVSM(rk.param_groups(model, **SPLIT), lr=0.1)
    net = rk.sparse_copy(model, optimizer)
    assert net.same is net.a and net.b.weight is net.a.weight
    assert net.c.weight is not net.a.weight and net.c.weight.data_ptr() == net.a.weight.data_ptr()
    assert net.a.weight.data_ptr() != model.a.weight.data_ptr()
    state = rk.sparse_state_dict(model, optimizer)
    check_same(state, u_of(model, optimizer))
    names = ("a.weight", "b.weight", "c.weight", "same.weight")
    assert len({state[name].data_ptr() for name in names}) == 1
    assert len({value.data_ptr() for value in state.values()}) == 4


def test_hooks_come_along() -> None:
    model, optimizer = trained()
    seen: list[Any] = []
    model.conv.register_forward_hook(lambda module, arguments, output: seen.append(module))
    model.conv.weight.register_hook(lambda gradient: seen.append("gradient"))
    net = rk.sparse_copy(model, optimizer)
    net(batch(0)[0]).sum().backward()
    assert seen == [net.conv]


CHANGED: dict[str, Callable[[nn.Module], Any]] = {
    "pruned": lambda layer: prune.random_unstructured(layer, "weight", 0.5),
    "parametrised": lambda layer: parametrize.register_parametrization(layer, "weight", nn.Tanh()),
    "weight norm": lambda layer: nn.utils.parametrizations.weight_norm(layer),
    "the older weight norm": lambda layer: nn.utils.weight_norm(layer),
}


@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
def test_layers_whose_weight_is_computed(change: Callable[[nn.Module], Any]) -> None:
    """Their weight has a gradient function, which copy.deepcopy alone refuses."""
    model = small()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        change(model.hidden)
        model, optimizer = trained(model)
    model(batch(0)[0])
    net = rk.sparse_copy(model, optimizer).eval()
    check_same(net.state_dict(), u_of(model, optimizer))
    model.eval()
    with optimizer.sparse_weights(model):
        wanted = model(batch(0)[0])
    assert torch.equal(net(batch(0)[0]), wanted)


def test_wrappers_come_off() -> None:
    model, optimizer = trained()
    u = u_of(model, optimizer)
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        wrapped = torch.compile(nn.parallel.DistributedDataParallel(nn.DataParallel(model)), backend="eager")
        net = rk.sparse_copy(wrapped, optimizer)
        assert type(net) is type(model)
        check_same(net.state_dict(), u)
        state = rk.sparse_state_dict(wrapped, optimizer)
    finally:
        dist.destroy_process_group()
    assert list(state) == [f"_orig_mod.module.module.{name}" for name in u]
    model.compile(backend="eager")
    assert rk.sparse_copy(model, optimizer)._compiled_call_impl is None


def test_around_the_optimizer_too() -> None:
    class Accelerated:
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer

    model, optimizer = trained()
    check_same(rk.sparse_copy(model, Accelerated(optimizer)).state_dict(), u_of(model, optimizer))
    model = small()
    wrapper = rk.RVSMWrapper(torch.optim.Adam(rk.param_groups(model, **SPLIT), lr=1e-3))
    check_same(rk.sparse_state_dict(model, wrapper), u_of(model, wrapper))


@pytest.mark.parametrize("take", [rk.sparse_copy, rk.sparse_state_dict])
def test_refusals(take: Any) -> None:
    model, optimizer = trained()
    with pytest.raises(TypeError, match="takes a module, but got a dict"):
        take({}, optimizer)
    with pytest.raises(TypeError, match="no optimizer of rvsm_kernels"):
        take(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="the optimizer has no parameter of this model"):
        take(copy.deepcopy(model), optimizer)
    weights = copy.deepcopy(model.state_dict())
    model.conv.weight.data = model.conv.weight.data[:1].expand(7, -1, -1, -1)
    with pytest.raises((RuntimeError, ValueError)):
        take(model, optimizer)
    model.conv.weight.data = weights["conv.weight"].clone()
    check_same(model.state_dict(), weights)
    rk.sparse_copy(model, optimizer)


def test_a_model_that_cannot_be_copied_is_left_alone() -> None:
    model, optimizer = trained()
    weights = copy.deepcopy(model.state_dict())
    model.file = open(__file__)  # noqa: SIM115
    with model.file, pytest.raises(TypeError, match="cannot pickle"):
        rk.sparse_copy(model, optimizer)
    check_same(model.state_dict(), weights)
    with optimizer.sparse_weights():
        pass


def test_lazy_parameters() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3))
    optimizer = rk.RVSM([model[0].weight], lr=0.1, **SPLIT)
    net = rk.sparse_copy(model, optimizer)
    assert net(torch.ones(2, 4)).shape == (2, 3)
    assert torch.nn.parameter.is_lazy(model[1].weight)


# ---- what is compiled or exported ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_exported_program_keeps_u() -> None:
    model, optimizer = trained()
    x = batch(0)[0]
    model.eval()
    with optimizer.sparse_weights():
        by_reference = torch.export.export(model, (x,))
        wanted = model(x)
    own = torch.export.export(rk.sparse_copy(model, optimizer), (x,))
    file = io.BytesIO()
    torch.export.save(own, file)
    model.train()
    backward(model, optimizer, 3)
    optimizer.step()
    file.seek(0)
    for program in (own, torch.export.load(file)):
        assert torch.equal(program.module()(x), wanted)
    assert not torch.allclose(by_reference.module()(x), wanted)  # why there is a copy


@pytest.mark.slow
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="inductor freezes with mkldnn on a CPU")
def test_constants_that_inductor_freezes() -> None:
    """Freezing takes the weights into the compiled code: those of a copy stay right, whatever becomes of the model."""
    from torch._inductor import config

    model, optimizer = trained()
    x = batch(0)[0]
    model.eval()
    net = rk.sparse_copy(model, optimizer)
    with torch.no_grad(), optimizer.sparse_weights():
        wanted = model(x)
    with torch.no_grad(), config.patch(freezing=True):
        compiled = torch.compile(net)
        torch.testing.assert_close(compiled(x), wanted)
        frozen = torch.compile(model)
        w = model(x)
        torch.testing.assert_close(frozen(x), w)
        with optimizer.sparse_weights():  # the model itself, frozen, does not see that the weights change
            assert torch.allclose(frozen(x), w) and not torch.allclose(model(x), w)
    model.train()
    for k in range(3):
        backward(model, optimizer, k)
        optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), wanted)
