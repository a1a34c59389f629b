"""Next-token cross-entropy against a tied embedding, a chunk of positions at a time.

Logits of a whole batch are never there: 8192 tokens over 256,000 rows would be 8.4 GB in fp32. A chunk's logits are made
once: its loss and, when a gradient is asked for, its share of the gradient follow from them before the next chunk's
are made. The softmax is fp32 and is not divided out: where it meets a matrix, the narrow side carries the divisor.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gemmary.config import Config
from gemmary.data.packing import Batch
from gemmary.model.attention import Marks
from gemmary.model.transformer import Remat, hidden
from gemmary.params import Params
from gemmary.weights import project

__all__ = ["Head", "chunk_size", "next_token_loss", "packed_loss"]


class Head(NamedTuple):
    """How logits become a loss: their soft-cap, and the weight of log²(Z), which keeps the sum Z of a softmax near 1.

    `chunk` positions of every row of the batch are taken at once.
    """

    chunk: int
    softcap: float | None = None
    z_loss: float = 0.0


def chunk_size(rows: int, vocab: int, most_bytes: int) -> int:
    """Positions of `rows` rows whose fp32 logits take at most so many bytes; a power of two, at least 16."""
    return int(max(16, 1 << max(0, (most_bytes // (4 * rows * vocab)).bit_length() - 1)))


def next_token_loss(
    x: Float[Array, "B T D"],
    embed: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    head: Head,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sums over the batch: of what is to be minimized, and of nats alone (which carries no gradient).

    Position t counts `mask` times. Divide by the mask's sum over the whole batch, not over a part of it.
    """
    total, nats = _loss(x, embed, targets, mask, head)
    return total, jax.lax.stop_gradient(nats)


def packed_loss(
    params: Params, config: Config, batch: Batch, head: Head, *, dtype: Any, remat: Remat = "none"
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The same sums of a model's predictions over packed rows."""
    tokens, targets, mask, positions, segments = map(jnp.asarray, batch)
    x, _ = hidden(params, config, tokens, Marks(positions, segments), dtype=dtype, remat=remat)
    return next_token_loss(x, params["embed"], targets, mask, head)


class _Chunk(NamedTuple):
    total: Array
    nats: Array
    dx: Any
    d_embed: Any
    pull: Any
    """How much each position pulls at the embedding of its target: [n, 1]."""


def _chunk(head: Head, gradient: bool, embed: Array, x: Array, targets: Array, mask: Array) -> _Chunk:
    """One chunk [n, D]."""
    logits = project("td,vd->tv", x, embed, dtype=jnp.float32)
    slope = None
    if head.softcap is not None:
        capped = jnp.tanh(logits / head.softcap)
        logits, slope = head.softcap * capped, 1 - capped**2
    peak = logits.max(axis=-1, keepdims=True)
    e = jnp.exp(logits - peak)
    mass = e.sum(axis=-1, keepdims=True)
    log_z = (peak + jnp.log(mass))[:, 0]
    at_target = partial(jnp.take_along_axis, indices=targets[:, None], axis=-1)
    nats = (mask * (log_z - at_target(logits)[:, 0])).sum()
    total = nats + head.z_loss * (mask * log_z**2).sum()
    if not gradient:
        return _Chunk(total, nats, None, None, None)
    share = (mask * (1 + 2 * head.z_loss * log_z))[:, None] / mass
    pull = mask[:, None]
    if slope is not None:
        e, pull = e * slope, pull * at_target(slope)
    e = e.astype(x.dtype)
    dx = share * project("tv,vd->td", e, embed, dtype=jnp.float32) - pull * embed[targets]
    d_embed = project("vt,td->vd", e.T, (x * share).astype(x.dtype), dtype=jnp.float32)
    return _Chunk(total, nats, dx, d_embed, pull)


def _cut(array: Array, chunk: int) -> Array:
    """[B, T, …] as [chunks, B * chunk, …], zeros where T ends first."""
    missing = -array.shape[1] % chunk
    array = jnp.pad(array, [(0, missing if axis == 1 else 0) for axis in range(array.ndim)])
    rows, length, *rest = array.shape
    return array.reshape(rows, length // chunk, chunk, *rest).swapaxes(0, 1).reshape(-1, rows * chunk, *rest)


def _joined(chunks: Array, rows: int, length: int) -> Array:
    """What `_cut` cut."""
    chunks = chunks.reshape(len(chunks), rows, -1, *chunks.shape[2:]).swapaxes(0, 1)
    return chunks.reshape(rows, -1, *chunks.shape[3:])[:, :length]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _loss(x: Array, embed: Array, targets: Array, mask: Array, head: Head) -> tuple[Array, Array]:
    def add(sums: tuple[Array, Array], at: tuple[Array, ...]) -> tuple[tuple[Array, Array], None]:
        chunk = _chunk(head, False, embed, *at)
        return (sums[0] + chunk.total, sums[1] + chunk.nats), None

    zero = jnp.zeros((), jnp.float32)
    size = min(head.chunk, x.shape[1])
    return jax.lax.scan(add, (zero, zero), tuple(_cut(array, size) for array in (x, targets, mask)))[0]


def _forward(x: Array, embed: Array, targets: Array, mask: Array, head: Head) -> tuple[tuple[Array, Array], Any]:
    def add(sums: tuple[Array, Array, Array], at: tuple[Array, ...]) -> tuple[tuple[Array, Array, Array], Any]:
        chunk = _chunk(head, True, embed, *at)
        sums = (sums[0] + chunk.total, sums[1] + chunk.nats, sums[2] + chunk.d_embed)
        return sums, (chunk.dx, chunk.pull)

    zero = jnp.zeros((), jnp.float32)
    size = min(head.chunk, x.shape[1])
    cut = tuple(_cut(array, size) for array in (x, targets, mask))
    (total, nats, d_embed), (dx, pull) = jax.lax.scan(add, (zero, zero, jnp.zeros(embed.shape, jnp.float32)), cut)
    dx, pull = _joined(dx, *x.shape[:2]), _joined(pull, *x.shape[:2])
    d_embed = d_embed.at[targets].add(-pull * x)
    # In the dtypes of what they are gradients of; the arrays themselves carry those dtypes to the backward pass.
    return (total, nats), (dx.astype(x.dtype), d_embed.astype(embed.dtype))


def _backward(head: Head, kept: tuple[Array, Array], seed: tuple[Array, Array]) -> tuple[Any, ...]:
    dx, d_embed = kept
    return (dx * seed[0]).astype(dx.dtype), (d_embed * seed[0]).astype(d_embed.dtype), None, None


_loss.defvjp(_forward, _backward)
