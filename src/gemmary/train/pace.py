"""How long each step takes, without a stop of the device after each.

A step is sent on its way and the next one prepared while the device works, so the loop itself does not know when a step ends.
A thread does: it waits for the loss of each step in turn, which costs neither the device nor the loop anything. What is measured:

- the end of a step is when the host hears of its loss: some ten microseconds late, more where the interpreter is busy;
- a step's time runs from the end of the one before, or from when its batch was asked for, if that is later (a save or an
  evaluation lay between);
- of it, waiting for data is from when the device had nothing to do until the batch was there. All else is called the device's:
  also what a step does on the host, such as sampling answers and judging them. Compiling is left out.

In a run of many processes a step ends at about the same time for all: each waits for the slowest in its collectives, so a slow
step says that some process was slow, not which.
"""

from __future__ import annotations

import queue
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import jax

__all__ = ["Pace", "Taken"]

_RECENT, _ENOUGH = 50, 10
_TIMES, _MORE = 2.0, 0.1


class Taken(NamedTuple):
    """A step that was sent on its way: when its batch was asked for and there (monotonic seconds), and what of it was compiling."""

    number: int
    asked: float
    there: float
    compiling: float
    loss: Any


class Pace:
    """Ends of steps. `hidden` is told the seconds of each wait for data in which the device was still at work."""

    def __init__(self, hidden: Callable[[float], None]) -> None:
        self._hidden = hidden
        self._taken: queue.SimpleQueue[Taken | None] = queue.SimpleQueue()
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._slow: list[tuple[float, int, str]] = []
        self._sent, self._changed, self._last = 0, threading.Condition(), 0.0
        self.ended = 0
        """Steps of this sitting."""
        self._thread = threading.Thread(target=self._wait, name="pace", daemon=True)
        self._thread.start()

    def sent(self, taken: Taken) -> None:
        """A step is on its way to the device."""
        self._sent += 1
        self._taken.put(taken)

    def busy(self) -> bool:
        """Is the device at a step?"""
        return self._sent > self.ended

    def median(self) -> float | None:
        """Seconds of one of the last 50 steps; None before the first end."""
        with self._changed:
            return statistics.median(self._recent) if self._recent else None

    def slow(self) -> dict[str, Any] | None:
        """Steps since the last time of asking that took twice the median of the 50 before and a tenth of a second more.

        Their `count`, and of the worst its `worst_step`, `worst_seconds` and `cause`: data or device. None where there were none.
        To be asked when the device has no work left.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self.busy(), timeout=1.0)
            found, self._slow = self._slow, []
        if not found:
            return None
        seconds, number, cause = max(found)
        return {"count": len(found), "worst_step": number, "worst_seconds": round(seconds, 3), "cause": cause}

    def close(self) -> None:
        """End the thread; one that waits for a device that never answers is left behind."""
        self._taken.put(None)
        self._thread.join(1.0)

    def _wait(self) -> None:
        while (taken := self._taken.get()) is not None:
            with suppress(Exception):  # which the loop meets as well, and says
                jax.block_until_ready(taken.loss)
            now = time.monotonic()
            with self._changed:
                self._end(taken, now)
                self.ended += 1
                self._changed.notify_all()

    def _end(self, taken: Taken, now: float) -> None:
        idle = max(self._last, taken.asked)  # since then the device had nothing to do, or else had the step before
        waited = max(0.0, taken.there - idle)
        seconds = now - idle - taken.compiling
        if hidden := taken.there - taken.asked - waited:
            self._hidden(hidden)
        if len(self._recent) >= _ENOUGH:
            usual = statistics.median(self._recent)
            if seconds > _TIMES * usual and seconds > usual + _MORE:
                self._slow.append((seconds, taken.number, "data" if waited > seconds / 2 else "device"))
        self._recent.append(seconds)
        self._last = now
