"""``python -m bench static``: what the compiler made of every CUDA kernel, read from the compiled module.

Registers, stack and shared memory come from ``cuobjdump -res-usage``, widths of loads and stores from the disassembly,
and from its vector loops what else than the memory's bandwidth may bound them (:mod:`bench.sass`). No GPU is needed;
where the CUDA toolkit has no cuobjdump, the Triton package brings one.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import rvsm_kernels as rk

from . import sass
from .baselines import Unavailable
from .config import Config
from .results import environment, write_json

_REGISTER_FILE = 65536
_REGISTERS_PER_WARP = 256
"""Registers are handed out to warps in units of so many."""

# Threads and shared memory of a multiprocessor (CUDA C++ Programming Guide, technical specifications).
_THREADS = {"80": 2048, "86": 1536, "87": 1536, "89": 1536, "90": 2048, "100": 2048, "103": 2048, "120": 1536}
_SHARED = {"80": 164, "86": 100, "87": 164, "89": 100, "90": 228, "100": 228, "103": 228, "120": 100}
_BLOCK_THREADS = 256
_RESERVED_SHARED = 1024


@dataclass
class Kernel:
    """One kernel of one architecture.

    Attributes:
        name: as in kernels.cu, with its template arguments.
        stack, local: bytes per thread outside the registers; 0 without spills.
        loads, stores: instructions on global memory by width in bits.
        local_accesses: instructions on local memory.
        loops: the vector loops, where bench.sass knows the architecture.
    """

    arch: str
    name: str
    registers: int
    stack: int
    shared: int
    local: int
    loads: Counter[int] = field(default_factory=Counter)
    stores: Counter[int] = field(default_factory=Counter)
    local_accesses: int = 0
    loops: list[sass.Loop] = field(default_factory=list)

    @property
    def spills(self) -> bool:
        """Whether anything lies in local memory."""
        return bool(self.stack or self.local or self.local_accesses)

    @property
    def threads(self) -> int:
        """How many of its threads are on a multiprocessor at a time."""
        return round(self.occupancy * _THREADS.get(self.arch.rstrip("af"), 2048))

    @property
    def occupancy(self) -> float:
        """Share of a multiprocessor's threads that registers and shared memory allow."""
        warps = _BLOCK_THREADS // 32
        per_warp = -(-self.registers * 32 // _REGISTERS_PER_WARP) * _REGISTERS_PER_WARP
        arch = self.arch.rstrip("af")
        threads, shared = _THREADS.get(arch, 2048), _SHARED.get(arch, 100) * 1024
        blocks = min(
            _REGISTER_FILE // (per_warp * warps),
            threads // _BLOCK_THREADS,
            shared // (self.shared + _RESERVED_SHARED),
        )
        return blocks * _BLOCK_THREADS / threads


def tool(name: str) -> str:
    """A program of the CUDA toolkit: on PATH, under CUDA_HOME, where toolkits are installed, or inside Triton.

    Raises:
        Unavailable: there is none.
    """
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [Path(home) / "bin" for home in homes if home]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    found = shutil.which(name) or shutil.which(name, path=os.pathsep.join(map(str, places)))
    if found is None:
        raise Unavailable(f"no {name} here: neither in a CUDA toolkit nor in the Triton package")
    return found


def module() -> Path:
    """The compiled module.

    Raises:
        Unavailable: it is not built, or without CUDA.
    """
    state = rk.engines()["native"]["cuda"]
    module = importlib.util.find_spec("rvsm_kernels._C")
    if state != "available" or module is None or module.origin is None:
        raise Unavailable(state)
    return Path(module.origin)


def _output(*command: str | Path) -> str:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=True).stdout


_ARGUMENTS = {"f": "float", "d": "double", "N4rvsm8BFloat16E": "BFloat16", "N4rvsm7Float16E": "Float16"}
_ARGUMENTS |= {"NS_8BFloat16E": "BFloat16", "NS_7Float16E": "Float16", "Lb0E": "false", "Lb1E": "true"}
_ARGUMENTS |= {"NS_3SgdILb0EEE": "Sgd<0>", "NS_3SgdILb1EEE": "Sgd<1>"}  # the bases, by their template argument
_ARGUMENTS |= {"NS_6NoBaseILb0EEE": "NoBase<0>", "NS_6NoBaseILb1EEE": "NoBase<1>"}
_ARGUMENTS |= {"NS_5AdamWILb0EEE": "AdamW<0>", "NS_5AdamWILb1EEE": "AdamW<1>"}
_ARGUMENT = re.compile("|".join(sorted(map(re.escape, _ARGUMENTS), key=len, reverse=True)))


def readable(symbol: str) -> str:
    """``step_kernel<float>`` of a mangled name; the symbol itself where it is none of ours."""
    found = re.search(r"\d+([a-z_]+_kernel)I(.*?)EEv", symbol)
    if found is None:
        plain = re.search(r"\d+([a-z_]+_kernel)E", symbol)  # no template
        return symbol if plain is None else plain[1]
    return f"{found[1]}<{', '.join(_ARGUMENTS[part] for part in _ARGUMENT.findall(found[2] + 'E'))}>"


