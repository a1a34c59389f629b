"""`losses.next_token_loss` on a mesh: the vocabulary is split over chips, and no chip has all of the embedding or of the logits.

Chips along `model` (and `fold`) share the work: each has a part of the vocabulary's rows, and its own tokens. A chunk of all
their tokens is brought together, each makes its part of the chunk's logits, and what the softmax needs is added up between
them: one number a token. Each gets back the gradient of its own tokens. The embedding's gradient is summed once, at the end.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from gemmary.mesh import ROWS, spec, storage_spec
from gemmary.spread import axes_in_use, index_over, names_of, on_each
from gemmary.train.head import Head
from gemmary.weights import project

__all__ = ["sharded_loss"]


def sharded_loss(
    x: Float[Array, "B T D"],
    embed: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    head: Head,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The sums of `next_token_loss`, where a mesh is in use. Products are made in x's dtype, all else in fp32."""
    return _loss(x, embed, targets, mask, head)


class _Place(NamedTuple):
    """Mesh axes: of rows, of positions, of the vocabulary; and of the embedding as it is stored."""

    rows: tuple[str, ...]
    length: tuple[str, ...]
    vocab: tuple[str, ...]
    stored_vocab: tuple[str, ...]
    stored_width: tuple[str, ...]

    @property
    def embed(self) -> PartitionSpec:
        return PartitionSpec(self.stored_vocab or None, self.stored_width or None)

    @property
    def tokens(self) -> PartitionSpec:
        return PartitionSpec(self.rows or None, self.length or None)

    @property
    def others(self) -> tuple[str, ...]:
        """Axes along which tokens differ and the vocabulary does not."""
        return tuple(axis for axis in (*self.rows, *self.length) if axis not in self.vocab)

    @property
    def share(self) -> tuple[str, ...]:
        """Axes along which tokens are brought together: those that split both them and the vocabulary."""
        return tuple(axis for axis in self.vocab if axis in (*self.rows, *self.length))


def _place(x: Any, embed: Any) -> _Place:
    sizes = axes_in_use()
    rows, length = map(names_of, spec([ROWS, ("model",)], x.shape[:2], sizes))
    vocab, width = map(names_of, storage_spec(("vocab", "embed"), embed.shape, sizes))
    return _Place(rows, length, names_of(spec([(*vocab, "fold")], embed.shape[:1], sizes)[0]), vocab, width)


def _taken(embed: Array, place: _Place) -> Array:
    """From a device's stored part of the embedding to whole rows of its part of the vocabulary."""
    if "fold" in place.vocab and "fold" in place.stored_width:
        embed = jax.lax.all_to_all(embed, "fold", 0, 1, tiled=True)
    elif "fold" in place.vocab:
        rows = embed.shape[0] // jax.lax.axis_size("fold")
        embed = jax.lax.dynamic_slice_in_dim(embed, jax.lax.axis_index("fold") * rows, rows)
    rest = tuple(axis for axis in place.stored_width if axis not in place.vocab)
    return jax.lax.all_gather(embed, rest, axis=1, tiled=True) if rest else embed


def _returned(gradient: Array, place: _Place) -> Array:
    """The way back of `_taken`, summed over all tokens."""
    rest = tuple(axis for axis in place.stored_width if axis not in place.vocab)
    if summed := tuple(axis for axis in place.others if axis not in rest):
        gradient = jax.lax.psum(gradient, summed)
    if rest:
        gradient = jax.lax.psum_scatter(gradient, rest, scatter_dimension=1, tiled=True)
    if "fold" in place.vocab and "fold" in place.stored_width:
        gradient = jax.lax.all_to_all(gradient, "fold", 1, 0, tiled=True)
    elif "fold" in place.vocab:
        gradient = jax.lax.all_gather(gradient, "fold", axis=0, tiled=True)
    return gradient


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _loss(x: Array, embed: Array, targets: Array, mask: Array, head: Head) -> tuple[Array, Array]:
    sums: tuple[Array, Array] = _sums(x, embed, targets, mask, head, False)[0]
    return sums


def _forward(x: Array, embed: Array, targets: Array, mask: Array, head: Head) -> tuple[tuple[Array, Array], Any]:
    sums, dx, d_embed = _sums(x, embed, targets, mask, head, True)
    return sums, (dx, d_embed.astype(embed.dtype))


