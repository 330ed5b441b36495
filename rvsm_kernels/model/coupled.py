"""Coupled channels: for each channel of a network the slices of all weights that read it, and what leaves with it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..dist.shards import is_of_shards
from ..method.memory import kind_of
from ..method.parameters import is_flattened
from . import channel_layers  # noqa: F401  its rules register themselves
from .channel_rules import rule_of
from .channel_ties import across, settle
from .channel_trace import ChannelTrace, Uses
from .channels import FIXED, PADDING

NOBODY = 0
"""The label of an index that belongs to no coupled group."""


@dataclasses.dataclass(frozen=True)
class Reader:
    """A weight that reads channels along one dimension.

    Attributes:
        dim: the dimension of its inputs.
        labels: for each index the group that it reads, ``NOBODY`` where it belongs to none.
        kept: why an index belongs to no group, by index.
    """

    dim: int
    labels: tuple[int, ...]
    kept: dict[int, str]


@dataclasses.dataclass(frozen=True)
class CoupledChannels:
    """The coupled groups of a model: equal integers, anywhere, are one group.

    Attributes:
        readers: by name of the weight: which group each of its inputs belongs to.
        slices: by name of a parameter or buffer, by dimension: the groups with which its indices leave; readers are
            among them, besides filters, biases, norms and buffers. ``NOBODY``: the index stays.
        made: by group: (weight, dimension, indices) of each filter that makes it; depthwise ones pass it on.
        varying: by group: what its values follow from beside what makes them and parameters, where there is such.
        untraced: (module, operation) of which nothing is known: what goes in and comes out belongs to no group.
    """

    readers: dict[str, Reader]
    slices: dict[str, dict[int, tuple[int, ...]]]
    made: dict[int, list[tuple[str, int, list[int]]]]
    varying: dict[int, str]
    untraced: list[tuple[str, str]]

    @property
    def groups(self) -> dict[int, list[tuple[str, int, list[int]]]]:
        """By group: (weight, dimension, indices) of each reader."""
        return _by_group((name, reader.dim, reader.labels) for name, reader in self.readers.items())


def _by_group(
    places: Iterable[tuple[str, int, tuple[int, ...]]],
) -> dict[int, list[tuple[str, int, list[int]]]]:
    """By group: (weight, dimension, indices) of all weights that have some, from the labels of their indices."""
    found: dict[int, list[tuple[str, int, list[int]]]] = {}
    for name, dim, labels in places:
        by_label: dict[int, list[int]] = {}
        for i, label in enumerate(labels):
            if label != NOBODY:
                by_label.setdefault(label, []).append(i)
        for label, indices in by_label.items():
            found.setdefault(label, []).append((name, dim, indices))
    return found


def check_model(model: nn.Module, what: str) -> None:
    """Refuse a model whose modules or tensors are not what runs.

    Raises:
        TypeError: it is compiled, wrapped or scripted; a parameter is lazy, sharded or without memory of its own.
    """
    for name, module in model.named_modules():
        kind = type(module).__name__
        if hasattr(module, "_orig_mod"):
            raise TypeError(f"{name or 'the model'} is compiled: {what} needs its _orig_mod; compile afterwards")
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            raise TypeError(f"{name or 'the model'} is a {kind}: {what} needs its .module; wrap it afterwards")
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(f"{name or 'the model'} is a ScriptModule, which has no modules that {what} could follow")
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(t):
            raise TypeError(f"{name} is lazy: run the model once before {what}")
        if is_of_shards(t) or is_flattened(t):
            raise TypeError(f"{name} is sharded: {what} comes before sharding")
        if kind_of(t) is not None:
            raise TypeError(f"{name} is {kind_of(t)}, of which {what} knows nothing")


def as_arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments: of one tensor, of a sequence of arguments, or of a mapping of named ones."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, (str, bytes)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def outputs_of(value: Any, depth: int = 0) -> Iterator[Tensor]:
    """The tensors of a model's output: containers and dataclasses; a cache of keys and values is none."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for v in value.values():
            yield from outputs_of(v, depth + 1)
    elif isinstance(value, (list, tuple, set)):
        for v in value:
            yield from outputs_of(v, depth + 1)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from outputs_of(getattr(value, field.name), depth + 1)


