"""Copies that hold u and share no memory with the model: a model of its own, a state_dict."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..dist.gathered import has_flat_params
from ..dist.shards import is_sharded
from ..method.memory import kind_of
from ..model.wrappers import memory_key, unwrapped
from .unwrap import unwrap
from .zero import ZeroShares


def sparse_copy(model: nn.Module, optimizer: Any, *, frozen: bool = False) -> nn.Module:
    """A model of its own that holds u, to compile, export or ship while the training of w goes on.

    ::

        net = rk.sparse_copy(model, optimizer).eval()
        torch.export.save(torch.export.export(net, (x,)), "net.pt2")

    What is taken of the model itself inside ``sparse_weights()`` (a ``state_dict()``, a traced or exported program that
    is saved later) shares memory with the parameters, and shows w again afterwards. The copy shares none. w and the
    optimizer are left bit for bit as they are, but for the version counters of the parameters: call this between
    steps, not between a forward pass and its backward pass. Inside ``sparse_weights()`` it copies what the model
    holds there, with the running statistics of ``recalibrate=`` for example.

    Args:
        model: what the optimizer trains. DDP, ``nn.DataParallel`` and what ``torch.compile`` returned are left away:
            the copy is the network inside.
        optimizer: ours, or a wrapper around it (see :func:`rvsm_kernels.unwrap`); under ``ZeroRedundancyOptimizer``
            call it on all ranks.
        frozen: also u of parameters with ``requires_grad=False``, which else are copied as they are.

    Returns:
        A ``copy.deepcopy`` of the network, in its mode and on its device, with u in its parameters and without
        gradients. Tied weights are tied in the copy. Hooks of modules come along as ``copy.deepcopy`` takes them
        (functions as they are), those of parameters do not.

    Raises:
        TypeError: something else than a module; no optimizer of this library; parameters that are sharded over ranks
            (DTensor, FSDP), of which a copy on one rank would be a part only.
        ValueError: the optimizer has no parameter of this model.
        Exception: what ``copy.deepcopy`` of the model raises. Nothing has changed then.
    """
    net = unwrapped(model, "sparse_copy")
    ours = unwrap(optimizer)
    _check_belongs(net, ours)
    if has_flat_params(ours.param_groups) or any(is_sharded(p) for p in net.parameters()):
        raise TypeError(
            "sparse_copy cannot copy a model whose parameters are sharded over ranks: take the state_dict of all ranks"
            " (torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True) inside"
            " `with optimizer.sparse_weights(model)`, and load it into a model that is not sharded"
        )
    twin = copy.deepcopy(net, _computed(net))
    with _u_inside(ours, model, frozen), torch.no_grad():
        first: dict[Hashable, Tensor] = {}
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            if is_lazy(p) or kind_of(p) is not None:
                continue
            tied = first.setdefault(memory_key(p), q)
            if tied is not q:
                q.data = tied.data  # two parameters that are one memory
            else:
                q.copy_(p)
    return twin


def sparse_state_dict(model: nn.Module, optimizer: Any, *, frozen: bool = False) -> dict[str, Any]:
    """``model.state_dict()`` with u in the place of w, in memory of its own.

    ::

        torch.save(rk.sparse_state_dict(model, optimizer), "u.pt")

    The model and the optimizer are left as :func:`sparse_copy` leaves them. Entries that are one tensor in the model
    (tied weights) are one tensor here. DTensors stay DTensors, of which each rank has its shards.

    Args:
        model, optimizer, frozen: see :func:`sparse_copy`. The names are those of ``model.state_dict()``, wrappers
            included.

    Raises:
        TypeError: something else than a module; no optimizer of this library.
        ValueError: the optimizer has no parameter of this model.
    """
    net = unwrapped(model, "sparse_state_dict")
    ours = unwrap(optimizer)
    _check_belongs(net, ours)
    with _u_inside(ours, model, frozen), torch.no_grad():
        state = model.state_dict()
        copies: dict[Hashable, Tensor] = {}
        for name, value in list(state.items()):  # which keeps all of them alive, as memory_key() needs it
            if not isinstance(value, Tensor):
                state[name] = copy.deepcopy(value)
                continue
            key = memory_key(value) if kind_of(value) is None else id(value)
            if key not in copies:
                copies[key] = value.detach().clone()
            state[name] = copies[key]
    return state


def _check_belongs(net: nn.Module, ours: Any) -> None:
    """Raise ValueError for an optimizer of another model."""
    mine = {id(p) for group in ours.param_groups for p in group["params"]}
    if not any(id(p) in mine for p in net.parameters()) and not has_flat_params(ours.param_groups):
        raise ValueError(
            "the optimizer has no parameter of this model: give the model that it trains, not a copy of it"
        )


def _u_inside(ours: Any, model: nn.Module, frozen: bool) -> contextlib.AbstractContextManager[Any]:
    """A context in which the parameters hold u."""
    view = ours.mine._view if isinstance(ours, ZeroShares) else ours._view
    if view.is_open:
        return contextlib.nullcontext()
    return ours.sparse_weights(model, frozen=frozen)  # type: ignore[no-any-return]


def _computed(net: nn.Module) -> dict[int, Any]:
    """A memo for ``copy.deepcopy`` with the tensors that modules have computed from parameters.

    ``torch.nn.utils.prune`` and ``weight_norm`` keep such a tensor as an attribute, which has a gradient function and
    cannot be copied; they compute it anew in every forward pass.
    """
    memo: dict[int, Any] = {}
    for module in net.modules():
        for value in vars(module).values():
            for t in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(t, Tensor) and not t.is_leaf:
                    memo[id(t)] = t.detach().clone()
    return memo
