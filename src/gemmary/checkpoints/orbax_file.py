"""The Orbax container: a pytree on disk, read one array at a time and written in pieces.

Values are stored uncompressed: weights do not compress, and trying costs a second copy of the largest one. Orbax is imported
when a tree is opened: that takes a sixth of a second, and most models are in other formats.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gemmary import processes
from gemmary.errors import GemmaryError

__all__ = ["OrbaxEntry", "OrbaxReader", "OrbaxWriter", "is_orbax"]

# Orbax announces every save and missing optional file on stderr; what concerns a user reaches them as our errors.
logging.getLogger("absl").setLevel(logging.ERROR)


@dataclass(frozen=True)
class OrbaxEntry:
    """One array: its key path in the tree, shape and dtype."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def is_orbax(directory: Path) -> bool:
    """Whether the directory holds an Orbax pytree: `_METADATA`, or the `checkpoint` file of older releases."""
    return (directory / "_METADATA").is_file() or (directory / "checkpoint").is_file()


class OrbaxReader:
    """Reads a pytree directory. Names in `entries` are key paths joined with a slash."""

    def __init__(self, directory: Path) -> None:
        import orbax.checkpoint as ocp

        self._directory = directory.absolute()
        self._ocp = ocp
        alone = ocp.options.MultiprocessingOptions(**_alone())
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
        self._checkpointer = ocp.Checkpointer(handler, multiprocessing_options=alone)
        try:
            tree = self._checkpointer.metadata(self._directory).item_metadata.tree
            leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
            self.entries: dict[str, OrbaxEntry] = {}
            for keys, leaf in leaves:
                path = tuple(str(key.key) for key in keys)
                self.entries["/".join(path)] = OrbaxEntry(path, tuple(leaf.shape), np.dtype(leaf.dtype))
        except Exception as error:  # Orbax and TensorStore raise many kinds for one fact: it cannot be read
            raise GemmaryError(f"{directory} cannot be read as an Orbax checkpoint: {_first_line(error)}") from None

    def read(self, name: str) -> np.ndarray:
        """That array, whole."""
        path = self.entries[name].path
        item: Any = 0
        how: Any = self._ocp.RestoreArgs(restore_type=np.ndarray)
        for key in reversed(path):
            item, how = {key: item}, {key: how}
        try:
            args = self._ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True)
            value = self._checkpointer.restore(self._directory, args=args)
        except Exception as error:
            raise GemmaryError(f"{self._directory}: {name} cannot be read: {_first_line(error)}") from None
        for key in path:
            value = value[key]
        return np.asarray(value)

    def close(self) -> None:
        self._checkpointer.close()


class OrbaxWriter:
    """Writes a pytree directory piece by piece; `close` makes it whole. Pieces must not share a top-level key."""

    def __init__(self, directory: Path) -> None:
        from orbax.checkpoint.experimental import v1

        self._ocp = v1
        self._final = directory.absolute()
        self._aside = self._final.with_name(self._final.name + ".orbax")
        self._context = v1.Context(multiprocessing_options=v1.options.MultiprocessingOptions(**_alone()))
        self._context.array.saving.use_compression = False

    def write(self, tree: Mapping[str, Any]) -> None:
        """Add arrays (NumPy or JAX), nested as they shall be on disk."""
        with self._context, _asking_nobody():
            self._ocp.partial.save(self._aside, dict(tree))

    def close(self) -> None:
        """Commit. The pytree itself becomes the directory, as Orbax's stable readers and Google's models expect it."""
        with self._context, _asking_nobody():
            self._ocp.partial.finalize(self._aside)
        os.replace(self._aside / "state", self._final)
        shutil.rmtree(self._aside)


def _alone() -> dict[str, Any]:
    """Of several processes each reads and writes for itself; Orbax would have all of them wait for one another."""
    if processes.count() == 1:
        return {}
    here = processes.index()
    return {"primary_host": here, "active_processes": {here}, "barrier_sync_key_prefix": f"process_{here}"}


@contextmanager
def _asking_nobody() -> Iterator[None]:
    """Orbax's saving in pieces (0.12) compares notes with all processes, also with those that are not active: here with itself."""
    if processes.count() == 1:
        yield
        return
    from orbax.checkpoint.experimental.v1._src.synchronization import multihost

    asked = multihost.broadcast_one_to_all, multihost.process_allgather
    multihost.broadcast_one_to_all = multihost.process_allgather = lambda tree, **_: tree
    try:
        yield
    finally:
        multihost.broadcast_one_to_all, multihost.process_allgather = asked


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
