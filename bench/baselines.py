"""The contenders: the engines under test and what they are measured against.

A contender is a function of a problem that gives a step: ``contender(problem)()``. All of them do the same step
where they can: SGD with momentum and weight decay, or AdamW, the penalised tensors pulled towards u first. The base of
a case says which (:data:`bench.cases.BASES`).
"""

from __future__ import annotations

import importlib
import logging
import math
import re
from collections.abc import Callable
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor, nn

import rvsm_kernels as rk

from .problems import ADAMW_OPTIONS, BETA, CUT, LR, MOMENTUM, SGD_OPTIONS, WEIGHT_DECAY, A, Problem, strength
from .timing import Step

ENGINES = ("native", "triton")


class Unavailable(Exception):
    """A baseline that this machine or this case does not have; the message is the reason."""


class DoesNothing(torch.optim.Optimizer):
    """An optimizer whose step changes nothing: a wrapper around it does the pull alone."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": LR})

    def step(self, closure: Any = None) -> None:
        """Nothing."""


_OPTIMIZERS: dict[str, Callable[[Any, str], torch.optim.Optimizer]] = {
    "sgd": lambda groups, engine: rk.RVSM(groups, **SGD_OPTIONS, engine=engine),
    "adamw": lambda groups, engine: rk.RVSMAdamW(groups, **ADAMW_OPTIONS, engine=engine),
    "wrapper": lambda groups, engine: rk.RVSMWrapper(
        torch.optim.AdamW(groups, **ADAMW_OPTIONS, fused=True), engine=engine
    ),
    "pull": lambda groups, engine: rk.RVSMWrapper(DoesNothing(groups), engine=engine),
}
"""Base of a case to (param groups, engine) -> the optimizer under test."""


def optimizer_over(groups: list[dict[str, Any]], base: str, engine: str) -> torch.optim.Optimizer:
    """The optimizer under test over the base of a case."""
    return _OPTIMIZERS[base](groups, engine)


def _engine(name: str) -> Callable[[Problem], Step]:
    return lambda problem: optimizer_over(problem.groups(problem.parameters()), problem.case.base, name).step


def _needs(problem: Problem, *bases: str) -> None:
    """Raise Unavailable for a case over another base."""
    if problem.case.base not in bases:
        raise Unavailable(f"the baseline is one of {' and '.join(bases)}, the case of {problem.case.base}")


def reference(problem: Problem) -> Step:
    """The vectorised step in plain PyTorch: the baseline of the quoted speed-up."""
    return _engine("reference")(problem)


def _compute(t: Tensor) -> Tensor:
    """Half types are computed in float32, as every engine does."""
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


def compiled(problem: Problem) -> Step:
    """The reference's arithmetic over lists of tensors, under torch.compile."""
    _needs(problem, "sgd")
    case = problem.case
    if case.group_dim is not None:
        raise Unavailable("the compiled baseline is elementwise")
    penalty, tau = case.penalty, strength(case.penalty) / BETA
    flags = [spec.penalised for spec in case.specs]

    def step(weights: list[Tensor], grads: list[Tensor], momenta: list[Tensor]) -> None:
        for p, grad, buffer, penalised in zip(weights, grads, momenta, flags, strict=True):
            w = _compute(p)
            if penalised:
                w = w - LR * BETA * (w - rk.reference.prox(w, penalty, tau, A))
            m = MOMENTUM * _compute(buffer) + (_compute(grad) + WEIGHT_DECAY * w)
            buffer.copy_(m)
            p.copy_(w - LR * m)

    params = [p.detach() for p in problem.parameters()]
    momenta = [torch.zeros_like(p) for p in params]
    # Worker processes would still be starting up, on the cores that are being measured, when timing begins.
    torch._inductor.config.compile_threads = 1
    torch._dynamo.reset()  # else the cases count as recompilations of one function, which has a limit
    # One tensor of any size shares the code, and with it inductor's cache on the disk.
    fused = torch.compile(step, fullgraph=True, dynamic=len(params) == 1)

    @torch.no_grad()
    def call() -> None:
        fused(params, problem.grads, momenta)

    return call


