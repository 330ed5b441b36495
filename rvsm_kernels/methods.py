"""What a method keeps beside the weights, and what a penalty takes from the data (section 3 of docs/method.md).

``"rvsm-delayed"`` pulls towards the u of the step before and keeps it (state ``u``); ``"admm"`` keeps its multiplier
(state ``dual``); ``penalty="topk"`` takes its cut from the magnitudes of the tensor. All of it is found here, once for
all engines, which only read and write one more buffer and read one more number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .method.groups import GroupDim, magnitudes
from .method.memory import kind_of, refuse, turns_of, whole
from .method.penalties import PENALTIES
from .options import is_split, param_name, refuse_expanded, strength

STATE = {"rvsm": None, "rvsm-delayed": "u", "admm": "dual"}
"""The name of what a method keeps of each element."""

_BELOW_1 = 1 - 2**-50  # a density of 0.1 keeps 3 of 30, though 0.1 * 30 is above 3 in floating point


def arithmetic(t: Tensor) -> Tensor:
    """The tensor in the type it is computed in: float32 for half types, else its own."""
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


def state_name(group: Mapping[str, Any]) -> str | None:
    """What a group's parameters keep beside their momentum, or None."""
    return STATE[group["method"]] if is_split(group) else None


def is_topk(group: Mapping[str, Any]) -> bool:
    """Whether the cut of a group's parameters comes from their magnitudes."""
    return group["penalty"] == "topk" and is_split(group)


def survivors(density: float, count: int) -> int:
    """ceil(density * count)."""
    return math.ceil(density * count * _BELOW_1)


def cut_of(v: Tensor, density: float, group_dim: GroupDim = None) -> Tensor:
    """The magnitude up to which elements (or groups) go to zero, so that ceil(density * n) survive.

    Args:
        v: what is thresholded, float32 or float64.

    Returns:
        A 0-dim tensor on the device of ``v``: the largest magnitude that goes to zero, or -1 where none does.
        Magnitudes that tie with it go to zero too, as ties do under l0, so that fewer survive. Between norms of groups
        it is halfway to the smallest survivor: another order of summation cannot move a group across.
    """
    r = whole(magnitudes(v, group_dim)).reshape(-1)
    n = r.numel()
    dropped = n - survivors(density, n)
    if dropped == 0:
        return r.new_full((), -1.0)
    low = torch.kthvalue(r, dropped).values
    if group_dim is None:
        return low
    high = torch.kthvalue(r, dropped + 1).values
    middle = low + (high - low) / 2
    return torch.where(high.isfinite() & (middle < high), middle, low)  # between neighbours it is one of them


def keep_above(v: Tensor, cut: Tensor, group_dim: GroupDim = None) -> Tensor:
    """The l0 rule: v where its magnitude (or its group's) is above the cut, else 0. NaN stays visible."""
    return torch.where(magnitudes(v, group_dim) <= cut, torch.zeros_like(v), v)


def is_special(group: Mapping[str, Any]) -> bool:
    """Whether u is not a function of w and the options alone."""
    return is_split(group) and (group["method"] == "admm" or group["penalty"] == "topk")


# ---- the step --------------------------------------------------------------------------------------------------------


def moved(group: Mapping[str, Any]) -> Iterator[tuple[int, Tensor]]:
    """The parameters that this step moves, with their places."""
    for j, p in enumerate(group["params"]):
        if p.grad is not None and p.numel() > 0:
            yield j, p


def check_kept(kept: Any, p: Tensor, name: str, key: str) -> None:
    """Raise RuntimeError if what a method keeps does not fit its parameter."""
    fits = isinstance(kept, Tensor) and kept.shape == p.shape and kept.device == p.device
    if not fits or not kept.is_floating_point() or kept.layout != torch.strided:
        what = f"{kept.dtype} {list(kept.shape)} on {kept.device}" if isinstance(kept, Tensor) else repr(kept)
        raise RuntimeError(
            f"the {key} of {name} is {what}, the parameter {p.dtype} {list(p.shape)} on {p.device}; delete it from the"
            " optimizer's state to begin anew"
        )
    if kind_of(p) is None:
        refuse(kept, f"the {key} of {name}")
    refuse_expanded(kept, f"the {key} of {name}")


def find_kept(
    groups: Sequence[Mapping[str, Any]],
    state: Mapping[Tensor, Any],
    first_u: Callable[[Tensor, Mapping[str, Any], str], Tensor],
) -> tuple[dict[Tensor, Tensor], dict[Tensor, tuple[str, Tensor]]]:
    """What the methods keep of each parameter that a step moves, and what of it is not in the state yet.

    Args:
        first_u: u of the weights of (parameter, its group, its name), in the parameter's type and layout.

    Returns:
        The tensors by parameter, and for those that the state lacks also their names. Nothing is changed. Where lr is 0
        the step gets copies to write to: neither w nor what is kept of it moves then.

    Raises:
        RuntimeError: a tensor of the state that does not fit its parameter.
    """
    kept: dict[Tensor, Tensor] = {}
    fresh: dict[Tensor, tuple[str, Tensor]] = {}
    for i, group in enumerate(groups):
        key = state_name(group)
        if key is None:
            continue
        for j, p in moved(group):
            found = state[p].get(key) if p in state else None
            if found is None:
                found = torch.zeros_like(p) if key == "dual" else first_u(p, group, param_name(group, i, j))
                fresh[p] = key, found
            else:
                check_kept(found, p, param_name(group, i, j), key)
                if found.dtype != p.dtype:  # it follows its parameter to another dtype
                    found = found.to(p.dtype)
                    fresh[p] = key, found
            kept[p] = found if float(group["lr"]) != 0 else found.clone()
    return kept, fresh


