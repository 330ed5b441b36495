"""What the callbacks share: u in the weights between two hooks of a framework, and the numbers that are logged."""

from __future__ import annotations

import contextlib
import copy
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Sampler, SequentialSampler

from ..method.options import shown
from ..model.recalibrate import check_batches, recalibrate


class Recalibration:
    """The running statistics of batch norms for u: what a callback is given as ``recalibrate`` and ``batches``.

    Args:
        loader: None or False: they stay those of w. True: from the training's data, in an order of its own. Batches as
            :func:`rvsm_kernels.recalibrate` takes them: from these, each time anew.
        batches: at most so many; None takes all.

    Raises:
        ValueError: batches below 1, or without a loader; an iterator, which is used up the first time.
        TypeError: something else.
    """

    def __init__(self, loader: Iterable[Any] | bool | None, batches: int | None) -> None:
        check_batches(batches)
        self._loader = None if loader is False else loader
        self._batches = batches
        if self._loader is None and batches is not None:
            raise ValueError("batches is a number of batches of recalibrate: give that too, True or a loader")
        if self._loader is not None and self._loader is not True:
            if not isinstance(self._loader, Iterable):
                raise TypeError(f"recalibrate takes True or batches, as a DataLoader gives them, not {shown(loader)}")
            if iter(self._loader) is self._loader:
                raise ValueError("recalibrate needs a loader that begins anew each time, not an iterator")

    @property
    def is_on(self) -> bool:
        """Whether there is anything to do."""
        return self._loader is not None

    def run(
        self,
        model: nn.Module,
        training: Callable[[], tuple[Any, int]],
        convert: Callable[[Any], Any] = lambda batch: batch,
    ) -> None:
        """Estimate the statistics of a model for the weights that it holds; random states are as before.

        Args:
            training: gives the loader of the training and the size of its batches.
            convert: what becomes of a batch before the model gets it.
        """
        if self.is_on:
            with _random_states_kept():
                loader = _anew(*training()) if self._loader is True else self._loader
                recalibrate(model, map(convert, loader), self._batches)  # type: ignore[arg-type]


def _anew(loader: Any, size: int) -> DataLoader[Any]:
    """Another loader of the same data: neither the iterator of the training nor its order moves."""
    dataset = getattr(loader, "dataset", None)
    if dataset is None or isinstance(dataset, IterableDataset):
        raise ValueError(
            "recalibrate=True needs one training loader, of data with a length: give recalibrate a loader of its own"
        )
    generator = torch.Generator().manual_seed(0)
    order: dict[str, Any] = {"shuffle": True, "generator": generator}
    sampler = copy.copy(getattr(loader, "sampler", None))
    if isinstance(sampler, Sampler) and not isinstance(sampler, SequentialSampler):  # it may take a part of the data
        if hasattr(sampler, "generator"):
            sampler.generator = generator
        order = {"sampler": sampler}
    collate, drop_last = getattr(loader, "collate_fn", None), bool(getattr(loader, "drop_last", False))
    return DataLoader(dataset, batch_size=size, drop_last=drop_last, collate_fn=collate, **order)


@contextlib.contextmanager
def _random_states_kept() -> Iterator[None]:
    """What reads data may draw random numbers (augmentation), which the training must not miss."""
    numpy = sys.modules.get("numpy")
    of_python, of_numpy = random.getstate(), None if numpy is None else numpy.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(of_python)
            if numpy is not None:
                numpy.random.set_state(of_numpy)


class HeldSparseWeights:
    """Puts u into the weights at one call and w back at another.

    ``optimizer.sparse_weights()`` gives w back at the end of a ``with`` block. A framework calls one hook before a
    validation and another after it, and this object is what both know.

    Args:
        then: called with the model once it holds u; what it does to running statistics is undone with u.
    """

    def __init__(self, then: Callable[[nn.Module], None] | None = None) -> None:
        self._then = then
        self._stack: contextlib.ExitStack | None = None

    @property
    def is_open(self) -> bool:
        """Whether the weights are u now."""
        return self._stack is not None

    def open(self, optimizers: Sequence[Any], model: nn.Module | None) -> None:
        """Put u into the weights of these optimizers, which may be none."""
        self.close()
        with contextlib.ExitStack() as stack:
            for optimizer in optimizers:
                stack.enter_context(_average(optimizer))
                stack.enter_context(optimizer.sparse_weights(model))
            if optimizers and model is not None and self._then is not None:
                self._then(model)
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Put w back. Does nothing where the weights are w."""
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.close()

    @contextlib.contextmanager
    def holding(self, u: bool, optimizers: Sequence[Any], model: nn.Module | None) -> Iterator[None]:
        """u (True) or w (False) for the body of a ``with``, and afterwards what was there before."""
        before = self.is_open
        if u == before:
            yield
            return
        self._switch(u, optimizers, model)
        try:
            yield
        finally:
            self._switch(before, optimizers, model)

    def _switch(self, u: bool, optimizers: Sequence[Any], model: nn.Module | None) -> None:
        if u:
            self.open(optimizers, model)
        else:
            self.close()


def _holds_no_average(optimizer: Any) -> bool:
    """Whether the weights are not yet schedulefree's average, of which u is evaluated and shipped."""
    groups = optimizer.param_groups
    return bool(groups and groups[0].get("train_mode"))


@contextlib.contextmanager
def _average(optimizer: Any) -> Iterator[None]:
    """schedulefree's average, inside an RVSMWrapper; nothing changes for other optimizers."""
    if not _holds_no_average(optimizer):
        yield
        return
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()


def sparsify(optimizers: Sequence[Any]) -> None:
    """w <- u for good; of the average, where there is one."""
    for optimizer in optimizers:
        if _holds_no_average(optimizer):
            optimizer.eval()
        optimizer.sparsify_()


def share_of_zeros(optimizers: Sequence[Any]) -> float:
    """The share of zeros of u among the penalised weights of all optimizers."""
    totals = [optimizer.sparsity().total for optimizer in optimizers]
    return sum(total.zeros for total in totals) / max(1, sum(total.numel for total in totals))


def measured(optimizers: Sequence[Any], loss: float | None) -> dict[str, float]:
    """What is logged of the weights as they are now.

    Args:
        loss: of the same step, if there is one to be had.

    Returns:
        ``sparsity``: the share of zeros; ``penalty_value``: lam P(u) + beta/2 ||w - u||^2; ``L_beta``: loss and penalty
        together.
    """
    penalty = sum(float(optimizer.penalty_value()) for optimizer in optimizers)
    numbers = {"sparsity": share_of_zeros(optimizers), "penalty_value": penalty}
    return numbers if loss is None else {**numbers, "L_beta": loss + penalty}
