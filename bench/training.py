"""What the training tasks share: a method, a task, the loop over its trainings, and the pieces of tables and plots.

A task trains a small model on real data with several methods, dense first. ``bench/train.py`` lists the tasks.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch

import rvsm_kernels as rk

from . import markdown
from .config import Config
from .results import Result, digest, environment, write_json

Run = dict[str, Any]

SEEDS = (0, 1, 2)
ENGINES = ("reference", "native")


@dataclass(frozen=True)
class Method:
    """One way to train: a name and, unless it is dense, what :func:`rvsm_kernels.param_groups` is told.

    Attributes:
        layers: the ends of the names of the weights that are penalised; empty: all that ``param_groups`` takes.
    """

    name: str
    label: str
    lr: float
    options: dict[str, Any] = field(default_factory=dict)
    layers: tuple[str, ...] = ()

    @property
    def dense(self) -> bool:
        return not self.options

    @property
    def setting(self) -> str:
        """The setting in words, without what the label says."""
        told = ("penalty", "structure", "group_dim", "a")
        options = {key: value for key, value in self.options.items() if key not in told}
        words = [f"{key} {value if isinstance(value, bool) else f'{value:.3g}'}" for key, value in options.items()]
        return ", ".join([f"lr {self.lr:g}", *words])


@dataclass(frozen=True)
class Task:
    """A model and data to train it with.

    Attributes:
        kind: the name of its result file and of its table in a report.
        check: raises MissingPackage where the data cannot be had.
        head: (smoke) -> what the result file says of all trainings: their length, the size of a batch.
        data: what every training is given.
        train: (method, engine, seed, data, head) -> one training.
        outcome: what a training came to, in a few words for the terminal.
        table: the Markdown of a result.
    """

    kind: str
    methods: tuple[Method, ...]
    check: Callable[[], None]
    head: Callable[[bool], dict[str, Any]]
    data: Callable[[], Any]
    train: Callable[[Method, str, int, Any, dict[str, Any]], Run]
    outcome: Callable[[Run], str]
    table: Callable[[Result], str]


# ---- the trainings ---------------------------------------------------------------------------------------------------


def engines() -> tuple[str, ...]:
    """The engines to compare; a build without the compiled one is compared with nothing, and says so."""
    state = rk.engines()["native"]["cpu"]
    if state == "available":
        return ENGINES
    print(f"train: only the reference engine is measured (native: {state})")
    return ("reference",)


def runs(task: Task, effort: str, engines: Sequence[str]) -> list[tuple[int, Method, str]]:
    """The trainings of an effort, as (seed, method, engine).

    "quick" trains every method once, with the fastest engine; "full" with every seed and engine, "smoke" with every
    engine, for a short time. Engines innermost: whatever else the machine does, it does to both.
    """
    seeds = SEEDS if effort == "full" else SEEDS[:1]
    return list(product(seeds, task.methods, engines[-1:] if effort == "quick" else engines))


def run(task: Task, config: Config) -> None:
    """Train what the effort asks for, write the result file and print its table.

    The result is written after each training, so an interruption loses nothing that was measured. The task runs on the
    CPU, whatever else is there: the models are too small for a GPU.

    Raises:
        MissingPackage: the data cannot be had.
    """
    task.check()
    from tqdm import tqdm

    effort = config.effort.name
    head = task.head(effort == "smoke")
    result: Result = {
        **environment("cpu", config.command),
        "complete": False,
        **head,
        "smoke": effort == "smoke",
        "methods": [asdict(method) for method in task.methods],
        "rows": [],
    }
    path = config.out / f"{task.kind}.json"
    data = task.data()
    with tqdm(runs(task, effort, engines()), desc=task.kind, unit="run", disable=None) as bar:
        for seed, method, engine in bar:
            bar.set_postfix_str(f"{method.name}, {engine}, seed {seed}")
            row = task.train(method, engine, seed, data, head)
            result["rows"].append(row)
            write_json(path, result)
            tqdm.write(
                f"{method.label:<25} {engine_label(method, engine):<14} seed {seed}   {task.outcome(row)}"
                f"   {row['step_s']:.3f} s in {row['steps']} steps"
            )
    result["complete"] = True
    write_json(path, result)
    print(f"\n{task.table(result)}\n")


class Stopwatch:
    """Times ``optimizer.step()`` over a training."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        start = time.perf_counter()
        optimizer.step()
        self.seconds.append(time.perf_counter() - start)

    def times(self) -> Run:
        """Steps, their seconds together, the median of one."""
        return {
            "steps": len(self.seconds),
            "step_s": sum(self.seconds),
            "step_median_s": statistics.median(self.seconds),
        }


# ---- reading a result ------------------------------------------------------------------------------------------------


def methods_of(result: Result) -> list[Method]:
    """The methods of a result file; JSON has lists for tuples."""
    return [Method(**{**values, "layers": tuple(values.get("layers", ()))}) for values in result["methods"]]


def rows_of(result: Result, method: str, engine: str | None = None) -> list[Run]:
    return [row for row in result["rows"] if row["method"] == method and engine in (None, row["engine"])]


def last(rows: Sequence[Run], key: str) -> list[float]:
    """A number at the end of each training."""
    return [row["curve"][-1][key] for row in rows]


def engine_label(method: Method, engine: str) -> str:
    """A dense method's two "engines" are torch's two ways to step."""
    if method.dense:
        return "torch, fused" if engine == "native" else "torch, foreach"
    return engine


