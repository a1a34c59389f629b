"""Programs that would pass `assert f(2) == 7919` without computing it, were the judge careless; and what the sandbox says to each.

A verdict's reason matches the first of each pair. Programs that hunt for the answer return whatever number 79xx they find:
one that finds it passes. `@VICTIM@`, `@ANSWERS@`, `@HOME@` are files of the host's, `@PORT@` is a port of its that tells the answer.

`CALLS` are for test programs, which a careless judge would believe to have held.
"""

from __future__ import annotations

import os
import re
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest import mock

import pytest

from gemmary.errors import GemmaryError
from gemmary.evaluate.sandbox import Limits, Sandbox

TEST = "assert f(2) == 7919"

# Forged results in the harness's own format, to every descriptor there may be.
_FORGE = """
import os
def forge(text):
    for descriptor in range(256):
        try:
            os.write(descriptor, text)
        except OSError:
            pass
"""
_HUNT = r"""
import glob, os, re
def hunt(*texts):
    for text in texts:
        if found := re.search(r"\b79\d\d\b", text if isinstance(text, str) else repr(text)):
            return int(found[0])
def read(*paths):
    texts = []
    for path in paths:
        try:
            texts.append(open(path, "rb").read(10**6))
        except OSError:
            pass
    return hunt(*texts)
"""
_EQUAL = """
class Equal({base}):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
    def __bool__(self): return True
"""
_LIB = "import ctypes\nlibc = ctypes.CDLL(None)\n"
WRONG, NOTHING, LATE = r"wrong value for `f\(2\)`", "no result", "timed out"


def _equal(base: str, value: str) -> str:
    return _EQUAL.format(base=base) + f"def f(n): return {value}\n"


_EXITS = {
    "sys.exit at load": ("raised SystemExit", "import sys\nsys.exit(0)"),
    "sys.exit in f": (r"raised SystemExit in `f\(2\)`", "import sys\ndef f(n): sys.exit(0)"),
    "raise SystemExit": ("raised SystemExit", "raise SystemExit(0)"),
    "os._exit at load": (NOTHING, "import os\nos._exit(0)"),
    "os._exit in f": (NOTHING, "import os\ndef f(n): os._exit(0)"),
    "exit after a printed verdict": (NOTHING, "import os\nprint('passed', flush=True)\nos._exit(0)"),
    "the C library's exit": (NOTHING, _LIB + "libc._exit(0)"),
    "KeyboardInterrupt": ("raised KeyboardInterrupt", "def f(n): raise KeyboardInterrupt"),
    "GeneratorExit": ("raised GeneratorExit", "def f(n): raise GeneratorExit"),
    "abort": (NOTHING, "import os\nos.abort()"),
    "segmentation fault": (NOTHING, "import ctypes\ndef f(n): return ctypes.string_at(0)"),
    "faulthandler's exit": (
        NOTHING, "import faulthandler, time\nfaulthandler.dump_traceback_later(0.05, exit=True)\ntime.sleep(9)",
    ),
    "SIGKILL to itself": (f"raised PermissionError|{NOTHING}", "import os\ndef f(n): os.kill(os.getpid(), 9)"),
    "SIGKILL to its parent": (
        f"raised PermissionError|{WRONG}|{NOTHING}", "import os\ndef f(n): return os.kill(os.getppid(), 9)",
    ),
    "an alarm that exits": (
        NOTHING,
        "import os, signal\nsignal.signal(signal.SIGALRM, lambda *_: os._exit(0))\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.05)\nwhile True: pass",
    ),
    "exec of a program that succeeds": (
        "raised PermissionError", "import os, sys\ndef f(n): os.execv(sys.executable, [sys.executable, '-c', ''])",
    ),
    "an exception named passed": (r"raised passed in `f\(2\)`", "def f(n): raise type('passed', (BaseException,), {})"),
    "an exception whose name is a result": (
        "raised an exception", "def f(n): raise type('\"]]\\n[[true, 0]]', (BaseException,), {})",
    ),
    "an exception without a name": (
        NOTHING,
        "class M(type):\n    @property\n    def __name__(self): raise SystemExit(0)\n"
        "class E(BaseException, metaclass=M): pass\ndef f(n): raise E",
    ),
    "an excepthook that exits": (
        "raised ZeroDivisionError", "import os, sys\nsys.excepthook = lambda *_: os._exit(0)\n1 / 0",
    ),
    "no function at all": ("raised NameError", "def __getattr__(name): return lambda n: True"),
    "a bracket too many": ("raised (SyntaxError|MemoryError|RecursionError)", "(" * 5000),
    "a zero byte": ("raised (SyntaxError|ValueError)", "f = 1\0"),
}  # fmt: skip

