"""The splitting over the step of SGD."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..method.bases import SGD
from ..method.groups import GroupDim
from .attributes import names_its_arguments
from .split_optimizer import SplitOptimizer


class RVSM(SplitOptimizer):
    r"""SGD that trains sparse weights: relaxed variable splitting, fused into one pass over memory.

    Replaces ``torch.optim.SGD``. Minimises f(w) + lam * P(w) through

        L_beta(w, u) = f(w) + lam * P(u) + (beta / 2) * ||w - u||^2

    by a gradient step in w and u = prox_{tau P}(w) with tau = lam / beta. The step, with g the gradient
    (arXiv 1812.05719, Algorithm 1, without its normalisation; momentum and weight decay as torch.optim.SGD)::

        u = prox(w);  p = w - u
        g = g + group_lasso * w_G / ||w_G||
        decoupled=True:   w = w - lr * beta * p,  d = g + weight_decay * w
        decoupled=False:                          d = g + weight_decay * w + beta * p
        momentum on d;  w = w - lr * d
        unit_norm=True:    w = w / ||w||_2

    u is never stored (but by ``method="rvsm-delayed"``): read it with :meth:`sparse_weights` (for evaluation),
    :meth:`sparsify_` (for good) or :meth:`sparsity`.

    Args:
        params: parameters, named parameters or groups, as in torch.optim; :func:`rvsm_kernels.param_groups` divides
            a model. Each option below can be set per group and edited between steps.
        lr: learning rate, a float or a 1-element tensor, >= 0. Tensors for ``lr``, ``lam``, ``beta`` and
            ``weight_decay`` that are on the parameters' device are read there by the kernels: a captured graph follows
            what is filled into them.
        momentum, dampening, weight_decay, nesterov, maximize: as ``torch.optim.SGD``. ``maximize`` turns the loss
            gradient around; the pull, weight decay and group_lasso keep their signs.
        penalty: ``"l0"``, ``"l1"``, ``"tl1"`` (transformed l1), ``"topk"``, ``"nm"`` or None (plain SGD). Top-k keeps
            the ceil(density * n) elements (or groups) of largest magnitude of each tensor in u. Where the smallest
            survivor ties with the largest magnitude that is zeroed, all that tie are zeroed, as under l0, so that
            fewer may survive. N:M keeps the n largest magnitudes of every m consecutive elements along dimension 1,
            the inputs of a Linear or Conv weight; ties keep the earlier element, so that exactly n survive. ``lam``
            only switches the two on.
        density: of ``"topk"``, in (0, 1].
        budget: ``"tensor"``: the density is a share of each tensor; ``"global"``: of all tensors together, so that a
            layer with small weights loses more. One cut is taken over all groups with the same ``budget_name``, which
            have one density; with a ``group_dim`` norms are compared, with ``group_scale`` norms / sqrt(group size).
        pattern: of ``"nm"``, (n, m) with 1 <= n < m <= 16: (2, 4) is what GPUs with sparse tensor cores take. Dimension
            1 of every parameter of the group is a multiple of m; the group has neither ``group_dim`` nor ``density``.
        lam: strength of the penalty, in units of the loss, >= 0. 0 switches the splitting off.
        beta: strength of the coupling, >= 0. 0 switches the splitting off. Weights below the cut go to zero in u:
            sqrt(2 lam / beta) for l0, lam / beta for l1.
        a: shape of tl1, > 0: small is near l0, large is near l1.
        group_dim: the dimensions that index the groups: None (elements), 1 (input channels of a Conv or Linear
            weight), 0 (output channels), (0, 1) (kernels), () (the whole tensor).
        group_block: how many consecutive indices of ``group_dim`` make one group, for a ``group_dim`` of one dimension
            whose size is a multiple of it: an attention head of 64 is ``group_dim=0, group_block=64`` of a projection
            to queries.
        coupling: joins groups over several slices and weights: an integer for each index of ``group_dim`` (each block
            of ``group_block`` indices), one dimension then. Equal integers under one ``coupling_name`` are one group,
            with one norm over all of its slices and one shrink factor: what reads one channel of a network goes to
            zero together (``rk.param_groups(model, structure="coupled")`` makes such groups). They have the same
            penalty, lam, beta, a, density, budget and ``group_scale``; of top-k the density is a share of the groups
            that hang together.
        coupling_name: see ``coupling``.
        group_scale: multiply lam by sqrt(group size); of coupled groups the mean size of those that share weights.
        group_lasso: strength of group_lasso * sum ||w_G||_2, added to the gradient (needs ``group_dim``).
        decoupled: the pull moves the weights before the SGD step (True) or is added to the gradient and so passes
            through momentum (False).
        method: ``"rvsm"``: p = w - u. ``"rvsm-delayed"``: p = w - u with the u of the step before (state ``u``, at
            first that of the first weights). ``"admm"``, with state ``dual`` y, at first 0:
            v = w + y, u = prox(v), y = v - u, p = w - u + y. The state of a method is dropped when the splitting or
            the method is switched off, and begins anew.
        hold_zeros: an element that is 0 when a step begins is 0 when it ends, and so are its states, whatever its
            gradient is: training with a fixed support. No mask is kept. ``sparsify_(hold=True)`` sets it.
        unit_norm: w <- w / ||w||_2 of each whole tensor at the end of the step; a zero tensor stays zero.
        master_weights: float32 weights behind parameters of a half type, which else lose every change below half a
            unit in their last place. They follow a float32 run that is given the same gradients bit for bit: the base's
            and the method's states are float32 too. A bfloat16 parameter holds their upper half (rounded half away from
            zero), the int16 state ``low`` the rest; a float16 parameter has the float32 state ``master``. u is that of
            these weights. Of a parameter that was edited by hand, a bfloat16 one within half a unit in the last place,
            the weights are what it holds.
        rounding: ``"stochastic"``: a half-type parameter without a master is rounded up or down with the probabilities
            that make it unbiased. The random bits (Philox4x32-7) follow from the seed, the parameter's step and the
            element's place in memory alone: a run is reproducible and resumes bit for bit. The state ``step`` counts.
        seed: of those bits, an integer >= 0.
        state_dtype: what the base's states are stored in: None (the parameter's dtype, as torch; float32 beside a
            master), ``"float32"`` or ``"bfloat16"``.
        amp_scaling: True: a GradScaler hands its scale to the step, which unscales in the same pass (``p.grad`` stays
            scaled: call ``scaler.unscale_(optimizer)`` to log or clip its norm). False: it unscales before the step, as
            for ``SGD(fused=False)``; Lightning and Fabric ask for it when they clip float16 gradients.
        engine: ``"native"``, ``"triton"`` (GPUs), ``"reference"`` or None, which takes the first of them that serves
            the device. DTensors are stepped shard by shard; other tensors without memory of their own (FakeTensor, ...)
            and traced code get the reference.
        statistics: each step also counts and adds up what :meth:`statistics` reads: zeros of u, ||w - u||^2, lam P(u),
            the norm of the gradient, elements that are not finite. ``collect_statistics`` turns it on and off between
            steps.

    Raises:
        ValueError: a number out of range, an unknown name, ``group_lasso`` without ``group_dim``, a ``group_dim``
            that a parameter does not have, a ``pattern`` whose windows do not fit one.
        TypeError: a parameter or option of the wrong type.
        RuntimeError: an engine that this build does not have.

    Example::

        optimizer = rvsm_kernels.RVSM(
            rvsm_kernels.param_groups(model, penalty="l0", lam=1e-6, beta=8e-2),
            lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True,
        )
    """

    _base = SGD

    @names_its_arguments
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
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
        unit_norm: bool = False,
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
