"""rk.save_sparse and rk.load_sparse: small, exact, refused when damaged, never half written."""

from __future__ import annotations

import copy
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builds import generator
from torch import Tensor, nn

import rvsm_kernels as rk
from models import assert_same_state, batch, run_afresh, small
from rvsm_kernels.model import sparse_format
from rvsm_kernels.model.sparse_format import BITMASK, CSR, DENSE, dequantize, quantize

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


def round_trip(model: nn.Module, other: nn.Module, tmp_path: Path, **options: Any) -> Any:
    saved = rk.save_sparse(model, tmp_path / "x", **options)
    assert rk.load_sparse(other, tmp_path / "x") is other
    return saved


# ---- whole models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.97])
def test_a_model_comes_back(share: float, dtype: torch.dtype, tmp_path: Path) -> None:
    model, other = sparse_small(share, dtype=dtype), small(dtype, seed=3)
    before = copy.deepcopy(model)
    saved = round_trip(model, other, tmp_path)
    assert_same_state(model, other)
    assert_same_state(model, before)
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
    assert_same_state(net, other)
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
    assert_same_state(model, other)
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
    assert_same_state(model, other)


def test_a_fresh_process_predicts_the_same(tmp_path: Path) -> None:
    model = sparse_small(0.8).eval()
    x = batch(0)[0]
    wanted = []
    for name, int8 in (("exact", False), ("int8", True)):
        rk.save_sparse(model, tmp_path / name, int8=int8)
        wanted.append(rk.load_sparse(small(seed=4), tmp_path / name).eval()(x))
    assert torch.equal(wanted[0], model(x)) and not torch.equal(*wanted)
    torch.save([x, *wanted], tmp_path / "wanted.pt")
    done = run_afresh(
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
