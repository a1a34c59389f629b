"""A compiled program as data: what runs, how often, and which loops nobody knows the length of.

`read_program` takes the text of an optimized HLO module, as XLA's compilers for CPU, TPU and GPU print it. What a program does to
memory and arithmetic is in `program_costs`, what it sends in `program_collectives`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from gemmary.plan.program_loops import trips_of
from gemmary.plan.program_text import Computation, Instruction, computations_of

__all__ = ["Program", "calls_of", "read_program"]

# Their computations say how two numbers are combined; what that costs belongs to the instruction itself.
_COMBINING = {
    "all-reduce", "all-reduce-start", "reduce", "reduce-scatter", "reduce-window", "scatter", "select-and-scatter", "sort", "map", "topk",
}  # fmt: skip


@dataclass(frozen=True)
class Program:
    """One device's program; all devices run the same.

    `devices` is how many it was compiled for (of a program over several TPU slices: those of one slice). `trips` has every loop's
    body count by the loop's name; a loop of `unknown_loops` counts as 1. `times` is how often each computation runs in all. All
    branches of a conditional count once each time it runs, which is an upper bound. `fused` are the computations that are inside
    one kernel.
    """

    computations: dict[str, Computation]
    entry: str
    devices: int
    scheduled: bool
    trips: dict[str, int]
    unknown_loops: tuple[str, ...]
    times: dict[str, int]
    fused: frozenset[str]

    def instructions(self, *opcodes: str) -> Iterator[tuple[Instruction, int]]:
        """All that run, or those of the given opcodes, each with how often it does; what is inside fusions too."""
        for name, times in self.times.items():
            for instruction in self.computations[name].instructions.values():
                if not opcodes or instruction.opcode in opcodes:
                    yield instruction, times


def read_program(text: str) -> Program:
    """An optimized HLO module's text as a `Program`. Time is linear in the text: some seconds for tens of megabytes.

    Raises GemmaryError for text that is not an HLO module's.
    """
    computations, entry = computations_of(text)
    trips: dict[str, int] = {}
    unknown = []
    for computation in computations.values():
        for one in computation.instructions.values():
            if one.opcode == "while":
                found = trips_of(one, computation, computations)
                trips[one.name] = 1 if found is None else found
                unknown += [one.name] if found is None else []
    times, fused = _walk(computations, entry, trips)
    head = text[: text.find("\n")]
    partitions = re.search(r"\bnum_partitions=(\d+)", head)
    replicas = re.search(r"\breplica_count=(\d+)", head)
    devices = int(partitions[1] if partitions else 1) * int(replicas[1] if replicas else 1)
    unknown = [name for name in unknown if any(name in computations[one].instructions for one in times)]
    return Program(
        computations, entry, devices, "is_scheduled=true" in head, trips, tuple(unknown), times, frozenset(fused)
    )


def calls_of(instruction: Instruction, trips: dict[str, int]) -> Iterator[tuple[str, int]]:
    """The computations that an instruction runs, each with how often; a loop's condition runs once more than its body."""
    if instruction.opcode in _COMBINING or instruction.opcode.endswith(("-done", "-update")):
        return
    if instruction.opcode != "while":
        yield from ((name, 1) for name in instruction.called)
        return
    count = trips.get(instruction.name, 1)
    for part, more in (("condition", 1), ("body", 0)):
        if name := (instruction.attribute(part) or "").lstrip("%"):
            yield name, count + more


def _walk(computations: dict[str, Computation], entry: str, trips: dict[str, int]) -> tuple[dict[str, int], set[str]]:
    """How often each runs, and which are fused. Callees are printed before callers, so that one pass from the end finds all."""
    times = {entry: 1}
    fused: set[str] = set()
    for name in reversed(computations):
        if not (runs := times.get(name)):
            continue
        for instruction in computations[name].instructions.values():
            for callee, count in calls_of(instruction, trips):
                if callee in computations and count:
                    times[callee] = times.get(callee, 0) + runs * count
                    if instruction.opcode == "fusion" or name in fused:
                        fused.add(callee)
    return times, fused
