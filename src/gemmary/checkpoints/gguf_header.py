"""A GGUF's bytes, in one file or in parts, and a cursor over its header that never reads past a limit or the end."""

from __future__ import annotations

import bisect
import struct
from collections.abc import Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from gemmary.errors import GemmaryError

__all__ = ["ARRAY", "SCALARS", "STRING", "Header", "Parts"]

# Value types of metadata, by their number: struct code, or NumPy dtype for arrays of it.
SCALARS, STRING, ARRAY = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}, 8, 9

_MOST_STRING = 16 << 20
_MOST_ELEMENTS = 4 << 20


class Parts:
    """Files read as if they were one."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.where = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more parts"
        self._files: list[BufferedReader] = []
        self._starts = [0]
        try:
            for path in paths:
                self._files.append(path.open("rb"))
                self._starts.append(self._starts[-1] + path.stat().st_size)
        except OSError as error:
            self.close()
            raise GemmaryError(f"{error.filename} cannot be read: {error.strerror}") from None
        self.size = self._starts[-1]

    def read_into(self, start: int, view: memoryview) -> None:
        """Fill `view` from `start` on; the caller has checked that it fits."""
        part = bisect.bisect_right(self._starts, start) - 1
        filled = 0
        while filled < len(view):
            file = self._files[part]
            file.seek(start + filled - self._starts[part])
            end = min(len(view), self._starts[part + 1] - start)
            count = file.readinto(view[filled:end])
            if not count:
                raise GemmaryError(f"{self.where} ends early; fetch it again")
            filled += count
            part += filled == end

    def close(self) -> None:
        for file in self._files:
            file.close()


class Header:
    """A cursor over the file that never reads past its end."""

    _AHEAD = 1 << 20

    def __init__(self, parts: Parts) -> None:
        self._parts, self.at = parts, 0
        self._window, self._window_start = b"", 0

    def bytes(self, count: int) -> bytes:
        if count > self._parts.size - self.at:
            raise GemmaryError(f"{self._parts.where} ends inside its header; fetch it again")
        begin = self.at - self._window_start
        if begin + count > len(self._window):
            length = min(max(count, self._AHEAD), self._parts.size - self.at)
            buffer = bytearray(length)
            self._parts.read_into(self.at, memoryview(buffer))
            self._window, self._window_start, begin = bytes(buffer), self.at, 0
        self.at += count
        return self._window[begin : begin + count]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.bytes(struct.calcsize(code)))[0]

    def string(self, most: int = _MOST_STRING) -> str:
        length = self.number("Q")
        if length > most:
            raise GemmaryError(f"{self._parts.where} has a string of {length} bytes in its header: it is damaged")
        return self.bytes(length).decode("utf-8", errors="replace")

    def strings(self, count: int) -> list[str]:
        """So many, as `string` reads one; where a window holds the next ones whole, straight from it."""
        found = list[str]()
        while len(found) < count:
            found.append(self.string())
            window, at = self._window, self.at - self._window_start
            for _ in range(count - len(found)):
                end = at + 8 + int.from_bytes(window[at : at + 8], "little")
                if end > len(window):
                    break
                found.append(window[at + 8 : end].decode("utf-8", errors="replace"))
                at = end
            self.at = self._window_start + at
        return found

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise GemmaryError(f"{self._parts.where} has a metadata value of unknown type {kind}: it is damaged")
        of, count = self.number("I"), self.number("Q")
        if count > _MOST_ELEMENTS or (of not in SCALARS and of != STRING):
            raise GemmaryError(f"{self._parts.where} has an array of {count} values of type {of}: too large, or nested")
        if of == STRING:
            if count * 8 > self._parts.size - self.at:
                raise GemmaryError(f"{self._parts.where} ends inside its header; fetch it again")
            return self.strings(count)
        dtype = np.dtype(SCALARS[of]).newbyteorder("<")
        return np.frombuffer(self.bytes(count * dtype.itemsize), dtype)
