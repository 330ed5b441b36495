"""Algorithm 2 of arXiv 1812.05719: gradient descent that thresholds only when the set of largest elements changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..engines.interface import Engine
from ..method.bases import SGD
from ..method.groups import GroupDim, grouping_of
from ..method.memory import turns_of
from ..method.parameters import with_gradient
from ..method.selection import Room
from ..method.split import is_topk
from ..method.step_options import StepOptions
from ..method.support import Support, TorchSupport
from .attributes import names_its_arguments
from .split_optimizer import SplitOptimizer


class AdaptiveHardThreshold(SplitOptimizer):
    """Algorithm 2 of arXiv 1812.05719: w <- w - lr grad, and w <- H_s(w) only when the support of H_s(w) changes.

    H_s keeps the s = ceil(density * n) elements (or groups) of largest magnitude of each tensor; where the smallest of
    them ties with the largest magnitude that is zeroed, all that tie are zeroed. The support of H_s(w) before the step
    is compared with that after it; where they are the same nothing is zeroed, so that the gradient can bring new
    elements up. The paper begins with a sparse w: call ``sparsify_()`` first. At the end ``sparsify_()`` gives H_s(w)
    for good, as ``sparse_weights()`` does for a while.

    Args:
        params: tensors, groups or named parameters, as in torch.optim.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in ``torch.optim.SGD``.
        density: the share of elements or groups that survive, in (0, 1]; can differ per group.
        group_dim, group_block: what indexes the groups, None and 1 for elements (see :class:`RVSM`).
        unit_norm: w <- w / ||w|| of each tensor at the end of the step.
        engine, statistics: see :class:`RVSM`; the step is a plain one, so that u is w in its statistics.

    Raises:
        ValueError: a number out of range, no density.
    """

    _base = SGD
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
        group_block: int = 1,
        unit_norm: bool = False,
        maximize: bool = False,
        amp_scaling: bool = True,
        engine: str | None = None,
        statistics: bool = False,
    ) -> None:
        if density is None:
            raise ValueError("AdaptiveHardThreshold needs a density: the share of elements or groups that survive")
        options = {**locals(), "penalty": "topk", "lam": 1.0, "beta": 1.0}
        super().__init__(params, options, amp_scaling=amp_scaling, engine=engine, statistics=statistics)

    def _validate(self, group: Mapping[str, Any]) -> None:
        super()._validate(group)
        if group["penalty"] not in (None, "topk"):
            raise ValueError(f"Invalid penalty: {group['penalty']!r}: AdaptiveHardThreshold knows 'topk' and None")
        if group["budget"] != "tensor":
            raise ValueError("AdaptiveHardThreshold keeps a share of each tensor: budget='tensor'")
        if group["master_weights"] or group["rounding"] != "nearest":
            raise ValueError("AdaptiveHardThreshold has neither master_weights nor another rounding than 'nearest'")

    def _step_options(self, group: Mapping[str, Any]) -> StepOptions:
        """The step of the algorithm is a plain one: top-k says only what u is."""
        return super()._step_options({**group, "penalty": None})

    def _start(self, engine: str | None, amp_scaling: bool, statistics: bool = False) -> None:
        super()._start(engine, amp_scaling, statistics)
        self._rooms: dict[Tensor, Room] = {}

    def _supports(self) -> list[Support]:
        """Where H_s is not 0, for each parameter that a step moves and that has a penalty."""
        watched = [(p, group) for group in self.param_groups if is_topk(group) for _, p in with_gradient(group)]
        params = [p for p, _ in watched]
        self._rooms = {p: self._room_of(p) for p in params}
        if any(turns_of(params)):  # a tensor is looked at again after another one has written to its memory
            return [TorchSupport(p, group["density"], grouping_of(group)) for p, group in watched]
        return [
            self._engines.engine_of(p, "a parameter").support_of(
                p, group["density"], grouping_of(group), self._rooms[p]
            )
            for p, group in watched
        ]

    def _room_of(self, p: Tensor) -> Room:
        room = self._rooms.get(p)
        return room if room is not None and room.serves(p) else Room.like(p)

    def _run(self, engines: Sequence[Engine]) -> None:
        supports = self._supports()
        super()._run(engines)
        for support in supports:
            support.threshold_where_changed_()
