"""The network inside the modules that others put around it, and tensors that are the same memory."""

from __future__ import annotations

import sys
from collections.abc import Hashable

import torch
from torch import Tensor, nn


def unwrapped(model: nn.Module, what: str) -> nn.Module:
    """The network itself inside DDP, ``nn.DataParallel`` and what ``torch.compile`` returns, however deep.

    Args:
        what: the function that asks, for the message.

    Raises:
        TypeError: something else than a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{what} takes a module, but got a {type(model).__name__}")
    compiled = getattr(sys.modules.get("torch._dynamo"), "OptimizedModule", ())
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(model, compiled):
            model = model._orig_mod
        else:
            return model


def memory_key(t: Tensor) -> Hashable:
    """A key that two tensors share if they are the same elements of the same memory; of no memory, the object itself.

    Only for tensors that are alive together: memory that is freed is given out anew.
    """
    if t.layout != torch.strided or t.numel() == 0 or t.device.type == "meta" or t.data_ptr() == 0:
        return id(t)
    return t.device, t.data_ptr(), t.dtype, tuple(t.shape), t.stride()