def _own(value: Any, trace: ChannelTrace | None = None) -> Any:
    """The inputs as tensors of the pass: constants that do not shrink."""
    if isinstance(value, Tensor):
        t = value.detach().clone()
        if trace is not None:
            trace.note(t, torch.full(t.shape, FIXED, dtype=torch.int32))
        return t
    if isinstance(value, Mapping):
        return {k: _own(v, trace) for k, v in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(_own(v, trace) for v in value)
    return value


def _watch(model: nn.Module, trace: ChannelTrace) -> list[Any]:
    """Hooks that keep the name of the module that runs."""
    handles: list[Any] = []
    for name, module in model.named_modules():
        label = f"{name} ({type(module).__name__})" if name else type(module).__name__

        def enter(_m: nn.Module, _a: Any, label: str = label) -> None:
            trace.stack.append(label)

        def leave(_m: nn.Module, _a: Any, _o: Any) -> None:
            trace.stack.pop()

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave))
    return handles


def traced(model: nn.Module, example_inputs: Any) -> ChannelTrace:
    """A forward pass of a copy of the model in eval mode, settled.

    Raises:
        RuntimeError: the model cannot run on the example inputs.
    """
    with contextlib.suppress(RuntimeError, TypeError):  # a weight that is computed from others: torch copies leaves
        model = copy.deepcopy(model)
    modes = {m: m.training for m in model.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    handles: list[Any] = []
    args, kwargs = as_arguments(example_inputs)
    try:
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.inference_mode():
            uses, plain, named = Uses(), _own(args), _own(kwargs)
            try:
                with uses:
                    out = model(*plain, **named)
            except Exception as error:
                raise RuntimeError(f"the model does not run on example_inputs: {error}") from error
            trace = ChannelTrace(model, rule_of, uses.idle(list(outputs_of(out))))
            handles = _watch(model, trace)
            args, kwargs = _own(args, trace), _own(kwargs, trace)
            with trace:
                out = model(*args, **kwargs)
            for t in outputs_of(out):
                labels = trace.labels(t)
                if labels is not None:
                    trace.channels.freeze(labels, "an output of the model")
                else:
                    trace.block(t, "an output of the model")
            settle(trace)
    finally:
        for handle in handles:
            handle.remove()
        torch.backends.mha.set_fastpath_enabled(fast)
        for m, mode in modes.items():
            m.training = mode
    return trace


def coupled_channels(model: nn.Module, example_inputs: Any) -> CoupledChannels:
    """Find the coupled groups of a model (docs/groups.md, Coupled channels).

    Args:
        model: any module that runs on the example inputs in eval mode.
        example_inputs: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments. One small
            batch is enough; values do not matter.
    """
    with torch.inference_mode():
        return _result(traced(model, example_inputs))


def _result(trace: ChannelTrace) -> CoupledChannels:
    channels = trace.channels
    read = {int(k) for labels in trace.readers.values() for k in channels.removable(labels).tolist()} - {PADDING}
    number = {label: k + 1 for k, label in enumerate(sorted(read))}

    def numbered(labels: Tensor) -> tuple[int, ...]:
        return tuple(number.get(int(k), NOBODY) for k in channels.removable(labels).tolist())

    readers: dict[str, Reader] = {}
    slices: dict[str, dict[int, tuple[int, ...]]] = {}
    for (name, dim), labels in trace.readers.items():
        if (name, dim) in trace.makers:
            labels = torch.where(labels == PADDING, trace.makers[name, dim], labels)
        groups = numbered(labels)
        kept = {
            i: channels.reason(int(k)) or "nothing reads it"
            for i, k in enumerate(labels.tolist())
            if groups[i] == NOBODY and k != PADDING
        }
        readers[name] = Reader(dim, groups, kept)
        slices.setdefault(name, {})[dim] = groups
    for (name, dim), labels in trace.makers.items():
        slices.setdefault(name, {}).setdefault(dim, numbered(labels))
    for name, labels in trace.adopted.items():
        beside = across(trace, labels)
        if beside is not None:
            others = [d for d in range(labels.dim()) if d != beside]
            roots = channels.removable(labels)
            slices.setdefault(name, {})[beside] = numbered(roots.amax(others) if others else roots)
    slices = {name: {d: g for d, g in dims.items() if any(g)} for name, dims in slices.items()}
    made = _by_group(
        (name, dim, numbered(labels)) for (name, dim), labels in trace.makers.items() if name not in trace.passing
    )
    varying = {k: why for label, k in number.items() if (why := channels.why_varying(label)) is not None}
    slices = {name: dims for name, dims in slices.items() if dims}
    return CoupledChannels(readers, slices, made, varying, list(trace.unknown))
