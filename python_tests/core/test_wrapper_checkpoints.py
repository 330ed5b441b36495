"""Checkpoints of RVSMWrapper: to the optimizer inside and back, errors that change nothing, hooks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_wrapper import SPLIT, T, apart, model_of, train
from torch import Tensor, nn

import rvsm_kernels as rk


def test_to_the_optimizer_and_back() -> None:
    """A plain checkpoint loads; a wrapper's loads into the optimizer, and wrapping that goes on bit for bit."""
    first, straight = model_of(), model_of()
    optimizer = rk.RVSMWrapper(T.AdamW(first.parameters(), lr=0.01), **SPLIT, method="admm")
    train(first, optimizer, range(3))
    train(straight, rk.RVSMWrapper(T.AdamW(straight.parameters(), lr=0.01), **SPLIT, method="admm"), range(6))
    second = model_of()
    second.load_state_dict(first.state_dict())
    plain = T.AdamW(second.parameters())
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    wrapped = rk.RVSMWrapper(plain)
    assert not any("dual" in of_p for of_p in plain.state.values())
    train(second, wrapped, range(3, 6))
    assert apart(second, straight) == 0

    third = model_of()
    plain = T.AdamW(third.parameters(), lr=0.02)
    train(third, plain, range(2))
    wrapped = rk.RVSMWrapper(T.AdamW(third.parameters()), **SPLIT)
    wrapped.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert wrapped.param_groups[0]["lr"] == 0.02 and wrapped.param_groups[0]["beta"] == SPLIT["beta"]
    assert all(float(of_p["step"]) == 2 for of_p in wrapped.state.values())


@pytest.mark.parametrize("method", ["admm", "rvsm-delayed"])
def test_a_method_that_was_edited_is_saved_with_its_state(method: str) -> None:
    straight, first = model_of(), model_of()
    for model in (straight, first):
        optimizer = rk.RVSMWrapper(T.AdamW(model.parameters(), lr=0.01), **SPLIT)
        train(model, optimizer, range(3))
        optimizer.param_groups[0]["method"] = method
        saved = copy.deepcopy(optimizer.state_dict()) if model is first else None
        if saved is not None:
            optimizer = rk.RVSMWrapper(T.AdamW(first.parameters()))
            optimizer.load_state_dict(saved)
        train(model, optimizer, range(3, 6))
    assert apart(straight, first) == 0


def test_what_cannot_be_loaded() -> None:
    """Nothing has changed then: neither the optimizer's state nor the wrapper's."""
    model, other = model_of(), nn.Linear(2, 2)
    optimizer = rk.RVSMWrapper(T.AdamW(model.parameters()), **SPLIT, method="admm")
    train(model, optimizer, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    good = copy.deepcopy(before)
    others = T.AdamW([{"params": [p]} for p in other.parameters()]).state_dict()
    wrong: dict[str, tuple[Any, type[Exception]]] = {
        "takes what state_dict": ([1], TypeError),
        "no optimizer's state_dict": ({"model": 1}, ValueError),
        "different number of parameter groups": (others, ValueError),
        "doesn't match the size": (T.AdamW([*model.parameters()][:1]).state_dict(), ValueError),
        "Invalid lam": ({**good, "param_groups": [{**good["param_groups"][0], "lam": -1.0}]}, ValueError),
        "has no dual for": ({**good, "state": {0: {"exp_avg": torch.zeros(8, 6)}}}, ValueError),
    }
    for match, (state_dict, kind) in wrong.items():
        with pytest.raises(kind, match=match):
            optimizer.load_state_dict(state_dict)
        now = optimizer.state_dict()
        assert now["param_groups"] == before["param_groups"]
        for key, of_p in before["state"].items():
            assert all(torch.equal(value, now["state"][key][name]) for name, value in of_p.items())


def test_state_dicts_of_another_form() -> None:
    """As Lookahead's, which has another optimizer inside: said, not a KeyError."""

    class Nested(T.SGD):
        def state_dict(self) -> dict[str, Any]:
            return {"base": super().state_dict()}

    optimizer = rk.RVSMWrapper(Nested(model_of().parameters(), lr=0.1), **SPLIT)
    with pytest.raises(TypeError, match="put Nested around the RVSMWrapper"):
        optimizer.state_dict()


def test_hooks_of_checkpoints() -> None:
    """Those of the wrapper and those of the optimizer, each where torch calls it."""
    model, called = model_of(), []
    optimizer = rk.RVSMWrapper(T.SGD(model.parameters(), lr=0.1), **SPLIT)
    for whose, of in (("wrapper", optimizer), ("optimizer", optimizer.optimizer)):
        of.register_state_dict_pre_hook(lambda _, w=whose: called.append(f"{w} before save"))
        of.register_state_dict_post_hook(lambda *_, w=whose: called.append(f"{w} after save"))
        of.register_load_state_dict_pre_hook(lambda *_, w=whose: called.append(f"{w} before load"))
        of.register_load_state_dict_post_hook(lambda _, w=whose: called.append(f"{w} after load"))
    order = ["wrapper before", "optimizer before", "optimizer after", "wrapper after"]
    optimizer.register_state_dict_post_hook(lambda _, state: {"packed": state})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: state["packed"])
    packed = optimizer.state_dict()
    assert list(packed) == ["packed"] and called == [f"{x} save" for x in order]
    called.clear()
    optimizer.load_state_dict(packed)
    assert called == [f"{x} load" for x in order]


def test_states_of_another_dtype() -> None:
    """They take that of their parameter, as torch's own do."""
    model = model_of()
    optimizer = rk.RVSMWrapper(T.AdamW(model.parameters()), **SPLIT, method="admm")
    train(model, optimizer, range(2))
    state_dict = copy.deepcopy(optimizer.state_dict())
    for of_p in state_dict["state"].values():
        of_p.update({name: x.double() for name, x in of_p.items() if isinstance(x, Tensor) and x.dim() > 0})
    optimizer.load_state_dict(state_dict)
    loaded = optimizer.state_dict()["state"]
    assert len(loaded) == 2 and all(x.dtype == torch.float32 for of_p in loaded.values() for x in of_p.values())
