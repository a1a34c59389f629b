"""Causal attention with grouped queries, windows, packed segments and soft-caps.

What a query sees follows from positions alone, so one rule serves training, packed documents, prefill in chunks and a
ring cache that has wrapped. A key slot with position -1 is empty; a query with position -1 is padding, and sees nothing.

Paths equal in value: `attend_directly` makes all scores at once; `attend_among` those of tokens among themselves, in the CPU
kernel where it serves, else a few queries at a time and only up to the diagonal; `attend_in_blocks` keeps one block of
scores, with a running maximum and sum (Milakov and Gimelshein, arXiv 1805.02867), and skips blocks in which nothing is
visible. Softmax is fp32 in all.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gemmary import kernels

__all__ = [
    "MASKED",
    "Marks",
    "attend",
    "attend_among",
    "attend_directly",
    "attend_in_blocks",
    "attend_to_diagonal",
    "visible",
]

MASKED = -1e30
"""The score of what may not be seen. Finite, so that a row that sees nothing is uniform and not NaN."""

_BLOCK_QUERIES = 512
_BLOCK_KEYS = 1024
# Up to this many scores per head are made directly: a decoding step at any context, or a short prompt.
_DIRECT_SCORES = _BLOCK_QUERIES * _BLOCK_KEYS
# Queries that stand together in `attend_to_diagonal`: few enough to skip nearly half the scores, enough for a matrix product.
_AMONG_QUERIES = 128


# Of a row of queries: the highest score so far, the sum of exponentials below it, the values mixed by these.
_Running = tuple[Array, Array, Array]


class Marks(NamedTuple):
    """What a token's place says: its position in its own document (-1: none) and which document it belongs to.

    Texts that begin alike can share their beginning, as a tree of segments numbered in order of depth first: a token is then
    seen by the segments from its own to the one before its `ends`. Without `ends` only its own segment sees it.
    """

    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"] | None = None
    ends: Int[Array, "B T"] | None = None


def visible(query: Marks, key: Marks, window: int | Array | None) -> Bool[Array, "B T S"]:
    """Which keys each query sees: not after it, at most `window` back counting itself, and of its own segment or one that this grew from."""
    q, k = query.positions[:, :, None], key.positions[:, None, :]
    seen = (k <= q) & (k >= 0)
    if window is not None:
        seen &= k > q - window
    if query.segments is not None and key.segments is not None:
        ends = key.segments + 1 if key.ends is None else key.ends
        asking = query.segments[:, :, None]
        seen &= (key.segments[:, None, :] <= asking) & (asking < ends[:, None, :])
    return seen


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    query: Marks,
    key: Marks,
    *,
    window: int | Array | None,
    softcap: float | None,
) -> Float[Array, "B T N H"]:
    """Attention of scaled, rotated queries. Query head n reads key/value head n // (N/K)."""
    path = attend_directly if q.shape[1] * k.shape[2] <= _DIRECT_SCORES else attend_in_blocks
    return _ungrouped(path(_grouped(q, k.shape[1]), k, v, query, key, window=window, softcap=softcap))


def attend_among(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    marks: Marks,
    *,
    window: int | Array | None,
    softcap: float | None,
) -> Float[Array, "B T N H"]:
    """Attention of tokens among themselves, in the order of their documents: no token sees one that stands after it."""
    if kernels.serves_attention(q.shape[3]) and not isinstance(window, jax.Array):
        segments = jnp.zeros_like(marks.positions) if marks.segments is None else marks.segments
        ends = segments + 1 if marks.ends is None else marks.ends
        return kernels.attention(q, k, v, marks.positions, segments, ends, window=window, softcap=softcap)
    plain = marks.ends is None and kernels.serves_flash(q.shape[1], q.shape[3], softcap)
    if plain and not isinstance(window, jax.Array):
        segments = jnp.zeros_like(marks.positions) if marks.segments is None else marks.segments
        return kernels.flash_attention(q, k, v, marks.positions, segments, window=window, softcap=softcap)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    if q.shape[1] ** 2 > _DIRECT_SCORES:
        return attend(q, k, v, marks, marks, window=window, softcap=softcap)
    return attend_to_diagonal(q, k, v, marks, window=window, softcap=softcap)


def attend_to_diagonal(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    marks: Marks,
    *,
    window: int | Array | None,
    softcap: float | None,
    block: int = _AMONG_QUERIES,
) -> Float[Array, "B T N H"]:
    """The same, a block of queries at a time with all the keys that stand no later."""
    T, K = q.shape[1], k.shape[1]
    ends = [min(end, T) for end in range(block, T + block, block)]
    # Split, not sliced: the gradient of a split is one concatenation, that of slices a sum over the whole for each.
    queries = jnp.split(_grouped(q, K), ends[:-1], axis=3)
    mixed, mass = [], []
    for part, end in zip(queries, ends, strict=True):
        seen = visible(_slice(marks, end - part.shape[3], end), _slice(marks, 0, end), window)
        scores = _scores(part, k[:, :, :end], seen, softcap)
        p = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
        mixed.append(_mix(p, v[:, :, :end]))
        mass.append(p.sum(axis=-1, keepdims=True))
    # The sum divides the mixed values, of which there are fewer than scores.
    out = jnp.concatenate(mixed, axis=3) / jnp.concatenate(mass, axis=3)
    return _ungrouped(out.astype(q.dtype))


