"""What the callbacks share: u in the weights between two hooks of a framework, and the numbers that are logged."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn


class HeldSparseWeights:
    """Puts u into the weights at one call and w back at another.

    ``optimizer.sparse_weights()`` gives w back at the end of a ``with`` block. A framework calls one hook before a
    validation and another after it, and this object is what both know.
    """

    def __init__(self) -> None:
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
