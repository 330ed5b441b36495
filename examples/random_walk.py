"""The senile reinforced random walk and its perturbations: the dissertation's chapter 2, simulated and in closed form.

    python examples/random_walk.py            # some minutes
    python examples/random_walk.py --quick    # under ten seconds, the same with fewer walkers
    python examples/random_walk.py --record   # into examples/results, and into the tables of examples/README.md

Prints tables as Markdown and writes ``walk.json`` and ``walk.png``. examples/README.md explains the numbers. No part of
rvsm_kernels is needed.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deep.missing import explain

try:
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot as plt
    from matplotlib.axes import Axes
    from tqdm import tqdm

    from deep import cli, files
    from random_walk_model import (
        LOG_LIMIT,
        NOISES,
        Walk,
        diffusion,
        nu,
        second_moments,
        series,
        simulate,
        survival,
    )
except ModuleNotFoundError as error:
    explain(error, __name__)
    raise

HERE = Path(__file__).resolve().parent
Rows = list[dict[str, Any]]

WALKS = (
    Walk(1),
    *(Walk(1, 0.02, noise) for noise in NOISES),
    Walk(2),
    *(Walk(2, 0.05, noise) for noise in ("I", "II Cauchy", "II Pareto", "II slow", "III lognormal")),
    Walk(3),
    *(Walk(3, 0.05, noise) for noise in ("I", "II slow")),
)
DELTAS = (1e-2, 1e-4, 1e-6, 1e-8, 1e-12)
SLOW_DELTAS = (1e-2, 1e-6, 1e-12, 1e-50, 1e-300)
DIMENSIONS = (2, 3)

RATES: dict[str, tuple[str, Any]] = {
    "δ": ("δ", lambda x: x),
    "δ|log δ|": ("δ |log δ|", lambda x: x * abs(math.log(x))),
    "√δ": ("√δ", math.sqrt),
    "1/|log δ|": ("1/|log δ|", lambda x: 1 / abs(math.log(x))),
    "1/log²δ": ("1/log² δ", lambda x: 1 / math.log(x) ** 2),
}
"""From a key to its heading and to the function of delta."""
HIGHER: dict[str, tuple[str, ...]] = {
    "I": ("δ",),
    "II exponential": ("δ",),
    "III lognormal": ("δ",),
    "III gamma": ("δ",),
    "II Cauchy": ("δ|log δ|",),
    "II Pareto": ("√δ",),
    "II slow": ("1/|log δ|", "1/log²δ"),
}
"""Theorem 2.6: the rates that each noise is held against for d >= 2."""


# ---- what is measured ------------------------------------------------------------------------------------------------


def simulated(walk: Walk, walkers: int, n: int, seed: int, bar: tqdm[Any]) -> dict[str, Any]:
    """A simulation against the closed forms.

    Returns:
        Pairs of simulation and closed form with the standard error of the former: ``msd`` is E|S_n|^2/n; ``nu`` the
        mean increase of |S|^2 in a step of the second half of the walk against (2.1), its limit for large n; ``odd``
        is P(tau odd, tau <= n), ``tau`` E[min(tau, n)], which need nothing beyond n.
    """
    paths = simulate(walk, walkers, (n // 2, n), seed, bar.update)
    half, full = paths.squares
    tau = np.where(paths.tau == 0, n, paths.tau)
    p = survival(walk, n + 1)
    odd = (paths.tau % 2).astype(float)
    samples = {
        "msd": (full / n, second_moments(walk, n)[n] / n),
        "nu": ((full - half) / (n - n // 2), nu(walk)),
        "odd": (odd, float(np.sum((p[:-1] - p[1:])[::2]))),
        "tau": (tau.astype(float), float(np.sum(p[:-1]))),
    }
    row: dict[str, Any] = {"d": walk.d, "delta": walk.delta, "noise": walk.noise, "n": n, "walkers": walkers}
    for name, (sample, exact) in samples.items():
        row[name] = float(sample.mean())
        row[f"{name}_error"] = float(sample.std(ddof=1) / math.sqrt(walkers))
        row[f"{name}_exact"] = exact
    return row


def trend(longest: int, walkers: int, steps: int, seed: int, bar: tqdm[Any]) -> Rows:
    """Proposition 2.2.1, d = 1 without perturbation: (log n / n) E|S_n|^2 over its limit, by the exact second moments.

    To the next order it is 1 + (2 - Euler's constant)/log n: the generating function of P(tau >= n) is 2 (L - 1) near
    z = 1, L = -log(1 - z), and z^n has the coefficient n (1/log n + (1 - Euler's constant)/log^2 n) in (1 - z)^-2 / L.
    """
    exact = second_moments(Walk(1), longest)
    times = [10**k for k in range(1, 10) if 10**k < longest] + [longest]
    seen = tuple(n for n in times if n <= steps)
    paths = simulate(Walk(1), walkers, seen, seed, bar.update)
    rows: Rows = []
    for n in times:
        unit = math.log(n) / n / LOG_LIMIT
        row: dict[str, Any] = {"n": n, "ratio": exact[n] * unit, "simulated": None, "error": None}
        row["excess_times_log"] = (row["ratio"] - 1) * math.log(n)
        if n in seen:
            squares = paths.squares[seen.index(n)] * unit
            row |= {"simulated": squares.mean(), "error": squares.std(ddof=1) / math.sqrt(walkers)}
        rows.append({key: None if value is None else float(value) for key, value in row.items()} | {"n": n})
    return rows


def one_dimension() -> Rows:
    """Theorems 2.3 to 2.5: nu times its rate as delta falls, and nu over the delta^2 of the perturbation alone."""
    rows: Rows = []
    for noise in NOISES:
        slow = noise == "II slow"
        for delta in SLOW_DELTAS if slow else DELTAS:
            found = series(Walk(1, delta, noise))
            value = diffusion(found.mean, found.odd, 1)
            log = abs(math.log(delta))
            row = {"noise": noise, "delta": delta, "nu": value, "mean": found.mean, "mean_error": found.mean_error}
            row |= {"odd": found.odd, "odd_error": found.odd_error, "odd_over_even": found.odd / (1 - found.odd)}
            row["times_rate"] = value * (math.log(log) if slow else log)
            rows.append({**row, "over_square": None if slow else value / delta**2})  # 1e-300 has no square
    return rows


def higher_dimensions() -> Rows:
    """Theorem 2.6: (nu_delta - nu_0) over each rate that a noise is held against."""
    rows: Rows = []
    for d in DIMENSIONS:
        start = nu(Walk(d))
        for noise, rates in HIGHER.items():
            for rate in rates:
                for delta in SLOW_DELTAS if noise == "II slow" else DELTAS[:4]:
                    rise = nu(Walk(d, delta, noise)) - start
                    row = {"d": d, "nu_0": start, "noise": noise, "rate": rate, "delta": delta, "rise": rise}
                    rows.append({**row, "over_rate": rise / RATES[rate][1](delta)})
    return rows


def cut_means(delta: float, exponents: Sequence[int]) -> Rows:
    """Model III, d = 1: E[min(tau, n)] as n grows. It stays bounded if and only if the walk is diffusive."""
    rows: Rows = []
    for noise in ("III lognormal", "III gamma"):
        p = np.cumsum(survival(Walk(1, delta, noise), 10 ** max(exponents)))
        rows += [{"noise": noise, "delta": delta, "n": 10**k, "mean": float(p[10**k - 1])} for k in exponents]
    return rows


def largest_delta() -> float:
    """The delta up to which P(tau odd)/P(tau even) <= 2 in model I with d = 1, by bisection."""
    low, high = 0.0, 0.5
    for _ in range(40):
        middle = (low + high) / 2
        odd = series(Walk(1, middle)).odd
        low, high = (middle, high) if odd <= 2 * (1 - odd) else (low, middle)
    return low


def run(quick: bool, seed: int) -> dict[str, Any]:
    """Everything; each simulation has a seed of its own, so that its numbers do not depend on the others."""
    walkers, n = (2_000, 400) if quick else (100_000, 2_000)
    long_walkers, steps, longest = (2_000, 1_000, 1 << 14) if quick else (50_000, 10_000, 1 << 22)
    with tqdm(total=len(WALKS) * n + steps, unit=" steps", disable=None) as bar:
        rows = []
        for number, walk in enumerate(WALKS):
            bar.set_description(f"d = {walk.d}, {walk.noise if walk.delta else 'unperturbed'}")
            rows.append(simulated(walk, walkers, n, seed + number, bar))
        bar.set_description("d = 1, a long walk")
        long = trend(longest, long_walkers, steps, seed + len(WALKS), bar)
    return {
        "quick": quick,
        "seed": seed,
        "simulated": rows,
        "trend": long,
        "trend_walkers": long_walkers,
        "one_dimension": one_dimension(),
        "higher_dimensions": higher_dimensions(),
        "cut_means": cut_means(0.1, (2, 3, 4) if quick else (2, 4, 6)),
        "largest_delta": largest_delta(),
    }


# ---- tables ----------------------------------------------------------------------------------------------------------


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def name_of(noise: str, delta: float = 1.0) -> str:
    """A noise as the label of a table's row."""
    return NOISES[noise].label.replace("|", "\\|") if delta else "unperturbed"


def simulated_table(result: dict[str, Any]) -> str:
    """Simulated ± standard error, then the closed form, for each walk."""
    lines = []
    for row in result["simulated"]:
        cells = [f"{row['d']}", name_of(row["noise"], row["delta"]), f"{row['delta']:g}"]
        for name in ("odd", "tau", "msd", "nu"):
            cells += [f"{row[name]:.4f} ± {row[f'{name}_error']:.4f}", f"{row[f'{name}_exact']:.4f}"]
        lines.append(cells)
    head = ["d", "perturbation", "δ", "P(τ odd, τ ≤ n)", "exact", "E[min(τ, n)]", "exact", "E\\|S_n\\|²/n", "exact"]
    return markdown([*head, "rise of E\\|S\\|² in a step", "ν, (2.1)"], lines)


def trend_table(result: dict[str, Any]) -> str:
    """Proposition 2.2.1 as n grows."""
    lines = []
    for row in result["trend"]:
        seen = "" if row["simulated"] is None else f"{row['simulated']:.4f} ± {row['error']:.4f}"
        lines.append([f"{row['n']:,}", f"{row['ratio']:.4f}", f"{row['excess_times_log']:.3f}", seen])
    head = ["n", "(log n / n) E\\|S_n\\|² over its limit", "(that − 1) log n", "simulated"]
    return markdown(head, lines)


def one_dimension_table(result: dict[str, Any]) -> str:
    """nu times its rate, in two tables: the slow noise has deltas of its own."""
    tables = []
    for slow in (False, True):
        lines, deltas = [], SLOW_DELTAS if slow else DELTAS
        rate = "ν log \\|log δ\\|" if slow else "ν \\|log δ\\|"
        for noise in NOISES:
            rows = [row for row in result["one_dimension"] if row["noise"] == noise]
            if slow == (noise == "II slow"):
                for key, of in (("times_rate", rate), ("over_square", "ν/δ²")):
                    if key == "times_rate" or noise == "I":
                        lines.append([name_of(noise), of, *(f"{row[key]:.4g}" for row in rows)])
        tables.append(markdown(["d = 1", "", *(f"δ = {delta:.0e}" for delta in deltas)], lines))
    return "\n\n".join(tables)


def higher_table(result: dict[str, Any]) -> str:
    """(nu_delta - nu_0) over its rate, in two tables."""
    tables = []
    for slow in (False, True):
        deltas, lines = SLOW_DELTAS if slow else DELTAS[:4], []
        for d in DIMENSIONS:
            for noise, rates in HIGHER.items():
                for rate in rates if slow == (noise == "II slow") else ():
                    rows = [
                        row
                        for row in result["higher_dimensions"]
                        if (row["d"], row["noise"], row["rate"]) == (d, noise, rate)
                    ]
                    heading = RATES[rate][0].replace("|", "\\|")
                    lines.append([f"{d}", name_of(noise), heading, *(f"{row['over_rate']:.4g}" for row in rows)])
        tables.append(markdown(["d", "perturbation", "rate", *(f"δ = {delta:.0e}" for delta in deltas)], lines))
    return "\n\n".join(tables)


def cut_table(result: dict[str, Any]) -> str:
    """Model III: whether E[tau] is finite depends on the law."""
    rows = result["cut_means"]
    ns = sorted({row["n"] for row in rows})
    lines = [
        [name_of(noise), *(f"{row['mean']:.4f}" for row in rows if row["noise"] == noise)]
        for noise in dict.fromkeys(row["noise"] for row in rows)
    ]
    return markdown([f"d = 1, δ = {rows[0]['delta']:g}: E[min(τ, n)]", *(f"n = {n:,}" for n in ns)], lines)


TABLES = {
    "simulated": simulated_table,
    "trend": trend_table,
    "one": one_dimension_table,
    "higher": higher_table,
    "three": cut_table,
}


def worst(result: dict[str, Any]) -> float:
    """The largest distance of a simulation from its exact value, in standard errors."""
    return max(
        abs(row[name] - row[f"{name}_exact"]) / row[f"{name}_error"]
        for row in result["simulated"]
        for name in ("odd", "tau", "msd")
    )


def note(result: dict[str, Any]) -> str:
    """What the tables do not say."""
    walkers, n = result["simulated"][0]["walkers"], result["simulated"][0]["n"]
    mean = max(row["mean_error"] for row in result["one_dimension"] if math.isfinite(row["mean"]))
    odd = max(row["odd_error"] for row in result["one_dimension"])
    return (
        f"{walkers:,} walkers, n = {n:,}; the long walk: {result['trend_walkers']:,} walkers. The largest of"
        f" {3 * len(result['simulated'])} distances from an exact value: {worst(result):.1f} standard errors."
        f" Truncation errors of the series with d = 1: at most {mean:.0e} of E[τ], {odd:.0e} of P(τ odd). Model I"
        f" with d = 1 keeps P(τ odd)/P(τ even) ≤ 2 up to δ = {result['largest_delta']:.4f}."
    )


# ---- the figure ------------------------------------------------------------------------------------------------------

# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = dict(zip(NOISES, "#0072B2 #56B4E9 #E69F00 #009E73 #D55E00 #CC79A7 #000000".split(), strict=True))


def figure(result: dict[str, Any], path: Path) -> None:
    """nu over delta for d = 1, and its rise above nu_0 for d = 2, with the rates drawn in as thin lines."""
    deltas = np.logspace(-8, -1, 29)
    plain, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6))
    start = nu(Walk(2))
    for noise, colour in COLOURS.items():
        seen = [row for row in result["simulated"] if (row["d"], row["noise"]) == (1, noise) and row["delta"]]
        if noise != "III gamma":  # nu is 0 for d = 1
            left.plot(deltas, [nu(Walk(1, x, noise)) for x in deltas], color=colour, label=NOISES[noise].label)
            x, y, error = ([row[key] for row in seen] for key in ("delta", "nu", "nu_error"))
            left.errorbar(x, y, error, fmt="o", color=colour, markersize=4, markerfacecolor="white")
        right.plot(deltas, [nu(Walk(2, x, noise)) - start for x in deltas], color=colour, label=NOISES[noise].label)
    _rate(left, deltas, LOG_LIMIT / np.abs(np.log(deltas)), "0.794/|log δ|", "--")
    _rate(left, deltas, deltas**2, "δ²", ":")
    left.set(title="d = 1; circles: simulated", ylabel="ν", ylim=(1e-3, 3))
    # Each rate goes through the leftmost point of the noise that it belongs to.
    styles = {"δ": "--", "δ|log δ|": "-.", "√δ": (0, (5, 1)), "1/|log δ|": (0, (1, 3)), "1/log²δ": ":"}
    for rate, style in styles.items():
        noise = next(noise for noise, rates in HIGHER.items() if rate in rates)
        values = np.array([RATES[rate][1](float(x)) for x in deltas])
        values *= (nu(Walk(2, float(deltas[0]), noise)) - start) / values[0]
        _rate(right, deltas, values, RATES[rate][0] + (" (printed)" if rate == "1/log²δ" else ""), style)
    right.set(title="d = 2", ylabel="ν(δ) − ν(0)")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel="δ")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=7, frameon=False, ncol=2, loc="upper center", bbox_to_anchor=(0.5, -0.13))
    plain.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(plain)


