"""Test programs: no cheat makes one pass, nothing of a test is told to a candidate, and honest code passes."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import cheats
import pytest
from cheats import CALLS, CHEATS, Host, attacked, children_of_this, sandbox_of

from gemmary.errors import GemmaryError
from gemmary.evaluate.programs import answering, parse_program
from gemmary.evaluate.sandbox import Limits, Sandbox, Verdict, check_program

LIMITS = Limits(seconds=2.0, memory_bytes=256 * 2**20, scratch_bytes=4 * 2**20)
PASSED = Verdict(True, "passed")
PROGRAM = f"def check(candidate):\n    {cheats.TEST.replace('f(', 'candidate(')}\n\n\ncheck(f)"
HONEST = ("def f(n): return 7917 + n", PROGRAM)


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return sandbox_of(LIMITS)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with attacked(tmp_path_factory.mktemp("host")) as found:
        yield found


@pytest.fixture(scope="module")
def verdicts(sandbox: Sandbox, host: Host) -> dict[str, Verdict]:
    assert sandbox.layer == "bubblewrap"
    found = sandbox.checks_all([(host.addressed(code), PROGRAM) for _, code in CHEATS.values()], workers=2)
    return dict(zip(CHEATS, found, strict=True))


@pytest.mark.parametrize("name", CHEATS)
def test_no_cheat_passes(name: str, verdicts: dict[str, Verdict]) -> None:
    assert not verdicts[name].passed


def test_the_host_is_as_it_was(sandbox: Sandbox, host: Host, verdicts: dict[str, Verdict]) -> None:
    assert len(verdicts) > 60
    assert host.victim.read_text(encoding="utf-8") == "whole"
    assert host.calls == 0
    assert sandbox.checks(*HONEST) == PASSED


@pytest.fixture(scope="module")
def called(sandbox: Sandbox) -> dict[str, Verdict]:
    found = sandbox.checks_all([(code, program) for _, program, code in CALLS.values()], workers=2)
    return dict(zip(CALLS, found, strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_no_cheat_of_this_way_passes(name: str, called: dict[str, Verdict]) -> None:
    assert not called[name].passed
    assert re.match(CALLS[name][0], called[name].reason), called[name].reason


def test_what_knows_the_value_passes(sandbox: Sandbox) -> None:
    """The limit of the method, and what a test allows itself."""
    known = [
        ("def f(n): return {2: 7919}[n]", PROGRAM),
        (cheats.CALLS["a set of lists"][2].replace("['set', [['list', []]]]", "7919"), cheats.TEST),
        ("def f(a): a.clear()", "a = [3, 1]\nf(a)\nassert a == sorted(a)"),
        ("def f(n): return object()", "assert f(2) is not None\nassert f(2)\nassert f(2) != 3"),
    ]
    assert sandbox.checks_all(known) == [PASSED] * len(known)


HELPED = '''from typing import List


def turn(words: List[str]) -> List[str]:
    """The first goes behind the last."""
    return words[1:] + words[:1]


def back(words: List[str]) -> List[str]:
    """Undoes turn.
    >>> back(['b', 'a'])
    ['a', 'b']
    """
'''
CHECK = """

METADATA = {'author': 'nobody'}


def check(candidate):
    import random
    rng = random.Random(3)
    for _ in range(20):
        words = [chr(97 + rng.randint(0, 25)) for _ in range(rng.randint(1, 9))]
        assert candidate(turn(words)) == words, "Error"
    assert True, "the end"

