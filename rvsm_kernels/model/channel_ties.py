"""What has to hold once a forward pass is over: which channels can leave together so that every shape still fits."""

from __future__ import annotations

from torch import Tensor

from .channel_trace import ChannelTrace, Later
from .channels import PADDING, varying

ALL = "all channels of a layer would have to leave"


def settle(trace: ChannelTrace) -> None:
    """Tie and freeze until all that was noted holds.

    Labels that a layer has nothing but are frozen: it would be empty.
    """
    channels = trace.channels
    for name, why in trace.blocked.items():
        for labels in _labels_of(trace, name):
            channels.freeze(labels, f"{name}: {why}")
    names = {name for name, _ in (*trace.makers, *trace.readers)} | set(trace.adopted)
    for name in names:
        read = [d for n, d in trace.readers if n == name]
        weight = bool(read) or any(n == name for n, _ in trace.makers)
        beside = name in trace.adopted and bool((trace.adopted[name] != PADDING).any())
        if len(read) > 1 or (weight and beside):
            for labels in _labels_of(trace, name):
                channels.freeze(labels, f"{name} is used in two ways")
    for place, labels in trace.readers.items():
        if place in trace.makers:
            _meet(trace, labels, trace.makers[place])
    changes = -1
    while changes != channels.changes:
        changes = channels.changes
        for labels in (*trace.makers.values(), *trace.readers.values()):
            _not_all(trace, labels)
        for labels in trace.adopted.values():
            _not_all(trace, labels)
            _whole(trace, labels, "a parameter that does not shrink")
        for later in trace.later:
            _hold(trace, later)


def _labels_of(trace: ChannelTrace, name: str) -> list[Tensor]:
    found = [labels for table in (trace.makers, trace.readers) for (n, _), labels in table.items() if n == name]
    return found + ([trace.adopted[name]] if name in trace.adopted else [])


def _meet(trace: ChannelTrace, a: Tensor, b: Tensor) -> None:
    """Tie what the same indices of a weight read and make."""
    channels = trace.channels
    for x, y in ((a, b), (b, a)):
        stuck = (channels.removable(x) == PADDING) & (y != PADDING) & (x != PADDING)
        channels.freeze(y[stuck], "its index belongs to a channel that stays")
    channels.tie(a, b)


def _not_all(trace: ChannelTrace, labels: Tensor) -> None:
    roots = trace.channels.roots(labels)
    used = roots[roots != PADDING]
    if used.numel() and not bool((used != used[0]).any()):
        trace.channels.freeze(used, ALL)


def _sliced(roots: Tensor, unused: Tensor) -> int | None:
    """The dimension whose indices have one label each, whatever the unused elements have; None where there is none."""
    for d in range(roots.dim()):
        others = [k for k in range(roots.dim()) if k != d]
        top = roots.masked_fill(unused, PADDING)
        top = top.amax(others, keepdim=True) if others else top
        if bool(((roots == top) | unused).all()):
            return d
    return None


def across(trace: ChannelTrace, labels: Tensor) -> int | None:
    """The dimension of a parameter along which its elements leave, beside the channels; None where there is none."""
    roots = trace.channels.removable(labels)
    return _sliced(roots, labels == PADDING) if bool((roots != PADDING).any()) else None


def _whole(trace: ChannelTrace, labels: Tensor, why: str) -> None:
    """Let what leaves be whole slices along one dimension."""
    roots = trace.channels.removable(labels)
    if labels.dim() == 0:
        trace.channels.freeze(labels, why)
    elif bool((roots != PADDING).any()) and _sliced(roots, labels == PADDING) is None:
        keep = max(varying(roots), key=lambda d: labels.shape[d])
        trace.channels.tie_whole(labels, [d for d in range(labels.dim()) if d != keep], why)


def _hold(trace: ChannelTrace, later: Later) -> None:
    channels, labels = trace.channels, later.labels
    roots = channels.removable(labels)
    along = varying(roots)
    if later.kind == "whole":
        _whole(trace, labels, "no whole slice of an activation")
    elif later.dim in along and not (later.by_number and bool(channels.heads(roots[roots != PADDING]).all())):
        if later.kind == "split":
            size = labels.shape[later.dim] // later.pieces
            channels.tie_whole(labels.unflatten(later.dim, (later.pieces, size)), [later.dim], "a part stays as it is")
        elif later.kind == "cut":
            channels.freeze(roots[roots != PADDING], "cut at a number in the model's code")
        else:
            changing = (roots != roots.narrow(later.dim, 0, 1)).any(later.dim, keepdim=True).expand_as(roots)
            channels.freeze(roots[changing & (roots != PADDING)], "its index is a number in the model's code")
