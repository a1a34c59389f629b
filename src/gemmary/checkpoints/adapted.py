"""A model and adapters over it, opened as one: its weights come as LoRA leaves, which every reader of a checkpoint can merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gemmary.checkpoints.checkpoint import Checkpoint
from gemmary.checkpoints.peft import read_adapter
from gemmary.errors import GemmaryError
from gemmary.text.tokenizer import Tokenizer
from gemmary.weights import LoRA

__all__ = ["AdaptedCheckpoint"]


class AdaptedCheckpoint(Checkpoint):
    """`base` with the adapters in `directory`. Raises GemmaryError where they do not fit it."""

    format = "peft"

    def __init__(self, base: Checkpoint, directory: Path) -> None:
        self.where, self._base = str(directory), base
        self._adapter = read_adapter(directory, base.config)
        score = "score" in self._adapter.extra
        self.config = base.config.replace(score_head=True) if score else base.config

    def weight(self, name: str, layer: int = 0) -> Any:
        if name in self._adapter.extra:
            return self._adapter.extra[name]
        return self._adapted(name, layer, self._base.weight(name, layer))

    def packed(self, name: str, layer: int = 0) -> Any:
        if name in self._adapter.extra:
            return self._adapter.extra[name]
        return self._adapted(name, layer, self._base.packed(name, layer))

    def _adapted(self, name: str, layer: int, weight: Any) -> Any:
        if name not in self._adapter.weights:
            return weight
        one = self._adapter.weights[name][layer]
        if isinstance(weight, LoRA):
            raise GemmaryError(f"{self._base.where} is adapted already: merge it first")
        return LoRA(weight, one.a, one.b, one.scale)

    def dtype(self, name: str) -> str:
        if name in self._adapter.extra:
            return str(self._adapter.extra[name].dtype)
        return ("LoRA over " if name in self._adapter.weights else "") + self._base.dtype(name)

    def stored_bytes(self, name: str) -> int:
        if name in self._adapter.extra:
            return int(self._adapter.extra[name].nbytes)
        adapters = self._adapter.weights.get(name, ())
        return self._base.stored_bytes(name) + sum(int(np.asarray(x).nbytes) for w in adapters for x in (w.a, w.b))

    def tokenizer(self) -> Tokenizer | None:
        return self._base.tokenizer()

    def close(self) -> None:
        self._base.close()
