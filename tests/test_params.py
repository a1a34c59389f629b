"""The table against published facts, and what derives from it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec
from models import run, small

from gemmary.config import Config
from gemmary.errors import GemmaryError
from gemmary.mesh import make_mesh
from gemmary.params import TABLE, abstract, count, init, shape_of, shardings, stack, table, unstack
from gemmary.presets import PRESETS, preset

# (embedding, non-embedding) as printed in the sources: Gemma report table 2, Gemma 2 report table 2.
EXACT = {
    "gemma-2b": (524_550_144, 1_981_884_416),
    "gemma-7b": (786_825_216, 7_751_248_896),
    "gemma2-2b": (590_118_912, 2_024_517_888),
    "gemma2-9b": (917_962_752, 8_324_201_984),
    "gemma2-27b": (1_180_237_824, 26_047_480_320),
}
# In millions, as printed: Gemma 3 report table 1 (its embedding column also counts the vision projection from 4B on) and
# the announcement of the 270M.
ROUNDED = {
    "gemma3-270m": (170, 100),
    "gemma3-1b": (302, 698),
    "gemma3-4b": (675, 3209),
    "gemma3-12b": (1012, 10759),
    "gemma3-27b": (1416, 25600),
}


@pytest.mark.parametrize("name", EXACT)
def test_counts_are_the_published_ones(name: str) -> None:
    assert tuple(count(PRESETS[name].config)) == EXACT[name]
    assert (PRESETS[name].embedding, PRESETS[name].non_embedding) == EXACT[name]


@pytest.mark.parametrize("name", ROUNDED)
def test_counts_round_to_the_published_ones(name: str) -> None:
    embedding, rest = ROUNDED[name]
    counts = count(PRESETS[name].config)
    assert counts.non_embedding == pytest.approx(rest * 1e6, abs=1e6)
    assert counts.embedding == pytest.approx(embedding * 1e6, rel=0.015)
    assert (PRESETS[name].embedding, PRESETS[name].non_embedding) == (embedding * 10**6, rest * 10**6)


def test_both_vocabularies_of_gemma_1() -> None:
    assert count(PRESETS["gemma-2b-256000"].config).embedding == 256000 * 2048
    assert PRESETS["gemma-7b-256000"].config.vocab_size == 256000
    assert PRESETS["gemma-2b"].config.num_tokens == 256000


@pytest.mark.parametrize(
    ("name", "local"), [("gemma2-2b", [0, 2, 4]), ("gemma3-1b", [0, 1, 2, 3, 4, 6]), ("gemma-2b", [])]
)
def test_which_layers_slide(name: str, local: list[int]) -> None:
    kinds = PRESETS[name].config.layer_kinds()
    assert [i for i in range(7) if kinds[i].window is not None][: len(local)] == local


def test_rope_of_gemma_3() -> None:
    for name, factor in [("gemma3-270m", 1.0), ("gemma3-1b", 1.0), ("gemma3-4b", 8.0), ("gemma3-27b", 8.0)]:
        kinds = PRESETS[name].config.layer_kinds()
        assert (kinds[0].rope_base, kinds[0].rope_factor) == (1e4, 1.0)
        assert (kinds[5].rope_base, kinds[5].rope_factor) == (1e6, factor)


def test_an_unknown_preset_names_its_neighbours() -> None:
    with pytest.raises(GemmaryError, match="gemma-2b"):
        preset("gema-2b")


@pytest.mark.parametrize(
    "change",
    [
        {"num_kv_heads": 3},
        {"head_dim": 7},
        {"num_tokens": 5000},
        {"window_pattern": (True,)},
        {"embed_dim": 0},
        {"embed_dim": 1 << 40},
        {"query_scale": float("nan")},
        {"norm_eps": -1.0},
        {"num_layers": True},
    ],
)
def test_a_config_that_contradicts_itself_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(GemmaryError, match="config: "):
        PRESETS["nano"].config.replace(**change)


def test_initial_values_follow_the_fan_in() -> None:
    config = PRESETS["nano"].config
    params = init(config, jax.random.key(0))
    assert set(params) == set(table(config))
    for name, spec in table(config).items():
        assert params[name].shape == shape_of(config, spec)
        fan_in = np.prod([params[name].shape[axis] for axis in spec.read_axes()]) if spec.reads else 0
        assert float(params[name].std()) == pytest.approx(fan_in**-0.5 if fan_in else 0, rel=0.02)


def test_stacking_goes_there_and_back() -> None:
    params = small("gemma3")[3]
    again = unstack(stack(params))
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True))


def _spread(config: Config, data: int, model: int) -> dict[str, PartitionSpec]:
    mesh = AbstractMesh((data, model), ("data", "model"))
    return {name: sharding.spec for name, sharding in shardings(config, mesh).items()}


def test_storage_on_a_pod() -> None:
    spread = _spread(PRESETS["gemma-7b"].config, 16, 16)
    assert spread["embed"] == PartitionSpec("model", "data")
    assert spread["attn.q"] == PartitionSpec(None, "data", "model", None)
    assert spread["mlp.down"] == PartitionSpec(None, "model", "data")
    assert spread["pre_attn_norm"] == spread["final_norm"] == PartitionSpec()
    # One key/value head divides over nothing: it is replicated over `model`.
    assert _spread(PRESETS["gemma-2b"].config, 16, 16)["attn.k"] == PartitionSpec(None, "data", None, None)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_place_on_every_mesh(name: str) -> None:
    config = PRESETS[name].config
    for data, model in [(1, 1), (256, 1), (16, 16), (1, 3)]:
        mesh = AbstractMesh((data, model), ("data", "model"))
        for value in abstract(config, jnp.bfloat16, mesh).values():
            shard = value.sharding.shard_shape(value.shape)  # raises where an axis does not divide
            assert len(shard) == len(value.shape)


def test_sharded_parameters_give_the_same_logits() -> None:
    config = PRESETS["nano"].config.replace(num_layers=2)
    params = init(config, jax.random.key(0))
    ids = jnp.arange(24)[None]
    alone = run(params, config, ids)
    placed = jax.device_put(params, shardings(config, make_mesh(data=4, model=2)))
    assert len(placed["mlp.gate"].sharding.device_set) == 8
    np.testing.assert_allclose(run(placed, config, ids), alone, atol=2e-5)


def test_a_mesh_larger_than_the_machine_is_refused() -> None:
    with pytest.raises(GemmaryError, match="needs 128 devices"):
        make_mesh(data=64, model=2)


def test_norms_and_the_score_alone_read_nothing() -> None:
    reads_nothing = {name for name, spec in TABLE.items() if not spec.reads}
    assert reads_nothing == {n for n in TABLE if n.endswith("norm")} | {"score"}