def fused_sgd(problem: Problem) -> Step:
    """torch.optim.SGD(fused=True): the price of the dense step."""
    _needs(problem, "sgd")
    params = problem.parameters()
    if params[0].dtype in (torch.bfloat16, torch.float16) and not _fused_sgd_updates(params[0]):
        # pytorch#191763: its time would be that of doing nothing.
        raise Unavailable(f"torch's fused SGD leaves {params[0].dtype} weights on the {problem.device} unchanged")
    return torch.optim.SGD(params, **SGD_OPTIONS, fused=True).step


def fused_adamw(problem: Problem) -> Step:
    """torch.optim.AdamW(fused=True): the price of the dense step over AdamW."""
    _needs(problem, "adamw", "wrapper")
    return torch.optim.AdamW(problem.parameters(), **ADAMW_OPTIONS, fused=True).step


def cpu_adam(problem: Problem) -> Step:
    """DeepSpeed's CPUAdam, a dense AdamW step in C++ with AVX, where it is installed."""
    _needs(problem, "adamw")
    if problem.device != "cpu":
        raise Unavailable("DeepSpeed's CPUAdam is for weights on the CPU")
    try:
        adam = importlib.import_module("deepspeed.ops.adam")
    except ImportError as error:
        raise Unavailable(f"deepspeed could not be imported: {error}") from error
    return adam.DeepSpeedCPUAdam(problem.parameters(), **ADAMW_OPTIONS, adamw_mode=True).step


def scaled(problem: Problem) -> Step:
    """``w.mul_(c)`` of every penalised tensor: reads and writes what the pull reads and writes."""
    _needs(problem, "pull")
    weights = [p.detach() for p in problem.divided(problem.parameters())[0]]

    def call() -> None:
        for w in weights:
            w.mul_(1 - LR * BETA)

    return call


def _fused_sgd_updates(like: Tensor) -> bool:
    """Whether a fused step changes every one of some vectors' worth of weights."""
    p = nn.Parameter(torch.ones(256, dtype=like.dtype, device=like.device))
    p.grad = torch.ones_like(p)
    torch.optim.SGD([p], lr=0.5, momentum=MOMENTUM, fused=True).step()
    return bool((p != 1).all())


def foreach_sgd(problem: Problem) -> Step:
    """torch.optim.SGD(foreach=True)."""
    _needs(problem, "sgd")
    return torch.optim.SGD(problem.parameters(), **SGD_OPTIONS, foreach=True).step


class ChannelLoop(torch.optim.SGD):
    """What the released research code does: a Python loop over the channels of every weight, then SGD.

    Written anew after its structure: the norms of one tensor at once, then channel by channel a comparison and a
    scaling of that channel of a copy; the pull; torch.optim.SGD with its defaults. Groups may have the options penalty,
    lam, beta, a, group_dim and group_lasso of :class:`rvsm_kernels.RVSM`; others are dense.
    """

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        for group in self.param_groups:
            if group.get("penalty") is not None and not isinstance(group.get("group_dim"), int):
                raise Unavailable("the loop is over one channel dimension")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One step; a closure is not supported."""
        assert closure is None
        for group in self.param_groups:
            if group.get("penalty") is None:
                continue
            pulled = [(p, *self._thresholded(p, group)) for p in group["params"] if p.grad is not None]
            for p, u, norms in pulled:
                if group.get("group_lasso"):
                    p.grad.add_(torch.where(norms > 0, p / norms, 0), alpha=group["group_lasso"])
                p.sub_(p - u, alpha=group["lr"] * group["beta"])
        super().step()

    @staticmethod
    def _thresholded(w: Tensor, group: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """u, and the norms of the channels in a shape that goes with w's."""
        dim, tau = group["group_dim"], group["lam"] / group["beta"]
        u = w.clone()
        norms = u.square().sum(dim=[d for d in range(u.dim()) if d != dim], keepdim=True).sqrt()
        before = norms.flatten()
        after = rk.reference.prox(before, group["penalty"], tau, group["a"])
        for i in range(len(before)):
            channel = u.select(dim, i)
            if after[i] == 0:
                channel.mul_(0)
            elif group["penalty"] != "l0":
                channel.mul_(after[i] / before[i])
        return u, norms


def channel_loop(problem: Problem) -> Step:
    """:class:`ChannelLoop` over a problem with a group penalty."""
    _needs(problem, "sgd")
    return ChannelLoop(problem.groups(problem.parameters()), **SGD_OPTIONS).step


