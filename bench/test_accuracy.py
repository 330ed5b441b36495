"""``python -m bench accuracy``: each way reaches the zeros that it is asked for, and a run goes on where it stopped."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from . import accuracy, accuracy_tables, cli, fashion, pruners, report
from .accuracy import METHODS, Job
from .config import MissingPackage
from .pruners import Curve
from .results import environment

# ---- the other ways --------------------------------------------------------------------------------------------------


def _weights() -> list[nn.Parameter]:
    gen = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=gen) * s) for shape, s in (((30, 20), 1.0), ((8, 30, 3, 3), 0.1))]


def test_the_smallest_go() -> None:
    weights = _weights()
    pruners.prune_(weights, 0.9, groups=False)
    assert sum(int((w == 0).sum()) for w in weights) == round(0.9 * (600 + 2160))
    assert (weights[1] == 0).all() and (weights[0] == 0).float().mean() < 0.6  # one cut over both
    weights = _weights()
    kept = pruners.masks(weights, 0.5, groups=False, each=True)
    assert [int(mask.sum()) for mask in kept] == [300, 1080]
    norms = [w.transpose(0, 1).flatten(1).norm(dim=1) for w in weights]
    pruners.prune_(weights, 0.3, groups=True)
    for w, norm, channels in zip(weights, norms, (20, 30), strict=True):  # of each tensor
        gone = (w == 0).transpose(0, 1).flatten(1).all(1)
        assert int(gone.sum()) == round(0.3 * channels) and norm[gone].max() < norm[~gone].min()


def test_gradual_pruning_follows_the_curve_and_keeps_its_masks() -> None:
    weights, curve = _weights(), Curve(0.8, 10, 90)
    gradual, before, seen = pruners.Gradual(weights, curve, groups=False), None, []
    for step in range(1, 120):
        with torch.no_grad():
            for w in weights:
                w.add_(torch.randn(w.shape, generator=torch.Generator().manual_seed(step)) * 0.05)
        gradual.step()
        zeros = torch.cat([(w == 0).flatten() for w in weights])
        if before is not None:
            assert (zeros >= before).all()
        before = zeros
        seen.append(zeros.float().mean().item())
        if curve.is_due(step):
            assert seen[-1] == pytest.approx(curve.at(step), abs=1e-3)
    assert seen[89] == seen[-1] == pytest.approx(0.8, abs=1e-3) and seen[8] == 0


_DENSE = pytest.param("dense", marks=pytest.mark.slow)
_OTHERS = [name for name, m in METHODS.items() if not m.search and m.kind != "dense"]


@pytest.mark.parametrize("name", [_DENSE, *_OTHERS])
@pytest.mark.parametrize("of", ["elements", "channels"])
def test_a_method(name: str, of: str) -> None:
    """Of a short training on few digits, whose accuracy says nothing."""
    method = METHODS[name]
    if of not in method.of or (method.kind == "pat" and of == "channels"):
        pytest.skip("is not trained")
    if method.kind.startswith("pat"):
        pytest.importorskip("torchao")
    rows = accuracy.train(Job("digits", of, name, 0.75, 0, smoke=True))
    assert len(rows) == (1 + len(accuracy.ELEMENTS) + len(accuracy.CHANNELS) if method.kind == "dense" else 1)
    for row in rows:
        # The lasso moves the survivors too: within the eight steps of this training they fall below the cut.
        wide = method.kind == "pat-lasso" or method.options.get("penalty") in ("l1", "tl1")
        asked = 0.0 if row["method"].startswith("dense") else row["share"]
        assert row["got"] == pytest.approx(asked, abs=0.3 if wide else 0.03)
        assert 0 <= row["accuracy"] <= 1 and row["dead"] <= 5 and row["steps"] == 8


def test_the_same_first_weights_and_batches() -> None:
    """Without a zero asked for, magnitude pruning is the dense training."""
    rows = [accuracy.train(Job("digits", "elements", name, 0.0, 1, smoke=True))[0] for name in ("dense", "gradual")]
    assert rows[0]["accuracy_as_is"] == rows[1]["accuracy_as_is"] and rows[0]["accuracy"] == rows[1]["accuracy"]


# ---- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The trainings of any effort, and no need of Fashion-MNIST."""
    jobs = [Job("digits", "elements", name, 0.9, 0, smoke=True) for name in ("dense", "gradual", "l0", "l0-hold")]
    monkeypatch.setattr(accuracy, "jobs", lambda effort: jobs)
    monkeypatch.setattr(fashion, "check", lambda: None)
    return jobs


