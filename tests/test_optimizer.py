"""Update rules and schedules: numbers worked out by hand, and which parameters are treated how."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemmary.errors import GemmaryError
from gemmary.params import Params, init, table, unstack
from gemmary.presets import nano
from gemmary.train.optimizer import OptimizerSettings, learning_rate, optimizer

CONFIG = nano(2, 64, 3).replace(embed_dim=48)  # no two sides alike


def rates(settings: OptimizerSettings, steps: int) -> list[float]:
    shape = learning_rate(settings, steps)
    return [float(shape(i)) for i in range(steps)]


def test_cosine_goes_up_a_line_and_down_a_cosine() -> None:
    found = rates(OptimizerSettings(warmup=0.1, final=0.2), 110)
    assert found[:11] == pytest.approx([i / 11 for i in range(1, 12)])
    middle = 11 + 99 // 2
    assert found[middle] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + np.cos(np.pi * (middle - 11) / 99)), abs=1e-6)
    assert found[-1] == pytest.approx(0.2, abs=1e-3)


def test_constant_stays_and_then_falls_a_line() -> None:
    found = rates(OptimizerSettings(schedule="constant", warmup=0.0, decay=0.25, final=0.0), 100)
    assert found[:75] == [1.0] * 75
    assert found[75:] == pytest.approx([1 - i / 25 for i in range(25)])


def _updates(settings: OptimizerSettings, params: Params, grads: Params) -> Params:
    rule = optimizer(settings, 10)
    updates: Params = rule.update(grads, rule.init(params), params)[0]
    return updates


@pytest.mark.parametrize("form", [unstack, lambda params: params])
def test_adamw_decays_matrices_and_not_norms(form: object) -> None:
    params: Params = form(jax.tree.map(lambda w: w + 1, init(CONFIG, jax.random.key(0))))  # type: ignore[operator]
    settings = OptimizerSettings(learning_rate=0.5, warmup=0.0, weight_decay=0.1, clip=0.0)
    still = _updates(settings, params, jax.tree.map(jnp.zeros_like, params))
    for name, spec in table(CONFIG).items():
        for update, weight in zip(jax.tree.leaves(still[name]), jax.tree.leaves(params[name]), strict=True):
            np.testing.assert_allclose(update, -0.5 * 0.1 * weight if spec.reads else 0 * weight, rtol=1e-6)


@pytest.mark.parametrize("form", [unstack, lambda params: params])
def test_muon_makes_layers_matrices_orthogonal_and_leaves_the_rest_to_adam(form: object) -> None:
    params: Params = form(init(CONFIG, jax.random.key(0)))  # type: ignore[operator]
    grads = jax.tree.map(lambda w: jax.random.normal(jax.random.key(w.size), w.shape), params)
    settings = OptimizerSettings(
        kind="muon", learning_rate=0.5, matrix_learning_rate=0.01, warmup=0.0, weight_decay=0.0, clip=0.0
    )
    updates = _updates(settings, params, grads)
    # Adam's first step is the gradient's sign; with Nesterov's momentum times (0.9 x 0.1 / (1 - 0.9²) + 1).
    for name in ("embed", "final_norm"):
        np.testing.assert_allclose(updates[name], -0.736842 * jnp.sign(grads[name]), rtol=1e-3)
    matrix = jax.tree.leaves(updates["attn.o"])[0]
    matrix = matrix[0] if matrix.ndim == 4 else matrix
    matrix = matrix.reshape(-1, CONFIG.embed_dim)  # [N * H, D]
    singular = np.linalg.svd(matrix, compute_uv=False) / (0.01 * 0.2 * max(matrix.shape) ** 0.5)
    assert singular.min() > 0.5  # five Newton-Schulz steps bring every singular value between 0.7 and 1.2 or so
    assert singular.max() < 1.4


def test_a_long_gradient_is_shortened() -> None:
    params = {"final_norm": jnp.zeros(4)}
    long = {"final_norm": jnp.array([300.0, 400.0, 0.0, 0.0])}
    rule = optimizer(OptimizerSettings(clip=1.0), 10)
    state = rule.update(long, rule.init(params), params)[1]
    first_moment = next(leaf for leaf in jax.tree.leaves(state) if leaf.shape == (4,))
    np.testing.assert_allclose(first_moment, 0.1 * long["final_norm"] / 500, rtol=1e-5)


@pytest.mark.parametrize("wrong", [{"learning_rate": -1.0}, {"beta2": 1.5}, {"warmup": 2.0}, {"clip": -0.1}])
def test_what_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(GemmaryError, match=next(iter(wrong))):
        OptimizerSettings(**wrong)  # type: ignore[arg-type]
