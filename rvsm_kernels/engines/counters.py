"""The 1-element tensors that count the steps of parameters, such as the ``step`` of torch.optim.AdamW."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..method.step_options import StepOptions
from .interface import StepInputs


def counts_of(params: Sequence[Tensor], options: StepOptions, inputs: StepInputs) -> list[int]:
    """How many steps the states of each parameter have seen; without a counter 0 where a state is missing, else 1."""
    if options.counter is None:
        names = options.states[: options.base_states]
        return [int(all(inputs.state_of(p, name) is not None for name in names)) for p in params]
    found = [inputs.state_of(p, options.counter) for p in params]
    return [0 if counter is None else int(counter.item()) for counter in found]


def advance(params: Iterable[Tensor], options: StepOptions, inputs: StepInputs) -> None:
    """Count one step more of each parameter; a counter that is missing is made, in the type and place of torch's."""
    if options.counter is None:
        return
    for p in params:
        counter = inputs.state_of(p, options.counter)
        if counter is None:
            inputs.states[p][options.counter] = torch.ones((), dtype=torch.float32)
        else:
            counter.add_(1)
