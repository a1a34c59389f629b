"""A step on a mesh: the same as on one device, and what its program sends. Eight devices of one CPU."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gemmary.config import Config
from gemmary.data.packing import Batch
from gemmary.errors import GemmaryError
from gemmary.mesh import make_mesh, rows_sharding, using
from gemmary.params import init, unstack
from gemmary.plan import collectives, read_program, shapes_of
from gemmary.presets import nano
from gemmary.spread import by_heads, look_up, spread
from gemmary.train.head import Head
from gemmary.train.objectives import language_loss
from gemmary.train.optimizer import OptimizerSettings, optimizer
from gemmary.train.step import init_state, make_step, state_shardings
from gemmary.weights import lookup

VOCAB, ROWS, LENGTH = 768, 8, 96
# Two kinds of layers, and a key/value head that no mesh divides.
MANY = nano(2, VOCAB, 3).replace(num_layers=3, context=512, window=16, window_pattern=(True, False), final_softcap=30.0)
# Heads that four devices divide.
HEADS = nano(4, VOCAB, 1).replace(num_layers=2, num_kv_heads=4, context=512)
RULE = optimizer(OptimizerSettings(), 10)


def batches(count: int = 2) -> list[Batch]:
    """Rows of two documents each; the last has padding."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        tokens = rng.integers(0, VOCAB, (ROWS, LENGTH + 1)).astype(np.int32)
        segments = np.tile(np.repeat([0, 1], LENGTH // 2), (ROWS, 1)).astype(np.int32)
        positions = np.tile(np.arange(LENGTH // 2), (ROWS, 2)).astype(np.int32)
        mask = np.ones((ROWS, LENGTH), np.float32)
        positions[-1, -8:], mask[-1, -8:] = -1, 0
        found.append(Batch(tokens[:, :-1], tokens[:, 1:], mask, positions, segments))
    return found


def step_of(config: Config, mesh: Any, **options: Any) -> Any:
    loss = language_loss(config, head=Head(16, config.final_softcap, 1e-4), dtype=jnp.float32)
    return make_step(loss, RULE, mesh=mesh, **options)


def state_of(config: Config, mesh: Any, *, unstacked: bool = False) -> Any:
    params = init(config, jax.random.key(0))
    state = init_state(unstack(params) if unstacked else params, RULE, jax.random.key(0))
    return state if mesh is None else jax.device_put(state, state_shardings(state, mesh))


def run(config: Config, mesh: Any = None, *, unstacked: bool = False, **options: Any) -> list[list[float]]:
    """Losses and gradients' lengths of some steps."""
    step, state, found = step_of(config, mesh, **options), state_of(config, mesh, unstacked=unstacked), []
    for batch in batches():
        with using(mesh):
            given = batch if mesh is None else jax.device_put(batch, rows_sharding(mesh, ROWS))
            state, means = step(state, given)
        found.append([float(means["loss"]), float(means["gradient_norm"])])
    return found


@pytest.fixture(scope="module")
def alone() -> dict[Config, list[list[float]]]:
    """What one device comes to."""
    return {config: run(config) for config in (MANY, HEADS)}


@pytest.mark.parametrize(
    ("config", "sizes", "options"),
    [
        (MANY, {"data": 8, "fold": 2}, {}),
        (MANY, {"slices": 2, "data": 2, "model": 2}, {"accumulate": 2}),
        (MANY, {"slices": 2, "data": 4, "fold": 2}, {"unstacked": True}),
        (HEADS, {"data": 2, "model": 4}, {"unstacked": True}),
        (HEADS, {"slices": 2, "data": 1, "model": 4}, {}),
    ],
)
def test_a_step_on_a_mesh_is_the_step_on_one_device(
    alone: dict[Config, Any], config: Config, sizes: dict[str, int], options: dict[str, Any]
) -> None:
    found = run(config, make_mesh(**sizes), **options)
    np.testing.assert_allclose(found, alone[config], rtol=0, atol=1e-5)


def test_a_run_can_change_its_mesh(alone: dict[Config, Any]) -> None:
    state, found = state_of(HEADS, None), []
    for batch, sizes in zip(batches(), ({"data": 8}, {"data": 4, "model": 2}), strict=True):
        mesh = make_mesh(**sizes)
        state = jax.device_put(state, state_shardings(state, mesh))
        with using(mesh):
            state, means = step_of(HEADS, mesh)(state, jax.device_put(batch, rows_sharding(mesh, ROWS)))
        found.append([float(means["loss"]), float(means["gradient_norm"])])
    np.testing.assert_allclose(found, alone[HEADS], rtol=0, atol=1e-5)


# ---- What a program sends ----


@pytest.fixture(
    scope="module",
    params=[{"slices": 2, "data": 2, "model": 2}, {"slices": 2, "data": 4, "fold": 2}],
    ids=["model", "fold"],
)
def compiled(request: pytest.FixtureRequest) -> Any:
    """A program over slices, its mesh, and the state it was compiled for."""
    mesh = make_mesh(**request.param)
    state = state_of(MANY, mesh)
    with using(mesh):
        given = jax.device_put(batches(1)[0], rows_sharding(mesh, ROWS))
        program = step_of(MANY, mesh).lower(state, given).compile()
    return read_program(program.as_text()), dict(mesh.shape), state


def test_nobody_gathers_the_embedding_or_the_logits(compiled: Any) -> None:
    program, _, state = compiled
    whole = VOCAB * MANY.embed_dim
    made = [shape for _, shape in shapes_of(program, "all-gather", "all-reduce", "all-to-all")]
    assert made
    assert not [shape.dims for shape in made if shape.elements >= whole and VOCAB in shape.dims]
    logits = [
        s.dims for _, s in shapes_of(program) if VOCAB in s.dims and s.elements >= ROWS // 2 * LENGTH * VOCAB // 2
    ]
    assert not logits
    assert state.params["embed"].sharding.shard_shape((VOCAB, MANY.embed_dim))[1] < MANY.embed_dim


def test_slices_meet_once_for_the_gradients(compiled: Any) -> None:
    program, mesh, state = compiled
    crossing = [one for one in collectives(program, mesh) if one.crosses_slices]
    assert {one.kind for one in crossing} == {"all-reduce"}
    assert all(one.times == 1 for one in crossing)  # in no loop: not by layer, nor by part
    mine = sum(4 * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(state.params))
    sent = sum(one.times * one.operand_bytes for one in crossing)
    assert mine <= sent <= 1.02 * mine + 256


def test_no_scores_of_all_positions_are_made(compiled: Any) -> None:
    program, _, _ = compiled
    square = [
        s.dims for _, s in shapes_of(program) if len(s.dims) >= 2 and s.dims[-2] % LENGTH == 0 and s.dims[-1] == LENGTH
    ]
    assert not square


def test_the_optimizer_keeps_its_part(compiled: Any) -> None:
    _, mesh, state = compiled
    parts = mesh["data"] * mesh["fold"] * mesh["model"]
    for moment in (state.opt_state[1][0].mu, state.opt_state[1][0].nu):
        for name, array in moment.items():
            mine = math.prod(array.sharding.shard_shape(array.shape))
            if name in ("embed", "mlp.gate", "mlp.up", "mlp.down", "attn.q", "attn.o"):
                assert mine * parts == array.size, name
            elif array.ndim > 2:
                assert mine < array.size, name


# ---- Parts ----


@pytest.mark.parametrize("sizes", [{"data": 4, "model": 2}, {"data": 8, "fold": 2}, {"model": 8}])
def test_lookups_are_the_tables_rows_and_so_are_their_gradients(sizes: dict[str, int]) -> None:
    table = jax.random.normal(jax.random.key(0), (96, 32))
    ids = jax.random.randint(jax.random.key(1), (8, 16), 0, 96)
    pull = jax.random.normal(jax.random.key(2), (8, 16, 32))
    with using(make_mesh(**sizes)):
        found, back = jax.jit(lambda t: jax.vjp(lambda t: look_up(ids, t, jnp.float32), t))(table)
        gradient = jax.jit(lambda t: jax.grad(lambda t: (look_up(ids, t, jnp.float32) * pull).sum())(t))(table)
    np.testing.assert_array_equal(found, table[ids])
    np.testing.assert_allclose(gradient, jnp.zeros_like(table).at[ids].add(pull), atol=1e-5)
    assert back is not None


def test_heads_that_are_too_few_are_repeated() -> None:
    q = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
    k, v = (jax.random.normal(jax.random.key(i), (2, 8, 2, 4)) for i in (1, 2))

    def local(q: Any, k: Any, v: Any) -> Any:
        """Attention without a softmax, by groups."""
        group = q.shape[2] // k.shape[2]
        return jnp.einsum("btnh,bsnh,bsnd->btnd", q, jnp.repeat(k, group, 2), jnp.repeat(v, group, 2))

    with using(make_mesh(data=2, model=4)):
        found = jax.jit(lambda *x: by_heads(local, *x))(q, k, v)
    np.testing.assert_allclose(found, local(q, k, v), rtol=1e-4, atol=1e-4)
    assert found.sharding.is_equivalent_to(
        NamedSharding(make_mesh(data=2, model=4), PartitionSpec("data", None, "model")), 4
    )


def test_without_a_mesh_nothing_is_moved() -> None:
    x = jnp.ones((2, 4, 8))
    assert spread(x, "btd") is x
    table = jnp.arange(12.0).reshape(4, 3)
    np.testing.assert_array_equal(lookup(jnp.array([[1, 2]]), table, jnp.float32), table[jnp.array([[1, 2]])])


def test_rows_that_do_not_divide_are_refused_with_a_number_that_does() -> None:
    with pytest.raises(GemmaryError, match="8 would"):
        rows_sharding(make_mesh(data=8), 12)
