"""The splitting around any torch optimizer: one fused pull, then the optimizer's own step."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from ..engines.checks import validate_param
from ..method.bases import NONE
from ..method.groups import GroupDim
from ..method.methods import STATES
from ..method.options import make_plain, shown
from ..method.parameters import param_name
from ..method.split import is_split
from . import advice, method_states
from .attributes import ends_scaling, names_its_arguments
from .split_optimizer import SplitOptimizer

_SCALING = ("grad_scale", "found_inf")


class RVSMWrapper(SplitOptimizer):
    """The relaxed variable splitting around a torch optimizer that exists: ``RVSMWrapper(torch.optim.Muon(...), ...)``.

    A step is one fused pass over the penalised parameters, then ``optimizer.step()``. With p the gap of
    :class:`rvsm_kernels.RVSM` and lr the group's current learning rate::

        decoupled=True:   w = w - lr * beta * p           the gradient is not read
        decoupled=False:  p.grad = p.grad + beta * p      and stays so; group_lasso is added in the same way

    The wrapper shares ``param_groups`` and ``state`` with the optimizer: the options of the splitting are plain values
    in the same groups (groups of :func:`rvsm_kernels.param_groups` keep theirs). ``u`` or ``dual`` is kept apart, and
    stands beside the optimizer's states in ``state_dict()``. Learning-rate schedulers, hooks and GradScaler see one
    optimizer.
    What the wrapper does not have is looked up in the optimizer (``train()``, ``eval()``).

    Args:
        optimizer: any ``torch.optim.Optimizer`` whose groups have an ``lr``; step the wrapper, not this.
        penalty, lam, beta, a, density, group_dim, group_scale, group_lasso, decoupled, method, engine: see
            :class:`rvsm_kernels.RVSM`; for groups that do not set them.

    Raises:
        TypeError: something that is no optimizer, or one that makes sparse weights already; a wrong type.
        ValueError: a number out of range; a group without ``lr``; an optimizer that has an option of the same name.

    Example::

        adamw = torch.optim.NAdam(rvsm_kernels.param_groups(model, penalty="l0", lam=1e-5, beta=8.0), lr=1e-3)
        optimizer = rvsm_kernels.RVSMWrapper(adamw)
    """

    _base = NONE

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
        group_dim: GroupDim = None,
        group_scale: bool = False,
        group_lasso: float = 0.0,
        decoupled: bool = True,
        method: str = "rvsm",
        engine: str | None = None,
    ) -> None:
        given = locals()
        if isinstance(optimizer, SplitOptimizer) or not isinstance(optimizer, Optimizer):
            what = "makes sparse weights already" if isinstance(optimizer, SplitOptimizer) else "is no torch optimizer"
            raise TypeError(f"RVSMWrapper takes a torch optimizer, but {type(optimizer).__name__} {what}")
        defaults = {o.name: given.get(o.name, o.default) for o in NONE.all_options if o.name != "lr"}
        make_plain(defaults, self._option_names)
        self._validate({**defaults, "lr": 0.0})
        strange = sorted(set(optimizer.defaults) & set(defaults) - {"maximize"})
        if strange:
            raise ValueError(f"{type(optimizer).__name__} has options of its own named {', '.join(strange)}")
        explicit = [list(group) for group in optimizer.param_groups]
        completed = [_completed(group, defaults, i, optimizer) for i, group in enumerate(optimizer.param_groups)]
        for i, group in enumerate(completed):
            self._check_new_group(i, group)
        for group, full in zip(optimizer.param_groups, completed, strict=True):
            group.update(full)
        Optimizer.__setstate__(self, {"optimizer": optimizer, "defaults": {**optimizer.defaults, **defaults}})
        self._own_states: Any = defaultdict(dict)
        self._start(engine, True)
        for i, group in enumerate(self.param_groups):
            advice.of_group(i, group, explicit[i])

    # ---- shared with the optimizer -----------------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The param groups of the wrapped optimizer."""
        return self.optimizer.param_groups  # type: ignore[no-any-return]

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The state of the wrapped optimizer."""
        return self.optimizer.state

    @property
    def _states(self) -> Any:
        """``u`` and ``dual``: an optimizer that finds a state of a parameter takes it for initialised."""
        return self._own_states

    @property
    def _step_supports_amp_scaling(self) -> bool:  # type: ignore[override]
        """Whether a GradScaler may leave the gradients scaled: nothing but the wrapped optimizer reads them then."""
        reads = any(
            group["group_lasso"] != 0 or (is_split(group) and not group["decoupled"]) for group in self.param_groups
        )
        return bool(getattr(self.optimizer, "_step_supports_amp_scaling", False)) and not reads

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        pass  # the wrapped optimizer says it

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in (*self._option_names, *_SCALING) or "optimizer" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.optimizer, name)

    # ---- the step ----------------------------------------------------------------------------------------------------

    @ends_scaling
    @Optimizer.profile_hook_step
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """The pull, then the step of the wrapped optimizer.

        Args:
            closure: reevaluates the model and returns the loss. It is called once before the pull; an optimizer that
                needs it (LBFGS) calls it again as often as it likes, and coupled terms are added to each gradient.

        Returns:
            The loss of the closure, or what the wrapped optimizer returns.

        Raises:
            what :meth:`rvsm_kernels.RVSM.step` raises, before anything changes, and what the wrapped optimizer raises.
        """
        self._view.refuse_while_open("step()")
        loss, evaluate = None, _needs_closure(self.optimizer)
        if closure is not None:
            if not callable(closure):
                raise TypeError(f"step takes a closure that computes the loss, or nothing, but got {shown(closure)}")
            with torch.enable_grad():
                loss = closure()
        elif evaluate:
            raise TypeError(f"{type(self.optimizer).__name__}.step() needs a closure")
        scaling = {name: self.__dict__[name] for name in _SCALING if self.__dict__.get(name) is not None}
        with self._lock:
            self._do_step()
            for name, value in scaling.items():
                setattr(self.optimizer, name, value)
            try:
                if not evaluate:
                    result = self.optimizer.step()
                else:
                    result = self.optimizer.step(lambda: self._evaluated(closure))
            finally:
                for name in scaling:
                    delattr(self.optimizer, name)
        return result if loss is None else loss

    def _evaluated(self, closure: Any) -> Any:
        """The loss of a closure that the wrapped optimizer calls, with coupled terms in the gradients."""
        with torch.enable_grad():
            loss = closure()
        if any(options.writes_gradient for options in self._options):
            self._do_step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the wrapped optimizer does it."""
        self.optimizer.zero_grad(set_to_none)

    # ---- torch.optim habits ------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer; options that it does not name are those of the constructor."""
        explicit = list(param_group) if isinstance(param_group, dict) else []
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
        advice.of_group(index, group, explicit)

    def state_dict(self) -> dict[str, Any]:
        """The state dict of the wrapped optimizer, with the options of the splitting, and ``u`` or ``dual``."""
        self._complete_states()
        state_dict = self.optimizer.state_dict()
        states = {key: dict(of_p) if isinstance(of_p, dict) else of_p for key, of_p in state_dict["state"].items()}
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for p, key in zip(group["params"], saved["params"], strict=True):
                if self._own_states.get(p):
                    states[key] = {**states.get(key, {}), **self._own_states[p]}
        return {**state_dict, "state": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of a wrapper, or of the optimizer alone, with the same groups.

        Raises:
            RuntimeError: inside :meth:`sparse_weights`.
            ValueError: other groups, an invalid option; nothing has changed then.
        """
        self._view.refuse_while_open("load_state_dict()")
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"load_state_dict takes what state_dict() returned, but got {shown(state_dict)}")
        groups = [dict(group) for group in state_dict.get("param_groups", ())]
        for i, (group, own) in enumerate(zip(groups, self.param_groups, strict=False)):
            for name in self._option_names:
                if name in own:
                    group.setdefault(name, own[name])
            make_plain(group, self._option_names)
            self._validate(group)
            for j, p in enumerate(own["params"]):
                validate_param(p, group, param_name(own, i, j))
        method_states.check_loaded(groups, state_dict.get("state", {}))
        theirs: dict[Any, Any] = {}
        ours: dict[Any, dict[str, Any]] = {}
        for key, of_p in state_dict.get("state", {}).items():
            if isinstance(of_p, dict):
                ours[key] = {name: value for name, value in of_p.items() if name in STATES}
                of_p = {name: value for name, value in of_p.items() if name not in STATES}
            if of_p or key not in ours:
                theirs[key] = of_p
        with self._lock:
            self.optimizer.load_state_dict({**state_dict, "state": theirs, "param_groups": groups})
            self._own_states.clear()
            for group, saved in zip(self.param_groups, groups, strict=True):
                for p, key in zip(group["params"], saved["params"], strict=True):
                    if ours.get(key):
                        self._own_states[p] = {name: value.to(p.device, p.dtype) for name, value in ours[key].items()}
            self._has_obsolete_states = True
            self._seen = []

    def __getstate__(self) -> dict[str, Any]:
        if self._view.is_open:
            raise RuntimeError("an optimizer cannot be copied or pickled inside sparse_weights()")
        return {
            "optimizer": self.optimizer,
            "defaults": self.defaults,
            "_own_states": self._own_states,
            "_engine": self._engines.requested,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        engine = state.pop("_engine")
        Optimizer.__setstate__(self, state)
        self._start(engine, True)


def _completed(group: Mapping[str, Any], defaults: Mapping[str, Any], i: int, optimizer: Optimizer) -> dict[str, Any]:
    """A group with all options of the splitting.

    Raises:
        ValueError: it has no lr, which the pull needs.
    """
    if "lr" not in group:
        raise ValueError(f"group {i} of {type(optimizer).__name__} has no lr, which the pull is proportional to")
    return {**defaults, **group}


def _needs_closure(optimizer: Optimizer) -> bool:
    """Whether a step of the optimizer cannot do without a closure."""
    step = inspect.signature(type(optimizer).step)
    closure = step.parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty
