"""Attention in the CPU kernel."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gemmary.kernels.library import instructions, kernel
from gemmary.mesh import platform
from gemmary.spread import by_heads

__all__ = [
    "attention",
    "cached_attention",
    "late_attention",
    "paged_attention",
    "put_in_pages",
    "serves_attention",
    "serves_cached",
]

_HEAD = 8
"""Head sizes that attention takes are multiples of it."""
_FEW = 16
"""Up to so many new tokens each reads the cache for itself."""


def serves_attention(head_dim: int) -> bool:
    """Whether `attention` can be called. On a mesh each device computes its own rows and heads."""
    return platform() == "cpu" and head_dim % _HEAD == 0 and instructions() is not None


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    ends: Int[Array, "B T"],
    *,
    window: int | None,
    softcap: float | None,
) -> Float[Array, "B T N H"]:
    """Attention of scaled, rotated queries among themselves, and its gradient; no scores are kept, whatever T is.

    A token sees those that stand no later than itself, in place and in position, at most `window` back, and in whose segments,
    from their own to the one before their end, its own lies.
    One at position -1 is padding: it sees nothing and its result is 0. Computed in fp32.
    """

    def local(q: Array, k: Array, v: Array, *marks: Array) -> Array:
        return _attention(q, k, v, *marks, window or 0, softcap or 0.0)

    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    return by_heads(local, *wide, positions, segments, ends).astype(q.dtype)


def late_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    positions: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
    start: Int[Array, " B"],
    *,
    window: int | None,
    softcap: float | None,
) -> Float[Array, "B T N H"]:
    """Attention of the later ones of many tokens: query t is that of key start + t, and sees no key after it. No gradient."""

    def put(into: Array, values: Array) -> Array:
        return jax.vmap(lambda x, y, at: jax.lax.dynamic_update_slice_in_dim(x, y, at, 0))(into, values, start)

    B, T, N, H = q.shape
    asks = put(jnp.full(key_positions.shape, -1, jnp.int32), positions.astype(jnp.int32))
    wide = put(jnp.zeros((B, k.shape[1], N, H), jnp.float32), q.astype(jnp.float32))
    like = jax.ShapeDtypeStruct(wide.shape, jnp.float32), jax.ShapeDtypeStruct((B, N, k.shape[1]), jnp.float32)
    places = key_positions.astype(jnp.int32)
    given = (
        wide,
        k.astype(jnp.float32),
        v.astype(jnp.float32),
        places,
        jnp.zeros_like(places),
        jnp.ones_like(places),
        asks,
    )
    out, _ = kernel("attend", like)(*given, **_limits(window or 0, softcap or 0.0))
    return jax.vmap(lambda x, at: jax.lax.dynamic_slice_in_dim(x, at, T, 0))(out, start).astype(q.dtype)


def serves_cached(tokens: int, dtype: Any) -> bool:
    """Whether `cached_attention` takes so many new tokens, and a cache of that dtype."""
    few = tokens <= _FEW and dtype in (jnp.float32, jnp.bfloat16)
    return few and platform() == "cpu" and instructions() is not None


def cached_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    positions: Int[Array, "B T"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    slot_positions: Int[Array, "B S"],
    *,
    window: int | None,
    softcap: float | None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B K S H"], Float[Array, "B K S H"], Int[Array, "B S"]]:
    """Attention of a few new tokens, scaled and rotated, to themselves and to a cache; and the cache with them in it.

    A token at position p goes into slot p mod S; at -1 it is padding, goes nowhere and its result is 0. In a jit to which
    the cache was donated it is changed in place.
    """
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (wide[0], keys, values, slot_positions)]
    call = kernel("attend_cached", like, input_output_aliases={4: 1, 5: 2, 6: 3})
    limits = _limits(window or 0, softcap or 0.0)
    out, *cache = call(*wide, positions.astype(jnp.int32), keys, values, slot_positions, **limits)
    return out.astype(q.dtype), cache[0], cache[1], cache[2]


def paged_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    positions: Int[Array, "B T"],
    table: Int[Array, "B M"],
    keys: Float[Array, "P K S H"],
    values: Float[Array, "P K S H"],
    *,
    window: int | None,
    softcap: float | None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "P K S H"], Float[Array, "P K S H"]]:
    """`cached_attention` where a cache is pages of S slots: position p of a row is in page table[row, p // S], -1 being none."""
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    limits = _limits(window or 0, softcap or 0.0)
    out, keys, values = _in_pages(wide, positions, table, keys, values, reads=True, **limits)
    return out.astype(q.dtype), keys, values


def put_in_pages(
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    positions: Int[Array, "B T"],
    table: Int[Array, "B M"],
    keys: Float[Array, "P K S H"],
    values: Float[Array, "P K S H"],
) -> tuple[Float[Array, "P K S H"], Float[Array, "P K S H"]]:
    """The pages with new tokens in them, as many as there are."""
    none = jnp.zeros((k.shape[0], 0, *k.shape[2:]), jnp.float32)
    wide = [none, k.astype(jnp.float32), v.astype(jnp.float32)]
    return _in_pages(wide, positions, table, keys, values, reads=False, **_limits(0, 0.0))[1:]


def _in_pages(
    qkv: list[Array], positions: Array, table: Array, keys: Array, values: Array, **attributes: Any
) -> tuple[Array, Array, Array]:
    like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (qkv[0], keys, values)]
    call = kernel("attend_pages", like, input_output_aliases={5: 1, 6: 2})
    out, keys, values = call(*qkv, positions.astype(jnp.int32), table.astype(jnp.int32), keys, values, **attributes)
    return out, keys, values


@partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attention(
    q: Array, k: Array, v: Array, positions: Array, segments: Array, ends: Array, window: int, softcap: float
) -> Array:
    return _forward(q, k, v, positions, segments, ends, window, softcap)[0]


def _limits(window: int, softcap: float) -> dict[str, Any]:
    return {"window": np.int64(window), "softcap": np.float32(softcap)}


def _forward(
    q: Array, k: Array, v: Array, positions: Array, segments: Array, ends: Array, window: int, softcap: float
) -> tuple[Array, tuple[Array, ...]]:
    B, T, N, _ = q.shape
    like = jax.ShapeDtypeStruct(q.shape, jnp.float32), jax.ShapeDtypeStruct((B, N, T), jnp.float32)
    given = q, k, v, *(x.astype(jnp.int32) for x in (positions, segments, ends))
    out, log_sum = kernel("attend", like)(*given, given[3], **_limits(window, softcap))
    return out, (*given, out, log_sum)


def _backward(window: int, softcap: float, kept: tuple[Array, ...], d_out: Array) -> tuple[Any, ...]:
    like = tuple(jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in kept[:3])
    grads = kernel("attend_gradient", like)(*kept, d_out, **_limits(window, softcap))
    return (*grads, None, None, None)


_attention.defvjp(_forward, _backward)
