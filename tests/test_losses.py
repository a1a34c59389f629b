"""The chunked loss against the plain one: values and gradients, at chunks that do and do not divide."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from gemmary.quantization import quantize_weight
from gemmary.train.head import Head, chunk_size
from gemmary.train.losses import next_token_loss, token_log_probs
from gemmary.weights import Int8, dequantize

B, T, D, V = 3, 13, 8, 29


def inputs(dtype: object = jnp.float32) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (B, T, D)).astype(dtype)
    embed = jax.random.normal(keys[1], (V, D)) * 2
    targets = jax.random.randint(keys[2], (B, T), 0, V)
    mask = (jax.random.uniform(keys[3], (B, T)) < 0.7).astype(jnp.float32)
    return x, embed, targets, mask


def plain(x: jax.Array, embed: jax.Array, targets: jax.Array, mask: jax.Array, head: Head) -> jax.Array:
    logits = jnp.einsum("btd,vd->btv", x.astype(jnp.float32), embed)
    if head.softcap is not None:
        logits = head.softcap * jnp.tanh(logits / head.softcap)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    nats = log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return (mask * (nats + head.z_loss * log_z**2)).sum()


@pytest.mark.parametrize("chunk", [1, 4, 13, 64])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_values_and_gradients_are_those_of_the_plain_loss(chunk: int, softcap: float | None, z_loss: float) -> None:
    x, embed, targets, mask = inputs()
    head = Head(chunk, softcap, z_loss)

    def ours(x: jax.Array, embed: jax.Array) -> jax.Array:
        return next_token_loss(x, embed, targets, mask, head)[0] * 1.5

    def theirs(x: jax.Array, embed: jax.Array) -> jax.Array:
        return plain(x, embed, targets, mask, head) * 1.5

    value, grads = jax.value_and_grad(ours, (0, 1))(x, embed)
    reference, wanted = jax.value_and_grad(theirs, (0, 1))(x, embed)
    np.testing.assert_allclose(value, reference, rtol=1e-5)
    np.testing.assert_allclose(ours(x, embed), reference, rtol=1e-5)  # without a gradient it is another path
    for ours_, theirs_ in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(ours_, theirs_, atol=2e-5)


def test_nats_leave_the_regularizer_out_and_carry_no_gradient() -> None:
    x, embed, targets, mask = inputs()
    total, nats = next_token_loss(x, embed, targets, mask, Head(4, None, 0.1))
    np.testing.assert_allclose(nats, plain(x, embed, targets, mask, Head(4)), rtol=1e-5)
    assert float(total) > float(nats)
    gradient = jax.grad(lambda x: next_token_loss(x, embed, targets, mask, Head(4))[1])(x)
    assert not np.asarray(gradient).any()


def test_bfloat16_activations_keep_an_fp32_softmax() -> None:
    x, embed, targets, mask = inputs(jnp.bfloat16)
    total, _ = next_token_loss(x, embed, targets, mask, Head(4))
    assert total.dtype == jnp.float32
    # A softmax in bf16 would be wrong by 1 %; whether weights are rounded too is the device's affair.
    np.testing.assert_allclose(total, plain(x, embed, targets, mask, Head(4)), rtol=1e-3)
    gradient = jax.grad(lambda x: next_token_loss(x, embed, targets, mask, Head(4))[0])(x)
    assert gradient.dtype == jnp.bfloat16


def test_no_more_logits_than_a_chunk_are_there_at_once() -> None:
    x, targets = jax.ShapeDtypeStruct((1, 8192, 256), jnp.float32), jax.ShapeDtypeStruct((1, 8192), jnp.int32)
    embed, mask = jax.ShapeDtypeStruct((65536, 256), jnp.float32), jax.ShapeDtypeStruct((1, 8192), jnp.float32)
    step = jax.jit(jax.value_and_grad(lambda *a: next_token_loss(*a, Head(64))[0], (0, 1)))
    used = step.lower(x, embed, targets, mask).compile().memory_analysis()
    assert used.temp_size_in_bytes < 300e6  # whole logits would be 2.1 GB


def test_the_chunk_follows_from_memory() -> None:
    assert chunk_size(8, 8192, 1 << 24) == 64
    assert chunk_size(1, 262144, 1 << 29) == 512
    assert chunk_size(4096, 262144, 1 << 24) == 16


# --- Positions that count for nothing ---------------------------------------------------------------------------------


def masks() -> dict[str, jax.Array]:
    """As batches have them: answers far apart, a row that is all padding, advantages of either sign, and nothing at all."""
    kept = jax.random.uniform(jax.random.key(7), (B, T))
    weights = jax.random.normal(jax.random.key(8), (B, T))
    few = (kept < 0.2).astype(jnp.float32)
    return {
        "few": few,
        "a row of none": few.at[1].set(0.0),
        "only the last": jnp.zeros((B, T)).at[:, -1].set(1.0),
        "advantages": few * weights,
        "none": jnp.zeros((B, T)),
        "all": jnp.ones((B, T)),
    }


@partial(jax.jit, static_argnames="head")
def _pulled(head: Head, mask: jax.Array) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """The two sums, and the gradients of x and of the embedding."""
    x, embed, targets, _ = inputs()
    loss = lambda x, embed: next_token_loss(x, embed, targets, mask, head)  # noqa: E731
    (total, nats), back = jax.vjp(loss, x, embed)
    return (total, nats), back((jnp.float32(1.5), jnp.zeros_like(nats)))


@pytest.mark.parametrize("which", masks())
@pytest.mark.parametrize("head", [Head(4), Head(4, 3.0, 0.1), Head(64)], ids=["4 of 13", "capped", "whole"])
def test_sparse_is_dense(head: Head, which: str) -> None:
    """Also where the chunk does not divide the length."""
    mask = masks()[which]
    sums, grads = _pulled(head._replace(sparse=True), mask)
    wanted, dense = _pulled(head, mask)
    np.testing.assert_allclose(sums, wanted, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(grads, dense, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert bool(jnp.isfinite(grads[0]).all())
    assert (float(jnp.abs(grads[1]).max()) > 0) == (which != "none")


@pytest.mark.parametrize("differentiated", [False, True])
def test_no_logits_are_made_of_what_counts_for_nothing(differentiated: bool) -> None:
    """What is left out of the work is not read: not even NaN there reaches the loss or a gradient."""
    x, embed, targets, _ = inputs()
    mask = jnp.zeros((B, T)).at[:, 5].set(1.0)
    spoilt = x.at[:, :5].set(jnp.nan).at[:, 6:].set(jnp.nan)
    loss = lambda x: next_token_loss(x, embed, targets, mask, Head(1, sparse=True))[0]  # noqa: E731
    np.testing.assert_array_equal(loss(spoilt), loss(x))
    if differentiated:
        np.testing.assert_array_equal(jax.grad(loss)(spoilt), jax.grad(loss)(x))


# --- An embedding that is not learnt ----------------------------------------------------------------------------------


def _equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a program, those of its loops and calls too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from _equations(inner)


def _made(function: Any, *arguments: Any) -> set[tuple[int, ...]]:
    """The shapes of all that a program computes, in floating point."""
    program = jax.make_jaxpr(function)(*arguments)
    made = [out.aval for equation in _equations(program.jaxpr) for out in equation.outvars]
    return {aval.shape for aval in made if jnp.issubdtype(aval.dtype, jnp.floating)}


@pytest.mark.parametrize(("softcap", "sparse"), [(None, False), (3.0, True)])
def test_an_embedding_that_is_not_learnt_changes_no_other_gradient(softcap: float | None, sparse: bool) -> None:
    x, embed, targets, mask = inputs()
    head = Head(4, softcap, 0.1, sparse)
    loss = lambda x, embed: next_token_loss(x, embed, targets, mask, head)[0]  # noqa: E731
    value, alone = jax.jit(jax.value_and_grad(loss))(x, embed)
    both, (beside, _) = jax.jit(jax.value_and_grad(loss, (0, 1)))(x, embed)
    np.testing.assert_allclose(value, both, rtol=1e-6)
    np.testing.assert_allclose(alone, beside, atol=1e-6)


def test_no_gradient_is_made_of_an_embedding_that_is_not_learnt() -> None:
    x, embed, targets, mask = inputs()
    loss = lambda x, embed: next_token_loss(x, embed, targets, mask, Head(4, 3.0, 0.1))[0]  # noqa: E731
    assert (V, D) not in _made(jax.grad(loss), x, embed)
    assert (V, D) in _made(jax.grad(loss, (0, 1)), x, embed)
    assert (V, D) in _made(jax.grad(loss, 1), x, embed)


# --- An embedding of eight bits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("softcap", "sparse"), [(None, False), (3.0, True)])
def test_an_int8_embedding_is_the_array_that_it_stands_for(softcap: float | None, sparse: bool) -> None:
    x, embed, targets, mask = inputs()
    leaf, head = quantize_weight("embed", embed, 8), Head(4, softcap, 0.1, sparse)
    assert isinstance(leaf, Int8)
    assert float(jnp.abs(dequantize(leaf) - embed).max()) > 1e-3

    def loss(x: jax.Array, embed: Any) -> jax.Array:
        return next_token_loss(x, embed, targets, mask, head)[0]

    pulled = jax.jit(jax.value_and_grad(loss))
    (value, dx), (wanted, reference) = pulled(x, leaf), pulled(x, dequantize(leaf))
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(loss)(x, leaf), wanted, rtol=1e-5)
    np.testing.assert_allclose(dx, reference, atol=2e-5)


# --- Log-probabilities of their own -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("chunk", "softcap"), [(4, 3.0), (64, None)])
def test_log_probabilities_are_those_of_the_logits(chunk: int, softcap: float | None) -> None:
    """And their gradients, each token weighed on its own."""
    x, embed, targets, _ = inputs()
    weights = jax.random.normal(jax.random.key(9), (B, T))

    def plainly(x: jax.Array, embed: jax.Array) -> jax.Array:
        logits = jnp.einsum("btd,vd->btv", x, embed)
        logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
        return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]

    def ours(x: jax.Array, embed: jax.Array) -> jax.Array:
        return token_log_probs(x, embed, targets, Head(chunk, softcap))

    def pulled(found: Any, *arguments: jax.Array) -> Any:
        scores, back = jax.vjp(found, *arguments)
        return scores, *back(weights)

    (ours_, *grads), (plainly_, *wanted_) = (jax.jit(partial(pulled, f))(x, embed) for f in (ours, plainly))
    np.testing.assert_allclose(ours_, plainly_, rtol=1e-5, atol=1e-5)
    for found, wanted in zip(grads, wanted_, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=2e-4)


def test_log_probabilities_with_an_int8_embedding() -> None:
    x, embed, targets, _ = inputs()
    leaf = quantize_weight("embed", embed, 8)
    found, wanted = (token_log_probs(x, w, targets, Head(4)) for w in (leaf, dequantize(leaf)))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_the_loss_is_the_log_probabilities_weighed() -> None:
    x, embed, targets, mask = inputs()
    found = -(mask * token_log_probs(x, embed, targets, Head(4, 3.0))).sum()
    np.testing.assert_allclose(next_token_loss(x, embed, targets, mask, Head(4, 3.0))[1], found, rtol=1e-5)
