"""Random cases as data: what an optimizer is given, how its tensors lie in memory, and the weights that are hard."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from builds import on_device
from torch import Tensor, nn

import definition

WIDTHS = [*range(1, 71), 127, 128, 129, 255, 256, 257, 1023, 1024, 1025]
"""Sizes around the widths of vectors, of unrolled loops and of blocks."""


LONG = [
    (2, 300),
    (300, 2),
    (3, 257, 2),
    (3, 2, 513),
    (2, 2100),
    (5, 520),
    (1, 2500),
    (2, 3, 5, 260),
    (9, 4, 300),
    (2, 2, 2, 2, 130),
]
"""Shapes with runs longer than tiles and blocks are likely to be."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a tensor lies in memory.

    Attributes:
        order: its dimensions, the slowest first.
        gap: the stride of the fastest dimension.
        pad: elements left out after each run of the fastest dimension.
        offset: elements of the storage before the first; odd ones are misaligned for vectors.
    """

    order: tuple[int, ...]
    gap: int = 1
    pad: int = 0
    offset: int = 0

    def place(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(a view that holds `values` in this layout, the flat buffer below it)."""
        strides, step = [0] * values.dim(), self.gap
        for k, d in enumerate(reversed(self.order)):
            strides[d] = step
            step = step * max(values.shape[d], 1) + (self.pad if k == 0 else 0)
        buffer = torch.full((self.offset + step + 3,), 7.0, dtype=values.dtype)
        view = buffer.as_strided(values.shape, strides, self.offset)
        view.copy_(values)
        return view, buffer


def collapses(shape: Sequence[int], order: Sequence[int], group_dim: definition.Grouping) -> bool:
    """Whether the dimensions of group_dim are next to each other in memory (dimensions of size 1 lie anywhere).

    Or in two such runs of which one is the slowest: the kernels (0, 1) of a channels-last weight.
    """
    if group_dim is None:
        return True
    dims = definition.group_dims(group_dim, len(shape))
    where = [k for k, d in enumerate(d for d in order if shape[d] != 1) if d in dims]
    runs = 1 + sum(after != k + 1 for k, after in itertools.pairwise(where))
    return runs == 1 or (runs == 2 and where[0] == 0)


@dataclasses.dataclass(frozen=True)
class TensorCase:
    """One parameter. `grad` is a Layout, "expanded" (stride 0), "negated" (a lazy negation) or None (no gradient)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    layout: Layout
    grad: Layout | str | None
    momentum: Layout | None
    spread: float


@dataclasses.dataclass(frozen=True)
class GroupCase:
    """One param group. `lr` is given as a float, or as a tensor of the named dtype."""

    options: dict[str, Any]
    tensors: tuple[TensorCase, ...]
    lr: torch.dtype | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """One optimizer and how many steps it takes."""

    seed: int
    steps: int
    groups: tuple[GroupCase, ...]
    grad_scale: float | None
    found_inf: float | None


# ---- the same case over another base ---------------------------------------------------------------------------------


def over_adamw(case: Case) -> Case:
    """The case with AdamW's options in the place of SGD's; what was the layout of a momentum is that of the moments."""
    rng = random.Random(case.seed)

    def group_over(group: GroupCase) -> GroupCase:
        options = {k: v for k, v in group.options.items() if k not in ("momentum", "dampening", "nesterov")}
        options["betas"] = rng.choice(((0.9, 0.999), (0.9, 0.95), (0.0, 0.9), (0.6, 0.5)))
        options["eps"] = rng.choice((1e-8, 1e-8, 1e-3, 1e-15))
        options["amsgrad"] = rng.random() < 0.3
        options["weight_decay"] = rng.choice((0.0, 1e-2, 1e-2, 0.5))
        return dataclasses.replace(group, options=options)

    return dataclasses.replace(case, groups=tuple(map(group_over, case.groups)))


# ---- drawing a case --------------------------------------------------------------------------------------------------


def draw(seed: int, dtypes: Sequence[torch.dtype], methods: bool = False) -> Case:
    """The case of a seed; every tensor's dtype is one of `dtypes`. `methods`: other methods than rvsm, and top-k."""
    rng = random.Random(seed)
    groups = tuple(_draw_group(rng, dtypes, methods) for _ in range(rng.choice((1, 1, 2, 3))))
    scale = rng.choice((None, None, None, 1024.0, 0.37, 65536.0))
    # A GradScaler hands over both; after unscale_() only found_inf.
    found_inf = rng.choice((0.0, 0.0, 0.0, 1.0)) if scale is not None else rng.choice((None, None, None, 0.0, 1.0))
    return Case(seed, rng.choice((1, 2, 3)), groups, scale, found_inf)