def _rate(axes: Axes, x: np.ndarray, y: np.ndarray, label: str, style: Any) -> None:
    axes.plot(x, y, color="#7F7F7F", linewidth=1, linestyle=style, label=label)


# ---- the script ------------------------------------------------------------------------------------------------------


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer walkers and shorter walks, for CI")
    parser.add_argument("--out", type=Path, default=Path("build/random_walk"), help="folder for JSON and figure")
    parser.add_argument("--seed", type=int, default=2020, help="of the first simulation (default: %(default)s)")
    parser.add_argument("--record", action="store_true", help="write examples/results and the README's tables")
    args = parser.parse_args(argv)
    if args.seed < 0:
        parser.error(f"argument --seed: {args.seed}: a seed is at least 0")
    if args.record and args.quick:
        parser.error("argument --record: the README's tables are those of the full size")
    return args


def record(result: dict[str, Any]) -> None:
    """Fill the tables of examples/README.md."""
    from bench.markdown import stamp
    from bench.report import fill

    def content(name: str) -> str:
        return f"{note(result)} {stamp(result)}" if name == "note" else TABLES[name](result)

    readme = HERE / "README.md"
    readme.write_text(fill(readme.read_text(encoding="utf-8"), "walk", content), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Run, print, save."""
    args = arguments(argv)
    head: dict[str, Any] = {}
    if args.record:
        from bench.results import environment

        head = environment("cpu", "python examples/random_walk.py --record")
        args.out = HERE / "results"
    files.prepare(args.out)
    start = time.perf_counter()
    result = head | run(args.quick, args.seed)
    result["seconds"] = round(time.perf_counter() - start, 1)
    print("\n\n".join([*(table(result) for table in TABLES.values()), note(result)]))
    # JSON has no infinity: an E[tau] without bound is null.
    for row in result["one_dimension"]:
        row |= {key: None for key in ("mean", "mean_error") if math.isinf(row[key])}
    files.write_json(args.out / "walk.json", result)
    figure(result, args.out / "walk.png")
    if args.record:
        for row in result["one_dimension"]:
            row |= {key: math.inf for key in ("mean", "mean_error") if row[key] is None}
        record(result)
    print(f"\n{result['seconds']} s; {args.out / 'walk.json'} and walk.png written")


if __name__ == "__main__":
    cli.guarded(main)