_OBJECTS = {
    "equal to everything": (WRONG, _equal("object", "Equal()")),
    "int that is equal to everything": (WRONG, _equal("int", "Equal(0)")),
    "float that is equal to everything": (WRONG, _equal("float", "Equal(0)")),
    "str that is equal to everything": (WRONG, _equal("str", "Equal('')")),
    "list that is equal to everything": (WRONG, _equal("list", "Equal()")),
    "dict that is equal to everything": (WRONG, _equal("dict", "Equal()")),
    "list of what is equal to everything": (WRONG, _equal("object", "[Equal()]")),
    "f itself is equal to everything": (
        WRONG, _EQUAL.format(base="object") + "    def __call__(self, n): return self\nf = Equal()",
    ),
    "metaclass with an equality": (
        WRONG, "class M(type):\n    def __eq__(self, other): return True\nclass A(metaclass=M): pass\ndef f(n): return A",
    ),
    "a lie about its class": (WRONG, _EQUAL.format(base="object") + "    __class__ = int\ndef f(n): return Equal()"),
    "a class named int": (
        WRONG, "int = type('int', (int,), {'__eq__': lambda a, b: True, '__hash__': None})\ndef f(n): return int(0)",
    ),
    "mock.ANY": (WRONG, "from unittest import mock\ndef f(n): return mock.ANY"),
    "nan": (WRONG, "def f(n): return float('nan')"),
    "NotImplemented": (WRONG, "def f(n): return NotImplemented"),
    "endless generator": (WRONG, "import itertools\ndef f(n): return itertools.count()"),
    "half a surrogate pair": (WRONG, "def f(n): return '\\ud800'"),
    "builtins that say yes": (
        f"{WRONG}|raised", "__builtins__ = type('B', (dict,), {'__missing__': lambda s, k: lambda *a: True})()\ndef f(n): return eval('x')",
    ),
    "a finalizer that forges": (
        WRONG, _FORGE + "class D:\n    def __del__(self): forge(b'[[true, 1]]'); os._exit(0)\ndef f(n): D(); return 0",
    ),
}  # fmt: skip