check(back)"""
SOLVED = HELPED + "    return words[-1:] + words[:-1]\n"
TREE = "class Node:\n    def __init__(self, value): self.value, self.left = value, None\n"
GOOD = {
    "a loop with a tolerance": (
        "def f(n): return n / 3",
        "import math\ndef check(candidate):\n    for n in range(9):\n        assert abs(candidate(n) - n / 3) < 1e-6\n"
        "        assert math.isclose(candidate(n), n / 3)\ncheck(f)",
    ),
    "a prompt in front": (SOLVED, HELPED + CHECK),
    "a prompt in front of the candidate only": (SOLVED, CHECK),
    "the candidate's own name in a test": ("def f(a): return a[::-1]", "def check(c):\n    assert tuple(c([1, 2])) == tuple(f([1, 2]))\ncheck(f)"),
    "a program run as such": ("def f(): return 1", "def main():\n    assert f() == 1\nif __name__ == '__main__':\n    main()"),
    "sets": ("def f(a): return [*a, *a]", "assert set(f((1, 2))) == set([2, 1])\r\nassert sorted(f([1])) == [1, 1]"),
    "modules without an import": ("def f(a): return a * 2", "assert math.isclose(f(1.5), 3)\nassert f('ab') == string.ascii_letters[:2] * 2"),
    "a candidate named as a builtin": ("def sum(a, b): return a - b", "assert sum(5, 2) == 3\nassert sum(2, 5) == -3"),
    "an entry named as a builtin": ("def max(a): return min(a)", "def check(c):\n    assert c([2, 1]) == 1\ncheck(max)"),
    "an entry named as a module": ("def string(a): return a", "assert string(1) == 1\ndef check(c): assert c(2) == 2\ncheck(string)"),
    "objects": (
        TREE + "def f(node): return node and node.value + (f(node.left) or 0)\n",
        "root = Node(1)\r\nroot.left = Node(2)\r\nroot.left.left = Node(5)\nassert f(root) == 8\nassert root.left.value == 2\n"
        "root.left.value = [7]\nassert root.left.value == [7] and root.left.left.left is None\nassert f(None) is None\n"
        "assert root.left is root.left and root.left == root.left and root != root.left and root\nassert len({root, root.left, root}) == 2",
    ),
    "methods, and attributes of any name": (
        "class A:\n    _line = _target = read = 4\n    def add(self, *a, by=0): return A.add if not a else sum(a) + by\n    def __str__(self): return 'an A'\n"
        "    def __getitem__(self, key): return {'k': self}[key]\n    def __len__(self): return 3",
        "a = A()\nassert a.add(1, 2, by=3) == 6 and (a._line, a._target, a.read) == (4, 4, 4)\nassert a.add()(a, 5) == 5\n"
        "assert str(a) == f'{a}' == 'an A' and len(a) == 3\nassert a['k'] is a",
    ),
    "generators and other iterables": (
        "import collections\ndef f(n):\n    while n: yield [n]; n -= 1\ndef g(n): return collections.deque(range(n))\ndef h(a): return a.items()",
        "assert list(f(2)) == [[2], [1]]\nassert [*g(3)] == [0, 1, 2] and 2 in g(3) and 3 not in g(3)\nmade = f(1)\nassert next(made) == [1]\n"
        "assert next(made, None) is None\nassert dict(h({1: 2})) == {1: 2}\nassert all(map(set, g(0)))",
    ),
    "every plain value": (
        "def f(*a): return a",
        "import collections\nfor value in (None, True, 0, -1.5, 1e999, 2**53, -10**5000, 2j, 'ä\\ud800\\n', b'\\xff', [1, [2]], (1, (2,)), {1, 'a'}, frozenset([(1,)]),\n"
        "              {1: {'a': None}, (1, 2): 3}, collections.Counter('aab'), collections.OrderedDict(b=1, a=2), range(5, 1, -2), int, dict,\n"
        "              collections.defaultdict(list, {1: [2]})):\n    found, = f(value)\n    assert found == value and type(found) is type(value), value\n"
        "nan, = f(float('nan'))\nassert nan != nan\nassert f()[:] == () and f(f)[0]",
    ),
    "keywords of any name": ("def f(self, target, number): return self - target - number", "assert f(number=1, target=2, self=9) == 6"),
    "types as arguments": ("def f(a, kind): return [v for v in a if type(v) is not kind]", "assert f([1, 'a', 2.0], int) == ['a', 2.0]"),
    "values of the candidate's": ("LIMIT, PAIR = 9, (1, 2)\ndef f(): return LIMIT", "assert LIMIT == f() == 9\na, b = PAIR\nassert b == 2"),
    "names that come late": ("def f():\n    global late\n    late = lambda: 5", "assert f() is None\nassert late() == 5"),
    "state": ("seen = []\ndef f(n): seen.append(n); return seen", "assert f(1) == [1]\nassert f(2) == [1, 2]"),
    "work in place": (
        "def f(a, b=None, *, c=None):\n    a.sort(); b and b.pop('x'); c and c.add(3)",
        "a, b, c = [3, 1], {'x': 1, 'y': 2}, {1}\nalias = a\nf(a, b, c=c)\nassert (alias, b, c) == ([1, 3], {'y': 2}, {1, 3})",
    ),
    "copies where a value is returned": ("def f(a): a.sort(); return a", "a = [3, 1]\nassert f(a) == [1, 3]\nassert a == [3, 1]"),
    "exceptions": (
        "class Bad(KeyError): pass\ndef f(n):\n    if n: raise ValueError(f'not {n}')\n    raise Bad('k')\ndef g(): 'ä'.encode('ascii')\ndef h(): raise type('E', (Exception,), {})",
        "try:\n    f(1)\nexcept ValueError as error:\n    assert str(error) == 'not 1'\nelse:\n    assert False\ntry:\n    f(0)\n    raise AssertionError\n"
        "except KeyError as error:\n    assert error.args == ('k',)\nfor bad, kind in ((g, ValueError), (h, Exception), (f, TypeError)):\n"
        "    try:\n        bad()\n    except kind:\n        continue\n    raise AssertionError(kind)",
    ),
    "unittest": ("def f(n): return 1 / n", "import unittest\ncase = unittest.TestCase()\nwith case.assertRaises(ZeroDivisionError):\n    f(0)\ncase.assertEqual(f(2), 0.5)"),
    "noise": ("import sys\nprint('a' * 10**5); sys.stderr.write('b')\ndef f(n): print(n); return n", "print('c' * 10**5)\nassert f(1) == 1"),
    "many calls and a long answer": ("def f(n): return 'a' * n", "for n in range(2000):\n    assert f(n % 7) == 'a' * (n % 7)\nassert f(60000) == 'a' * 60000"),
    "a long argument": ("def f(a): return len(a)", "assert f('ä' * 10**6) == 10**6"),
    "classes in the test": ("def f(n): return n", "class Case:\n    def __init__(self, n): self.n = n\n    def run(self): assert f(self.n) == self.n\nCase(3).run()"),
}  # fmt: skip
BAD = {
    "a wrong value": ("def f(n): return n + 1", PROGRAM, "failed `assert candidate(2) == 7919`"),
    "a wrong value late": ("def f(n): return min(n, 7)", "for n in range(9):\n    assert f(n) == n, n", "failed `assert f(n) == n, n`"),
    "a tolerance": ("def f(n): return n + 2e-6", "assert abs(f(1) - 1) < 1e-6", "failed `assert abs(f(1) - 1) < 1e-6`"),
    "a wrong helped one": (SOLVED.replace("words[-1:] + ", ""), HELPED + CHECK, 'failed `assert candidate(turn(words)) == words, "Error"`'),
    "another type": ("def f(n): return (n,)", "assert f(1) == [1]", "failed `assert f(1) == [1]`"),
    "an object that is like another": ("class P: pass\ndef f(): return P()", "assert f() == f()", "failed `assert f() == f()`"),
    "an exception": ("def f(n): return n / 0", PROGRAM, "raised ZeroDivisionError in `assert candidate(2) == 7919`"),
    "an exception of its own": ("class E(Exception): pass\ndef f(n): raise E", "assert f(2) == 1", "raised Exception in `assert f(2) == 1`"),
    "no exception": ("def f(n): return n", "try:\n    f(1)\nexcept ValueError: pass\nelse: raise AssertionError", "failed `else: raise AssertionError`"),
    "no code": ("", PROGRAM, "raised NameError in `assert candidate(2) == 7919`"),
    "no such attribute": ("class A: pass", "assert A().b == 1", "raised AttributeError in `assert A().b == 1`"),
    "no Python": ("def f(n) return n", PROGRAM, "raised SyntaxError"),
    "no such module": ("import nosuch", PROGRAM, "raised ModuleNotFoundError"),
    "no such module in the test": ("def f(n): return n", "import nosuch\nassert f(1) == 1", "raised ModuleNotFoundError in `import nosuch`"),
    "an end too early": ("def f(n): return n", "import sys\nassert f(1) == 1\nsys.exit(0)", "raised SystemExit in `sys.exit(0)`"),
    "a function for an argument": ("def f(n): return 1", "try:\n    f(len, lambda: 1)\nexcept BaseException: pass\nassert f(1)", "cannot send builtin_function_or_method in `f(len, lambda: 1)`"),
    "a copy of an object": (
        "class A:\n    def __deepcopy__(self, memo): return 1", "import copy\nassert copy.deepcopy(A()) == 1",
        "raised TypeError in `assert copy.deepcopy(A()) == 1`",
    ),
    "a long line": ("def f(n): return 0", f"assert f(1) == {'1' * 99}", f"failed `assert f(1) == {'1' * 64}…`"),
    "a loop in the code": ("def f(n):\n    while True: pass", PROGRAM, "timed out"),
    "a loop in the test": ("def f(n): return n", "while True:\n    assert f(1) == 1", "timed out"),
}  # fmt: skip


def test_honest_solutions_pass_and_broken_ones_do_not(sandbox: Sandbox) -> None:
    found = iter(sandbox.checks_all([*GOOD.values(), *((code, program) for code, program, _ in BAD.values())]))
    assert {name: next(found) for name in GOOD} == dict.fromkeys(GOOD, PASSED)
    assert {name: next(found).reason for name in BAD} == {name: reason for name, (_, _, reason) in BAD.items()}


SIMPLE = [
    ("def f(n): return n % 2 == 0", ["assert f(2)", "assert not f(3)", "assert f(4) is True", "assert f(5) == False"]),
    ("def f(*a): return list(a)", ["assert f(1, 'ä', None) == [1, 'ä', None]", "assert f() == []"]),
    ("def f(a): return tuple(a), {1: a}", ["assert f([2]) == ((2,), {1: [2]})"]),
    ("def f(s): return s.encode()", ["assert f('ä') == b'\\xc3\\xa4'"]),
    ("def f(): pass", ["assert f() is None", "assert f() == None, 'a message'"]),
    ("def f(n): return 10**n", [f"assert f(4000) == 1{'0' * 4000}", "assert f(0) == 1.0"]),
    ("from collections import *\ndef f(w): return Counter(w)", ["assert f('aab') == {'b': 1, 'a': 2}"]),
    ("def f(n): return n + 1", ["assert f(1) == 2", "assert f(2) == 4"]),
    ("def f(n): return n + 1e-7", ["assert f(1.0) == 1.0"]),
    ("def g(n): return n", ["assert f(1) == 1"]),
    ("def f(n): return (n,)", ["assert f(1) == [1]"]),
    ("def f(n): return {n: 1, 3: 1}", ["assert f(1) == {1: 1, 2: 1}"]),
    ("def f(n): return 'é'", ["assert f(1) == b'\\xc3\\xa9'"]),
    ("def f(n): return None", ["assert f(1)"]),
    ("def f(n): return frozenset([n])", ["assert f(1) == frozenset([1])", "assert f(1) == f(2)"]),
]  # fmt: skip


def test_simple_tests_are_judged_as_by_values(sandbox: Sandbox) -> None:
    both = SIMPLE[:-1]
    values = sandbox.passes_all(both)
    programs = sandbox.checks_all([(code, "\n".join(tests)) for code, tests in both])
    assert [one.passed for one in values] == [one.passed for one in programs] == [True] * 7 + [False] * 7


REFUSED = {
    "no assertion": ("f(1)\nprint(f(2))", "could not fail"),
    "nothing": ("", "could not fail"),
    "a check that nobody calls": (PROGRAM.removesuffix("check(f)"), "could not fail"),
    "a check within one that nobody calls": ("def a():\n    check(f)\ndef check(f): assert f(1)\nprint(f)", "could not fail"),
    "a constant": ("x = f(1)\nassert True, 'so'\nassert 1", "could not fail"),
    "a tuple": ("assert (f(1), 'a message')", "could not fail"),
    "nothing of the candidate's": ("def f(n): return n\nassert f(1) == 1", "nothing of the candidate's"),
    "builtins only": ("assert 1 + len('a') == 2", "nothing of the candidate's"),
    "no Python": ("assert f(1) ==", "no Python"),
    "a zero byte": ("assert f(1)\0", "no Python"),
    "half a surrogate pair": ("assert f('\ud800')", "no Python"),
    "brackets": ("(" * 5000, "no Python"),
    "eval": ("assert eval(f(1)) == 1", "uses eval"),
    "exec": ("exec(f(1))\nassert f(1) == 1", "uses exec"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_programs_that_say_nothing_are_refused(name: str) -> None:
    program, reason = REFUSED[name]
    with pytest.raises(GemmaryError, match=reason):
        check_program(program)


def test_a_bad_program_is_refused_before_any_code_runs(sandbox: Sandbox) -> None:
    started = time.monotonic()
    with pytest.raises(GemmaryError, match="could not fail"):
        sandbox.checks_all([("while True: pass", PROGRAM), ("x = 1", "x")])
    with pytest.raises(GemmaryError, match="seconds"):
        sandbox.checks(*HONEST, seconds=0)
    assert time.monotonic() - started < LIMITS.seconds


def test_whose_names_they_are() -> None:
    parsed = parse_program(
        "import os\nx: int = g(h)\ndef k(a, *b, c=d, **e):\n    global s\n    s = [i for i in a if y]\nassert k(json.f, re)"
    )
    assert parsed.names == ("d", "g", "h", "re", "y")
    assert parsed.modules == ("json",)
    assert parsed.entry is None
    front = parse_program(HELPED + CHECK)
    assert (front.names, front.entry) == (("back",), "back")
    assert "def turn" in front.source
    assert "def back" not in front.source
    assert front.line(HELPED.count("\n") + 1 + CHECK[: CHECK.index("for _ in range(20)")].count("\n")).startswith(
        "for _"
    )


def test_a_helper_is_asked_of_what_stands_before_the_entry() -> None:
    program = parse_program(CHECK)
    codes, names = answering(SOLVED + "\ndef turn(words): return words", program)
    assert codes == [SOLVED + "\ndef turn(words): return words", HELPED[: HELPED.index("def back")]]
    assert names == {"back": 0, "turn": 1}
    assert answering("def back(words): return words\ndef turn(words): return words", program)[1] == {
        "back": 0,
        "turn": 0,
    }
    assert len(answering(SOLVED, parse_program(HELPED + CHECK))[0]) == 1


def test_it_ends_in_time_and_leaves_nothing(sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    loop = "import threading\nthreading.Thread(target=print).start()\ndef f(n):\n    while True: pass"
    children, descriptors = children_of_this(), os.listdir("/proc/self/fd")
    many = [os.open("/dev/null", os.O_RDONLY) for _ in range(200)]  # numbers above a candidate's limit of files
    try:
        started = time.monotonic()
        found = sandbox.checks_all(
            [(loop, PROGRAM), ("def f(n): return n", "while True:\n    assert f(1)"), HONEST, HONEST], workers=2
        )
        assert time.monotonic() - started < LIMITS.seconds + 2
        assert found == [Verdict(False, "timed out")] * 2 + [PASSED] * 2
        assert sandbox.checks(loop, PROGRAM, seconds=0.3) == Verdict(False, "timed out")
        assert time.monotonic() - started < LIMITS.seconds + 3
    finally:
        for descriptor in many:
            os.close(descriptor)
    assert (children_of_this(), os.listdir("/proc/self/fd")) == (children, descriptors)
    assert not list(tmp_path.iterdir())


def test_without_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only cheats that would do no harm if the limits failed."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(GemmaryError, match="needs a sandbox"):
        Sandbox(LIMITS)
    bare = Sandbox(LIMITS, allow_unsandboxed=True)
    assert bare.layer == "rlimits"
    names = [
        "a verdict",
        "two answers",
        "a line without end",
        "what it can read",
        "an exit where everything is caught",
        "its own math",
    ]
    found = bare.checks_all([HONEST, *((CALLS[name][2], CALLS[name][1]) for name in names), GOOD["objects"]], workers=2)
    assert found[0] == found[-1] == PASSED
    for name, verdict in zip(names, found[1:-1], strict=True):
        assert not verdict.passed, name
        assert re.match(CALLS[name][0], verdict.reason), (name, verdict.reason)
