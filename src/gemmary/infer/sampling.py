"""From logits to the next token, inside the jitted step, one setting per row.

Filters apply in the order that Hugging Face's do: penalties and biases, temperature, top-k, top-p, min-p. Thresholds are found
by bisection on the logits' bits, not by sorting 256k of them: all tokens equal to the last one kept are kept too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gemmary import kernels
from gemmary.errors import GemmaryError

__all__ = ["GREEDY", "Drawn", "Rows", "Sampling", "highest", "recorded", "rows_of", "sample", "seen_in"]

_EXCLUDED = -1e30
_IN_PROMPT = 1 << 30
"""Added to a token's count in the history where it is in the prompt."""


@dataclass(frozen=True)
class Sampling:
    """How one answer is drawn. Temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and a penalty of 1 filter nothing.

    The repetition penalty (Keskar et al., arXiv 1909.05858) holds down what is in the prompt or the answer, the other two
    (OpenAI's) what is in the answer: once, or as often as it is there.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        limits: dict[str, tuple[float, float, bool]] = {
            "temperature": (0.0, 100.0, True),
            "top_k": (0, 1 << 20, True),
            "top_p": (0.0, 1.0, False),
            "min_p": (0.0, 1.0, True),
            "repetition_penalty": (0.0, 100.0, False),
            "presence_penalty": (-2.0, 2.0, True),
            "frequency_penalty": (-2.0, 2.0, True),
            "seed": (0, (1 << 32) - 1, True),
        }
        for name, (least, most, closed) in limits.items():
            value = getattr(self, name)
            inside = least <= value <= most if closed else least < value <= most
            if not math.isfinite(value) or not inside:
                raise GemmaryError(f"{name} is {value}; it must be {'from' if closed else 'above'} {least} to {most}")

    @property
    def penalized(self) -> bool:
        """Whether tokens that are there already are held down."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


GREEDY = Sampling()


class Rows(NamedTuple):
    """The settings of a batch, as arrays."""

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    repetition_penalty: Float[Array, " B"]
    presence_penalty: Float[Array, " B"]
    frequency_penalty: Float[Array, " B"]
    seed: Int[Array, " B"]


def rows_of(settings: Sequence[Sampling]) -> Rows:
    """One setting per row, as arrays."""
    dtypes = {"top_k": np.int32, "seed": np.uint32}
    values: Any = (
        np.array([getattr(s, name) for s in settings], dtypes.get(name, np.float32)) for name in Rows._fields
    )
    return Rows(*values)


def _ordered(x: Float[Array, "B V"]) -> Int[Array, "B V"]:
    """Integers that order as the floats do."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _threshold(keys: Int[Array, "B V"], amount: Float[Array, "B V"], enough: Float[Array, " B"]) -> Int[Array, " B"]:
    """The largest key such that what is at or above it amounts to enough."""

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # low holds enough, high does not
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, without overflow
        holds = jnp.where(keys >= middle[:, None], amount, 0).sum(axis=1) >= enough
        return jnp.where(holds, middle, low), jnp.where(holds, high, middle)

    ends = np.iinfo(np.int32)
    start = (jnp.full(keys.shape[0], ends.min), jnp.full(keys.shape[0], ends.max))
    found: Array = jax.lax.fori_loop(0, 32, halve, start)[0]
    return found


def _filtered(logits: Float[Array, "B V"], rows: Rows) -> Float[Array, "B V"]:
    """Logits at their temperature, with what top-k, top-p and min-p drop excluded."""

    def top_k(x: Array) -> Array:
        keys = _ordered(x)
        count = jnp.where(rows.top_k > 0, rows.top_k, x.shape[1]).astype(jnp.float32)
        kept = keys >= _threshold(keys, jnp.ones_like(x), count)[:, None]
        return jnp.where(kept, x, _EXCLUDED)

    def top_p(x: Array) -> Array:
        keys, p = _ordered(x), jax.nn.softmax(x, axis=1)
        kept = keys >= _threshold(keys, p, rows.top_p * p.sum(axis=1))[:, None]
        return jnp.where(kept | (rows.top_p >= 1)[:, None], x, _EXCLUDED)

    x = logits / jnp.where(rows.temperature > 0, rows.temperature, 1)[:, None]
    x = jax.lax.cond((rows.top_k > 0).any(), top_k, lambda x: x, x)
    x = jax.lax.cond((rows.top_p < 1).any(), top_p, lambda x: x, x)
    floor = x.max(axis=1) + jnp.log(rows.min_p)  # log 0 is -inf: no floor
    return jnp.where(x >= floor[:, None], x, _EXCLUDED)


def _pick(x: Float[Array, "B V"], u: Float[Array, " B"]) -> Int[Array, " B"]:
    """The token at which the cumulative probability passes u: blocks first, then within one, so that sums stay short."""
    width = 512
    p = jnp.exp(x - x.max(axis=1, keepdims=True))
    blocks = jnp.pad(p, ((0, 0), (0, -x.shape[1] % width))).reshape(x.shape[0], -1, width)
    block, rest = _passing(blocks.sum(axis=2), u)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * width + _passing(inside, rest)[0]


def _passing(mass: Float[Array, "B M"], u: Float[Array, " B"]) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Where the cumulative mass passes the share u of it, and which share of that entry u then stands for."""
    total = jnp.cumsum(mass, axis=1)
    # Kept just under one: some token must pass even where rounding shortens the sum.
    wanted = jnp.minimum(u, 1 - 2.0**-20)[:, None] * total[:, -1:]
    at = jnp.argmax(total > wanted, axis=1)
    entry = jnp.take_along_axis(mass, at[:, None], axis=1)
    before = jnp.take_along_axis(total, at[:, None], axis=1) - entry
    return at, jnp.clip((wanted - before) / entry, 0, 1)[:, 0]