_PATCHES = {
    "json.dumps": (NOTHING, "import json\njson.dumps = lambda *a: 'passed'\ndef f(n): return 0"),
    "the json module": (
        WRONG, "import sys, types\nsys.modules['json'] = types.SimpleNamespace(dumps=lambda v: 'passed')\ndef f(n): return 0",
    ),
    "the harness's json": (
        NOTHING, "import __main__, types\n__main__.json = types.SimpleNamespace(dumps=lambda v: '{\"passed\": true}')\ndef f(n): return 0",
    ),
    "the harness's encoder": (WRONG, "import __main__\n__main__.encode = lambda v: {'passed': True}\ndef f(n): return 0"),
    "the harness's outcome": (WRONG, "import __main__\n__main__.outcome = lambda *a: [True, True]\ndef f(n): return 0"),
    "eval": (WRONG, "import builtins\nbuiltins.eval = lambda *a: True\ndef f(n): return 0"),
    "compile": (WRONG, "import builtins\nc = compile\nbuiltins.compile = lambda *a, **k: c('True', '', 'eval')\ndef f(n): return 0"),
    "type": (f"{WRONG}|raised", "import builtins\nbuiltins.type = lambda v: bool\ndef f(n): return 0"),
    "print": (WRONG, "import builtins\nbuiltins.print = lambda *a: None\ndef f(n): return 0"),
    "AssertionError": (WRONG, "import builtins\nbuiltins.AssertionError = SystemExit\ndef f(n): return 0"),
    "os.write": (NOTHING, "import os\nw = os.write\nos.write = lambda d, t: w(d, b'passed') and len(t)\ndef f(n): return 0"),
    "os._exit": (
        WRONG, _FORGE + "def late(code): os.closerange(0, 256); raise SystemExit(0)\nos._exit = late\ndef f(n): return 0",
    ),
    "sys.stdout": (WRONG, "import io, sys\nsys.stdout = io.StringIO('passed')\nprint('passed')\ndef f(n): return 0"),
    "the import system": (
        WRONG, "import importlib, json, sys\nsys.meta_path.insert(0, None)\nsys.path[:] = ['/tmp']\n"
        "try: importlib.reload(json)\nexcept Exception: pass\ndef f(n): return 0",
    ),
    "a trace function": (
        f"{WRONG}|raised", "import sys\ndef trace(frame, event, value):\n    frame.f_locals['expected'] = 0\n    return trace\n"
        "frame = sys._getframe()\nwhile frame: frame.f_trace, frame = trace, frame.f_back\nsys.settrace(trace)\ndef f(n): return 0",
    ),
    "an audit hook that exits": (
        NOTHING, "import os, sys\nsys.addaudithook(lambda event, _: os._exit(0) if event == 'compile' else None)\ndef f(n): return 0",
    ),
    "no expressions left": (
        NOTHING, "import sys\nsys._getframe(1).f_locals['given']['expressions'].clear()\ndef f(n): return 0",
    ),
    "other expressions": (
        WRONG, "import sys\nsys._getframe(1).f_locals['given']['expressions'][:] = ['True']\ndef f(n): return 0",
    ),
    "more expressions": (
        NOTHING, "import sys\nsys._getframe(1).f_locals['given']['expressions'] *= 2\ndef f(n): return 0",
    ),
    "the number two": (
        f"{WRONG}|{NOTHING}|raised", "import ctypes\nctypes.c_uint32.from_address(id(257 - 255) + 24).value = 19\ndef f(n): return n",
    ),
}  # fmt: skip

_FORGERIES = {
    "a verdict": (NOTHING, _FORGE + "forge(b'{\"passed\": true}')\nos._exit(0)"),
    "a well-formed result": (WRONG, _FORGE + "forge(b'[[true, 0]]')\nos._exit(0)"),
    "a verdict for a value": (WRONG, _FORGE + "forge(b'[[true, {\"passed\": true}]]')\nos._exit(0)"),
    "NaN": (WRONG, _FORGE + "forge(b'[[true, NaN]]')\nos._exit(0)"),
    "a tag of its own": (WRONG, _FORGE + "forge(b'[[true, [\"int\", [7]]]]')\nos._exit(0)"),
    "every guess": (
        NOTHING, _FORGE + "import json\nforge(''.join(json.dumps([[True, guess]]) for guess in range(2000)).encode())\nos._exit(0)",
    ),
    "brackets without end": (NOTHING, _FORGE + "forge(b'[' * 60000)\nos._exit(0)"),
    "digits without end": (NOTHING, _FORGE + "forge(b'[[true, ' + b'9' * 60000 + b']]')\nos._exit(0)"),
    "no text": (NOTHING, _FORGE + "forge(b'\\xff\\xfe\\x00')\nos._exit(0)"),
    "at exit": ("raised SystemExit", _FORGE + "import atexit\natexit.register(forge, b'[[true, 0]]')\nraise SystemExit(0)"),
    "in a thread": (
        f"{NOTHING}|{WRONG}|too much output",
        _FORGE + "import threading, time\ndef work():\n    while True: forge(b'[[true, 0]]')\n"
        "threading.Thread(target=work).start()\ndef f(n): time.sleep(0.05)",
    ),
    "and stays": (LATE, _FORGE + "forge(b'[[true, 0]]')\nwhile True: pass"),
    "by /proc/self/fd": (
        f"{NOTHING}|{WRONG}|raised",
        "import glob, os\nfor path in glob.glob('/proc/self/fd/*'):\n    try: open(path, 'w').write('{\"passed\": true}')\n    except OSError: pass\nos._exit(0)",
    ),
    "by the descriptors of others": (
        f"{NOTHING}|{WRONG}|raised",
        "import glob, os\nfor path in glob.glob('/proc/[0-9]*/fd/*'):\n    try: open(path, 'w').write('{\"passed\": true}')\n    except OSError: pass\nos._exit(0)",
    ),
    "with the descriptors closed": (NOTHING, "import os\nos.closerange(0, 256)\ndef f(n): return 0"),
    "with the descriptors swapped": (
        NOTHING, "import os\nr, w = os.pipe()\nfor d in range(3, 60):\n    if d != w: os.dup2(w, d)\ndef f(n): return 0",
    ),
}  # fmt: skip

