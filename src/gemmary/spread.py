"""What happens to arrays where a mesh is in use: put where the rules say, gathered for a product, looked up across devices.

Without a mesh everything here returns what it was given, so the rooms above never ask whether there is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, Int

from gemmary.mesh import COMPUTE, ROWS, spec, storage_spec

__all__ = ["axes_in_use", "by_heads", "gathered", "index_over", "look_up", "names_of", "on_each", "spread"]

# The letters of equations that are axes of parameters.
_LETTERS = {"v": "vocab", "d": "embed", "n": "heads", "k": "kv_heads", "h": "head_dim", "f": "ffw"}


def axes_in_use() -> dict[str, int]:
    """The mesh axes that arrays can be put on here, with their sizes: none without a mesh, or where the code is a device's own."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return {}
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name: mesh.shape[name] for name, kind in kinds if kind == AxisType.Auto and mesh.shape[name] > 1}


def spread(x: Array, letters: str, *, whole_rows: bool = False) -> Array:
    """An activation where `COMPUTE` says, by its letters. `whole_rows` leaves positions together, as a product wants its input."""
    sizes = axes_in_use()
    if not sizes:
        return x
    order = sorted(letters, key=lambda letter: letter == "t")  # positions take what others leave
    wanted = [() if whole_rows and letter == "t" else COMPUTE.get(letter, ()) for letter in order]
    found = dict(zip(order, spec(wanted, [x.shape[letters.index(one)] for one in order], sizes), strict=True))
    put: Array = jax.lax.with_sharding_constraint(x, PartitionSpec(*(found[letter] for letter in letters)))
    return put


def gathered(w: Array, letters: str) -> Array:
    """A parameter as a product takes it: together along what is stored over the data axes. Its gradient goes back to where it is stored."""
    sizes = axes_in_use()
    if not sizes or len(letters) < 2:
        return w
    stored = storage_spec([_LETTERS.get(letter, "") for letter in letters], w.shape, sizes)
    taken = spec([COMPUTE.get(letter, ()) if letter != "t" else () for letter in letters], w.shape, sizes)
    return _moved(w, taken, stored)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _moved(w: Array, there: PartitionSpec, back: PartitionSpec) -> Array:
    moved: Array = jax.lax.with_sharding_constraint(w, there)
    return moved


def _moved_forward(w: Array, there: PartitionSpec, back: PartitionSpec) -> tuple[Array, None]:
    return _moved(w, there, back), None


def _moved_backward(there: PartitionSpec, back: PartitionSpec, _: None, gradient: Array) -> tuple[Array]:
    return (jax.lax.with_sharding_constraint(gradient, back),)


_moved.defvjp(_moved_forward, _moved_backward)


def names_of(part: Any) -> tuple[str, ...]:
    """The mesh axes that one part of a PartitionSpec names."""
    return () if part is None else (part,) if isinstance(part, str) else tuple(part)


def index_over(axes: Sequence[str]) -> Array:
    """This device's place along several mesh axes, the first of which counts most. Within `on_each`."""
    place = jnp.zeros((), jnp.int32)
    for axis in axes:
        place = place * jax.lax.axis_size(axis) + jax.lax.axis_index(axis)
    return place


def on_each(fn: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`fn` of each device's own part of its arguments."""
    mesh = jax.sharding.get_abstract_mesh()
    # Axes of one device as well: foreign code asks for all to be named.
    axes = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}
    return jax.shard_map(fn, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False)


