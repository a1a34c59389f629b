"""What an answer is worth: a reward model's score, or a function that can tell whether it is right.

A reward takes rollouts and gives a number for each; None is for one that it cannot judge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from gemmary.config import Config
from gemmary.data.lessons import right
from gemmary.data.packing import Batch, stacked
from gemmary.data.tokens import tokenizer_digest
from gemmary.data.turns import lay_out, pack
from gemmary.errors import GemmaryError
from gemmary.params import Params
from gemmary.text.tokenizer import Tokenizer
from gemmary.train.objectives import scores
from gemmary.train.rollouts import Rollout

__all__ = ["Reward", "exact_answer", "model_reward", "rewarded", "score_answers"]

Reward = Callable[[Sequence[Rollout]], Sequence[float | None]]


def exact_answer(rollouts: Sequence[Rollout]) -> list[float | None]:
    """1 where a finished answer ends with what its prompt's `answer` says, else 0; None for prompts without one."""
    return [
        None if one.prompt.answer is None else float(one.finished and right(one.text, one.prompt.answer))
        for one in rollouts
    ]


def model_reward(
    params: Params, config: Config, tokenizer: Tokenizer, policy: Tokenizer, *, dtype: Any, length: int
) -> Reward:
    """A reward model's scores. Raises GemmaryError where it is none, or has another tokenizer than the policy."""
    if not config.score_head:
        raise GemmaryError("this is a language model, not a reward model: gemmary reward trains one")
    if tokenizer_digest(tokenizer) != tokenizer_digest(policy):
        raise GemmaryError("the reward model has another tokenizer than the policy: its scores would be of other texts")

    def judge(rollouts: Sequence[Rollout]) -> list[float | None]:
        return list(score_answers(params, config, rollouts, dtype=dtype, length=length, pad=tokenizer.pad))

    return judge


@partial(jax.jit, static_argnames=("config", "dtype"))
def _scores(params: Params, batch: Batch, config: Config, dtype: Any) -> jax.Array:
    return scores(params, config, batch, dtype=dtype)


def score_answers(
    params: Params, config: Config, rollouts: Sequence[Rollout], *, dtype: Any, length: int, pad: int, rows: int = 4
) -> list[float]:
    """The score of each answer, read at its last token; packed into rows of `length`, a multiple of `rows` of them."""
    ids = [np.array([*one.prompt.ids, *one.ids], np.int64) for one in rollouts]
    packed = pack([len(one) for one in ids], length)
    packed += [[]] * (-len(packed) % rows)
    made = [lay_out([(ids[i], np.zeros(len(ids[i]), np.int64)) for i in row], length, pad) for row in packed]
    found = np.asarray(_scores(params, stacked(made), config, dtype))
    result = [0.0] * len(ids)
    for number, row in enumerate(packed):
        for i, end in zip(row, np.cumsum([len(ids[i]) for i in row], dtype=np.int64) - 1, strict=True):
            result[i] = float(found[number, end])
    return result


def rewarded(reward: Reward, rollouts: Sequence[Rollout]) -> list[float | None]:
    """What the reward says; a number that is none, and all of them where it raises, are None. A GemmaryError is the user's to mend."""
    try:
        given = [None if value is None else float(value) for value in reward(rollouts)]
        if len(given) != len(rollouts):
            raise ValueError(f"{len(given)} rewards for {len(rollouts)} answers")
    except GemmaryError:
        raise
    except Exception:  # whatever a reward does must not lose the run
        if len(rollouts) == 1:
            return [None]
        return [value for one in rollouts for value in rewarded(reward, [one])]
    return [value if value is not None and math.isfinite(value) else None for value in given]
