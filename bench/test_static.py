"""What the compiler made of the CUDA kernels; no GPU is needed."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
from builds import shared_folder

from . import sass
from .baselines import Unavailable
from .static import Kernel, add_disassembly, kernels_of, line, loop_line, module, readable, resources, row

RESOURCES = """
Fatbin elf code:
================
arch = sm_90
 Function _ZN4rvsm4cuda43_GLOBAL__N__61_10_kernels_cu_e37c11step_kernelINS_7Float16EEEvNS0_5TableE:
  REG:40 STACK:8 SHARED:16 LOCAL:0 CONSTANT[0]:39520 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = """
		arch = sm_90
		Function : _ZN4rvsm4cuda43_GLOBAL__N__61_10_kernels_cu_e37c11step_kernelINS_7Float16EEEvNS0_5TableE
        /*0100*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0110*/              @!P0 LDG.E.U16 R8, desc[UR4][R2.64] ;
        /*0120*/                   LDG.E R9, desc[UR4][R2.64] ;
        /*0130*/                   STL.64 [R1], R4 ;
        /*0140*/                   STG.E.64 desc[UR4][R2.64], R4 ;
"""


def test_reading_the_tools() -> None:
    """One kernel of cuobjdump's output, with a spill."""
    kernels = resources(RESOURCES)
    add_disassembly(kernels, SASS)
    (kernel,) = kernels.values()
    assert (kernel.arch, kernel.name, kernel.registers, kernel.shared) == ("90", "step_kernel<Float16>", 40, 16)
    assert kernel.loads == {128: 1, 16: 1, 32: 1} and kernel.stores == {64: 1}
    assert kernel.stack == 8 and kernel.local_accesses == 1 and kernel.spills
    assert row(kernel)["loads_by_bits"] == {"16": 1, "32": 1, "128": 1} and "step_kernel<Float16>" in line(kernel)


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "occupancy"),
    [("90", 40, 0, 0.75), ("90", 41, 0, 0.625), ("90", 32, 0, 1), ("90", 32, 50000, 0.5), ("86", 64, 0, 2 / 3)],
)
def test_occupancy(arch: str, registers: int, shared: int, occupancy: float) -> None:
    """By hand: 65,536 registers of a multiprocessor over 256 threads times the registers of one, and so on."""
    assert Kernel(arch, "k", registers, 0, shared, 0).occupancy == pytest.approx(occupancy)


def test_names() -> None:
    assert readable("_ZN4rvsm10sum_kernelIdLb0EfEEvNS0_8SumTableE") == "sum_kernel<double, false, float>"
    assert readable("_ZN4rvsm10sum_kernelINS_8BFloat16ELb1EfEEvNS0_8SumTableE") == "sum_kernel<BFloat16, true, float>"
    symbol = "_ZN4rvsm4cuda11step_kernelINS_7Float16ENS_3SgdILb1EEELb0EEEvNS0_5TableE"
    assert readable(symbol) == "step_kernel<Float16, Sgd<1>, false>"
    assert readable("another") == "another"


LOOP = """
        /*0100*/                   MOV R20, RZ ;                            /* 0x000000ff00147202 */
        /*0110*/                   LDG.E.128 R4, desc[UR4][R2.64] ;         /* 0x0000000402047981 */
        /*0120*/                   LDG.E.128 R8, desc[UR4][R12.64] ;        /* 0x000000040c087981 */
        /*0130*/                   IADD3 R20, P1, R20, 0x1, RZ ;            /* 0x0000000114147810 */
        /*0140*/                   ISETP.GE.AND P0, PT, R20, 0x8, PT ;      /* 0x000000081400780c */
        /*0150*/                   FADD R4, R4, R8 ;                        /* 0x0000000804047221 */
        /*0160*/                   MUFU.RCP R5, R4 ;                        /* 0x0000000400057308 */
        /*0170*/                   STG.E.128 desc[UR4][R2.64], R4 ;         /* 0x0000000402007986 */
        /*0180*/              @!P0 BRA 0x110 ;                              /* 0xfffffffc00e08947 */
        /*0190*/                   EXIT ;                                   /* 0x000000000000794d */
"""


