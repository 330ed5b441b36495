"""One training run of the benchmark: handwritten digits, a small convolutional net, a method, an engine, a seed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import rvsm_kernels as rk

from .training import Method, Run, Stopwatch

SPLIT_SEED = 0
TEST_SHARE = 0.25
VALIDATION_SHARE = 0.2
BATCH = 64
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4


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
    from sklearn.model_selection import train_test_split  # needed to train, not to read a result

    parts = train_test_split(range(len(data)), test_size=share, random_state=seed, stratify=data.y.numpy())
    first, second = (Images(data.x[part], data.y[part]) for part in parts)
    return first, second


def train_and_test() -> tuple[Images, Images]:
    """The 1,797 digits of scikit-learn in a fixed stratified split: 1,347 to train with, 450 to test with."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    x = torch.tensor(raw.images, dtype=torch.float32)[:, None]
    train, test = _divide(Images(x, torch.tensor(raw.target)), TEST_SHARE, SPLIT_SEED)
    mean, std = train.x.mean(), train.x.std()
    return Images((train.x - mean) / std, train.y), Images((test.x - mean) / std, test.y)


def train_and_validation(seed: int) -> tuple[Images, Images]:
    """A stratified division of the training images, for choosing settings without a look at the test images."""
    return _divide(train_and_test()[0], VALIDATION_SHARE, seed)


class Net(nn.Sequential):
    """Four 3x3 convolutions (1-32-32-64-64) with batch norm, global average pooling and a linear layer.

    65,834 parameters, of which 65,440 are weights to penalise; the convolutions have 129 input channels.
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


def make_statistics(model: nn.Module, images: Images, batch: int) -> None:
    """The running statistics of batch norms, anew, as the mean over all batches of the training images."""
    rk.recalibrate(model, images.batches(batch, torch.Generator().manual_seed(0)))


def optimizer_for(method: Method, model: nn.Module, engine: str) -> torch.optim.Optimizer:
    """The optimizer of a run; dense SGD's two "engines" are torch's own two ways to step."""
    base: dict[str, Any] = {"lr": method.lr, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY, "nesterov": True}
    if method.dense:
        way = "fused" if engine == "native" else "foreach"
        return torch.optim.SGD(model.parameters(), **base, **{way: True})
    return rk.RVSM(rk.param_groups(model, **method.options), **base, engine=engine)


def zero_channels(model: nn.Module) -> float:
    """The share of zero input channels over the convolutions; the linear layer does not count, as in the papers."""
    rows = [row for row in rk.sparsity(model, group_dim=1).rows if len(row.shape) == 4]
    return sum(row.zero_groups for row in rows) / sum(row.groups for row in rows)


def measure(model: nn.Module, optimizer: torch.optim.Optimizer, data: Images) -> dict[str, float]:
    """Accuracy with w and with u, and the zeros of u. The statistics of batch norm stay those of w."""
    accuracy_w = accuracy(model, data)
    sparse = optimizer.sparse_weights() if isinstance(optimizer, rk.RVSM) else contextlib.nullcontext()
    with sparse:
        return {
            "accuracy_w": accuracy_w,
            "accuracy_u": accuracy(model, data),
            "zeros": rk.sparsity(model).share,
            "zero_channels": zero_channels(model),
        }


def measured(model: nn.Module, optimizer: torch.optim.Optimizer, images: Images, held_out: Images) -> Run:
    """:func:`measure` on the images that were held out."""
    return dict(measure(model, optimizer, held_out))


def train(
    method: Method,
    engine: str,
    seed: int,
    data: tuple[Images, Images],
    epochs: int,
    every: int = 1,
    lead: Callable[[Method, torch.optim.Optimizer, int], Any] = lambda method, optimizer, steps: None,
    measure: Callable[[nn.Module, torch.optim.Optimizer, Images, Images], Run] = measured,
) -> Run:
    """Train on the first part of the data from scratch; measure on the second every ``every`` epochs and at the end.

    Args:
        lead: (method, optimizer, number of steps) -> a schedule of the penalty, which goes on after each step, or None.
        measure: (model, optimizer, images to train with, images held out) -> what is known of them.
    """
    images, held_out = data
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Net()
    order = torch.Generator().manual_seed(seed)
    optimizer = optimizer_for(method, model, engine)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    schedule = lead(method, optimizer, epochs * -(-len(images) // BATCH))
    loss_of = nn.CrossEntropyLoss()
    watch = Stopwatch()
    curve = []
    for epoch in range(1, epochs + 1):
        for x, y in images.batches(BATCH, order):
            optimizer.zero_grad()
            loss_of(model(x), y).backward()
            watch.step(optimizer)
            if schedule is not None:
                schedule.step()
        scheduler.step()
        if epoch % every == 0 or epoch == epochs:
            curve.append({"epoch": epoch, **measure(model, optimizer, images, held_out)})
    return {"method": method.name, "engine": engine, "seed": seed, **watch.times(), "curve": curve}