def resources(text: str) -> dict[tuple[str, str], Kernel]:
    """The kernels in the output of ``cuobjdump -res-usage``, by (architecture, symbol)."""
    kernels: dict[tuple[str, str], Kernel] = {}
    arch = symbol = ""
    for line in text.splitlines():
        if found := re.match(r"\s*arch = sm_(\w+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function (\S+):", line):
            symbol = found[1]
        elif found := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            numbers = dict(zip(("registers", "stack", "shared", "local"), map(int, found.groups()), strict=True))
            kernels[arch, symbol] = Kernel(arch, readable(symbol), **numbers)
    return kernels


def _width(modifiers: str) -> int:
    """Bits of an access: ``.128``, ``.64``, ``.U16``, ``.S8`` …, else 32."""
    for part in modifiers.split("."):
        if part.lstrip("US") in ("8", "16", "64", "128"):
            return int(part.lstrip("US"))
    return 32


def _functions(text: str) -> Iterator[tuple[str, str, str]]:
    """Architecture, symbol and text of each function in the output of ``cuobjdump -sass``."""
    arch = ""
    for part in re.split(r"^(?=\s*(?:arch = sm_|Function : ))", text, flags=re.MULTILINE):
        if found := re.match(r"\s*arch = sm_(\w+)", part):
            arch = found[1]
        elif found := re.match(r"\s*Function : (\S+)", part):
            yield arch, found[1], part


def add_disassembly(kernels: dict[tuple[str, str], Kernel], text: str) -> None:
    """Count the accesses in the output of ``cuobjdump -sass``, and look at its vector loops."""
    for arch, symbol, function in _functions(text):
        kernel = kernels[arch, symbol]
        for found in re.finditer(r"\b(LDG|STG|LDL|STL)\b([.\w]*)", function):
            if found[1] in ("LDL", "STL"):
                kernel.local_accesses += 1
            else:
                (kernel.loads if found[1] == "LDG" else kernel.stores)[_width(found[2])] += 1
        device = sass.DEVICES.get(arch.rstrip("af"))
        if device is not None:
            kernel.loops = sass.loops(sass.instructions(function), kernel.threads, device)


def kernels_of(library: Path) -> list[Kernel]:
    """Every kernel of a compiled module, by architecture and name."""
    cuobjdump = tool("cuobjdump")
    kernels = resources(_output(cuobjdump, "-res-usage", library))
    add_disassembly(kernels, _output(cuobjdump, "-sass", library))
    return sorted(kernels.values(), key=lambda kernel: (int(re.sub(r"\D", "", kernel.arch)), kernel.name))


def _counts(widths: Counter[int]) -> str:
    return " ".join(f"{count}x{bits}" for bits, count in sorted(widths.items(), reverse=True))


def line(kernel: Kernel) -> str:
    """A kernel in one line."""
    return (
        f"sm_{kernel.arch:<4} {kernel.name:<34} {kernel.registers:>4} {kernel.occupancy:>6.0%} {kernel.stack:>6}"
        f" {kernel.local_accesses:>6} {kernel.shared:>7}   {_counts(kernel.loads):<24} {_counts(kernel.stores)}"
    )


def loop_line(kernel: Kernel, loop: sass.Loop) -> str:
    """One of its vector loops in one line."""
    return (
        f"sm_{kernel.arch:<4} {kernel.name:<34} {loop.address:>#7x} {loop.instructions:>6} {loop.loads:>5}"
        f" {loop.stores:>6} {loop.in_flight:>6.1f}   {loop.issue:>6.2f} {loop.pipe:>6.2f} {loop.latency:>7.2f}"
    )


def row(kernel: Kernel) -> dict[str, Any]:
    """A kernel as it stands in static.json."""
    numbers = {key: getattr(kernel, key) for key in ("arch", "name", "registers", "stack", "shared", "local")}
    widths = {"loads_by_bits": kernel.loads, "stores_by_bits": kernel.stores}
    return {
        **numbers,
        "local_accesses": kernel.local_accesses,
        "occupancy": kernel.occupancy,
        **{key: {str(bits): count for bits, count in sorted(counts.items())} for key, counts in widths.items()},
        "loops": [asdict(loop) for loop in kernel.loops],
    }


def run(config: Config) -> bool:
    """Print the table and write static.json; False where a kernel uses local memory."""
    try:
        kernels = kernels_of(module())
    except Unavailable as error:
        print(f"static: not read ({error})")
        return True
    heads = f"{'arch':<7} {'kernel':<34} {'regs':>4} {'occup.':>6} {'stack':>6} {'local':>6} {'shared':>7}   "
    print(f"{heads}{'loads (number x bits)':<24} stores")
    for kernel in kernels:
        print(line(kernel))
    for arch, device in sass.DEVICES.items():
        print(f"\nvector loops of sm_{arch}, their times over that of their bytes on an {device.name}")
        heads = f"{'arch':<7} {'kernel':<34} {'at':>7} {'instr.':>6} {'loads':>5} {'stores':>6} {'flying':>6}   "
        print(f"{heads}{'issue':>6} {'pipe':>6} {'latency':>7}")
        for kernel in kernels:
            for loop in kernel.loops if kernel.arch.rstrip("af") == arch else []:
                print(loop_line(kernel, loop))
    rows = [row(kernel) for kernel in kernels]
    write_json(config.out / "static.json", {**environment(config.device, config.command), "rows": rows})
    spilled = [kernel for kernel in kernels if kernel.spills]
    print(f"static: {len(kernels)} kernels, {len(spilled)} of them use local memory")
    return not spilled
