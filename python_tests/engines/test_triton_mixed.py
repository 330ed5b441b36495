"""Masters, stochastic rounding and states of another type in the kernels of the Triton engine, bit for bit."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from builds import DEVICE, need, round_in_the_interpreter
from torch import Tensor, nn

import rvsm_kernels as rk
from runner import same_bits
from rvsm_kernels.method import precision

triton = pytest.importorskip("triton")

HALF_TYPES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def here() -> None:
    """The Triton engine, interpreted on the CPU."""
    need("triton")
    if DEVICE == "cpu":
        round_in_the_interpreter()


def patterns(count: int) -> Tensor:
    """float32 numbers: of every exponent, near what the half types can hold, and what is no number."""
    gen = torch.Generator().manual_seed(2)
    bits = torch.randint(-(2**31), 2**31 - 1, (count,), generator=gen, dtype=torch.int64).to(torch.int32)
    edges = [0, 1, 0x8000, 0x7FFF, 0x7F7F0000, 0x7F7F8000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF]
    edges += [0x477FE000, 0x477FE001, 0x477FEFFF, 0x477FF000, 0x477FF001, 113 << 23, (113 << 23) - 1, 0x33800000]
    near = torch.tensor(edges, dtype=torch.int32)
    small = torch.randn(count // 4, generator=gen) * 10.0 ** torch.empty(count // 4).uniform_(-9, 5, generator=gen)
    bits[: 2 * len(edges)] = torch.cat([near, near | -(2**31)])
    bits[-len(small) :] = small.view(torch.int32)
    return bits.view(torch.float32).to(DEVICE)


def bits_of(t: Tensor) -> Tensor:
    """As integers; every NaN of a half type is one, whose sign and payload devices choose."""
    kind = {2: torch.int16, 4: torch.int32}[t.element_size()]
    return t.masked_fill(t.isnan(), torch.nan).view(kind) if t.is_floating_point() else t


def test_the_twins_agree() -> None:
    """Parting, joining, rounding and the random bits against method/precision.py."""
    import triton.language as tl

    from rvsm_kernels.engines.triton.precision import LOW, WHOLE, joined, parted, random_bits, rounded

    @triton.jit
    def kernel(w, high, low, again, edited, p16, again16, random, bf, hf, out, N: tl.constexpr):
        i = tl.arange(0, N)
        x, r = tl.load(w + i), tl.load(random + i)
        h, rest = parted(x)
        tl.store(high + i, h)
        tl.store(low + i, rest)
        tl.store(again + i, joined(h, rest, LOW))
        tl.store(edited + i, joined(h, r.to(tl.int16), LOW))
        tl.store(again16 + i, joined(tl.load(p16 + i), x, WHOLE))
        tl.store(bf + i, rounded(x, r, tl.bfloat16))
        tl.store(hf + i, rounded(x, r, tl.float16))
        first = tl.full((), 8 * (2**33 + 5), tl.int64)
        seed, step = tl.full((), 2**45 + 9, tl.int64), tl.full((), 2**31 + 5, tl.int64)
        tl.store(out + i, random_bits(first, seed, step, N))

    globals().update(
        LOW=LOW, WHOLE=WHOLE, joined=joined, parted=parted, random_bits=random_bits, rounded=rounded, tl=tl
    )
    n = 1 << 14
    w = patterns(n)
    random = precision.random_bits(n, 1, 2, 0, w.device)
    # Below the normal numbers of float16, a quarter above the number that the fraction is compared with.
    w[100:1000] = ((torch.arange(900) % 50 + (random[100:1000] + 0.25) / 65536) * 2.0**-24).float()
    half = w.half()
    half[::3] = torch.randn(half[::3].shape).half()  # edited: the master is another number
    high, low, bf, hf = (torch.empty(n, dtype=torch.int16) for _ in range(4))
    again, edited, again16, out = torch.empty(n), torch.empty(n), torch.empty(n), torch.empty(n, dtype=torch.int32)
    kernel[(1,)](w, high, low, again, edited, half, again16, random, bf, hf, out, n)
    want_high, want_low = precision.split(w)
    assert torch.equal(high, want_high.view(torch.int16)) and torch.equal(low, want_low)
    assert torch.equal(bits_of(again), bits_of(w))
    assert torch.equal(bits_of(edited), bits_of(precision.join(want_high, random.to(torch.int16))))
    assert torch.equal(bits_of(again16), bits_of(precision.join(half, w)))
    for got, dtype in ((bf, torch.bfloat16), (hf, torch.float16)):
        assert torch.equal(bits_of(got.view(dtype)), bits_of(precision.rounded(w, dtype, random)))
    call, rest = 2**33 + 5, torch.arange(n)
    words = precision.random_bits(8, 2**45 + 9, 2**31 + 5, 0, w.device)
    assert words.shape == (8,) and not torch.equal(out[:8], words), "the number of the call is 64 bits wide"
    assert torch.equal(out, wide_random_bits(call + rest // 8, rest % 8, 2**45 + 9, 2**31 + 5))


def wide_random_bits(call: Tensor, place: Tensor, seed: int, step: int) -> Tensor:
    """Philox4x32-7 in Python's integers: the 16 bits at each place of each call."""
    found: dict[int, list[int]] = {}
    mask = 0xFFFFFFFF
    for c in set(call.tolist()):
        x, key = [c & mask, c >> 32, step & mask, 0], [seed & mask, seed >> 32 & mask]
        for _ in range(precision.PHILOX_ROUNDS):
            a, b = x[0] * 0xD2511F53, x[2] * 0xCD9E8D57
            x = [b >> 32 ^ x[1] ^ key[0], b & mask, a >> 32 ^ x[3] ^ key[1], a & mask]
            key = [key[0] + 0x9E3779B9 & mask, key[1] + 0xBB67AE85 & mask]
        found[c] = [half for word in x for half in (word & 0xFFFF, word >> 16)]
    return torch.tensor([found[c][k] for c, k in zip(call.tolist(), place.tolist(), strict=True)], dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_rounding_is_that_of_the_reference(dtype: torch.dtype) -> None:
    """Where the arithmetic is exact, over several steps; one tensor is not contiguous, one lies in a larger one."""
    results = []
    for engine in ("triton", "reference"):
        gen = torch.Generator().manual_seed(1)
        whole = torch.rand(5000, generator=gen).to(DEVICE, dtype)
        tensors = [whole[3:4500], torch.rand(70, 9, generator=gen).to(DEVICE, dtype).t(), whole[4500:]]
        params = [nn.Parameter(t) for t in tensors]
        optimizer = rk.RVSM(params, lr=1.0, penalty=None, rounding="stochastic", seed=2**45 + 9, engine=engine)
        for _ in range(3):
            for p in params:
                p.grad = torch.empty_like(p).copy_((torch.rand(p.shape, generator=gen) / 64).to(dtype))
            optimizer.step()
        results.append([whole, *(p.detach() for p in params)])
        assert [float(optimizer.state[p]["step"]) for p in params] == [3.0] * 3
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


OPTIONS: tuple[dict[str, Any], ...] = (
    {"master_weights": True},
    {"rounding": "stochastic", "seed": 5},
    {"state_dtype": "float32"},
    {"rounding": "stochastic", "state_dtype": "bfloat16"},
    {"master_weights": True, "state_dtype": "bfloat16"},
)


@pytest.mark.parametrize("cls", [rk.RVSM, pytest.param(rk.RVSMAdamW, marks=pytest.mark.slow)])
def test_elements_need_no_copies(cls: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch reads and writes all planes, and a repeated step prepares nothing; a found_inf changes not a bit."""
    from rvsm_kernels.engines.triton import staging, step_table

    def refuse(*args: Any) -> None:
        raise AssertionError("a copy was made")

    for dtype, options in itertools.product((*HALF_TYPES, torch.float32), OPTIONS):
        params = [nn.Parameter(torch.randn(s).to(DEVICE, dtype)) for s in ((7, 5), (2100,))]
        base = {"momentum": 0.9} if cls is rk.RVSM else {}
        optimizer = cls(
            params, lr=0.1, penalty="l1", lam=0.1, beta=0.5, method="admm", engine="triton", **base, **options
        )
        for k in range(4):
            if k == 2:
                with pytest.MonkeyPatch.context() as patch:
                    for kind in (staging.Staged, staging.StagedWeights):
                        patch.setattr(kind, "store", refuse)
                    patch.setattr(step_table.StepTable, "build", refuse)
                    optimizer.step()
                continue
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        tensors = [t for p in params for t in (p.detach(), *optimizer.state[p].values())]
        before = [t.clone() for t in tensors]
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
        optimizer.step()
        assert all(same_bits(t, b) for t, b in zip(tensors, before, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [*HALF_TYPES, torch.float32])
def test_tensors_off_their_boundaries(dtype: torch.dtype) -> None:
    """Whole blocks and the last of them, on a boundary of 16 bytes and off it, are the same numbers."""
    gen = torch.Generator().manual_seed(4)
    values, grad = torch.randn(4100, generator=gen).to(dtype), torch.randn(4100, generator=gen).to(dtype)
    for options in OPTIONS:
        results = []
        for shift in (0, 1):
            buffer = torch.zeros(4100 + 16, dtype=dtype, device=DEVICE)
            p = nn.Parameter(buffer[shift : shift + 4100])
            with torch.no_grad():
                p.copy_(values)
            optimizer = rk.RVSMAdamW([p], lr=0.1, lam=0.1, beta=0.5, penalty="tl1", engine="triton", **options)
            for _ in range(2):
                p.grad = grad.to(DEVICE)
                optimizer.step()
            assert not buffer[:shift].any() and not buffer[shift + 4100 :].any()
            results.append([p.detach(), *optimizer.state[p].values()])
        assert all(same_bits(a, b) for a, b in zip(*results, strict=True)), options
