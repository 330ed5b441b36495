"""rk.save_sparse and rk.load_sparse: small, exact, refused when damaged, never half written."""

from __future__ import annotations

import copy
import json
import os
import struct
import subprocess
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
from models import batch, small
from runner import same_bits
from rvsm_kernels.model import sparse_file, sparse_format
from rvsm_kernels.model.sparse_format import BITMASK, CSR, DENSE, decode, dequantize, encode, quantize

pytest.importorskip("safetensors")

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def sparse_small(share: float = 0.9, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A net whose weights are zero in a share of their elements, by magnitude."""
    model = small(dtype, seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() >= 2:
                p[p.abs() <= p.abs().flatten().double().quantile(share)] = 0
    return model


def check_same(model: nn.Module, other: nn.Module) -> None:
    """Every element of the state_dicts, bit for bit; zeros of either sign are equal."""
    a, b = model.state_dict(), other.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert same_bits(a[name], b[name]) or torch.equal(a[name], b[name]), name


def round_trip(model: nn.Module, other: nn.Module, tmp_path: Path, **options: Any) -> Any:
    saved = rk.save_sparse(model, tmp_path / "x", **options)
    assert rk.load_sparse(other, tmp_path / "x") is other
    return saved


# ---- the elements of a tensor ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8], ids=str)
@pytest.mark.parametrize(
    ("size", "share", "form"),
    [
        (0, 0.0, DENSE),
        (1, 0.0, DENSE),
        (3000, 0.0, DENSE),
        (5000, 0.6, BITMASK),
        (5001, 0.99, CSR),
        (70_000, 0.9999, CSR),
        (70_000, 1.0, CSR),
    ],
)
def test_every_form_comes_back(size: int, share: float, form: str, dtype: torch.dtype) -> None:
    gen = generator(size)
    flat = (torch.randn(size, generator=gen).clamp(-9, 9) * 10).to(dtype)
    flat[flat == 0] = 1
    flat[torch.rand(size, generator=gen) < share] = 0
    stored = encode(flat)
    assert stored.form == form or dtype in (torch.int8, torch.float64)
    bytes_of = {}
    for forms in ((DENSE,), (BITMASK,), (CSR,), (DENSE, BITMASK, CSR)):
        stored = encode(flat, forms)
        assert stored.form in forms
        back = decode(stored.form, stored.row, stored.blocks, size, dtype)
        assert same_bits(back, flat) if flat.is_floating_point() else torch.equal(back, flat)
        extra = 96 * (len(stored.blocks) - 1)
        bytes_of[forms] = extra + sum(b.numel() * b.element_size() for b in stored.blocks.values())
    assert bytes_of[DENSE, BITMASK, CSR] == min(bytes_of.values())


def test_special_elements() -> None:
    flat = torch.zeros(2000)
    flat[::100] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e-45, -1e-45]).repeat(4)
    flat[1::2] = -0.0
    for form in (BITMASK, CSR):
        stored = encode(flat, [form])
        assert len(stored.blocks["values"]) == 20
        back = decode(form, stored.row, stored.blocks, 2000, torch.float32)
        assert same_bits(back[::100], flat[::100])
        assert same_bits(back[1::2], torch.zeros(1000))  # zeros of either sign come back as +0
    assert same_bits(decode(DENSE, 0, encode(flat, [DENSE]).blocks, 2000, torch.float32), flat)


def _put(at: int, value: Callable[[Tensor], int]) -> Callable[[Tensor], None]:
    """A change of one element."""

    def change(t: Tensor) -> None:
        t[at] = value(t)

    return change


def _with(blocks: dict[str, Tensor], name: str, change: Callable[[Tensor], Any]) -> dict[str, Tensor]:
    changed = {key: block.clone() for key, block in blocks.items()}
    wide = changed[name].long() if not changed[name].is_floating_point() else changed[name]
    found = change(wide)
    changed[name] = (wide if found is None else found).to(changed[name].dtype)
    return changed


WRONG: dict[str, tuple[str, str, Callable[[Tensor], Any]]] = {
    "a value too few": (CSR, "values", lambda t: t[1:]),
    "a column too many": (CSR, "columns", lambda t: torch.cat([t, t[:1]])),
    "columns out of order": (CSR, "columns", lambda t: t.flip(0)),
    "a column twice": (CSR, "columns", _put(1, lambda t: int(t[0]))),
    "beyond the end": (CSR, "columns", _put(-1, lambda t: 255)),
    "rows begin late": (CSR, "rows", _put(0, lambda t: 1)),
    "rows end early": (CSR, "rows", _put(-1, lambda t: 1)),
    "rows go back": (CSR, "rows", _put(1, lambda t: int(t[2]) + 1)),
    "a row too few": (CSR, "rows", lambda t: t[1:]),
    "a bit too many": (BITMASK, "mask", _put(0, lambda t: 255)),
    "a byte too few": (BITMASK, "mask", lambda t: t[1:]),
    "bits beyond the end": (BITMASK, "mask", _put(-1, lambda t: int(t[-1]) | 128)),
    "a value too many": (BITMASK, "values", lambda t: torch.cat([t, t[:1]])),
    "dense, a value too few": (DENSE, "values", lambda t: t[1:]),
}


@pytest.mark.parametrize(("form", "name", "change"), WRONG.values(), ids=WRONG)
def test_blocks_that_do_not_fit(form: str, name: str, change: Callable[[Tensor], Any]) -> None:
    """With a checksum that is right: bounds are looked at too."""
    flat = torch.zeros(1001)
    flat[5::17] = 1.5
    stored = encode(flat, [form])
    assert same_bits(decode(form, stored.row, stored.blocks, 1001, flat.dtype), flat)
    with pytest.raises(ValueError):  # noqa: PT011
        decode(form, stored.row, _with(stored.blocks, name, change), 1001, flat.dtype)
    missing = {key: block for key, block in stored.blocks.items() if key != name}
    with pytest.raises(ValueError, match=f"no {name} of"):
        decode(form, stored.row, missing, 1001, flat.dtype)


def test_other_forms_are_refused() -> None:
    for form, row in (("zip", 0), (CSR, 0), (CSR, 100)):
        with pytest.raises(ValueError, match="no form"):
            decode(form, row, {"values": torch.ones(1)}, 1, torch.float32)


# ---- whole models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.97])
def test_a_model_comes_back(share: float, dtype: torch.dtype, tmp_path: Path) -> None:
    model, other = sparse_small(share, dtype=dtype), small(dtype, seed=3)
    before = copy.deepcopy(model)
    saved = round_trip(model, other, tmp_path)
    check_same(model, other)
    check_same(model, before)
    assert saved.file_bytes == os.path.getsize(tmp_path / "x")
    if share > 0:
        x = batch(0, dtype)[0]
        assert torch.equal(model.eval()(x), other.eval()(x))


@pytest.mark.parametrize("penalty", ["l0", "l1", "tl1", "topk"])
def test_u_comes_back(penalty: str, tmp_path: Path) -> None:
    model = small()
    optimizer = rk.RVSM(rk.param_groups(model, penalty=penalty, lam=0.02, beta=1.0, density=0.2), lr=0.1)
    net, other = rk.sparse_copy(model, optimizer), small(seed=3)
    saved = round_trip(net, other, tmp_path)
    check_same(net, other)
    zeros = {t.name: t.zeros for t in saved.tensors}
    assert all(zeros[row.name] == row.zeros for row in optimizer.sparsity().rows)
    with optimizer.sparse_weights(model):
        assert round_trip(model, other, tmp_path) == saved


class Odd(nn.Module):
    """Tensors of every kind that a state_dict can have."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        gen = generator(seed)

        def sparse(*shape: int) -> Tensor:
            w = torch.randn(shape, generator=gen)
            return w.where(torch.rand(shape, generator=gen) < 0.1, 0)

        self.last = nn.Parameter(sparse(8, 16, 5, 5).to(memory_format=torch.channels_last))
        self.transposed = nn.Parameter(sparse(40, 30).t())
        self.gaps = nn.Parameter(sparse(40, 60)[:, ::2])
        self.scalar = nn.Parameter(torch.randn((), generator=gen))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.sixteen = nn.Parameter(sparse(50, 50).half())
        self.sixty_four = nn.Parameter(sparse(50, 50).double())
        self.pairs = nn.Parameter(torch.view_as_complex(sparse(20, 20, 2).contiguous()))
        self.frozen = nn.Parameter(sparse(30, 30), requires_grad=False)
        self.register_buffer("flags", torch.rand(70, generator=gen) < 0.5)
        self.register_buffer("counts", torch.randint(-5, 5, (4, 3), generator=gen))
        self.register_buffer("bytes", torch.randint(0, 255, (9,), generator=gen, dtype=torch.uint8))
        self.register_buffer("float8", torch.randn(9, generator=gen).to(torch.float8_e4m3fn))
        self.register_buffer("wide", torch.arange(3).to(torch.uint16))
        self.register_buffer("unsaved", torch.randn(3, generator=gen), persistent=False)


def test_types_and_layouts(tmp_path: Path) -> None:
    model, other = Odd(0), Odd(1)
    unsaved, strides = other.unsaved.clone(), {name: t.stride() for name, t in other.state_dict().items()}
    places = {name: t.data_ptr() for name, t in other.state_dict().items()}
    saved = round_trip(model, other, tmp_path)
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)) if name == "float8" else torch.equal(a, b), name
        assert b.stride() == strides[name] and b.data_ptr() == places[name]
    assert torch.equal(other.unsaved, unsaved)
    forms = {t.name: t.form for t in saved.tensors}
    assert {forms[name] for name in ("last", "transposed", "gaps", "sixteen", "sixty_four", "frozen")} <= {BITMASK, CSR}
    assert forms["flags"] == forms["counts"] == forms["pairs"] == forms["empty"] == DENSE
    dense = other.to(memory_format=torch.contiguous_format)
    rk.load_sparse(dense, tmp_path / "x")  # into other layouts
    assert torch.equal(dense.last, model.last)


