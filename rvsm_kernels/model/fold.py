"""Channels that are constants, whose filters are all zero: what they add to their readers goes into the biases."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..method.precision import join, master_of, store
from .coupled import CoupledChannels, Reader
from .slices import Kept, tensors_of
from .structures import is_conv1d

ITERATES = ("z",)
"""States of optimizers that are weights themselves (schedulefree's z): they move along with their parameter."""
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclasses.dataclass(frozen=True)
class FoldedChannels:
    """Constant inputs of a weight that were removed.

    Attributes:
        weight: the name of the weight that read them.
        channels: their indices, as they were before.
        bias: the name of the bias that has what they added; None where the constants were 0 and added nothing.
    """

    weight: str
    channels: tuple[int, ...]
    bias: str | None


@dataclasses.dataclass
class _Input:
    """What a reader got as its input: of each channel the smallest and the largest value."""

    low: Tensor
    high: Tensor
    eps: float

    def include(self, other: _Input) -> _Input:
        return _Input(
            torch.minimum(self.low, other.low), torch.maximum(self.high, other.high), max(self.eps, other.eps)
        )

    def constant(self, i: int) -> float | None:
        """The value of a channel, None where it has several: equal up to the rounding of an interpolation."""
        low, high = float(self.low[i]), float(self.high[i])
        slack = (
            16 * self.eps * max(1.0, abs(high)) if self.eps < 1e-4 else 0.0
        )  # of a half type it would be a difference
        return (low + high) / 2 if high - low <= slack else None  # False for NaN


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a weight is read: the only module that has it."""

    weight: Tensor
    module: Any
    bias: str | None


class Constants:
    """The channels of a model that are constants, and whether they can be folded.

    That a channel is a constant follows from the forward pass: all filters that make it are zero, and what it meets on
    its way are parameters. That is looked at, too: the readers' inputs are the same over batch and positions, for the
    example inputs and for random ones.

    Args:
        model: a copy of the model in eval mode that holds u.
        inputs: the example inputs and others.
        run: a forward pass of a model on inputs.
        zero: groups that nothing reads, of which nothing has to be folded.
        penalised: whether a parameter of this name has a penalty.

    Attributes:
        groups: those that can be folded.
        reasons: by group: why another constant cannot.
    """

    def __init__(
        self,
        model: nn.Module,
        channels: CoupledChannels,
        inputs: list[Any],
        run: Callable[[nn.Module, Any], Any],
        zero: set[int],
        penalised: Callable[[str], bool],
    ) -> None:
        self._weights = tensors_of(model)
        self._channels, self._penalised = channels, penalised
        self._readers = channels.groups
        self.reasons: dict[int, str] = {}
        self.groups: set[int] = set()
        made_of_zeros = {g for g, made in channels.made.items() if g not in zero and all(map(self._is_zero, made))}
        for g in sorted(made_of_zeros):
            if g in channels.varying:
                self.reasons[g] = f"no constant: {channels.varying[g]}"
        candidates = made_of_zeros - set(self.reasons)
        if not candidates:
            return
        self._places = _places(model, {name for g in candidates for name, _, _ in self._readers[g]}, self._weights)
        try:
            self._inputs = _watched(model, self._places, inputs, run)
        except Exception as error:
            failed = f"the model does not run on random inputs, which would show whether it is a constant: {error}"
            self.reasons.update(dict.fromkeys(candidates, failed.splitlines()[0]))
            return
        for g in sorted(candidates):
            reasons = [why for place in self._readers[g] if (why := self._why_not(*place)) is not None]
            if reasons:
                self.reasons[g] = reasons[0]
            else:
                self.groups.add(g)

    def _is_zero(self, place: tuple[str, int, list[int]]) -> bool:
        name, dim, indices = place
        return not bool(self._slice(name, dim, indices).any())

    def _slice(self, name: str, dim: int, indices: list[int]) -> Tensor:
        weight = self._weights[name].detach()
        return weight.index_select(dim, torch.tensor(indices, device=weight.device))

    def _why_not(self, name: str, dim: int, indices: list[int]) -> str | None:
        """Why a reader's bias cannot take what constant inputs add; None where it can, or has nothing to take."""
        if not bool(self._slice(name, dim, indices).any()):
            return None
        place, seen = self._places.get(name), self._inputs.get(name)
        if place is None or seen is None:
            return f"{name} is not read by one Linear or convolution of its own"
        values = [seen.constant(k) for i in indices for k in self._inputs_at(name, i)]
        if any(value is None for value in values):
            return f"no constant: it varies where {name} reads it"
        if not any(values):
            return None
        if place.bias is None:
            return f"{name} has no bias that could hold the constant"
        if _pads_with_zeros(place.module):
            return f"{name} pads with zeros, beside which the constant is none"
        if self._penalised(place.bias):
            return f"{place.bias} has a penalty, which would move the constant"
        return None

    def _inputs_at(self, name: str, i: int) -> range:
        """The inputs of a layer that index ``i`` of its weight reads: of a grouped convolution one for each group."""
        size = self._weights[name].shape[self._channels.readers[name].dim]
        return range(i, size * getattr(self._places[name].module, "groups", 1), size)

    def _added(self, name: str, i: int) -> Tensor:
        """What index ``i`` of a weight adds to each output, float64."""
        reader: Reader = self._channels.readers[name]
        weight = self._weights[name].detach().double().select(reader.dim, i)
        weight = weight.flatten(1).sum(1) if weight.dim() > 1 else weight
        values = [self._inputs[name].constant(k) or 0.0 for k in self._inputs_at(name, i)]
        return (weight.view(len(values), -1) * weight.new_tensor(values).view(-1, 1)).view(-1)

    def additions(self, groups: Iterable[int]) -> dict[str, Tensor]:
        """What the biases get when these groups are removed, by name, float64."""
        found: dict[str, Tensor] = {}
        for g in sorted(self.groups.intersection(groups)):
            for name, _, indices in self._readers[g]:
                for i in indices:
                    bias = self._bias_of(name, i)
                    if bias is not None:
                        added = self._added(name, i)
                        found[bias] = found[bias] + added if bias in found else added
        return found

    def _bias_of(self, name: str, i: int) -> str | None:
        """The bias that gets what an input adds, None where that is nothing."""
        seen = self._inputs.get(name)
        if seen is None or not self._is_used(name, i) or not any(seen.constant(k) for k in self._inputs_at(name, i)):
            return None
        return self._places[name].bias

    def _is_used(self, name: str, i: int) -> bool:
        return bool(self._slice(name, self._channels.readers[name].dim, [i]).any())

    def folded(self, groups: Iterable[int]) -> list[FoldedChannels]:
        """What the report says of these groups."""
        found: dict[tuple[str, str | None], list[int]] = {}
        for g in sorted(self.groups.intersection(groups)):
            for name, _, indices in self._readers[g]:
                for i in indices:
                    found.setdefault((name, self._bias_of(name, i)), []).append(i)
        return [FoldedChannels(name, tuple(sorted(indices)), bias) for (name, bias), indices in found.items()]


def _places(model: nn.Module, names: set[str], tensors: Mapping[str, Tensor]) -> dict[str, _Place]:
    """By name of a weight: the module that it is the weight of, where it is one alone, and of a kind that is known."""
    owners: dict[int, list[tuple[str, Any]]] = {}
    for prefix, module in model.named_modules():
        for key in ("weight", "bias"):
            t = module._parameters.get(key)
            if t is not None:
                owners.setdefault(id(t), []).append((f"{prefix}.{key}" if prefix else key, module))
    found = {}
    for name in names:
        of_weight = owners.get(id(tensors[name]), [])
        if len(of_weight) != 1:
            continue
        ((_, module),) = of_weight
        if not (isinstance(module, (nn.Linear, *_CONVOLUTIONS)) or is_conv1d(module)):
            continue
        bias = module._parameters.get("bias")
        of_bias = owners.get(id(bias), []) if bias is not None else []
        alone = len(of_bias) == 1 and of_bias[0][0] in tensors  # else it has another name, and may be read by that
        found[name] = _Place(tensors[name], module, of_bias[0][0] if alone else None)
    return found


def _pads_with_zeros(module: Any) -> bool:
    """Whether a convolution reads zeros beside its input."""
    if not isinstance(module, _CONVOLUTIONS) or module.padding_mode != "zeros" or module.padding == "valid":
        return False
    if module.padding == "same":
        return any(d * (k - 1) > 0 for d, k in zip(module.dilation, module.kernel_size, strict=True))
    return any(p != 0 for p in module.padding)


def _watched(
    model: nn.Module, places: Mapping[str, _Place], inputs: list[Any], run: Callable[[nn.Module, Any], Any]
) -> dict[str, _Input]:
    """By name of a weight: what its module got in all passes."""
    seen: dict[str, _Input] = {}
    handles = []
    for name, place in places.items():
        at = -(place.weight.dim() - 1)  # a channel has the dimensions of the kernel behind it

        def watch(_: Any, args: Any, kwargs: Any, name: str = name, at: int = at) -> None:
            x = args[0] if args else kwargs["input"]
            if x.numel():
                flat = x.detach().movedim(at, 0).reshape(x.shape[at], -1).double()
                now = _Input(flat.amin(1), flat.amax(1), torch.finfo(x.dtype).eps)
                seen[name] = seen[name].include(now) if name in seen else now

        handles.append(place.module.register_forward_pre_hook(watch, with_kwargs=True))
    try:
        for value in inputs:
            run(model, value)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def other_inputs(example_inputs: Any, count: int = 2) -> list[Any]:
    """Inputs like the example inputs: random floats; integers, masks and other pairs of values in another order."""
    gen = torch.Generator().manual_seed(0)

    def other(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.numel() == 0:
            return value
        here = value.detach().cpu()
        if here.is_floating_point() and here.unique().numel() > 2:
            t = torch.randn(here.shape, generator=gen) * float(here.float().std()) * 1.5 + float(here.float().mean())
            return t.to(here.dtype).to(value.device)
        return here.reshape(-1)[torch.randperm(here.numel(), generator=gen)].view(here.shape).to(value.device)

    return [tree_map(other, example_inputs) for _ in range(count)]


@torch.no_grad()
def add_to_biases(model: nn.Module, optimizers: list[Any], additions: Mapping[str, Tensor], remaining: Kept) -> None:
    """Write what folded channels have added into the biases of a model that is cut already.

    Behind a half type its master gets it in full, and so does what an optimizer keeps in the place of the weights.

    Args:
        additions: float64, of the outputs as they were before the cut.
        remaining: what the cut has left of each parameter.
    """
    tensors = tensors_of(model)
    for name, added in additions.items():
        p = tensors[name]
        index = remaining.get(name, {}).get(0)
        added = (added if index is None else added.index_select(0, index.to(added.device))).to(p.device)
        master = None
        for optimizer in optimizers:
            states = getattr(optimizer, "_states", getattr(optimizer, "state", {}))
            of_p = states.get(p, {})
            for group in getattr(optimizer, "param_groups", ()):
                if any(p is q for q in group["params"]):
                    master = master_of(p, group, of_p) if master is None else master
        for iterate in {id(t): t for t in _iterates(optimizers, p)}.values():
            iterate.add_(added)
        store(p, (join(p.detach(), master).double() + added).to(join(p.detach(), master).dtype), master)


def _iterates(optimizers: list[Any], p: Tensor) -> Iterable[Tensor]:
    for optimizer in optimizers:
        states = getattr(optimizer, "state", {})
        for name in ITERATES:
            state = states[p].get(name) if p in states else None
            if isinstance(state, Tensor) and state.shape == p.shape and state.is_floating_point():
                yield state


def has_penalty(optimizers: list[Any], p: Tensor) -> bool:
    """Whether an optimizer of this library thresholds a parameter: what is added to its w need not be added to u."""
    groups = [group for optimizer in optimizers for group in getattr(optimizer, "param_groups", ())]
    return any(group.get("penalty") is not None and any(p is q for q in group["params"]) for group in groups)
