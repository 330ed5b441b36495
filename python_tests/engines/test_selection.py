"""The compiled selection of top-k's cuts against torch's: the same numbers, whatever was there before.

Each test runs with the loops of the CPU, and with the kernels of CUDA interpreted on the host.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from builds import generator
from torch import Tensor, nn

import rvsm_kernels as rk
from rvsm_kernels.engines import cuts, histograms, native
from rvsm_kernels.method.dtypes import opmath_type
from rvsm_kernels.method.groups import Blocks, Grouping
from rvsm_kernels.method.precision import split
from rvsm_kernels.method.selection import Candidates, Room, Selection, cut_of
from rvsm_kernels.method.selection import select as select_in_torch

pytestmark = [
    pytest.mark.skipif(native.load_error is not None, reason=str(native.load_error)),
    pytest.mark.usefixtures("on_cpu"),
]


@pytest.fixture(autouse=True, params=["loops", "kernels"])
def selecting(request: pytest.FixtureRequest) -> Iterator[str]:
    native._C.interpret_cuda(request.param == "kernels")
    yield request.param
    native._C.interpret_cuda(False)


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DENSITIES = (1e-6, 0.1, 0.5, 0.999, 1.0)

TENSORS: dict[str, Callable[[Any], Tensor]] = {
    "normal": lambda shape: torch.randn(shape, generator=generator(0)),
    "all equal": lambda shape: torch.full(shape, 0.25),
    "zeros": lambda shape: torch.zeros(shape),
    "few values": lambda shape: torch.randint(-3, 4, shape, generator=generator(0)).float(),
    "mostly zero": lambda shape: torch.randn(shape, generator=generator(0)).clamp_min(1) - 1,
    "denormal": lambda shape: torch.randn(shape, generator=generator(0)) * 2.0**-135,
    "wide": lambda shape: (torch.randn(shape, generator=generator(0)) * 20).exp(),
    "sorted": lambda shape: torch.arange(math.prod(shape)).float().reshape(shape),
}


def selection(
    w: Tensor, density: float, group_dim: Grouping = None, master: Tensor | None = None, dual: Tensor | None = None
) -> Selection:
    return Selection.by_density(Room.like(w), [Candidates(w, master, dual, group_dim)], density)


def in_torch(s: Selection) -> Tensor:
    """The cut by torch's selection."""
    other = dataclasses.replace(s, cut=torch.zeros_like(s.cut))
    select_in_torch([other])
    return other.cut


def check_cut(s: Selection) -> None:
    """The compiled cut is torch's bit for bit; again, around the last cut, and after an edit of the weights."""
    ws = [c.w for c in s.candidates]
    edits: list[Callable[[], Any]] = [
        lambda: None,
        lambda: None,
        lambda: [w.mul_(1.0001) for w in ws],
        lambda: [w.mul_(-3.0) for w in ws],
        lambda: ws[0].view(-1)[: ws[0].numel() // 2].zero_(),
        lambda: [w.add_(1) for w in ws],
        lambda: s.last.copy_(torch.tensor([2**62, 5])),
        lambda: s.last.copy_(torch.tensor([-7, -7])),
    ]
    for edit in edits:
        edit()
        cuts.select([s])
        want = in_torch(s)
        assert torch.equal(s.cut, want), (s.survivors, s.cut.item(), want.item())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TENSORS)
def test_cut_is_that_of_a_sort(name: str, dtype: torch.dtype, threads: int) -> None:
    for shape in ((1,), (2,), (3, 5), (2049,), (300, 331)):
        for density in DENSITIES:
            check_cut(selection(TENSORS[name](shape).to(dtype), density))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_counts_as_the_largest(dtype: torch.dtype) -> None:
    for count, density in ((3, 0.5), (5000, 0.5), (5000, 0.3)):
        w = torch.randn(count, generator=generator(1)).to(dtype)
        w[::3] = math.nan
        w[1::5] = -math.inf
        for _ in range(2):
            s = selection(w, density)
            cuts.select([s])
            want = cut_of(w, density).to(s.cut.dtype)
            assert torch.equal(s.cut, want) or (s.cut.isnan() and want.isnan())


def test_sizes_without_elements_and_with_one() -> None:
    room = Room.like(torch.zeros(0))
    torch.ops.rvsm_kernels.cuts_([room.cut], [room.last], [torch.zeros(0)], [None], [None], [0])
    assert room.cut.item() == -1
    one = selection(torch.tensor([-2.0]), 0.5)
    cuts.select([one])
    assert one.cut.item() == -1, "the only element survives"


