"""FSDP, which gathers shards for a forward pass, and may keep what it has gathered until the next backward pass.

Whoever writes to the shards in between must let it gather them anew: else a forward pass sees what was there before.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from ..method.parameters import is_flattened
from .shards import is_sharded

Groups = Sequence[dict[str, Any]]


def has_flat_params(param_groups: Groups) -> bool:
    """Whether FSDP1 has flattened any parameter."""
    return any(is_flattened(p) for group in param_groups for p in group["params"])


@contextlib.contextmanager
def gathered_anew(model: nn.Module | None, param_groups: Groups) -> Iterator[None]:
    """Forward passes inside see the weights that the parameters hold there, and those afterwards what they hold then.

    Args:
        model: None: all models that FSDP2 has sharded are meant.

    Raises:
        RuntimeError: FSDP1 without the model, for its modules cannot be found.
    """
    if has_flat_params(param_groups) and model is None:
        raise RuntimeError(
            "sparse_weights() needs the model under FullyShardedDataParallel, which would show the weights that it has"
            " gathered before: optimizer.sparse_weights(model)"
        )
    forget_gathered(model, param_groups)
    try:
        yield
    finally:
        forget_gathered(model, param_groups)


def forget_gathered(model: nn.Module | None, param_groups: Groups) -> None:
    """Let FSDP forget what it has gathered, where any parameter is sharded."""
    if has_flat_params(param_groups) and model is not None:
        from torch.distributed.fsdp import FullyShardedDataParallel

        for module in FullyShardedDataParallel.fsdp_modules(model):
            if module._handle is not None:
                module._handle.reshard(True)  # there is no public call for it
    if any(is_sharded(p) for group in param_groups for p in group["params"]):
        for module in _sharded_modules(model):
            module.reshard()


def _sharded_modules(model: nn.Module | None) -> Iterable[Any]:
    """The modules that FSDP2 has sharded: of a model, or all that there are."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return []
    if model is not None:
        return [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]
    from torch.distributed import _composable_state

    return [module for module in list(_composable_state._module_state_mapping) if isinstance(module, fsdp.FSDPModule)]
