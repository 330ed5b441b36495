"""Numbers that the kernels read on the device: a small launch finishes the records of a step with them.

The host sends each record in double precision, made with a factor of 1 where a tensor stands, and the addresses of the
tensors behind it: a *source*, which ``counts.py`` reads too. :func:`finish_kernel` multiplies what follows from them
and writes the record that the kernels of the step read, in the type of the arithmetic. So no host waits for the
tensors, and a captured graph follows whatever is filled into them.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...method import device_numbers
from ...method.dtypes import DTYPES
from ...method.step_options import StepOptions
from .bases import finished_number
from .calls import Grid
from .elements import PROX, SPLIT
from .penalty import NONE, cut_of, rho_of
from .table import Table

# The tensors of a source, each as its address and the number of its type, in the order of NAMES.
TENSORS = tl.constexpr(len(device_numbers.NAMES))
NUMBER_OF_TYPE = {dtype: k + 1 for k, dtype in enumerate(DTYPES)}  # FLOAT32 .. FLOAT16
FLOAT32 = tl.constexpr(1)
FLOAT64 = tl.constexpr(2)
BFLOAT16 = tl.constexpr(3)
FLOAT16 = tl.constexpr(4)
RECORDS = tl.constexpr(32)  # that a program finishes
THREADS = 32


@triton.jit
def factor_at(where, mask):
    """The tensors' numbers at places of a source in float64, and 1 where there is no tensor; blocks."""
    address, kind = tl.load(where, mask, 0), tl.load(where + 1, mask, 0)
    x32 = tl.load(address.to(tl.pointer_type(tl.float32)), kind == FLOAT32, 0.0)
    x64 = tl.load(address.to(tl.pointer_type(tl.float64)), kind == FLOAT64, 1.0)
    xb = tl.load(address.to(tl.pointer_type(tl.bfloat16)), kind == BFLOAT16, 0.0)
    xh = tl.load(address.to(tl.pointer_type(tl.float16)), kind == FLOAT16, 0.0)
    half = tl.where(kind == BFLOAT16, xb.to(tl.float32), xh.to(tl.float32))
    narrow = tl.where(kind == FLOAT32, x32, half)
    return tl.where((kind == 0) | (kind == FLOAT64), x64, narrow.to(tl.float64))


@triton.jit
def finish_kernel(
    sources, records, count, T: tl.constexpr, BASE: tl.constexpr, NUMBERS: tl.constexpr, WORDS: tl.constexpr
):
    """Records of NUMBERS numbers and one that says whether lr is 0, WORDS words long, from as many sources."""
    i = tl.program_id(0) * RECORDS + tl.arange(0, RECORDS)
    mask = i < count
    source = sources + i * (NUMBERS + 2 * TENSORS + 1)
    made = (records + i * WORDS).to(tl.pointer_type(T))
    numbers, tensors = source.to(tl.pointer_type(tl.float64)), source + NUMBERS
    lr, lam = factor_at(tensors, mask), factor_at(tensors + 2, mask)
    beta, decay = factor_at(tensors + 4, mask), factor_at(tensors + 6, mask)
    penalty = tl.where((lam > 0) & (beta > 0), tl.load(numbers, mask, 0.0), 0.0)
    on = penalty != NONE
    tau = tl.where(on, tl.load(numbers + 2, mask, 0.0) * lam / tl.where(on, beta, 1.0), 0.0)
    a = tl.load(numbers + 3, mask, 1.0)
    rho = rho_of(tau, a)
    of_prox = (penalty, cut_of(penalty, tau, a), tau, a, rho, rho - a)
    for k in tl.static_range(PROX):
        tl.store(made + k, of_prox[k].to(T), mask)
    s = numbers + PROX
    pull, coupling = tl.load(s + 1, mask, 0.0) * lr * beta, tl.load(s + 2, mask, 0.0) * beta
    grad, lasso, hold = tl.load(s, mask, 0.0), tl.load(s + 3, mask, 0.0), tl.load(s + 4, mask, 0.0)
    of_split = (grad, tl.where(on, pull, 0.0), tl.where(on, coupling, 0.0), lasso, hold)
    for k in tl.static_range(SPLIT):
        tl.store(made + PROX + k, of_split[k].to(T), mask)
    for k in tl.static_range(NUMBERS - PROX - SPLIT):
        x = tl.load(numbers + PROX + SPLIT + k, mask, 0.0)
        tl.store(made + PROX + SPLIT + k, finished_number(x, k, lr, decay, BASE).to(T), mask)
    tl.store(made + NUMBERS, tl.where(lr == 0, 1.0, 0.0).to(T), mask)


def source_words(numbers: int) -> int:
    """The length of a source in int64: its numbers, its tensors and the seed of its rounding."""
    return numbers + 2 * TENSORS.value + 1


class Sources:
    """The sources of a launch's records, and the records that are made of them.

    Args:
        count: of the records.
        numbers: of a record, as ``StepOptions.numbers`` makes them.
        words: length of a finished record in int64; see :func:`.table.record_words`.
        finishes: whether the launch reads records that are finished here.
    """

    def __init__(self, device: torch.device, count: int, numbers: int, words: int, finishes: bool) -> None:
        self.table = Table(device)
        self.records = torch.empty(count * words * finishes, dtype=torch.int64, device=device)
        self._shape = numbers, words
        self._count = count
        self._grid = Grid(-(-count // RECORDS.value), THREADS)
        self._tensors: list[Tensor] = []
        self._of_graphs: list[list[Tensor]] = []  # they go on reading the tensors

    def set(self, numbers: Sequence[Sequence[float]], told: Sequence[StepOptions]) -> None:
        """The numbers of each record, and the options that they were made of."""
        data = []
        on_device = [options.on_device for options in told]
        for record, options, tensors in zip(numbers, told, on_device, strict=True):
            words = [0] * (2 * TENSORS.value)
            for k, t in enumerate(tensors):
                if t is not None:
                    words[2 * k : 2 * k + 2] = t.data_ptr(), NUMBER_OF_TYPE[t.dtype]
            data.append(struct.pack(f"<{len(record)}d{len(words)}qq", *record, *words, options.seed))
        self.table.data = b"".join(data)
        self._tensors = [t for tensors in on_device for t in tensors if t is not None]

    def put(self, captured: bool) -> Tensor:
        """The sources, on the device."""
        if captured:
            self._of_graphs.append(self._tensors)
        return self.table.put(captured)

    def finish(self, sources: Tensor, opmath: tl.dtype, base: int) -> Tensor:
        """The records, which a launch on the current stream makes of the sources on the device."""
        self._grid(finish_kernel, sources, self.records, self._count, opmath, base, *self._shape)
        return self.records
