"""Removing channels that nothing reads any more: the model and its optimizer get smaller in place, outputs stay."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .coupled import NOBODY, CoupledChannels, as_arguments, check_model, coupled_channels, outputs_of
from .fold import Constants, FoldedChannels, add_to_biases, has_penalty, other_inputs
from .slices import Kept, cut_couplings, cut_model, cut_states, optimizers_in, tensors_of

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""How much outputs may differ from those before, relative to the largest; of half types 0.05."""


@dataclasses.dataclass(frozen=True)
class KeptChannels:
    """Channels of a weight that are zero, and stay: its inputs, or outputs where the reason says that it makes them.

    Attributes:
        weight: the name of the weight.
        channels: their indices, as they were before.
        reason: why they stay.
    """

    weight: str
    channels: tuple[int, ...]
    reason: str


@dataclasses.dataclass(frozen=True)
class ShrinkReport:
    """What :func:`rvsm_kernels.shrink` did.

    Attributes:
        parameters, macs, bytes: before and after: elements of parameters; multiplications with additions of a forward
            pass of the example inputs (None where they cannot be counted); bytes of parameters and buffers.
        groups: how many coupled groups were removed.
        removed: by name of a weight: how many of its inputs are gone, of how many.
        kept: zero channels that stay, and why.
        folded: channels that were constants, whose filters are zero, and went: what they added is in biases now.
    """

    parameters: tuple[int, int]
    macs: tuple[int | None, int | None]
    bytes: tuple[int, int]
    groups: int
    removed: dict[str, tuple[int, int]]
    kept: list[KeptChannels]
    folded: list[FoldedChannels] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        def change(name: str, before: int | None, after: int | None) -> str:
            if before is None or after is None:
                return f"{name}: not counted"
            return f"{name}: {before:,} -> {after:,}" + (f" ({after / before:.1%})" if before else "")

        lines = [
            f"{self.groups} coupled groups removed",
            change("parameters", *self.parameters),
            change("MACs", *self.macs),
            change("bytes", *self.bytes),
        ]
        lines += [f"  {name}: {gone} of {n} inputs removed" for name, (gone, n) in self.removed.items()]
        for fold in self.folded:
            where = f"folded into {fold.bias}" if fold.bias is not None else "of which nothing had to be folded"
            lines.append(f"  {fold.weight}: {len(fold.channels)} constant inputs ({_listed(fold.channels)}) {where}")
        for entry in self.kept:
            some = _listed(entry.channels)
            lines.append(f"  {entry.weight}: {len(entry.channels)} zero channels stay ({some}): {entry.reason}")
        return "\n".join(lines)


def _listed(channels: tuple[int, ...]) -> str:
    return ", ".join(map(str, channels[:8])) + (", ..." if len(channels) > 8 else "")


