"""Which engine serves which device in this build, and why another does not."""

from __future__ import annotations

import functools
import warnings

from . import native

NAMES = ("native", "triton", "reference")
"""Every engine, the preferred first."""

_AVAILABLE = "available"


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"rvsm_kernels runs on its slow reference engine: {reason}", stacklevel=2)


def engines() -> dict[str, dict[str, str]]:
    """What this build has: ``{engine: {device: "available" or the reason why not}}``.

    Prefer asking :func:`choose` for a decision; this is for reading.
    """
    cpu = _AVAILABLE if native.load_error is None else native.load_error
    return {
        "native": {"cpu": cpu, "cuda": native.missing_cuda() or _AVAILABLE},
        "triton": {"any": "not in this version of rvsm_kernels"},
        "reference": {"any": _AVAILABLE},
    }


def choose(requested: str | None, device_type: str) -> str:
    """The engine for a device: the one asked for, else native, else triton, else reference.

    Raises:
        ValueError: an unknown engine.
        RuntimeError: the engine that was asked for is missing here; says why and what to do.
    """
    if requested is not None and requested not in NAMES:
        raise ValueError(f"Invalid engine: {requested!r} (choose one of None, {', '.join(map(repr, NAMES))})")
    table = engines()
    for name in NAMES if requested is None else (requested,):
        state = table[name].get(device_type, table[name].get("any", f"does not serve {device_type} tensors"))
        if state == _AVAILABLE:
            if name == "reference" and requested is None and native.load_error is not None:
                _warn_once(native.load_error)
            return name
    raise RuntimeError(
        f"engine={requested!r} is not available for {device_type} tensors: {state}."
        " Leave engine=None to let rvsm_kernels choose, or see python -m rvsm_kernels"
    )
