"""The GGUF container (ggml's docs/gguf.md, versions 2 and 3), read within bounds and written one tensor at a time.

The header reader is our own: every count is checked against a limit and against the bytes that are left before anything is
made of it. Dequantizing is the `gguf` package's, imported when it is asked for. A file may come in parts that are read as one.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gemmary.checkpoints.gguf_header import ARRAY, SCALARS, STRING, Header, Parts
from gemmary.errors import GemmaryError

__all__ = ["READ_TYPES", "WRITE_TYPES", "Entry", "GGUFReader", "GGUFWriter"]

_MAGIC, _MOST_KEYS, _MOST_TENSORS = b"GGUF", 65536, 65536
_MOST_DIMS = 4
_MOST_NAME = 256
_MOST_BLOCK_BYTES = 64 << 20  # of a quantized tensor, dequantized at a time

_NUMBERS = {np.dtype(code): number for number, code in SCALARS.items()}

# Each type's number in the file, the values of a block and its bytes (ggml's ggml-common.h).
_TYPES = {
    "F32": (0, 1, 4), "F16": (1, 1, 2), "BF16": (30, 1, 2), "Q8_0": (8, 32, 34), "Q4_0": (2, 32, 18), "Q5_0": (6, 32, 22),
    "Q4_K": (12, 256, 144), "Q5_K": (13, 256, 176), "Q6_K": (14, 256, 210),
}  # fmt: skip
_NAMES = {number: name for name, (number, _, _) in _TYPES.items()}

_PLAIN: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
READ_TYPES = tuple(_TYPES)
WRITE_TYPES = ("F32", "BF16", "Q8_0", "Q4_0")


@dataclass(frozen=True)
class Entry:
    """One tensor: its ggml type, its shape (NumPy's order, the reverse of the file's), and where its bytes are.

    `dtype` is that of `read`: quantized types come as float32.
    """

    type_name: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def dtype(self) -> np.dtype[Any]:
        return _PLAIN.get(self.type_name, np.dtype(np.float32))


class GGUFReader:
    """Reads a GGUF: `fields` (metadata: Python scalars and strings, lists of strings, NumPy arrays) and `entries`.

    Raises GemmaryError for a wrong magic, version or byte order, for counts and sizes above the limits, for names that come
    twice, for tensors of other types, outside the file, misaligned or overlapping.
    """

    def __init__(self, paths: Path | Sequence[Path]) -> None:
        self._parts = Parts([paths] if isinstance(paths, Path) else list(paths))
        try:
            self._read_header()
        except BaseException:
            self._parts.close()
            raise

    def _read_header(self) -> None:
        where, header = self._parts.where, Header(self._parts)
        if header.bytes(4) != _MAGIC:
            raise GemmaryError(f"{where} is not a GGUF file")
        version = header.number("I")
        if version not in (2, 3):
            hint = "it is big-endian" if version in (2 << 24, 3 << 24) else "versions 2 and 3 are read"
            raise GemmaryError(f"{where} is GGUF version {version}: {hint}")
        tensors, keys = header.number("Q"), header.number("Q")
        if tensors > _MOST_TENSORS or keys > _MOST_KEYS:
            raise GemmaryError(
                f"{where} claims {keys} keys and {tensors} tensors; at most {_MOST_KEYS} of each are read"
            )
        self.fields: dict[str, Any] = {}
        for _ in range(keys):
            key = header.string(1 << 16)
            if key in self.fields:
                raise GemmaryError(f"{where} has the key {key[:60]!r} twice: it is damaged")
            self.fields[key] = header.value(header.number("I"))
        alignment = self.fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 16 or alignment & (alignment - 1):
            raise GemmaryError(f"{where} has an alignment of {alignment!r}: it must be a power of two")
        infos = [self._tensor_info(header) for _ in range(tensors)]
        data = -(-header.at // alignment) * alignment
        self.entries = {name: self._entry(name, *info, data, alignment) for name, info in infos}
        if len(self.entries) != tensors:
            raise GemmaryError(f"{where} has two tensors of one name: it is damaged")
        ends = 0
        for entry in sorted(self.entries.values(), key=lambda entry: entry.start):
            if entry.start < ends:
                raise GemmaryError(f"{where} has tensors that overlap: it is damaged")
            ends = entry.start + entry.nbytes

    def _tensor_info(self, header: Header) -> tuple[str, tuple[tuple[int, ...], int, int]]:
        name = header.string(_MOST_NAME)
        dims = header.number("I")
        if not 1 <= dims <= _MOST_DIMS:
            raise GemmaryError(f"{self._parts.where}: {name!r} has {dims} dimensions; GGUF has 1 to {_MOST_DIMS}")
        shape = tuple(header.number("Q") for _ in range(dims))[::-1]
        return name, (shape, header.number("I"), header.number("Q"))

    def _entry(self, name: str, shape: tuple[int, ...], kind: int, offset: int, data: int, alignment: int) -> Entry:
        where = self._parts.where
        if kind not in _NAMES:
            raise GemmaryError(f"{where}: {name} is {_named(kind)}; gemmary reads {', '.join(READ_TYPES)}")
        _, block, block_bytes = _TYPES[_NAMES[kind]]
        if not all(shape) or shape[-1] % block:
            raise GemmaryError(f"{where}: {name} has the shape {list(shape)}, which its type cannot have")
        nbytes = math.prod(shape) // block * block_bytes
        if offset % alignment or data + offset + nbytes > self._parts.size:
            raise GemmaryError(f"{where}: {name} lies outside the file or misaligned; the file is cut short or damaged")
        return Entry(_NAMES[kind], shape, data + offset, nbytes)

    def read(self, name: str) -> np.ndarray:
        """That tensor: F32, F16 and BF16 as they are, quantized types as float32, some rows at a time."""
        entry = self.entries[name]
        if entry.type_name in _PLAIN:
            plain = np.empty(entry.shape, entry.dtype)
            self._parts.read_into(entry.start, plain.reshape(-1).view(np.uint8).data)
            return plain
        from gguf.quants import GGMLQuantizationType, dequantize

        rows = np.empty((math.prod(entry.shape[:-1]), entry.shape[-1]), np.float32)
        step = max(1, _MOST_BLOCK_BYTES // (4 * entry.shape[-1]))
        for start in range(0, len(rows), step):
            packed = self.read_blocks(name, start, start + step)
            rows[start : start + step] = dequantize(packed, GGMLQuantizationType[entry.type_name])
        return rows.reshape(entry.shape)

    def read_blocks(self, name: str, start: int = 0, end: int | None = None) -> np.ndarray:
        """Rows of a quantized tensor as they are stored, uint8 [rows, bytes of a row]."""
        entry = self.entries[name]
        rows = math.prod(entry.shape[:-1])
        packed = np.empty((min(end or rows, rows) - start, entry.nbytes // rows), np.uint8)
        self._parts.read_into(entry.start + start * packed.shape[1], packed.reshape(-1).data)
        return packed

    def close(self) -> None:
        self._parts.close()


class GGUFWriter:
    """Writes a GGUF of planned tensors, (name, shape, type), in any order, within a `with`; at its end all must have come.

    In `fields` a NumPy scalar or array says its own type; bool, str and lists of str are as GGUF has them.
    """

    _ALIGNMENT = 32

    def __init__(self, path: Path, fields: Mapping[str, Any], plan: Sequence[tuple[str, tuple[int, ...], str]]) -> None:
        header = [_MAGIC, struct.pack("<IQQ", 3, len(plan), len(fields))]
        for key, value in fields.items():
            header += [_string(key), *_value(value)]
        self._places: dict[str, tuple[int, tuple[int, ...], str]] = {}
        at = 0
        for name, shape, kind in plan:
            number, block, block_bytes = _TYPES[kind]
            if kind not in WRITE_TYPES or shape[-1] % block:
                raise GemmaryError(f"{name} of shape {list(shape)} cannot be written as {kind}")
            header += [_string(name), struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], number, at)]
            self._places[name] = at, tuple(shape), kind
            at = self._aligned(at + math.prod(shape) // block * block_bytes)
        head = b"".join(header)
        self._data = self._aligned(len(head))
        self._file = path.open("w+b")
        self._file.write(head)
        self._file.truncate(self._data + at)

    def _aligned(self, at: int) -> int:
        return -(-at // self._ALIGNMENT) * self._ALIGNMENT

    def write(self, name: str, array: np.ndarray) -> None:
        """Put a tensor in its place, in its planned type. Raises GemmaryError where it was not planned, or came before."""
        if name not in self._places:
            raise GemmaryError(f"{name} was not planned, or was written already")
        at, shape, kind = self._places[name]
        if array.shape != shape:
            raise GemmaryError(f"{name} has the shape {list(array.shape)}, planned as {list(shape)}")
        del self._places[name]
        self._file.seek(self._data + at)
        if kind in _PLAIN:
            plain = np.ascontiguousarray(array.astype(_PLAIN[kind], copy=False))
            self._file.write(plain.reshape(-1).view(np.uint8).data)
            return
        from gguf.quants import GGMLQuantizationType, quantize

        rows = array.reshape(-1, shape[-1])
        step = max(1, _MOST_BLOCK_BYTES // (4 * shape[-1]))
        for start in range(0, len(rows), step):
            piece = rows[start : start + step].astype(np.float32)
            self._file.write(quantize(piece, GGMLQuantizationType[kind]).reshape(-1).view(np.uint8).data)

    def __enter__(self) -> GGUFWriter:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self._file.close()
        if self._places and error is None:
            raise GemmaryError(
                f"{len(self._places)} tensors were planned and not written: {next(iter(self._places))}, …"
            )


def _named(kind: int) -> str:
    """What ggml calls a type that we do not read."""
    from gguf import GGMLQuantizationType

    return next((known.name for known in GGMLQuantizationType if known == kind), str(kind))


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> Iterator[bytes]:
    """A metadata value with its type before it."""
    if isinstance(value, str):
        yield struct.pack("<I", STRING) + _string(value)
    elif isinstance(value, list):
        yield struct.pack("<IIQ", ARRAY, STRING, len(value))
        yield from map(_string, value)
    elif isinstance(value, np.ndarray):
        yield struct.pack("<IIQ", ARRAY, _NUMBERS[value.dtype], value.size)
        yield value.tobytes()
    else:
        scalar = np.asarray(value)
        yield struct.pack("<I", _NUMBERS[scalar.dtype]) + scalar.tobytes()
