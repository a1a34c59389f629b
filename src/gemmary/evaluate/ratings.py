"""What people say of pairs, in SQLite: kept when `rate` returns, whatever happens to the process then."""

from __future__ import annotations

import hashlib
import secrets
import sqlite3
import threading
from collections.abc import Collection
from contextlib import closing
from pathlib import Path

from gemmary.checkpoints.checkpoint import closed_on_error
from gemmary.errors import GemmaryError

__all__ = ["Ratings"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS ratings (
    number INTEGER PRIMARY KEY AUTOINCREMENT, rater TEXT NOT NULL, pair TEXT NOT NULL, value REAL, first TEXT NOT NULL,
    time TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ')), UNIQUE (rater, pair)
);
CREATE TABLE IF NOT EXISTS secret (salt TEXT NOT NULL);
"""


class Ratings:
    """Ratings of one comparison, by several raters, from several threads. Values are A's: 1, 0.5, 0, or None for a pair that was skipped.

    Raises GemmaryError for a file that is no such database.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        try:
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=30)
            with closed_on_error(self._db):
                self._db.execute("PRAGMA journal_mode = WAL")
                self._db.execute("PRAGMA synchronous = FULL")  # also a power cut loses nothing
                self._db.executescript(_SCHEMA)
                self._db.execute(
                    "INSERT INTO secret SELECT ? WHERE NOT EXISTS (SELECT 1 FROM secret)", (secrets.token_hex(16),)
                )
                (self._salt,) = self._db.execute("SELECT salt FROM secret").fetchone()
        except sqlite3.Error as error:
            raise GemmaryError(f"{path} cannot be used for ratings: {error}") from None

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def first(self, rater: str, pair: str) -> str:
        """Whose answer this rater sees first, "a" or "b": as good as random, and the same whenever it is asked."""
        return "ab"[self._random("first", rater, pair) & 1]

    def order(self, rater: str, pairs: Collection[str]) -> list[str]:
        """The order in which this rater sees these pairs, so that those that nobody reaches are not always the same ones."""
        return sorted(pairs, key=lambda pair: self._random("order", rater, pair))

    def rate(self, rater: str, pair: str, value: float | None) -> None:
        """The last word counts. It is on the disk when this returns."""
        with self._lock:
            self._db.execute(
                "INSERT OR REPLACE INTO ratings (rater, pair, value, first) VALUES (?, ?, ?, ?)",
                (rater, pair, value, self.first(rater, pair)),
            )

    def undo(self, rater: str, pairs: Collection[str]) -> str | None:
        """Take back this rater's last rating of one of these pairs, and say of which; None where there is none."""
        with self._lock:
            rows = self._db.execute(
                "SELECT pair FROM ratings WHERE rater = ? ORDER BY number DESC", (rater,)
            ).fetchall()
            found: str | None = next((pair for (pair,) in rows if pair in pairs), None)
            if found is not None:
                self._db.execute("DELETE FROM ratings WHERE rater = ? AND pair = ?", (rater, found))
        return found

    def seen(self, rater: str) -> set[str]:
        """The pairs that this rater has rated or skipped."""
        with self._lock:
            return {pair for (pair,) in self._db.execute("SELECT pair FROM ratings WHERE rater = ?", (rater,))}

    def by_pair(self) -> dict[str, dict[str, float]]:
        """Of each pair, what each rater gave to A; what was skipped is not there."""
        found: dict[str, dict[str, float]] = {}
        with (
            self._lock,
            closing(
                self._db.execute("SELECT pair, rater, value FROM ratings WHERE value IS NOT NULL ORDER BY number")
            ) as rows,
        ):
            for pair, rater, value in rows:
                found.setdefault(pair, {})[rater] = value
        return found

    def _random(self, *parts: str) -> int:
        return int.from_bytes(hashlib.sha256("\0".join([self._salt, *parts]).encode()).digest()[:8], "big")
