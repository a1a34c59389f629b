"""One step of learning: the only place that takes gradients. A loss says what is learnt; the stream of batches, from what.

A loss gives a sum over its batch, the weight it is a mean over, and sums to report. So a batch may be taken in parts whose
gradients add up to the same: the mean is over the tokens of the whole batch, not over means of its parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array

from gemmary.adapters import join
from gemmary.errors import GemmaryError
from gemmary.mesh import replicated
from gemmary.params import TABLE, Params, placement
from gemmary.spread import axes_in_use

__all__ = ["Loss", "Step", "Sums", "TrainState", "init_state", "make_step", "state_shardings"]


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


def make_step(
    loss: Loss, rule: optax.GradientTransformation, *, accumulate: int = 1, mesh: Mesh | AbstractMesh | None = None
) -> Any:
    """A compiled step(state, batch, rest = None), which takes its state's memory for the next one's.

    On a mesh the state comes placed (`state_shardings`) and stays where it is; each slice takes the gradient of its own rows, and
    slices add theirs once. To be called, lowered or traced within `mesh.using(mesh)`.

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
        whole = gradient if accumulate == 1 else partial(_in_parts, gradient, parts=accumulate)
        sums, grads = _over_slices(whole)(state.params, batch, rng)
        weight = jnp.maximum(sums.weight, 1)
        grads = jax.tree.map(lambda g: g / weight, grads)
        updates, opt_state = rule.update(grads, state.opt_state, state.params)
        report = {name: value / weight for name, value in sums.report.items()}
        report |= {"gradient_norm": optax.tree.norm(grads), "weight": sums.weight}
        params: Any = optax.apply_updates(state.params, updates)
        new = TrainState(params, opt_state, state.step + 1, state.rng)
        if mesh is not None:
            new = jax.lax.with_sharding_constraint(new, state_shardings(new, mesh))
            report = jax.lax.with_sharding_constraint(report, replicated(mesh))
        return new, report

    return jax.jit(step, donate_argnums=0)


def state_shardings(state: TrainState, mesh: Mesh | AbstractMesh) -> TrainState:
    """Where each part of a state lies: parameters and what the optimizer keeps of each alike, all else on every device."""
    everywhere = replicated(mesh)

    def of_params(node: Any) -> bool:
        return isinstance(node, dict) and node.keys() <= TABLE.keys()

    def one(node: Any) -> Any:
        return placement(node, mesh) if of_params(node) else everywhere

    opt_state = jax.tree.map(one, state.opt_state, is_leaf=of_params)
    return TrainState(placement(state.params, mesh), opt_state, everywhere, everywhere)  # type: ignore[arg-type]


def _over_slices(gradient: Any) -> Any:
    """The sums and gradients of all slices' rows. Within a slice it is one program; between them one sum, at the end."""
    if axes_in_use().get("slice", 1) == 1:
        return gradient

    def each(params: Params, batch: Any, rng: Array) -> tuple[Sums, Params]:
        found: tuple[Sums, Params] = jax.lax.psum(gradient(params, batch, rng), "slice")
        return found

    rows = PartitionSpec("slice")
    return jax.shard_map(
        each,
        in_specs=(PartitionSpec(), rows, PartitionSpec()),
        out_specs=PartitionSpec(),
        axis_names={"slice"},
        check_vma=False,
    )


def _in_parts(gradient: Any, params: Params, batch: Any, rng: Array, *, parts: int) -> tuple[Sums, Params]:
    """Sums and gradients over the parts of a batch."""
    rows = jax.tree.leaves(batch)[0].shape[0]
    if rows % parts:
        raise GemmaryError(f"a batch of {rows} rows cannot be taken in {parts} equal parts: change batch or accumulate")

    def in_parts(x: Array) -> Array:
        if axes_in_use():  # every device has some rows of each part
            return x.reshape(rows // parts, parts, *x.shape[1:]).swapaxes(0, 1)
        return x.reshape(parts, rows // parts, *x.shape[1:])

    cut = jax.tree.map(in_parts, batch)

    def add(done: Any, at: tuple[Any, Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, done, gradient(params, *at)), None

    keys = jax.random.split(rng, parts)
    shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], cut), rng)
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    done: tuple[Sums, Params] = jax.lax.scan(add, start, (cut, keys))[0]
    return done
