"""The container of `torch.save` (a zip of a pickle and of raw storages), read without torch and without running anything.

A pickle is a program. This one is never run: its opcodes are walked one by one by `_Machine`, which knows tuples, dicts,
strings and numbers, the few names that a state dict is made of, and refuses every other. Tensors come as records of
dtype, shape, strides and storage; their bytes are read when asked for.
"""

from __future__ import annotations

import math
import pickletools
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gemmary.errors import GemmaryError

__all__ = ["Entry", "TorchReader"]

_MOST_PICKLE_BYTES = 64 << 20
_MOST_ENTRIES = 1 << 16
_MOST_DEPTH = 1 << 16
_MOST_DIMS = 8

_STORAGES: dict[str, np.dtype[Any]] = {
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "DoubleStorage": np.dtype(np.float64),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "ShortStorage": np.dtype(np.int16),
    "IntStorage": np.dtype(np.int32),
    "LongStorage": np.dtype(np.int64),
    "BoolStorage": np.dtype(np.bool_),
    "ComplexFloatStorage": np.dtype(np.complex64),  # the rope tables
}
_TENSOR = "torch._utils _rebuild_tensor_v2"
_PARAMETER = "torch._utils _rebuild_parameter"
_DICT = "collections OrderedDict"


@dataclass(frozen=True)
class _Name:
    """A global that the pickle mentions: one of the allowed, and never looked up."""

    text: str


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype[Any]
    size: int


