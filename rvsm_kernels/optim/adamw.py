"""The splitting over the step of AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..method.bases import ADAMW
from ..method.groups import GroupDim
from .attributes import names_its_arguments
from .split_optimizer import SplitOptimizer


class RVSMAdamW(SplitOptimizer):
    r"""AdamW that trains sparse weights: relaxed variable splitting, fused into one pass over memory.

    Replaces ``torch.optim.AdamW``: with ``penalty=None`` it is that optimizer, and state dicts load in both directions.
    The splitting is that of :class:`rvsm_kernels.RVSM`, and comes before AdamW's step. With g the gradient
    (AdamW: arXiv 1711.05101, Algorithm 2)::

        u = prox(w);  p = w - u
        g = g + group_lasso * w_G / ||w_G||
        decoupled=True:   w = w - lr * beta * p
        decoupled=False:  g = g + beta * p
        w = w - lr * weight_decay * w
        m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
        w = w - lr * m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)

    State of a parameter: ``exp_avg``, ``exp_avg_sq``, with ``amsgrad`` also ``max_exp_avg_sq``, all of its shape and
    dtype, and ``step``, a float32 tensor with one element, on the CPU or, with the CUDA engine, on the GPU. A parameter
    without a gradient misses the step and keeps its own count.

    Args:
        params: parameters, named parameters or groups, as in torch.optim; :func:`rvsm_kernels.param_groups` divides
            a model. Each option below can be set per group and edited between steps.
        lr: learning rate, a float or a 1-element tensor, >= 0. The pull is lr * beta of the gap in a step: with the
            small learning rates of AdamW it needs a larger beta than with SGD.
        betas: decay rates of the two moments, in [0, 1).
        eps, weight_decay, amsgrad, maximize: as ``torch.optim.AdamW``. ``maximize`` turns the loss gradient around; the
            pull, weight decay and group_lasso keep their signs.
        penalty, lam, beta, a, density, budget, budget_name, pattern: see :class:`rvsm_kernels.RVSM`.
        group_dim, group_block, coupling, coupling_name, group_scale, group_lasso: see :class:`rvsm_kernels.RVSM`.
        decoupled, method, hold_zeros: see :class:`rvsm_kernels.RVSM`. With
            ``decoupled=False`` the pull passes through the moments, which take its size away: what is left of it is
            hardly more than its sign.
        master_weights, rounding, seed, state_dtype, amp_scaling, engine, statistics: see :class:`rvsm_kernels.RVSM`.
            Moments in bfloat16 have eight bits: an ``exp_avg_sq`` that is to shrink by less than 1/512 in a step (a
            beta2 above 0.998) stays where it is.

    Raises:
        ValueError: a number out of range, an unknown name, ``group_lasso`` without ``group_dim``, a ``group_dim``
            that a parameter does not have.
        TypeError: a parameter or option of the wrong type.
        RuntimeError: an engine that this build does not have.

    Example::

        optimizer = rvsm_kernels.RVSMAdamW(
            rvsm_kernels.param_groups(model, penalty="l0", lam=1e-5, beta=8.0),
            lr=1e-3, weight_decay=0.1,
        )
    """

    _base = ADAMW

    @names_its_arguments
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        penalty: str | None = "l0",
        lam: float = 1e-6,
        beta: float = 1e-2,
        a: float = 1.0,
        density: float | None = None,
        budget: str = "tensor",
        budget_name: str | None = None,
        pattern: tuple[int, int] | None = None,
        group_dim: GroupDim = None,
        group_block: int = 1,
        coupling: Sequence[int] | None = None,
        coupling_name: str = "coupled",
        group_scale: bool = False,
        group_lasso: float = 0.0,
        decoupled: bool = True,
        method: str = "rvsm",
        hold_zeros: bool = False,
        maximize: bool = False,
        master_weights: bool = False,
        rounding: str = "nearest",
        seed: int = 0,
        state_dtype: str | None = None,
        amp_scaling: bool = True,
        engine: str | None = None,
        statistics: bool = False,
    ) -> None:
        super().__init__(params, locals(), amp_scaling=amp_scaling, engine=engine, statistics=statistics)
