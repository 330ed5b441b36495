"""What ``recalibrate=True`` of a callback reads: the data of the training, in an order of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset

from rvsm_kernels.integrations.held import Recalibration


class Seen(nn.Module):
    """Remembers what passes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1)
        self.batches: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.batches.append(x.detach().clone())
        return self.norm(x)


def numbers(count: int) -> TensorDataset:
    return TensorDataset(torch.arange(count, dtype=torch.float32).unsqueeze(1))


def seen(loader: Any, size: int, batches: int | None = None) -> list[Tensor]:
    model = Seen()
    Recalibration(True, batches).run(model, lambda: (loader, size))
    return model.batches


def test_a_sampler_that_takes_a_part() -> None:
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(numbers(64), 8, sampler=SubsetRandomSampler(range(16), generator))
    before = generator.get_state()
    read = torch.cat(seen(loader, 8))
    assert sorted(read.flatten().tolist()) == list(range(16))
    assert torch.equal(generator.get_state(), before), "the order of the training moved"


@pytest.mark.parametrize("shuffle", [True, False])
def test_all_of_the_data_and_the_last_batch(shuffle: bool) -> None:
    """The last batch is left out where the training leaves it out: a batch norm cannot be trained on one sample."""
    loader = DataLoader(numbers(65), 8, shuffle=shuffle, drop_last=True)
    read = torch.cat(seen(loader, 8)).flatten().tolist()
    assert len(read) == len(set(read)) == 64
    assert len(torch.cat(seen(DataLoader(numbers(66), 8, shuffle=shuffle), 8))) == 66
    assert len(seen(loader, 8, batches=3)) == 3


def test_data_without_a_length() -> None:
    class Stream(IterableDataset[Tensor]):
        def __iter__(self) -> Any:
            return iter([torch.zeros(1)])

    with pytest.raises(ValueError, match="one training loader, of data with a length"):
        seen(DataLoader(Stream(), 1), 1)
