"""The main job with a sparsity asked for, and no lam: ``python -m bench train --task targets``.

Every penalty is led to several shares of zeros by ``rk.SparsitySchedule`` (from a tenth to seven tenths of the steps,
along the cubic curve), elements and input channels, with one seed; ``--full``: three. The learning rate and the number
of epochs are those of the dense run.

What to expect beyond the numbers:

- l0 and top-k pull with ``pull_rate=0.2``: lr * beta stays, though lr goes to 0. The weights that survive are not
  pulled.
- l1 and tl1 pull all weights that survive, by lam / beta, so a pull that grows as lr falls would shrink the network
  away: they keep a beta. u differs from w everywhere, and the running statistics of batch norm, gathered with w, do not
  fit u: they are made again for u, from the training images, in the last column.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import rvsm_kernels as rk

from . import digits, markdown, training
from .config import require
from .results import Result
from .training import Method, Run, Task, last, methods_of, rows_of

EPOCHS = 30
BEGIN, END = 0.1, 0.7
"""The shares of the steps between which the sparsity rises."""


@dataclass(frozen=True)
class Target:
    """A share of zeros that is asked for.

    Attributes:
        schedule: arguments of ``rk.SparsitySchedule`` beside the target and the steps.
    """

    share: float
    schedule: dict[str, Any]


def _leads() -> dict[str, tuple[Method, Target]]:
    """Every sparse method by its name, with what it is led to."""
    leads: dict[str, tuple[Method, Target]] = {}
    rate = {"pull_rate": 0.2}
    elements: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "l0": ({"beta": 1.0}, rate),
        "topk": ({"beta": 1.0, "density": 1.0}, {**rate, "scope": "tensor"}),
        "l1": ({"beta": 6.0}, {}),
        "tl1": ({"beta": 6.0, "a": 1.0}, {}),
    }
    for penalty, (options, schedule) in elements.items():
        for share in (0.5, 0.8, 0.9, 0.95):
            method = Method(f"{penalty}-{share:g}", f"RVSM {penalty}", 0.1, {"penalty": penalty, **options})
            leads[method.name] = method, Target(share, schedule)
    for share in (0.25, 0.5):
        options = {"penalty": "l0", "beta": 1.0, "structure": "in_channels"}
        method = Method(f"channels-{share:g}", "RVSM l0 (input channels)", 0.1, options)
        leads[method.name] = method, Target(share, {**rate, "of": "groups"})
    return leads


LEADS = _leads()
METHODS = (Method("dense", "dense SGD", 0.1), *(method for method, _ in LEADS.values()))


def _head(smoke: bool) -> dict[str, Any]:
    return {"epochs": 2 if smoke else EPOCHS, "batch": digits.BATCH}


def _schedule(method: Method, optimizer: torch.optim.Optimizer, steps: int) -> Any:
    """The schedule of a run, None for a dense one."""
    if method.dense:
        return None
    target = LEADS[method.name][1]
    end = max(1, round(END * steps))
    return rk.SparsitySchedule(
        optimizer, target.share, begin=min(round(BEGIN * steps), end - 1), end=end, **target.schedule
    )


def _measure(model: nn.Module, optimizer: torch.optim.Optimizer, images: digits.Images, held_out: digits.Images) -> Run:
    """What the main job measures, what the optimizer says that it got, and the accuracy with batch norms made for u."""
    found: Run = digits.measure(model, optimizer, held_out)
    if isinstance(optimizer, rk.RVSM):
        report = optimizer.sparsity()
        found["got"] = report.group_share if optimizer.param_groups[0]["group_dim"] is not None else report.share
        with optimizer.sparse_weights(model):
            digits.make_statistics(model, images, digits.BATCH)
            found["accuracy_made"] = digits.accuracy(model, held_out)
    else:
        found["got"], found["accuracy_made"] = 0.0, found["accuracy_u"]
    return found


def _train(method: Method, engine: str, seed: int, data: Any, head: dict[str, Any]) -> Run:
    return digits.train(
        method, engine, seed, data, head["epochs"], every=head["epochs"], lead=_schedule, measure=_measure
    )


def _outcome(row: Run) -> str:
    end = row["curve"][-1]
    return f"zeros {end['got']:>7.2%}   accuracy with u {end['accuracy_u']:>6.1%}, {end['accuracy_made']:>6.1%}"


def table(result: Result) -> str:
    """The Markdown table of a result: asked for, got, accuracy."""
    lines = []
    for method in methods_of(result):
        rows = rows_of(result, method.name)
        if rows:
            asked = "" if method.dense else f"{LEADS[method.name][1].share:.0%}"
            got, *accuracies = (
                markdown.spread(last(rows, key), places)
                for key, places in (("got", 2), ("accuracy_w", 1), ("accuracy_u", 1), ("accuracy_made", 1))
            )
            lines.append([method.label, asked, "" if method.dense else got, *accuracies])
    header = [
        "method",
        "zeros asked for",
        "got, %",
        "test accuracy with w, %",
        "with u, %",
        "with u, batch norms made anew, %",
    ]
    seeds = training.seeds_of(result)
    repeated = f"{seeds} seeds: mean (least–greatest) over all engines and seeds" if seeds > 1 else "1 seed"
    note = f"{repeated}. {result['epochs']} epochs; `rk.SparsitySchedule`, no lam is set."
    note += " Zeros: of the penalised weights, or of their input channels."
    doubt = training.caution(
        result, "accuracies that differ by less than a point", "python -m bench train --task targets"
    )
    return "\n\n".join([markdown.table(header, lines), note, *doubt, markdown.stamp(result)])


TASK = Task(
    "targets", METHODS, lambda: require("numpy", "sklearn"), _head, digits.train_and_test, _train, _outcome, table
)
