"""Weights that act like matrices: a plain array, or a leaf that stands for one.

`LoRA`, `Int8` and `Int4` are pytrees, so a model adapted or quantized is the same dict with other leaves, and the
transformer never asks which it holds: it calls `project` and `lookup`. The equations of a LoRA's two factors and the
place of a scale in the output follow from the equation of the product itself.

Letters in the equations are the house's legend (see `gemmary.__doc__`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gemmary import kernels
from gemmary.errors import GemmaryError
from gemmary.params import TABLE, Params, Spec

__all__ = [
    "INT4_GROUP",
    "Int4",
    "Int8",
    "LoRA",
    "Weight",
    "dequantize",
    "lookup",
    "map_rows",
    "project",
    "quantize",
    "quantize_weight",
    "weight_shape",
]

# To a type checker an array. At run time anything: JAX and optax put shapes, flags and stand-ins into the same trees.
if TYPE_CHECKING:
    _Leaf = Array | np.ndarray
else:
    _Leaf = Any

INT4_GROUP = 32
"""Values that share one scale in `Int4`, as in GGUF's Q4_0."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8:
    """Eight-bit values with one scale per output channel: w = values * scale.

    `values` int8 has the weight's shape; `scale` float32 the same with the axes that a product sums over kept at 1.
    """

    values: _Leaf
    scale: _Leaf


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int4:
    """Four-bit values in groups of 32 along one axis: w = (nibble - 8) * scale.

    `packed` uint8 has the weight's shape with `axis` (counted from the end) halved: within a group, byte j holds value
    j in its low nibble and value j + 16 in its high one. `scale` float16 has `axis` divided by 32.
    """

    packed: _Leaf
    scale: _Leaf
    axis: int = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoRA:
    """A weight plus a low-rank update (Hu et al., arXiv 2106.09685): base + scale * a b.

    `a` has the input axes and R, `b` has R and the output axes in the weight's order; stacked, both lead with L.
    `base` is any other weight; None where the update is kept apart from it (`adapters.split`).
    """

    base: Any
    a: _Leaf
    b: _Leaf
    scale: float = field(metadata={"static": True})


Weight = Array | np.ndarray | Int8 | Int4 | LoRA
"""A weight of one row: on the device, or (as a checkpoint gives it) on the host."""


def project(equation: str, x: Float[Array, ...], w: Weight, *, dtype: Any = None) -> Float[Array, ...]:
    """The product `equation` of activations and a weight, such as "btd,dnh->btnh", in `dtype` (default: that of x)."""
    inputs, output = equation.split("->")
    x_axes, w_axes = inputs.split(",")
    dtype = dtype or x.dtype
    if isinstance(w, LoRA):
        read = "".join(c for c in w_axes if c not in output)
        kept = "".join(c for c in w_axes if c in output)
        rank_axes = "".join(c for c in x_axes if c not in read) + "r"
        inner = jnp.einsum(f"{x_axes},{read}r->{rank_axes}", x, w.a.astype(x.dtype))
        update = jnp.einsum(f"{rank_axes},r{kept}->{output}", inner, w.b.astype(x.dtype))
        return project(equation, x, w.base, dtype=dtype) + (w.scale * update).astype(dtype)
    if isinstance(w, Int8):
        # One scale per output channel: it leaves the sum and multiplies the (smaller) output, whose last axes it has.
        kept = "".join(c for c in output if c in w_axes)
        scale = jnp.einsum(f"{w_axes}->{kept}", w.scale)
        return (_contract(equation, x, w.values, jnp.float32) * scale).astype(dtype)
    if isinstance(w, Int4):
        w = dequantize(w, x.dtype)
    return _contract(equation, x, w, dtype)


