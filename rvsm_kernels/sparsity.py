"""Counting zeros: the report of an optimizer's u and of a model as it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .groups import GroupDim, kept_dims, magnitudes
from .modules import penalised_weights

ZERO_NORM = 1e-15
"""A group counts as zero when ||u_G||_2 is below this, as in the papers."""


@dataclasses.dataclass(frozen=True)
class SparsityRow:
    """The zeros of one parameter.

    Attributes:
        name: the parameter's name, or its place in the optimizer.
        shape: its shape.
        zeros, numel: zero elements, all elements.
        zero_groups, groups: groups with ||u_G||_2 < 1e-15, all groups; for elementwise, a group is an element.
    """

    name: str
    shape: tuple[int, ...]
    zeros: int
    numel: int
    zero_groups: int
    groups: int

    @property
    def share(self) -> float:
        """zeros / numel (0 for an empty parameter)."""
        return self.zeros / self.numel if self.numel else 0.0

    @property
    def group_share(self) -> float:
        """zero_groups / groups (0 for an empty parameter)."""
        return self.zero_groups / self.groups if self.groups else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**dataclasses.asdict(self), "share": self.share, "group_share": self.group_share}


class SparsityReport:
    """The zeros of every parameter and in total. ``print`` gives a table, ``to_dict`` plain values for JSON."""

    def __init__(self, rows: Iterable[SparsityRow]) -> None:
        self.rows = list(rows)
        counts = [sum(getattr(r, f) for r in self.rows) for f in ("zeros", "numel", "zero_groups", "groups")]
        self.total = SparsityRow("total", (), *counts)

    @property
    def share(self) -> float:
        """The share of zero elements over all parameters."""
        return self.total.share

    @property
    def group_share(self) -> float:
        """The share of zero groups over all parameters."""
        return self.total.group_share

    def to_dict(self) -> dict[str, Any]:
        """``{"total": row, "parameters": [row, ...]}`` of plain values, for JSON."""
        return {"total": self.total.to_dict(), "parameters": [r.to_dict() for r in self.rows]}

    def __str__(self) -> str:
        width = max(len(r.name) for r in [*self.rows, self.total])
        head = f"{'parameter':<{max(width, 9)}} {'shape':>18} {'zeros':>12} {'of':>12} {'share':>8}"
        lines = [f"{head} {'groups':>9} {'of':>9} {'share':>8}"]
        for r in [*self.rows, self.total]:
            shape = "x".join(map(str, r.shape)) if r is not self.total else ""
            lines.append(
                f"{r.name:<{max(width, 9)}} {shape:>18} {r.zeros:>12,} {r.numel:>12,} {r.share:>8.2%}"
                f" {r.zero_groups:>9,} {r.groups:>9,} {r.group_share:>8.2%}"
            )
        return "\n".join(lines)

    __repr__ = __str__


def measure(name: str, u: Tensor, group_dim: GroupDim = None) -> SparsityRow:
    """Count the zeros of one tensor."""
    zeros = u.numel() - int(torch.count_nonzero(u))
    if group_dim is None:
        return SparsityRow(name, tuple(u.shape), zeros, u.numel(), zeros, u.numel())
    kept_dims(group_dim, u.dim(), name)  # an error names the parameter
    norms = magnitudes(u, group_dim)
    return SparsityRow(name, tuple(u.shape), zeros, u.numel(), int((norms < ZERO_NORM).sum()), norms.numel())


@torch.no_grad()
def sparsity(model: nn.Module, group_dim: GroupDim = None) -> SparsityReport:
    """How sparse a model is as it stands: the weights that :func:`rvsm_kernels.param_groups` would penalise.

    Args:
        model: any module.
        group_dim: what a group is (see :class:`rvsm_kernels.RVSM`); None counts elements.

    Raises:
        ValueError: a ``group_dim`` that one of the weights does not have.
    """
    return SparsityReport(measure(name, p.detach(), group_dim) for name, p, _ in penalised_weights(model))
