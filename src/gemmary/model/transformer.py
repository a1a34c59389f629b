"""Gemma 1, 2 and 3: one `block`, for training, prefill and decoding.

What differs between generations is data in the config: windows and rope bases per layer, and five switches. Layers that
come stacked are scanned (training); layers that come unstacked are unrolled (inference, with or without a cache).

Rounding points, which the tests hold to a float64 oracle: norms, rope, softmax and logits are fp32 whatever the
activations are; the embedding's factor is rounded to the activations' dtype first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from gemmary.config import Config
from gemmary.errors import GemmaryError
from gemmary.kernels import CONTEXT
from gemmary.mesh import platform
from gemmary.model.attention import Marks, attend_among
from gemmary.model.cache import LayerCache
from gemmary.model.pages import PagedLayer
from gemmary.model.rope import Turn, rotate, timescales, turn
from gemmary.params import TABLE, Params, is_stacked
from gemmary.weights import gated, lookup, project, project_all

__all__ = ["Remat", "block", "embed", "forward", "hidden", "logits", "rms_norm"]

# Tokens from which making their sines and cosines once is worth a loop.
_MANY = 1024

Layer = LayerCache | PagedLayer
"""The cache of one layer, in one of its forms."""

Remat = Literal["none", "dots", "ffw", "layers"]
"""What a backward pass makes again: nothing; all but matrix products and what attention gives; that and the wide products of the
feed-forward part; whole layers."""


def _keep(*names: str) -> Callable[..., Any]:
    return partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(*names))


_NARROW = ("projection", CONTEXT)
_REMAT: dict[Remat, Callable[..., Any]] = {
    "none": lambda layer: layer,
    "dots": _keep(*_NARROW, "wide"),
    "ffw": _keep(*_NARROW),
    "layers": jax.checkpoint,
}


class _Kind(NamedTuple):
    """What a layer's kind comes to for these tokens: how far it sees, and how their positions turn."""

    window: int | Array | None
    turn: Turn


def _kinds(config: Config, positions: Array) -> list[_Kind]:
    """The kind of each layer; layers of one rope share one turn.

    The turns of many tokens are made in a loop, through which XLA does not fuse: on a CPU it would make sines and
    cosines again for every layer's queries, keys and their gradients.
    """
    kinds = config.layer_kinds()

    def of(base: float, factor: float) -> Turn:
        scale = timescales(config.head_dim, base, factor)
        if positions.size < _MANY or platform() != "cpu":
            return turn(positions, scale)
        rows = jax.lax.map(lambda row: turn(row[None], scale), positions)
        return Turn(rows.cos[:, 0], rows.sin[:, 0])

    turns = {rope: of(*rope) for rope in dict.fromkeys((kind.rope_base, kind.rope_factor) for kind in kinds)}
    return [_Kind(kind.window, turns[kind.rope_base, kind.rope_factor]) for kind in kinds]


def _layer(config: Config, marks: Marks, kind: _Kind, remat: Remat) -> Callable[[Array, Params], Array]:
    """`block` without a cache. A kind's window stays a number, which kernels are made for."""

    def run(x: Array, w: Params, turn: Turn, marks: Marks) -> Array:
        return block(x, w, _Kind(kind.window, turn), config, marks)[0]

    run = _REMAT[remat](run)
    return lambda x, w: run(x, w, kind.turn, marks)


def _scan(
    x: Float[Array, "B T D"], layers: Params, config: Config, marks: Marks, remat: Remat
) -> Float[Array, "B T D"]:
    """All layers, stacked: one compiled body for as many layers as the kinds take to come round again, then those that are left."""
    made = [_layer(config, marks, kind, remat) for kind in _kinds(config, marks.positions)]
    kinds = config.layer_kinds()
    period = next(n for n in range(1, len(kinds) + 1) if all(kinds[i] == kinds[i % n] for i in range(len(kinds))))
    rounds = len(kinds) // period

    def body(x: Array, w: Params) -> tuple[Array, None]:
        for i in range(period):
            x = made[i](x, jax.tree.map(lambda leaf, i=i: leaf[i], w) if period > 1 else w)
        return x, None

    whole = layers
    if period > 1:
        whole = jax.tree.map(lambda w: w[: rounds * period].reshape(rounds, period, *w.shape[1:]), layers)
    x = jax.lax.scan(body, x, whole)[0]
    for i in range(rounds * period, len(kinds)):
        x = made[i](x, jax.tree.map(lambda leaf, i=i: leaf[i], layers))
    return x