def _contract(equation: str, x: Array, w: Array | np.ndarray, dtype: Any) -> Array:
    """The product itself: of few rows in the CPU kernel where it serves, else in plain XLA.

    The axes summed over lead or trail in every weight, so each product is one of two matrices: on a CPU XLA is six times
    slower over several axes than over the same ones folded. It also multiplies bf16 and int8 in scalar loops there; both
    sides are widened to fp32 first.
    """
    inputs, output = equation.split("->")
    x_axes, w_axes = inputs.split(",")
    read = [c for c in w_axes if c not in output]
    rows, leads = x.shape[: len(x_axes) - len(read)], w_axes.startswith("".join(read))
    size = math.prod(x.shape[len(rows) :])
    kept = w.shape[len(read) :] if leads else w.shape[: -len(read)]
    assert x_axes.endswith("".join(read)), equation
    assert output == x_axes[: len(rows)] + "".join(c for c in w_axes if c not in read), equation
    compute = x.dtype
    if jax.default_backend() == "cpu" and compute == jnp.bfloat16:
        compute = jnp.dtype(jnp.float32)
    x, w = x.reshape(-1, size).astype(compute), w.reshape((size, -1) if leads else (-1, size))
    if kernels.serves_rows(len(x), w.dtype) and compute == jnp.float32:
        return kernels.few_rows(x, jnp.asarray(w), not leads).reshape(*rows, *kept).astype(dtype)
    w, wide = w.astype(compute), jnp.promote_types(dtype, compute)
    product = _one_row(x, w, leads, wide) if len(x) == 1 else None
    if product is None:
        axes = (((1,), (0 if leads else 1,)), ((), ()))
        product = jax.lax.dot_general(x, w, axes, preferred_element_type=wide)
    return product.reshape(*rows, *kept).astype(dtype)


def _one_row(x: Array, w: Array | np.ndarray, leads: bool, dtype: Any) -> Array | None:
    """The product of one row, cut in as many parts as there are cores; None where it cannot be, or need not.

    XLA multiplies a single row by a matrix of a few MB on one core of a CPU, but the members of a batch side by side. So the
    matrix is cut along its first axis (no byte moves): into outputs that stand one after the other, or into sums to add.
    """
    parts = math.gcd(os.cpu_count() or 1, w.shape[0])
    if jax.default_backend() != "cpu" or parts == 1:
        return None
    w = w.reshape(parts, -1, w.shape[1])
    x = x.reshape(parts, 1, -1) if leads else jnp.broadcast_to(x, (parts, *x.shape))
    axes = (((2,), (1 if leads else 2,)), ((0,), (0,)))
    product = jax.lax.dot_general(x, w, axes, preferred_element_type=dtype)
    return product.sum(axis=0) if leads else product.reshape(1, -1)


def lookup(ids: Int[Array, ...], w: Weight, dtype: Any) -> Float[Array, "... D"]:
    """Rows of a [V, D] weight, in `dtype`."""
    if isinstance(w, LoRA):
        update = jnp.einsum("r...,dr->...d", w.b[:, ids], w.a)
        return lookup(ids, w.base, dtype) + (w.scale * update).astype(dtype)
    if isinstance(w, Int8):
        return (jnp.asarray(w.values[ids], jnp.float32) * w.scale[ids]).astype(dtype)
    if isinstance(w, Int4):
        return dequantize(Int4(w.packed[ids], w.scale[ids], w.axis), dtype)
    return jnp.asarray(w)[ids].astype(dtype)


def dequantize(w: Array | np.ndarray | Int8 | Int4, dtype: Any = jnp.float32) -> Float[Array, ...]:
    """The array that a weight stands for (for a LoRA, see `adapters.merge`)."""
    if isinstance(w, Int8):
        return (jnp.asarray(w.values, jnp.float32) * w.scale).astype(dtype)
    if isinstance(w, Int4):
        packed = jnp.moveaxis(w.packed, w.axis, -1)
        packed = packed.reshape(*packed.shape[:-1], -1, INT4_GROUP // 2)
        nibbles = jnp.concatenate([packed & 15, packed >> 4], axis=-1).astype(jnp.float32) - 8
        scale = jnp.moveaxis(w.scale, w.axis, -1)[..., None].astype(jnp.float32)
        values = (nibbles * scale).reshape(*nibbles.shape[:-2], -1)
        return jnp.moveaxis(values, -1, w.axis).astype(dtype)
    return jnp.asarray(w, dtype)


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


def weight_shape(w: Weight) -> tuple[int, ...]:
    """The shape of the array that a weight stands for."""
    if isinstance(w, Int8):
        return tuple(w.values.shape)
    if isinstance(w, Int4):
        shape = list(w.packed.shape)
        shape[w.axis] *= 2
        return tuple(shape)
    return tuple(w.shape)  # type: ignore[union-attr]


def map_rows(params: Params, change: Any, wanted: Any, names: Collection[str] = tuple(TABLE)) -> Params:
    """`change(name, weight)` over the weights of those named rows whose Spec is `wanted`, stacked or not."""

    def one(name: str, weight: Any) -> Any:
        spec: Spec = TABLE[name]
        if name not in names or not wanted(spec):
            return weight
        return tuple(change(name, w) for w in weight) if isinstance(weight, tuple) else change(name, weight)

    return {name: one(name, weight) for name, weight in params.items()}
