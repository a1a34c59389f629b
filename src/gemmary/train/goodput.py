"""Goodput: the share of a run's time since its first beginning that went into steps that count in the end.

Time is split by what the loop was at. `steps` are productive: those that the run kept. The rest is lost:

start        from the beginning of a sitting to its first step, and compiling at any time
data         waiting for a batch while the device had nothing to do
saving       what the loop waits for; a checkpoint is written behind its back
evaluation   hooks, journal and reports
repeated     steps that a kill took and that are done again
down         between two sittings: nothing ran

`goodput.json` in the run's folder keeps the sums over all sittings, and the productive seconds at each checkpoint's step: where
a sitting goes on from a step, what was productive beyond it becomes `repeated`. It is written aside and renamed, so that a
kill leaves the last one whole; what ran after that counts as `down`. Between sittings the wall clock tells time, within one
the monotonic clock.
"""

from __future__ import annotations

import json
import threading
import time
from bisect import bisect_left
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from gemmary.checkpoints.checkpoint import write_whole

__all__ = ["LOST", "Goodput"]

LOST = ("start", "data", "saving", "evaluation", "repeated", "down")
"""Causes of lost time, in the order that they are told in."""

_FORMAT, _MARKS = 1, 64
_LOADED = time.monotonic()  # near enough the beginning of the process


class Goodput:
    """The account of one run. Any thread may ask it; only the loop enters.

    `run` names what is run: the record of another is forgotten; None takes what there is. Nothing is kept where `path` is None.
    """

    def __init__(
        self,
        path: Path | None,
        run: str | None = None,
        *,
        wall: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
        loaded: float = _LOADED,
    ) -> None:
        self._path, self._run = path, run
        self._wall, self._clock, self._loaded = wall, clock, loaded
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._opened = self._since = clock()
        record = _read(path, run)
        self._known = record is not None
        self._began_wall = self._last = float(record["last"]) if record else wall()
        self._began = self._opened
        self._seconds: dict[str, float] = dict.fromkeys(("steps", *LOST), 0.0) | (record["seconds"] if record else {})
        self._marks: list[tuple[int, float]] = record["marks"] if record else []
        self._sittings: int = record["sittings"] if record else 0
        self.at: str | None = None
        """What the loop is at: a cause, or `steps`; None outside of a sitting."""

    def begin(self, step: int) -> None:
        """A sitting that goes on from this step. What the process did before, if it began since the last sitting, was its start."""
        with self._lock:
            now, seconds = self._clock(), self._seconds
            self._began, self._began_wall = now, self._wall()
            starting = now - self._opened
            if self._known:
                kept = float(np.interp(step, [at for at, _ in self._marks], [spent for _, spent in self._marks]))
                seconds["repeated"] += seconds["steps"] - kept
                seconds["steps"] = kept
                away, alive = max(0.0, self._began_wall - self._last), now - self._loaded
                starting = min(alive if alive < away else starting, away)
                seconds["down"] += away - starting
            seconds["start"] += starting
            self._sittings += 1
            self._known, self.at, self._since = True, "start", now
        self.mark(step)

    def enter(self, cause: str) -> None:
        """From now on the loop is at this."""
        with self._lock:
            self._settle()
            self.at = cause

    def move(self, seconds: float, source: str, target: str) -> None:
        """So much of what counted as one was the other."""
        with self._lock:
            self._seconds[source] -= seconds
            self._seconds[target] += seconds

    def mark(self, step: int) -> None:
        """A checkpoint of this step is on its way to disk: what was productive up to here stays so."""
        with self._lock:
            self._settle()
            del self._marks[bisect_left(self._marks, step, key=lambda mark: mark[0]) :]
            self._marks = [*self._marks[:1], *self._marks[1:][-_MARKS:], (step, self._seconds["steps"])]
        self.write()

    def end(self) -> None:
        """Of the sitting."""
        with self._lock:
            self._settle()
            self.at = None
        self.write()

    def figures(self) -> dict[str, float]:
        """Goodput of all time (`of_all`) and without `down` (`of_running`), all seconds, and the seconds of each cause.

        Empty where there is no account of any sitting.
        """
        with self._lock:
            if not self._known:
                return {}
            self._settle()
            found, steps = {name: round(value, 3) for name, value in self._seconds.items()}, self._seconds["steps"]
            total = sum(self._seconds.values())
            running = total - self._seconds["down"]
        shares = {"of_all": round(steps / max(total, 1e-9), 4), "of_running": round(steps / max(running, 1e-9), 4)}
        return {**shares, "seconds": round(total, 3), **found}

    def write(self) -> None:
        """As it is now. A disk that takes nothing is left alone until the next time: the journal says so already."""
        if self._path is None or not self._known:
            return
        with self._writing:  # and nobody who only asks waits for the disk
            with self._lock:
                self._settle()
                record = {
                    "format": _FORMAT, "run": self._run, "sittings": self._sittings, "last": self._last,
                    "seconds": self._seconds, "marks": self._marks,
                }  # fmt: skip
                text = json.dumps(record) + "\n"
            with suppress(OSError):
                write_whole(self._path, text.encode())

    def _settle(self) -> None:
        if self.at is None:
            return
        now = self._clock()
        self._seconds[self.at] += now - self._since
        self._since, self._last = now, self._began_wall + now - self._began


def _read(path: Path | None, run: str | None) -> dict[str, Any] | None:
    """The record so far; none where it is of another run, or damaged."""
    try:
        record = json.loads(path.read_bytes()) if path else None
        if not record or record["format"] != _FORMAT or run not in (None, record["run"]):
            return None
        marks = [(int(step), float(seconds)) for step, seconds in record["marks"]]
        seconds = {name: float(record["seconds"][name]) for name in ("steps", *LOST)}
        known = {"last": float(record["last"]), "sittings": int(record["sittings"]), "seconds": seconds, "marks": marks}
        return known if marks else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
