"""The committed runs of the deep experiments: the README's tables, the recorded commands, the comparison."""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import robust
import runs
import runs_sets
from bench.report import fill
from deep import cli, files, models, plots, recipes
from deep.settings import Settings

SETS = sorted(runs.SETS)


def rows(name: str) -> list[dict[str, Any]]:
    """The rows of a committed set."""
    return json.loads((runs.RESULTS / f"{name}.json").read_text())["rows"]


def test_the_readme_says_what_the_results_say() -> None:
    text = runs.README.read_text(encoding="utf-8")
    assert all(f"<!-- runs:{name} -->" in text for name in [*SETS, "time"])
    assert fill(text, "runs", runs.content) == text, "run python examples/runs.py --readme"


@pytest.mark.parametrize("name", SETS)
def test_committed_results_are_those_of_the_runs(name: str) -> None:
    """Every run of a set is there once, under the command that the code gives now."""
    expected = [(run.label, run.settings.seed, run.command) for run in runs.seeded(name, smoke=False)]
    found = [(row["label"], row["seed"], row["command"]) for row in rows(name)]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("name", SETS)
def test_recorded_commands_parse_to_the_settings(name: str) -> None:
    for run in runs.seeded(name, smoke=False):
        is_robust = isinstance(run.settings, robust.RobustSettings)
        words = shlex.split(run.command)
        assert words[1] == f"examples/{'robust' if is_robust else 'train'}.py"
        kind = robust.RobustSettings if is_robust else Settings
        assert cli.arguments(words[2:], "", kind, {}, is_robust)[0] == run.settings


def test_no_path_of_a_machine_is_in_the_results() -> None:
    for path in runs.RESULTS.glob("*.json"):
        text = path.read_text()
        assert str(Path.home()) not in text and "/tmp" not in text, path.name


def test_every_set_has_what_its_table_needs() -> None:
    for name in SETS:
        labels = runs.by_label({"rows": rows(name)})
        assert list(labels) == list(dict.fromkeys(run.label for run in runs.SETS[name]()))
        assert {len(tests) for tests in labels.values()} == {runs_sets.SEEDS[name]}


def test_the_comparison_sees_a_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed = rows("b")[0]
    (tmp_path / "b.json").write_text(json.dumps({"rows": [committed]}))
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    for change, good in ((0.0, True), (0.019, True), (0.03, False)):
        test = {**committed["test"], "accuracy_u": committed["test"]["accuracy_u"] - change}
        monkeypatch.setattr(runs, "trained", lambda run, out, test=test: {"test": test})
        assert runs.check_set("b") == good
    assert not runs.check_set("a"), "nothing to compare is no success"


