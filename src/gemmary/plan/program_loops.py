"""How often a loop's body runs: from what XLA notes about it, else from its counter's start, step and bound."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from gemmary.plan.program_text import Computation, Instruction

__all__ = ["trips_of"]

_KNOWN = re.compile(r'"known_trip_count":\{"n":"?(\d+)"?\}')
_PASSED_ON = {"copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "optimization-barrier"}
_DEPTH = 64  # of what a value is followed through; real programs need ten


@dataclass(frozen=True)
class _Place:
    """An instruction, and what its computation's parameters stand for; `ring` ties a loop's parameter to nothing."""

    computation: Computation
    instruction: Instruction
    given: tuple[_Place, ...] = ()


def trips_of(loop: Instruction, around: Computation, computations: Mapping[str, Computation]) -> int | None:
    """How often the body of a `while` in the computation `around` runs; None where the text does not tell.

    XLA's CPU and GPU compilers note the count. The TPU's does not: there the condition compares a counter, which starts from a
    constant and goes up or down by one, with a bound.
    """
    if known := _KNOWN.search(loop.attributes):
        return int(known[1])
    condition = computations.get((loop.attribute("condition") or "").lstrip("%"))
    body = computations.get((loop.attribute("body") or "").lstrip("%"))
    start = around.operand(loop, 0)
    if condition is None or body is None or start is None:
        return None
    found = _Reader(computations)
    test = found.source(_Place(condition, condition.instructions[condition.root]))
    if test is None or test.instruction.opcode != "compare":
        return None
    left, right = (found.source(found.operand(test, i)) for i in (0, 1))
    direction = test.instruction.attribute("direction")
    counter, bound = _element(left), right
    if counter is None:  # the bound stands first
        counter, bound = _element(right), left
        direction = {"GT": "LT", "GE": "LE", "LT": "GT", "LE": "GE"}.get(direction or "", direction)
    if counter is None:
        return None
    begin = found.number(found.part(_Place(around, start), counter))
    step = found.step(body, counter)
    # What the loop carries unchanged may be the bound: then it is what it was at the start.
    end = found.number(found.part(_Place(around, start), index) if (index := _element(bound)) is not None else bound)
    if begin is None or step is None or end is None or not step:
        return None
    apart = {"LT": end - begin, "LE": end - begin + 1, "GT": end - begin, "GE": end - begin - 1, "NE": end - begin}
    return None if direction not in apart else max(math.ceil(apart[direction] / step), 0)


def _element(place: _Place | None) -> int | None:
    """The tuple's index, where a value is an element of what the computation was given; 0 where it is all of it."""
    if place is None:
        return None
    if place.instruction.opcode == "parameter":
        return 0
    if place.instruction.opcode != "get-tuple-element":
        return None
    whole = place.computation.operand(place.instruction, 0)
    return int(place.instruction.attribute("index") or 0) if whole and whole.opcode == "parameter" else None


class _Reader:
    """Follows values to where they are made, through copies, tuples and calls."""

    def __init__(self, computations: Mapping[str, Computation]) -> None:
        self.computations = computations

    def operand(self, place: _Place | None, index: int) -> _Place | None:
        """The instruction that makes an operand."""
        made = place.computation.operand(place.instruction, index) if place else None
        return _Place(place.computation, made, place.given) if place and made else None

    def source(self, place: _Place | None) -> _Place | None:
        """Where a value is made."""
        for _ in range(_DEPTH):
            if place is None:
                return None
            one = place.instruction
            inner = self.computations.get(one.called[0]) if one.called and one.opcode in ("fusion", "call") else None
            if one.opcode in _PASSED_ON:
                place = self.operand(place, 0)
            elif inner is not None:
                given = tuple(g for i in range(len(one.operands)) if (g := self.operand(place, i)))
                place = _Place(inner, inner.instructions[inner.root], given)
            elif one.opcode == "parameter" and place.given:
                place = place.given[int(one.literal)] if int(one.literal) < len(place.given) else None
            elif one.opcode == "get-tuple-element":
                whole = self.source(self.operand(place, 0))
                if whole is None or whole.instruction.opcode != "tuple":
                    return place
                place = self.operand(whole, int(one.attribute("index") or 0))
            else:
                return place
        return None

    def part(self, place: _Place | None, index: int) -> _Place | None:
        """An element of a tuple, or the value itself where it is none."""
        whole = self.source(place)
        return self.operand(whole, index) if whole and whole.instruction.opcode == "tuple" else whole

    def number(self, place: _Place | None) -> int | None:
        """A whole number that the text has, or that sums of such are."""
        place = self.source(place)
        if place is None:
            return None
        one = place.instruction
        if one.opcode == "constant":
            return int(one.literal) if re.fullmatch(r"-?\d+", one.literal) else None
        if one.opcode in ("add", "subtract"):
            left, right = (self.number(self.operand(place, i)) for i in (0, 1))
            if left is not None and right is not None:
                return left + right if one.opcode == "add" else left - right
        return None

    def step(self, body: Computation, counter: int) -> int | None:
        """By how much a loop's body moves its counter."""
        place = self.source(self.part(_Place(body, body.instructions[body.root]), counter))
        if place is None or place.instruction.opcode not in ("add", "subtract"):
            return None
        left, right = (self.operand(place, i) for i in (0, 1))
        if place.instruction.opcode == "add" and self.number(left) is not None:
            left, right = right, left
        by = self.number(right)
        if by is None or _element(self.source(left)) != counter:
            return None
        return by if place.instruction.opcode == "add" else -by