class Drawn(NamedTuple):
    """The next token of each row, and the model's own log-probabilities, before any filter: its, and the highest ones."""

    ids: Int[Array, " B"]
    logprobs: Float[Array, " B"]
    top_ids: Int[Array, "B C"]
    top_logprobs: Float[Array, "B C"]


def seen_in(prompt: Sequence[int], vocab_size: int) -> np.ndarray:
    """The history of a row that has drawn nothing, int32 [V]."""
    history = np.zeros(vocab_size, np.int32)
    history[np.asarray(prompt)] = _IN_PROMPT
    return history


def recorded(
    history: Int[Array, "R V"], ids: Int[Array, " B"], at: Int[Array, " B"] | None = None
) -> Int[Array, "R V"]:
    """The history with the drawn tokens in it, in rows `at` (default: each in its own); what is past the last row is dropped."""
    return history.at[jnp.arange(len(ids)) if at is None else at, ids].add(1, mode="drop")


def sample(
    logits: Float[Array, "B V"],
    rows: Rows,
    history: Callable[[], Int[Array, "B V"]],
    position: Int[Array, " B"],
    num_tokens: int,
    *,
    top: int = 0,
    bias: Float[Array, "B V"] | None = None,
) -> Drawn:
    """The next token of each row, and the `top` likeliest.

    Ids at and past `num_tokens` are padding and never drawn. `history` gives what penalties count (see
    `seen_in`), and is asked only where there are such. A bias is added to
    the logits that are drawn from. A row's draw depends on its seed and position alone, so its neighbours do not change it.
    """
    best_ids, best, total = highest(logits, num_tokens, max(top, 1))
    penalized = (rows.repetition_penalty != 1) | (rows.presence_penalty != 0) | (rows.frequency_penalty != 0)

    def penalize(logits: Array) -> Array:
        past = history()
        penalty, count = rows.repetition_penalty[:, None], past & (_IN_PROMPT - 1)
        logits = jnp.where(past > 0, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
        return logits - rows.presence_penalty[:, None] * (count > 0) - rows.frequency_penalty[:, None] * count

    def draw(logits: Array) -> Array:
        keys = jax.vmap(lambda seed, at: jax.random.fold_in(jax.random.key(seed), at))(rows.seed, position)
        drawn = _pick(_filtered(logits, rows), jax.vmap(jax.random.uniform)(keys))
        return jnp.where(rows.temperature > 0, drawn, jnp.argmax(logits, axis=1))

    def steered(logits: Array) -> Array:
        logits = jax.lax.cond(penalized.any(), penalize, lambda x: x, logits)
        logits = logits if bias is None else logits + bias
        logits = jnp.where(jnp.arange(logits.shape[1]) < num_tokens, logits, _EXCLUDED)
        drawn: Array = jax.lax.cond((rows.temperature > 0).any(), draw, lambda x: jnp.argmax(x, axis=1), logits)
        return drawn

    if bias is None:
        plain = ~((rows.temperature > 0) | penalized).any()
        ids = jax.lax.cond(
            plain, lambda _: best_ids[:, 0].astype(jnp.int32), lambda x: steered(x).astype(jnp.int32), logits
        )
    else:
        ids = steered(logits).astype(jnp.int32)
    chosen = jnp.take_along_axis(logits, ids[:, None], axis=1)[:, 0] - total
    return Drawn(ids, chosen, best_ids[:, :top], best[:, :top] - total[:, None])


def highest(
    logits: Float[Array, "B V"], known: int, count: int
) -> tuple[Int[Array, "B C"], Float[Array, "B C"], Float[Array, " B"]]:
    """The highest logits among the first `known`, from the highest down, and the log-sum-exp of all: padding has its share too."""
    if kernels.serves_choice():
        return kernels.choose(logits, known, count)
    masked = jnp.where(jnp.arange(logits.shape[1]) < known, logits, _EXCLUDED)
    values, ids = jax.lax.top_k(masked, count)
    return ids, values, jax.nn.logsumexp(logits, axis=1)
