"""The networks of ``sizes`` and ``latency``, and what these two measure of them."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import rvsm_kernels as rk

from . import cases, latency, resnet, sizes
from .config import SMOKE, Config
from .results import read_json


def test_resnet_has_the_tensors_of_the_cases() -> None:
    model = resnet.dense()
    assert [tuple(p.shape) for p in model.parameters()] == [spec.shape for spec in cases.specs("ResNet-20")]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resnet.dense().parameters(), strict=True))


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_so_many_channels_go(share: float) -> None:
    model = resnet.shrink(resnet.dense(), share)
    widths = {p.shape[0] for p in model.parameters() if p.dim() == 4}
    assert widths == {int(w * (1 - share)) for w in (16, 32, 64)}
    assert resnet.macs(model) < (1 - share) ** 2 * 1.05 * resnet.macs(resnet.dense())
    assert model(resnet.images(2)).shape == (2, resnet.CLASSES)


def test_so_many_zeros() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no layer is lost
        model = resnet.zero(resnet.dense(), 0.95)
    assert rk.sparsity(model).share == pytest.approx(0.95, abs=1e-4)
    assert resnet.macs(model) == resnet.macs(resnet.dense())


def config(out: Path) -> Config:
    effort = replace(SMOKE, budget_s=0.01, max_samples=2)
    return Config(engines=("reference",), out=out, device="cpu", effort=effort, command="python -m bench")


def test_latency(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime that is not installed is left out, and the table says so."""
    monkeypatch.setattr(latency, "BATCHES", (1,))
    monkeypatch.setattr(latency.importlib.util, "find_spec", lambda name: None)
    latency.run(config(tmp_path))
    result = read_json(tmp_path / "latency.json")
    assert result is not None and result["complete"]
    text = latency.render(result)
    assert (
        "| eager, batch 1 |" in text
        and "onnxruntime: not measured: onnx, onnxscript, onnxruntime cannot be found" in text
    )
    assert "| multiplications (MACs) | 40,813,184 | 0.56 | 0.25 | 0.06 | 1.00 | 1.00 |" in text


@pytest.mark.slow
def test_every_runtime_computes_the_same() -> None:
    pytest.importorskip("onnxruntime")
    model, x = resnet.shrink(resnet.dense(), 0.5), resnet.images(2)
    with torch.no_grad():
        wanted = model(x)
        for name, make in latency.RUNTIMES.items():
            found = make(model, x)()
            found = torch.from_numpy(found[0]) if isinstance(found, list) else found
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4, msg=name)


def test_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("safetensors")
    monkeypatch.setattr(sizes, "SHARES", (0.9,))
    monkeypatch.setattr(sizes, "REMOVED", (0.5,))
    sizes.run(config(tmp_path))
    result = read_json(tmp_path / "sizes.json")
    assert result is not None
    rows = {row["network"]: row["forms"] for row in result["rows"]}
    dense = rows["dense"]["dense float32"]["bytes"]
    removed = rows["50% of the channels removed"]
    assert removed["dense float32"]["bytes"] < 0.3 * dense and removed["dense int8"]["bytes"] < 0.1 * dense
    assert rows["90% zeros"]["dense float32"]["bytes"] == dense
    assert all(form["gzip"] < form["bytes"] for forms in rows.values() for form in forms.values())
    assert "| dense | 272,474 |" in sizes.render(result)
