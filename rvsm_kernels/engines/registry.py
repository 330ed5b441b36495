"""Which engine serves which device in this build, and why another does not."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import warnings

import torch

from . import native
from .interface import Engine

NAMES = ("native", "triton", "reference")
"""Every engine, the preferred first."""

_AVAILABLE = "available"
_DEVICE_TYPES = ("cpu", "cuda", "xpu")


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"rvsm_kernels runs on its slow reference engine: {reason}", stacklevel=2)


def _is_interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def missing_triton(device_type: str) -> str | None:
    """Why the Triton engine does not serve a type of device here, or None. Triton itself is not imported."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    interpret = os.environ.get("TRITON_INTERPRET", "")
    if device_type == "cpu":
        if _is_interpreted():
            return None
        ignored = f"; to Triton, {interpret!r} does not mean yes" if interpret not in ("", "0") else ""
        return f"runs on GPUs; on a CPU only in Triton's slow interpreter (TRITON_INTERPRET=1{ignored})"
    if _is_interpreted():
        return f"TRITON_INTERPRET={interpret} is set: kernels run on CPU tensors"
    compiler = _missing_compiler()
    if compiler is not None:
        return f"Triton needs a C compiler to start kernels: {compiler}"
    # Not before there are CUDA tensors: asking would start CUDA, and a process that did must not fork.
    if device_type == "cuda" and torch.version.hip is None and torch.cuda.is_initialized():
        return _too_old()
    return None


def _missing_compiler() -> str | None:
    """Why Triton finds no C compiler, or None. Triton runs the program in CC even where CC is empty."""
    named = os.environ.get("CC")
    if named is None:
        found = shutil.which("gcc") or shutil.which("clang")
        return None if found else "install gcc or clang, or set CC"
    if not named.strip():
        return "CC is set but empty; unset it, or set it to a C compiler"
    # CC may be a path with blanks or a program with its arguments. Triton decides; here either will do.
    found = shutil.which(named) or shutil.which(named.split()[0])
    return None if found else f"CC is {named!r}, and there is no such program; unset it, or set it to a C compiler"


@functools.cache
def _too_old() -> str | None:
    """Why Triton has no code for a GPU of this machine, or None."""
    for device in range(torch.cuda.device_count()):
        if torch.cuda.get_device_capability(device) < (7, 0):
            return f"Triton does not know {torch.cuda.get_device_name(device)} (compute capability below 7.0)"
    return None


def _state(name: str, device_type: str) -> str:
    """Whether an engine serves a type of device here: ``"available"``, or the reason why not."""
    if name == "reference":
        return _AVAILABLE
    if name == "triton" and device_type in _DEVICE_TYPES:
        return missing_triton(device_type) or _AVAILABLE
    if name == "native" and device_type == "cpu":
        return native.load_error or _AVAILABLE
    if name == "native" and device_type == "cuda":
        return native.missing_cuda() or _AVAILABLE
    return f"does not serve {device_type} tensors"


def engines() -> dict[str, dict[str, str]]:
    """What this build has: ``{engine: {device: "available" or the reason why not}}``.

    For reading; an optimizer decides by :func:`engine_name_for`.
    """
    return {
        "native": {device: _state("native", device) for device in ("cpu", "cuda")},
        "triton": {device: _state("triton", device) for device in _DEVICE_TYPES},
        "reference": {"any": _AVAILABLE},
    }


def _check_name(requested: str | None) -> None:
    if requested is not None and requested not in NAMES:
        raise ValueError(f"Invalid engine: {requested!r} (choose one of None, {', '.join(map(repr, NAMES))})")


def check_requested(requested: str | None) -> None:
    """Raise for an engine that serves no device here.

    Raises:
        ValueError: an unknown engine.
        RuntimeError: a missing one.
    """
    _check_name(requested)
    if requested is not None and not served_device_types(requested):
        engine_name_for(requested, "cuda" if requested == "triton" else "cpu")


def served_device_types(name: str) -> tuple[str, ...]:
    """The types of devices that an engine serves here."""
    return tuple(device for device in _DEVICE_TYPES if _state(name, device) == _AVAILABLE)


def engine_name_for(requested: str | None, device_type: str) -> str:
    """The engine for a device: the one asked for, else native, else triton, else reference.

    Raises:
        ValueError: an unknown engine.
        RuntimeError: the engine that was asked for is missing here; says why and what to do.
    """
    _check_name(requested)
    # Triton serves the CPU only in its interpreter, which is slow: for tests, which ask for it by name.
    wanted = [name for name in NAMES if (name, device_type) != ("triton", "cpu")] if requested is None else [requested]
    for name in wanted:
        state = _state(name, device_type)
        if state == _AVAILABLE:
            if name == "reference" and requested is None and native.load_error is not None:
                _warn_once(native.load_error)
            return name
    raise RuntimeError(
        f"engine={requested!r} is not available for {device_type} tensors: {state}."
        " Leave engine=None to let rvsm_kernels choose, or see python -m rvsm_kernels"
    )


# What torch.compiler.assume_constant_result does, which would import the compiler with the package: the choice is made
# when a function is traced.
engine_name_for._dynamo_marked_constant = True  # type: ignore[attr-defined]


def make_engine(name: str) -> Engine:
    """A new engine of an optimizer. The modules of an engine are imported only where it is used."""
    if name == "triton":
        from .triton.engine import TritonEngine  # Triton takes a second to import

        return TritonEngine(served_device_types(name))
    if name == "native":
        return native.NativeEngine()
    from .reference import ReferenceEngine

    return ReferenceEngine()
