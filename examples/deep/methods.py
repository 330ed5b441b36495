"""The optimizer of a run, and how sparse its weights are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import rvsm_kernels as rk
from deep.settings import Settings, SettingsError

SMALL = 1e-3
"""Weights below this count as small: Figure 1 of 002."""


def penalised(settings: Settings) -> bool:
    """Whether the method has a u."""
    return settings.method in ("rvsm", "rgsm", "admm")


def parameter_groups(settings: Settings, model: nn.Module) -> list[dict[str, Any]]:
    """The model's parameters, the weights to penalise with their options.

    Elementwise penalties take the weights of convolutions and linear layers, groups those of convolutions only, as the
    papers do.
    """
    s = settings
    include = {} if s.groups is None else {"include": (nn.Conv2d,)}
    return rk.param_groups(
        model,
        structure=s.groups,
        **include,
        penalty=s.penalty,
        lam=s.lam,
        beta=s.beta,
        a=s.a,
        density=s.density,
        group_scale=s.group_scale,
        group_lasso=s.group_lasso,
        decoupled=s.decoupled,
        method="admm" if s.method == "admm" else "rvsm",
    )


def optimizer_for(settings: Settings, model: nn.Module, lr: float | None = None) -> torch.optim.Optimizer:
    """The optimizer: torch's fused SGD where there is no u, else rk.RVSM or the loop over channels.

    Raises:
        SettingsError: options that the optimizer refuses, or an engine that is not there.
    """
    base: dict[str, Any] = {
        "lr": settings.lr if lr is None else lr,
        "momentum": settings.momentum,
        "weight_decay": settings.weight_decay,
        "nesterov": True,
    }
    if not penalised(settings):
        return torch.optim.SGD(model.parameters(), **base, fused=True)
    try:
        groups = parameter_groups(settings, model)
        if settings.engine == "loop":
            from bench.baselines import ChannelLoop  # the baseline that the benchmarks measure; of the source tree

            return ChannelLoop(groups, **base)
        return rk.RVSM(groups, **base, engine=settings.engine)
    except ImportError as error:
        raise SettingsError("--engine loop needs the folder bench of the source tree") from error
    except (ValueError, RuntimeError) as error:
        raise SettingsError(str(error)) from error


def reader_for(settings: Settings, model: nn.Module, optimizer: torch.optim.Optimizer) -> rk.RVSM | None:
    """The optimizer that knows u: a run's own, or one that never steps beside the loop over channels; None if dense."""
    if not penalised(settings):
        return None
    return optimizer if isinstance(optimizer, rk.RVSM) else rk.RVSM(parameter_groups(settings, model))


@torch.no_grad()
def group_lasso(optimizer: torch.optim.Optimizer) -> float:
    """lam_2 ||w||_GL: RGSM's second penalty, over the groups of the weights as they stand."""
    total = 0.0
    for group in optimizer.param_groups:
        if group["group_lasso"]:
            norms = (_norms(p, group["group_dim"]).sum().item() for p in group["params"])
            total += group["group_lasso"] * sum(norms)
    return total


def _norms(w: Tensor, group_dim: Any) -> Tensor:
    """||w_G||_2 of every group."""
    dims = (group_dim,) if isinstance(group_dim, int) else group_dim
    reduced = [d for d in range(w.dim()) if d not in dims]
    return torch.linalg.vector_norm(w, dim=reduced, dtype=torch.float64) if reduced else w.abs().double()


def sizes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """By layer, the counts of weights and input channels."""
    return {row.name: (row.numel, row.groups) for row in rk.sparsity(model, group_dim=1).rows}


@torch.no_grad()
def weight_statistics(model: nn.Module, before: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """How sparse the weights of convolutions and linear layers are as they stand.

    Args:
        before: :func:`sizes` of the model as it was built; what was removed since counts as zero.

    Returns:
        Shares: ``zeros`` of all weights; ``zero_channels`` of the input channels of the convolutions
        (||w_g||_2 < 1e-15); ``small`` of the weights with |w| < 1e-3; and ``layers``, the counts by layer.
    """
    layers = []
    for row in rk.sparsity(model, group_dim=1).rows:
        w = model.get_parameter(row.name)
        weights, channels = before[row.name]
        layers.append(
            {
                "name": row.name,
                "shape": list(row.shape),
                "zeros": row.zeros + weights - row.numel,
                "weights": weights,
                "small": int((w.abs() < SMALL).sum()) + weights - row.numel,
                "zero_channels": row.zero_groups + channels - row.groups,
                "channels": channels,
            }
        )
    convolutions = [layer for layer in layers if len(layer["shape"]) == 4]

    def share(of: list[dict[str, Any]], part: str, whole: str) -> float:
        return sum(layer[part] for layer in of) / max(1, sum(layer[whole] for layer in of))

    return {
        "zeros": share(layers, "zeros", "weights"),
        "zero_channels": share(convolutions, "zero_channels", "channels"),
        "small": share(layers, "small", "weights"),
        "layers": layers,
    }


@torch.no_grad()
def channel_norms(model: nn.Module) -> Tensor:
    """The norms ||w_g||_2 of the input channels of all convolutions, in one row."""
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    return torch.cat([module.weight.float().pow(2).sum((0, 2, 3)).sqrt().cpu() for module in convolutions])


@torch.no_grad()
def all_weights(model: nn.Module) -> Tensor:
    """The weights of convolutions and linear layers, in one row."""
    return torch.cat([model.get_parameter(row.name).flatten().float().cpu() for row in rk.sparsity(model).rows])


@torch.no_grad()
def map_layer(model: nn.Module) -> Tensor:
    """The weights of the last convolution with a kernel above 1x1, outputs x inputs x height x width.

    Of an ensemble that of its first member, as in Figures 4.1 and A.2 of the dissertation.
    """
    net = getattr(model, "net", model)
    member = net.members[0] if hasattr(net, "members") else net
    convolutions = [m for m in member.modules() if isinstance(m, nn.Conv2d) and m.weight[0, 0].numel() > 1]
    return convolutions[-1].weight.detach().float().cpu().clone()
