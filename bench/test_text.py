"""The training task on text: the data are real and divided fairly, the model is causal, and a run ends in a report."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

import rvsm_kernels as rk

from . import cli, report, text, text_task, training
from .config import MissingPackage, available_engines

pytestmark = pytest.mark.skipif("native" not in available_engines("cpu"), reason="the native engine is not built")


def _method(name: str) -> training.Method:
    return next(method for method in text_task.METHODS if method.name == name)


def test_the_text_is_the_manual_without_repetitions() -> None:
    raw = text.manual().decode()
    paragraphs = raw.split("\n\n")
    assert len(raw) > 200_000 and "Assignment statements" in raw
    assert len(set(paragraphs)) == len(paragraphs)


def test_no_byte_is_trained_and_validated_with() -> None:
    data = text.load()
    assert (len(data.train), len(data.validation)) == (36, 4)
    raw, length = text.manual(), data.train.shape[1]
    blocks = [raw[i * length : (i + 1) * length] for i in range(text.BLOCKS)]
    assert [bytes(block.tolist()) for block in data.validation] == [blocks[i] for i in (5, 15, 25, 35)]
    held_out = {bytes(block.tolist()) for block in data.validation}
    assert [bytes(block.tolist()) for block in data.train] == [block for block in blocks if block not in held_out]


def test_samples_are_consecutive_and_cover_a_block() -> None:
    blocks = torch.arange(2 * 101).view(2, 101)
    samples = text.windows(blocks, 10)
    assert samples.shape == (20, 11)
    # Every byte but the first of a block is predicted once.
    assert samples[:, 1:].flatten().tolist() == [*range(1, 101), *range(102, 202)]
    drawn = text.draw(blocks, text.Size(context=10, batch=200), torch.Generator().manual_seed(0))
    assert (drawn.diff(dim=1) == 1).all() and (drawn[:, 0] // 101 == drawn[:, -1] // 101).all()
    assert {0, 90, 101, 191} <= set(drawn[:, 0].tolist())  # the first and the last place of a block


def test_a_prediction_sees_what_came_before() -> None:
    torch.manual_seed(0)
    model, tokens = text.Transformer(text.SMOKE_SIZE), torch.randint(256, (2, 20))
    changed = tokens.clone()
    changed[:, 12] = (changed[:, 12] + 1) % 256
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12])
    assert (before[:, 12:] != after[:, 12:]).flatten(2).any(2).all(), "a later byte does not see an earlier one"


def test_the_model_has_the_size_that_it_says() -> None:
    model = text.Transformer(text.Size())
    linear = [p for name, p in model.named_parameters() if "blocks" in name and p.dim() == 2]
    sizes = (sum(p.numel() for p in model.parameters()), sum(p.numel() for p in linear))
    assert all(f"{size:,}" in (text.Transformer.__doc__ or "") for size in sizes), sizes


def test_a_model_that_knows_nothing_needs_eight_bits() -> None:
    model = text.Transformer(text.SMOKE_SIZE)
    torch.nn.init.zeros_(model.byte.weight)
    samples = torch.randint(256, (70, 33))  # more than one part
    assert text.bits_per_byte(model, samples) == pytest.approx(8, rel=1e-6)


def test_a_zero_neuron_can_be_taken_out() -> None:
    torch.manual_seed(0)
    model, tokens = text.Transformer(text.SMOKE_SIZE), torch.randint(256, (2, 20))
    with torch.no_grad():
        model.blocks[1].mlp_in.weight[3] = 0
        before = model(tokens)
        model.blocks[1].mlp_out.weight[:, 3] = torch.randn(32)
        assert torch.equal(model(tokens), before)
    assert text.zero_neurons(model) == pytest.approx(1 / (2 * 4 * 32))
    assert text.zero_weights(model) == pytest.approx(1 / (2 * 12 * 32))


def test_only_linear_layers_are_penalised() -> None:
    model = text.Transformer(text.SMOKE_SIZE)

    def penalised(method: training.Method) -> set[str]:
        optimizer = text.optimizer_for(method, model, "native")
        ids = {id(p) for group in optimizer.param_groups if group["penalty"] for p in group["params"]}
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
        return {name for name, p in model.named_parameters() if id(p) in ids}

    linear = {name for name, p in model.named_parameters() if "blocks" in name and p.dim() == 2}
    assert penalised(_method("l0")) == linear
    assert penalised(_method("neurons")) == {name for name in linear if "mlp_in" in name}
    assert isinstance(text.optimizer_for(_method("dense"), model, "native"), torch.optim.AdamW)


def test_the_learning_rate_rises_and_falls() -> None:
    factors = [text.lr_factor(step, 200) for step in range(200)]
    assert max(factors) == 1 and factors.index(1) == 9
    assert factors[:10] == sorted(factors[:10]) and factors[10:] == sorted(factors[10:], reverse=True)
    assert text.LEAST_LR <= factors[-1] < text.LEAST_LR + 1e-3 and factors[0] == pytest.approx(0.1)


def test_the_cut_rises_over_half_of_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    method, size, seen = _method("l0"), text.Size(layers=1, width=32, heads=2, steps=8, measured=1), []
    step = training.Stopwatch.step

    def watched(watch: training.Stopwatch, optimizer: torch.optim.Optimizer) -> None:
        seen.append([group["lam"] for group in optimizer.param_groups])
        step(watch, optimizer)

    monkeypatch.setattr(training.Stopwatch, "step", watched)
    text.train(method, "native", 0, text.load(), size)
    lam = method.options["lam"]
    assert [of_step[0] / lam for of_step in seen] == pytest.approx([0, 1 / 16, 1 / 4, 9 / 16, 1, 1, 1, 1])
    assert all(of_step[1] == seen[0][1] for of_step in seen), "what is not penalised is left alone"


def test_engines_train_the_same_network() -> None:
    data, method = text.load(), _method("l0")
    ends = [text.train(method, engine, 0, data, text.SMOKE_SIZE)["curve"][-1] for engine in ("native", "reference")]
    assert ends[0] == pytest.approx(ends[1], rel=1e-3)
    assert 0 < ends[0]["zeros"] < 1 and ends[0]["bits_w"] < 8


def test_u_is_what_is_measured_and_w_goes_on() -> None:
    torch.manual_seed(0)
    model, samples = text.Transformer(text.SMOKE_SIZE), torch.randint(256, (4, 33))
    optimizer = rk.RVSMAdamW(rk.param_groups(model, penalty="l0", lam=0.05, beta=10.0))
    before = [p.clone() for p in model.parameters()]
    found = text.measure(model, optimizer, samples)
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    assert found["zeros"] > 0.2 and found["bits_u"] != found["bits_w"]


def test_a_smoke_run_ends_in_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--task", "text", "--smoke", "--out", str(tmp_path), "--device", "cpu"]) == 0
    assert "A smoke run" in capsys.readouterr().out
    result = json.loads((tmp_path / "text.json").read_text())
    assert result["complete"] and len(result["rows"]) == 2 * len(text_task.METHODS)
    assert result["command"].startswith("python -m bench train --task text --smoke")
    assert result["text"]["sha256"] == text.load().digest
    for row in result["rows"]:
        assert 0 < row["step_s"] < row["train_s"] and row["steps"] == text.SMOKE_SIZE.steps
        assert [point["step"] for point in row["curve"]] == [3, 6]
        assert all(math.isfinite(value) for point in row["curve"] for value in point.values())
    assert not (tmp_path / "train.json").exists()
    table = report.render(tmp_path, "text")
    assert all(f"| {method.label} | " in table for method in text_task.METHODS)
    assert "bits per byte" in table and "Against dense AdamW" in table and result["text"]["source"] in table
    for kept in (1, 3):  # interrupted: the dense trainings alone, then with one sparse
        short = text_task.table({**result, "rows": result["rows"][:kept]})
        assert short.count("| dense AdamW |") == min(kept, 2) and short.count("- RVSMAdamW") == max(0, kept - 2)
    pytest.importorskip("matplotlib")
    assert "text.png" in report.draw(tmp_path)


def test_a_python_without_its_manual_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(MissingPackage, match="without its manual"):
        text.topics()
    assert cli.main(["train", "--task", "text", "--smoke", "--out", str(tmp_path), "--device", "cpu"]) == 1
    assert "not measured, because pydoc_data cannot be imported" in capsys.readouterr().err
