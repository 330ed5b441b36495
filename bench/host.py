"""``python -m bench host``: microseconds that one ``step()`` costs the host, by number of parameters."""

from __future__ import annotations

from tqdm import tqdm

from . import cases
from .baselines import Unavailable, start
from .cases import Case
from .config import Config
from .problems import build
from .results import Results, Row
from .timing import Step, clock_for, interleave

BASELINES = ("fused_sgd", "foreach_sgd", "reference")


def measure(count: int, config: Config) -> Row:
    """One row: a model of so many one-element parameters."""
    problem = build(Case(f"{count} of 1"), config.device)
    steps: dict[str, Step] = {}
    skipped: dict[str, str] = {}
    for name in [*config.engines, *(name for name in BASELINES if name not in config.engines)]:
        try:
            steps[name] = start(name, problem)
        except Unavailable as error:
            skipped[name] = str(error)
    timings = interleave(steps, clock_for(config.device, host=True), config.effort)
    seconds = {name: timings.seconds(name) for name in steps}
    return {
        "parameters": count,
        "microseconds": {
            name: {"median": q.median * 1e6, "q25": q.q25 * 1e6, "q75": q.q75 * 1e6, "samples": q.samples}
            for name, q in seconds.items()
        },
        "not_measured": skipped,
    }


def line(row: Row) -> str:
    """A row in one line, for the terminal."""
    values = "  ".join(f"{name} {value['median']:.1f} us" for name, value in row["microseconds"].items())
    return f"{row['parameters']:>5} parameters   {values}"


def run(config: Config) -> None:
    """Measure every count and write host.json."""
    counts = cases.HOST_COUNTS
    with Results("host", config) as results, tqdm(counts, desc="host", unit="case", disable=None) as bar:
        for count in bar:
            results.add(measure(count, config))
            tqdm.write(line(results.rows[-1]))
