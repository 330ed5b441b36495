"""What layers do to the labels of channels: weights read channels and make new ones; attention mixes within heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .channel_rules import combine, rule, spread
from .channel_trace import ChannelTrace
from .channels import FIXED


def _seen(trace: ChannelTrace, t: Tensor) -> Tensor:
    """The labels of what a layer reads; a parameter that is read like an activation does not shrink."""
    labels = trace.labels(t)
    if labels is None:
        trace.block(t, "read by a layer")
        labels = torch.full(t.shape, FIXED, dtype=torch.int32)
    return labels


def _per_index(trace: ChannelTrace, labels: Tensor, dim: int) -> Tensor:
    """The labels along one dimension, after all others are tied."""
    others = [d for d in range(labels.dim()) if d != dim % labels.dim()]
    return trace.channels.tie_along(labels, others).reshape(-1)


def _with_bias(trace: ChannelTrace, made: Tensor, bias: Any, shape: Sequence[int], dim: int) -> Tensor:
    """The labels of a layer's output: those that its weight has made, along one dimension."""
    wide = made.view([-1 if d == dim % len(shape) else 1 for d in range(len(shape))])
    labels = spread(wide, tuple(shape))
    if isinstance(bias, Tensor):
        _join_bias(trace, labels, bias, dim % len(shape))
    return labels


def _join_bias(trace: ChannelTrace, labels: Tensor, bias: Tensor, dim: int) -> None:
    """Let a bias leave with the channels of a dimension."""
    place = torch.zeros(labels.shape, dtype=torch.float32)
    trace.note(place, labels)
    shaped = bias.view([-1 if d == dim else 1 for d in range(labels.dim())]) if bias.dim() == 1 else bias
    combine(trace, labels.shape, [place, shaped])


def _is_weight(trace: ChannelTrace, t: Tensor) -> bool:
    """Whether a factor is a parameter; a buffer (an adjacency matrix) is a constant."""
    return trace.labels(t) is None and trace.parameter(t) in trace.trained


# ---- linear layers ---------------------------------------------------------------------------------------------------


def _linear(trace: ChannelTrace, x: Tensor, weight: Tensor, dims: tuple[int, int], bias: Any, out: Tensor) -> None:
    """x (..., inputs) times a weight whose dimensions (outputs, inputs) are `dims`."""
    trace.reads(weight, dims[1], _per_index(trace, _seen(trace, x), -1))
    trace.note(out, _with_bias(trace, trace.makes(weight, dims[0]), bias, out.shape, -1))


