"""What each stage learns by: next tokens, answers weighed by their advantage, and one answer preferred to another.

Each is a `Loss` of `step`: a sum, the weight it is a mean over, and sums to report.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gemmary.config import Config
from gemmary.data.packing import Batch
from gemmary.data.turns import PairBatch
from gemmary.eight import Eight
from gemmary.model.attention import Marks
from gemmary.model.transformer import Remat, hidden
from gemmary.params import Params
from gemmary.train.head import Head
from gemmary.train.losses import packed_loss, token_log_probs
from gemmary.train.step import Loss, Sums
from gemmary.weights import map_rows

__all__ = [
    "dpo_loss",
    "language_loss",
    "policy_loss",
    "preference_loss",
    "scores",
    "sequence_log_probs",
    "target_log_probs",
]


def language_loss(
    config: Config, *, head: Head, dtype: Any = jnp.float32, remat: Remat = "none", int8: bool = False
) -> Loss:
    """Next-token prediction over packed rows; reports `loss`, in nats for each token that counts. `int8`: see `eight`."""

    def loss(params: Params, batch: Batch, rng: Array) -> Sums:
        if int8:
            params = map_rows(params, lambda name, w: Eight(w), lambda spec: spec.layered and bool(spec.reads))
        total, nats = packed_loss(params, config, batch, head, dtype=dtype, remat=remat)
        return Sums(total, jnp.sum(batch.mask), {"loss": nats})

    return loss


def policy_loss(config: Config, *, head: Head, dtype: Any = jnp.float32, remat: Remat = "none") -> Loss:
    """REINFORCE (Williams 1992) over sampled answers: -advantage * log p(answer), a mean over answers.

    A batch's `mask` holds each answer's advantage at its tokens. With one step for each batch of samples the policy is
    the sampler, and no ratio between the two is needed.
    """

    def loss(params: Params, batch: Batch, rng: Array) -> Sums:
        total, nats = packed_loss(params, config, batch, head, dtype=dtype, remat=remat)
        answers = (batch.segments.max(axis=1) + 1).sum().astype(jnp.float32)
        return Sums(total, answers, {"loss": nats})

    return loss


def scores(params: Params, config: Config, batch: Batch, *, dtype: Any, remat: Remat = "none") -> Float[Array, "B T"]:
    """A reward model's score after every token, fp32."""
    x = _hidden(params, config, batch, dtype, remat)
    found: Array = x.astype(jnp.float32) @ params["score"].astype(jnp.float32)
    return found


def preference_loss(config: Config, *, dtype: Any = jnp.float32, remat: Remat = "none") -> Loss:
    """Bradley and Terry's model: -log sigmoid(score of the preferred answer - score of the other), a mean over pairs.

    Reports `loss` and `accuracy`, the share of pairs whose preferred answer has the higher score (ties count half).
    """

    def loss(params: Params, batch: PairBatch, rng: Array) -> Sums:
        found = scores(params, config, Batch(*batch[:5]), dtype=dtype, remat=remat)
        return _preferred(found - _at(found, batch.partner), batch.partner)

    return loss


def dpo_loss(config: Config, *, beta: float, head: Head, dtype: Any = jnp.float32, remat: Remat = "none") -> Loss:
    """Direct preference optimization (Rafailov et al., arXiv 2305.18290): the pairs' loss, the policy as its own reward.

    Of a batch (pairs, reference): the reference model's log-probabilities of the answers, as `sequence_log_probs` gives them.
    """

    def loss(params: Params, batch: tuple[PairBatch, Array], rng: Array) -> Sums:
        pairs, reference = batch
        found = sequence_log_probs(params, config, Batch(*pairs[:5]), head, dtype=dtype, remat=remat)
        reward = beta * (found - reference)
        return _preferred(reward - _at(reward, pairs.partner), pairs.partner)

    return loss


def target_log_probs(
    params: Params, config: Config, batch: Batch, head: Head, *, dtype: Any, remat: Remat = "none"
) -> Float[Array, "B T"]:
    """The log-probability of each slot's target, whether it counts or not."""
    x = _hidden(params, config, batch, dtype, remat)
    return token_log_probs(x, params["embed"], jnp.asarray(batch.targets), head)


def sequence_log_probs(
    params: Params, config: Config, batch: Batch, head: Head, *, dtype: Any, remat: Remat = "none"
) -> Float[Array, "B T"]:
    """At each slot, the log-probability of what was learnt (`mask`) of its segment up to there: at its last, of all of it."""
    found = target_log_probs(params, config, batch, head, dtype=dtype, remat=remat) * (batch.mask != 0)
    # Summed by segment: a row's running sum would mix in what came before it.
    same = batch.segments[:, :, None] == batch.segments[:, None, :]
    before = batch.positions[:, :, None] >= batch.positions[:, None, :]
    return jnp.einsum("bts,bs->bt", (same & before).astype(found.dtype), found)


def _hidden(params: Params, config: Config, batch: Batch, dtype: Any, remat: Remat) -> Float[Array, "B T D"]:
    marks = Marks(jnp.asarray(batch.positions), jnp.asarray(batch.segments))
    return hidden(params, config, jnp.asarray(batch.tokens), marks, dtype=dtype, remat=remat)[0]


def _at(values: Float[Array, "B T"], places: Any) -> Float[Array, "B T"]:
    return jnp.take_along_axis(values, jnp.maximum(places, 0), axis=1)


def _preferred(margin: Float[Array, "B T"], partner: Any) -> Sums:
    """The pairs' loss of their margins, which stand where `partner` is not -1."""
    pairs = (partner >= 0).astype(jnp.float32)
    total = (pairs * jax.nn.softplus(-margin)).sum()
    right = (pairs * ((margin > 0) + 0.5 * (margin == 0))).sum()
    return Sums(total, pairs.sum(), {"loss": total, "accuracy": right})
