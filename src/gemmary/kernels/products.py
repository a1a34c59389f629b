"""Products with matrices in the CPU kernel: plain ones, and the packed blocks of a GGUF as they lie in its file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gemmary.errors import GemmaryError
from gemmary.kernels.library import instructions, kernel
from gemmary.mesh import platform

__all__ = ["BLOCKS", "Factor", "lookup", "products", "row_bytes", "serves_blocks", "serves_rows"]

BLOCKS: dict[str, tuple[int, int]] = {
    "Q8_0": (32, 34), "Q4_0": (32, 18), "Q5_0": (32, 22), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
}  # fmt: skip
"""The block types of GGUF that the kernels read: values of a block, and its bytes."""

_PLAIN = {np.dtype(np.float32): 0, np.dtype(jnp.bfloat16): 1, np.dtype(np.int8): 2}
_NUMBERS = {name: number for number, name in enumerate(BLOCKS, start=len(_PLAIN))}
_ROWS = 8
"""Up to so many rows the time of a product is that of reading the matrix."""


class Factor(NamedTuple):
    """A matrix: [K, N], or [N, K] if `turned`; of a `kind` in `BLOCKS` it is uint8 [N, bytes of a row], and turned."""

    w: Array
    turned: bool
    kind: str | None = None

    @property
    def columns(self) -> int:
        """N."""
        return int(self.w.shape[0 if self.turned else 1])


def row_bytes(kind: str, size: int) -> int:
    """Bytes of a row of `size` values. Raises GemmaryError where they are not whole blocks."""
    values, stored = BLOCKS[kind]
    if size % values:
        raise GemmaryError(f"a row of {size} values does not divide into {kind} blocks of {values}")
    return size // values * stored


def serves_rows(rows: int, dtype: Any) -> bool:
    """Whether `products` takes so many rows and plain matrices of that dtype."""
    return rows <= _ROWS and np.dtype(dtype) in _PLAIN and serves_blocks()


def serves_blocks() -> bool:
    """Whether `products` and `lookup` take blocks, of any number of rows."""
    return platform() == "cpu" and instructions() is not None


def products(x: Float[Array, "M K"], factors: Sequence[Factor], *, gated: bool = False) -> list[Float[Array, "M N"]]:
    """x w in fp32 for up to four matrices, each read once, as it is stored; `gated`, the one gelu(x w0) * (x w1).

    Of plain matrices, int8 too, there is a gradient; of blocks and of gated products it is refused (TypeError).
    """
    kinds = tuple(_NUMBERS[f.kind] if f.kind else _PLAIN[np.dtype(f.w.dtype)] for f in factors)
    turned = tuple(f.turned for f in factors)
    if gated or any(f.kind for f in factors):
        return _call(_forward_only(x), [f.w for f in factors], kinds, turned, gated)
    return _plain(x, [f.w for f in factors], kinds, turned)


def _call(x: Array, ws: list[Array], kinds: tuple[int, ...], turned: tuple[bool, ...], gated: bool) -> list[Array]:
    columns = [w.shape[0 if t else 1] for w, t in zip(ws, turned, strict=True)]
    like = [jax.ShapeDtypeStruct((x.shape[0], n), jnp.float32) for n in (columns[:1] if gated else columns)]
    attributes = {"kinds": np.array(kinds, np.int32), "turned": np.array(turned, np.int32), "gated": gated}
    call = kernel("products", like, vmap_method="sequential")
    out: list[Array] = list(call(x.astype(jnp.float32), *ws, **attributes))
    return out


@jax.custom_jvp
def _forward_only(x: Array) -> Array:
    return x


@_forward_only.defjvp
def _refuse(primals: Any, tangents: Any) -> Any:
    raise TypeError("products of quantized weights on a CPU have no gradient: dequantize the weights to train them")


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _plain(x: Array, ws: list[Array], kinds: tuple[int, ...], turned: tuple[bool, ...]) -> list[Array]:
    return _call(x, ws, kinds, turned, False)


def _plain_forward(
    x: Array, ws: list[Array], kinds: tuple[int, ...], turned: tuple[bool, ...]
) -> tuple[list[Array], tuple[Array, list[Array]]]:
    return _plain(x, ws, kinds, turned), (x, ws)


def _plain_backward(
    kinds: tuple[int, ...], turned: tuple[bool, ...], kept: tuple[Array, list[Array]], ds: list[Array]
) -> tuple[Array, list[Any]]:
    x, ws = kept
    dx = sum(d @ (w if t else w.T).astype(jnp.float32) for d, w, t in zip(ds, ws, turned, strict=True))
    dws = [
        (d.T @ x if t else x.T @ d).astype(w.dtype)
        if jnp.issubdtype(w.dtype, jnp.floating)
        else np.zeros(w.shape, jax.dtypes.float0)  # whole numbers have none
        for d, w, t in zip(ds, ws, turned, strict=True)
    ]
    return jnp.asarray(dx).astype(x.dtype), dws


_plain.defvjp(_plain_forward, _plain_backward)


def lookup(rows: Int[Array, ...], w: Array, kind: str, size: int) -> Float[Array, "... K"]:
    """Rows of blocks as fp32, `size` values each; one that there is not is NaN."""
    like = jax.ShapeDtypeStruct((math.prod(rows.shape), size), jnp.float32)
    call = kernel("lookup", like, vmap_method="sequential")
    out: Array = call(w, rows.reshape(-1).astype(jnp.int32), kind=np.int32(_NUMBERS[kind]))
    return out.reshape(*rows.shape, size)
