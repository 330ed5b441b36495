"""From a model to param groups: which weights are penalised, along which dimension, and why the others are not."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ..method.dtypes import DTYPES
from ..method.groups import GroupDim
from ..method.options import OPTION_NAMES, unknown_option
from ..method.parameters import is_flattened
from ..method.warn import some, warn
from ..method.windows import NO_PATTERN, check_pattern, why_not
from .couplings import check_inputs, couplings
from .structures import (
    COUPLED,
    HEADS,
    NO_HEADS,
    NOT_WHOLE,
    check_structure,
    heads_of,
    is_conv1d,
    is_experts,
    is_router,
    structure_dim,
)

PENALISED: tuple[type[nn.Module], ...] = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
    nn.Bilinear,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RNNCellBase,
)
"""The modules whose weights are penalised, together with ``Conv1D`` and the experts of transformers."""

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_PRUNED = ("_orig", "_g", "_v", "_mask")  # what torch.nn.utils.prune, weight_norm and spectral_norm make of a weight


_CHANGED = "pruned or parametrised: the layer computes with another tensor"
_THIN = "a bias, a norm or another parameter of fewer than two dimensions"
_BIAS = "a bias"
_FLAT = "flattened by FullyShardedDataParallel: it has no shape left"
_FROZEN = "frozen"
_BUFFER = "a buffer, which is not trained"
_PACKED = "quantized, and not trained"
_ROUTER = "a router, which chooses the experts; include its type to penalise it"


class InOrder(list[Any]):
    """Parameters of a group, with the place of each in ``model.parameters()``.

    An optimizer notes the places as ``param_order``, so that a checkpoint of ``torch.optim.SGD`` can be loaded.
    """

    order: list[int]


class Weight(NamedTuple):
    """A parameter of a model.

    Attributes:
        name: as in ``model.named_parameters()``.
        param: the parameter.
        owner: the module that has it.
        left: why it is not penalised, None where it is.
        group_dim, group_block: those of its groups, where a structure was asked for.
        coupling: with which indices of which weights each index of ``group_dim`` is one group.
    """

    name: str
    param: nn.Parameter
    owner: nn.Module
    left: str | None
    group_dim: GroupDim = None
    group_block: int = 1
    coupling: tuple[int, ...] | None = None


def is_changed(name: str, module: nn.Module) -> bool:
    """Whether pruning or a parametrisation has made a parameter of a weight: the layer computes with another tensor."""
    if isinstance(module, parametrize.ParametrizationList):
        return True
    for ending in _PRUNED:
        base = name.removesuffix(ending)
        if base != name and not isinstance(getattr(module, base, None), nn.Parameter) and hasattr(module, base):
            return True
    return False


def owners(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter, nn.Module]]:
    """(full name, name in its module, parameter, module) of every parameter, each once, as ``model.parameters()``."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for local, p in module.named_parameters(recurse=False):
            if id(p) not in seen:
                seen.add(id(p))
                yield f"{prefix}.{local}" if prefix else local, local, p, module


def _types(include: Any) -> tuple[type[nn.Module], ...]:
    types = (include,) if isinstance(include, type) else include
    if isinstance(types, (str, bytes)) or not isinstance(types, Iterable):
        raise TypeError(f"include takes module types, as in include=(nn.Linear,), but got {include!r}")
    types = tuple(types)
    for t in types:
        if not (isinstance(t, type) and issubclass(t, nn.Module)):
            raise TypeError(f"include takes module types, as in include=(nn.Linear,), but got {t!r}")
    return types


