"""The papers' points of comparison, which remove channels after a dense training: by the library Torch-Pruning.

l1-norm filter pruning (Li et al., 2017) removes in every layer the filters of least ||w||_1; network slimming (Liu et
al., 2017) trains with an l1 penalty on the scales of the batch norms and removes the channels of least scale anywhere.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deep.models import PreActResNet
from deep.settings import PRUNERS, Settings, SettingsError

LEAST_LEFT = 0.1
"""The share of a layer's channels that network slimming leaves: without it, whole layers vanish at 70 %."""


def _library() -> Any:
    try:
        return importlib.import_module("torch_pruning")
    except ImportError as error:
        raise SettingsError("--method l1norm and slimming need Torch-Pruning: pip install torch-pruning") from error


def _pruner(settings: Settings, model: nn.Module, example: Tensor) -> Any:
    tp = _library()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if settings.method == "slimming" and not norms:
        raise SettingsError(f"network slimming needs batch norms: {settings.model} has none")
    # The logits stay as many as there are classes.
    heads = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    if hasattr(getattr(model, "net", model), "members"):
        raise SettingsError(f"--method {settings.method} takes a single net, not an ensemble")
    options = {"pruning_ratio": settings.ratio, "ignored_layers": heads}
    if settings.method == "l1norm":
        # Of the filters alone: by default the library averages with the norms and the next layer that go with them.
        importance = tp.importance.MagnitudeImportance(p=1, group_reduction="first", normalizer=None)
        return tp.pruner.MagnitudePruner(model, example, importance, **options)
    return tp.pruner.BNScalePruner(
        model,
        example,
        tp.importance.BNScaleImportance(),
        reg=settings.scale_lasso,
        global_pruning=True,
        max_pruning_ratio=1 - LEAST_LEFT,
        **options,
    )


def regularizer(settings: Settings, model: nn.Module, example: Tensor) -> Callable[[], None] | None:
    """What network slimming adds to the gradients after backward; None for other methods.

    Raises:
        SettingsError: Torch-Pruning is not installed, or the model has no batch norm.
    """
    if settings.method not in PRUNERS:
        return None
    pruner = _pruner(settings, model, example)  # for l1norm too: what it lacks is said before hours of training
    return None if settings.method == "l1norm" else lambda: pruner.regularize(model)


def prune(settings: Settings, model: nn.Module, example: Tensor) -> list[Any]:
    """Remove channels from a model, in place.

    Args:
        example: images that the model takes, N x C x H x W.

    Returns:
        The library's record of what was removed, in plain values, for :func:`prune_again`.
    """
    pruner = _pruner(settings, model, example)
    pruner.step()
    return [[name, bool(out), [int(i) for i in indices]] for name, out, indices in pruner.pruning_history()]


def prune_again(model: nn.Module, example: Tensor, history: list[Any]) -> None:
    """Remove from a fresh model what a record says."""
    graph = _library().DependencyGraph().build_dependency(model, example_inputs=example)
    graph.load_pruning_history(history)


def initialize(model: nn.Module, seed: int) -> None:
    """New weights for a training from scratch."""
    torch.manual_seed(seed)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for module in model.modules():
        if isinstance(module, PreActResNet):
            module.reset_convolutions()
