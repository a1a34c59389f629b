"""From one format to another, tensor by tensor: memory for one, whatever the model's size.

A conversion keeps every value and its dtype, so that there and back is bit-identical; `dtype` or `gguf_type` ask for
others. Quantized and adapted weights of a native checkpoint are merged and widened on the way out, since no other format
has them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from gemmary.adapters import merge
from gemmary.checkpoints.checkpoint import Checkpoint, config_to_json, in_dtype, staged
from gemmary.checkpoints.gguf import fields_for
from gemmary.checkpoints.gguf_file import WRITE_TYPES, GGUFWriter
from gemmary.checkpoints.huggingface import write_side_files
from gemmary.checkpoints.names import Stored, join, layout, stored_shape
from gemmary.checkpoints.native import NativeWriter
from gemmary.checkpoints.orbax_file import OrbaxWriter
from gemmary.checkpoints.safetensors_file import SafetensorsWriter
from gemmary.config import Config
from gemmary.errors import GemmaryError
from gemmary.params import TABLE, count, layered_names, shape_of
from gemmary.quantization import quantize_weight
from gemmary.weights import Int4, Int8, LoRA, dequantize

__all__ = ["DTYPES", "FORMATS", "GGUF_TYPES", "convert", "quantize_model"]

FORMATS = ("native", "hf", "gguf", "kaggle")
DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
GGUF_TYPES = WRITE_TYPES

Progress = Callable[[int, int], None]
"""Called with the parameters done and their total."""


def convert(
    source: Checkpoint,
    destination: Path,
    to: str,
    *,
    dtype: str | None = None,
    gguf_type: str | None = None,
    on_progress: Progress = lambda done, total: None,
) -> None:
    """Write `source` to `destination` in format `to` (a directory, or a file for gguf).

    `dtype` (float32, bfloat16) changes the stored values' type; `gguf_type` (F32, BF16, Q8_0, Q4_0) that of a GGUF's matrices.
    Raises GemmaryError for an unknown format or type, an existing destination or too little disk; nothing is left behind.
    """
    _check(to, FORMATS, "format")
    _check(dtype, (None, *DTYPES), "dtype")
    _check(gguf_type, (None, *GGUF_TYPES), "GGUF type")
    if gguf_type and to != "gguf":
        raise GemmaryError(f"a GGUF type is for --to gguf, not for {to}")
    if source.config.score_head and to not in ("native", "hf"):
        raise GemmaryError(f"{to} has no place for a reward model's score: choose native or hf")
    reader = _Reader(source, DTYPES.get(dtype or ""), on_progress)
    write = {"native": _to_native, "hf": _to_huggingface, "gguf": _to_gguf, "kaggle": _to_kaggle}[to]
    with staged(destination, reader.bytes(), directory=to != "gguf") as stage:
        write(reader, stage, gguf_type)


def quantize_model(
    source: Checkpoint, destination: Path, bits: int, *, on_progress: Progress = lambda done, total: None
) -> None:
    """Write `source` as a native checkpoint with Int8 or Int4 weights (norms stay; at 4 bits the embedding keeps 8).

    Raises GemmaryError for other widths, and where groups of 32 do not fit.
    """
    if bits not in (4, 8):
        raise GemmaryError(f"weights can be quantized to 8 or 4 bits, not {bits}")
    reader = _Reader(source, None, on_progress)
    config = source.config

    def narrow(name: str, value: np.ndarray) -> Any:
        if not TABLE[name].reads:
            return value
        leaf = quantize_weight(name, jnp.asarray(value), 8 if name == "embed" else bits)
        return jax.tree.map(np.asarray, leaf)

    with staged(destination, count(config).total * bits // 8) as stage:
        writer = NativeWriter(stage, config, source.tokenizer())
        for group in _by_layer(config):
            writer.write({at: narrow(at[0], reader.array(*at)) for at in group})
        writer.close()


def _check(value: Any, allowed: tuple[Any, ...], what: str) -> None:
    if value not in allowed:
        names = ", ".join(str(name) for name in allowed if name is not None)
        raise GemmaryError(f"there is no {what} {value!r}: choose among {names}")


class _Reader:
    """A source's weights as plain arrays, in the dtype asked for, with progress."""

    def __init__(self, source: Checkpoint, dtype: np.dtype[Any] | None, on_progress: Progress) -> None:
        self.source, self.config = source, source.config
        self._dtype, self._progress = dtype, on_progress
        self._done, self._total = 0, count(source.config).total
        # Widened weights have no dtype of their own to keep; fp32 then loses nothing.
        embed = dtype or _float_dtype(source.dtype("embed"))
        self.dtype_name = next(name for name, known in DTYPES.items() if known == embed)

    def array(self, name: str, layer: int) -> np.ndarray:
        weight = self.source.weight(name, layer)
        if isinstance(weight, LoRA):
            weight = in_dtype(weight, np.float32) if self._dtype else weight  # rounded once, when it is merged
            weight = np.asarray(merge({name: jax.tree.map(jnp.asarray, weight)})[name])
        elif isinstance(weight, (Int8, Int4)):
            weight = np.asarray(dequantize(jax.tree.map(jnp.asarray, weight)))
        array: np.ndarray = weight if self._dtype is None else weight.astype(self._dtype, copy=False)
        if array.dtype == np.float16:  # the other formats we write have no use for it, and fp32 holds it exactly
            array = array.astype(np.float32)
        self._count(name)
        return array

    def _count(self, name: str) -> None:
        spec = TABLE[name]
        self._done += math.prod(shape_of(self.config, spec)[1 if spec.layered else 0 :])
        self._progress(self._done, self._total)

    def as_stored(self, name: str, layer: int) -> Any:
        """The weight for a native checkpoint: quantized and adapted leaves stay, unless a dtype is asked for."""
        weight = self.source.weight(name, layer)
        if self._dtype or isinstance(weight, np.ndarray):
            return self.array(name, layer)
        self._count(name)
        return weight

    def dtype(self, row: Stored, layer: int) -> np.dtype[Any]:
        """The dtype that `joined` gives. Norms, which a format may keep wider than the rest, are read to know."""
        name = row.members[0]
        if self._dtype or TABLE[name].reads:
            return self._dtype or _float_dtype(self.source.dtype(name))
        return _float_dtype(str(self.source.weight(name, layer).dtype))

    def joined(self, row: Stored, layer: int) -> np.ndarray:
        return join(row, self.config, {ours: self.array(ours, layer) for ours in row.members})

    def bytes(self) -> int:
        return self._total * int(DTYPES[self.dtype_name].itemsize)


