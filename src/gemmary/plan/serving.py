"""Steps of serving as programs: a token for each of many rows, or the reading of prompts. Weights are in bf16 and nothing is stored apart.

Each of `data` groups of chips is a replica of its own: one is planned, of `model` chips.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from gemmary.mesh import replicated, spec
from gemmary.model.attention import Marks
from gemmary.model.cache import init_cache
from gemmary.model.transformer import hidden, logits
from gemmary.params import abstract, placement, unstack
from gemmary.plan.job import Job

__all__ = ["cache_shapes", "serving_step"]

_CHUNK = 512  # tokens that are read at once, which is what windows' rings have room for


def cache_shapes(job: Job) -> Any:
    """The cache of a job's rows, as shapes."""
    reads = job.length if job.kind == "prefill" else _CHUNK
    return jax.eval_shape(lambda: init_cache(job.config, job.rows_at_once, job.length, reads, jnp.bfloat16))


def serving_step(job: Job, mesh: Mesh | AbstractMesh) -> tuple[Any, tuple[Any, ...]]:
    """The step and its arguments as shapes. It takes its cache's memory for the next one's."""
    config, rows = job.config, job.rows_at_once
    width = 1 if job.kind == "decode" else job.length
    params = jax.eval_shape(unstack, abstract(config, jnp.bfloat16))
    sizes = dict(mesh.shape)

    def place(x: Any) -> Any:
        """Keys and values by their heads where these divide; positions everywhere."""
        parts = spec([(), ("model",), (), ()] if x.ndim == 4 else [()] * x.ndim, x.shape, sizes)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, parts))

    def step(params: Any, cache: Any, tokens: jax.Array, positions: jax.Array) -> tuple[jax.Array, Any]:
        x, cache = hidden(
            params, config, tokens, Marks(positions), cache, first=job.kind == "prefill", dtype=jnp.bfloat16
        )
        return logits(params, config, x[:, -1:])[:, 0, : config.num_tokens].argmax(axis=-1), cache

    everywhere = replicated(mesh)
    ids: Any = jax.ShapeDtypeStruct((rows, width), jnp.int32, sharding=everywhere)
    placed = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), params, placement(params, mesh)
    )
    return jax.jit(step, donate_argnums=1), (placed, jax.tree.map(place, cache_shapes(job)), ids, ids)
