"""What every split optimizer shares: options, checks and the hand-over to an engine.

A step goes one way: the optimizer validates and fills defaults, then an :class:`Engine` prepares (all checks,
nothing written) and launches (all writes). Nothing comes back up.
"""

from __future__ import annotations

import contextlib
import threading
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from . import advice, checkpoint, methods
from .attributes import FromScaler, OptionOfGroups, ends_scaling, names_its_arguments
from .interface import Engine, Group
from .method.groups import GroupDim
from .method.memory import kind_of, tracer
from .options import (
    OPTIONS,
    differ,
    is_left_alone,
    make_plain,
    param_name,
    refuse_expanded,
    shown,
    snapshot,
    validate,
    validate_param,
)
from .reading import Reading

_read_options = itemgetter(*OPTIONS)
_GROUP_DIM = OPTIONS.index("group_dim")


class SplittingOptimizer(Reading):
    """SGD with relaxed variable splitting; see :class:`rvsm_kernels.RVSM` for the arguments."""

    grad_scale = FromScaler("grad_scale")
    found_inf = FromScaler("found_inf")
    _at_once = True  # a step is one call of an engine, where nothing has to be done in between

    @names_its_arguments
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
        amp_scaling: bool = True,
        engine: str | None = None,
    ) -> None:
        values = locals()
        defaults = {key: values[key] for key in OPTIONS}
        make_plain(defaults)
        self._validate(defaults)
        if not isinstance(amp_scaling, bool):
            raise TypeError(f"Invalid amp_scaling value: {shown(amp_scaling)} (True or False is needed)")
        self._start(engine, amp_scaling)
        super().__init__(params, defaults)

    def _start(self, engine: str | None, amp_scaling: bool) -> None:
        """The attributes beside torch's own; none of them is part of the state."""
        # GradScaler then hands grad_scale and found_inf to step() instead of unscaling in a pass of its own.
        self._step_supports_amp_scaling = amp_scaling
        self._requested_engine = engine
        self._lock = threading.RLock()  # one step at a time: an engine's table serves one
        self._pull_rates = advice.PullRates()
        self._marks = {}
        self._dense_marks = set()
        self._dead = set()
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
    def _make_engine(self, name: str) -> Engine:
        """A new engine."""

    def _engine(self, p: Tensor, name: str) -> Engine:
        """The engine that serves a parameter.

        Raises:
            TypeError: a parameter without memory of its own, and a named engine that needs it.
            RuntimeError: a named engine in code that is being traced, which would not see what it does.
        """
        asked = self._requested_engine
        by = tracer()
        kind = kind_of(p)
        if by is None and kind is None:
            engine = self._engine_name(p.device.type)
        elif asked in (None, "reference") or self._engine_name("cpu") == "reference":
            engine = "reference"
        elif kind is not None:
            raise TypeError(f"engine={asked!r} cannot serve {name}: it is {kind}. Leave engine=None for such tensors")
        else:
            raise RuntimeError(
                f"{by} would not see what engine={asked!r} does. Leave engine=None for code that is traced"
            )
        if engine not in self._engines:
            self._engines[engine] = self._make_engine(engine)
        return self._engines[engine]

    def _by_engine(self, whole: Sequence[Group]) -> list[tuple[Engine, list[Group]]]:
        """Param groups, divided by the engine that serves each parameter; without those that have no gradient."""
        parts: dict[str, list[Group]] = {}
        for i, group in enumerate(whole):
            for j, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                name = param_name(group, i, j)
                part = parts.setdefault(self._engine(p, name).name, [])
                if not part or part[-1]["index"] != i:
                    part.append({**group, "index": i, "params": [], "param_names": []})
                part[-1]["params"].append(p)
                part[-1]["param_names"].append(name)
        if parts:
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
                make_plain(group)
                values = _read_options(group)
                self._validate(group)
                before = seen[i]
                if before is None or before[_GROUP_DIM] != group["group_dim"]:
                    for j, p in enumerate(group["params"]):
                        validate_param(p, group, param_name(group, i, j))
                seen[i] = snapshot(values)
                self._pull_rates.look(i, group)

    def _first_u(self, p: Tensor, group: Mapping[str, Any], name: str) -> Tensor:
        """u of a parameter that has none in its state yet."""
        refuse_expanded(p, name)
        engine = self._engine(p, name)
        engine.check(p, group, name)
        return torch.empty_like(p).copy_(self._u_of(p, p, group, engine))

    @ends_scaling
    @Optimizer.profile_hook_step
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step for every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss, as in torch.optim.

        Returns:
            What the closure returned, else None.

        Raises:
            RuntimeError: inside :meth:`sparse_weights`; a sparse or complex gradient; a gradient or a momentum
                buffer that does not fit its parameter; a named engine in code that is being traced.
            ValueError, TypeError: an option that was edited to something invalid; a tensor without memory of its own
                beside a named engine, or in the place of a gradient or a state.

        No parameter and no state has changed when an error is raised.
        """
        self._refuse_inside_sparse_weights("step()")
        loss = None
        if closure is not None:
            if not callable(closure):
                raise TypeError(f"step takes a closure that computes the loss, or nothing, but got {shown(closure)}")
            with torch.enable_grad():
                loss = closure()
        with self._lock:
            self._do_step()
        return loss

    @torch._disable_dynamo  # a kernel's launch is no graph: torch.compile calls it as it is
    def _do_step(self) -> None:
        self._validate_groups()
        own = self.__dict__  # what a GradScaler hands over is there or not; asking by attribute would raise each time
        scaling = own.get("grad_scale"), own.get("found_inf")
        whole = self._step_groups()
        kept, fresh = methods.find_kept(whole, self.state, self._first_u)
        cuts = self._cuts.find(whole)
        inputs = self.state, *scaling, kept, cuts
        known: Engine | None = None
        # The reference engine is asked for anew each time: it may have served what was traced.
        if len(self._engines) == 1 and tracer() is None:
            (known,) = self._engines.values()
            known = None if known.name == "reference" else known
        engines: list[Engine] = []
        done = False
        try:
            if known is not None and self._at_once and not (fresh or cuts or self._keeps):
                done = known.step(whole, *inputs)
            elif known is not None and known.prepare(whole, *inputs):
                engines = [known]
            if not (done or engines):
                for engine, groups in self._by_engine(whole):
                    engines.append(engine)
                    if not engine.prepare(groups, *inputs):
                        raise TypeError(f"engine {engine.name!r} does not serve all of its parameters")
            if not done:
                # Whether state appears is decided here, so that a first step waits for the device; no other does.
                if fresh and scaling[1] is not None and scaling[1].item() > 0:
                    return
                for p, (key, value) in fresh.items():
                    self.state[p][key] = value
                if self._keeps or fresh:
                    self._keeps = methods.drop_obsolete(self.param_groups, self.state)
                if cuts:
                    self._cuts.select(whole, kept)
                self._run(engines)
        finally:
            for engine in engines:
                engine.drop()
        for group in self.param_groups:
            if group["unit_norm"] and float(group["lr"]) != 0:
                methods.normalize_([p for _, p in methods.moved(group)], scaling[1])

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
        explicit = list(param_group) if isinstance(param_group, dict) else []
        if isinstance(param_group, dict) and "params" not in param_group:
            raise ValueError(f"a param group needs 'params', a list of tensors; this one has {', '.join(explicit)}")
        order = getattr(param_group["params"], "order", None) if explicit else None
        try:
            super().add_param_group(param_group)
        except ValueError as error:
            if "names" not in str(error):
                raise
            raise ValueError(
                f"{error}. The groups before this one have names (rvsm_kernels.param_groups gives them):"
                " {'params': list(layer.named_parameters())} has them too, and rvsm_kernels.param_groups(model,"
                " named=False) does without"
            ) from None
        index = len(self.param_groups) - 1
        group = self.param_groups[-1]
        if order is not None and len(order) == len(group["params"]):
            group["param_order"] = order
        try:
            make_plain(group)
            self._validate(group)
            for j, p in enumerate(group["params"]):
                validate_param(p, group, param_name(group, index, j))
        except Exception:
            self.param_groups.pop()
            raise
        advice.of_group(index, group, explicit)
        self._pull_rates.look(index, group)

    def state_dict(self) -> dict[str, Any]:
        """The state and the options, as in torch.optim.

        A parameter that is in training, but not yet with its method (which was edited after the last step), gets what
        the next step would begin with.
        """
        for i, group in enumerate(self.param_groups):
            make_plain(group)
            key = methods.state_name(group)
            for j, p in enumerate(group["params"]):
                own = self.state.get(p)
                if key is not None and own and own.get(key) is None and not is_lazy(p) and not is_left_alone(p):
                    w, name = self._weights(p).detach(), param_name(group, i, j)
                    # Where u cannot be made the next step will say so; saving must not.
                    with torch.no_grad(), contextlib.suppress(RuntimeError, ValueError, TypeError):
                        own[key] = torch.zeros_like(p) if key == "dual" else self._first_u(w, group, name)
                    self._keeps = True
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimizer or of torch.optim.SGD.

        The options of the checkpoint go before those that were passed to the constructor, as in torch.optim; options
        that it does not name keep the values they have here. Its groups need not be those of this optimizer: parameters
        are found by their names where both sides have them, else by their order in ``model.parameters()``, which
        :func:`rvsm_kernels.param_groups` notes. :func:`rvsm_kernels.to_torch_state_dict` is the way back.

        Raises:
            RuntimeError: inside :meth:`sparse_weights`.
            ValueError: a checkpoint of another kind of optimizer, parameters that cannot be mapped, or an invalid
                option; nothing has changed then.
        """
        self._refuse_inside_sparse_weights("load_state_dict()")
        if not isinstance(state_dict, Mapping):
            raise TypeError(
                f"load_state_dict takes what state_dict() returned, but got {shown(state_dict)}; torch.load reads files"
            )
        with self._lock:
            self._keeps = True
            # A hook may unpack what it is given, so groups are mapped after the hooks, by the last of them.
            last = self.register_load_state_dict_pre_hook(
                lambda optimizer, state: checkpoint.regrouped(state, optimizer.param_groups)
            )
            try:
                super().load_state_dict(state_dict)  # runs the hooks, then hands the groups to __setstate__
            finally:
                last.remove()
            self._validated.clear()

    def __getstate__(self) -> dict[str, Any]:
        if self._dense is not None:
            raise RuntimeError("an optimizer cannot be copied or pickled inside sparse_weights()")
        return {**super().__getstate__(), "_start_with": (self._requested_engine, self._step_supports_amp_scaling)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        loading = "_engines" in self.__dict__  # else a new object: unpickled or copied
        if loading:
            for i, (own, loaded) in enumerate(zip(self.param_groups, state["param_groups"], strict=True)):
                for key in (*OPTIONS, "param_order"):
                    if key in own:
                        loaded.setdefault(key, own[key])
                make_plain(loaded)
                self._validate(loaded)
                for j, p in enumerate(loaded["params"]):
                    validate_param(p, loaded, param_name(loaded, i, j))
            methods.check_loaded(state["param_groups"], state["state"])
        super().__setstate__(state)
        if not loading:
            # 0.1.0 pickled the engine alone.
            before = self.__dict__.pop("_requested_engine", None), True
            self._start(*self.__dict__.pop("_start_with", before))
        for group in self.param_groups:
            for key in OPTIONS:
                group.setdefault(key, self.defaults[key])


for _name in OPTIONS:
    setattr(SplittingOptimizer, _name, OptionOfGroups(_name))
