"""The harness itself: cases are what they say, contenders do the same step, results and reports survive trouble."""

from __future__ import annotations

import itertools
import json
import os
import re
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import rvsm_kernels as rk

from . import baselines, cases, cli, gpu_check, markdown, report, results, tables, throughput, timing, train, training
from .baselines import CONTENDERS, Unavailable, without_paths
from .cases import Case
from .config import RESULTS, ROOT, SMOKE, Config, MissingPackage, available_engines
from .floors import Measured, at_least, at_most
from .problems import BETA, CUT, A, build, magnitudes, strength

ENGINES = available_engines("cpu")


@pytest.mark.parametrize(
    ("model", "tensors", "elements"),
    [
        ("ResNet-20", 65, 272_474),
        ("ResNet-18", 62, 11_689_512),
        ("ResNet-50", 161, 25_557_032),
        ("VGG-16", 32, 138_357_544),
        ("GPT-2 small", 148, 124_439_808),
        ("1000 of 1", 1000, 1000),
    ],
)
def test_models_have_their_published_sizes(model: str, tensors: int, elements: int) -> None:
    assert len(cases.specs(model)) == tensors
    assert sum(spec.numel for spec in cases.specs(model)) == elements


def test_every_listed_case_is_known() -> None:
    listed = cases.SMOKE_CASES + cases.QUICK_CASES + cases.FULL_CASES + cases.MEMORY_CASES
    assert all(case.elements > 0 and cases.small(case).elements > 0 for case in listed)
    assert Case("300x200", "l0", 1).groups == 200
    with pytest.raises(ValueError, match="unknown shape"):
        cases.specs("ResNet-19")


@pytest.mark.parametrize("penalty", ["l0", "l1", "tl1"])
@pytest.mark.parametrize("group_dim", [None, 0, 1])
def test_supports_are_mixed(penalty: str, group_dim: int | None) -> None:
    around = torch.tensor([0.999, 1.001], dtype=torch.float64) * CUT
    assert (rk.reference.prox(around, penalty, strength(penalty) / BETA, A) == 0).tolist() == [True, False]
    w = build(Case("300x400", penalty, group_dim), "cpu").weights[0]
    below = (magnitudes(w, group_dim) <= CUT).double().mean()
    assert 0.35 < below < 0.65


SAME_STEP = [
    *((name, case) for name in ENGINES for case in (Case("ResNet-20"), Case("ResNet-20", "l0", 1), Case("1K", "tl1"))),
    *(("channel_loop", Case("30x40x3x3", penalty, dim)) for penalty in ("l0", "l1", "tl1") for dim in (0, 1)),
    ("compiled", Case("1K", "tl1")),
    *((name, Case("ResNet-20", base=base)) for name in ENGINES for base in ("adamw", "wrapper", "pull")),
]


