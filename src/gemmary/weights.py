"""Weights that act like matrices: a plain array, or a leaf that stands for one.

`LoRA`, `Int8`, `Int4` and `Blocks` are pytrees, so a model adapted or quantized is the same dict with other leaves, and the
transformer never asks which it holds: it calls `project`, `lookup` and their kin. The equations of a LoRA's two factors and the
place of a scale in the output follow from the equation of the product itself.

Letters in the equations are the house's legend (see `gemmary.__doc__`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gemmary import kernels
from gemmary.eight import Eight, eight_bit_product
from gemmary.mesh import platform
from gemmary.params import TABLE, Params, Spec
from gemmary.spread import axes_in_use, gathered, look_up, spread

__all__ = [
    "INT4_GROUP",
    "Blocks",
    "Int4",
    "Int8",
    "LoRA",
    "Weight",
    "dequantize",
    "gated",
    "lookup",
    "map_rows",
    "project",
    "project_all",
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
class Blocks:
    """A weight as a GGUF keeps it, for the CPU kernels: `data` uint8 [outputs, bytes], each output's values in blocks of `kind`.

    `shape` is that of the array it stands for; the axes that a product sums over lead in it, or else trail.
    """

    data: _Leaf
    kind: str = field(metadata={"static": True})
    shape: tuple[int, ...] = field(metadata={"static": True})
    leads: bool = field(metadata={"static": True})


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


Weight = Array | np.ndarray | Eight | Int8 | Int4 | Blocks | LoRA
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
    if isinstance(w, Eight):
        x, whole = x.astype(_compute_dtype(x)), jnp.asarray(w.w).astype(_compute_dtype(x))
        x, whole = spread(x, x_axes, whole_rows=True), gathered(whole, w_axes)
        return spread(eight_bit_product(equation, x, whole, dtype), output)
    if isinstance(w, Int8):
        # One scale per output channel: it leaves the sum and multiplies the (smaller) output, whose last axes it has.
        kept = "".join(c for c in output if c in w_axes)
        scale = jnp.einsum(f"{w_axes}->{kept}", w.scale)
        return (_contract(equation, x, w.values, jnp.float32) * scale).astype(dtype)
    if isinstance(w, Blocks):
        return _in_kernel([equation], x, [w])[0].astype(dtype)
    if isinstance(w, Int4):
        w = dequantize(w, x.dtype)
    return _contract(equation, x, w, dtype)


def project_all(equations: Sequence[str], x: Float[Array, ...], weights: Sequence[Weight]) -> list[Float[Array, ...]]:
    """`project` of the same activations by several weights: in one call of the CPU kernel where it serves all."""
    if all(_served(x, equation, w) for equation, w in zip(equations, weights, strict=True)):
        return [out.astype(x.dtype) for out in _in_kernel(equations, x, weights)]
    return [project(equation, x, w) for equation, w in zip(equations, weights, strict=True)]


def gated(equation: str, x: Float[Array, ...], gate: Weight, up: Weight) -> Float[Array, ...] | None:
    """gelu(x gate) * (x up), the approximation with tanh, where the CPU kernel makes it at once; else None."""
    if not isinstance(gate, Blocks) or not isinstance(up, Blocks):
        return None
    return _in_kernel([equation] * 2, x, (gate, up), gated=True)[0].astype(x.dtype)


class _Sides(NamedTuple):
    """A product as one of two matrices: shapes of what stays of x and of w, and how many values are summed over."""

    rows: tuple[int, ...]
    size: int
    kept: tuple[int, ...]
    leads: bool
    """Whether the axes summed over lead in w; else they trail."""


def _sides(equation: str, x: Array, shape: tuple[int, ...]) -> _Sides:
    inputs, output = equation.split("->")
    x_axes, w_axes = inputs.split(",")
    read = [c for c in w_axes if c not in output]
    rows, leads = x.shape[: len(x_axes) - len(read)], w_axes.startswith("".join(read))
    assert x_axes.endswith("".join(read)), equation
    assert output == x_axes[: len(rows)] + "".join(c for c in w_axes if c not in read), equation
    kept = shape[len(read) :] if leads else shape[: -len(read)]
    return _Sides(rows, math.prod(x.shape[len(rows) :]), kept, leads)


def _compute_dtype(x: Array) -> Any:
    """What a product is made in: on a CPU XLA multiplies bf16 in scalar loops, so it is widened first."""
    return jnp.dtype(jnp.float32) if platform() == "cpu" and x.dtype == jnp.bfloat16 else x.dtype


def _served(x: Array, equation: str, w: Weight) -> bool:
    """Whether `_in_kernel` takes it."""
    if isinstance(w, Blocks):
        return True
    if isinstance(w, (LoRA, Eight, Int8, Int4)) or axes_in_use():  # foreign code cannot be split
        return False
    rows = math.prod(_sides(equation, x, w.shape).rows)
    return kernels.serves_rows(rows, w.dtype) and _compute_dtype(x) == jnp.float32


def _in_kernel(equations: Sequence[str], x: Array, weights: Sequence[Any], *, gated: bool = False) -> list[Array]:
    """Products of arrays and `Blocks` in the CPU kernel, in fp32; `gated`, the one of `gated`."""
    factors, sides = [], [_sides(equation, x, tuple(w.shape)) for equation, w in zip(equations, weights, strict=True)]
    size = sides[0].size
    for w, side in zip(weights, sides, strict=True):
        if isinstance(w, Blocks):
            assert w.leads == side.leads
            factors.append(kernels.Factor(jnp.asarray(w.data), True, w.kind))
        else:
            flat = w.reshape((size, -1) if side.leads else (-1, size))
            factors.append(kernels.Factor(jnp.asarray(flat), not side.leads))
    found = kernels.products(x.reshape(-1, size).astype(jnp.float32), factors, gated=gated)
    return [out.reshape(*side.rows, *side.kept) for out, side in zip(found, sides, strict=not gated)]


def _contract(equation: str, x: Array, w: Array | np.ndarray, dtype: Any) -> Array:
    """The product itself: of few rows in the CPU kernel where it serves, else in plain XLA.

    The axes summed over lead or trail in every weight, so each product is one of two matrices: on a CPU XLA is six times
    slower over several axes than over the same ones folded. It also multiplies bf16 and int8 in scalar loops there; both
    sides are widened to fp32 first.
    """
    if _served(x, equation, w):
        return _in_kernel([equation], x, [w])[0].astype(dtype)
    compute = _compute_dtype(x)
    if axes_in_use():
        return _spread_product(equation, x.astype(compute), jnp.asarray(w).astype(compute), dtype)
    x, w = x.astype(compute), jnp.asarray(w).astype(compute)
    rows, size, kept, leads = _sides(equation, x, w.shape)
    x, w = x.reshape(-1, size), w.reshape((size, -1) if leads else (-1, size))
    wide = jnp.promote_types(dtype, compute)
    product = _one_row(x, w, leads, wide) if len(x) == 1 else None
    if product is None:
        axes = (((1,), (0 if leads else 1,)), ((), ()))
        product = jax.lax.dot_general(x, w, axes, preferred_element_type=wide)
    return product.reshape(*rows, *kept).astype(dtype)


def _spread_product(equation: str, x: Array, w: Array, dtype: Any) -> Array:
    """The product on a mesh: of whole rows, by a weight that is together along what is stored apart (narrowed already: less to move)."""
    inputs, output = equation.split("->")
    x_axes, w_axes = inputs.split(",")
    x, w = spread(x, x_axes, whole_rows=True), gathered(w, w_axes)
    wide = jnp.promote_types(dtype, x.dtype)
    product = jnp.einsum(equation, x, w, preferred_element_type=wide).astype(dtype)
    return spread(product, output)


def _one_row(x: Array, w: Array | np.ndarray, leads: bool, dtype: Any) -> Array | None:
    """The product of one row, cut in as many parts as there are cores; None where it cannot be, or need not.

    XLA multiplies a single row by a matrix of a few MB on one core of a CPU, but the members of a batch side by side. So the
    matrix is cut along its first axis (no byte moves): into outputs that stand one after the other, or into sums to add.
    """
    parts = math.gcd(os.cpu_count() or 1, w.shape[0])
    if platform() != "cpu" or parts == 1:
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
    if isinstance(w, Blocks):
        return kernels.lookup(ids, jnp.asarray(w.data), w.kind, w.shape[-1]).astype(dtype)
    if axes_in_use() and ids.ndim == 2:
        return spread(look_up(ids, jnp.asarray(w), dtype), "btd")
    return jnp.asarray(w)[ids].astype(dtype)


def dequantize(w: Array | np.ndarray | Int8 | Int4 | Blocks, dtype: Any = jnp.float32) -> Float[Array, ...]:
    """The array that a weight stands for (for a LoRA, see `adapters.merge`)."""
    if isinstance(w, Blocks):
        outputs = w.data.shape[0]
        rows = kernels.lookup(jnp.arange(outputs), jnp.asarray(w.data), w.kind, math.prod(w.shape) // outputs)
        return (rows.T if w.leads else rows).reshape(w.shape).astype(dtype)
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


def weight_shape(w: Weight) -> tuple[int, ...]:
    """The shape of the array that a weight stands for."""
    if isinstance(w, Int8):
        return tuple(w.values.shape)
    if isinstance(w, Blocks):
        return w.shape
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
