"""Traces on demand: `touch RUN/profile`, SIGUSR1 to the process, or steps named beforehand.

The next five steps are traced by `jax.profiler` into `RUN/traces/step_N`, N being the first of them, as
`.xplane.pb` for XProf (TensorBoard's profile plug-in) and `.trace.json.gz` for https://ui.perfetto.dev. Nothing that fails here ends a run: it is said. Of many processes the first looks for
the file; a signal is for the process that gets it, and named steps are traced by all.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path

import jax

__all__ = ["STEPS", "Traces"]

STEPS = 5
"""Of a trace."""
_FILE = "profile"


class Traces:
    """The traces of one run. The loop calls all but `ask` and `look`, which any thread may."""

    def __init__(self, folder: Path, at: Collection[int], say: Callable[[str], None]) -> None:
        self._folder, self._at, self._say = folder, frozenset(at), say
        self._asked = threading.Event()
        self._blind = False
        self._first: int | None = None

    def ask(self) -> None:
        """The next steps are traced, if none are being traced now."""
        self._asked.set()

    def look(self) -> None:
        """Ask where the file is there, and remove it: it is taken once."""
        path = self._folder / _FILE
        if self._blind or not path.exists():
            return
        try:
            path.unlink()
        except OSError as error:
            self._blind = True
            self._say(f"{path} cannot be removed ({error.strerror}): it is traced once, and not looked for again")
        self.ask()

    def before(self, step: int) -> None:
        """This step comes next."""
        if self._first is not None or not (self._asked.is_set() or step in self._at):
            return
        self._asked.clear()
        if why := _would_crash():
            self._say(f"no trace of step {step}: {why}")
            return
        try:
            jax.profiler.start_trace(self._path(step))
            self._first = step
        except Exception as error:  # of the profiler's and the disk's many kinds none is worth a run
            self._say(f"no trace of step {step}: {_line(error)}")

    def complete(self, step: int) -> bool:
        """Is a trace under way, and this step its last? Then it is to be closed, when the device is done with it."""
        return self._first is not None and step >= self._first + STEPS - 1

    def close(self, last: int) -> None:
        """Write what is being traced, up to this step."""
        if self._first is None:
            return
        first, self._first = self._first, None
        try:
            jax.profiler.stop_trace()
            self._say(f"trace of steps {first} to {last}: {self._path(first)}")
        except Exception as error:
            self._say(f"no trace of step {first}: {_line(error)}")

    def _path(self, first: int) -> Path:
        return self._folder / "traces" / f"step_{first:08d}"


def _would_crash() -> str | None:
    """Why the profiler would take the process with it: a libtpu of another version than JAX's own, seen with 0.0.52 and JAX 0.10.2."""
    maps = Path("/proc/self/maps")
    if not maps.is_file() or "libtpu" not in maps.read_text():
        return None
    wanted = next((line for line in metadata.requires("jax") or () if line.startswith("libtpu==")), "libtpu==*").split(
        ";"
    )[0]
    try:
        found = metadata.version("libtpu")
    except metadata.PackageNotFoundError:
        return None
    if fnmatchcase(f"{found}.", wanted.strip().removeprefix("libtpu==")):
        return None
    return f"libtpu is {found}, whose profiler would crash; pip install '{wanted.strip()}', or set JAX_PLATFORMS=cpu"


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