def test_a_damaged_result_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"rows": [')
    with pytest.raises(files.FileError, match="could not be read as JSON") as caught:
        files.read_json(path)
    assert "\n" not in str(caught.value)
    assert files.read_json(tmp_path / "none.json") is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["g"], "no set g; there are a, b, c, d, e, f, time"),
        (["time", "--rounds", "0"], "--rounds: a median needs at least 1 epoch"),
        (["time", "--rounds", "x"], "--rounds"),
        (["time", "--check"], "nothing to compare in time"),
    ],
)
def test_command_lines_that_cannot_be(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        runs.main(words)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def _cost(row: dict[str, Any], dense: float) -> str:
    return f"{100 * (dense - row['test']['accuracy_u']):.1f}".removesuffix(".0")


def test_the_readme_says_what_channels_cost() -> None:
    """The sentence under the table of (a), from its rows: points below the median of the dense nets."""
    dense = statistics.median(row["test"]["accuracy_u"] for row in rows("a") if row["label"] == "dense")
    by_count: dict[int, list[dict[str, Any]]] = {}
    for row in rows("a"):
        by_count.setdefault(round(7 * row["test"]["u"]["zero_channels"]), []).append(row)
    four = sorted(by_count[4], key=lambda row: -row["test"]["accuracy_u"])
    assert [row["label"].partition("λ")[2] for row in four] == [" = 0.2", " = 0.5", " = 0.2"]
    (three,) = [row for row in by_count[3] if row["label"].endswith("λ = 0.2")]
    text = " ".join(runs.README.read_text(encoding="utf-8").split())
    first, second, third = (_cost(row, dense) for row in four)
    assert f"Four cost {first}, {second} and {third} points in the three runs that lost four" in text
    assert f"The third seed of λ = 0.2 lost three and {_cost(three, dense)} points" in text


def test_the_printed_lambda_leaves_no_channel() -> None:
    """What the note of the recipe says, in the committed runs of (e)."""
    printed = [row["test"] for row in rows("e") if "as printed" in row["label"]]
    assert [(test["u"]["zero_channels"], test["accuracy_u"]) for test in printed] == [(1.0, 0.1)] * runs_sets.SEEDS["e"]
    note = recipes.recipes(False)["table4.1/gl"].note
    assert "in each of three seeds" in note and "accuracy of 10 %" in note


def test_the_sweep_compares_nets_of_one_size() -> None:
    """As in the paper: two nets against one of about their size, five seeds, the printed lambda_1 among the values."""
    nets = {run.settings.model: run.settings for run in runs.SETS["f"]()}
    two, one = (models.build(name, 1, size=14, width=nets[name].width) for name in ("en2resnet8", "resnet14"))
    two_size, one_size = (sum(p.numel() for p in net.parameters()) for net in (two, one))
    assert (two_size, one_size) == (39_428, 44_130)
    printed = {row.settings.get("lam", 0.0) for row in recipes.TABLES["table4.6"].values()}
    assert printed <= set(runs_sets.SWEPT) and runs_sets.SEEDS["f"] == 5
    for run in runs.SETS["f"]():
        pruned = run.settings.method == "rgsm"
        assert ("dense" in run.label) != pruned
        if pruned:
            row = recipes.TABLES["table4.6"]["resnet38-0.05"].settings
            same = ("method", "penalty", "beta", "group_lasso")
            assert {name: getattr(run.settings, name) for name in same} == {name: row[name] for name in same}


def test_the_sweep_is_drawn_from_its_rows(tmp_path: Path) -> None:
    tests = {}
    for k, run in enumerate(runs.seeded("f", smoke=False)):
        robust_u = {"natural": 0.9, "FGSM": 0.8, "IFGSM^20": 0.7 + k / 1000}
        tests[run.label, run.settings.seed] = {"u": {"zero_channels": k / 100}, "robust_u": robust_u}
    found = [{"label": label, "seed": seed, "test": test} for (label, seed), test in tests.items()]
    panels = runs.swept({"rows": found})
    assert list(panels) == list(runs.SWEPT_PANELS)
    for net in runs_sets.SWEPT_NETS.values():
        for lam in runs_sets.SWEPT:
            label = f"{net}, λ₁ = {lam:g}" if lam else f"{net}, dense"
            five = [tests[label, seed] for seed in range(5)]
            assert panels["zero channels of u"][net][lam] == [test["u"]["zero_channels"] for test in five]
            assert panels["under IFGSM²⁰ (A3)"][net][lam] == [test["robust_u"]["IFGSM^20"] for test in five]
    plots.sweep(tmp_path / "f.png", panels, "λ₁")
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def test_zero_channels_by_kernel() -> None:
    """Shortcuts and 3 x 3 convolutions together give the share of all; linear layers have no part in it."""
    for row in rows("f"):
        of = {kernel: runs.zero_channels_of(row["test"], kernel) for kernel in (1, 3)}
        layers = [layer for layer in row["test"]["u"]["layers"] if len(layer["shape"]) == 4]
        counts = {k: sum(layer["channels"] for layer in layers if layer["shape"][2] == k) for k in of}
        both = sum(of[k] * counts[k] for k in of) / sum(counts.values())
        assert both == pytest.approx(row["test"]["u"]["zero_channels"], abs=1e-12)


def test_the_readme_says_which_net_is_sparser() -> None:
    """The order of the nets under the table of (f), from its rows, and the numbers of its sentences."""
    tests = runs.by_label({"rows": rows("f")})

    def of(net: str, lam: float, get: Callable[[dict[str, Any]], float]) -> list[float]:
        return [100 * get(test) for test in tests[f"{net}, λ₁ = {lam:g}" if lam else f"{net}, dense"]]

    text = " ".join(runs.README.read_text(encoding="utf-8").split())
    pairs = {}
    for lam in runs_sets.SWEPT[1:]:
        two, one = (of(net, lam, lambda t: t["u"]["zero_channels"]) for net in runs_sets.SWEPT_NETS.values())
        assert (min(two) > max(one)) == (lam < 0.1) and (statistics.fmean(two) > statistics.fmean(one)) == (lam < 0.1)
        pairs[lam] = f"{statistics.fmean(two):.1f} against {statistics.fmean(one):.1f} %"
        two, one = (of(net, lam, lambda t: runs.zero_channels_of(t, 3)) for net in runs_sets.SWEPT_NETS.values())
        assert lam < 0.07 or statistics.fmean(two) < statistics.fmean(one)
    assert f"{pairs[0.05]}, {pairs[0.07]}" in text and f"{pairs[0.1]} and {pairs[0.15]}" in text

    keys = ("natural", "FGSM", "IFGSM^20")
    mean = {
        (net, lam, key): statistics.fmean(of(net, lam, lambda t, key=key: t["robust_u"][key]))
        for net in runs_sets.SWEPT_NETS.values()
        for lam in runs_sets.SWEPT
        for key in keys
    }
    two, one = runs_sets.SWEPT_NETS.values()
    below = max(mean[net, 0.0, key] - mean[net, 0.05, key] for net in (two, one) for key in keys)
    assert f"no mean is more than {below:.1f} points below" in text
    costs = " and ".join(f"{mean[net, 0.0, 'natural'] - mean[net, 0.1, 'natural']:.1f}" for net in (two, one))
    assert f"At 0.1 A1 costs {costs} points" in text
    ahead = {(lam, key): mean[two, lam, key] - mean[one, lam, key] for lam in runs_sets.SWEPT for key in keys}
    assert all(abs(ahead[lam, key]) < 1 for lam in (0.0, 0.05, 0.07) for key in keys)
    assert all(-2 < ahead[0.1, key] < 0 and ahead[0.15, key] < -5 for key in keys[1:])