@pytest.mark.parametrize("group_dim", [0, 1, (0, 1), (), Blocks(0, 3), (0, 1, 2, 3)], ids=repr)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups(group_dim: Grouping, dtype: torch.dtype, threads: int) -> None:
    """Halfway between two norms, which torch and the kernels may sum in another order."""
    for channels_last in (False, True):
        w = torch.randn(60, 35, 3, 3, generator=generator(2)).to(dtype)
        if channels_last and group_dim != (0, 1):
            w = w.contiguous(memory_format=torch.channels_last)
        for density in (0.1, 0.5, 1.0):
            s = selection(w, density, group_dim)
            for _ in range(2):
                cuts.select([s])
                want = in_torch(s)
                torch.testing.assert_close(s.cut, want, rtol=4 * torch.finfo(want.dtype).eps, atol=0)


def test_groups_of_one_element_out_of_the_range_of_squares() -> None:
    w = torch.tensor([[1e-200, 3e-200, 1e200]], dtype=torch.float64)
    s = selection(w, 0.5, (0, 1))
    cuts.select([s])
    assert s.cut.item() == cut_of(w, 0.5, (0, 1)).item() == 2e-200 or s.cut.item() == 1e-200


@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_dim", [None, 0])
def test_states_beside_the_weights(
    group_dim: Grouping, dtype: torch.dtype, dual: bool, master: bool, threads: int
) -> None:
    if master and dtype not in (torch.bfloat16, torch.float16):
        pytest.skip("masters stand behind half types")
    w = torch.randn(400, 300, generator=generator(3))
    p, rest = (split(w) if dtype == torch.bfloat16 else (w.half(), w)) if master else (w.to(dtype), None)
    y = 0.3 * torch.randn(400, 300, generator=generator(4)) if dual else None
    y = y if y is None or master else y.to(dtype)
    for transposed in (False, True):
        if transposed and y is not None:  # another layout than the parameter's
            y = y.t().contiguous().t()
        s = selection(p, 0.3, group_dim, rest, y)
        cuts.select([s])
        want = in_torch(s)
        torch.testing.assert_close(s.cut, want, rtol=0 if group_dim is None else 1e-6, atol=0)


def test_layouts() -> None:
    """Slices and expanded rows of a larger tensor."""
    w = torch.randn(40, 50, generator=generator(5))
    for view in (w.t(), w[::2], w[:, 3:9], w[:1].expand(8, 50)):
        for density in (0.2, 0.7):
            s = selection(view, density)
            cuts.select([s])
            assert torch.equal(s.cut, cut_of(view, density))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_that_begins_beside_a_boundary(dtype: torch.dtype) -> None:
    """Nothing outside of the view is counted."""
    w, y = (torch.randn(40001, generator=generator(k)).to(dtype) for k in (5, 6))
    w[:1], w[-3:] = 100, 100
    for view, dual in ((w[1:-3], None), (w[1:-3], y[2:-2]), (w[:-1], y[1:])):
        check_cut(selection(view, 0.2, dual=dual))


def test_where_to_look_the_next_time() -> None:
    """The cut stands in what a selection leaves for the next one, and a half of its reach is not negative."""
    w = torch.randn(50000, generator=generator(6))
    s = selection(w, 0.1)
    assert s.last.tolist() == [-1, -1]
    for factor in (1.0, 1.0001):
        w.mul_(factor)
        cuts.select([s])
        assert s.last[0].item() == s.cut.view(torch.int32).item()
        inside = (w.abs().view(torch.int32).long() - s.last[0]).abs() <= s.last[1]
        assert 1 < inside.sum() < w.numel() // 16, "the bracket holds few"


