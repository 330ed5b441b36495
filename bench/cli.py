"""The command line of ``python -m bench``."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from . import accuracy, floors, host, latency, memory, report, sizes, static, throughput, train
from .baselines import ENGINES
from .config import FULL, QUICK, RESULTS, ROOT, SMOKE, Config, MissingPackage, available_engines, missing_engines, shown

_MEASURES: dict[str, Callable[[Config], object]] = {
    "train": train.digits,
    "text": train.text,
    "targets": train.targets,
    "accuracy": accuracy.run,
    "throughput": throughput.run,
    "host": host.run,
    "memory": memory.run,
    "floors": floors.run,
    "static": static.run,
    "sizes": sizes.run,
    "latency": latency.run,
}
"""Measure to function; a measure is a command, or a task of ``train``. A function that judges returns False where its
verdict is bad."""

_EVERYTHING = ("train", "text", "throughput", "host", "memory", "floors")
"""What a run without a command measures, in this order: the main job first, because its table is what most people want
to see."""

_COMMANDS = {
    "train": "training a small model dense and sparse; --full: three seeds, and the reference engine too",
    "accuracy": "magnitude pruning, PAT and RVSM at equal zeros; goes on where it stopped; --full: five seeds, an hour",
    "throughput": "time, GB/s and share of the copy bandwidth of a step, against every baseline",
    "host": "microseconds of step() by number of parameters",
    "memory": "peak bytes beyond torch.optim.SGD's",
    "floors": "measured against floor; exits 1 if one falls short",
    "static": "registers, spills and widths of access of every CUDA kernel; needs no GPU",
    "sizes": "bytes of a network on the disk, by its zeros, its channels and the form of the file",
    "latency": "time of a forward pass on the CPU, by the share of the channels that were removed; --full: minutes",
    "report": "Markdown tables and plots from the JSON",
}

_TASKS = {"digits": "train", "text": "text", "targets": "targets"}
"""A value of ``train --task`` to its measure, whose name its result file has too."""

_KNOWN_ENGINES = (*ENGINES, "reference")

_MOST_THREADS = 1024
"""More threads than any machine has; OpenMP ends the process where it cannot start a thread."""


def _threads(text: str) -> int:
    """The value of --threads."""
    if not text.isdecimal() or not 1 <= int(text) <= _MOST_THREADS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of threads between 1 and {_MOST_THREADS}")
    return int(text)


def _folder(text: str) -> Path:
    """The value of --out and --from."""
    if not text:  # Path("") is the current folder
        raise argparse.ArgumentTypeError("the name of a folder is needed")
    return Path(text)


def _parser() -> argparse.ArgumentParser:
    # SUPPRESS: an option may stand before or after the command, and neither place overwrites the other.
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    effort = common.add_mutually_exclusive_group()
    effort.add_argument("--quick", dest="effort", action="store_const", const=QUICK, help="minutes (the default)")
    effort.add_argument("--full", dest="effort", action="store_const", const=FULL, help="every case; an hour or more")
    effort.add_argument("--smoke", dest="effort", action="store_const", const=SMOKE, help="shows that it runs")
    common.add_argument("--out", type=_folder, metavar="DIR", help="results (default bench/results/local)")
    common.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    known = ", ".join(_KNOWN_ENGINES)
    common.add_argument("--engines", metavar="A,B", help=f"of {known}; default: every compiled engine of this build")
    common.add_argument("--threads", type=_threads, metavar="N", help="threads of torch (default: torch's own)")

    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure rvsm_kernels on this machine. Without a command: everything, then the report.",
        parents=[common],
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, text in _COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text, parents=[common])
        if name == "train":
            sub.add_argument("--task", choices=tuple(_TASKS), default="digits", help="default: digits")
        if name == "report":
            sub.add_argument("--from", dest="source", type=_folder, metavar="DIR", help="results (default: as --out)")
            goal = sub.add_mutually_exclusive_group()
            committed = f"{RESULTS.relative_to(ROOT)}/{report.REPORT}"
            goal.add_argument("--readme", action="store_true", help=f"write README.md's blocks, {committed}, its plots")
            goal.add_argument("--check", action="store_true", help=f"exit 1 if README.md or {committed} is stale")
    return parser


def _engines(wanted: str | None, device: str) -> tuple[str, ...]:
    """The engines under test.

    Raises:
        ValueError: an unknown engine.
        RuntimeError: an engine that is not here; no compiled engine at all, and none asked for.
    """
    if wanted is not None:
        names = tuple(dict.fromkeys(name.strip() for name in wanted.split(",")))
        unknown = [repr(name) for name in names if name not in _KNOWN_ENGINES]
        if unknown:
            known = ", ".join(_KNOWN_ENGINES)
            raise ValueError(f"--engines: {', '.join(unknown)} is no engine; the engines are {known}")
        if not set(names) <= {*available_engines(device), "reference"}:
            raise RuntimeError(f"--engines {wanted}: not available for {device} here ({missing_engines(device)})")
        return names
    names = available_engines(device)
    if not names:
        raise RuntimeError(
            f"the rvsm_kernels in {shown(ROOT)} has no compiled engine for {device}"
            f" ({missing_engines(device)}). Run `make bench` in the clone, which builds it,"
            " or choose --engines reference."
        )
    return names


def _writable(folder: Path) -> Path:
    """A folder for results, made where it does not exist.

    Raises:
        ValueError: nothing can be written there; better said now than after the first measurement.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except FileExistsError:
        raise ValueError(f"--out {folder} is a file; a folder is needed") from None
    except OSError as error:
        raise ValueError(f"--out {folder} cannot be written: {error.strerror}") from error


