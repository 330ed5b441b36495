"""The reference engine: the method in plain PyTorch, short enough to be read as its specification.

``decoupled=True`` is: pull the weights, then ``torch.optim.SGD.step()``; ``decoupled=False`` is: add
beta * (w - u) to the gradient, then ``torch.optim.SGD.step()``. Both stand on torch's own functional SGD
(its foreach form). Half types are computed in float32 and stored in their own type, as the kernels do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from .adaptive import AdaptiveThresholding
from .base import SplittingOptimizer
from .interface import Engine, check_gradient
from .method.groups import GroupDim, magnitudes
from .method.memory import kind_of, named, turns_of, whole
from .method.penalties import PENALTIES, shrink
from .methods import arithmetic, is_topk, keep_above, moved
from .options import is_split, param_name, strength


def prox(w: Tensor, penalty: str | None, tau: float, a: float = 1.0, group_dim: GroupDim = None) -> Tensor:
    """u = argmin_u ||u - w||^2 / 2 + tau * P(u), out of place; shape, dtype and layout of ``w``.

    P(u) = sum over elements (or groups, see ``group_dim``) of g(|u_i|) (or g(||u_G||_2)).
    """
    if penalty is None or tau == 0:
        return w.clone()
    v = arithmetic(w)
    r = magnitudes(v, group_dim)
    s = shrink(r, penalty, tau, a)
    u = torch.copysign(s, v) if group_dim is None else v * torch.where(r == 0, torch.zeros_like(r), s / r)
    return u.to(w.dtype)


def _buffer(p: Tensor, state: MutableMapping[str, Any]) -> Tensor | None:
    """The momentum of a parameter; it follows a parameter that was moved to another dtype."""
    buffer = state.get("momentum_buffer")
    if buffer is not None and buffer.dtype != p.dtype:
        state["momentum_buffer"] = buffer = buffer.to(p.dtype)
    return buffer


def _batches(group: Mapping[str, Any]) -> Iterator[list[Tensor]]:
    """The parameters of a group that a step moves, divided so that torch can step each list by one foreach call.

    Tensors that share memory have one turn after the other, in their order; torch does not mix kinds of tensors, nor
    DTensors of different meshes.
    """
    params = [p for _, p in moved(group)]
    batches: dict[Any, list[Tensor]] = {}
    for p, turn in zip(params, turns_of(params), strict=True):
        batches.setdefault((turn, kind_of(p), getattr(p, "device_mesh", None)), []).append(p)
    yield from (batches[key] for key in sorted(batches, key=lambda key: key[0]))


def _step(
    params: Sequence[Tensor],
    stored: Sequence[Tensor | None],
    group: Mapping[str, Any],
    state: MutableMapping[Tensor, Any],
    grad_scale: Tensor | None,
    kept: Mapping[Tensor, Tensor],
    cuts: Mapping[Tensor, Tensor],
) -> None:
    """One step of parameters of one param group: section 3 of docs/method.md, line by line.

    Args:
        stored: their momentum buffers, None at a first step and without momentum.
    """
    w = [arithmetic(p.detach()) for p in params]
    g = [p.grad.detach().to(x.dtype) for p, x in zip(params, w, strict=True) if p.grad is not None]
    if grad_scale is not None:
        g = [x * grad_scale.to(x.device, x.dtype).reciprocal() for x in g]
    if group["maximize"]:
        g = list(torch._foreach_neg(g))
    lr, beta, dims = float(group["lr"]), float(group["beta"]), group["group_dim"]

    if group["group_lasso"] != 0:
        norms = [magnitudes(x, dims) for x in w]
        unit = [x / torch.where(r == 0, torch.ones_like(r), r) for x, r in zip(w, norms, strict=True)]
    if is_split(group):
        admm, delayed = group["method"] == "admm", group["method"] == "rvsm-delayed"
        k = [arithmetic(kept[p]) for p in params] if admm or delayed else []
        v = list(torch._foreach_add(w, k)) if admm else w
        if is_topk(group):
            u = [keep_above(x, cuts[p], dims) for x, p in zip(v, params, strict=True)]
        else:
            u = [prox(x, group["penalty"], strength(group, x.shape) / beta, group["a"], dims) for x in v]
        if admm:
            dual = torch._foreach_sub(v, u)
            pull = torch._foreach_add(torch._foreach_sub(w, u), dual)
        else:
            pull = torch._foreach_sub(w, k if delayed else u)
        if admm or delayed:
            for p, new in zip(params, dual if admm else u, strict=True):
                kept[p].copy_(new)
        if group["decoupled"]:
            torch._foreach_add_(w, pull, alpha=-lr * beta)
        else:
            g = list(torch._foreach_add(g, pull, alpha=beta))
    if group["group_lasso"] != 0:
        g = list(torch._foreach_add(g, unit, alpha=float(group["group_lasso"])))
    if group["nesterov"] and not group["weight_decay"]:
        g = [x.clone() for x in g]  # torch's foreach SGD would write the Nesterov direction into p.grad

    m = [None if b is None else arithmetic(b) for b in stored]
    sgd(
        w,
        g,
        m,
        lr=lr,
        weight_decay=float(group["weight_decay"]),
        momentum=float(group["momentum"]),
        dampening=float(group["dampening"]),
        nesterov=bool(group["nesterov"]),
        maximize=False,
        foreach=True,
    )
    for p, new_w, buffer, new_m in zip(params, w, stored, m, strict=True):
        if new_w.dtype != p.dtype:  # else new_w is p: the step was in place
            p.copy_(new_w)
        if buffer is None and new_m is not None:
            state[p]["momentum_buffer"] = torch.empty_like(p).copy_(new_m)
        elif buffer is not None and new_m is not None and buffer.dtype != new_m.dtype:
            buffer.copy_(new_m)


class ReferenceEngine(Engine):
    """Serves every device that torch serves."""

    name = "reference"
    _job: Any = None

    def prepare(
        self,
        groups: Sequence[MutableMapping[str, Any]],
        state: MutableMapping[Tensor, Any],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        kept: Mapping[Tensor, Tensor],
        cuts: Mapping[Tensor, Tensor],
    ) -> bool:
        for i, group in enumerate(groups):
            for j, p in enumerate(group["params"]):
                if p.grad is not None:
                    check_gradient(p, state, group, i, j, memory=kind_of(p) is None)
        self._job = (groups, state, grad_scale, found_inf, kept, cuts)
        return True

    def launch(self) -> None:
        assert self._job is not None
        groups, state, grad_scale, found_inf, kept, cuts = self._job
        self._job = None
        if found_inf is not None and found_inf.item() > 0:
            return
        for i, group in enumerate(groups):
            buffers = {p: _buffer(p, state[p]) if group["momentum"] else None for _, p in moved(group)}
            for params in _batches(group):
                try:
                    _step(params, [buffers[p] for p in params], group, state, grad_scale, kept, cuts)
                except (AssertionError, NotImplementedError, RuntimeError) as error:
                    j = next(j for j, p in enumerate(group["params"]) if p is params[0])
                    raise named(error, params[0], param_name(group, i, j)) from error

    def drop(self) -> None:
        self._job = None

    def prox_(self, params: Sequence[Tensor], group: Mapping[str, Any]) -> None:
        for p in params:
            tau = strength(group, p.shape) / group["beta"]
            p.copy_(prox(p, group["penalty"], tau, group["a"], group["group_dim"]))

    def penalty_value(self, params: Sequence[Tensor], group: Mapping[str, Any]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=params[0].device)
        for p in params:
            w, lam = arithmetic(whole(p)), strength(group, p.shape)
            u = prox(w, group["penalty"], lam / group["beta"], group["a"], group["group_dim"])
            value = PENALTIES[group["penalty"]].value(magnitudes(u.double(), group["group_dim"]), group["a"])
            total += lam * value.sum() + group["beta"] / 2 * (w.double() - u.double()).square().sum()
        return total


class _InPyTorch(SplittingOptimizer):
    def _make_engine(self, name: str) -> Engine:
        return ReferenceEngine()

    def _engine_name(self, device_type: str) -> str:
        return "reference"


class RVSM(_InPyTorch):
    """:class:`rvsm_kernels.RVSM` in plain PyTorch: the same signature, options and state."""


class AdaptiveHardThreshold(AdaptiveThresholding, _InPyTorch):
    """:class:`rvsm_kernels.AdaptiveHardThreshold` in plain PyTorch: the same signature, options and state."""


class RVSMAdamW:
    """Reserved: the splitting over AdamW's step comes in a later version."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("RVSMAdamW is not in this version of rvsm_kernels")
