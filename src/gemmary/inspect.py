"""What `gemmary inspect` shows: a model's config and every tensor with shape, count and bytes.

For a preset the numbers are those of the table at bf16, for a model on disk those of its files. Tensors are named and
shaped as Hugging Face's, since that is how the published tables print them, with the layers of one kind in one line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from gemmary.checkpoints import Checkpoint
from gemmary.checkpoints.checkpoint import config_to_json
from gemmary.checkpoints.names import layout, stored_shape
from gemmary.config import Config
from gemmary.params import Counts, count
from gemmary.presets import PRESETS, Preset

__all__ = ["Inspection", "TensorLine", "inspect_checkpoint", "inspect_preset"]


@dataclass(frozen=True)
class TensorLine:
    """One kind of tensor: its name, shape in one layer, how many layers have it, and its bytes over all of them."""

    name: str
    shape: tuple[int, ...]
    layers: int
    dtype: str
    bytes: int

    @property
    def count(self) -> int:
        """Parameters in one layer."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Inspection:
    """A model as told."""

    model: str
    format: str
    config: Config
    counts: Counts
    tensors: list[TensorLine]
    published: Preset | None

    def to_json(self) -> dict[str, Any]:
        """As plain data: `parameters`, `tensors` (layers unrolled by name), `config`, `published`."""
        published = self.published and {
            "embedding": self.published.embedding,
            "non_embedding": self.published.non_embedding,
            "exact": self.published.exact,
            "source": self.published.source,
        }
        return {
            "model": self.model,
            "format": self.format,
            "config": config_to_json(self.config),
            "parameters": {
                "embedding": self.counts.embedding,
                "non_embedding": self.counts.non_embedding,
                "total": self.counts.total,
            },
            "bytes": sum(line.bytes for line in self.tensors),
            "tensors": [
                {
                    "name": line.name.format(i=i),
                    "shape": list(line.shape),
                    "count": line.count,
                    "dtype": line.dtype,
                    "bytes": line.bytes // line.layers,
                }
                for line in self.tensors
                for i in range(line.layers)
            ],
            "published": published,
        }


def inspect_preset(name: str, preset: Preset) -> Inspection:
    """A published shape, its bytes as bf16."""
    lines = _lines(preset.config, lambda _: "bfloat16", lambda _, count: 2 * count)
    return Inspection(name, "preset", preset.config, count(preset.config), lines, preset)


def inspect_checkpoint(model: str, checkpoint: Checkpoint) -> Inspection:
    """A model on disk; no weight is read. The published counts are shown where its shape is a preset's."""
    config = checkpoint.config
    lines = _lines(config, checkpoint.dtype, lambda name, _: checkpoint.stored_bytes(name))
    published = next((preset for preset in PRESETS.values() if preset.config == config), None)
    return Inspection(model, checkpoint.format, config, count(config), lines, published)


def _lines(config: Config, dtype_of: Any, bytes_of: Any) -> list[TensorLine]:
    lines = []
    for row in layout("hf", config):
        shape, layers, (ours,) = stored_shape(row, config), config.num_layers if row.layered else 1, row.members
        lines.append(TensorLine(row.name, shape, layers, dtype_of(ours), bytes_of(ours, math.prod(shape) * layers)))
    return lines
