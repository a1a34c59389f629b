"""The transformer against the float64 oracle, and its paths against one another (the numerics contract)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from models import run, small, step, tokens

from gemmary.config import Config
from gemmary.errors import GemmaryError
from gemmary.model import attention
from gemmary.model.attention import Marks, attend, attend_directly, attend_in_blocks, attend_to_diagonal
from gemmary.model.cache import init_cache
from gemmary.model.rope import rotate, timescales, turn
from gemmary.model.transformer import Remat, embed, forward, hidden, rms_norm
from gemmary.params import Params, abstract, init, stack
from gemmary.presets import PRESETS

WINDOW = 8


@pytest.mark.parametrize("kind", oracle.KINDS)
def test_scanned_logits_equal_the_oracle(kind: str) -> None:
    spec, weights, config, params = small(kind)
    stacked = stack(params)
    for length in oracle.lengths(WINDOW):
        ids = tokens(length, spec.vocab)
        ours = run(stacked, config, jnp.asarray(ids)[None])[0]
        np.testing.assert_allclose(ours, oracle.logits(spec, weights, list(ids)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", oracle.KINDS)
def test_unrolled_logits_equal_the_oracle(kind: str) -> None:
    spec, weights, config, params = small(kind)
    ids = tokens(3 * WINDOW + 17, spec.vocab)
    ours = run(params, config, jnp.asarray(ids)[None])[0]
    np.testing.assert_allclose(ours, oracle.logits(spec, weights, list(ids)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", oracle.KINDS)
def test_bfloat16_stays_close_to_the_oracle(kind: str) -> None:
    spec, weights, config, params = small(kind)
    # The weights are what bf16 can hold, and of a trained model's scale, so that only activations round.
    weights = {n: np.asarray(jnp.asarray(w * 0.3, jnp.bfloat16).astype(jnp.float32)) for n, w in weights.items()}
    params = jax.tree.map(lambda w: (w * 0.3).astype(jnp.bfloat16), params)
    spec = oracle.Spec(**{**vars(spec), "embed_factor": lambda x: float(jnp.asarray(x, jnp.bfloat16))})
    ids = tokens(3 * WINDOW + 17, spec.vocab)
    ours = jax.nn.log_softmax(run(stack(params), config, jnp.asarray(ids)[None], dtype=jnp.bfloat16)[0])
    reference = jax.nn.log_softmax(jnp.asarray(oracle.logits(spec, weights, list(ids))))
    divergence = (jnp.exp(reference) * (reference - ours)).sum(axis=-1)
    assert float(divergence.mean()) < 1e-3


@pytest.mark.parametrize("kind", oracle.KINDS)
def test_packed_documents_are_as_if_alone(kind: str) -> None:
    spec, weights, config, params = small(kind)
    sizes = [9, 1, 30]
    ids = tokens(sum(sizes), spec.vocab)
    positions = np.concatenate([np.arange(size) for size in sizes])
    segments = np.repeat(np.arange(len(sizes)), sizes)
    marks = Marks(jnp.asarray(positions)[None], jnp.asarray(segments)[None])
    packed = run(stack(params), config, jnp.asarray(ids)[None], marks)[0]
    start = 0
    for size in sizes:
        alone = oracle.logits(spec, weights, list(ids[start : start + size]))
        np.testing.assert_allclose(packed[start : start + size], alone, atol=1e-4, rtol=0)
        start += size


def _through_cache(params: Params, config: Config, ids: np.ndarray, chunk: int) -> np.ndarray:
    cache, out = init_cache(config, 1, 128, chunk, jnp.float32), []
    for start in range(0, len(ids), chunk):
        places = np.arange(start, start + chunk)
        piece = np.where(places < len(ids), np.resize(ids[start : start + chunk], chunk), 0)
        marks = Marks(jnp.asarray(np.where(places < len(ids), places, -1))[None])  # the last chunk ends in padding
        found, cache = step(params, config, jnp.asarray(piece)[None], marks, cache)
        out.append(np.asarray(found)[0])
    return np.concatenate(out)[: len(ids)]


@pytest.mark.parametrize("chunk", range(1, 2 * WINDOW + 1))
@pytest.mark.parametrize("kind", ["gemma2", "gemma3"])
def test_chunks_through_a_ring_equal_the_full_pass(kind: str, chunk: int) -> None:
    spec, weights, config, params = small(kind)
    ids = tokens(4 * WINDOW + 9, spec.vocab)  # the ring has wrapped several times
    cached = _through_cache(params, config, ids, chunk)
    full = oracle.logits(spec, weights, list(ids))
    np.testing.assert_allclose(cached, full, atol=1e-4, rtol=0)
    np.testing.assert_array_equal(cached.argmax(axis=-1), full.argmax(axis=-1))


@pytest.mark.parametrize("kind", ["gemma1-mqa", "gemma1-mha"])
def test_decoding_through_a_cache_equals_the_full_pass(kind: str) -> None:
    spec, weights, config, params = small(kind)
    ids = tokens(41, spec.vocab)
    full = oracle.logits(spec, weights, list(ids))
    np.testing.assert_allclose(_through_cache(params, config, ids, 1), full, atol=1e-4, rtol=0)


def test_a_windowed_layer_keeps_a_ring_and_not_the_context() -> None:
    config = small("gemma2")[2]
    slots = [layer.k.shape[2] for layer in init_cache(config, 1, 1000, 4, jnp.float32)]
    assert slots == [WINDOW + 4 - 1, 1000, WINDOW + 4 - 1, 1000]


def test_padding_is_not_written_and_sees_nothing() -> None:
    _, _, config, params = small("gemma2")
    cache = init_cache(config, 1, 16, 4, jnp.float32)
    ids = jnp.asarray([[3, 5, 7, 9]])
    x, padded = step(params, config, ids, Marks(jnp.asarray([[0, 1, -1, -1]])), cache)
    assert padded is not None
    assert sorted(np.asarray(padded[1].positions)[0])[-2:] == [0, 1]
    assert np.isfinite(np.asarray(x)).all()


@pytest.mark.parametrize("window", [None, WINDOW, 1])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("segments", ["one", "many", "tree"])
def test_attention_paths_agree(window: int | None, softcap: float | None, segments: str) -> None:
    length = 3 * WINDOW + 17
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (2, 2, 3, length, 10))
    k, v = (jax.random.normal(key, (2, 2, length, 10)) for key in keys[1:])
    places = jnp.broadcast_to(jnp.arange(length), (2, length))
    # In the tree every other stretch is seen by the one after it, and the first by all.
    ends = jnp.where(places < 23, length, places // 23 + 1 + (places // 23) % 2)
    marks = Marks(places, None if segments == "one" else places // 23, ends if segments == "tree" else None)
    direct = attend_directly(q, k, v, marks, marks, window=window, softcap=softcap)
    for sizes in ((8, 4), (4, 16), (64, 64)):
        blocks = attend_in_blocks(
            q, k, v, marks, marks, window=window, softcap=softcap, block_queries=sizes[0], block_keys=sizes[1]
        )
        np.testing.assert_allclose(blocks, direct, atol=2e-6)
    # Each block is a shape of its own to compile: a block a token, only where a window ends and two stretches meet.
    for block, some in ((1, slice(17, 29)), (16, slice(0, length)), (64, slice(0, length))):
        marked, wanted = jax.tree.map(lambda x, some=some: x[:, some], marks), direct
        if block == 1:
            wanted = attend_directly(
                q[..., some, :], k[:, :, some], v[:, :, some], marked, marked, window=window, softcap=softcap
            )
        flat = q[..., some, :].transpose(0, 3, 1, 2, 4).reshape(2, -1, 6, 10)
        among = attend_to_diagonal(
            flat, k[:, :, some], v[:, :, some], marked, window=window, softcap=softcap, block=block
        )
        among = among.reshape(2, -1, 2, 3, 10).transpose(0, 2, 3, 1, 4)
        np.testing.assert_allclose(among, wanted, atol=2e-6)


def test_every_path_of_attention_has_the_same_gradient() -> None:
    length = 41
    keys = jax.random.split(jax.random.key(1), 3)
    q = jax.random.normal(keys[0], (1, 1, 3, length, 6))
    k, v = (jax.random.normal(key, (1, 1, length, 6)) for key in keys[1:])
    marks = Marks(jnp.arange(length)[None])

    def loss(path: object, **sizes: int) -> object:
        def of(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return (path(q, k, v, marks, marks, window=WINDOW, softcap=5.0, **sizes) ** 2).sum()  # type: ignore[operator]

        return jax.grad(of, argnums=(0, 1, 2))(q, k, v)

    def among(q: jax.Array, k: jax.Array, v: jax.Array, query: Marks, _: Marks, **how: Any) -> jax.Array:
        return attend_to_diagonal(q[:, 0].swapaxes(1, 2), k, v, query, block=8, **how).swapaxes(1, 2)[:, None]

    direct = loss(attend_directly)
    for other in (loss(attend_in_blocks, block_queries=8, block_keys=16), loss(among)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), direct, other)


def test_query_heads_read_the_kv_head_of_their_group() -> None:
    q = jnp.zeros((1, 1, 6, 4))
    k = jnp.zeros((1, 3, 1, 4))
    v = jnp.arange(3.0)[None, :, None, None] * jnp.ones((1, 3, 1, 4))
    marks = Marks(jnp.zeros((1, 1), int))
    out = attend(q, k, v, marks, marks, window=None, softcap=None)
    np.testing.assert_array_equal(out[0, 0, :, 0], [0, 0, 1, 1, 2, 2])


def test_a_row_that_sees_nothing_is_no_nan() -> None:
    q, k = jnp.ones((1, 1, 1, 1, 4)), jnp.ones((1, 1, 3, 4))
    nothing, empty = Marks(jnp.asarray([[-1]])), Marks(jnp.full((1, 3), -1))
    for path in (attend_directly, attend_in_blocks):
        assert np.isfinite(np.asarray(path(q, k, k, nothing, empty, window=None, softcap=None))).all()


@pytest.mark.parametrize("position", [0, 2047, 4095, 8191, 131071])
@pytest.mark.parametrize(("base", "factor"), [(1e4, 1.0), (1e6, 8.0)])
def test_rope_at_far_positions(position: int, base: float, factor: float) -> None:
    x = jax.random.normal(jax.random.key(0), (1, 1, 1, 256))
    ours = rotate(x, turn(jnp.asarray([[position]]), timescales(256, base, factor)))
    reference = oracle.turn(np.asarray(x[0], np.float64), np.array([position]), base, factor)
    # An fp32 angle near 131071 is good to 2^-8: that is the format's limit, and the same in every implementation.
    np.testing.assert_allclose(ours[0], reference, atol=1e-6 + position * 2.0**-23)


def test_bf16_rope_tells_neighbouring_far_positions_apart() -> None:
    x = jnp.ones((1, 2, 1, 256), jnp.bfloat16)
    out = rotate(x, turn(jnp.asarray([[8190, 8191]]), timescales(256, 1e4)))
    assert not np.array_equal(out[0, 0], out[0, 1])


@pytest.mark.parametrize(("preset", "factor"), [("gemma-2b", 45.25), ("gemma-7b", 55.5)])
def test_the_embedding_factor_is_rounded_to_the_activations(preset: str, factor: float) -> None:
    config = PRESETS[preset].config.replace(vocab_size=3, num_tokens=3)
    params = {"embed": jnp.ones((3, config.embed_dim), jnp.bfloat16)}
    assert float(embed(params, config, jnp.asarray([[1]]), jnp.bfloat16)[0, 0, 0]) == factor


def test_norms_add_one_in_fp32() -> None:
    x, w = jnp.ones((1, 4), jnp.bfloat16) * 3, jnp.full(4, 1e-3, jnp.bfloat16)
    exact = 1 + float(w[0])
    assert float(rms_norm(x.astype(jnp.float32), w, 1e-6)[0, 0]) == pytest.approx(exact, abs=1e-6)
    assert rms_norm(x, w, 1e-6).dtype == jnp.bfloat16


def test_float16_activations_are_refused() -> None:
    _, _, config, params = small("gemma1-mqa")
    with pytest.raises(GemmaryError, match="float16"):
        forward(params, config, jnp.zeros((1, 2), int), dtype=jnp.float16)


def test_long_context_needs_no_square_buffer() -> None:
    """8192 tokens through a 2B-shaped layer: at most 2 GB beyond its weights."""
    config = PRESETS["gemma-2b"].config.replace(num_layers=1, vocab_size=256, num_tokens=256)
    lowered = jax.jit(lambda p, t: hidden(p, config, t)[0]).lower(
        abstract(config), jax.ShapeDtypeStruct((1, 8192), jnp.int32)
    )
    assert "8192x8192" not in lowered.as_text()
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 2e9


def test_short_prompts_take_the_direct_path_and_long_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for name in ("attend_directly", "attend_in_blocks"):
        path = getattr(attention, name)
        monkeypatch.setattr(
            attention, name, lambda *args, path=path, name=name, **more: (taken.append(name), path(*args, **more))[1]
        )
    for length in (16, 1024):
        q, k = jnp.zeros((1, length, 1, 2)), jnp.zeros((1, 1, length, 2))
        marks = Marks(jnp.arange(length)[None])
        attend(q, k, k, marks, marks, window=None, softcap=None)
    assert taken == ["attend_directly", "attend_in_blocks"]


@pytest.mark.parametrize("form", [stack, lambda params: params])
def test_what_a_backward_pass_makes_again_changes_no_gradient(form: Any) -> None:
    spec, _, config, params = small("gemma2")
    ids = jnp.asarray(tokens(24, spec.vocab))[None]
    programs: dict[str, str] = {}

    def gradient(remat: Remat) -> Params:
        def loss(params: Params) -> jax.Array:
            return (hidden(params, config, ids, remat=remat)[0] ** 2).mean()

        jaxpr = str(jax.make_jaxpr(jax.grad(loss))(form(params)))
        programs[remat] = jaxpr
        return jax.jit(jax.grad(loss))(form(params))

    kept = gradient("none")
    for remat in ("dots", "layers"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), kept, gradient(remat))
    assert len(set(programs.values())) == 3  # and each is another program


def test_initial_activations_and_logits_are_near_one() -> None:
    config = PRESETS["nano"].config
    out = run(init(config, jax.random.key(0)), config, jnp.arange(32)[None])
    assert 0.5 < float(out.std()) < 2