def shrink(model: nn.Module, optimizer: Any = None, *, example_inputs: Any) -> ShrinkReport:
    """Remove every channel, neuron and attention head that all its readers have let go of, in place.

    A coupled group (docs/groups.md, Coupled channels) goes where the slices of all weights that read it are exactly
    zero, however they came to be: with it go the filters that make it, norms, biases, depthwise filters, rows of q, k
    and v. So does a channel whose filters are zero where it is made, so that biases and norms make a constant of it,
    where the biases of all that read it can take what the constant adds to them: of Linear layers, and of convolutions
    that pad with no zeros. A constant 0, as behind a ReLU, adds nothing, whoever reads it. The parameters are the same
    objects with less in them, so that whoever holds them goes on. Training goes on: the optimizer's states and
    gradients are cut alike.

    Args:
        model: any module that :func:`rvsm_kernels.param_groups` with ``structure="coupled"`` takes.
        optimizer: an optimizer of its parameters, or a wrapper around one; where it is of this library, what is zero is
            decided by u, and what remains is w. None: by the weights as they stand, after ``sparsify_()`` for example.
            Another optimizer of torch is cut along with the model.
        example_inputs: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments.

    Returns:
        A report: sizes before and after, what is gone, and what is zero and stays, with the reason.

    Raises:
        TypeError: something else than a module; a compiled or wrapped model, a sharded or lazy parameter; a state of
            the optimizer that has neither one element nor its parameter's shape.
        RuntimeError: the model does not run on the example inputs.

    Nothing has changed when an error is raised. Before anything is written a copy of the model is cut and run: its
    outputs on the example inputs have to be those of the model with u. Where the code of a forward pass has a size
    written into it, so that a cut copy fails, these channels stay, with the error as the reason.
    """
    _check(model, optimizer)
    inside = [] if optimizer is None else optimizers_in(optimizer)
    with _with_u(inside):
        copied = _copied(model)
    channels = coupled_channels(copied, example_inputs)
    zero, holders, kept = _zero_groups(copied, channels)
    names, others = dict(model.named_parameters()), other_inputs(example_inputs)
    constants = Constants(
        copied, channels, [example_inputs, *others], _run, zero, lambda name: has_penalty(inside, names[name])
    )
    spared = _spare(channels, zero | constants.groups)
    kept += _stayed(channels, dict.fromkeys(spared, "the last channel of a layer"))
    zero, folding = zero - spared, constants.groups - spared
    tried = [example_inputs, *(others if folding else ())]
    expected = [_run(copied, x) for x in tried]
    reasons: dict[int, str] = {}

    def works(groups: list[int]) -> bool:
        trial, remaining = copy.deepcopy(copied), _remaining(channels, set(groups))
        try:
            cut_model(trial, remaining)
            add_to_biases(trial, [], constants.additions(groups), remaining)
            for x, outputs in zip(tried, expected, strict=True):
                _compare(outputs, _run(trial, x))
        except Exception as error:
            reasons.update(dict.fromkeys(groups, f"the model's code keeps it: {str(error).splitlines()[0]}"))
            return False
        return True

    if folding and works(sorted(zero | folding)):
        gone = zero | folding
    else:  # what is zero goes, whatever becomes of constants
        gone = _largest(_families(channels, zero), works) if zero else set()
        for family in _families(channels, folding):
            gone |= set(family) if works(sorted(gone.union(family))) else set()
    kept += _stayed(channels, {g: reasons[g] for g in (zero | folding) - gone})
    kept += _made_of_zeros(copied, channels, holders, gone | folding | spared, constants.reasons)
    before = _sizes(copied, example_inputs)
    remaining, additions, folded = _remaining(channels, gone), constants.additions(gone), constants.folded(gone)
    _cut(model, inside, remaining, additions)
    cut_model(copied, remaining)
    after = _sizes(copied, example_inputs)
    removed = {}
    for name, reader in channels.readers.items():
        lost = sum(label in gone for label in reader.labels)
        if lost:
            removed[name] = (lost, len(reader.labels))
    parameters, macs, size = zip(before, after, strict=True)
    return ShrinkReport(parameters, macs, size, len(gone), removed, kept, folded)  # type: ignore[arg-type]


# ---- before ----------------------------------------------------------------------------------------------------------


