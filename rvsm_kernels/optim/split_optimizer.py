"""What every split optimizer shares: options, checks and the hand-over to an engine.

A step goes down and nothing comes back up: the optimizer checks the options that have changed and makes the inputs of
the step, then an :class:`Engine` prepares (all checks, nothing written) and launches (all writes).
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ..dist.coupled import Couplings
from ..dist.norms import normalize_ as normalize_shards_
from ..dist.shards import is_sharded
from ..engines.checks import validate_param
from ..engines.interface import Engine, Ready, StepInputs
from ..method.bases import Base, validate
from ..method.cuts import Cuts, budget_of
from ..method.groups import grouping_of
from ..method.methods import METHODS
from ..method.new_squares import NewSquares
from ..method.options import make_plain, may_differ, names_of, shown, snapshot
from ..method.parameters import is_left_alone, param_name, with_gradient
from ..method.precision import Stored
from ..method.split import is_coupled, state_name
from ..method.step_options import StepOptions
from . import advice, checkpoint, method_states, traced
from .attributes import FromScaler, OptionOfGroups, ends_scaling, outside_graphs
from .chosen_engines import ChosenEngines
from .reading import ReadsU
from .sparse_view import SparseView
from .statistics import StepStatistics


class SplitOptimizer(ReadsU, Optimizer):
    """Relaxed variable splitting over a base step; see :class:`rvsm_kernels.RVSM`.

    A subclass says which base it steps with, and has a constructor with the options of that base and of the splitting.

    Args:
        params: parameters, named parameters or groups, as in torch.optim.
        options: values by name, in the place of the defaults in the table of options; keys that are no options of
            this optimizer are ignored.
        amp_scaling: whether a GradScaler hands its scale to the step.
        engine: the name of an engine, or None.
        statistics: whether steps make statistics; see :meth:`statistics`.
    """

    _base: ClassVar[Base]
    _only_engine: ClassVar[str | None] = None  # the engine of all objects of a class, whatever they are asked for
    _at_once: ClassVar[bool] = True  # whether a step may be one call that prepares and launches
    _option_names: ClassVar[tuple[str, ...]]
    _read_options: ClassVar[itemgetter[Any]]

    grad_scale = FromScaler("grad_scale")
    found_inf = FromScaler("found_inf")

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "_base" in vars(cls):  # a subclass that a user makes of RVSM has what RVSM has
            cls._option_names = names_of(cls._base.all_options)
            cls._read_options = itemgetter(*cls._option_names)
            for name in cls._option_names:
                setattr(cls, name, OptionOfGroups(name))

    def __init__(
        self,
        params: Any,
        options: Mapping[str, Any],
        *,
        amp_scaling: bool,
        engine: str | None,
        statistics: bool = False,
    ) -> None:
        defaults = {option.name: options.get(option.name, option.default) for option in self._base.all_options}
        make_plain(defaults, self._option_names)
        self._validate(defaults)
        if not isinstance(amp_scaling, bool):
            raise TypeError(f"Invalid amp_scaling value: {shown(amp_scaling)} (True or False is needed)")
        self._start(engine, amp_scaling, statistics)
        super().__init__(params, defaults)

    def _start(self, engine: str | None, amp_scaling: bool, statistics: bool = False) -> None:
        """The attributes beside torch's own; none of them is part of the state."""
        # GradScaler then hands grad_scale and found_inf to step() instead of unscaling in a pass of its own.
        self._step_supports_amp_scaling = amp_scaling
        self._statistics = StepStatistics(False)
        self.collect_statistics = statistics
        self._engines = ChosenEngines(self._only_engine or engine)
        self._view = SparseView(self)
        self._lock = threading.RLock()  # one step at a time: an engine's table serves one
        self._pull_rates = advice.PullRates()
        self._cuts = Cuts()
        self._squares = NewSquares()
        self._couplings = Couplings()
        self._seen: list[tuple[Any, ...] | None] = []  # the options of each group at their last check
        self._options: list[StepOptions] = []  # the same for the engines
        self._changed: set[int] = set()  # the groups of which the engine has not been told yet
        self._told: Engine | None = None  # the engine that knows the options of all others
        self._has_obsolete_states = True  # the state may hold what no method has any more
        self._summarize()

    @property
    def _states(self) -> Any:
        """Where the engines find the states, by parameter and name."""
        return self.state

    def _begin_anew(self) -> None:
        """Forget what was known of the tensors: those of parameters and states have been replaced."""
        self._start(self._engines.requested, self._step_supports_amp_scaling, self._statistics.on)

    # ---- options -----------------------------------------------------------------------------------------------------

    def _validate(self, group: Mapping[str, Any]) -> None:
        """Check every option of a param group; see :func:`rvsm_kernels.method.bases.validate`."""
        validate(group, self._base)

    def _check_new_group(self, i: int, group: dict[str, Any]) -> None:
        """Check the options and the parameters of a group that is added or loaded; its numbers become Python's own."""
        make_plain(group, self._option_names)
        self._validate(group)
        self._validate_params(i, group)

    def _validate_params(self, i: int, group: Mapping[str, Any]) -> None:
        """Check that the parameters of a group can be stepped with its options."""
        names = group.get("param_names")
        if group["group_dim"] is not None and names is not None and len(names) != len(group["params"]):
            raise ValueError(
                f"Invalid group_dim value: {group['group_dim']!r}: group {i} has {len(names)} names for"
                f" {len(group['params'])} parameters: if DeepSpeed has flattened them, no groups are left; shard with"
                " fully_shard (FSDP2), or leave group_dim=None"
            )
        for j, p in enumerate(group["params"]):
            validate_param(p, group, param_name(group, i, j))

    def _stepped_groups(self) -> list[dict[str, Any]]:
        """The param groups that the engines are shown, as many and in the order of ``param_groups``."""
        return self.param_groups

    def _step_options(self, group: Mapping[str, Any]) -> StepOptions:
        """What the engines are told of a param group."""
        return StepOptions.of(group, self._base)

    def _check_options(self) -> None:
        """Check every option that has changed since the last time; a scheduler's edit of lr is one."""
        groups, seen, read = self.param_groups, self._seen, self._read_options
        if len(seen) != len(groups):
            self._seen = seen = [None] * len(groups)
            self._options = []
        changed = [i for i, group in enumerate(groups) if may_differ(read(group), seen[i])]
        try:
            for i in changed:
                self._check_group(i, groups[i])
        finally:
            if changed:
                self._summarize()

    def _summarize(self) -> None:
        """What a step asks of the options of all groups together."""
        topk = coupled = unit_norm = at_rest = False
        for options in self._options:
            topk |= options.topk
            coupled |= options.coupled
            unit_norm |= bool(options.values.get("unit_norm"))
            at_rest |= options.method.state is not None and options.values["lr"] == 0
        self._any_topk, self._any_coupled, self._any_unit_norm = topk, coupled, unit_norm
        self._any_state_at_rest = at_rest

    def _check_group(self, i: int, group: dict[str, Any]) -> None:
        """Check the options of a group that may have changed, and remember them for the engines."""
        make_plain(group, self._option_names)
        old = self._options[i] if i < len(self._options) else None
        # What a tensor on the device held was checked when it came; to look again would wait for the device.
        checked = {} if old is None else old.same_on_device(group)
        self._validate({**group, **checked} if checked else group)
        new = self._step_options(group)
        if old is None or old.pattern != new.pattern or grouping_of(old.values) != grouping_of(new.values):
            self._validate_params(i, group)
        if old is None or new.differ(old):
            self._options[i : i + 1] = [new]
            self._changed.add(i)
            self._has_obsolete_states |= old is None or old.structure != new.structure
        self._seen[i] = snapshot(self._read_options(group))
        self._pull_rates.watch(i, group)

    # ---- the step ----------------------------------------------------------------------------------------------------

    @outside_graphs
    @ends_scaling
    @Optimizer.profile_hook_step
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step for every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss, as in torch.optim.

        Returns:
            What the closure returned, else None.

        Raises:
            RuntimeError: inside :meth:`sparse_weights`; a sparse or complex gradient; a gradient or a state that does
                not fit its parameter; a named engine in code that is being traced.
            ValueError, TypeError: an option that was edited to something invalid; a tensor without memory of its own
                beside a named engine, or in the place of a gradient or a state.

        No parameter and no state has changed when an error is raised.
        """
        self._view.refuse_while_open("step()")
        loss = None
        if closure is not None:
            if not callable(closure):
                raise TypeError(f"step takes a closure that computes the loss, or nothing, but got {shown(closure)}")
            with torch.enable_grad():
                loss = closure()
        with self._lock:
            (self._do_step if closure is None else self._do_step_outside_graphs)()
        return loss

    @Optimizer.profile_hook_step
    @torch.no_grad()
    def _traced_step(self) -> None:
        """:meth:`step` in a graph of torch.compile."""
        traced.step(self)

    def _can_be_traced(self) -> bool:
        """Whether the reference alone steps, with cuts of single tensors, and no GradScaler may call the step off."""
        alone = self._engines.requested == "reference" and self._at_once
        alone = alone and not any(budget_of(group) is not None for group in self.param_groups)
        alone = alone and not any(map(is_coupled, self.param_groups))
        alone = alone and not self._statistics.on  # what a graph computes is not there before it has run
        return alone and "grad_scale" not in self.__dict__ and "found_inf" not in self.__dict__

    def _init_group(self, group: dict[str, Any], params: list[Tensor], states: list[Any]) -> bool:
        """What torch does not trace of :meth:`_traced_step`, but calls as it is: by this name, as in torch.optim."""
        return traced.make_ready(self, group, params, states)

    @torch._disable_dynamo
    def _do_step_outside_graphs(self) -> None:
        """:meth:`_do_step` where torch.compile may be on."""
        self._do_step()

    def _do_step(self) -> None:
        grad = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # torch.no_grad() as a decorator costs two microseconds
        try:
            self._do_step_without_grad()
        finally:
            torch._C._set_grad_enabled(grad)

    def _do_step_without_grad(self) -> None:
        self._check_options()
        # What a GradScaler hands over is there or not; asking by attribute would raise each time.
        scaling = self.__dict__
        inputs = StepInputs(scaling.get("grad_scale"), scaling.get("found_inf"), self._options, self._states)
        if self._statistics.on:
            inputs.statistics = self._statistics.rooms(self._stepped_groups())
        if self._any_unit_norm and self._at_once:  # else w changes once more before it is divided
            inputs.new_squares = self._squares.rooms(self.param_groups)
        if not self._step_at_once(inputs):
            self._step_in_parts(inputs)
        if self._statistics.on:
            self._statistics.note(self._stepped_groups(), self._options)
        if self._any_unit_norm:
            for group, options in zip(self.param_groups, self._options, strict=True):
                if options.values["unit_norm"] and options.values["lr"] != 0:
                    moved = [Stored.of(p, group, self._states.get(p)) for _, p in with_gradient(group)]
                    lr = group["lr"] if options.on_device else None
                    for engine, theirs in self._by_engine([t for t in moved if not is_sharded(t.p)]):
                        engine.normalize_(theirs, inputs.found_inf, lr, inputs.new_squares)
                    normalize_shards_([t for t in moved if is_sharded(t.p)], inputs.found_inf, lr)

    def _by_engine(self, tensors: Sequence[Stored]) -> list[tuple[Engine, list[Stored]]]:
        """Parameters by the engine that serves them."""
        found: dict[str, tuple[Engine, list[Stored]]] = {}
        for t in tensors:
            engine = self._engines.engine_of(t.p, "a parameter")
            found.setdefault(engine.name, (engine, []))[1].append(t)
        return list(found.values())

    def _step_at_once(self, inputs: StepInputs) -> bool:
        """The usual step: one call of the engine that served the last step. False where that was not possible."""
        if (
            not self._at_once
            or self._any_topk
            or self._any_coupled
            or self._any_state_at_rest
            or self._has_obsolete_states
        ):
            return False
        engine = self._engines.the_only()
        if engine is None:
            return False
        inputs.changed = self._changed if engine is self._told else None
        if engine.step(self._stepped_groups(), inputs) != Ready.YES:
            return False
        self._told, self._changed = engine, set()
        return True

    def _step_in_parts(self, inputs: StepInputs) -> None:
        """Any other step: engines prepare, the optimizer makes what is missing and selects cuts, engines launch."""
        groups = self._stepped_groups()
        if self._any_coupled:
            inputs.options = self._couplings.sized(groups, inputs.options)
            if inputs.options is not self._options:  # lam depends on more than the options that an engine was told of
                self._told = None
            inputs.norms = self._couplings.rooms(groups, inputs.options)
            self._view.forget_cuts()
        options = inputs.options
        states = method_states.NewStates(inputs, self._view.first_u)
        if self._any_topk:
            inputs.cuts = self._cuts.find(groups, options, inputs.state_of)
            self._view.forget_cuts()
        if self._any_state_at_rest:
            states.copy_where_lr_is_0(groups)
        engines: list[Engine] = []
        parts: list[tuple[Engine, Sequence[Any], Sequence[StepOptions]]] = []  # what each engine steps
        try:
            only = self._engines.the_only()
            inputs.changed = self._changed if only is self._told else None
            if only is not None and _prepare(only, groups, inputs, states):
                engines, parts = [only], [(only, groups, options)]
                self._told, self._changed = only, set()
            else:
                self._told, self._changed = None, set()
                for share in self._engines.divide(groups):
                    engines.append(share.engine)
                    part = dataclasses.replace(inputs, options=[options[i] for i in share.places], changed=None)
                    parts.append((share.engine, share.groups, part.options))
                    if not _prepare(share.engine, share.groups, part, states):
                        raise TypeError(f"engine {share.engine.name!r} does not serve all of its parameters")
            # A step that makes new states reads found_inf here, which waits for the device; other steps leave it to the
            # engine.
            if states and inputs.found_inf is not None and inputs.found_inf.item() > 0:
                return
            states.put()
            if self._has_obsolete_states:
                method_states.drop_obsolete(self.param_groups, self._states)
                self._has_obsolete_states = False
            if self._any_topk:
                for engine, of_engine, their_options in parts:
                    self._cuts.select(of_engine, their_options, inputs.state_of, engine.select)
                self._cuts.select_budgets(self._view.select_for)
            if inputs.norms:
                self._couplings.fill(options, inputs.state_of, inputs.cuts)
            self._run(engines)
            if inputs.norms and self._statistics.on:
                self._couplings.correct(inputs.statistics, options)
        finally:
            for engine in engines:
                engine.drop()

    def _run(self, engines: Sequence[Engine]) -> None:
        """Do the step that was prepared."""
        for engine in engines:
            engine.launch()

    # ---- torch.optim habits ------------------------------------------------------------------------------------------

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
            self._check_new_group(index, group)
        except Exception:
            self.param_groups.pop()
            raise
        advice.of_group(index, group, explicit, self.param_groups[index - 1] if index else None)
        self._pull_rates.watch(index, group)

    def state_dict(self) -> dict[str, Any]:
        """The state and the options, as in torch.optim.

        A parameter that is in training, but not yet with its method (which was edited after the last step), gets what
        the next step would begin with.
        """
        self._complete_states()
        return super().state_dict()

    def _complete_states(self) -> None:
        """The states that the next step would begin with, of parameters whose method was edited after the last one."""
        self._view.forget_cuts()
        for i, group in enumerate(self.param_groups):
            make_plain(group, self._option_names)
            key = state_name(group)
            for j, p in enumerate(group["params"]):
                states = self._states.get(p) or {}
                if key is None or states.get(key) is not None or not (states or self.state.get(p)):
                    continue
                if not is_lazy(p) and not is_left_alone(p):
                    # Where u cannot be made the next step will say so; saving must not.
                    with torch.no_grad(), contextlib.suppress(RuntimeError, ValueError, TypeError):
                        if METHODS[group["method"]].starts_from_u:
                            made = self._view.first_u(p, group, param_name(group, i, j))
                        else:
                            made = method_states.zeros_for(p, self._step_options(group), key)
                        self._states[p][key] = made

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimizer or of the torch.optim optimizer that it replaces.

        The options of the checkpoint go before those that were passed to the constructor, as in torch.optim; options
        that it does not name keep the values they have here. Its groups need not be those of this optimizer: parameters
        are found by their names where both sides have them, else by their order in ``model.parameters()``, which
        :func:`rvsm_kernels.param_groups` notes. :func:`rvsm_kernels.to_torch_state_dict` is the way back.

        Raises:
            RuntimeError: inside :meth:`sparse_weights`.
            ValueError: a checkpoint of another kind of optimizer, parameters that cannot be mapped, or an invalid
                option; nothing has changed then.
        """
        self._view.refuse_while_open("load_state_dict()")
        if not isinstance(state_dict, Mapping):
            raise TypeError(
                f"load_state_dict takes what state_dict() returned, but got {shown(state_dict)}; torch.load reads files"
            )
        with self._lock:
            self._has_obsolete_states = True
            # A hook may unpack what it is given, so groups are mapped after the hooks, by the last of them.
            loaded: dict[str, Any] = {}

            def map_groups(optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
                mapped = checkpoint.regrouped(state, optimizer.param_groups, self._base, type(self).__name__)
                loaded.update(state if mapped is None else mapped)
                return loaded

            last = self.register_load_state_dict_pre_hook(map_groups)
            try:
                super().load_state_dict(state_dict)  # runs the hooks, then hands the groups to __setstate__
            finally:
                last.remove()
            self._seen = []
            self._take_types(loaded)

    def _take_types(self, state_dict: Mapping[str, Any]) -> None:
        """Load the states whose type is not that of their parameter once more: torch has cast all of them to that."""
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            options = self._step_options(group)
            if not options.mixed:
                continue
            for key, p in zip(saved["params"], group["params"], strict=True):
                states = state_dict["state"].get(key) or {}
                for name, dtype in options.states_of(p.dtype).items():
                    value = states.get(name)
                    if isinstance(value, Tensor) and name in self.state[p] and dtype != p.dtype:
                        self.state[p][name] = value.detach().to(p.device, dtype, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        if self._view.is_open:
            raise RuntimeError("an optimizer cannot be copied or pickled inside sparse_weights()")
        start_with = self._engines.requested, self._step_supports_amp_scaling, self._statistics.on
        return {**super().__getstate__(), "_start_with": start_with}

    def __setstate__(self, state: dict[str, Any]) -> None:
        loading = "_engines" in self.__dict__  # else a new object: unpickled or copied
        if loading:
            for i, (group, loaded) in enumerate(zip(self.param_groups, state["param_groups"], strict=True)):
                for key in (*self._option_names, "param_order"):
                    if key in group:
                        loaded.setdefault(key, group[key])
                self._check_new_group(i, loaded)
            method_states.check_loaded(state["param_groups"], state["state"])
        super().__setstate__(state)
        if not loading:
            # 0.1.0 pickled the engine alone.
            before = self.__dict__.pop("_requested_engine", None), True
            self._start(*self.__dict__.pop("_start_with", before))
        for option in self._base.all_options:  # a pickle of an earlier version may lack some
            self.defaults.setdefault(option.name, option.default)
            for group in self.param_groups:
                group.setdefault(option.name, self.defaults[option.name])


def _prepare(engine: Engine, groups: Sequence[Any], inputs: StepInputs, states: method_states.NewStates) -> bool:
    """Let an engine prepare a step over param groups; False if it does not serve all of them."""
    ready = engine.prepare(groups, inputs)
    if ready == Ready.LACKS:
        states.add_first_u(groups, inputs.options)
        ready = engine.prepare(groups, inputs)
    return ready == Ready.YES
