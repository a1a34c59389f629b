"""Quantized and adapted leaves: what they stand for, and that products and lookups with them say the same."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import run

from gemmary.adapters import adapt, merge
from gemmary.errors import GemmaryError
from gemmary.params import TABLE, Params, init, unstack
from gemmary.presets import PRESETS
from gemmary.weights import Int4, Int8, LoRA, dequantize, lookup, project, quantize, quantize_weight

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


def _stirred(params: Params) -> Params:
    """Adapters as training would leave them: b no longer zero."""

    def stir(w: Any) -> Any:
        return dataclasses.replace(w, b=jax.random.normal(jax.random.key(2), w.b.shape) * 0.1)

    is_lora = lambda w: isinstance(w, LoRA)  # noqa: E731
    return jax.tree.map(lambda w: stir(w) if is_lora(w) else w, params, is_leaf=is_lora)


@pytest.mark.parametrize("form", ["stacked", "unstacked"])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_merged_equals_adapted(params: Params, bits: int | None, form: str) -> None:
    base = params if bits is None else quantize(params, bits)
    base = unstack(base) if form == "unstacked" else base
    targets = [name for name, spec in TABLE.items() if spec.reads]  # the tied embedding too
    adapted = _stirred(adapt(base, jax.random.key(1), 3, alpha=6.0, targets=targets))
    ids = jnp.arange(20)[None]
    with_adapters = run(adapted, CONFIG, ids)
    np.testing.assert_allclose(run(merge(adapted), CONFIG, ids), with_adapters, atol=2e-4)
    assert float(jnp.abs(with_adapters - run(base, CONFIG, ids)).max()) > 0.1
    assert not any(isinstance(w, LoRA) for w in jax.tree.leaves(merge(adapted), is_leaf=lambda w: isinstance(w, LoRA)))


def test_a_fresh_adapter_changes_nothing(params: Params) -> None:
    ids = jnp.arange(20)[None]
    adapted = adapt(params, jax.random.key(1), 4)
    np.testing.assert_array_equal(run(adapted, CONFIG, ids), run(params, CONFIG, ids))


def test_only_adapters_need_a_gradient(params: Params) -> None:
    adapted = adapt(quantize(params, 8), jax.random.key(1), 4, targets=["mlp.up"])
    w = adapted["mlp.up"]

    def loss(b: jax.Array) -> jax.Array:
        return (run({**adapted, "mlp.up": dataclasses.replace(w, b=b)}, CONFIG, jnp.arange(8)[None]) ** 2).mean()

    assert float(jnp.abs(jax.grad(loss)(w.b)).max()) > 0


def test_wrong_targets_are_refused(params: Params) -> None:
    with pytest.raises(GemmaryError, match=r"attn\.x"):
        adapt(params, jax.random.key(0), 4, targets=["attn.x"])
    with pytest.raises(GemmaryError, match="already adapted"):
        adapt(adapt(params, jax.random.key(0), 4), jax.random.key(0), 4)
    with pytest.raises(GemmaryError, match="rank"):
        adapt(params, jax.random.key(0), 0)
