"""Tests as an expression and the value that it should have, and the comparison of what a sandbox sent with that value."""

from __future__ import annotations

import ast
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from gemmary.errors import GemmaryError

__all__ = ["Assertion", "check_tests", "parse_tests", "same"]

_RELATIVE = 1e-9  # between floats that count as equal


class Assertion(NamedTuple):
    """The expression is for the sandbox; `expected` never enters it."""

    expression: str
    expected: object


def check_tests(tests: Sequence[str]) -> None:
    """Every test has a form that the sandbox can judge, and there is at least one; else GemmaryError, which names the test.

    The forms: `assert <expression> == <literal>`, `assert <expression> is None` (True, False), `assert <expression>` (True)
    and `assert not <expression>` (False); a message may follow. Where True or False is expected, the expression holds no
    comparison: the sandbox would do it, and cannot be trusted to. Literals are of int, float, bool, None, str, bytes, list,
    tuple, dict and set.
    """
    parse_tests(tests)


def parse_tests(tests: Sequence[str]) -> list[Assertion]:
    """What `check_tests` checks, taken apart."""
    if isinstance(tests, str) or not tests:
        raise GemmaryError("a candidate needs a list of at least one test: without tests every code would pass")
    return [_parse(test) for test in tests]


@functools.lru_cache(2**12)
def _parse(test: str) -> Assertion:
    try:
        match ast.parse(test.strip()).body:
            case [ast.Assert(test=ast.Compare(left=left, ops=[ast.Eq()], comparators=[right]))]:
                expected = _literal(right)
            case [ast.Assert(test=ast.Compare(left=left, ops=[ast.Is()], comparators=[ast.Constant(value=value)]))] if (
                value is None or isinstance(value, bool)
            ):
                expected = value
            case [ast.Assert(test=ast.UnaryOp(op=ast.Not(), operand=left))]:
                expected = False
            case [ast.Assert(test=left)]:
                expected = True
            case _:
                raise ValueError("it is not one `assert`")
        if isinstance(expected, bool) and any(isinstance(part, ast.Compare) for part in ast.walk(left)):
            raise ValueError("the sandbox would have to compare; give it as `assert <expression> == <literal>`")
        return Assertion(ast.unparse(left), expected)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise GemmaryError(f"the test {test[:200]!r} cannot be judged: {error}") from None


def _literal(node: ast.expr) -> object:
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError):
        raise ValueError(f"`{ast.unparse(node)[:100]}` is no literal") from None
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, complex | type(...)):
            raise ValueError(f"{part.value} is not of a type that can be compared")
    return value


def _same_number(expected: Any, found: Any) -> bool:
    """As Python has it, an int may be a float's equal; of floats, those that are near count, and nan is nan."""
    if type(expected) is type(found) is int:
        return bool(expected == found)
    try:
        return math.isclose(expected, found, rel_tol=_RELATIVE) or (math.isnan(expected) and math.isnan(found))
    except OverflowError:  # an int beyond all floats
        return False


def same(expected: object, found: object) -> bool:
    """Whether `found`, any JSON at all, is the harness's encoding of the value. The recursion follows the literal."""
    kind = type(expected)
    if kind in (int, float) and type(found) in (int, float):
        return _same_number(expected, found)
    if expected is None or isinstance(expected, bool | int | str):
        return type(found) is kind and found == expected
    if not isinstance(found, list) or len(found) != 2 or found[0] != kind.__name__:
        return False
    content = found[1]
    if isinstance(expected, bytes):
        return type(content) is str and content == expected.hex()
    if not isinstance(content, list) or not isinstance(expected, list | tuple | set | dict):
        return False
    if len(content) != len(expected):
        return False
    if isinstance(expected, list | tuple):
        return all(map(same, expected, content))
    # A dictionary's items are pairs, which come without a tag.
    left = [["tuple", item] for item in content] if isinstance(expected, dict) else list(content)
    for item in expected.items() if isinstance(expected, dict) else expected:
        place = next((i for i, other in enumerate(left) if same(item, other)), None)
        if place is None:
            return False
        del left[place]
    return True
