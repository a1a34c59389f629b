"""The safetensors container against the official library, both ways, and against damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from gemmary.checkpoints.safetensors_file import SafetensorsReader, SafetensorsWriter
from gemmary.errors import GemmaryError

RNG = np.random.default_rng(0)
ARRAYS = {
    "a": RNG.normal(size=(5, 7)).astype(np.float32),
    "b": RNG.normal(size=(3,)).astype(ml_dtypes.bfloat16),
    "c": RNG.normal(size=(2, 2)).astype(np.float16),
    "d": RNG.integers(-9, 9, (4, 4)).astype(np.int8),
}
INDEX = "model.safetensors.index.json"


def _write(directory: Path, **options: Any) -> Path:
    directory.mkdir(exist_ok=True)
    plan = [(name, array.shape, array.dtype) for name, array in ARRAYS.items()]
    with SafetensorsWriter(directory, plan, **options) as writer:
        for name in reversed(ARRAYS):
            writer.write(name, ARRAYS[name])
    return directory


def _same(reader: SafetensorsReader) -> None:
    assert reader.entries.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert reader.read(name).dtype == array.dtype
        np.testing.assert_array_equal(reader.read(name), array)


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    save_file(ARRAYS, tmp_path / "model.safetensors")
    _same(SafetensorsReader(tmp_path))
    _same(SafetensorsReader(tmp_path / "model.safetensors"))


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    _write(tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)
    with safe_open(tmp_path / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("shard_bytes", [1, 100, 160, 10**6])
def test_shards(tmp_path: Path, shard_bytes: int) -> None:
    _write(tmp_path, shard_bytes=shard_bytes)
    _same(SafetensorsReader(tmp_path))
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    if shard_bytes == 10**6:
        assert files == ["model.safetensors"]
        return
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in ARRAYS.values())
    assert sorted(set(index["weight_map"].values())) == files
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / file)


def test_a_writer_wants_what_was_planned(tmp_path: Path) -> None:
    plan = [("a", (2,), np.dtype(np.float32))]
    with pytest.raises(GemmaryError, match="planned and not written: a"), SafetensorsWriter(tmp_path, plan):
        pass
    with SafetensorsWriter(tmp_path, plan) as writer:
        writer.write("a", np.zeros(2, np.float32))
        with pytest.raises(GemmaryError, match="written already"):
            writer.write("a", np.zeros(2, np.float32))
    for wrong in (np.zeros(3, np.float32), np.zeros(2)):
        with pytest.raises(GemmaryError, match="planned as float32"), SafetensorsWriter(tmp_path, plan) as writer:
            writer.write("a", wrong)


def _header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return damage


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "empty": lambda p: p.write_bytes(b""),
    "garbage": lambda p: p.write_bytes(b"\xff" * 64),
    "cut short": lambda p: p.write_bytes(p.read_bytes()[:-1]),
    "too long": lambda p: p.write_bytes(p.read_bytes() + b"x"),
    "header without end": lambda p: p.write_bytes((1 << 62).to_bytes(8, "little") + b"{}"),
    "overlap": _header(lambda h: h["b"].update(data_offsets=h["a"]["data_offsets"])),
    "shape of another size": _header(lambda h: h["a"].update(shape=[5, 8])),
    "negative": _header(lambda h: h["a"].update(shape=[-5, -7])),
    "product overflows": _header(lambda h: h["a"].update(shape=[1 << 40, 1 << 40])),
    "unknown dtype": _header(lambda h: h["a"].update(dtype="F99")),
    "no offsets": _header(lambda h: h["a"].pop("data_offsets")),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(tmp_path: Path, kind: str) -> None:
    _write(tmp_path)
    DAMAGE[kind](tmp_path / "model.safetensors")
    with pytest.raises(GemmaryError, match=r"model\.safetensors") as caught:
        SafetensorsReader(tmp_path)
    assert "\n" not in str(caught.value)


def test_index_damage_is_named(tmp_path: Path) -> None:
    good = json.loads((_write(tmp_path, shard_bytes=100) / INDEX).read_text())
    names = good["weight_map"]

    def attempt(value: Any, message: str) -> None:
        (tmp_path / INDEX).write_text(value if isinstance(value, str) else json.dumps(value))
        with pytest.raises(GemmaryError, match=message):
            SafetensorsReader(tmp_path)

    attempt("{", "not an index")
    attempt("[" * 100_000, "not an index")
    attempt({}, "not an index")
    attempt({"weight_map": {"a": 1}}, "not an index")
    attempt({"weight_map": {**names, "a": "../model.safetensors"}}, "shards lie beside their index")
    attempt({"weight_map": {**names, "a": "/etc/passwd"}}, "shards lie beside their index")
    attempt({"weight_map": {**names, "a": "none.safetensors"}}, r"none\.safetensors is missing")
    attempt({"weight_map": {**names, "b": names["a"]}}, "does not place there")
    attempt({"weight_map": {**names, "e": names["d"]}}, "e of the index are in no shard")
    with pytest.raises(GemmaryError, match="the weights are missing"):
        SafetensorsReader(tmp_path / "none")