def _optimizer(params: list[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    chosen = {"lr": 0.1, "momentum": 0.9, "penalty": "topk", "density": 0.3, "lam": 1.0, "beta": 0.5, **options}
    return rk.RVSM(params, **chosen)


def _train(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    for k in range(6):
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=generator(10 * k + i)).to(p.dtype)
        if k == 2:
            params[0].data.mul_(torch.rand(params[0].shape, generator=generator(99)) > 0.6)  # the idiom of pruning
        if k == 4:
            params[1].data.mul_(50)
        optimizer.step()


@pytest.mark.parametrize(
    "options",
    [{}, {"method": "rvsm-delayed"}, {"method": "admm"}, {"group_dim": 0}, {"group_dim": 0, "method": "admm"}],
    ids=repr,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_are_those_of_torchs_selection(
    options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """Bit for bit, also after somebody wrote to p.data between two steps."""
    options = {**options, "master_weights": True} if dtype == torch.bfloat16 else options
    start = [
        nn.Parameter(torch.randn(shape, generator=generator(7)).to(dtype)) for shape in ((90, 70), (333, 20), (7,))
    ]
    start = start[:2] if "group_dim" in options else start
    found = []
    for select in (cuts.select, select_in_torch):
        monkeypatch.setattr(native.cuts, "select", select)
        params = copy.deepcopy(start)
        optimizer = _optimizer(params, **options)
        _train(params, optimizer)
        with optimizer.sparse_weights():
            u = [p.detach().clone() for p in params]
        zeros = [(row.zeros, row.zero_groups) for row in optimizer.sparsity().rows]
        found.append((params, u, zeros))
    (ours, our_u, our_zeros), (theirs, their_u, their_zeros) = found
    assert our_zeros == their_zeros
    for a, b in zip([*ours, *our_u], [*theirs, *their_u], strict=True):
        assert torch.equal(a, b)


def test_threads_change_no_bit() -> None:
    w = torch.randn(700, 900, generator=generator(8))
    found = []
    for count in (1, 3):
        torch.set_num_threads(count)
        p = nn.Parameter(w.clone())
        optimizer = _optimizer([p])
        for k in range(3):
            p.grad = torch.randn(p.shape, generator=generator(k))
            optimizer.step()
        found.append(p.detach())
    assert torch.equal(found[0], found[1])


def test_many_tensors_in_one_call() -> None:
    ws = [torch.randn(n, generator=generator(n)) for n in (1, 2, 100, 5000, 1, 70000)]
    selections = [selection(w, 0.4) for w in ws] + [selection(torch.randn(6, 5), 0.5, 0)]
    cuts.select(selections)
    for s in selections:
        torch.testing.assert_close(s.cut, in_torch(s), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_cut_over_several_tensors(dtype: torch.dtype, threads: int) -> None:
    """As if they were one; half types among float32, views, and a tensor without elements."""
    others = (torch.bfloat16, torch.float16) if dtype == torch.float32 else ()
    for shapes in (((3, 5), (1,), (2, 4)), ((300, 331), (70, 9), (2049,), (0, 4))):
        ws = [torch.randn(shape, generator=generator(len(shape))).to(dtype) for shape in shapes]
        ws += [torch.randn(40, 50, generator=generator(6)).to(t) for t in others]
        ws.append(torch.randn(33, 20, generator=generator(7)).to(dtype).t())
        for density in DENSITIES:
            for between in (False, True):
                one = Selection.by_density(Room.like(*ws), [Candidates(w.clone()) for w in ws], density)
                check_cut(dataclasses.replace(one, between=between))


def test_no_survivor() -> None:
    for count in (5, 5000):
        w = torch.randn(count, generator=generator(9))
        for between in (False, True):
            s = Selection(*Room.like(w), [Candidates(w)], 0, between)
            cuts.select([s])
            assert torch.equal(s.cut, w.abs().max()) and torch.equal(in_torch(s), s.cut)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_histograms_are_torchs(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    wide = opmath_type(dtype)
    ws = [torch.randn(n, generator=generator(n)).to(dtype) for n in (0, 7, 90000)]
    # Which NaN a NaN of float16 becomes in float32 is the converter's choice.
    ws[1][0], ws[2][:3] = math.inf if dtype == torch.float16 else math.nan, math.inf
    candidates, like = [Candidates(w) for w in ws], torch.zeros((), dtype=wide)
    bits = 63 if wide == torch.float64 else 31
    found = []
    for served in (("cpu",), ()):
        monkeypatch.setattr(histograms, "served_device_types", lambda engine, served=served: served)
        ranges = [(0, 2**bits - 1), (2 ** (bits - 2), 2 ** (bits - 2) + 2**20 - 1), (5, 5)]
        found.append([histograms.magnitude_counts(candidates, *r, like) for r in ranges])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
    assert found[0][0].sum() == 90007, "every magnitude has a bin"


def test_what_the_op_refuses() -> None:
    op, w = torch.ops.rvsm_kernels.cuts_, torch.randn(5)
    cut, last = Room.like(w)
    with pytest.raises(RuntimeError, match="as many"):
        op([cut], [last], [w], [None], [None], [])
    with pytest.raises(ValueError, match="survivors"):
        op([cut], [last], [w], [None], [None], [-1])
    with pytest.raises(ValueError, match="sizes of 1 tensors, and 2"):
        op([cut], [last], [w, w], [None, None], [None, None], [1], False, [1])
    with pytest.raises(ValueError, match="Invalid sizes value: 0"):
        op([cut, cut], [last, last], [w], [None], [None], [1, 1], False, [1, 0])
    with pytest.raises(TypeError, match="one type"):
        op([cut], [last], [w, w.double()], [None, None], [None, None], [1], False, [2])
    with pytest.raises(TypeError, match="cut"):
        op([cut.double()], [last], [w], [None], [None], [1])
    with pytest.raises(TypeError, match="last cut"):
        op([cut], [last[:1]], [w], [None], [None], [1])
    with pytest.raises(RuntimeError, match="does not fit"):
        op([cut], [last], [w], [None], [torch.zeros(4)], [1])
    with pytest.raises(TypeError, match="dtype"):
        op([cut], [last], [w.int()], [None], [None], [1])


def test_op_in_a_trace() -> None:
    w = torch.randn(5, device="meta")
    room = Room.like(w)
    torch.ops.rvsm_kernels.cuts_([room.cut], [room.last], [w], [None], [None], [2])
