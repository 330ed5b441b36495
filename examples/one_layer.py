"""The one-layer network of the papers under rk.RVSM: Tables 1-3, the theorems, figures, ADMM.

    python examples/one_layer.py            # under two minutes
    python examples/one_layer.py --quick    # under ten seconds, the same with fewer runs

Prints the tables as Markdown and writes ``one_layer.json`` and the figures. examples/README.md explains the numbers.
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
    import torch
    from tqdm import tqdm

    import one_layer_claims as claims
    import one_layer_figures as figures
    import one_layer_tables as tables
    import rvsm_kernels as rk
    from deep import cli, files
    from one_layer_model import curvature
    from one_layer_runs import CONVERGED, PENALTIES, PENALTY_STRENGTH, K
except ModuleNotFoundError as error:
    explain(error, __name__)
    raise

SEED = 1812
MOST_SEEDS = 10_000


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer runs and only d = 10 and 30, for CI")
    parser.add_argument("--out", type=Path, default=Path("build/one_layer"), help="folder for JSON and figures")
    parser.add_argument("--seeds", type=int, help="random w* for each d and in each check (100; 10 with --quick)")
    args = parser.parse_args(argv)
    if args.seeds is None:
        args.seeds = 10 if args.quick else 100
    if args.seeds < 2:
        parser.error(f"argument --seeds: {args.seeds}: a standard deviation needs at least 2")
    if args.seeds > MOST_SEEDS:
        parser.error(f"argument --seeds: {args.seeds}: at most {MOST_SEEDS}, which take an hour and much memory")
    return args


def text(value: Any) -> str:
    """A cell of a printed table."""
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def markdown(rows: Sequence[dict[str, Any]], labels: dict[str, str]) -> str:
    """A Markdown table with one line for each row; ``labels`` maps keys to headings."""
    lines = ["| " + " | ".join(labels.values()) + " |", "|" + "---|" * len(labels)]
    lines += ["| " + " | ".join(text(row[key]) for key in labels) + " |" for row in rows]
    return "\n".join(lines)


def columns(rows: Sequence[dict[str, Any]], labels: dict[str, str]) -> str:
    """The same with one column for each row, for few rows with many numbers."""
    lines = ["| " + " | ".join([label, *(text(row[key]) for row in rows)]) + " |" for key, label in labels.items()]
    return "\n".join([lines[0], "|" + "---|" * (len(rows) + 1), *lines[1:]])


def without_nan(x: Any) -> Any:
    """JSON has no NaN: what has no value is null."""
    if isinstance(x, dict):
        return {key: without_nan(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [without_nan(value) for value in x]
    return None if isinstance(x, float) and math.isnan(x) else x


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Everything, with one generator for each part: a part's numbers do not depend on the others."""
    seeds, d = args.seeds, 30
    dimensions = (10, 30) if args.quick else tables.DIMENSIONS

    def generator(part: int) -> torch.Generator:
        return torch.Generator().manual_seed(SEED + part)

    result: dict[str, Any] = {
        "settings": {
            **PENALTY_STRENGTH,
            "k": K,
            "quick": args.quick,
            "seeds": seeds,
            "seed": SEED,
            "converged": CONVERGED,
            "tables_lr": tables.LR,
            "fixed_steps": tables.FIXED_STEPS,
            "L": curvature(K),
            "versions": {"torch": torch.__version__, "rvsm_kernels": rk.__version__},
        }
    }
    parts: dict[str, Any] = {
        "closed_forms": lambda: claims.closed_forms(generator(1), batches=40 if args.quick else 200),
        "rvsm_theorem": lambda: claims.rvsm_theorem(d, seeds, generator(2)),
        "rvscgd_theorem": lambda: claims.rvscgd_theorem(d, seeds, generator(3)),
        "hard_thresholding": lambda: claims.hard_thresholding(d, 6, seeds, generator(4)),
        "admm": lambda: claims.admm_gap(d, seeds, generator(5), steps=500 if args.quick else 2_000),
        "saddle": lambda: claims.saddle(d, generator(8)),
        "escape": lambda: claims.escape(d, seeds, generator(9), (1e-1, 1e-2) if args.quick else (1e-1, 1e-2, 1e-3)),
        "annulus": lambda: claims.annulus(generator(10), 20_000 if args.quick else 200_000),
        "figure2": lambda: figures.level_lines(args.out),
        "figure4": lambda: figures.thresholding(args.out),
        "figure5": lambda: figures.huber_functions(args.out),
        "figure6": lambda: figures.gamma_angles(args.out, generator(6)),
        "figure7": lambda: figures.lagrangian(args.out, generator(7)),
    }
    with tqdm(total=len(dimensions) + len(parts), disable=None) as bar:
        result["tables"] = []
        for size in dimensions:
            bar.set_description(f"tables, d = {size}")
            result["tables"].append(tables.measure(size, seeds, generator(100 + size)))
            bar.update()
        for name, part in parts.items():
            bar.set_description(name)
            result[name] = part()
            bar.update()
    result["deviations"] = {moment: tables.deviations(result["tables"], moment) for moment in tables.MOMENTS}
    return result


