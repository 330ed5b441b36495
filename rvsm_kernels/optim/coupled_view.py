"""u of coupled groups: the part of :class:`rvsm_kernels.optim.sparse_view.SparseView` that looks at several weights."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..dist.coupled import CoupledWeight, Norms
from ..dist.coupled_cuts import coupled_cuts
from ..dist.shards import is_sharded, shard_of, sharded_like
from ..method import device_numbers
from ..method.dtypes import to_opmath
from ..method.groups import from_memory_order, group_size, grouping_of
from ..method.penalties import PENALTIES
from ..method.prox import threshold
from ..method.selection import keep_above, thresholded
from ..method.split import is_coupled, is_topk, strength_of_size

if TYPE_CHECKING:
    from .sparse_view import SparseView, SplitParams


class CoupledView:
    """Norms, u and values of the coupled groups of one optimizer."""

    def __init__(self, view: SparseView) -> None:
        self._view_ref = weakref.ref(view)
        self._norms: dict[Tensor, Norms] | None = None  # while one method of the view looks
        self._known_cuts: dict[Tensor, Tensor] | None = None  # of these norms

    @property
    def _view(self) -> SparseView:
        view = self._view_ref()
        assert view is not None
        return view

    def forget(self) -> None:
        """Make the norms anew from here on."""
        self._norms = self._known_cuts = None

    def norms_of(self, p: Tensor) -> Norms:
        """The norms of a weight's coupled groups.

        Of the weights as they were when the first weight was asked for: u must not depend on the order in which it is
        put into the parameters.
        """
        view, couplings = self._view, self._view._optimizer._couplings
        if self._norms is None:
            groups = view._optimizer.param_groups
            couplings.find(groups)
            self._norms = couplings.norms(lambda member: [self._thresholded(member.p, groups[member.place])])
        return self._norms[p]

    def _thresholded(self, p: Tensor, group: Mapping[str, Any], w: Tensor | None = None) -> Tensor:
        """What this rank has of what is thresholded, in the type of the arithmetic."""
        dual = self._view._dual(p, group)
        w = self._view._weights(p, group) if w is None else w
        return to_opmath(thresholded(shard_of(w.detach()), None if dual is None else shard_of(dual)))

    def leading_group(self, i: int, group: Mapping[str, Any]) -> int:
        """The first param group whose weights hang together with those of group ``i``; without a coupling ``i``."""
        if not is_coupled(group):
            return i
        optimizer = self._view._optimizer
        members = optimizer._couplings.find(optimizer.param_groups)
        return next((members[p].leader[0] for p in group["params"] if p in members), i)

    def size_of_groups(self, p: Tensor, group: Mapping[str, Any]) -> float:
        """What ``group_scale`` takes for the size of a parameter's groups, coupled or not."""
        if not is_coupled(group):
            return group_size(p.shape, grouping_of(group))
        self.norms_of(p)
        return self._view._optimizer._couplings.size_of(p)

    def u_of(self, p: Tensor, w: Tensor, group: Mapping[str, Any]) -> Tensor:
        """u of a weight of coupled groups, in the type of the arithmetic."""
        v, norms = self._thresholded(p, group, w), self.norms_of(p).here
        if is_topk(group):
            u = keep_above(v, from_memory_order(norms, v, grouping_of(group)), self._cuts()[p])
            return sharded_like(u, p) if is_sharded(p) else u
        tau = strength_of_size(group, self.size_of_groups(p, group)) / float(group["beta"])
        groups = grouping_of(group)
        u = threshold(v, from_memory_order(norms, v, groups), group["penalty"], tau, float(group["a"]), groups)
        return sharded_like(u, p) if is_sharded(p) else u

    def _cuts(self) -> dict[Tensor, Tensor]:
        """The cuts of top-k of all weights that :meth:`norms_of` knows."""
        if self._known_cuts is not None:
            return self._known_cuts
        optimizer = self._view._optimizer
        members, values = optimizer._couplings.find(optimizer.param_groups), optimizer.param_groups
        now = [device_numbers.read(group) for group in values]
        self._known_cuts = coupled_cuts(members.values(), now, lambda member: self.norms_of(member.p).firsts)
        return self._known_cuts

    def value(self, parts: Sequence[SplitParams]) -> Tensor | None:
        """lam P(u) of all coupled groups, each once, 0-dim float64; None where there are none."""
        by_param = {p: part for part in parts if is_coupled(part.group) for p in part.params}
        if not by_param:
            return None
        # u of all weights first: it follows from the norms of w.
        u = {p: self._u_now(p, part) for p, part in by_param.items()}

        def value(member: CoupledWeight, norms: Tensor) -> Tensor:
            part = by_param.get(member.p)
            if part is None or is_topk(part.group):
                return norms.new_zeros(())
            lam, a = strength_of_size(part.group, member.size), float(part.group["a"])
            return lam * PENALTIES[part.group["penalty"]].value(norms, a).sum()

        couplings = self._view._optimizer._couplings
        return couplings.value_of(lambda member: shard_of(u.get(member.p, member.p.detach())), value)

    def _u_now(self, p: Tensor, part: SplitParams) -> Tensor:
        """u of a parameter, also where its weights are u already."""
        w = self._view._weights(p, part.group)
        is_u = not p.requires_grad or self._view._is_u(p, part.group)
        return w if is_u else self._view._u_of(p, w, part.group, part.engine)
