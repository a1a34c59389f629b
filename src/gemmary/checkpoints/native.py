"""Our own format: an Orbax pytree with an array per weight and layer, and a SHA-256 manifest written last.

    gemmary.json      format version and config
    tokenizer.model   where there is one
    params/           the pytree; keys are "embed", "attn.q.00", …; a quantized or adapted weight is a dict of its parts
    manifest.json     size and SHA-256 of every other file

Orbax has no checksum on tensor bytes, so `open_native` compares every file with the manifest before it reads any weight.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from gemmary.checkpoints.checkpoint import (
    Checkpoint,
    closed_on_error,
    config_from_json,
    config_to_json,
    read_json,
)
from gemmary.checkpoints.manifest import MANIFEST, verify_manifest, write_manifest
from gemmary.checkpoints.orbax_file import OrbaxReader, OrbaxWriter
from gemmary.config import Config
from gemmary.errors import GemmaryError
from gemmary.params import TABLE, shape_of, table
from gemmary.text.tokenizer import Tokenizer
from gemmary.weights import INT4_GROUP, Int4, Int8, LoRA

__all__ = ["NativeCheckpoint", "NativeWriter", "is_native", "open_native"]

_VERSION = 1
_MODEL, _TOKENIZER, _PARAMS = "gemmary.json", "tokenizer.model", "params"


def is_native(directory: Path) -> bool:
    """Whether the directory is one of ours: our params, or at least our manifest."""
    return (directory / _MODEL).is_file() and ((directory / _PARAMS).is_dir() or (directory / MANIFEST).is_file())


def _key(name: str, layer: int) -> str:
    return f"{name}.{layer:02d}" if TABLE[name].layered else name


class NativeWriter:
    """Writes a model into an empty directory, weight by weight; `close` writes the manifest and makes it loadable."""

    def __init__(self, directory: Path, config: Config, tokenizer: Tokenizer | None) -> None:
        self._directory = directory
        model = {"format": _VERSION, "config": config_to_json(config)}
        (directory / _MODEL).write_text(json.dumps(model, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            (directory / _TOKENIZER).write_bytes(tokenizer.to_sentencepiece())
        self._params = OrbaxWriter(directory / _PARAMS)

    def write(self, weights: dict[tuple[str, int], Any]) -> None:
        """Add weights by (row, layer)."""
        self._params.write({_key(*at): _parts(weight) for at, weight in weights.items()})

    def close(self) -> None:
        self._params.close()
        write_manifest(self._directory)


def open_native(directory: Path, *, verify: bool = True) -> NativeCheckpoint:
    """Open one of our directories. Raises GemmaryError where a file is missing, extra to the manifest or altered."""
    if verify:
        verify_manifest(directory)
    return NativeCheckpoint(directory)


class NativeCheckpoint(Checkpoint):
    """One of our directories, opened."""

    format = "native"

    def __init__(self, directory: Path) -> None:
        self.where, self._directory = str(directory), directory
        model = read_json(directory / _MODEL)
        if not isinstance(model, dict) or model.get("format") != _VERSION:
            raise GemmaryError(
                f"{directory / _MODEL}: format {model!r:.40} is not {_VERSION}; update gemmary to read it"
            )
        self.config = config_from_json(model.get("config"), self.where)
        with closed_on_error(OrbaxReader(directory / _PARAMS)) as self._file:
            self._check()

    def _check(self) -> None:
        wanted = {
            _key(name, i): shape_of(self.config, spec)[1 if spec.layered else 0 :]
            for name, spec in table(self.config).items()
            for i in range(self.config.num_layers if spec.layered else 1)
        }
        found = {key for entry in self._file.entries.values() for key in entry.path[:1]}
        if found != set(wanted):
            odd = ", ".join(sorted(found ^ set(wanted))[:4])
            raise GemmaryError(f"{self.where}: its weights are not those of its config ({odd})")
        for key, shape in wanted.items():
            have = self._shape(key)
            if have != shape:
                raise GemmaryError(f"{self.where}: {key} is {list(have)} instead of {list(shape)}")

    def _shape(self, path: str) -> tuple[int, ...]:
        entries = self._file.entries
        for part in ("", "/values"):
            if path + part in entries:
                return entries[path + part].shape
        if f"{path}/packed" in entries:
            shape = list(entries[f"{path}/packed"].shape)
            shape[_int4_axis(path)] *= 2
            return tuple(shape)
        return self._shape(f"{path}/base") if f"{path}/a" in entries else ()

    def weight(self, name: str, layer: int = 0) -> Any:
        return self._leaf(name, _key(name, layer))

    def _leaf(self, name: str, path: str) -> Any:
        read, entries = self._file.read, self._file.entries
        if path in entries:
            return read(path)
        if f"{path}/values" in entries:
            return Int8(read(f"{path}/values"), read(f"{path}/scale"))
        if f"{path}/packed" in entries:
            return Int4(read(f"{path}/packed"), read(f"{path}/scale"), _int4_axis(path))
        base, scale = self._leaf(name, f"{path}/base"), float(read(f"{path}/lora_scale"))
        return LoRA(base, read(f"{path}/a"), read(f"{path}/b"), scale)

    def dtype(self, name: str) -> str:
        key = _key(name, 0)
        suffixes = {"": "", "/values": "", "/packed": f"int4, groups of {INT4_GROUP}", "/base": "LoRA over "}
        for suffix, text in suffixes.items():
            if key + suffix in self._file.entries:
                return text + (str(self._file.entries[key + suffix].dtype) if suffix != "/packed" else "")
        return "LoRA over int8 or int4"

    def stored_bytes(self, name: str) -> int:
        keys = {_key(name, i) for i in range(self.config.num_layers if TABLE[name].layered else 1)}
        return sum(entry.nbytes for entry in self._file.entries.values() if entry.path[0] in keys)

    def tokenizer(self) -> Tokenizer | None:
        path = self._directory / _TOKENIZER
        return Tokenizer.from_sentencepiece(path) if path.exists() else None

    def close(self) -> None:
        self._file.close()


def _int4_axis(path: str) -> int:
    name = path.split("/")[0]
    return TABLE[name if name in TABLE else name.rpartition(".")[0]].read_axes()[-1]


def _parts(weight: Any) -> Any:
    """A weight as nested dicts of arrays."""
    if isinstance(weight, Int8):
        return {"values": weight.values, "scale": weight.scale}
    if isinstance(weight, Int4):
        return {"packed": weight.packed, "scale": weight.scale}
    if isinstance(weight, LoRA):
        return {"base": _parts(weight.base), "a": weight.a, "b": weight.b, "lora_scale": np.float64(weight.scale)}
    return weight
