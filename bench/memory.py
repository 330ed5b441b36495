"""``python -m bench memory``: peak bytes of a step beyond those of torch.optim.SGD."""

from __future__ import annotations

from tqdm import tqdm

from . import cases
from .cases import Case
from .config import Config
from .peak import RSS_RESOLUTION, in_child
from .results import Results, Row

_SGD = "fused_sgd"


def measure(case: Case, config: Config) -> Row:
    """One row: the engines and the reference, each in a process of its own, against SGD."""
    names = [*config.engines, *({"reference"} - set(config.engines))]
    answers = {name: in_child(case, name, config.device) for name in (_SGD, *names)}
    reasons = {name: answer["unavailable"] for name, answer in answers.items() if "unavailable" in answer}
    row: Row = {
        "case": case.name,
        "elements": case.elements,
        "groups": case.groups,
        "one_float_per_group": 4 * case.groups,
        "resolution_bytes": 0 if config.device == "cuda" else RSS_RESOLUTION,
        "not_measured": reasons,
    }
    if _SGD in reasons:
        return row
    sgd = answers[_SGD]["bytes"]
    beyond = {name: answers[name]["bytes"] - sgd for name in names if name not in reasons}
    return {
        **row,
        "sgd_bytes": sgd,
        "beyond_sgd_bytes": beyond,
        "beyond_sgd_per_parameter": {name: value / case.elements for name, value in beyond.items()},
    }


def line(row: Row) -> str:
    """A row in one line, for the terminal."""
    if "beyond_sgd_bytes" not in row:
        return f"{row['case']:<32} not measured: {row['not_measured']}"
    values = "  ".join(f"{name} {value / 2**20:+.2f} MiB" for name, value in row["beyond_sgd_bytes"].items())
    return f"{row['case']:<32} beyond SGD: {values}   (one float per group: {row['one_float_per_group']:,} B)"


def run(config: Config) -> None:
    """Measure every case and write memory.json."""
    wanted: tuple[Case, ...] = cases.MEMORY_CASES
    if config.effort.name == "smoke":
        wanted = (cases.small(cases.MEMORY_CASES[1]),)
    with Results("memory", config) as results, tqdm(wanted, desc="memory", unit="case", disable=None) as bar:
        for case in bar:
            bar.set_postfix_str(case.name)
            results.add(measure(case, config))
            tqdm.write(line(results.rows[-1]))