def weights_of(
    model: nn.Module,
    include: Iterable[type[nn.Module]] = PENALISED,
    structure: str | None = None,
    example_inputs: Any = None,
) -> list[Weight]:
    """Every parameter of a model, with why it is left dense.

    A weight that an Embedding shares (tied input and output layers) is an embedding, unless Embedding is included.
    """
    types = _types(include)
    by_default = types == PENALISED
    wants_embeddings = any(issubclass(t, _EMBEDDINGS) for t in types)
    embeddings = {id(p) for m in model.modules() if isinstance(m, _EMBEDDINGS) for p in m.parameters(recurse=False)}
    heads = heads_of(model) if structure == HEADS else {}
    weights = []
    for name, local, p, module in owners(model):
        included = isinstance(module, types) or (by_default and (is_conv1d(module) or is_experts(module, local)))
        left: str | None = None
        dim: GroupDim = None
        block = 1
        if is_changed(local, module):
            left = _CHANGED
        elif is_flattened(p):
            left = _FLAT
        elif not is_lazy(p) and p.dim() < 2:
            left = _THIN
        elif "bias" in local:
            left = _BIAS
        elif id(p) in embeddings and not wants_embeddings:
            left = "an embedding"
        elif by_default and is_router(module):
            left = _ROUTER
        elif not included:
            left = f"a parameter of {type(module).__name__}, which is not included"
        elif not p.requires_grad:
            left = _FROZEN
        elif p.dtype not in DTYPES:
            left = f"of {p.dtype}, which is not trained"
        elif structure != HEADS and structure != COUPLED:
            dim, left = structure_dim(module, structure, local)
        elif structure == COUPLED:
            pass  # below, by the forward pass
        elif (id(module), local) in heads:
            dim, block = heads[id(module), local].dim, heads[id(module), local].size
        else:
            left = NO_HEADS
        weights.append(Weight(name, p, module, left, dim, block))
    if structure == COUPLED:
        of_weight = couplings(model, example_inputs, [w.name for w in weights if w.left is None])
        for k, w in enumerate(weights):
            if w.left is None:
                dim, coupling, left = of_weight(w.name)
                weights[k] = w._replace(left=left, group_dim=dim, coupling=coupling)
    return weights


def _hint(model: nn.Module, weights: list[Weight]) -> str:
    found = sorted({type(w.owner).__name__ for w in weights if not is_lazy(w.param) and w.param.dim() >= 2})
    return f"its weights are in {', '.join(found)}" if found else f"{type(model).__name__} has no weights"


