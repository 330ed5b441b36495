"""Cases as data: which tensors, which penalty, which groups, which type.

The shape lists are those of the well-known models, written out by small generators so that nothing but torch is
needed. ``penalised`` follows ``rvsm_kernels.param_groups``: the weights of convolutions and linear layers; biases,
norms and embeddings stay dense.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

GroupDim = int | tuple[int, ...] | None


class Spec(NamedTuple):
    """One parameter tensor."""

    shape: tuple[int, ...]
    penalised: bool

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


Specs = list[Spec]


def _weight(*shape: int) -> Specs:
    return [Spec(shape, True)]


def _dense(*shape: int) -> Specs:
    return [Spec(shape, False)]


def _conv(c_out: int, c_in: int, k: int, bias: bool = False) -> Specs:
    return _weight(c_out, c_in, k, k) + (_dense(c_out) if bias else [])


def _norm(c: int) -> Specs:
    return _dense(c) + _dense(c)


def _linear(c_out: int, c_in: int) -> Specs:
    return _weight(c_out, c_in) + _dense(c_out)


def _basic_block(c_in: int, c: int, stride: int) -> Specs:
    """Two 3x3 convolutions; a 1x1 convolution on the shortcut where the shape changes."""
    block = _conv(c, c_in, 3) + _norm(c) + _conv(c, c, 3) + _norm(c)
    return block + (_conv(c, c_in, 1) + _norm(c) if stride != 1 or c_in != c else [])


def _bottleneck(c_in: int, c: int, stride: int) -> Specs:
    """1x1, 3x3, 1x1 with four times the channels at the end."""
    block = _conv(c, c_in, 1) + _norm(c) + _conv(c, c, 3) + _norm(c) + _conv(4 * c, c, 1) + _norm(4 * c)
    return block + (_conv(4 * c, c_in, 1) + _norm(4 * c) if stride != 1 or c_in != 4 * c else [])


def _stages(block: Callable[[int, int, int], Specs], c_in: int, channels: list[int], depths: list[int]) -> Specs:
    specs: Specs = []
    for i, (c, depth) in enumerate(zip(channels, depths, strict=True)):
        for j in range(depth):
            specs += block(c_in, c, 2 if i > 0 and j == 0 else 1)
            c_in = c if block is _basic_block else 4 * c
    return specs


def resnet20() -> Specs:
    """The CIFAR-10 ResNet-20 with convolutions on its two changing shortcuts."""
    body = _stages(_basic_block, 16, [16, 32, 64], [3, 3, 3])
    return _conv(16, 3, 3) + _norm(16) + body + _linear(10, 64)


def resnet18() -> Specs:
    """The ImageNet ResNet-18."""
    body = _stages(_basic_block, 64, [64, 128, 256, 512], [2, 2, 2, 2])
    return _conv(64, 3, 7) + _norm(64) + body + _linear(1000, 512)


def resnet50() -> Specs:
    """The ImageNet ResNet-50."""
    body = _stages(_bottleneck, 64, [64, 128, 256, 512], [3, 4, 6, 3])
    return _conv(64, 3, 7) + _norm(64) + body + _linear(1000, 2048)


def vgg16() -> Specs:
    """The ImageNet VGG-16 without batch norm."""
    specs, c_in = [], 3
    for c in [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]:
        specs += _conv(c, c_in, 3, bias=True)
        c_in = c
    return specs + _linear(4096, 512 * 7 * 7) + _linear(4096, 4096) + _linear(1000, 4096)


def gpt2_small() -> Specs:
    """GPT-2 small: token and position embeddings (the output layer is the first of them), 12 blocks, a norm."""
    d = 768
    block = _norm(d) + _linear(3 * d, d) + _linear(d, d) + _norm(d) + _linear(4 * d, d) + _linear(d, 4 * d)
    return _dense(50257, d) + _dense(1024, d) + 12 * block + _norm(d)


SINGLE = {
    "1K": 1_000,
    "10K": 10_000,
    "100K": 100_000,
    "1M": 1_000_000,
    "5M": 5_000_000,
    "10M": 10_000_000,
    "25M": 25_000_000,
    "100M": 100_000_000,
}
"""One tensor of so many elements."""

MODELS: dict[str, Callable[[], Specs]] = {
    "ResNet-20": resnet20,
    "ResNet-18": resnet18,
    "ResNet-50": resnet50,
    "VGG-16": vgg16,
    "GPT-2 small": gpt2_small,
}


def specs(shape: str) -> Specs:
    """The tensors of a named shape: a key of SINGLE or MODELS, sizes as "5000x5000", or many tensors "62 of 1".

    Raises:
        ValueError: a name that is none of these.
    """
    if shape in SINGLE:
        return _weight(SINGLE[shape])
    if shape in MODELS:
        return MODELS[shape]()
    try:
        if " of " in shape:
            count, size = shape.split(" of ")
            return int(count) * _weight(*map(int, size.split("x")))
        return _weight(*map(int, shape.split("x")))
    except ValueError:
        raise ValueError(f"unknown shape {shape!r}") from None


class Base(NamedTuple):
    """What follows the pull in a step.

    Attributes:
        label: its words in the name of a case.
        states: tensors beside every parameter: the momentum; the two moments.
        moved: elements that a step must read and write for every parameter: w and g read, w written, each state
            read and written.
        pulled: the same for every penalised parameter, in a pass of its own: w read, w written.
    """

    label: str
    states: int
    moved: int
    pulled: int


BASES = {
    "sgd": Base("", 1, 5, 0),
    "adamw": Base("adamw", 2, 7, 0),
    "wrapper": Base("RVSMWrapper around adamw", 2, 7, 2),
    "pull": Base("pull alone", 0, 0, 2),
}
"""RVSM; RVSMAdamW; RVSMWrapper around torch's fused AdamW; RVSMWrapper around an optimizer that does nothing."""


