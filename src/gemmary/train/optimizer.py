"""AdamW, or Muon for layers' matrices with AdamW for the rest: optax's parts, with masks and matrix sides from the table.

Muon (Jordan et al., https://kellerjordan.github.io/posts/muon) steps along the momentum's nearest orthogonal matrix. optax's own
finds it under `vmap`, whose batched products take XLA's CPU backend two and a half times as long as plain ones.

State and master weights are fp32, whatever the step computes in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from gemmary.errors import check_bounds
from gemmary.params import TABLE

__all__ = ["OptimizerSettings", "learning_rate", "optimizer", "orthogonal"]


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """What a run minimizes with, and how fast. Shares are of the run's steps. Raises GemmaryError for what cannot be."""

    kind: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    matrix_learning_rate: float = 0.01
    """Of Muon, for the layers' matrices; the embedding and the norms keep `learning_rate`."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: down a cosine at once, or constant and then down a line over the last `decay` of the run."""
    warmup: float = 0.01
    decay: float = 0.3
    final: float = 0.1
    """The last step's learning rate, as a share of the highest."""
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    momentum: float = 0.95
    newton_schulz_steps: int = 5
    """Muon's, to make a matrix orthogonal: fewer are quicker and rougher."""
    weight_decay: float = 0.1
    clip: float = 1.0
    """A gradient longer than this is shortened to it; 0 never."""

    def __post_init__(self) -> None:
        check_bounds(
            self, learning_rate=(0, 10), matrix_learning_rate=(0, 10), warmup=(0, 1), decay=(0, 1), final=(0, 1), beta1=(0, 1),
            beta2=(0, 1), epsilon=(0, 1), momentum=(0, 1), newton_schulz_steps=(1, 20), weight_decay=(0, 10), clip=(0, 1e9),
        )  # fmt: skip


def learning_rate(settings: OptimizerSettings, steps: int) -> optax.Schedule:
    """The share of the highest learning rate at each of `steps` steps."""
    warmup = max(1, round(settings.warmup * steps))
    rest = max(1, steps - warmup)
    up = optax.linear_schedule(1 / warmup, 1.0, warmup - 1) if warmup > 1 else optax.constant_schedule(1.0)
    if settings.schedule == "cosine":
        return optax.join_schedules([up, optax.cosine_decay_schedule(1.0, rest, settings.final)], [warmup])
    falling = min(rest, max(1, round(settings.decay * steps)))
    down = optax.linear_schedule(1.0, settings.final, falling)
    return optax.join_schedules([up, optax.constant_schedule(1.0), down], [warmup, steps - falling])


def optimizer(settings: OptimizerSettings, steps: int) -> optax.GradientTransformation:
    """The update rule of a run of `steps` steps, for stacked or unstacked parameters."""
    shape = learning_rate(settings, steps)

    def rate(highest: float) -> optax.Schedule:
        return lambda count: highest * shape(count)

    decays = _by_row(lambda name: bool(TABLE[name].reads))
    if settings.kind == "adamw":
        rule = optax.adamw(
            rate(settings.learning_rate), settings.beta1, settings.beta2, settings.epsilon,
            weight_decay=settings.weight_decay, mask=decays,
        )  # fmt: skip
    else:
        adam = optax.nadamw(
            rate(settings.learning_rate), settings.beta1, settings.beta2, settings.epsilon, weight_decay=0.0
        )
        muon = optax.chain(
            optax.trace(settings.momentum, nesterov=True),
            optax.stateless(lambda updates, _: _orthogonal_rows(updates, settings.newton_schulz_steps)),
            optax.add_decayed_weights(settings.weight_decay),
            optax.scale_by_learning_rate(rate(settings.matrix_learning_rate)),
        )
        kinds = _by_row(lambda name: "muon" if TABLE[name].layered and TABLE[name].reads else "adam")
        rule = optax.partition({"muon": muon, "adam": adam}, kinds)
    return optax.chain(optax.clip_by_global_norm(settings.clip), rule) if settings.clip else rule


def _by_row(value: Any) -> Any:
    """A function from parameters to the same tree with value(row) in place of each weight."""
    return lambda params: {name: jax.tree.map(lambda _, name=name: value(name), params[name]) for name in params}


_NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)  # Jordan's: steepest at 0, and between 0.7 and 1.2 after five steps
_RMS = 0.2  # of an update before the learning rate, about AdamW's (Liu et al., arXiv 2502.16982)


def orthogonal(x: Float[Array, "M N"], steps: int) -> Float[Array, "M N"]:
    """The orthogonal matrix nearest x, roughly: singular values near 1 where x's are not far below its largest.

    Each step multiplies x by a polynomial of x x^T. These commute, so the steps are taken on x x^T alone, which for an oblong x
    is nearly half the work, and x is multiplied once, by their product.
    """
    a, b, c = _NEWTON_SCHULZ
    wide = x.shape[0] <= x.shape[1]
    x = (x if wide else x.T) / (jnp.linalg.norm(x) + 1e-8)
    square = x @ x.T
    identity = jnp.eye(len(square), dtype=x.dtype)
    product = identity
    for step in range(steps):
        factor = a * identity + b * square + c * (square @ square)
        product = factor @ product if step else factor
        if step + 1 < steps:
            square = factor @ (factor @ square)
    x = product @ x
    return x if wide else x.T


def _orthogonal_rows(updates: Any, steps: int) -> Any:
    """Each matrix of each row made orthogonal, and scaled to one root mean square whatever its shape."""

    def one(w: Array, reads: int) -> Array:
        x = w.reshape(math.prod(w.shape[:reads]), -1)
        scaled: Array = orthogonal(x, steps) * (_RMS * max(x.shape) ** 0.5)
        return scaled.reshape(w.shape)

    def row(name: str, weight: Any) -> Any:
        spec = TABLE[name]
        fn = partial(one, reads=len(spec.reads))  # a layer's matrix begins with the axes that a product sums over
        stacked = not isinstance(weight, tuple)
        return jax.tree.map(jax.vmap(fn) if stacked else fn, weight)

    # What is not Muon's comes as empty nodes.
    return {name: row(name, weight) if jax.tree.leaves(weight) else weight for name, weight in updates.items()}
