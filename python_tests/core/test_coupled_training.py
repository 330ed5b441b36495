"""Coupled channels from the first step to the small network: groups, schedule, removal, and training that goes on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rvsm_kernels as rk


class Block(nn.Module):
    """A residual block whose inner channels and whose stream can go."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.beside = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)).relu()) + self.beside(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.blocks = nn.Sequential(Block(8, 8), Block(8, 16))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x).relu()).relu().mean((2, 3)))


def batch(step: int) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(step)
    return torch.randn(6, 1, 8, 8, generator=gen), torch.randint(0, 3, (6,), generator=gen)


def train(net: nn.Module, optimizer: Any, steps: range, schedule: Any = None) -> None:
    for step in steps:
        x, y = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()


@pytest.mark.parametrize("make", [rk.RVSM, rk.RVSMAdamW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("options", [{}, {"penalty": "l1"}, {"group_scale": True}, {"method": "admm"}], ids=str)
def test_half_of_the_channels(engine: str, make: Any, options: dict[str, Any]) -> None:
    """Every layer loses half of its channels, outputs are those of u, and training goes on."""
    torch.manual_seed(0)
    net, x = Net(), batch(0)[0]
    options = {"penalty": "l0", "lam": 0.0, "beta": 1.0, **options}
    groups = rk.param_groups(net, structure="coupled", example_inputs=x, **options)
    optimizer = make(groups, lr=0.01, engine=engine)
    schedule = rk.SparsitySchedule(optimizer, 0.5, of="groups", scope="tensor", begin=1, end=6, every=1)
    train(net, optimizer, range(8), schedule)
    net.eval()
    with optimizer.sparse_weights(), torch.no_grad():
        expected = net(x)
    sparse = rk.sparse_copy(net, optimizer)
    report = rk.shrink(net, optimizer, example_inputs=x)
    assert rk.shrink(sparse, example_inputs=x) == report
    with torch.no_grad():
        torch.testing.assert_close(sparse(x), expected, rtol=1e-5, atol=1e-5)
    assert report.groups == 4 + 4 + 8 + 8  # the stem's stream, two inner ones, the last stream
    assert (net.stem.out_channels, net.blocks[1].first.out_channels, net.head.in_features) == (4, 8, 8)
    net.train()
    before = [p.detach().clone() for p in net.parameters()]
    train(net, optimizer, range(8, 11), schedule)
    assert all(not torch.equal(p, w) for p, w in zip(net.parameters(), before, strict=True))
    assert not any(bool(torch.isnan(p).any()) for p in net.parameters())
    again = make(rk.param_groups(net, structure="coupled", example_inputs=x, **options), lr=0.01, engine=engine)
    again.load_state_dict(optimizer.state_dict())
