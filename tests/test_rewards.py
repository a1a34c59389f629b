"""What an answer is worth: right or not, or a reward model's score; and what becomes of rewards that cannot be had."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tuning_runs import COLOURS, LENGTH, THINGS, config, dialogue, params, prompt, tokenizer

from gemmary.errors import GemmaryError
from gemmary.model.transformer import hidden
from gemmary.params import Params
from gemmary.text.training import TokenizerSettings, train_tokenizer
from gemmary.train.rewards import exact_answer, model_reward, rewarded, score_answers
from gemmary.train.rollouts import Rollout

SCORER = config().replace(score_head=True)


def answered(said: str, *, right: str | None = None, finished: bool = True, asked: str = "say red") -> Rollout:
    ids = [*tokenizer().encode(said), *([tokenizer().end_of_turn] if finished else [])]
    return Rollout(prompt(asked, right), tuple(ids), (0.0,) * len(ids), said, finished)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def scorer() -> Params:
    return {**params(), "score": jax.random.normal(jax.random.key(3), (32,))}


# --- Right or not -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "right", "finished", "worth"),
    [
        ("That makes 12.", "12", True, 1.0),
        ("12 and then 13", "12", True, 0.0),
        ("it is Red!", "red", True, 1.0),
        ("red it is", "red", True, 0.0),
        ("12", "12", False, 0.0),
        ("", "12", True, 0.0),
        ("anything", None, True, None),
    ],
)
def test_an_exact_answer_ends_with_what_is_right(
    said: str, right: str | None, finished: bool, worth: float | None
) -> None:
    """And only a finished one does: what stops where the tokens do has not been given."""
    assert exact_answer([answered(said, right=right, finished=finished)]) == [worth]


def test_answers_are_judged_one_by_one() -> None:
    assert exact_answer([answered("1", right="1"), answered("2"), answered("2", right="1")]) == [1.0, None, 0.0]


# --- A model's score --------------------------------------------------------------------------------------------------


def test_a_score_is_that_of_the_answer_alone(scorer: Params) -> None:
    """Whatever rows it shares with others, more than one batch of rows holds."""
    answers = [
        answered(f"{thing} {colour} " * (1 + i % 3), asked=f"say {thing} {colour}", finished=i % 2 == 0)
        for i, (thing, colour) in enumerate((t, c) for t in THINGS for c in COLOURS[:4])
    ]
    found = score_answers(scorer, SCORER, answers, dtype=jnp.float32, length=LENGTH, pad=tokenizer().pad)
    ids = [[*one.prompt.ids, *one.ids] for one in answers]
    padded = jnp.asarray([row + [0] * (LENGTH - len(row)) for row in ids])
    alone = np.asarray(jax.jit(lambda ids: hidden(scorer, SCORER, ids)[0] @ scorer["score"])(padded))
    np.testing.assert_allclose(found, [alone[i, len(row) - 1] for i, row in enumerate(ids)], atol=1e-5)
    assert len(set(np.round(found, 4))) == len(answers)


def test_a_model_judges_the_policys_answers(scorer: Params) -> None:
    judge = model_reward(scorer, SCORER, tokenizer(), tokenizer(), dtype=jnp.float32, length=LENGTH)
    answers = [answered("red"), answered("blue")]
    assert judge(answers) == score_answers(scorer, SCORER, answers, dtype=jnp.float32, length=LENGTH, pad=0)


def test_a_language_model_judges_nothing() -> None:
    with pytest.raises(GemmaryError, match="a language model, not a reward model"):
        model_reward(params(), config(), tokenizer(), tokenizer(), dtype=jnp.float32, length=LENGTH)


def test_another_tokenizer_is_refused(scorer: Params) -> None:
    """Of the same size, and as near as can be: the same words, a piece apart."""
    text = "\n".join(f"{a} {b}" for a in [*COLOURS, *THINGS, "user", "model"] for b in [*COLOURS, *THINGS])
    other = train_tokenizer([text], TokenizerSettings(vocab_size=560, threads=1))
    with pytest.raises(GemmaryError, match="another tokenizer than the policy"):
        model_reward(scorer, SCORER, other, tokenizer(), dtype=jnp.float32, length=LENGTH)


def test_scores_are_read_at_the_last_token(scorer: Params) -> None:
    """What is learnt of pairs, whose last token is `<end_of_turn>` too."""
    one = answered("red hats")
    whole = dialogue("say red", "red hats").ids
    assert [*one.prompt.ids, *one.ids] == whole[:-1]  # the newline behind is never generated


# --- Rewards that cannot be had ---------------------------------------------------------------------------------------


def fails_on(word: str, how: Callable[[], Any]) -> Callable[[Sequence[Rollout]], list[Any]]:
    return lambda rollouts: [how() if word in one.text else float(len(one.text)) for one in rollouts]


def raises(error: BaseException) -> Any:
    raise error


THREE = [answered("red"), answered("green"), answered("blue")]


def test_an_answer_that_makes_a_reward_raise_is_the_only_one_left_out() -> None:
    assert rewarded(fails_on("green", lambda: raises(ZeroDivisionError("x"))), THREE) == [3.0, None, 4.0]


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, None])
def test_what_is_no_number_is_unknown(odd: float | None) -> None:
    assert rewarded(fails_on("blue", lambda: odd), THREE) == [3.0, 5.0, None]


def test_numbers_of_other_kinds_are_floats() -> None:
    found = rewarded(lambda rollouts: np.arange(len(rollouts), dtype=np.float32), THREE)  # type: ignore[arg-type, return-value]
    assert found == [0.0, 1.0, 2.0]
    assert all(type(value) is float for value in found)
    assert rewarded(lambda rollouts: [True, 0, 2], THREE) == [1.0, 0.0, 2.0]


def test_a_reward_that_always_raises_knows_none() -> None:
    assert rewarded(lambda rollouts: raises(RuntimeError("no")), THREE) == [None] * 3


def test_what_the_user_can_mend_ends_it() -> None:
    with pytest.raises(GemmaryError, match="no sandbox"):
        rewarded(fails_on("green", lambda: raises(GemmaryError("no sandbox"))), THREE)


def test_an_interrupt_is_no_error_of_the_reward() -> None:
    with pytest.raises(KeyboardInterrupt):
        rewarded(fails_on("green", lambda: raises(KeyboardInterrupt())), THREE)


@pytest.mark.parametrize("gives", [["no number"], [1.0, 2.0, 3.0], [[1.0]]])
def test_what_is_no_number_for_each_answer_cannot_be_judged(gives: list[object]) -> None:
    assert rewarded(lambda rollouts: gives, [answered("red"), answered("blue")]) == [None, None]  # type: ignore[arg-type, return-value]