@pytest.mark.parametrize(
    ("name", "case"),
    [pytest.param(*row, marks=pytest.mark.slow if row[0] in ("triton", "compiled") else []) for row in SAME_STEP],
    ids=str,
)
def test_contenders_do_the_step_of_the_reference(name: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """After three steps from the same weights, the same weights; else a ratio compares two different things."""
    # The benchmark's own lr would hide a wrong pull.
    monkeypatch.setattr(baselines, "LR", 0.1)
    monkeypatch.setitem(baselines.SGD_OPTIONS, "lr", 0.1)
    monkeypatch.setitem(baselines.ADAMW_OPTIONS, "lr", 0.01)
    before = build(case, "cpu").weights

    def after(contender: str) -> list[torch.Tensor]:
        problem = build(case, "cpu")
        problem.reuse = True
        step = CONTENDERS[contender](problem)
        for _ in range(3):
            step()
        return problem.weights

    try:
        found = after(name)
    except Unavailable as reason:
        pytest.skip(str(reason))
    for p, q, start, spec in zip(found, after("reference"), before, case.specs, strict=True):
        assert torch.equal(p, start) == (case.base == "pull" and not spec.penalised)
        # Float32 sums in another order; a wrong pull would show at 1e-4.
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_baselines_belong_to_a_base() -> None:
    """Nothing is measured against the step of another base."""
    for base, other in (
        ("sgd", "fused_adamw"),
        ("sgd", "cpu_adam"),
        ("sgd", "scaled"),
        ("adamw", "fused_sgd"),
        ("adamw", "foreach_sgd"),
        ("adamw", "compiled"),
        ("wrapper", "pat"),
        ("pull", "fused_adamw"),
    ):
        with pytest.raises(Unavailable, match=f"case of {base}"):
            CONTENDERS[other](build(Case("1K", base=base), "cpu"))


def test_every_base_is_measured_against_baselines_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a table has a column for can be measured where its package is installed."""
    assert (
        throughput.BASELINES.keys() == cases.BASES.keys() == baselines._OPTIMIZERS.keys() == tables._OPTIMIZERS.keys()
    )
    monkeypatch.setattr(baselines, "import_pat", lambda: lambda base, reg_lambda: base)
    monkeypatch.setitem(sys.modules, "deepspeed.ops.adam", SimpleNamespace(DeepSpeedCPUAdam=_CPUAdam))
    for base, names in throughput.BASELINES.items():
        for name in names:
            # PAT knows the lasso alone, the loop channels alone.
            case = Case("30x40", "l1" if name == "pat" else "l0", 0 if name == "channel_loop" else None, base=base)
            if name != "compiled":
                baselines.start(name, build(case, "cpu"))


class _CPUAdam(torch.optim.AdamW):
    """DeepSpeed's signature, with torch's step."""

    def __init__(
        self, model_params: Any, lr: float = 1e-3, weight_decay: float = 0, adamw_mode: bool = False, **options: Any
    ) -> None:
        assert adamw_mode
        super().__init__(model_params, lr=lr, weight_decay=weight_decay, **options)


def test_a_baseline_that_is_not_installed_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed.ops.adam", None)
    monkeypatch.setitem(sys.modules, "torchao.prototype.pat.optim", None)
    row = throughput.measure(Case("30x40", "l1", base="adamw"), _config(Path("unused")))
    assert "deepspeed could not be imported" in row["not_measured"]["cpu_adam"]
    assert "torchao.prototype.pat could not be imported" in row["not_measured"]["pat"]
    assert {"native", "reference", "fused_adamw"} == row["contenders"].keys() and row["base"] == "adamw"


def test_pat_is_around_the_fused_step_of_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its price is that of its proximal map, not of a slower base."""
    seen: list[torch.optim.Optimizer] = []
    monkeypatch.setattr(baselines, "import_pat", lambda: lambda base, reg_lambda: seen.append(base) or base)
    for base in ("sgd", "adamw"):
        baselines.pat(build(Case("30x40", "l1", 0, base=base), "cpu"))
    assert [type(base) for base in seen] == [torch.optim.SGD, torch.optim.AdamW]
    assert all(base.defaults["fused"] and base.param_groups[0]["group_type"] == "Dim0Grouper" for base in seen)


def test_counted_bytes() -> None:
    """Float32: SGD with momentum 20 bytes a parameter, AdamW 28; a pull 8 for a penalised parameter."""
    expected = {"sgd": 20_000, "adamw": 28_000, "wrapper": 36_000, "pull": 8_000}
    assert {base: Case("1K", base=base).counted_bytes for base in cases.BASES} == expected
    assert Case("1K", method="admm").counted_bytes == 28_000
    model = Case("ResNet-20", base="pull")
    assert model.counted_bytes == 8 * sum(spec.numel for spec in model.specs if spec.penalised) < 8 * model.elements


def test_the_pull_alone_and_its_baseline_touch_the_penalised_weights() -> None:
    case = Case("ResNet-20", base="pull")
    for name in ("scaled", "reference"):
        problem, before = build(case, "cpu"), build(case, "cpu").weights
        problem.reuse = True
        CONTENDERS[name](problem)()
        changed = [not torch.equal(w, old) for w, old in zip(problem.weights, before, strict=True)]
        assert changed == [spec.penalised for spec in case.specs], name


def test_turns_meet_in_every_round_of_the_slower() -> None:
    durations = {"fast": 1e-3, "slow": 5e-3, "slowest": 0.03}
    steps = {name: (lambda: None) for name in durations}
    by_step = {id(step): durations[name] for name, step in steps.items()}
    effort = replace(SMOKE, budget_s=0.3, min_samples=2, max_samples=50)
    timings = timing.interleave(steps, lambda step, inner: by_step[id(step)], effort)
    assert timings.seconds("fast").samples > timings.seconds("slowest").samples >= 2
    assert timings.ratio("fast", "slowest").samples == timings.seconds("slowest").samples
    assert timings.ratio("fast", "slowest").median == pytest.approx(1 / 30)


def _config(out: Path) -> Config:
    return Config(out, "cpu", ("native",), SMOKE, "python -m bench throughput --smoke")


def test_interrupted_results_stay(tmp_path: Path) -> None:
    def interrupted() -> None:
        with results.Results("host", _config(tmp_path)) as written:
            written.add({"parameters": 1})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    value = json.loads((tmp_path / "host.json").read_text())
    assert value["rows"] == [{"parameters": 1}]
    assert value["complete"] is False
    assert {"machine", "versions", "commit", "device", "threads", "command"} <= value.keys()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    results.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        results.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_reasons_name_no_folders() -> None:
    assert without_paths("cannot open /home/someone/lib/x.so: no such file\nmore") == "cannot open x.so: no such file"
    assert without_paths("2/3 of a GB/s") == "2/3 of a GB/s"


def _result(rows: list[results.Row]) -> results.Result:
    return {
        "machine": {"cpu": "A CPU", "system": "Linux x86_64"},
        "versions": {"torch": "2", "rvsm_kernels": "0"},
        "commit": "0123456789abcdef-dirty",
        "device": "cpu",
        "threads": 2,
        "busy_share": 0.02,
        "command": "python -m bench host --quick",
        "effort": "quick",
        "engines": ["native"],
        "complete": True,
        "rows": rows,
    }


def test_readme_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"parameters": 1000, "microseconds": {"native": {"median": 98.7}}, "not_measured": {}}
    results.write_json(tmp_path / "host.json", _result([row]))
    results.write_json(tmp_path / "gpu" / "host.json", _result([{**row, "parameters": 7}]))
    readme = tmp_path / "README.md"
    blocks = ("host", "headline", "gpu/host")
    readme.write_text(
        "Text.\n" + "\n".join(f"<!-- bench:{b} -->\nold\n<!-- /bench:{b} -->" for b in blocks) + "\nEnd.\n"
    )
    assert not report.check(readme, tmp_path)
    assert "README.md in host, README.md in headline, README.md in gpu/host, report.md" in capsys.readouterr().out
    report.write_committed(readme, tmp_path)
    text = readme.read_text()
    assert "| 1,000 | 98.7 |" in text
    assert "| 7 | 98.7 |" in text
    assert f"<!-- bench:headline -->\n{markdown.NOT_MEASURED}\n<!-- /bench:headline -->" in text
    assert "commit 0123456789-dirty" in text
    assert text.startswith("Text.\n")
    assert text.endswith("\nEnd.\n")
    assert "| 1,000 | 98.7 |" in (tmp_path / "report.md").read_text()
    assert report.check(readme, tmp_path)
    # A plot of other numbers, and report.md: both are checked, not the README alone.
    (tmp_path / "train.png").write_bytes(b"of other numbers")
    assert not report.check(readme, tmp_path)
    assert "stale: train.png; run" in capsys.readouterr().out
    (tmp_path / "train.png").unlink()
    (tmp_path / "report.md").write_text("old\n")
    assert not report.check(readme, tmp_path)
    assert capsys.readouterr().out.endswith("stale: report.md; run python -m bench report --readme\n")


