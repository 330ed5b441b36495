"""``python -m bench floors``: what the engine promises, measured on this machine; exits 1 if a floor falls short."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import rvsm_kernels as rk

from . import backward, crowd, readings, scheduled, shards
from .baselines import Unavailable, optimizer_over, start
from .cases import CONV, MATRIX, Case, small
from .config import Config
from .peak import RSS_RESOLUTION, in_child
from .problems import CUT, DENSITY, SGD_OPTIONS, build
from .results import Results, Row, read_json
from .throughput import COPY, copier, release, too_large
from .timing import clock_for, interleave, launched

_NARROW = 0.15
"""A floor missed by less than this share is measured once more, with four times the samples: noise is of that size
on a shared machine."""
_MORE = 4

_LARGE_MATRIX = "10000x10000"

_CUDA_ALIGNMENT = 256
"""Arrays of scratch on a GPU begin at multiples of so many bytes."""


@dataclass(frozen=True)
class Measured:
    """A value, and what it may miss the limit by because the measurement cannot see less."""

    value: float
    limit: float | None = None
    allowance: float = 0.0
    note: str = ""


Measure = Callable[[Config, bool, int], Measured]
"""(config, smoke, more) -> what was measured; ``more`` multiplies the samples."""


@dataclass(frozen=True)
class Floor:
    """One row of the table of floors.

    Attributes:
        limit: what the value must reach; a measure may give its own (bytes depend on the case).
    """

    where: str
    measure: str
    limit: float
    run: Measure
    unit: str
    at_least: bool

    def passed(self, found: Measured) -> bool:
        limit = self.limit if found.limit is None else found.limit
        if self.at_least:
            return found.value >= limit - found.allowance
        return found.value <= limit + found.allowance

    def narrow(self, found: Measured) -> bool:
        """Missed, but by so little that it may be noise."""
        limit = self.limit if found.limit is None else found.limit
        return not self.passed(found) and abs(found.value - limit) <= _NARROW * limit


def at_most(where: str, measure: str, limit: float, run: Measure, unit: str = "x") -> Floor:
    """A floor on a price: time, launches, bytes."""
    return Floor(where, measure, limit, run, unit, at_least=False)


def at_least(where: str, measure: str, limit: float, run: Measure, unit: str = "x") -> Floor:
    """A floor on a gain: a speed-up, a share."""
    return Floor(where, measure, limit, run, unit, at_least=True)


def _sized(case: Case, smoke: bool) -> Case:
    return small(case) if smoke else case


def _fits(case: Case, contenders: int, config: Config) -> None:
    reason = too_large(case, contenders, config.device)
    if reason is not None:
        raise Unavailable(f"{case.name} {reason}")


def over(case: Case, other: str | Case, inverse: bool = False) -> Measure:
    """Time of the engine over a baseline's, or over its own on another case; or the inverse, a speed-up."""

    def run(config: Config, smoke: bool, more: int) -> Measured:
        engine, case_here = config.engines[0], _sized(case, smoke)
        _fits(case_here, 2, config)
        problem = build(case_here, config.device)
        steps = {"engine": start(engine, problem)}
        if isinstance(other, Case):
            steps["other"] = start(engine, build(_sized(other, smoke), config.device))
        else:
            steps["other"] = start(other, problem)
        timings = interleave(steps, clock_for(config.device), config.effort, more)
        pair = ("other", "engine") if inverse else ("engine", "other")
        ratio = timings.ratio(*pair)
        seconds = timings.seconds("engine").median
        return Measured(ratio.median, note=f"{ratio.samples} rounds, {seconds * 1e3:.3g} ms per step")

    return run


def first_over(case: Case, other: Case) -> Measure:
    """Time of the first step of an optimizer over that of one on another case: states are made, no cut is known."""

    def run(config: Config, smoke: bool, more: int) -> Measured:
        engine, steps = config.engines[0], {}
        for name, of in (("engine", _sized(case, smoke)), ("other", _sized(other, smoke))):
            _fits(of, 2, config)
            problem = build(of, config.device)
            groups = problem.groups(problem.parameters())
            steps[name] = lambda groups=groups, of=of: optimizer_over(groups, of.base, engine).step()
        ratio = interleave(steps, clock_for(config.device), config.effort, more).ratio("engine", "other")
        return Measured(ratio.median, note=f"{ratio.samples} rounds")

    return run


