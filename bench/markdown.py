"""The pieces of a Markdown text about results: tables, numbers with units, where a result comes from."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence

from .results import BUSY, Result

NOT_MEASURED = "*not measured yet*"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column to the left, numbers to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def device_name(result: Result) -> str:
    """The device that was measured, with the threads of a CPU."""
    machine, threads = result["machine"], result["threads"]
    if result["device"] == "cuda":
        return machine["gpu"]
    return f"{machine['cpu']}, {threads} thread{'s' if threads > 1 else ''}"


def stamp(result: Result) -> str:
    """One line that says where a table comes from."""
    versions, commit = result["versions"], result["commit"]
    where = f"{device_name(result)}; {result['machine']['system']}; torch {versions['torch']}"
    where += f"; rvsm_kernels {versions['rvsm_kernels']}"
    if commit is not None:
        head, _, dirty = commit.partition("-")
        where += f", commit {head[:10]}{'-' + dirty if dirty else ''}"
    trouble = "" if result.get("complete", True) else " The run was interrupted."
    busy = result.get("busy_share")
    if busy is not None and busy > BUSY:
        trouble += f" Other programs kept {busy:.0%} of the cores busy when it began."
    return f"*{where}. `{result['command']}`.{trouble}*"


def spread(
    values: Sequence[float],
    places: int = 1,
    middle: Callable[[Sequence[float]], float] = statistics.fmean,
    scale: float = 100,
) -> str:
    """Mean (or another middle) and, in brackets, the least and the greatest; in percent unless told otherwise."""
    low, mid, high = (f"{scale * v:.{places}f}" for v in (min(values), middle(values), max(values)))
    return mid if low == high else f"{mid} ({low}–{high})"


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def microseconds(value: float) -> str:
    """Whole from 100 on, three digits below."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def group_label(group_dim: object) -> str:
    if group_dim is None:
        return "elements"
    return {"0": "output channels (0)", "1": "input channels (1)"}.get(str(group_dim), f"group_dim {group_dim}")


def count(elements: int) -> str:
    """12,345,678 as 12.3 M."""
    for unit, size in ((" M", 1e6), (" K", 1e3)):
        if elements >= size:
            return f"{elements / size:.3g}{unit}"
    return str(elements)
