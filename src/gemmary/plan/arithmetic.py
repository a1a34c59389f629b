"""What a job takes, from shapes alone: model FLOPs exactly; memory, traffic and time as estimates for where nothing can be compiled.

All numbers are of one chip and one step. The estimates count what cannot be avoided and little more.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from gemmary.adapters import adapt, split
from gemmary.mesh import abstract_mesh
from gemmary.params import Params, abstract, count, placement, table
from gemmary.plan.job import Job
from gemmary.plan.network import seconds_of
from gemmary.plan.roofline import Traffic
from gemmary.plan.serving import cache_shapes
from gemmary.train.flops import train_flops

__all__ = [
    "attention_flops",
    "compute_estimate",
    "made_again",
    "memory_estimate",
    "model_flops",
    "traffic_estimate",
]

_BLOCK = 512
_HEAD_BYTES = 1 << 29


def model_flops(job: Job) -> float:
    """What the mathematics of a step needs, made again or not: see `train.flops`."""
    config = job.config
    if job.kind == "decode":
        matrices = count(config).non_embedding + config.vocab_size * config.embed_dim
        seen = sum(min(job.length, kind.window or job.length) for kind in config.layer_kinds())
        return job.rows_at_once * (2 * matrices + 4 * config.num_heads * config.head_dim * seen) / job.model
    whole = train_flops(config, job.length) * job.length
    if job.kind == "prefill":
        return job.rows_at_once * whole / 3 / job.model
    # Of adapters alone no gradient of the weights beneath is made: a third of the work is left out.
    return job.rows * whole * (2 / 3 if job.kind == "lora" else 1) / job.chips


def attention_flops(job: Job, products: int, *, block: int = _BLOCK) -> float:
    """Of one layer, the mean over layers, of the rows that a chip has at once: as kernels do it, in whole blocks of queries and keys.

    `products` are those of the kernel that have a score for each pair on one side: two forward, five in a whole backward pass.
    """
    heads = job.config.num_heads // (job.model if job.config.num_heads % job.model == 0 else 1)
    blocks = math.ceil(job.length / block)
    pairs = 0.0
    for kind in job.config.layer_kinds():
        back = blocks if kind.window is None else min(blocks, math.ceil((kind.window - 1) / block) + 1)
        pairs += sum(min(i + 1, back) for i in range(blocks)) * block**2
    flops: float = job.rows_at_once * heads * 2 * products * job.config.head_dim * pairs / job.config.num_layers
    return flops


def made_again(job: Job) -> float:
    """What a backward pass makes a second time."""
    if not job.trains or job.remat in ("none", "dots"):
        return 0.0
    config = job.config
    if job.remat == "ffw":
        return job.tokens * 2 * 2 * config.embed_dim * config.ffw_dim * config.num_layers / job.chips
    head = 6 * config.vocab_size * config.embed_dim
    return job.tokens * (train_flops(config, job.length) - head) / 3 / job.chips


def _mine(params: Params, job: Job) -> float:
    """Bytes of a chip's part of these parameters."""
    places = placement(params, abstract_mesh(job.mesh))
    each = jax.tree.map(lambda x, at: math.prod(at.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize, params, places)
    return float(sum(jax.tree.leaves(each)))


def _layer_bytes(job: Job) -> float:
    """Of one layer's weights in bf16 as products take them: a chip's part of heads and ffw, whole along the width."""
    layers = {k: v for k, v in abstract(job.config, jnp.bfloat16).items() if table(job.config)[k].layered}
    split_over = job.model if job.config.num_heads % job.model == 0 and job.config.ffw_dim % job.model == 0 else 1
    elements = float(sum(math.prod(v.shape) for v in layers.values()))
    return 2 * elements / job.config.num_layers / split_over


def _token_bytes(job: Job) -> float:
    """Kept of each token and layer for the backward pass, of a chip's part of a row."""
    config, model = job.config, job.model
    width, heads = config.embed_dim / model, config.head_dim * config.num_heads / model
    keys = 2 * config.head_dim * config.num_kv_heads / (model if config.num_kv_heads % model == 0 else 1)
    narrow = 2 * (width + 2 * width + 2 * heads + keys)
    wide = narrow + 2 * 2 * config.ffw_dim / model
    kept: dict[str, float] = {"layers": 2 * width, "ffw": narrow, "dots": wide, "none": 2.6 * wide}
    return kept[job.remat]


def memory_estimate(job: Job) -> dict[str, float]:
    """Bytes by kind, as `Memory` has them."""
    config = job.config
    if not job.trains:
        cache = sum(
            math.prod(x.shape) * np.dtype(x.dtype).itemsize / (job.model if _splits(x.shape, job) else 1)
            for x in jax.tree.leaves(cache_shapes(job))
        )
        made = 4 * job.rows_at_once * config.vocab_size / job.model
        width = 2 * job.rows_at_once * (job.length if job.kind == "prefill" else 1)
        made += width * 2 * (config.embed_dim + 2 * config.ffw_dim / job.model)
        return {
            "parameters": _mine(abstract(config, jnp.bfloat16), job), "optimizer": 0.0, "gradients": 0.0, "activations": cache,
            "temporaries": made,
        }  # fmt: skip
    learnt, rest = abstract(config), 0.0
    if job.kind == "lora":
        some, other = split(
            jax.eval_shape(lambda p: adapt(p, jax.random.key(0), job.rank), abstract(config, jnp.bfloat16))
        )
        learnt, rest = some, _mine(other, job)
    own = _mine(learnt, job)
    tokens = job.rows_at_once * job.length
    embed = config.vocab_size * config.embed_dim / max(job.model, min(job.data, 16))
    return {
        "parameters": own + rest,
        "optimizer": 2 * own,
        "gradients": own,
        "activations": tokens * config.num_layers * _token_bytes(job),
        "temporaries": 2 * _HEAD_BYTES + 3 * _layer_bytes(job) + 6 * embed,
    }


def _splits(shape: tuple[int, ...], job: Job) -> bool:
    return len(shape) == 4 and shape[1] % job.model == 0


def compute_estimate(job: Job) -> tuple[float, float]:
    """FLOPs, and bytes to and from memory: weights for each pass over them, and what products read and write."""
    config = job.config
    flops = model_flops(job) + made_again(job)
    if not job.trains:
        guess = memory_estimate(job)
        return flops, guess["parameters"] + guess["activations"]
    weights = config.num_layers * _layer_bytes(job) * 3 * job.accumulate
    tokens = job.rows_at_once * job.length * job.accumulate
    moved = 30 * (config.embed_dim + config.ffw_dim) / job.model * 2 * config.num_layers * tokens
    return flops, weights + moved + 8 * _mine(abstract(config), job)


def traffic_estimate(job: Job) -> list[Traffic]:
    """Weights gathered and gradients scattered over the data axes, positions gathered and scattered over `model`, sums over slices."""
    config, made = job.config, list[Traffic]()

    def add(kind: str, axes: str, group: int, count_: int, size: float, hidden: bool) -> None:
        if group > 1 and size and count_:
            seconds = count_ * seconds_of(kind, size, size, group, axes.split("+"), job.topology)
            made.append(
                Traffic(kind, axes, count_, int(count_ * size), seconds, 0.0 if hidden else seconds, axes == "slice")
            )

    layer, rounds = _layer_bytes(job), config.num_layers * job.accumulate
    row = job.rows_at_once * (1 if job.kind == "decode" else job.length) * config.embed_dim * 2
    if not job.trains:
        add("all-reduce", "model", job.model, 2 * config.num_layers, row, False)
        return made
    along = "data+fold" if job.mesh["fold"] > 1 else "data"
    add("all-gather", along, job.data, 2 * rounds, layer, True)
    if job.kind != "lora":
        add("reduce-scatter", along, job.data, rounds, layer, True)
        add("all-reduce", "slice", job.slices, 1, _mine(abstract(config), job), False)
    add("all-gather", "model", job.model, (6 if job.remat in ("none", "dots") else 8) * rounds, row, False)
    add("reduce-scatter", "model", job.model, 4 * rounds, row, False)
    return sorted(made, key=lambda part: -part.seconds)
