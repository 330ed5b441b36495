"""``python -m bench.static_triton``: what Triton's compiler makes of every kernel, for targets that need not be here.

Compiles each variant ahead of time and reads registers, spills and the widths of accesses: from PTX and ``cuobjdump``
for NVIDIA, from the assembly for AMD. No GPU is needed; TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rvsm_kernels.engines.triton import counts, device_numbers, elements, mixed, norms, selection, statistics, windows
from rvsm_kernels.engines.triton.calls import options_for
from rvsm_kernels.engines.triton.launch import STORAGE, block_of
from rvsm_kernels.engines.triton.table import FACTOR_TILE, PARTS_AT_ONCE, record_words
from rvsm_kernels.method.bases import ADAMW, BASES, NONE, SGD
from rvsm_kernels.method.dtypes import opmath_type

from .static import tool

TARGETS = ("cuda:80", "cuda:90", "hip:gfx942")
_TABLES = ("addresses", "entries", "records", "sources", "states", "bins", "blocks", "strengths", "pieces")
_TOTALS = ("totals", "rows", "sums")
_OTHERS = {
    "owners": "*i32",
    "found_inf": "*fp32",
    **dict.fromkeys(_TOTALS, "*fp64"),
    **dict.fromkeys(("count", "shift", "used"), "i32"),
}
_HELD_STACK = 8  # of two kernels for sm_80 since zeros can be held; one comparison less moved it to two others
_MEASURING_STACK = 16
"""Bytes that a variant with statistics may keep on the stack: a few have 8 or 16, outside of every loop."""
_ARGUMENTS = {**dict.fromkeys(_TABLES, "*i64"), **_OTHERS}


def target_of(name: str) -> GPUTarget:
    """The target of a name like ``cuda:90`` or ``hip:gfx942``."""
    backend, arch = name.split(":")
    return GPUTarget("cuda", int(arch), 32) if backend == "cuda" else GPUTarget("hip", arch, 64)


def steps() -> Iterator[tuple[dict[str, Any], int]]:
    """The constants of every kind of step but its types, and how many arrays it reads and writes."""
    for momentum, tl1, groups, method in itertools.product((0, 1), (False, True), (False, True), range(3)):
        kind = {"BASE": SGD.number, "WRITES_GRADIENT": False, "WITH_TL1": tl1, "WITH_GROUPS": groups, "METHOD": method}
        states = momentum + (method > 0)
        for measures in (False, True)[: 1 + momentum]:  # statistics where most registers are needed
            yield {**kind, "STATES": states, "REST": 0, "MEASURES": measures}, 3 + 2 * states
        if method > 0:
            yield {**kind, "STATES": states, "REST": 16, "MEASURES": False}, 3 + 2 * states
    for writes, method in itertools.product((False, True), (0, 2)):
        kind = {"BASE": NONE.number, "WRITES_GRADIENT": writes, "WITH_TL1": True, "WITH_GROUPS": True, "METHOD": method}
        states = int(method > 0)
        yield {**kind, "STATES": states, "REST": 0, "MEASURES": False}, 2 + 2 * writes + 2 * states
        yield {**kind, "STATES": states, "REST": 0, "MEASURES": True}, 3 + writes + 2 * states  # reads the gradient
    for moments, groups, method in itertools.product((2, 3), (False, True), (0, 2)):
        kind = {"BASE": ADAMW.number, "WRITES_GRADIENT": False, "WITH_TL1": True, "WITH_GROUPS": groups}
        states = moments + (method > 0)
        for measures in (False, True):
            yield {**kind, "METHOD": method, "STATES": states, "REST": 0, "MEASURES": measures}, 3 + 2 * states
        if method > 0:
            yield {**kind, "METHOD": method, "STATES": states, "REST": 19, "MEASURES": False}, 3 + 2 * states


def mixed_steps() -> Iterator[tuple[dict[str, Any], int]]:
    """The constants of the steps whose planes have several types, and how many arrays they read and write."""
    bf16, fp16, fp32 = tl.bfloat16, tl.float16, tl.float32
    planes = [  # weights, states, master, whether they are rounded
        *((bf16, fp32, 1, False), (fp16, fp32, 2, False), (bf16, bf16, 0, True), (fp16, fp16, 0, True)),
        *((bf16, fp32, 0, True), (bf16, bf16, 1, False), (bf16, fp32, 0, False), (fp32, bf16, 0, False)),
    ]
    for (weight, state, master, rounds), method, tl1 in itertools.product(planes, (0, 2), (False, True)):
        of_method = fp32 if master else weight
        types = {"WEIGHT": weight, "GRADIENT": weight, "OF_BASE": state, "OF_METHOD": of_method}
        kind = {**types, "MASTER": master, "ROUNDS": rounds, "BLOCK": mixed.MIXED_BLOCK, "METHOD": method}
        for base, of_base in ((SGD, 0), (SGD, 1), (ADAMW, 2), (ADAMW, 3)):
            states = of_base + (method > 0)
            constants = {**kind, "BASE": base.number, "STATES": states, "WRITES_GRADIENT": False, "WITH_TL1": tl1}
            for measures in (False, True)[: 1 + tl1]:
                yield {**constants, "REST": 0, "MEASURES": measures}, 3 + 2 * (states + (master > 0))


def variants() -> Iterator[tuple[Any, dict[str, Any], int]]:
    """Every kernel with its compile-time constants, and how many arrays it reads and writes as a stream."""
    for dtype, storage in STORAGE.items():
        types = {"S": storage, "T": STORAGE[opmath_type(dtype)]}
        for kind, streams in steps():
            block = block_of(dtype, kind["WITH_GROUPS"])
            plain = not (kind["WITH_TL1"] or kind["REST"])
            for has_windows in (False, True) if plain else (False,):  # windows read a byte more for each element
                yield elements.step_kernel, {**types, "BLOCK": block, "WITH_WINDOWS": has_windows, **kind}, streams
        for method in (0, 2):
            constants = {"OF_METHOD": storage, "METHOD": method, "MASTER": 0, "BLOCK": windows.WINDOW_BLOCK}
            yield windows.window_kernel, {**types, **constants}, 0  # the elements of a window are anywhere
            for master in (0, *{torch.bfloat16: (1,), torch.float16: (2,)}.get(dtype, ())):
                constants = {"OF_METHOD": tl.float32 if master else storage, "METHOD": method, "MASTER": master}
                constants |= {"BLOCK": selection.SELECT_BLOCK, "READS": selection.READS}
                yield selection.histogram_kernel, {**types, **constants}, 0
                yield selection.next_kernel, {**types, **constants}, 0
        yield elements.prox_kernel, {**types, "BLOCK": block_of(dtype, True)}, 2
        yield elements.penalty_kernel, {**types, "BLOCK": block_of(dtype, False)}, 1
        for measures in (False, True):
            constants = {**types, "MEASURES": measures}
            yield norms.sum_kernel, {**constants, "WITH_DUAL": False}, 4  # one for each shape of a tile
            yield norms.sum_kernel, {**constants, "WITH_DUAL": True}, 4 + 8
    yield selection.bin_kernel, {}, 0
    yield statistics.piece_kernel, {}, 0
    yield statistics.row_kernel, {}, 0
    for opmath in (tl.float32, tl.float64):
        for between in (False, True):
            yield selection.write_kernel, {"T": opmath, "BETWEEN": between}, 0
        for measures in (False, True):
            constants = {"T": opmath, "P": PARTS_AT_ONCE, "G": FACTOR_TILE, "MEASURES": measures}
            yield norms.factor_kernel, constants, 0
        for base in BASES.values():
            numbers = 10 + len(base.number_names)
            words = record_words(numbers + 1, opmath == tl.float64, numbers + 1)
            constants = {"T": opmath, "BASE": base.number, "NUMBERS": numbers, "WORDS": words}
            yield device_numbers.finish_kernel, constants, 0
    for base, rounds in ((SGD, True), (ADAMW, False), (ADAMW, True)):
        constants = {"BASE": base.number, "NUMBERS": 10 + len(base.number_names), "CORRECTS": base is ADAMW}
        yield counts.count_kernel, {**constants, "ROUNDS": rounds}, 0
    for kind, streams in mixed_steps():
        yield mixed.mixed_kernel, {**kind, "WITH_WINDOWS": False}, streams


def compiled(kernel: Any, constants: dict[str, Any], target: GPUTarget) -> Any:
    """The kernel, compiled ahead of time as a launch would."""
    names = kernel.arg_names
    pointers = {**_ARGUMENTS, "grad_scale": "*fp64" if constants.get("T") == tl.float64 else "*fp32"}
    signature = {name: "constexpr" if name in constants else pointers[name] for name in names}
    fixed = {(names.index(name),): value for name, value in constants.items()}
    # As a launch finds them: whole allocations.
    aligned = {
        (k,): [["tt.divisibility", 16]] for k, name in enumerate(names) if name in (*_TABLES, *_TOTALS, "owners")
    }
    source = ASTSource(kernel, signature, fixed, aligned)
    threads = {device_numbers.finish_kernel: device_numbers.THREADS, counts.count_kernel: counts.THREADS}
    options = options_for(target.warp_size, threads.get(kernel, norms.THREADS.value))
    if kernel in selection.KERNELS:
        options |= selection.OPTIONS
    return triton.compile(source, target=target, options=options)


def usage(binary: Any) -> dict[str, int]:
    """Registers, bytes outside of them, and accesses of 16 bytes."""
    assembly = binary.asm
    if "cubin" in assembly:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(assembly["cubin"])
            command = [tool("cuobjdump"), "-res-usage", file.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = {key: int(n) for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
        wide = len(re.findall(r"(?:ld|st)\.global[.\w]*\.v(?:4\.b32|2\.b64)", assembly["ptx"]))
        return {"registers": found["REG"], "spilled": found["STACK"] + found["LOCAL"], "wide": wide}
    text = assembly["amdgcn"]
    # A scalar register that is lacking becomes a lane of a vector register, which costs no memory: not a spill here.
    numbers = {key: int(n) for key, n in re.findall(r"\.(vgpr_count|vgpr_spill_count): *(\d+)", text)}
    wide = len(re.findall(r"(?:global|buffer|flat)_(?:load|store)_dwordx4", text))
    spilled = numbers.get("vgpr_spill_count", 0)
    return {"registers": numbers.get("vgpr_count", 0), "spilled": spilled, "wide": wide}


def row(name: str, index: int) -> dict[str, Any]:
    """What became of a variant for a target."""
    kernel, constants, streams = list(variants())[index]
    kinds = {key: str(value) for key, value in constants.items()}
    found = usage(compiled(kernel, constants, target_of(name)))
    return {"target": name, "kernel": kernel.__name__, **kinds, "streams": streams, **found}


def measure(targets: Sequence[str]) -> list[dict[str, Any]]:
    """One row for each kernel, variant and target; as many at a time as there are processors."""
    work = [(name, index) for name in targets for index in range(len(list(variants())))]
    # Fresh processes: those that this one would fork have its threads' locks.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), context) as pool:
        return list(pool.map(row, *zip(*work, strict=True), chunksize=8))


def _spills(row: dict[str, Any]) -> bool:
    of_steps = _HELD_STACK if row["target"] == "cuda:80" else 0
    return bool(row["spilled"] > (_MEASURING_STACK if row.get("MEASURES") == "True" else of_steps))


def main(argv: Sequence[str] | None = None) -> int:
    """Print one line for each; 1 if anything spills or a stream is not read in accesses of 16 bytes."""
    parser = argparse.ArgumentParser(prog="python -m bench.static_triton", description=__doc__)
    parser.add_argument("targets", nargs="*", default=list(TARGETS), help=f"of these by default: {', '.join(TARGETS)}")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args(argv)
    rows = measure(arguments.targets)
    bad = [row for row in rows if _spills(row) or row["wide"] < row["streams"]]
    for row in rows:
        print("  ".join(f"{key}={value}" for key, value in row.items()) + ("  BAD" if row in bad else ""))
    print(f"static_triton: {len(rows)} kernels, {len(bad)} of them spill or read a stream in narrow accesses")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
