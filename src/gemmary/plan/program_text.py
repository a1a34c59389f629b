"""The text of an optimized HLO module, taken apart: computations, their instructions in order, shapes.

What XLA prints (`compiled.as_text()`) is one instruction a line: a name, a shape, an opcode, operands, attributes. Each is read once,
left to right; attributes stay text, of which a reader takes what it needs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from gemmary.errors import GemmaryError

__all__ = ["Computation", "Instruction", "Shape", "computations_of", "shapes_in"]

# Bits of an element. Tokens and opaque values have none.
_BITS = {
    "pred": 8,
    "bf16": 16,
    "f16": 16,
    "f32": 32,
    "f64": 64,
    "tf32": 32,
    "c64": 64,
    "c128": 128,
    "token": 0,
    "opaque": 0,
}
_SIZED = re.compile(r"[sufb]+(\d+)")  # s32, u4, f8e4m3fn, f4e2m1fn
_SHAPE = re.compile(r"([a-z][a-z0-9]*)\[([^\]]*)\](?:\{([^}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_NAME = re.compile(r"%([\w.\-]+)")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+)\s*\(.*\{\s*$")


@dataclass(frozen=True, slots=True)
class Shape:
    """One array. `space` is where it lies: 0 is the device's main memory, others are nearer (5 is the host's)."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def elements(self) -> int:
        """How many there are."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """What they take, padding left out."""
        bits = _BITS.get(self.dtype)
        if bits is None:
            sized = _SIZED.match(self.dtype)
            bits = int(sized[1]) if sized else 0
        return (self.elements * bits + 7) // 8


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line. `shapes` are its result's arrays, a tuple's one after another; `literal` is what a constant or a parameter has in
    place of operands; `called` are the computations it names, a loop's condition first."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    literal: str
    attributes: str
    called: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Of all its result's arrays."""
        return sum(shape.bytes for shape in self.shapes)

    def attribute(self, name: str) -> str | None:
        """What stands behind `name=`, up to the comma that ends it; None where it is not there."""
        found = re.search(rf"(?<![\w\"]){re.escape(name)}=", self.attributes)
        return _balanced(self.attributes, found.end()) if found else None

    def quoted(self, name: str) -> str | None:
        """What stands in quotes behind `name=`."""
        found = re.search(rf'\b{re.escape(name)}="([^"]*)"', self.attributes)
        return found[1] if found else None


@dataclass(frozen=True, slots=True)
class Computation:
    """Instructions by name, in the order in which they are printed: where the module is scheduled, that in which they run."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""

    def operand(self, instruction: Instruction, index: int) -> Instruction | None:
        """The instruction that makes an operand; None where there is none."""
        if index >= len(instruction.operands):
            return None
        return self.instructions.get(instruction.operands[index])


def computations_of(text: str) -> tuple[dict[str, Computation], str]:
    """All computations, callees before callers as XLA prints them, and the entry's name.

    Raises GemmaryError for text that is not an HLO module's.
    """
    if not text.startswith("HloModule"):
        raise GemmaryError("this is not the text of an HLO module: give what compiled.as_text() returns")
    found: dict[str, Computation] = {}
    entry, current = "", None
    for line in _lines(text):
        if line.startswith(" "):
            if current is None or not (head := _LINE.match(line)):
                continue
            instruction = _instruction(head[2], line, head.end())
            current.instructions[instruction.name] = instruction
            if head[1]:
                found[current.name] = current = Computation(current.name, current.instructions, instruction.name)
        elif line.startswith(("%", "ENTRY ")) and (head := _HEAD.match(line)):
            current = found[head[2]] = Computation(head[2])
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
    if not entry:
        raise GemmaryError("this HLO module has no entry computation: it may have been cut short")
    return found, entry


def _lines(text: str) -> Iterator[str]:
    """Lines, each with those that go on with it: what a kernel says of itself is printed over several."""
    start, held = 0, ""
    while start < len(text):
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        line = text[start:end]
        start = end + 1
        if line.startswith(('"', "}}")):
            held += line
            continue
        yield held
        held = line
    yield held


def _instruction(name: str, line: str, start: int) -> Instruction:
    shape_end = _closing(line, start) if line[start] == "(" else line.find(" ", start)
    opened = line.find("(", shape_end)
    closed = _closing(line, opened)
    opcode, inside, attributes = line[shape_end:opened].strip(), line[opened + 1 : closed - 1], line[closed:]
    literal = inside if opcode in ("constant", "parameter") else ""
    called = _CALLED.findall(attributes)
    if branches := _BRANCHES.search(attributes):
        called += _NAME.findall(branches[1])
    operands = () if literal else tuple(_NAME.findall(inside))
    return Instruction(name, opcode, shapes_in(line[start:shape_end]), operands, literal, attributes, tuple(called))


def _closing(line: str, start: int) -> int:
    """Behind the bracket that closes the one at `start`; the line's end where none does."""
    depth = 0
    for found in re.compile(r"[()]").finditer(line, start):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return found.end()
    return len(line)


def _balanced(text: str, start: int) -> str:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in "{([") - (text[i] in "})]")
        if depth < 0 or (not depth and text[i] == ","):
            return text[start:i]
    return text[start:]


@lru_cache(maxsize=65536)
def shapes_in(text: str) -> tuple[Shape, ...]:
    """The arrays of a printed shape, a tuple's in order."""
    found = []
    for dtype, dims, layout in _SHAPE.findall(text):
        space = _SPACE.search(layout)
        sizes = tuple(int(dim.lstrip("<=")) for dim in dims.split(",") if dim)
        found.append(Shape(dtype, sizes, int(space[1]) if space else 0))
    return tuple(found)
