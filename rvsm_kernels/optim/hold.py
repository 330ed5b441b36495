"""Zeros that stay: where holding begins, and what it takes around an optimizer that is not ours.

``hold_zeros`` is an option of a param group, and no mask is kept: an element that is 0 when a step begins is 0 when it
ends, and so are its states: in the pass of an engine its gradient and states count as 0 (``csrc/math/split.h``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..dist.shards import is_of_shards, placed_like, shard_of
from ..method.memory import kind_of
from ..method.parameters import is_left_alone
from ..method.precision import master_of

if TYPE_CHECKING:
    from .split_optimizer import SplitOptimizer


def _held_params(optimizer: SplitOptimizer) -> Iterator[tuple[Tensor, Mapping[str, Any]]]:
    """The parameters whose zeros are held, each once, with their groups."""
    seen: set[int] = set()
    for group in optimizer.param_groups:
        for p in group["params"] if group["hold_zeros"] else ():
            if id(p) not in seen and p.requires_grad and not is_left_alone(p) and p.numel() > 0:
                seen.add(id(p))
                yield p, group


def _zeros_of(optimizer: SplitOptimizer, p: Tensor, group: Mapping[str, Any]) -> Tensor:
    """Where a weight of a parameter is 0; of a DTensor in its shard."""
    zeros = shard_of(p.detach()) == 0
    states = optimizer._states
    master = master_of(p, group, states[p]) if p in states else None
    if master is not None:  # the weight behind a half type may be smaller than its smallest number
        zeros &= shard_of(master) == 0
    return zeros


def _clear_(t: Tensor, p: Tensor, zeros: Tensor) -> None:
    """t <- 0 where the weights are: t has the shape of the parameter, and its placements or others."""
    if is_of_shards(p) and is_of_shards(t) and tuple(t.placements) != tuple(p.placements):  # type: ignore[attr-defined]
        placed = placed_like(t, p).clone()
        shard_of(placed).masked_fill_(zeros, 0)
        t.copy_(placed_like(placed, t))
        return
    shard_of(t).masked_fill_(zeros, 0)


def penalised_groups(optimizer: SplitOptimizer) -> list[dict[str, Any]]:
    """The groups whose zeros :meth:`SplitOptimizer.sparsify_` holds.

    Raises:
        ValueError: one whose zeros cannot be held: an AdamW whose eps is 0.
    """
    groups = []
    for i, group in enumerate(optimizer.param_groups):
        if group["penalty"] is not None:
            try:
                optimizer._validate({**group, "hold_zeros": True})
            except ValueError as error:
                raise ValueError(f"group {i}: {error}") from None
            groups.append(group)
    return groups


@torch.no_grad()
def begin_to_hold(optimizer: SplitOptimizer) -> None:
    """Hold the zeros of all groups with a penalty from now on; the states of what is 0 become 0."""
    for held in penalised_groups(optimizer):
        held["hold_zeros"] = True
    for p, group in _held_params(optimizer):
        zeros = _zeros_of(optimizer, p, group)
        for states in {id(s[p]): s[p] for s in (optimizer.state, optimizer._states) if p in s}.values():
            for name, state in states.items():
                # A quantized state of another library is left: its step is taken back.
                plain = isinstance(state, Tensor) and (kind_of(state) is None or is_of_shards(state))
                if plain and state.shape == p.shape and state.is_floating_point() and name != "step":
                    _clear_(state, p, zeros)


@torch.no_grad()
def clear_gradients(optimizer: SplitOptimizer) -> None:
    """p.grad <- 0 where a weight is held, as the pull does it in its pass."""
    for p, group in _held_params(optimizer):
        if p.grad is not None:
            _clear_(p.grad, p, _zeros_of(optimizer, p, group))


class TakenBack:
    """What an optimizer inside an :class:`RVSMWrapper` writes into zeros that are held: it is taken back.

    The pull has set their gradients to 0, but an unknown optimizer may do anything there.
    """

    def __init__(self, optimizer: SplitOptimizer) -> None:
        """To be made before the step of the optimizer inside."""
        self._held = [(p, _zeros_of(optimizer, p, group)) for p, group in _held_params(optimizer) if p.grad is not None]

    def after_step(self) -> None:
        """The zeros are zeros again."""
        for p, zeros in self._held:
            shard_of(p.detach()).masked_fill_(zeros, 0)
