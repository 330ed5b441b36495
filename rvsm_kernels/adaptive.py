"""Algorithm 2 of arXiv 1812.05719: gradient descent that thresholds only when the largest elements become others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .attributes import names_its_arguments
from .base import SplittingOptimizer
from .interface import Engine, Group
from .method.groups import GroupDim, magnitudes
from .methods import arithmetic, cut_of, is_topk, moved


class AdaptiveThresholding(SplittingOptimizer):
    """The algorithm over any engine; see :class:`rvsm_kernels.AdaptiveHardThreshold`."""

    _at_once = False  # the supports are compared before and after

    @names_its_arguments
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        density: float | None = None,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        group_dim: GroupDim = None,
        unit_norm: bool = False,
        maximize: bool = False,
        amp_scaling: bool = True,
        engine: str | None = None,
    ) -> None:
        if density is None:
            raise ValueError("AdaptiveHardThreshold needs a density: the share of elements or groups that survive")
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            penalty="topk",
            density=density,
            lam=1.0,
            beta=1.0,
            group_dim=group_dim,
            unit_norm=unit_norm,
            maximize=maximize,
            amp_scaling=amp_scaling,
            engine=engine,
        )

    def _validate(self, group: Mapping[str, Any]) -> None:
        super()._validate(group)
        if group["penalty"] not in (None, "topk"):
            raise ValueError(f"Invalid penalty: {group['penalty']!r}: AdaptiveHardThreshold knows 'topk' and None")

    def _step_groups(self) -> Sequence[Group]:
        """The step of the algorithm is a plain one: top-k says only what u is."""
        return [{**group, "penalty": None} for group in self.param_groups]

    def _supports(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The parameters that a step moves and that have a penalty, and where H_s is not 0 of them."""
        for group in self.param_groups:
            if is_topk(group):
                for _, p in moved(group):
                    yield p, _support(p, group)

    def _run(self, engines: Sequence[Engine]) -> None:
        before = dict(self._supports())
        super()._run(engines)
        for p, support in self._supports():
            changed = (support != before[p]).any()
            p.copy_(torch.where(changed & ~support, torch.zeros((), dtype=p.dtype, device=p.device), p))


def _support(p: Tensor, group: Mapping[str, Any]) -> Tensor:
    w = arithmetic(p.detach())
    # Not "above": NaN is above nothing, and must stay visible.
    return ~(magnitudes(w, group["group_dim"]) <= cut_of(w, group["density"], group["group_dim"]))
