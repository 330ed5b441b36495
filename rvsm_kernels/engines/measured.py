"""The statistics of a step in plain torch: the reference engine's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..method.dtypes import to_opmath
from ..method.groups import from_memory_order, grouping_of, magnitudes, once
from ..method.penalties import PENALTIES, shrink
from ..method.precision import MASTER_STATES, has_master, join
from ..method.prox import threshold
from ..method.selection import keep_above
from ..method.split import strength
from ..method.statistics import ZERO_NORM
from ..method.step_options import StepOptions
from ..method.windows import keep_largest
from .interface import StepInputs


def norms_for(p: Tensor, v: Tensor, options: StepOptions, inputs: StepInputs, row: int) -> Tensor:
    """The magnitudes of v, of each element or group of a parameter.

    Args:
        v: the weights, or weights + dual, in the type of the arithmetic.
        row: the row of v among norms that were made elsewhere. Where there is one row only, it is that of v.
    """
    groups, given = grouping_of(options.values), inputs.norms.get(p)
    if given is None:
        return magnitudes(v, groups)
    rows = given.reshape(-1, given.shape[-1])
    return from_memory_order(rows[min(row, len(rows) - 1)], v, groups)


def write_statistics(params: Sequence[Tensor], options: StepOptions, inputs: StepInputs) -> None:
    """The rows of statistics of parameters of one param group, before their step: ``inputs.statistics`` says where.

    A found_inf above 0 leaves the rows as they are, without a wait for the device.
    """
    for p in params:
        if p.numel() == 0 or p not in inputs.statistics:
            continue
        room, row = inputs.statistics[p], _row(p, options, inputs)
        if inputs.found_inf is not None:
            row = torch.where(inputs.found_inf.to(row.device).reshape(()) > 0, room, row)
        room.copy_(row)


def _row(p: Tensor, options: StepOptions, inputs: StepInputs) -> Tensor:
    """The numbers of :data:`rvsm_kernels.method.statistics.COLUMNS` of a parameter."""
    assert p.grad is not None
    values, groups = options.values, grouping_of(options.values)
    master = inputs.state_of(p, MASTER_STATES[p.dtype][0]) if has_master(values, p.dtype) else None
    w = to_opmath(p.detach()) if master is None else join(p.detach(), master)
    d = p.grad.detach().to(w.dtype)
    if inputs.grad_scale is not None:
        d = d * inputs.grad_scale.to(w.device, w.dtype).reciprocal()
    sign = -1.0 if values["maximize"] and not options.turns_terms else 1.0
    d = d * sign
    terms = -1.0 if options.turns_terms else 1.0
    zero = torch.zeros((), dtype=torch.float64, device=w.device)
    u, zero_groups, value = w, zero, zero
    if options.split:
        method = options.method
        state = None if method.state is None else inputs.state_of(p, method.state)
        before = [] if method.state is None else [torch.zeros_like(w) if state is None else to_opmath(state)]
        v = w + before[0] if method.adds_state else w
        r = norms_for(p, v, options, inputs, row=0)
        tau = strength(values, p.shape) / float(values["beta"])
        if options.pattern is not None:
            u = of_groups = keep_largest(v, options.pattern)
        elif options.topk:
            cut = inputs.cuts[p]
            u, of_groups = keep_above(v, r, cut), torch.where(r <= cut, 0, r)
        else:
            u = threshold(v, r, values["penalty"], tau, values["a"], groups)
            of_groups = shrink(r, values["penalty"], tau, values["a"])
        of_groups = once(of_groups, groups)
        zero_groups = ((of_groups == 0) if groups is None else (of_groups < ZERO_NORM)).sum()
        if not options.topk and options.pattern is None:
            value = PENALTIES[values["penalty"]].value(of_groups.double(), values["a"]).sum()
            value = value * strength(values, p.shape)
        if not values["decoupled"]:
            (gap,), _ = method.gap([w], [v], [u], before)
            d = d + terms * float(values["beta"]) * gap
    if options.lasso:
        r = norms_for(p, w, options, inputs, row=1)
        d = d + terms * float(values["group_lasso"]) * (w / torch.where(r == 0, torch.ones_like(r), r))
    gap = (w.double() - u.double()).square().sum() if options.split else zero
    numbers = (
        (u == 0).sum(),
        (~(w.isfinite() & d.isfinite())).sum(),
        gap,
        d.double().square().sum(),
        gap * (float(values["beta"]) / 2),
        zero_groups,
        value,
    )
    return torch.stack([number.double() for number in numbers])
