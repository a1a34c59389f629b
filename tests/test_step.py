"""A training step: the mean over the whole batch, equal in any number of parts, on any mesh, and pinned to numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gemmary.adapters import adapt, join, split
from gemmary.config import Config
from gemmary.data.packing import Batch
from gemmary.errors import GemmaryError
from gemmary.mesh import make_mesh
from gemmary.model.attention import Marks
from gemmary.model.transformer import forward
from gemmary.params import Params, init, shardings, unstack
from gemmary.presets import nano
from gemmary.quantization import quantize
from gemmary.train.head import Head
from gemmary.train.objectives import language_loss
from gemmary.train.optimizer import OptimizerSettings, optimizer
from gemmary.train.step import TrainState, init_state, make_step
from gemmary.weights import LoRA

CONFIG = nano(2, 96, 3).replace(embed_dim=64)
B, T = 8, 24


def batch(seed: int = 0) -> Batch:
    """Two packed documents a row, the second's length and the masked targets differing from row to row."""
    rng = np.random.default_rng(seed)
    cut = rng.integers(4, T - 4, B)
    place = np.arange(T)
    second = place >= cut[:, None]
    return Batch(
        tokens=rng.integers(0, 96, (B, T)).astype(np.int32),
        targets=rng.integers(0, 96, (B, T)).astype(np.int32),
        mask=(rng.random((B, T)) < np.linspace(0.2, 1, B)[:, None]).astype(np.float32),
        positions=np.where(second, place - cut[:, None], place).astype(np.int32),
        segments=second.astype(np.int32),
    )


def start(config: Config = CONFIG, *, stacked: bool = False, kind: str = "adamw") -> tuple[TrainState, object]:
    params = init(config, jax.random.key(0))
    rule = optimizer(OptimizerSettings(kind=kind, learning_rate=1e-2, warmup=0.0), 20)  # type: ignore[arg-type]
    return init_state(params if stacked else unstack(params), rule, jax.random.key(1)), rule


def stepped(accumulate: int = 1, *, stacked: bool = False) -> tuple[TrainState, dict[str, jax.Array]]:
    state, rule = start(stacked=stacked)
    loss = language_loss(CONFIG, head=Head(8))
    return make_step(loss, rule, accumulate=accumulate)(state, batch())  # type: ignore[arg-type]


def test_the_loss_is_the_mean_over_the_targets_that_count() -> None:
    state, _ = start()
    tokens, targets, mask, positions, segments = map(jnp.asarray, batch())
    scores = jax.nn.log_softmax(forward(state.params, CONFIG, tokens, Marks(positions, segments)))
    wanted = -(mask * jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]).sum() / mask.sum()
    _, means = stepped()
    np.testing.assert_allclose(means["loss"], wanted, rtol=1e-5)
    assert float(means["weight"]) == batch().mask.sum()


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_a_batch_in_parts_gives_the_same_step(parts: int) -> None:
    (whole, means), (split, same) = stepped(), stepped(parts)
    np.testing.assert_allclose(means["loss"], same["loss"], rtol=1e-6)
    np.testing.assert_allclose(means["gradient_norm"], same["gradient_norm"], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(split.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)  # AdamW's first step turns a gradient near 0 into its sign


def test_parts_that_do_not_divide_are_refused() -> None:
    with pytest.raises(GemmaryError, match="8 rows cannot be taken in 3"):
        stepped(3)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_on_a_mesh_is_the_step_on_one_device(kind: str) -> None:
    loss, mesh = language_loss(CONFIG, head=Head(8)), make_mesh(data=4, model=2)
    state, rule = start(stacked=True, kind=kind)
    step = make_step(loss, rule)  # type: ignore[arg-type]
    again, _ = start(stacked=True, kind=kind)  # a step takes its state's memory
    placed = {name: jax.device_put(w, shardings(CONFIG, mesh)[name]) for name, w in again.params.items()}
    spread = init_state(placed, rule, again.rng)  # type: ignore[arg-type]
    rows = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))), batch())
    spread, means = step(spread, rows)
    alone, wanted = step(state, batch())
    np.testing.assert_allclose(means["loss"], wanted["loss"], rtol=1e-5)
    np.testing.assert_allclose(means["gradient_norm"], wanted["gradient_norm"], rtol=1e-4)
    for name in alone.params:
        np.testing.assert_allclose(spread.params[name], alone.params[name], atol=1e-3)


