"""Fashion-MNIST for ``python -m bench accuracy``: the images, from IDX files, and a fully connected net."""

from __future__ import annotations

import gzip
from pathlib import Path

import torch
from torch import Tensor, nn

from .config import ROOT, MissingPackage
from .digits import Images

FOLDERS = (Path("/usr/share/datasets/fashion-mnist"), ROOT / "data" / "fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts the files, and where a user may."""

TRAIN, TEST = 20_000, 10_000
"""How many images, the first ones of each file."""

_MOST_BYTES = 60_000 * 28 * 28 + 16


def _file(name: str) -> Path:
    for folder in FOLDERS:
        for path in (folder / f"{name}.gz", folder / name):
            if path.is_file():
                return path
    raise MissingPackage(
        f"Fashion-MNIST is not in {FOLDERS[0]} nor in data/fashion-mnist of the clone: install Debian's package"
        " dataset-fashion-mnist, or put its four IDX files there"
    )


def _bytes(name: str, header: int) -> Tensor:
    """What stands behind the header of an IDX file, plain or packed by gzip."""
    path = _file(name)
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        data = bytearray(file.read(_MOST_BYTES))
    if data[:4] != bytes([0, 0, 8, (header - 4) // 4]):
        raise MissingPackage(f"{path.name} in {path.parent} is no IDX file of bytes")
    return torch.frombuffer(data, dtype=torch.uint8)[header:]


def _images(part: str, count: int) -> Images:
    x, y = _bytes(f"{part}-images-idx3-ubyte", 16), _bytes(f"{part}-labels-idx1-ubyte", 8)
    return Images(x.reshape(-1, 1, 28, 28)[:count].float(), y[:count].long())


def check() -> None:
    """Raises MissingPackage where a file is not there."""
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            _file(f"{part}-{kind}-ubyte")


def train_and_test() -> tuple[Images, Images]:
    """20,000 images to train with and the 10,000 to test with, shifted and scaled to mean 0 and deviation 1."""
    train, test = _images("train", TRAIN), _images("t10k", TEST)
    mean, std = train.x.mean(), train.x.std()
    return Images((train.x - mean) / std, train.y), Images((test.x - mean) / std, test.y)


class Net(nn.Sequential):
    """Four linear layers (784-300-100-100-10) with batch norm between them: LeNet-300-100 with one layer more.

    277,210 parameters, of which 276,200 are weights to penalise. Behind the first layer there are 500 neurons.
    """

    def __init__(self) -> None:
        super().__init__(nn.Flatten())
        for i, (inputs, outputs) in enumerate([(784, 300), (300, 100), (100, 100)], 1):
            self.add_module(f"linear{i}", nn.Linear(inputs, outputs, bias=False))
            self.add_module(f"norm{i}", nn.BatchNorm1d(outputs))
            self.add_module(f"relu{i}", nn.ReLU())
        self.add_module("linear4", nn.Linear(100, 10))
