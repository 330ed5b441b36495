"""The data of the examples: scikit-learn's 1,797 handwritten digits of 8x8 pixels, which come with the package."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

TRAIN = 1438  # four fifths


def digits() -> tuple[TensorDataset, TensorDataset]:
    """(to train with, to test with): images of shape (1, 8, 8) in [-1, 1], and classes."""
    images, classes = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    y = torch.tensor(classes)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return tuple(TensorDataset(x[part], y[part]) for part in (order[:TRAIN], order[TRAIN:]))  # type: ignore[return-value]