def beside(case: Case, made: Callable[[list[dict[str, Any]], str], torch.optim.Optimizer], plain: Case) -> Measure:
    """Time of an optimizer that does more than steps over the engine's steps alone.

    Args:
        made: (param groups, engine) -> the optimizer.
    """

    def run(config: Config, smoke: bool, more: int) -> Measured:
        engine, case_here = config.engines[0], _sized(case, smoke)
        _fits(case_here, 2, config)
        problem = build(case_here, config.device)
        step = made(problem.groups(problem.parameters()), engine).step
        step()
        steps = {"engine": step, "plain": start(engine, build(_sized(plain, smoke), config.device))}
        ratio = interleave(steps, clock_for(config.device), config.effort, more).ratio("engine", "plain")
        return Measured(ratio.median, note=f"{ratio.samples} rounds")

    return run


def cut_over_copy(case: Case, ties: bool) -> Measure:
    """Time of the cut of a tensor alone, of which nothing is known, over that of a copy of the tensor.

    Args:
        ties: of a tensor of two values.
    """

    def run(config: Config, smoke: bool, more: int) -> Measured:
        case_here = _sized(case, smoke)
        _fits(case_here, 2, config)
        w = build(case_here, config.device).weights[0]
        w = torch.where(w > 0, CUT, -2 * CUT) if ties else w
        cut, last, target = torch.zeros(()), torch.zeros(2, dtype=torch.int64), torch.zeros_like(w)
        survivors = math.ceil(DENSITY * w.numel())

        def select() -> None:
            last.fill_(-1)
            torch.ops.rvsm_kernels.cuts_([cut], [last], [w], [None], [None], [survivors])

        steps = {"cut": select, COPY: lambda: target.copy_(w)}
        timings = interleave(steps, clock_for(config.device), config.effort, more)
        ratio = timings.ratio("cut", COPY)
        return Measured(ratio.median, note=f"{ratio.samples} rounds, {timings.seconds('cut').median * 1e3:.3g} ms")

    return run


def over_alone(case: Case) -> Measure:
    """Time of steps with a SparsitySchedule over that of the same steps without."""

    def run(config: Config, smoke: bool, more: int) -> Measured:
        case_here = _sized(case, smoke)
        _fits(case_here, 2, config)
        ratio = scheduled.measure(case_here, config.engines[0], config.device, config.effort, more)
        return Measured(ratio.median, note=f"{ratio.samples} rounds of {scheduled.EVERY} steps")

    return run


def share(case: Case, engine: str | None = None) -> Measure:
    """Counted bytes per second over the bytes per second of a large copy."""

    def run(config: Config, smoke: bool, more: int) -> Measured:
        case_here = _sized(case, smoke)
        _fits(case_here, 1, config)
        copy, copied_bytes = copier(config.device, config.effort)
        steps = {"engine": start(engine or config.engines[0], build(case_here, config.device)), COPY: copy}
        timings = interleave(steps, clock_for(config.device), config.effort, more)
        ratio = timings.ratio(COPY, "engine")
        bandwidth = copied_bytes / timings.seconds(COPY).median / 1e9
        value = ratio.median * case_here.counted_bytes / copied_bytes
        return Measured(value, note=f"{ratio.samples} rounds, copy {bandwidth:.0f} GB/s")

    return run


def host_us(case: Case, engine: str | None = None) -> Measure:
    """Microseconds that step() keeps the host."""

    def run(config: Config, smoke: bool, more: int) -> Measured:
        step = start(engine or config.engines[0], build(_sized(case, smoke), config.device))
        timings = interleave({"engine": step}, clock_for(config.device, host=True), config.effort, more)
        seconds = timings.seconds("engine")
        return Measured(seconds.median * 1e6, note=f"{seconds.samples} samples")

    return run


