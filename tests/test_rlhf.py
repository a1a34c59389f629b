"""Learning from rewards: what a step is made of, that it learns, and what ends or does not end it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tuning_runs import config, params, prompt, said, saved, tokenizer, tuned

from gemmary.data.packing import Batch
from gemmary.errors import GemmaryError
from gemmary.model.transformer import forward
from gemmary.params import Params
from gemmary.train import rlhf as module
from gemmary.train.finetune import LoraSettings, TuneSettings
from gemmary.train.rewards import exact_answer
from gemmary.train.rlhf import RlhfSettings, advantages, rlhf
from gemmary.train.rollouts import Prompt, Rollout
from gemmary.train.run import Ended
from gemmary.train.sft import sft
from gemmary.train.step import TrainState, make_step

SAID = ("red", "blue", "green birds", "grey hats boats doors")
"""What the policy that learning begins from answers, each about as often."""
ASKED = prompt("say hats", "red", where="asked.jsonl:3")
STEPS, ANSWERS = 30, 8


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Params:
    """A policy that has something to choose among."""
    folder = tmp_path_factory.mktemp("taught")
    tokens = said(folder / "tokens", [("say hats", answer) for answer in SAID])
    ended = sft(
        TuneSettings(**tuned(60, batch=4)), config(), params(), tokenizer(), {"all": tokens}, {}, folder / "run",
        weights={"all": 1.0},
    )  # fmt: skip
    return ended.state.params


def settings(**changes: Any) -> RlhfSettings:
    given = tuned(STEPS, batch=4, prompts=1, answers=ANSWERS, max_new_tokens=4, learning_rate=3e-3)
    return RlhfSettings(**{**given, **changes})


def ran(
    folder: Path, start: Params, reward: Any = exact_answer, *, asked: Sequence[Prompt] = (ASKED,),
    held_out: Sequence[Prompt] = (), success: Any = exact_answer, calls: dict[str, Any] | None = None, **changes: Any,
) -> Ended:  # fmt: skip
    return rlhf(
        settings(**changes), config(), start, tokenizer(), {"all": asked}, held_out, reward, success, folder,
        weights={"all": 1.0}, digest="asked", **calls or {},
    )  # fmt: skip


# --- It learns --------------------------------------------------------------------------------------------------------


class Runs(NamedTuple):
    """The same run unbroken, and broken off at step 17 and gone on with from 15."""

    whole: Ended
    parts: Ended
    folder: Path
    given: Params


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, taught: Params) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    options: dict[str, Any] = {"held_out": [ASKED] * ANSWERS, "save_every": 5, "evaluate_every": 10}

    def breaks(entry: dict[str, Any]) -> None:
        if entry["step"] == 17:
            raise KeyboardInterrupt

    given = jax.tree.map(jnp.array, taught)
    made: list[Any] = []  # one compiled step for all three

    def once(*arguments: Any, **options: Any) -> Any:
        made.append(made[0] if made else make_step(*arguments, **options))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "make_step", once)
        whole = ran(folder / "whole", given, **options)
        with pytest.raises(KeyboardInterrupt):
            ran(folder / "parts", given, calls={"report": breaks}, **options)
        said: list[str] = []
        parts = ran(folder / "parts", given, calls={"say": said.append}, **options)
    assert said == ["going on from step_00000015"]
    return Runs(whole, parts, folder, given)


def test_a_right_answer_is_learnt(runs: Runs) -> None:
    rewards = [entry["reward"] for entry in runs.whole.entries[1:]]
    assert np.mean(rewards[:5]) < 0.6
    assert np.mean(rewards[-5:]) > 0.9
    watched = [entry["watched"] for entry in runs.whole.entries if "watched" in entry]
    assert watched[-1]["success"] == 1.0
    assert watched[-1]["finished"] == 1.0


def test_it_begins_where_the_reference_is(runs: Runs) -> None:
    before, first = runs.whole.entries[:2]
    assert before["step"] == 0
    assert before["watched"]["win_rate"] == 0.5
    assert abs(first["kl"]) < 1e-4  # the sum over an answer
    assert runs.whole.last["kl"] > 0.1


def test_gone_on_with_is_unbroken(runs: Runs) -> None:
    """Samples, rewards and all: a draw is a function of the run's seed, the step and its place."""
    for a, b in zip(jax.tree.leaves(runs.whole.state.params), jax.tree.leaves(runs.parts.state.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    for name in ("step", "reward", "kl", "finished", "loss"):
        found, wanted = ([e.get(name, 0.0) for e in ended.entries] for ended in (runs.parts, runs.whole))
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3, err_msg=name)


def test_the_parameters_of_the_highest_success_are_kept(runs: Runs) -> None:
    found = {e["step"]: -e["watched"]["success"] for e in runs.whole.entries[1:] if "watched" in e}
    best = json.loads(next((runs.folder / "whole" / "best").glob("*/best.json")).read_text())
    assert best == {"step": min(found, key=found.__getitem__), "value": min(found.values())}


def test_the_given_weights_stay_as_they_were(runs: Runs, taught: Params) -> None:
    for a, b in zip(jax.tree.leaves(runs.given), jax.tree.leaves(taught), strict=True):
        np.testing.assert_array_equal(a, b)


def test_adapters_over_int8_learn_and_are_written_alone(tmp_path: Path, taught: Params) -> None:
    base = saved(tmp_path / "base", taught)
    lora = LoraSettings(rank=2, targets=("mlp.down",), base_bits=8)
    ended = ran(tmp_path / "run", taught, steps=2, lora=lora, calls={"base": str(base)})
    assert abs(ended.entries[0]["kl"]) < 1e-4  # of the policy in eight bits to the reference in eight bits
    assert ended.parameters.name == "adapter"
    assert set(ended.state.params) == {"mlp.down"}


# --- What a step is made of -------------------------------------------------------------------------------------------


class Steps:
    """Stands for the compiled step: keeps what it is given, and learns nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[Batch] = []
        monkeypatch.setattr(module, "make_step", lambda *_, **__: self)

    def __call__(self, state: TrainState, batch: Batch, rest: Any) -> tuple[TrainState, dict[str, Any]]:
        self.batches.append(batch)
        means = {"loss": jnp.float32(0.5), "gradient_norm": jnp.float32(1.0)}
        return replace(state, step=state.step + 1), means

    def advantages(self, at: int = 0) -> dict[tuple[int, ...], set[float]]:
        """By answer, what its tokens are weighed with."""
        found: dict[tuple[int, ...], set[float]] = {}
        batch = self.batches[at]
        for row in range(len(batch.tokens)):
            for segment in range(batch.segments[row].max() + 1):
                here = np.flatnonzero(batch.segments[row] == segment)[len(ASKED.ids) - 1 : -1]
                weights = {round(float(w), 4) for w in batch.mask[row][here]}
                assert len(weights) == 1  # one for all of an answer's tokens
                found.setdefault(tuple(batch.targets[row][here].tolist()), set()).update(weights)
        return found


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    return Steps(monkeypatch)


class Kept:
    """A reward that keeps what it was asked about."""

    def __init__(self, worth: Callable[[Rollout], Any]) -> None:
        self.asked: list[Rollout] = []
        self._worth = worth

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Any]:
        self.asked += rollouts
        return [self._worth(one) for one in rollouts]


def leave_one_out(values: Sequence[float | None]) -> list[float]:
    """By hand: each less the mean of the others that are known."""
    found = []
    for i, value in enumerate(values):
        others = [v for j, v in enumerate(values) if j != i and v is not None]
        found.append(0.0 if value is None or not others else value - sum(others) / len(others))
    return found


def close(found: dict[tuple[int, ...], set[float]], asked: Sequence[Rollout], gains: Sequence[float]) -> None:
    """Every answer has its gain; of one prompt, equal answers have the same."""
    wanted: dict[tuple[int, ...], list[float]] = {}
    for one, gain in zip(asked, gains, strict=True):
        wanted.setdefault(one.ids, []).append(gain)
    assert set(found) == set(wanted)
    for ids, values in wanted.items():
        (gain,) = found[ids]
        np.testing.assert_allclose(values, gain, atol=1e-3)


def test_an_answers_advantage_is_its_value_less_the_others_mean(tmp_path: Path, taught: Params, steps: Steps) -> None:
    """Of its reward, less what an unfinished one costs; the penalty is nothing at the first step."""
    worth = {"red": 3.0, "blue": 1.0}
    reward = Kept(lambda one: worth.get(one.text, 0.5))
    ended = ran(tmp_path, taught, reward, steps=1, unfinished=2.0, beta=1.0, calls={"seed": 1})
    done = [one.finished for one in reward.asked]
    assert set(done) == {True, False}
    rewards = [worth.get(one.text, 0.5) for one in reward.asked]
    values = [value - (0.0 if end else 2.0) for value, end in zip(rewards, done, strict=True)]
    close(steps.advantages(), reward.asked, leave_one_out(values))
    assert ended.last["reward"] == pytest.approx(np.mean(rewards))
    assert ended.last["finished"] == np.mean(done)
    assert ended.last["answer_tokens"] == np.mean([len(one.ids) for one in reward.asked])
    assert ended.last["unjudged"] == 0


def test_the_penalty_is_the_log_ratio_to_the_reference(
    tmp_path: Path, taught: Params, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_reference", lambda pupil: params())  # one that has learnt nothing
    reward = Kept(lambda one: 1.0)
    ended = ran(tmp_path, taught, reward, steps=1, max_new_tokens=1, unfinished=0.0, beta=0.5)
    plain = jax.nn.log_softmax(jax.jit(forward, static_argnums=1)(params(), config(), jnp.asarray([ASKED.ids])))[0, -1]
    ratios = [one.log_probs[0] - float(plain[one.ids[0]]) for one in reward.asked]
    close(steps.advantages(), reward.asked, leave_one_out([1.0 - 0.5 * ratio for ratio in ratios]))
    assert ended.last["kl"] == pytest.approx(np.mean(ratios), rel=1e-4)


def test_every_step_asks_each_of_its_prompts_so_often(tmp_path: Path, taught: Params, steps: Steps) -> None:
    """Each prompt of the source before any comes again."""
    others = [prompt(asked) for asked in ("say boats", "say birds", "say doors")]
    reward = Kept(lambda one: 1.0)
    ran(tmp_path, taught, reward, asked=[ASKED, *others], steps=2, prompts=2, answers=4)
    asked = [one.prompt.text for one in reward.asked]
    assert [len(set(asked[at : at + 4])) for at in range(0, 16, 4)] == [1, 1, 1, 1]
    assert len(set(asked)) == 4
    assert len(steps.batches) == 2


@pytest.mark.parametrize(
    ("values", "known"),
    [
        ([[1.0, 2.0, 6.0]], [[True, True, True]]),
        ([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0]], [[True, False, True], [True, True, True]]),
        ([[1.0, 9.0, 9.0]], [[True, False, False]]),  # the only known one has nothing to be measured by
        ([[9.0, 9.0]], [[False, False]]),
    ],
)
def test_advantages_by_hand(values: list[list[float]], known: list[list[bool]]) -> None:
    found = advantages(np.array(values), np.array(known))
    for row, which, gains in zip(values, known, found, strict=True):
        hand = leave_one_out([value if here else None for value, here in zip(row, which, strict=True)])
        np.testing.assert_allclose(gains, hand)
    if all(map(all, known)):
        np.testing.assert_allclose(found.sum(axis=1), 0, atol=1e-12)


def test_advantages_of_three_in_numbers() -> None:
    found = advantages(np.array([[1.0, 2.0, 6.0]]), np.array([[True, True, True]]))
    np.testing.assert_allclose(found, [[-3.0, -1.5, 4.5]])


# --- Answers that a reward cannot judge -------------------------------------------------------------------------------


def judges_all_but(word: str, how: Callable[[], Any]) -> Kept:
    return Kept(lambda one: how() if one.text.startswith(word) else 2.0 * one.text.startswith("red"))


def fails() -> Any:
    raise ZeroDivisionError("the reward's own mistake")


@pytest.mark.parametrize("how", [fails, lambda: math.nan, lambda: None], ids=["raises", "nan", "none"])
def test_an_answer_that_cannot_be_judged_is_left_out_and_counted(
    tmp_path: Path, taught: Params, steps: Steps, how: Callable[[], Any]
) -> None:
    said: list[str] = []
    reward = judges_all_but("blue", how)
    ended = ran(tmp_path, taught, reward, steps=3, unfinished=0.0, calls={"say": said.append})
    assert ended.complete
    unjudged = [entry["unjudged"] for entry in ended.entries]
    assert 0 < min(unjudged) <= max(unjudged) < 1
    assert len([line for line in said if "cannot judge" in line]) == 1  # once for the run
    assert "asked.jsonl:3" in said[0]
    assert "left out and counted as `unjudged`" in said[0]
    blue = (*tokenizer().encode("blue"), tokenizer().end_of_turn)
    for at in range(3):
        found = steps.advantages(at)
        assert found.get(blue, {0.0}) == {0.0}
        assert max(max(gains) for gains in found.values()) > 0 or len(found) <= 2
    assert all(0 <= entry["reward"] <= 2 for entry in ended.entries)


@pytest.mark.parametrize("how", [fails, lambda: math.nan], ids=["raises", "nan"])
def test_or_it_ends_the_run_naming_the_prompt(
    tmp_path: Path, taught: Params, steps: Steps, how: Callable[[], Any]
) -> None:
    with pytest.raises(
        GemmaryError, match=r"cannot judge \d of a step's answers, the first to 'asked\.jsonl:3'; on_error = "
    ):
        ran(tmp_path, taught, judges_all_but("blue", how), steps=3, on_error="refuse")
    assert steps.batches == []


def test_a_step_of_which_nothing_can_be_judged_learns_nothing(tmp_path: Path, taught: Params, steps: Steps) -> None:
    ended = ran(tmp_path, taught, Kept(lambda one: None), steps=1)
    assert not steps.batches[0].mask.any()
    assert ended.last["unjudged"] == 1.0
    assert ended.last["reward"] == 0.0


# --- A reward that is gamed -------------------------------------------------------------------------------------------


def falling(*successes: float) -> Callable[[Sequence[Rollout]], list[float]]:
    """What is truly so, look by look; the first two looks are at the reference and before the first step."""
    looks = iter(successes)
    return lambda rollouts: [next(looks)] * len(rollouts)


def rising() -> Callable[[Sequence[Rollout]], list[float]]:
    calls = iter(range(1000))
    return lambda rollouts: [float(next(calls))] * len(rollouts)


def test_a_gamed_reward_stops_the_run_at_its_best(tmp_path: Path, taught: Params, steps: Steps) -> None:
    options: dict[str, Any] = {"held_out": [ASKED] * ANSWERS, "evaluate_every": 1, "patience": 2, "steps": 12}
    ended = ran(tmp_path, taught, rising(), success=falling(0.5, 0.5, 0.9, 0.6, 0.5, 0.4), **options)
    assert ended.complete
    assert int(ended.state.step) == 3
    assert ended.last["stop"].startswith("the reward is being gamed: it rose from ")
    assert "fell from 90.0% to 50.0%" in ended.last["stop"]
    assert ended.parameters == tmp_path / "best" / "step_00000001" / "model"
    again = ran(tmp_path, taught, fails, success=fails, **options)  # it is over
    assert again.complete
    assert len(steps.batches) == 3


def test_looks_before_a_break_count(tmp_path: Path, taught: Params, steps: Steps) -> None:
    options: dict[str, Any] = {
        "held_out": [ASKED] * ANSWERS, "evaluate_every": 1, "patience": 2, "steps": 12, "save_every": 1
    }  # fmt: skip

    def breaks(entry: dict[str, Any]) -> None:
        if entry["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ran(tmp_path, taught, rising(), success=falling(0.5, 0.5, 0.9, 0.9, 0.6), calls={"report": breaks}, **options)
    # Gone on with from step 2: the reference is looked at again, then step 3 and 4.
    later = lambda rollouts: [100.0] * len(rollouts)  # noqa: E731
    ended = ran(tmp_path, taught, later, success=falling(0.5, 0.6, 0.5), **options)
    assert int(ended.state.step) == 4
    assert "stop" in ended.last


def test_only_so_many_are_watched(tmp_path: Path, taught: Params, steps: Steps) -> None:
    ended = ran(tmp_path, taught, steps=1, held_out=[ASKED] * 20, watched=8)
    assert ended.last["watched"]["prompts"] == 8


def test_none_watched_none_kept(tmp_path: Path, taught: Params, steps: Steps) -> None:
    ended = ran(tmp_path, taught, steps=1, held_out=[ASKED] * 20, watched=0)
    assert "watched" not in ended.last
    assert not (tmp_path / "best").exists()


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answers": 1}, r"rlhf\.answers is 1"),
        ({"prompts": 0}, r"rlhf\.prompts is 0"),
        ({"beta": -1.0}, r"rlhf\.beta is -1"),
        ({"max_new_tokens": 0}, r"rlhf\.max_new_tokens is 0"),
        ({"batch": 4, "accumulate": 2}, r"rlhf\.accumulate: answers fill rows of their own number"),
        ({"steps": None}, "either steps, at least 1, or epochs"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GemmaryError, match=message):
        settings(**changes)


def test_only_what_the_result_depends_on_is_decisive() -> None:
    assert settings().decisive() == settings(watched=7, on_error="refuse", log_every=3).decisive()
    assert settings().decisive() != settings(beta=0.1).decisive()


def test_no_leap_of_a_policys_loss_ends_a_run() -> None:
    """It is weighed by advantages: of answers in hundreds of nats it goes up and down by tens."""
    assert settings(spike=1.0).loop(STEPS).spike == math.inf
    assert settings().loop(STEPS).steps == STEPS


@pytest.mark.parametrize("where", ["asked", "held_out"])
def test_a_prompt_that_leaves_no_room_is_named(tmp_path: Path, where: str) -> None:
    long = prompt("say " + "hats " * 40, where="long.jsonl:7")
    given: dict[str, Any] = {where: [long]}
    with pytest.raises(
        GemmaryError, match=r"long\.jsonl:7: a prompt of \d+ tokens and an answer of 4 do not fit rows of 48"
    ):
        ran(tmp_path / "run", params(), **given)
    assert not (tmp_path / "run").exists()


def test_epochs_are_of_all_prompts(tmp_path: Path, taught: Params, steps: Steps) -> None:
    others = [prompt(asked) for asked in ("say boats", "say birds", "say doors")]
    ended = ran(
        tmp_path, taught, Kept(lambda one: 1.0), asked=[ASKED, *others], steps=None, epochs=1.5, prompts=2, answers=4
    )
    assert int(ended.state.step) == 3