def _check(model: nn.Module, optimizer: Any) -> None:
    """Refuse what cannot be cut, before anything changes."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"shrink takes a module, but got a {type(model).__name__}; give the model itself")
    check_model(model, "shrink")
    if optimizer is not None and not any(hasattr(x, "param_groups") for x in optimizers_in(optimizer)):
        raise TypeError(f"shrink takes an optimizer, but got a {type(optimizer).__name__}")


@contextlib.contextmanager
def _with_u(inside: list[Any]) -> Iterator[None]:
    """The parameters hold u, where one of the optimizers has one."""
    ours = next((x for x in inside if hasattr(type(x), "sparse_weights")), None)
    with contextlib.nullcontext() if ours is None else ours.sparse_weights():
        yield


def _copied(model: nn.Module) -> nn.Module:
    """A copy in eval mode, without gradients."""
    grads = [(p, p.grad) for p in model.parameters()]
    try:
        for p, _ in grads:
            p.grad = None
        return copy.deepcopy(model).eval()
    except (RuntimeError, TypeError) as error:
        raise TypeError(f"the model cannot be copied, which shrink needs: {error}") from error
    finally:
        for p, grad in grads:
            p.grad = grad


def _zero_groups(
    model: nn.Module, channels: CoupledChannels
) -> tuple[set[int], dict[int, set[str]], list[KeptChannels]]:
    """(the groups whose readers are all zero, who reads the others, zero inputs that cannot go and why)."""
    weights = tensors_of(model)
    zeros: dict[str, list[bool]] = {}
    holders: dict[int, set[str]] = {}
    for name, reader in channels.readers.items():
        others = [d for d in range(weights[name].dim()) if d != reader.dim]
        empty = weights[name].detach() == 0
        zeros[name] = (empty.all(others) if others else empty).tolist() if empty.numel() else []
        for label, zero in zip(reader.labels, zeros[name], strict=True):
            if label != NOBODY and not zero:
                holders.setdefault(label, set()).add(name)
    zero_groups = {g for g in channels.groups if g not in holders}
    reasons: dict[tuple[str, str], list[int]] = {}
    for name, reader in channels.readers.items():
        for i, (label, zero) in enumerate(zip(reader.labels, zeros[name], strict=True)):
            if zero and label == NOBODY and i in reader.kept:
                reasons.setdefault((name, reader.kept[i]), []).append(i)
            elif zero and label in holders:
                reasons.setdefault((name, f"still read by {_some(holders[label])}"), []).append(i)
    kept = [KeptChannels(name, tuple(indices), why) for (name, why), indices in reasons.items()]
    return zero_groups, holders, kept


def _made_of_zeros(
    model: nn.Module,
    channels: CoupledChannels,
    holders: dict[int, set[str]],
    settled: set[int],
    reasons: dict[int, str],
) -> list[KeptChannels]:
    """Zero filters of groups that someone reads, for a bias or a norm's shift still makes a constant of them."""
    weights, found = tensors_of(model), dict[tuple[str, str], list[int]]()
    for g, places in channels.made.items():
        for name, d, indices in places if g in holders and g not in settled else ():
            filters = weights[name].detach().movedim(d, 0).flatten(1)
            zeros = [i for i in indices if not bool(filters[i].any())]
            if zeros:
                why = f"zero where it is made, and still read by {_some(holders[g])}"
                why += f": {reasons[g]}" if g in reasons else ""
                found.setdefault((name, why), []).extend(zeros)
    return [KeptChannels(name, tuple(sorted(indices)), why) for (name, why), indices in found.items()]


def _some(names: set[str]) -> str:
    return ", ".join(sorted(names)[:4]) + (", ..." if len(names) > 4 else "")


def _spare(channels: CoupledChannels, gone: set[int]) -> set[int]:
    """Groups that have to stay so that no dimension of any tensor becomes empty."""
    full = [set(labels) for dims in channels.slices.values() for labels in dims.values() if gone.issuperset(labels)]
    spared: set[int] = set()
    for labels in full:
        if spared.isdisjoint(labels):
            spared.add(min(labels))
    for g in sorted(spared):  # another may do for all of its layers
        if all(g not in labels or len(labels & spared) > 1 for labels in full):
            spared.remove(g)
    return spared


def _stayed(channels: CoupledChannels, reasons: dict[int, str]) -> list[KeptChannels]:
    """Groups that are zero and stay, by weight and reason."""
    found: dict[tuple[str, str], list[int]] = {}
    groups = channels.groups if reasons else {}
    for g in sorted(reasons):
        for name, _, indices in groups[g]:
            found.setdefault((name, reasons[g]), []).extend(indices)
    return [KeptChannels(name, tuple(sorted(indices)), why) for (name, why), indices in found.items()]


