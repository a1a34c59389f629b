"""A watchdog over the loop: where nothing has happened for too long, it says what was waited for and writes down every stack.

A hung collective, a device that died, a source that gives no batch, a file system that does not answer: none raises anything.
The watchdog is a thread of its own, which touches no file and no device before it has something to say.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from gemmary.processes import EXIT_CODE

__all__ = ["Place", "Watchdog"]

_LEAST, _TIMES = 300.0, 20.0
_PATIENT = 3600.0  # at least, and ten times a step's limit, for what is slow by nature
_SLOW_BY_NATURE = ("start", "saving", "evaluation")
_WAITS = {
    "start": "the start (compiling, or reading a checkpoint)",
    "data": "the next batch",
    "steps": "the device",
    "saving": "a save",
    "evaluation": "an evaluation",
}
_LAST_WORDS = 30.0  # seconds to write the stacks in, on a file system that may hang as well


class Place(NamedTuple):
    """Where the loop is: what it is at (see `goodput`), the step it is at, and a token that changes whenever something was done.

    `usual` is the median of a step's seconds, None before the first has ended.
    """

    at: str
    step: int
    token: tuple[int, int]
    usual: float | None


class Watchdog:
    """Looks at `place` until it is closed.

    `seconds` is the limit without the end of a step: None is 20 times the usual step and at least 300 s. Compiling, saving,
    evaluation, and the first step (which may compile) have ten times that and at least an hour. `exits`: the process
    ends with EXIT_CODE, so that what manages it starts it again; otherwise it is only said, once for each hang.
    """

    def __init__(
        self,
        place: Callable[[], Place | None],
        folder: Path,
        *,
        seconds: float | None,
        exits: bool,
        say: Callable[[str], None],
        process: int = 0,
        processes: int = 1,
    ) -> None:
        self._place, self._folder, self._seconds, self._exits, self._say = place, folder, seconds, exits, say
        self._process, self._processes = process, processes
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End it."""
        self._closed.set()
        self._thread.join(1.0)

    def _limit(self, place: Place) -> float:
        limit = max(_LEAST, _TIMES * (place.usual or 0.0)) if self._seconds is None else self._seconds
        compiles = place.at == "steps" and place.usual is None
        return max(_PATIENT, 10 * limit) if compiles or place.at in _SLOW_BY_NATURE else limit

    def _watch(self) -> None:
        pause = min(5.0, (self._seconds or _LEAST) / 8)
        token, quiet, told, before = None, 0.0, False, time.monotonic()
        while not self._closed.wait(pause):
            now = time.monotonic()
            # A process that was stopped and goes on did not hang: no look counts for more than two.
            quiet, before = quiet + min(now - before, 2 * pause), now
            place = self._place()
            if place is None or place.token != token:
                if told and place is not None:
                    self._say(f"it goes on, at step {place.step}")
                token, quiet, told = place.token if place else None, 0.0, False
            elif not told and quiet > self._limit(place):
                told = True
                self._bark(place, quiet)

    def _bark(self, place: Place, quiet: float) -> None:
        """In a thread that is waited for so long and no longer: what hangs the loop may hang the file system."""
        words = threading.Thread(target=self._tell, args=(place, quiet), daemon=True)
        words.start()
        words.join(_LAST_WORDS)
        if self._exits:
            os._exit(EXIT_CODE)

    def _tell(self, place: Place, quiet: float) -> None:
        number = f"_{self._process}" if self._process else ""
        path = self._folder / f"hang_{place.step:08d}{number}.txt"
        usual = f" (one takes {place.usual:.3g} s)" if place.usual is not None else ""
        line = f"step {place.step} hangs: no step has ended for {quiet:.3g} s{usual}; it waits for {_WAITS[place.at]}"
        if self._processes > 1:
            line += (
                f"; of {self._processes} processes another may be lost: its own hang file, or that it has none, tells"
            )
        self._say(f"{line}; every thread's stack: {path}")
        try:
            with path.open("w", encoding="utf-8") as out:
                out.write(f"{time.strftime('%Y-%m-%d %H:%M:%S %z')} {line}\n\n")
                out.flush()
                faulthandler.dump_traceback(out, all_threads=True)
        except OSError as error:
            self._say(f"{path} cannot be written: {error.strerror}")
        if self._exits:
            self._say(f"the process ends with exit code {EXIT_CODE} (hang_exits)")
            sys.stdout.flush()
            sys.stderr.flush()
