"""FSDP1, whose flat parameters are gathered for a forward pass and kept until the next backward pass frees them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..method.parameters import is_flattened


def has_flat_params(param_groups: list[dict[str, Any]]) -> bool:
    """Whether FSDP1 has flattened any parameter."""
    return any(is_flattened(p) for group in param_groups for p in group["params"])


@contextlib.contextmanager
def gathered_anew(model: nn.Module | None) -> Iterator[None]:
    """Forward passes inside see the weights that the parameters hold there, and those afterwards what they hold then.

    FSDP1 has no public call that makes it forget what it has gathered.

    Raises:
        RuntimeError: without the model, its modules cannot be found.
    """
    if model is None:
        raise RuntimeError(
            "sparse_weights() needs the model under FullyShardedDataParallel, which would show the weights that it has"
            " gathered before: optimizer.sparse_weights(model)"
        )
    _forget(model)
    try:
        yield
    finally:
        _forget(model)


def _forget(model: nn.Module) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    for module in FullyShardedDataParallel.fsdp_modules(model):
        if module._handle is not None:
            module._handle.reshard(True)