def launches(case: Case, engine: str | None = None) -> Measure:
    """Kernels that one step launches, counted by torch's profiler."""

    def run(config: Config, smoke: bool, more: int) -> Measured:
        step = start(engine or config.engines[0], build(_sized(case, smoke), config.device))
        on_device = launched(step)
        if not on_device:
            raise Unavailable("the profiler saw no launch")
        copies = [name for name in on_device if name.startswith(("Memcpy", "Memset"))]
        return Measured(len(on_device) - len(copies), note=f"and {len(copies)} copies")

    return run


@functools.cache
def _sgd_bytes(shape: str, device: str) -> tuple[int, int]:
    """Peak bytes of torch.optim.SGD, measured twice: the difference shows what the measurement resolves."""
    answers = [in_child(Case(shape), "fused_sgd", device) for _ in range(2)]
    if "unavailable" in answers[0]:
        raise Unavailable(answers[0]["unavailable"])
    return answers[0]["bytes"], answers[1]["bytes"]


def memory(case: Case) -> Measure:
    """Peak bytes beyond torch.optim.SGD's."""

    def run(config: Config, smoke: bool, more: int) -> Measured:
        case_here = _sized(case, smoke)
        sgd = _sgd_bytes(case_here.shape, config.device)
        answer = in_child(case_here, config.engines[0], config.device)
        if "unavailable" in answer:
            raise Unavailable(answer["unavailable"])
        own = answer["bytes"]
        resolution = _CUDA_ALIGNMENT if config.device == "cuda" else RSS_RESOLUTION
        allowance = max(resolution, abs(sgd[0] - sgd[1]))
        note = f"the measurement resolves {allowance / 1024:.3g} KiB"
        return Measured(own - min(sgd), limit=4.0 * case_here.groups, allowance=allowance, note=note)

    return run


def crowded(case: Case, other: str) -> Measure:
    """Time of the engine over a baseline's in each of several processes at the same time; see :mod:`bench.crowd`."""

    def run(config: Config, smoke: bool, more: int) -> Measured:
        found = crowd.measure(_sized(case, smoke), (config.engines[0], other), config.effort, more)
        note = f"{crowd.PROCESSES} processes of {crowd.THREADS} threads, {found.seconds * 1e3:.3g} ms per step"
        return Measured(found.ratio, note=note)

    return run


def sharded(case: Case) -> Measure:
    """Time of a sharded step over that of a plain one of the shards' size; see :mod:`bench.shards`."""

    def run(config: Config, smoke: bool, more: int) -> Measured:
        found, messages = shards.measure(_sized(case, smoke), config.engines[0], config.effort, more)
        note = f"{shards.RANKS} ranks of 1 thread, {messages} messages, {found.seconds * 1e3:.3g} ms per step"
        return Measured(found.ratio, note=note)

    return run


def in_backward_us(case: Case, other: str) -> Measure:
    """Microseconds a parameter that steps in backward() take more than a baseline's; see :mod:`bench.backward`."""

    def run(config: Config, smoke: bool, more: int) -> Measured:
        names = config.engines[0], other
        found = backward.measure(_sized(case, smoke), names, config.device, config.effort, more)
        return Measured(found.median * 1e6, note=f"{found.samples} rounds, {backward.COUNT} parameters")

    return run


def _with_unit_norm(groups: list[dict[str, Any]], engine: str) -> torch.optim.Optimizer:
    return rk.RVSM(groups, **SGD_OPTIONS, unit_norm=True, engine=engine)


def _adaptive(groups: list[dict[str, Any]], engine: str) -> torch.optim.Optimizer:
    return rk.AdaptiveHardThreshold(groups, **SGD_OPTIONS, density=DENSITY, engine=engine)


def reading(name: str, case: Case, copies: int = 0) -> Measure:
    """Time of a reading over that of a plain step, or over copies of the weights; see :mod:`bench.readings`."""

    def run(config: Config, smoke: bool, more: int) -> Measured:
        case_here = _sized(case, smoke)
        _fits(case_here, 2 + copies, config)
        engine, device = config.engines[0], config.device
        ratio = readings.measure(name, case_here, engine, device, config.effort, more, copies)
        return Measured(ratio.median, note=f"{ratio.samples} rounds")

    return run