@rule("linear")
def _linear_rule(trace: ChannelTrace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    x, weight, *rest = args
    if weight.dim() == 1:  # one output, without a dimension
        trace.reads(weight, 0, _per_index(trace, _seen(trace, x), -1))
        trace.note(out, torch.full(out.shape, FIXED, dtype=torch.int32))
        return
    _linear(trace, x, weight, (0, 1), rest[0] if rest else kwargs.get("bias"), out)


@rule("addmm baddbmm addbmm addmv")
def _addmm(trace: ChannelTrace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    bias, a, b = args[:3]
    if func._schema.name == "aten::addmm":
        _product(trace, a, b, bias, out)
    else:
        _product(trace, a, b, None, out)
        trace.note(out, combine(trace, out.shape, [out, bias]))


@rule("mm matmul bmm mv dot")
def _matmul(trace: ChannelTrace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    _product(trace, args[0], args[1], None, out)


def _product(trace: ChannelTrace, a: Tensor, b: Tensor, bias: Any, out: Tensor) -> None:
    if _is_weight(trace, b) and b.dim() == 2 and not _is_weight(trace, a):
        _linear(trace, a, b, (1, 0), bias, out)
    elif _is_weight(trace, a) and a.dim() == 2 and not _is_weight(trace, b) and b.dim() >= 2:
        trace.reads(a, 1, _per_index(trace, _seen(trace, b), -2))
        labels = _with_bias(trace, trace.makes(a, 0), None, out.shape, -2)
        trace.note(out, labels)
        if bias is not None:
            trace.note(out, combine(trace, out.shape, [out, bias]))
    elif _is_weight(trace, a) or _is_weight(trace, b) or a.dim() < 2 or b.dim() < 2:
        trace.give_up([a, b], "a product with a weight of other than two dimensions")
        trace.note(out, torch.full(out.shape, FIXED, dtype=torch.int32))
    else:
        rows = trace.channels.tie_along(_seen(trace, a), [a.dim() - 1])
        columns = trace.channels.tie_along(_seen(trace, b), [b.dim() - 2])
        _mix(trace, rows, columns, out)
        if bias is not None:
            trace.note(out, combine(trace, out.shape, [out, bias]))


def _mix(trace: ChannelTrace, rows: Tensor, columns: Tensor, out: Tensor) -> None:
    """The labels of a product of activations: what is multiplied is one set, a head."""
    trace.channels.tie(rows, columns)
    rows, columns = torch.broadcast_tensors(rows, columns)
    trace.channels.mark_heads(rows[(rows > FIXED) & (columns > FIXED)])
    alone = (rows > FIXED) != (columns > FIXED)
    trace.channels.vary(torch.maximum(rows, columns)[alone], "it is multiplied by values that are no parameters")
    trace.note(out, torch.where(rows > FIXED, rows, columns).expand(out.shape).contiguous().clone())


@rule("scaled_dot_product_attention")
def _attention(trace: ChannelTrace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    q, k = (trace.channels.tie_along(_seen(trace, t), [-2, -1]) for t in args[:2])
    v = trace.channels.tie_along(_seen(trace, args[2]), [-2])
    if q.dim() > 3 and k.shape[-3] != q.shape[-3]:  # several query heads share a head of keys and values
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    trace.channels.tie(q, k)
    mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
    if isinstance(mask, Tensor):
        scores = torch.zeros((*out.shape[:-1], args[1].shape[-2]))
        trace.note(scores, spread(torch.where(q > FIXED, q, k), tuple(scores.shape)))
        combine(trace, scores.shape, [scores, mask])
    _mix(trace, torch.where(q > FIXED, q, k), v, out)


@rule("embedding")
def _embedding(trace: ChannelTrace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    trace.note(out, spread(trace.makes(args[0], 1), tuple(out.shape)))


# ---- convolutions ----------------------------------------------------------------------------------------------------


def _convolve(
    trace: ChannelTrace, x: Tensor, weight: Tensor, bias: Any, out: Tensor, groups: int, transposed: bool
) -> None:
    at = -(weight.dim() - 1)  # a channel has the dimensions of the kernel behind it
    channels = _per_index(trace, _seen(trace, x), at)
    inputs, outputs = x.shape[at], out.shape[at]
    in_dim, out_dim = (0, 1) if transposed else (1, 0)
    if groups == inputs and inputs > 1:  # depthwise: channels pass
        passed = trace.makes(weight, 0)
        trace.passing.update(name for name in [trace.parameter(weight)] if name is not None)
        made = channels.repeat_interleave(outputs // inputs)
        rows = channels if transposed else made
        trace.channels.freeze(passed[trace.channels.roots(rows) == FIXED], "a depthwise filter of what does not shrink")
        trace.channels.tie(passed, rows)
        made = passed.repeat_interleave(outputs // inputs) if transposed else passed
    else:
        per_group = channels.view(groups, -1)
        if groups > 1:
            trace.channels.tie_whole(per_group, [0], "a group of the convolution reads what does not shrink")
        read = per_group[0]
        if transposed:
            trace.reads(weight, 0, channels)
            made = trace.makes(weight, 1).repeat(groups)
        else:
            trace.reads(weight, in_dim, read)
            made = trace.makes(weight, out_dim)
            if groups > 1:
                trace.channels.tie_whole(made.view(groups, -1), [0], "a group of the convolution does not shrink")
    trace.note(out, _with_bias(trace, made, bias, out.shape, at))


@rule("conv1d conv2d conv3d")
def _conv(trace: ChannelTrace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    groups = args[6] if len(args) > 6 else kwargs.get("groups", 1)
    _convolve(trace, args[0], args[1], args[2] if len(args) > 2 else kwargs.get("bias"), out, groups, False)


@rule("conv_transpose1d conv_transpose2d conv_transpose3d")
def _conv_transpose(trace: ChannelTrace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    groups = args[6] if len(args) > 6 else kwargs.get("groups", 1)
    _convolve(trace, args[0], args[1], args[2] if len(args) > 2 else kwargs.get("bias"), out, groups, True)


@rule("convolution _convolution")
def _convolution(trace: ChannelTrace, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    _convolve(trace, args[0], args[1], args[2], out, args[8], bool(args[6]))
