"""What each operation does to the labels of channels: elementwise ones, reductions, norms, pools, moves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .channel_trace import ChannelTrace, Rule, noted, spread
from .channels import FIXED, PADDING, varying

RULES: dict[str, Rule] = {}


def rule(names: str) -> Callable[[Rule], Rule]:
    """Register a rule under the names of some operations of aten."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names.split(), function))
        return function

    return register


def rule_of(func: Any) -> Rule | None:
    """The rule of an operation, None where there is none."""
    name = func._schema.name.partition("::")[2]
    if not func._schema.name.startswith("aten::"):
        return None
    found = RULES.get(name) or RULES.get(name.removesuffix("_"))
    if found is None and torch.Tag.pointwise in func.tags:
        found = elementwise
    return found


def argument(func: Any, args: Sequence[Any], kwargs: dict[str, Any], name: str, default: Any = None) -> Any:
    """An argument of a call, by its name in the schema."""
    for k, a in enumerate(func._schema.arguments):
        if a.name == name:
            return args[k] if k < len(args) else kwargs.get(name, a.default_value if default is None else default)
    return default


def _is_inplace(func: Any) -> bool:
    return bool(func._schema.is_mutable)


# ---- elementwise -----------------------------------------------------------------------------------------------------


def combine(trace: ChannelTrace, shape: Sequence[int], operands: Sequence[Tensor | None]) -> Tensor:
    """The labels of an elementwise operation on activations, parameters and constants that broadcast to a shape.

    Labels that meet are tied. An operand that is broadcast over several channels belongs to none of them. A constant
    that is not broadcast along a dimension keeps that dimension as long as it is: what varies along it is tied.
    """
    shape = tuple(shape)
    activations: list[Tensor] = []
    constants: list[tuple[int, ...]] = []
    params: list[Tensor] = []
    for t in operands:
        if t is None:
            continue
        labels = trace.labels(t)
        if labels is not None and bool((labels != FIXED).any()):
            activations.append(labels)
        elif labels is None and trace.parameter(t) is not None:
            params.append(t)
        else:
            constants.append(tuple(t.shape))
    total = torch.zeros(shape, dtype=torch.int32)
    for labels in sorted(activations, key=lambda x: -x.numel()):
        total = _join(trace, total, labels)
    if not activations and len(params) == 1 and not constants and math.prod(shape) == params[0].numel():
        return trace.named_elements(params[0]).expand(shape)
    if constants and activations:
        trace.channels.vary(total, "it meets values that are no parameters")
    for p in params:
        fixed = _join_parameter(trace, total, p)
        if fixed is not None:
            constants.append(fixed)
    for size in constants:
        kept = [len(shape) - len(size) + k for k, n in enumerate(size) if n > 1]
        kept = [d for d in kept if d in varying(trace.channels.roots(total))]
        if kept:
            trace.channels.tie_along(total, kept)
    if not activations:
        return torch.full(shape, FIXED, dtype=torch.int32)
    return total


def _wide(shape: Sequence[int], size: Sequence[int]) -> tuple[tuple[int, ...], list[int]]:
    """(a size with leading ones, the dimensions along which it is broadcast to a shape)."""
    padded = (1,) * (len(shape) - len(size)) + tuple(size)
    return padded, [d for d, (a, b) in enumerate(zip(padded, shape, strict=True)) if a == 1 and b > 1]


def _fibres(trace: ChannelTrace, total: Tensor, dims: list[int]) -> tuple[Tensor, Tensor]:
    """(the label of each fibre, whether it has several)."""
    total = trace.channels.roots(total)
    if not dims:
        return total, torch.zeros_like(total, dtype=torch.bool)
    top = total.amax(dims, keepdim=True)
    several = ((total != top) & (total != PADDING)).any(dims, keepdim=True)
    return top, several


def _join(trace: ChannelTrace, total: Tensor, labels: Tensor) -> Tensor:
    size, dims = _wide(total.shape, labels.shape)
    labels = labels.reshape(size)
    top, several = _fibres(trace, total, dims)
    roots = trace.channels.roots(labels)
    trace.channels.freeze(roots[several], "a factor of several channels")
    if bool(several.any()):
        trace.channels.vary(total, "it meets what several channels share")
    trace.channels.tie(torch.where(several, PADDING, roots), top)
    stuck = ~several & (((roots == FIXED) & (top > FIXED)) | ((roots > FIXED) & (top == FIXED)))
    trace.channels.freeze(torch.maximum(roots, top)[stuck], "added up with what does not shrink")
    return torch.where(total == PADDING, labels.expand_as(total), total)