_OVER_SGD = "time over torch.optim.SGD(fused=True)"
_OVER_ADAMW = "AdamW, l0: time over torch.optim.AdamW(fused=True)"


def _cpu() -> list[Floor]:
    """The floors of a CPU, as the table states them."""
    big = "CPU, 25 M elements"
    floors = [at_most(big, f"{p}: {_OVER_SGD}", 1.0, over(Case("25M", p), "fused_sgd")) for p in ("l0", "l1")]
    floors.append(at_most(big, "time of tl1 over l0", 2.0, over(Case("25M", "tl1"), Case("25M"))))
    for shape in (MATRIX, CONV):
        for base, word in (("sgd", ""), ("adamw", "AdamW, ")):
            for dim in (0, 1):
                measure = f"{shape}: {word}time of l0 groups (group_dim {dim}) over elementwise"
                run = over(Case(shape, "l0", dim, base=base), Case(shape, base=base))
                floors.append(at_most(big, measure, 1.3, run))
    speed_up = over(Case("25M"), "reference", inverse=True)
    resnet = over(Case("ResNet-20"), "fused_sgd")
    floors += [
        at_least(big, "l0: speed-up over the PyTorch reference", 10.0, speed_up),
        at_most("CPU, ResNet-20-shaped (65 tensors)", _OVER_SGD, 0.5, resnet),
        at_most("CPU, 1,000 one-element parameters", "step()", 100.0, host_us(Case("1000 of 1")), "us"),
    ]
    large, resnet_20, tiny = (Case(shape, base="adamw") for shape in ("25M", "ResNet-20", "1000 of 1"))
    floors += [
        at_most(big, _OVER_ADAMW, 1.0, over(large, "fused_adamw")),
        at_most("CPU, ResNet-20-shaped (65 tensors)", _OVER_ADAMW, 0.5, over(resnet_20, "fused_adamw")),
        at_most("CPU, 1,000 one-element parameters", "AdamW: step()", 130.0, host_us(tiny), "us"),
    ]
    for base, name in (("sgd", "SGD"), ("adamw", "AdamW")):
        more_than = f"{name}, l0, in backward, an optimizer a parameter: more than torch.optim.{name}(fused=True)"
        run = in_backward_us(Case("1 of 1", base=base), f"fused_{base}")
        floors.append(at_most("CPU, one-element parameters", more_than, 2.0, run, "us"))
    pull = Case("25M", base="pull")
    half, stochastic = (Case("25M", dtype="bfloat16", precision=p) for p in ("", "stochastic rounding"))
    master = Case("25M", dtype="bfloat16", precision="master weights")
    topk = Case("25M", "topk")
    several, all_of_them = Case("25 of 1000000"), Case("25 of 1000000", "topk", budget="global")
    many, fewer = Case("21000 of 16"), Case("5250 of 16")
    floors += [
        at_most(big, "the wrapper's pull: time over w.mul_(c)", 1.2, over(pull, "scaled")),
        at_most(big, "bfloat16 with master weights: time over float32", 1.1, over(master, Case("25M"))),
        at_most(big, "bfloat16, stochastic rounding: time over nearest", 1.5, over(stochastic, half)),
        at_most(big, "topk: time over l0", 1.3, over(topk, Case("25M"))),
        at_most(big, "topk: the first step over that of l0", 2.0, first_over(topk, Case("25M"))),
        at_most(big, "unit_norm, l0: time over l0", 1.5, beside(Case("25M"), _with_unit_norm, Case("25M"))),
        at_most(big, "AdaptiveHardThreshold: time over l0", 3.0, beside(topk, _adaptive, Case("25M"))),
        at_most(big, "topk: the cut alone over a copy of w", 0.8, cut_over_copy(topk, ties=False)),
        at_most(big, "topk: the same, a tensor of ties", 1.6, cut_over_copy(topk, ties=True)),
        at_most("CPU, 25 tensors of 1 M", "topk, one cut over all: time over l0", 1.3, over(all_of_them, several)),
        at_most("CPU, 25 tensors of 1 M", "the same: the first step", 2.0, first_over(all_of_them, several)),
        at_most(big, f"l0, SparsitySchedule every {scheduled.EVERY}: time over l0", 1.05, over_alone(Case("25M"))),
        at_most("CPU, 25 tensors of 1 M", "the same, one cut over all tensors", 1.05, over_alone(several)),
        at_most(big, f"{MATRIX}: 2:4 over l0", 1.3, over(Case(MATRIX, "nm"), Case(MATRIX))),
        at_most(big, "statistics in the step: time over a step without", 1.05, reading("statistics", Case("25M"))),
        at_most(big, "penalty_value(): time over a step", 0.6, reading("penalty_value", Case("25M"))),
        at_most(big, "sparsity(): time over a step", 1.0, reading("sparsity", Case("25M"))),
        at_most(
            big,
            "sparse_weights(), entered and left: time over three copies of w",
            1.2,
            reading("sparse_weights", Case("25M"), copies=3),
        ),
        at_most("CPU, 21,000 tensors", "time over 5,250 tensors (linear: 4)", 5.0, over(many, fewer)),
        at_most(
            "CPU, 4 processes of 2 threads, 5 M elements each",
            _OVER_ADAMW,
            1.0,
            crowded(Case("5M", base="adamw"), "fused_adamw"),
        ),
    ]
    for measure, limit, case in (
        ("l0: time of a sharded step over a plain one", 1.1, Case(MATRIX)),
        ("l0 groups across the ranks (group_dim 1): the same", 1.5, Case(MATRIX, "l0", 1)),
    ):
        floors.append(at_most(f"CPU, {shards.RANKS} ranks, {MATRIX} per rank", measure, limit, sharded(case)))
    return floors