def pat(problem: Problem) -> Step:
    """torchao.prototype.pat: a proximal map after each step; not the same method, but the nearest peer.

    Its base optimizer is torch's fused one, the kindest choice.
    """
    _needs(problem, "sgd", "adamw")
    case = problem.case
    if case.penalty != "l1":
        raise Unavailable("of the penalties measured here torchao.prototype.pat has the lasso and the group lasso")
    grouper = _pat_grouper(problem)
    prune = import_pat()
    params = problem.parameters()
    penalised, dense = problem.divided(params)
    prox = "ProxLasso" if case.group_dim is None else "ProxGroupLasso"
    groups: list[dict[str, Any]] = [{"params": penalised, "prox_type": prox, "group_type": grouper}]
    groups += [{"params": dense}] if dense else []
    base: torch.optim.Optimizer
    if case.base == "adamw":
        base = torch.optim.AdamW(groups, **ADAMW_OPTIONS, fused=True)
    else:
        base = torch.optim.SGD(groups, **SGD_OPTIONS, fused=True)
    # Its threshold is reg_lambda * sqrt(group size) * (the sum of the learning rates so far): this stays below the
    # weights over the thousands of steps of a benchmark.
    first = penalised[0]
    size = 1 if case.group_dim is None else first.numel() // first.shape[case.group_dim]
    return prune(base, reg_lambda=0.1 * CUT / math.sqrt(size)).step


def _pat_grouper(problem: Problem) -> str:
    """PAT's name for the groups of the case, where it has the same ones."""
    dim = problem.case.group_dim
    dims = {len(spec.shape) for spec in problem.case.specs if spec.penalised}
    if dim is None:
        return "ElemGrouper"
    if dim == 0:
        return "Dim0Grouper"
    if dim == 1 and dims == {2}:
        return "Dim1Grouper"
    raise Unavailable(f"torchao.prototype.pat has no such groups (group_dim={dim!r})")


def import_pat() -> Any:
    """PruneOptimizer; torchao's complaints about its own kernels, which PAT does not use, are kept quiet."""
    logging.disable(logging.WARNING)
    try:
        return importlib.import_module("torchao.prototype.pat.optim").PruneOptimizer
    except ImportError as error:
        raise Unavailable(f"torchao.prototype.pat could not be imported: {error}") from error
    finally:
        logging.disable(logging.NOTSET)


CONTENDERS: dict[str, Callable[[Problem], Step]] = {
    **{name: _engine(name) for name in ENGINES},
    "reference": reference,
    "compiled": compiled,
    "fused_sgd": fused_sgd,
    "foreach_sgd": foreach_sgd,
    "fused_adamw": fused_adamw,
    "cpu_adam": cpu_adam,
    "scaled": scaled,
    "channel_loop": channel_loop,
    "pat": pat,
}

LABELS = {
    "native": "rvsm_kernels (native)",
    "triton": "rvsm_kernels (triton)",
    "reference": "PyTorch reference",
    "compiled": "reference under torch.compile",
    "fused_sgd": "torch.optim.SGD(fused=True)",
    "foreach_sgd": "torch.optim.SGD(foreach=True)",
    "fused_adamw": "torch.optim.AdamW(fused=True)",
    "cpu_adam": "DeepSpeed CPUAdam",
    "scaled": "`w.mul_(c)`",
    "channel_loop": "channel-by-channel loop",
    "pat": "torchao PAT",
}


def without_paths(text: str) -> str:
    """The first line of a message, the folders of this machine left out of it."""
    line = text.strip().splitlines()[0] if text.strip() else ""
    return re.sub(r"(?<![\w.])/(?:[\w.@+~-]+/)+", "", line)[:200]


def start(name: str, problem: Problem) -> Step:
    """A contender after two steps: its states exist, its code is compiled.

    Raises:
        Unavailable: a baseline that does not run here. An engine's own error is raised as it is: it is a finding.
    """
    try:
        step = CONTENDERS[name](problem)
        step()
        step()
    except Unavailable:
        raise
    except Exception as error:
        if name in (*ENGINES, "reference"):
            raise
        raise Unavailable(f"{type(error).__name__}: {without_paths(str(error))}") from error
    return step
