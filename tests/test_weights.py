"""Quantized leaves: what they stand for, and that products and lookups with them say the same."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemmary.errors import GemmaryError
from gemmary.model.transformer import forward
from gemmary.params import TABLE, Params, init, unstack
from gemmary.presets import PRESETS
from gemmary.quantization import packed, quantize, quantize_weight
from gemmary.weights import (
    Blocks,
    Int4,
    Int8,
    dequantize,
    gated,
    lookup,
    project,
    project_all,
    weight_shape,
)

CONFIG = PRESETS["nano"].config.replace(num_layers=2, embed_dim=96, ffw_dim=160, num_heads=6, num_kv_heads=2)
# Each row of the table that is multiplied with: its equation, and the shape of the activations.
PRODUCTS = {
    "attn.q": ("btd,dnh->btnh", (2, 3, 96)),
    "attn.k": ("btd,dkh->btkh", (2, 3, 96)),
    "attn.o": ("btnh,nhd->btd", (2, 3, 6, 64)),
    "mlp.gate": ("btd,df->btf", (2, 3, 96)),
    "mlp.down": ("btf,fd->btd", (2, 3, 160)),
    "embed": ("btd,vd->btv", (2, 3, 96)),
}


@pytest.fixture(scope="module")
def params() -> Params:
    return init(CONFIG, jax.random.key(0))


def _one(params: Params, name: str) -> jax.Array:
    return params[name][0] if TABLE[name].layered else params[name]


def _close(a: Any, b: Any) -> None:
    np.testing.assert_allclose(a, b, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_the_einsum(params: Params, name: str) -> None:
    equation, shape = PRODUCTS[name]
    x, w = jax.random.normal(jax.random.key(1), shape), _one(params, name)
    _close(project(equation, x, w), jnp.einsum(equation, x, w, precision="highest"))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_with_a_quantized_weight_is_that_with_its_array(params: Params, name: str, bits: int) -> None:
    equation, shape = PRODUCTS[name]
    x, w = jax.random.normal(jax.random.key(1), shape), quantize_weight(name, _one(params, name), bits)
    _close(project(equation, x, w), jnp.einsum(equation, x, dequantize(w)))


@pytest.mark.parametrize("name", PRODUCTS)
def test_int8_is_within_half_a_step_per_channel(params: Params, name: str) -> None:
    w = _one(params, name)
    leaf = quantize_weight(name, w, 8)
    assert isinstance(leaf, Int8)
    assert leaf.values.dtype == jnp.int8
    axes = TABLE[name].read_axes()
    assert leaf.scale.shape == tuple(1 if i - w.ndim in axes else n for i, n in enumerate(w.shape))
    assert bool((jnp.abs(dequantize(leaf) - w) <= leaf.scale * 0.5001).all())


@pytest.mark.parametrize("name", PRODUCTS)
def test_int4_is_within_a_step_per_group_of_32(params: Params, name: str) -> None:
    w = _one(params, name)
    leaf = quantize_weight(name, w, 4)
    assert isinstance(leaf, Int4)
    assert leaf.packed.nbytes * 8 == w.size * 4
    assert leaf.scale.size * 32 == w.size
    grouped = jnp.moveaxis(jnp.abs(dequantize(leaf) - w), leaf.axis, -1).reshape(-1, 32)
    scale = jnp.moveaxis(jnp.abs(leaf.scale.astype(jnp.float32)), leaf.axis, -1).reshape(-1)
    # Half a step, or a whole one for a value opposite to the extreme that -8 is kept for; fp16 scales add a little.
    assert bool((grouped.max(axis=1) <= scale * 1.01).all())
    assert float((grouped <= scale[:, None] * 0.51).mean()) > 0.97


def test_int4_packs_as_ggml_does() -> None:
    w = jnp.asarray(np.arange(32, dtype=np.float32) - 16)[:, None]
    leaf = quantize_weight("mlp.gate", w, 4)
    assert float(leaf.scale[0, 0]) == 2.0  # -16 is the extreme, and lands on -8
    assert int(leaf.packed[0, 0]) == 0 | (8 << 4)  # value 0 (-16) low, value 16 (0) high


def test_zeros_stay_zeros() -> None:
    for bits in (4, 8):
        assert not np.asarray(dequantize(quantize_weight("mlp.gate", jnp.zeros((32, 2)), bits))).any()


@pytest.mark.parametrize("bits", [8, 4])
def test_lookup_is_the_row(params: Params, bits: int) -> None:
    leaf = quantize_weight("embed", params["embed"], bits)
    ids = jnp.asarray([[5, 0], [4095, 5]])
    _close(lookup(ids, leaf, jnp.float32), dequantize(leaf)[ids])
    _close(lookup(ids, params["embed"], jnp.float32), params["embed"][ids])


def test_quantizing_a_model_keeps_norms_and_the_embedding_at_eight_bits(params: Params) -> None:
    four = quantize(params, 4)
    assert isinstance(four["embed"], Int8)
    assert isinstance(four["mlp.down"], Int4)
    assert isinstance(four["final_norm"], jax.Array)
    with pytest.raises(GemmaryError, match="not 3"):
        quantize(params, 3)


def test_groups_that_do_not_fit_are_refused() -> None:
    with pytest.raises(GemmaryError, match=r"mlp\.gate.*use 8 bits"):
        quantize_weight("mlp.gate", jnp.zeros((33, 2)), 4)


def test_int4_as_blocks_is_the_same_weights() -> None:
    """Every matrix of a model: what blocks stand for, and logits, to the rounding of rows to 16 bits."""
    config, params = CONFIG, unstack(quantize(init(CONFIG, jax.random.key(0)), 4))
    run = {
        name: tuple(packed(name, w) for w in weight) if isinstance(weight, tuple) else packed(name, weight)
        for name, weight in params.items()
    }
    assert isinstance(run["attn.q"][0], Blocks)
    assert isinstance(run["embed"], Int8)
    for name in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down"):
        for one, blocks in zip(params[name], run[name], strict=True):
            assert weight_shape(blocks) == weight_shape(one)
            np.testing.assert_array_equal(dequantize(blocks), dequantize(one))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 60, (2, 7)))
    wide = forward(params, config, ids)
    assert float(jnp.abs(forward(run, config, ids) - wide).max()) < 2e-4 * float(jnp.abs(wide).max())


def test_several_products_are_those_of_each() -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, 3, 64)), jnp.float32)
    q, k = (jnp.asarray(rng.standard_normal((64, n, 8)), jnp.float32) for n in (4, 2))
    both = project_all(("btd,dnh->btnh", "btd,dkh->btkh"), x, (q, k))
    np.testing.assert_allclose(both[0], jnp.einsum("btd,dnh->btnh", x, q), atol=1e-4)
    np.testing.assert_allclose(both[1], jnp.einsum("btd,dkh->btkh", x, k), atol=1e-4)
    assert gated("btd,df->btf", x, q.reshape(64, 32), q.reshape(64, 32)) is None  # arrays have a gradient: XLA's
