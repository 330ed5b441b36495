"""The compiled engine: hands param groups to the C++ plan, and tensors to the dispatcher ops."""

from __future__ import annotations

import functools
import os
import platform
import re
import warnings
from collections.abc import Mapping, Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..method.bases import BASES
from ..method.groups import Grouping, as_dims, group_dims, size_of_block
from ..method.memory import kind_of, tracer
from ..method.penalties import PENALTIES
from ..method.precision import Stored
from ..method.prox import PROX_NUMBERS
from ..method.selection import Room, Selection
from ..method.split import SPLIT_NUMBERS, is_nm
from ..method.support import Support
from . import cuts, whole
from .checks import check_groups
from .interface import Engine, Group, Ready, StepInputs
from .windows import keep_largest_, value_of_windows

load_error: str | None = None
"""Why the compiled engine is missing, or None."""

other_torch: str | None = None
"""A note that the compiled module was built for another minor version of torch, though it loads and works; or None.

Only with ``RVSM_OTHER_TORCH=1``: without, such a module does not load.
"""

_PACKAGE = Path(__file__).parents[1]
_ISAS = ("base", "avx2", "avx512")
_REBUILD = (
    "build it again for this torch (pip install --no-build-isolation --no-deps --force-reinstall, from the sources; in"
    " a source tree: rm -f build/module.stamp, then make build)"
)


def _file() -> Path | None:
    """The file of the compiled module for this Python."""
    return next((f for suffix in EXTENSION_SUFFIXES if (f := _PACKAGE / f"_C{suffix}").exists()), None)


def _why_not_loaded(error: Exception) -> str:
    """Why the import of the compiled module failed."""
    file = _file()
    if file is not None:
        # The words that build_info() in bindings.cpp reads its answer from.
        built = re.search(rb"built for (torch [\w.+-]+)\0", file.read_bytes())
        built_for = built[1].decode() if built else "an unknown torch"
        versions = f"was built for {built_for}, this is torch {torch.__version__}"
        return f"{file} {versions}, and it does not load ({error}); {_REBUILD}"
    note = _PACKAGE / "no_module.txt"  # setup.py writes it
    if note.exists():
        return f"{_PACKAGE} holds no compiled module: {note.read_text(encoding='utf-8').strip()}"
    others = [f.name for f in sorted(_PACKAGE.glob("_C.*")) if f.suffix in (".so", ".pyd")]
    if others:
        return (
            f"{_PACKAGE} holds no compiled module for this Python ({platform.python_version()}), only"
            f" {', '.join(others)}; install rvsm_kernels again with this Python, or build it there with make build"
        )
    if isinstance(error, ImportError):
        return (
            f"{_PACKAGE} holds no compiled module; build it there with make build, or, if rvsm_kernels is installed,"
            " run Python outside the source tree (an installation with RVSM_NATIVE=0, or without a C++ compiler, has"
            " none)"
        )
    return f"{_PACKAGE} has no compiled module that loads here ({error})"


def _minor(version: str) -> str:
    """The major and minor version of a torch: "2.13" of "torch 2.13.0+cpu"."""
    found = re.search(r"\d+\.\d+", version)
    return found[0] if found else version


def _fault() -> str | None:
    """What is wrong when the compiled module does a little work, or None."""
    try:
        w = torch.tensor([[-3.0, 0.5], [2.0, 0.0]], dtype=torch.float32, device="cpu")
        _C.check([w], [0])
        u = torch.ops.rvsm_kernels.prox(w, "l1", 1.0, 1.0, None, 1).tolist()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None if u == [[-2.0, 0.0], [1.0, 0.0]] else f"a proximal step gives {u}"


def _other_tables() -> str | None:
    """What the compiled module and Python understand differently of the numbers that pass between them, or None."""
    numbers = {"prox": len(PROX_NUMBERS), "split": len(SPLIT_NUMBERS)}
    numbers |= {base.name: len(base.number_names) for base in BASES.values()}
    for what, ours in (("penalties", tuple(PENALTIES)), ("numbers", numbers)):
        theirs = getattr(_C, what, None)
        in_order = [
            list(x.items()) if isinstance(x, dict) else x for x in (theirs, ours)
        ]  # numbers of bases are places
        if in_order[0] != in_order[1]:
            return f"its {what} are {theirs}, those of Python {ours}"
    return None


try:
    from .. import _C  # type: ignore[attr-defined,unused-ignore]
except Exception as error:  # a source tree that was not built, or a build for another torch
    _C = None  # type: ignore[assignment]
    load_error = _why_not_loaded(error)
    if _file() is not None:  # an engine was installed, and another one serves in its place
        warnings.warn(f"rvsm_kernels runs without its compiled module: {load_error}", RuntimeWarning, stacklevel=2)

