"""Adapters put on, taken apart from what they adapt, and folded in: what each leaves as it was, and what it learns."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import run

from gemmary.adapters import PROJECTIONS, adapt, join, merge, split
from gemmary.errors import GemmaryError
from gemmary.params import TABLE, Params, init, unstack
from gemmary.presets import nano
from gemmary.quantization import quantize
from gemmary.weights import Int8, LoRA, dequantize, project

CONFIG = nano(1, 128).replace(num_layers=2, embed_dim=96, ffw_dim=160, num_heads=6, num_kv_heads=2, head_dim=32)
IDS = jnp.arange(20)[None]


@pytest.fixture(scope="module")
def params() -> Params:
    return init(CONFIG, jax.random.key(0))


def _is_lora(w: Any) -> bool:
    return isinstance(w, LoRA)


def _stirred(params: Params) -> Params:
    """Adapters as training would leave them: b no longer zero."""

    def stir(w: Any) -> Any:
        return dataclasses.replace(w, b=jax.random.normal(jax.random.key(2), w.b.shape) * 0.1)

    return jax.tree.map(lambda w: stir(w) if _is_lora(w) else w, params, is_leaf=_is_lora)


def _based(params: Params, bits: int | None, form: str) -> Params:
    base = params if bits is None else quantize(params, bits)
    return unstack(base) if form == "unstacked" else base


def _same(a: Params, b: Params) -> None:
    """The same rows, the same form, and the same bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


# --- Put on, and folded in --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "form"), [(None, "stacked"), (4, "unstacked")])
def test_merged_equals_adapted(params: Params, bits: int | None, form: str) -> None:
    targets = [name for name, spec in TABLE.items() if spec.reads]  # the tied embedding too
    fresh = adapt(_based(params, bits, form), jax.random.key(1), 3, alpha=6.0, targets=targets)
    adapted = _stirred(fresh)
    with_adapters = run(adapted, CONFIG, IDS)
    np.testing.assert_allclose(run(merge(adapted), CONFIG, IDS), with_adapters, atol=2e-4)
    assert float(jnp.abs(with_adapters - run(fresh, CONFIG, IDS)).max()) > 0.1
    assert not any(_is_lora(w) for w in jax.tree.leaves(merge(adapted), is_leaf=_is_lora))


@pytest.mark.parametrize("form", ["stacked", "unstacked"])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_merged_weight_is_its_base_and_scale_times_a_b(params: Params, bits: int | None, form: str) -> None:
    adapted = _stirred(adapt(_based(params, bits, form), jax.random.key(1), 3, alpha=6.0))
    merged = merge(adapted)
    for name in PROJECTIONS:
        for layer in range(CONFIG.num_layers):
            w, found = (
                (tree[name][layer] if form == "unstacked" else jax.tree.map(lambda x: x[layer], tree[name]))  # noqa: B023
                for tree in (adapted, merged)
            )
            wanted = np.asarray(dequantize(w.base)) + 2.0 * np.tensordot(w.a, w.b, 1)
            np.testing.assert_allclose(found, wanted, atol=1e-6, err_msg=name)


def test_merged_projections_give_the_adapted_logits_to_1e_5(params: Params) -> None:
    adapted = _stirred(adapt(unstack(params), jax.random.key(1), 4))
    merged, with_adapters = run(merge(adapted), CONFIG, IDS), run(adapted, CONFIG, IDS)
    np.testing.assert_allclose(merged, with_adapters, atol=1e-5, rtol=1e-5)


def test_a_merged_weight_keeps_the_dtype_of_its_base(params: Params) -> None:
    narrow = adapt({"mlp.up": params["mlp.up"].astype(jnp.bfloat16)}, jax.random.key(1), 2, targets=["mlp.up"])
    assert merge(narrow)["mlp.up"].dtype == jnp.bfloat16
    quantized = adapt(quantize({"mlp.up": params["mlp.up"]}, 8), jax.random.key(1), 2, targets=["mlp.up"])
    assert merge(quantized)["mlp.up"].dtype == jnp.float32


def test_a_fresh_adapter_changes_nothing(params: Params) -> None:
    base = unstack(params)
    np.testing.assert_array_equal(run(adapt(base, jax.random.key(1), 4), CONFIG, IDS), run(base, CONFIG, IDS))


@pytest.mark.parametrize("form", ["stacked", "unstacked"])
def test_every_matrix_and_every_layer_draws_its_own(params: Params, form: str) -> None:
    adapted = adapt(_based(params, None, form), jax.random.key(1), 4)
    assert [name for name, w in adapted.items() if _is_lora(w[0] if isinstance(w, tuple) else w)] == list(PROJECTIONS)
    drawn = [np.asarray(w.a[i] if form == "stacked" else w[i].a) for w in map(adapted.get, PROJECTIONS) for i in (0, 1)]
    assert len({a.tobytes() for a in drawn}) == 2 * len(PROJECTIONS)
    for a in drawn:  # of variance 1 over what is read, as the matrix itself
        assert float((a**2).sum() / a.shape[-1]) == pytest.approx(1, abs=0.35)


