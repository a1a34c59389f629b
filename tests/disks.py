"""A disk that fails on demand: every operation that changes a folder is counted, and one of them raises.

Python announces what it does to files (audit events), and an exception from the listener is the operation's own; fsync,
which it does not announce, is wrapped. TensorStore and safetensors write on their own: a limit on file sizes cuts those off.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

__all__ = ["Disk", "small_files"]

_CHANGES = {"open", "os.mkdir", "os.rename", "os.truncate", "os.link", "os.symlink", "fsync"}
_active: Disk | None = None


class Disk:
    """Operations under `folder` while `watched`; the one numbered `fails` raises `error`, an errno."""

    def __init__(self, folder: Path, fails: int = -1, error: int = 0) -> None:
        self._folder, self._fails, self._error = f"{folder}{os.sep}", fails, error
        self.operations: list[str] = []

    def _happens(self, event: str, arguments: tuple[Any, ...]) -> None:
        path = arguments[0] if isinstance(arguments[0], str) else os.fspath(arguments[0])
        reads = event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if reads or not str(path).startswith(self._folder):
            return
        self.operations.append(f"{event} {str(path)[len(self._folder) :]}")
        if len(self.operations) == self._fails + 1:
            raise OSError(self._error, os.strerror(self._error), str(path))

    @contextmanager
    def watched(self) -> Iterator[Disk]:
        """Count, and fail."""
        global _active
        sync = os.fsync

        def fsync(descriptor: int) -> None:
            _listen("fsync", (os.readlink(f"/proc/self/fd/{descriptor}"),))
            sync(descriptor)

        with pytest.MonkeyPatch.context() as patch:
            if Path("/proc/self/fd").is_dir():
                patch.setattr(os, "fsync", fsync)
            _active = self
            try:
                yield self
            finally:
                _active = None


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if _active is not None and event in _CHANGES and isinstance(arguments[0], str | bytes | os.PathLike):
        _active._happens(event, arguments)


sys.addaudithook(_listen)


@contextmanager
def small_files(most: int) -> Iterator[None]:
    """While it lasts, no file of this process grows beyond so many bytes: a write there fails, whoever writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
