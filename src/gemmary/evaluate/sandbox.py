"""Whether generated code passes its tests, where the code is hostile.

Expected values never enter the sandbox. A test is `assert <expression> == <literal>`; a fresh interpreter loads the code,
evaluates the expressions and sends their values out, and this process compares them with the literals. Nothing that comes
out is trusted: no exit code, no object with an equality of its own, no output but one well-formed list of values. A cheat can
stop its own run, or send values that it did not compute; it passes only where these are the right ones.

What remains: code that knows or guesses the values. Literals that were seen in training can be hard-coded, and `True` is right
in half of all tests of a predicate; against both only tests that the model has not seen, and more of them, are of use. What
remains too is a hole in the kernel. In the layer "rlimits" there are no namespaces: code runs as this user, reads and deletes
what this user can, and may find the literals in a file or in this process's memory.
"""

from __future__ import annotations

import glob
import json
import math
import os
import platform
import re
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from gemmary.errors import GemmaryError, check_bounds
from gemmary.evaluate.assertions import Assertion, check_tests, parse_tests, same
from gemmary.evaluate.harness import HARNESS, system_call_filter

__all__ = ["Limits", "Sandbox", "Verdict", "check_tests", "find_code"]

_PROBE_SECONDS = 20.0
_SHOWN = 80  # characters of an expression
_FENCE = re.compile(r"```[ \t]*([\w+.-]*)[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)


class Verdict(NamedTuple):
    """`reason` is "passed", "wrong value for `f(2)`", "raised ValueError", "timed out", "too much output" or "no result"."""

    passed: bool
    reason: str


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one candidate with all its tests; GemmaryError where one is out of bounds."""

    seconds: float = 5.0
    """On the wall clock, the interpreter's start (some 50 ms) included."""
    memory_bytes: int = 512 * 2**20
    """Of address space."""
    output_bytes: int = 64 * 2**10
    """Of all values together, as JSON."""
    scratch_bytes: int = 16 * 2**20
    """Of /tmp in bubblewrap (read-only before its version 0.7), and of one file in either layer."""
    files: int = 64
    """Open at once."""
    threads: int = 64
    """Root's are bounded by memory only. In the layer "rlimits" whatever else the user runs is counted too."""

    def __post_init__(self) -> None:
        check_bounds(
            self,
            seconds=(0.1, 3600), memory_bytes=(2**26, None), output_bytes=(2**10, 2**26), scratch_bytes=(0, None),
            files=(16, None), threads=(1, None),
        )  # fmt: skip


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
        self._confinement = {
            "limits": {
                "RLIMIT_AS": limits.memory_bytes,
                "RLIMIT_CPU": math.ceil(limits.seconds) + 1,  # the wall clock comes first
                "RLIMIT_FSIZE": limits.scratch_bytes,
                "RLIMIT_NOFILE": limits.files,
                "RLIMIT_NPROC": limits.threads,
                "RLIMIT_CORE": 0,
            },
            "filter": system_call_filter(platform.machine()).hex(),
        }
        said = "bubblewrap (bwrap) is not installed"
        for command in _bubblewraps(limits):
            if (said := self._trial(command)) == "":
                self.layer, self._command = "bubblewrap", command
                return
        if not allow_unsandboxed:
            raise GemmaryError(
                f"generated code needs a sandbox: {said}. Install bubblewrap and allow user namespaces, or accept resource "
                "limits only, with allow_unsandboxed (--allow-unsandboxed)"
            )
        self.layer, self._command = "rlimits", _python()
        if said := self._trial(self._command):
            raise GemmaryError(f"generated code cannot be run here: {said}")

    def passes(self, code: str, tests: Sequence[str]) -> Verdict:
        """Whether the code loads and every test's value is right, in type and value (an int may be a float's equal, a bool is neither).

        Floats may differ by 1e-9 of the greater. Values of any class but int, float, bool, str, bytes, list, tuple, dict
        (Counter, OrderedDict and defaultdict too), set and None are wrong. The tests run in their order in one namespace; the
        reason names the first that fails. GemmaryError where a test is not of a form that `check_tests` allows.
        """
        parsed = parse_tests(tests)
        output = self._run(self._request(code, [test.expression for test in parsed]))
        if isinstance(output, str):
            return Verdict(False, output)
        try:
            found = json.loads(output)
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

    def _request(self, code: str, expressions: list[str]) -> bytes:
        return json.dumps({"code": code, "expressions": expressions, **self._confinement}).encode()

    def _trial(self, command: list[str]) -> str:
        """Why the command does not run an honest candidate; empty where it does."""
        try:
            done = subprocess.run(
                command, input=self._request("x = 1", ["x"]), capture_output=True, timeout=_PROBE_SECONDS, env={}, cwd="/"
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"{command[0]} does not work here (no answer in {_PROBE_SECONDS:g} seconds)"
        except OSError as error:
            return f"{command[0]} does not work here ({error})"
        if done.stdout == b"[[true, 1]]":
            return ""
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        return f"{command[0]} does not work here ({last[0]})"

    def _run(self, request: bytes) -> bytes | str:
        """What the candidate sent, or why nothing of it counts. When it returns, the candidate has been killed."""
        deadline = time.monotonic() + self.limits.seconds
        # A file and no pipe: a child that does not read cannot hold this process up.
        with tempfile.TemporaryFile() as given, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            given.write(request)
            given.seek(0)
            with subprocess.Popen(
                self._command, stdin=given, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=folder, env={},
                start_new_session=True,
            ) as process:  # fmt: skip
                assert process.stdout is not None
                try:
                    return _read(process.stdout.fileno(), self.limits.output_bytes, deadline)
                finally:
                    _end(process)


def _read(pipe: int, most: int, deadline: float) -> bytes | str:
    """All that comes until the other end closes."""
    poll = select.poll()  # select() cannot take descriptors from 1024
    poll.register(pipe, select.POLLIN)
    got = bytearray()
    while (left := deadline - time.monotonic()) > 0:
        if not poll.poll(left * 1000):
            break
        chunk = os.read(pipe, 2**16)
        if not chunk:
            return bytes(got) or "no result"
        got += chunk
        if len(got) > most:
            return "too much output"
    return "timed out"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills it and all that it started."""
    with suppress(OSError, subprocess.TimeoutExpired):
        # Bubblewrap's child, the first process of its namespace, goes before bubblewrap, which then reaps it: as an orphan it
        # would stay a zombie wherever process 1 does not reap, as in many containers.
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="ascii").split()
        for child in children:
            os.kill(int(child), signal.SIGKILL)
        if children:
            process.wait(1)
    if process.returncode is None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


def _python() -> list[str]:
    # The base interpreter: a virtual environment's would need that environment's files.
    executable = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    return [executable, "-I", "-S", "-c", HARNESS]


def _bubblewraps(limits: Limits) -> list[list[str]]:
    """Commands to try, best first; none where bubblewrap is not installed."""
    found = shutil.which("bwrap")
    if found is None:
        return []
    python = _python()
    base = os.path.realpath(sys.base_prefix)
    libraries = ["/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", f"{base}/lib", f"{base}/lib64"]
    files = ["/etc/ld.so.cache", "/usr/share/zoneinfo", python[0], sysconfig.get_path("stdlib")]
    shown = [path for path in dict.fromkeys([*libraries, *files]) if os.path.exists(path)]
    # What is installed beside the standard library may be a data set with its answers.
    hidden = {
        path for root in libraries for path in glob.glob(f"{root}/python3*/*-packages") if not os.path.islink(path)
    }
    command = [found, "--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"]
    # Else bubblewrap leaves before the first process of its namespace, an orphan.
    command += ["--as-pid-1"]
    for path in shown:
        command += ["--ro-bind", path, path]
    for path in sorted(hidden):
        command += ["--tmpfs", path, "--remount-ro", path]
    # What is written to a tmpfs is memory that no limit of the process counts: all but /tmp is read-only.
    command += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"]
    rest = ["--remount-ro", "/", "--chdir", "/tmp", "--", *python]
    return [
        [*command, "--size", str(max(limits.scratch_bytes, 1)), "--tmpfs", "/tmp", *rest],
        [*command, "--dir", "/tmp", *rest],
    ]


def _judged(tests: list[Assertion], found: object) -> Verdict:
    """`found` is any JSON at all."""
    if isinstance(found, dict) and set(found) == {"raised"}:
        return Verdict(False, _raised(found["raised"]))
    if not isinstance(found, list) or len(found) != len(tests):
        return Verdict(False, "no result")
    for test, outcome in zip(tests, found, strict=True):
        shown = test.expression if len(test.expression) <= _SHOWN else test.expression[: _SHOWN - 1] + "…"
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
