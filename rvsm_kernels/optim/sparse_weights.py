"""u in the place of the weights while a model is validated: the context of ``optimizer.sparse_weights()``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..dist.gathered import gathered_anew
from ..method.warn import warn
from ..model.recalibrate import NORMS, recalibrate

if TYPE_CHECKING:
    from .split_optimizer import SplitOptimizer


class SparseWeights(contextlib.ContextDecorator):
    """What ``optimizer.sparse_weights()`` returns: the parameters hold u while it is entered.

    Args:
        optimizer: whose u.
        model: whose running statistics are given back.
        frozen: also u of parameters with ``requires_grad=False``.
        recalibrate: None, or batches and how many of them, for running statistics of u.
    """

    def __init__(
        self,
        optimizer: SplitOptimizer,
        model: nn.Module | None,
        frozen: bool,
        recalibrate: tuple[Iterable[Any], int | None] | None = None,
    ) -> None:
        self._arguments = optimizer, model, frozen, recalibrate
        self._entered = False

    def _recreate_cm(self) -> SparseWeights:
        """As a decorator: one object a call."""
        self._entered = True
        return SparseWeights(*self._arguments)

    def __enter__(self) -> None:
        optimizer, model, frozen, batches = self._arguments
        self._entered = True
        view = optimizer._view
        view.refuse_while_open("sparse_weights()")
        with contextlib.ExitStack() as stack:
            stack.enter_context(RunningStatistics(model))
            stack.enter_context(gathered_anew(model, optimizer.param_groups))
            stack.callback(view.give_back)
            view.put_u(frozen)
            if model is not None and batches is not None:
                recalibrate(model, *batches)
            self._open = stack.pop_all()

    def __exit__(self, *error: Any) -> None:
        self._open.close()

    def __del__(self) -> None:
        if not self.__dict__.get("_entered", True):
            warn(
                "sparse_weights() was called without `with`: the parameters still hold w. Write"
                " `with optimizer.sparse_weights(): validate(model)`"
            )


class RunningStatistics(contextlib.AbstractContextManager["RunningStatistics"]):
    """Gives the running statistics of a model's batch norms back, or, without the model, warns when they change."""

    def __init__(self, model: nn.Module | None) -> None:
        norms = [] if model is None else [m for m in model.modules() if isinstance(m, NORMS)]
        self._before = [(b, b.detach().clone()) for m in norms for b in m.buffers(recurse=False)]
        self._has_model = model is not None
        self._seen: set[tuple[bool, int]] = set()
        self._warned = False

    def __enter__(self) -> RunningStatistics:
        if not self._has_model:
            # Called for the outermost module first, also where that is compiled and its parts are not called one by
            # one.
            self._hook = nn.modules.module.register_module_forward_pre_hook(self._before_forward)
        return self

    def _before_forward(self, module: nn.Module, arguments: Any) -> None:
        if self._warned or (module.training, id(module)) in self._seen:
            return
        for m in module.modules():
            self._seen.add((m.training, id(m)))
            if isinstance(m, NORMS) and m.training and m.track_running_stats and not self._warned:
                self._warned = True
                warn(
                    "a forward pass in training mode inside sparse_weights() changes the running statistics of batch"
                    " norms for good: call model.eval() before, or give the model, sparse_weights(model), to get them"
                    " back"
                )

    def __exit__(self, *error: Any) -> None:
        if not self._has_model:
            self._hook.remove()
        with torch.no_grad():
            for buffer, value in self._before:
                buffer.copy_(value)
