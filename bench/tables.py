"""Markdown from results: one function per kind, from the JSON alone."""

from __future__ import annotations

from collections.abc import Iterable

from . import accuracy_tables, digits_task, latency, sizes, targets_task, text_task
from .baselines import LABELS
from .cases import BASES
from .floors import number
from .markdown import NOT_MEASURED, count, duration, group_label, microseconds, stamp, table
from .results import Result, Row
from .throughput import BASELINES

_Chosen = tuple[str, str, int | None, str]
"""(shape, penalty, group_dim, base) of a case."""

_OVERVIEW: tuple[_Chosen, ...] = (
    ("25M", "l0", None, "sgd"),
    ("25M", "l1", None, "sgd"),
    ("25M", "tl1", None, "sgd"),
    ("5000x5000", "l0", 1, "sgd"),
    ("ResNet-20", "l0", None, "sgd"),
    ("ResNet-18", "l0", None, "sgd"),
    ("ResNet-18", "l0", 1, "sgd"),
    ("ResNet-50", "l0", None, "sgd"),
    ("GPT-2 small", "l0", None, "sgd"),
    ("GPT-2 small", "l0", None, "adamw"),
)
"""The cases that the overview and the picture show, where they were measured."""

_HEADLINES: tuple[_Chosen, ...] = (
    ("ResNet-18", "l0", None, "sgd"),
    ("ResNet-18", "l0", 1, "sgd"),
    ("GPT-2 small", "l0", None, "sgd"),
    ("GPT-2 small", "l0", None, "adamw"),
)
"""Those on the front page: elements and channels, small and large, and AdamW."""

_OPTIMIZERS = {
    "sgd": "`RVSM`",
    "adamw": "`RVSMAdamW`",
    "wrapper": "`RVSMWrapper` around `torch.optim.AdamW(fused=True)`",
    "pull": "the pull of `RVSMWrapper` alone",
}

_FUSED = {"sgd": "fused_sgd", "adamw": "fused_adamw"}
"""The dense step of a base."""


def base_of(row: Row) -> str:
    """The base of a row's case; results of 0.1.0 have SGD alone and do not say so."""
    return row.get("base", "sgd")


def speed_up(row: Row, engine: str, baseline: str) -> str:
    """How many times faster than a baseline, or why there is no number."""
    ratio = row["time_over"][engine].get(baseline)
    return "–" if ratio is None else f"{1 / ratio['median']:.3g}×"


def _measured(result: Result) -> list[Row]:
    return [row for row in result["rows"] if "skipped" not in row]


def _chosen(result: Result, cases: Iterable[_Chosen]) -> list[Row]:
    """The rows of some cases in float32, in their order; what was not measured is left out."""
    by_case = {
        (row["shape"], row["penalty"], row["group_dim"], base_of(row)): row
        for row in _measured(result)
        if row["dtype"] == "float32" and row.get("method", "rvsm") == "rvsm" and not isinstance(row["group_dim"], list)
    }
    return [by_case[case] for case in cases if case in by_case]


def overview_rows(result: Result) -> list[Row]:
    """The cases that say most: of the overview, or those of a smoke run, which has none of them."""
    return _chosen(result, _OVERVIEW) or [row for row in _measured(result) if row["dtype"] == "float32"]


def _summary(result: Result, rows: Iterable[Row]) -> str:
    """A short table: the step, and its price beside the reference, a dense step and a copy."""
    engine = result["engines"][0]
    cells = []
    for row in rows:
        over_fused = row["time_over"][engine].get(_FUSED.get(base_of(row), ""))
        tensors = f"{row['tensors']} tensor{'s' if row['tensors'] > 1 else ''}"
        cells.append(
            [
                f"{row['shape']} ({tensors}, {count(row['elements'])})",
                _OPTIMIZERS[base_of(row)],
                row["penalty"],
                group_label(row["group_dim"]),
                duration(row["contenders"][engine]["median_s"]),
                speed_up(row, engine, "reference"),
                "–" if over_fused is None else f"{over_fused['median']:.2f}",
                f"{row['contenders'][engine]['share_of_copy']:.0%}",
            ]
        )
    if not cells:
        return NOT_MEASURED
    header = [
        "parameters",
        "optimizer",
        "penalty",
        "over",
        "step",
        "speed-up over PyTorch",
        "time over torch's fused step",
        "share of copy bandwidth",
    ]
    return table(header, cells) + "\n\n" + stamp(result)


def headline(result: Result) -> str:
    """The rows of the front page."""
    return _summary(result, _chosen(result, _HEADLINES))


def overview(result: Result) -> str:
    """The same for every case of the picture."""
    return _summary(result, overview_rows(result))


