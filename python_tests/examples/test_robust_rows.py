"""The rows of the robust tables that only a GPU can train: each builds the net that it names and trains a step."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import robust
import robust_rows
from deep import cli, models, recipes
from deep.loop import Training

ROWS = robust_rows.chosen(robust_rows.ROWS)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_rows_are_those_that_no_set_trains() -> None:
    """EnResNet5, ResNet-38 beside En2, and the two tables without skip connections."""
    counts = {"table4.5": 3, "table4.6": 6, "table002-5": 2, "table002-6": 4}
    tables = [name.split("/")[0] for name in ROWS]
    assert {table: tables.count(table) for table in tables} == counts
    nets = {row.settings["model"] for row in ROWS.values()}
    assert nets == {"en5resnet20", "en2resnet20", "resnet38", "resnet20-noskip", "en2resnet20-noskip"}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_builds_its_net_and_trains_a_step(name: str) -> None:
    row = ROWS[name]
    settings = replace(robust_rows.tiny(row), train_images=40, validation=8)  # one batch
    training = Training(settings, cli.load(settings, None), robust.perturbation(settings))

    members, depth, noskip = re.fullmatch(r"(?:en(\d))?resnet(\d+)(-noskip)?", row.settings["model"]).groups()
    net = training.model.net
    each = [net] if members is None else list(net.members)
    assert len(each) == int(members or 1)
    for one in each:
        blocks = [module for module in one.modules() if isinstance(module, models.PreActBlock)]
        assert 2 * len(blocks) + 2 == int(depth)
        assert {block.skip for block in blocks} == {noskip is None}
        assert any(block.shortcut is not None for block in blocks) == (noskip is None)
        assert {isinstance(block.noise, models.Noise) for block in blocks} == {members is not None}
    told = ("penalty", "lam", "beta", "group_lasso", "method")
    group = training.optimizer.param_groups[0]
    if "method" in row.settings:  # rvsm and rgsm are one method of the optimizer, on elements and on groups
        wanted = {"group_lasso": 0.0, **row.settings, "method": "rvsm"}
        assert {key: group[key] for key in told} == {key: wanted[key] for key in told}
        assert (group["group_dim"] is None) == (row.settings["method"] == "rvsm")
    else:
        assert isinstance(training.optimizer, torch.optim.SGD) and not training.has_u

    before = [p.detach().clone() for p in training.model.parameters()]
    assert training.train_epoch()["loss"] < 4
    moved = [not torch.equal(p, old) for p, old in zip(training.model.parameters(), before, strict=True)]
    assert all(moved)


def test_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    robust_rows.main(["table002-6/resnet20-rg", "table4.6/resnet38-base"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| table")]
    words = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    # 563,930: the count of the paper's ResNet-38.
    assert [line[:3] for line in words] == [
        ["table4.6/resnet38-base", "resnet38", "563,930"],
        ["table002-6/resnet20-rgsm", "resnet20-noskip", "269,722"],
    ]
    assert all("FGSM" in line[4] and "C&W" in line[4] for line in words)


def test_a_row_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        robust_rows.main(["table9"])
    assert caught.value.code == 2 and "no row begins with 'table9'" in capsys.readouterr().err
    natural = next(iter(recipes.recipes(robust=False)))
    with pytest.raises(ValueError, match=natural):
        robust_rows.chosen([natural])
