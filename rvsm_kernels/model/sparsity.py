"""Counting zeros: the report of an optimizer's u and of a model as it is."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..dist.shards import is_of_shards, is_sharded, shard_of
from ..dist.sums import add_ranks, zeros_of
from ..method.groups import GroupDim, Grouping, check_grouping, group_count, grouping, magnitudes, once
from ..method.memory import kind_of, whole
from ..method.options import at_least_one
from ..method.statistics import ZERO_NORM
from ..method.windows import Pattern, broken, check_pattern, why_not
from .param_groups import counted_weights


@dataclasses.dataclass(frozen=True)
class SparsityRow:
    """The zeros of one parameter.

    Attributes:
        name: the parameter's name, or its place in the optimizer.
        shape: its shape.
        zeros, numel: zero elements, all elements.
        zero_groups, groups: groups with ||u_G||_2 < 1e-15, all groups; for elementwise, a group is an element.
        left: why :func:`rvsm_kernels.param_groups` would not penalise it, None where it would.
        pattern: (n, m) where it was asked for and of every m elements along dimension 1 at most n are not zero, else
            None.
    """

    name: str
    shape: tuple[int, ...]
    zeros: int
    numel: int
    zero_groups: int
    groups: int
    left: str | None = None
    pattern: tuple[int, int] | None = None

    @property
    def all_zero(self) -> bool:
        """Whether nothing of a layer is left, so that no signal passes it."""
        return self.numel > 0 and self.zeros == self.numel

    @property
    def share(self) -> float:
        """zeros / numel (0 for an empty parameter)."""
        return self.zeros / self.numel if self.numel else 0.0

    @property
    def group_share(self) -> float:
        """zero_groups / groups (0 for an empty parameter)."""
        return self.zero_groups / self.groups if self.groups else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            **dataclasses.asdict(self),
            "share": self.share,
            "group_share": self.group_share,
            "all_zero": self.all_zero,
        }


class SparsityReport:
    """The zeros of every parameter and in total. ``print`` gives a table, ``to_dict`` plain values for JSON."""

    def __init__(self, rows: Iterable[SparsityRow], uncounted: Mapping[str, str] | None = None) -> None:
        self.rows = list(rows)
        self.uncounted = dict(uncounted or {})  # name: why its zeros cannot be counted
        counts = [sum(getattr(r, f) for r in self.rows) for f in ("zeros", "numel", "zero_groups", "groups")]
        self.total = SparsityRow("total", (), *counts)

    @property
    def share(self) -> float:
        """The share of zero elements over all parameters."""
        return self.total.share

    @property
    def group_share(self) -> float:
        """The share of zero groups over all parameters."""
        return self.total.group_share

    def to_dict(self) -> dict[str, Any]:
        """``{"total": row, "parameters": [row, ...]}`` of plain values, for JSON."""
        rows = [r.to_dict() for r in self.rows]
        return {"total": self.total.to_dict(), "parameters": rows, "uncounted": self.uncounted}

    def __str__(self) -> str:
        width = max(len(r.name) for r in [*self.rows, self.total])
        head = f"{'parameter':<{max(width, 9)}} {'shape':>18} {'zeros':>12} {'of':>12} {'share':>8}"
        lines = [f"{head} {'groups':>9} {'of':>9} {'share':>8}"]
        for r in [*self.rows, self.total]:
            shape = "x".join(map(str, r.shape)) if r is not self.total else ""
            lines.append(
                f"{r.name:<{max(width, 9)}} {shape:>18} {r.zeros:>12,} {r.numel:>12,} {r.share:>8.2%}"
                f" {r.zero_groups:>9,} {r.groups:>9,} {r.group_share:>8.2%}"
                + (f"  {r.pattern[0]}:{r.pattern[1]}" if r.pattern is not None else "")
                + ("  all zero: nothing passes" if r.all_zero and r is not self.total else "")
            )
        left: dict[str, list[str]] = {}
        for r in self.rows:
            if r.left is not None:
                left.setdefault(r.left, []).append(r.name)
        lines += [f"not penalised by param_groups ({why}): {', '.join(names)}" for why, names in left.items()]
        lines += [f"not counted ({why}): {name}" for name, why in self.uncounted.items()]
        return "\n".join(lines)

    __repr__ = __str__


def _dense(t: Tensor) -> Tensor:
    """A sparse or quantized tensor as an ordinary one; also torchao's, which are subclasses of Tensor."""
    if t.layout != torch.strided:
        return t.to_dense()
    if t.is_quantized:
        return t.dequantize()
    if kind_of(t) is not None and t.device.type != "meta" and not is_sharded(t):
        with contextlib.suppress(AttributeError, NotImplementedError, RuntimeError, TypeError):
            found = t.dequantize()
            return found if kind_of(found) is None else t
    return t