def _missing(result: Result) -> list[str]:
    """Footnotes: what was not measured, and why."""
    reasons: dict[str, list[str]] = {}
    for row in result["rows"]:
        if "skipped" in row:
            reasons.setdefault(row["skipped"], []).append(row["case"])
        for name, reason in row.get("not_measured", {}).items():
            if name != "channel_loop" or row["group_dim"] is not None:  # the loop is for groups; that says itself
                reasons.setdefault(f"{LABELS[name]}: {reason}", []).append(row["case"])
    return [f"- {reason} ({len(cases)} case{'s' if len(cases) > 1 else ''})" for reason, cases in reasons.items()]


def throughput(result: Result) -> str:
    """Every case: time, bandwidth, speed-up over every baseline. A table for each optimizer, with its baselines."""
    parts = []
    for engine in result["engines"]:
        for base in BASES:
            measured = [row for row in _measured(result) if base_of(row) == base]
            if measured:
                title = f"{LABELS[engine]}, {_OPTIMIZERS[base]}; the columns to the right are speed-ups, time of the"
                parts.append(f"{title} baseline over its own:\n\n{_speed(measured, engine, base)}")
    missing = _missing(result)
    if missing:
        parts.append("Not measured:\n\n" + "\n".join(missing))
    return "\n\n".join([*parts, stamp(result)])


def _speed(measured: list[Row], engine: str, base: str) -> str:
    """The table of an engine and a base; a baseline that was measured in no case has no column."""
    found = {name for row in measured for name in row["time_over"][engine]}
    baselines = [name for name in BASELINES[base] if name in found]
    rows = [
        [
            row["case"],
            duration(row["contenders"][engine]["median_s"]),
            f"{row['contenders'][engine]['gb_per_s']:.3g}",
            f"{row['contenders'][engine]['share_of_copy']:.0%}",
            *(speed_up(row, engine, name) for name in baselines),
        ]
        for row in measured
    ]
    return table(["case", "step", "GB/s", "share of copy", *(f"over {LABELS[name]}" for name in baselines)], rows)


def host(result: Result) -> str:
    """Microseconds of step() by number of parameters."""
    names = list(dict.fromkeys(name for row in result["rows"] for name in row["microseconds"]))
    rows = [
        [
            f"{row['parameters']:,}",
            *(microseconds(row["microseconds"][n]["median"]) if n in row["microseconds"] else "–" for n in names),
        ]
        for row in result["rows"]
    ]
    header = ["one-element parameters", *(f"{LABELS[name]} (us)" for name in names)]
    return table(header, rows) + "\n\n" + stamp(result)


def memory(result: Result) -> str:
    """Peak bytes beyond SGD's."""
    names = list(dict.fromkeys(name for row in result["rows"] for name in row.get("beyond_sgd_bytes", {})))
    rows = []
    for row in result["rows"]:
        beyond = row.get("beyond_sgd_bytes", {})
        values = [
            f"{beyond[n] / 2**20:+.2f} MiB ({row['beyond_sgd_per_parameter'][n]:+.2f} B)" if n in beyond else "–"
            for n in names
        ]
        rows.append([row["case"], f"{row['one_float_per_group'] / 2**20:.2f} MiB", *values])
    header = ["case", "one float per group", *(f"{LABELS[name]} (per parameter)" for name in names)]
    reasons = sorted({reason for row in result["rows"] for reason in row["not_measured"].values()})
    notes = [f"Not measured: {'; '.join(reasons)}"] if reasons else []
    resolution = max((row["resolution_bytes"] for row in result["rows"]), default=0)
    if resolution:
        notes.append(f"Peak of the resident set, which cannot tell differences below {resolution // 1024} KiB.")
    return "\n\n".join([table(header, rows), *notes, stamp(result)])


def floors(result: Result) -> str:
    """Measured against floor."""
    rows = []
    for row in result["rows"]:
        limit = f"{'≥' if row['at_least'] else '≤'} {number(row['limit'], row['unit'])}"
        value = "–" if row["value"] is None else number(row["value"], row["unit"])
        verdict = {True: "holds", False: "**missed**", None: f"not measured: {row['note']}"}[row["passed"]]
        if row.get("first_value") is not None:
            verdict += f" (measured twice; first {number(row['first_value'], row['unit'])})"
        if row.get("allowance"):
            verdict += f" ({row['note']})"
        rows.append([f"{row['where']}: {row['measure']}", limit, value, verdict])
    note = "\n\n*A smoke run: small sizes, not a verdict.*" if result["effort"] == "smoke" else ""
    return table(["where and what", "floor", "measured", ""], rows) + note + "\n\n" + stamp(result)


KINDS = {
    "throughput": throughput,
    "host": host,
    "memory": memory,
    "floors": floors,
    "train": digits_task.table,
    "text": text_task.table,
    "targets": targets_task.table,
    "accuracy": accuracy_tables.table,
    "sizes": sizes.render,
    "latency": latency.render,
}
"""The function of every result file; also blocks of a README, beside ``headline`` and ``overview``."""
