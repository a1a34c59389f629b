"""Small random models of every generation, and checkpoints of them on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from gemmary.checkpoints.checkpoint import Checkpoint
from gemmary.checkpoints.native import NativeWriter
from gemmary.config import Config
from gemmary.params import init, layered_names, unstack
from gemmary.presets import PRESETS
from gemmary.text import Tokenizer

__all__ = ["CONFIGS", "same_weights", "values_of", "write_native"]

_SIZES: dict[str, Any] = {
    "embed_dim": 64, "num_layers": 3, "num_heads": 4, "head_dim": 32, "ffw_dim": 96, "context": 256
}  # fmt: skip
CONFIGS: dict[str, Config] = {
    "gemma1-mqa": PRESETS["gemma-2b"].config.replace(**_SIZES, query_scale=32**-0.5, vocab_size=1064, num_tokens=1000),
    "gemma1-mha": PRESETS["gemma-7b"].config.replace(
        **_SIZES, num_kv_heads=4, query_scale=32**-0.5, vocab_size=1000, num_tokens=1000
    ),
    "gemma2": PRESETS["gemma2-2b"].config.replace(
        **_SIZES, num_kv_heads=2, query_scale=24**-0.5, vocab_size=1000, num_tokens=1000, window=16
    ),
    "gemma3": PRESETS["gemma3-4b"].config.replace(
        **{**_SIZES, "num_layers": 6}, num_kv_heads=2, query_scale=32**-0.5, vocab_size=1000, num_tokens=1000, window=16
    ),
}


def values_of(config: Config, dtype: Any = ml_dtypes.bfloat16) -> dict[tuple[str, int], np.ndarray]:
    """Random weights by (row, layer); the norms are random too, and some of their values are tiny."""
    params = unstack(init(config, jax.random.key(0)))
    values = {}
    for i, (name, layer) in enumerate(layered_names(config)):
        w = params[name][layer] if isinstance(params[name], tuple) else params[name]
        if not np.asarray(w).any():
            rng = np.random.default_rng(i)
            w = rng.normal(size=w.shape) * 10.0 ** rng.integers(-8, 1, w.shape)
        values[name, layer] = np.asarray(w).astype(dtype)
    return values


def write_native(directory: Path, config: Config, tokenizer: Tokenizer | None, values: dict[Any, Any]) -> Path:
    """A native checkpoint of those weights."""
    directory.mkdir(parents=True)
    writer = NativeWriter(directory, config, tokenizer)
    writer.write(values)
    writer.close()
    return directory


def same_weights(checkpoint: Checkpoint, values: dict[tuple[str, int], np.ndarray]) -> None:
    """Every weight bit for bit, dtype and all."""
    for (name, layer), value in values.items():
        found = checkpoint.weight(name, layer)
        assert found.dtype == value.dtype, (name, layer, found.dtype)
        np.testing.assert_array_equal(
            np.ascontiguousarray(found).view(np.uint8), np.ascontiguousarray(value).view(np.uint8), err_msg=name
        )
        assert jnp.asarray(found).shape == value.shape
