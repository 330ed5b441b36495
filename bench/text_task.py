"""The training task on text: a small causal transformer over bytes, dense and sparse, with AdamW.

``python -m bench train --task text`` trains it with dense AdamW (torch's fused step), with l0 on the weights of all
linear layers and with l0 on neurons: rows of the layers into the MLPs, which have no bias, so that a zero row is a
neuron that can be taken out. ``--full`` trains it with three seeds and with the reference engine too.

The settings were chosen by hand with one seed, some twenty trainings, on the blocks that are validated with: they are
those of a demonstration, not of a contest. What was seen on the way, beside bench/NOTES.md:

- AdamW's steps have one size, so a pulled weight settles at about 1 / beta times the share of its gradient that keeps
  its sign. With beta * cut near 0.6 a weight with a steady gradient escapes, and the others stay so far below the cut
  that u does nearly what w does; at half of it (beta 10) u lost nearly twice as much against w.
- With the full cut from the first step on, the weights that begin below it are held down: 0.07 bits worse at the same
  zeros than with a cut that rises over half of the steps (:func:`bench.text.lam_factor`). Neurons begin with nearly
  equal norms, and a fixed cut takes all of them or nearly none.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import markdown, text, training
from .results import Result
from .training import (
    STEP_MEDIAN,
    STEP_SECONDS,
    Column,
    Method,
    Panel,
    Run,
    Task,
    last,
    percent,
    percent_axis,
    rows_of,
    sparse_results,
)

METHODS = (
    Method("dense", "dense AdamW", 4e-3),
    Method("l0", "RVSMAdamW l0", 4e-3, {"penalty": "l0", "lam": 9e-3, "beta": 20.0}),
    Method(
        "neurons",
        "RVSMAdamW l0 (neurons)",
        4e-3,
        {"penalty": "l0", "group_dim": 0, "lam": 4.4, "beta": 20.0},
        ("mlp_in.weight",),
    ),
)
"""Dense first."""


def _head(smoke: bool) -> dict[str, Any]:
    return {"size": asdict(text.SMOKE_SIZE if smoke else text.Size()), "text": _described(text.load())}


def _described(data: text.Text) -> dict[str, Any]:
    """What a result file says of the text."""
    parts = {"train_bytes": data.train.numel(), "validation_bytes": data.validation.numel()}
    return {"source": data.source, "bytes": data.size, "sha256": data.digest, **parts}


def _train(method: Method, engine: str, seed: int, data: Any, head: dict[str, Any]) -> Run:
    return text.train(method, engine, seed, data, text.Size(**head["size"]))


def _outcome(row: Run) -> str:
    end = row["curve"][-1]
    zeros = f"zeros {end['zeros']:>4.0%}   zero neurons {end['zero_neurons']:>4.0%}"
    return f"bits per byte with u {end['bits_u']:.3f}   {zeros}"


def _against_dense(result: Result) -> list[str]:
    """One line per sparse method: what its zeros cost."""
    dense = last(rows_of(result, "dense"), "bits_w")
    lines = []
    for method, rows in sparse_results(result):
        more = statistics.fmean(last(rows, "bits_u")) / statistics.fmean(dense) - 1
        zeros, neurons = (statistics.fmean(last(rows, key)) for key in ("zeros", "zero_neurons"))
        needs = f"u needs {abs(more):.1%} {'more' if more > 0 else 'fewer'} bits per byte"
        lines.append(
            f"- {method.label} ({method.setting}): {needs}, for {zeros:.0%} zeros and {neurons:.0%} zero neurons."
        )
    return lines


def _bits(header: str, key: str) -> Column:
    """A column of bits per byte; the spread is over the seeds."""
    return header, lambda rows: markdown.spread(last(rows, key), 3, scale=1)


_COLUMNS = (
    _bits("validation bits per byte with w", "bits_w"),
    _bits("with u", "bits_u"),
    percent("zero weights, %", "zeros"),
    percent("zero neurons, %", "zero_neurons"),
    STEP_SECONDS,
    ("of the training, %", lambda rows: markdown.spread([row["step_s"] / row["train_s"] for row in rows])),
    STEP_MEDIAN,
)


def table(result: Result) -> str:
    """The Markdown table of a result."""
    size, data = text.Size(**result["size"]), result["text"]
    note = (
        f"A transformer of {size.layers} layers, {size.width} wide, over bytes; {size.steps} steps of {size.batch}"
        f" samples of {size.context} bytes. Text: {data['source']}, {data['bytes']:,} bytes (SHA-256"
        f" {data['sha256']}...), of which {data['validation_bytes']:,} in {text.BLOCKS // text.HELD_OUT} blocks are"
        " held out. Zero weights: of the linear layers. Neurons: rows of the layers into the MLPs."
    )
    doubt = "differences of a hundredth of a bit"
    command = "python -m bench train --task text"
    return training.table(result, _COLUMNS, note, _against_dense(result), doubt, command)


def _bits_axis(axes: Any) -> None:
    axes.set_ylabel("bits per byte")


_PANELS = (
    Panel("validation loss with u", lambda point: point["bits_u"], _bits_axis),
    Panel("zero weights in u", lambda point: 100 * point["zeros"], percent_axis),
    Panel("zero neurons in u", lambda point: 100 * point["zero_neurons"], percent_axis),
)


def plot(result: Result, path: Path) -> bool:
    """Loss with u, zero weights and zero neurons over the steps. Returns whether there was anything to draw."""
    return training.plot(result, path, "Text", "step", _PANELS)


TASK = Task("text", METHODS, text.topics, _head, text.load, _train, _outcome, table)
