"""The step of the reference engine inside a graph of torch.compile, traced as the optimizers of torch.optim are.

What a step checks and makes, it does while torch traces, in :func:`make_ready`: the optimizer calls it ``_init_group``,
and a method of this name torch calls as it is; then it guards the param groups and the states that it finds there. What
is left for the graph is the arithmetic of :func:`rvsm_kernels.engines.reference.step_params`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..engines.interface import StepInputs
from ..engines.reference import ReferenceEngine, find_states, step_params
from ..method import device_numbers
from ..method.memory import kind_of, turns_of
from ..method.parameters import param_name, with_gradient
from ..method.precision import Stored, master_name
from ..method.selection import fresh_cut, normalize_together_
from ..method.step_options import StepOptions
from . import method_states

if TYPE_CHECKING:
    from .split_optimizer import SplitOptimizer


def make_ready(optimizer: SplitOptimizer, group: dict[str, Any], params: list[Tensor], states: list[Any]) -> bool:
    """All of the step of a param group that is not arithmetic, in plain Python: checks, and states that are missing.

    The momentum of SGD alone stays missing before the first step, which computes something else than later ones. States
    of all groups are made when the first is asked for: torch looks at ``optimizer.state`` once.

    Args:
        params: empty; gets the parameters that the step moves.
        states: empty; gets the states of the first of them, then those of the second, ..., in the order of
            :func:`_names`; None for one that is missing.

    Returns:
        Whether one call can step all of them: no two share memory, and they are of one kind.
    """
    _allow_numbers()
    optimizer._check_options()
    all_options = [options.on_host() for options in optimizer._options]
    inputs = StepInputs(None, None, all_options, optimizer.state)
    ReferenceEngine().prepare(optimizer.param_groups, inputs)
    if optimizer._has_obsolete_states:
        method_states.drop_obsolete(optimizer.param_groups, optimizer.state)
        optimizer._has_obsolete_states = False
    for i, (other, options) in enumerate(zip(optimizer.param_groups, all_options, strict=True)):
        for j, p in with_gradient(other):
            for name, state in find_states(p, options, inputs).items():
                if state is None and name == "u":
                    optimizer.state[p][name] = optimizer._view.first_u(p, other, param_name(other, i, j))
                elif state is None and name != "momentum_buffer":
                    optimizer.state[p][name] = method_states.zeros_for(p, options, name)
            if options.counter is not None and inputs.state_of(p, options.counter) is None:
                optimizer.state[p][options.counter] = torch.zeros((), dtype=torch.float32)
            if other is group:
                params.append(p)
                states += [optimizer.state[p].get(name) for name in _names(p, options)]
    return not any(turns_of(params)) and len({kind_of(p) for p in params}) == 1


def _names(p: Tensor, options: StepOptions) -> list[str]:
    """The names of the states of a parameter, its counter among them."""
    names = list(options.states_of(p.dtype))
    return names if options.counter is None else [*names, options.counter]


def step(optimizer: SplitOptimizer) -> None:
    """A step without a closure and without a GradScaler; everything here is traced."""
    optimizer._view.refuse_while_open("step()")
    for group in optimizer.param_groups:
        params: list[Tensor] = []
        found: list[Any] = []
        together = optimizer._init_group(group, params, found)
        lr, numbers = _read(group)
        options = StepOptions.of({**group, **numbers}, optimizer._base)
        flat = iter(found)
        states = [{name: next(flat) for name in _names(p, options)} for p in params]
        size = len(params) if together else 1
        for k in range(0, len(params), size):
            _step_together(optimizer, params[k : k + size], states[k : k + size], options, lr)


def _read(group: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
    """lr as a tensor, and the options that a graph reads from tensors: lr, a float or not, and other tensors.

    lr is to change without another graph. torch makes a graph for each value of a float that it cannot replace by a
    tensor, such as the scalar of a foreach call; it can replace the term of a sum.
    """
    tensors = {name: group[name] for name in device_numbers.NAMES if isinstance(group.get(name), Tensor)}
    if "lr" not in tensors:
        tensors["lr"] = torch.zeros((), dtype=torch.float64) + group["lr"]
    return tensors["lr"], {name: _number(tensor) for name, tensor in tensors.items()}


def _number(tensor: Tensor) -> float:
    """What a 1-element tensor holds, read by the graph."""
    if tensor.dtype == torch.float64:
        # torch takes such a tensor for a float, whose value it may compile for; not so what a reduction gives.
        tensor = tensor.reshape(1).expand(2).amax()
    with torch._dynamo.patch_dynamo_config(capture_scalar_outputs=True):
        return tensor.item()


def _allow_numbers() -> None:
    """Let the graph that is being traced read numbers from tensors, as torch does where it needs to."""
    context = torch._guards.TracingContext.try_get()
    if context is not None and context.fake_mode is not None:
        context.fake_mode.allow_scalar_outputs = True


def _step_together(
    optimizer: SplitOptimizer, params: list[Tensor], states: list[Any], options: StepOptions, lr: Tensor
) -> None:
    """The step of parameters of a group that share no memory.

    Args:
        states: of each parameter, by name.
        lr: a graph cannot ask whether it is 0, as the step does before it moves the state of a method.
    """
    values, key = options.values, options.method.state
    cuts = {p: fresh_cut(p, options, of_p.get) for p, of_p in zip(params, states, strict=True)} if options.topk else {}
    inputs = StepInputs(None, None, [options], optimizer.state, cuts=cuts)
    before = [] if key is None else [of_p[key].clone() for of_p in states]
    step_params(params, states, _counts(states, options), options, inputs, moves=True)
    for of_p, old in zip(states, before, strict=bool(before)):
        of_p[key].copy_(torch.where(lr.to(old.device) == 0, old, of_p[key]))
    if options.counter is not None:
        torch._foreach_add_([of_p[options.counter] for of_p in states], 1)
    if values.get("unit_norm"):
        for p, of_p in zip(params, states, strict=True):
            master = master_name(values, p.dtype)
            counter = of_p[options.counter] if options.rounds(p.dtype) else None
            stored = Stored(p, None if master is None else of_p[master], options.seed, counter)
            normalize_together_([stored], None, lr)


def _counts(states: list[Any], options: StepOptions) -> list[Any]:
    """What :func:`rvsm_kernels.engines.counters.counts_of` says, of states that are all there but the momentum."""
    if options.counter is None:
        names = options.states[: options.base_states]
        return [int(all(of_p[name] is not None for name in names)) for of_p in states]
    return [int(_number(of_p[options.counter])) for of_p in states]
