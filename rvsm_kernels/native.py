"""The compiled engine: hands param groups to the C++ plan, and tensors to the dispatcher ops."""

from __future__ import annotations

import functools
from collections.abc import Mapping, MutableMapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .groups import GroupDim, kept_dims
from .interface import Engine
from .methods import is_topk
from .options import METHODS, differ, is_split, snapshot

load_error: str | None = None
"""Why the compiled module is missing, or None."""

try:
    from . import _C  # type: ignore[attr-defined,unused-ignore]
except ImportError as error:  # a source tree that was not built, or a build for another torch
    _C = None  # type: ignore[assignment]
    load_error = f"{Path(__file__).parent} has no compiled module that loads here ({error})"
    if "partially initialized" in str(error):  # what Python says of a module that is not there
        load_error = (
            f"{Path(__file__).parent} holds no compiled module; build it there with make build, or, if"
            " rvsm_kernels is installed, run Python outside the source tree (an installation without a C++ compiler"
            " has none)"
        )


def missing_cuda() -> str | None:
    """Why there is no compiled engine for CUDA tensors here, or None."""
    if load_error is not None:
        return load_error
    if torch.version.hip is not None:
        return "the compiled kernels are CUDA's, this torch is built for ROCm"
    if not _C.has_cuda:
        return "this build found no nvcc; rebuild where nvcc (12.1 or newer) is on PATH or under CUDA_HOME"
    # Not before there are CUDA tensors: asking would start CUDA, and a process that did must not fork.
    return _probe() if torch.cuda.is_initialized() else None


@functools.cache
def _probe() -> str | None:
    """Why the compiled kernels do not run on a GPU of this machine, or None."""
    for device in range(torch.cuda.device_count()):
        error = _C.probe_cuda(device)
        if error is not None:
            name, built = torch.cuda.get_device_name(device), _C.build_info()["architectures"]
            return f"the kernels, built for {built}, do not run on {name} here: {error}"
    return None


_PLAN_OPTIONS = (
    "lr momentum dampening weight_decay nesterov maximize "
    "penalty lam beta a group_dim group_scale group_lasso decoupled method"
).split()
_read = itemgetter(*_PLAN_OPTIONS)


def prox(w: Tensor, penalty: str | None, tau: float, a: float = 1.0, group_dim: GroupDim = None) -> Tensor:
    """Twin of :func:`rvsm_kernels.reference.prox`."""
    return torch.ops.rvsm_kernels.prox(w, penalty, tau, a, kept_dims(group_dim, w.dim()))


class NativeEngine(Engine):
    """Serves CPU tensors and, where the build found nvcc, CUDA tensors.

    One C++ plan holds the table of an optimizer's parameters.
    """

    name = "native"

    def __init__(self) -> None:
        self._plan = _C.Plan()
        self._seen: list[tuple[Any, ...] | None] = []

    def prepare(
        self,
        groups: Sequence[MutableMapping[str, Any]],
        state: MutableMapping[Tensor, Any],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        kept: Mapping[Tensor, Tensor],
        cuts: Mapping[Tensor, Tensor],
    ) -> bool:
        seen, plan = self._seen, self._plan
        for i, group in enumerate(groups):
            values = _read(group)
            if i >= len(seen) or differ(values, seen[i]):
                plan.set_options(i, _packed(group))
                seen[i : i + 1] = [snapshot(values)]
        del seen[len(groups) :]
        return plan.prepare(groups, state, grad_scale, found_inf, kept, cuts)

    def launch(self) -> None:
        self._plan.launch()

    def check(self, p: Tensor, group: Mapping[str, Any], name: str) -> None:
        if group["group_dim"] is not None:
            try:
                _C.check([p], _dims(group["group_dim"]))
            except ValueError as error:
                raise ValueError(f"Invalid group_dim value for {name}: {group['group_dim']!r}: {error}") from None

    def prox_(self, params: Sequence[Tensor], group: Mapping[str, Any]) -> None:
        torch.ops.rvsm_kernels.prox_(params, *_penalty_arguments(group))

    def penalty_value(self, params: Sequence[Tensor], group: Mapping[str, Any]) -> Tensor:
        return torch.ops.rvsm_kernels.penalty_value(params, *_penalty_arguments(group))


def _dims(group_dim: GroupDim) -> list[int] | None:
    """``group_dim`` as the ops take it."""
    return group_dim if group_dim is None else [group_dim] if isinstance(group_dim, int) else list(group_dim)


def _penalty_arguments(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """(penalty, lam, beta, a, group_dim, group_scale), the order of the ops' schemas."""
    return (
        group["penalty"],
        float(group["lam"]),
        float(group["beta"]),
        float(group["a"]),
        _dims(group["group_dim"]),
        bool(group["group_scale"]),
    )


def _packed(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a group as plain numbers for the plan."""
    packed: dict[str, Any] = {
        key: float(group[key]) for key in "lr momentum dampening weight_decay lam beta a group_lasso".split()
    }
    packed.update({key: bool(group[key]) for key in "nesterov maximize group_scale decoupled".split()})
    packed["topk"] = is_topk(group)
    packed["penalty"] = "l0" if packed["topk"] else group["penalty"] if is_split(group) else None
    packed["method"] = METHODS.index(group["method"])
    packed["group_dim"] = _dims(group["group_dim"])
    return packed
