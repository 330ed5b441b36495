"""From a model to param groups: which weights are penalised, and along which dimension."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from .groups import GroupDim, structure_dim
from .options import OPTIONS

PENALISED = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)


def penalised_weights(
    model: nn.Module, include: tuple[type[nn.Module], ...] = PENALISED
) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    """(name, parameter, owner) of the ``weight`` of every included module, each parameter once.

    A weight that an Embedding shares (tied input and output layers) is left out: it is an embedding.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(module, include) or not isinstance(weight, nn.Parameter):
            continue
        # A lazy module's weight has no shape yet; it will be a matrix or a convolution's.
        if (is_lazy(weight) or weight.dim() >= 2) and id(weight) not in embeddings and id(weight) not in seen:
            seen.add(id(weight))
            yield f"{prefix}.weight" if prefix else "weight", weight, module


def param_groups(
    model: nn.Module,
    *,
    structure: str | None = None,
    include: tuple[type[nn.Module], ...] = PENALISED,
    **penalty_options: Any,
) -> list[dict[str, Any]]:
    """Divide a model into the weights to penalise and the dense rest, with names.

    Args:
        model: any module.
        structure: None (elementwise, or ``group_dim`` as given), ``"in_channels"``, ``"out_channels"``,
            ``"kernels"`` or ``"layers"``: sets ``group_dim`` by module type (a transposed convolution swaps
            dimensions 0 and 1, so it gets a group of its own).
        include: module types whose ``weight`` (2-D or more, and trained) is penalised.
        **penalty_options: any option of :class:`rvsm_kernels.RVSM`, for the penalised groups.

    Returns:
        Groups for an optimizer: the penalised one (two if the model mixes transposed and plain convolutions under a
        structure), then the rest (biases, norms, embeddings, frozen weights) with ``penalty=None``.

    Raises:
        ValueError: an unknown structure, or a structure together with ``group_dim``.
        TypeError: an option that RVSM does not have.
    """
    unknown = set(penalty_options) - set(OPTIONS)
    if unknown:
        raise TypeError(f"param_groups got unknown option(s): {', '.join(sorted(unknown))}")
    structure_dim(nn.Module(), structure)
    if structure is not None and penalty_options.get("group_dim") is not None:
        raise ValueError(f"structure={structure!r} sets group_dim; give one of the two")

    by_dim: dict[GroupDim, list[tuple[str, nn.Parameter]]] = {}
    penalised: set[int] = set()
    for name, weight, module in penalised_weights(model, include):
        if weight.requires_grad:
            by_dim.setdefault(structure_dim(module, structure), []).append((name, weight))
            penalised.add(id(weight))
    groups = [
        {"params": params, **penalty_options, **({"group_dim": dim} if structure is not None else {})}
        for dim, params in by_dim.items()
    ]
    rest = [(name, p) for name, p in model.named_parameters() if id(p) not in penalised]
    if rest:
        groups.append({"params": rest, "penalty": None, "group_dim": None, "group_lasso": 0.0})
    return groups
