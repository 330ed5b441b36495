"""The command line of ``python -m bench``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import floors, host, memory, report, static, throughput
from .baselines import ENGINES
from .config import FULL, QUICK, RESULTS, SMOKE, Config, available_engines, missing_engines
from .results import environment, write_json

_MEASURES = {
    "throughput": throughput.run,
    "host": host.run,
    "memory": memory.run,
    "floors": floors.run,
    "static": static.run,
}
_COMMANDS = {
    "throughput": "time, GB/s and share of the copy bandwidth of a step, against every baseline",
    "host": "microseconds of step() by number of parameters",
    "memory": "peak bytes beyond torch.optim.SGD's",
    "floors": "measured against floor; exits 1 if one falls short",
    "static": "registers, spills and widths of access of every CUDA kernel; needs no GPU",
    "train": "training a small model with each penalty",
    "report": "Markdown tables and plots from the JSON",
}


def _parser() -> argparse.ArgumentParser:
    # SUPPRESS: an option may stand before or after the command, and neither place overwrites the other.
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    effort = common.add_mutually_exclusive_group()
    effort.add_argument("--quick", dest="effort", action="store_const", const=QUICK, help="minutes (the default)")
    effort.add_argument("--full", dest="effort", action="store_const", const=FULL, help="every case; an hour or more")
    effort.add_argument("--smoke", dest="effort", action="store_const", const=SMOKE, help="seconds; shows that it runs")
    common.add_argument("--out", type=Path, metavar="DIR", help="results (default bench/results/local)")
    common.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    common.add_argument("--engines", metavar="A,B", help="default: every compiled engine of this build")
    common.add_argument("--threads", type=int, metavar="N", help="threads of torch (default: torch's own)")

    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure rvsm_kernels on this machine. Without a command: everything, then the report.",
        parents=[common],
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, text in _COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text, parents=[common])
        if name == "report":
            sub.add_argument("--from", dest="source", type=Path, metavar="DIR", help="results (default: as --out)")
            sub.add_argument("--readme", action="store_true", help="fill README.md's blocks from bench/results")
            sub.add_argument("--check", action="store_true", help="exit 1 if README.md is not what bench/results gives")
    return parser


def _engines(wanted: str | None, device: str) -> tuple[str, ...]:
    """The engines under test.

    Raises:
        ValueError: an unknown engine.
        RuntimeError: an engine that is not here; no compiled engine at all, and none asked for.
    """
    if wanted is not None:
        names = tuple(name.strip() for name in wanted.split(","))
        unknown = set(names) - {*ENGINES, "reference"}
        if unknown:
            raise ValueError(f"unknown engine {', '.join(sorted(unknown))}")
        if not set(names) <= {*available_engines(device), "reference"}:
            raise RuntimeError(f"not every one of {wanted} is available for {device} ({missing_engines(device)})")
        return names
    names = available_engines(device)
    if not names:
        raise RuntimeError(f"no compiled engine for {device} to measure ({missing_engines(device)})")
    return names


def _config(arguments: argparse.Namespace) -> Config:
    given = vars(arguments)
    device = given.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    if "threads" in given:
        torch.set_num_threads(arguments.threads)
    effort = given.get("effort", QUICK)
    words = ["python -m bench", arguments.command or "", f"--{effort.name}", f"--device {device}"]
    words += [f"--engines {arguments.engines}"] if "engines" in given else []
    words += [f"--threads {arguments.threads}"] if "threads" in given else []
    return Config(
        out=given.get("out", RESULTS / "local"),
        device=device,
        engines=_engines(given.get("engines"), device),
        effort=effort,
        command=" ".join(word for word in words if word),
    )


def _measure(command: str, config: Config) -> bool:
    """Run one command; returns whether it passed."""
    if command == "train":
        try:
            from . import train  # it needs a data set's package that the other measures do not
        except ImportError as error:
            print(f"train: not measured ({error}; the bench extra has what it needs)", file=sys.stderr)
            return False
        result = train.main(config.out, config.effort is SMOKE)
        write_json(config.out / "train.json", {**environment(config.device, config.command), **result})
        return True
    return _MEASURES[command](config) is not False


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = _parser().parse_args(argv)
    if arguments.command == "report":
        folder = arguments.source if arguments.source is not None else vars(arguments).get("out", RESULTS / "local")
        try:
            return 0 if report.run(folder, arguments.readme, arguments.check) else 1
        except (OSError, ValueError) as error:
            print(f"python -m bench report: {error}", file=sys.stderr)
            return 1
    try:
        config = _config(arguments)
    except (RuntimeError, ValueError) as error:
        print(f"python -m bench: {error}", file=sys.stderr)
        return 2
    wanted = (
        [arguments.command] if arguments.command else [name for name in _COMMANDS if name not in ("static", "report")]
    )
    try:
        passed = [_measure(command, config) for command in wanted]
    except KeyboardInterrupt:
        print(f"\ninterrupted; what was measured is in {os.path.relpath(config.out)}", file=sys.stderr)
        return 130
    except OSError as error:  # a full disk, a folder that cannot be written
        print(f"python -m bench: {error}; what was written before is in {os.path.relpath(config.out)}", file=sys.stderr)
        return 1
    if arguments.command is None:
        report.run(config.out, readme=False, check=False)
        print((config.out / report.REPORT).read_text(encoding="utf-8"))
    return 0 if all(passed) else 1