def _draw_shape(rng: random.Random) -> tuple[int, ...]:
    if rng.random() < 0.06:
        return rng.choice(LONG)
    ndim = rng.choice((0, 1, 1, 1, 2, 2, 3, 4, 4, 5))
    if ndim == 1:
        return (rng.choice(WIDTHS),)
    limit = {0: 1, 2: 40, 3: 14, 4: 9, 5: 6}[ndim]
    shape = [rng.choice((1, 2, 3, rng.randint(1, limit))) for _ in range(ndim)]
    if ndim and rng.random() < 0.25:
        shape[rng.randrange(ndim)] = rng.choice((16, 17, 31, 33, 64, 65))
    if ndim and rng.random() < 0.03:
        shape[rng.randrange(ndim)] = 0
    return tuple(shape)


def _draw_layout(rng: random.Random, ndim: int) -> Layout:
    order = list(range(ndim))
    kind = rng.choice(("contiguous", "contiguous", "channels_last", "permuted", "strided"))
    if kind == "channels_last" and ndim >= 3:
        order = [0, *range(2, ndim), 1]
    elif kind in ("permuted", "strided"):
        rng.shuffle(order)
    gap, pad = rng.choice(((2, 0), (1, 3), (3, 1))) if kind == "strided" and ndim else (1, 0)
    return Layout(tuple(order), gap, pad, rng.choice((0, 0, 0, 1, 2, 3, 5)))


def _draw_group_dim(rng: random.Random, shape: tuple[int, ...], order: tuple[int, ...]) -> definition.GroupDim:
    ndim = len(shape)
    options: list[definition.GroupDim] = [()]
    options += [d for d in (0, 1, -1, -2) if -ndim <= d < ndim]
    options += [(0, 1)] * 2 if ndim >= 2 else []
    options += [(order[0], order[2])] * 2 if ndim >= 3 else []
    for length in range(1, ndim + 1):  # a run of dimensions in memory, in any order of naming
        start = rng.randint(0, ndim - length)
        run = [d - ndim * rng.randint(0, 1) for d in order[start : start + length]]
        rng.shuffle(run)
        options.append(tuple(run))
    return rng.choice([d for d in options if collapses(shape, order, d)])


def _draw_block(rng: random.Random, shape: tuple[int, ...], group_dim: definition.GroupDim) -> int:
    """A group_block: 1, or a divisor of the one dimension."""
    dims = [] if group_dim is None else list(definition.group_dims(group_dim, len(shape)))
    n = shape[dims[0]] if len(dims) == 1 else 1
    return rng.choice([k for k in range(1, n + 1) if n % k == 0] or [1]) if rng.random() < 0.4 else 1


