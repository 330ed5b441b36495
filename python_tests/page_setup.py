"""What the pages' code blocks take for given: a small network and data. Hidden blocks of the pages import it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

CLASSES = 4


def cnn(seed: int = 0) -> nn.Module:
    """Three convolutions with batch norms and a linear layer, for images of 1 x 8 x 8."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES))


def images(count: int = 128) -> tuple[Tensor, Tensor]:
    """Images of four classes that differ in the corner that is bright."""
    gen = torch.Generator().manual_seed(0)
    y = torch.randint(CLASSES, (count,), generator=gen)
    x = torch.randn(count, 1, 8, 8, generator=gen)
    for k in range(CLASSES):
        x[y == k, :, 4 * (k // 2) : 4 * (k // 2) + 4, 4 * (k % 2) : 4 * (k % 2) + 4] += 1.5
    return x, y


def batches(size: int = 32) -> DataLoader:
    """The images in batches."""
    return DataLoader(TensorDataset(*images()), size)


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """One forward and backward pass."""
    nn.functional.cross_entropy(model(x), y).backward()


def validate(model: nn.Module) -> float:
    """Accuracy on the images, in eval mode."""
    was, (x, y) = model.training, images()
    with torch.no_grad():
        right = (model.eval()(x).argmax(1) == y).float().mean().item()
    model.train(was)
    return right
