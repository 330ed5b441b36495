"""The main job on real data: a small convolutional net learns handwritten digits, dense and sparse.

``python -m bench train`` trains it with dense SGD (torch's fused step) and with every penalty (the native engine), on
a fixed split with a fixed seed: about a minute. ``--full`` trains it with three seeds and with the plain PyTorch engine
too, which makes the committed markdown. ``python -m bench.train --search`` repeats the search for the settings.

How the settings were chosen: every setting of :func:`grid` was trained on four fifths of the training images and
judged on the last fifth, with three divisions; the test images had no part in it. Chosen was the setting with the most
zeros (zero channels for RGSM) whose accuracy with u stays within ``ALLOWANCE`` of the best dense run's, on average and
within twice that in each division; see :func:`choose`.

What to expect beyond the numbers:

- The cut has to fit the weights. Weights below the cut at the start are pulled to zero together, and batch norm hides
  it: it scales a small layer up again, so w keeps its accuracy while u loses everything. l0 has a narrow band of cuts
  between "few zeros" and that.
- l1 shrinks the weights that survive as well: u differs from w by lam / beta everywhere, and the running statistics of
  batch norm, gathered with w, do not fit u. At the same lam a larger beta makes the difference smaller. l0 keeps the
  survivors as they are.
- tl1 with a = 1 is nearly 2 l1 for weights this small (its slope at 0 is (a + 1) / a), so it shares the bias.
- The group penalty alone does not choose: the channels of a layer start with nearly equal norms and fall below the cut
  all or none. RGSM's group lasso (``group_lasso``) first spreads the norms.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import rvsm_kernels as rk

from . import digits, markdown
from .config import RESULTS, Config, MissingPackage, require
from .digits import Method, Run
from .results import digest, environment, write_json

EPOCHS = 30
SEEDS = (0, 1, 2)
ENGINES = ("reference", "native")

Result = dict[str, Any]

METHODS = (
    Method("dense", "dense SGD", 0.05),
    Method("l0", "RVSM l0", 0.1, {"penalty": "l0", "lam": 1.8e-3, "beta": 3.0}),
    Method("l1", "RVSM l1", 0.1, {"penalty": "l1", "lam": 6e-3, "beta": 6.0}),
    Method("tl1", "RVSM TL1 (a = 1)", 0.1, {"penalty": "tl1", "lam": 3e-3, "beta": 6.0, "a": 1.0}),
    Method(
        "rgsm",
        "RGSM l0 (input channels)",
        0.05,
        {
            "penalty": "l0",
            "structure": "in_channels",
            "lam": 2.7e-3,
            "beta": 6.0,
            "group_scale": True,
            "group_lasso": 1.05e-2,
        },
    ),
)
"""Dense first; what was tried is in bench/NOTES.md and :func:`grid`."""


# ---- the job ---------------------------------------------------------------------------------------------------------


def engines() -> tuple[str, ...]:
    """The engines to compare; a build without the compiled one is compared with nothing, and says so."""
    state = rk.engines()["native"]["cpu"]
    if state == "available":
        return ENGINES
    print(f"train: only the reference engine is measured (native: {state})")
    return ("reference",)


def runs(effort: str, engines: Sequence[str]) -> list[tuple[int, Method, str]]:
    """The trainings of an effort, as (seed, method, engine).

    "quick" trains every method once, with the fastest engine; "full" with every seed and engine, "smoke" with every
    engine, for two epochs. Engines innermost: whatever else the machine does, it does to both.
    """
    seeds = SEEDS if effort == "full" else SEEDS[:1]
    return list(product(seeds, METHODS, engines[-1:] if effort == "quick" else engines))


def run(config: Config) -> None:
    """Train what the effort asks for, write train.json and print its table.

    The result is written after each run, so an interruption loses nothing that was measured. The job runs on the CPU,
    whatever else is there: the net is too small for a GPU.

    Raises:
        MissingPackage: the data set comes with scikit-learn.
    """
    require("numpy", "sklearn")
    from tqdm import tqdm

    effort = config.effort.name
    epochs = 2 if effort == "smoke" else EPOCHS
    result: Result = {
        **environment("cpu", config.command),
        "complete": False,
        "epochs": epochs,
        "batch": digits.BATCH,
        "smoke": effort == "smoke",
        "methods": [asdict(method) for method in METHODS],
        "rows": [],
    }
    data = digits.train_and_test()
    with tqdm(runs(effort, engines()), desc="train", unit="run", disable=None) as bar:
        for seed, method, engine in bar:
            bar.set_postfix_str(f"{method.name}, {engine}, seed {seed}")
            result["rows"].append(digits.train(method, engine, seed, data, epochs))
            write_json(config.out / "train.json", result)
            tqdm.write(line(method, result["rows"][-1]))
    result["complete"] = True
    write_json(config.out / "train.json", result)
    print(f"\n{table(result)}\n")


def line(method: Method, row: Run) -> str:
    """A training in one line, for the terminal."""
    last = row["curve"][-1]
    return (
        f"{method.label:<25} {_engine_label(method, row['engine']):<14} seed {row['seed']}"
        f"   accuracy with u {last['accuracy_u']:>6.1%}   zeros {last['zeros']:>4.0%}"
        f"   {row['step_s']:.3f} s in {row['steps']} steps"
    )


def _methods(result: Result) -> list[Method]:
    return [Method(**values) for values in result["methods"]]


def _rows(result: Result, method: str, engine: str | None = None) -> list[Run]:
    return [row for row in result["rows"] if row["method"] == method and engine in (None, row["engine"])]


def _last(rows: Sequence[Run], key: str) -> list[float]:
    return [row["curve"][-1][key] for row in rows]


def _engine_label(method: Method, engine: str) -> str:
    if method.dense:
        return "torch, fused" if engine == "native" else "torch, foreach"
    return engine


def _against_dense(result: Result) -> list[str]:
    """One line per sparse method: what its zeros cost."""
    dense = _last(_rows(result, "dense"), "accuracy_w")
    lines = []
    for method in _methods(result):
        rows = _rows(result, method.name)
        if method.dense or not rows or not dense:
            continue
        loss = statistics.fmean(dense) - statistics.fmean(_last(rows, "accuracy_u"))
        share = statistics.fmean(_last(rows, "zeros"))
        channels = statistics.fmean(_last(rows, "zero_channels"))
        cost = f"u costs {100 * loss:.1f} points" if loss >= 5e-4 else f"u gains {-100 * loss + 0:.1f} points"
        lines.append(
            f"- {method.label} ({method.setting}): {cost} of accuracy for {share:.0%} zeros"
            f" and {channels:.0%} zero channels."
        )
    return lines


def table(result: Result) -> str:
    """The Markdown table of a result: one row per method and engine, mean (least–greatest) over the seeds."""
    lines = []
    for method in _methods(result):
        for engine in ENGINES:
            rows = _rows(result, method.name, engine)
            if rows:
                percents = [
                    markdown.spread(_last(rows, key)) for key in ("accuracy_w", "accuracy_u", "zeros", "zero_channels")
                ]
                seconds = statistics.fmean(row["step_s"] for row in rows)
                median = statistics.median(row["step_median_s"] for row in rows)
                label = _engine_label(method, engine)
                lines.append([method.label, label, *percents, f"{seconds:.3f}", markdown.microseconds(median * 1e6)])
    header = [
        "method",
        "engine",
        "test accuracy with w, %",
        "with u, %",
        "zero weights, %",
        "zero channels, %",
        "seconds in step()",
        "median step, µs",
    ]
    seeds = len({row["seed"] for row in result["rows"]})
    steps = max((row["steps"] for row in result["rows"]), default=0)
    repeated = f"{seeds} seeds: mean (least–greatest)" if seeds > 1 else "1 seed"
    note = (
        f"{repeated}. {result['epochs']} epochs, {steps} steps of {result['batch']} images."
        " Channels: input channels of the convolutions."
    )
    several = seeds > 1 or len({row["engine"] for row in result["rows"]}) > 1
    over = ", over all engines and seeds" if several else ""
    against = "\n".join([f"Against dense SGD{over}:", "", *_against_dense(result)])
    return "\n\n".join([markdown.table(header, lines), note, *_caution(result, seeds), against, markdown.stamp(result)])


def _caution(result: Result, seeds: int) -> list[str]:
    """What a short run cannot say."""
    if result["smoke"]:
        return ["*A smoke run: too short to say anything about accuracy.*"]
    if seeds > 1:
        return []
    return [
        "*One seed: accuracies that differ by less than a point say nothing. `python -m bench train --full` repeats the"
        f" job with {len(SEEDS)} seeds, and with the reference engine.*"
    ]


# ---- the plot --------------------------------------------------------------------------------------------------------

# Okabe and Ito's colours, which colour-blind readers tell apart; markers and dashes say the same again.
_STYLES = {
    "dense": ("#000000", "s", ":"),
    "l0": ("#D55E00", "o", "-"),
    "l1": ("#0072B2", "^", "--"),
    "tl1": ("#009E73", "v", "-."),
    "rgsm": ("#CC79A7", "D", "-"),
}
_ACCURACY_TICKS = (0, 50, 80, 90, 95, 98, 99, 99.5, 99.8)
_LEAST_ERROR = 1e-3
"""Where the axis of the accuracy ends; less than half an image of the test set."""


def _draw(axes: Any, result: Result, of: Callable[[dict[str, float]], float]) -> None:
    """A line per method: the mean over engines and seeds, in a band from the least to the greatest."""
    for method in _methods(result):
        rows = _rows(result, method.name)
        if not rows:
            continue
        colour, marker, dashes = _STYLES[method.name]
        epochs = [point["epoch"] for point in rows[0]["curve"]]
        values = [[100 * of(point) for point in points] for points in zip(*(r["curve"] for r in rows), strict=True)]
        mean = [statistics.fmean(v) for v in values]
        axes.fill_between(epochs, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15, lw=0)
        axes.plot(
            epochs,
            mean,
            color=colour,
            linestyle=dashes,
            linewidth=1.8,
            marker=marker,
            markersize=4,
            markevery=max(1, len(epochs) // 8),
            label=method.label,
        )


def plot(result: Result, path: Path) -> bool:
    """Accuracy with u, zero weights and zero channels over the epochs. Returns whether there was anything to draw."""
    if not result["rows"]:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(12.5, 4.2))
    # What is missing to 100 %, on a log scale upside down: differences near the top can be seen, and up is better.
    _draw(panels[0], result, lambda point: max(1 - point["accuracy_u"], _LEAST_ERROR))
    panels[0].set_yscale("log")
    panels[0].set_ylim(100, 100 * _LEAST_ERROR)
    panels[0].set_yticks([100 - accuracy for accuracy in _ACCURACY_TICKS])
    panels[0].minorticks_off()
    panels[0].set_title("test accuracy with u", loc="left", fontsize=10)
    _draw(panels[1], result, lambda point: point["zeros"])
    panels[1].set_title("zero weights in u", loc="left", fontsize=10)
    _draw(panels[2], result, lambda point: point["zero_channels"])
    panels[2].set_title("zero input channels in u", loc="left", fontsize=10)
    for axes in panels[1:]:
        axes.set_ylim(-2, 102)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}%")
    panels[0].yaxis.set_major_formatter(lambda value, _: f"{100 - value:g}%")
    for axes in panels:
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    seeds = len({row["seed"] for row in result["rows"]})
    several = len(result["rows"]) > len(_methods(result))
    bands = f", mean of {seeds} seed{'s' if seeds > 1 else ''} and all engines; bands: least to greatest"
    figure.suptitle(
        f"Handwritten digits{bands if several else ', one seed'}",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=130, metadata={"Software": None, "Source": digest(result)})
    plt.close(figure)
    return True


# ---- the search ------------------------------------------------------------------------------------------------------

ALLOWANCE = 0.005
"""What u may lose against the best dense run on the validation images; half of what is asked on the test images."""


def grid() -> Iterator[Method]:
    """Every setting that was tried. The cut depends on lam / beta, so the grid is in beta and lam / beta."""
    by_name = {method.name: method for method in METHODS}
    for lr in (0.02, 0.05, 0.1, 0.2):
        yield replace(by_name["dense"], lr=lr)
    for name, betas, ratios in (
        ("l0", (1, 3, 6), (5e-4, 6e-4, 7e-4)),
        ("l1", (3, 6, 10), (6e-4, 1e-3, 1.6e-3)),
        ("tl1", (3, 6, 10), (3e-4, 5e-4, 8e-4)),
    ):
        for lr, beta, ratio in product((0.05, 0.1), betas, ratios):
            yield _changed(by_name[name], lr, beta, ratio)
    # lam is per group, or times the square root of the group's size with group_scale: 17 or 24 here.
    for scale, lasso, ratios in (
        (True, (0.0,), (5e-3, 7e-3)),
        (False, (0.0,), (8e-2, 1.2e-1)),
        (True, (2e-3, 2.5e-3, 3e-3), (4.5e-4, 1.2e-3)),
        (False, (2e-3, 2.5e-3, 3e-3), (1e-2, 2e-2)),
    ):
        for beta, group_lasso, ratio in product((1, 3), lasso, ratios):
            yield _changed(by_name["rgsm"], 0.1, beta, ratio, group_scale=scale, group_lasso=group_lasso)


def _changed(method: Method, lr: float, beta: float, ratio: float, **options: Any) -> Method:
    lam = float(f"{beta * ratio:.3g}")
    return replace(method, lr=lr, options={**method.options, "lam": lam, "beta": float(beta), **options})


def choose(rows: Sequence[Run]) -> dict[str, Run]:
    """The best setting of each method by the rule at the head of this file; a method without one is left out."""
    dense = max((row for row in rows if row["name"] == "dense"), key=lambda row: statistics.fmean(row["accuracy_u"]))
    chosen = {"dense": dense}
    for row in rows:
        losses = [d - u for d, u in zip(dense["accuracy_u"], row["accuracy_u"], strict=True)]
        if row["name"] == "dense" or statistics.fmean(losses) > ALLOWANCE or max(losses) > 2 * ALLOWANCE:
            continue
        best = chosen.get(row["name"])
        if best is None or _aim(row) > _aim(best):
            chosen[row["name"]] = row
    return chosen


def _aim(row: Run) -> float:
    return statistics.fmean(row["zero_channels" if row["name"] == "rgsm" else "zeros"])


def search(out: Path) -> Result:
    """Train every setting of :func:`grid`, print what came of it and write out/train_search.json."""
    require("numpy", "sklearn")
    from tqdm import tqdm

    engine = engines()[-1]
    divisions = [(seed, digits.train_and_validation(seed)) for seed in SEEDS]
    result: Result = {**environment("cpu", "python -m bench.train --search"), "complete": False, "rows": []}
    for method in tqdm(list(grid()), desc="search", unit="setting"):
        runs = [digits.train(method, engine, seed, data, EPOCHS, every=EPOCHS) for seed, data in divisions]
        values = {key: _last(runs, key) for key in ("accuracy_w", "accuracy_u", "zeros", "zero_channels")}
        result["rows"].append({**asdict(method), "setting": method.setting, **values})
        write_json(out / "train_search.json", result)
    result["complete"] = True
    write_json(out / "train_search.json", result)
    print(f"\n{search_table(result)}\n\nwrote {out / 'train_search.json'}")
    return result


def search_table(result: Result) -> str:
    """The Markdown table of a search, in the order of the grid; the chosen settings are bold."""
    chosen = choose(result["rows"])
    lines = []
    for row in result["rows"]:
        percents = [markdown.spread(row[key]) for key in ("accuracy_w", "accuracy_u", "zeros", "zero_channels")]
        setting = f"**{row['setting']}**" if row is chosen.get(row["name"]) else row["setting"]
        lines.append([f"{row['label']}: {setting}", *percents])
    header = ["tried", "validation accuracy with w, %", "with u, %", "zero weights, %", "zero channels, %"]
    return "\n\n".join([markdown.table(header, lines), markdown.stamp(result)])


def main() -> None:
    """``python -m bench.train --search``."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.train", description="Search for the settings. The main job itself: python -m bench train."
    )
    parser.add_argument("--search", action="store_true", required=True, help="a quarter of an hour")
    parser.add_argument("--out", type=Path, metavar="DIR", default=RESULTS / "local", help="default: %(default)s")
    given = parser.parse_args()
    try:
        search(given.out)
    except (MissingPackage, OSError) as error:
        sys.exit(f"python -m bench.train: {error}")


if __name__ == "__main__":
    main()
