"""Files of rk.save_sparse that rk.load_sparse refuses, and that no file is ever written half."""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builds import generator
from torch import Tensor, nn

import rvsm_kernels as rk
from models import assert_same_state, run_afresh, small
from runner import same_bits
from rvsm_kernels.model import sparse_file
from rvsm_kernels.model.sparse_format import BITMASK, DENSE

pytest.importorskip("safetensors")

# ---- files that are refused ------------------------------------------------------------------------------------------


def tiny(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(60, 20), nn.BatchNorm1d(20), nn.Linear(20, 60))
    with torch.no_grad():
        model[0].weight[model[0].weight.abs() < 0.12] = 0
        model[2].weight[model[2].weight.abs() < 0.15] = 0
    return model


def check_refused(file: Path, model: nn.Module, match: str) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        rk.load_sparse(model, file)
    assert all(same_bits(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("every", [13, pytest.param(1, marks=pytest.mark.slow)])
def test_flipped_bits_are_refused(every: int, tmp_path: Path) -> None:
    """One bit of a byte of the header, and of the rest at fewer places."""
    model, other = tiny(), tiny(1)
    saved = rk.save_sparse(model, tmp_path / "x")
    assert {t.form for t in saved.tensors} >= {DENSE, BITMASK}
    file = (tmp_path / "x").read_bytes()
    header = 8 + struct.unpack("<Q", file[:8])[0]
    gen = np.random.default_rng(0)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    for at in [*range(0, header, every), *range(header, len(file), 5 * every)]:
        damaged = bytearray(file)
        damaged[at] ^= 1 << int(gen.integers(8))
        (tmp_path / "y").write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            rk.load_sparse(other, tmp_path / "y")
    assert all(same_bits(value, before[name]) for name, value in other.state_dict().items())
    rk.load_sparse(other, tmp_path / "x")


def test_truncated_and_other_files_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model, file = tiny(), tmp_path / "x"
    rk.save_sparse(model, file)
    whole = file.read_bytes()
    for size in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        check_refused(file, model, "damaged")
    file.write_bytes(whole + b"\0")
    check_refused(file, model, "damaged")
    torch.save(model.state_dict(), file)
    check_refused(file, model, "was not written by save_sparse")
    save_file(model.state_dict(), file)
    check_refused(file, model, "was not written by save_sparse")
    with pytest.raises(FileNotFoundError):
        rk.load_sparse(model, tmp_path / "nothing")
    with pytest.raises(OSError):  # noqa: PT011
        rk.load_sparse(model, tmp_path)


OTHERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a layer more": (lambda: nn.Sequential(*tiny(), nn.Linear(2, 2)), r"it has no 3\.weight; it has no 3\.bias"),
    "a layer less": (lambda: tiny()[:2], r"the model has no 2\.weight"),
    "another size": (
        lambda: nn.Sequential(nn.Linear(60, 20), nn.BatchNorm1d(20), nn.Linear(20, 61)),
        r"2\.weight is \[60, 20\] there and \[61, 20\] in the model",
    ),
    "transposed": (lambda: nn.Sequential(nn.Linear(20, 60), *tiny()[1:]), r"\[20, 60\] there and \[60, 20\]"),
    "another type": (lambda: tiny().half(), "is float32 there and float16 in the model"),
    "tied": (lambda: _tie(tiny()), r"2\.weight is 0\.weight in the model|0\.weight"),
}


def _tie(model: nn.Module) -> nn.Module:
    model[2] = nn.Linear(60, 20)
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize(("other", "match"), OTHERS.values(), ids=OTHERS)
def test_files_of_other_models_are_refused(other: Callable[[], nn.Module], match: str, tmp_path: Path) -> None:
    rk.save_sparse(tiny(), tmp_path / "x")
    check_refused(tmp_path / "x", other(), f"is of another model: .*{match}")


FORGED: dict[str, Callable[[list[Any], dict[str, Tensor]], Any]] = {
    "a block left over": lambda entries, blocks: blocks.update({"values/more": torch.ones(2)}),
    "a block missing": lambda entries, blocks: blocks.pop("values/0.bias"),
    "an entry twice": lambda entries, blocks: entries.append(entries[0]),
    "no list": lambda entries, blocks: entries[0].__setitem__("shape", 7),
    "a size below 0": lambda entries, blocks: entries[0].__setitem__("shape", [-20, -60]),
    "an unknown word": lambda entries, blocks: entries[0].__setitem__("code", "import os"),
    "an unknown form": lambda entries, blocks: entries[0].__setitem__("form", "pickle"),
    "as one that is not there": lambda entries, blocks: entries[1].__setitem__("same", "2.bias"),
    "int8 without scales": lambda entries, blocks: entries[0].__setitem__("int8", [0]),
    "int8 along no dimension": lambda entries, blocks: entries[0].__setitem__("int8", [2]),
    "rows of another length": lambda entries, blocks: entries[0].update(form="csr", row=257),
}


@pytest.mark.parametrize("forge", FORGED.values(), ids=FORGED)
def test_forged_files_are_refused(forge: Callable[[list[Any], dict[str, Tensor]], Any], tmp_path: Path) -> None:
    """Those whose checksum is right."""
    rk.save_sparse(tiny(), tmp_path / "x")
    entries, blocks = sparse_file.read(tmp_path / "x")
    raw = [entry.to_json() for entry in entries]
    forge(raw, blocks)
    forged = [type("Raw", (), {"to_json": lambda self, r=r: r})() for r in raw]
    sparse_file.write(tmp_path / "y", forged, {key: block.clone() for key, block in blocks.items()})
    check_refused(tmp_path / "y", tiny(1), "damaged")


def test_a_later_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sparse_file, "VERSION", 2)
        rk.save_sparse(tiny(), tmp_path / "x")
    check_refused(tmp_path / "x", tiny(), "is of version '2' of its format; this release reads 1")


