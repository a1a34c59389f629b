"""Generated code: no cheat passes, none harms the host, and honest code passes after each of them."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import cheats
import pytest
from cheats import Host, attacked, children_of_this, sandbox_of

from gemmary.errors import GemmaryError
from gemmary.evaluate.assertions import same
from gemmary.evaluate.harness import system_call_filter
from gemmary.evaluate.sandbox import Limits, Sandbox, Verdict, check_tests, find_code

LIMITS = Limits(seconds=2.0, memory_bytes=256 * 2**20, scratch_bytes=4 * 2**20)
PASSED = Verdict(True, "passed")
HONEST = ("def f(n): return 7917 + n", [cheats.TEST])


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return sandbox_of(LIMITS)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with attacked(tmp_path_factory.mktemp("host")) as found:
        yield found


@pytest.fixture(scope="module")
def verdicts(sandbox: Sandbox, host: Host) -> dict[str, tuple[Verdict, Verdict]]:
    """Of every cheat, and of the honest candidate that came after it."""
    assert sandbox.layer == "bubblewrap"
    candidates = []
    for _, code in cheats.CHEATS.values():
        candidates += [(host.addressed(code), [cheats.TEST]), HONEST]
    found = sandbox.passes_all(candidates, workers=2)
    return dict(zip(cheats.CHEATS, zip(found[::2], found[1::2], strict=True), strict=True))


@pytest.mark.parametrize("name", cheats.CHEATS)
def test_no_cheat_passes(name: str, verdicts: dict[str, tuple[Verdict, Verdict]]) -> None:
    verdict, after = verdicts[name]
    assert not verdict.passed
    assert re.match(cheats.CHEATS[name][0], verdict.reason), verdict.reason
    assert after == PASSED


def test_the_host_is_as_it_was(host: Host, verdicts: dict[str, tuple[Verdict, Verdict]]) -> None:
    assert len(verdicts) > 60
    assert host.victim.read_text(encoding="utf-8") == "whole"
    assert host.calls == 0


def test_what_knows_the_value_passes(sandbox: Sandbox, host: Host) -> None:
    """The limit of the method: no judge can tell these from a computation."""
    hard_coded = ("def f(n): return {2: 7919}[n]", [cheats.TEST])
    forged = (cheats.CHEATS["forgery: a well-formed result"][1].replace("true, 0", "true, 7919"), [cheats.TEST])
    assert sandbox.passes_all([hard_coded, forged]) == [PASSED, PASSED]


SOLUTIONS = [
    ("def f(n): return n % 2 == 0", ["assert f(2)", "assert not f(3)", "assert f(4) is True", "assert f(5) == False"]),
    ("def f(*a): return list(a)", ["assert f(1, 'ä', None) == [1, 'ä', None]", "assert f() == []"]),
    ("def f(a): return tuple(a), {1: a}", ["assert f([2]) == ((2,), {1: [2]})"]),
    ("def f(a): return set(a)", ["assert f([3, 1, 1]) == {1, 3}", "assert f([]) == set()"]),
    ("def f(n): return float(n)", ["assert f(1) == 1"]),
    ("def f(n): return n", ["assert f(55) == 55.0"]),
    ("def f(a): return a / 3", ["assert f(1) == 0.3333333333", "assert f(-3.0) == -1.0", "assert f(1e999) == 1e999"]),
    ("def f(a): return {a / 3, 7.0}", ["assert f(1) == {7.0, 0.3333333333}"]),
    ("def f(s): return s.encode()", ["assert f('ä') == b'\\xc3\\xa4'"]),
    ("def f(): pass", ["assert f() is None", "assert f() == None, 'a message'"]),
    ("def f(): return '\\ud800\\n\"'", ["assert f() == '\\ud800\\n\"'"]),
    ("def f(n): return 10**n", [f"assert f(4000) == 1{'0' * 4000}", "assert f(0) == 1"]),
    (
        "import collections, heapq, math, re, itertools as it\n"
        "def f(w): return heapq.nlargest(2, collections.Counter(w).items(), key=lambda p: (p[1], p[0]))",
        ["assert f('abcabb') == [('b', 3), ('a', 2)]"],
    ),
    ("from collections import *\ndef f(w): return Counter(w)", ["assert f('aab') == {'b': 1, 'a': 2}"]),
    (
        "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n    def twice(self): return P(self.x * 2)\n",
        ["assert P(4).twice().x == 8", "assert [p.x for p in (P(1), P(2)) if p.x > 1] == [2]"],
    ),
    ("def f(n):\n    while n: yield n; n -= 1", ["assert list(f(3)) == [3, 2, 1]"]),
    (
        "import threading\ndef f(n):\n    r = []\n    t = [threading.Thread(target=r.append, args=(i,)) for i in range(n)]\n"
        "    for x in t: x.start()\n    for x in t: x.join()\n    return sorted(r)",
        ["assert f(4) == [0, 1, 2, 3]"],
    ),
    ("import asyncio\nasync def g(n): return n\ndef f(n): return asyncio.run(g(n))", ["assert f(5) == 5"]),
    ("import tempfile\ndef f(s):\n    with tempfile.TemporaryFile('w+') as t: t.write(s); t.seek(0); return t.read()", ["assert f('a') == 'a'"]),
    ("print('noise' * 10**5)\nimport sys; sys.stderr.write('x')\ndef f(n): print(n); return n", ["assert f(1) == 1"]),
    ("seen = []\ndef f(n): seen.append(n); return seen", ["assert f(1) == [1]", "assert f(2) == [1, 2]"]),
    ("if __name__ == '__main__':\n    import sys; sys.exit(1)\ndef f(n): return n", ["assert f(1) == 1"]),
]  # fmt: skip
BROKEN = [
    ("def f(n): return n + 1", ["assert f(1) == 2", "assert f(2) == 4"], "wrong value for `f(2)`"),
    ("def f(n): return n / 0", ["assert f(1) == 2"], "raised ZeroDivisionError in `f(1)`"),
    ("def f(n) return n", ["assert f(1) == 2"], "raised SyntaxError"),
    ("import nosuch", ["assert f(1) == 2"], "raised ModuleNotFoundError"),
    ("def g(n): return n", ["assert f(1) == 1"], "raised NameError in `f(1)`"),
    ("def f(n): return n", ["assert f(1)"], "wrong value for `f(1)`"),
    ("def f(n): return n", ["assert f(1) is True"], "wrong value for `f(1)`"),
    ("def f(n): return True", ["assert f(1) == 1"], "wrong value for `f(1)`"),
    ("def f(n): return n == 1", ["assert f(1) == 1"], "wrong value for `f(1)`"),
    ("def f(n): return n == 1", ["assert f(1) == 1.0"], "wrong value for `f(1)`"),
    ("def f(n): return 10**400", ["assert f(1) == 1.0"], "wrong value for `f(1)`"),
    ("def f(n): return n * (1 + 1e-8)", ["assert f(1.0) == 1.0"], "wrong value for `f(1.0)`"),
    ("def f(n): return (n,)", ["assert f(1) == [1]"], "wrong value for `f(1)`"),
    ("def f(n): return [n, n]", ["assert f(1) == [1]"], "wrong value for `f(1)`"),
    ("def f(n): return {n: 1}", ["assert f(1) == {1: 2}"], "wrong value for `f(1)`"),
    ("def f(n): return {n: 1, 3: 1}", ["assert f(1) == {1: 1, 2: 1}"], "wrong value for `f(1)`"),
    ("def f(n): return {True}", ["assert f(1) == {1}"], "wrong value for `f(1)`"),
    ("def f(n): return 'é'", ["assert f(1) == b'\\xc3\\xa9'"], "wrong value for `f(1)`"),
    ("def f(n): return None", ["assert not f(1)"], "wrong value for `f(1)`"),
    ("def f(n): return n", [f"assert f({'1' * 99}) == 0"], f"wrong value for `f({'1' * 77}…`"),
]  # fmt: skip


def test_honest_solutions_pass_and_broken_ones_do_not(sandbox: Sandbox) -> None:
    candidates = [*SOLUTIONS, *((code, tests) for code, tests, _ in BROKEN)]
    expected = [PASSED] * len(SOLUTIONS) + [Verdict(False, reason) for _, _, reason in BROKEN]
    for candidate, verdict, right in zip(candidates, sandbox.passes_all(candidates), expected, strict=True):
        assert verdict == right, candidate


@pytest.mark.parametrize(
    "test",
    [
        "assert f(1) == g(1)", "assert f(1) != 2", "assert f(1) > 2", "assert f(1) == 2 == 2", "assert f(1) == 2 and f(2) == 3",
        "assert (f(1) == 2) == True", "assert not f(1) == 2", "assert f(1) is not None", "assert f(1) is 5", "assert f(1) == 2j",
        "assert f(1) == [1 + 2j]", "assert f(1) == ...", "assert f(1) == [x]", "assert f(1) == {[]}", "f(1) == 2", "", "assert",
        "assert f(1) == 1; x = 2", "assert f(1) == 1\nassert f(2) == 2", "import os", "assert f(1) == f'{1}'", "assert \0",
        "assert " + "(" * 5000, "assert f(1) == __import__('os')",
    ],
)  # fmt: skip
def test_other_tests_are_refused_by_name(test: str) -> None:
    with pytest.raises(GemmaryError, match=r"^the test .* cannot be judged: ") as raised:
        check_tests(["assert f(1) == 1", test])
    assert test.split("\n")[0].strip("\0")[:20] in str(raised.value)


def test_no_tests_are_refused(sandbox: Sandbox) -> None:
    for tests in ([], (), "assert f(1) == 1"):
        with pytest.raises(GemmaryError, match="at least one test"):
            sandbox.passes("x = 1", tests)
    started = time.monotonic()
    with pytest.raises(GemmaryError, match="no literal"):
        sandbox.passes_all([("while True: pass", ["assert f(1) == 1"]), ("x = 1", ["assert x == x"])])
    assert time.monotonic() - started < LIMITS.seconds  # nothing ran


@pytest.mark.parametrize("expected", [1, True, None, "a", 1.0, b"a", [1], (1,), {1}, {1: 2}, [{1: [2]}], {(1, 2)}])
@pytest.mark.parametrize(
    "sent",
    [
        {}, [], [[]], ["list"], ["list", None], ["list", 1, 2], ["dict", [1]], ["dict", [[1]]], ["set", [[1]]], ["set", {}],
        ["bytes", None], ["bytes", 1], [["list"], [1]], ["object", "int"], 2, "", 1e999, ["dict", [["tuple", [1, 2]]]],
        ["set", [["tuple", 1]]], ["tuple", "1"], ["list", "1"],
    ],
)  # fmt: skip
def test_any_json_can_be_compared(expected: object, sent: object) -> None:
    assert not same(expected, sent)


def test_a_loop_ends_in_time_and_leaves_nothing(sandbox: Sandbox) -> None:
    loop = ("import threading\nthreading.Thread(target=print).start()\nwhile True: pass", [cheats.TEST])
    children, descriptors = children_of_this(), _descriptors()
    libc = ctypes.CDLL(None)
    assert libc.prctl(36, 1, 0, 0, 0) == 0  # PR_SET_CHILD_SUBREAPER: an orphan becomes this process's
    try:
        started = time.monotonic()
        verdicts = sandbox.passes_all([loop, loop, HONEST, HONEST], workers=2)
        assert time.monotonic() - started < LIMITS.seconds + 2
        assert verdicts == [Verdict(False, "timed out")] * 2 + [PASSED] * 2
        assert (children_of_this(), _descriptors()) == (children, descriptors)
    finally:
        libc.prctl(36, 0, 0, 0, 0)


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_without_isolation_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(GemmaryError, match=r"bwrap.*not installed.*Install bubblewrap.*--allow-unsandboxed") as raised:
        Sandbox(LIMITS)
    assert "\n" not in str(raised.value)


def _stub(folder: Path, text: str) -> str:
    path = folder / "bwrap"
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def test_a_bubblewrap_that_does_not_work_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = _stub(tmp_path, "echo 'bwrap: No permissions to create a new namespace' >&2; exit 1")
    monkeypatch.setattr(shutil, "which", lambda name: stub)
    with pytest.raises(GemmaryError, match=r"does not work here \(bwrap: No permissions.*allow user namespaces"):
        Sandbox(LIMITS)
    assert Sandbox(LIMITS, allow_unsandboxed=True).layer == "rlimits"


def test_an_old_bubblewrap_has_a_tmp_that_cannot_be_written(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = _stub(tmp_path, f'case "$*" in *--size*) exit 1;; esac\nexec {shutil.which("bwrap")} "$@"')
    monkeypatch.setattr(shutil, "which", lambda name: stub)
    old = Sandbox(LIMITS)
    assert old.layer == "bubblewrap"
    assert old.passes(*HONEST) == PASSED
    assert old.passes("open('/tmp/x', 'w')", [cheats.TEST]) == (False, "raised OSError")


def test_limits_without_namespaces(monkeypatch: pytest.MonkeyPatch, host: Host) -> None:
    """Only cheats that would do no harm if the limits failed."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    bare = Sandbox(LIMITS, allow_unsandboxed=True)
    assert bare.layer == "rlimits"
    names = [
        "exit: sys.exit at load", "exit: os._exit in f", "exit: segmentation fault", "forgery: a well-formed result",
        "forgery: every guess", "object: equal to everything", "patch: the harness's json", "hunt: environment",
        "hunt: standard input once more", "harm: a loop", "harm: subprocess", "harm: fork, and the parent exits",
        "harm: one great allocation", "harm: its limits raised", "exit: exec of a program that succeeds", "hunt: the network",
    ]  # fmt: skip
    found = bare.passes_all(
        [HONEST, *((host.addressed(cheats.CHEATS[name][1]), [cheats.TEST]) for name in names), HONEST], workers=2
    )
    assert found[0] == found[-1] == PASSED
    for name, verdict in zip(names, found[1:-1], strict=True):
        assert not verdict.passed, name
        assert re.match(cheats.CHEATS[name][0], verdict.reason), (name, verdict.reason)
    # What namespaces are for: these are stopped by nothing else.
    reads = host.addressed(cheats.CHEATS["hunt: a file of the host's"][1])
    assert bare.passes(reads, [cheats.TEST]) == PASSED
    relative = bare.passes("open('left', 'w').write('x')\ndef f(n): return 7919", [cheats.TEST])
    assert relative == PASSED
    assert not Path("left").exists()


