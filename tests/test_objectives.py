"""What each stage learns by, against its formula on every conversation alone: that they share rows must not show."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemmary.data.packing import Batch, stacked
from gemmary.data.tokens import Tokens
from gemmary.data.turns import PackedPairs, PairBatch, lay_out, pack
from gemmary.model.transformer import forward, hidden
from gemmary.params import Params, init, unstack
from gemmary.presets import nano
from gemmary.train.head import Head
from gemmary.train.objectives import dpo_loss, policy_loss, preference_loss, scores, sequence_log_probs
from gemmary.train.rollouts import Prompt, Rollout, as_batch
from gemmary.train.step import Sums

CONFIG = nano(1, 48).replace(num_layers=1, embed_dim=16, ffw_dim=32, head_dim=8, num_heads=2, context=64)
SCORER = CONFIG.replace(score_head=True)
HEAD = Head(8, sparse=True)
LENGTH, LONGEST, BETA = 32, 14, 0.3
KEY = jax.random.key(0)
PAIRS = 7


class Said:
    """Conversations as `Tokens` gives them: ids, and which of them the model said."""

    def __init__(self, ids: list[np.ndarray], prompts: list[int]) -> None:
        self.ids, self.prompts = ids, prompts
        self.lengths = np.array([len(one) for one in ids])

    def __getitem__(self, index: int) -> np.ndarray:
        return self.ids[index]

    def learnt(self, index: int) -> np.ndarray:
        return (np.arange(len(self.ids[index])) >= self.prompts[index]).astype(np.uint8)

    def alone(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids and what is learnt of each conversation [n, LONGEST], zeros behind its end."""
        both = (self.ids, [self.learnt(i) for i in range(len(self.ids))])
        return tuple(np.stack([np.pad(x, (0, LONGEST - len(x))) for x in some]) for some in both)  # type: ignore[return-value]


def _said() -> tuple[Said, Said]:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 48, size) for size in rng.integers(2, 7, PAIRS)]
    both = []
    for _ in range(2):
        ids = [np.concatenate([p, rng.integers(3, 48, rng.integers(1, LONGEST - len(p) + 1))]) for p in prompts]
        both.append(Said(ids, [len(p) for p in prompts]))
    return both[0], both[1]


CHOSEN, REJECTED = _said()


@pytest.fixture(scope="module")
def params() -> Params:
    drawn = unstack(init(SCORER, KEY))
    return {**drawn, "score": jax.random.normal(jax.random.key(5), (16,))}


@pytest.fixture(scope="module")
def batch() -> PairBatch:
    """All pairs once, several to a row, and a row of padding."""
    chosen, rejected = (cast("Tokens", said) for said in (CHOSEN, REJECTED))
    rows = PackedPairs(chosen, rejected, "pairs", length=LENGTH, seed=0, pad=0)
    assert rows.rows < PAIRS
    return stacked([*(rows.row(items) for items in rows.in_order()), rows.row([])])


def _order() -> list[int]:
    """The pairs in the order of the batch's rows."""
    return [i for row in pack((CHOSEN.lengths + REJECTED.lengths).tolist(), LENGTH) for i in row]


@jax.jit
def _scores_alone(params: Params, ids: Any) -> jax.Array:
    return hidden(params, SCORER, ids)[0] @ params["score"]


@jax.jit
def _log_probs_alone(params: Params, ids: Any, learnt: Any) -> jax.Array:
    """Of every conversation, that of what is learnt in it, plainly."""
    every = jax.nn.log_softmax(forward(params, CONFIG, ids))
    picked = jnp.take_along_axis(every[:, :-1], ids[:, 1:, None], axis=-1)[..., 0]
    return (picked * learnt[:, 1:]).sum(axis=1)


def _last_scores(params: Params, said: Said) -> np.ndarray:
    found = np.asarray(_scores_alone(params, said.alone()[0]))
    return found[np.arange(PAIRS), said.lengths - 1]


def _without(params: Params) -> Params:
    return {name: weight for name, weight in params.items() if name != "score"}


@partial(jax.jit, static_argnames="loss")
def _of(loss: Any, params: Params, batch: Any) -> Sums:
    return loss(params, batch, KEY)  # type: ignore[no-any-return]


PREFERENCE = preference_loss(SCORER)
DPO = dpo_loss(CONFIG, beta=BETA, head=HEAD)
POLICY = policy_loss(CONFIG, head=HEAD)
_answers = jax.jit(partial(sequence_log_probs, config=CONFIG, head=HEAD, dtype=jnp.float32))


# --- Scores and preferences -------------------------------------------------------------------------------------------


def test_scores_in_shared_rows_are_those_of_each_alone(params: Params, batch: PairBatch) -> None:
    found = np.asarray(scores(params, SCORER, Batch(*batch[:5]), dtype=jnp.float32))
    row, slot = np.nonzero(batch.partner >= 0)
    for here, said in ((slot, CHOSEN), (batch.partner[row, slot], REJECTED)):
        np.testing.assert_allclose(found[row, here], _last_scores(params, said)[_order()], atol=1e-5)


def test_preference_is_bradley_and_terrys(params: Params, batch: PairBatch) -> None:
    margin = _last_scores(params, CHOSEN).astype(np.float64) - _last_scores(params, REJECTED)
    found = _of(PREFERENCE, params, batch)
    assert float(found.weight) == PAIRS
    np.testing.assert_allclose(found.total, -np.log(1 / (1 + np.exp(-margin))).sum(), rtol=1e-5)
    np.testing.assert_array_equal(found.total, found.report["loss"])
    right = int((margin > 0).sum())
    assert 0 < right < PAIRS
    assert float(found.report["accuracy"]) == right