if load_error is None and _minor(_C.build_info()["built for"]) != _minor(torch.__version__):
    # torch keeps its C++ interface within a minor version only. The warning comes first: the rest may crash.
    _versions = f"was built for {_C.build_info()['built for']}, this is torch {torch.__version__}"
    warnings.warn(
        f"The compiled module of rvsm_kernels {_versions}; it may fail or give wrong results: {_REBUILD}",
        RuntimeWarning,
        stacklevel=2,
    )
    if (_reason := _fault()) is None:
        other_torch = f"{_versions}: {_REBUILD}"
    else:
        _C = None  # type: ignore[assignment]
        load_error = f"the compiled module {_versions}, and it does not work ({_reason}); {_REBUILD}"

if load_error is None and (_reason := _other_tables()) is not None:
    _C = None  # type: ignore[assignment]
    load_error = f"the compiled module was built from other sources of rvsm_kernels ({_reason}); {_REBUILD}"

if load_error is None and os.environ.get("RVSM_ISA", "") not in ("", *_ISAS):
    warnings.warn(
        f"RVSM_ISA is {os.environ['RVSM_ISA']!r}, no instruction set of the native engine ({', '.join(_ISAS)}), and has"
        " no effect",
        RuntimeWarning,
        stacklevel=2,
    )


def missing_cuda() -> str | None:
    """Why there is no compiled engine for CUDA tensors here, or None."""
    if load_error is not None:
        return load_error
    if torch.version.hip is not None:
        return "the compiled kernels are CUDA's, this torch is built for ROCm"
    if not _C.has_cuda:
        return (
            f"this build has no CUDA kernels: {_C.build_info()['without CUDA']}; build it again with RVSM_CUDA=1, which"
            " needs nvcc (12.1 or newer) on PATH or under CUDA_HOME"
        )
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


def prox(w: Tensor, penalty: str | None, tau: float, a: float = 1.0, group_dim: Grouping = None) -> Tensor:
    """Twin of :func:`rvsm_kernels.reference.prox`."""
    return torch.ops.rvsm_kernels.prox(w, penalty, tau, a, group_dims(group_dim, w.dim()), size_of_block(group_dim))


class NativeEngine(Engine):
    """Serves CPU tensors and, where the build found nvcc, CUDA tensors.

    One C++ plan holds the table of an optimizer's parameters.
    """

    name = "native"

    def __init__(self) -> None:
        self._plan = _C.Plan()

    def prepare(self, groups: Sequence[Group], inputs: StepInputs) -> Ready:
        return Ready(self._plan.prepare(groups, inputs))

    def launch(self) -> None:
        self._plan.launch()

    def step(self, groups: Sequence[Group], inputs: StepInputs) -> Ready:
        return Ready(self._plan.step(groups, inputs))

    def drop(self) -> None:
        self._plan.drop()

    def select(self, selections: Sequence[Selection]) -> None:
        cuts.select(selections)

    def normalize_(
        self, tensors: Sequence[Stored], found_inf: Tensor | None, lr: Any, squares: Mapping[Tensor, Tensor]
    ) -> None:
        whole.normalize_(tensors, found_inf, lr, squares)

    def support_of(self, p: Tensor, density: float, grouping: Grouping, room: Room) -> Support:
        return whole.support_of(p, density, grouping, room)

    def check(self, p: Tensor, group: Mapping[str, Any], name: str) -> None:
        check_groups(p, group, name)

    def copy_of(self, p: Tensor) -> Tensor:
        w = p.detach()
        if w.device.type != "cpu" or kind_of(w) is not None or tracer() is not None:
            return w.clone()
        copy = torch.empty_like(w)
        _C.advise_huge_pages(copy)
        return copy.copy_(w)

    def prox_(self, params: Sequence[Tensor], group: Mapping[str, Any]) -> None:
        if is_nm(group):
            keep_largest_(params, group)
            return
        torch.ops.rvsm_kernels.prox_(params, *_penalty_arguments(group))

    def penalty_value(self, params: Sequence[Tensor], group: Mapping[str, Any]) -> Tensor:
        if is_nm(group):
            return value_of_windows(params, group)
        return torch.ops.rvsm_kernels.penalty_value(params, *_penalty_arguments(group))

    def sums_of_u(
        self, weights: Sequence[Tensor], group: Mapping[str, Any], cuts: Sequence[Tensor], zeros: bool
    ) -> Tensor | None:
        if tracer() is not None or any(w.device.type != "cpu" or kind_of(w) is not None for w in weights):
            return None
        penalty, *numbers = _penalty_arguments(group)
        # What the cut of top-k zeroes is what that of l0 does.
        penalty = "l0" if penalty == "topk" else penalty
        return torch.ops.rvsm_kernels.sums_of_u(weights, penalty, *numbers, cuts, zeros)


def _penalty_arguments(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """(penalty, lam, beta, a, group_dim, group_scale, group_block), the order of the ops' schemas."""
    dims = as_dims(group["group_dim"])
    return (
        group["penalty"],
        float(group["lam"]),
        float(group["beta"]),
        float(group["a"]),
        dims if dims is None else list(dims),
        bool(group["group_scale"]),
        int(group["group_block"]),
    )