@pytest.mark.parametrize("text", ["<!-- bench:hsot -->\n<!-- /bench:hsot -->", "<!-- bench:host -->\n"])
def test_a_broken_block_is_an_error(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="block"):
        report.filled(text, tmp_path)


def test_floors_know_what_holds() -> None:
    def unused(*_: object) -> Measured:
        raise AssertionError

    price, gain = at_most("here", "time", 1.0, unused), at_least("here", "speed", 10.0, unused)
    assert price.passed(Measured(1.0))
    assert not price.passed(Measured(1.05))
    assert price.narrow(Measured(1.05))
    assert not price.narrow(Measured(2.0))
    assert gain.passed(Measured(11.0))
    assert gain.narrow(Measured(9.5))
    assert not gain.narrow(Measured(5.0))
    assert price.passed(Measured(1.05, allowance=0.1))
    assert price.passed(Measured(5.0, limit=6.0))


def test_gpu_check_keeps_what_its_steps_said(tmp_path: Path) -> None:
    """A step that passes, one that fails, one that is stopped with all that it started, and one for which no time is
    left."""
    check = gpu_check.Check(tmp_path, time.monotonic() + 60)
    talk = "import subprocess, sys, time; print('said'); subprocess.Popen([sys.executable, '-c', 'import time; {}'])"
    assert check.run("passes", [sys.executable, "-c", "print('fine')"], 20).status == "pass"
    assert check.run("fails", [sys.executable, "-c", "print('not'); raise SystemExit(3)"], 20).status == "FAIL"
    start = time.monotonic()
    stopped = check.run("stops", [sys.executable, "-c", talk.format("time.sleep(50)") + "; time.sleep(50)"], 6)
    assert (stopped.status, stopped.text.splitlines()[0]) == ("stopped", "said") and not stopped.good
    assert time.monotonic() - start < 20, "what the command had started ran on"
    stopped.may_stop = True
    assert stopped.good
    check.deadline = time.monotonic()
    assert check.run("late", [sys.executable, "-c", ""], 20).status == "skipped"
    log = (tmp_path / "log.txt").read_text()
    assert all(word in log for word in ("fine", "not", "said", "no time left"))


