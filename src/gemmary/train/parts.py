"""A state on disk in parts: every process writes what its own devices hold, and reads what its own devices need.

    parts/process_00003.safetensors   pieces of arrays
    parts/process_00003.json          of each piece: its array's name, whole shape and dtype, and start and stop along each axis

No array is put together anywhere to be written. Of a piece that several devices hold, one writes it. Reading cuts what is asked
for out of whatever pieces there are, so another mesh, or another number of processes, reads them as well.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
import safetensors.numpy

from gemmary import processes
from gemmary.checkpoints.checkpoint import read_json
from gemmary.checkpoints.manifest import sealed, to_disk, write_manifest
from gemmary.errors import GemmaryError

__all__ = ["Piece", "Pieces", "in_parts", "names_of_tree", "opened", "pieces_here", "write_pieces", "write_together"]

_PARTS = "parts"

Bounds = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Piece:
    """A box of an array: start and stop along each axis, and (in memory) its values."""

    name: str
    shape: tuple[int, ...]
    at: Bounds
    values: npt.NDArray[Any]


def names_of_tree(tree: Any) -> list[str]:
    """A name for each leaf, in the leaves' order: its path, such as `['attn.q'][3]`."""
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def pieces_here(prefix: str, tree: Any) -> list[Piece]:
    """What this process has to write of a tree of arrays, copied to the host."""
    found = []
    for name, array in zip(names_of_tree(tree), jax.tree.leaves(tree), strict=True):
        for shard in array.addressable_shards:
            if shard.replica_id == 0:
                at = _bounds(shard.index, array.shape)
                found.append(Piece(prefix + name, tuple(array.shape), at, np.array(shard.data, copy=True)))
    return found


def write_pieces(folder: Path, process: int, pieces: Sequence[Piece]) -> list[Path]:
    """One process's two files; the paths written."""
    folder.mkdir(parents=True, exist_ok=True)
    data, about = (folder / f"process_{process:05d}.{end}" for end in ("safetensors", "json"))
    safetensors.numpy.save_file({str(i): piece.values for i, piece in enumerate(pieces)}, data)
    index = [
        [piece.name, list(piece.shape), piece.values.dtype.name, [list(one) for one in piece.at]] for piece in pieces
    ]
    about.write_text(json.dumps(index) + "\n", encoding="utf-8")
    return [data, about]


class Pieces:
    """The pieces of a folder, opened. Arrays are read box by box."""

    def __init__(self, files: Mapping[Path, Any]) -> None:
        self._files = files
        self._arrays: dict[str, list[tuple[Bounds, Path, str]]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype[Any]] = {}
        for path in files:
            for i, (name, shape, dtype, at) in enumerate(read_json(path.with_suffix(".json"))):
                self.shapes[name], self.dtypes[name] = tuple(shape), np.dtype(dtype)
                bounds = tuple((int(start), int(stop)) for start, stop in at)
                self._arrays.setdefault(name, []).append((bounds, path, str(i)))

    def read(self, name: str, index: Sequence[slice] = ()) -> npt.NDArray[Any]:
        """An array, or a box of it. Raises GemmaryError where pieces of it are missing."""
        shape = self.shapes[name]
        wanted = _bounds([*index, *[slice(None)] * (len(shape) - len(index))], shape)
        out = np.empty([stop - start for start, stop in wanted], self.dtypes[name])
        filled = 0
        for at, path, key in self._arrays[name]:
            both = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(at, wanted, strict=True)]
            if any(start >= stop for start, stop in both):
                continue
            there = tuple(slice(x - a, y - a) for (x, y), (a, _) in zip(both, at, strict=True))
            here = tuple(slice(x - c, y - c) for (x, y), (c, _) in zip(both, wanted, strict=True))
            file = self._files[path]
            found = file.get_slice(key)[there] if shape else file.get_tensor(key)
            out[here] = found
            filled += found.size
        if filled != out.size:
            raise GemmaryError(
                f"{next(iter(self._files)).parent}: {name} has {filled} of {out.size} numbers: parts of it are missing"
            )
        return out

    def tree(self, prefix: str, like: Any) -> Any:
        """A tree in the form of `like`, its leaves whole, on the host."""
        form = jax.tree.structure(like)
        return jax.tree.unflatten(form, [self.read(prefix + name) for name in names_of_tree(like)])

    def fill(self, prefix: str, like: Any) -> Any:
        """A tree in the form of `like`, each leaf where that leaf lies. Raises GemmaryError for a tree of another form."""
        leaves, form = jax.tree.flatten(like)
        names = [prefix + name for name in names_of_tree(like)]
        there = {name for name in self.shapes if name.startswith(prefix)}
        if other := sorted(there ^ set(names)) or [
            n for n, x in zip(names, leaves, strict=True) if self.shapes[n] != x.shape
        ]:
            raise GemmaryError(
                f"{next(iter(self._files)).parent} has another state than this run ({', '.join(other[:4])})"
            )
        return jax.tree.unflatten(form, [self._leaf(name, leaf) for name, leaf in zip(names, leaves, strict=True)])

    def _leaf(self, name: str, like: jax.Array) -> jax.Array:
        return jax.make_array_from_callback(like.shape, like.sharding, lambda at: self.read(name, at or ()))


@contextmanager
def opened(checkpoint: Path) -> Iterator[Pieces]:
    """A checkpoint's pieces, of all the processes that wrote it; they are taken to be verified. Nothing is read yet."""
    with ExitStack() as stack:
        paths = sorted((checkpoint / _PARTS).glob("process_*.safetensors"))
        yield Pieces({path: stack.enter_context(safetensors.safe_open(path, "numpy")) for path in paths})


def _bounds(index: Sequence[slice], shape: Sequence[int]) -> Bounds:
    return tuple(one.indices(size)[:2] for one, size in zip(index, shape, strict=True))


def write_together(path: Path, pieces: Sequence[Piece], texts: Mapping[str, str], size: int) -> None:
    """All processes' pieces, and `texts` by name, as one folder at `path`, sealed and then renamed. All call it alike.

    It is written in a folder beside it, of a name that all know. Raises GemmaryError in all where one process cannot write.
    """
    aside = path.with_name(f".{path.name}.partial")

    def begin() -> None:
        shutil.rmtree(aside, ignore_errors=True)
        (aside / _PARTS).mkdir(parents=True)
        if (free := shutil.disk_usage(aside).free) < size:
            raise GemmaryError(f"{path.parent} has {free / 1e9:.1f} GB free and {path.name} needs {size / 1e9:.1f} GB")

    def write() -> dict[str, Any]:
        files = write_pieces(aside / _PARTS, processes.index(), pieces)
        return {file.relative_to(aside).as_posix(): sealed(file) for file in files}

    def finish() -> None:
        for name, text in texts.items():
            (aside / name).write_text(text, encoding="utf-8")
        write_manifest(aside, {name: entry for one in entries for name, entry in one.items()})
        shutil.rmtree(path, ignore_errors=True)  # one that was found damaged
        aside.replace(path)
        to_disk(path.parent)

    try:
        processes.from_first("save.begin", begin)
        entries = processes.agreed("save.write", write)
        processes.from_first("save.finish", finish)
    except Exception:
        if processes.is_first():
            shutil.rmtree(aside, ignore_errors=True)
        raise


def in_parts(path: Path) -> bool:
    """Whether a checkpoint is in parts."""
    return (path / _PARTS).is_dir()
