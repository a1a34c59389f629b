"""Products of training in eight bits: what a chip that multiplies int8 twice as fast as bf16 gains, for a little noise.

Activations are scaled by row and weights by output, each to 127 at its largest, afresh in every product (as AQT does; Abdolrashidi
et al., arXiv 2111.15127). The product forward and the one that carries the gradient back to the activations are made so. The weight's own
gradient, which sums over many tokens, stays in the activations' dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["Eight", "eight_bit_product"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Eight:
    """A weight whose products are made in eight bits; it is itself kept in full."""

    w: Any


def _rounded(x: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """x as int8, and what to multiply by; the largest of each `axes` is 127."""
    wide = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(wide).max(axis=axes, keepdims=True), 1e-30) / 127
    return jnp.round(wide / scale).astype(jnp.int8), scale


def _product(equation: str, x: Array, w: Array, dtype: Any) -> Array:
    inputs, output = equation.split("->")
    x_axes, w_axes = inputs.split(",")
    summed = [letter for letter in x_axes if letter not in output]
    x8, x_scale = _rounded(x, tuple(x_axes.index(letter) for letter in summed))
    w8, w_scale = _rounded(w, tuple(w_axes.index(letter) for letter in summed))
    found = jnp.einsum(equation, x8, w8, preferred_element_type=jnp.int32).astype(jnp.float32)
    kept = {letter: n for axes, x in ((x_axes, x), (w_axes, w)) for letter, n in zip(axes, x.shape, strict=True)}

    def along(scale: Array, axes: str) -> Array:
        """The scale in the output's axes."""
        rest = [letter for letter in axes if letter not in summed]
        flat = scale.reshape([kept[letter] for letter in rest])
        return jnp.einsum(f"{''.join(rest)}->{''.join(c for c in output if c in rest)}", flat).reshape(
            [kept[letter] if letter in rest else 1 for letter in output]
        )

    return (found * along(x_scale, x_axes) * along(w_scale, w_axes)).astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def eight_bit_product(equation: str, x: Float[Array, ...], w: Float[Array, ...], dtype: Any) -> Float[Array, ...]:
    """The product `equation` of activations and a weight, such as "btd,dnh->btnh", in `dtype`."""
    return _product(equation, x, w, dtype)


def _forward(equation: str, x: Array, w: Array, dtype: Any) -> tuple[Array, tuple[Array, Array]]:
    return _product(equation, x, w, dtype), (x, w)


def _backward(equation: str, dtype: Any, kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, w = kept
    inputs, output = equation.split("->")
    x_axes, w_axes = inputs.split(",")
    dx = _product(f"{output},{w_axes}->{x_axes}", gradient, w, x.dtype)
    dw = jnp.einsum(f"{x_axes},{output}->{w_axes}", x, gradient.astype(x.dtype), preferred_element_type=w.dtype)
    return dx, dw


eight_bit_product.defvjp(_forward, _backward)