@pytest.mark.parametrize(
    ("machine", "other", "read", "fork", "clone", "socket", "memfd"),
    [("x86_64", "aarch64", 0, 57, 56, 41, 319), ("aarch64", "x86_64", 63, None, 220, 198, 279)],
)
def test_the_system_call_filter_of_each_machine(
    machine: str, other: str, read: int, fork: int | None, clone: int, socket: int, memfd: int
) -> None:
    architecture = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
    allow, kill, denied, missing = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026

    def answer(number: int, argument: int = 0, by: str = machine) -> int:
        return _filtered(system_call_filter(machine), {0: number, 4: architecture[by], 16: argument})

    assert answer(read) == answer(clone, 0x10000 | 0x100) == allow
    assert answer(clone, 17) == answer(socket, 0x10000) == answer(memfd) == answer(425) == denied
    assert fork is None or answer(fork) == denied
    assert answer(435, 0x10000) == missing
    assert answer(read, by=other) == answer(0x40000000 + read) == kill
    assert system_call_filter("riscv64") == b""


def _filtered(program: bytes, data: dict[int, int]) -> int:
    """What a classic BPF program returns: the instructions that the filter has, and no others."""
    code, place, held = list(struct.iter_unpack("HBBI", program)), 0, 0
    while True:
        operation, yes, no, constant = code[place]
        if operation == 0x06:
            return constant
        if operation == 0x20:
            held = data[constant]
            place += 1
            continue
        holds = {0x15: held == constant, 0x35: held >= constant, 0x45: held & constant}[operation]
        place += 1 + (yes if holds else no)


@pytest.mark.parametrize("wrong", [{"seconds": 0}, {"seconds": float("nan")}, {"memory_bytes": 5}, {"output_bytes": 0}])
def test_limits_have_bounds(wrong: dict[str, float]) -> None:
    with pytest.raises(GemmaryError, match=next(iter(wrong))):
        Limits(**wrong)


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("x = 1", "x = 1"),
        ("Here:\n```python\nx = 1\n```\nand so on", "x = 1\n"),
        ("```\nx = 1\n```\n```py\nx = 2\n```\n```python\nx = 3\n```", "x = 2\n"),
        ("```sh\npip\n```\nthen\n```Python3\r\nx = 1\r\n```", "x = 1\n"),
        ("```sh\npip\n```\n```\nx\n```", "pip\n"),
        ("So: ```python\nx = 1", "x = 1"),
        ("1. first\n   ```python title=a\n   if x:\n       y\n   ```", "if x:\n    y\n"),
        ("```python\nx = '```'\n```", "x = '```'\n"),
        ("use `x` or ```y``` here", "use `x` or ```y``` here"),
        ("```python\n```", ""),
        ("", ""),
    ],
)
def test_find_code(answer: str, code: str) -> None:
    assert find_code(answer) == code
