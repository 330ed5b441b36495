"""Taking indices out of a model and of its optimizers: parameters, gradients, buffers, states, sizes of modules."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from .attention import PrunedMultiheadAttention
from .structures import is_conv1d

Kept = dict[str, dict[int, Tensor]]
"""By name of a parameter or buffer and by dimension: the indices that remain."""


def take(t: Tensor, indices: Mapping[int, Tensor]) -> Tensor:
    """The given indices of some dimensions of a tensor, in the memory format that it has."""
    channels_last = t.dim() == 4 and not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last)
    out = t.detach()
    for d, index in indices.items():
        out = out.index_select(d, index.to(t.device))
    return out.contiguous(memory_format=torch.channels_last) if channels_last else out.contiguous().clone()


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, shared ones once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def replace_data(p: Tensor, data: Tensor) -> None:
    """Let a parameter that everyone holds be another tensor.

    The node that accumulates its gradient remembers the shape while an old graph is alive; torch makes a new one where
    the type changes.
    """
    grad, p.grad = p.grad, None
    other = torch.float64 if p.dtype != torch.float64 else torch.float32
    if p.requires_grad:
        p.data = torch.empty(0, dtype=other, device=p.device)
    p.data = data
    del grad


# ---- the model -------------------------------------------------------------------------------------------------------


def cut_model(model: nn.Module, kept: Kept) -> None:
    """Take indices out of a model in place: all tensors are made before the first is replaced."""
    tensors = tensors_of(model)
    sizes = _Sizes(model)
    data = {name: take(tensors[name], indices) for name, indices in kept.items()}
    grads = {
        name: take(grad, kept[name]) for name in kept if (grad := tensors[name].grad) is not None and not grad.is_sparse
    }
    with torch.no_grad():
        for name, t in tensors.items():
            if name in data:
                replace_data(t, data[name])
                if name in grads:
                    t.grad = grads[name]
    sizes.adjust(model)


_CHANNELS = ("num_features", "num_channels", "num_parameters", "embedding_dim")
_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_key_value_heads", "num_kv_heads", "n_kv_heads")
_WIDTHS = ("all_head_size", "split_size", "inner_dim")


class _Sizes:
    """The sizes that modules keep as attributes, before indices are taken out."""

    def __init__(self, model: nn.Module) -> None:
        self._shapes = {m: self._shape(m) for m in model.modules()}

    @staticmethod
    def _shape(m: nn.Module) -> tuple[int, ...] | None:
        weight: Any = getattr(m, "weight", None)
        if not isinstance(weight, Tensor):
            weight = getattr(m, "running_mean", weight)
        return tuple(weight.shape) if isinstance(weight, Tensor) else None

    def adjust(self, model: nn.Module) -> None:
        """Let the attributes say what the tensors are now."""
        shrunk: dict[nn.Module, float] = {}
        for m in model.modules():
            before, now = self._shapes.get(m), self._shape(m)
            if before is not None and now is not None and before != now:
                self._adjust_layer(m, before, now)
                out = 1 if is_conv1d(m) else 0
                if (isinstance(m, nn.Linear) or is_conv1d(m)) and now[out] < before[out]:
                    shrunk[m] = now[out] / before[out]
        for m in model.modules():
            ratios = {shrunk[child] for child in m.children() if child in shrunk}
            if len(ratios) == 1:
                _adjust_heads(m, ratios.pop())
            if isinstance(m, nn.MultiheadAttention) and self._shapes[m.out_proj] != self._shape(m.out_proj):
                PrunedMultiheadAttention.of(m, m.out_proj.in_features // m.head_dim)

    @staticmethod
    def _adjust_layer(m: Any, before: tuple[int, ...], now: tuple[int, ...]) -> None:
        if isinstance(m, nn.modules.conv._ConvNd):
            out, inputs = (1, 0) if m.transposed else (0, 1)
            if m.groups > 1 and m.groups == m.in_channels:  # depthwise
                m.groups = m.in_channels = now[0] if m.transposed else now[0] * m.in_channels // m.out_channels
                m.out_channels = now[0] * now[1] if m.transposed else now[0]
            else:
                m.in_channels = now[inputs] * (1 if m.transposed else m.groups)
                m.out_channels = now[out] * (m.groups if m.transposed else 1)
        elif isinstance(m, nn.Linear):
            m.out_features, m.in_features = now
        elif is_conv1d(m):
            m.nx, m.nf = now
        elif isinstance(m, (nn.LayerNorm, nn.RMSNorm)):
            m.normalized_shape = now
        elif isinstance(m, nn.Embedding):
            m.num_embeddings, m.embedding_dim = now
        else:
            for name in _CHANNELS:
                if getattr(m, name, None) == before[-1]:
                    setattr(m, name, now[-1])


def _adjust_heads(m: Any, ratio: float) -> None:
    """Counts of heads and widths of all of them, of a module whose projections have lost heads."""
    if not any(isinstance(getattr(m, name, None), int) for name in (*_COUNTS, *_WIDTHS)):
        return
    for name in (*_COUNTS, *_WIDTHS):
        value = getattr(m, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            setattr(m, name, round(value * ratio))
    config = getattr(m, "config", None)
    if any(isinstance(getattr(config, name, None), int) for name in _COUNTS):
        config = copy.copy(config)  # other layers keep their heads
        for name in _COUNTS:
            value = getattr(config, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                setattr(config, name, round(value * ratio))
        m.config = config


# ---- optimizers ------------------------------------------------------------------------------------------------------

_INSIDE = ("optimizer", "_optimizer", "optim", "base_optimizer")


def optimizers_in(optimizer: Any) -> list[Any]:
    """An optimizer and all that it wraps."""
    found: list[Any] = []
    waiting = [optimizer]
    while waiting:
        here = waiting.pop(0)
        if here is None or any(here is x for x in found):
            continue
        found.append(here)
        waiting += [getattr(here, "__dict__", {}).get(name) for name in _INSIDE]
    return found


def _states_of(optimizer: Any) -> Iterator[MutableMapping[Any, Any]]:
    for name in ("state", "_own_states"):
        states = getattr(optimizer, name, None)
        if isinstance(states, MutableMapping):
            yield states


def cut_states(optimizers: list[Any], kept: dict[Tensor, tuple[str, dict[int, Tensor]]]) -> list[tuple[Any, Any, Any]]:
    """The states of parameters without the indices that go, as (container, key, new value); nothing is written yet.

    Args:
        kept: by parameter: its name and the indices that remain by dimension.

    Raises:
        TypeError: a state that has several elements and not the shape of its parameter.
    """
    writes: list[tuple[Any, Any, Any]] = []
    seen: set[int] = set()

    def visit(container: Any, key: Any, value: Any, p: Tensor, where: str) -> None:
        name, indices = kept[p]
        if isinstance(value, Tensor):
            if value.numel() <= 1 and p.numel() > 1:
                return
            alike = value.dim() == p.dim() and all(a in (b, 1) for a, b in zip(value.shape, p.shape, strict=True))
            if not alike:
                raise TypeError(
                    f"shrink does not know which elements of the state {where} of {name} go: it is"
                    f" {'x'.join(map(str, value.shape))} and the parameter {'x'.join(map(str, p.shape))}"
                )
            writes.append((container, key, take(value, {d: i for d, i in indices.items() if value.shape[d] > 1})))
        elif isinstance(value, MutableMapping):
            for k, v in value.items():
                visit(value, k, v, p, f"{where}.{k}" if where else str(k))
        elif isinstance(value, list):
            for k, v in enumerate(value):
                visit(value, k, v, p, f"{where}[{k}]")

    for optimizer in optimizers:
        for states in _states_of(optimizer):
            if id(states) not in seen:
                seen.add(id(states))
                for p in [p for p in states if isinstance(p, Tensor) and p in kept]:
                    visit(states, p, states[p], p, "")
    return writes


def cut_couplings(
    optimizers: list[Any], kept: dict[Tensor, tuple[str, dict[int, Tensor]]]
) -> list[tuple[Any, Any, Any]]:
    """The ``coupling`` of param groups without the indices that go, as (group, key, new value).

    Raises:
        ValueError: weights of one group that do not lose the same indices.
    """
    writes: list[tuple[Any, Any, Any]] = []
    seen: set[int] = set()
    for optimizer in optimizers:
        for group in getattr(optimizer, "param_groups", ()):
            coupling, dim = group.get("coupling"), group.get("group_dim")
            if coupling is None or not isinstance(dim, int) or id(group) in seen:
                continue
            seen.add(id(group))
            sets = {
                tuple(kept[p][1][dim].tolist()) if p in kept and dim in kept[p][1] else None for p in group["params"]
            }
            if len(sets) > 1:
                names = ", ".join(kept[p][0] for p in group["params"] if p in kept)
                raise ValueError(f"{names} share a coupling but do not lose the same indices: give each a param group")
            for indices in sets - {None}:
                writes.append((group, "coupling", tuple(coupling[i] for i in indices or ())))
    return writes
