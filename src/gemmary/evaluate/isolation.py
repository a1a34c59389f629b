"""How a hostile program is started, bounded, listened to and ended; `sandbox` decides what it is given and what its words count for."""

from __future__ import annotations

import glob
import math
import os
import platform
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemmary.errors import check_bounds
from gemmary.evaluate.harness import system_call_filter

__all__ = ["Limits", "confinement", "interpreter", "interpreters_in_bubblewrap", "output", "running", "trial"]

_PROBE_SECONDS = 20.0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one candidate with all its tests; GemmaryError where one is out of bounds."""

    seconds: float = 5.0
    """On the wall clock, the interpreter's start (some 50 ms) included."""
    memory_bytes: int = 512 * 2**20
    """Of address space; of each process."""
    output_bytes: int = 64 * 2**10
    """Of all values together, as JSON; of one answer, where a test program asks."""
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


def confinement(limits: Limits) -> dict[str, Any]:
    """What a program of `harness` needs to confine itself: the part of its standard input that is about limits."""
    return {
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


def interpreter() -> list[str]:
    """The command of a Python with its standard library only; the program comes behind it."""
    # The base interpreter: a virtual environment's would need that environment's files.
    executable = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    return [executable, "-I", "-S", "-c"]


def interpreters_in_bubblewrap(limits: Limits) -> list[list[str]]:
    """Commands to try, best first; none where bubblewrap is not installed."""
    found = shutil.which("bwrap")
    if found is None:
        return []
    python = interpreter()
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


def trial(command: Sequence[str], given: bytes, wanted: bytes) -> str:
    """Why the command does not say what it should; empty where it does."""
    try:
        done = subprocess.run(command, input=given, capture_output=True, timeout=_PROBE_SECONDS, env={}, cwd="/")
    except subprocess.TimeoutExpired:
        return f"{command[0]} does not work here (no answer in {_PROBE_SECONDS:g} seconds)"
    except OSError as error:
        return f"{command[0]} does not work here ({error})"
    if done.stdout == wanted:
        return ""
    last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
    return f"{command[0]} does not work here ({last[0]})"


@contextmanager
def running(command: Sequence[str], given: bytes, descriptors: Sequence[int] = ()) -> Iterator[int]:
    """The command with `given` as its standard input, as the descriptor that its standard output comes from.

    It has a new, empty folder and, under their numbers, the `descriptors`. At the end it has been killed, with all that it
    started.
    """
    # A file and no pipe: a child that does not read cannot hold this process up.
    with tempfile.TemporaryFile() as file, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        file.write(given)
        file.seek(0)
        with subprocess.Popen(
            command, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=folder, env={},
            start_new_session=True, pass_fds=descriptors,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            try:
                yield process.stdout.fileno()
            finally:
                _end(process)


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


def output(pipe: int, most: int, deadline: float) -> bytes | str:
    """All that comes until the other end closes, or why it does not count; `deadline` is of `time.monotonic`."""
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
