"""What an engine is told of one param group."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor

from . import device_numbers
from .bases import Base
from .groups import Grouping, as_dims, grouping_of, size_of_block
from .methods import METHODS, Method
from .options import PLAIN_TYPES
from .precision import MASTER_STATES, STATE_TYPES, has_master, is_stochastic
from .prox import prox_numbers
from .split import is_coupled, is_split, split_numbers, strength_of_size
from .windows import Pattern


@dataclass(frozen=True, slots=True, eq=False)
class StepOptions:
    """One param group as an engine steps it: made anew whenever an option has changed, and never changed itself.

    Attributes:
        values: the options as they were, by name; tensors among them as floats, lists as tuples. An option that the
            kernels read on the device is 1 here: see ``on_device``.
        on_device: the tensors of :data:`rvsm_kernels.method.device_numbers.NAMES` that the kernels read, None for those
            that are numbers; empty where all of them are.
        base: the base of the optimizer.
        method: the group's method; that without a state where there is no splitting.
        split: whether there is a splitting.
        topk: whether the cut comes from the magnitudes of each tensor.
        pattern: (n, m) of N:M sparsity, None for every other penalty.
        grouping: what indexes the groups, as it was given (negative numbers too); None for elements, and where the
            norms of groups do not matter to a step.
        lasso: whether there is a group lasso.
        coupled: whether the norms of groups are of several slices or weights, and made elsewhere.
        scaled: whether the numbers differ by the size of the groups.
        states: the names of the states, the base's first, then the method's.
        base_states: how many of them are the base's.
        counter: the name of the tensor that counts the steps of a parameter, None where neither the base nor a
            stochastic rounding needs one.
        counts: whether the numbers of the base follow from the count.
        mixed: whether a tensor of a step may have another storage type than its parameter, or the step rounds
            stochastically.
        precision: what decides about that.
        writes_gradient: the step writes to ``p.grad``: the base leaves the gradient to another optimizer, and the
            splitting has terms in it, or takes away that of zeros that are held.
        structure: what of all this decides about tables and launches, rather than about numbers.
    """

    values: Mapping[str, Any]
    on_device: tuple[Tensor | None, ...]
    base: Base
    method: Method
    split: bool
    topk: bool
    pattern: Pattern | None
    grouping: Grouping
    lasso: bool
    coupled: bool
    scaled: bool
    states: tuple[str, ...]
    base_states: int
    counter: str | None
    counts: bool
    mixed: bool
    writes_gradient: bool
    precision: Hashable
    structure: Hashable

    @classmethod
    def of(cls, group: Mapping[str, Any], base: Base) -> StepOptions:
        """Those of a param group whose options were checked."""
        values = {option.name: group[option.name] for option in base.all_options}
        tensors: dict[str, Tensor] = {}
        for name, value in values.items():
            if type(value) in PLAIN_TYPES:
                continue
            if isinstance(value, Tensor) and device_numbers.stays(name, group):
                tensors[name] = value
                values[name] = 1.0
            elif isinstance(value, (Tensor, list)):
                values[name] = tuple(value) if isinstance(value, list) else float(value)
        split, lasso = is_split(values), values["group_lasso"] != 0
        penalty = values["penalty"] if split else None
        pattern = tuple(values["pattern"]) if penalty == "nm" else None
        grouping = grouping_of(values) if split or lasso else None
        method = METHODS[values["method"]] if split else METHODS["rvsm"]
        base_states = base.states(values)
        states = base_states if method.state is None else (*base_states, method.state)
        scaled = bool(values["group_scale"])
        stochastic = values.get("rounding") == "stochastic" and not values["master_weights"]
        precision = bool(values.get("master_weights")), stochastic, values.get("state_dtype")
        in_gradient = lasso or (split and not values["decoupled"]) or bool(values["hold_zeros"])
        writes_gradient = base.writes_gradient and in_gradient
        return cls(
            values=values,
            on_device=tuple(map(tensors.get, device_numbers.NAMES)) if tensors else (),
            base=base,
            method=method,
            split=split,
            topk=penalty == "topk",
            pattern=pattern,
            grouping=grouping,
            lasso=lasso,
            coupled=grouping is not None and is_coupled(values),
            scaled=scaled,
            states=states,
            base_states=len(base_states),
            counter="step" if base.counter is None and stochastic else base.counter,
            counts=base.counter is not None,
            mixed=any(precision),
            precision=precision,
            writes_gradient=writes_gradient,
            structure=(
                *(base.name, method.name, penalty, pattern, grouping, lasso, scaled, states, writes_gradient),
                grouping is not None and is_coupled(values),
                precision,
                *tensors,
            ),
        )

    def on_host(self) -> StepOptions:
        """The same with every number read from its device, which waits for it; for engines that take only numbers."""
        if not self.on_device:
            return self
        found = {n: float(t) for n, t in zip(device_numbers.NAMES, self.on_device, strict=True) if t is not None}
        return StepOptions.of({**self.values, **found}, self.base)

    def for_size(self, size: float) -> StepOptions:
        """The same with lam scaled by a size of groups that an engine does not know; it reads numbers as above."""
        values = self.on_host().values
        scaled = {**values, "lam": strength_of_size(values, size), "group_scale": False, "params": []}
        return StepOptions.of(scaled, self.base)

    def differ(self, other: StepOptions) -> bool:
        """Whether a step with the others is another one."""
        same = len(self.on_device) == len(other.on_device) and all(map(is_, self.on_device, other.on_device))
        return self.values != other.values or not same

    def same_on_device(self, group: Mapping[str, Any]) -> dict[str, float]:
        """The options that a group still leaves to the kernels by the same tensors, with their values here."""
        names = zip(device_numbers.NAMES, self.on_device, strict=False)
        return {name: 1.0 for name, tensor in names if tensor is not None and group.get(name) is tensor}

    def states_of(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """The names and types of the states of a parameter of a dtype: the base's, the method's, that of its master."""
        master = has_master(self.values, dtype)
        usual = torch.float32 if master else dtype
        base_type = STATE_TYPES.get(self.values.get("state_dtype") or "", usual)
        types = {name: base_type if k < self.base_states else usual for k, name in enumerate(self.states)}
        if master:
            name, master_type = MASTER_STATES[dtype]
            types[name] = master_type
        return types

    @property
    def dims(self) -> tuple[int, ...] | None:
        """The dimensions of ``grouping``."""
        return as_dims(self.grouping)

    @property
    def block(self) -> int:
        """How many consecutive indices of them make a group."""
        return size_of_block(self.grouping)

    @property
    def master(self) -> bool:
        """Whether parameters of a half type have float32 weights behind them."""
        return bool(self.values.get("master_weights"))

    @property
    def seed(self) -> int:
        """The key of the random bits of stochastic rounding."""
        return int(self.values.get("seed", 0))

    def rounds(self, dtype: torch.dtype) -> bool:
        """Whether a step rounds a parameter of a dtype stochastically."""
        return is_stochastic(self.values, dtype)

    @property
    def turns_terms(self) -> bool:
        """Whether the step's own terms in ``p.grad`` change their sign: the optimizer that takes it turns it around."""
        return self.base.writes_gradient and bool(self.values["maximize"])

    @property
    def norm_rows(self) -> int:
        """The norms that each group needs: of what is thresholded and, where that is not w, of w for a group lasso."""
        return 2 if self.method.adds_state and self.lasso else 1

    def numbers(self, size: int, count: int) -> tuple[float, ...]:
        """The numbers of a step of one tensor, in double precision: those of the prox, of the splitting and the base.

        Those that follow from numbers on a device are finished there: ``csrc/math/device_numbers.h`` says how.

        Args:
            size: elements of one of its groups, 1 for elements. Matters only where ``scaled``.
            count: how many steps the base's states have seen; without a counter 0 for none, 1 for any number.
        """
        values = self.values
        a, penalty, tau = float(values["a"]), None, 0.0
        if self.split:
            # Top-k thresholds as l0 does, at another cut; N:M keeps as l0 does, by another rule.
            penalty = "l0" if self.topk or self.pattern else values["penalty"]
            tau = strength_of_size(values, size) / float(values["beta"])
        prox = prox_numbers(penalty, tau, a)
        split = split_numbers(values, self.split)
        if self.turns_terms:
            sign, pull, coupling, lasso, hold = split
            split = -sign, pull, -coupling, -lasso, hold
        return (*prox, *split, *self.base.numbers(values, count))
