"""Whether generated code passes its tests, where the code is hostile.

Expected values never enter the candidate's process. For `passes`, a test is `assert <expression> == <literal>`; a fresh
interpreter loads the code, evaluates the expressions and sends their values out, and this process compares them with the literals.
For `checks`, a test is a program; it runs in an interpreter of its own, and calls the code in the candidate's by messages. Nothing
that comes from the candidate is trusted: no exit code, no object with an equality of its own, no output but well-formed values. A
cheat can stop its own run, or send values that it did not compute; it passes only where these are the right ones.

What remains: code that knows or guesses the values. Literals that were seen in training can be hard-coded, and `True` is right
in half of all tests of a predicate; against both only tests that the model has not seen, and more of them, are of use. What
remains too is a hole in the kernel. In the layer "rlimits" there are no namespaces: code runs as this user, reads and deletes
what this user can, and may find the literals in a file or in this process's memory.
"""

from __future__ import annotations

import json
import os
import re
import textwrap
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from typing import NamedTuple

from gemmary.errors import GemmaryError
from gemmary.evaluate.assertions import Assertion, check_tests, parse_tests, same
from gemmary.evaluate.calling import CANDIDATE, CHECKER
from gemmary.evaluate.harness import HARNESS
from gemmary.evaluate.isolation import (
    Limits,
    confinement,
    interpreter,
    interpreters_in_bubblewrap,
    output,
    running,
    trial,
)
from gemmary.evaluate.programs import Program, answering, check_program, parse_program

__all__ = ["Limits", "Sandbox", "Verdict", "check_program", "check_tests", "find_code"]