class Cuts:
    """The cuts of parameters with top-k, each in memory that stays where it is from step to step."""

    def __init__(self) -> None:
        self._of: dict[Tensor, Tensor] = {}

    def find(self, groups: Sequence[Mapping[str, Any]]) -> dict[Tensor, Tensor]:
        """Room for the cuts of a step."""
        cuts: dict[Tensor, Tensor] = {}
        for group in groups:
            if is_topk(group):
                for _, p in moved(group):
                    own = self._of.get(p)
                    dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
                    odd = own is not None and own.is_inference() and not torch.is_inference_mode_enabled()
                    odd = odd or (own is not None and kind_of(own) is not None)  # left by a step that was traced
                    if own is None or odd or own.device != p.device or own.dtype != dtype:
                        own = torch.zeros((), dtype=dtype, device=p.device)
                    cuts[p] = own
        self._of = cuts
        return cuts

    def select(self, groups: Sequence[Mapping[str, Any]], kept: Mapping[Tensor, Tensor]) -> None:
        """Fill them from the weights of this step."""
        for group in groups:
            if is_topk(group):
                for _, p in moved(group):
                    v = argument(p.detach(), kept[p] if group["method"] == "admm" else None)
                    self._of[p].copy_(cut_of(v, group["density"], group["group_dim"]))


# ---- u ---------------------------------------------------------------------------------------------------------------


def argument(w: Tensor, dual: Tensor | None) -> Tensor:
    """What is thresholded, in the arithmetic type: w, or w + dual."""
    v = arithmetic(w)
    return v if dual is None else v + dual.to(v.dtype)


def special_u(
    w: Tensor, dual: Tensor | None, group: Mapping[str, Any], prox_: Callable[[Sequence[Tensor], Any], None]
) -> Tensor:
    """u where it is not a function of w and the options alone, as a new tensor in the arithmetic type.

    Args:
        prox_: puts u into tensors in place; an engine's.
    """
    v = argument(w, dual)
    if is_topk(group):
        return keep_above(v, cut_of(v, group["density"], group["group_dim"]), group["group_dim"])
    v = v.clone() if dual is None else v
    prox_([v], group)
    return v


def special_value(w: Tensor, u: Tensor, group: Mapping[str, Any]) -> Tensor:
    """lam P(u) + beta/2 ||w - u||^2, 0-dim float64. P of top-k is 0 where no more survive than may."""
    value = float(group["beta"]) / 2 * (w.double() - u.double()).square().sum()
    if is_topk(group):
        return value
    r = magnitudes(u.double(), group["group_dim"])
    return value + strength(group, w.shape) * PENALTIES[group["penalty"]].value(r, float(group["a"])).sum()


# ---- after the step --------------------------------------------------------------------------------------------------


def normalize_(params: Sequence[Tensor], found_inf: Tensor | None) -> None:
    """w <- w / ||w||_2 of each whole tensor; a zero tensor stays zero, and so does everything after a found_inf."""
    turns = turns_of(params)
    kinds = [(turn, p.device, p.dtype, kind_of(p)) for turn, p in zip(turns, params, strict=True)]
    for key in sorted(dict.fromkeys(kinds), key=lambda kind: kind[0]):
        device = key[1]
        own = [p for p, kind in zip(params, kinds, strict=True) if kind == key]
        ws = [arithmetic(p.detach()) for p in own]
        # ||w|| = largest * ||w / largest||, whose squares neither overflow nor vanish.
        largest = torch.stack(torch._foreach_norm(ws, torch.inf)).double()
        largest = torch.where(largest == 0, 1.0, largest)
        scaled = torch._foreach_div(ws, list(largest.unbind()))
        rest = torch.stack(torch._foreach_norm(scaled, 2, dtype=torch.float64))
        keep = rest == 0
        if found_inf is not None:
            keep |= found_inf.to(device).reshape(()) > 0
        # One division, unless the norm itself is out of range.
        norms = torch.where(keep, 1.0, largest * rest)
        once = norms.to(ws[0].dtype).isfinite() & (norms >= torch.finfo(ws[0].dtype).tiny)
        for factors in (torch.where(once, norms, largest), torch.where(once, 1.0, rest)):
            torch._foreach_div_(ws, list(factors.unbind()))
        for p, w in zip(own, ws, strict=True):
            if w.dtype != p.dtype:  # else the division was in place
                p.copy_(w)


def drop_obsolete(groups: Sequence[Mapping[str, Any]], state: MutableMapping[Tensor, Any]) -> bool:
    """Forget what no method keeps any more: it would be stale when the splitting is switched on again.

    Returns whether anything is kept still.
    """
    kept = False
    for group in groups:
        name = state_name(group)
        for p in group["params"]:
            own = state.get(p)
            for key in ("u", "dual"):
                if own and key in own and key != name:
                    del own[key]
            kept = kept or bool(own and name in own)
    return kept


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def check_loaded(groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any]) -> None:
    """Raise ValueError for a checkpoint that has state for a parameter, but not what its method keeps.

    Args:
        groups: as they will be, with ids or tensors in ``params``.
        state: by the same ids or tensors.
    """
    for i, group in enumerate(groups):
        name = state_name(group)
        if name is None:
            continue
        for j, key in enumerate(group["params"]):
            own = state.get(key) or {}
            if name not in own and any(value is not None for value in own.values()):
                raise ValueError(
                    f"the checkpoint has no {name} for {param_name(group, i, j)}, which"
                    f" method={group['method']!r} keeps (it has {', '.join(own)}); to begin with a new one, load it"
                    " with method='rvsm' and edit the method after that"
                )
