"""The key/value cache: for each layer, slots that remember the position they hold.

A layer that sees everything has a slot per position. A sliding-window layer has a ring of window + chunk - 1 slots: enough
that a chunk can be written first and read after, since no key that the chunk's first query sees is overwritten by its
last token. Masks follow from the positions in the slots, so nothing else needs to know that the ring wraps.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gemmary import kernels
from gemmary.config import Config
from gemmary.model.attention import Marks, attend, attend_among

__all__ = ["Cache", "LayerCache", "cache_bytes", "init_cache", "write"]


# To a type checker an array. At run time anything: shapes alone go into the same trees.
if TYPE_CHECKING:
    _Leaf = Array
else:
    _Leaf = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """One layer's keys and values [B, K, S, H], and the position in each slot [B, S] (-1: empty)."""

    k: _Leaf
    v: _Leaf
    positions: _Leaf

    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        marks: Marks,
        *,
        first: bool,
        window: int | None,
        softcap: float | None,
    ) -> tuple[Float[Array, "B T N H"], LayerCache]:
        """Attention of new tokens to themselves and to the cache, and the cache with them in it; `first`: it was empty."""
        limits: dict[str, Any] = {"window": window, "softcap": softcap}
        if not first and kernels.serves_cached(q.shape[1], self.k.dtype):
            out, *kept = kernels.cached_attention(q, k, v, marks.positions, self.k, self.v, self.positions, **limits)
            return out, LayerCache(*kept)
        written = write(self, k, v, marks.positions)
        if first:
            return attend_among(q, k, v, marks, **limits), written
        if kernels.serves_attention(q.shape[3]):
            return kernels.late_attention(q, *_in_order(written, marks.positions), **limits), written
        return attend(q, written.k, written.v, marks, Marks(written.positions), **limits), written


Cache = tuple[LayerCache, ...]


def _slots(config: Config, length: int, chunk: int) -> list[int]:
    windows = [kind.window for kind in config.layer_kinds()]
    return [length if window is None else min(length, window + chunk - 1) for window in windows]


def init_cache(config: Config, batch: int, length: int, chunk: int, dtype: Any) -> Cache:
    """An empty cache for positions 0 to length - 1, written in pieces of at most `chunk` tokens."""
    cache: Cache = _empty(config, batch, tuple(_slots(config, length, min(chunk, length))), dtype)
    return cache


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _empty(config: Config, batch: int, slots: tuple[int, ...], dtype: Any) -> Cache:
    """In one dispatch, whatever the layers."""

    def layer(slots: int) -> LayerCache:
        shape = (batch, config.num_kv_heads, slots, config.head_dim)
        return LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.full((batch, slots), -1, jnp.int32))

    return tuple(map(layer, slots))


def cache_bytes(config: Config, batch: int, length: int, chunk: int, dtype: Any) -> int:
    """What `init_cache` would allocate, in bytes."""
    row = 2 * config.num_kv_heads * config.head_dim * jnp.dtype(dtype).itemsize + 4
    return int(batch * row * sum(_slots(config, length, min(chunk, length))))


def write(
    cache: LayerCache, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], positions: Int[Array, "B T"]
) -> LayerCache:
    """The cache with T new tokens in it: in each row consecutive positions, then padding at -1, which is not written.

    Each slot asks which token it gets, rather than each token where it goes: XLA's scatter is a serial loop on a CPU and
    copies the whole cache three times around it, while this is one pass in place.
    """
    slots, T = cache.positions.shape[1], positions.shape[1]
    token = (jnp.arange(slots) - positions[:, :1] % slots) % slots  # [B, S]; those past the chunk get none
    new = jnp.take_along_axis(positions, jnp.minimum(token, T - 1), axis=1)
    written = (token < T) & (new >= 0)
    at = jnp.minimum(token, T - 1)[:, None, :, None]

    def put(into: Array, values: Array) -> Array:
        values = values.swapaxes(1, 2).astype(into.dtype)
        moved = values if T == 1 else jnp.take_along_axis(values, at, axis=2)
        return jnp.where(written[:, None, :, None], moved, into)

    return LayerCache(put(cache.k, k), put(cache.v, v), jnp.where(written, new, cache.positions))


def _in_order(cache: LayerCache, positions: Int[Array, "B T"]) -> tuple[Array, Array, Array, Array, Array]:
    """What `kernels.late_attention` takes after the queries: keys, values and positions from the oldest to the newest, with room
    behind for tokens that are padding, and where the new ones begin."""
    slots, T = cache.positions.shape[1], positions.shape[1]
    order = (positions.max(axis=1, keepdims=True) + 1 + jnp.arange(slots)) % slots

    def sorted_(x: Array) -> Array:  # [B, K, S, H] as [B, S + T, K, H]
        found = jnp.take_along_axis(x, order[:, None, :, None], axis=2).swapaxes(1, 2)
        return jnp.pad(found, ((0, 0), (0, T), (0, 0), (0, 0)))

    held = jnp.pad(jnp.take_along_axis(cache.positions, order, axis=1), ((0, 0), (0, T)), constant_values=-1)
    start = slots - (positions >= 0).sum(axis=1)
    return sorted_(cache.k), sorted_(cache.v), positions, held, start
