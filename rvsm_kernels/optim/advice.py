"""Warnings about options that are legal, but rarely do what was meant."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..method.device_numbers import is_on_device
from ..method.options import OPTION_NAMES
from ..method.parameters import param_name
from ..method.split import is_split
from ..method.warn import some, warn

_KEYS_BESIDE_OPTIONS = set("params param_names param_order structure initial_lr foreach fused differentiable".split())

STALL = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Half the spacing of the numbers just above 1: a pull by a smaller share of a weight may be rounded away."""


# ---- how hard a group pulls ------------------------------------------------------------------------------------------


class _Rate(NamedTuple):
    """The pull rate of a group when it was last looked at."""

    lr: float
    beta: float
    level: int  # 0: lr * beta <= 1, 1: the pull overshoots, 2: it diverges
    stalled: int  # how many limits of half types lr * beta is below


class PullRates:
    """Watches lr * beta, the share of the gap between w and u that a step closes, for one optimizer."""

    def __init__(self) -> None:
        self._last: dict[int, _Rate] = {}

    def watch(self, index: int, group: Mapping[str, Any]) -> None:
        """Warn if lr * beta of a group is too large, or too small for its dtype: once, and again after an edit.

        A scheduler that changes lr at every step gets one warning for each limit that lr * beta crosses.
        """
        if not is_split(group) or is_on_device(group["lr"]) or is_on_device(group["beta"]):
            self._last.pop(index, None)
            return
        lr, beta = float(group["lr"]), float(group["beta"])
        rate = lr * beta
        level = 0 if rate <= 1 + 1e-6 else 1 if rate < 2 else 2
        stalled = sum(0 < rate < limit for limit in STALL.values())
        before = self._last.get(index, _Rate(0.0, 0.0, 0, 0))
        self._last[index] = _Rate(lr, beta, level, stalled)
        edited = (before.lr, before.beta) != (lr, beta) and ("initial_lr" not in group or before.beta != beta)
        if level > before.level or (level and edited):
            what = (
                "the pull throws the weights further from u at every step, and none of them becomes zero"
                if level == 2
                else "every pull overshoots u and turns the gap around"
            )
            warn(
                f"group {index}: lr * beta = {lr:g} * {beta:g} = {rate:g}, and {what}. A pull is stable below 2 and"
                f" goes straight to u up to 1: take a beta of at most {1 / lr:.3g}, or a smaller lr"
            )
        if stalled > before.stalled or (stalled and before.beta != beta):
            _warn_of_half_types(index, group, lr, beta)


def _warn_of_half_types(index: int, group: Mapping[str, Any], lr: float, beta: float) -> None:
    if group.get("master_weights") or group.get("rounding") == "stochastic":
        return
    for dtype in sorted({p.dtype for p in group["params"] if p.dtype in STALL}, key=str):
        limit = STALL[dtype]
        if lr * beta < limit:
            warn(
                f"group {index}: lr * beta = {lr:g} * {beta:g} = {lr * beta:.3g} is below {limit:.3g} = half the"
                f" spacing of {str(dtype).removeprefix('torch.')} numbers: the pull is rounded away for many weights,"
                f" which then never become sparse. Take a beta of at least {limit / lr:.3g}, or master_weights=True,"
                " or rounding='stochastic'"
            )


# ---- options of a new group ------------------------------------------------------------------------------------------


def of_group(index: int, group: Mapping[str, Any], explicit: Collection[str], before: Mapping[str, Any] | None) -> None:
    """Warn about a new param group: options that have no effect, penalties on biases.

    Args:
        explicit: the keys that the group was given itself; the others come from the optimizer's defaults.
        before: the group before it, None for the first.
    """
    for key in explicit:
        if key == "structure":
            warn(f"group {index}: structure is an option of rvsm_kernels.param_groups, and has no effect in a group")
        elif key in OPTION_NAMES or key in _KEYS_BESIDE_OPTIONS:
            continue
        elif near := difflib.get_close_matches(key, OPTION_NAMES, 1, 0.7):
            warn(f"group {index}: {key!r} is no option and has no effect; did you mean {near[0]!r}?")
    penalty = group["penalty"]
    if penalty is None:
        return

    def given(key: str, beside: str) -> bool:
        """False where the group sets ``beside`` itself, and has ``key`` from defaults that may be for other groups."""
        return key in explicit or beside not in explicit

    if group["density"] is not None and penalty != "topk" and given("density", "penalty"):
        warn(f"group {index}: density has no effect with penalty={penalty!r}; it belongs to penalty='topk'")
    if group["budget"] != "tensor" and penalty != "topk" and given("budget", "penalty"):
        warn(f"group {index}: budget has no effect with penalty={penalty!r}; it belongs to penalty='topk'")
    if group["pattern"] is not None and penalty != "nm" and given("pattern", "penalty"):
        warn(f"group {index}: pattern has no effect with penalty={penalty!r}; it belongs to penalty='nm'")
    if penalty in ("topk", "nm") and group["lam"] == 0:
        what = f"penalty={penalty!r} with lam=0 has no effect"
        warn(f"group {index}: {what}: lam switches it on, any value above 0 will do")
    if "train_mode" in group and group["decoupled"] and is_split(group):
        warn(
            f"group {index}: decoupled=True pulls schedulefree's y alone, and its z takes most of the pull back; take"
            " decoupled=False, which moves both"
        )
    if group["group_scale"] and group["group_dim"] is None and given("group_scale", "group_dim"):
        warn(f"group {index}: group_scale has no effect without a group_dim")
    params = [(param_name(group, index, j), p) for j, p in enumerate(group["params"]) if not is_lazy(p)]
    _of_dims(index, group, params)
    _of_biases(index, params, None if "penalty" in explicit else before)


def _of_dims(index: int, group: Mapping[str, Any], params: Sequence[tuple[str, Tensor]]) -> None:
    dims = group["group_dim"]
    negative = [d for d in ([dims] if isinstance(dims, int) else dims or ()) if d < 0]
    counts = {p.dim(): name for name, p in params}
    if negative and len(counts) > 1:
        meant = "; ".join(f"{name}: dimension {negative[0] % n} of {n}" for n, name in sorted(counts.items()))
        warn(
            f"group {index}: group_dim={dims!r} counts from the end and so means other dimensions of tensors that have"
            f" more or fewer of them ({meant}); count from the front: 1 is the inputs of Linear and Conv weights, 0"
            " their outputs"
        )


def _of_biases(index: int, params: Sequence[tuple[str, Tensor]], before: Mapping[str, Any] | None) -> None:
    """Warn of biases and norms among the weights of a group, or in a group of their own after that of the weights."""
    trained = [(name, p.dim()) for name, p in params if p.requires_grad]
    thin = [name for name, n in trained if n <= 1]
    if not thin:
        return
    if len(thin) < len(trained):
        together = " together with weights"
    elif before is not None and before["penalty"] and any(not is_lazy(p) and p.dim() > 1 for p in before["params"]):
        together = " as the group before it penalises weights"
    else:
        return
    warn(
        f"group {index} penalises biases and norms{together}: {some(thin)}. Small ones among them go to zero, which"
        " prunes nothing and hurts; rvsm_kernels.param_groups(model, ...) leaves them dense"
    )
