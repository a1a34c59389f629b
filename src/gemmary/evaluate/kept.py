"""Answers that were given before, on disk: what a model was asked, with what it said. An evaluation that was killed goes on with them."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gemmary.errors import GemmaryError
from gemmary.gemma import Gemma

__all__ = ["Kept", "content_of", "model_digest"]

_MANY = 500  # keys in one query


class Kept:
    """A file of answers. `model` stands for all that they depend on beside the question: other models' answers lie beside them unseen.

    Raises GemmaryError where the file is something else.
    """

    def __init__(self, path: Path, model: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._model = model
        self._file = sqlite3.connect(path, isolation_level=None)
        try:
            self._file.execute("PRAGMA journal_mode=WAL")
            self._file.execute(
                "CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, answer TEXT NOT NULL) WITHOUT ROWID"
            )
        except sqlite3.DatabaseError as error:
            raise GemmaryError(f"{path} cannot be used to keep answers ({error}): move it away") from None

    def key(self, question: Sequence[Any]) -> bytes:
        """What a question, plain data, is kept under."""
        asked = json.dumps([self._model, question], separators=(",", ":"), sort_keys=True)
        return hashlib.sha256(asked.encode()).digest()

    def get(self, keys: Sequence[bytes]) -> dict[bytes, Any]:
        """The answers that there are."""
        found: dict[bytes, Any] = {}
        for start in range(0, len(keys), _MANY):
            some = keys[start : start + _MANY]
            marks = ",".join("?" * len(some))
            rows = self._file.execute(f"SELECT key, answer FROM answers WHERE key IN ({marks})", some)
            found |= {key: json.loads(answer) for key, answer in rows}
        return found

    def put(self, answers: Iterable[tuple[bytes, Any]]) -> None:
        """Keep them, all or none."""
        lines = [(key, json.dumps(answer)) for key, answer in answers]
        self._file.execute("BEGIN")
        self._file.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", lines)
        self._file.execute("COMMIT")

    def close(self) -> None:
        """Nothing more is kept."""
        self._file.close()


def model_digest(gemma: Gemma) -> str:
    """What answers depend on: a digest of the config, the type of activations and every weight."""
    found = hashlib.sha256(repr((gemma.config, str(gemma.engine.dtype))).encode())
    for leaf in jax.tree.leaves(gemma.params):
        array = np.asarray(leaf)
        found.update(f"{array.shape}{array.dtype}".encode())
        found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def content_of(path: Path) -> str:
    """A digest of a folder's files, their names and bytes."""
    found = hashlib.sha256()
    for one in sorted(one for one in path.rglob("*") if one.is_file()):
        found.update(f"{one.relative_to(path)}\0{one.stat().st_size}\0".encode())
        with one.open("rb") as opened:
            while piece := opened.read(2**22):
                found.update(piece)
    return found.hexdigest()
