"""A key/value cache in pages of a common pool, so that long and short texts share memory and equal beginnings are kept once.

Position p of a row is in page `table[row, p // PAGE]`, in slot p % PAGE; -1 says that there is none (Kwon et al., "PagedAttention",
arXiv 2309.06180). Who owns which page is decided elsewhere (`infer.memory`); here they are read and written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gemmary import kernels
from gemmary.config import Config
from gemmary.model.attention import Marks, attend, attend_among

__all__ = ["PAGE", "PagedLayer", "Pool", "init_pool", "page_bytes"]

PAGE = 64
"""Positions of a page."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pool:
    """One layer's pages."""

    k: Float[Array, "P K S H"]
    v: Float[Array, "P K S H"]


def init_pool(config: Config, pages: int, dtype: Any) -> Pool:
    """So many empty pages."""
    shape = (pages, config.num_kv_heads, PAGE, config.head_dim)
    return Pool(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def page_bytes(config: Config, dtype: Any) -> int:
    """What a page takes in one layer."""
    return int(2 * PAGE * config.num_kv_heads * config.head_dim * jnp.dtype(dtype).itemsize)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedLayer:
    """One layer's pages, and which of them each row of a batch has."""

    pool: Pool
    table: Int[Array, "B M"]

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
    ) -> tuple[Float[Array, "B T N H"], PagedLayer]:
        """Attention of new tokens to themselves and to what the pages hold, and the pages with them; `first`: they held nothing."""
        limits: dict[str, Any] = {"window": window, "softcap": softcap}
        pool = self.pool
        if kernels.serves_cached(q.shape[1], pool.k.dtype):
            out, *both = kernels.paged_attention(q, k, v, marks.positions, self.table, pool.k, pool.v, **limits)
            return out, PagedLayer(Pool(*both), self.table)
        written = PagedLayer(self._put(k, v, marks.positions), self.table)
        if first:
            return attend_among(q, k, v, marks, **limits), written
        return written._attend_late(q, marks, window, softcap), written

    def _put(self, k: Array, v: Array, positions: Array) -> Pool:
        pool = self.pool
        if kernels.serves_cached(1, pool.k.dtype):
            return Pool(*kernels.put_in_pages(k, v, positions, self.table, pool.k, pool.v))
        index = jnp.clip(positions // PAGE, 0, self.table.shape[1] - 1)
        page = jnp.take_along_axis(self.table, index, axis=1)
        page = jnp.where((positions >= 0) & (page >= 0), page, pool.k.shape[0])  # what is past the last is dropped

        def put(into: Array, x: Array) -> Array:
            return into.at[page, :, positions % PAGE].set(x.astype(into.dtype), mode="drop")

        return Pool(put(pool.k, k), put(pool.v, v))

    def _attend_late(self, q: Array, marks: Marks, window: int | None, softcap: float | None) -> Array:
        """Of many tokens after others: the pages that they can see are laid side by side first."""
        T, pages = q.shape[1], self.table.shape[1]
        start = marks.positions[:, 0]
        reach = T // PAGE + 2
        if window is not None:
            reach += min(pages, window // PAGE + 1)
            base = jnp.maximum(start - window + 1, 0) // PAGE
        else:
            reach += pages
            base = jnp.zeros_like(start)
        index = base[:, None] + jnp.arange(reach)
        page = jnp.where(index < pages, jnp.take_along_axis(self.table, jnp.minimum(index, pages - 1), axis=1), -1)
        places = index[:, :, None] * PAGE + jnp.arange(PAGE)
        there = (page >= 0)[:, :, None] & (places <= marks.positions.max(axis=1)[:, None, None])
        key_marks = Marks(jnp.where(there, places, -1).reshape(len(q), -1))

        def gathered(x: Array) -> Array:  # [B, pages, K, PAGE, H]
            return x[jnp.maximum(page, 0)]

        k, v = gathered(self.pool.k), gathered(self.pool.v)
        if kernels.serves_attention(q.shape[3]):
            k, v = (x.swapaxes(2, 3).reshape(len(q), -1, x.shape[2], x.shape[4]) for x in (k, v))
            at = start - base * PAGE
            return kernels.late_attention(
                q, k, v, marks.positions, key_marks.positions, at, window=window, softcap=softcap
            )
        k, v = (x.swapaxes(1, 2).reshape(len(q), x.shape[2], -1, x.shape[4]) for x in (k, v))
        return attend(q, k, v, marks, key_marks, window=window, softcap=softcap)