def _backward(head: Head, kept: tuple[Array, Array], seed: tuple[Array, Any]) -> tuple[Any, ...]:
    dx, d_embed = kept
    return (dx * seed[0]).astype(dx.dtype), (d_embed * seed[0]).astype(d_embed.dtype), None, None


_loss.defvjp(_forward, _backward)


def _sums(x: Array, embed: Array, targets: Array, mask: Array, head: Head, wanted: bool) -> Any:
    """The two sums; where `wanted`, also the gradients of x and (in fp32) of the embedding."""
    place = _place(x, embed)
    each = partial(_each, place=place, head=head, wanted=wanted)
    tokens, sums = PartitionSpec(*place.tokens, None), (PartitionSpec(), PartitionSpec())
    outs = (sums, tokens, place.embed) if wanted else (sums,)
    return on_each(each, (tokens, place.embed, place.tokens, place.tokens), outs)(x, embed, targets, mask)


def _each(x: Array, embed: Array, targets: Array, mask: Array, *, place: _Place, head: Head, wanted: bool) -> Any:
    """A device's own part."""
    B, T, D = x.shape
    size = min(head.chunk, T)
    embed = _taken(embed.astype(x.dtype), place)
    pad = -T % size

    def chunks(array: Array) -> Array:
        array = jnp.pad(array, [(0, pad if axis == 1 else 0) for axis in range(array.ndim)])
        return array.reshape(B, -1, size, *array.shape[2:]).swapaxes(0, 1).reshape(-1, B * size, *array.shape[2:])

    def add(sums: tuple[Array, Array, Array], at: tuple[Array, Array, Array]) -> tuple[Any, Array]:
        total, nats, d_embed = sums
        chunk = _chunk(at, embed, place, head, wanted)
        return (total + chunk[0], nats + chunk[1], d_embed + chunk[3]), chunk[2]

    zero = jnp.zeros((), jnp.float32)
    start = (zero, zero, jnp.zeros(embed.shape, jnp.float32) if wanted else zero)
    (total, nats, d_embed), dx = jax.lax.scan(add, start, (chunks(x), chunks(targets), chunks(mask)))
    if place.others:
        total, nats = jax.lax.psum((total, nats), place.others)
    if not wanted:
        return ((total, nats),)
    dx = dx.reshape(-1, B, size, D).swapaxes(0, 1).reshape(B, -1, D)[:, :T]
    return (total, nats), dx, _returned(d_embed, place)


def _chunk(at: tuple[Array, Array, Array], embed: Array, place: _Place, head: Head, wanted: bool) -> Any:
    """Sums over a chunk, and gradients: of this device's tokens, and of its part of the embedding by all the tokens here."""
    if place.share:
        at = jax.tree.map(lambda part: jax.lax.all_gather(part, place.share, axis=0, tiled=True), at)
    x, targets, mask = at
    logits = project("pd,vd->pv", x, embed, dtype=jnp.float32)
    slope = None
    if head.softcap is not None:
        capped = jnp.tanh(logits / head.softcap)
        logits, slope = head.softcap * capped, 1 - capped**2
    aimed = jnp.arange(embed.shape[0]) == (targets - index_over(place.vocab) * embed.shape[0])[:, None]
    peak = jax.lax.stop_gradient(logits.max(axis=-1))
    peak = jax.lax.pmax(peak, place.vocab) if place.vocab else peak
    e = jnp.exp(logits - peak[:, None])
    mass, at_target = e.sum(axis=-1), jnp.where(aimed, logits, 0).sum(axis=-1)
    if place.vocab:
        mass, at_target = jax.lax.psum((mass, at_target), place.vocab)
    log_z = peak + jnp.log(mass)
    nats = (mask * (log_z - at_target)).sum()
    total = nats + head.z_loss * (mask * log_z**2).sum()
    if not wanted:
        return total, nats, jnp.zeros_like(x[:0]), 0.0
    pull = (mask * (1 + 2 * head.z_loss * log_z) / mass)[:, None] * e - jnp.where(aimed, mask[:, None], 0)
    pull = (pull if slope is None else pull * slope).astype(x.dtype)
    dx = project("pv,vd->pd", pull, embed, dtype=jnp.float32)
    if place.share:
        dx = jax.lax.psum_scatter(dx, place.share, scatter_dimension=0, tiled=True)
    if alone := tuple(axis for axis in place.vocab if axis not in place.share):
        dx = jax.lax.psum(dx, alone)
    return total, nats, dx.astype(x.dtype), project("vp,pd->vd", pull.T, x, dtype=jnp.float32)