# ---- the front page --------------------------------------------------------------------------------------------------


def test_the_front_page_is_short() -> None:
    lines = report.README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 110
    code = [number for number, line in enumerate(lines, 1) if line.startswith("```")]
    assert code[0] < 25
    heads = ("| ---", "| parameters", "| zeros of")
    table_rows = [line for line in lines if line.startswith("| ") and not line.startswith(heads)]
    speed = [line for line in table_rows if "`RVSM" in line]
    assert 4 <= len(speed) <= len(tables._HEADLINES)
    assert len(table_rows) - len(speed) <= 6  # of accuracy
    pictures = [line for line in lines if line.startswith("![")]
    assert len(pictures) == 1 and "(bench/results/speedup.png)" in pictures[0]


def test_links_of_the_pages_lead_somewhere() -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "bench" / "README.md"]
    for page in [*pages, RESULTS / report.REPORT]:
        text = re.sub(r"```.*?```|<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        links = re.findall(r"\]\((?!https?://|#)([^)#]+)", text)
        assert [link for link in links if not (page.parent / link).exists()] == [], page.name


def test_the_picture_fits_the_page() -> None:
    """Twice the pixels of a README's 830, so that a letter of 8.5 points is 12 pixels high there."""
    width, height = struct.unpack(">II", (RESULTS / "speedup.png").read_bytes()[16:24])
    assert width == 2 * 830
    assert height < width


def _as_seen(colour: str, blindness: tuple[tuple[float, ...], ...]) -> tuple[float, ...]:
    """A colour in CIE Lab, as a colour-blind reader sees it."""
    srgb = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in srgb]
    seen = [min(max(sum(m * c for m, c in zip(row, linear, strict=True)), 0.0), 1.0) for row in blindness]
    to_xyz = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
    white = (0.9505, 1.0, 1.089)
    xyz = [sum(m * c for m, c in zip(row, seen, strict=True)) / w for row, w in zip(to_xyz, white, strict=True)]
    x, y, z = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in xyz)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


