"""What every split optimizer shares: options, checks and the hand-over to an engine.

A step goes one way: the optimizer validates and fills defaults, then an :class:`Engine` prepares (all checks,
nothing written) and launches (all writes). Nothing comes back up.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from . import methods
from .groups import GroupDim
from .interface import Engine, Group
from .options import (
    OPTIONS,
    differ,
    param_name,
    refuse_expanded,
    snapshot,
    validate,
    validate_param,
)
from .reading import Reading

_read_options = itemgetter(*OPTIONS)
_GROUP_DIM = OPTIONS.index("group_dim")


class SplittingOptimizer(Reading):
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
