"""u of the weights of an optimizer: put into the parameters for a while or for good, measured, counted."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..dist.gathered import forget_gathered, has_flat_params
from ..dist.shards import is_of_shards, is_sharded, placed_like
from ..engines.checks import check_state, refuse_expanded
from ..engines.interface import Engine, Group
from ..method import device_numbers
from ..method import u as more_than_prox
from ..method.cuts import Budget, budget_of, find_budgets, put_cut, scale_of, select_budget
from ..method.dtypes import opmath_type
from ..method.groups import grouping_of
from ..method.memory import kind_of, named, refuse, whole
from ..method.methods import METHODS
from ..method.parameters import is_left_alone, param_name
from ..method.precision import MASTER_STATES, as_parameter, has_master, join, master_of, new_master, store
from ..method.selection import Candidates, Room, Select, Selection, cut_by, thresholded
from ..method.split import is_coupled, is_nm, is_split, is_topk
from ..method.warn import some, warn
from ..model.sparsity import SparsityReport, SparsityRow, counted, is_all_zero, measure
from . import marks
from .coupled_view import CoupledView

if TYPE_CHECKING:
    from .split_optimizer import SplitOptimizer


class SplitParams(NamedTuple):
    """Parameters of one split group that one engine serves, and their names."""

    group: Group
    engine: Engine
    params: list[Tensor]
    names: list[str]


class SparseView:
    """u of the weights of one optimizer.

    The public methods of the optimizer are documented there and call those of the same names here. Between the calls
    this object remembers the weights while the parameters hold u, and which parameters hold u for good.
    """

    def __init__(self, optimizer: SplitOptimizer) -> None:
        # A weak reference: an optimizer that nobody holds is freed at once, not by the next garbage collection.
        self._optimizer_ref = weakref.ref(optimizer)
        self._dense: dict[Tensor, Tensor] | None = None  # the weights, while the parameters hold u
        self._marks: dict[Tensor, marks.Mark] = {}  # of the parameters that sparsify_() has made u
        self._dense_marks: set[Tensor] = set()  # those whose mark held when u was put in
        self._cuts_of_budgets: dict[Budget, Tensor] | None = None  # while one method looks; see forget_cuts()
        self.coupled = CoupledView(self)
        self._dead: set[str] = set()  # layers that are all zero in u, and were warned about

    @property
    def _optimizer(self) -> SplitOptimizer:
        optimizer = self._optimizer_ref()
        assert optimizer is not None
        return optimizer

    @property
    def is_open(self) -> bool:
        """Whether the parameters hold u, inside ``sparse_weights()``."""
        return self._dense is not None

    def refuse_while_open(self, what: str) -> None:
        """Raise RuntimeError for what must not be done inside ``sparse_weights()``."""
        if self._dense is not None:
            raise RuntimeError(f"{what} inside sparse_weights(): the parameters hold u, not the weights")

    def _master(self, p: Tensor, group: Mapping[str, Any]) -> Tensor | None:
        """The state that holds the rest of a parameter's weights, None where there is none."""
        states = self._optimizer._states
        return master_of(p, group, states[p]) if p in states else None

    def _weights(self, p: Tensor, group: Mapping[str, Any]) -> Tensor:
        """The weights of a parameter, also while it holds u: float32 where it has a master, else in its own type."""
        w = (p if self._dense is None else self._dense.get(p, p)).detach()
        return join(w, self._master(p, group)) if has_master(group, p.dtype) else w

    # ---- which parameters have a u -----------------------------------------------------------------------------------

    def _split_params(self, frozen: bool) -> list[SplitParams]:
        """The parameters of split groups, each once, by group and engine; all of them checked.

        Args:
            frozen: also those with ``requires_grad=False``.
        """
        with self._optimizer._lock:
            self._optimizer._check_options()
        self.forget_cuts()
        parts: list[SplitParams] = []
        seen: set[Any] = set()
        skipped = 0
        for i, group in enumerate(map(device_numbers.read, self._optimizer.param_groups)):
            if not is_split(group):
                continue
            by_engine: dict[str, SplitParams] = {}
            for j, p in enumerate(group["params"]):
                if is_lazy(p) or is_left_alone(p) or p.numel() == 0:
                    continue
                if not (p.requires_grad or frozen):
                    skipped += 1
                    continue
                name = param_name(group, i, j)
                self._check(p, p, group, name)
                key = id(p) if kind_of(p) is not None else (p.data_ptr(), p.shape, p.stride(), p.dtype)
                if key not in seen:  # u of u is another tensor: the same memory must not be thresholded twice
                    seen.add(key)
                    engine = self._engine_of(p, name)
                    part = by_engine.setdefault(engine.name, SplitParams(group, engine, [], []))
                    part.params.append(p)
                    part.names.append(name)
            parts += by_engine.values()
        if skipped and not parts:
            warn(
                f"all {skipped} penalised parameters are frozen (requires_grad=False), and so they are left as they"
                " are; give frozen=True to take them too"
            )
        return parts

    def _engine_of(self, w: Tensor, name: str) -> Engine:
        return self._optimizer._engines.engine_of(w, name)

    def _check(self, p: Tensor, w: Tensor, group: Group, name: str) -> None:
        """Raise unless u of a parameter with these weights can be made."""
        if kind_of(w) is None:
            refuse(w, name)
        refuse_expanded(w, name)
        self._engine_of(w, name).check(w, group, name)
        dual = self._dual(p, group)
        if dual is not None:
            check_state(dual, w, name, "dual")
        master = self._master(p, group)
        if master is not None:
            check_state(master, p, name, MASTER_STATES[p.dtype][0])

    def _dual(self, p: Tensor, group: Mapping[str, Any]) -> Any:
        """The dual of a parameter, None where there is none or it does not matter."""
        method, states = METHODS[group["method"]], self._optimizer._states
        return states[p].get(method.state) if method.adds_state and p in states else None

    def _is_u(self, p: Tensor, group: Mapping[str, Any]) -> bool:
        """Whether the weights of a parameter are u already: sparsify_() put it there, and nothing has changed since."""
        mark = self._marks.get(p)
        if mark is None:
            return False
        if self._dense is not None:  # this was found out when u was put in
            return p in self._dense_marks
        if marks.holds(mark, p, group, self._dual(p, group)):
            return True
        del self._marks[p]
        return False

    # ---- the cuts of budgets -----------------------------------------------------------------------------------------

    def forget_cuts(self) -> None:
        """Look for cuts of budgets and norms of coupled groups anew from here on: the weights may have changed."""
        self._cuts_of_budgets = None
        self.coupled.forget()

    def _cut_of_budget(self, p: Tensor, w: Tensor, group: Mapping[str, Any]) -> Tensor | None:
        """The cut of a parameter whose budget spans several tensors, None where its cut is its own.

        Of the weights as they were when the first one was asked for: u must not depend on the order in which it is
        put into the parameters.
        """
        key = budget_of(group)
        if key is None:
            return None
        cuts = self._cuts_of_budgets
        if cuts is None:
            cuts, groups = {}, list(map(device_numbers.read, self._optimizer.param_groups))

            def candidates(i: int, j: int, p: Tensor) -> Candidates:
                if kind_of(p) is None:
                    refuse(p, param_name(groups[i], i, j))
                return self.candidates(p, groups[i])

            for name, members in find_budgets(groups, groups, candidates).items():
                room = Room.like(*(member.p for member in members))
                select_budget(room, members, self.select_for([member.p for member in members]))
                cuts[name] = room.cut
            self._cuts_of_budgets = cuts
        if key not in cuts:  # all of its parameters are frozen
            return None
        cut = torch.empty((), dtype=opmath_type(w.dtype), device=w.device)
        put_cut(cut, cuts[key], scale_of(group, p))
        return cut

    def topk_cut(self, p: Tensor, w: Tensor, group: Mapping[str, Any], engine: Engine) -> Tensor:
        """The cut of a parameter of top-k with these weights: of its budget, or its own."""
        of_budget = self._cut_of_budget(p, w, group)
        if of_budget is not None:
            return of_budget
        if is_of_shards(p):  # counted by its ranks, in the place of a whole copy
            room = Room.like(p)
            engine.select([Selection.by_density(room, [self.candidates(p, group)], group["density"])])
            return room.cut
        candidates = Candidates(w.detach(), None, self._dual(p, group), grouping_of(group))
        return cut_by(engine.select, candidates, group["density"])

    def candidates(self, p: Tensor, group: Mapping[str, Any], once: bool = False) -> Candidates:
        """Those of a parameter, with its weights as they are, also while it holds u.

        Of coupled groups they are the norms of the groups of its slices.

        Args:
            once: of coupled groups those alone whose first slice is the parameter's; there may be none.
        """
        if is_coupled(group):
            norms = self.coupled.norms_of(p)
            return Candidates((norms.firsts if once else norms.slices).to(opmath_type(p.dtype)))
        w = (p if self._dense is None else self._dense.get(p, p)).detach()
        master = self._master(p, group) if has_master(group, p.dtype) else None
        return Candidates(w, master, self._dual(p, group), grouping_of(group), scale_of(group, p))

    def select_for(self, params: Sequence[Tensor]) -> Select:
        """The selection of the engine that serves parameters: where there are shards, theirs."""
        first = next((p for p in params if is_sharded(p)), params[0])
        return self._engine_of(first, "a parameter").select

    # ---- u of tensors ------------------------------------------------------------------------------------------------

    def first_u(self, p: Tensor, group: Mapping[str, Any], name: str) -> Tensor:
        """u of the weights of a parameter that has none in its state yet, in the type of its weights and its layout."""
        refuse_expanded(p, name)
        engine = self._engine_of(p, name)
        engine.check(p, group, name)
        dtype = torch.float32 if has_master(group, p.dtype) else p.dtype
        w, now = self._weights(p, group), device_numbers.read(group)
        u = self._u_of(p, w, now, engine) if is_split(now) else w
        return torch.empty_like(p, dtype=dtype).copy_(u)

    def _u_of(self, p: Tensor, w: Tensor, group: Mapping[str, Any], engine: Engine) -> Tensor:
        """u of a parameter with these weights, as a new tensor; in the type of the weights or of the arithmetic."""
        if is_coupled(group):
            return self.coupled.u_of(p, w, group)
        if more_than_prox.is_more_than_prox(group):
            cut = self.topk_cut(p, w, group, engine) if is_topk(group) else None
            u = more_than_prox.u_of(w.detach(), self._dual(p, group), group, engine.prox_, cut)
            return placed_like(u, p)
        u = w.detach().clone()
        engine.prox_([u], group)
        return u

    def _write_u(self, params: Sequence[Tensor], group: Group, engine: Engine, for_good: bool) -> None:
        """w <- u in place.

        Args:
            for_good: also what a master remembers of w.
        """
        plain = []
        for p in params:
            if not (has_master(group, p.dtype) or is_coupled(group) or more_than_prox.is_more_than_prox(group)):
                plain.append(p.detach())  # another thread may give a parameter other data meanwhile
                continue
            u = self._u_of(p, self._weights(p, group), group, engine)
            if for_good and has_master(group, p.dtype):
                name, states = MASTER_STATES[p.dtype][0], self._optimizer._states[p]
                states[name] = states[name] if states.get(name) is not None else new_master(p)
                store(p, u, states[name])
            else:
                p.copy_(as_parameter(u, p.dtype, group))
        if plain:
            engine.prox_(plain, group)

    # ---- for a while -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def put_u(self, frozen: bool) -> None:
        """Put u into the parameters; :meth:`give_back` undoes it, also where this was interrupted."""
        with self._optimizer._lock:
            parts = self._split_params(frozen)
            dense = {p: part.engine.copy_of(p) for part in parts for p in part.params}
            self._dense_marks = {p for part in parts for p in part.params if self._is_u(p, part.group)}
            self._dense = dense
            for part in parts:
                params = [p for p in part.params if p not in self._dense_marks]
                self._write_u(params, part.group, part.engine, for_good=False)
            self._warn_of_dead(parts, "sparse_weights()")

    @torch.no_grad()
    def give_back(self) -> None:
        """Give every parameter its weights back, also after one that cannot take them."""
        dense, self._dense = self._dense or {}, None
        errors = []
        for p, w in dense.items():
            try:
                p.copy_(w)
                if p in self._marks:
                    self._marks[p] = marks.renewed(self._marks[p], p) if p in self._dense_marks else marks.NEVER
            except RuntimeError as error:  # the body gave it another shape
                errors.append(error)
        if errors:
            raise errors[0]

    # ---- for good ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sparsify_(self, frozen: bool) -> None:
        """See :meth:`SplitOptimizer.sparsify_`."""
        self.refuse_while_open("sparsify_()")
        optimizer = self._optimizer
        if has_flat_params(optimizer.param_groups):
            raise RuntimeError(
                "sparsify_() cannot tell FullyShardedDataParallel to gather the new weights: save the model inside"
                " `with optimizer.sparse_weights(model)`, or shard with fully_shard (FSDP2)"
            )
        with optimizer._lock:
            parts = self._split_params(frozen)
            for part in parts:
                group = part.group
                params = [p for p in part.params if not self._is_u(p, group)]
                duals = [(p, dual) for p in params if (dual := self._dual(p, group)) is not None]
                before = [thresholded(self._weights(p, group), dual) for p, dual in duals]
                self._write_u(params, group, part.engine, for_good=True)
                for (p, dual), v in zip(duals, before, strict=True):
                    dual.copy_(v - thresholded(self._weights(p, group), None))
                for p in params:
                    self._marks[p] = marks.of(p, group, self._dual(p, group))
            forget_gathered(None, optimizer.param_groups)
            self._warn_of_dead(parts, "sparsify_()")
            here = {id(p) for group in optimizer.param_groups for p in group["params"]}
            self._marks = {p: mark for p, mark in self._marks.items() if id(p) in here}

    def _warn_of_dead(self, parts: Sequence[SplitParams], where: str) -> None:
        """Warn once of each layer whose u is all zero: it computes a constant."""
        dead = []
        for part in parts:
            for p, name in zip(part.params, part.names, strict=True):
                if p.dim() >= 2 and is_all_zero(p):
                    dead.append(name)
                else:
                    self._dead.discard(name)
        new = [name for name in dead if name not in self._dead]
        self._dead.update(new)
        if new:
            warn(
                f"{where}: u is all zero in {some(new)}, so that nothing passes there and the network computes a"
                " constant; take a smaller lam (the cut is above every magnitude), or another group_dim"
            )

    # ---- values and counts -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def penalty_value(self) -> Tensor:
        """See :meth:`SplitOptimizer.penalty_value`."""
        total: Tensor | None = None
        parts = self._split_params(frozen=True)
        for part in parts:
            try:
                value = self._value_of(part.params, part.group, part.engine)
            except (AssertionError, NotImplementedError, RuntimeError) as error:
                raise named(error, part.params[0], part.names[0]) from error
            total = value if total is None else total + value.to(total.device)
        coupled = self.coupled.value(parts)
        if total is not None and coupled is not None:
            total = total + coupled.to(total.device)
        if total is None:
            params = (p for group in self._optimizer.param_groups for p in group["params"])
            device = next((p.device for p in params), torch.device("cpu"))
            total = torch.zeros((), dtype=torch.float64, device=device)
        return total

    def _value_of(self, params: Sequence[Tensor], group: Group, engine: Engine) -> Tensor:
        """lam P(u) + beta/2 ||w - u||^2 over parameters that one engine serves."""
        already_u = {p for p in params if not p.requires_grad or self._is_u(p, group)}
        more = is_coupled(group) or more_than_prox.is_more_than_prox(group)
        plain = [] if more else [p for p in params if p not in already_u]
        total = torch.zeros((), dtype=torch.float64, device=params[0].device)
        if plain:
            total = total + engine.penalty_value([self._weights(p, group) for p in plain], group).to(total.device)
        for p in params:
            if p in already_u or more:
                w = self._weights(p, group)
                sums = None if p in already_u else self._sums_of_u(p, w, group, engine, zeros=False)
                if sums is not None and is_topk(group):  # P of top-k is 0
                    total = total + (float(group["beta"]) / 2 * sums[2]).to(total.device)
                    continue
                u = w if p in already_u else self._u_of(p, w, group, engine)
                if is_coupled(group):  # P follows for all weights together
                    gap = (whole(w).double() - whole(u).double()).square().sum()
                    total = total + (float(group["beta"]) / 2 * gap).to(total.device)
                    continue
                total = total + more_than_prox.value_of(whole(w), whole(u), group).to(total.device)
        return total

    def _sums_of_u(self, p: Tensor, w: Tensor, group: Group, engine: Engine, zeros: bool) -> Tensor | None:
        """:meth:`Engine.sums_of_u` of one parameter with these weights, None where u itself must be looked at.

        Sums of a half type would be those of u before it is rounded. With a dual they are of w + dual, of which the
        zeros of u are.
        """
        dual = self._dual(p, group)
        kept = grouping_of(group) is None and group["penalty"] in ("l0", "topk")  # u is w or 0
        if (w.dtype not in (torch.float32, torch.float64) and not kept) or (dual is not None and not zeros):
            return None
        if is_nm(group) or is_coupled(group):  # the report looks at u for its pattern
            return None
        v = w if dual is None and not is_topk(group) else thresholded(w, dual)
        cuts = [self.topk_cut(p, w, group, engine)] if is_topk(group) else []
        sums = engine.sums_of_u([v], group, cuts, zeros)
        return None if sums is None else sums[0]

    def sparsity(self) -> SparsityReport:
        """See :meth:`SplitOptimizer.sparsity`."""
        return SparsityReport(row for _, row in self.rows())

    @torch.no_grad()
    def rows(self) -> list[tuple[Tensor, SparsityRow]]:
        """Every parameter with a penalty, and what is counted of it."""
        with self._optimizer._lock:
            self._optimizer._check_options()
        self.forget_cuts()
        rows = []
        for i, group in enumerate(map(device_numbers.read, self._optimizer.param_groups)):
            if group["penalty"] is None:
                continue
            for j, p in enumerate(group["params"]):
                name = param_name(group, i, j)
                if is_lazy(p) or is_left_alone(p):
                    continue
                w = self._weights(p, group)
                try:
                    u = w
                    if is_split(group) and w.numel() > 0 and p.requires_grad and not self._is_u(p, group):
                        self._check(p, w, group, name)
                        engine = self._engine_of(w, name)
                        sums = self._sums_of_u(p, w, group, engine, zeros=True)
                        if sums is not None:
                            zeros, zero_groups = int(sums[0]), int(sums[1])
                            rows.append((p, counted(name, w, zeros, zero_groups, grouping_of(group))))
                            continue
                        u = self._u_of(p, w, group, engine).to(w.dtype)
                    pattern = group["pattern"] if is_nm(group) else None
                    rows.append((p, measure(name, u, grouping_of(group), pattern=pattern)))
                except (AssertionError, NotImplementedError, RuntimeError) as error:
                    raise named(error, w, name) from error
        return rows
