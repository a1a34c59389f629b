"""Weights made smaller: arrays as `Int8` and `Int4`, and `Int4` as the blocks that the CPU kernels read."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gemmary import kernels
from gemmary.errors import GemmaryError
from gemmary.params import TABLE, Params
from gemmary.weights import INT4_GROUP, Blocks, Int4, Int8, map_rows, weight_shape

__all__ = ["packed", "quantize", "quantize_weight"]


def quantize_weight(name: str, w: Array, bits: int) -> Int8 | Int4:
    """One array as `Int8` or `Int4`, along the axes that row `name` reads. Raises GemmaryError where groups do not fit."""
    axes = TABLE[name].read_axes()
    w = w.astype(jnp.float32)
    if bits == 8:
        peak = jnp.max(jnp.abs(w), axis=axes, keepdims=True)
        scale = jnp.where(peak > 0, peak / 127, 1.0)
        return Int8(jnp.round(w / scale).astype(jnp.int8), scale)
    if w.shape[axes[-1]] % INT4_GROUP:
        raise GemmaryError(
            f"{name}: its input of {w.shape[axes[-1]]} values does not divide into groups of {INT4_GROUP}; use 8 bits"
        )
    grouped = jnp.moveaxis(w, axes[-1], -1)
    grouped = grouped.reshape(*grouped.shape[:-1], -1, INT4_GROUP)
    # The value of largest magnitude, sign kept, lands on -8: the one level that has no opposite.
    extreme = jnp.take_along_axis(grouped, jnp.argmax(jnp.abs(grouped), axis=-1, keepdims=True), axis=-1)
    scale = (extreme / -8).astype(jnp.float16)
    safe = jnp.where(scale == 0, 1, scale).astype(jnp.float32)
    nibbles = jnp.clip(jnp.round(grouped / safe) + 8, 0, 15).astype(jnp.uint8)
    packed = nibbles[..., : INT4_GROUP // 2] | nibbles[..., INT4_GROUP // 2 :] << 4
    packed = packed.reshape(*packed.shape[:-2], -1)
    return Int4(jnp.moveaxis(packed, -1, axes[-1]), jnp.moveaxis(scale[..., 0], -1, axes[-1]), axes[-1])


def quantize(params: Params, bits: int) -> Params:
    """Every matrix as Int8 or Int4; norms stay. At four bits the embedding keeps eight: it is also the output.

    Raises GemmaryError for other widths, or where an axis does not divide into groups.
    """
    if bits not in (4, 8):
        raise GemmaryError(f"weights can be quantized to 8 or 4 bits, not {bits}")
    return map_rows(
        params, lambda name, w: quantize_weight(name, w, 8 if name == "embed" else bits), lambda s: bool(s.reads)
    )


def packed(name: str, w: Any) -> Any:
    """An `Int4` of row `name` as the same values in blocks, where the CPU kernels serve; any other weight as it is.

    Its groups of 32 are those of Q4_0, byte for byte: they only have to lie along the input.
    """
    if not isinstance(w, Int4) or not kernels.serves_blocks():
        return w
    axes, shape = TABLE[name].read_axes(), weight_shape(w)
    leads, size = axes[-1] != -1, math.prod(shape[axis] for axis in axes)
    outputs = math.prod(shape) // size

    def by_output(part: Any) -> np.ndarray:
        flat = np.asarray(part)
        return flat.reshape(-1, outputs).T if leads else flat.reshape(outputs, -1)

    scales = np.ascontiguousarray(by_output(w.scale)).view(np.uint8).reshape(outputs, -1, 2)
    codes = by_output(w.packed).reshape(outputs, -1, INT4_GROUP // 2)
    return Blocks(np.concatenate([scales, codes], axis=2).reshape(outputs, -1), "Q4_0", shape, leads)
