"""Other ways to a share of zeros, for ``python -m bench accuracy``: magnitude pruning at once and in steps, and PAT.

Each is led along the same curve as ``rk.SparsitySchedule`` (Zhu & Gupta, arXiv 1710.01878), looked up every
:data:`EVERY` steps. Elements are compared by magnitude over all tensors, channels (``group_dim`` 1) by norm within
each: norms of layers with more outputs are larger, and one cut over all would take the last layers whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .baselines import import_pat

EVERY = 16


@dataclass(frozen=True)
class Curve:
    """share * (1 - (1 - t)^3), t from 0 at the step ``begin`` to 1 at ``end``."""

    share: float
    begin: int
    end: int

    def at(self, step: int) -> float:
        t = min(max((step - self.begin) / (self.end - self.begin), 0.0), 1.0)
        return self.share * (1 - (1 - t) ** 3)

    def is_due(self, step: int) -> bool:
        """Whether the zeros are looked up after so many steps: never after ``end``."""
        return self.begin <= step <= self.end and ((step - self.begin) % EVERY == 0 or step == self.end)


def _above(scores: Sequence[Tensor], share: float) -> list[Tensor]:
    """Where scores are not among the share of the smallest of all."""
    everything = torch.cat([s.flatten() for s in scores])
    zeros = round(share * everything.numel())
    if zeros == 0:
        return [torch.ones_like(s, dtype=torch.bool) for s in scores]
    cut = torch.kthvalue(everything, zeros).values
    return [s > cut for s in scores]


def _norms(w: Tensor) -> Tensor:
    return torch.linalg.vector_norm(w, dim=[d for d in range(w.dim()) if d != 1], keepdim=True)


@torch.no_grad()
def masks(weights: Sequence[Tensor], share: float, groups: bool, each: bool = False) -> list[Tensor]:
    """What survives where the share of the smallest goes to zero, in a shape that broadcasts over each weight.

    Args:
        each: the share of each tensor, as always of groups, in the place of that of all together.
    """
    scores = [_norms(w) if groups else w.abs() for w in weights]
    return [_above([s], share)[0] for s in scores] if groups or each else _above(scores, share)


@torch.no_grad()
def prune_(weights: Sequence[Tensor], share: float, groups: bool) -> None:
    """One-shot magnitude pruning."""
    for w, mask in zip(weights, masks(weights, share, groups), strict=True):
        w.mul_(mask)


class Gradual:
    """Gradual magnitude pruning: masks that grow along the curve, applied after every step, and stay from its end on.

    What is masked is 0 and remains the smallest, so that no weight comes back.
    """

    def __init__(self, weights: Sequence[Tensor], curve: Curve, groups: bool, each: bool = False) -> None:
        self._weights, self._curve, self._how = weights, curve, (groups, each)
        self._masks = masks(weights, 0.0, *self._how)
        self._steps = 0

    @torch.no_grad()
    def step(self) -> None:
        self._steps += 1
        if self._curve.is_due(self._steps):
            self._masks = masks(self._weights, self._curve.at(self._steps), *self._how)
        torch._foreach_mul_(list(self._weights), self._masks)


def pat(
    base: type[torch.optim.Optimizer],
    weights: Sequence[Tensor],
    rest: Sequence[Tensor],
    options: dict[str, Any],
    curve: Curve,
    groups: bool,
    lasso: bool,
) -> torch.optim.Optimizer:
    """``torchao.prototype.pat`` around a base: a proximal map of latent weights after each step, then "healing".

    Gradients are those at the pruned weights and move the latent ones. From the end of the curve on zeros are frozen.

    Args:
        lasso: the proximal map of l1, whose strength :class:`LedLasso` sets; else PAT's own constraint of a least
            sparsity, along PAT's own curve, which is the same cubic one.
    """
    penalised: dict[str, Any] = {"params": list(weights)}
    if lasso:
        penalised |= {"prox_type": "ProxLasso", "group_type": "ElemGrouper"}
    else:
        penalised |= {"min_sparsity": curve.share, "min_sparsity_schedule": True}
        if groups:
            penalised |= {"prox_type": "MinSparsityConstraint", "group_type": "Dim1Grouper"}
        else:
            penalised |= {"prox_type": "GlobalMinSparsityConstraint", "group_type": "KElementGrouper", "k": 1}
    inner = base([penalised, {"params": list(rest)}], **options)
    optimizer: torch.optim.Optimizer = import_pat()(inner, warmup_steps=curve.begin, healing_start_step=curve.end)
    return optimizer


class LedLasso:
    """Leads ``reg_lambda`` of PAT's lasso, so that the share of zeros follows the curve: PAT has no such schedule."""

    def __init__(self, optimizer: torch.optim.Optimizer, curve: Curve) -> None:
        self._optimizer, self._curve, self._steps = optimizer, curve, 0

    @torch.no_grad()
    def step(self) -> None:
        self._steps += 1
        if not (self._curve.is_due(self._steps + 1) or self._steps == self._curve.begin):
            return
        group = self._optimizer.param_groups[0]
        latent = torch.cat([self._optimizer.state[p].get("latent", p).abs().flatten() for p in group["params"]])
        zeros = round(self._curve.at(self._steps + 1) * latent.numel())
        cut = float(torch.kthvalue(latent, zeros).values) if zeros else 0.0
        gamma = group["gamma"] + group["lr"]  # PAT's threshold is reg_lambda times the sum of the learning rates
        group["reg_lambda"] = math.nextafter(cut, math.inf) / gamma
