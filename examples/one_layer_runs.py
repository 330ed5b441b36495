"""Many runs of rk.RVSM on the one-layer network at once, and what the papers measure along a run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import rvsm_kernels as rk
from one_layer_model import angle, population_gradient, population_loss

K = 2
PENALTY_STRENGTH: dict[str, Any] = {"lam": 1e-4, "beta": 4e-3, "a": 1.0}
"""The setting of Tables 1-3 and Figure 7 of arXiv 1812.05719."""

PENALTIES = ("l0", "tl1", "l1")
CONVERGED = 1e-12
Options = dict[str, Any]
Gradient = Callable[[Tensor, Tensor], Tensor]
Loss = Gradient
relu_gradient: Gradient = functools.partial(population_gradient, k=K)
relu_loss: Loss = functools.partial(population_loss, k=K)


def random_directions(count: int, d: int, generator: torch.Generator) -> Tensor:
    """Uniform on the unit sphere, ``(count, d)``, float64."""
    x = torch.randn(count, d, generator=generator, dtype=torch.float64)
    return x / x.norm(dim=1, keepdim=True)


def at_angle(target: Tensor, theta: float | Tensor, generator: torch.Generator) -> Tensor:
    """Random unit vectors at the given angle to unit targets ``(count, d)``."""
    across = random_directions(len(target), target.shape[1], generator)
    across -= (across * target).sum(1, keepdim=True) * target
    across /= across.norm(dim=1, keepdim=True)
    theta = torch.as_tensor(theta, dtype=target.dtype).reshape(-1, 1)
    return theta.cos() * target + theta.sin() * across


def penalty_of(u: Tensor, name: str, a: float) -> Tensor:
    """P(u) of each row, ``(rows,)``."""
    r = u.abs()
    elements = {"l0": (r > 0).to(r.dtype), "l1": r, "tl1": (a + 1) * r / (a + r)}[name]
    return elements.sum(1)


class Ensemble:
    """The same problems under several options, all in one optimizer.

    Row i of ``w`` is a parameter of its own, because ``unit_norm`` belongs to a whole tensor; so are the rows of the
    gradient, and a step of all of them costs one gradient in closed form and one call of the optimizer.

    Args:
        target: w*, ``(count, d)``.
        start: w^0, ``(count, d)``.
        options: one param group each, for all problems: rows ``j * count`` to ``(j + 1) * count`` have options j.
        gradient: of (w, w*), row by row.
        make: what makes the optimizer from the param groups; rk.RVSM unless told otherwise.
    """

    def __init__(
        self,
        target: Tensor,
        start: Tensor,
        options: Sequence[Options],
        gradient: Gradient = relu_gradient,
        make: Callable[[list[Options]], rk.RVSM | rk.AdaptiveHardThreshold] = rk.RVSM,
    ) -> None:
        count = len(target)
        self.options = [{**PENALTY_STRENGTH, **o} if "penalty" in o else dict(o) for o in options]
        self.target, self.w = target.repeat(len(options), 1), start.repeat(len(options), 1)
        self._gradient, self._grad = gradient, torch.zeros_like(self.w)
        params = [nn.Parameter(row) for row in self.w]
        for p, row in zip(params, self._grad, strict=True):
            p.grad = row
        self._rows = [slice(j * count, (j + 1) * count) for j in range(len(options))]
        groups = [{"params": params[rows], **o} for rows, o in zip(self._rows, self.options, strict=True)]
        self.optimizer = make(groups)

    def step(self) -> Tensor:
        """One step of every run. Returns ||w^{t+1} - w^t||, ``(rows,)``."""
        before = self.w.clone()
        self._grad.copy_(self._gradient(self.w, self.target))
        self.optimizer.step()
        return (self.w - before).norm(dim=1)

    def converge(self, max_steps: int = 20_000, tolerance: float = CONVERGED) -> int:
        """Step until no row moves by more than the tolerance. Returns the number of steps.

        Raises:
            RuntimeError: some row still moves after ``max_steps``.
        """
        for t in range(1, max_steps + 1):
            change = self.step().max().item()
            if change <= tolerance:
                return t
        raise RuntimeError(f"not converged: a weight vector still moves by {change:.1e} after {max_steps} steps")

    def split(self, x: Tensor) -> list[Tensor]:
        """A tensor with one entry for each row, divided by options."""
        return [x[rows] for rows in self._rows]

    def u(self, w: Tensor | None = None) -> Tensor:
        """prox(w) of these or of other weights, each row by its options, ``(rows, d)``."""
        parts = self.split(self.w if w is None else w)
        return torch.cat(
            [
                rk.prox(part.contiguous(), o["penalty"], o["lam"] / o["beta"], o["a"])
                for part, o in zip(parts, self.options, strict=True)
            ]
        )

    def lagrangian(self, loss: Loss = relu_loss) -> Tensor:
        """L_beta(w, u) = f(w) + lam P(u) + beta/2 ||w - u||^2 (3.9) with u = prox(w), ``(rows,)``."""
        u = self.u()
        parts = zip(self.split(self.w), self.split(u), self.options, strict=True)
        coupled = [
            o["lam"] * penalty_of(v, o["penalty"], o["a"]) + o["beta"] / 2 * (w - v).square().sum(1)
            for w, v, o in parts
        ]
        return loss(self.w, self.target) + torch.cat(coupled)


@dataclass
class Trace:
    """A run, step by step; row 0 is the start."""

    lagrangian: Tensor
    """L_beta, ``(steps + 1, rows)``."""
    theta: Tensor
    """The angle between w and w*, ``(steps + 1, rows)``."""

    def rise(self, what: str) -> Tensor:
        """The largest increase from one step to the next, ``(rows,)``; negative if there is none."""
        x: Tensor = getattr(self, what)
        return x.diff(dim=0).amax(0)


def trace(
    runs: Ensemble,
    max_steps: int,
    tolerance: float = CONVERGED,
    loss: Loss = relu_loss,
) -> Trace:
    """Step until no row moves by more than the tolerance, at most ``max_steps`` times, and keep every value."""
    values, angles = [runs.lagrangian(loss)], [angle(runs.w, runs.target)]
    for _ in range(max_steps):
        change = runs.step().max()
        values.append(runs.lagrangian(loss))
        angles.append(angle(runs.w, runs.target))
        if change <= tolerance:
            break
    return Trace(torch.stack(values), torch.stack(angles))