def _draw_group(rng: random.Random, dtypes: Sequence[torch.dtype], methods: bool) -> GroupCase:
    """Group options first for one tensor; further tensors of the group must allow its group_dim."""
    spread = 10 ** rng.uniform(-3, 1)
    shape = _draw_shape(rng)
    layout = _draw_layout(rng, len(shape))
    group_dim = _draw_group_dim(rng, shape, layout.order) if rng.random() < 0.55 else None
    block = _draw_block(rng, shape, group_dim)
    options = _draw_options(rng, shape, group_dim, block, spread)
    if methods:
        options["method"] = rng.choice(("rvsm-delayed", "admm"))
        if options["penalty"] is not None and rng.random() < 0.4:
            options |= {"penalty": "topk", "density": rng.choice((0.1, 0.3, 0.5, 0.9, 1.0))}
            options["method"] = rng.choice(("rvsm", "rvsm", "rvsm-delayed", "admm"))
    tensors = [_draw_tensor(rng, dtypes, shape, layout, options, spread)]
    for _ in range(rng.choice((0, 0, 1, 2, 4))):
        shape = _draw_shape(rng)
        layout = _draw_layout(rng, len(shape))
        dims = [] if group_dim is None else [group_dim] if isinstance(group_dim, int) else list(group_dim)
        ndim = len(shape)
        fits = all(-ndim <= d < ndim for d in dims) and len({d % max(ndim, 1) for d in dims}) == len(dims)
        fits = fits and all(shape[d] % block == 0 for d in dims)
        if group_dim is None or (fits and collapses(shape, layout.order, group_dim)):
            tensors.append(_draw_tensor(rng, dtypes, shape, layout, options, spread))
    return GroupCase(options, tuple(tensors), rng.choice((None, None, None, None, torch.float32, torch.float64)))


def _draw_tensor(
    rng: random.Random,
    dtypes: Sequence[torch.dtype],
    shape: tuple[int, ...],
    layout: Layout,
    options: dict[str, Any],
    spread: float,
) -> TensorCase:
    same = Layout(layout.order, offset=rng.choice((0, 1)))
    grad = rng.choice((same, same, same, _draw_layout(rng, len(shape)), "expanded", "negated"))
    has_momentum = options["momentum"] and rng.random() < 0.5
    momentum = rng.choice((same, _draw_layout(rng, len(shape)))) if has_momentum else None
    return TensorCase(rng.choice(dtypes), shape, layout, grad if rng.random() < 0.93 else None, momentum, spread)


def _draw_options(
    rng: random.Random, shape: tuple[int, ...], group_dim: definition.GroupDim, block: int, spread: float
) -> dict[str, Any]:
    penalty = rng.choice(("l0", "l1", "tl1", "tl1", "l0", "l1", "tl1", None))
    a = rng.choice((0.01, 0.1, 1.0, 3.7, 100.0, 10 ** rng.uniform(-2, 2)))
    beta = 10 ** rng.uniform(-3, 1) if rng.random() < 0.95 else 0.0
    size = definition.group_size(shape, definition.groups_of({"group_dim": group_dim, "group_block": block}))
    scaled = rng.random() < 0.3
    tau = tau_of_cut(penalty, spread * math.sqrt(size) * rng.uniform(0.1, 2.0), a) if penalty else rng.random()
    if penalty == "tl1" and rng.random() < 0.1:
        tau = a * a / (2 * (a + 1)) * rng.choice((1.0, 0.999, 1.001, 1 + 1e-6))
    lam = tau * beta / (math.sqrt(size) if scaled and size else 1.0) if rng.random() < 0.94 else 0.0
    momentum = rng.choice((0.0, 0.0, 0.5, 0.9, 0.9, 0.99))
    nesterov = momentum > 0 and rng.random() < 0.4
    return {
        "lr": rng.choice((10 ** rng.uniform(-4, 0), 0.1, 0.0 if rng.random() < 0.3 else 0.01)),
        "momentum": momentum,
        "dampening": 0.0 if nesterov else rng.choice((0.0, 0.0, 0.1, 1.0)),
        "weight_decay": rng.choice((0.0, 0.0, 5e-4, 0.1)),
        "nesterov": nesterov,
        "maximize": rng.random() < 0.2,
        "penalty": penalty,
        "lam": lam,
        "beta": beta,
        "a": a,
        "group_dim": group_dim,
        "group_block": block,
        "group_scale": scaled,
        "group_lasso": 10 ** rng.uniform(-4, 0) if group_dim is not None and rng.random() < 0.35 else 0.0,
        "decoupled": rng.random() < 0.5,
        "hold_zeros": rng.random() < 0.25,
    }


