"""u and the value of a penalty by Triton: launches that are made for one call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...method.groups import Grouping, group_dims, grouping, grouping_of, size_of_block, view_of
from ...method.prox import prox_numbers
from ...method.split import strength
from .kinds import TensorArgs
from .launch import Launch
from .staging import Staged, on_device
from .table import capturing


def prox_(params: Sequence[Tensor], group: Mapping[str, Any]) -> None:
    """w <- u in place, for parameters of one split group."""
    staged = [Staged(p.detach(), p.dtype) for p in params]
    for s in staged:
        s.load()
    beta, a = float(group["beta"]), float(group["a"])
    tensors = []
    for s in staged:
        tau = strength(group, s.dense.shape) / beta
        tensors.append(_args_of(s.dense, s.dense, grouping_of(group), prox_numbers(group["penalty"], tau, a)))
    for launch in _launches("prox", tensors):
        launch.run(captured=capturing(launch.device))
    for s in staged:
        s.store()
    torch.autograd.graph.increment_version([p for p in params if not p.is_inference()])


def penalty_value(params: Sequence[Tensor], group: Mapping[str, Any]) -> Tensor:
    """lam P(u) + beta/2 ||w - u||^2 over parameters of one split group, 0-dim float64."""
    beta, a = float(group["beta"]), float(group["a"])
    tensors = []
    for p in params:
        staged = Staged(p.detach(), p.dtype)
        staged.load()
        lam = strength(group, p.shape)
        numbers = (*prox_numbers(group["penalty"], lam / beta, a), lam, beta)
        tensors.append(_args_of(staged.dense, staged.dense, grouping_of(group), numbers))
    total = torch.zeros((), dtype=torch.float64, device=params[0].device)
    norms = []
    for launch in _launches("penalty", tensors):
        launch.run(captured=capturing(launch.device))
        if launch.totals.numel():
            total = total + launch.totals.sum().to(total.device)
        norms += [TensorArgs(t, t, None, args.key) for t, args in launch.norms]
    for launch in _launches("penalty", norms):
        launch.run(captured=capturing(launch.device))
        total = total + launch.totals.sum().to(total.device)
    return total


def _args_of(w: Tensor, source: Tensor, group_dim: Grouping, numbers: tuple[float, ...]) -> TensorArgs:
    return TensorArgs(w, source, view_of(w, group_dim), numbers)


def _launches(action: str, tensors: Sequence[TensorArgs]) -> Iterator[Launch]:
    """Launches of tensors whose keys are their numbers, filled, each on its device."""
    kinds: dict[tuple[torch.device, torch.dtype], list[TensorArgs]] = {}
    for args in tensors:
        if args.w.numel() > 0:
            kinds.setdefault((args.w.device, args.w.dtype), []).append(args)
    for (device, dtype), of_kind in kinds.items():
        with on_device(device):
            launch = Launch(action, dtype, device, of_kind)
            launch.move([args.w.data_ptr() for args in of_kind], [args.g.data_ptr() for args in of_kind])
            launch.set({key: key for key in launch.keys})
            yield launch


@torch.library.custom_op("rvsm_kernels_triton::prox", mutates_args=())
def _prox(
    w: Tensor, penalty: str | None, tau: float, a: float, group_dim: list[int] | None, group_block: int
) -> Tensor:
    u = torch.empty_like(w)
    staged = Staged(w.detach(), w.dtype, u)
    staged.load()
    try:
        args = _args_of(u, staged.dense, grouping(group_dim, group_block), prox_numbers(penalty, tau, a))
    except ValueError as error:
        raise ValueError(f"Invalid group_dim value: {error}") from None
    for launch in _launches("prox", [args]):
        launch.run(captured=capturing(launch.device))
    return u


@_prox.register_fake
def _(w: Tensor, penalty: str | None, tau: float, a: float, group_dim: list[int] | None, group_block: int) -> Tensor:
    return torch.empty_like(w)


def prox(w: Tensor, penalty: str | None, tau: float, a: float = 1.0, group_dim: Grouping = None) -> Tensor:
    """Twin of :func:`rvsm_kernels.reference.prox`, an op of its own under torch.compile."""
    dims = group_dims(group_dim, w.dim())
    return _prox(w, penalty, float(tau), float(a), None if dims is None else list(dims), size_of_block(group_dim))
