"""The chunked loss against the plain one: values and gradients, at chunks that do and do not divide."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemmary.train.losses import Head, chunk_size, next_token_loss

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