def _float_dtype(stored: str) -> np.dtype[Any]:
    return DTYPES["bfloat16"] if stored.lower() in ("bfloat16", "bf16") else DTYPES["float32"]


def _by_layer(config: Config) -> Iterator[list[tuple[str, int]]]:
    """(row, layer) grouped: what the model has once, each alone, then layer by layer."""
    names = layered_names(config)
    yield from ([at] for at in names if not TABLE[at[0]].layered)
    for layer in range(config.num_layers):
        yield [at for at in names if TABLE[at[0]].layered and at[1] == layer]


def _rows(format: str, config: Config) -> list[tuple[Stored, int]]:
    return [(row, i) for row in layout(format, config) for i in range(config.num_layers if row.layered else 1)]


def _to_native(reader: _Reader, stage: Path, _: str | None) -> None:
    writer = NativeWriter(stage, reader.config, reader.source.tokenizer())
    for group in _by_layer(reader.config):
        writer.write({at: reader.as_stored(*at) for at in group})
    writer.close()


def _to_huggingface(reader: _Reader, stage: Path, _: str | None) -> None:
    rows = _rows("hf", reader.config)
    plan = [(row.at(i), stored_shape(row, reader.config), reader.dtype(row, i)) for row, i in rows]
    with SafetensorsWriter(stage, plan) as writer:
        for row, i in rows:
            writer.write(row.at(i), reader.joined(row, i))
    write_side_files(stage, reader.config, reader.dtype_name, reader.source.tokenizer())


def _to_gguf(reader: _Reader, stage: Path, gguf_type: str | None) -> None:
    config = reader.config
    matrix = gguf_type or {"float32": "F32", "bfloat16": "BF16"}[reader.dtype_name]
    rows = _rows("gguf", config)

    def kind_of(row: Stored) -> str:
        if row.one_plus:
            return "F32"
        return "Q8_0" if matrix == "Q4_0" and "embed" in row.members else matrix  # the embedding is also the output

    plan = [(row.at(i), stored_shape(row, config), kind_of(row)) for row, i in rows]
    fields = fields_for(config, reader.source.tokenizer(), reader.source, stage.stem)
    with GGUFWriter(stage, fields, plan) as writer:
        for row, i in rows:
            writer.write(row.at(i), reader.joined(row, i))


def _to_kaggle(reader: _Reader, stage: Path, _: str | None) -> None:
    """The tree as Google released it: keys joined by slashes, but for the last. A config and tokenizer beside it are ours."""
    config = reader.config
    weights = OrbaxWriter(stage / "weights")
    for layer in range(-1, config.num_layers):
        tree: dict[str, dict[str, np.ndarray]] = {}
        for row, i in _rows("kaggle", config):
            if (i if row.layered else -1) == layer:
                key, _, leaf = row.at(i).rpartition("/")
                tree.setdefault(key, {})[leaf] = reader.joined(row, i)
        weights.write(tree)
    weights.close()
    for path in (stage / "weights").iterdir():
        path.rename(stage / path.name)
    (stage / "weights").rmdir()
    model = {"config": config_to_json(config)}
    (stage / "gemmary.json").write_text(json.dumps(model, indent=2) + "\n", encoding="utf-8")
    tokenizer = reader.source.tokenizer()
    if tokenizer is not None:
        (stage / "tokenizer.model").write_bytes(tokenizer.to_sentencepiece())