def _run(out: Path) -> dict[str, Any]:
    assert cli.main(["accuracy", "--smoke", "--out", str(out), "--device", "cpu", "--threads", "1"]) == 0
    return json.loads((out / "accuracy.json").read_text())


def test_a_run_goes_on_where_it_stopped(
    tmp_path: Path, few: list[Job], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = _run(tmp_path / "straight")
    train, trained = accuracy.train, []

    def stopping(job: Job) -> list[dict[str, Any]]:
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(job.method)
        return train(job)

    monkeypatch.setattr(accuracy, "train", stopping)
    assert cli.main(["accuracy", "--smoke", "--out", str(tmp_path), "--device", "cpu", "--threads", "1"]) == 130
    stopped = json.loads((tmp_path / "accuracy.json").read_text())
    assert trained == ["dense", "gradual"] and not stopped["complete"]
    monkeypatch.setattr(accuracy, "train", lambda job: trained.append(job.method) or train(job))
    whole = _run(tmp_path)
    assert trained == ["dense", "gradual", "l0", "l0-hold"] and whole["complete"]
    kept = ("method", "share", "seed", "got", "accuracy")
    rows = [[{key: row[key] for key in kept} for row in result["rows"]] for result in (straight, whole)]
    assert rows[0] == rows[1]
    assert "2 of 4 trainings are in the file already" in capsys.readouterr().out
    # A method with another setting is trained anew, and what it made before is gone.
    monkeypatch.setitem(METHODS, "l0", replace(METHODS["l0"], schedule={"pull_rate": 0.3}))
    again = _run(tmp_path)
    assert trained[4:] == ["l0"] and len(again["rows"]) == len(whole["rows"])


@pytest.mark.slow
def test_threads_are_processes_and_change_no_number(few: list[Job]) -> None:
    rows = [[row for rows in accuracy._trained(few, n) for row in rows] for n in (1, 2)]
    for row, other in zip(*rows, strict=True):
        assert {**row, "train_s": 0} == {**other, "train_s": 0}


@pytest.mark.slow
def test_command(tmp_path: Path) -> None:
    try:
        fashion.check()
    except MissingPackage as error:
        pytest.skip(str(error))
    result = _run(tmp_path)
    assert result["complete"] and {row["method"] for row in result["rows"]} >= {"one-shot", "gradual", "l0", "l0-hold"}
    table = report.render(tmp_path, "accuracy")
    assert "Fashion-MNIST" in table and "A smoke run" in table and "| RVSM l0, pull_rate 0.2, hold |" in table


def test_jobs() -> None:
    """Each once; the comparison of l0 with magnitude pruning comes before everything else."""
    full = accuracy.jobs("full")
    assert len(set(full)) == len(full) > 10 * len(accuracy.jobs("quick")) > 0
    first = full[:40]
    assert {(job.problem, job.of) for job in first} == {("fashion", "elements")} and {job.seed for job in first} <= {
        0,
        1,
    }
    assert {METHODS[job.method].options.get("penalty", "l0") for job in first} == {"l0"}
    searched = {job for job in full if METHODS[job.method].search}
    assert searched and all(job.seed < accuracy.SEARCH_SEEDS for job in searched)
    assert {job.method for job in accuracy.jobs("smoke")} == {m.name for m in METHODS.values() if not m.search}


# ---- tables ----------------------------------------------------------------------------------------------------------


def test_a_difference_is_of_pairs() -> None:
    cell, other = {0: 0.90, 1: 0.80, 2: 0.1}, {0: 0.89, 1: 0.77, 3: 0.9}
    assert accuracy_tables.difference(cell, other) == (pytest.approx(0.02), pytest.approx(0.01))
    assert accuracy_tables.difference(cell, {0: 0.5}) is None
    assert accuracy_tables._cell(cell, other, 5) == "60.0 [3] (+2.0 ± 1.0)"
    assert accuracy_tables._cell(None, other, 5) == "–"


def test_what_a_table_says_of_few_seeds_and_lost_layers() -> None:
    base = {"problem": "digits", "of": "elements", "share": 0.9, "got": 0.9, "dead": 0}
    rows = [
        {**base, "method": "gradual", "seed": seed, "accuracy": 0.1 * (seed + 1), "dead": 1 - seed} for seed in (0, 1)
    ]
    rows.append({**base, "method": "l0", "seed": 0, "accuracy": 0.5, "got": 0.8})
    rows.append({**base, "method": "dense", "seed": 0, "share": 0.0, "got": 0.0, "accuracy": 0.75})
    methods = [{"name": m.name, "label": m.label, "setting": m.setting} for m in METHODS.values()]
    head = {**environment("cpu", "python -m bench accuracy"), **accuracy._head(False), "complete": False}
    text = accuracy_tables.table({**head, "methods": methods, "rows": rows})
    assert "dense SGD 75.0 [1] %" in text and "| gradual magnitude pruning | 15.0 [2] |" in text
    assert (
        "gradual magnitude pruning, 90% of elements, digits: 1 of 2" in text and "channels" not in text.split("Test")[0]
    )
    assert "RVSM l0, pull_rate 0.2: 80.0% zeros where 90% were asked for" in text and "was interrupted" in text
    assert accuracy_tables.headline({**head, "methods": methods, "rows": rows}).startswith("*not measured yet*")


def test_the_front_page_says_whose_accuracy_it_is() -> None:
    row = {"problem": "digits", "of": "elements", "share": 0.95, "seed": 0}
    rows = [
        {**row, "method": "l0-hold", "got": 0.951, "accuracy": 0.93},
        {**row, "method": "gradual", "got": 0.95, "accuracy": 0.92},
        {**row, "method": "dense", "share": 0.0, "got": 0.0, "accuracy": 0.97},
    ]
    head = {**environment("cpu", "python -m bench accuracy"), **accuracy._head(False)}
    header, _, line = accuracy_tables.headline({**head, "rows": rows}).splitlines()[:3]
    assert [word in cell for word, cell in zip(("RVSM", "gradual", "dense"), header.split("|")[4:7], strict=True)] == [
        True
    ] * 3
    assert line == "| digits, weights | 95% | 95.1 % | 93.0 | 92.0 | 97.0 |"


# ---- Fashion-MNIST ---------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set of three images."""
    monkeypatch.setattr(fashion, "FOLDERS", (tmp_path / "nowhere", tmp_path))
    for part in ("train", "t10k"):
        pixels = bytes([0, 0, 8, 3, 0, 0, 0, 3, 0, 0, 0, 28, 0, 0, 0, 28]) + bytes(i % 251 for i in range(3 * 784))
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(pixels))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 0, 9]))
    return tmp_path


def test_fashion(folder: Path) -> None:
    fashion.check()
    train, test = fashion.train_and_test()
    assert train.x.shape == (3, 1, 28, 28) and train.y.tolist() == test.y.tolist() == [7, 0, 9]
    assert train.x.mean().abs() < 1e-6 and train.x.std() == pytest.approx(1)
    torch.manual_seed(0)
    net = fashion.Net()
    assert net(train.x).shape == (3, 10)
    sizes = sum(p.numel() for p in net.parameters()), sum(p.numel() for p in net.parameters() if p.dim() == 2)
    assert all(f"{size:,}" in (fashion.Net.__doc__ or "") for size in sizes), sizes


def test_bad_or_missing_files(folder: Path) -> None:
    (folder / "t10k-labels-idx1-ubyte").write_bytes(b"something else")
    with pytest.raises(MissingPackage, match="is no IDX file"):
        fashion.train_and_test()
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(MissingPackage, match="dataset-fashion-mnist"):
        fashion.check()
