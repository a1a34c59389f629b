"""The key/value cache: for each layer, slots that remember the position they hold.

A layer that sees everything has a slot per position. A sliding-window layer has a ring of window + chunk - 1 slots: enough
that a chunk can be written first and read after, since no key that the chunk's first query sees is overwritten by its
last token. Masks follow from the positions in the slots, so nothing else needs to know that the ring wraps. Beyond the
last slot there is a spare one, always empty, which takes what padding writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gemmary.config import Config

__all__ = ["Cache", "LayerCache", "cache_bytes", "init_cache", "write"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """One layer's keys and values, and the position in each slot (-1: empty)."""

    k: Float[Array, "B K S H"]
    v: Float[Array, "B K S H"]
    positions: Int[Array, "B S"]


Cache = tuple[LayerCache, ...]


def _slots(config: Config, length: int, chunk: int) -> list[int]:
    windows = [kind.window for kind in config.layer_kinds()]
    return [length if window is None else min(length, window + chunk - 1) for window in windows]


def init_cache(config: Config, batch: int, length: int, chunk: int, dtype: Any) -> Cache:
    """An empty cache for positions 0 to length - 1, written in pieces of at most `chunk` tokens."""
    chunk = min(chunk, length)

    def layer(slots: int) -> LayerCache:
        shape = (batch, config.num_kv_heads, slots + 1, config.head_dim)
        return LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.full((batch, slots + 1), -1, jnp.int32))

    return tuple(layer(slots) for slots in _slots(config, length, chunk))


def cache_bytes(config: Config, batch: int, length: int, chunk: int, dtype: Any) -> int:
    """What `init_cache` would allocate, in bytes."""
    row = 2 * config.num_kv_heads * config.head_dim * jnp.dtype(dtype).itemsize + 4
    return int(batch * row * sum(n + 1 for n in _slots(config, length, min(chunk, length))))


def write(
    cache: LayerCache, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], positions: Int[Array, "B T"]
) -> LayerCache:
    """The cache with T new tokens in it; those at position -1 are padding, and go to the spare slot."""
    spare = cache.positions.shape[1] - 1
    slot = jnp.where(positions >= 0, positions % spare, spare)
    k, v = k.astype(cache.k.dtype), v.astype(cache.v.dtype)
    if positions.shape[1] > 1:
        row = jnp.arange(positions.shape[0])[:, None]
        return LayerCache(
            cache.k.at[row, :, slot].set(k),
            cache.v.at[row, :, slot].set(v),
            cache.positions.at[row, slot].set(positions),
        )

    # One token: row by row, since XLA turns a scatter of one into three copies of the whole cache on a CPU.
    def write_row(b: int | Array, cache: LayerCache) -> LayerCache:
        def put(into: Array, new: Array, *at: int | Array) -> Array:
            return jax.lax.dynamic_update_slice(into, jax.lax.dynamic_slice_in_dim(new, b, 1), (b, *at))

        at = slot[b, 0]
        return LayerCache(
            put(cache.k, k.swapaxes(1, 2), 0, at, 0),
            put(cache.v, v.swapaxes(1, 2), 0, at, 0),
            put(cache.positions, positions, at),
        )

    rows = positions.shape[0]
    written: LayerCache = write_row(0, cache) if rows == 1 else jax.lax.fori_loop(0, rows, write_row, cache)
    return written