def _config(arguments: argparse.Namespace) -> Config:
    """What the arguments ask for.

    Raises:
        RuntimeError, ValueError: it cannot be had here; the message is a sentence for the user.
    """
    given = vars(arguments)
    if given.get("device") == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"--device cuda: torch {torch.__version__} sees no GPU here")
    device = given.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    if "threads" in given:
        torch.set_num_threads(arguments.threads)
    effort = given.get("effort", QUICK)
    words = ["python -m bench", arguments.command or ""]
    words += [f"--task {arguments.task}"] if given.get("task", "digits") != "digits" else []
    words += [f"--{effort.name}", f"--device {device}"]
    words += [f"--engines {arguments.engines}"] if "engines" in given else []
    words += [f"--threads {arguments.threads}"] if "threads" in given else []
    return Config(
        engines=_engines(given.get("engines"), device),
        out=_writable(given.get("out", RESULTS / "local")),
        device=device,
        effort=effort,
        command=" ".join(word for word in words if word),
    )


def _everything(config: Config) -> int:
    """Measure everything, print the report, and end with what was missed or missing: neither is a failure."""
    missing = []
    for command in _EVERYTHING:
        try:
            _MEASURES[command](config)
        except MissingPackage as error:
            missing.append(f"{command}: not measured, because {error}")
    try:
        text = report.write_folder(config.out)
    except ValueError as error:  # an older file in the folder is damaged, or nothing at all could be measured
        print("\n".join([f"python -m bench: there is no report: {error}", *missing]), file=sys.stderr)
        return 1
    print(f"\n{text}")
    print("\n".join([floors.standing(config.out), *missing]))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    """``python -m bench report``; returns the exit status."""
    given = vars(arguments)
    folder = arguments.source if arguments.source is not None else given.get("out")
    if arguments.check:
        if folder is not None:
            raise ValueError("--check is about the committed results; leave --from and --out out")
        return 0 if report.check() else 1
    if folder is not None or not arguments.readme:
        report.write_folder(RESULTS / "local" if folder is None else folder)
    if arguments.readme:
        report.write_committed()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = _parser().parse_args(argv)
    name = " ".join(["python -m bench", *([arguments.command] if arguments.command else [])])
    if arguments.command == "report":
        try:
            return _report(arguments)
        except (MissingPackage, OSError, ValueError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
    try:
        config = _config(arguments)
    except (RuntimeError, ValueError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    try:
        if arguments.command is None:
            return _everything(config)
        measure = _TASKS[arguments.task] if arguments.command == "train" else arguments.command
        return 1 if _MEASURES[measure](config) is False else 0
    except KeyboardInterrupt:
        print(f"\ninterrupted; what was measured is in {shown(config.out)}", file=sys.stderr)
        return 130
    except MissingPackage as error:
        print(f"{name}: not measured, because {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, a folder that cannot be written
        print(f"{name}: {error}; what was written before is in {shown(config.out)}", file=sys.stderr)
        return 1
