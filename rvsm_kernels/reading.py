"""Reading u from an optimizer: sparse weights, for a while or for good, the value of the penalty, sparsity."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from . import advice, marks, methods
from .interface import Engine, Group
from .method.memory import kind_of, named, refuse, whole
from .options import is_left_alone, is_split, param_name, refuse_expanded
from .sparsity import SparsityReport, is_all_zero, measure


class Part(NamedTuple):
    """Parameters of one split group that one engine serves, and their names."""

    group: Group
    engine: Engine
    params: list[Tensor]
    names: list[str]


class Reading(Optimizer):
    """The part of a split optimizer that makes u of its weights."""

    _dense: dict[Tensor, Tensor] | None  # the weights, while sparse_weights() holds u in them
    _marks: dict[Tensor, marks.Mark]  # parameters that are u already, and how to know that they still are
    _dense_marks: set[Tensor]  # those that are u already, while sparse_weights() is open
    _dead: set[str]  # layers that are all zero in u, and were warned about
    _lock: contextlib.AbstractContextManager[Any]

    @abstractmethod
    def _engine(self, p: Tensor, name: str) -> Engine:
        """The engine that serves a parameter."""

    @abstractmethod
    def _validate_groups(self) -> None:
        """Check the options."""

    def _refuse_inside_sparse_weights(self, what: str) -> None:
        if self._dense is not None:
            raise RuntimeError(f"{what} inside sparse_weights(): the parameters hold u, not the weights")

    def _split_params(self, frozen: bool) -> list[Part]:
        """The parameters that have a u of their own, each once, by group and engine; all of them checked.

        Args:
            frozen: also those with ``requires_grad=False``.
        """
        self._validate_groups()
        parts: list[Part] = []
        seen: set[Any] = set()
        skipped = 0
        for i, group in enumerate(self.param_groups):
            if not is_split(group):
                continue
            by_engine: dict[str, Part] = {}
            for j, p in enumerate(group["params"]):
                if is_lazy(p) or is_left_alone(p) or p.numel() == 0:
                    continue
                if not (p.requires_grad or frozen):
                    skipped += 1
                    continue
                name = param_name(group, i, j)
                self._check_reading(p, p, group, name)
                key = id(p) if kind_of(p) is not None else (p.data_ptr(), p.shape, p.stride(), p.dtype)
                if key not in seen:  # u of u is not u
                    seen.add(key)
                    engine = self._engine(p, name)
                    part = by_engine.setdefault(engine.name, Part(group, engine, [], []))
                    part.params.append(p)
                    part.names.append(name)
            parts += by_engine.values()
        if skipped and not parts:
            advice.warn(
                f"all {skipped} penalised parameters are frozen (requires_grad=False), and so they are left as they"
                " are; give frozen=True to take them too"
            )
        return parts

    def _check_reading(self, p: Tensor, w: Tensor, group: Group, name: str) -> None:
        """Raise unless u of a parameter with these weights can be made."""
        if kind_of(w) is None:
            refuse(w, name)
        refuse_expanded(w, name)
        self._engine(w, name).check(w, group, name)
        dual = self._dual(p, group)
        if dual is not None:
            methods.check_kept(dual, w, name, "dual")

    def _dual(self, p: Tensor, group: Mapping[str, Any]) -> Any:
        """The dual of a parameter, None where there is none or it does not matter."""
        return self.state[p].get("dual") if group["method"] == "admm" and p in self.state else None

    def _is_u(self, p: Tensor, group: Mapping[str, Any]) -> bool:
        """Whether the weights of a parameter are u already: sparsify_() put it there, and nothing has changed since."""
        mark = self._marks.get(p)
        if mark is None:
            return False
        if self._dense is not None:  # it was looked at when u was put in
            return p in self._dense_marks
        if marks.holds(mark, p, group, self._dual(p, group)):
            return True
        del self._marks[p]
        return False

    def sparse_weights(self, model: nn.Module | None = None, *, frozen: bool = False) -> SparseWeights:
        """Hold u = prox_{tau P}(w) in the parameters, and give w back bit for bit afterwards.

        ::

            with optimizer.sparse_weights():
                validate(model)

        w comes back also when the body raises. Inside, :meth:`step` and a second :meth:`sparse_weights` raise
        RuntimeError. Costs one copy of the split parameters while it is open.

        What shares memory with the parameters shows w again afterwards: ``model.state_dict()``, and what
        ``torch.export`` or ``torch.jit.trace`` made of the model. To keep u, copy it inside:
        ``{k: v.clone() for k, v in model.state_dict().items()}``.

        Args:
            model: its batch norms' running statistics are given back too. Without it, a forward pass in training mode
                changes them for good, which is warned about.
            frozen: also parameters with ``requires_grad=False``, which else stay as they are.
        """
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"sparse_weights takes a module or nothing, but got a {type(model).__name__}")
        return SparseWeights(self, model, frozen)

    @torch.no_grad()
    def _put_u(self, frozen: bool) -> None:
        """Put u into the parameters; _give_back() undoes it, also where this was interrupted."""
        with self._lock:
            parts = self._split_params(frozen)
            dense = {p: p.detach().clone() for part in parts for p in part.params}
            self._dense_marks = {p for part in parts for p in part.params if self._is_u(p, part.group)}
            self._dense = dense
            for part in parts:
                self._write_u([p for p in part.params if p not in self._dense_marks], part.group, part.engine)
            self._warn_of_dead(parts, "sparse_weights()")

    @torch.no_grad()
    def _give_back(self) -> None:
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

    @torch.no_grad()
    def sparsify_(self, *, frozen: bool = False) -> None:
        """w <- u for good. Momentum is left alone, so a pruned weight may grow again.

        Until a step or an edit changes them, the weights are u: a second call changes nothing, :meth:`sparse_weights`
        holds what they are, and :meth:`sparsity` counts it. The dual of ``method="admm"`` becomes what the step makes
        of it, w + dual - u, so that u stays what it is.

        Args:
            frozen: also parameters with ``requires_grad=False``, which else stay as they are.
        """
        self._refuse_inside_sparse_weights("sparsify_()")
        with self._lock:
            parts = self._split_params(frozen)
            for part in parts:
                group = part.group
                params = [p for p in part.params if not self._is_u(p, group)]
                duals = [(p, dual) for p in params if (dual := self._dual(p, group)) is not None]
                arguments = [methods.argument(p.detach(), dual) for p, dual in duals]
                self._write_u(params, group, part.engine)
                for (p, dual), v in zip(duals, arguments, strict=True):
                    dual.copy_(v - methods.arithmetic(p.detach()))
                for p in params:
                    self._marks[p] = marks.of(p, group, self._dual(p, group))
            self._warn_of_dead(parts, "sparsify_()")
            here = {id(p) for group in self.param_groups for p in group["params"]}
            self._marks = {p: mark for p, mark in self._marks.items() if id(p) in here}

    def _warn_of_dead(self, parts: Sequence[Part], where: str) -> None:
        """Warn once of layers whose u is all zero: no signal passes them."""
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
            advice.warn(
                f"{where}: u is all zero in {advice.some(new)}, so that nothing passes there and the network computes a"
                " constant; take a smaller lam (the cut is above every magnitude), or another group_dim"
            )

    @torch.no_grad()
    def penalty_value(self) -> Tensor:
        """lam P(u) + beta/2 ||w - u||^2 over all split parameters: ``loss + penalty_value()`` is L_beta(w, u).

        Returns:
            A 0-dim float64 tensor on the parameters' device; not differentiable.
        """
        total: Tensor | None = None
        for part in self._split_params(frozen=True):
            try:
                value = self._value_of(part.params, part.group, part.engine)
            except (AssertionError, NotImplementedError, RuntimeError) as error:
                raise named(error, part.params[0], part.names[0]) from error
            total = value if total is None else total + value.to(total.device)
        if total is None:
            device = next((p.device for g in self.param_groups for p in g["params"]), torch.device("cpu"))
            total = torch.zeros((), dtype=torch.float64, device=device)
        return total

    @torch.no_grad()
    def sparsity(self) -> SparsityReport:
        """How sparse u is: zeros and zero groups of every parameter with a penalty, and in total.

        Frozen parameters (``requires_grad=False``), and weights that :meth:`sparsify_` has made u, are counted as they
        are.
        """
        self._validate_groups()
        rows = []
        for i, group in enumerate(self.param_groups):
            if group["penalty"] is None:
                continue
            for j, p in enumerate(group["params"]):
                name = param_name(group, i, j)
                if is_lazy(p) or is_left_alone(p):
                    continue
                w = self._weights(p).detach()
                try:
                    u = w
                    if is_split(group) and w.numel() > 0 and p.requires_grad and not self._is_u(p, group):
                        self._check_reading(p, w, group, name)
                        u = self._u_of(p, w, group, self._engine(w, name)).to(w.dtype)
                    rows.append(measure(name, whole(u), group["group_dim"]))
                except (AssertionError, NotImplementedError, RuntimeError) as error:
                    raise named(error, w, name) from error
        return SparsityReport(rows)

    def _u_of(self, p: Tensor, w: Tensor, group: Mapping[str, Any], engine: Engine) -> Tensor:
        """u of a parameter with these weights, as a new tensor; where it is special, in the arithmetic type."""
        if methods.is_special(group):
            return methods.special_u(w.detach(), self._dual(p, group), group, engine.prox_)
        u = w.detach().clone()
        engine.prox_([u], group)
        return u

    def _write_u(self, params: Sequence[Tensor], group: Group, engine: Engine) -> None:
        """w <- u in place."""
        if methods.is_special(group):
            for p in params:
                p.copy_(self._u_of(p, p, group, engine))
        elif params:
            # Tensors of their own: another thread may give a parameter other data meanwhile.
            engine.prox_([p.detach() for p in params], group)

    def _value_of(self, params: Sequence[Tensor], group: Group, engine: Engine) -> Tensor:
        """lam P(u) + beta/2 ||w - u||^2 over parameters that one engine serves."""
        still = {p for p in params if not p.requires_grad or self._is_u(p, group)}
        plain = [p for p in params if p not in still and not methods.is_special(group)]
        total = torch.zeros((), dtype=torch.float64, device=params[0].device)
        if plain:
            total = total + engine.penalty_value([self._weights(p).detach() for p in plain], group).to(total.device)
        for p in params:
            if p in still or methods.is_special(group):
                w = self._weights(p).detach()
                u = w if p in still else self._u_of(p, w, group, engine)
                total = total + methods.special_value(whole(w), whole(u), group).to(total.device)
        return total

    def _weights(self, p: Tensor) -> Tensor:
        """The weights of a parameter, also while it holds u."""
        return p if self._dense is None else self._dense.get(p, p)


class SparseWeights(contextlib.ContextDecorator):
    """What :meth:`Reading.sparse_weights` returns: u is in the parameters while it is entered."""

    def __init__(self, optimizer: Reading, model: nn.Module | None, frozen: bool) -> None:
        self._arguments = optimizer, model, frozen
        self._entered = False

    def _recreate_cm(self) -> SparseWeights:
        """As a decorator: one object a call."""
        self._entered = True
        return SparseWeights(*self._arguments)

    def __enter__(self) -> None:
        optimizer, model, frozen = self._arguments
        self._entered = True
        optimizer._refuse_inside_sparse_weights("sparse_weights()")
        with contextlib.ExitStack() as stack:
            stack.enter_context(Statistics(model))
            stack.callback(optimizer._give_back)
            optimizer._put_u(frozen)
            self._open = stack.pop_all()

    def __exit__(self, *error: Any) -> None:
        self._open.close()

    def __del__(self) -> None:
        if not self.__dict__.get("_entered", True):
            advice.warn(
                "sparse_weights() was called without `with`: the parameters still hold w. Write"
                " `with optimizer.sparse_weights(): validate(model)`"
            )


_NORMS = nn.modules.batchnorm._NormBase


class Statistics(contextlib.AbstractContextManager["Statistics"]):
    """Gives the running statistics of a model's batch norms back, or, without the model, warns when they change."""

    def __init__(self, model: nn.Module | None) -> None:
        norms = [] if model is None else [m for m in model.modules() if isinstance(m, _NORMS)]
        self._before = [(b, b.detach().clone()) for m in norms for b in m.buffers(recurse=False)]
        self._known = model is not None
        self._seen: set[tuple[bool, int]] = set()
        self._warned = False

    def __enter__(self) -> Statistics:
        if not self._known:
            # Called for the outermost module first, also where that is compiled and its parts are not called one by
            # one.
            self._hook = nn.modules.module.register_module_forward_pre_hook(self._look)
        return self

    def _look(self, module: nn.Module, arguments: Any) -> None:
        if self._warned or (module.training, id(module)) in self._seen:
            return
        for m in module.modules():
            self._seen.add((m.training, id(m)))
            if isinstance(m, _NORMS) and m.training and m.track_running_stats and not self._warned:
                self._warned = True
                advice.warn(
                    "a forward pass in training mode inside sparse_weights() changes the running statistics of batch"
                    " norms for good: call model.eval() before, or give the model, sparse_weights(model), to get them"
                    " back"
                )

    def __exit__(self, *error: Any) -> None:
        if not self._known:
            self._hook.remove()
        with torch.no_grad():
            for buffer, value in self._before:
                buffer.copy_(value)