@pytest.mark.parametrize(
    "blindness",
    [
        # Machado, Oliveira and Fernandes 2009, severity 1: protanopia, deuteranopia, tritanopia.
        ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
        ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
        ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
    ],
    ids=["protanopia", "deuteranopia", "tritanopia"],
)
def test_colour_blind_readers_tell_the_bars_apart(blindness: tuple[tuple[float, ...], ...]) -> None:
    """A difference of 2 in CIE Lab can just be seen side by side; a legend needs several times that."""
    plots = pytest.importorskip("bench.plots")
    seen = {name: _as_seen(colour, blindness) for name, colour in plots.COLOURS.items()}
    distances = {
        (a, b): sum((x - y) ** 2 for x, y in zip(seen[a], seen[b], strict=True)) ** 0.5
        for a, b in itertools.combinations(seen, 2)
    }
    nearest = min(distances, key=distances.__getitem__)
    assert distances[nearest] > 10, (nearest, distances[nearest])


def _throughput_row(case: Case, seconds: float) -> results.Row:
    contender = {"median_s": seconds, "gb_per_s": 1.0, "share_of_copy": 0.5, "over_reference": 0.1}
    return {
        "case": case.name,
        "shape": case.shape,
        "tensors": len(case.specs),
        "elements": case.elements,
        "penalty": case.penalty,
        "group_dim": case.group_dim,
        "method": case.method,
        "base": case.base,
        "dtype": case.dtype,
        "contenders": {"native": contender, "reference": {**contender, "over_reference": 1.0}},
        "time_over": {"native": {"reference": {"median": 0.1}}},
        "not_measured": {},
    }


def test_the_front_page_shows_the_plain_method(tmp_path: Path) -> None:
    """ADMM on the same tensors is another case: it does not take the place of RVSM in the short tables."""
    rows = [_throughput_row(Case("GPT-2 small"), 0.001), _throughput_row(Case("GPT-2 small", method="admm"), 0.002)]
    results.write_json(tmp_path / "throughput.json", _result(rows))
    for block in ("headline", "overview"):
        text = report.render(tmp_path, block)
        assert "| 1 ms |" in text and "| 2 ms |" not in text


def test_the_tables_keep_the_bases_apart(tmp_path: Path) -> None:
    """A case over AdamW stands beside the same case over SGD, against its own dense step and in its own table."""
    rows = [_throughput_row(Case("GPT-2 small", base=base), 1e-3 * i) for i, base in enumerate(cases.BASES, 1)]
    for row, dense, over in zip(
        rows, ("fused_sgd", "fused_adamw", "fused_adamw", "scaled"), (0.5, 0.6, 0.7, 0.8), strict=True
    ):
        row["time_over"]["native"][dense] = {"median": over}
    del rows[0]["base"]  # as in a result of 0.1.0
    results.write_json(tmp_path / "throughput.json", _result(rows))
    headline = report.render(tmp_path, "headline").splitlines()[2:4]
    assert "| `RVSM` | l0 | elements | 1 ms | 10× | 0.50 |" in headline[0]
    assert "| `RVSMAdamW` | l0 | elements | 2 ms | 10× | 0.60 |" in headline[1]
    whole = report.render(tmp_path, "throughput")
    headers = [line for line in whole.splitlines() if line.startswith("| case")]
    dense = ["SGD(fused=True)", "AdamW(fused=True)", "AdamW(fused=True)", "`w.mul_(c)`"]
    assert len(headers) == 4 and all(words in header for words, header in zip(dense, headers, strict=True))
    assert whole.count("\n| GPT-2 small") == 4, "a case stands in one table"
    assert "DeepSpeed" not in whole, "a baseline that was measured nowhere has a column"
    plots = pytest.importorskip("bench.plots")
    assert [plots._tick_label(row) for row in rows[:2]] == [
        "GPT-2 small\nl0, elements",
        "GPT-2 small, AdamW\nl0, elements",
    ]
    single = [_throughput_row(Case(shape, base=base), 1e-3) for shape in ("1M", "10M") for base in ("adamw", "pull")]
    assert not plots.share_over_size(_result(single), tmp_path / "bandwidth.png"), "the picture is about SGD"


