"""A model on disk, opened: its config, its tokenizer, and its weights one at a time, in our layout.

Whatever the format, a `Checkpoint` reads one layer's one weight per call, so that loading and converting need memory for
one tensor beside the result. Writers stage what they write beside its place and rename it when it is whole.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
import numpy as np

from gemmary.checkpoints.names import Stored, check_names, layout, split
from gemmary.config import Config
from gemmary.errors import GemmaryError
from gemmary.kernels import serves_blocks
from gemmary.params import TABLE, Params, table
from gemmary.quantization import packed
from gemmary.text.tokenizer import Tokenizer
from gemmary.weights import LoRA

__all__ = [
    "Checkpoint",
    "StoredCheckpoint",
    "TensorFile",
    "closed_on_error",
    "config_from_json",
    "config_to_json",
    "in_dtype",
    "known_tokens",
    "read_json",
    "staged",
    "write_whole",
]

_JSON_BYTES = 16 << 20


class TensorFile(Protocol):
    """A container of named tensors that reads one at a time; entries have `shape`, `dtype` and `nbytes`."""

    @property
    def entries(self) -> Mapping[str, Any]: ...
    def read(self, name: str) -> np.ndarray: ...
    def close(self) -> None: ...


class _Closes(Protocol):
    def close(self) -> None: ...


F = TypeVar("F", bound=_Closes)


class Checkpoint(ABC):
    """An opened model. `where` names it in messages, `format` is native, hf, gguf, kaggle or torch."""

    where: str
    format: str
    config: Config

    @abstractmethod
    def weight(self, name: str, layer: int = 0) -> Any:
        """One layer's weight of that table row: a NumPy array, or a quantized or adapted leaf with NumPy parts."""

    @abstractmethod
    def dtype(self, name: str) -> str:
        """How that row's weights are stored, for people: bfloat16, Q4_K, int8, …"""

    @abstractmethod
    def stored_bytes(self, name: str) -> int:
        """What that row takes in the files, over all layers."""

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that came with the weights, if one did."""
        return None

    def own_tokenizer(self) -> Tokenizer:
        """The same, where one is needed. Raises GemmaryError where there is none."""
        tokenizer = self.tokenizer()
        if tokenizer is None:
            raise GemmaryError(f"{self.where} has no tokenizer: put its tokenizer.model beside the weights")
        return tokenizer

    @abstractmethod
    def close(self) -> None:
        """Let go of the files."""

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def packed(self, name: str, layer: int = 0) -> Any:
        """A weight as the CPU kernels read it best: in the blocks that it is stored in, where there are such."""
        return packed(name, self.weight(name, layer))

    def params(self, dtype: Any, on_weight: Any = lambda name: None, *, to_run: bool = False) -> Params:
        """All weights on the default device, unstacked, floating ones in `dtype`.

        Quantized values stay as they are; scales keep their own dtype. `on_weight` is called after each. Weights `to_run`
        and not to change are left in blocks where the CPU kernels serve.
        """

        def place(name: str, layer: int) -> Any:
            weight = self.packed(name, layer) if to_run else self.weight(name, layer)
            placed = jax.device_put(in_dtype(weight, _to_keep(name, weight, dtype) if to_run else dtype))
            on_weight(name)
            return placed

        return {
            name: tuple(place(name, i) for i in range(self.config.num_layers)) if spec.layered else place(name, 0)
            for name, spec in table(self.config).items()
        }


def _to_keep(name: str, weight: Any, dtype: Any) -> Any:
    """The dtype to run a weight in: matrices that are stored in bfloat16 stay so where the CPU kernels read them."""
    stored = getattr(weight.base if isinstance(weight, LoRA) else weight, "dtype", None)
    return stored if stored == jax.numpy.bfloat16 and TABLE[name].reads and serves_blocks() else dtype


def in_dtype(weight: Any, dtype: Any) -> Any:
    """A floating array in `dtype`, also beneath adapters; a quantized weight as it is."""
    if isinstance(weight, LoRA):
        return replace(weight, base=in_dtype(weight.base, dtype))
    return weight.astype(dtype, copy=False) if isinstance(weight, np.ndarray) else weight


class StoredCheckpoint(Checkpoint):
    """A checkpoint of a foreign format: a container of tensors read through the table of names.

    `files` maps the format's names to the container's, where these differ by a prefix. Checks all names and shapes at once
    and raises GemmaryError listing what is missing, unknown or misshapen.
    """

    def __init__(
        self, where: str, format: str, config: Config, file: TensorFile, files: Mapping[str, str] | None = None
    ) -> None:
        self.where, self.format, self.config = where, format, config
        self._file = file
        self._names = dict(files) if files is not None else {name: name for name in file.entries}
        check_names(where, format, config, {name: file.entries[self._names[name]].shape for name in self._names})
        self._rows = {ours: row for row in layout(format, config) for ours in row.members}
        self._last: tuple[str, dict[str, np.ndarray]] = ("", {})

    def _entry(self, name: str, layer: int = 0) -> Any:
        return self._file.entries[self._names[self._rows[name].at(layer)]]

    def _tensor(self, row: Stored, layer: int) -> np.ndarray:
        return self._file.read(self._names[row.at(layer)])

    def weight(self, name: str, layer: int = 0) -> np.ndarray:
        row = self._rows[name]
        stored = row.at(layer)
        if len(row.members) == 1:
            return split(row, self.config, self._tensor(row, layer))[name]
        if self._last[0] != stored:  # a fused tensor is read once for all that it holds
            self._last = (stored, split(row, self.config, self._tensor(row, layer)))
        return self._last[1][name]

    def dtype(self, name: str) -> str:
        return str(self._entry(name).dtype)

    def stored_bytes(self, name: str) -> int:
        row = self._rows[name]
        layers = self.config.num_layers if row.layered else 1
        return int(sum(self._entry(name, i).nbytes for i in range(layers))) // len(row.members)

    def close(self) -> None:
        self._last = ("", {})
        self._file.close()


def known_tokens(vocab_size: int) -> int:
    """How many rows of a published embedding a tokenizer knows: 256128 pads 256000, and 262208 pads 262144."""
    return {256128: 256000, 262208: 262144}.get(vocab_size, vocab_size)


def config_to_json(config: Config) -> dict[str, Any]:
    """The config as plain data, every field."""
    return asdict(config)


def config_from_json(data: Any, where: str) -> Config:
    """The inverse; unknown or missing fields and wrong types raise GemmaryError."""
    known = {field.name for field in fields(Config)}
    if not isinstance(data, dict) or not set(data) <= known:
        raise GemmaryError(f"{where}: its config is not one of ours; was it written by a newer gemmary?")
    if isinstance(data.get("window_pattern"), list):
        data = {**data, "window_pattern": tuple(bool(x) for x in data["window_pattern"])}
    try:
        return Config(**data)
    except TypeError as error:
        raise GemmaryError(f"{where}: its config is incomplete ({error})") from None


def read_json(path: Path) -> Any:
    """A small JSON file's value. Raises GemmaryError where it is missing, too large or not JSON."""
    try:
        if path.stat().st_size > _JSON_BYTES:
            raise GemmaryError(f"{path} is over {_JSON_BYTES >> 20} MiB: not a configuration file")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise GemmaryError(f"{path} is missing: give a directory that holds a whole model") from None
    except (OSError, ValueError, RecursionError) as error:
        raise GemmaryError(f"{path} cannot be read as JSON ({error})") from None


