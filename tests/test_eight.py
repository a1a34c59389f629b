"""Training's products in eight bits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sharded import HEADS, RULE, batches, state_of

from gemmary.eight import Eight, eight_bit_product
from gemmary.mesh import make_mesh, rows_sharding, using
from gemmary.train.head import Head
from gemmary.train.objectives import language_loss
from gemmary.train.step import make_step
from gemmary.weights import project


@pytest.mark.parametrize(
    ("equation", "x", "w"), [("btd,dnh->btnh", (2, 5, 64), (64, 3, 8)), ("btnh,nhd->btd", (2, 5, 3, 16), (3, 16, 40))]
)
def test_the_product_and_its_gradients_are_near(equation: str, x: tuple[int, ...], w: tuple[int, ...]) -> None:
    a, b = jax.random.normal(jax.random.key(0), x), jax.random.normal(jax.random.key(1), w)
    exact, back = jax.vjp(lambda a, b: jnp.einsum(equation, a, b), a, b)
    found, near = jax.vjp(lambda a, b: eight_bit_product(equation, a, b, jnp.float32), a, b)
    pull = jax.random.normal(jax.random.key(2), exact.shape)
    for mine, true in zip((found, *near(pull)), (exact, *back(pull)), strict=True):
        error = float(jnp.abs(mine - true).max() / jnp.abs(true).max())
        assert error < 0.02
    assert float(jnp.abs(found - exact).max()) > 0  # it is in eight bits
    np.testing.assert_allclose(near(pull)[1], back(pull)[1], rtol=1e-5, atol=1e-5)  # and the weight's gradient is not


def test_whole_numbers_are_exact() -> None:
    x = jnp.array([[[127.0, -3.0, 5.0, 0.0]]])
    w = jnp.array([[1.0, 127.0], [2.0, 0.0], [-127.0, 4.0], [9.0, 1.0]])
    np.testing.assert_allclose(project("btd,df->btf", x, Eight(w)), x @ w, rtol=1e-6)


def test_a_model_learns_as_well_on_a_mesh() -> None:
    found = {}
    for int8, mesh in ((False, None), (True, None), (True, make_mesh(data=2, model=4))):
        step = make_step(language_loss(HEADS, head=Head(16), int8=int8), RULE, mesh=mesh)
        state, losses = state_of(HEADS, mesh), []
        batch = batches(1)[0]
        with using(mesh):
            given = batch if mesh is None else jax.device_put(batch, rows_sharding(mesh, 8))
            for _ in range(6):
                state, means = step(state, given)
                losses.append(float(means["loss"]))
        found[int8, mesh is None] = losses
    exact, here, there = found[False, True], found[True, True], found[True, False]
    np.testing.assert_allclose(here, exact, atol=0.1)
    np.testing.assert_allclose(there, here, atol=0.02)
    assert here[-1] < here[0] - 0.5