class Extra(nn.Module):
    def get_extra_state(self) -> Any:
        return {"a": 1}

    def set_extra_state(self, state: Any) -> None:
        raise AssertionError


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "no module": (dict, "takes a module, but got a dict"),
    "lazy": (lambda: nn.LazyLinear(3), "weight is lazy"),
    "meta": (lambda: nn.Linear(3, 3, device="meta"), "weight is a meta tensor"),
    "no tensor": (Extra, "_extra_state is no tensor but a dict"),
    "complex128": (lambda: nn.Linear(3, 3, dtype=torch.complex128), "of torch.complex128"),
}


@pytest.mark.parametrize(("model", "match"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_saved(model: Callable[[], Any], match: str, tmp_path: Path) -> None:
    rk.save_sparse(tiny(), tmp_path / "x")
    with pytest.raises(TypeError, match=match):
        rk.save_sparse(model(), tmp_path / "y")
    with pytest.raises(TypeError, match=match):
        rk.load_sparse(model(), tmp_path / "x")
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("forms", [(), "dense", ("zip",)], ids=str)
def test_unknown_forms(forms: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="forms are some of dense, bitmask, csr"):
        rk.save_sparse(tiny(), tmp_path / "x", forms=forms)


def test_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (rk.save_sparse, rk.load_sparse):
        with pytest.raises(ImportError, match="pip install safetensors"):
            call(tiny(), tmp_path / "x")


# ---- nothing is written half -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_an_older_file_survives(error: BaseException, where: str, tmp_path: Path, monkeypatch: Any) -> None:
    model = tiny()
    rk.save_sparse(model, tmp_path / "x")
    before = (tmp_path / "x").read_bytes()

    def fail(*arguments: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, where, fail)
        for name in ("x", "y"):
            with pytest.raises(type(error)):
                rk.save_sparse(tiny(1), tmp_path / name)
    assert os.listdir(tmp_path) == ["x"] and (tmp_path / "x").read_bytes() == before
    rk.save_sparse(tiny(1), tmp_path / "x")
    assert_same_state(rk.load_sparse(model, tmp_path / "x"), tiny(1))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="a limit on the size of files")
def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """As large a file as the limit lets be: the write itself fails, half way."""
    rk.save_sparse(small(), tmp_path / "x")
    before = (tmp_path / "x").read_bytes()
    done = run_afresh(
        "import resource, signal, rvsm_kernels as rk; from models import small\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "try: rk.save_sparse(small(seed=1), 'x')\n"
        "except OSError as error: print('refused', error)\n",
        tmp_path,
    )
    assert "refused x cannot be written" in done.stdout, done.stderr
    assert os.listdir(tmp_path) == ["x"] and (tmp_path / "x").read_bytes() == before


def test_links_and_missing_folders(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "folder" / "x")
    rk.save_sparse(tiny(), str(link))
    assert link.is_symlink() and os.listdir(tmp_path / "folder") == ["x"]
    assert_same_state(rk.load_sparse(tiny(1), link), tiny())
    with pytest.raises(OSError, match="cannot be written"):
        rk.save_sparse(tiny(), tmp_path / "none" / "x")
    with pytest.raises(OSError):  # noqa: PT011
        rk.save_sparse(tiny(), tmp_path / "folder")
    assert sorted(os.listdir(tmp_path)) == ["folder", "link"]


@pytest.mark.slow
def test_25_million_elements_in_seconds(tmp_path: Path) -> None:
    import time

    w = torch.randn(5000, 5000, generator=generator(0))
    model = nn.Linear(5000, 5000, bias=False)
    model.weight = nn.Parameter(w.where(w.abs() > 1.6, 0))
    start = time.perf_counter()
    saved = rk.save_sparse(model, tmp_path / "x")
    other = rk.load_sparse(nn.Linear(5000, 5000, bias=False), tmp_path / "x")
    assert time.perf_counter() - start < 30  # two on an idle machine
    assert torch.equal(other.weight, model.weight) and saved.file_bytes < 0.18 * saved.dense_bytes
