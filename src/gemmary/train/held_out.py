"""Bits per byte of held-out documents: what a model needs to write them down, whatever its tokenizer is.

The sum of -log2 p over all tokens of the documents, over the UTF-8 bytes of the documents. A document is read in windows,
each from BOS; its end is not predicted.
"""

from __future__ import annotations

import lzma
import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from gemmary.config import Config
from gemmary.data.packing import Batch
from gemmary.params import Params
from gemmary.train.head import Head
from gemmary.train.losses import packed_loss

__all__ = ["bits_per_byte", "xz_bits_per_byte"]


@partial(jax.jit, static_argnames=("config", "head", "dtype"))
def _nats(params: Params, batch: Batch, config: Config, head: Head, dtype: Any) -> jax.Array:
    return packed_loss(params, config, batch, head, dtype=dtype)[1]


def bits_per_byte(
    params: Params,
    config: Config,
    sources: Mapping[str, tuple[Iterable[Batch], int]],
    *,
    head: Head,
    dtype: Any = jnp.float32,
) -> dict[str, float]:
    """Of each source, by name: its batches and the bytes that these spell."""
    found = {}
    for name, (batches, size) in sources.items():
        nats = sum(float(_nats(params, batch, config, head, dtype)) for batch in batches)
        found[name] = nats / math.log(2) / size
    return found


def xz_bits_per_byte(texts: Iterable[str]) -> float:
    """What `xz -9` needs for the same documents in one file: a mark that a language model should pass."""
    packer, size, written = lzma.LZMACompressor(preset=9), 0, 0
    for text in texts:
        data = text.encode()
        size += len(data)
        written += len(packer.compress(data))
    return 8 * (written + len(packer.flush())) / max(size, 1)