def test_what_an_instruction_reads_and_writes() -> None:
    """Pairs of registers in double precision, four of a vector, carries, predicates and addresses of 64 bits."""
    effects = {
        "LDG.E.128 R4, desc[UR4][R2.64]": ("R2 R3", "R4 R5 R6 R7"),
        "STG.E.64 desc[UR4][R2.64], R8": ("R2 R3 R8 R9", ""),
        "DFMA R4, R6, R8, R10": ("R6 R7 R8 R9 R10 R11", "R4 R5"),
        "F2F.F64.F32 R4, R6": ("R6", "R4 R5"),
        "IADD3 R20, P1, R20, UR5, RZ": ("R20 UR5", "R20 P1"),
        "@!P0 FSETP.GT.AND P1, PT, |R3|, R4, PT": ("P0 R3 R4", "P1"),
        "IMAD.WIDE.U32 R2, R5, 0x4, R2": ("R5 R2 R3", "R2 R3"),
    }
    for text, (reads, writes) in effects.items():
        instruction = sass.Instruction(0, text)
        assert (instruction.reads, instruction.writes) == (set(reads.split()), set(writes.split())), text


def test_vector_loops() -> None:
    """By hand: 8 instructions of a pass for three vectors. Both loads are in flight when FADD waits for them."""
    device = sass.Device("a GPU", multiprocessors=100, clock=1e9, bandwidth=1.6e12, latency=500e-9)
    (loop,) = sass.loops(sass.instructions(LOOP), 1024, device)
    assert (loop.address, loop.instructions, loop.loads, loop.stores, loop.in_flight) == (0x110, 8, 2, 1, 2)
    memory = 3 * 16 * 32 / 16  # cycles, at 16 bytes in each
    assert loop.issue == pytest.approx(8 / 4 / memory)
    assert loop.pipe == pytest.approx(32 / 16 / memory)
    # FADD waits until 501, MUFU until 506, STG until 530; BRA follows.
    assert loop.latency == pytest.approx(532 / 32 / memory)
    assert loop.slowest == loop.latency


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    """Every kernel of this build, read once: cuobjdump takes a minute."""
    try:
        library: Path = module()
        with shared_folder(tmp_path_factory, "kernels") as file:
            if not file.exists():
                file.write_bytes(pickle.dumps(kernels_of(library)))
            return pickle.loads(file.read_bytes())
    except Unavailable as error:
        if os.environ.get("RVSM_CUDA") == "1":
            pytest.fail(f"RVSM_CUDA=1, but {error}")
        pytest.skip(str(error))


@pytest.mark.slow
def test_no_kernel_spills(compiled: list[Kernel]) -> None:
    """No stack, no local memory, on any architecture."""
    assert compiled
    spilled = [line(kernel) for kernel in compiled if kernel.spills]
    assert not spilled, "\n".join(spilled)


@pytest.mark.slow
def test_every_kernel_is_there(compiled: list[Kernel]) -> None:
    """Each storage type has its step, prox, norms and penalty, on every architecture."""
    for arch in {kernel.arch for kernel in compiled}:
        names = [kernel.name for kernel in compiled if kernel.arch == arch]
        assert {"count_kernel", "numbers_kernel", "general_sum_kernel", "row_kernel"} <= set(names)
        assert {"measure_kernel<float>", "measure_kernel<double>"} <= set(names)
        for storage in ("float", "double", "BFloat16", "Float16"):
            for kind in ("prox", "sum", "penalty"):
                assert any(name.startswith(f"{kind}_kernel<{storage}") for name in names), (arch, kind, storage)
            for base in ("Sgd<0>", "Sgd<1>", "NoBase<0>", "NoBase<1>", "AdamW<0>", "AdamW<1>"):
                assert {f"step_kernel<{storage}, {base}, {state}>" for state in ("false", "true")} <= set(names)
                assert f"resident_kernel<{storage}, {base}, true>" in names
                if storage in ("float", "double"):
                    assert {f"general_kernel<{storage}, {base}, {state}>" for state in ("false", "true")} <= set(names)


