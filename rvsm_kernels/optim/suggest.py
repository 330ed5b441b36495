"""Fixed options that give a sparsity: lam from the cut among the weights as they are, beta from lr and the steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..method.options import is_number, shown, whole_number
from ..method.penalties import PENALTIES
from ..model.param_groups import param_groups
from .rvsm import RVSM
from .schedules import SparsitySchedule
from .split_optimizer import SplitOptimizer
from .unwrap import optimizer_in

_SET = ("beta", "lam", "density")
"""What a suggestion sets, and :class:`SparsitySchedule` edits when it looks for a cut."""


@dataclass(frozen=True)
class SuggestedGroup:
    """What is suggested for one param group.

    Attributes:
        group: its place in the param groups.
        density: for top-k, which ``lam`` only switches on; else None.
        cut: the largest magnitude or norm that goes to zero; None for top-k, N:M, and with ``group_scale``, where it is
            another one for each size of a group.
        zeros: the share of zeros of u that the options give now, of elements or of groups as it was asked.
    """

    group: int
    penalty: str
    lr: float
    beta: float
    lam: float
    density: float | None
    cut: float | None
    zeros: float


class Suggestion(Sequence[SuggestedGroup]):
    """The suggestions for all penalised groups: prints as a table; :meth:`apply` sets them.

    Attributes:
        param_groups: those of the optimizer, or the new ones of the model, for the constructor of an optimizer.
    """

    def __init__(self, rows: list[SuggestedGroup], groups: list[dict[str, Any]], promise: str) -> None:
        self._rows, self.param_groups, self._promise = rows, groups, promise

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]

    def apply(self) -> list[dict[str, Any]]:
        """Set ``beta`` and ``lam`` (for top-k ``density``) of every penalised group; returns all groups."""
        for row in self._rows:
            group = self.param_groups[row.group]
            _put(group, {"beta": row.beta, **({"lam": row.lam} if row.density is None else {"density": row.density})})
        return self.param_groups

    def to_dict(self) -> list[dict[str, Any]]:
        """The rows as plain values."""
        return [asdict(row) for row in self._rows]

    def __repr__(self) -> str:
        header = ("group", "penalty", "lr", "beta", "lam", "cut", "zeros now")
        lines = [header]
        for row in self._rows:
            lam = f"{row.lam:.4g}" if row.density is None else f"density {row.density:.4g}"
            cut = "" if row.cut is None else f"{row.cut:.4g}"
            numbers = (f"{row.lr:.4g}", f"{row.beta:.4g}", lam, cut, f"{row.zeros:.2%}")
            lines.append((str(row.group), row.penalty, *numbers))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines)
        return "\n".join([*table, self._promise])


def suggest(
    model_or_optimizer: Any,
    target: float,
    *,
    steps: int,
    lr: float | None = None,
    within: float = 0.1,
    closed: float = 0.95,
    of: str = "elements",
    scope: str = "global",
    **penalty_options: Any,
) -> Suggestion:
    """A first lam and beta for those who want fixed options in the place of a :class:`SparsitySchedule`.

    ::

        print(rk.suggest(optimizer, 0.9, steps=10_000))  # a table; nothing is changed
        rk.suggest(optimizer, 0.9, steps=10_000).apply()  # now it is
        optimizer = rk.RVSM(rk.suggest(model, 0.9, steps=10_000, lr=0.1, penalty="l0").apply(), lr=0.1)

    A step closes the share lr * beta of the gap between w and u, and n steps close 1 - (1 - lr * beta)^n. beta is what
    closes ``closed`` within ``within`` of all steps::

        beta = (1 - (1 - closed)^(1 / n)) / lr        n = max(1, within * steps)

    so that lr * beta < 1. Gradients work against the pull: a weight comes to rest where beta * (w - u) is its gradient.
    A beta too small leaves weights hanging above u, a beta too large takes what is below the cut away before training
    can tell what matters. lam is what has the cut that gives ``target`` among the weights as they are now:
    lam = beta * tau(cut). Ask when the weights say something: of a trained network, or after the first epochs.

    Args:
        model_or_optimizer: RVSM, RVSMAdamW, RVSMWrapper or a wrapper around one of them, whose groups with a penalty
            are meant; or a module, with ``lr``.
        target: the share of zeros of u, in [0, 1).
        steps: of the whole training.
        lr: the learning rate; None takes that of each group (``initial_lr`` where a scheduler has noted one).
        within, closed: shares in (0, 1], (0, 1).
        of, scope: as those of :class:`SparsitySchedule`.
        **penalty_options: of a model: what :func:`rvsm_kernels.param_groups` takes.

    Raises:
        ValueError, TypeError: an argument out of range; what :class:`SparsitySchedule` refuses; lr 0.
    """
    for name, value, top in (("within", within, True), ("closed", closed, False)):
        if not is_number(value) or not (0 < value < 1 or (top and value == 1)):
            raise ValueError(f"Invalid {name} value: {shown(value)} (a share in (0, 1{']' if top else ')'} is needed)")
    whole_number("steps", steps, 1)
    if lr is not None and not (is_number(lr) and lr > 0):
        raise ValueError(f"Invalid lr value: {shown(lr)} (a number above 0 is needed)")
    if isinstance(model_or_optimizer, nn.Module):
        optimizer, groups = _of_model(model_or_optimizer, lr, penalty_options)
    else:
        if penalty_options:
            raise TypeError(
                f"suggest takes {', '.join(penalty_options)} for a model; an optimizer's groups have theirs"
            )
        optimizer = optimizer_in(model_or_optimizer, "suggest")
        groups = optimizer.param_groups
    rate = 1 - (1 - closed) ** (1 / max(1.0, within * steps))
    rows = _rows(optimizer, target, rate, lr, of, scope)
    promise = f"lr * beta = {rate:.4g}: {closed:.0%} of a gap is closed within {within:.0%} of {steps:,} steps"
    return Suggestion(rows, groups, promise)


def _of_model(
    model: nn.Module, lr: float | None, penalty_options: Mapping[str, Any]
) -> tuple[SplitOptimizer, list[dict[str, Any]]]:
    """An optimizer to ask, and the groups that are for the user's own."""
    if lr is None:
        raise TypeError("suggest needs the lr that a model will be trained with")
    suggested = [name for name in ("lam", "beta") if name in penalty_options]
    if suggested:
        raise TypeError(f"suggest finds {' and '.join(suggested)}; leave {'it' if len(suggested) == 1 else 'them'} out")
    options = dict(penalty_options)
    if options.get("penalty") == "topk":
        options.setdefault("density", 1.0)
    groups = param_groups(model, **options)
    return RVSM([dict(group) for group in groups], lr=lr), groups


