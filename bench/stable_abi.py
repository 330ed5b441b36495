"""``python -m bench.stable_abi``: what a step would cost the host through interfaces that are stable across versions.

Today's module reads tensors through torch's C++ classes and so fits one minor version of torch. This measures, for the
five tensors of each parameter (weight, gradient, three states), that way and those that would fit several versions: an
op of torch's stable interface that is given lists, and a module of Python's limited API that asks the gradients for
their addresses. It compiles the three small files beside this one (a minute at most); ``--keep DIR`` keeps what it
compiled, and uses what it finds there, so that another torch or Python can load the same files.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import shlex
import statistics
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
STATES = ("exp_avg", "exp_avg_sq", "dual")

# Source to (variable that names a compiler, compiler, flags, libraries of torch, which are in the process already).
SOURCES = {
    "stable_abi_today.cpp": ("CXX", "g++", ["-std=c++20"], ["-ltorch_python", "-ltorch_cpu", "-lc10"]),
    "stable_abi_lists.cpp": ("CXX", "g++", ["-std=c++20"], ["-ltorch_cpu"]),
    "stable_abi_addresses.c": ("CC", "gcc", [], []),
}


def compile_into(folder: Path) -> None:
    """Each of the sources, unless it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    package = Path(torch.__file__).parent
    includes = [package / "include", package / "include/torch/csrc/api/include", sysconfig.get_path("include")]
    common = ["-O2", "-shared", "-fPIC", *(f"-I{include}" for include in includes), f"-L{package / 'lib'}"]
    for source, (variable, default, flags, libraries) in SOURCES.items():
        target = folder / file_of(source)
        if not target.exists():
            compiler = shlex.split(os.environ.get(variable, "").strip() or default)
            command = [*compiler, *flags, *common, str(HERE / source), "-o", str(target), *libraries]
            subprocess.run(command, check=True)


def file_of(source: str) -> str:
    """The name of what is compiled; today's way fits one torch and one Python, beside others it may end the process."""
    stem, suffix = Path(source).stem, sysconfig.get_config_var("EXT_SUFFIX")
    return f"{stem}-{torch.__version__}{suffix}" if stem == "stable_abi_today" else f"{stem}.so"


def load_module(folder: Path, source: str) -> ModuleType:
    """The module of a source."""
    spec = importlib.util.spec_from_file_location(Path(source).stem, folder / file_of(source))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def torch_symbols(path: Path) -> tuple[int, int]:
    """How many functions a library takes from torch: of its stable C interface, and others (C++ names)."""
    listed = subprocess.run(["nm", "-D", "--undefined-only", str(path)], capture_output=True, text=True, check=True)
    names = [line.split()[-1] for line in listed.stdout.splitlines() if line.split()]
    stable = [name for name in names if name.startswith(("aoti_torch_", "torch_"))]
    mangled = [name for name in names if re.match(r"_Z\w*(c10|5torch|2at|7caffe2|THP)", name) or name.startswith("THP")]
    return len(stable), len(mangled)


def microseconds(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median time of each call; they take turns."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            samples[name].append((time.perf_counter() - start) * 1e6)
    return {name: statistics.median(values) for name, values in samples.items()}


def counts_writes(folder: Path) -> bool:
    """Whether a call of the op, whose schema says what it writes, is seen by autograd's check of saved tensors."""
    torch.ops.load_library(str(folder / file_of("stable_abi_lists.cpp")))
    w = torch.ones(1)
    torch.ops.rvsm_stable_abi.look.default([w], *([torch.ones(1)] for _ in range(4)))
    return w._version > 0


def ways(params: list[Tensor], folder: Path) -> dict[str, Callable[[], object]]:
    """Name to call, for parameters with gradients."""
    states = {p: {name: torch.zeros_like(p) for name in STATES} for p in params}
    lists = [[states[p][name] for p in params] for name in STATES]
    weights = [p.detach() for p in params]
    grads = [p.grad for p in params]
    facts = [(p.dtype, p.shape, p.stride()) for p in params]
    written = [*weights, *(t for tensors in lists for t in tensors)]
    op, increment = torch.ops.rvsm_stable_abi.look.default, torch.autograd.graph.increment_version
    addresses = load_module(folder, "stable_abi_addresses.c")
    today = load_module(folder, "stable_abi_today.cpp")
    return {
        "today: all five, and counting the writes": lambda: today.look(params, states, STATES),
        "stable op: the list of gradients": lambda: [p.grad for p in params],
        "stable op: the call with five lists": lambda: op(weights, grads, *lists),
        "limited API: addresses of gradients": lambda: addresses.look(params, None),
        "limited API: those, type and layout": lambda: addresses.look(params, facts),
        "both: counting the writes": lambda: increment(written),
    }


def todays(params: list[Tensor]) -> dict[str, Callable[[], object]]:
    """The whole step() of this build, or nothing where it has no native engine for this torch."""
    try:
        import rvsm_kernels as rk  # another torch may have no engine of this build

        optimizer = rk.RVSMAdamW(params, lam=1e-4, beta=1e-2, method="admm", engine="native")
    except (ImportError, RuntimeError) as error:
        print(f"no step() to compare with: {error}")
        return {}
    optimizer.step()
    missing = set(STATES) - set(optimizer.state[params[0]])
    if missing:
        raise RuntimeError(f"the states of a parameter are not those that are measured: {', '.join(sorted(missing))}")
    return {"today: the whole step()": optimizer.step}


def main() -> None:
    """Print one line for each way."""
    parser = argparse.ArgumentParser(prog="python -m bench.stable_abi", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parameters", type=int, default=1000, metavar="N", help="of one element each (default 1000)")
    parser.add_argument("--rounds", type=int, default=300, metavar="N", help="the median of so many (default 300)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keeps the compiled files, and uses those it finds")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        compile_into(folder)
        print(f"torch {torch.__version__}, Python {platform.python_version()}, {arguments.parameters} parameters")
        for path in (*sorted(folder.glob("*.so")), *sorted((HERE.parent / "rvsm_kernels").glob("_C*.so"))):
            stable, others = torch_symbols(path)
            print(f"{path.name}: {stable} functions of torch's stable C interface, {others} others of torch")
        params: list[Tensor] = [torch.nn.Parameter(torch.ones(1)) for _ in range(arguments.parameters)]
        for p in params:
            p.grad = torch.ones(1)
        print(f"the stable op counts its writes: {'yes' if counts_writes(folder) else 'no'}")
        for name, value in microseconds({**todays(params), **ways(params, folder)}, arguments.rounds).items():
            print(f"{name:<41} {value:8.1f} us")


if __name__ == "__main__":
    main()
