"""Floating-point operations of a training step, counted from the shapes, and what a device can do at most.

A multiply and an add are two. A backward pass costs twice a forward one. What is made again to save memory is work, but
not the model's: model FLOPs utilization (MFU; Chowdhery et al., arXiv 2204.02311) leaves it out.
"""

from __future__ import annotations

import math
import time

import jax
import jax.numpy as jnp

from gemmary.config import Config
from gemmary.hardware import chip_of
from gemmary.params import count

__all__ = ["peak_flops", "train_flops"]


def train_flops(config: Config, length: int) -> float:
    """Of one token in rows of `length`: forward and backward, matrix products only."""
    matrices = (
        count(config).non_embedding + config.vocab_size * config.embed_dim
    )  # the tied output; the lookup is no product
    per_key = 4 * config.num_heads * config.head_dim
    seen = 0.0
    for kind in config.layer_kinds():
        window = min(length, kind.window or length)
        seen += window * (length - (window - 1) / 2) / length  # a query sees itself and up to window - 1 before it
    return 3 * (2 * matrices + per_key * seen)


def peak_flops() -> float:
    """Operations a second of all devices: a data sheet's figure, or on a CPU what its own matrix products reach."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        chip = chip_of(device.device_kind)
        return (chip.flops if chip else math.nan) * jax.device_count()
    a = jnp.ones((2048, 1024), jnp.float32)
    product = jax.jit(lambda a: a @ a.T)
    product(a).block_until_ready()
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        product(a).block_until_ready()
        best = max(best, 2 * 2048 * 2048 * 1024 / (time.perf_counter() - started))
    return best
