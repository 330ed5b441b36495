"""The tables of ``python -m bench accuracy``, from accuracy.json alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

from . import markdown
from .results import Result, Row

Cells = dict[tuple[str, str, str, float], dict[int, float]]
"""(problem, of, method, share) to seed to accuracy, or to another number of a row."""

_WHAT = {
    "elements": "zeros among the weights",
    "channels": "zero channels between the layers, of each layer by their norms",
}


def one_shot(dense: str) -> str:
    """The name of the rows that one-shot pruning makes of a dense net."""
    return dense.replace("dense", "one-shot")


def trained(method: str) -> str:
    """The method whose training gave the rows of that name; the other way round."""
    return method.replace("one-shot", "dense")


def _cells(rows: Iterable[Row], what: str = "accuracy") -> Cells:
    cells: Cells = {}
    for row in rows:
        key = row["problem"], row["of"], row["method"], row["share"]
        cells.setdefault(key, {})[row["seed"]] = row[what]
    return cells


def _names(result: Result) -> list[tuple[str, str, str]]:
    """(name, label, base) of everything that has a row in a table, in order."""
    found = []
    for method in result["methods"]:
        name, label, setting = method["name"], method["label"], method["setting"]
        if setting["kind"] == "dense":
            name, label = one_shot(name), f"one-shot magnitude pruning of {label}"
        found.append((name, label, setting["base"]))
    return found


def _gradual(base: str) -> str:
    return "gradual" if base == "sgd" else f"gradual-{base}"


def difference(cell: dict[int, float], other: dict[int, float]) -> tuple[float, float] | None:
    """The mean difference over the seeds that both have, and its standard error; None below two seeds."""
    both = [cell[seed] - other[seed] for seed in cell.keys() & other.keys()]
    if len(both) < 2:
        return None
    return statistics.fmean(both), statistics.stdev(both) / math.sqrt(len(both))


def _cell(cell: dict[int, float] | None, other: dict[int, float] | None, seeds: int) -> str:
    if cell is None:
        return "–"
    text = f"{100 * statistics.fmean(cell.values()):.1f}"
    if len(cell) < seeds:
        text += f" [{len(cell)}]"
    gain = None if other is None else difference(cell, other)
    return text if gain is None else f"{text} ({100 * gain[0]:+.1f} ± {100 * gain[1]:.1f})"


def _part(result: Result, cells: Cells, problem: str, of: str) -> str | None:
    """The table of a problem and of what is counted; None where nothing was trained."""
    shares = sorted({share for p, o, _, share in cells if (p, o) == (problem, of) and share > 0})
    lines = []
    for name, label, base in _names(result):
        found = [cells.get((problem, of, name, share)) for share in shares]
        if not any(found):
            continue
        against = _gradual(base) if name not in (_gradual(base), one_shot("dense"), one_shot(f"dense-{base}")) else ""
        others = [cells.get((problem, of, against, share)) for share in shares]
        lines.append([label, *(_cell(c, o, result["seeds"]) for c, o in zip(found, others, strict=True))])
    return markdown.table([_WHAT[of], *(f"{share:.0%}" for share in shares)], lines) if lines else None


def _dense(result: Result, cells: Cells, problem: str) -> str:
    """The accuracies of the dense nets, in words."""
    found = {name: cells.get((problem, "elements", name, 0.0)) for name in ("dense", "dense-adamw")}
    labels = {"dense": "dense SGD", "dense-adamw": "dense AdamW"}
    return ", ".join(f"{labels[name]} {_cell(cell, None, result['seeds'])} %" for name, cell in found.items() if cell)


def _note(result: Result) -> str:
    seeds = result["seeds"]
    return (
        f"Test accuracy of the sparse weights in per cent, mean of {seeds} seeds, or of as many as stand in [ ]. In"
        " brackets: what it has more than gradual magnitude pruning over the same base, by pairs of trainings with the"
        " same seed, ± the standard error. All ways have the same epochs, first weights, batches and cubic curve of"
        " zeros (`rk.SparsitySchedule`'s; PAT's constraint its own, which is the same), one cut over all tensors but"
        " for top-k and channels, and batch norms made anew for the sparse weights."
    )


def _misses(result: Result) -> list[str]:
    """What did not get the zeros that it was asked for."""
    labels = {name: label for name, label, _ in _names(result)}
    worst: dict[str, Row] = {}
    for row in result["rows"]:
        off = abs(row["got"] - row["share"])
        if row["method"] in labels and off > 2e-3 and row["of"] == "elements":
            known = worst.get(row["method"])
            if known is None or off > abs(known["got"] - known["share"]):
                worst[row["method"]] = row
    return [
        f"- {labels[name]}: {row['got']:.1%} zeros where {row['share']:.0%} were asked for"
        for name, row in worst.items()
    ]


def _constant(result: Result) -> list[str]:
    """Networks that give one answer to everything, because a whole layer is zero; one-shot pruning says it itself."""
    labels = {name: label for name, label, _ in _names(result)}
    lost: dict[tuple[str, str, str, float], list[bool]] = {}
    for row in result["rows"]:
        if row["method"] in labels and not row["method"].startswith("one-shot"):
            key = row["problem"], row["of"], row["method"], row["share"]
            lost.setdefault(key, []).append(row.get("dead", 0) > 0 or row["accuracy"] < 0.12)
    return [
        f"- {labels[name]}, {share:.0%} of {of}, {problem}: {sum(found)} of {len(found)}"
        for (problem, of, name, share), found in lost.items()
        if any(found)
    ]


def table(result: Result) -> str:
    """The Markdown of a result: a table for each problem and for elements and channels."""
    cells = _cells(result["rows"])
    parts: list[str] = []
    for problem, told in result["problems"].items():
        for of in _WHAT:
            text = _part(result, cells, problem, of)
            if text is not None:
                parts += [f"**{told['title']}**, {told['epochs']} epochs; {_dense(result, cells, problem)}:", text]
    misses = _misses(result)
    if misses:
        parts.append("Other zeros than asked for:\n\n" + "\n".join(misses))
    constant = [] if result["smoke"] else _constant(result)
    if constant:
        parts.append("Networks that have lost a whole layer, and give a constant:\n\n" + "\n".join(constant))
    smoke = ["*A smoke run: too short to say anything about quality.*"] if result["smoke"] else []
    return "\n\n".join([*parts, _note(result), *smoke, markdown.stamp(result)])


_FRONT = (
    ("fashion", "elements", 0.9),
    ("fashion", "elements", 0.95),
    ("fashion", "elements", 0.99),
    ("digits", "elements", 0.95),
    ("digits", "elements", 0.98),
    ("digits", "channels", 0.5),
)
"""The rows of the front page."""
_SHORT = {"fashion": "Fashion-MNIST", "digits": "digits"}


def headline(result: Result) -> str:
    """The short answer over SGD: asked for, got, accuracies of RVSM, of gradual pruning and of the dense net."""
    cells, zeros, lines = _cells(result["rows"]), _cells(result["rows"], "got"), []
    for problem, of, share in _FRONT:
        found = [cells.get((problem, of, name, share)) for name in ("l0-hold", "gradual")]
        dense = cells.get((problem, "elements", "dense", 0.0))
        if all(found) and dense:
            shares = markdown.spread(list(zeros[problem, of, "l0-hold", share].values()))
            accuracies = [markdown.spread(list(cell.values())) for cell in (*found, dense) if cell]
            what = f"{_SHORT[problem]}, {'weights' if of == 'elements' else of}"
            lines.append([what, f"{share:.0%}", f"{shares} %", *accuracies])
    if not lines:
        return f"{markdown.NOT_MEASURED}\n\n{markdown.stamp(result)}"
    header = ["zeros of", "asked for", "got", "accuracy: RVSM l0, hold, %", "gradual pruning, %", "dense, %"]
    note = f"{result['seeds']} seeds: mean (least–greatest). "
    return "\n\n".join([markdown.table(header, lines), note + markdown.stamp(result)])
