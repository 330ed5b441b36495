"""Tensors as the Triton kernels need them: dense, in one dtype, on the current device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from .groups import GroupDim, GroupView, group_view, kept_dims


@contextlib.contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Triton launches on the current device."""
    if device.type == "cpu":
        yield
        return
    module = torch.get_device_module(device)
    if module.current_device() == device.index:
        yield
        return
    with module.device(device):
        yield


def is_dense(t: Tensor) -> bool:
    """Whether the elements fill their memory, in any order of the dimensions, each once."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def same_layout(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors put every element at the same offset."""
    return x.shape == y.shape and all(a == b for a, b, n in zip(x.stride(), y.stride(), x.shape, strict=True) if n != 1)


def _plain(t: Tensor) -> bool:
    return not t.is_neg() and not t._is_zerotensor()


class Staged:
    """A tensor as the kernels need it: itself, or a dense copy to load before and to store after."""

    def __init__(self, tensor: Tensor, dtype: torch.dtype, like: Tensor | None = None) -> None:
        self.tensor = tensor
        fits = tensor.dtype == dtype and _plain(tensor)
        if like is None:
            fits = fits and is_dense(tensor)
            self.dense = tensor if fits else torch.empty_like(tensor, dtype=dtype)
        else:
            fits = fits and same_layout(tensor, like)
            self.dense = tensor if fits else torch.empty_like(like, dtype=dtype)

    @property
    def is_copy(self) -> bool:
        """Whether the kernels work on a copy."""
        return self.dense is not self.tensor

    def load(self) -> None:
        """Fill the copy."""
        if self.is_copy:
            self.dense.copy_(self.tensor)

    def store(self) -> None:
        """Bring the copy back."""
        if self.is_copy:
            self.tensor.copy_(self.dense)


def view_of(dense: Tensor, group_dim: GroupDim) -> GroupView | None:
    """The groups of a dense tensor, None for elements and for no elements.

    Raises:
        ValueError: they do not collapse in memory.
    """
    kept = kept_dims(group_dim, dense.dim())
    return None if kept is None or dense.numel() == 0 else group_view(dense.shape, dense.stride(), kept)