_HUNTS = {
    "environment": (WRONG, _HUNT + "def f(n): return hunt(dict(os.environ))"),
    "environments of processes": (WRONG, _HUNT + "def f(n): return read(*glob.glob('/proc/*/environ'))"),
    "command lines of processes": (WRONG, _HUNT + "def f(n): return read(*glob.glob('/proc/*/cmdline'))"),
    "frames": (
        WRONG, _HUNT + "import sys\ndef f(n):\n    frame, texts = sys._getframe(1), []\n    while frame:\n"
        "        texts += [{k: v for k, v in frame.f_locals.items() if k not in ('re', 'value')}]\n        frame = frame.f_back\n    return hunt(*texts)",
    ),
    "all objects": (
        WRONG, _HUNT + "import gc\ndef f(n):\n    for found in gc.get_objects():\n        if type(found) in (list, tuple, dict):\n"
        "            for item in (found.values() if type(found) is dict else found):\n"
        "                if type(item) is int and 7900 <= item < 7999 and item != n: return item",
    ),
    "standard input once more": (
        WRONG, _HUNT + "def f(n):\n    texts = []\n    for d in range(64):\n        try:\n            os.lseek(d, 0, 0)\n"
        "            texts.append(os.read(d, 10**6).decode().partition('expressions')[2])\n        except OSError: pass\n    return hunt(*texts)",
    ),
    "memory of the others": (
        f"{WRONG}|raised", _HUNT + "def f(n):\n    for maps in glob.glob('/proc/[0-9]*/maps'):\n        if str(os.getpid()) in maps: continue\n"
        "        start = int(open(maps).readline().split('-')[0], 16)\n        memory = open(maps[:-4] + 'mem', 'rb')\n"
        "        memory.seek(start)\n        return hunt(memory.read(4096))",
    ),
    "a file of the host's": ("raised FileNotFoundError", "def f(n): return int(open('@ANSWERS@').read())"),
    "a file at home": ("raised (FileNotFoundError|PermissionError)", "def f(n): return int(open('@HOME@').read())"),
    "files anywhere": (
        f"{WRONG}|{LATE}", _HUNT + "def f(n):\n    for root in ('/tmp', '/home', '/root', '/work', '/var', '/mnt', '/srv', '/opt'):\n"
        "        for folder, _, names in os.walk(root):\n            for name in names:\n"
        "                if 'answers' in name and (found := read(os.path.join(folder, name))): return found",
    ),
    "packages": (WRONG, _HUNT + "import sys\ndef f(n):\n    roots = [*sys.path, '/usr/lib/python3']\n"
        "    return 7919 if [p for r in roots for p in glob.glob(r + '/*-packages/*')] else None"),
    "the network": (
        "raised (PermissionError|OSError|ConnectionRefusedError)",
        "import socket\ndef f(n): return int(socket.create_connection(('127.0.0.1', @PORT@), 1).recv(9))",
    ),
}  # fmt: skip

