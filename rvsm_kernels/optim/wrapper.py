"""The splitting around any torch optimizer: one fused pull, then the optimizer's own step."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..method.bases import NONE
from ..method.groups import GroupDim
from ..method.methods import STATES
from ..method.options import make_plain, shown
from ..method.split import is_split, state_name
from . import advice, checkpoint, method_states
from .attributes import ends_scaling, names_its_arguments, takes_closure
from .hold import TakenBack, clear_gradients
from .split_optimizer import SplitOptimizer

_SCALING = ("grad_scale", "found_inf")
_WRAPPED: weakref.WeakSet[Optimizer] = weakref.WeakSet()
"""The optimizers that have a wrapper, or had one: their groups hold its options."""


class RVSMWrapper(SplitOptimizer):
    """The relaxed variable splitting around a torch optimizer that exists: ``RVSMWrapper(torch.optim.Muon(...), ...)``.

    A step is one fused pass over the penalised parameters, then ``optimizer.step()``. With p the gap of
    :class:`rvsm_kernels.RVSM` and lr the group's current learning rate::

        decoupled=True:   w = w - lr * beta * p           the gradient is not read
        decoupled=False:  p.grad = p.grad + beta * p      and stays so; group_lasso is added in the same way

    The wrapper shares ``param_groups`` and ``state`` with the optimizer: the options of the splitting are plain values
    in the same groups (groups of :func:`rvsm_kernels.param_groups` keep theirs). ``u`` or ``dual`` is kept apart, and
    stands beside the optimizer's states in ``state_dict()``. Learning-rate schedulers, hooks and GradScaler see one
    optimizer. A group without a penalty is left to the optimizer alone, whatever its parameters and gradients are.

    Public attributes that the wrapper does not have are those of the optimizer. ``train()`` and ``eval()`` of
    schedulefree are among them. Take ``decoupled=False`` with it: ``decoupled=True`` pulls the point y where the
    gradient is taken, and the iterate z takes it back. Read and ship u in eval mode: it is that of the average x then.

    Args:
        optimizer: any ``torch.optim.Optimizer`` whose groups have an ``lr``; step the wrapper, not this.
        penalty, lam, beta, a, density, budget, budget_name, pattern: see :class:`rvsm_kernels.RVSM`; options are for
            groups that do not set them.
        group_dim, group_block, coupling, coupling_name, group_scale, group_lasso: see :class:`rvsm_kernels.RVSM`.
        decoupled, method, hold_zeros, engine, statistics: see :class:`rvsm_kernels.RVSM`.

    Raises:
        TypeError: something that is no optimizer, or one that makes sparse weights already; a wrong type.
        ValueError: a number out of range; a group without ``lr``; an optimizer that has an option of the same name.
        RuntimeError: ``differentiable=True`` beside a penalty.

    Example::

        adamw = torch.optim.NAdam(rvsm_kernels.param_groups(model, penalty="l0", lam=1e-5, beta=8.0), lr=1e-3)
        optimizer = rvsm_kernels.RVSMWrapper(adamw)
    """

    _base = NONE
    optimizer: Optimizer

    @names_its_arguments
    def __init__(
        self,
        optimizer: Optimizer,
        *,
        penalty: str | None = "l0",
        lam: float = 1e-6,
        beta: float = 1e-2,
        a: float = 1.0,
        density: float | None = None,
        budget: str = "tensor",
        budget_name: str | None = None,
        pattern: tuple[int, int] | None = None,
        group_dim: GroupDim = None,
        group_block: int = 1,
        coupling: Sequence[int] | None = None,
        coupling_name: str = "coupled",
        group_scale: bool = False,
        group_lasso: float = 0.0,
        decoupled: bool = True,
        method: str = "rvsm",
        hold_zeros: bool = False,
        engine: str | None = None,
        statistics: bool = False,
    ) -> None:
        given = locals()
        if isinstance(optimizer, SplitOptimizer) or not isinstance(optimizer, Optimizer):
            what = "makes sparse weights already" if isinstance(optimizer, SplitOptimizer) else "is no torch optimizer"
            raise TypeError(f"RVSMWrapper takes a torch optimizer, but {type(optimizer).__name__} {what}")
        if optimizer in _WRAPPED:
            raise TypeError(
                f"this {type(optimizer).__name__} has a wrapper already, and its groups have the options of that: edit"
                " them in optimizer.param_groups, or wrap a new optimizer"
            )
        defaults = {o.name: given.get(o.name, o.default) for o in NONE.all_options if o.name != "lr"}
        make_plain(defaults, self._option_names)
        self._validate({**defaults, "lr": 0.0})
        strange = sorted(set(optimizer.defaults) & set(defaults) - {"maximize"})
        if strange:
            raise ValueError(f"{type(optimizer).__name__} has options of its own named {', '.join(strange)}")
        # NAdam's momentum_decay is no misspelt momentum: the options of the wrapped optimizer are not advised about.
        explicit = [[key for key in group if key not in optimizer.defaults] for group in optimizer.param_groups]
        completed = [_completed(group, defaults, i, optimizer) for i, group in enumerate(optimizer.param_groups)]
        for i, group in enumerate(completed):
            self._check_new_group(i, group)
        Optimizer.__setstate__(self, {"optimizer": optimizer, "defaults": {**optimizer.defaults, **defaults}})
        self._own_states: Any = defaultdict(dict)
        self._start(engine, True, statistics)
        for group, full in zip(optimizer.param_groups, completed, strict=True):
            group.update(full)
        self._take_over_states()
        _WRAPPED.add(optimizer)
        for i, group in enumerate(self.param_groups):
            advice.of_group(i, group, explicit[i], self.param_groups[i - 1] if i else None)

    # ---- shared with the optimizer -----------------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The param groups of the wrapped optimizer."""
        return self.optimizer.param_groups  # type: ignore[no-any-return]

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = value

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The state of the wrapped optimizer; another one begins anew, also without ``u`` and ``dual``."""
        return self.optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        self.optimizer.state = value
        self._own_states.clear()

    @property
    def _states(self) -> Any:
        """``u`` and ``dual``: an optimizer that finds a state of a parameter takes it for initialised."""
        return self._own_states

    def _take_over_states(self) -> None:
        """``u`` and ``dual`` out of an optimizer that has loaded a wrapper's checkpoint."""
        for group in self.param_groups:
            key = state_name(group)
            for p in group["params"]:
                if key is not None and isinstance(self.state.get(p), dict) and key in self.state[p]:
                    self._own_states[p][key] = self.state[p].pop(key)

    @property
    def _step_supports_amp_scaling(self) -> bool:  # type: ignore[override]
        """Whether a GradScaler may leave the gradients scaled: nothing but the wrapped optimizer reads them then."""
        self._refuse_incomplete()
        reads = any(
            _pulls(group) and (group["group_lasso"] != 0 or group["hold_zeros"] or not group["decoupled"])
            for group in self.param_groups
        )
        return bool(getattr(self.optimizer, "_step_supports_amp_scaling", False)) and not reads

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        pass  # the wrapped optimizer says it

    def __getattr__(self, name: str) -> Any:
        of_class = getattr(type(self), name, None)
        if of_class is not None:  # a descriptor that raised, and says why
            return of_class.__get__(self, type(self))
        if name.startswith("_") or "optimizer" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        value = getattr(self.optimizer, name)
        if name not in ("train", "eval") or not callable(value):
            return value

        def switch(*args: Any, **kwargs: Any) -> Any:
            """As the wrapped optimizer does it, but not while the parameters hold u, which it would mix into w."""
            if any(group.get("train_mode") != (name == "train") for group in self.param_groups):
                self._view.refuse_while_open(f"{name}()")
            return value(*args, **kwargs)

        return switch

    # ---- options -----------------------------------------------------------------------------------------------------

    def _validate_params(self, i: int, group: Mapping[str, Any]) -> None:
        if _pulls(group):
            if group.get("differentiable"):
                raise RuntimeError("`RVSMWrapper` does not support `differentiable`: the pull is not differentiated")
            super()._validate_params(i, group)

    def _stepped_groups(self) -> list[dict[str, Any]]:
        return [group if _pulls(group) else {**group, "params": []} for group in self.param_groups]

    def _check_options(self) -> None:
        try:
            super()._check_options()
        except KeyError:
            self._refuse_incomplete()
            raise

    def _refuse_incomplete(self) -> None:
        """Raise ValueError for a group of the wrapped optimizer that came there without the wrapper."""
        for i, group in enumerate(self.param_groups):
            missing = [name for name in self._option_names if name not in group]
            if missing:
                raise ValueError(
                    f"group {i} of {type(self.optimizer).__name__} has no {', '.join(missing)}: add groups and load"
                    " checkpoints through the wrapper, which completes them"
                )

    # ---- the step ----------------------------------------------------------------------------------------------------

    @ends_scaling
    @Optimizer.profile_hook_step
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """The pull, then the step of the wrapped optimizer.

        Args:
            closure: reevaluates the model and returns the loss. It is called once before the pull; an optimizer that
                asks for more (LBFGS, SAM) calls it again, and coupled terms are added to each gradient.

        Returns:
            The loss of the closure, or what the wrapped optimizer returns.

        Raises:
            RuntimeError: in schedulefree's eval mode; and what :meth:`rvsm_kernels.RVSM.step` raises. Both before
                anything changes. What the wrapped optimizer raises comes after the pull.
        """
        self._view.refuse_while_open("step()")
        name = type(self.optimizer).__name__
        if self.param_groups and self.param_groups[0].get("train_mode") is False:
            raise RuntimeError(
                f"step() in eval mode, where {name} holds averaged weights: call optimizer.train() before"
            )
        takes, needs = takes_closure(type(self.optimizer))  # type: ignore[arg-type]  # a class has a hash
        loss = None
        if closure is not None:
            if not callable(closure):
                raise TypeError(f"step takes a closure that computes the loss, or nothing, but got {shown(closure)}")
            with torch.enable_grad():
                loss = closure()
        elif needs:
            raise TypeError(f"{name}.step() needs a closure")
        scaling = {name: self.__dict__[name] for name in _SCALING if self.__dict__.get(name) is not None}
        with self._lock:
            self._do_step_outside_graphs()
            held = TakenBack(self)
            for name, value in scaling.items():
                setattr(self.optimizer, name, value)
            try:
                if closure is None or not takes:
                    result = self.optimizer.step()
                else:
                    result = self.optimizer.step(self._again(closure, [] if needs else [loss]))
            finally:
                held.after_step()
                for name in scaling:
                    delattr(self.optimizer, name)
        return result if loss is None else loss

    def _again(self, closure: Callable[[], Any], known: list[Any]) -> Callable[[], Any]:
        """The closure for the wrapped optimizer, with coupled terms in the gradients.

        Args:
            known: the loss whose gradients are there already, for its first call; or nothing.
        """

        def evaluate() -> Any:
            if known:
                return known.pop()
            with torch.enable_grad():
                loss = closure()
            has_terms = (o.lasso or (o.split and not o.values["decoupled"]) for o in self._options)
            with torch.no_grad():
                if any(has_terms):
                    self._do_step_outside_graphs()
                else:  # a decoupled pull comes once a step
                    clear_gradients(self)
            return loss

        return evaluate

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the wrapped optimizer does it."""
        self.optimizer.zero_grad(set_to_none)

    # ---- torch.optim habits ------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer; options that it does not name are those of the constructor."""
        given = param_group if isinstance(param_group, dict) else {}
        explicit = [key for key in given if key not in self.optimizer.defaults]
        self.optimizer.add_param_group(param_group)
        index, group = len(self.param_groups) - 1, self.param_groups[-1]
        try:
            defaults = {name: self.defaults[name] for name in self._option_names if name != "lr"}
            full = _completed(group, defaults, index, self.optimizer)
            self._check_new_group(index, full)
        except Exception:
            self.param_groups.pop()
            raise
        group.update(full)
        advice.of_group(index, group, explicit, self.param_groups[index - 1] if index else None)

    def state_dict(self) -> dict[str, Any]:
        """The state dict of the wrapped optimizer, with the options of the splitting, and ``u`` or ``dual``."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        self._refuse_incomplete()
        self._complete_states()
        state_dict = self.optimizer.state_dict()
        if "state" not in state_dict or "param_groups" not in state_dict:
            name = type(self.optimizer).__name__
            raise TypeError(
                f"the state_dict() of {name} is not of torch's form: put {name} around the RVSMWrapper instead"
            )
        states = {key: dict(of_p) if isinstance(of_p, dict) else of_p for key, of_p in state_dict["state"].items()}
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for p, key in zip(group["params"], saved["params"], strict=True):
                if self._own_states.get(p):
                    states[key] = {**states.get(key, {}), **self._own_states[p]}
        state_dict = {**state_dict, "state": states}
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of a wrapper, or of the optimizer alone, with the same groups.

        Raises:
            RuntimeError: inside :meth:`sparse_weights`.
            ValueError: no checkpoint, other groups, an invalid option; nothing has changed then.
        """
        self._view.refuse_while_open("load_state_dict()")
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"load_state_dict takes what state_dict() returned, but got {shown(state_dict)}")
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        checkpoint.refuse_no_checkpoint(state_dict)
        groups = [dict(group) for group in state_dict["param_groups"]]
        if len(groups) != len(self.param_groups):
            raise ValueError("loaded state dict has a different number of parameter groups")
        params: dict[Any, Tensor] = {}
        for i, (group, own) in enumerate(zip(groups, self.param_groups, strict=True)):
            if len(group["params"]) != len(own["params"]):
                raise ValueError(
                    "loaded state dict contains a parameter group that doesn't match the size of optimizer's group"
                )
            for name in self._option_names:
                group.setdefault(name, own.get(name, self.defaults.get(name)))
            self._check_new_group(i, {**own, **group, "params": own["params"]})
            make_plain(group, self._option_names)
            params.update(zip(group["params"], own["params"], strict=True))
        method_states.check_loaded(groups, state_dict["state"])
        theirs: dict[Any, Any] = {}
        ours: dict[Any, dict[str, Any]] = {}
        for key, of_p in state_dict["state"].items():
            if isinstance(of_p, dict):
                ours[key] = {name: _moved(value, params.get(key)) for name, value in of_p.items() if name in STATES}
                of_p = {name: value for name, value in of_p.items() if name not in STATES}
            if of_p or key not in ours:
                theirs[key] = of_p
        with self._lock:
            self.optimizer.load_state_dict({**state_dict, "state": theirs, "param_groups": groups})
            self._own_states.clear()
            self._own_states.update((p, ours[key]) for key, p in params.items() if ours.get(key))
            self._has_obsolete_states = True
            self._seen = []
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        if self._view.is_open:
            raise RuntimeError("an optimizer cannot be copied or pickled inside sparse_weights()")
        return {
            "optimizer": self.optimizer,
            "defaults": self.defaults,
            "_own_states": self._own_states,
            "_engine": self._engines.requested,
            "_collects": self._statistics.on,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        engine, statistics = state.pop("_engine"), state.pop("_collects", False)
        Optimizer.__setstate__(self, state)
        self._start(engine, True, statistics)
        for option in NONE.all_options:  # a pickle of an earlier version may lack some
            if option.name != "lr" and option.name not in self.defaults:
                self.defaults[option.name] = option.default
                for group in self.param_groups:
                    group.setdefault(option.name, option.default)
        _WRAPPED.add(self.optimizer)


def _pulls(group: Mapping[str, Any]) -> bool:
    """Whether the pull has anything to do in a group."""
    return is_split(group) or group["group_lasso"] != 0 or bool(group["hold_zeros"])


def _moved(state: Any, p: Tensor | None) -> Any:
    """A loaded state on the device and in the dtype of its parameter."""
    return state.to(p.device, p.dtype) if isinstance(state, Tensor) and p is not None else state


def _completed(group: Mapping[str, Any], defaults: Mapping[str, Any], i: int, optimizer: Optimizer) -> dict[str, Any]:
    """A group with all options of the splitting.

    Raises:
        ValueError: it has no lr, which the pull needs.
    """
    if "lr" not in group:
        raise ValueError(f"group {i} of {type(optimizer).__name__} has no lr, which the pull is proportional to")
    # Some optimizers keep maximize for themselves.
    return {**defaults, "maximize": getattr(optimizer, "maximize", None) is True, **group}
