"""Rotary position embeddings (Su et al., arXiv 2104.09864), split-half layout: value i turns with value i + H/2.

Angles are computed in fp32 from integer positions: in bf16, positions 8190 and 8191 are both 8192.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

__all__ = ["Turn", "rotate", "timescales", "turn"]


class Turn(NamedTuple):
    """How far each position is turned: cosine and sine of its H/2 angles, the same for every head."""

    cos: Float[Array, "B T 1 H2"]
    sin: Float[Array, "B T 1 H2"]


def timescales(head_dim: int, base: float, factor: float = 1.0) -> np.ndarray:
    """The H/2 numbers that a position is divided by to give an angle; `factor` stretches them all (linear scaling).

    Taken in float64 and rounded once: a power in fp32 is wrong by 0.1 radian at position 131071.
    """
    exponent = np.arange(head_dim // 2) * 2 / head_dim
    return (base**exponent * factor).astype(np.float32)


def turn(positions: Int[Array, "B T"], timescale: Float[Array | np.ndarray, " H2"]) -> Turn:
    """The turn of each position: position / timescale, in fp32."""
    angle = positions[:, :, None, None].astype(jnp.float32) / timescale
    return Turn(jnp.cos(angle), jnp.sin(angle))


def rotate(x: Float[Array, "B T N H"], by: Turn) -> Float[Array, "B T N H"]:
    """Turn each head's halves, in fp32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * by.cos - second * by.sin, second * by.cos + first * by.sin], axis=-1)
    return turned.astype(x.dtype)