def test_wrong_targets_are_refused(params: Params) -> None:
    with pytest.raises(GemmaryError, match=r"attn\.x"):
        adapt(params, jax.random.key(0), 4, targets=["attn.x"])
    with pytest.raises(GemmaryError, match="already adapted"):
        adapt(adapt(params, jax.random.key(0), 4), jax.random.key(0), 4)
    with pytest.raises(GemmaryError, match="rank"):
        adapt(params, jax.random.key(0), 0)


# --- Taken apart, and put together ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["stacked", "unstacked"])
@pytest.mark.parametrize("bits", [None, 8])
def test_there_and_back(params: Params, bits: int | None, form: str) -> None:
    adapted = _stirred(adapt(_based(params, bits, form), jax.random.key(1), 3, alpha=6.0))
    _same(join(*split(adapted)), adapted)
    _same(join(*split(adapted, also=("final_norm",))), adapted)


@pytest.mark.parametrize("form", ["stacked", "unstacked"])
def test_what_is_learnt_is_the_adapters_alone(params: Params, form: str) -> None:
    base = _based(params, 8, form)
    learnt, rest = split(adapt(base, jax.random.key(1), 3, targets=["attn.q", "mlp.down"]))
    assert set(learnt) == {"attn.q", "mlp.down"}
    for w in jax.tree.leaves(learnt, is_leaf=_is_lora):
        assert w.base is None
    a, b = (96, 3), (3, 6, 32)
    assert {leaf.shape[-len(a) :] for leaf in jax.tree.leaves(learnt["attn.q"])} >= {a}
    assert {leaf.shape[-len(b) :] for leaf in jax.tree.leaves(learnt["attn.q"])} >= {b}
    _same({name: rest[name] for name in base}, base)  # and the rest is the model as it was, Int8 and all


def test_rows_named_beside_are_learnt_whole(params: Params) -> None:
    whole = {**adapt(params, jax.random.key(1), 3), "score": jnp.ones(96)}
    learnt, rest = split(whole, also=("score", "final_norm"))
    assert set(learnt) == {*PROJECTIONS, "score", "final_norm"}
    assert "score" not in rest
    assert "final_norm" not in rest
    np.testing.assert_array_equal(join(learnt, rest)["score"], np.ones(96))


def test_a_row_beside_that_is_not_there_is_none(params: Params) -> None:
    assert "score" not in split(adapt(params, jax.random.key(1), 3), also=("score",))[0]


def test_without_adapters_nothing_is_learnt(params: Params) -> None:
    learnt, rest = split(params)
    assert learnt == {}
    _same(rest, params)


def test_gradients_go_through_join_to_what_is_learnt_alone(params: Params) -> None:
    """As in a step: of the learnt tree, in its form, through a model whose other weights cannot have any."""
    adapted = _stirred(adapt(quantize(params, 8), jax.random.key(1), 2, targets=["attn.o", "mlp.gate"]))
    learnt, rest = split(adapted, also=("final_norm",))
    grads = jax.grad(lambda learnt: (run(join(learnt, rest), CONFIG, jnp.arange(8)[None]) ** 2).mean())(learnt)
    assert jax.tree.structure(grads) == jax.tree.structure(learnt)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(grads))


def test_gradients_of_what_is_learnt_are_those_of_the_whole(params: Params) -> None:
    adapted = _stirred(adapt(params, jax.random.key(1), 2, targets=["mlp.gate"]))
    learnt, rest = split(adapted)
    x = jax.random.normal(jax.random.key(3), (2, 3, CONFIG.embed_dim))

    def loss(params: Params) -> jax.Array:
        layer = jax.tree.map(lambda leaf: leaf[0], params["mlp.gate"])
        return (project("btd,df->btf", x, layer) ** 2).sum()

    apart = jax.grad(lambda learnt: loss(join(learnt, rest)))(learnt)["mlp.gate"]
    whole = jax.grad(loss)(adapted)["mlp.gate"]
    np.testing.assert_array_equal(apart.a, whole.a)
    np.testing.assert_array_equal(apart.b, whole.b)
    assert apart.base is None


def test_adapters_over_int8_stay_int8_beneath(params: Params) -> None:
    _, rest = split(adapt(quantize(params, 8), jax.random.key(1), 2))
    assert all(isinstance(rest[name], Int8) for name in PROJECTIONS)
