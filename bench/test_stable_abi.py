"""The programs of bench.stable_abi compile, look at every tensor, and refuse those that do not fit."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

from . import stable_abi

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the libraries are compiled as on Linux"),
    pytest.mark.skipif(not all(map(shutil.which, ("g++", "gcc", "nm"))), reason="there are no compilers here"),
]


def test_the_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--parameters", "20", "--rounds", "3", "--keep", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["stable_abi", *arguments])
    stable_abi.main()
    printed = capsys.readouterr().out
    for name in ("stable op: the call with five lists", "limited API: those", "today: all five", "both: counting"):
        assert name in printed
    assert "stable_abi_lists.so: 16 functions of torch's stable C interface, 0 others of torch" in printed
    addresses, today = (
        stable_abi.load_module(tmp_path, source) for source in ("stable_abi_addresses.c", "stable_abi_today.cpp")
    )
    p = torch.nn.Parameter(torch.ones(2, 3))
    p.grad = torch.ones(2, 3)
    assert addresses.look([p, p], None) == 2 * p.grad.data_ptr()
    states = {p: {name: torch.ones(2, 3) for name in stable_abi.STATES}}
    before = p._version
    assert today.look([p], states, stable_abi.STATES) == 5 and p._version == before + 1
    with pytest.raises(ValueError, match="does not agree with its parameter"):
        addresses.look([p], [(torch.float64, p.shape, p.stride())])
    states[p]["dual"] = torch.ones(3, 2)
    with pytest.raises(ValueError, match="do not agree"):
        today.look([p], states, stable_abi.STATES)
    look = torch.ops.rvsm_stable_abi.look.default
    with pytest.raises(RuntimeError):
        look([p.detach()], [p.grad], [p.grad], [p.grad], [torch.ones(3, 2)])
