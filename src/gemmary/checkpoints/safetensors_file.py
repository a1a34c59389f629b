"""The safetensors container: one file or an index of shards, read and written one tensor at a time.

The official library judges a header before we trust it. Files are opened anew for each tensor, so that no mapping of a
whole model stays in memory; and they are written at places planned from shapes alone, in any order, which the library's
own writer (it wants all tensors at once) cannot do.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from gemmary.errors import GemmaryError

__all__ = ["Entry", "SafetensorsReader", "SafetensorsWriter"]

_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_MOST_HEADER_BYTES = 100 << 20
_MOST_TENSORS = 1 << 16
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class Entry:
    """One tensor: the file it is in, its shape and dtype, and where its bytes begin."""

    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsReader:
    """Reads a `.safetensors` file, or a directory with one or with an index of shards.

    Raises GemmaryError for whatever the official library refuses, for unknown dtypes, and for an index whose shards lie
    elsewhere, are missing, or do not hold exactly what it says.
    """

    def __init__(self, path: Path) -> None:
        self.entries: dict[str, Entry] = {}
        if path.is_file():
            self.entries = _entries(path)
        elif (path / _SINGLE).is_file():
            self.entries = _entries(path / _SINGLE)
        elif (path / _INDEX).is_file():
            self._add_shards(path)
        else:
            raise GemmaryError(f"{path} has no {_SINGLE} and no {_INDEX}: the weights are missing")

    def _add_shards(self, directory: Path) -> None:
        wanted = _index(directory / _INDEX)
        for name in sorted(set(wanted.values())):
            if not (directory / name).is_file():
                raise GemmaryError(f"{directory / name} is missing: the index names it; fetch the model again")
            for tensor, entry in _entries(directory / name).items():
                if wanted.get(tensor) != name:
                    raise GemmaryError(f"{directory / name} holds {tensor}, which the index does not place there")
                self.entries[tensor] = entry
        lost = [tensor for tensor in wanted if tensor not in self.entries]
        if lost:
            raise GemmaryError(
                f"{directory}: {', '.join(lost[:4])} of the index are in no shard; fetch the model again"
            )

    def read(self, name: str) -> np.ndarray:
        """That tensor."""
        entry = self.entries[name]
        array = np.empty(entry.shape, entry.dtype)
        with entry.file.open("rb") as file:
            file.seek(entry.start)
            if file.readinto(array.reshape(-1).view(np.uint8).data) != entry.nbytes:
                raise GemmaryError(f"{entry.file} is cut short within {name}; fetch it again")
        return array

    def close(self) -> None:
        """Nothing is held open."""


def _entries(path: Path) -> dict[str, Entry]:
    try:
        with safe_open(str(path), framework="numpy"):  # the library's checks: sizes, overlaps, gaps, JSON
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _MOST_HEADER_BYTES:
                raise GemmaryError(f"{path} has a header of {length} bytes: it is damaged")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        if isinstance(error, GemmaryError):
            raise
        raise GemmaryError(f"{path} is not a whole safetensors file: {error}") from None
    header.pop("__metadata__", None)
    if len(header) > _MOST_TENSORS:
        raise GemmaryError(f"{path} has {len(header)} tensors; at most {_MOST_TENSORS} are read")
    entries = {}
    for name, info in header.items():
        if info["dtype"] not in _DTYPES:
            raise GemmaryError(f"{path}: {name} is {info['dtype']}; gemmary reads {', '.join(_DTYPES)}")
        start = 8 + length + info["data_offsets"][0]
        entries[name] = Entry(path, tuple(info["shape"]), _DTYPES[info["dtype"]], start)
    return entries


def _index(path: Path) -> dict[str, str]:
    try:
        if path.stat().st_size > _MOST_HEADER_BYTES:
            raise GemmaryError(f"{path} is over {_MOST_HEADER_BYTES >> 20} MiB: not an index")
        placed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(placed, dict) or not all(isinstance(name, str) for name in placed.values()):
            raise TypeError("weight_map is not a map of names")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, GemmaryError):
            raise
        raise GemmaryError(f"{path} is not an index of shards: {error}") from None
    for name in set(placed.values()):
        if Path(name).name != name or not name.endswith(".safetensors") or name.startswith("."):
            raise GemmaryError(f"{path} names a shard {name!r}: shards lie beside their index, by plain names")
    return placed


class SafetensorsWriter:
    """Writes a planned set of tensors into a directory, in any order, within a `with`; at its end all must have come.

    `plan` lists (name, shape, dtype). Above `shard_bytes` it is cut into shards with an index, as Hugging Face's are.
    """

    def __init__(
        self,
        directory: Path,
        plan: Sequence[tuple[str, tuple[int, ...], np.dtype[Any]]],
        *,
        shard_bytes: int = 5_000_000_000,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._codes = {dtype: code for code, dtype in _DTYPES.items()}
        sizes = {name: math.prod(shape) * np.dtype(dtype).itemsize for name, shape, dtype in plan}
        shards: list[list[tuple[str, tuple[int, ...], np.dtype[Any]]]] = [[]]
        filled = 0
        for item in plan:
            if shards[-1] and filled + sizes[item[0]] > shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(item)
            filled += sizes[item[0]]
        self._files: list[BinaryIO] = []
        self._places: dict[str, tuple[BinaryIO, Entry]] = {}
        names = [_SINGLE] if len(shards) == 1 else [_shard_name(i, len(shards)) for i in range(len(shards))]
        for name, items in zip(names, shards, strict=True):
            self._begin(directory / name, items, dict(metadata or {"format": "pt"}))
        if len(shards) > 1:
            placed = {item[0]: name for name, items in zip(names, shards, strict=True) for item in items}
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": placed}
            (directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _begin(self, path: Path, items: Sequence[tuple[str, tuple[int, ...], Any]], metadata: dict[str, str]) -> None:
        header: dict[str, Any] = {"__metadata__": metadata}
        at, places = 0, []
        for name, shape, dtype in items:
            size = math.prod(shape) * np.dtype(dtype).itemsize
            header[name] = {
                "dtype": self._codes[np.dtype(dtype)],
                "shape": list(shape),
                "data_offsets": [at, at + size],
            }
            places.append((name, shape, np.dtype(dtype), at))
            at += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file = path.open("w+b")
        self._files.append(file)
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
        for name, shape, dtype, start in places:
            self._places[name] = file, Entry(path, tuple(shape), dtype, 8 + len(text) + start)

    def write(self, name: str, array: np.ndarray) -> None:
        """Put a tensor in its place. Raises GemmaryError where it is not what was planned, or came before."""
        if name not in self._places:
            raise GemmaryError(f"{name} was not planned, or was written already")
        file, entry = self._places[name]
        if array.shape != entry.shape or array.dtype != entry.dtype:
            raise GemmaryError(f"{name} is {array.dtype} {array.shape}, planned as {entry.dtype} {entry.shape}")
        del self._places[name]
        file.seek(entry.start)
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        for file in self._files:
            file.close()
        if self._places and error is None:
            raise GemmaryError(
                f"{len(self._places)} tensors were planned and not written: {next(iter(self._places))}, …"
            )


def _shard_name(i: int, of: int) -> str:
    return f"model-{i + 1:05d}-of-{of:05d}.safetensors"