def _slice(marks: Marks, start: int, end: int) -> Marks:
    part: Marks = jax.tree.map(lambda part: part[:, start:end], marks)
    return part


def _grouped(q: Float[Array, "B T N H"], heads: int) -> Float[Array, "B K G T H"]:
    """Heads of a group one below the other, so that a product with the keys they share is one matrix product."""
    B, T, N, H = q.shape
    return q.reshape(B, T, heads, N // heads, H).transpose(0, 2, 3, 1, 4)


def _ungrouped(out: Float[Array, "B K G T H"]) -> Float[Array, "B T N H"]:
    B, K, G, T, H = out.shape
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


def _scores(q: Array, k: Array, seen: Array, softcap: float | None) -> Array:
    """Scores [B, K, G, T, S] in fp32, capped before they are masked."""
    B, K, G, T, H = q.shape
    scores = jnp.einsum("bkth,bksh->bkts", q.reshape(B, K, G * T, H), k, preferred_element_type=jnp.float32)
    scores = scores.reshape(B, K, G, T, -1)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    return jnp.where(seen[:, None, None], scores, MASKED)


def _mix(p: Array, v: Array) -> Array:
    """Values [B, K, S, H] weighed by p [B, K, G, T, S], in fp32."""
    B, K, G, T, S = p.shape
    flat = p.reshape(B, K, G * T, S).astype(v.dtype)
    return jnp.einsum("bkts,bksh->bkth", flat, v, preferred_element_type=jnp.float32).reshape(B, K, G, T, -1)


def attend_directly(
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    query: Marks,
    key: Marks,
    *,
    window: int | Array | None,
    softcap: float | None,
) -> Float[Array, "B K G T H"]:
    """All scores at once."""
    scores = _scores(q, k, visible(query, key, window), softcap)
    return _mix(jax.nn.softmax(scores, axis=-1), v).astype(q.dtype)


def attend_in_blocks(
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    query: Marks,
    key: Marks,
    *,
    window: int | Array | None,
    softcap: float | None,
    block_queries: int = _BLOCK_QUERIES,
    block_keys: int = _BLOCK_KEYS,
) -> Float[Array, "B K G T H"]:
    """A block of scores at a time. Backward passes make each block again instead of keeping it."""
    T, S = q.shape[3], k.shape[2]
    q, query = _blocks(q, query, 3, block_queries)
    k, keys = _blocks(k, key, 2, block_keys)
    v, _ = _blocks(v, key, 2, block_keys)

    @jax.checkpoint
    def one_block(q: Array, query: Marks) -> Array:
        def add(state: _Running, at: tuple[Array, Array, Marks]) -> tuple[_Running, None]:
            seen = visible(query, at[2], window)
            return jax.lax.cond(seen.any(), _accumulate, lambda state, *_: state, state, q, *at[:2], seen), None

        def _accumulate(state: _Running, q: Array, k: Array, v: Array, seen: Array) -> _Running:
            peak, total, mixed = state
            scores = _scores(q, k, seen, softcap)
            new_peak = jnp.maximum(peak, scores.max(axis=-1, keepdims=True))
            p, shrink = jnp.exp(scores - new_peak), jnp.exp(peak - new_peak)
            return new_peak, total * shrink + p.sum(axis=-1, keepdims=True), mixed * shrink + _mix(p, v)

        nothing = jnp.zeros((*q.shape[:-1], 1), jnp.float32)
        start = (nothing + MASKED, nothing, jnp.zeros(q.shape, jnp.float32))
        (_, total, mixed), _ = jax.lax.scan(add, start, (k, v, keys))
        return (mixed / jnp.where(total > 0, total, 1)).astype(q.dtype)

    out = jax.lax.map(lambda args: one_block(*args), (q, query))
    out = jnp.moveaxis(out, 0, 3)
    out = out.reshape(*out.shape[:3], -1, out.shape[-1])
    assert out.shape[3] >= T
    assert k.shape[0] * block_keys >= S
    return out[:, :, :, :T]


def _blocks(x: Array, marks: Marks, axis: int, size: int) -> tuple[Array, Marks]:
    """x and its marks cut along time into blocks that lead; what is added to fill the last has position -1."""

    def cut(x: Array, axis: int, fill: int) -> Array:
        missing = -x.shape[axis] % size
        widths = [(0, missing if i == axis else 0) for i in range(x.ndim)]
        if missing:
            x = jnp.pad(x, widths, constant_values=fill)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :]), axis, 0)

    return cut(x, axis, 0), jax.tree.map(lambda part: cut(part, 1, -1), marks)
