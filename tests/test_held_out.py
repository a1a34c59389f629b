"""Bits per byte against counting by hand."""

import lzma
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemmary.data.packing import Batch
from gemmary.params import init, unstack
from gemmary.presets import nano
from gemmary.train.head import Head
from gemmary.train.held_out import bits_per_byte, xz_bits_per_byte


def test_a_model_that_knows_nothing_needs_log2_of_the_vocabulary() -> None:
    config = nano(1, 64)
    params = unstack(init(config, jax.random.key(0)))
    params["embed"] = jnp.zeros_like(params["embed"])
    ones = np.ones((2, 8), np.int32)
    batch = Batch(ones, ones, np.array([[1.0] * 8, [1.0] * 3 + [0.0] * 5], np.float32), ones, ones)
    found = bits_per_byte(params, config, {"a": ([batch], 22), "b": ([batch, batch], 22)}, head=Head(4))
    assert found["a"] == pytest.approx(11 * math.log2(64) / 22)
    assert found["b"] == pytest.approx(2 * found["a"])


def test_xz_is_the_program_s() -> None:
    texts = ["the same again, " * 50, "and more"]
    whole = "".join(texts).encode()
    assert xz_bits_per_byte(texts) == pytest.approx(8 * len(lzma.compress(whole, preset=9)) / len(whole))