@pytest.mark.slow
def test_vectors_are_128_bits_wide(compiled: list[Kernel]) -> None:
    """A step reads w, g and its states and writes w and the states in accesses of 16 bytes, one set for each kind of u;
    the pull alone reads g only where it writes to it. 64-bit accesses are double's single elements and never pairs of
    smaller ones."""
    for kernel in compiled:
        kind, _, arguments = kernel.name.partition("<")
        storage = arguments.split(",")[0].rstrip(">")
        sets = kernel.loads[128], kernel.stores[128]
        # A thread for a tensor or for a record; weights that are read one by one, or whose type is found when they are.
        # Sums of blocks that become rows of statistics.
        apart = ("count_kernel", "numbers_kernel", "general_sum_kernel", "window_kernel", "row_kernel")
        if kind in apart or "select_" in kind:
            continue
        if kind == "resident_kernel":
            assert sets[0] >= 2 and sets[1] >= 1, line(kernel)
        elif kind == "step_kernel":
            of_bases = {"Sgd<1>": 1, "AdamW<0>": 2, "AdamW<1>": 3}
            states = sum(n for base, n in of_bases.items() if base in arguments) + arguments.endswith("true>")
            reads, writes = 1 + ("NoBase<0>" not in arguments) + states, 1 + ("NoBase<1>" in arguments) + states
            # Where nothing pulls (elements; in float32 arithmetic groups too), the pull alone leaves w as it is, and a
            # compiler may leave out its store.
            unwritten = 2 if "NoBase" in arguments else 0
            assert 0 <= sets[0] * writes - sets[1] * reads <= unwritten * reads, line(kernel)
            assert sets[1] >= 4 * writes, line(kernel)
        elif kind == "prox_kernel":
            assert sets[0] == sets[1] >= 5, line(kernel)
        else:
            assert sets[0] >= 2, line(kernel)
        if storage != "double":
            # AdamW's corrections are in double precision.
            assert kernel.loads[64] == 0 or "AdamW" in kernel.name, line(kernel)
            assert kernel.stores[64] == 0 or kind in ("sum_kernel", "penalty_kernel", "measure_kernel"), line(kernel)


@pytest.mark.slow
def test_occupancy_on_sm_90(compiled: list[Kernel]) -> None:
    """Three quarters of the threads for every kernel of a step over float32 and half types; but the value of a penalty
    divides in double precision, float64 has twice as much to hold, and half types hold two phases at once where a
    block sums its own groups; a method with a state has one more array, and as many bytes in flight with half of the
    threads; AdamW has one or two more, a root and a quotient. A selection holds a run of weights of any type,
    statistics hold three of them."""
    kernels = [kernel for kernel in compiled if kernel.arch == "90"]
    if not kernels:
        pytest.skip("this build has no code for sm_90")
    for kernel in kernels:
        both = kernel.name.startswith("resident_kernel") and "16" in kernel.name
        both |= kernel.name.startswith("select_")
        heavy = "double" in kernel.name or kernel.name.startswith("penalty")
        state = kernel.name.startswith("step_kernel") and kernel.name.endswith("true>")
        state = state or ", true, true, " in kernel.name  # sums of w + dual
        least = 0.25 if state and heavy else 0.375 if heavy or state else 0.5 if both else 0.75
        # The pull alone, momentum and the prox in half types; float32 groups with momentum that a block sums itself.
        if "16, NoBase<" in kernel.name or "16, Sgd<1>, false" in kernel.name or kernel.name.startswith("prox"):
            least = min(least, 0.375 if "NoBase<1>" in kernel.name else 0.625)
        if kernel.name == "resident_kernel<float, Sgd<1>, true>":  # since zeros can be held; half reads ahead enough
            least = 0.5
        if kernel.name.startswith("sum_kernel"):  # several loads in flight; half types have twice the sums
            least = min(least, 0.5 if "16" in kernel.name else 0.625)
        if "AdamW" in kernel.name:
            least = 0.25 if state or "float" not in kernel.name else 0.375
        if kernel.name.startswith(("general_", "measure_")):  # eight elements of every array are held at a time
            least = 0.125 if heavy else 0.25
        if kernel.name == "numbers_kernel":  # a thread holds a record
            least = 0.5
        assert kernel.occupancy >= least, line(kernel)


@pytest.mark.slow
def test_steps_are_bound_by_memory(compiled: list[Kernel]) -> None:
    """Every vector loop of a step over float32 and float64 needs less time for its instructions, its slow units and its
    latency than the memory of an H200 for its bytes. In half types tl1 and groups need up to half as much again, in
    float64 tl1 with a state, where only the pull is computed, and that of AdamW as much as the memory; SGD without
    momentum and with a dual a quarter more, for a quarter of the threads of sm_90 are there."""
    steps = 0
    for kernel in compiled:
        for loop in kernel.loops:
            # The loop of a general step has a branch for each type of each array, and runs one of them.
            if loop.stores < 2 or kernel.name == "count_kernel" or kernel.name.startswith("general_"):
                continue
            as_slow = any(name in kernel.name for name in ("double, NoBase<1>, true", "double, AdamW<0>, false"))
            few = "double, Sgd<0>, true" in kernel.name
            most = 1.5 if "16" in kernel.name else 1.25 if few else 1.05 if as_slow else 1
            assert loop.slowest < most, loop_line(kernel, loop)
            steps += 1
    assert steps > 0 or not any(kernel.arch in sass.DEVICES for kernel in compiled)
