"""``make gpu-check``: everything that only a GPU can tell, in one run with a deadline, and one page about it.

Builds in place for this GPU, runs the suite on CUDA, the kernels under compute-sanitizer, the floors and the
throughput. Needs no network. The folder (``OUT=``) gets summary.md, log.txt, gpu_check.json, and the JSON of the bench.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "gpu"
LEAST_S = 5.0
"""A step is not begun with less time than this."""


@dataclass
class Step:
    """One command of the check.

    Attributes:
        status: "pass", "FAIL", "stopped" (at its time limit; what it wrote is kept) or "skipped".
        may_stop: a measure that is welcome to use all the time there is.
        text: what it printed.
    """

    name: str
    status: str = "skipped"
    seconds: float = 0.0
    text: str = ""
    note: str = ""
    may_stop: bool = False

    @property
    def good(self) -> bool:
        """Whether nothing is wrong, as far as the step got."""
        return self.status in ("pass", "skipped") or (self.may_stop and self.status == "stopped")


@dataclass
class Check:
    """The steps so far, their log, and the time that is left."""

    out: Path
    deadline: float
    steps: list[Step] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, name: str, command: Sequence[str], limit_s: float, env: Mapping[str, str] | None = None) -> Step:
        """Run a command, at most as long as its limit and the deadline allow; its output goes to the log."""
        step = Step(name)
        limit = min(limit_s, self.deadline - time.monotonic())
        start = time.monotonic()
        if limit < LEAST_S:
            step.note = "no time left"
            return self._add(step)
        # Unbuffered: what a stopped command has said so far is kept.
        whole = {**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})}
        try:
            child = subprocess.Popen(
                command,
                cwd=ROOT,
                env=whole,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # so that its own children can be stopped with it
            )
        except OSError as error:
            step.status, step.note = "FAIL", str(error)
            return self._add(step)
        try:
            step.text, _ = child.communicate(timeout=limit)
            step.status = "pass" if child.returncode == 0 else "FAIL"
        except subprocess.TimeoutExpired:
            step.text = stop(child)
            step.status, step.note = "stopped", f"at its limit of {limit:.0f} s"
        except BaseException:
            stop(child)
            raise
        step.seconds = time.monotonic() - start
        return self._add(step)

    def skip(self, name: str, why: str) -> Step:
        """Note a step that cannot be done here."""
        return self._add(Step(name, note=why))

    def _add(self, step: Step) -> Step:
        with self.lock:
            self.steps.append(step)
            with (self.out / "log.txt").open("a", encoding="utf-8") as log:
                log.write(f"==== {step.name}: {step.status} {step.note} ({step.seconds:.1f} s)\n{step.text}\n")
        print(f"{step.status:>8}  {step.name} ({step.seconds:.0f} s) {step.note}", flush=True)
        return step


def stop(child: subprocess.Popen[str]) -> str:
    """End a command and all that it started, kindly at first; returns what it printed."""
    for kind, patience_s in ((signal.SIGINT, 10.0), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, kind)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.communicate(timeout=patience_s)[0]
    raise AssertionError("a killed process does not end")


def build(check: Check) -> bool:
    """CMake in place, for this GPU's architecture unless the environment names others."""
    major, minor = torch.cuda.get_device_capability()
    env = {"RVSM_CUDA": "1", "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}+PTX")}
    configure = [
        *("cmake", "-S", ".", "-B", str(BUILD), f"-DPython3_EXECUTABLE={sys.executable}"),
        *(["-G", "Ninja"] if shutil.which("ninja") else []),
        *("-DRVSM_TESTS=ON", "-DRVSM_DEVICE_TEST=ON", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={ROOT / 'rvsm_kernels'}"),
    ]
    if check.run("configure", configure, 60, env).status != "pass":
        return False
    return check.run("build", ["cmake", "--build", str(BUILD), "--parallel"], 200, env).status == "pass"


def python_tests(check: Check) -> None:
    """The whole suite on CUDA tensors, divided among processes where pytest-xdist is there."""
    env = {"RVSM_TEST_DEVICE": "cuda", "RVSM_REQUIRE_NATIVE": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    workers = min(8, os.cpu_count() or 1)
    several = ["-n", str(workers)] if importlib.util.find_spec("xdist") is not None else []
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short"]
    check.run("tests of what only a GPU shows", [*pytest, "python_tests/engines/test_cuda.py"], 90, env)
    rest = ["python_tests", "--deselect", "python_tests/engines/test_cuda.py", "--maxfail=40"]
    check.run("the suite on CUDA", [*pytest, *several, *rest], 240, env)


def device_tests(check: Check) -> None:
    """The C++ tests, and the one on the device under compute-sanitizer."""
    check.run("C++ tests", ["ctest", "--test-dir", str(BUILD), "--output-on-failure"], 60)
    device = str(BUILD / "test_cuda_device")
    check.run("kernels against the CPU engine", [device, "729"], 60)
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = os.pathsep.join(str(Path(home) / "bin") for home in homes if home)
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=folders)
    for tool in ("memcheck", "racecheck", "initcheck"):
        if sanitizer is None:
            check.skip(tool, "compute-sanitizer is not installed")
            continue
        step = check.run(tool, [sanitizer, "--tool", tool, "--error-exitcode", "9", device, "27"], 60)
        if "Device not supported" in step.text:  # a virtual machine that hides the device's debugging interface
            step.status, step.note = "skipped", "compute-sanitizer does not support this device here"


def triton_static(check: Check) -> None:
    """What Triton's compiler makes of every kernel for this GPU."""
    if importlib.util.find_spec("triton") is None:
        check.skip("static of triton", "Triton is not installed")
        return
    major, minor = torch.cuda.get_device_capability()
    to = str(check.out / "static_triton.json")
    command = [sys.executable, "-m", "bench.static_triton", f"cuda:{major}{minor}", "--json", to]
    check.run("static of triton", command, 60)


def summary(check: Check) -> str:
    """The page."""
    properties = torch.cuda.get_device_properties(0)
    lines = [
        f"# gpu-check: {properties.name}",
        "",
        f"torch {torch.__version__}, CUDA {torch.version.cuda}, capability {properties.major}.{properties.minor},"
        f" {properties.total_memory / 2**30:.0f} GiB",
        "",
        "| step | | seconds | |",
        "|---|---|---:|---|",
    ]
    for step in check.steps:
        note = step.note or last_line(step.text)
        lines.append(f"| {step.name} | {step.status} | {step.seconds:.0f} | {note[:100].replace('|', '/')} |")
    for step in check.steps:
        failed = [line for line in step.text.splitlines() if line.startswith(("FAILED", "ERROR "))]
        if failed:
            lines += ["", f"{step.name}:", "", *(f"    {line[:150]}" for line in failed[:15])]
    measured = [line for step in check.steps if step.name in ("floors", "throughput") for line in results_of(step.text)]
    return "\n".join([*lines, "", "```", *measured, "```", ""])


def results_of(text: str) -> list[str]:
    """The lines of floors and throughput that hold a result."""
    return [line for line in text.splitlines() if re.match(r"\s*(pass|FAIL|----) |.* us .*GB/s|floors:", line)]


def last_line(text: str) -> str:
    """The last line that says something."""
    said = [line.strip(" =") for line in text.splitlines() if line.strip(" =-")]
    return said[-1] if said else ""


def bench(check: Check) -> None:
    """Floors and throughput on an idle machine: nothing else runs now."""
    common = [sys.executable, "-m", "bench"]
    options = ["--device", "cuda", "--out", str(check.out), "--quick"]
    check.run("floors", [*common, "floors", *options], 180)
    check.run("host", [*common, "host", *options], 40).may_stop = True
    check.run("throughput", [*common, "throughput", *options], 300).may_stop = True


def main(argv: Sequence[str] | None = None) -> int:
    """Run the check; 0 if every step that could be done passed."""
    parser = argparse.ArgumentParser(prog="make gpu-check", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check", help="folder of the results")
    parser.add_argument("--minutes", type=float, default=8.0, help="stop after so many (8)")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(f"gpu-check: torch {torch.__version__} sees no GPU here", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "log.txt").unlink(missing_ok=True)
    # Some seconds are kept for the page.
    check = Check(arguments.out.resolve(), time.monotonic() + 60 * arguments.minutes - 3)
    try:
        if build(check):
            check.run("engines", [sys.executable, "-m", "rvsm_kernels"], 60)
            with concurrent.futures.ThreadPoolExecutor(2) as pool:  # neither of them measures time
                for done in [pool.submit(python_tests, check), pool.submit(device_tests, check)]:
                    done.result()
            static = [sys.executable, "-m", "bench", "static", "--device", "cuda", "--out", str(check.out)]
            check.run("static", static, 30)
            triton_static(check)
            bench(check)
    finally:  # also after Ctrl-C: what was found is written
        page = summary(check)
        (arguments.out / "summary.md").write_text(page, encoding="utf-8")
        found: list[dict[str, Any]] = [
            {"step": s.name, "status": s.status, "seconds": s.seconds, "note": s.note or last_line(s.text)}
            for s in check.steps
        ]
        (arguments.out / "gpu_check.json").write_text(json.dumps({"steps": found}, indent=1) + "\n", encoding="utf-8")
    print(f"\n{page}")
    return 0 if all(step.good for step in check.steps) else 1


if __name__ == "__main__":
    sys.exit(main())
