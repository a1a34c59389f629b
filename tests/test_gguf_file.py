"""The GGUF container against the gguf package, which wrote or reads the same files, and against damage."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest

from gemmary.checkpoints import gguf_file
from gemmary.checkpoints.gguf_file import READ_TYPES, WRITE_TYPES, GGUFReader, GGUFWriter
from gemmary.errors import GemmaryError

RNG = np.random.default_rng(0)
VALUES = RNG.normal(size=(6, 512)).astype(np.float32)


def _peer_file(path: Path, tensors: dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]]) -> Path:
    """A file as the gguf package writes it."""
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_uint32("a.count", 7)
    writer.add_float64("a.share", 0.25)
    writer.add_bool("a.yes", True)
    writer.add_array("a.words", ["ü", "", "x" * 1000])
    writer.add_array("a.numbers", [1.5, 2.5])
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _packed(kind: str) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
    """VALUES in that type; k-quants, which the package does not write, as random blocks with finite scales."""
    number = gguf.GGMLQuantizationType[kind]
    try:
        return gguf.quants.quantize(VALUES, number), number
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[number]
        blocks = RNG.integers(0, 256, (VALUES.size // block, size), dtype=np.uint8)
        scale = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
        for at in (0, 2) if kind in ("Q4_K", "Q5_K") else (size - 2,):
            blocks[:, at : at + 2] = scale
        return blocks.reshape(VALUES.shape[0], -1), number


def test_lists_of_many_strings(tmp_path: Path) -> None:
    """More than is read ahead at once, and some that are longer than that."""
    words = [f"ü{i}" * (i % 7) for i in range(50_000)]
    words[7], words[-1], words[30_000:30_002] = "a" * (3 << 20), "", ["b" * (1 << 20), "c" * (1 << 20)]
    with GGUFWriter(tmp_path / "m.gguf", {"words": words, "after": np.uint32(5)}, []):
        pass
    file = GGUFReader(tmp_path / "m.gguf")
    file.close()
    assert file.fields["words"] == words
    assert file.fields["after"] == 5


def test_types_are_those_of_the_gguf_package() -> None:
    sizes = {kind.name: (int(kind), *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    assert {kind: sizes[kind] for kind in READ_TYPES} == gguf_file._TYPES


@pytest.mark.parametrize("kind", READ_TYPES)
def test_reads_what_the_gguf_package_writes(tmp_path: Path, kind: str) -> None:
    data, number = _packed(kind)
    path = _peer_file(tmp_path / "m.gguf", {"w": (data, number), "v": (VALUES[0], gguf.GGMLQuantizationType.F32)})
    file = GGUFReader(path)
    assert file.entries["w"].shape == (6, 512)
    assert file.entries["w"].type_name == kind
    found = file.read("w").astype(np.float32)
    np.testing.assert_array_equal(found, gguf.quants.dequantize(data, number).reshape(VALUES.shape))
    np.testing.assert_array_equal(file.read("v"), VALUES[0])
    file.close()
    assert file.fields["a.count"] == 7
    assert (file.fields["a.share"], file.fields["a.yes"]) == (0.25, True)
    assert file.fields["a.words"] == ["ü", "", "x" * 1000]
    np.testing.assert_array_equal(file.fields["a.numbers"], [1.5, 2.5])


def test_cut_in_parts_it_is_the_same(tmp_path: Path) -> None:
    whole = _peer_file(tmp_path / "m.gguf", {"w": _packed("Q8_0"), "x": _packed("Q4_0")})
    data = whole.read_bytes()
    for size in (len(data) // 2, 1000, 331):
        parts = []
        for i, start in enumerate(range(0, len(data), size)):
            parts.append(tmp_path / f"{size}-{i}")
            parts[-1].write_bytes(data[start : start + size])
        one, many = GGUFReader(whole), GGUFReader(parts)
        for name in ("w", "x"):
            np.testing.assert_array_equal(one.read(name), many.read(name))
        one.close()
        many.close()


FIELDS: dict[str, Any] = {
    "general.architecture": "gemma",
    "n": np.uint32(5),
    "f": np.float32(0.5),
    "d": np.float64(0.1),
    "b": True,
    "words": ["a", "▁b"],
    "scores": np.array([1, 2], np.float32),
    "flags": np.array([0, 1], np.uint8),
}


@pytest.mark.parametrize("kind", WRITE_TYPES)
def test_the_gguf_package_reads_what_we_write(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "m.gguf"
    plan = [("w", VALUES.shape, kind), ("v", (512,), "F32")]
    with GGUFWriter(path, FIELDS, plan) as writer:
        writer.write("v", VALUES[0])
        writer.write("w", VALUES)
    peer = gguf.GGUFReader(path)
    for key, value in FIELDS.items():
        found = peer.fields[key].contents()
        np.testing.assert_array_equal(found, value)
    tensors = {tensor.name: tensor for tensor in peer.tensors}
    number = gguf.GGMLQuantizationType[kind]
    stored = gguf.quants.quantize(VALUES, number) if kind.startswith("Q") else VALUES
    stored = stored.astype(ml_dtypes.bfloat16) if kind == "BF16" else stored
    assert tensors["w"].tensor_type == number
    assert tensors["w"].data.tobytes() == stored.tobytes()
    assert tensors["v"].data.tobytes() == VALUES[0].tobytes()
    assert list(tensors["w"].shape) == [512, 6]


def test_a_writer_wants_what_was_planned(tmp_path: Path) -> None:
    plan = [("w", (2, 32), "F32")]
    with pytest.raises(GemmaryError, match="planned and not written: w"), GGUFWriter(tmp_path / "a", {}, plan):
        pass
    with GGUFWriter(tmp_path / "b", {}, plan) as writer:
        with pytest.raises(GemmaryError, match=r"shape \[32\], planned as \[2, 32\]"):
            writer.write("w", VALUES[0, :32])
        writer.write("w", VALUES[:2, :32])
        with pytest.raises(GemmaryError, match="not planned, or was written already"):
            writer.write("w", VALUES[:2, :32])
    with pytest.raises(GemmaryError, match="cannot be written as Q8_0"):
        GGUFWriter(tmp_path / "c", {}, [("w", (2, 33), "Q8_0")])


# --- Damage -----------------------------------------------------------------------------------------------------------


def _string(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def _file(
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    keys: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    counts: tuple[int, int] | None = None,
    data: bytes = bytes(4096),
) -> bytes:
    """A file said field by field, so that any of them can be wrong."""
    keys, tensors = keys or [], tensors or []
    n_tensors, n_keys = counts or (len(tensors), len(keys))
    head = magic + struct.pack("<IQQ", version, n_tensors, n_keys) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


def _tensor(
    name: bytes = b"w", shape: tuple[int, ...] = (32, 4), kind: int = 0, offset: int = 0, dims: int | None = None
) -> bytes:
    packed = struct.pack(f"<{len(shape)}Q", *shape)
    return (
        _string(name)
        + struct.pack("<I", len(shape) if dims is None else dims)
        + packed
        + struct.pack("<IQ", kind, offset)
    )


def _key(name: bytes, kind: int, value: bytes) -> bytes:
    return _string(name) + struct.pack("<I", kind) + value


HUGE = (1 << 63) - 1
DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "ends inside its header"),
    "magic": (_file(magic=b"GGML"), "not a GGUF"),
    "version 1": (_file(version=1), "GGUF version 1: versions 2 and 3"),
    "big-endian": (_file(version=3 << 24), "big-endian"),
    "tensors without end": (_file(counts=(HUGE, 0)), "at most 65536"),
    "keys without end": (_file(counts=(0, HUGE)), "at most 65536"),
    "more keys than there are": (_file(counts=(0, 60000), data=b""), "ends inside its header"),
    "a long string": (_file(keys=[struct.pack("<Q", HUGE)]), "has a string of"),
    "a string past the end": (_file(keys=[struct.pack("<Q", 60000)]), "ends inside its header"),
    "unknown value type": (_file(keys=[_key(b"k", 13, b"")]), "unknown type 13"),
    "nested arrays": (_file(keys=[_key(b"k", 9, struct.pack("<IQ", 9, 1))]), "nested"),
    "array without end": (_file(keys=[_key(b"k", 9, struct.pack("<IQ", 4, HUGE))]), "too large"),
    "array past the end": (_file(keys=[_key(b"k", 9, struct.pack("<IQ", 4, 1 << 20))]), "ends inside"),
    "strings past the end": (_file(keys=[_key(b"k", 9, struct.pack("<IQ", 8, 1 << 20))]), "ends inside"),
    "key twice": (_file(keys=[_key(b"k", 4, bytes(4))] * 2), "'k' twice"),
    "alignment 0": (_file(keys=[_key(b"general.alignment", 4, bytes(4))]), "alignment of 0"),
    "alignment 24": (_file(keys=[_key(b"general.alignment", 4, struct.pack("<I", 24))]), "power of two"),
    "alignment as text": (_file(keys=[_key(b"general.alignment", 8, _string(b"32"))]), "power of two"),
    "no dimensions": (_file(tensors=[_tensor(shape=())]), "has 0 dimensions"),
    "five dimensions": (_file(tensors=[_tensor(shape=(32, 1, 1, 1, 1))]), "has 5 dimensions"),
    "product overflows": (_file(tensors=[_tensor(shape=(1 << 32, 1 << 32, 1 << 32))]), "outside the file"),
    "zero-sized": (_file(tensors=[_tensor(shape=(32, 0))]), "which its type cannot have"),
    "not whole blocks": (_file(tensors=[_tensor(shape=(33, 2), kind=8)]), "which its type cannot have"),
    "type we do not read": (_file(tensors=[_tensor(kind=10)]), "w is Q2_K; gemmary reads"),
    "type nobody knows": (_file(tensors=[_tensor(kind=999)]), "w is 999"),
    "past the end": (_file(tensors=[_tensor(offset=4096)]), "outside the file"),
    "far offset": (_file(tensors=[_tensor(offset=HUGE & ~31)]), "outside the file"),
    "misaligned": (_file(tensors=[_tensor(offset=8)]), "misaligned"),
    "overlap": (_file(tensors=[_tensor(), _tensor(b"v", offset=256)]), "overlap"),
    "name twice": (_file(tensors=[_tensor(), _tensor(offset=512)]), "two tensors of one name"),
    "long name": (_file(tensors=[_tensor(b"w" * 300)]), "string of 300 bytes"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damage_is_named(tmp_path: Path, kind: str) -> None:
    data, message = DAMAGED[kind]
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(GemmaryError, match=message) as caught:
        GGUFReader(tmp_path / "m.gguf")
    assert "\n" not in str(caught.value)


def test_the_undamaged_file_opens(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(_file(tensors=[_tensor(), _tensor(b"v", offset=512)]))
    file = GGUFReader(tmp_path / "m.gguf")
    assert file.read("v").shape == (4, 32)
    file.close()


def test_a_missing_part(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(_file())
    with pytest.raises(GemmaryError, match="b cannot be read: No such file"):
        GGUFReader([tmp_path / "a", tmp_path / "b"])
