"""What a structure means for a weight: the dimensions whose indices are channels, kernels, layers or heads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeGuard

from torch import Tensor, nn

from ..method.groups import Blocks, GroupDim, as_dims

STRUCTURES: dict[str, tuple[GroupDim, GroupDim]] = {
    # structure: (group_dim of a weight (outputs, inputs, ...), of one (inputs, outputs, ...))
    "in_channels": (1, 0),
    "out_channels": (0, 1),
    "kernels": ((0, 1), (0, 1)),
    "layers": ((), ()),
}

HEADS = "heads"
"""The structure whose groups are blocks of a dimension: see :func:`heads_of`."""

COUPLED = "coupled"
"""The structure whose groups span all weights that read a channel: see :mod:`rvsm_kernels.model.couplings`."""

NOT_WHOLE = "no whole dimension of this weight indexes"
"""How a reason begins why a weight cannot express a structure."""

NO_HEADS = "no projection of attention heads that is known"
"""Why a weight stays dense under the structure of heads."""

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def check_structure(structure: str | None) -> None:
    """Raise ValueError for an unknown structure."""
    names = (*STRUCTURES, HEADS, COUPLED)
    if structure is not None and structure not in names:
        raise ValueError(f"Invalid structure: {structure!r} (choose one of None, {', '.join(map(repr, names))})")


# ---- modules of transformers, which is not imported ------------------------------------------------------------------


def _names_in_transformers(module: nn.Module) -> Iterator[str]:
    """The names of a module's classes that transformers, or a model's code on its hub, has defined."""
    return (c.__name__ for c in type(module).__mro__ if c.__module__.startswith("transformers"))


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D, a linear layer whose weight is (inputs, outputs)."""
    return "Conv1D" in _names_in_transformers(module)


def is_router(module: nn.Module) -> bool:
    """Whether a module of transformers chooses experts: a class of its own, not a plain Linear."""
    return any("Router" in name for name in _names_in_transformers(module))


def is_experts(module: nn.Module, name: str) -> bool:
    """Whether a parameter of a module holds the weights of all experts of transformers: (experts, ..., ...)."""
    p = getattr(module, name, None)
    return (
        isinstance(p, nn.Parameter)
        and not nn.parameter.is_lazy(p)
        and p.dim() == 3
        and any(n.endswith("Experts") for n in _names_in_transformers(module))
    )


def _swaps_experts(module: nn.Module) -> bool:
    """Whether the weights of experts are (experts, inputs, outputs): Llama 4's, GPT-OSS's."""
    known = getattr(module, "is_transposed", None)
    first, last = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
    if known is not None or first is None or last is None:
        return bool(known)
    # A neuron has two outputs of the first weight, its gate and its value, and one input of the last.
    return bool(first.shape[2] == 2 * last.shape[1])


# ---- whole dimensions ------------------------------------------------------------------------------------------------


def structure_dim(module: nn.Module, structure: str | None, name: str = "weight") -> tuple[GroupDim, str | None]:
    """The ``group_dim`` that a structure means for a weight of a module: its groups are channels of the network.

    Args:
        structure: one of whole dimensions, or None.
        name: the name of the weight in the module.

    Returns:
        (group_dim, None), or (None, why the weight cannot express the structure).
    """
    if structure is None:
        return None, None
    if is_experts(module, name):  # every expert has channels of its own, and is a layer
        dims = as_dims(STRUCTURES[structure][_swaps_experts(module)]) or ()
        return (0, *(d + 1 for d in dims)), None
    transposed = isinstance(module, _TRANSPOSED)
    dim = STRUCTURES[structure][transposed or is_conv1d(module)]
    groups = getattr(module, "groups", 1) if isinstance(module, nn.modules.conv._ConvNd) else 1
    if groups > 1 and (structure, transposed) in (("in_channels", False), ("out_channels", True)):
        inputs, outputs = module.in_channels, module.out_channels
        if groups == inputs == outputs:  # depthwise: channel i is filter i
            return 0, None
        return None, f"{NOT_WHOLE} its {structure.replace('_', ' ')}, for it has {groups} groups"
    if isinstance(module, nn.Bilinear) and structure == "in_channels":
        return None, f"{NOT_WHOLE} its input channels, for it has two inputs"
    gated = isinstance(module, (nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell)) and not name.startswith("weight_hr")
    if gated and structure == "out_channels":
        return None, f"{NOT_WHOLE} its units, for each gate has a row of its own"
    return dim, None


# ---- heads: blocks of a dimension ------------------------------------------------------------------------------------