_SHOWN = 80  # characters of an expression or a line
_FENCE = re.compile(r"```[ \t]*([\w+.-]*)[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)


class Verdict(NamedTuple):
    """`reason` is "passed", "wrong value for `f(2)`", "raised ValueError", "timed out", "too much output" or "no result".

    Of a test program also "failed `assert f(2) == 3`", the line whose assertion did not hold, and "cannot send function in `f(g)`".
    """

    passed: bool
    reason: str


_LIMITS = Limits()


class Sandbox:
    """Runs candidates, each in an interpreter of its own with the standard library only.

    `layer` says what isolates them: "bubblewrap" (user, mount, process, network, IPC and host name namespaces, no
    capabilities, a read-only system without this user's files) or, only where `allow_unsandboxed` is set and bubblewrap does
    not work here, "rlimits". Both have resource limits, no new privileges and, on x86-64 and arm64, a system call filter
    that knows neither processes nor sockets. GemmaryError where neither layer is to be had.
    """

    layer: str

    def __init__(self, limits: Limits = _LIMITS, *, allow_unsandboxed: bool = False) -> None:
        self.limits = limits
        said = "bubblewrap (bwrap) is not installed"
        for command in interpreters_in_bubblewrap(limits):
            if (said := self._trial(command)) == "":
                self.layer, self._command = "bubblewrap", command
                return
        if not allow_unsandboxed:
            raise GemmaryError(
                f"generated code needs a sandbox: {said}. Install bubblewrap and allow user namespaces, or accept resource "
                "limits only, with allow_unsandboxed (--allow-unsandboxed)"
            )
        self.layer, self._command = "rlimits", interpreter()
        if said := self._trial(self._command):
            raise GemmaryError(f"generated code cannot be run here: {said}")

    def passes(self, code: str, tests: Sequence[str]) -> Verdict:
        """Whether the code loads and every test's value is right, in type and value (an int may be a float's equal, a bool is neither).

        Floats may differ by 1e-9 of the greater. Values of any class but int, float, bool, str, bytes, list, tuple, dict
        (Counter, OrderedDict and defaultdict too), set and None are wrong. The tests run in their order in one namespace; the
        reason names the first that fails. GemmaryError where a test is not of a form that `check_tests` allows.
        """
        parsed = parse_tests(tests)
        deadline = time.monotonic() + self.limits.seconds
        request = self._request(code, [test.expression for test in parsed])
        with running([*self._command, HARNESS], request) as pipe:
            sent = output(pipe, self.limits.output_bytes, deadline)
        if isinstance(sent, str):
            return Verdict(False, sent)
        try:
            found = json.loads(sent)
        except (ValueError, RecursionError):
            return Verdict(False, "no result")
        return _judged(parsed, found)

    def passes_all(
        self, candidates: Sequence[tuple[str, Sequence[str]]], *, workers: int | None = None
    ) -> list[Verdict]:
        """`passes` of every (code, tests), in their order, `workers` at a time (the processors' number by default).

        Bad tests raise before any code runs.
        """
        for _, tests in candidates:
            check_tests(tests)
        with ThreadPoolExecutor(workers or os.cpu_count() or 1, "sandbox") as pool:
            return list(pool.map(lambda candidate: self.passes(*candidate), candidates))

    def checks(self, code: str, program: str, *, seconds: float | None = None) -> Verdict:
        """Whether the test program runs to its end, with the names that it does not define taken from the code.

        Two interpreters, each confined as in `passes`: one holds the code and answers calls, one runs the program. What the code
        returns arrives as values of exact built-in types or, where it is anything else, as an object that is equal to itself only
        and always true. Its exceptions arrive as the nearest built-in ones. Arguments are copies; where a call returns None, what
        it did to them comes back. `programs.parse_program` says which names are the code's, and which programs are refused
        (GemmaryError). A program that ends with `check(NAME)` may have its prompt in front. Where it has not and asks for more names, those that
        the code defines before NAME come from a third interpreter, of that beginning alone: the prompt's, where a candidate
        goes on from one. `seconds` in place of the limits' are for all of it.
        """
        return self.checks_all([(code, program)], workers=1, seconds=seconds)[0]

    def checks_all(
        self, candidates: Sequence[tuple[str, str]], *, workers: int | None = None, seconds: float | None = None
    ) -> list[Verdict]:
        """`checks` of every (code, program), in their order, `workers` at a time (the processors' number by default).

        Bad programs raise before any code runs.
        """
        limits = self.limits if seconds is None else replace(self.limits, seconds=seconds)
        programs = [parse_program(program) for _, program in candidates]
        asked = [answering(code, program) for (code, _), program in zip(candidates, programs, strict=True)]
        with ThreadPoolExecutor(workers or os.cpu_count() or 1, "sandbox") as pool:
            return list(pool.map(lambda *one: self._checked(*one, limits=limits), programs, asked))

    def _request(self, code: str, expressions: list[str]) -> bytes:
        return json.dumps({"code": code, "expressions": expressions, **confinement(self.limits)}).encode()

    def _trial(self, command: list[str]) -> str:
        """Why the command does not run an honest candidate; empty where it does."""
        return trial([*command, HARNESS], self._request("x = 1", ["x"]), b"[[true, 1]]")

    def _checked(self, program: Program, asked: tuple[list[str], dict[str, int]], *, limits: Limits) -> Verdict:
        deadline = time.monotonic() + limits.seconds
        codes, names = asked
        bounds = confinement(limits)
        with ExitStack() as stack:
            # Only what is named reaches a process, and this one keeps no end: where one dies, the other sees the pipe close.
            theirs = stack.enter_context(ExitStack())
            lines = []
            for each in codes:
                (taken, requests), (answers, given_back) = _pipe(theirs), _pipe(theirs)
                lines.append((requests, answers))
                given = {"code": each, "requests": taken, "answers": given_back, **bounds}
                command = [*self._command, CANDIDATE]
                stack.enter_context(running(command, json.dumps(given).encode(), (taken, given_back)))
            given = {
                "program": program.source, "names": names, "modules": program.modules, "lines": lines,
                "most": limits.output_bytes, **bounds,
            }  # fmt: skip
            command, passed_on = [*self._command, CHECKER], [end for line in lines for end in line]
            said = stack.enter_context(running(command, json.dumps(given).encode(), passed_on))
            theirs.close()
            return _concluded(program, output(said, limits.output_bytes, deadline))


def _pipe(stack: ExitStack) -> tuple[int, int]:
    ends = os.pipe()
    for end in ends:
        stack.callback(os.close, end)
    return ends


def _concluded(program: Program, said: bytes | str) -> Verdict:
    """From what the checker's process said: it runs nobody's code but the program's."""
    if isinstance(said, str):
        return Verdict(False, said)
    what, exception, line = json.loads(said)
    place = f" `{_shown(text)}`" if (text := program.line(line)) else ""
    if what == "failed":
        return Verdict(False, f"failed{place}")
    if what == "raised":
        return Verdict(False, _raised(exception) + (place and f" in{place}"))
    return Verdict(
        what == "passed", what if what in ("passed", "no result", "too much output") else f"{what} in{place}"
    )


def _judged(tests: list[Assertion], found: object) -> Verdict:
    """`found` is any JSON at all."""
    if isinstance(found, dict) and set(found) == {"raised"}:
        return Verdict(False, _raised(found["raised"]))
    if not isinstance(found, list) or len(found) != len(tests):
        return Verdict(False, "no result")
    for test, outcome in zip(tests, found, strict=True):
        shown = _shown(test.expression)
        match outcome:
            case [True, value] if same(test.expected, value):
                continue
            case [True, _]:
                return Verdict(False, f"wrong value for `{shown}`")
            case [False, name]:
                return Verdict(False, f"{_raised(name)} in `{shown}`")
            case _:
                return Verdict(False, "no result")
    return Verdict(True, "passed")


def _shown(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def _raised(name: object) -> str:
    plain = isinstance(name, str) and name.isascii() and name.isidentifier() and len(name) <= _SHOWN
    return f"raised {name}" if plain else "raised an exception"


def find_code(answer: str) -> str:
    """The Python in a model's answer: its first block fenced as Python, else its first fenced block, else all of it.

    A fence that is not closed ends with the answer; a block's common indent is taken away.
    """
    blocks = _FENCE.findall(answer.replace("\r\n", "\n"))
    for tag, block in blocks:
        if tag.lower() in ("python", "py", "python3"):
            return textwrap.dedent(block)
    return textwrap.dedent(blocks[0][1]) if blocks else answer