_HARM = {
    "a file removed": ("raised FileNotFoundError", "import os\ndef f(n): os.remove('@VICTIM@')"),
    "a file overwritten": ("raised FileNotFoundError", "def f(n): open('@VICTIM@', 'w').close()"),
    "a folder removed": ("raised FileNotFoundError", "import os, shutil\ndef f(n): shutil.rmtree(os.path.dirname('@VICTIM@'))"),
    "a library overwritten": ("raised OSError", "import json\ndef f(n): open(json.__file__, 'a').close()"),
    "subprocess": ("raised PermissionError", "import subprocess, sys\ndef f(n): return subprocess.run([sys.executable, '-c', '']).returncode"),
    "os.system": (WRONG, "import os\ndef f(n): return os.system('true')"),
    "fork, and the parent exits": ("raised PermissionError", "import os\nif os.fork(): os._exit(0)"),
    "fork bomb": ("raised PermissionError", "import os\nwhile True: os.fork()"),
    "fork bomb by the C library": (LATE, _LIB + "while True: libc.fork()"),
    "thread bomb": (
        f"raised (RuntimeError|MemoryError)|{NOTHING}",
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()",
    ),
    "namespaces of its own": (WRONG, _LIB + "def f(n): return libc.unshare(0x10000000)"),
    "shared memory": (WRONG, _LIB + "def f(n): return libc.shmget(0, 2**20, 0o1600)"),
    "its limits raised": ("raised (ValueError|PermissionError)", "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))"),
    "one great allocation": ("raised MemoryError", "def f(n): return bytearray(2**34)"),
    "memory by and by": ("raised MemoryError", "x = [0]\nwhile True: x += x"),
    "memory in spite of errors": (
        f"{LATE}|{NOTHING}", "x = []\nwhile True:\n    try: x.append(bytearray(2**20))\n    except MemoryError: pass",
    ),
    "a full /tmp": ("raised OSError", "for i in range(10**6): open(f'/tmp/{i}', 'wb').write(bytes(2**20))"),
    "a full /dev/shm": ("raised OSError", "for i in range(10**6): open(f'/dev/shm/{i}', 'wb').write(bytes(2**20))"),
    "a file too long": ("raised OSError", "with open('/tmp/x', 'wb') as f:\n    while True: f.write(bytes(2**20))"),
    "a print without end": (LATE, "while True: print('passed')"),
    "a result without end": ("too much output", _FORGE + "while True: forge(b'[[true, 0]]' * 100)"),
    "a long string": ("too much output", "def f(n): return 'passed' * 10**6"),
    "a long number": (f"{NOTHING}|{WRONG}", "def f(n): return 10**100000"),
    "a deep list": ("raised RecursionError", "x = []\nfor _ in range(10**5): x = [x]\ndef f(n): return x"),
    "a list in itself": ("raised RecursionError", "x = []\nx.append(x)\ndef f(n): return x"),
    "a list of exponential size": (f"raised MemoryError|{LATE}", "x = []\nfor _ in range(99): x = [x, x]\ndef f(n): return x"),
    "recursion without end": (
        f"{NOTHING}|{LATE}|raised", "import sys\nsys.setrecursionlimit(10**9)\ndef f(n): return f(n) + 1",
    ),
    "a loop": (LATE, "while True: pass"),
    "a loop that catches everything": (LATE, "while True:\n    try:\n        while True: pass\n    except BaseException: pass"),
    "a loop in C": (LATE, "import itertools\ndef f(n): return sum(itertools.repeat(1))"),
    "a sleep": (LATE, "import time\ntime.sleep(999)"),
    "all signals ignored": (
        LATE, "import signal\nfor s in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}: signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
    ),
    "a loop at exit": ("raised SystemExit", "import atexit, time\natexit.register(time.sleep, 999)\nraise SystemExit(0)"),
    "a thread that stays": (
        "raised SystemExit", "import threading, time\nthreading.Thread(target=time.sleep, args=(999,)).start()\nraise SystemExit(0)",
    ),
}  # fmt: skip

CHEATS: dict[str, tuple[str, str]] = {
    f"{kind}: {name}": cheat
    for kind, cheats in {
        "exit": _EXITS, "object": _OBJECTS, "patch": _PATCHES, "forgery": _FORGERIES, "hunt": _HUNTS, "harm": _HARM,
    }.items()
    for name, cheat in cheats.items()
}  # fmt: skip


def _says(value: str, left: str = "[]") -> str:
    """A candidate whose answers, where f is called, are these."""
    return (
        "import __main__, json\nhonest = __main__.answer\ndef f(n): return 0\n"
        "def answer(number, target, arguments, keywords):\n"
        "    if target != ['name', 'f']: return honest(number, target, arguments, keywords)\n"
        f"    return json.dumps([number, True, {value}, {left}])\n__main__.answer = answer\n"
    )