def _cuda() -> list[Floor]:
    """The floors of a GPU, as the table states them."""
    floors = []
    for shape in ("100M", "GPT-2 small"):
        for penalty in ("l0", "l1", "tl1"):
            run = share(Case(shape, penalty))
            floors.append(at_least(f"GPU, {shape}", f"{penalty}: share of copy bandwidth", 0.9, run, ""))
    for shape in (_LARGE_MATRIX, "GPT-2 small"):
        for dim in (0, 1):
            measure = f"l0 groups (group_dim {dim}): share of copy bandwidth"
            floors.append(at_least(f"GPU, {shape}", measure, 0.8, share(Case(shape, "l0", dim)), ""))
    for shape in ("ResNet-18", "ResNet-50", "GPT-2 small"):
        floors.append(at_most(f"GPU, {shape}-shaped", _OVER_SGD, 1.0, over(Case(shape), "fused_sgd")))
    for shape in ("100M", "ResNet-18", "GPT-2 small", "1000 of 1"):
        floors.append(at_most(f"GPU, {shape}", "launches per elementwise step", 1, launches(Case(shape)), ""))
    for shape in (_LARGE_MATRIX, "ResNet-18", "GPT-2 small"):
        for dim in (0, 1):
            measure = f"launches per group step (group_dim {dim})"
            floors.append(at_most(f"GPU, {shape}", measure, 3, launches(Case(shape, "l0", dim)), ""))
    host = host_us(Case("ResNet-18"))
    floors.append(at_most("GPU, ResNet-18-shaped (62 tensors)", "host time of step()", 25.0, host, "us"))
    return floors


def _triton() -> list[Floor]:
    """The floors of the Triton engine on a GPU that the native engine serves too."""
    large, few = Case("100M"), Case("ResNet-18")
    floors = []
    for penalty in ("l0", "l1", "tl1"):
        run = share(Case("100M", penalty), "triton")
        floors.append(at_least("GPU, triton, 100M", f"{penalty}: share of copy bandwidth", 0.85, run, ""))
    for case, most in ((large, 1), (few, 1), (Case("ResNet-18", "l0", 1), 3)):
        what = f"launches per step of {case.name}"
        floors.append(at_most("GPU, triton", what, most, launches(case, "triton"), ""))
    host = host_us(few, "triton")
    floors.append(at_most("GPU, triton, ResNet-18-shaped (62 tensors)", "host time of step()", 80.0, host, "us"))
    return floors