def sparse_results(result: Result) -> list[tuple[Method, list[Run]]]:
    """Every sparse method with its trainings over all engines and seeds, where it and the dense one were trained."""
    found = [(method, rows_of(result, method.name)) for method in methods_of(result) if not method.dense]
    return [(method, rows) for method, rows in found if rows] if rows_of(result, "dense") else []


Column = tuple[str, Callable[[list[Run]], str]]
"""(header, cell of the trainings of one method and engine)."""

STEP_SECONDS: Column = ("seconds in step()", lambda rows: f"{statistics.fmean(row['step_s'] for row in rows):.3f}")
STEP_MEDIAN: Column = (
    "median step, µs",
    lambda rows: markdown.microseconds(statistics.median(row["step_median_s"] for row in rows) * 1e6),
)


def percent(header: str, key: str) -> Column:
    """A column of shares, in percent."""
    return header, lambda rows: markdown.spread(last(rows, key))


def table(
    result: Result, columns: Sequence[Column], note: str, against: Sequence[str], doubt: str, command: str
) -> str:
    """The Markdown of a result: a row for each method and engine, mean (least–greatest) over the seeds.

    Args:
        columns: beside the method and the engine.
        note: how long the trainings were, and what the words of the header mean.
        against: a line for each sparse method, what its zeros cost.
        doubt: what a single seed cannot tell apart.
        command: the command of the task, without options.
    """
    lines = []
    for method in methods_of(result):
        for engine in ENGINES:
            rows = rows_of(result, method.name, engine)
            if rows:
                lines.append([method.label, engine_label(method, engine), *(cell(rows) for _, cell in columns)])
    header = ["method", "engine", *(name for name, _ in columns)]
    seeds = seeds_of(result)
    repeated = f"{seeds} seeds: mean (least–greatest)" if seeds > 1 else "1 seed"
    several = seeds > 1 or len({row["engine"] for row in result["rows"]}) > 1
    over = ", over all engines and seeds" if several else ""
    dense = next(method.label for method in methods_of(result) if method.dense)
    parts = [markdown.table(header, lines), f"{repeated}. {note}", *caution(result, doubt, command)]
    return "\n\n".join([*parts, "\n".join([f"Against {dense}{over}:", "", *against]), markdown.stamp(result)])


def seeds_of(result: Result) -> int:
    return len({row["seed"] for row in result["rows"]})


def caution(result: Result, doubt: str, command: str) -> list[str]:
    """What a short run cannot say."""
    if result["smoke"]:
        return ["*A smoke run: too short to say anything about quality.*"]
    if seeds_of(result) > 1:
        return []
    return [
        f"*One seed: {doubt} say nothing. `{command} --full` repeats the job with {len(SEEDS)} seeds, and with the"
        " reference engine.*"
    ]


# ---- plots -----------------------------------------------------------------------------------------------------------

# Okabe and Ito's colours, which colour-blind readers tell apart; markers and dashes say the same again.
_STYLES = (
    ("#000000", "s", ":"),
    ("#D55E00", "o", "-"),
    ("#0072B2", "^", "--"),
    ("#009E73", "v", "-."),
    ("#CC79A7", "D", "-"),
)


@dataclass(frozen=True)
class Panel:
    """One curve of every method: a number of each point of the training, in the unit of the axis."""

    title: str
    value: Callable[[dict[str, float]], float]
    prepare: Callable[[Any], None]


def percent_axis(axes: Any) -> None:
    """The vertical axis of a share."""
    axes.set_ylim(-2, 102)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}%")


def _draw(axes: Any, result: Result, panel: Panel, over: str) -> None:
    """A line per method: the mean over engines and seeds, in a band from the least to the greatest."""
    for method, (colour, marker, dashes) in zip(methods_of(result), _STYLES, strict=False):
        rows = rows_of(result, method.name)
        if not rows:
            continue
        places = [point[over] for point in rows[0]["curve"]]
        values = [[panel.value(point) for point in points] for points in zip(*(r["curve"] for r in rows), strict=True)]
        mean = [statistics.fmean(v) for v in values]
        axes.fill_between(places, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15, lw=0)
        axes.plot(
            places,
            mean,
            color=colour,
            linestyle=dashes,
            linewidth=1.8,
            marker=marker,
            markersize=4,
            markevery=max(1, len(places) // 8),
            label=method.label,
        )


def plot(result: Result, path: Path, title: str, over: str, panels: Sequence[Panel]) -> bool:
    """Curves over a training, one panel beside the other. Returns whether there was anything to draw.

    Args:
        over: what the horizontal axis counts, a key of the points: "epoch", "step".
    """
    if not result["rows"]:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, all_axes = plt.subplots(1, len(panels), figsize=(12.5, 4.2))
    for axes, panel in zip(all_axes, panels, strict=True):
        _draw(axes, result, panel, over)
        axes.set_title(panel.title, loc="left", fontsize=10)
        panel.prepare(axes)
        axes.set_xlabel(over)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    seeds = seeds_of(result)
    several = len(result["rows"]) > len(methods_of(result))
    bands = f", mean of {seeds} seed{'s' if seeds > 1 else ''} and all engines; bands: least to greatest"
    figure.suptitle(f"{title}{bands if several else ', one seed'}", x=0.01, ha="left", fontsize=11)
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=130, metadata={"Software": None, "Source": digest(result)})
    plt.close(figure)
    return True
