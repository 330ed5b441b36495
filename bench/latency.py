"""``python -m bench latency``: a forward pass on the CPU, of networks with fewer channels over the dense one."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import resnet
from .config import Config, MissingPackage
from .markdown import duration, stamp, table
from .results import Result, Results, Row
from .timing import Step, interleave, wall_clock

DENSE = "dense"
REMOVED = (0.25, 0.5, 0.75)
"""Of the channels of each coupled set."""
ZEROS = (0.5, 0.9)
"""Of the weights, in tensors that stay as large as they are."""
BATCHES = (1, 64)


def networks() -> dict[str, nn.Module]:
    """What is measured; the dense network first."""
    found: dict[str, nn.Module] = {DENSE: resnet.dense()}
    found |= {f"{share:.0%} of the channels removed": resnet.shrink(resnet.dense(), share) for share in REMOVED}
    return found | {f"{share:.0%} zeros": resnet.zero(resnet.dense(), share) for share in ZEROS}


# ---- what runs them --------------------------------------------------------------------------------------------------


def _eager(model: nn.Module, x: Tensor) -> Step:
    return lambda: model(x)


def _compiled(model: nn.Module, x: Tensor) -> Step:
    torch._dynamo.reset()  # else the sizes of one network become dynamic when the next one comes
    fast = torch.compile(model, dynamic=False)
    fast(x)
    return lambda: fast(x)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without what the exporter says of packages that it does not need."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _check_onnx() -> None:
    """Raise MissingPackage where one of the packages is not there, which ``make bench`` does not install."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        remedy = f"`pip install {' '.join(missing)}`, or `make .venv/frameworks` in the clone"
        raise MissingPackage(f"{', '.join(missing)} cannot be found: {remedy}")


def _onnxruntime(model: nn.Module, x: Tensor) -> Step:
    """As many threads as torch has, of which none spins while another network is timed."""
    _check_onnx()
    import onnxruntime

    with _silent():
        program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)


RUNTIMES: dict[str, Callable[[nn.Module, Tensor], Step]] = {
    "eager": _eager,
    "torch.compile": _compiled,
    "onnxruntime": _onnxruntime,
}
"""Name to what makes a forward pass of a network on an input."""


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure(runtime: str, batch: int, models: dict[str, nn.Module], config: Config) -> Row:
    """Seconds of a forward pass of each network, and the ratio to the dense one, round by round."""
    x = resnet.images(batch)
    with torch.no_grad():
        steps = {label: RUNTIMES[runtime](model, x) for label, model in models.items()}
        for step in steps.values():
            step()
        timings = interleave(steps, wall_clock, config.effort)
    found: dict[str, Any] = {}
    for label in models:
        seconds, over = timings.seconds(label), timings.ratio(label, DENSE)
        found[label] = {"seconds": dataclasses.asdict(seconds), "over_dense": dataclasses.asdict(over)}
    return {"runtime": runtime, "batch": batch, "networks": found}


def run(config: Config) -> None:
    """Measure every network in every runtime and write latency.json."""
    config = dataclasses.replace(config, device="cpu")
    models = networks()
    sizes = {
        label: {"parameters": sum(p.numel() for p in model.parameters()), "macs": resnet.macs(model)}
        for label, model in models.items()
    }
    with Results("latency", config) as results:
        results.add({"sizes": sizes})
        for runtime in RUNTIMES:
            if runtime == "torch.compile" and config.effort.compile_up_to == 0:
                results.add({"runtime": runtime, "skipped": "it compiles for minutes, and a smoke run leaves it out"})
                continue
            for batch in BATCHES:
                try:
                    results.add(measure(runtime, batch, models, config))
                except MissingPackage as error:
                    results.add({"runtime": runtime, "skipped": str(error)})
                    print(f"{runtime}: not measured, because {error}")
                    break
                ratios = {
                    label: f"{of['over_dense']['median']:.2f}" for label, of in results.rows[-1]["networks"].items()
                }
                print(f"{runtime}, batch {batch}, over dense: {ratios}")


# ---- the report ------------------------------------------------------------------------------------------------------


def render(result: Result) -> str:
    """The table: a row for each runtime and batch, ratios to the dense network."""
    sizes = result["rows"][0]["sizes"]
    others = [label for label in sizes if label != DENSE]
    rows = []
    for what, key in (("parameters", "parameters"), ("multiplications (MACs)", "macs")):
        whole = sizes[DENSE][key]
        rows.append([what, f"{whole:,}", *(f"{sizes[label][key] / whole:.2f}" for label in others)])
    notes = []
    for row in result["rows"][1:]:
        if "skipped" in row:
            notes.append(f"{row['runtime']}: not measured: {row['skipped']}.")
            continue
        cells = [f"{row['runtime']}, batch {row['batch']}", duration(row["networks"][DENSE]["seconds"]["median"])]
        for label in others:
            over = row["networks"][label]["over_dense"]
            cells.append(f"{over['median']:.2f} ({over['q25']:.2f}–{over['q75']:.2f})")
        rows.append(cells)
    samples = [of["over_dense"]["samples"] for row in result["rows"][1:] for of in row.get("networks", {}).values()]
    note = (
        "ResNet-20 with random weights on images of 32x32; a share of the channels of each coupled set removed by"
        " `rk.shrink`, or zeros in tensors that stay as large as they are. All but the second column: over the dense"
        " network, medians of ratios within a round, in brackets the quartiles"
        + (f"; {min(samples)} rounds or more" if samples else "")
        + f". torch and onnxruntime with {result['threads']} thread{'s' if result['threads'] > 1 else ''} each."
    )
    return "\n\n".join([table(["ResNet-20", DENSE, *others], rows), note, *notes, stamp(result)])
