"""What an instruction reads and writes of a device's main memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from gemmary.plan.program import Program
from gemmary.plan.program_text import Computation, Instruction, Shape

__all__ = ["Memory", "is_part_of_async"]

# Names for what is there already, or instructions whose parts are counted by themselves.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all", "partition-id",
    "replica-id", "optimization-barrier", "async-start", "add-dependency", "domain",
}  # fmt: skip
_VIEWS = {"bitcast", "get-tuple-element"}
_SLICES = {"dynamic-slice", "slice", "gather"}


def is_part_of_async(instruction: Instruction) -> bool:
    """Whether this is a piece of a collective that began in an earlier fusion: a TPU's kernels carry each other's collectives on."""
    if instruction.opcode == "custom-call":
        return instruction.quoted("custom_call_target") == "AsyncCollectiveDone"
    return (
        '"async_collective_fusion_config":{"flag_start"' in instruction.attributes
        and '"flag_start":"-1"' not in instruction.attributes
    )


class Memory:
    """Traffic of a program's instructions."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._users: dict[str, dict[str, list[Instruction]]] = {}

    def traffic(self, computation: Computation, one: Instruction) -> int:
        """Bytes that one run of an instruction reads and writes; 0 for those whose parts are counted by themselves."""
        if one.opcode in _FREE or one.opcode.endswith(("-done", "-update")):
            return 0
        if one.opcode.endswith("-start") or one.opcode in ("send", "recv"):
            return _main(one.shapes)  # a start's result holds its operand too
        made = [computation.operand(one, i) for i in range(len(one.operands))]
        if one.opcode == "fusion" and one.called and one.called[0] in self._program.computations:
            return self._fusion(self._program.computations[one.called[0]], one, made)
        if one.opcode in _SLICES and made[0]:
            return _main(one.shapes) + (one.bytes if _main(made[0].shapes) else 0)
        if one.opcode == "dynamic-update-slice" and made[1]:
            return _main(made[1].shapes) + (made[1].bytes if _main(one.shapes) else 0)
        return _main(one.shapes) + sum(_main(each.shapes) for each in made if each)

    def _fusion(self, inner: Computation, one: Instruction, made: Iterable[Instruction | None]) -> int:
        total = 0
        parameters = {int(p.literal): p for p in inner.instructions.values() if p.opcode == "parameter"}
        for number, given in enumerate(made):
            if given and number in parameters and (full := _main(given.shapes)):
                total += self._read(inner, parameters[number].name, full)
        written = self._written(inner, inner.instructions[inner.root])
        return total + sum(size for size, shape in zip(written, one.shapes, strict=False) if not shape.space)

    def _read(self, computation: Computation, name: str, full: int) -> int:
        """Bytes of a value of `full` bytes that are read inside a fusion."""
        total = 0
        for user in self._uses(computation).get(name, ()):
            if user.opcode in _VIEWS:
                total += self._read(computation, user.name, full)
            elif user.opcode == "fusion" and user.called[0] in self._program.computations:
                inner = self._program.computations[user.called[0]]
                for parameter in inner.instructions.values():
                    if parameter.opcode == "parameter" and user.operands[int(parameter.literal)] == name:
                        total += self._read(inner, parameter.name, full)
            elif user.opcode in _SLICES and user.operands[0] == name:
                total += user.bytes
            elif user.opcode == "dynamic-update-slice" and user.operands[1] != name:
                continue
            elif user.opcode != "tuple" and not is_part_of_async(user):
                total += full
        return min(total, full)

    def _written(self, computation: Computation, one: Instruction) -> list[int]:
        """Bytes that a fusion writes of each array of its result; what it hands on, or changes in place, is not written."""
        before = computation.operand(one, 0)
        if one.opcode == "tuple":
            each = (computation.operand(one, i) for i in range(len(one.operands)))
            return [size for made in each if made for size in self._written(computation, made)]
        if one.opcode == "parameter" or is_part_of_async(one):
            return [0] * len(one.shapes)
        if one.opcode == "custom-call" and one.quoted("custom_call_target") == "AsyncCollectiveStart":
            return [0, *(shape.bytes for shape in one.shapes[1:2])]
        if one.opcode == "bitcast" and before:
            return self._written(computation, before)
        if one.opcode == "dynamic-update-slice" and (update := computation.operand(one, 1)):
            return [update.bytes]
        if one.opcode == "fusion" and (inner := self._program.computations.get(one.called[0])):
            return self._written(inner, inner.instructions[inner.root])
        if one.opcode == "get-tuple-element" and before and before.opcode == "fusion":
            return [self._written(computation, before)[int(one.attribute("index") or 0)]]
        return [shape.bytes for shape in one.shapes]

    def _uses(self, computation: Computation) -> dict[str, list[Instruction]]:
        if computation.name not in self._users:
            uses: dict[str, list[Instruction]] = defaultdict(list)
            for one in computation.instructions.values():
                for name in dict.fromkeys(one.operands):
                    uses[name].append(one)
            self._users[computation.name] = uses
        return self._users[computation.name]


def _main(shapes: Iterable[Shape]) -> int:
    return sum(shape.bytes for shape in shapes if not shape.space)
