"""What the instructions of a vector loop cost beside the bytes that it moves, read from the disassembly of a kernel.

A loop that reads vectors of 16 bytes can be bound by four things: the memory's bandwidth, the slots in which
instructions are issued, the slowest of the units that compute (`pipe`), or the latency of loads where too few threads
wait at a time. `loops` finds the innermost loops, runs one warp of each through a model that issues in order, and gives
the last three as shares of the first: below 1 the loop keeps up with the memory.

The latencies are those of sm_90, from published micro-benchmarks; the model knows nothing of caches, bank conflicts or
instruction fetch. It is good for comparing two versions of a kernel, not for a time in microseconds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Device:
    """A GPU, as far as the model knows it.

    Attributes:
        clock: in Hz, under load.
        bandwidth: of the memory, in bytes per second.
        latency: of a load from memory under load, in seconds.
    """

    name: str
    multiprocessors: int
    clock: float
    bandwidth: float
    latency: float


DEVICES = {"90": Device("H200", 132, 1.7e9, 4.8e12, 700e-9)}
"""By architecture, without "sm_"."""

_WARP = 32
_SCHEDULERS = 4
_VECTOR = 16
"""Bytes of the accesses whose loops are looked at."""

_CACHED_CYCLES = 35
_SHARED_CYCLES = 30
_CYCLES = {"MUFU": 24, "F2F": 20, "F2FP": 8, "HADD2": 8, "I2F": 8, "F2I": 8}
"""From issue to result; all others: 5, in double precision 9."""

_DOUBLES = ("DFMA", "DADD", "DMUL", "DSETP")
_UNITS = {"mufu": (("MUFU",), 16), "double": (("DFMA", "DADD", "DMUL"), 64), "conversion": (("F2F",), 16)}
"""Slow units: their instructions, and results of all threads of a multiprocessor in a cycle."""

_STORES = ("STG", "STS", "ST")
_LOADS = ("LDG", "LDS", "LDC", "LD", "LDL")
_CONTROL = ("BRA", "EXIT", "BSSY", "BSYNC", "NOP", "BAR", "WARPSYNC")

_PREDICATED = re.compile(r"@(!?U?P\w+)\s+")
_OPERANDS = re.compile(r",(?![^\[]*\])")
_REGISTER = re.compile(r"[-|~!]*R(\d+)")
_UNIFORM = re.compile(r"[-|~!]*(UR\d+)")
_PREDICATE = re.compile(r"!?(U?P\d+)$")
_ADDRESS = re.compile(r"\bR(\d+)(\.64)?")


def _registers(operand: str, count: int) -> set[str]:
    """The registers that an operand names: ``count`` from the number that it gives."""
    found = _REGISTER.match(operand)
    return {f"R{int(found[1]) + k}" for k in range(count)} if found else set()


def _address(operand: str) -> set[str]:
    """The registers of an address."""
    return {f"R{int(n) + k}" for n, wide in _ADDRESS.findall(operand) for k in range(2 if wide else 1)}


def _named(operand: str) -> set[str]:
    """The predicate or the uniform register that an operand names."""
    found = _PREDICATE.match(operand) or _UNIFORM.match(operand)
    return {found[1]} if found else set()


@dataclass(frozen=True)
class Instruction:
    """One line of the disassembly: its address in the kernel and its text, without the semicolon."""

    address: int
    text: str

    @cached_property
    def _parts(self) -> tuple[str, str, list[str]]:
        """Predicate or nothing, operation with modifiers, operands."""
        found = _PREDICATED.match(self.text)
        words = self.text[found.end() if found else 0 :].split(None, 1)
        operands = [part.strip() for part in _OPERANDS.split(words[1])] if len(words) > 1 else []
        return (found[1] if found else ""), words[0], operands

    @property
    def operation(self) -> str:
        """With its modifiers, such as ``LDG.E.128``."""
        return self._parts[1]

    @property
    def name(self) -> str:
        """Without modifiers."""
        return self.operation.split(".")[0]

    @property
    def is_vector_load(self) -> bool:
        """Whether it reads 16 bytes of global memory."""
        return self.name == "LDG" and ".128" in self.operation

    @cached_property
    def _effect(self) -> tuple[frozenset[str], frozenset[str]]:
        predicate, operation, operands = self._parts
        name = self.name
        access = 4 if ".128" in operation else 2 if ".64" in operation else 1
        reads: set[str] = _named(predicate)
        writes: set[str] = set()
        if name in _STORES:
            reads |= _address(operands[0]) | _registers(operands[1], access)
        elif name in _LOADS:
            writes |= _registers(operands[0], access)
            reads |= _address(",".join(operands[1:]))
        elif name in _CONTROL:
            reads |= set().union(*map(_named, operands))
        elif operands:
            results = 2 if "SETP" in name or name == "PLOP3" else 1
            # IADD3 and LEA may also write carries, which are predicates behind the result.
            while (
                name in ("IADD3", "LEA", "IMAD") and results < len(operands) and re.match(r"P[T\d]", operands[results])
            ):
                results += 1
            double = name in _DOUBLES
            wide = double or any(part in operation for part in (".WIDE", ".F64.F32", ".F64.F16"))
            for operand in operands[:results]:
                writes |= _registers(operand, 2 if wide else 1) | _named(operand)
            for k, operand in enumerate(operands[results:]):
                pair = double or "F32.F64" in operation or ".64" in operand or (".WIDE" in operation and k == 2)
                reads |= _registers(operand, 2 if pair else 1) | _named(operand)
        return frozenset(reads), frozenset(writes)

    @property
    def reads(self) -> frozenset[str]:
        """Registers and predicates that it needs."""
        return self._effect[0]

    @property
    def writes(self) -> frozenset[str]:
        """Registers and predicates that it sets."""
        return self._effect[1]

    def cycles(self, device: Device) -> int:
        """From its issue until what it writes can be read."""
        if self.name == "LDG":
            return round(device.latency * device.clock) if self.is_vector_load else _CACHED_CYCLES
        if self.name in ("LDS", "LDC"):
            return _SHARED_CYCLES
        return _CYCLES.get(self.name, 9 if self.name in _DOUBLES else 5)


@dataclass(frozen=True)
class Loop:
    """An innermost loop with vector loads.

    Attributes:
        address: of its first instruction in the kernel.
        instructions: of one pass.
        loads, stores: accesses of 16 bytes in one pass.
        in_flight: vectors that a thread waits for together, on average over the stalls of a pass.
        issue, pipe, latency: times of one pass, over the time that the memory needs for its bytes.
    """

    address: int
    instructions: int
    loads: int
    stores: int
    in_flight: float
    issue: float
    pipe: float
    latency: float

    @property
    def slowest(self) -> float:
        """Above 1 something else than the memory's bandwidth bounds the loop."""
        return max(self.issue, self.pipe, self.latency)


