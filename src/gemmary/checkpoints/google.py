"""Google's own two formats: Kaggle's Flax checkpoints (Orbax) and PyTorch's .ckpt.

Neither carries a config. It is the published preset whose every tensor has the file's shapes; a `gemmary.json` beside the
weights, which our own exports have, says it for models that were never published.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from gemmary.checkpoints.checkpoint import (
    StoredCheckpoint,
    TensorFile,
    closed_on_error,
    config_from_json,
    read_json,
)
from gemmary.checkpoints.names import IGNORED, Stored, layout, stored_shape
from gemmary.checkpoints.orbax_file import OrbaxReader
from gemmary.checkpoints.torch_file import TorchReader
from gemmary.config import Config
from gemmary.errors import GemmaryError
from gemmary.presets import PRESETS
from gemmary.text.tokenizer import Tokenizer

__all__ = ["KaggleCheckpoint", "TorchCheckpoint", "open_kaggle", "open_torch"]

_SCALER = "_scaler"  # beside an int8 weight: one scale per row


class _GoogleCheckpoint(StoredCheckpoint):
    """Weights with, perhaps, a tokenizer.model beside them or one folder up."""

    def __init__(
        self, directory: Path, where: str, format: str, config: Config, file: TensorFile, files: Mapping[str, str]
    ) -> None:
        super().__init__(where, format, config, file, files)
        self._directory = directory

    def tokenizer(self) -> Tokenizer | None:
        for directory in (self._directory, self._directory.absolute().parent):
            if (directory / "tokenizer.model").exists():
                return Tokenizer.from_sentencepiece(directory / "tokenizer.model")
        return None


class KaggleCheckpoint(_GoogleCheckpoint):
    """An opened Flax checkpoint."""


class TorchCheckpoint(_GoogleCheckpoint):
    """An opened .ckpt; int8 rows are multiplied by their scales as they are read."""

    def _tensor(self, row: Stored, layer: int) -> np.ndarray:
        name = row.at(layer)
        values = super()._tensor(row, layer)
        if values.dtype != np.int8:
            return values
        scales = self._file.read(name + _SCALER).astype(np.float32)
        return values.astype(np.float32) * scales[:, None]


def open_kaggle(directory: Path) -> KaggleCheckpoint:
    """Open a Flax checkpoint, its keys flat (as released) or nested (as Google's library saves)."""
    with closed_on_error(OrbaxReader(directory)) as file:
        files = {}
        for name in file.entries:
            plain = name if name.startswith(("transformer/", "SigLiPFromPatches_0/")) else f"transformer/{name}"
            if plain.endswith(("mlp/linear", "mlp/gating_einsum")):
                plain += "/w"  # the newer, nested layout drops it
            if not plain.startswith(IGNORED["kaggle"]):
                files[plain] = name
        config = _config_for(directory, "kaggle", {name: file.entries[files[name]].shape for name in files})
        return KaggleCheckpoint(directory, str(directory), "kaggle", config, file, files)


def open_torch(path: Path) -> TorchCheckpoint:
    """Open a .ckpt without torch and without running anything in it."""
    with closed_on_error(TorchReader(path)) as file:
        files = {name: name for name in file.entries if not name.endswith((_SCALER, *IGNORED["torch"]))}
        config = _config_for(path.parent, "torch", {name: file.entries[name].shape for name in files}, str(path))
        for name in files:
            if file.entries[name].dtype == np.int8:
                scaler = file.entries.get(name + _SCALER)
                if scaler is None or scaler.shape != file.entries[name].shape[:1]:
                    raise GemmaryError(
                        f"{path}: {name} is int8 and has no scale per row beside it; the file is incomplete"
                    )
        return TorchCheckpoint(path.parent, str(path), "torch", config, file, files)


def _config_for(
    directory: Path, format: str, shapes: Mapping[str, tuple[int, ...]], where: str | None = None
) -> Config:
    if (directory / "gemmary.json").is_file():
        data = read_json(directory / "gemmary.json")
        return config_from_json(data.get("config") if isinstance(data, dict) else None, str(directory / "gemmary.json"))
    for config in _published(shapes.get(layout(format, PRESETS["gemma-2b"].config)[0].name)):
        wanted = {
            row.at(i): stored_shape(row, config)
            for row in layout(format, config)
            for i in range(config.num_layers if row.layered else 1)
        }
        if wanted == dict(shapes):
            return config
    raise GemmaryError(
        f"{where or directory} has the shapes of no published Gemma ({len(shapes)} tensors); "
        "for another model, put a gemmary.json with its config beside the weights"
    )


def _published(embedding: tuple[int, ...] | None) -> Iterator[Config]:
    """Presets of that width, with that many rows."""
    if embedding is None or len(embedding) != 2:
        return
    for preset in PRESETS.values():
        config = preset.config
        if config.embed_dim == embedding[1] and config.num_tokens <= embedding[0] <= config.num_tokens + 256:
            yield config.replace(vocab_size=embedding[0])
