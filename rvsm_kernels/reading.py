"""Reading u from an optimizer: sparse weights, for a while or for good, the value of the penalty, sparsity."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from . import methods
from .interface import Engine, Group
from .options import is_split, param_name, refuse_expanded
from .sparsity import SparsityReport, measure


class Reading(Optimizer):
    """The part of a split optimizer that makes u of its weights."""

    _dense: dict[Tensor, Tensor] | None  # the weights, while sparse_weights() holds u in them

    @abstractmethod
    def _engine(self, device_type: str) -> Engine:
        """The engine that serves a device."""

    @abstractmethod
    def _validate_groups(self) -> None:
        """Check the options."""

    def _refuse_inside_sparse_weights(self, what: str) -> None:
        if self._dense is not None:
            raise RuntimeError(f"{what} inside sparse_weights(): the parameters hold u, not the weights")

    def _split_params(self) -> Iterator[tuple[Group, Engine, list[Tensor]]]:
        """Every group with a splitting, its engine, its parameters with elements; checked, so take all before use."""
        self._validate_groups()
        for i, group in enumerate(self.param_groups):
            if is_split(group):
                by_device: dict[str, list[Tensor]] = {}
                for j, p in enumerate(group["params"]):
                    if not is_lazy(p) and p.numel() > 0:
                        self._check_reading(p, p, group, param_name(group, i, j))
                        by_device.setdefault(p.device.type, []).append(p)
                for device_type, params in by_device.items():
                    yield group, self._engine(device_type), params

    def _check_reading(self, p: Tensor, w: Tensor, group: Group, name: str) -> None:
        """Raise unless u of a parameter with these weights can be made."""
        refuse_expanded(w, name)
        self._engine(w.device.type).check(w, group, name)
        dual = self._dual(p, group)
        if dual is not None:
            methods.check_kept(dual, w, name, "dual")

    def _dual(self, p: Tensor, group: Mapping[str, Any]) -> Any:
        """The dual of a parameter, None where there is none or it does not matter."""
        return self.state[p].get("dual") if group["method"] == "admm" and p in self.state else None

    @contextlib.contextmanager
    def sparse_weights(self) -> Iterator[None]:
        """Hold u = prox_{tau P}(w) in the parameters, and give w back bit for bit afterwards.

        ::

            with optimizer.sparse_weights():
                validate(model)

        w comes back also when the body raises. Inside, :meth:`step` and a second :meth:`sparse_weights` raise
        RuntimeError. Costs one copy of the split parameters while it is open.
        """
        self._refuse_inside_sparse_weights("sparse_weights()")
        parts = list(self._split_params())
        dense = {p: p.detach().clone() for _, _, params in parts for p in params}
        try:
            self._dense = dense
            with torch.no_grad():
                for group, engine, params in parts:
                    self._write_u(params, group, engine)
            yield
        finally:
            self._dense = None
            self._restore(dense)

    @staticmethod
    @torch.no_grad()
    def _restore(dense: Mapping[Tensor, Tensor]) -> None:
        """Give every parameter its weights back, also after one that cannot take them."""
        errors = []
        for p, w in dense.items():
            try:
                p.copy_(w)
            except RuntimeError as error:  # the body gave it another shape
                errors.append(error)
        if errors:
            raise errors[0]

    @torch.no_grad()
    def sparsify_(self) -> None:
        """w <- u for good. Momentum is left alone, so a pruned weight may grow again.

        The dual of ``method="admm"`` becomes what the step makes of it, w + dual - u, so that u stays what it is.
        """
        self._refuse_inside_sparse_weights("sparsify_()")
        for group, engine, params in list(self._split_params()):
            duals = [(p, dual) for p in params if (dual := self._dual(p, group)) is not None]
            arguments = [methods.argument(p.detach(), dual) for p, dual in duals]
            self._write_u(params, group, engine)
            for (p, dual), v in zip(duals, arguments, strict=True):
                dual.copy_(v - methods.arithmetic(p.detach()))

    @torch.no_grad()
    def penalty_value(self) -> Tensor:
        """lam P(u) + beta/2 ||w - u||^2 over all split parameters: ``loss + penalty_value()`` is L_beta(w, u).

        Returns:
            A 0-dim float64 tensor on the parameters' device; not differentiable.
        """
        total: Tensor | None = None
        for group, engine, params in list(self._split_params()):
            value = self._value_of(params, group, engine)
            total = value if total is None else total + value.to(total.device)
        if total is None:
            device = next((p.device for g in self.param_groups for p in g["params"]), torch.device("cpu"))
            total = torch.zeros((), dtype=torch.float64, device=device)
        return total

    @torch.no_grad()
    def sparsity(self) -> SparsityReport:
        """How sparse u is: zeros and zero groups of every parameter with a penalty, and in total."""
        self._validate_groups()
        rows = []
        for i, group in enumerate(self.param_groups):
            if group["penalty"] is None:
                continue
            for j, p in enumerate(group["params"]):
                name = param_name(group, i, j)
                if is_lazy(p):
                    continue
                u = self._weights(p).detach()
                if is_split(group) and u.numel() > 0:  # else u is w
                    self._check_reading(p, u, group, name)
                    u = self._u_of(p, u, group, self._engine(u.device.type)).to(u.dtype)
                rows.append(measure(name, u, group["group_dim"]))
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
        else:
            engine.prox_(params, group)

    def _value_of(self, params: Sequence[Tensor], group: Group, engine: Engine) -> Tensor:
        """lam P(u) + beta/2 ||w - u||^2 over parameters on one type of device."""
        ws = [self._weights(p).detach() for p in params]
        if not methods.is_special(group):
            return engine.penalty_value(ws, group)
        total = torch.zeros((), dtype=torch.float64, device=ws[0].device)
        for p, w in zip(params, ws, strict=True):
            total += methods.special_value(w, self._u_of(p, w, group, engine), group).to(total.device)
        return total

    def _weights(self, p: Tensor) -> Tensor:
        """The weights of a parameter, also while it holds u."""
        return p if self._dense is None else self._dense.get(p, p)