def param_groups(
    model: nn.Module,
    *,
    structure: str | None = None,
    include: Iterable[type[nn.Module]] = PENALISED,
    named: bool = True,
    verbose: bool = False,
    example_inputs: Any = None,
    **penalty_options: Any,
) -> list[dict[str, Any]]:
    """Divide a model into the weights to penalise and the dense rest.

    Args:
        model: any module.
        structure: None (elementwise, or ``group_dim`` as given), ``"in_channels"``, ``"out_channels"``,
            ``"kernels"`` or ``"layers"``: sets ``group_dim`` so that a group is a channel of the network, by module
            type (transposed convolutions, transformers' Conv1D and experts and depthwise convolutions have theirs in
            other dimensions, and get groups of their own). A weight that cannot express them in whole dimensions (a
            grouped convolution by input channels, an LSTM by outputs) stays dense, with a warning. ``"heads"``: sets
            ``group_dim`` and ``group_block`` so that a group is an attention head, as rows of the projections to q, k
            and v and as columns of the output projection; what is no such projection stays dense. ``"coupled"``: a
            group is a channel, neuron or head with all its readers, so that it can be removed
            (:func:`rvsm_kernels.shrink`): sets ``group_dim`` and ``coupling``.
        include: module types whose weights (two dimensions or more, trained, no biases) are penalised: by default
            convolutions, linear and bilinear layers, attention, recurrent layers, transformers' Conv1D and experts.
            Another type (experts of your own, a router, an Embedding) takes all such parameters that belong to it
            directly.
        named: False: plain tensors in the place of (name, tensor), for wrappers that know no names
            (``ZeroRedundancyOptimizer``).
        verbose: print which weights are taken and which are left, and why (see :func:`describe`).
        example_inputs: for ``structure="coupled"``, which follows the channels through a forward pass of a copy of the
            model: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments.
        **penalty_options: any option of :class:`rvsm_kernels.RVSM`, for the penalised groups.

    Returns:
        Groups for an optimizer: the penalised ones (one for each place of groups that a structure needs), then the rest
        (biases, norms, embeddings, frozen weights) with ``penalty=None``. With ``penalty="nm"`` the rest has also the
        weights without whole windows of inputs along dimension 1, silently: a first convolution of three channels with
        ``pattern=(2, 4)``, depthwise and transposed convolutions, transformers' Conv1D (``verbose`` says which).

    Raises:
        ValueError: an unknown structure, a structure together with ``group_dim``, no weight to penalise;
            ``penalty="nm"`` without a ``pattern``, or with a structure.
        TypeError: an option that RVSM does not have, or something that is no module; ``example_inputs`` without
            ``structure="coupled"`` or the other way round.
        RuntimeError: the model does not run on the example inputs.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"param_groups takes a module, but got a {type(model).__name__}; give the model itself")
    for key in penalty_options:
        if key not in OPTION_NAMES:
            raise TypeError(f"unknown option: {unknown_option(key, OPTION_NAMES, 'param_groups')}")
    check_structure(structure)
    check_inputs(model, structure, example_inputs)
    taken: dict[str, Any] = {"group_dim": None}
    taken |= {"group_block": 1} if structure in (HEADS, COUPLED) else {}
    taken |= {"coupling": None} if structure == COUPLED else {}
    for key, default in taken.items() if structure is not None else ():
        if penalty_options.get(key, default) != default:
            raise ValueError(f"structure={structure!r} sets {key}; give one of the two")
    types = _types(include)
    weights = weights_of(model, types, structure, example_inputs)
    if penalty_options.get("penalty") == "nm":
        weights = _with_windows(weights, structure, penalty_options.get("pattern"))
    if verbose:
        print(_text(weights))
    if not any(w.left is None for w in weights):
        if weights and all(not w.param.requires_grad for w in weights):
            raise ValueError("no weight is penalised: every parameter of the model is frozen (requires_grad=False)")
        if any(w.left == _FLAT for w in weights):
            raise ValueError(
                "no weight is penalised: FullyShardedDataParallel has flattened the parameters, so that weights cannot"
                " be told from biases; shard with fully_shard (FSDP2), or penalise all elements alike:"
                " RVSM(model.parameters(), ...)"
            )
        among = "" if types == PENALISED else f" under include=({', '.join(t.__name__ for t in types)})"
        among += f" under structure={structure!r}: it has {NO_HEADS}" if structure == HEADS else ""
        raise ValueError(
            f"no weight of the model is penalised{among}: {_hint(model, weights)}; name those types in include, and"
            " see rvsm_kernels.describe(model)"
        )
    for t in types if types != PENALISED else ():
        if not any(w.left is None and isinstance(w.owner, t) for w in weights):
            had = [w for w in weights if isinstance(w.owner, t)]
            why = f"{had[0].name} is {had[0].left}" if had else "the model has none"
            warn(f"include: no weight of {t.__name__} is penalised ({why})")
    _warn_of_left(weights, structure)

    order = {id(p): k for k, p in enumerate(model.parameters())}
    by_place: dict[tuple[GroupDim, int, tuple[int, ...] | None], list[Weight]] = {}
    for w in weights:
        if w.left is None:
            by_place.setdefault((w.group_dim, w.group_block, w.coupling), []).append(w)
    groups = []
    for (dim, block, coupling), members in by_place.items():
        groups.append({**_members(members, named, order), **penalty_options})
        if structure is not None:
            groups[-1]["group_dim"] = dim
        if structure == HEADS:
            groups[-1]["group_block"] = block
        if structure == COUPLED:
            groups[-1] = {"coupling_name": "coupled", **groups[-1], "coupling": coupling}
    rest = [w for w in weights if w.left is not None]
    if rest:
        groups.append({**_members(rest, named, order), "penalty": None, **_NO_GROUPS})
    return groups


def _with_windows(weights: list[Weight], structure: str | None, pattern: Any) -> list[Weight]:
    """The weights with those left dense that have no whole windows of N:M sparsity along their inputs.

    Raises:
        ValueError: no pattern, or a structure, which windows have not; no weight has windows.
        TypeError: something else than a pattern.
    """
    if structure is not None:
        raise ValueError(f"structure={structure!r} makes groups, and penalty='nm' keeps elements: give one of the two")
    if pattern is None:
        raise ValueError(NO_PATTERN)
    check_pattern("pattern", pattern)

    def left(w: Weight) -> str | None:
        if w.left is not None or is_lazy(w.param):
            return w.left
        dims, _ = structure_dim(w.owner, "in_channels", w.name.rpartition(".")[2])
        inputs = () if dims is None else (dims,) if isinstance(dims, int) else tuple(dims)
        if inputs and 1 not in inputs:
            return f"without windows for {pattern[0]}:{pattern[1]}: dimension 1 does not hold its inputs"
        reason = why_not(w.param.shape, pattern)
        return None if reason is None else f"without windows for {pattern[0]}:{pattern[1]}: {reason}"

    fitted = [w._replace(left=left(w)) for w in weights]
    if any(w.left is None for w in weights) and not any(w.left is None for w in fitted):
        first = next(w for w, before in zip(fitted, weights, strict=True) if before.left is None)
        raise ValueError(f"no weight is penalised: {first.name} is {first.left}, and so are all others")
    return fitted


_NO_GROUPS = {"group_dim": None, "group_block": 1, "coupling": None, "group_lasso": 0.0}
"""What dense parameters have, whatever the defaults of their optimizer are."""


def _members(weights: list[Weight], named: bool, order: dict[int, int]) -> dict[str, Any]:
    params = InOrder((w.name, w.param) if named else w.param for w in weights)
    params.order = [order[id(w.param)] for w in weights]
    return {"params": params}


def _warn_of_left(weights: list[Weight], structure: str | None) -> None:
    """Warn of weights that someone would expect to be penalised."""
    changed = [w.name for w in weights if w.left == _CHANGED]
    if changed:
        warn(
            f"left dense: {some(changed)}: torch.nn.utils.prune, weight_norm or a parametrisation computes the"
            " weight from them; remove it (prune.remove, parametrize.remove_parametrizations), or build the group by"
            " hand"
        )
    unexpressed = [w for w in weights if w.left is not None and w.left.startswith(NOT_WHOLE)]
    if unexpressed:
        names = some([w.name for w in unexpressed])
        warn(f"left dense under structure={structure!r}: {names}: {unexpressed[0].left}")


def _text(weights: list[Weight]) -> str:
    width = max((len(w.name) for w in weights), default=0)
    lines = []
    for w in weights:
        shape = "lazy" if is_lazy(w.param) else "x".join(map(str, w.param.shape)) or "1"
        what = "dense: " + w.left if w.left is not None else "penalised"
        what += "" if w.group_dim is None else f", group_dim={w.group_dim!r}"
        what += "" if w.group_block == 1 else f", group_block={w.group_block}"
        what += "" if w.coupling is None else f", {len({k for k in w.coupling if k > 0})} coupled groups"
        lines.append(f"{w.name:<{width}}  {shape:>16}  {what}")
    return "\n".join(lines)


def describe(
    model: nn.Module,
    *,
    structure: str | None = None,
    include: Iterable[type[nn.Module]] = PENALISED,
    example_inputs: Any = None,
) -> str:
    """Which weights :func:`param_groups` takes and which it leaves dense, with the reasons, as a table to print."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"describe takes a module, but got a {type(model).__name__}")
    check_structure(structure)
    check_inputs(model, structure, example_inputs)
    return _text(weights_of(model, include, structure, example_inputs))