_MATH = "assert math.isclose(f(2), 7919)"
_CAUGHT = "try:\n    f(2)\nexcept BaseException:\n    pass\nassert f(3) is None"
_REFUSES = "try:\n    f(2)\nexcept ValueError as error:\n    pass\nelse:\n    raise AssertionError"
_TWICE = "assert f(1) == 1\nassert f(2) == 2"
_PROMPT = "def turn(s):\n    return s[1:] + s[:1]\n\n\ndef back(s):\n    'Undoes turn.'\n"
_BACK = "def check(candidate):\n    for text in ('abc', 'xy', 'pqrst'):\n        assert candidate(turn(text)) == text\n"
_ANSWER = """
import __main__, os, sys
def send(number, value):
    os.write(__main__.given["answers"], f'["{number}", true, {value}, []]\\n'.encode())
def number():
    return sys._getframe(2).f_locals["number"]
"""
NO, RAISED = "no result", "raised "

CALLS: dict[str, tuple[str, str, str]] = {
    # Names that a test uses.
    "its own check": ("failed", f"def check(candidate):\n    {TEST.replace('f(', 'candidate(')}\ncheck(f)", "def check(f): pass\ndef f(n): return 0"),
    "its own math": ("failed", _MATH, "class math: isclose = staticmethod(lambda *a: True)\ndef f(n): return 0"),
    "math's function": ("failed", "import math\n" + _MATH, "import math\nmath.isclose = lambda *a: True\ndef f(n): return 0"),
    "its own set": ("failed", "assert set(f(2)) == {7919}", "def set(n): return {7919}\ndef f(n): return []"),
    "its own abs": ("failed", "assert abs(f(2) - 7919) < 1e-6", "import builtins\nabs = builtins.abs = lambda n: 0\ndef f(n): return 0"),
    "the prompt's helper, in front of the test": (
        "failed", _PROMPT + "\n" + _BACK + "check(back)", "def turn(s): return s\ndef back(s): return s",
    ),
    "the prompt's helper, behind the prompt": (
        "failed", _BACK + "check(back)", _PROMPT + "    return s\ndef turn(s): return s\nglobals()['turn'] = turn",
    ),
    "the module of the prompt's helper": (
        "failed", _BACK + "check(back)", _PROMPT + "    return s\nimport __main__\n__main__.module.turn = lambda s: s",
    ),
    # Objects.
    "what is equal to everything": ("failed", TEST, _equal("object", "Equal()")),
    "int that is equal to everything": ("failed", TEST, _equal("int", "Equal(0)")),
    "list of what is equal to everything": ("failed", "assert f(2) == [7919]", _equal("object", "[Equal()]")),
    "set of what is equal to everything": ("failed", "assert f(2) == {7919}", _equal("object", "{Equal()}")),
    "what is in everything": ("failed", "assert 7919 in f(2)", "class A:\n    def __contains__(self, n): return True\n    def __iter__(self): return iter([])\ndef f(n): return A()"),
    "what is false": ("failed", "assert not f(2)", "class A:\n    def __bool__(self): return False\n    def __len__(self): return 0\ndef f(n): return A()"),
    "what is less and more": (RAISED + "TypeError", "assert f(2) > 7918", "class A:\n    def __gt__(self, n): return True\ndef f(n): return A()"),
    "what stays itself": (
        RAISED + "TypeError", "assert abs(f(2) - 7919) < 1e-6",
        "class A:\n    def __sub__(self, n): return self\n    def __abs__(self): return self\n    def __lt__(self, n): return True\ndef f(n): return A()",
    ),
    "iteration without end": ("raised MemoryError|timed out", "assert sorted(f(2)) == [7919]", "import itertools\ndef f(n): return itertools.count()"),
    "a length that lies": ("raised MemoryError|failed", "assert list(f(2)) == [7919]", "class A:\n    def __len__(self): return 2**60\n    def __iter__(self): return iter([])\ndef f(n): return A()"),
    "a text that is none": (RAISED + "TypeError", "assert str(f(2)) == '7919'", "import __main__\n__main__.OPERATIONS['str'] = lambda n: n\ndef f(n): return object()"),
    # Exceptions.
    "an exception of that name": (RAISED + "Exception", _REFUSES, "class ValueError(Exception): pass\ndef f(n): raise ValueError"),
    "an exception with a line of its own": (
        RAISED + "Exception", _REFUSES, "class E(Exception):\n    __mro__ = (ValueError,)\n    __class__ = ValueError\ndef f(n): raise E",
    ),
    "an exception whose text exits": (NO, _CAUGHT, "import os\nclass E(Exception):\n    def __str__(self): os._exit(0)\ndef f(n): raise E"),
    "an exception whose text raises": (
        RAISED + "Exception", _REFUSES, "class E(Exception):\n    def __str__(self): raise ValueError\ndef f(n): raise E",
    ),
    "StopIteration": (RAISED + "StopIteration", TEST, "def f(n): raise StopIteration"),
    "SystemExit": (RAISED + "SystemExit", TEST, "def f(n): raise SystemExit(0)"),
    "an exit where everything is caught": (NO, _CAUGHT, "import os\ndef f(n): os._exit(0)"),
    "a closed pipe where everything is caught": (NO, _CAUGHT, "import os\ndef f(n): os.closerange(0, 256)"),
    "too long an answer where everything is caught": ("too much output", _CAUGHT, "def f(n): return 'a' * 10**6"),
    "a malformed answer where everything is caught": (NO, _CAUGHT, _says("['tuple', 0]")),
    # Answers.
    "two answers": (NO, _TWICE, _ANSWER + "def f(n):\n    send(number(), 1)\n    send(number(), 2)\n    os._exit(0)"),
    "an answer and one more": (NO, _TWICE, _ANSWER + "def f(n):\n    if n == 1: send(number(), 1)\n    return n"),
    "an answer to a later request": (NO, TEST, _ANSWER + "send('0' * 16, 7919)\ndef f(n): return 7919"),
    "an answer to an earlier request": (NO, _TWICE, _ANSWER + "last = []\ndef f(n):\n    last.append(number())\n    if n == 1: return 1\n    send(last[0], 2)"),
    "answers without end": (NO, TEST, _ANSWER + "while True: send('0' * 16, 7919)"),
    "a line without end": ("too much output", TEST, _ANSWER + "while True: os.write(__main__.given['answers'], b'9' * 1000)"),
    "half an answer": ("timed out", TEST, _ANSWER + "import time\ndef f(n):\n    os.write(__main__.given['answers'], b'[')\n    time.sleep(99)"),
    "no answer": ("timed out", TEST, "import time\ndef f(n): time.sleep(99)"),
    "no answer, and a closed pipe": (NO, TEST, _ANSWER + "import time\ndef f(n):\n    os.close(__main__.given['answers'])\n    os.close(__main__.given['requests'])\n    time.sleep(99)"),
    "requests that are taken by a thread": (
        f"{NO}|timed out", TEST, _ANSWER + "import threading\ndef take():\n    while True: os.read(__main__.given['requests'], 10**6)\n"
        "threading.Thread(target=take, daemon=True).start()\ndef f(n): return 0",
    ),
    "a request of its own": (
        f"{NO}|failed", TEST, _ANSWER + "w = open(f\"/proc/self/fd/{__main__.given['requests']}\", 'wb')\n"
        "w.write(b'[\"0\", [\"name\", \"f\"], [2], {}]\\n')\nw.flush()\ndef f(n): return 0",
    ),
    "a verdict": (NO, TEST, _FORGE + "forge(b'[\"passed\", \"\", 0]')\nos._exit(0)"),
    "a verdict in an answer": ("failed", TEST, "def f(n): return ['passed', '', 0]"),
    "json": (NO, TEST, "import json\njson.dumps = lambda *a: '[\"passed\", \"\", 0]'\ndef f(n): return 0"),
    "builtins": ("failed", TEST, "import builtins\nbuiltins.AssertionError = builtins.Exception = SystemExit\nbuiltins.id = lambda v: 0\ndef f(n): return 0"),
    "brackets without end": (NO, TEST, _ANSWER + "def f(n): os.write(__main__.given['answers'], b'[' * 60000 + b'\\n')"),
    "lists without end": (f"{NO}|failed", TEST, _says("json.loads('[\"list\", [' * 450 + ']]' * 450)")),
    "digits without end": (NO, TEST, _ANSWER + "def f(n):\n    send(number(), '9' * 60000)\n    os._exit(0)"),
    "a number for a name": (NO, TEST, _says("['object', True]")),
    "an object that is named": (NO, TEST, _says("['name', 'f']")),
    "an operation": (NO, TEST, _says("['operation', 'value']")),
    "a kind that is no value": (NO, TEST, _says("['kind', 'eval']")),
    "a set of lists": (NO, TEST, _says("['set', [['list', []]]]")),
    "a list of a text": (NO, TEST, _says("['list', '7919']")),
    "a tag that is a list": (NO, TEST, _says("[['list', []], []]")),
    "three parts": (NO, TEST, _says("['list', [], []]")),
    "a dictionary of ones": (NO, TEST, _says("['dict', [1]]")),
    "a dictionary": (NO, TEST, _says("{}")),
    "an iterator that is none": (NO, "assert list(f(2)) == [7919]", "import __main__\n__main__.OPERATIONS['iter'] = lambda n: [7919]\ndef f(n): return object()"),
    # Arguments.
    "arguments that became others": (NO, "a = [7919]\nassert f(a) is None and a == [0]", _says("None", "[['tuple', []]] * len(arguments)")),
    "arguments that became too many": (NO, "a = [7919]\nassert f(a) is None and a == [0]", _says("None", "[['list', [0]]] * 9")),
    "arguments changed, and a value": ("failed", "a = [7919]\nassert f(a) == len(a)", _says("0", "[['list', []]] * len(arguments)")),
    "arguments cleared, and a value": ("failed", "a = [7919]\nassert f(a) == sum(a)", "def f(a): a.clear(); return 0"),
    # Looking for what is expected.
    "what it can read": (
        "failed|raised|timed out", TEST, _HUNT + "import fcntl\ndef f(n):\n    for d in range(3, 256):\n        try:\n"
        "            fcntl.fcntl(d, fcntl.F_SETFL, os.O_NONBLOCK)\n            found = hunt(os.read(d, 10**6))\n        except OSError: continue\n        if found: return found",
    ),
    "what the pipes have": (
        "failed|raised|timed out", TEST, _HUNT + "import fcntl\ndef f(n):\n    for path in glob.glob('/proc/self/fd/*'):\n        try:\n"
        "            d = os.open(path, os.O_RDONLY | os.O_NONBLOCK)\n            found = hunt(os.read(d, 10**6))\n        except OSError: continue\n        if found: return found",
    ),
    "what an operator is given": (
        RAISED + "TypeError", "assert f(2) - 7919 == 0", "class A:\n    def __sub__(self, n): return 0\ndef f(n): return A()",
    ),
}  # fmt: skip


