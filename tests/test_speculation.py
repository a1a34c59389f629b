"""Guessing changes how fast the tokens come, and not which."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from models import small

from gemmary.errors import GemmaryError
from gemmary.infer.engine import Engine, Token
from gemmary.infer.sampling import Sampling
from gemmary.infer.speculation import Draft, Guesser, LookUp, speculate

SETTINGS = [Sampling(), Sampling(1.0, seed=3), Sampling(0.8, top_k=10, top_p=0.9, seed=4)]


def engine(kind: str = "gemma3") -> Engine:
    config, params = small(kind)[2:]
    return Engine(params, config)


def prompt(length: int) -> list[int]:
    return list(map(int, np.random.default_rng(length).integers(1, 60, length)))


class Oracle:
    """Knows the answer, but for some places; counts how often it is asked."""

    def __init__(self, answer: Sequence[int], wrong: float) -> None:
        self._answer, self._wrong, self._rng, self.asked = answer, wrong, np.random.default_rng(0), 0

    def guess(self, tokens: Sequence[int], most: int) -> list[int]:
        self.asked += 1
        at = len(tokens) - self.prompt
        right = self._answer[at : at + most]
        return [token if self._rng.random() >= self._wrong else (token + 1) % 50 for token in right]

    prompt = 0


def plain(model: Engine, ids: list[int], setting: Sampling, count: int = 40, stop: Sequence[int] = ()) -> list[Token]:
    steps = model.generate([ids], max_new_tokens=count, sampling=setting, stop_ids=stop, top_logprobs=3)
    return [step[0] for step in steps]


def guessed(model: Engine, ids: list[int], setting: Sampling, guesser: Guesser, **options: object) -> list[Token]:
    given = {"max_new_tokens": 40, "top_logprobs": 3, **options}
    return list(speculate(model, ids, guesser, sampling=setting, **given))  # type: ignore[arg-type]


def alike(mine: list[Token], theirs: list[Token]) -> None:
    assert [t.id for t in mine] == [t.id for t in theirs]
    assert [t.finish for t in mine] == [t.finish for t in theirs]
    np.testing.assert_allclose([t.logprob for t in mine], [t.logprob for t in theirs], atol=1e-4)
    assert [[i for i, _ in t.top_logprobs] for t in mine] == [[i for i, _ in t.top_logprobs] for t in theirs]


@pytest.mark.parametrize("kind", ["gemma1-mqa", "gemma2", "gemma3"])
def test_the_same_tokens_whatever_is_guessed(kind: str) -> None:
    model, ids = engine(kind), prompt(20)
    for setting in SETTINGS:
        wanted = plain(model, ids, setting)
        for wrong in (0.0, 0.3, 1.0):
            oracle = Oracle([token.id for token in wanted], wrong)
            oracle.prompt = len(ids)
            alike(guessed(model, ids, setting, oracle), wanted)
            assert oracle.asked == 10 if wrong == 0 else oracle.asked > 10  # four tokens a step, or fewer


def test_a_draft_model_and_a_look_up_too() -> None:
    model, ids = engine(), prompt(30)
    for setting in SETTINGS:
        wanted = plain(model, ids, setting)
        alike(guessed(model, ids, setting, LookUp()), wanted)
        alike(guessed(model, ids, setting, Draft(engine("gemma1-mqa"), 70)), wanted)
    for guesses in (1, 15):
        alike(guessed(model, ids, SETTINGS[0], Draft(engine(), 70), guesses=guesses), plain(model, ids, SETTINGS[0]))


def test_a_model_drafts_its_own_greedy_answer() -> None:
    model, ids = engine(), prompt(30)
    answer = [token.id for token in plain(model, ids, Sampling())]
    draft = Draft(model, 80)
    assert draft.guess([*ids, *answer[:5]], 4) == answer[5:9]
    assert draft.guess([*ids, *answer[:7]], 4) == answer[7:11]  # two were right
    assert draft.guess([*ids, *answer[:30]], 4) == answer[30:34]  # many came at once
    assert draft.guess([*ids, *answer, *answer], 20) == []  # no room


def test_looking_up() -> None:
    look = LookUp()
    assert look.guess([1, 2, 3, 4], 3) == []
    assert look.guess([1, 2, 3, 4, 9, 2, 3], 3) == [4, 9, 2]
    assert look.guess([1, 2, 3, 4, 9, 2, 3, 7, 2, 3], 3) == [7, 2, 3]  # the later one
    assert look.guess([1, 2, 3, 4, 9, 2, 3, 7, 2, 3, 4, 9], 2) == [2, 3]  # the longer one, 3 4 9
    assert LookUp().guess([5], 3) == []
    assert LookUp().guess([5, 5], 3) == [5]


def test_stops_and_the_end_of_the_context() -> None:
    model, ids = engine(), prompt(12)
    wanted = plain(model, ids, Sampling(1.0, seed=9))
    stop = wanted[17].id
    ended = plain(model, ids, Sampling(1.0, seed=9), stop=[stop])
    oracle = Oracle([token.id for token in wanted], 0.0)
    oracle.prompt = len(ids)
    alike(guessed(model, ids, Sampling(1.0, seed=9), oracle, stop_ids=[stop]), ended)
    short = Engine(model.params, model.config.replace(context=30))
    alike(guessed(short, ids, Sampling(), LookUp()), plain(short, ids, Sampling()))
    assert len(guessed(model, ids, Sampling(), LookUp(), max_new_tokens=1)) == 1


def test_what_is_refused() -> None:
    with pytest.raises(GemmaryError, match="penalties count every token"):
        guessed(engine(), prompt(5), Sampling(repetition_penalty=1.2), LookUp())
    with pytest.raises(GemmaryError, match="guesses is 16; it must be from 1 to 15"):
        guessed(engine(), prompt(5), Sampling(), LookUp(), guesses=16)
    with pytest.raises(GemmaryError, match="at least <bos>"):
        guessed(engine(), [], Sampling(), LookUp())