def counted_weights(model: nn.Module) -> Iterator[tuple[str, Tensor, str | None]]:
    """(name, tensor, why it is not penalised or None) of every weight that a model computes with.

    Those are all of two dimensions or more but biases; of a pruned or parametrised layer the tensor that comes out.
    Also sparse, quantized and int8 buffers, and the weights that the quantized layers of torch.ao keep packed.
    """
    for w in weights_of(model):
        if w.left in (_THIN, _BIAS) or is_lazy(w.param):
            continue
        prefix, _, local = w.name.rpartition(".")
        if w.left == _CHANGED:
            found = _effective(local, w.owner, prefix, model)
            if found is not None:
                yield (*found, w.left)
        else:
            yield w.name, w.param.detach(), None if w.left == _FROZEN else w.left
    for name, buffer in model.named_buffers():
        if buffer.dim() >= 2 and (buffer.layout != torch.strided or buffer.is_quantized or buffer.dtype == torch.int8):
            yield name, buffer, _BUFFER
    for prefix, module in model.named_modules():
        if type(module).__module__.startswith("torch.ao.nn.") and inspect.ismethod(getattr(module, "weight", None)):
            yield f"{prefix}.weight" if prefix else "weight", module.weight(), _PACKED


def _effective(local: str, owner: nn.Module, prefix: str, model: nn.Module) -> tuple[str, Tensor] | None:
    """The tensor that a pruned or parametrised layer computes with, once for all the parameters that make it."""
    if isinstance(owner, parametrize.ParametrizationList):
        if local not in ("original", "original0"):
            return None
        path, _, attribute = prefix.rpartition(".parametrizations.")
        if not path and prefix.startswith("parametrizations."):
            attribute = prefix.removeprefix("parametrizations.")
        return f"{path}.{attribute}" if path else attribute, getattr(model.get_submodule(path), attribute).detach()
    for ending in ("_orig", "_g"):
        base = local.removesuffix(ending)
        if base != local:
            mask = getattr(owner, f"{base}_mask", None)
            value = getattr(owner, local) * mask if mask is not None else getattr(owner, base)
            return f"{prefix}.{base}" if prefix else base, value.detach()
    return None
