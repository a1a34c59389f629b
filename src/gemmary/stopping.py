"""Stopping when asked: of several processes all after the same step, whichever of them is asked."""

from __future__ import annotations

import threading
from contextlib import suppress

from gemmary import processes

__all__ = ["Stopping"]

_LOOK = 0.25  # seconds
_names = 0


class Stopping:
    """Whether to stop: whichever process is asked, all stop after the same step.

    Steps are sent off ahead of the devices, so no process may simply stop where it is: the others' devices would wait for it.
    A thread tells the others, all tell how far they are, and the step after the farthest is the last.
    """

    def __init__(self) -> None:
        self._asked, self._closed = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._done, self._last = -1, -1
        self._thread: threading.Thread | None = None
        if processes.count() > 1:
            global _names
            _names += 1
            self._name = f"stop.{_names}"
            self._thread = threading.Thread(target=self._listen, name="stopping", daemon=True)
            self._thread.start()

    @property
    def asked(self) -> bool:
        """Whether this process was."""
        return self._asked.is_set()

    def ask(self) -> None:
        """May be called by a signal's handler."""
        self._asked.set()

    def due(self, done: int) -> bool:
        """Now, `done` steps being done. May wait for a moment, where processes are about to agree."""
        if self._thread is None:
            return self.asked
        with self._lock:
            self._done = done
            return 0 <= self._last <= done

    def close(self) -> None:
        """Nobody is listened to any more."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(8 * _LOOK)

    def _listen(self) -> None:
        while not self._closed.wait(_LOOK):
            with suppress(Exception):  # without the service the roll call has the word
                if self._asked.is_set():
                    processes.note(self._name)
                if processes.noted(self._name):
                    with self._lock:
                        self._last = 1 + max(
                            map(int, processes.exchange(f"{self._name}.at", str(self._done), seconds=60))
                        )
                    return