def test_a_tie_is_half_right(params: Params, batch: PairBatch) -> None:
    found = _of(PREFERENCE, {**params, "score": jnp.zeros(16)}, batch)
    assert float(found.report["accuracy"]) == PAIRS / 2
    np.testing.assert_allclose(found.total, PAIRS * np.log(2), rtol=1e-6)


def test_a_row_of_padding_is_no_pair(params: Params, batch: PairBatch) -> None:
    found = _of(PREFERENCE, params, jax.tree.map(lambda x: x[-1:], batch))
    assert float(found.total) == float(found.weight) == 0


# --- What a segment's answer is worth to the model --------------------------------------------------------------------


def test_a_last_slot_has_the_log_probability_of_its_own_answer(params: Params, batch: PairBatch) -> None:
    found = np.asarray(_answers(params, batch=Batch(*batch[:5])))
    row, slot = np.nonzero(batch.partner >= 0)
    for here, said in ((slot, CHOSEN), (batch.partner[row, slot], REJECTED)):
        wanted = np.asarray(_log_probs_alone(params, *said.alone()))[_order()]
        np.testing.assert_allclose(found[row, here], wanted, rtol=1e-5, atol=1e-5)
    assert not found[-1].any()


def test_a_slot_has_what_was_learnt_up_to_there(params: Params) -> None:
    ids, learnt = CHOSEN[0], CHOSEN.learnt(0)
    one = stacked([lay_out([(ids, learnt)], LENGTH, 0)])  # type: ignore[list-item]
    found = np.asarray(_answers(params, batch=one))[0, : len(ids)]
    every = np.asarray(jax.jit(lambda ids: jax.nn.log_softmax(forward(params, CONFIG, ids)))(ids[None]))[0]
    each = every[np.arange(len(ids) - 1), ids[1:]] * learnt[1:]
    np.testing.assert_allclose(found, [*np.cumsum(each), each.sum()], rtol=1e-5, atol=1e-5)
    assert not found[: CHOSEN.prompts[0] - 1].any()


# --- Direct preference optimization -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(batch: PairBatch) -> tuple[Params, jax.Array]:
    other = unstack(init(CONFIG, jax.random.key(9)))
    return other, _answers(other, batch=Batch(*batch[:5]))


def test_dpo_is_its_formula(params: Params, batch: PairBatch, reference: tuple[Params, jax.Array]) -> None:
    ratio = [
        np.asarray(_log_probs_alone(_without(params), *said.alone()), np.float64)
        - np.asarray(_log_probs_alone(reference[0], *said.alone()))
        for said in (CHOSEN, REJECTED)
    ]
    margin = BETA * (ratio[0] - ratio[1])
    found = _of(DPO, _without(params), (batch, reference[1]))
    np.testing.assert_allclose(found.total, np.log1p(np.exp(-margin)).sum(), rtol=1e-5)
    assert float(found.weight) == PAIRS
    assert 0 < float(found.report["accuracy"]) == (margin > 0).sum() < PAIRS


def test_at_the_reference_dpo_is_log_2(batch: PairBatch, reference: tuple[Params, jax.Array]) -> None:
    found = _of(DPO, reference[0], (batch, reference[1]))
    np.testing.assert_allclose(found.total, PAIRS * np.log(2), rtol=1e-5)


def test_dpo_falls_as_the_policy_comes_to_prefer_what_was_chosen(
    batch: PairBatch, reference: tuple[Params, jax.Array]
) -> None:
    policy, about = reference[0], (batch, reference[1])
    step = jax.jit(jax.grad(lambda params: DPO(params, about, KEY).total))
    found = [_of(DPO, policy, about)]
    for _ in range(4):
        policy = jax.tree.map(lambda w, g: w - 0.05 * g, policy, step(policy))
        found.append(_of(DPO, policy, about))
    losses = [float(one.total) for one in found]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.7 * losses[0]
    assert float(found[-1].report["accuracy"]) == PAIRS


# --- A policy's gradient ----------------------------------------------------------------------------------------------

ADVANTAGES = np.array([1.0, -0.5, 0.0, 2.0, -1.5, 0.25, -0.75])


def _rolled() -> Batch:
    """The chosen answers as if sampled, each with its advantage."""
    answers = [
        Rollout(Prompt(tuple(ids[:at].tolist()), ""), tuple(ids[at:].tolist()), (), "", True)
        for ids, at in zip(CHOSEN.ids, CHOSEN.prompts, strict=True)
    ]
    made, order = as_batch(answers, ADVANTAGES.tolist(), LENGTH, 0, 4)
    assert len(made.tokens) % 4 == 0
    assert sorted(order) == list(range(PAIRS))
    return made


def test_a_policys_gradient_is_reinforces(params: Params) -> None:
    """The mean over answers of -advantage times the gradient of log p, advantages below and at 0 too."""
    params = _without(params)
    ids, learnt = CHOSEN.alone()

    def plainly(params: Params) -> jax.Array:
        return -(ADVANTAGES * _log_probs_alone(params, ids, learnt)).sum() / PAIRS

    def ours(params: Params) -> jax.Array:
        sums = POLICY(params, _rolled(), KEY)
        return sums.total / sums.weight

    (value, found), (wanted, reference) = (jax.jit(jax.value_and_grad(f))(params) for f in (ours, plainly))
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(reference), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert float(jnp.abs(reference["embed"]).max()) > 0.01


def test_every_answer_counts_in_the_mean_whatever_its_advantage(params: Params) -> None:
    found = _of(POLICY, _without(params), _rolled())
    assert float(found.weight) == PAIRS