class Tied(nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(20, 20), nn.Linear(20, 20)
        self.b.weight = self.a.weight if tied else nn.Parameter(torch.ones(20, 20))


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    model, other = Tied(), Tied()
    saved = round_trip(model, other, tmp_path)
    check_same(model, other)
    assert [(t.form, t.bytes) for t in saved.tensors if t.name == "b.weight"] == [("as a.weight", 0)]
    assert saved.dense_bytes == 4 * (400 + 20 + 20)
    loose = Tied(tied=False)
    rk.load_sparse(loose, tmp_path / "x")  # both get the elements
    assert torch.equal(loose.b.weight, model.a.weight) and loose.b.weight is not loose.a.weight
    loose.b.weight.data.fill_(2)
    rk.save_sparse(loose, tmp_path / "y")
    before = model.a.weight.clone()
    with pytest.raises(ValueError, match=r"b\.weight is a\.weight in the model, but another tensor there"):
        rk.load_sparse(model, tmp_path / "y")
    assert torch.equal(model.a.weight, before)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "csr": Tensor.to_sparse_csr,
    "csc": Tensor.to_sparse_csc,
    "bsr": lambda t: t.to_sparse_bsr((2, 4)),
    "coo": Tensor.to_sparse,
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_sparse_tensors(layout: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    def net(seed: int) -> tuple[nn.Module, Tensor]:
        dense = sparse_small(0.9, seed).head.weight.detach()[:, :12]
        model = nn.Sequential(nn.Linear(12, 4), nn.Linear(4, 4))
        model[0].weight = nn.Parameter(layout(dense), requires_grad=False)
        model[1].register_buffer("more", layout(dense))
        return model, dense

    (model, dense), (other, _) = net(0), net(1)
    saved = round_trip(model, other, tmp_path)
    for t, like in ((other[0].weight, model[0].weight), (other[1].more, model[1].more)):
        assert t.layout == like.layout and torch.equal(t.to_dense(), dense)
    assert isinstance(other[0].weight, nn.Parameter) and not other[0].weight.requires_grad
    assert torch.equal(other[1].weight, model[1].weight)
    assert {t.name: t.zeros for t in saved.tensors}["0.weight"] == int((dense == 0).sum())
    plain = nn.Sequential(nn.Linear(12, 4), nn.Linear(4, 4))
    plain[1].register_buffer("more", torch.zeros(4, 12))
    rk.load_sparse(plain, tmp_path / "x")
    assert torch.equal(plain[0].weight, dense)


def test_wrappers_are_left_away(tmp_path: Path) -> None:
    model, other = sparse_small(), small(seed=3)
    rk.save_sparse(torch.compile(nn.DataParallel(model), backend="eager"), tmp_path / "x")
    compiled = torch.compile(other, backend="eager")
    assert rk.load_sparse(compiled, tmp_path / "x") is compiled
    check_same(model, other)


def _run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A fresh process, in a folder."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[2])])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200, check=False
    )


def test_a_fresh_process_predicts_the_same(tmp_path: Path) -> None:
    model = sparse_small(0.8).eval()
    x = batch(0)[0]
    wanted = []
    for name, int8 in (("exact", False), ("int8", True)):
        rk.save_sparse(model, tmp_path / name, int8=int8)
        wanted.append(rk.load_sparse(small(seed=4), tmp_path / name).eval()(x))
    assert torch.equal(wanted[0], model(x)) and not torch.equal(*wanted)
    torch.save([x, *wanted], tmp_path / "wanted.pt")
    done = _run(
        "import torch, rvsm_kernels as rk; from models import small\n"
        "x, *wanted = torch.load('wanted.pt')\n"
        "for name, y in zip(('exact', 'int8'), wanted):\n"
        "    assert torch.equal(rk.load_sparse(small(seed=9), name).eval()(x), y)\n",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr


# ---- int8 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_no_element_is_off_by_more_than_half_a_scale(dtype: torch.dtype) -> None:
    gen = generator(1)
    for shape, dims in (((9, 30), (0,)), ((9, 30), (1,)), ((4, 5, 3, 3), (0,)), ((3, 4, 8), (0, 1)), ((3, 4), (0, 1))):
        w = torch.randn(shape, generator=gen, dtype=torch.float64)
        w *= torch.logspace(-6, 3, shape[0], dtype=torch.float64).reshape(-1, *[1] * (len(shape) - 1))
        w = w.to(dtype)
        w[w.abs() < 1e-6] = 0
        w[-1] = 0
        values, scales = quantize(w, dims)
        back = dequantize(values, scales, dims, dtype)
        spread = scales.double().reshape([n if d in dims else 1 for d, n in enumerate(shape)])
        rounding = w.double().abs() * torch.finfo(dtype).eps + 1e-7 * spread
        rounding += torch.finfo(dtype).tiny * torch.finfo(dtype).eps  # of what is less than normal
        assert ((back - w).double().abs() <= spread / 2 + rounding).all()
        assert (back[w == 0] == 0).all() and values.abs().max() == 127 and back.dtype == dtype


def test_scales_at_the_ends_of_float32() -> None:
    for w in (torch.tensor([[1e-45, 0.0]]), torch.tensor([[1e-60, 1e-300]], dtype=torch.float64)):
        back = dequantize(*quantize(w, (0,)), (0,), w.dtype)
        assert ((back - w).abs() <= torch.finfo(torch.float32).tiny).all()
    for bad in (torch.nan, torch.inf, 1e300):
        with pytest.raises(ValueError, match="not finite, or too large"):
            quantize(torch.tensor([[bad, 1.0]], dtype=torch.float64), (0,))


class Channels(nn.Module):
    """Layers whose output channels lie in dimensions of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv2d(4, 6, 3), nn.ConvTranspose2d(4, 6, 3)
        self.grouped, self.lstm = nn.ConvTranspose2d(4, 6, 3, groups=2), nn.LSTM(4, 3)
        self.words, self.norm = nn.Embedding(7, 4), nn.LayerNorm([2, 3])
        self.running = nn.BatchNorm2d(4)


def test_int8_by_output_channel(tmp_path: Path) -> None:
    model, other = Channels(), Channels()
    saved = round_trip(model, other, tmp_path, int8=True)
    int8 = {t.name for t in saved.tensors if t.int8}
    assert int8 == {
        *("conv.weight", "up.weight", "grouped.weight", "words.weight", "norm.weight"),
        *("lstm.weight_ih_l0", "lstm.weight_hh_l0"),
    }
    for name, dim in {"conv": 0, "up": 1, "grouped": 0}.items():
        w, back = (m.get_submodule(name).weight.detach().transpose(0, dim).flatten(1) for m in (model, other))
        bound = w.abs().amax(1, keepdim=True) / 127 / 2 * (1 + 1e-5)
        assert ((w - back).abs() <= bound).all() and not torch.equal(w, back)
    for name, a in model.state_dict().items():
        assert name in int8 or torch.equal(a, other.state_dict()[name])
    with torch.no_grad():
        model.conv.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"conv\.weight has elements that are not finite"):
        rk.save_sparse(model, tmp_path / "y", int8=True)
    assert os.listdir(tmp_path) == ["x"]


# ---- sizes -----------------------------------------------------------------------------------------------------------


def test_sizes_are_those_of_the_file(tmp_path: Path) -> None:
    for share in (0.0, 0.5, 0.9, 0.99):
        model = nn.Sequential(nn.Linear(300, 200), nn.BatchNorm1d(200), nn.Linear(200, 7))
        with torch.no_grad():
            for p in model.parameters():
                p[torch.rand(p.shape, generator=generator(2)) < share] = 0
        sizes = {}
        for int8 in (False, True):
            for forms in ((DENSE,), (BITMASK,), (CSR,), sparse_format.FORMS):
                saved = rk.save_sparse(model, tmp_path / "x", int8=int8, forms=forms)
                file = (tmp_path / "x").read_bytes()
                header = 8 + struct.unpack("<Q", file[:8])[0]
                assert len(file) == saved.file_bytes == header + sum(t.bytes for t in saved.tensors)
                sizes[int8, forms] = saved.file_bytes
                assert saved.dense_bytes == sum(t.numel() * t.element_size() for t in model.state_dict().values())
                told = saved.to_dict()
                assert json.loads(json.dumps(told))["file_bytes"] == len(file)
                assert f"{len(file):,}" in str(saved)
            every = [sizes[int8, forms] for forms in ((DENSE,), (BITMASK,), (CSR,))]
            assert sizes[int8, sparse_format.FORMS] <= min(every) + 200  # the header is only known roughly
        assert share < 0.9 or sizes[False, sparse_format.FORMS] < 0.25 * sizes[False, (DENSE,)]


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
    check_same(rk.load_sparse(model, tmp_path / "x"), tiny(1))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="a limit on the size of files")
def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """As large a file as the limit lets be: the write itself fails, half way."""
    rk.save_sparse(small(), tmp_path / "x")
    before = (tmp_path / "x").read_bytes()
    done = _run(
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
    check_same(rk.load_sparse(tiny(1), link), tiny())
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