def write_whole(path: Path, data: bytes) -> None:
    """Write a file aside, then rename it: whoever reads it meets the old one or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_bytes(data)
    aside.replace(path)


@contextmanager
def closed_on_error(file: F) -> Iterator[F]:
    """The opened file, for making a checkpoint of; where that fails, it is closed."""
    try:
        yield file
    except BaseException:
        file.close()
        raise


@contextmanager
def staged(destination: Path, expected_bytes: int, *, directory: bool = True) -> Iterator[Path]:
    """A place beside the destination to write to; renamed to it at the end, removed on any error.

    Refuses (GemmaryError) to overwrite, and to start where the disk has less than `expected_bytes` free.
    """
    if destination.exists():
        raise GemmaryError(f"{destination} exists already: choose another name, or remove it first")
    parent = destination.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(parent).free
        if free < expected_bytes:
            raise GemmaryError(
                f"{parent} has {free / 1e9:.1f} GB free and {destination.name} needs {expected_bytes / 1e9:.1f} GB"
            )
        stage = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=".partial", dir=parent))
    except OSError as error:
        raise GemmaryError(f"cannot write to {parent}: {error.strerror}") from None
    try:
        target = stage / destination.name
        if directory:
            target.mkdir()
        yield target
        os.replace(target, destination)
    except OSError as error:
        if error.errno is None:
            raise
        raise GemmaryError(f"writing {destination} failed: {error.strerror}; nothing was left behind") from None
    finally:
        shutil.rmtree(stage, ignore_errors=True)
