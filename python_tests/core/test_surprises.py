"""What users do to an optimizer that its authors did not think of first; each case was a defect once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from builds import quick_in_all
from torch import nn

import rvsm_kernels as rk
from runner import bits, checked_step, same_bits

SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}


def one(*shape: int) -> nn.Parameter:
    """A parameter with a gradient."""
    p = nn.Parameter(torch.randn(shape))
    p.grad = torch.randn(shape)
    return p


# ---- state that goes away again --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reset", ["load_state_dict", "clear", "delete"])
@pytest.mark.parametrize("steps", [1, 2])
def test_reset_right_after_the_first_step(engine: str, reset: str, steps: int) -> None:
    """A learning-rate finder: one step, back to the start, again. No momentum may survive."""
    params = [one(5), one(3, 2)]
    optimizer = rk.RVSM(params, **SGD, lam=0.1, beta=0.5, engine=engine)
    start = copy.deepcopy(optimizer.state_dict())
    for _ in range(steps):
        checked_step(optimizer, "before the reset")
    if reset == "load_state_dict":
        optimizer.load_state_dict(start)
    elif reset == "clear":
        optimizer.state.clear()
    else:
        del optimizer.state[params[1]]
    checked_step(optimizer, "after the reset")
    assert optimizer.state_dict()["state"].keys() == {0, 1}
    checked_step(optimizer, "and again")


@quick_in_all
def test_second_parameter_forgotten(engine: str) -> None:
    """The state of a parameter that began later is deleted while the other's stays."""
    params = [one(5), nn.Parameter(torch.randn(3))]
    optimizer = rk.RVSM(params, **SGD, engine=engine)
    checked_step(optimizer)
    params[1].grad = torch.randn(3)
    checked_step(optimizer)
    del optimizer.state[params[1]]
    checked_step(optimizer)
    assert params[1] in optimizer.state


# ---- tensors as options ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["lr", "lam", "beta", "a", "weight_decay", "momentum"])
def test_tensor_options_edited_in_place(engine: str, key: str) -> None:
    options: dict[str, Any] = {**SGD, "penalty": "tl1", "lam": 0.2, "beta": 0.5, "a": 1.0, "weight_decay": 0.1}
    optimizer = rk.RVSM([one(20)], **{**options, key: torch.tensor(options[key])}, engine=engine)
    checked_step(optimizer, "a tensor")
    optimizer.param_groups[0][key].mul_(0.5)
    checked_step(optimizer, "changed in place")
    optimizer.param_groups[0][key] = torch.tensor(options[key])
    checked_step(optimizer, "another tensor")
    optimizer.param_groups[0][key].mul_(0.25)
    checked_step(optimizer, "changed in place again")


# ---- parameters that are not there yet -------------------------------------------------------------------------------


def test_lazy_modules(engine: str) -> None:
    """An optimizer may be built before the first batch gives the weights their shapes."""
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(3))
    groups = rk.param_groups(model, structure="in_channels", penalty="l0", lam=0.1, beta=0.5)
    assert groups[0]["group_dim"] == 1 and len(groups[0]["params"]) == 2
    optimizer = rk.RVSM(groups, **SGD, engine=engine)
    optimizer.step()
    with optimizer.sparse_weights():
        pass
    model(torch.randn(2, 3, 6, 6)).square().mean().backward()
    checked_step(optimizer, "the first batch")
    assert optimizer.sparsity().to_dict()["total"]["numel"] > 0


# ---- sparse_weights --------------------------------------------------------------------------------------------------


def test_a_body_that_breaks_a_parameter(engine: str) -> None:
    """The others get their weights back, and the optimizer goes on once the parameter is mended."""
    broken, whole = one(4), one(5)
    optimizer = rk.RVSM([broken, whole], lr=0.1, lam=1.0, beta=1.0, engine=engine)
    before = bits(whole)
    data = broken.data
    with pytest.raises(RuntimeError), optimizer.sparse_weights():
        broken.data = torch.zeros(3)
    assert torch.equal(bits(whole), before)
    broken.data = data
    checked_step(optimizer)


def test_expanded_parameter_read(engine: str) -> None:
    good = one(5)
    optimizer = rk.RVSM([nn.Parameter(torch.ones(1).expand(4)), good], lr=0.1, lam=1.0, beta=1.0, engine=engine)
    before = bits(good)
    with pytest.raises(RuntimeError, match="0 of group 0 is expanded"), optimizer.sparse_weights():
        pass
    assert torch.equal(bits(good), before)
    good.grad = None
    optimizer.step()


