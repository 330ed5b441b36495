"""Markdown from results: one function per kind, from the JSON alone."""

from __future__ import annotations

from collections.abc import Iterable

from . import digits_task, text_task
from .baselines import LABELS
from .floors import number
from .markdown import NOT_MEASURED, count, duration, group_label, microseconds, stamp, table
from .results import Result, Row

_OVERVIEW = (
    ("25M", "l0", None),
    ("25M", "l1", None),
    ("25M", "tl1", None),
    ("5000x5000", "l0", 1),
    ("ResNet-20", "l0", None),
    ("ResNet-18", "l0", None),
    ("ResNet-18", "l0", 1),
    ("ResNet-50", "l0", None),
    ("GPT-2 small", "l0", None),
)
"""(shape, penalty, group_dim) of the cases that the overview and the picture show, where they were measured."""

_HEADLINES = (
    ("ResNet-18", "l0", None),
    ("ResNet-18", "l0", 1),
    ("5000x5000", "l0", 1),
    ("GPT-2 small", "l0", None),
)
"""The four of them on the front page: elements and channels, small and large, and the one that costs the most."""

_BASELINES = ("reference", "compiled", "fused_sgd", "channel_loop", "pat")


def speed_up(row: Row, engine: str, baseline: str) -> str:
    """How many times faster than a baseline, or why there is no number."""
    ratio = row["time_over"][engine].get(baseline)
    return "–" if ratio is None else f"{1 / ratio['median']:.3g}×"


def _measured(result: Result) -> list[Row]:
    return [row for row in result["rows"] if "skipped" not in row]


def _chosen(result: Result, cases: Iterable[tuple[str, str, int | None]]) -> list[Row]:
    """The rows of some cases in float32, in their order; what was not measured is left out."""
    by_case = {
        (row["shape"], row["penalty"], row["group_dim"]): row
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
        over_sgd = row["time_over"][engine].get("fused_sgd")
        tensors = f"{row['tensors']} tensor{'s' if row['tensors'] > 1 else ''}"
        cells.append(
            [
                f"{row['shape']} ({tensors}, {count(row['elements'])})",
                row["penalty"],
                group_label(row["group_dim"]),
                duration(row["contenders"][engine]["median_s"]),
                speed_up(row, engine, "reference"),
                "–" if over_sgd is None else f"{over_sgd['median']:.2f}",
                f"{row['contenders'][engine]['share_of_copy']:.0%}",
            ]
        )
    if not cells:
        return NOT_MEASURED
    header = [
        "parameters",
        "penalty",
        "over",
        "step",
        "speed-up over PyTorch",
        "time over `SGD(fused=True)`",
        "share of copy bandwidth",
    ]
    return table(header, cells) + "\n\n" + stamp(result)


def headline(result: Result) -> str:
    """The four rows of the front page."""
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
    """Every case: time, bandwidth, speed-up over every baseline."""
    parts = []
    for engine in result["engines"]:
        baselines = [name for name in _BASELINES if name != engine]
        rows = [
            [
                row["case"],
                duration(row["contenders"][engine]["median_s"]),
                f"{row['contenders'][engine]['gb_per_s']:.3g}",
                f"{row['contenders'][engine]['share_of_copy']:.0%}",
                *(speed_up(row, engine, name) for name in baselines),
            ]
            for row in _measured(result)
        ]
        header = ["case", "step", "GB/s", "share of copy", *(f"over {LABELS[name]}" for name in baselines)]
        title = f"{LABELS[engine]}; the columns to the right are speed-ups, time of the baseline over its own:"
        parts.append(f"{title}\n\n{table(header, rows)}")
    missing = _missing(result)
    if missing:
        parts.append("Not measured:\n\n" + "\n".join(missing))
    return "\n\n".join([*parts, stamp(result)])


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


KINDS = {"throughput": throughput, "host": host, "memory": memory, "floors": floors, "train": digits_task.table, "text": text_task.table}
"""The function of every result file; also blocks of a README, beside ``headline`` and ``overview``."""
