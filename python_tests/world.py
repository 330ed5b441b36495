"""An optimizer in training, for the tests that change something between two steps."""

from __future__ import annotations

from typing import Any

import torch
from builds import generator
from torch import Tensor, nn

import rvsm_kernels as rk
from runner import check_reading, checked_step

OPTIONS: dict[str, Any] = {
    **{"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
    **{"penalty": "tl1", "lam": 0.05, "beta": 0.5, "a": 2.0},
}
GROUPED: dict[str, Any] = {"penalty": "l0", "lam": 0.6, "group_dim": 1, "group_lasso": 0.05}


class World:
    """An optimizer over two groups, elementwise and grouped, with all kinds of sizes, and its gradients."""

    def __init__(self, engine: str, steps: int, **options: Any) -> None:
        self.gen = generator(9)
        self.first = [nn.Parameter(torch.randn(s, generator=self.gen)) for s in ((40,), (1,), (7, 5), (3, 4, 3, 3))]
        self.second = [nn.Parameter(torch.randn(s, generator=self.gen)) for s in ((8, 6, 3, 3), (5, 9))]
        groups = [{"params": self.first}, {"params": self.second, **GROUPED}]
        self.optimizer = rk.RVSM(groups, **{**OPTIONS, **options}, engine=engine)
        self.engine = engine
        for k in range(steps):
            self.step(f"before, {k}")

    def params(self) -> list[Tensor]:
        """Every parameter that the optimizer has now."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def set_gradients(self) -> None:
        """New gradient tensors."""
        for p in self.params():
            values = torch.randn(p.shape, generator=self.gen, dtype=torch.float64).to(p.dtype)
            p.grad = torch.empty_like(p).copy_(values)

    def step(self, what: str, gradients: bool = True) -> None:
        """A step against the definition."""
        if gradients:
            self.set_gradients()
        checked_step(self.optimizer, what)

    def go_on(self) -> None:
        """The change holds, and what is read from the optimizer shows it."""
        self.step("right after the change")
        check_reading(self.optimizer, "right after the change")
        self.step("one step later")

    def momentum(self, p: Tensor) -> Tensor:
        """A parameter's buffer."""
        return self.optimizer.state[p]["momentum_buffer"]
