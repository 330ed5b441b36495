"""Sharded parameters and whole ones that are stepped side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import distribute_tensor

import rvsm_kernels as rk
from runner import same_bits

SHAPES = ((5, 7), (1, 6), (4, 3, 2, 2))
"""Rows and columns that ranks cannot share evenly, and one row, which one rank has and the others have not."""

GROUPED: dict[str, Any] = {"lam": 2.0, "group_lasso": 0.1}


def mesh_of() -> Any:
    from torch.distributed.tensor import init_device_mesh

    return init_device_mesh("cpu", (dist.get_world_size(),))


def placements() -> list[Any]:
    from torch.distributed.tensor import Replicate, Shard

    return [Shard(0), Shard(1), Replicate()]


class Pair:
    """An optimizer of sharded parameters, and one of whole ones that gets the same gradients."""

    def __init__(
        self,
        cls: type,
        mesh: Any,
        placement: Sequence[Any],
        dtype: torch.dtype = torch.float32,
        shapes: Sequence[Sequence[int]] = SHAPES,
        **options: Any,
    ) -> None:
        self._share = lambda t: distribute_tensor(t.clone(), mesh, list(placement))
        self._gen = torch.Generator().manual_seed(3)
        whole = [torch.randn(shape, generator=self._gen).to(dtype) for shape in shapes]
        self.sharded = [nn.Parameter(self._share(w)) for w in whole]
        self.whole = [nn.Parameter(w.clone()) for w in whole]
        options = {"lr": 0.1, "penalty": "l0", "lam": 0.3, "beta": 1.0, **options}
        if cls is rk.RVSM:
            options.setdefault("momentum", 0.9)
        self.ours, self.theirs = cls(self.sharded, **options), cls(self.whole, **options)

    def give_gradients(self) -> None:
        for p, q in zip(self.sharded, self.whole, strict=True):
            q.grad = torch.randn(q.shape, generator=self._gen).to(q.dtype)
            p.grad = self._share(q.grad)

    def step(self, steps: int = 1) -> None:
        for _ in range(steps):
            self.give_gradients()
            self.ours.step()
            self.theirs.step()

    def check(self, exact: bool) -> None:
        """Weights and states are those of one process: every bit, or within the rounding of a sum in another order."""
        from torch.distributed.tensor import DTensor

        for p, q in zip(self.sharded, self.whole, strict=True):
            self._close(p, q, exact)
            assert self.ours.state[p].keys() == self.theirs.state[q].keys(), (
                p.shape,
                self.ours.state[p].keys(),
                self.theirs.state[q].keys(),
            )
            for name, state in self.theirs.state[q].items():
                mine = self.ours.state[p][name]
                assert isinstance(mine, DTensor) == (name != "step")
                assert name == "step" or mine.placements == p.placements
                self._close(mine, state, exact)

    @staticmethod
    def _close(sharded: Tensor, whole: Tensor, exact: bool) -> None:
        """Of what this rank has: gloo does not send every type."""
        x, y = sharded.detach(), whole.detach()
        if x.shape and hasattr(x, "placements"):
            y = distribute_tensor(y.clone(), x.device_mesh, x.placements, src_data_rank=None).to_local()
            x = x.to_local()
        if exact:
            assert same_bits(x, y)
        else:
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)

    def check_statistics(self) -> None:
        """Those of the last step are sums over all ranks: counts to the last integer."""
        ours, theirs = self.ours.statistics(), self.theirs.statistics()
        for mine, other in zip([*ours.rows, ours.total], [*theirs.rows, theirs.total], strict=True):
            for name, value in other.to_dict().items():
                found = mine.to_dict()[name]
                assert found == pytest.approx(value, rel=1e-6) if isinstance(value, float) else found == value, name


METHODS = ("rvsm", "rvsm-delayed", "admm")
DIMS: tuple[Any, ...] = (None, 0, 1, (0, 1), ())
