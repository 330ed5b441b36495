"""The cuts of top-k over coupled groups: of those that hang together, or of a budget; see ``coupled.py``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..method.cuts import budget_of, check_budget
from ..method.selection import cut_among, survivors
from ..method.split import is_topk

if TYPE_CHECKING:
    from .coupled import CoupledWeight


def populations(members: Iterable[CoupledWeight], values: Sequence[Mapping[str, Any]]) -> list[list[CoupledWeight]]:
    """The weights with top-k that share a cut.

    Args:
        values: the options of every param group.

    Raises:
        ValueError: groups of one budget that differ in density.
    """
    found: dict[Any, list[CoupledWeight]] = {}
    for member in members:
        group = values[member.place]
        if is_topk(group):
            budget = budget_of(group)
            together = found.setdefault(("together", member.leader) if budget is None else budget, [])
            together.append(member)
            check_budget(values[together[0].place], group)
    return list(found.values())


def coupled_cuts(
    members: Iterable[CoupledWeight],
    values: Sequence[Mapping[str, Any]],
    norms_of: Callable[[CoupledWeight], Tensor],
) -> dict[Tensor, Tensor]:
    """The norm up to which the coupled groups of each weight with top-k go to zero, 0-dim float64, on its device.

    Each group counts once. The cut is halfway to the smallest survivor, as between norms of any groups.

    Args:
        norms_of: the norms of the groups that a weight has the first slice of.

    ``values`` and errors: see :func:`populations`.
    """
    cuts: dict[Tensor, Tensor] = {}
    for together in populations(members, values):
        scales = [math.sqrt(m.size) if values[m.place]["group_scale"] else 1.0 for m in together]
        norms = torch.cat([norms_of(m).to(together[0].p.device) / s for m, s in zip(together, scales, strict=True)])
        if not norms.numel():
            continue
        cut = cut_among([norms], survivors(float(values[together[0].place]["density"]), norms.numel()), between=True)
        cuts.update((m.p, (cut * scale).to(m.p.device)) for m, scale in zip(together, scales, strict=True))
    return cuts