def rms_norm(x: Float[Array, "... D"], w: Float[Array, " D"], eps: float) -> Float[Array, "... D"]:
    """x over its root mean square, times 1 + w: all in fp32, cast last."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * scale * (1 + w.astype(jnp.float32))).astype(x.dtype)


def embed(params: Params, config: Config, tokens: Int[Array, "B T"], dtype: Any) -> Float[Array, "B T D"]:
    """Token embeddings times sqrt(D), the factor rounded to `dtype` first (in bf16: 45.25 for the 2B, 55.5 for the 7B)."""
    if jnp.dtype(dtype) == jnp.float16:
        raise GemmaryError("float16 activations overflow in Gemma: use bfloat16 or float32")
    return lookup(tokens, params["embed"], dtype) * jnp.asarray(config.embed_dim**0.5, dtype)


def _named(name: str, arrays: Any) -> Any:
    """The same, under a name by which `_REMAT` keeps it."""
    return jax.tree.map(lambda x: checkpoint_name(x, name), arrays)


def _attention(
    x: Float[Array, "B T D"],
    w: Params,
    kind: _Kind,
    config: Config,
    marks: Marks,
    cache: Layer | None,
    first: bool,
) -> tuple[Float[Array, "B T D"], Layer | None]:
    equations = ("btd,dnh->btnh", "btd,dkh->btkh", "btd,dkh->btkh")
    q, k, v = _named("projection", project_all(equations, x, (w["attn.q"], w["attn.k"], w["attn.v"])))
    if config.qk_norm:
        q = rms_norm(q, w["attn.q_norm"], config.norm_eps)
        k = rms_norm(k, w["attn.k_norm"], config.norm_eps)
    q = rotate(q, kind.turn) * jnp.asarray(config.query_scale, q.dtype)
    k = rotate(k, kind.turn)
    limits: dict[str, Any] = {"window": kind.window, "softcap": config.attn_softcap}
    if cache is None:
        out = attend_among(q, k, v, marks, **limits)
    else:
        out, cache = cache.attend(q, k, v, marks, first=first, **limits)
    return _named("projection", project("btnh,nhd->btd", checkpoint_name(out, CONTEXT), w["attn.o"])), cache


def _feed_forward(x: Float[Array, "B T D"], w: Params) -> Float[Array, "B T D"]:
    """GeGLU: the gate goes through GELU (tanh approximation) and multiplies the up branch."""
    both = gated("btd,df->btf", x, w["mlp.gate"], w["mlp.up"])
    if both is not None:
        return project("btf,fd->btd", both, w["mlp.down"])
    gate, up = _named("wide", project_all(("btd,df->btf",) * 2, x, (w["mlp.gate"], w["mlp.up"])))

    # A backward pass makes what lies between the matrix products again: it is the widest of all activations, five times
    # over, and quicker made than kept.
    @jax.checkpoint
    def down(gate: Array, up: Array, weight: Any) -> Array:
        return project("btf,fd->btd", jax.nn.gelu(gate, approximate=True) * up, weight)

    out: Array = _named("projection", down(gate, up, w["mlp.down"]))
    return out


def block(
    x: Float[Array, "B T D"],
    w: Params,
    kind: _Kind,
    config: Config,
    marks: Marks,
    cache: Layer | None = None,
    first: bool = False,
) -> tuple[Float[Array, "B T D"], Layer | None]:
    """One layer: attention and feed-forward, each on a normed input, added back (after a second norm where the config has it)."""
    out, cache = _attention(rms_norm(x, w["pre_attn_norm"], config.norm_eps), w, kind, config, marks, cache, first)
    if config.post_norms:
        out = rms_norm(out, w["post_attn_norm"], config.norm_eps)
    x = x + out
    out = _feed_forward(rms_norm(x, w["pre_ffw_norm"], config.norm_eps), w)
    if config.post_norms:
        out = rms_norm(out, w["post_ffw_norm"], config.norm_eps)
    return x + out, cache


@partial(jax.jit, static_argnums=(5, 6, 7), inline=True)
def _cached(
    x: Array, w: Params, turn: Turn, marks: Marks, cache: Layer, config: Config, window: int | None, first: bool
) -> tuple[Array, Layer | None]:
    """`block` for layers that are alike, traced once for all of them: tracing is a third of the time to a first token."""
    return block(x, w, _Kind(window, turn), config, marks, cache, first)


def hidden(
    params: Params,
    config: Config,
    tokens: Int[Array, "B T"],
    marks: Marks | None = None,
    cache: tuple[Layer, ...] | None = None,
    *,
    first: bool = False,
    dtype: Any = jnp.float32,
    remat: Remat = "none",
) -> tuple[Float[Array, "B T D"], Any]:
    """The last layer's output, normed, and the cache with these tokens in it.

    `marks` gives each token's position (default: 0, 1, 2, …) and, for packed documents, its segment. With a cache,
    layers must be unstacked and tokens at most its chunk; `first` says that it is empty, so that the tokens have only
    themselves to see. `remat` says what a backward pass makes again instead of keeping. Raises GemmaryError for
    fp16 activations.
    """
    if marks is None:
        marks = Marks(jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape))
    x = embed(params, config, tokens, dtype)
    layers = {name: weight for name, weight in params.items() if TABLE[name].layered}
    if is_stacked(params):
        assert cache is None, "a cache needs unstacked layers"
        return rms_norm(_scan(x, layers, config, marks, remat), params["final_norm"], config.norm_eps), None
    written = []
    for i, kind in enumerate(_kinds(config, marks.positions)):
        w = {name: weight[i] for name, weight in layers.items()}
        if cache is None:
            x = _layer(config, marks, kind, remat)(x, w)
        else:
            x, new = _cached(x, w, kind.turn, marks, cache[i], config, kind.window, first)
            written.append(new)
    x = rms_norm(x, params["final_norm"], config.norm_eps)
    return x, tuple(written) if cache is not None else None


def logits(params: Params, config: Config, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """Next-token logits in fp32 from the tied embedding, soft-capped where the config says so."""
    out = project("btd,vd->btv", x, params["embed"], dtype=jnp.float32)
    if config.final_softcap is not None:
        out = config.final_softcap * jnp.tanh(out / config.final_softcap)
    return out


def forward(
    params: Params,
    config: Config,
    tokens: Int[Array, "B T"],
    marks: Marks | None = None,
    *,
    dtype: Any = jnp.float32,
) -> Float[Array, "B T V"]:
    """Logits at every position. They are V wide: for training and long texts, cut `hidden` in chunks and call `logits`."""
    return logits(params, config, hidden(params, config, tokens, marks, dtype=dtype)[0])
