"""What every split optimizer shares: options, checks, reading u, and the hand-over to an engine.

A step goes one way: the optimizer validates and fills defaults, then an :class:`Engine` prepares (all checks,
nothing written) and launches (all writes). Nothing comes back up.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from . import methods
from .groups import GroupDim
from .options import (
    OPTIONS,
    differ,
    is_split,
    param_name,
    refuse_expanded,
    snapshot,
    validate,
    validate_param,
)
from .sparsity import SparsityReport, measure

Group = MutableMapping[str, Any]


class Engine(ABC):
    """Who does the arithmetic. One object belongs to one optimizer."""

    name: str

    @abstractmethod
    def prepare(
        self,
        groups: Sequence[Group],
        state: MutableMapping[Tensor, Any],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        kept: Mapping[Tensor, Tensor],
        cuts: Mapping[Tensor, Tensor],
    ) -> bool:
        """Check everything that a step over these groups needs; change nothing.

        Args:
            kept: what the methods of split parameters keep (u or dual), to be read and written by the step.
            cuts: of parameters with top-k: a number in the arithmetic type, which is there when the step is launched.

        Returns False if a parameter is on a device that this engine does not serve.
        """

    @abstractmethod
    def launch(self) -> None:
        """Do the step that was prepared."""

    def check(self, p: Tensor, group: Mapping[str, Any], name: str) -> None:  # noqa: B027 - most need none
        """Raise ValueError if the groups of a parameter are none that this engine can reduce."""

    @abstractmethod
    def prox_(self, params: Sequence[Tensor], group: Mapping[str, Any]) -> None:
        """w <- prox_{tau P}(w) in place, for parameters of one split group."""

    @abstractmethod
    def penalty_value(self, params: Sequence[Tensor], group: Mapping[str, Any]) -> Tensor:
        """lam P(u) + beta/2 ||w - u||^2 over the parameters of one split group, 0-dim float64."""


def check_gradient(p: Tensor, state: Mapping[Tensor, Any], group: Mapping[str, Any], i: int, j: int) -> None:
    """Raise if the gradient or the momentum of a parameter cannot be used; nothing is changed."""
    grad, name = p.grad, param_name(group, i, j)
    assert grad is not None
    if grad.layout != torch.strided:
        raise RuntimeError(f"RVSM does not support sparse gradients ({name} has layout {grad.layout})")
    if grad.is_complex():
        raise RuntimeError(f"RVSM does not support complex gradients ({name})")
    if grad.shape != p.shape:
        raise RuntimeError(f"the gradient of {name} has shape {list(grad.shape)}, the parameter {list(p.shape)}")
    if grad.device != p.device:
        raise RuntimeError(f"the gradient of {name} is on {grad.device}, the parameter on {p.device}")
    refuse_expanded(p, name)
    validate_param(p, group, name)
    buffer = state[p].get("momentum_buffer") if p in state else None
    if not group["momentum"] or buffer is None:
        return
    if (buffer.shape, buffer.device) != (p.shape, p.device) or not buffer.is_floating_point():
        raise RuntimeError(
            f"the momentum_buffer of {name} is {buffer.dtype} {list(buffer.shape)} on {buffer.device},"
            f" the parameter {p.dtype} {list(p.shape)} on {p.device}"
        )


_read_options = itemgetter(*OPTIONS)
_GROUP_DIM = OPTIONS.index("group_dim")


class SplittingOptimizer(Optimizer):
    """SGD with relaxed variable splitting; see :class:`rvsm_kernels.RVSM` for the arguments."""

    # GradScaler then hands grad_scale and found_inf to step() instead of unscaling in a pass of its own.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        penalty: str | None = "l0",
        lam: float = 1e-6,
        beta: float = 1e-2,
        a: float = 1.0,
        density: float | None = None,
        group_dim: GroupDim = None,
        group_scale: bool = False,
        group_lasso: float = 0.0,
        decoupled: bool = True,
        method: str = "rvsm",
        unit_norm: bool = False,
        maximize: bool = False,
        engine: str | None = None,
    ) -> None:
        values = locals()
        defaults = {key: values[key] for key in OPTIONS}
        self._validate(defaults)
        self._start(engine)
        super().__init__(params, defaults)

    def _start(self, engine: str | None) -> None:
        """The attributes beside torch's own; none of them is part of the state."""
        self._requested_engine = engine
        self._engines: dict[str, Engine] = {}
        self._validated: list[tuple[Any, ...] | None] = []
        self._cuts = methods.Cuts()
        self._keeps = True  # the state may hold what a method keeps, or what none keeps any more
        self._dense: dict[Tensor, Tensor] | None = None  # the weights, while sparse_weights() holds u in them
        self._check_engine()  # an unknown or missing engine is an error now, not at the first step

    def _validate(self, group: Mapping[str, Any]) -> None:
        """Check every option of a param group; see :func:`rvsm_kernels.options.validate`."""
        validate(group)

    # ---- engines -------------------------------------------------------------------------------------------------

    def _check_engine(self) -> None:
        """Raise for an engine that serves no device here."""

    @abstractmethod
    def _engine_name(self, device_type: str) -> str:
        """Which engine serves a device."""

    @abstractmethod
    def _make_engine(self, device_type: str) -> Engine:
        """A new engine for a device."""

    def _engine(self, device_type: str) -> Engine:
        name = self._engine_name(device_type)
        if name not in self._engines:
            self._engines[name] = self._make_engine(device_type)
        return self._engines[name]

    def _by_engine(self, whole: Sequence[Group]) -> list[tuple[Engine, list[Group]]]:
        """Param groups, divided by the engine that serves each parameter's device."""
        parts: dict[str, list[Group]] = {}
        for i, group in enumerate(whole):
            for j, p in enumerate(group["params"]):
                part = parts.setdefault(self._engine(p.device.type).name, [])
                if not part or part[-1]["index"] != i:
                    part.append({**group, "index": i, "params": [], "param_names": []})
                part[-1]["params"].append(p)
                part[-1]["param_names"].append(param_name(group, i, j))
        self._engines = {name: self._engines[name] for name in parts}
        return [(self._engines[name], groups) for name, groups in parts.items()]

    # ---- the step ------------------------------------------------------------------------------------------------

    def _validate_groups(self) -> None:
        """Check every option that changed since the last time; a scheduler's edit of lr is one."""
        groups, seen = self.param_groups, self._validated
        if len(seen) != len(groups):
            seen[:] = [None] * len(groups)
        for i, group in enumerate(groups):
            values = _read_options(group)
            if differ(values, seen[i]):
                self._validate(group)
                before = seen[i]
                if before is None or before[_GROUP_DIM] != group["group_dim"]:
                    for j, p in enumerate(group["params"]):
                        validate_param(p, group, param_name(group, i, j))
                seen[i] = snapshot(values)

    def _first_u(self, p: Tensor, group: Mapping[str, Any], name: str) -> Tensor:
        """u of a parameter that has none in its state yet."""
        refuse_expanded(p, name)
        engine = self._engine(p.device.type)
        engine.check(p, group, name)
        return torch.empty_like(p).copy_(self._u_of(p, p, group, engine))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step for every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss, as in torch.optim.

        Returns:
            What the closure returned, else None.

        Raises:
            RuntimeError: inside :meth:`sparse_weights`; a sparse or complex gradient; a gradient or a momentum
                buffer that does not fit its parameter.
            ValueError, TypeError: an option that was edited to something invalid.

        No parameter and no state has changed when an error is raised.
        """
        self._refuse_inside_sparse_weights("step()")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._validate_groups()
        scaling = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        whole = self._step_groups()
        kept, fresh = methods.find_kept(whole, self.state, self._first_u)
        cuts = self._cuts.find(whole)
        engines: list[Engine] = []
        if len(self._engines) == 1:
            (engine,) = self._engines.values()
            if engine.prepare(whole, self.state, *scaling, kept, cuts):
                engines = [engine]
        if not engines:
            parts = self._by_engine(whole)
            for engine, groups in parts:
                engine.prepare(groups, self.state, *scaling, kept, cuts)
            engines = [engine for engine, _ in parts]
        # Whether state appears is decided here, so that a first step waits for the device; no other does.
        if fresh and scaling[1] is not None and scaling[1].item() > 0:
            return loss
        for p, (key, value) in fresh.items():
            self.state[p][key] = value
        if self._keeps or fresh:
            self._keeps = methods.drop_obsolete(self.param_groups, self.state)
        if cuts:
            self._cuts.select(whole, kept)
        self._run(engines)
        for group in self.param_groups:
            if group["unit_norm"]:
                methods.normalize_([p for _, p in methods.moved(group)], scaling[1])
        return loss

    def _step_groups(self) -> Sequence[Group]:
        """The param groups as the engines are to see them in a step."""
        return self.param_groups

    def _run(self, engines: Sequence[Engine]) -> None:
        """Do the step that was prepared."""
        for engine in engines:
            engine.launch()

    # ---- reading u -----------------------------------------------------------------------------------------------

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
            before = [(p, p.detach().clone(), self._dual(p, group)) for p in params]
            self._write_u(params, group, engine)
            for p, w, dual in before:
                if dual is not None:
                    dual.copy_(methods.argument(w, dual) - methods.arithmetic(p.detach()))

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

    # ---- torch.optim habits --------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch.optim; its options are checked before it is added.

        Raises:
            ValueError, TypeError: as the constructor.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._validate(group)
            for j, p in enumerate(group["params"]):
                validate_param(p, group, param_name(group, len(self.param_groups) - 1, j))
        except Exception:
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """The state and the options, as in torch.optim.

        A parameter that is in training, but not yet with its method (which was edited after the last step), gets what
        the next step would begin with.
        """
        for i, group in enumerate(self.param_groups):
            key = methods.state_name(group)
            for j, p in enumerate(group["params"]):
                own = self.state.get(p)
                if key is not None and own and own.get(key) is None and not is_lazy(p) and p.numel() > 0:
                    w, name = self._weights(p).detach(), param_name(group, i, j)
                    # Where u cannot be made the next step will say so; saving must not.
                    with torch.no_grad(), contextlib.suppress(RuntimeError, ValueError):
                        own[key] = torch.zeros_like(p) if key == "dual" else self._first_u(w, group, name)
                    self._keeps = True
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimizer or of torch.optim.SGD.

        Options that the checkpoint does not name keep the values they have here.

        Raises:
            RuntimeError: inside :meth:`sparse_weights`.
            ValueError: groups that do not match, or an invalid option in the checkpoint; nothing has changed then.
        """
        self._refuse_inside_sparse_weights("load_state_dict()")
        self._keeps = True
        super().load_state_dict(state_dict)  # runs the pre-hooks, then hands the groups to __setstate__
        self._validated.clear()

    def __getstate__(self) -> dict[str, Any]:
        if self._dense is not None:
            raise RuntimeError("an optimizer cannot be copied or pickled inside sparse_weights()")
        return {**super().__getstate__(), "_requested_engine": self._requested_engine}

    def __setstate__(self, state: dict[str, Any]) -> None:
        loading = "_engines" in self.__dict__  # else a new object: unpickled or copied
        if loading:
            for i, (own, loaded) in enumerate(zip(self.param_groups, state["param_groups"], strict=True)):
                for key in OPTIONS:
                    loaded.setdefault(key, own[key])
                self._validate(loaded)
                for j, p in enumerate(loaded["params"]):
                    validate_param(p, loaded, param_name(loaded, i, j))
            methods.check_loaded(state["param_groups"], state["state"])
        super().__setstate__(state)
        if not loading:
            self._start(self._requested_engine)
        for group in self.param_groups:
            for key in OPTIONS:
                group.setdefault(key, self.defaults[key])
