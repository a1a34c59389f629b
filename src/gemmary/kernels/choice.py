"""The highest logits and what all come to, in one pass of the CPU kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gemmary.kernels.library import instructions, kernel
from gemmary.mesh import platform

__all__ = ["choose", "serves_choice"]


def serves_choice() -> bool:
    """Whether `choose` can be called."""
    return platform() == "cpu" and instructions() is not None


def choose(
    logits: Float[Array, "B V"], known: int, count: int
) -> tuple[Int[Array, "B C"], Float[Array, "B C"], Float[Array, " B"]]:
    """The `count` highest among the first `known` of each row, from the highest down, and the log-sum-exp of the whole row."""
    B = logits.shape[0]
    like = [
        jax.ShapeDtypeStruct((B, count), jnp.int32),
        *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((B, count), (B,), (B,))),
    ]
    call = kernel("choose", like)
    places, values, top, total = call(logits.astype(jnp.float32), known=np.int64(known))
    return places, values, top + jnp.log(total)