@dataclass(frozen=True)
class Entry:
    """One tensor: a strided view of a storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.storage.dtype

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * int(self.dtype.itemsize)


class TorchReader:
    """Reads the tensors of a `.ckpt`: those of its `model_state_dict`, or of the dict it is.

    Raises GemmaryError for the older, unzipped layout, for any name or opcode outside the allowed, and for tensors that
    reach outside their storage.
    """

    def __init__(self, path: Path) -> None:
        self._where = str(path)
        try:
            self._zip = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError) as error:
            raise GemmaryError(f"{path} is not a checkpoint of torch.save in its zip form: {error}") from None
        try:
            self._read()
        except GemmaryError:
            self._zip.close()
            raise
        except (zipfile.BadZipFile, OSError, ValueError, KeyError, NotImplementedError, EOFError) as error:
            self._zip.close()
            raise GemmaryError(f"{path} is damaged: {error}") from None

    def _read(self) -> None:
        infos = self._zip.infolist()
        if len(infos) > _MOST_ENTRIES:
            raise GemmaryError(f"{self._where} has {len(infos)} files in it; at most {_MOST_ENTRIES} are read")
        self._infos = {info.filename: info for info in infos}
        pickles = [name for name in self._infos if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1 or len(self._infos) != len(infos):
            raise GemmaryError(
                f"{self._where} holds no torch checkpoint: it needs exactly one data.pkl, names once each"
            )
        self._root = pickles[0].removesuffix("data.pkl")
        order = self._infos.get(self._root + "byteorder")
        if order is not None and self._bytes(order, 16) != b"little":
            raise GemmaryError(f"{self._where} is big-endian; save it anew on a common machine")
        loaded = _Machine(self._where).run(self._bytes(self._infos[pickles[0]], _MOST_PICKLE_BYTES))
        state = loaded.get("model_state_dict", loaded) if isinstance(loaded, dict) else None
        if not isinstance(state, dict):
            raise GemmaryError(f"{self._where} holds no dict of tensors")
        self.entries = {str(name): value for name, value in state.items() if isinstance(value, Entry)}
        for name, entry in self.entries.items():
            self._check(name, entry)

    def _bytes(self, info: zipfile.ZipInfo, most: int) -> bytes:
        if info.file_size > most:
            raise GemmaryError(f"{self._where}: {info.filename} has {info.file_size} bytes; at most {most} are read")
        with self._zip.open(info) as file:
            return file.read(most)

    def _check(self, name: str, entry: Entry) -> None:
        info = self._infos.get(f"{self._root}data/{entry.storage.key}")
        reach = entry.offset + sum((n - 1) * stride for n, stride in zip(entry.shape, entry.strides, strict=True)) + 1
        held = info.file_size // entry.dtype.itemsize if info is not None else 0
        if info is None or info.compress_type != zipfile.ZIP_STORED or (entry.size and reach > held):
            raise GemmaryError(f"{self._where}: {name} reaches outside its storage; the file is cut short or damaged")
        if entry.size > held:
            raise GemmaryError(f"{self._where}: {name} repeats its storage's values; that is no checkpoint's tensor")

    def read(self, name: str) -> np.ndarray:
        """That tensor; only the stretch of its storage that it covers is read."""
        entry = self.entries[name]
        if not entry.size:
            return np.empty(entry.shape, entry.dtype)
        size = entry.dtype.itemsize
        span = sum((n - 1) * stride for n, stride in zip(entry.shape, entry.strides, strict=True)) + 1
        flat = np.empty(span, entry.dtype)
        try:
            with self._zip.open(self._infos[f"{self._root}data/{entry.storage.key}"]) as file:
                file.seek(entry.offset * size)
                view, filled = flat.view(np.uint8).data, 0
                while filled < len(view):
                    count = file.readinto(view[filled:])  # type: ignore[attr-defined]
                    if not count:
                        raise GemmaryError(f"{self._where} ends inside {name}; fetch it again")
                    filled += count
        except (zipfile.BadZipFile, OSError, EOFError) as error:
            raise GemmaryError(f"{self._where}: {name} cannot be read: {error}") from None
        strides = tuple(stride * size for stride in entry.strides)
        return np.lib.stride_tricks.as_strided(flat, entry.shape, strides).copy()

    def close(self) -> None:
        self._zip.close()


_MARK = object()


class _Machine:
    """Walks the opcodes of a state dict's pickle. What it does not know, it refuses."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def _refuse(self, what: str) -> GemmaryError:
        return GemmaryError(f"{self._where} holds more than tensors: {what}; gemmary runs no code from files")

    def run(self, data: bytes) -> Any:
        """The value that the pickle describes."""
        try:
            for opcode, argument, _ in pickletools.genops(data):
                if len(self._stack) > _MOST_DEPTH * 16 or len(self._memo) > 1 << 22:
                    raise self._refuse("a pickle too large")
                if opcode.name == "STOP":
                    return self._stack.pop()
                self._step(opcode.name, argument)
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
            if isinstance(error, GemmaryError):
                raise
            raise GemmaryError(f"{self._where} is damaged: its pickle does not parse ({error})") from None
        raise GemmaryError(f"{self._where} is damaged: its pickle has no end")

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                stack.append(_MARK)
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE":
                stack.append(tuple(self._to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "APPEND":
                value = stack.pop()
                stack[-1].append(value)
            case "APPENDS":
                values = self._to_mark()
                stack[-1].extend(values)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self._dict(stack[-1])[key] = value
            case "SETITEMS":
                items = self._to_mark()
                self._dict(stack[-1]).update(zip(items[::2], items[1::2], strict=True))
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "GLOBAL":
                stack.append(self._name(argument))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(self._name(f"{module} {attribute}"))
            case "BINPERSID":
                stack.append(self._storage(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(self._call(function, arguments))
            case "BUILD":
                stack.pop()  # an OrderedDict's _metadata: versions of torch modules
                self._dict(stack[-1])
            case _:
                raise self._refuse(f"opcode {name}")

    def _to_mark(self) -> list[Any]:
        at = len(self._stack) - 1
        while self._stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise ValueError("no mark")
        values = self._stack[at + 1 :]
        del self._stack[at:]
        return values

    def _dict(self, value: Any) -> dict[Any, Any]:
        if not isinstance(value, dict):
            raise self._refuse(f"items set on a {type(value).__name__}")
        return value

    def _name(self, text: str) -> _Name:
        module, _, attribute = text.partition(" ")
        if text in (_TENSOR, _PARAMETER, _DICT) or (module == "torch" and attribute in _STORAGES):
            return _Name(text)
        raise self._refuse(f"the name {module}.{attribute}"[:120])

    def _storage(self, pid: Any) -> _Storage:
        kind, storage, key, _, size = pid
        if kind != "storage" or not isinstance(storage, _Name) or not isinstance(key, str) or not isinstance(size, int):
            raise self._refuse("a reference that is no storage")
        return _Storage(key, _STORAGES[storage.text.removeprefix("torch ")], size)

    def _call(self, function: Any, arguments: Any) -> Any:
        match function:
            case _Name(text) if text == _DICT:
                return dict(*arguments)
            case _Name(text) if text == _TENSOR:
                return self._tensor(*arguments[:4])
            case _Name(text) if text == _PARAMETER and isinstance(arguments[0], Entry):
                return arguments[0]
        raise self._refuse("a call")

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any) -> Entry:
        numbers = [offset, *shape, *strides]
        if (
            not isinstance(storage, _Storage)
            or len(shape) != len(strides)
            or len(shape) > _MOST_DIMS
            or any(not isinstance(n, int) or isinstance(n, bool) or not 0 <= n < 1 << 48 for n in numbers)
        ):
            raise self._refuse("a tensor of impossible shape")
        return Entry(storage, offset, tuple(shape), tuple(strides))
