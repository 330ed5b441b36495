"""A case made of tensors: weights with mixed supports, fixed gradients, and the options of the step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .cases import PRECISIONS, Case

LR, MOMENTUM, WEIGHT_DECAY, BETA, A = 1e-3, 0.9, 5e-4, 8e-2, 1.0
DENSITY = 0.5
PATTERN = 2, 4
SGD_OPTIONS: dict[str, Any] = {"lr": LR, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}
ADAMW_OPTIONS: dict[str, Any] = {"lr": LR, "weight_decay": WEIGHT_DECAY}
CUT = 0.05
"""Weights (or group norms) at or below this go to zero in u."""

# A gradient of this size, relative to its tensor, moves a weight by 2e-5 of itself per step (momentum 0.9 makes the
# steady step 10 lr g): after the thousands of steps of a benchmark the supports are still mixed.
_GRADIENT = 2e-3


def strength(penalty: str) -> float:
    """The lam that puts the cut of a penalty at CUT (for tl1 with a = 1 while lam / beta <= 1/4).

    Top-k and N:M have none: lam switches them on.
    """
    return {"topk": 1.0, "nm": 1.0, "l0": BETA * CUT**2 / 2, "l1": BETA * CUT, "tl1": BETA * CUT * A / (A + 1)}[penalty]


@dataclass
class Problem:
    """The tensors of one case; every contender starts from them.

    Attributes:
        grads: shared by the contenders, none of which writes to a gradient.
        reuse: hand out ``weights`` themselves, for a single contender, so that no second copy is in memory.
    """

    case: Case
    device: str
    weights: list[Tensor]
    grads: list[Tensor]
    reuse: bool = False
    penalty_options: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        case = self.case
        self.penalty_options = {
            "penalty": case.penalty,
            "lam": strength(case.penalty),
            "beta": BETA,
            "a": A,
            "group_dim": case.group_dim,
            "method": case.method,
            **({"density": DENSITY, "budget": case.budget} if case.penalty == "topk" else {}),
            **({"pattern": PATTERN} if case.penalty == "nm" else {}),
        }

    def parameters(self) -> list[nn.Parameter]:
        """Fresh parameters in the order of the specs, each with its gradient."""
        params = [nn.Parameter(w if self.reuse else w.clone()) for w in self.weights]
        for p, grad in zip(params, self.grads, strict=True):
            p.grad = grad
        return params

    def divided(self, params: list[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """(penalised, dense) parameters."""
        flags = [spec.penalised for spec in self.case.specs]
        pairs = list(zip(params, flags, strict=True))
        return [p for p, flag in pairs if flag], [p for p, flag in pairs if not flag]

    def groups(self, params: list[nn.Parameter]) -> list[dict[str, Any]]:
        """Param groups as ``rvsm_kernels.param_groups`` makes them."""
        penalised, dense = self.divided(params)
        precision = PRECISIONS[self.case.precision]
        groups: list[dict[str, Any]] = [{"params": penalised, **self.penalty_options, **precision}]
        return groups + ([{"params": dense, "penalty": None, **precision}] if dense else [])


def magnitudes(w: Tensor, group_dim: int | tuple[int, ...] | None) -> Tensor:
    """|w_i|, or the norms of the groups, with reduced dimensions of size 1 so that they broadcast over w."""
    dims = range(w.dim()) if group_dim is None else (group_dim,) if isinstance(group_dim, int) else group_dim
    reduced = [d for d in range(w.dim()) if d not in dims]
    if not reduced:
        return w.abs()
    return torch.linalg.vector_norm(w, dim=reduced, keepdim=True, dtype=torch.float64).to(w.dtype)


def build(case: Case, device: str) -> Problem:
    """The tensors of a case: about half of the penalised weights or groups lie below the cut."""
    generator = torch.Generator(device=device).manual_seed(0)
    dtype = getattr(torch, case.dtype)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    weights, grads = [], []
    for spec in case.specs:
        w = torch.randn(spec.shape, generator=generator, device=device, dtype=work)
        if spec.penalised:
            r = magnitudes(w, case.group_dim).clamp_(min=torch.finfo(work).tiny)
            w *= torch.rand(r.shape, generator=generator, device=device, dtype=work).add_(0.5).mul_(CUT).div_(r)
        else:
            w *= CUT
        g = torch.randn(spec.shape, generator=generator, device=device, dtype=work)
        g *= _GRADIENT * w.square().mean().sqrt()
        weights.append(w.to(dtype))
        grads.append(g.to(dtype))
    return Problem(case, device, weights, grads)