def _anywhere() -> list[Floor]:
    """One float per group at most, so nothing at all for elements."""
    what = "memory beyond torch.optim.SGD's"
    matrix_cases = (Case(MATRIX), Case(MATRIX, "l0", 0), Case(MATRIX, "l0", 1))
    return [at_most("anywhere", f"{case.name}: {what}", 4.0 * case.groups, memory(case), "B") for case in matrix_cases]


def floors_of(device: str, engines: tuple[str, ...]) -> list[Floor]:
    """The floors of engines on a device: those of the first, and on a GPU Triton's own, which are lower."""
    if device != "cuda":
        return _cpu() + _anywhere()
    own = _triton() if "triton" in engines else []
    return own if engines[0] == "triton" else _cuda() + own + _anywhere()


def measure(floor: Floor, config: Config) -> Row:
    """One row: measured, and once more if narrowly missed."""
    row: Row = {
        "where": floor.where,
        "measure": floor.measure,
        "at_least": floor.at_least,
        "limit": floor.limit,
        "unit": floor.unit,
    }
    smoke = config.effort.name == "smoke"
    try:
        first = found = floor.run(config, smoke, 1)
        again = floor.narrow(found) and not smoke
        if again:
            found = floor.run(config, smoke, _MORE)
    except Unavailable as error:
        return {**row, "value": None, "passed": None, "note": str(error)}
    return {
        **row,
        "limit": floor.limit if found.limit is None else found.limit,
        "value": found.value,
        "allowance": found.allowance,
        "note": found.note,
        "first_value": first.value if again else None,
        "passed": floor.passed(found),
    }


def number(value: float, unit: str) -> str:
    """A value as the floors are written: bytes whole, the rest with three digits."""
    if unit == "B":
        return f"{value:,.0f} B"
    return f"{value:.3g}{' ' + unit if unit == 'us' else unit}"


def line(row: Row) -> str:
    """A row in one line, for the terminal."""
    if row["value"] is None:
        return f"----  not measured: {row['where']}: {row['measure']} ({row['note']})"
    sense = ">=" if row["at_least"] else "<="
    again = "" if row["first_value"] is None else f"; measured again after {number(row['first_value'], row['unit'])}"
    return (
        f"{'pass' if row['passed'] else 'FAIL'}  {number(row['value'], row['unit']):>12}"
        f" {sense} {number(row['limit'], row['unit']):<10} {row['where']}: {row['measure']} ({row['note']}{again})"
    )


def standing(folder: Path) -> str:
    """Where the floors of a folder stand, in one line."""
    result = read_json(folder / "floors.json")
    if result is None:
        return "floors: not measured"
    rows = result["rows"]
    if result["effort"] == "smoke":
        return f"floors: {len(rows)} were measured with small sizes and few samples; that is no verdict"
    lacking = {
        word: [f"{row['where']}: {row['measure']}" for row in rows if row["passed"] is passed]
        for word, passed in (("missed", False), ("not measured", None))
    }
    held = sum(row["passed"] is True for row in rows)
    parts = [f"floors: {held} of {len(rows)} hold here"]
    return "; ".join([*parts, *(f"{word}: {' | '.join(names)}" for word, names in lacking.items() if names)])


def run(config: Config) -> bool:
    """Measure every floor of the device, write floors.json, and say whether all hold."""
    wanted = floors_of(config.device, config.engines)
    if config.effort.name == "smoke":
        wanted = wanted[:-2]  # each measure of memory starts processes: one is enough to show that it can be done
    with Results("floors", config) as results, tqdm(wanted, desc="floors", unit="floor", disable=None) as bar:
        for floor in bar:
            bar.set_postfix_str(floor.measure[:40])
            results.add(measure(floor, config))
            release(config.device)
            tqdm.write(line(results.rows[-1]))
    print(standing(config.out))
    return config.effort.name == "smoke" or all(row["passed"] is not False for row in results.rows)
