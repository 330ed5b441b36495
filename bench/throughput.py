"""``python -m bench throughput``: the time of a step, its bandwidth, and its ratio to every baseline."""

from __future__ import annotations

import contextlib
import gc
import os

import torch
from tqdm import tqdm

from . import cases
from .baselines import Unavailable, start
from .cases import Case
from .config import Config, Effort
from .problems import build
from .results import Results, Row
from .timing import Quartiles, Step, Timings, clock_for, interleave

BASELINES: dict[str, tuple[str, ...]] = {
    "sgd": ("reference", "compiled", "fused_sgd", "channel_loop", "pat"),
    "adamw": ("reference", "fused_adamw", "cpu_adam", "pat"),
    "wrapper": ("reference", "fused_adamw"),
    "pull": ("reference", "scaled"),
}
"""The base of a case to what it is measured against."""

COPY = "copy"
"""The contender that moves bytes and does nothing else."""

_CASES = {"smoke": cases.SMOKE_CASES, "quick": cases.QUICK_CASES, "full": cases.FULL_CASES}


def copier(device: str, effort: Effort) -> tuple[Step, int]:
    """A large ``copy_``, and the bytes that it reads and writes."""
    source = torch.ones(effort.copy_elements, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source), 2 * source.numel() * source.element_size()


def available_bytes(device: str) -> int | None:
    """Memory that is free now, where the system says so."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    with contextlib.suppress(OSError, ValueError), open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return None


def release(device: str) -> None:
    """Give the memory of the last case back."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def too_large(case: Case, contenders: int, device: str) -> str | None:
    """Why a case does not fit, or None: every contender keeps weights and states, the reference's temporaries are about
    eight more."""
    free = available_bytes(device)
    needed = (2 + (1 + cases.BASES[case.base].states) * contenders + 8) * case.elements * case.itemsize
    if free is None or needed < 0.9 * free:
        return None
    return f"needs about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free"


def _wanted(case: Case, name: str, config: Config) -> str | None:
    """Why a baseline is left out of a run, or None."""
    if case.method != "rvsm" and name in ("compiled", "channel_loop", "pat"):
        return f"does not do the step of {case.method}"
    if name == "compiled" and case.group_dim is None and len(case.specs) > config.effort.compile_up_to:
        return f"left out of --{config.effort.name}: compiling takes longer than the run may"
    return None


def _seconds(quartiles: Quartiles) -> Row:
    return {
        "median_s": quartiles.median,
        "q25_s": quartiles.q25,
        "q75_s": quartiles.q75,
        "samples": quartiles.samples,
    }


def _ratio(quartiles: Quartiles) -> Row:
    return {
        "median": quartiles.median,
        "q25": quartiles.q25,
        "q75": quartiles.q75,
        "rounds": quartiles.samples,
    }


def _describe(case: Case) -> Row:
    return {
        "case": case.name,
        "shape": case.shape,
        "tensors": len(case.specs),
        "elements": case.elements,
        "groups": case.groups,
        "penalty": case.penalty,
        "group_dim": case.group_dim,
        "method": case.method,
        "base": case.base,
        "dtype": case.dtype,
        "counted_bytes": case.counted_bytes,
    }


def _evaluate(case: Case, config: Config, timings: Timings, copied_bytes: int) -> Row:
    """The measured part of a row."""
    contenders: Row = {}
    for name in timings.rounds:
        if name == COPY:
            continue
        # Bytes per second of the step over bytes per second of the copy, round by round.
        over_copy = timings.ratio(name, COPY).median
        contenders[name] = {
            **_seconds(timings.seconds(name)),
            "gb_per_s": case.counted_bytes / timings.seconds(name).median / 1e9,
            "share_of_copy": case.counted_bytes / copied_bytes / over_copy,
            "over_reference": timings.ratio(name, "reference").median,
        }
    names = [name for name in timings.rounds if name != COPY]
    time_over = {
        engine: {name: _ratio(timings.ratio(engine, name)) for name in names if name != engine}
        for engine in config.engines
    }
    copy_s = timings.seconds(COPY)
    return {
        "copy": {**_seconds(copy_s), "gb_per_s": copied_bytes / copy_s.median / 1e9},
        "contenders": contenders,
        "time_over": time_over,
    }


def measure(case: Case, config: Config) -> Row:
    """One row: every contender of a case, in turns."""
    names = [*config.engines, *(name for name in BASELINES[case.base] if name not in config.engines)]
    reason = too_large(case, len(names), config.device)
    if reason is not None:
        return {**_describe(case), "skipped": reason}
    problem = build(case, config.device)
    steps: dict[str, Step] = {}
    skipped: dict[str, str] = {}
    for name in names:
        left_out = _wanted(case, name, config)
        try:
            if left_out is not None:
                raise Unavailable(left_out)
            steps[name] = start(name, problem)
        except Unavailable as error:
            skipped[name] = str(error)
    steps[COPY], copied_bytes = copier(config.device, config.effort)
    timings = interleave(steps, clock_for(config.device), config.effort)
    return {**_describe(case), **_evaluate(case, config, timings, copied_bytes), "not_measured": skipped}


def line(row: Row, engines: tuple[str, ...]) -> str:
    """A row in one line, for the terminal."""
    if "skipped" in row:
        return f"{row['case']:<32} skipped: {row['skipped']}"
    engine = engines[0]
    own = row["contenders"][engine]
    ratios = "  ".join(f"{value['median']:.3g} x {name}" for name, value in row["time_over"][engine].items())
    return (
        f"{row['case']:<32} {own['median_s'] * 1e6:>11.1f} us {own['gb_per_s']:>7.1f} GB/s"
        f" {own['share_of_copy']:>5.0%} of copy   {ratios}"
    )


def run(config: Config) -> None:
    """Measure every case of the effort and write throughput.json."""
    with (
        Results("throughput", config) as results,
        tqdm(_CASES[config.effort.name], desc="throughput", unit="case", disable=None) as bar,
    ):
        for case in bar:
            bar.set_postfix_str(case.name)
            results.add(measure(case, config))
            release(config.device)
            tqdm.write(line(results.rows[-1], config.engines))
