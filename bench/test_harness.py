"""The harness itself: cases are what they say, contenders do the same step, results and reports survive trouble."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rvsm_kernels.groups import magnitudes
from rvsm_kernels.penalties import PENALTIES

from . import baselines, cases, gpu_check, report, results, tables, timing
from .baselines import CONTENDERS, Unavailable, without_paths
from .cases import Case
from .config import SMOKE, Config, available_engines
from .floors import Measured, at_least, at_most
from .problems import BETA, CUT, A, build, strength

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
    assert PENALTIES[penalty].cut(strength(penalty) / BETA, A) == pytest.approx(CUT)
    w = build(Case("300x400", penalty, group_dim), "cpu").weights[0]
    below = (magnitudes(w, group_dim) <= CUT).double().mean()
    assert 0.35 < below < 0.65


SAME_STEP = [
    *((name, case) for name in ENGINES for case in (Case("ResNet-20"), Case("ResNet-20", "l0", 1), Case("1K", "tl1"))),
    *(("channel_loop", Case("30x40x3x3", penalty, dim)) for penalty in ("l0", "l1", "tl1") for dim in (0, 1)),
    ("compiled", Case("1K", "tl1")),
]


@pytest.mark.parametrize(("name", "case"), SAME_STEP, ids=str)
def test_contenders_do_the_step_of_the_reference(name: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """After three steps from the same weights, the same weights; else a ratio compares two different things."""
    # The benchmark's own lr would hide a wrong pull.
    monkeypatch.setattr(baselines, "LR", 0.1)
    monkeypatch.setitem(baselines.SGD_OPTIONS, "lr", 0.1)
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
    for p, q, start in zip(found, after("reference"), before, strict=True):
        assert not torch.equal(p, start)
        # Float32 sums in another order; a wrong pull would show at 1e-4.
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


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
    assert not report.check_readme(readme, tmp_path)
    assert "stale in host, headline, gpu/host" in capsys.readouterr().out
    report.write_readme(readme, tmp_path)
    text = readme.read_text()
    assert "| 1,000 | 98.7 |" in text
    assert "| 7 | 98.7 |" in text
    assert f"<!-- bench:headline -->\n{tables.NOT_MEASURED}\n<!-- /bench:headline -->" in text
    assert "commit 0123456789-dirty" in text
    assert text.startswith("Text.\n")
    assert text.endswith("\nEnd.\n")
    assert report.check_readme(readme, tmp_path)


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