PRECISIONS: dict[str, dict[str, Any]] = {
    "": {},
    "master weights": {"master_weights": True},
    "stochastic rounding": {"rounding": "stochastic"},
}
"""What a step over half types does beside rounding to nearest, as options of its groups."""


@dataclass(frozen=True)
class Case:
    """One thing to measure."""

    shape: str
    penalty: str = "l0"
    group_dim: GroupDim = None
    dtype: str = "float32"
    method: str = "rvsm"
    base: str = "sgd"
    precision: str = ""
    budget: str = "tensor"

    @property
    def name(self) -> str:
        group = "" if self.group_dim is None else f", group_dim {self.group_dim}"
        dtype = "" if self.dtype == "float32" else f", {self.dtype}"
        method = "" if self.method == "rvsm" else f", {self.method}"
        base = "" if self.base == "sgd" else f", {BASES[self.base].label}"
        precision = f", {self.precision}" if self.precision else ""
        budget = "" if self.budget == "tensor" else f", {self.budget} budget"
        return f"{self.shape} {self.penalty}{budget}{group}{dtype}{method}{base}{precision}"

    @property
    def specs(self) -> Specs:
        return specs(self.shape)

    @property
    def elements(self) -> int:
        return sum(spec.numel for spec in self.specs)

    @property
    def itemsize(self) -> int:
        return {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}[self.dtype]

    @property
    def counted_bytes(self) -> int:
        """What a step must move, those of the base and the state of the method, which is read and written."""
        base, penalised = BASES[self.base], sum(spec.numel for spec in self.specs if spec.penalised)
        kept = 0 if self.method == "rvsm" else 2
        if self.precision == "master weights":  # states in float32, and the rest of the weights read and written
            rest = 2 * (4 - self.itemsize if self.dtype == "bfloat16" else 4)
            states = 4 * (2 * base.states * self.elements + kept * penalised)
            return states + (3 * self.itemsize + rest) * self.elements
        return self.itemsize * (base.moved * self.elements + (base.pulled + kept) * penalised)

    @property
    def groups(self) -> int:
        """How many groups the penalised tensors have (0 for an elementwise case)."""
        if self.group_dim is None:
            return 0
        dims = self.group_dim if isinstance(self.group_dim, tuple) else (self.group_dim,)
        return sum(math.prod(spec.shape[d] for d in dims) for spec in self.specs if spec.penalised)


MATRIX = "5000x5000"
CONV = "2048x1360x3x3"
"""25 M elements as a linear weight and as a convolution's."""

_PENALTIES = ("l0", "l1", "tl1")
_MODEL_VARIANTS = (("l0", None), ("l1", None), ("tl1", None), ("l0", 1), ("l0", 0))