def by_heads(fn: Callable[..., Array], q: Array, k: Array, v: Array, *rows: Array) -> Array:
    """fn(q, k, v, *rows) of each device's rows and heads. [B, T, heads, H]; key/value heads that are too few to be split are
    repeated, as many as there are devices to read them; where that cannot be either, every device has all heads."""
    sizes = axes_in_use()
    if not sizes:
        return fn(q, k, v, *rows)
    N, K, parts = q.shape[2], k.shape[2], sizes.get("model", 1)
    if K % parts and N % parts == 0 and parts % K == 0:
        k, v = jnp.repeat(k, parts // K, axis=2), jnp.repeat(v, parts // K, axis=2)
    heads = "model" if parts > 1 and N % parts == 0 and k.shape[2] % parts == 0 else None
    lead = spec([ROWS], q.shape[:1], sizes)[0]
    whole = PartitionSpec(lead, None, heads, None)
    out: Array = on_each(fn, (whole,) * 3 + (PartitionSpec(lead),) * len(rows), whole)(q, k, v, *rows)
    return out


def look_up(ids: Int[Array, "B T"], table: Float[Array, "V D"], dtype: Any) -> Float[Array, "B T D"]:
    """Rows of a table that is stored over the mesh, without gathering it.

    Each device looks up, for the rows of all that the width is stored over, its own part of their width; then each gets the
    whole width of its own rows. What is moved is ids and activations, as much as one block's.
    """
    sizes = axes_in_use()
    rows = names_of(spec([ROWS], ids.shape[:1], sizes)[0])
    vocab, width = map(names_of, storage_spec(("vocab", "embed"), table.shape, sizes))
    length = names_of(spec([vocab], ids.shape[1:], sizes)[0])
    place = _Place(rows, length, vocab, width if set(width) <= set(rows) else ())
    return _look_up(ids, table, place, jnp.dtype(dtype))


@dataclass(frozen=True)
class _Place:
    """How a lookup's arrays lie: by which mesh axes rows and positions are split, and the table's rows and width."""

    rows: tuple[str, ...]
    length: tuple[str, ...]
    vocab: tuple[str, ...]
    width: tuple[str, ...]

    @property
    def ids(self) -> PartitionSpec:
        return PartitionSpec(self.rows or None, self.length or None)

    @property
    def out(self) -> PartitionSpec:
        return PartitionSpec(self.rows or None, self.length or None, None)

    @property
    def table(self) -> PartitionSpec:
        return PartitionSpec(self.vocab or None, self.width or None)

    @property
    def others(self) -> tuple[str, ...]:
        """What splits rows that are not looked up together: their gradients are added."""
        return tuple(axis for axis in self.rows if axis not in self.width)

    def all_ids(self, ids: Array) -> Array:
        if self.width:
            ids = jax.lax.all_gather(ids, self.width, axis=0, tiled=True)
        return jax.lax.all_gather(ids, self.length, axis=1, tiled=True) if self.length else ids

    def local(self, ids: Array, rows: int) -> tuple[Array, Array]:
        """Ids as rows of this device's part, and whether they are in it."""
        at = ids - index_over(self.vocab) * rows
        return jnp.clip(at, 0, rows - 1), (at >= 0) & (at < rows)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _look_up(ids: Array, table: Array, place: _Place, dtype: Any) -> Array:
    def each(ids: Array, table: Array) -> Array:
        at, here = place.local(place.all_ids(ids), table.shape[0])
        found = jnp.where(here[..., None], table[at].astype(dtype), 0) if place.vocab else table[at].astype(dtype)
        if place.vocab and place.length:
            found = jax.lax.psum_scatter(found, place.vocab, scatter_dimension=1, tiled=True)
        elif place.vocab:
            found = jax.lax.psum(found, place.vocab)
        return jax.lax.all_to_all(found, place.width, 0, 2, tiled=True) if place.width else found

    out: Array = on_each(each, (place.ids, place.table), place.out)(ids, table)
    return out


def _look_up_forward(ids: Array, table: Array, place: _Place, dtype: Any) -> tuple[Array, Any]:
    return _look_up(ids, table, place, dtype), (ids, jnp.zeros((0, *table.shape), table.dtype))


def _look_up_backward(place: _Place, dtype: Any, kept: Any, gradient: Array) -> tuple[None, Array]:
    ids, like = kept
    rows, width = like.shape[1:]
    sizes = axes_in_use()
    here = tuple(
        n // math.prod(sizes[axis] for axis in axes) for n, axes in ((rows, place.vocab), (width, place.width))
    )

    def each(ids: Array, gradient: Array) -> Array:
        if place.width:
            gradient = jax.lax.all_to_all(gradient, place.width, 2, 0, tiled=True)
        if place.length:
            gradient = jax.lax.all_gather(gradient, place.length, axis=1, tiled=True)
        at, inside = place.local(place.all_ids(ids), here[0])
        gradient = jnp.where(inside[..., None], gradient, 0).astype(jnp.float32)
        total = jnp.zeros(here, jnp.float32).at[at].add(gradient)
        return jax.lax.psum(total, place.others) if place.others else total

    total = on_each(each, (place.ids, place.out), place.table)(ids, gradient)
    return None, total.astype(like.dtype)


_look_up.defvjp(_look_up_forward, _look_up_backward)