def _join_parameter(trace: ChannelTrace, total: Tensor, p: Tensor) -> tuple[int, ...] | None:
    """Let the elements of a parameter leave with what they stand beside; its size where it is a constant instead."""
    elements = trace.elements(p)
    assert elements is not None
    for d in range(p.dim()):
        if p.stride(d) == 0 and p.shape[d] > 1:
            elements = elements.narrow(d, 0, 1)
    size, dims = _wide(total.shape, elements.shape)
    elements = elements.reshape(size) if elements.dim() != len(size) else elements
    top, several = _fibres(trace, total, dims)
    if bool(several.any()) or bool((top <= FIXED).all()):
        trace.channels.freeze(elements, "a parameter that several channels share")
        elements.fill_(FIXED)
        return tuple(size)
    trace.channels.tie(elements, top)
    stuck = ((elements == FIXED) & (top > FIXED)) | ((elements > FIXED) & (top == FIXED))
    trace.channels.freeze(torch.maximum(elements, top)[stuck], "a parameter that several channels share")
    elements.copy_(torch.where(elements == PADDING, top, elements))
    return None


@rule(
    "hardswish relu6 selu celu mish rsub square log_sigmoid softsign true_divide divide multiply subtract masked_fill"
    " where clip absolute hardshrink threshold softshrink silu gelu nan_to_num elu hardtanh leaky_relu hardsigmoid"
    " softplus add sub mul div float_power"
)
def elementwise(trace: ChannelTrace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Each element of the output depends on those in its place."""
    operands = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    first = next(t for t in tree_leaves(out) if isinstance(t, Tensor))
    labels = combine(trace, first.shape, operands)
    for t in tree_leaves(out):
        if isinstance(t, Tensor) and trace.parameter(t) is None:
            trace.note(t, labels.contiguous(), _is_inplace(func))


@rule("copy")
def _copy(trace: ChannelTrace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    if trace.parameter(out) is None:
        labels = trace.labels(args[1])
        trace.note(out, spread(combine(trace, out.shape, [args[1]]) if labels is None else labels, out.shape), True)


@rule("zero fill uniform normal bernoulli detach_ requires_grad_ sym_size")
def _keep(trace: ChannelTrace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Zeros in the place of channels leave with these."""


@rule("dropout feature_dropout alpha_dropout native_dropout to _to_copy type_as float half bfloat16 double lift_fresh")
def _same(trace: ChannelTrace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    first = next(t for t in tree_leaves(out) if isinstance(t, Tensor))
    if trace.labels(first) is None and trace.parameter(first) is None:
        labels = trace.labels(args[0])
        if labels is None:
            labels = trace.named_elements(args[0]) if trace.parameter(args[0]) is not None else None
        if labels is not None:
            trace.note(first, labels.clone())


@rule("prelu _prelu_kernel")
def _prelu(trace: ChannelTrace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    trace.note(out, combine(trace, out.shape, [args[0], _along(args[1], out, 1) if args[1].dim() == 1 else args[1]]))


# ---- reductions ------------------------------------------------------------------------------------------------------


def _dims(dim: Any, n: int) -> list[int]:
    dims = [dim] if isinstance(dim, int) else list(dim) if dim else list(range(n))
    return sorted({d % n for d in dims}) if n else []


@rule("softmax log_softmax _softmax _log_softmax softmin cumsum cumprod logcumsumexp")
def _along_dim(trace: ChannelTrace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    labels = _labels(trace, args[0])
    top = trace.channels.tie_along(labels, _dims(argument(func, args, kwargs, "dim"), labels.dim()))
    trace.channels.vary(labels, "a softmax or a sum runs over positions")
    _note_if_whole(trace, top, "a softmax or a sum mixes all of the layer")
    trace.note(out, combine(trace, out.shape, [args[0]]), _is_inplace(func))


@rule(
    "mean sum amax amin max min var std var_mean std_mean norm linalg_vector_norm logsumexp prod any all argmax argmin"
)
def _reduce(trace: ChannelTrace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    outs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
    others = [t for t in tree_leaves((args[1:], kwargs)) if isinstance(t, Tensor)]
    if others:  # max(a, b) of two tensors
        elementwise(trace, func, args, kwargs, out)
        return
    labels = _labels(trace, args[0])
    top = trace.channels.tie_along(labels, _dims(argument(func, args, kwargs, "dim"), labels.dim()))
    _note_if_whole(trace, top, "a sum over the layer's channels mixes them")
    if func._schema.name.partition("::")[2] not in _SAME_OF_ANY_NUMBER:
        trace.channels.vary(labels, "a sum over positions grows with their number")
    for t in outs:
        trace.note(t, top.reshape(t.shape).clone())


_SAME_OF_ANY_NUMBER = ("mean", "amax", "amin", "max", "min", "any", "all")
"""Reductions of a constant that are the same however many positions there are."""


def _labels(trace: ChannelTrace, t: Tensor) -> Tensor:
    labels = trace.labels(t)
    if labels is None:
        known = t.is_floating_point() and trace.parameter(t) is not None
        labels = trace.named_elements(t) if known else torch.full(t.shape, FIXED, dtype=torch.int32)
    return labels


def _note_if_whole(trace: ChannelTrace, labels: Tensor, why: str) -> None:
    """Let nothing leave where all of a tensor would have to."""
    removable = trace.channels.removable(labels)
    if bool((removable != PADDING).any()) and not varying(removable):
        trace.channels.freeze(labels, why)


# ---- norms -----------------------------------------------------------------------------------------------------------


def _along(vector: Tensor | None, x: Tensor, dim: int) -> Tensor | None:
    """A vector of channels in a shape that broadcasts along one dimension of x."""
    if vector is None or vector.dim() != 1:
        return vector
    return vector.view([-1 if d == dim % x.dim() else 1 for d in range(x.dim())]) if x.dim() else vector


@rule("batch_norm native_batch_norm cudnn_batch_norm _native_batch_norm_legit_no_training instance_norm")
def _batch_norm(trace: ChannelTrace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    x = args[0]
    y = out if isinstance(out, Tensor) else out[0]
    if func._schema.name == "aten::instance_norm" and (labels := trace.labels(x)) is not None:
        trace.channels.tie_along(labels, list(range(2, x.dim())))
    vectors = [_along(t, x, 1) for t in args[1:5] if isinstance(t, Tensor)]
    trace.note(y, combine(trace, y.shape, [x, *vectors]))


@rule("layer_norm rms_norm")
def _layer_norm(trace: ChannelTrace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    x, size = args[0], args[1]
    labels = _labels(trace, x)
    top = trace.channels.tie_along(labels, list(range(x.dim() - len(size), x.dim())))
    _note_if_whole(trace, top, "a norm over the layer's channels mixes them")
    trace.note(out, combine(trace, out.shape, [x, *(t for t in args[2:] if isinstance(t, Tensor))]))


@rule("group_norm")
def _group_norm(trace: ChannelTrace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    x, groups = args[0], args[1]
    labels = _labels(trace, x)
    if groups < x.shape[1]:
        trace.channels.freeze(labels, "a GroupNorm mixes the channels of a group")
    trace.channels.tie_along(labels, list(range(2, x.dim())))
    trace.note(out, combine(trace, out.shape, [x, *(_along(t, x, 1) for t in args[2:4])]))


# ---- planes ----------------------------------------------------------------------------------------------------------


def _plane(n: int) -> Rule:
    def apply(trace: ChannelTrace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        labels = _labels(trace, args[0])
        top = trace.channels.tie_along(labels, list(range(labels.dim() - n, labels.dim())))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                trace.note(t, spread(top, t.shape))

    return apply


for _n in (1, 2, 3):
    _names = f"max_pool{_n}d max_pool{_n}d_with_indices avg_pool{_n}d adaptive_avg_pool{_n}d adaptive_max_pool{_n}d"
    _names += "".join(
        f" upsample_{kind}{_n}d" for kind in ("nearest", "nearest_exact", "linear", "bilinear", "trilinear")
    )
    rule(_names + f" _upsample_nearest_exact{_n}d upsample_bicubic{_n}d fractional_max_pool{_n}d")(_plane(_n))


@rule("grid_sampler grid_sampler_2d")
def _sample(trace: ChannelTrace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    _plane(2)(trace, func, args, kwargs, out)
    trace.channels.vary(_labels(trace, out), "it is sampled at points that are no parameters")


@rule("pad constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d replication_pad3d")
def _pad(trace: ChannelTrace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Padding along a dimension of channels does not shrink; elsewhere it leaves with the channel that it pads."""
    x, pad = args[0], args[1]
    mode = args[2] if len(args) > 2 and isinstance(args[2], str) else kwargs.get("mode", "constant")
    constant = mode == "constant" and "ection" not in str(func) and "replic" not in str(func)
    labels = _labels(trace, x)
    across = varying(trace.channels.roots(labels))
    for k in range(len(pad) // 2):
        d = labels.dim() - 1 - k
        if (pad[2 * k] or pad[2 * k + 1]) and d in across and min(pad[2 * k : 2 * k + 2]) < 0:
            trace.hold("index", labels, d)
    if not constant:
        padded = func(labels.double(), *args[1:], **kwargs).int()
        for k in range(len(pad) // 2):
            trace.hold("index", labels, labels.dim() - 1 - k)
    else:
        padded = labels
        for k in range(len(pad) // 2):
            d = labels.dim() - 1 - k
            value = FIXED if d in across else PADDING
            padded = torch.nn.functional.pad(padded, [0, 0] * k + list(pad[2 * k : 2 * k + 2]), value=value)
    trace.note(out, padded)
    noted(trace, padded)


# ---- moves -----------------------------------------------------------------------------------------------------------

_MOVES = """view _unsafe_view reshape _reshape_alias permute transpose t numpy_T mT swapaxes swapdims movedim moveaxis
expand expand_as broadcast_to slice select squeeze unsqueeze flatten unflatten split split_with_sizes chunk tensor_split
unsafe_split unsafe_chunk unbind gather cat concat concatenate stack clone contiguous detach alias repeat
repeat_interleave tile flip roll index_select index narrow pixel_shuffle pixel_unshuffle channel_shuffle
native_channel_shuffle view_as reshape_as hstack vstack dstack ravel"""


@rule(_MOVES)
def move(trace: ChannelTrace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Elements change their places: the labels go through the same operation."""
    outs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
    if all(trace.parameter(t) is not None for t in outs):
        return  # views of a parameter
    if len(outs) == 1 and any(outs[0] is t for t in tree_leaves(args)):
        return  # contiguous() of what is contiguous
    name = func._schema.name.partition("::")[2]
    is_index = name in ("index", "index_select", "gather", "repeat_interleave")
    moved = args[:1] if is_index else args
    moved = tree_map(lambda t: _labels(trace, t) if isinstance(t, Tensor) else t, moved)
    if is_index and any(trace.labels(t) is not None for t in tree_leaves(args[1:]) if isinstance(t, Tensor)):
        trace.give_up([t for t in tree_leaves(args[1:]) if isinstance(t, Tensor)], "an index that is computed")
    rest = tree_map(lambda t: t.cpu() if isinstance(t, Tensor) else t, args[len(moved) :])
    labels = func(*moved, *rest, **kwargs)
    results = [t for t in tree_leaves(labels) if isinstance(t, Tensor)]
    for t, result in zip(outs, results, strict=True):
        trace.note(t, result)
    source = tree_leaves(moved)[0]
    if isinstance(source, Tensor) and bool((source != FIXED).any()):
        _constrain(trace, name, source, func, args, kwargs, results)
    for result in results:
        noted(trace, result)


def _constrain(
    trace: ChannelTrace, name: str, source: Tensor, func: Any, args: Any, kwargs: Any, results: list[Tensor]
) -> None:
    """Note what cuts or numbers the indices of a dimension."""
    n = source.dim()
    if name == "index":
        for d, i in enumerate(args[1]):
            if i is not None:
                trace.hold("index", source, d)
        return
    dim = argument(func, args, kwargs, "dim", None)
    if name in ("select", "unbind", "index_select", "gather", "slice", "narrow") or "split" in name or "chunk" in name:
        d = (dim if isinstance(dim, int) else 0) % n
        sizes = {r.shape[d] for r in results} if name not in ("select", "unbind") else {0}
        if name in ("select", "unbind", "index_select", "gather"):
            trace.hold("index", source, d)
        elif name in ("slice", "narrow"):
            start = argument(func, args, kwargs, "start", 0) or 0
            start = min(start + source.shape[d] if start < 0 else start, source.shape[d])
            size, step = results[0].shape[d], argument(func, args, kwargs, "step", 1) if name == "slice" else 1
            if size != source.shape[d]:
                even = step == 1 and size > 0 and source.shape[d] % size == 0 and start % size == 0
                kind = "split" if even else "cut" if step == 1 else "index"
                trace.hold(kind, source, d, source.shape[d] // max(size, 1), kind != "index")
        elif name != "channel_shuffle" and len(results) > 1:
            numbers = "split" in name and "tensor" not in name
            trace.hold("split" if len(sizes) == 1 else "cut", source, d, len(results), numbers)
    elif name == "roll":
        for d in _dims(argument(func, args, kwargs, "dims"), n):
            trace.hold("index", source, d)


@rule("glu")
def _glu(trace: ChannelTrace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    labels = _labels(trace, args[0])
    d = argument(func, args, kwargs, "dim", -1) % labels.dim()
    a, b = labels.chunk(2, d)
    trace.channels.tie(a, b)
    trace.note(out, a.clone())