SMOKE_CASES = (
    Case("1K"),
    Case("1M"),
    Case("ResNet-20"),
    Case("ResNet-20", "l0", 1),
    Case("300x300", "l1", 0),
    Case("ResNet-20", base="adamw"),
    Case("300x300", "l1", 0, base="adamw"),
    Case("1M", base="wrapper"),
    Case("1M", base="pull"),
    Case("1M", dtype="bfloat16", precision="master weights"),
    Case("1M", dtype="bfloat16", base="adamw", precision="stochastic rounding"),
)

QUICK_CASES = (
    *(Case(shape) for shape in SINGLE if shape not in ("5M", "100M")),
    Case("25M", "l1"),
    Case("25M", "tl1"),
    Case("25M", method="admm"),
    Case("10M", dtype="bfloat16"),
    Case("10M", dtype="float64"),
    Case(MATRIX, "l0", 1),
    Case(MATRIX, "l0", 0),
    Case(MATRIX, "l1", 0),
    Case(CONV, "l0", 1),
    Case("ResNet-20"),
    Case("ResNet-20", "l0", 1),
    Case("ResNet-18"),
    Case("ResNet-18", "l0", 1),
    Case("ResNet-50"),
    Case("GPT-2 small"),
    Case("1000 of 1"),
    Case("25M", base="adamw"),
    Case("25M", "l1", base="adamw"),
    Case(MATRIX, "l0", 1, base="adamw"),
    Case(MATRIX, "l0", 0, base="adamw"),
    Case(MATRIX, "l1", 0, base="adamw"),
    Case("ResNet-20", base="adamw"),
    Case("GPT-2 small", base="adamw"),
    Case("1000 of 1", base="adamw"),
    Case("25M", base="wrapper"),
    Case("GPT-2 small", base="wrapper"),
    Case("25M", base="pull"),
    Case("GPT-2 small", base="pull"),
    *(Case("25M", dtype="bfloat16", base=base, precision=p) for base in ("sgd", "adamw") for p in PRECISIONS),
)

FULL_CASES = (
    *(Case(shape, penalty) for shape in SINGLE if shape != "5M" for penalty in _PENALTIES),
    *(Case("10M", penalty, dtype=dtype) for dtype in ("bfloat16", "float64") for penalty in _PENALTIES),
    *(Case(shape, penalty, dim) for shape in (MATRIX, CONV) for penalty in _PENALTIES for dim in (0, 1)),
    *(Case("25M", method=method) for method in ("rvsm-delayed", "admm")),
    *(Case(MATRIX, "l0", dim, method="admm") for dim in (0, 1)),
    *(Case(model, penalty, dim) for model in MODELS for penalty, dim in _MODEL_VARIANTS),
    Case("1000 of 1"),
    *(Case("25M", penalty, base="adamw") for penalty in _PENALTIES),
    *(Case(shape, penalty, dim, base="adamw") for shape in (MATRIX, CONV) for penalty in _PENALTIES for dim in (0, 1)),
    *(Case(model, penalty, dim, base="adamw") for model in MODELS for penalty, dim in _MODEL_VARIANTS),
    Case("1000 of 1", base="adamw"),
    *(Case(shape, base=base) for base in ("wrapper", "pull") for shape in ("25M", "ResNet-20", "GPT-2 small")),
    *(Case(MATRIX, "l0", dim, base=base) for base in ("wrapper", "pull") for dim in (0, 1)),
    *(
        Case("25M", dtype=dtype, base=base, precision=precision)
        for dtype in ("bfloat16", "float16")
        for base in ("sgd", "adamw")
        for precision in PRECISIONS
    ),
)

HOST_COUNTS = (1, 10, 62, 65, 161, 1000)
"""Numbers of one-element parameters: the models' counts, without their work."""

MEMORY_CASES = (Case(MATRIX), Case(MATRIX, "l0", 1), Case("ResNet-18", "l0", 1))

_SMALL = {
    "5M": "100K",
    "25M": "1M",
    "100M": "1M",
    "25 of 1000000": "25 of 40000",
    "21000 of 16": "2100 of 16",
    "5250 of 16": "525 of 16",
    MATRIX: "600x600",
    "10000x10000": "600x600",
    CONV: "64x64x3x3",
    "GPT-2 small": "ResNet-20",
}


def small(case: Case) -> Case:
    """The case at a size that a smoke run can afford."""
    return replace(case, shape=_SMALL.get(case.shape, case.shape))
