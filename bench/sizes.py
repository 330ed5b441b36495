"""``python -m bench sizes``: bytes of a network on the disk, by the share of its zeros and the form of the file."""

from __future__ import annotations

import gzip
import tempfile
from collections.abc import Iterator
from pathlib import Path

from torch import nn

import rvsm_kernels as rk

from . import resnet
from .config import Config, require
from .markdown import stamp, table
from .results import Result, Results, Row

SHARES = (0.5, 0.8, 0.9, 0.95)
"""Of zeros."""
REMOVED = (0.25, 0.5, 0.75)
"""Of the channels of each coupled set."""

FORMS: dict[str, dict[str, object]] = {
    "dense float32": {"forms": ("dense",)},
    "CSR": {"forms": ("csr",)},
    "bitmask": {"forms": ("bitmask",)},
    "chosen": {},
    "chosen, int8": {"int8": True},
    "dense int8": {"forms": ("dense",), "int8": True},
}
"""Column to the options of ``rk.save_sparse``; "chosen" is what it does without any."""


def networks() -> Iterator[tuple[str, nn.Module]]:
    """What is measured: a row of the table each; the dense network first."""
    yield "dense", resnet.dense()
    for share in SHARES:
        yield f"{share:.0%} zeros", resnet.zero(resnet.dense(), share)
    for share in REMOVED:
        yield f"{share:.0%} of the channels removed", resnet.shrink(resnet.dense(), share)
    both = resnet.zero(resnet.shrink(resnet.dense(), 0.5), 0.8)
    yield "50% of the channels removed, 80% zeros in the rest", both


def measure(label: str, model: nn.Module) -> Row:
    """The bytes of every form of one network, and of the same file after gzip."""
    found: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.safetensors"
        for form, options in FORMS.items():
            saved = rk.save_sparse(model, path, **options)  # type: ignore[arg-type]
            packed = len(gzip.compress(path.read_bytes(), 9, mtime=0))
            found[form] = {"bytes": saved.file_bytes, "gzip": packed}
    return {"network": label, "parameters": sum(p.numel() for p in model.parameters()), "forms": found}


def run(config: Config) -> None:
    """Measure every network and write sizes.json."""
    require("safetensors")
    with Results("sizes", config) as results:
        for label, model in networks():
            results.add(measure(label, model))
            chosen = results.rows[-1]["forms"]["chosen"]
            print(f"{label}: {chosen['bytes']:,} bytes chosen, {chosen['gzip']:,} after gzip")


def render(result: Result) -> str:
    """The table: kilobytes, in brackets after gzip, and how many times smaller than the dense network in float32."""
    forms = list(result["rows"][0]["forms"])
    dense = result["rows"][0]["forms"]["dense float32"]["bytes"]
    rows = []
    for row in result["rows"]:
        cells = []
        for form in forms:
            of = row["forms"][form]
            cells.append(f"{of['bytes'] / 1e3:.0f} ({of['gzip'] / 1e3:.0f}), {dense / of['bytes']:.3g}×")
        rows.append([row["network"], f"{row['parameters']:,}", *cells])
    note = (
        "Kilobytes of a file of `rk.save_sparse` with everything in it, in brackets after gzip -9, and how many times"
        " smaller than the dense network in float32. ResNet-20 with random weights: the smallest set to zero by one"
        " cut, or a share of the channels of each coupled set removed by `rk.shrink`. CSR: columns of one or two bytes."
        " Chosen: what `rk.save_sparse` takes, by tensor."
    )
    return "\n\n".join([table(["ResNet-20", "parameters", *forms], rows), note, stamp(result)])