def _families(channels: CoupledChannels, groups: set[int]) -> list[list[int]]:
    """Groups that stand in the same tensors, together."""
    family = {g: g for g in groups}

    def first(g: int) -> int:
        while family[g] != g:
            family[g] = g = family[family[g]]
        return g

    for dims in channels.slices.values():
        for labels in dims.values():
            together = groups.intersection(labels)
            if together:
                low = first(min(together))
                for g in together:
                    family[first(g)] = low
    found: dict[int, list[int]] = {}
    for g in sorted(groups):
        found.setdefault(first(g), []).append(g)
    return list(found.values())


def _largest(families: list[list[int]], works: Callable[[list[int]], bool]) -> set[int]:
    """The groups that can go, found by halving where not all can."""
    everything = [g for family in families for g in family]
    if works(everything):
        return set(everything)
    if len(families) == 1:
        return set()
    half = len(families) // 2
    found = _largest(families[:half], works) | _largest(families[half:], works)
    return found if works(sorted(found)) else set()


# ---- the cut ---------------------------------------------------------------------------------------------------------


def _remaining(channels: CoupledChannels, gone: set[int]) -> Kept:
    """What remains of each tensor that loses something."""
    kept: Kept = {}
    for name, dims in channels.slices.items():
        for d, labels in dims.items():
            if not gone.isdisjoint(labels):
                index = torch.tensor([i for i, label in enumerate(labels) if label not in gone], dtype=torch.long)
                kept.setdefault(name, {})[d] = index
    return kept


def _cut(model: nn.Module, inside: list[Any], remaining: Kept, additions: dict[str, Tensor]) -> None:
    """Cut the model and its optimizers, and add to biases; all that can fail comes before the first write."""
    tensors = tensors_of(model)
    by_tensor = {tensors[name]: (name, indices) for name, indices in remaining.items()}
    writes = cut_states(inside, by_tensor) + cut_couplings(inside, by_tensor)
    cut_model(model, remaining)
    for container, key, value in writes:
        container[key] = value
    add_to_biases(model, inside, additions, remaining)
    for x in inside:
        if hasattr(type(x), "_begin_anew") and remaining:
            x._begin_anew()


# ---- outputs and sizes -----------------------------------------------------------------------------------------------


def _run(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    """The outputs in eval mode, with the same random numbers each time."""
    args, kwargs = as_arguments(example_inputs)
    args, kwargs = copy.deepcopy((args, kwargs))
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        return [t.detach().clone() for t in outputs_of(model(*args, **kwargs))]


def _compare(expected: list[Tensor], outputs: list[Tensor]) -> None:
    """Raise ValueError where outputs differ."""
    for a, b in zip(expected, outputs, strict=True):
        if a.shape != b.shape:
            raise ValueError("an output has another shape without it")
        if a.numel() and a.is_floating_point():
            finite = a.isfinite() & b.isfinite()
            scale = max(1.0, float(torch.where(finite, a, 0.0).abs().max()))
            apart = float(torch.where(finite, a - b, 0.0).abs().max())
            same = torch.equal(a.nan_to_num()[~finite], b.nan_to_num()[~finite])  # infinities, and NaN as a 0
            if apart > TOLERANCE.get(a.dtype, 0.05) * scale or not same:
                raise ValueError("an output is another without it")


@contextlib.contextmanager
def _every_operation() -> Iterator[None]:
    """Attention in operations that are counted: not one call of a whole layer, nor a fused kernel of a CPU."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _sizes(model: nn.Module, example_inputs: Any) -> tuple[int, int | None, int]:
    """(elements of parameters, MACs, bytes of parameters and buffers)."""
    count = sum(p.numel() for p in model.parameters())
    size = sum(t.numel() * t.element_size() for t in tensors_of(model).values())
    from torch.utils.flop_counter import FlopCounterMode  # which imports Triton

    try:
        with FlopCounterMode(display=False) as counter, _every_operation():
            _run(model, example_inputs)
        return count, counter.get_total_flops() // 2, size
    except Exception:  # a model whose operations cannot be counted can be cut all the same
        return count, None, size
