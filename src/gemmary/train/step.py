"""One step of learning: the only place that takes gradients. A loss says what is learnt; the stream of batches, from what.

A loss gives a sum over its batch, the weight it is a mean over, and sums to report. So a batch may be taken in parts whose
gradients add up to the same: the mean is over the tokens of the whole batch, not over means of its parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from gemmary.adapters import join
from gemmary.errors import GemmaryError
from gemmary.params import Params

__all__ = ["Loss", "Step", "Sums", "TrainState", "init_state", "make_step"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a run changes, but for its place in the data. `step` counts the steps done; `rng` is the key they draw from."""

    params: Params
    opt_state: Any
    step: Array
    rng: Array


class Sums(NamedTuple):
    """What a loss gives of a batch: the sum to minimize, the weight it is a mean over, and sums to report as means."""

    total: Array
    weight: Array
    report: dict[str, Array]


Loss = Callable[[Params, Any, Array], Sums]
"""Of a whole model's parameters, a batch and a key."""

Step = Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]]
"""From a state and a batch to the next state, and means to report."""


def init_state(params: Params, rule: optax.GradientTransformation, rng: Array) -> TrainState:
    """The state before the first step."""
    return TrainState(params, rule.init(params), jnp.zeros((), jnp.int32), rng)


def make_step(loss: Loss, rule: optax.GradientTransformation, *, accumulate: int = 1) -> Any:
    """A compiled step(state, batch, rest = None), which takes its state's memory for the next one's.

    `rest` is what of the model is not learnt (see `adapters.split`).

    A batch's rows are taken in `accumulate` equal parts, one after the other. Reports the loss's means, the gradient's
    length (before clipping) and the weight.
    """

    def step(state: TrainState, batch: Any, rest: Params | None = None) -> tuple[TrainState, dict[str, Array]]:
        def gradient(params: Params, batch: Any, rng: Array) -> tuple[Sums, Params]:
            def total(params: Params) -> tuple[Array, Sums]:
                sums = loss(join(params, rest), batch, rng)
                return sums.total, sums

            grads, sums = jax.grad(total, has_aux=True)(params)
            return sums, grads

        rng = jax.random.fold_in(state.rng, state.step)
        if accumulate == 1:
            sums, grads = gradient(state.params, batch, rng)
        else:
            sums, grads = _in_parts(gradient, state.params, batch, rng, accumulate)
        weight = jnp.maximum(sums.weight, 1)
        grads = jax.tree.map(lambda g: g / weight, grads)
        updates, opt_state = rule.update(grads, state.opt_state, state.params)
        report = {name: value / weight for name, value in sums.report.items()}
        report |= {"gradient_norm": optax.tree.norm(grads), "weight": sums.weight}
        params: Any = optax.apply_updates(state.params, updates)
        return TrainState(params, opt_state, state.step + 1, state.rng), report

    return jax.jit(step, donate_argnums=0)


def _in_parts(gradient: Any, params: Params, batch: Any, rng: Array, parts: int) -> tuple[Sums, Params]:
    """Sums and gradients over the parts of a batch."""
    rows = jax.tree.leaves(batch)[0].shape[0]
    if rows % parts:
        raise GemmaryError(f"a batch of {rows} rows cannot be taken in {parts} equal parts: change batch or accumulate")
    cut = jax.tree.map(lambda x: x.reshape(parts, rows // parts, *x.shape[1:]), batch)

    def add(done: Any, at: tuple[Any, Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, done, gradient(params, *at)), None

    keys = jax.random.split(rng, parts)
    shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], cut), rng)
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    done: tuple[Sums, Params] = jax.lax.scan(add, start, (cut, keys))[0]
    return done