def test_a_report_needs_no_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tables are written, a picture of an earlier run is removed, and a line says what to install."""
    results.write_json(tmp_path / "throughput.json", _result([_throughput_row(Case("GPT-2 small"), 0.001)]))
    (tmp_path / "speedup.png").write_bytes(b"of an earlier run")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["report", "--from", str(tmp_path)]) == 0
    assert "the plots were not drawn, because matplotlib cannot be imported" in capsys.readouterr().out
    assert "speedup.png" not in (tmp_path / "report.md").read_text()
    assert not (tmp_path / "speedup.png").exists()


# ---- the order of a run, and how it ends -----------------------------------------------------------------------------


@pytest.mark.parametrize("task", train.TASKS.values(), ids=train.TASKS)
def test_a_quick_run_trains_each_method_once(task: training.Task) -> None:
    both = ("reference", "native")
    quick = training.runs(task, "quick", both)
    assert [(seed, engine) for seed, _, engine in quick] == [(0, "native")] * len(task.methods)
    assert len(training.runs(task, "full", both)) == 6 * len(task.methods)
    assert {engine for _, _, engine in training.runs(task, "smoke", both)} == set(both)
    assert task.methods[0].dense and not any(method.dense for method in task.methods[1:])


def test_the_tasks_come_first() -> None:
    assert cli._EVERYTHING[:2] == ("train", "text")
    assert {name: task.kind for name, task in train.TASKS.items()} == cli._TASKS
    assert {"train", "text"} <= cli._MEASURES.keys() & report._SOURCES.keys() & report._PLOTS.keys()


@pytest.mark.parametrize("task", train.TASKS.values(), ids=train.TASKS)
def test_the_recorded_command_makes_the_committed_training(task: training.Task) -> None:
    """The command beside the table asks today for the trainings that the table has."""
    result = json.loads((RESULTS / f"{task.kind}.json").read_text(encoding="utf-8"))
    arguments = cli._parser().parse_args(result["command"].split()[3:])
    assert arguments.command == "train" and train.TASKS[arguments.task] is task
    runs = training.runs(task, arguments.effort.name, training.ENGINES)
    asked = [(seed, method.name, engine) for seed, method, engine in runs]
    assert sorted(asked) == sorted((row["seed"], row["method"], row["engine"]) for row in result["rows"])


@pytest.mark.parametrize("task", train.TASKS.values(), ids=train.TASKS)
def test_the_table_of_one_seed_says_so(task: training.Task) -> None:
    result = json.loads((RESULTS / f"{task.kind}.json").read_text(encoding="utf-8"))
    whole = task.table(result)
    assert "3 seeds: mean" in whole and "over all engines and seeds" in whole and "One seed" not in whole
    result["rows"] = [row for row in result["rows"] if row["seed"] == 0 and row["engine"] == "native"]
    short = task.table(result)
    assert "\n1 seed. " in short and "*One seed: " in short and "over all engines" not in short
    assert f"train{'' if task.kind == 'train' else f' --task {task.kind}'} --full`" in short


def _floor_row(measure: str, passed: bool | None) -> results.Row:
    return {
        "where": "here",
        "measure": measure,
        "at_least": False,
        "limit": 1.0,
        "unit": "x",
        "value": None if passed is None else 2.0,
        "passed": passed,
        "note": "",
        "first_value": None,
    }


@pytest.fixture
def quick_measures(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Measures that take no time: two of three floors fall short or cannot be measured, and no data set is there."""
    called: list[str] = []

    def floors(config: Config) -> bool:
        called.append("floors")
        rows = [_floor_row("a", True), _floor_row("b", False), _floor_row("c", None)]
        results.write_json(config.out / "floors.json", {**_result(rows), "effort": "quick"})
        return False

    def no_data(config: Config) -> None:
        called.append("train")
        raise MissingPackage("scikit-learn cannot be imported: `pip install scikit-learn` installs it")

    measures = {name: lambda config, name=name: called.append(name) for name in cli._MEASURES}
    monkeypatch.setattr(cli, "_MEASURES", {**measures, "floors": floors, "train": no_data})
    return called


