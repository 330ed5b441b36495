"""What an optimizer asks of an engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .method.memory import refuse
from .options import param_name, refuse_expanded, validate_param

Group = MutableMapping[str, Any]


class Engine(ABC):
    """Who does the arithmetic. One object belongs to one optimizer."""

    name: str

    @abstractmethod
    def prepare(
        self,
        groups: Sequence[Group],
        state: MutableMapping[Tensor, Any],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        kept: Mapping[Tensor, Tensor],
        cuts: Mapping[Tensor, Tensor],
    ) -> bool:
        """Check everything that a step over these groups needs; change nothing.

        Args:
            kept: what the methods of split parameters keep (u or dual), to be read and written by the step.
            cuts: of parameters with top-k: a number in the arithmetic type, which is there when the step is launched.

        Returns False if a parameter that has a gradient is none that this engine serves.
        """

    @abstractmethod
    def launch(self) -> None:
        """Do the step that was prepared."""

    def step(self, groups: Sequence[Group], *inputs: Any) -> bool:
        """:meth:`prepare` with these arguments, and :meth:`launch` if that returned True."""
        ready = self.prepare(groups, *inputs)
        if ready:
            self.launch()
        return ready

    def drop(self) -> None:  # noqa: B027 - not every engine holds something
        """Forget what was prepared and let go of its tensors."""

    def check(self, p: Tensor, group: Mapping[str, Any], name: str) -> None:  # noqa: B027 - most need none
        """Raise ValueError if the groups of a parameter are none that this engine can reduce."""

    @abstractmethod
    def prox_(self, params: Sequence[Tensor], group: Mapping[str, Any]) -> None:
        """w <- prox_{tau P}(w) in place, for parameters of one split group."""

    @abstractmethod
    def penalty_value(self, params: Sequence[Tensor], group: Mapping[str, Any]) -> Tensor:
        """lam P(u) + beta/2 ||w - u||^2 over the parameters of one split group, 0-dim float64."""


def check_gradient(
    p: Tensor, state: Mapping[Tensor, Any], group: Mapping[str, Any], i: int, j: int, memory: bool = False
) -> None:
    """Raise if the gradient or the momentum of a parameter cannot be used; nothing is changed.

    Args:
        memory: the parameter has memory of its own, and all that stands beside it must have it too.
    """
    grad, name = p.grad, param_name(group, i, j)
    assert grad is not None
    if grad.layout != torch.strided:
        raise RuntimeError(f"RVSM does not support sparse gradients ({name} has layout {grad.layout})")
    if grad.is_complex():
        raise RuntimeError(f"RVSM does not support complex gradients ({name})")
    if grad.shape != p.shape:
        raise RuntimeError(f"the gradient of {name} has shape {list(grad.shape)}, the parameter {list(p.shape)}")
    if grad.device != p.device:
        raise RuntimeError(f"the gradient of {name} is on {grad.device}, the parameter on {p.device}")
    refuse_expanded(p, name)
    validate_param(p, group, name)
    if memory:
        refuse(p, name)
        refuse(grad, f"the gradient of {name}")
    buffer = state[p].get("momentum_buffer") if p in state else None
    if not group["momentum"] or buffer is None:
        return
    if memory:
        refuse(buffer, f"the momentum_buffer of {name}")
    if (buffer.shape, buffer.device) != (p.shape, p.device) or not buffer.is_floating_point():
        raise RuntimeError(
            f"the momentum_buffer of {name} is {buffer.dtype} {list(buffer.shape)} on {buffer.device},"
            f" the parameter {p.dtype} {list(p.shape)} on {p.device}"
        )