def _lr_of(i: int, group: Mapping[str, Any], lr: float | None) -> float:
    found = float(group.get("initial_lr", group["lr"])) if lr is None else float(lr)
    if not found > 0:
        raise ValueError(f"group {i}: lr is {found:g}, from which no beta follows: give lr=")
    return found


def _put(group: dict[str, Any], options: Mapping[str, Any]) -> None:
    """Set options; where one is a tensor, what the tensor holds."""
    for name, value in options.items():
        if isinstance(group.get(name), Tensor):
            group[name].copy_(torch.as_tensor(value))
        else:
            group[name] = value


def _saved(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: group[name].clone() if isinstance(group[name], Tensor) else group[name] for name in _SET}


@torch.no_grad()
def _rows(
    optimizer: SplitOptimizer, target: float, rate: float, lr: float | None, of: str, scope: str
) -> list[SuggestedGroup]:
    """Look as :class:`SparsitySchedule` does, at its end, and put the options back."""
    led = [(i, group) for i, group in enumerate(optimizer.param_groups) if group["penalty"] is not None]
    lrs = {i: _lr_of(i, group, lr) for i, group in led}
    saved = {i: _saved(group) for i, group in led}
    try:
        for i, group in led:
            _put(group, {"beta": rate / lrs[i]})
        SparsitySchedule(optimizer, target, end=1, of=of, scope=scope).step()
        return list(_read(optimizer, led, lrs, of))
    finally:
        for i, group in led:
            _put(group, saved[i])


def _read(
    optimizer: SplitOptimizer, led: list[tuple[int, dict[str, Any]]], lrs: Mapping[int, float], of: str
) -> Iterator[SuggestedGroup]:
    """The rows, while the options are set."""
    counted = {id(p): row for p, row in optimizer._view.rows()}
    for i, group in led:
        topk, beta, lam = group["penalty"] == "topk", float(group["beta"]), float(group["lam"])
        rows = [counted[id(p)] for p in group["params"] if id(p) in counted]
        zeros = sum(r.zero_groups if of == "groups" else r.zeros for r in rows)
        total = sum(r.groups if of == "groups" else r.numel for r in rows)
        plain = group["penalty"] in PENALTIES and not (group["group_scale"] and group["group_dim"] is not None)
        cut = PENALTIES[group["penalty"]].cut(lam / beta, float(group["a"])) if plain else None
        density = group["density"] if topk else None
        yield SuggestedGroup(i, group["penalty"], lrs[i], beta, lam, density, cut, zeros / total if total else 0.0)