def tau_of_cut(penalty: str, at: float, a: float) -> float:
    """The tau whose cut is `at`."""
    if penalty == "l1":
        return at
    if penalty == "l0":
        return at * at / 2
    low = at * a / (a + 1)
    return low if low <= a * a / (2 * (a + 1)) else (at + a / 2) ** 2 / (2 * (a + 1))


# ---- from data to tensors --------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Built:
    """A parameter, the buffer it lies in, and which elements of that buffer are not its own."""

    case: TensorCase
    param: nn.Parameter
    buffer: Tensor
    foreign: Tensor


def build(case: TensorCase, options: dict[str, Any], gen: torch.Generator) -> Built:
    """The parameter of a case, with its hard weights planted."""
    values = torch.randn(case.shape, generator=gen, dtype=torch.float64) * case.spread
    view, buffer = case.layout.place(plant(values, options, case.dtype, gen))
    own = torch.zeros(buffer.shape, dtype=torch.bool)
    own.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
    return Built(case, nn.Parameter(view), buffer, ~own)


def plant(values: Tensor, options: dict[str, Any], dtype: torch.dtype, gen: torch.Generator) -> Tensor:
    """Zeros of both signs, tiny numbers, and weights on the cut and a few ulp beside it."""
    if values.numel() == 0:
        return values.to(dtype)
    tau = definition.step_tau(options, values.shape)
    cut_by_data = tau is None or options["penalty"] == "topk"
    at = None if cut_by_data else float(definition.cut(options["penalty"], tau, options["a"]))
    dims = definition.groups_of(options)
    # A subnormal group whose 1 / norm overflows, but whose norm float32 still holds to 1e-6.
    tiny = 2e-39 if dtype == torch.float32 else 1e-7 if dtype == torch.float16 else 1e-37
    if dims is None:
        flat, n = values.reshape(-1), values.numel()
        picked = torch.randperm(n, generator=gen)[: n // 2].tolist()
        special = [0.0, -0.0, tiny, -tiny]
        if at is not None and at > 0:
            ulps = (-6, -5, -4, -1, 0, 1, 4, 5, 6)
            eps = 2.0**-52 if dtype == torch.float64 else 2.0**-23
            special = [at * (1 + k * eps) * sign for k in ulps for sign in (1, -1)] + special
        order = torch.randperm(len(special), generator=gen).tolist()
        for k, i in enumerate(picked[: len(special)]):
            flat[i] = special[order[k]]
        return flat.reshape(values.shape).to(dtype)
    array = values.cpu().numpy()
    for index in definition.group_indices(values.shape, dims):
        kind = int(torch.randint(8, (), generator=gen))
        norm = float(np.sqrt(np.sum(np.square(array[index]))))
        if kind == 0:
            array[index] = 0.0
        elif kind == 1:
            array[index] = array[index] * (tiny / max(norm, tiny))
        elif kind in (2, 3) and at is not None and norm > 0:
            array[index] = array[index] * (at * (1 + (kind - 2) * 1e-6) / norm)
    return on_device(array).to(dtype)


def gradient(case: TensorCase, gen: torch.Generator, grad_scale: float | None) -> Tensor | None:
    """A gradient in the case's layout."""
    if case.grad is None:
        return None
    size = 10 ** float(torch.rand((), generator=gen) * 3 - 2) * min(grad_scale or 1.0, 1e3)
    values = (torch.randn(case.shape, generator=gen, dtype=torch.float64) * size).to(case.dtype)
    if case.grad == "expanded":
        return values.new_tensor(size).expand(case.shape)
    if case.grad == "negated" and case.dtype in (torch.float32, torch.float64):
        lazy = torch.complex(torch.zeros_like(values), values).conj().imag
        assert lazy.is_neg()
        return lazy
    layout = case.grad if isinstance(case.grad, Layout) else Layout(tuple(range(len(case.shape))))
    return layout.place(values)[0]
