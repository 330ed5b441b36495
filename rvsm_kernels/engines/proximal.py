"""rk.prox: the thresholding itself, out of place and differentiable."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..method import prox as plain
from ..method.dtypes import DTYPES
from ..method.groups import GroupDim, Grouping, check_grouping, grouping
from ..method.memory import named, serves_ops
from ..method.options import at_least_one
from ..method.penalties import PENALTIES
from . import native
from .registry import engine_name_for


def _forward(w: Tensor, penalty: str | None, tau: float, a: float, group_dim: Grouping) -> Tensor:
    if not serves_ops(w):
        try:
            return plain.prox(w, penalty, tau, a, group_dim)
        except (AssertionError, NotImplementedError, RuntimeError) as error:
            raise named(error, w, "w") from error
    name = engine_name_for(None, w.device.type)
    if name == "triton":
        from .triton import u as triton  # Triton takes a second to import: only where it is used

        return triton.prox(w, penalty, tau, a, group_dim)
    return (native if name == "native" else plain).prox(w, penalty, tau, a, group_dim)


class _Prox(torch.autograd.Function):
    """The prox with its derivative with respect to w."""

    @staticmethod
    def forward(w: Tensor, penalty: str, tau: float, a: float, group_dim: Grouping) -> Tensor:
        return _forward(w, penalty, tau, a, group_dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.options = inputs[1:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (w,) = ctx.saved_tensors
        return plain.prox_derivative(w, grad, *ctx.options), None, None, None, None


def prox(
    w: Tensor,
    penalty: str | None,
    tau: float,
    a: float = 1.0,
    group_dim: GroupDim = None,
    group_block: int = 1,
) -> Tensor:
    """u = argmin_u ||u - w||^2 / 2 + tau * P(u): the sparse point next to w.

    Args:
        w: float32, float64, bfloat16 or float16, any shape and layout.
        penalty: ``"l0"``, ``"l1"``, ``"tl1"`` or None (u is w).
        tau: lam / beta, >= 0.
        a: the parameter of tl1, > 0.
        group_dim: the dimensions that index the groups, None for elements (see :class:`rvsm_kernels.RVSM`).
        group_block: how many consecutive indices of ``group_dim``, one dimension then, make one group.

    Returns:
        u, a new tensor like ``w``. Differentiable with respect to ``w`` wherever the prox is (almost everywhere);
        on the cut, where it is not, the derivative is taken as 0.

    Raises:
        ValueError: an unknown penalty, tau < 0, a <= 0, a dimension that ``w`` does not have, blocks that do not
            divide it.
        TypeError: a dtype without a kernel, or something else than a tensor.
    """
    if not isinstance(w, Tensor):
        raise TypeError(f"prox takes a tensor, but got a {type(w).__name__}; torch.as_tensor(w) makes one")
    if penalty == "topk":
        raise ValueError("Invalid penalty: 'topk' has no tau: its cut comes from the weights and a density")
    if penalty == "nm":
        raise ValueError("Invalid penalty: 'nm' has no tau: it keeps the largest elements of each window")
    if penalty is not None and penalty not in PENALTIES:
        raise ValueError(f"Invalid penalty: {penalty!r} (choose one of None, {', '.join(map(repr, PENALTIES))})")
    if not (tau >= 0 and math.isfinite(tau)):
        raise ValueError(f"Invalid tau value: {tau}")
    if not (a > 0 and math.isfinite(a)):
        raise ValueError(f"Invalid a value: {a}")
    if w.dtype not in DTYPES or w.layout != torch.strided:
        raise TypeError(f"prox does not support {w.layout} tensors of dtype {w.dtype}")
    at_least_one("group_block", group_block)
    groups = grouping(group_dim, group_block)
    check_grouping(w.shape, groups)
    if penalty is None or tau == 0 or w.numel() == 0:
        return w.clone()
    if torch.is_grad_enabled() and w.requires_grad:
        return _Prox.apply(w, penalty, tau, a, groups)
    return _forward(w.detach(), penalty, tau, a, groups)