class _Family(NamedTuple):
    """How the modules of an attention name their parts.

    Attributes:
        inputs: the linear layers whose outputs are heads, all of them there. Stacked ones (q, k and v in a weight)
            are whole heads one after the other, in any order.
        outputs: the names that the linear layer may have whose inputs are heads.
        by_count: each layer has ``heads`` equal blocks, whatever their size is; else every head has the same size.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...] = ()
    by_count: bool = False


_FAMILIES = (
    _Family(("q_b_proj", "kv_b_proj"), ("o_proj",), by_count=True),  # DeepSeek's latent attention
    _Family(("q_proj", "kv_b_proj"), ("o_proj",), by_count=True),  # the same, with queries that are not compressed
    _Family(("q_proj", "k_proj", "v_proj"), ("o_proj", "out_proj", "dense")),  # Llama, Mixtral, Qwen, ViT, Whisper
    _Family(("query", "key", "value"), ("dense",)),  # Bert, Albert
    _Family(("query_proj", "key_proj", "value_proj")),  # DeBERTa
    _Family(("q", "k", "v"), ("o",)),  # T5
    _Family(("q_lin", "k_lin", "v_lin"), ("out_lin",)),  # DistilBert
    _Family(("q_attn", "c_attn"), ("c_proj",)),  # GPT-2's cross attention
    _Family(("c_attn",), ("c_proj",)),  # GPT-2, OpenAI-GPT
    _Family(("qkv_proj",), ("o_proj",)),  # Phi-3
    _Family(("query_key_value",), ("dense",)),  # GPT-NeoX, Falcon, Bloom
    _Family(("Wqkv",), ("Wo", "out_proj")),  # ModernBert, DBRX
)
"""The attentions that are known; of several that fit a module the first counts."""

_SIZES = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")


def _number(module: nn.Module, names: tuple[str, ...]) -> int | None:
    """The first positive integer among some attributes of a module."""
    found = (getattr(module, name, None) for name in names)
    return next((n for n in found if isinstance(n, int) and n > 0), None)


def _is_linear(module: object) -> TypeGuard[nn.Linear]:
    """Whether a module is a linear layer that has its shape; transformers' Conv1D has what matters here too."""
    linear = isinstance(module, nn.Linear) or (isinstance(module, nn.Module) and is_conv1d(module))
    weight = getattr(module, "weight", None)
    return linear and isinstance(weight, Tensor) and not nn.parameter.is_lazy(weight)


def _size(layer: nn.Linear, of_inputs: bool) -> tuple[int, int]:
    """(the dimension of a linear layer's weight that its inputs or outputs index, how many these are)."""
    dim = int(of_inputs != is_conv1d(layer))
    return dim, layer.weight.shape[dim]


def _parts_of(attention: nn.Module, parent: nn.Module | None) -> Iterator[tuple[nn.Linear, bool, int]]:
    """(a linear layer, whether its inputs are the heads, the size of a head there) of a module that is an attention."""
    layers = {name: m for name, m in attention.named_children() if _is_linear(m)}
    family = next((f for f in _FAMILIES if all(n in layers for n in f.inputs)), None)
    if family is None:
        return
    inputs = [layers[n] for n in family.inputs]
    output = next((layers[n] for n in family.outputs if n in layers), None)
    if output is None:  # Bert: the attention beside its output, in one module
        beside = getattr(getattr(parent, "output", None), "dense", None)
        if _is_linear(beside) and _size(beside, True)[1] == _size(inputs[0], False)[1]:
            output = beside
    count, size = _number(attention, _COUNTS), _number(attention, _SIZES)
    whole = _size(inputs[0], False)[1] if output is None else _size(output, True)[1]
    if count is not None and size is None:
        size = whole // count
    parts = [(layer, False) for layer in inputs] + ([] if output is None else [(output, True)])
    for layer, of_inputs in parts:
        block = _size(layer, of_inputs)[1] // count if family.by_count and count is not None else size
        if block is not None and (count is not None or not family.by_count):
            yield layer, of_inputs, block


def heads_of(model: nn.Module) -> dict[tuple[int, str], Blocks]:
    """Where the heads are in the weights of attentions: rows of q, k and v, columns of the output projection.

    Returns:
        By the id of the module that has the weight and the weight's name there. A weight that is no whole number of
        heads is not among them.
    """
    found: dict[tuple[int, str], Blocks] = {}

    def add(module: nn.Module, name: str, dim: int, block: int) -> None:
        p = getattr(module, name, None)
        if isinstance(p, nn.Parameter) and not nn.parameter.is_lazy(p) and block > 0 and p.shape[dim] % block == 0:
            found.setdefault((id(module), name), Blocks(dim, block))

    for parent in model.modules():
        if isinstance(parent, nn.MultiheadAttention):
            for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
                add(parent, name, 0, parent.head_dim)
            add(parent.out_proj, "weight", 1, parent.head_dim)
        for attention in parent.children():
            for layer, of_inputs, block in _parts_of(attention, parent):
                add(layer, "weight", _size(layer, of_inputs)[0], block)
    for layer, of_inputs, block in _parts_of(model, None):
        add(layer, "weight", _size(layer, of_inputs)[0], block)
    return found
