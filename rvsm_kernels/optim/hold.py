"""Zeros that stay: the fixed support of :class:`SparsitySchedule` with ``hold=True``, in plain torch operations.

No mask is kept: an element that is 0 when a step begins is 0 when it ends. Its gradient and its states are 0, and then
every base leaves it at 0: lr, momentum and weight decay multiply it, and no method pulls while lam is 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..dist.gathered import has_flat_params
from ..dist.shards import is_of_shards, placed_like, shard_of
from ..method.memory import kind_of
from ..method.parameters import is_left_alone
from ..method.precision import master_of
from .split_optimizer import SplitOptimizer
from .wrapper import RVSMWrapper


def check(optimizer: SplitOptimizer) -> None:
    """Raise where zeros could not be held.

    Raises:
        ValueError: FSDP1; an AdamW whose eps is 0, for it divides 0 by 0 where the moments are 0.
    """
    if has_flat_params(optimizer.param_groups):
        raise ValueError(
            "hold=True: FullyShardedDataParallel cannot be told to gather weights anew: shard with fully_shard (FSDP2)"
        )
    for i, group in enumerate(optimizer.param_groups):
        if group["penalty"] is not None and group.get("eps", 1.0) == 0:
            raise ValueError(f"group {i}: hold=True needs an eps above 0: the step is 0 / eps where the moments are 0")


def _led(optimizer: SplitOptimizer) -> Iterator[tuple[Tensor, Mapping[str, Any]]]:
    """The parameters whose zeros are held, each once, with their groups."""
    seen: set[int] = set()
    for group in optimizer.param_groups:
        for p in group["params"] if group["penalty"] is not None else ():
            if id(p) not in seen and p.requires_grad and not is_left_alone(p) and p.numel() > 0:
                seen.add(id(p))
                yield p, group


def _kept(optimizer: SplitOptimizer, p: Tensor, group: Mapping[str, Any]) -> Tensor:
    """1 where a weight of a parameter is not 0, else 0, in its type; of a DTensor its shard.

    Numbers in the place of a bool: torch's loops over bool are not vectorized, and cost three times as much.
    """
    w = shard_of(p.detach())
    kept = torch.ne(w, 0, out=torch.empty_like(w))
    states = optimizer._states
    master = master_of(p, group, states[p]) if p in states else None
    if master is not None:  # the weight behind a half type may be smaller than its smallest number
        kept = torch.maximum(kept, torch.ne(shard_of(master), 0, out=torch.empty_like(w)))
    return kept


def _clear_(t: Tensor, p: Tensor, kept: Tensor) -> None:
    """t <- 0 where the weights are: t has the shape of the parameter, and its placements or others. NaN stays NaN."""
    if is_of_shards(p) and is_of_shards(t) and tuple(t.placements) != tuple(p.placements):  # type: ignore[attr-defined]
        placed = placed_like(t, p).clone()
        shard_of(placed).mul_(kept)
        t.copy_(placed_like(placed, t))
        return
    shard_of(t).mul_(kept)


@torch.no_grad()
def begin(optimizer: SplitOptimizer) -> None:
    """w <- u for good, and the states of what is 0 become 0."""
    optimizer.sparsify_()
    for p, group in _led(optimizer):
        kept = _kept(optimizer, p, group)
        for states in {id(s[p]): s[p] for s in (optimizer.state, optimizer._states) if p in s}.values():
            for state in states.values():
                # A quantized state of another library is left: its step is undone by what :meth:`Hold.after_step` does.
                plain = isinstance(state, Tensor) and (kind_of(state) is None or is_of_shards(state))
                if plain and state.shape == p.shape and state.is_floating_point():
                    _clear_(state, p, kept)


@torch.no_grad()
def _clear_gradients(optimizer: SplitOptimizer) -> list[tuple[Tensor, Tensor]]:
    """p.grad <- 0 where a weight is 0; returns (parameter, 1 where it is not 0)."""
    held = []
    for p, group in _led(optimizer):
        if p.grad is not None and p.grad.layout == torch.strided:
            kept = _kept(optimizer, p, group)
            _clear_(p.grad, p, kept)
            held.append((p, kept))
    return held


class Hold:
    """Holds zeros from step to step: the two hooks of :class:`SparsitySchedule`.

    An optimizer inside an :class:`RVSMWrapper` may do anything where its gradient is 0, so that what it wrote there is
    taken back after its step.
    """

    def __init__(self) -> None:
        self._held: list[tuple[Tensor, Tensor]] = []  # within a step of a wrapper

    def before_step(self, optimizer: SplitOptimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Clear the gradients, or those that a closure makes: a step hook of torch, which may change the arguments."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            self._clear(optimizer)
            return None

        def cleared(*a: Any, **k: Any) -> Any:
            loss = closure(*a, **k)
            self._clear(optimizer)
            return loss

        if len(args) > 1:
            return (args[0], cleared, *args[2:]), kwargs
        return args, {**kwargs, "closure": cleared}

    def _clear(self, optimizer: SplitOptimizer) -> None:
        held = _clear_gradients(optimizer)
        self._held = held if isinstance(optimizer, RVSMWrapper) else []

    @torch.no_grad()
    def after_step(self) -> None:
        """Take back what an unknown optimizer wrote into what is held."""
        for p, kept in self._held:
            shard_of(p.detach()).mul_(kept)
        self._held = []
