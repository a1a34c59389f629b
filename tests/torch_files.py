"""`torch.save` files made without torch, opcode by opcode: state dicts as PyTorch writes them, and hostile ones."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

_STORAGES = {"float32": "Float", "float16": "Half", "bfloat16": "BFloat16", "int8": "Char", "complex64": "ComplexFloat"}


def text(value: str) -> bytes:
    """BINUNICODE."""
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    """BININT."""
    return b"J" + struct.pack("<i", value)


def name(module: str, attribute: str) -> bytes:
    """GLOBAL."""
    return f"c{module}\n{attribute}\n".encode()


def numbers(values: tuple[int, ...]) -> bytes:
    """A tuple of numbers."""
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(key: str, dtype: str, size: int, shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0) -> bytes:
    """A call of _rebuild_tensor_v2 on a storage."""
    storage = b"(" + text("storage") + name("torch", f"{_STORAGES[dtype]}Storage") + text(key) + text("cpu")
    storage += number(size) + b"tQ"
    empty = name("collections", "OrderedDict") + b")R"
    arguments = storage + number(offset) + numbers(shape) + numbers(strides) + b"\x89" + empty
    return name("torch._utils", "_rebuild_tensor_v2") + b"(" + arguments + b"tR"


def dict_of(items: Mapping[str, bytes]) -> bytes:
    """A dict of values that are opcodes already."""
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def write(path: Path, value: bytes, storages: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """The zip around a pickle of that value."""
    with zipfile.ZipFile(path, "w", compression) as out:
        out.writestr("archive/data.pkl", b"\x80\x02" + value + b".")
        out.writestr("archive/byteorder", b"little")
        for key, data in storages.items():
            out.writestr(f"archive/data/{key}", data)
        out.writestr("archive/version", b"3\n")
    return path


def save(path: Path, arrays: Mapping[str, np.ndarray], wrapped: bool = True) -> Path:
    """A state dict, in a `model_state_dict` as Google's files have it."""
    storages, items = {}, {}
    for i, (key, array) in enumerate(arrays.items()):
        array = np.ascontiguousarray(array)
        strides = tuple(stride // array.itemsize for stride in array.strides)
        storages[str(i)] = array.tobytes()
        items[key] = tensor(str(i), array.dtype.name, array.size, array.shape, strides)
    value = dict_of(items)
    return write(path, dict_of({"model_state_dict": value}) if wrapped else value, storages)
