"""The data and the network of the training benchmark: handwritten digits and a small convolutional net."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

SPLIT_SEED = 0
TEST_SHARE = 0.25
VALIDATION_SHARE = 0.2


@dataclass(frozen=True)
class Images:
    """Images, N x 1 x 8 x 8, and their digits."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def batches(self, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """All images once, in a random order that the generator fixes."""
        for part in torch.randperm(len(self), generator=generator).split(size):
            yield self.x[part], self.y[part]


def _divide(data: Images, share: float, seed: int) -> tuple[Images, Images]:
    """Two parts with the same mix of digits; the second has ``share`` of the images."""
    parts = train_test_split(range(len(data)), test_size=share, random_state=seed, stratify=data.y.numpy())
    first, second = (Images(data.x[part], data.y[part]) for part in parts)
    return first, second


def train_and_test() -> tuple[Images, Images]:
    """The 1,797 digits of scikit-learn in a fixed stratified split: 1,347 to train with, 450 to test with."""
    raw = load_digits()
    x = torch.tensor(raw.images, dtype=torch.float32)[:, None]
    train, test = _divide(Images(x, torch.tensor(raw.target)), TEST_SHARE, SPLIT_SEED)
    mean, std = train.x.mean(), train.x.std()
    return Images((train.x - mean) / std, train.y), Images((test.x - mean) / std, test.y)


def train_and_validation(seed: int) -> tuple[Images, Images]:
    """A stratified division of the training images, for choosing settings without a look at the test images."""
    return _divide(train_and_test()[0], VALIDATION_SHARE, seed)


class Net(nn.Sequential):
    """Four 3x3 convolutions (1-32-32-64-64) with batch norm, global average pooling, one linear layer: 66,250 numbers.

    The convolutions have 129 input channels.
    """

    def __init__(self) -> None:
        super().__init__()
        for i, (inputs, outputs) in enumerate([(1, 32), (32, 32), (32, 64), (64, 64)], 1):
            self.add_module(f"conv{i}", nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))
            self.add_module(f"norm{i}", nn.BatchNorm2d(outputs))
            self.add_module(f"relu{i}", nn.ReLU())
            if i == 2:
                self.add_module("halve", nn.MaxPool2d(2))
        self.add_module("pool", nn.AdaptiveAvgPool2d(1))
        self.add_module("flatten", nn.Flatten())
        self.add_module("linear", nn.Linear(64, 10))


@torch.no_grad()
def accuracy(model: nn.Module, data: Images) -> float:
    """The share of right answers of the model in evaluation mode."""
    was_training = model.training
    model.eval()
    right = (model(data.x).argmax(1) == data.y).float().mean().item()
    model.train(was_training)
    return right
