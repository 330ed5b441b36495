"""u of all weights under ``ZeroRedundancyOptimizer``, whose ranks have an optimizer of some of the parameters each."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..method.cuts import budget_of
from ..method.parameters import param_name
from ..model.recalibrate import check_recalibration
from ..model.recalibrate import recalibrate as estimate_statistics
from ..model.sparsity import SparsityReport, SparsityRow

T = TypeVar("T")


class ZeroShares:
    """The optimizers that the ranks have under a ``ZeroRedundancyOptimizer``, as one.

    Every method is called on all ranks, and acts on the model of each of them; an error on one rank is raised on all.

    Attributes:
        zero: the ``ZeroRedundancyOptimizer``. Options are edited in its ``param_groups``, which it hands on.
        mine: the optimizer that this rank has.
    """

    def __init__(self, zero: Any, mine: Any) -> None:
        self.zero, self.mine = zero, mine

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The param groups of all parameters."""
        return self.zero.param_groups  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def sparse_weights(
        self,
        model: nn.Module | None = None,
        *,
        frozen: bool = False,
        recalibrate: Iterable[Any] | None = None,
        batches: int | None = None,
    ) -> Iterator[None]:
        """See :meth:`rvsm_kernels.RVSM.sparse_weights`. Each rank keeps a copy of the split parameters meanwhile."""
        check_recalibration(model, recalibrate, batches)
        with contextlib.ExitStack() as stack:
            self._everywhere(lambda: stack.enter_context(self.mine.sparse_weights(model, frozen=frozen)))
            mine = {id(p) for group in self.mine.param_groups for p in group["params"]}
            others = [p for group in self._penalised() for p in group["params"] if id(p) not in mine]
            weights = [p.detach().clone() for p in others]
            stack.callback(_copy, others, weights)  # without a message: after an error the others may not come here
            self._send()
            if model is not None and recalibrate is not None:
                estimate_statistics(model, recalibrate, batches)
            yield

    def sparsify_(self, *, frozen: bool = False, hold: bool = False) -> None:
        """See :meth:`rvsm_kernels.RVSM.sparsify_`."""
        self._everywhere(lambda: self.mine.sparsify_(frozen=frozen, hold=hold))
        for group in self._penalised() if hold else ():
            group["hold_zeros"] = True
        self._send()

    def sparsity(self) -> SparsityReport:
        """See :meth:`rvsm_kernels.RVSM.sparsity`: the same report on every rank."""
        names = {
            p: ((i, j), param_name(group, i, j))
            for i, group in enumerate(self.param_groups)
            for j, p in enumerate(group["params"])
        }

        def mine() -> list[tuple[tuple[int, int], SparsityRow]]:
            return [(names[p][0], dataclasses.replace(row, name=names[p][1])) for p, row in self.mine._view.rows()]

        rows = sorted((row for of_rank in self._everywhere(mine) for row in of_rank), key=lambda row: row[0])
        return SparsityReport(row for _, row in rows)

    def penalty_value(self) -> Tensor:
        """See :meth:`rvsm_kernels.RVSM.penalty_value`: of all parameters, on every rank."""
        values = self._everywhere(lambda: self.mine.penalty_value().item())
        device = next(p.device for group in self.param_groups for p in group["params"])
        return torch.tensor(sum(values), dtype=torch.float64, device=device)

    def _penalised(self) -> Iterator[dict[str, Any]]:
        return (group for group in self.param_groups if group["penalty"] is not None)

    def _everywhere(self, work: Callable[[], T]) -> list[T]:
        """What some work gives on each rank; if it raises on one of them, an error on every rank."""
        # torch hands edits of the groups on in a step only.
        self.zero._sync_param_groups(self.zero.param_groups, self.mine.param_groups)
        result: Any = None
        error: BaseException | None = None
        try:
            self._refuse_budgets()
            result = work()
        except Exception as raised:
            error = raised
        group = self.zero.process_group
        of_ranks: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(of_ranks, (result, None if error is None else repr(error)), group=group)
        if error is not None:
            raise error
        for rank, (_, text) in enumerate(of_ranks):
            if text is not None:
                raise RuntimeError(f"rank {rank}: {text}")
        return [value for value, _ in of_ranks]

    def _refuse_budgets(self) -> None:
        """Raise ValueError for a cut over tensors of several ranks: no optimizer there knows all of them."""
        several = torch.distributed.get_world_size(self.zero.process_group) > 1
        if several and any(budget_of(group) is not None for group in self.param_groups):
            raise ValueError(
                "budget='global' under a ZeroRedundancyOptimizer is one cut for each rank's parameters, not one for"
                " all: shard with fully_shard (FSDP2), or take budget='tensor'"
            )

    @torch.no_grad()
    def _send(self) -> None:
        """Each rank's parameters become those of all models, as they do in a step of the ZeroRedundancyOptimizer."""
        self.zero._sync_params()


@torch.no_grad()
def _copy(to: list[Tensor], values: list[Tensor]) -> None:
    for p, value in zip(to, values, strict=True):
        p.copy_(value)