def test_a_run_that_ends_is_no_failure(
    quick_measures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only ``floors`` judges by its exit status; a missing package is said in the last lines."""
    common = ["--out", str(tmp_path), "--device", "cpu", "--engines", "reference"]
    assert cli.main(common) == 0
    assert quick_measures == list(cli._EVERYTHING)
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "floors: 1 of 3 hold here; missed: here: b; not measured: here: c",
        "train: not measured, because scikit-learn cannot be imported: `pip install scikit-learn` installs it",
    ]
    (tmp_path / "train.json").write_text("{")  # of an earlier run
    assert cli.main(common) == 1
    assert "there is no report: " in capsys.readouterr().err
    assert cli.main(["floors", *common]) == 1
    assert cli.main(["train", *common]) == 1
    assert "python -m bench train: not measured, because scikit-learn" in capsys.readouterr().err


# ---- mistakes of the user: a sentence, an exit status, no traceback --------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--engines cuda", "'cuda' is no engine; the engines are native, triton, reference"),
        ("throughput --engines native,,triton", "'' is no engine; the engines are native, triton, reference"),
        ("--engines=", "'' is no engine"),
        ("--out=", "the name of a folder is needed"),
        ("--out {file}", "is a file; a folder is needed"),
        ("--out {file}/below", "cannot be written"),
        ("--threads 0", "'0' is not a number of threads"),
        ("--threads -1", "'-1' is not a number of threads"),
        ("--threads 1000000", "'1000000' is not a number of threads"),
        ("--threads two", "'two' is not a number of threads"),
        ("repot", "invalid choice: 'repot'"),
        ("report --from {missing}", "no results in"),
        ("report --from {file}", "no results in"),
        ("report --from {corrupt}", "host.json is not valid JSON"),
        ("report --from {binary}", "host.json is not valid JSON"),
        ("report --from {list}", "host.json holds no result"),
        ("report --from {empty}", "host.json is no result of python -m bench host (KeyError: 'rows')"),
        ("report --check --from {missing}", "leave --from and --out out"),
        ("report --check --readme", "not allowed with"),
    ],
)
def test_mistakes_end_in_a_sentence(
    arguments: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {name: tmp_path / name for name in ("file", "missing", "corrupt", "binary", "list", "empty")}
    places["file"].write_text("")
    for name, content in (("corrupt", b'{"rows": ['), ("binary", b"\xff\xfe"), ("list", b"[]"), ("empty", b"{}")):
        places[name].mkdir()
        (places[name] / "host.json").write_bytes(content)
    try:
        status = cli.main([word.format(**places) for word in arguments.split()])
    except SystemExit as end:  # argparse's own way
        status = end.code
    assert status not in (0, None)
    said = capsys.readouterr()
    assert words in said.err
    assert "Traceback" not in said.err


def test_cuda_without_a_gpu_is_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["--device", "cuda", "--engines", "reference"]) == 2
    assert "sees no GPU here" in capsys.readouterr().err


def test_a_build_without_engines_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after ``pip install`` in a clone: the clone's unbuilt folder is what Python imports."""
    monkeypatch.setattr(cli, "available_engines", lambda device: ())
    assert cli.main(["--device", "cpu"]) == 2
    assert "Run `make bench` in the clone" in capsys.readouterr().err


def _without(module: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``python -m bench`` where a module is not installed; Python looks into the folder first."""
    (folder / "bench").symlink_to(ROOT / "bench")
    text = f"raise ModuleNotFoundError({f'No module named {module!r}'!r}, name={module!r})\n"
    (folder / f"{module}.py").write_text(text)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "bench", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("module", ["torch", "tqdm", pytest.param("rvsm_kernels", marks=pytest.mark.slow)])
def test_a_missing_package_is_a_sentence(module: str, tmp_path: Path) -> None:
    done = _without(module, tmp_path)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert f"{module} is not installed" in done.stderr and "make bench" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("module", "name"), [("sklearn", "scikit-learn"), ("numpy", "numpy")])
def test_training_without_its_data_set_is_a_sentence(module: str, name: str, tmp_path: Path) -> None:
    options = ("--smoke", "--out", str(tmp_path / "out"), "--device", "cpu", "--engines", "reference")
    done = _without(module, tmp_path, "train", *options)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert f"python -m bench train: not measured, because {name} cannot be imported" in done.stderr
