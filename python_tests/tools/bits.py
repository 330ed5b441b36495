"""Records what every engine computes, bit for bit, and finds what a change of the code has changed.

    python -m python_tests.tools.bits --record [ENGINE ...]
    python -m python_tests.tools.bits --check [ENGINE ...]

A case is one optimizer over a few small tensors and a few steps. What is recorded of it is a checksum over the weights,
the states of the optimizer, u and the value of the penalty. A few cases may change in the last bit (see `Case.summed`);
their weights and momentum are recorded as numbers and compared within a bound.

The compiled kernels give the same bits on every processor. The reference and Triton's interpreter compute with torch's
and numpy's operations, whose bits depend on the processor and the version: their cases are only compared where they
were recorded, and those of the reference's transformed l1 only where torch's arc tangent and sine give the same bits.
Those of transformed l1 are compared from Python 3.11 on, which has a cube root.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import random
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rvsm_kernels as rk

ENGINES = ("native", "interpreted", "triton", "reference")
"""``interpreted``: the native engine, with its CUDA plan and kernels run on CPU tensors by the host's interpreter."""

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
METHODS = ("rvsm", "rvsm-delayed", "admm")
PENALTIES = (None, "l0", "l1", "tl1", "topk")
GROUP_DIMS = {"elements": None, "dim0": 0, "dim1": 1, "kernels": (0, 1), "whole": ()}

SMALL = ((1,), (17,), (7, 5), (3, 4, 3, 3), (2, 9, 5), (6, 2, 2, 2), (40, 1))
"""Shapes beside the widths of vectors."""
LARGE = ((529,), (3, 1031), (67, 61), (5, 3, 17, 21), (13, 19, 3, 3), (1, 2500))
"""Shapes beyond a tile of 512 elements."""


@dataclasses.dataclass(frozen=True)
class Tensors:
    """One parameter of a case: its shape, how it lies in memory, and whether its gradient lies in the same way."""

    shape: tuple[int, ...]
    layout: str
    same_layout: bool


@dataclasses.dataclass(frozen=True)
class Case:
    """One optimizer and what it does.

    Attributes:
        options: the keyword arguments of the optimizer.
        rates: lr of each step.
        grad_scale: what a GradScaler hands over, or None.
        skipped: the step that found_inf skips, or None.
    """

    key: str
    seed: int
    dtype: str
    options: dict[str, Any]
    tensors: tuple[Tensors, ...]
    rates: tuple[float, ...]
    grad_scale: float | None
    skipped: int | None

    @property
    def summed(self) -> bool:
        """Whether the gradient, the decay and the pull are added up, so that their order shows in the last bit."""
        return is_summed(self.options)


def is_summed(options: dict[str, Any]) -> bool:
    """Whether both weight decay and the pull are added to the gradient."""
    return options["penalty"] is not None and not options["decoupled"] and options["weight_decay"] != 0


# ---- drawing ---------------------------------------------------------------------------------------------------------


