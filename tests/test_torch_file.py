"""The .ckpt reader: a real file of torch's, hand-made ones, and those that would run code elsewhere."""

from __future__ import annotations

import os
import time
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch_files as make

from gemmary.checkpoints.torch_file import TorchReader
from gemmary.errors import GemmaryError

RECORDED = Path(__file__).parent / "golden" / "torch_small.ckpt"


def _read(path: Path) -> dict[str, np.ndarray]:
    file = TorchReader(path)
    try:
        return {name: file.read(name) for name in file.entries}
    finally:
        file.close()


def test_a_file_of_torch_itself() -> None:
    found = _read(RECORDED)
    base = np.arange(12, dtype=np.float32)
    expected = {
        "layer.weight": base[:6].reshape(2, 3),
        "view": base.reshape(3, 4)[1:].T,
        "same_storage": base,
        "bf16": np.array([[0.5, -3.0]], ml_dtypes.bfloat16),
        "rows": np.array([[1, -128], [127, 0]], np.int8),
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.array(7, np.int64),
        "turns": np.array([1 + 2j], np.complex64),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_hand_made_file(tmp_path: Path, wrapped: bool) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.normal(size=(3, 4)).astype(np.float32),
        "b": rng.normal(size=(2, 3, 5)).astype(ml_dtypes.bfloat16),
        "c": rng.integers(-128, 127, (4, 2)).astype(np.int8),
    }
    found = _read(make.save(tmp_path / "m.ckpt", arrays, wrapped))
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)


def _call(module: str, attribute: str, argument: str) -> bytes:
    return make.name(module, attribute) + make.text(argument) + b"\x85R"


HOSTILE = {
    "os.system": _call("os", "system", "echo > canary"),
    "posix.system": _call("posix", "system", "echo > canary"),
    "builtins.eval": _call("builtins", "eval", "open('canary', 'w')"),
    "builtins.getattr": _call("builtins", "getattr", "x"),
    "torch.load": _call("torch", "load", "x"),
    "torch.hub.load": _call("torch.hub", "load", "x"),
    "stack global": make.text("os") + make.text("system") + b"\x93" + make.text("echo > canary") + b"\x85R",
    "stack global of parts": make.text("torch") + make.text("_utils _rebuild_tensor_v2 x") + b"\x93",
    "inst": b"(" + make.text("echo > canary") + b"ios\nsystem\n",
    "newobj": make.name("collections", "OrderedDict") + b")\x81",
    "build on a tensor": make.tensor("0", "float32", 4, (4,), (1,)) + b"}b",
    "call of a string": make.text("x") + b")R",
    "extension": b"\x82\x01",
    "persistent id of a string": make.text("x") + b"Q",
    "dict of a call": make.name("collections", "OrderedDict") + make.text("ab") + b"\x85R",
    "no value": b"",
    "no mark": b"t",
    "memo never set": b"h\x07",
    "set on a string": make.text("x") + make.text("k") + make.text("v") + b"s",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_would_run_code_is_refused_and_runs_none(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = make.write(tmp_path / "m.ckpt", HOSTILE[kind], {"0": bytes(16)})
    with pytest.raises(GemmaryError) as caught:
        TorchReader(path)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["m.ckpt"]
    inside = make.write(tmp_path / "n.ckpt", make.dict_of({"w": HOSTILE[kind]}), {"0": bytes(16)})
    if kind != "no value":  # a dict whose items do not pair is refused below
        with pytest.raises(GemmaryError):
            TorchReader(inside)
    assert sorted(os.listdir(tmp_path)) == ["m.ckpt", "n.ckpt"]


def _tensor(**changes: object) -> bytes:
    arguments = {"key": "0", "dtype": "float32", "size": 4, "shape": (2, 2), "strides": (2, 1), "offset": 0}
    return make.dict_of({"w": make.tensor(**{**arguments, **changes})})  # type: ignore[arg-type]


IMPOSSIBLE = {
    "past its storage": {"shape": (3, 2)},
    "offset past its storage": {"offset": 1},
    "storage that is not there": {"key": "1"},
    "repeated by a zero stride": {"shape": (1 << 20, 4), "strides": (0, 1)},
    "far": {"shape": (2, 2), "strides": (1 << 30, 1)},
    "negative": {"shape": (-1, 2)},
    "strides that do not pair": {"strides": (1,)},
    "nine dimensions": {"shape": (1,) * 9, "strides": (1,) * 9},
}


@pytest.mark.parametrize("kind", IMPOSSIBLE)
def test_impossible_tensors(tmp_path: Path, kind: str) -> None:
    path = make.write(tmp_path / "m.ckpt", _tensor(**IMPOSSIBLE[kind]), {"0": bytes(16)})
    started = time.perf_counter()
    with pytest.raises(GemmaryError, match=r"storage|shape"):
        TorchReader(path)
    assert time.perf_counter() - started < 1


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    bomb = make.write(tmp_path / "m.ckpt", b"".join([make.text("x" * 1000) + b"0"] * 70_000), {}, zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 1 << 20
    with pytest.raises(GemmaryError, match="bytes; at most"):
        TorchReader(bomb)
    stored = make.write(tmp_path / "n.ckpt", _tensor(), {"0": bytes(16)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(GemmaryError, match="reaches outside its storage"):
        TorchReader(stored)


def test_deep_and_endless_pickles_end(tmp_path: Path) -> None:
    for value in (b"(" * (4 << 20), b"]" + b"2a" * (4 << 20), b"}" + b"2" * (4 << 20)):
        started = time.perf_counter()
        with pytest.raises(GemmaryError):
            TorchReader(make.write(tmp_path / "m.ckpt", value, {}))
        assert time.perf_counter() - started < 3


def test_other_files(tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    for data in (b"", b"no zip", b"\x80\x02}q\x00.", b"PK\x03\x04" + bytes(100)):
        path.write_bytes(data)
        with pytest.raises(GemmaryError, match="zip form"):
            TorchReader(path)
    with pytest.raises(GemmaryError, match="zip form"):
        TorchReader(tmp_path / "none.ckpt")
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("a/data.pkl", b"")
        out.writestr("b/data.pkl", b"")
    with pytest.raises(GemmaryError, match=r"exactly one data\.pkl"):
        TorchReader(path)
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("a/data.pkl", b"\x80\x02}.")
        out.writestr("a/byteorder", b"big")
    with pytest.raises(GemmaryError, match="big-endian"):
        TorchReader(path)
