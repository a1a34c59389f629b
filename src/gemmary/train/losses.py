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
from gemmary.spread import axes_in_use
from gemmary.train.head import Head
from gemmary.train.sharded_loss import sharded_loss
from gemmary.weights import Int8, Weight, lookup, project

__all__ = ["next_token_loss", "packed_loss", "token_log_probs"]


def next_token_loss(
    x: Float[Array, "B T D"],
    embed: Weight,
    targets: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    head: Head,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sums over the batch: of what is to be minimized, and of nats alone (which carries no gradient).

    Position t counts `mask` times, which may be less than none (a policy's gradient). `embed` is [V, D]. Divide by the
    mask's sum over the whole batch, not over a part of it.
    """
    if axes_in_use() and isinstance(embed, jax.Array):
        total, nats = sharded_loss(x, embed, targets, mask, head)
        return total, jax.lax.stop_gradient(nats)
    if head.sparse:
        order = jnp.argsort(mask == 0, axis=1, stable=True)
        x = jnp.take_along_axis(x, order[..., None], axis=1)
        targets, mask = (jnp.take_along_axis(array, order, axis=1) for array in (targets, mask))
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


def token_log_probs(
    x: Float[Array, "B T D"], embed: Weight, targets: Int[Array, "B T"], head: Head
) -> Float[Array, "B T"]:
    """The log-probability of every target, differentiable: for losses that weigh tokens by one another."""

    @jax.checkpoint
    def chunk(x: Array, targets: Array) -> Array:
        logits = project("pd,vd->pv", x, embed, dtype=jnp.float32)
        if head.softcap is not None:
            logits = head.softcap * jnp.tanh(logits / head.softcap)
        picked = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return picked - jax.nn.logsumexp(logits, axis=-1)

    size = min(head.chunk, x.shape[1])
    found = jax.lax.map(lambda at: chunk(*at), (_cut(x, size), _cut(targets, size)))
    return _joined(found, *x.shape[:2])


def _chunk(head: Head, wanted: tuple[bool, bool], embed: Any, x: Array, targets: Array, mask: Array) -> _Chunk:
    """One chunk [n, D]; `wanted` says whether gradients of x and of the embedding are."""
    logits = project("pd,vd->pv", x, embed, dtype=jnp.float32)
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
    if not any(wanted):
        return _Chunk(total, nats, None, None, None)
    share = (mask * (1 + 2 * head.z_loss * log_z))[:, None] / mass
    pull = mask[:, None]
    if slope is not None:
        e, pull = e * slope, pull * at_target(slope)
    e = e.astype(x.dtype)
    dx = share * _back(e, embed) - pull * lookup(targets, embed, x.dtype)
    d_embed = project("vp,pd->vd", e.T, (x * share).astype(x.dtype), dtype=jnp.float32) if wanted[1] else None
    return _Chunk(total, nats, dx, d_embed, pull)


def _back(e: Array, embed: Any) -> Array:
    """e [n, V] times the embedding; an Int8's scales are the rows', and so go to e."""
    if isinstance(embed, Int8):
        e, embed = (e * embed.scale[:, 0]).astype(e.dtype), embed.values
    return project("pv,vd->pd", e, embed, dtype=jnp.float32)


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
def _loss(x: Array, embed: Any, targets: Array, mask: Array, head: Head) -> tuple[Array, Array]:
    size = min(head.chunk, x.shape[1])
    cut = tuple(_cut(array, size) for array in (x, targets, mask))

    def add(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        chunk = _chunk(head, (False, False), embed, *(array[i] for array in cut))
        return (sums[0] + chunk.total, sums[1] + chunk.nats)

    zero = jnp.zeros((), jnp.float32)
    sums: tuple[Array, Array] = jax.lax.fori_loop(0, _used(mask, size, head), add, (zero, zero))
    return sums


def _used(mask: Array, size: int, head: Head) -> Any:
    """How many chunks have a position that counts; where `sparse` is not asked for, all."""
    if not head.sparse:
        return -(-mask.shape[1] // size)
    return -(-(mask != 0).sum(axis=1).max() // size)


def _forward(x: Any, embed: Any, targets: Any, mask: Any, head: Head) -> tuple[tuple[Array, Array], Any]:
    """The sums, and the gradients, which are made while the logits are there."""
    wanted = x.perturbed, any(leaf.perturbed for leaf in jax.tree.leaves(embed, is_leaf=_is_primal))
    x, targets, mask = x.value, targets.value, mask.value
    embed = jax.tree.map(lambda leaf: leaf.value, embed, is_leaf=_is_primal)
    size = min(head.chunk, x.shape[1])
    cut = tuple(_cut(array, size) for array in (x, targets, mask))

    def add(i: Array, sums: tuple[Any, ...]) -> tuple[Any, ...]:
        total, nats, d_embed, dx, pull = sums
        chunk = _chunk(head, wanted, embed, *(array[i] for array in cut))
        d_embed = d_embed + chunk.d_embed if wanted[1] else d_embed
        dx, pull = dx.at[i].set(chunk.dx.astype(dx.dtype)), pull.at[i].set(chunk.pull)
        return total + chunk.total, nats + chunk.nats, d_embed, dx, pull

    zero, count = jnp.zeros((), jnp.float32), len(cut[0])
    start = (
        zero,
        zero,
        jnp.zeros(embed.shape, jnp.float32) if wanted[1] else zero,
        jnp.zeros(cut[0].shape, x.dtype),
        jnp.zeros((count, cut[0].shape[1], 1), jnp.float32),
    )
    total, nats, d_embed, dx, pull = jax.lax.fori_loop(0, _used(mask, size, head), add, start)
    dx, pull = _joined(dx, *x.shape[:2]), _joined(pull, *x.shape[:2])
    if not wanted[1]:
        return (total, nats), (dx, None)
    d_embed = d_embed.at[targets].add(-pull * x)
    # In the dtypes of what they are gradients of; the arrays themselves carry those dtypes to the backward pass.
    return (total, nats), (dx, d_embed.astype(embed.dtype))


def _is_primal(leaf: Any) -> bool:
    return hasattr(leaf, "perturbed")


def _backward(head: Head, kept: tuple[Array, Array | None], seed: tuple[Array, Any]) -> tuple[Any, ...]:
    dx, d_embed = kept
    back = None if d_embed is None else (d_embed * seed[0]).astype(d_embed.dtype)
    return (dx * seed[0]).astype(dx.dtype), back, None, None


_loss.defvjp(_forward, _backward, symbolic_zeros=True)
