"""Tensors as the Triton kernels need them: dense, in one dtype, on the current device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ...method.groups import is_dense
from ...method.precision import join, store, store_rounded


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


class StagedWeights:
    """The weights of a half-type parameter as float32, where they stand behind it or are rounded stochastically.

    Args:
        p: the parameter.
        master: the state behind it, or None.
        random: (seed, counter) of the rounding, None for the nearest. The launch between :meth:`load` and :meth:`store`
            counts its step.
    """

    def __init__(self, p: Tensor, master: Tensor | None, random: tuple[int, Tensor] | None) -> None:
        self._p, self._master, self._random = p, master, random
        self.dense = torch.empty_like(p, dtype=torch.float32)

    def load(self) -> None:
        """Fill the copy."""
        self.dense.copy_(join(self._p, self._master))

    def store(self) -> None:
        """Bring the copy back."""
        if self._random is None:
            store(self._p, self.dense, self._master)
        else:
            seed, counter = self._random
            store_rounded(self._p, self.dense, seed, counter - 1)