def is_all_zero(t: Tensor) -> bool:
    """Whether every element is 0; looks at the first and the last slice before it looks at all of it."""
    try:
        return not any(bool(part.any()) for part in (t[0], t[-1], t))
    except (AssertionError, NotImplementedError, RuntimeError):
        if kind_of(t) is None:
            raise
        return False  # a tensor without values, on the meta device for example


def follows(w: Tensor, pattern: Pattern) -> bool:
    """Whether of every m elements along dimension 1 at most n are not zero; of a DTensor, on all ranks.

    For (2, 4) that is what ``torch.sparse.to_sparse_semi_structured`` needs of a weight. False where the tensor has no
    whole windows.
    """
    if why_not(w.shape, pattern) is not None:
        return False
    if not is_of_shards(w):
        return int(broken(_dense(whole(w)), pattern)) == 0
    shard = shard_of(w)
    if why_not(shard.shape, pattern) is not None:  # shards that cut windows
        return False
    count = broken(shard, pattern)
    return int(add_ranks(torch.stack([count, count]), w, None)[0]) == 0


def measure(
    name: str,
    u: Tensor,
    group_dim: Grouping = None,
    left: str | None = None,
    pattern: Pattern | None = None,
) -> SparsityRow:
    """Count the zeros of one tensor; of a DTensor, those of all ranks.

    Args:
        pattern: is looked for where it is given.
    """
    row = _counted(name, u, group_dim, left)
    if pattern is not None and follows(u, pattern):
        row = dataclasses.replace(row, pattern=(pattern[0], pattern[1]))
    return row


def _counted(name: str, u: Tensor, group_dim: Grouping, left: str | None) -> SparsityRow:
    check_grouping(u.shape, group_dim, name)  # an error names the parameter
    if is_of_shards(u):
        groups = u.numel() if group_dim is None else group_count(u.shape, group_dim)
        zeros, zero_groups = zeros_of(u, group_dim, ZERO_NORM)
        return SparsityRow(name, tuple(u.shape), zeros, u.numel(), zero_groups, groups, left)
    u = _dense(whole(u))
    zeros = u.numel() - int(torch.count_nonzero(u))
    if group_dim is None:
        return SparsityRow(name, tuple(u.shape), zeros, u.numel(), zeros, u.numel(), left)
    norms = once(magnitudes(u if u.is_floating_point() else u.float(), group_dim), group_dim)
    zero_groups = int((norms.double() < ZERO_NORM).sum())  # to float16 the limit is 0
    return SparsityRow(name, tuple(u.shape), zeros, u.numel(), zero_groups, norms.numel(), left)


def counted(name: str, u: Tensor, zeros: int, zero_groups: int, group_dim: Grouping) -> SparsityRow:
    """The row of a tensor like u whose zeros have been counted elsewhere."""
    groups = u.numel() if group_dim is None else group_count(u.shape, group_dim)
    return SparsityRow(name, tuple(u.shape), zeros, u.numel(), zero_groups, groups)


@torch.no_grad()
def sparsity(
    model: nn.Module, group_dim: GroupDim = None, group_block: int = 1, pattern: tuple[int, int] | None = None
) -> SparsityReport:
    """How sparse a model is as it stands: all its weights of two dimensions and more.

    The report says which of them :func:`rvsm_kernels.param_groups` would leave dense, and which cannot be counted. Of a
    pruned or parametrised layer the weight that comes out is counted; sparse and quantized tensors (torchao's too) are
    counted as the dense ones that they stand for, also where a module holds them as buffers, as it does int8 weights.

    Args:
        model: any module.
        group_dim, group_block: what a group is (see :class:`rvsm_kernels.RVSM`); None counts elements.
        pattern: (n, m): the rows of the weights that have at most n non-zeros in every m elements along dimension 1
            say so. (2, 4) is what ``torch.sparse.to_sparse_semi_structured`` takes.

    Raises:
        TypeError: something else than a module.
        ValueError: a ``group_dim`` that one of the weights does not have, a ``group_block`` that does not divide one.
    """
    if not isinstance(model, nn.Module):
        hint = "; an optimizer has a method: optimizer.sparsity()" if isinstance(model, torch.optim.Optimizer) else ""
        raise TypeError(f"sparsity takes a module, but got a {type(model).__name__}{hint}")
    at_least_one("group_block", group_block)
    groups = grouping(group_dim, group_block)
    if pattern is not None:
        check_pattern("pattern", pattern)
    rows, uncounted = [], {}
    for name, weight, left in counted_weights(model):
        try:
            rows.append(measure(name, weight, groups, left, pattern))
        except (NotImplementedError, RuntimeError) as error:
            kind = kind_of(weight)
            uncounted[name] = kind if kind is not None else str(error).splitlines()[0]
    return SparsityReport(rows, uncounted)
