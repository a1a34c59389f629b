"""The oracle's small models as gemmary's: configs, and weights through the table of names."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle

from gemmary.checkpoints.names import layout, split
from gemmary.config import Config
from gemmary.model.attention import Marks
from gemmary.model.cache import Cache
from gemmary.model.transformer import forward, hidden, logits
from gemmary.params import TABLE, Params


def config_of(kind: str) -> Config:
    """The small model's config, each field said again from the spec's numbers."""
    spec = oracle.small_spec(kind)
    generation = int(kind[5])
    pattern = {1: (False,), 2: (True, False), 3: (True, True, True, True, True, False)}[generation]
    return Config(
        generation=generation,
        vocab_size=spec.vocab,
        num_tokens=spec.vocab,
        embed_dim=spec.embed,
        num_layers=spec.layers,
        num_heads=spec.heads,
        num_kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        ffw_dim=spec.ffw,
        context=4096,
        query_scale=spec.query_scale,
        window=None if generation == 1 else 8,
        window_pattern=pattern,
        rope_base=1e6 if generation == 3 else 1e4,
        rope_factor=8.0 if generation == 3 else 1.0,
        qk_norm=spec.qk_norm,
        post_norms=spec.post_norms,
        attn_softcap=spec.attn_cap,
        final_softcap=spec.final_cap,
    )


def params_of(config: Config, weights: oracle.Weights) -> Params:
    """Hugging Face-named weights as our unstacked parameters, float32."""
    parts: dict[str, list[np.ndarray]] = {}
    for row in layout("hf", config):
        for layer in range(config.num_layers if row.layered else 1):
            for name, value in split(row, config, weights[row.at(layer)]).items():
                parts.setdefault(name, []).append(value)
    return {
        name: tuple(map(jnp.asarray, values)) if TABLE[name].layered else jnp.asarray(values[0])
        for name, values in parts.items()
    }


def small(kind: str) -> tuple[oracle.Spec, oracle.Weights, Config, Params]:
    """One of `oracle.KINDS`, both ways."""
    spec = oracle.small_spec(kind)
    weights = oracle.small_weights(spec)
    config = config_of(kind)
    return spec, weights, config, params_of(config, weights)


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def run(
    params: Params, config: Config, ids: jax.Array, marks: Marks | None = None, *, dtype: Any = jnp.float32
) -> jax.Array:
    """Compiled logits [B, T, V]."""
    return forward(params, config, ids, marks, dtype=dtype)


@functools.partial(jax.jit, static_argnames="config")
def step(params: Params, config: Config, ids: jax.Array, marks: Marks, cache: Cache) -> tuple[jax.Array, Cache | None]:
    """Compiled logits through a cache."""
    x, cache = hidden(params, config, ids, marks, cache)
    return logits(params, config, x), cache


def tokens(length: int, vocab: int) -> np.ndarray:
    """The ids that the recorded answers were taken on."""
    return np.random.RandomState(length).randint(0, vocab, length)