def test_empty_channels_last(engine: str) -> None:
    p = nn.Parameter(torch.empty(2, 3, 0, 5).to(memory_format=torch.channels_last))
    p.grad = torch.zeros_like(p)
    rk.RVSM([p], **SGD, engine=engine).step()


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def test_load_state_dict_pre_hook(engine: str) -> None:
    optimizer = rk.RVSM([one(4)], **SGD, engine=engine)
    saved = torch.optim.SGD([one(4)], lr=0.5, momentum=0.9).state_dict()
    optimizer.register_load_state_dict_pre_hook(lambda _, state: state["optimizer"])
    optimizer.load_state_dict({"optimizer": saved})
    assert optimizer.param_groups[0]["lr"] == 0.5 and optimizer.param_groups[0]["penalty"] == "l0"
    checked_step(optimizer)


@pytest.mark.parametrize("spoiled", [{"group_dim": 1}, {"lam": -1.0}, {"penalty": "lp"}])
def test_checkpoint_that_does_not_fit(engine: str, spoiled: dict[str, Any]) -> None:
    """Nothing has changed afterwards."""
    optimizer = rk.RVSM([one(4)], **SGD, engine=engine)
    checked_step(optimizer)
    old = copy.deepcopy(optimizer.state_dict())
    saved = copy.deepcopy(old)
    saved["param_groups"][0].update(lr=7.0, **spoiled)
    with pytest.raises(ValueError, match="Invalid"):
        optimizer.load_state_dict(saved)
    now = optimizer.state_dict()
    assert now["param_groups"] == old["param_groups"]
    assert same_bits(now["state"][0]["momentum_buffer"], old["state"][0]["momentum_buffer"])
    checked_step(optimizer)


# ---- groups edited by hand -------------------------------------------------------------------------------------------


def test_parameter_appended_to_a_named_group(engine: str) -> None:
    optimizer = rk.RVSM([("first", one(4))], **SGD, lam=0.1, beta=1.0, engine=engine)
    optimizer.param_groups[0]["params"].append(one(3))
    checked_step(optimizer)
    assert [row["name"] for row in optimizer.sparsity().to_dict()["parameters"]] == ["first", "parameter 1 of group 0"]


def test_params_as_a_tuple(engine: str) -> None:
    optimizer = rk.RVSM([one(4)], **SGD, engine=engine)
    optimizer.param_groups[0]["params"] = (*optimizer.param_groups[0]["params"], one(3))
    for _ in range(3):
        checked_step(optimizer)


# ---- reports and rk.prox ---------------------------------------------------------------------------------------------


def test_sparsity_during_a_warm_up(engine: str) -> None:
    """lam = 0: u is w, and the parameters are in the report all the same."""
    p = nn.Parameter(torch.tensor([0.0, 1.0]))
    optimizer = rk.RVSM([("p", p)], lam=0.0, engine=engine)
    (row,) = optimizer.sparsity().to_dict()["parameters"]
    assert (row["name"], row["zeros"], row["numel"]) == ("p", 1, 2)
    optimizer.param_groups[0]["lam"] = -1.0
    with pytest.raises(ValueError, match="lam"):
        optimizer.sparsity()


def test_group_dim_that_does_not_collapse(native: str) -> None:
    """Reading u names the parameter, as the step does."""
    optimizer = rk.RVSM([("odd", one(2, 3, 4, 5))], lam=0.1, beta=1.0, group_dim=(1, 3), engine=native)
    for read in (optimizer.sparsity, optimizer.penalty_value, optimizer.sparsify_):
        with pytest.raises(ValueError, match="odd"):
            read()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("penalty", ["l1", "l0", "tl1"])
def test_gradient_of_prox_in_half(dtype: torch.dtype, penalty: str) -> None:
    """Computed in float32: sums over large groups stay in range, and one rounding is all the error."""
    w = (torch.randn(2, 20000) * 3).to(dtype)
    grads = {}
    for kind in (dtype, torch.float64):
        v = w.to(kind).detach().requires_grad_()
        rk.prox(v, penalty, 100.0, 1.0, 0).mul(2.0).sum().backward()
        grads[kind] = v.grad
    assert torch.allclose(grads[dtype].double(), grads[torch.float64], rtol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("penalty", ["l1", "l0", "tl1"])
def test_second_derivative_of_prox(penalty: str) -> None:
    """Also with a zero group."""
    w = torch.randn(3, 4, dtype=torch.float64)
    w[1] = 0
    w.requires_grad_()
    (g,) = torch.autograd.grad(rk.prox(w, penalty, 0.1, 1.0, 0).square().sum(), w, create_graph=True)
    g.sum().backward()
    assert torch.isfinite(w.grad).all()


def test_prox_under_torch_func() -> None:
    w = torch.randn(5)
    slope = torch.func.grad(lambda x: rk.prox(x, "l1", 0.1).sum())(w)
    assert torch.equal(slope, (w.abs() > 0.1).float())


def test_topk_has_no_tau() -> None:
    with pytest.raises(ValueError, match="topk"):
        rk.prox(torch.ones(3), "topk", 0.1)