def test_a_step_learns_and_does_not_see_other_documents() -> None:
    state, rule = start(kind="muon")
    step = make_step(language_loss(CONFIG, head=Head(8)), rule)  # type: ignore[arg-type]
    losses = []
    for _ in range(12):
        state, means = step(state, batch())
        losses.append(float(means["loss"]))
    assert losses[-1] < 0.5 * losses[0]
    assert int(state.step) == 12


# --- A part of the model that is learnt, over the rest ----------------------------------------------------------------


def parted(*, bits: int | None = None, also: tuple[str, ...] = ()) -> tuple[TrainState, Params, object]:
    """Adapters of rank 2, no longer zero, to be learnt; the rest of the model; the rule."""
    state, rule = start()
    base = state.params if bits is None else quantize(state.params, bits)
    adapted = adapt(base, jax.random.key(2), 2, targets=["attn.q", "mlp.down"])
    learnt, rest = split(adapted, also)
    learnt = jax.tree.map(lambda x: x + 0.1, learnt)
    return init_state(learnt, rule, jax.random.key(1)), rest, rule  # type: ignore[arg-type]


def parted_step(accumulate: int, **options: object) -> tuple[TrainState, dict[str, jax.Array], Params]:
    state, rest, rule = parted(**options)  # type: ignore[arg-type]
    step = make_step(language_loss(CONFIG, head=Head(8)), rule, accumulate=accumulate)  # type: ignore[arg-type]
    after, means = step(state, batch(), rest)
    return after, means, rest


@pytest.fixture(scope="module")
def whole_step() -> tuple[TrainState, dict[str, jax.Array], Params]:
    return parted_step(1)


def test_only_what_is_learnt_changes(whole_step: tuple[TrainState, dict[str, jax.Array], Params]) -> None:
    after, _, rest = whole_step
    before, untouched, _ = parted()
    assert jax.tree.structure(after.params) == jax.tree.structure(before.params)
    for a, b in zip(jax.tree.leaves(after.params), jax.tree.leaves(before.params), strict=True):
        assert float(jnp.abs(a - b).min()) > 0  # AdamW's first step moves every number
    for a, b in zip(jax.tree.leaves(rest), jax.tree.leaves(untouched), strict=True):
        np.testing.assert_array_equal(a, b)  # nor was its memory taken
    assert isinstance(join(after.params, rest)["attn.q"][0], LoRA)
    learnt = sum(leaf.size for leaf in jax.tree.leaves(before.params))
    assert sum(leaf.size for leaf in jax.tree.leaves(after.opt_state)) <= 2 * learnt + 8


@pytest.mark.parametrize("parts", [2, 4])
def test_adapters_step_the_same_in_parts(
    whole_step: tuple[TrainState, dict[str, jax.Array], Params], parts: int
) -> None:
    (whole, means, _), (cut, same, _) = whole_step, parted_step(parts)
    np.testing.assert_allclose(means["loss"], same["loss"], rtol=1e-6)
    np.testing.assert_allclose(means["gradient_norm"], same["gradient_norm"], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(cut.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_adapters_and_a_norm_are_learnt_over_int8() -> None:
    after, _, rest = parted_step(2, bits=8, also=("final_norm",))
    before, untouched, _ = parted(bits=8, also=("final_norm",))
    assert float(jnp.abs(after.params["final_norm"]).max()) > 0
    assert "final_norm" not in rest
    for a, b in zip(jax.tree.leaves(after.params), jax.tree.leaves(before.params), strict=True):
        assert float(jnp.abs(a - b).max()) > 0
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), rest, untouched))


# Changing these numbers is legitimate where initial values, the loss, the rule or the model's arithmetic are meant to
# change; the commit says which. They are this code's own: what they guard against is a change that nobody meant.
GOLDEN = {"loss": [5.444615, 5.139079, 5.171320], "gradient_norm": [3.155349, 2.852614, 2.842149]}


def test_three_steps_are_pinned() -> None:
    state, rule = start(kind="muon")
    step = make_step(language_loss(CONFIG, head=Head(8)), rule)  # type: ignore[arg-type]
    found: dict[str, list[float]] = {"loss": [], "gradient_norm": []}
    for seed in range(3):
        state, means = step(state, batch(seed))
        for name, values in found.items():
            values.append(float(means[name]))
    for name, values in GOLDEN.items():
        assert found[name] == pytest.approx(values, rel=2e-4), (name, found[name])