def draw(engine: str) -> list[Case]:
    """The cases of an engine: each dtype, method, penalty and kind of group, and the rest at random."""
    cases: list[tuple[Case, int]] = []
    for dtype in DTYPES:
        for method in METHODS:
            for penalty in PENALTIES:
                for k, kind in enumerate(GROUP_DIMS):
                    seed = len(cases)
                    rng = random.Random(seed)
                    case = _draw(rng, engine, dtype, method, penalty, kind, seed)
                    cases.append((case, k))
    if engine == "triton":  # Python interprets each operation: one kind of group for each penalty, method and dtype
        cases = [(case, k) for place, (case, k) in enumerate(cases) if (place // 5 + place // 25) % 5 == k]
    return [case for case, _ in cases]


def _draw(rng: random.Random, engine: str, dtype: str, method: str, penalty: str | None, kind: str, seed: int) -> Case:
    momentum = rng.choice(("none", "plain", "dampened", "nesterov"))
    options: dict[str, Any] = {
        "method": method,
        "penalty": penalty,
        "group_dim": GROUP_DIMS[kind],
        "decoupled": rng.random() < 0.5,
        "momentum": 0.0 if momentum == "none" else rng.choice((0.5, 0.9)),
        "dampening": 0.3 if momentum == "dampened" else 0.0,
        "nesterov": momentum == "nesterov",
        "weight_decay": rng.choice((0.0, 0.01)),
        "maximize": rng.random() < 0.25,
        "group_scale": rng.random() < 0.3,
        "group_lasso": rng.choice((0.0, 0.05)) if kind != "elements" else 0.0,
        "unit_norm": rng.random() < 0.1,
        "beta": rng.choice((0.5, 0.07)),
        "a": rng.choice((0.3, 1.0, 3.7)),
        "density": rng.choice((0.2, 0.5, 0.9)) if penalty == "topk" else None,
    }
    summed = is_summed(options)
    if summed:
        options["unit_norm"] = False  # it would spread the last bit of one element over the tensor
    tensors = _draw_tensors(rng, kind, only_small=summed or engine == "triton")
    options["lam"] = _strength(rng, options, tensors[0].shape)
    steps = 1 if summed else 2 if engine == "triton" else 3
    rates = rng.choice(((0.1, 0.1, 0.1), (0.1, 0.03, 0.2)))[:steps]
    grad_scale = rng.choice((None, None, 8.0, 3.0))
    skipped = 1 if grad_scale is not None and steps > 2 and rng.random() < 0.5 else None
    words = [engine, dtype, method, str(penalty), kind, "decoupled" if options["decoupled"] else "coupled", momentum]
    words += ["decay"] if options["weight_decay"] else []
    words += [word for word in ("maximize", "group_scale", "group_lasso", "unit_norm") if options[word]]
    words += [f"scale{grad_scale:g}"] if grad_scale is not None else []
    words += ["skips"] if skipped is not None else []
    words += ["rates"] if len(set(rates)) > 1 else []
    words += sorted({t.layout for t in tensors} - {"contiguous"})
    words += ["summed"] if summed else []
    return Case("/".join(words), seed, dtype, options, tensors, rates, grad_scale, skipped)


def _draw_tensors(rng: random.Random, kind: str, only_small: bool) -> tuple[Tensors, ...]:
    least = {"elements": 1, "whole": 1, "dim0": 1, "dim1": 2, "kernels": 2}[kind]
    shapes = [shape for shape in SMALL if len(shape) >= least]
    picked = rng.sample(shapes, 2)
    if not only_small:
        picked.append(rng.choice([shape for shape in LARGE if len(shape) >= least]))
    layouts = [rng.choice(("contiguous", "contiguous", "channels_last", "transposed")) for _ in picked]
    layouts = [
        "contiguous" if layout == "channels_last" and len(shape) != 4 else layout
        for layout, shape in zip(layouts, picked, strict=True)
    ]
    return tuple(Tensors(s, layout, rng.random() < 0.7) for s, layout in zip(picked, layouts, strict=True))


def _strength(rng: random.Random, options: dict[str, Any], shape: tuple[int, ...]) -> float:
    """lam whose cut is at a magnitude that weights (or their groups) of this shape have."""
    kept = options["group_dim"]
    kept = range(len(shape)) if kept is None else (kept,) if isinstance(kept, int) else kept
    size = math.prod(shape) // math.prod(shape[d] for d in kept)
    at = 0.5 * math.sqrt(size) * rng.choice((0.5, 0.8, 1.0))
    tau = {"l1": at, "tl1": at * options["a"] / (options["a"] + 1)}.get(options["penalty"], at * at / 2)
    return options["beta"] * tau / (math.sqrt(size) if options["group_scale"] else 1.0)


# ---- tensors ---------------------------------------------------------------------------------------------------------


def _values(shape: tuple[int, ...], gen: torch.Generator) -> Tensor:
    """Numbers around 0, some slices of them larger than others, with zeros among them; the same on every processor."""
    summands = torch.randint(-(1 << 20), (1 << 20) + 1, (4, *shape), generator=gen).sum(0)
    values = summands.to(torch.float64) / (1 << 21)
    for d, n in enumerate(shape[:2]):
        factors = torch.randint(1, 7, (n,), generator=gen).to(torch.float64) / 4
        values = values * factors.reshape([-1 if k == d else 1 for k in range(len(shape))])
    return torch.where(torch.randint(0, 12, shape, generator=gen) == 0, 0.0, values)


def place(values: Tensor, layout: str) -> Tensor:
    """The values in memory: contiguous, channels_last, or transposed with gaps, at an odd address."""
    if layout == "channels_last":
        return values.clone(memory_format=torch.channels_last)
    if layout == "contiguous":
        return values.clone(memory_format=torch.contiguous_format)
    *outer, inner = reversed(values.shape)
    buffer = torch.full((*outer, inner + 3), 7.0, dtype=values.dtype)
    view = buffer[..., 1 : inner + 1].permute(*reversed(range(values.dim())))
    view.copy_(values)
    return view


def _hash(checksum: Any, t: Tensor) -> None:
    checksum.update(t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


# ---- running ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(engine: str) -> Iterator[str]:
    """The name that an optimizer knows the engine by; meanwhile CPU tensors go where the engine says."""
    if engine == "triton":
        from builds import round_in_the_interpreter

        round_in_the_interpreter()
    if engine != "interpreted":
        yield engine
        return
    from rvsm_kernels import _C  # type: ignore[attr-defined,unused-ignore]

    _C.interpret_cuda(True)
    try:
        yield "native"
    finally:
        _C.interpret_cuda(False)


@dataclasses.dataclass
class Result:
    """What a case gave: a checksum; of a `summed` case the numbers, and how far each may be from the recorded ones."""

    checksum: str
    numbers: Tensor
    bound: Tensor


def run(case: Case, name: str) -> Result:
    """Make the optimizer of a case, step it, read from it."""
    dtype, gen = DTYPES[case.dtype], torch.Generator().manual_seed(case.seed)
    params = [nn.Parameter(place(_values(t.shape, gen).to(dtype), t.layout)) for t in case.tensors]
    first = [p.detach().clone() for p in params]
    optimizer = rk.RVSM(params, lr=case.rates[0], engine=name, **case.options)
    for k, lr in enumerate(case.rates):
        optimizer.param_groups[0]["lr"] = lr
        for p, t in zip(params, case.tensors, strict=True):
            p.grad = place(_values(t.shape, gen).to(dtype), t.layout if t.same_layout else "contiguous")
        if case.grad_scale is not None:
            optimizer.grad_scale = torch.tensor(case.grad_scale)
            optimizer.found_inf = torch.tensor(float(k == case.skipped))
        optimizer.step()
    checksum = hashlib.sha256()
    for p in params:
        _hash(checksum, p)
        for key in sorted(optimizer.state[p]):
            checksum.update(key.encode())
            _hash(checksum, optimizer.state[p][key])
    _hash(checksum, optimizer.penalty_value())
    with optimizer.sparse_weights():
        for p in params:
            _hash(checksum, p)
    numbers, bounds = [], []
    for p, w in zip(params, first, strict=True) if case.summed else ():
        slack = _slack(w, p.grad, case)
        rate = case.rates[0] * (1 + case.options["momentum"] * case.options["nesterov"])
        numbers.append(p.detach())
        bounds.append(rate * slack + _ulp(p))
        m = optimizer.state[p].get("momentum_buffer")
        if m is not None:
            numbers.append(m)
            bounds.append(slack + _ulp(m))
    return Result(checksum.hexdigest()[:16], _flat(numbers, dtype), _flat(bounds, torch.float64))


def _flat(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors]) if tensors else torch.empty(0, dtype=dtype)


def _ulp(t: Tensor) -> Tensor:
    """An ulp of each element, or a little more."""
    numbers = torch.finfo(t.dtype)
    return numbers.eps * t.detach().double().abs().clamp_min(numbers.tiny)


def _slack(w: Tensor, grad: Tensor | None, case: Case) -> Tensor:
    """How far two orders of the sum d = g + lasso unit + decay w + beta gap can be apart, element by element.

    Each of the three additions, and each of the two operations that d still passes through before it meets the weights,
    rounds by at most half an ulp of the sum of the terms' magnitudes, in either order. The gap is at most |w|; under
    ADMM it is the dual and the gap together, at most 2 |w|. The elements of a unit vector are at most 1.
    """
    assert grad is not None
    o = case.options
    largest = grad.double().abs() / (case.grad_scale or 1.0) + o["group_lasso"]
    largest = largest + (o["weight_decay"] + 2 * o["beta"]) * w.double().abs()
    arithmetic = torch.float64 if w.dtype == torch.float64 else torch.float32
    return 5 * torch.finfo(arithmetic).eps * largest


def prox_checksums(engine: str) -> Iterator[tuple[str, str]]:
    """(key, checksum) of prox out of place, on every layout; Triton's is not reached by a public name on the CPU."""
    prox = rk.reference.prox if engine == "reference" else rk.prox
    for dtype in DTYPES:
        for penalty in PENALTIES[1:-1]:
            for kind, dims in GROUP_DIMS.items():
                checksum, gen = hashlib.sha256(), torch.Generator().manual_seed(1)
                for shape in ((4, 7, 3, 3), (6, 5), (2, 700)):
                    for layout in ("contiguous", "channels_last", "transposed"):
                        if layout != "channels_last" or len(shape) == 4:
                            w = place(_values(shape, gen).to(DTYPES[dtype]), layout)
                            _hash(checksum, prox(w, penalty, 0.3, 1.7, dims))
                yield f"{engine}/{dtype}/prox/{penalty}/{kind}", checksum.hexdigest()[:16]


# ---- the record ------------------------------------------------------------------------------------------------------


def surroundings() -> dict[str, str]:
    """What the bits of torch's operations depend on."""
    return {"capability": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__.split("+")[0]}


def functions() -> str:
    """A checksum over the functions that transformed l1 takes from torch; they differ by the maker of the processor."""
    checksum = hashlib.sha256()
    for dtype in (torch.float32, torch.float64):
        x = torch.linspace(-1, 1, 4001, dtype=dtype)
        for t in (torch.atan2(x, 1 - x * x), torch.sin(x)):
            _hash(checksum, t)
    return checksum.hexdigest()[:16]


def load() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(the record, the numbers of the `summed` cases by dtype)."""
    return json.loads((FIXTURES / "bits.json").read_text()), torch.load(FIXTURES / "bits.pt", weights_only=True)


def compute(engine: str) -> tuple[dict[str, Result], dict[str, str]]:
    """(what each case gave, the checksums of prox) of an engine, by their keys."""
    with serving(engine) as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random options are not always sensible
        cases = draw(engine)
        results = {case.key: run(case, name) for case in cases}
        assert len(results) == len(cases), "two cases have one key"
        return results, {} if engine == "triton" else dict(prox_checksums(engine))


def why_not_comparable(engine: str) -> str | None:
    """Why the bits of an engine cannot be compared here, or None."""
    if engine in ("native", "interpreted"):
        return None
    here, recorded = surroundings(), load()[0]["surroundings"]
    return None if here == recorded else f"the bits of {engine} were recorded with {recorded}, here is {here}"


def differing(engine: str) -> list[str]:
    """The keys of an engine's cases that give something else than what was recorded, or are not in both."""
    record, numbers = load()
    recorded = {key: value for key, value in record["cases"].items() if key.startswith(f"{engine}/")}
    results, prox = compute(engine)
    different = set(recorded) ^ {*results, *prox}
    same_functions = hasattr(math, "cbrt")  # since Python 3.11; the numbers of transformed l1 need a cube root
    same_functions &= engine != "reference" or functions() == record["functions"]
    different |= {key for key, checksum in prox.items() if recorded.get(key) != checksum}
    for key, result in results.items():
        value = recorded.get(key)
        if isinstance(value, list):
            dtype = key.split("/")[1]
            want = numbers[dtype][value[0] : value[1]].double()
            got = result.numbers.double()
            if got.shape != want.shape or not bool(((got - want).abs() <= result.bound).all()):
                different.add(key)
        elif value != result.checksum:
            different.add(key)
    return sorted(key for key in different if same_functions or "/tl1/" not in key)


def record(engines: Sequence[str]) -> None:
    """Write what the engines give now."""
    cases: dict[str, Any] = {}
    numbers: dict[str, list[Tensor]] = {dtype: [] for dtype in DTYPES}
    for engine in engines:
        results, prox = compute(engine)
        for key, result in results.items():
            if result.numbers.numel() == 0:
                cases[key] = result.checksum
                continue
            parts = numbers[key.split("/")[1]]
            start = sum(part.numel() for part in parts)
            cases[key] = [start, start + result.numbers.numel()]
            parts.append(result.numbers)
        cases |= prox
    FIXTURES.mkdir(exist_ok=True)
    lines = ",\n".join(f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in cases.items())
    head = f'"surroundings": {json.dumps(surroundings())},\n  "functions": "{functions()}"'
    (FIXTURES / "bits.json").write_text(f'{{\n  {head},\n  "cases": {{\n{lines}\n  }}\n}}\n')
    torch.save({dtype: _flat(parts, DTYPES[dtype]) for dtype, parts in numbers.items()}, FIXTURES / "bits.pt")


def main() -> int:
    """Record or check; the exit status is 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--record", action="store_true", help="write the fixtures, of every engine")
    action.add_argument("--check", action="store_true", help="print the keys of the cases that differ")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    parser.add_argument("engines", nargs="*", metavar="ENGINE", help=f"with --check: {', '.join(ENGINES)}")
    arguments = parser.parse_args()
    if unknown := set(arguments.engines) - set(ENGINES):
        parser.error(f"no such engine: {', '.join(sorted(unknown))}")
    if arguments.record and arguments.engines:
        parser.error("--record writes every engine: a record of some would lose the others")
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported, by the first step of its engine
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    torch.set_num_threads(arguments.threads)
    if arguments.record:
        record(ENGINES)
        return 0
    failed = False
    for engine in arguments.engines or ENGINES:
        if (reason := why_not_comparable(engine)) is not None:
            print(f"{engine}: skipped, {reason}")
            continue
        different = differing(engine)
        failed |= bool(different)
        print(f"{engine}: {len(different)} differ", *different, sep="\n  ")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