THEOREM = {
    "penalty": "penalty",
    "lr": "lr",
    "lagrangian_rise": "largest rise of L_β in a step",
    "theta_max": "largest θ",
    "theta": "largest θ of a limit",
    "delta": "δ",
    "theta_rise": "largest rise of θ in a step",
    "rise_above_delta": "the same where θ > δ",
    "rising": "runs whose θ ever rises",
    "theta_above_minimum": "limit θ − smallest θ",
    "residual": "residual of the limit equation",
}
RVSM_THEOREM = {
    **{"unit_norm": "unit norm", **THEOREM},
    **{"c_low": "smallest C", "c_high": "largest C", "c_bound": "bound of C"},
    **{"slack_13": "bound (13) − distance", "slack_14": "bound (14) − distance"},
}
RVSCGD_THEOREM = {
    **{"slope": "slope", **THEOREM},
    "residual_other": "residual with the other constant",
    "slack_15": "bound (3.15) − distance",
    "potential_rise": "largest rise of L_β, potential in the place of f",
}
ADMM = {
    **{"penalty": "penalty", "method": "method", "zeros": "d − ‖ū‖₀", "gap": "‖w̄ − ū‖"},
    **{"angle_u": "θ(ū,w*)", "loss_u": "f(ū)", "change": "last ‖Δw‖"},
}
SADDLE = {
    **{"k": "k", "c": "c", "gradient": "‖∇f(−c w*)‖", "cubic": "change of f across, over −h³/(3πkc²)"},
    "along": "curvature along w*, over the largest",
}
ESCAPE = {"noise": "noise", "saddle": "largest ‖w + c w*‖", "target": "largest ‖w − w*‖", "steps": "steps to θ < π/2"}
ANNULUS = {"k": "k", "M": "M", "ratio": "largest ratio", "bound": "1 + 3/M"}
DEVIATIONS = {"penalty": "penalty", **tables.LABELS, "zeros, moved": "d − ‖ū‖₀, printed row moved left"}


def report(result: dict[str, Any]) -> str:
    """A result as text."""
    texts = [tables.render(result["tables"], p, variant) for variant in tables.VARIANTS for p in PENALTIES]
    for moment, worst in result["deviations"].items():
        rows = [{"penalty": penalty, **values} for penalty, values in worst.items()]
        title = f"Largest |printed − mean| / standard deviation over d, unit norm, read {tables.MOMENTS[moment]}:"
        texts.append(f"{title}\n\n{markdown(rows, DEVIATIONS)}")
    checks, hard, admm = (result[name] for name in ("closed_forms", "hard_thresholding", "admm"))
    distances = ", ".join(f"{name} {x:.2f}" for name, x in checks.items() if name != "autograd")
    texts += [
        f"Closed forms: (3.16) against autograd of (3.2), relative difference: {checks['autograd']:.1e}\n"
        f"Closed forms against Gaussian inputs, in standard errors: {distances}",
        f"RVSM, Theorem 3.1:\n\n{columns(result['rvsm_theorem'], RVSM_THEOREM)}",
        f"RVSCGD, Theorem 3.2:\n\n{columns(result['rvscgd_theorem'], RVSCGD_THEOREM)}",
        f"Adaptive hard thresholding, d = {hard['d']}, s = {hard['s']}: exactly the support of w* in"
        f" {hard['eligible_recovered']} of {hard['eligible']} runs that start on it (in {hard['recovered']} of all"
        f" {hard['seeds']}), ‖w − w*‖ ≤ {hard['distance']:.1e}",
        f"ADMM, d = {admm[0]['d']}, {admm[0]['steps']} steps:\n\n{markdown(admm, ADMM)}",
        f"The saddle:\n\n{markdown(result['saddle'], SADDLE)}",
        f"Gradient descent from −w* plus noise:\n\n{markdown(result['escape'], ESCAPE)}",
        f"Lipschitz constant of ∇f outside radius M:\n\n{markdown(result['annulus'], ANNULUS)}",
    ]
    return "\n\n".join(texts)


def main(argv: Sequence[str] | None = None) -> None:
    """Run, print, save."""
    args = arguments(argv)
    torch.set_num_threads(1)  # tensors of a few kilobytes: threads would only wait for each other
    files.prepare(args.out)
    start = time.perf_counter()
    result = run(args)
    result["settings"]["seconds"] = round(time.perf_counter() - start, 2)
    print(report(result))
    path = args.out / "one_layer.json"
    files.write_json(path, without_nan(result))
    print(f"\n{result['settings']['seconds']} s; {path} and five figures written")


if __name__ == "__main__":
    cli.guarded(main)