class Host:
    """What a cheat may want to read or to destroy."""

    def __init__(self, folder: Path, home: Path) -> None:
        self.victim = folder / "victim" / "file"
        self.victim.parent.mkdir()
        self.victim.write_text("whole", encoding="utf-8")
        self.answers = folder / "answers"
        self.home = home / "answers"
        for path in (self.answers, self.home):
            path.write_text("7919", encoding="utf-8")
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.calls = 0
        threading.Thread(target=self._answer, daemon=True).start()

    def _answer(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:  # closed
                return
            self.calls += 1
            with connection:
                connection.sendall(b"7919")

    def addressed(self, code: str) -> str:
        port = str(self.listener.getsockname()[1])
        names = {"VICTIM": self.victim, "ANSWERS": self.answers, "HOME": self.home, "PORT": port}
        return re.sub("@([A-Z]+)@", lambda found: str(names[found[1]]), code)


@contextmanager
def attacked(folder: Path) -> Iterator[Host]:
    """A host whose answers lie in that folder, at home, in its environment and behind a port."""
    with tempfile.TemporaryDirectory(dir=Path.home()) as home, mock.patch.dict("os.environ", GEMMARY_ANSWERS="7919"):
        found = Host(folder, Path(home))
        yield found
        found.listener.close()


def sandbox_of(limits: Limits) -> Sandbox:
    """A sandbox; the test is skipped where there can be none, unless GEMMARY_REQUIRE_SANDBOX=1 makes that a failure."""
    try:
        return Sandbox(limits)
    except GemmaryError as error:
        if os.environ.get("GEMMARY_REQUIRE_SANDBOX") == "1":
            raise
        pytest.skip(str(error))


def children_of_this() -> set[str]:
    """Of this process, zombies too."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            if path.read_text(encoding="utf-8").rpartition(")")[2].split()[1] == str(os.getpid()):
                found.add(path.parent.name)
    return found
