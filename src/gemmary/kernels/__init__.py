"""The CPU kernels: C++ in one library that the package's build makes, called through XLA on XLA's own threads.

They are optional. Where there was no compiler, on a processor without AVX2 and on devices other than the CPU, plain XLA
serves, with the same results to rounding; `instructions()` tells.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

__all__ = ["attention", "few_rows", "instructions", "serves_attention", "serves_rows"]

_LIBRARY = "libgemmary_kernels.so"
_HEAD = 8
"""Head sizes that attention takes are multiples of it."""
_ROWS = 8
"""Up to so many rows the time of a product is that of reading the matrix."""


@functools.cache
def instructions() -> str | None:
    """The instruction set that the kernels run with here ("avx512", "avx2", …); None where there are none."""
    path = next((at for folder in __path__ if (at := Path(folder) / _LIBRARY).is_file()), None)
    if path is None:
        return None
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        logging.getLogger(__name__).warning("the CPU kernels cannot be loaded, plain XLA serves: %s", error)
        return None
    library.gemmary_instructions.restype = ctypes.c_char_p
    name: bytes | None = library.gemmary_instructions()
    if name is None:
        return None
    for target in ("gemmary_rows", "gemmary_attend", "gemmary_attend_gradient"):
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu")
    return name.decode()


def serves_attention(head_dim: int) -> bool:
    """Whether `attention` can be called. Of several CPU devices each computes all of it: XLA cannot split foreign code."""
    return jax.default_backend() == "cpu" and head_dim % _HEAD == 0 and instructions() is not None


def serves_rows(rows: int, dtype: Any) -> bool:
    """Whether `few_rows` can be called for so many rows and a matrix of that dtype."""
    narrow = rows <= _ROWS and dtype in (jnp.float32, jnp.bfloat16)
    return narrow and jax.default_backend() == "cpu" and instructions() is not None


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def few_rows(x: Float[Array, "M K"], w: Float[Array, ...], turned: bool) -> Float[Array, "M N"]:
    """x w, in fp32, for a w of [K, N], or of [N, K] if `turned`; w is read once, as it is stored."""
    columns = w.shape[0 if turned else 1]
    like = jax.ShapeDtypeStruct((x.shape[0], columns), jnp.float32)
    out: Array = jax.ffi.ffi_call("gemmary_rows", like, vmap_method="sequential")(
        x.astype(jnp.float32), w, turned=turned
    )
    return out


def _rows_forward(x: Array, w: Array, turned: bool) -> tuple[Array, tuple[Array, Array]]:
    return few_rows(x, w, turned), (x, w)


def _rows_backward(turned: bool, kept: tuple[Array, Array], d: Array) -> tuple[Array, Array]:
    x, w = kept
    wide = w.astype(jnp.float32)
    dw = d.T @ x if turned else x.T @ d
    return (d @ (wide if turned else wide.T)).astype(x.dtype), dw.astype(w.dtype)


few_rows.defvjp(_rows_forward, _rows_backward)


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    *,
    window: int | None,
    softcap: float | None,
) -> Float[Array, "B T N H"]:
    """Attention of scaled, rotated queries among themselves, and its gradient; no scores are kept, whatever T is.

    A token sees those of its segment that stand no later than itself, in place and in position, and at most `window` back.
    One at position -1 is padding: it sees nothing and its result is 0. Computed in fp32.
    """
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    return _attention(*wide, positions, segments, window or 0, softcap or 0.0).astype(q.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attention(q: Array, k: Array, v: Array, positions: Array, segments: Array, window: int, softcap: float) -> Array:
    return _forward(q, k, v, positions, segments, window, softcap)[0]


def _limits(window: int, softcap: float) -> dict[str, Any]:
    return {"window": np.int64(window), "softcap": np.float32(softcap)}


def _forward(
    q: Array, k: Array, v: Array, positions: Array, segments: Array, window: int, softcap: float
) -> tuple[Array, tuple[Array, ...]]:
    B, T, N, _ = q.shape
    like = jax.ShapeDtypeStruct(q.shape, jnp.float32), jax.ShapeDtypeStruct((B, N, T), jnp.float32)
    given = q, k, v, positions.astype(jnp.int32), segments.astype(jnp.int32)
    out, log_sum = jax.ffi.ffi_call("gemmary_attend", like)(*given, **_limits(window, softcap))
    return out, (*given, out, log_sum)


def _backward(window: int, softcap: float, kept: tuple[Array, ...], d_out: Array) -> tuple[Any, ...]:
    like = tuple(jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in kept[:3])
    grads = jax.ffi.ffi_call("gemmary_attend_gradient", like)(*kept, d_out, **_limits(window, softcap))
    return (*grads, None, None)


_attention.defvjp(_forward, _backward)
