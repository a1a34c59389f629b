"""AdamW, or Muon for matrices with AdamW for the rest: optax's, with masks and matrix sides from the table of parameters.

State and master weights are fp32, whatever the step computes in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from gemmary.errors import check_bounds
from gemmary.params import TABLE

__all__ = ["OptimizerSettings", "learning_rate", "optimizer"]


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
        rule = optax.contrib.muon(
            rate(settings.matrix_learning_rate), beta=settings.momentum,
            ns_steps=settings.newton_schulz_steps, weight_decay=settings.weight_decay,
            adam_b1=settings.beta1, adam_b2=settings.beta2, adam_learning_rate=rate(settings.learning_rate),
            muon_weight_dimension_numbers=_by_row(_sides), consistent_rms=0.2, mu_dtype=jnp.float32,
        )  # fmt: skip
    return optax.chain(optax.clip_by_global_norm(settings.clip), rule) if settings.clip else rule


def _by_row(value: Any) -> Any:
    """A function from parameters to the same tree with value(row) in place of each weight."""
    return lambda params: {name: jax.tree.map(lambda _, name=name: value(name), params[name]) for name in params}


def _sides(name: str) -> optax.contrib.MuonDimensionNumbers | None:
    """The two sides of a layer's matrix: what a product sums over, and what it gives. None for what is no such matrix."""
    spec = TABLE[name]
    if not spec.layered or not spec.reads:
        return None
    own = [axis - len(spec.axes) for axis in range(len(spec.axes)) if spec.axes[axis] != "layers"]
    reads = spec.read_axes()
    return optax.contrib.MuonDimensionNumbers(reads, tuple(axis for axis in own if axis not in reads))