def instructions(text: str) -> list[Instruction]:
    """The instructions of one function in the output of ``cuobjdump -sass``."""
    found = re.finditer(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?)\s*;", text, re.MULTILINE)
    return [Instruction(int(line[1], 16), line[2]) for line in found]


def _bodies(code: Sequence[Instruction]) -> Iterator[Sequence[Instruction]]:
    """The innermost loops: from the target of a branch backwards up to the branch."""
    place = {instruction.address: k for k, instruction in enumerate(code)}
    spans = []
    for end, instruction in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", instruction.text) if instruction.name == "BRA" else None
        begin = place.get(int(target[1], 16)) if target else None
        if begin is not None and begin < end:
            spans.append((begin, end))
    for begin, end in spans:
        if not any((b, e) != (begin, end) and b >= begin and e <= end for b, e in spans):
            yield code[begin : end + 1]


def _alone(body: Sequence[Instruction], device: Device) -> tuple[int, float]:
    """Cycles in which one warp issues a pass in order, and vectors in flight at its stalls."""
    ready: dict[str, int] = {}
    from_memory: set[str] = set()
    arrivals: list[int] = []
    waiting: list[int] = []
    now = 0
    for instruction in body:
        late = {r for r in instruction.reads | instruction.writes if ready.get(r, 0) > now}
        if late:
            last = max(late, key=lambda r: ready[r])
            if last in from_memory:
                waiting.append(sum(arrival > now for arrival in arrivals))
            now = ready[last]
        done = now + instruction.cycles(device)
        for register in instruction.writes:
            ready[register] = done
            (from_memory.add if instruction.is_vector_load else from_memory.discard)(register)
        if instruction.is_vector_load:
            arrivals.append(done)
        now += 1
    return now, sum(waiting) / len(waiting) if waiting else float(len(arrivals))


def loops(code: Sequence[Instruction], threads: int, device: Device) -> list[Loop]:
    """The vector loops of a kernel of which so many threads are on a multiprocessor at a time."""
    found = []
    for body in _bodies(code):
        loads = sum(instruction.is_vector_load for instruction in body)
        if loads == 0:
            continue
        stores = sum(instruction.name == "STG" and ".128" in instruction.operation for instruction in body)
        per_cycle = device.bandwidth / device.multiprocessors / device.clock  # bytes of a multiprocessor
        memory = _VECTOR * _WARP * (loads + stores) / per_cycle
        busy = [
            sum(instruction.name in names for instruction in body) * _WARP / rate for names, rate in _UNITS.values()
        ]
        alone, in_flight = _alone(body, device)
        latency = alone / (threads / _WARP)
        found.append(
            Loop(
                body[0].address,
                len(body),
                loads,
                stores,
                in_flight,
                len(body) / _SCHEDULERS / memory,
                max(busy) / memory,
                latency / memory,
            )
        )
    return found
