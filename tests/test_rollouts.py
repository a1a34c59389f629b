"""Answers sampled from the policy: the log-probabilities that a step would give them, and draws that nothing else changes."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tuning_runs import COLOURS, THINGS, config, params, prompt, tokenizer

from gemmary.config import Config
from gemmary.data.packing import Batch
from gemmary.model.attention import Marks
from gemmary.model.transformer import hidden
from gemmary.params import Params, init, unstack
from gemmary.train.head import Head
from gemmary.train.losses import token_log_probs
from gemmary.train.rollouts import Prompt, Rollout, as_batch, repetition, roll, seeds

LONG = config().replace(context=160)
# As Gemma 3 has them: norms of queries and keys, norms behind, a soft-cap as Gemma 2, and a window shorter than the answers.
WINDOWED = LONG.replace(
    generation=3, qk_norm=True, post_norms=True, window=24, window_pattern=(True, False), final_softcap=20.0
)
PADDED = LONG.replace(vocab_size=640)
ASKED = [prompt(f"say {thing} {colour}") for colour in COLOURS[:4] for thing in THINGS]


@partial(jax.jit, static_argnames=("config", "head"))
def trainers(params: Params, batch: Batch, config: Config, head: Head) -> jax.Array:
    """As a step has them: in rows that answers share, the vocabulary a chunk of positions at a time."""
    marks = Marks(jnp.asarray(batch.positions), jnp.asarray(batch.segments))
    x, _ = hidden(params, config, jnp.asarray(batch.tokens), marks)
    return token_log_probs(x, params["embed"], jnp.asarray(batch.targets), head)


def rolled(asked: list[Prompt], drawn: list[int] | None, *, count: int = 12, of: Config | None = None) -> list[Rollout]:
    of = of or config()
    weights = params() if of is config() else unstack(init(of, jax.random.key(0)))
    return roll(weights, of, tokenizer(), asked, max_new_tokens=count, dtype=jnp.float32, seeds=drawn)


@pytest.fixture(scope="module", params=[LONG, WINDOWED, PADDED], ids=["gemma 1", "gemma 3", "padded"])
def long(request: pytest.FixtureRequest) -> tuple[Config, list[Rollout]]:
    """Over a thousand tokens sampled, some answers ended by a stop token."""
    return request.param, rolled(ASKED, seeds(1, 0, len(ASKED)), count=100, of=request.param)


def test_the_samplers_log_probabilities_are_the_trainers(long: tuple[Config, list[Rollout]]) -> None:
    of, answers = long
    assert sum(len(one.ids) for one in answers) >= 1000
    ended = [one for one in answers if one.finished]
    assert 0 < len(ended) < len(answers)
    batch, order = as_batch(answers, [1.0] * len(answers), 160, 0, 4)
    weights = unstack(init(of, jax.random.key(0)))
    found = np.asarray(trainers(weights, batch, of, Head(16, of.final_softcap)))
    compared, stops = 0, 0
    places = iter(order)
    for row in range(len(found)):
        for segment in range(batch.segments[row].max() + 1):
            one = answers[next(places)]
            here = (batch.segments[row] == segment) & (batch.mask[row] != 0)
            assert batch.targets[row][here].tolist() == list(one.ids)
            np.testing.assert_allclose(found[row][here], one.log_probs, atol=1e-5)
            compared, stops = compared + len(one.ids), stops + (one.ids[-1] in tokenizer().stop_ids)
    assert compared == sum(len(one.ids) for one in answers)
    assert stops == len(ended)


def test_an_answer_has_the_token_that_ended_it_and_its_text_has_not(long: tuple[Config, list[Rollout]]) -> None:
    for one in long[1]:
        assert len(one.ids) == len(one.log_probs)
        stops = [i for i in one.ids if i in tokenizer().stop_ids]
        assert stops == (list(one.ids[-1:]) if one.finished else [])
        assert one.text == tokenizer().decode(one.ids[:-1] if one.finished else one.ids)
        assert one.finished or len(one.ids) == 100


# --- Draws ------------------------------------------------------------------------------------------------------------


def test_a_draw_depends_on_its_seed_and_prompt_alone() -> None:
    """Not on its neighbours, nor on its place among them."""
    asked, drawn = ASKED[:4], [11, 12, 13, 14]
    first = rolled(asked, drawn)
    others = [ASKED[9], ASKED[2], prompt("say"), ASKED[0]]
    second = rolled(others, [99, 13, 5, 11])
    for a, b in ((first[2], second[1]), (first[0], second[3])):
        assert a.ids == b.ids
        np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-5)
    assert rolled(asked, drawn) == first
    assert rolled([ASKED[0]] * 4, drawn)[0].ids == first[0].ids


def test_other_seeds_draw_others() -> None:
    four = rolled([ASKED[0]] * 4, [1, 2, 3, 4])
    assert len({one.ids for one in four}) == 4


def test_without_seeds_it_is_greedy() -> None:
    one, *same = rolled([ASKED[0]] * 4, None)
    assert all(other.ids == one.ids for other in same)
    assert all(a.ids != one.ids for a in rolled([ASKED[0]] * 4, [1, 2, 3, 4]))


# The seeds of every run there is: changing these numbers makes runs that are gone on with draw others.
SEEDS = {(0, 0): [2735729615, 1158725112], (0, 1): [3821399010, 2392889704], (7, 0): [2684764585, 3853503932]}


@pytest.mark.parametrize("at", SEEDS)
def test_seeds_are_a_function_of_run_step_and_place(at: tuple[int, int]) -> None:
    assert seeds(*at, 2) == SEEDS[at]
    assert seeds(*at, 9)[:2] == SEEDS[at]
    assert all(0 <= seed < 1 << 32 for seed in seeds(*at, 100))
    assert len(set(seeds(*at, 100))) == 100


# --- Rows to learn from -----------------------------------------------------------------------------------------------


def _said(asked: int, ids: list[int]) -> Rollout:
    return Rollout(Prompt(tuple(range(50, 50 + asked)), ""), tuple(ids), (0.0,) * len(ids), "", True)


def test_an_answers_value_is_the_mask_of_its_tokens_and_of_no_others() -> None:
    answers = [_said(3, [7, 8, 9]), _said(2, [11]), _said(4, [21, 22])]
    batch, order = as_batch(answers, [2.0, -1.0, 0.5], 8, 0, 1)
    assert sorted(order) == [0, 1, 2]
    found: dict[int, float] = {}
    for target, weight in zip(batch.targets.ravel().tolist(), batch.mask.ravel().tolist(), strict=True):
        if weight:
            found[target] = weight
    assert found == {7: 2.0, 8: 2.0, 9: 2.0, 11: -1.0, 21: 0.5, 22: 0.5}
    places = iter(order)
    for row in range(len(batch.tokens)):
        for segment in range(batch.segments[row].max() + 1):
            one = answers[next(places)]
            here = batch.segments[row] == segment
            assert batch.tokens[row][here].tolist() == [*one.prompt.ids, *one.ids]


@pytest.mark.parametrize(("rows", "wanted"), [(1, 3), (2, 4), (4, 4), (8, 8)])
def test_rows_are_rounded_up(rows: int, wanted: int) -> None:
    batch, _ = as_batch([_said(4, [7, 8])] * 3, [1.0] * 3, 10, 3, rows)
    assert batch.tokens.shape == (wanted, 10)
    assert (batch.segments[3:] == -1).all()
    assert (batch.tokens[3:] == 3).all()


@pytest.mark.parametrize(
    ("ids", "share"),
    [([], 0.0), ([1, 2, 3], 0.0), ([1, 2, 3, 4], 0.0), ([1, 2, 3, 4] * 2, 0.2), ([5] * 8, 0.8), (list(range(20)), 0.0)],
)
def test_repetition_is_the_share_of_runs_of_four_that_were_there_before(ids: list[int], share: float) -> None:
    assert repetition(ids) == pytest.approx(share)


def test_repetition_of_pairs() -> None:
    assert repetition([1, 2, 1, 2, 1], 2) == pytest.approx(0.5)
