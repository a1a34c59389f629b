"""A reward model: what it learns of preferences, and how its judgement of unseen ones is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tuning_runs import COLOURS, LENGTH, THINGS, config, pairs, params, prompt, saved, tokenizer, tuned

from gemmary.checkpoints import open_model
from gemmary.data.turns import pack
from gemmary.errors import GemmaryError
from gemmary.params import Params
from gemmary.train import reward as module
from gemmary.train.finetune import Learner, LoraSettings, TuneSettings, learner
from gemmary.train.reward import Pairs, interval, reward, verdicts
from gemmary.train.rewards import score_answers
from gemmary.train.rollouts import Rollout
from gemmary.train.run import Ended

LIKED = "red"
"""The word that an answer is preferred for."""
ALL = [(f"say {thing} {c}", f"{LIKED} {thing}", f"{c} {thing}") for thing in THINGS for c in COLOURS if c != LIKED]
UNSEEN, SEEN = ALL[::4], [one for i, one in enumerate(ALL) if i % 4]


class Run(NamedTuple):
    ended: Ended
    folder: Path
    given: Params


def ran(folder: Path, *, base: str = "", **changes: Any) -> Run:
    train, held_out = pairs(folder / "train", SEEN), pairs(folder / "held_out", UNSEEN)
    given = {**params(), "score": jnp.full(32, 0.01)} if changes.pop("scored", False) else params()
    settings = TuneSettings(**tuned(**changes))
    ended = reward(
        settings, config().replace(score_head="score" in given), given, tokenizer(), {"likes": train}, {"likes": held_out},
        folder / "run", weights={"likes": 1.0}, base=base,
    )  # fmt: skip
    return Run(ended, folder / "run", given)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return ran(tmp_path_factory.mktemp("reward"), steps=60, evaluate_every=20)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Adapters and the score, over a model that has a score already."""
    folder = tmp_path_factory.mktemp("adapted")
    base = saved(folder / "base", params())
    return ran(folder, base=str(base), steps=20, lora=LoraSettings(rank=2), scored=True, learning_rate=3e-2)


def answered(said: str) -> Rollout:
    ids = (*tokenizer().encode(said), tokenizer().end_of_turn)
    return Rollout(prompt("say birds grey"), ids, (), said, True)  # type: ignore[arg-type]


# --- What it learns ---------------------------------------------------------------------------------------------------


def test_it_learns_what_is_liked(whole: Run) -> None:
    before = whole.ended.entries[0]
    assert before["step"] == 0
    assert before["held_out_pairs"]["accuracy"] == 0.5  # a score of zero prefers nothing
    assert before["held_out_pairs"]["loss"] == pytest.approx(np.log(2))
    after = whole.ended.last["held_out_pairs"]
    assert after["accuracy"] > 0.9
    assert after["loss"] < 0.3
    assert whole.ended.last["accuracy"] == 1.0  # of the pairs learnt from


def test_its_model_is_a_reward_model(whole: Run) -> None:
    with open_model(whole.folder / "model") as checkpoint:
        assert checkpoint.config == config().replace(score_head=True)
        opened = checkpoint.params(jnp.float32)
    found = score_answers(
        opened, checkpoint.config, [answered("red birds"), answered("grey birds"), answered("red boats")],
        dtype=jnp.float32, length=LENGTH, pad=0,
    )  # fmt: skip
    assert min(found[0], found[2]) > found[1] + 1


def test_the_parameters_of_the_least_loss_are_kept(whole: Run) -> None:
    losses = {e["step"]: e["held_out_pairs"]["loss"] for e in whole.ended.entries if "held_out_pairs" in e}
    best = json.loads(next((whole.folder / "best").glob("*/best.json")).read_text())
    del losses[0]
    assert best == {"step": min(losses, key=losses.__getitem__), "value": min(losses.values())}


def test_adapters_carry_the_score(adapted: Run) -> None:
    assert adapted.ended.parameters.name == "adapter"
    assert "score" in adapted.ended.state.params
    about = json.loads((adapted.ended.parameters / "adapter_config.json").read_text())
    assert (about["task_type"], about["modules_to_save"]) == ("SEQ_CLS", ["score"])
    with open_model(adapted.folder / "adapter") as checkpoint:
        assert checkpoint.config.score_head
        opened = checkpoint.params(jnp.float32)
    np.testing.assert_array_equal(opened["score"], adapted.ended.state.params["score"])
    assert adapted.ended.last["held_out_pairs"]["loss"] < 0.9 * np.log(2)


def test_the_given_weights_stay_as_they_were(whole: Run, adapted: Run) -> None:
    """The score too, which is learnt beside adapters."""
    np.testing.assert_array_equal(adapted.given["score"], np.full(32, np.float32(0.01)))
    for run in (whole, adapted):
        for name, weight in params().items():
            assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), run.given[name], weight))


def test_a_score_begins_at_zero_or_as_it_was(tmp_path: Path) -> None:
    settings = TuneSettings(**tuned(lora=LoraSettings(rank=2)))
    fresh = learner(settings, config(), params(), tokenizer(), seed=0, base="", score=True)
    assert fresh.config.score_head
    assert not np.asarray(fresh.learnt["score"]).any()
    given = {**params(), "score": jnp.arange(32.0)}
    again = learner(settings, config().replace(score_head=True), given, tokenizer(), seed=0, base="", score=True)
    np.testing.assert_array_equal(again.learnt["score"], np.arange(32.0))
    assert again.rest is not None
    assert "score" not in again.rest


# --- How it is told ---------------------------------------------------------------------------------------------------

# By pair: (asked, preferred, the other), and the margin of its scores.
# The shortest pair stands first: rows are packed from the longest on.
MARGINS = [
    (("say hats blue", "blue hats", "grey"), -1.0),  # longer, wrong
    (("say hats red", "red hats hats", "red"), 2.0),  # longer, right
    (("say doors red", "red", "green doors red"), 0.5),  # shorter, right
    (("say boats red", "red", "green boats white"), 0.55),  # shorter, right
    (("say birds red", "red birds", "grey birds"), 0.0),  # as long, a tie
    (("say birds grey", "red birds", "blue birds"), -3.0),  # as long, wrong
]


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The verdicts on two sources where the scores make these margins: four pairs of one, two of the other."""
    sources, order = {}, list[float]()
    for name, some in {"a": MARGINS[:4], "b": MARGINS[4:]}.items():
        sources[name] = pairs(tmp_path / name, [pair for pair, _ in some])
        sizes = (sources[name].chosen.lengths + sources[name].rejected.lengths).tolist()
        order += [some[i][1] for row in pack(sizes, 64) for i in row]
    waiting = iter(order)

    def scores(learnt: Any, rest: Any, batch: Any, config: Any, dtype: Any) -> np.ndarray:
        found = np.full(batch.tokens.shape, 7.0, np.float32)
        for at in zip(*np.nonzero(batch.partner >= 0), strict=True):
            found[at] = 7 + next(waiting)
        return found

    monkeypatch.setattr(module, "_scores", scores)
    settings = TuneSettings(**tuned() | {"length": 64, "batch": 3})
    pupil = Learner(config(), {}, None, None, tokenizer())  # type: ignore[arg-type]
    found = verdicts(pupil, {}, sources, settings)
    assert next(waiting, None) is None
    return found


def test_accuracy_counts_a_tie_half(told: dict[str, Any]) -> None:
    assert told["pairs"] == 6
    assert told["accuracy"] == pytest.approx(3.5 / 6)
    assert told["interval"] == interval(3.5, 6)
    assert told["by_source"] == pytest.approx({"a": 0.75, "b": 0.25})


def test_loss_is_the_mean_over_pairs(told: dict[str, Any]) -> None:
    assert told["loss"] == pytest.approx(np.mean([np.log1p(np.exp(-margin)) for _, margin in MARGINS]), rel=1e-5)


def test_accuracy_by_which_answer_is_longer(told: dict[str, Any]) -> None:
    assert told["by_length"] == {
        "longer": {"pairs": 2, "accuracy": 0.5},
        "shorter": {"pairs": 2, "accuracy": 1.0},
        "as_long": {"pairs": 2, "accuracy": 0.25},
    }


def test_bins_of_confidence_add_up(told: dict[str, Any]) -> None:
    """Confidences .88, .73, .62, .63, .5 and .95; the third and fourth share a bin."""
    bins = told["calibration"]["bins"]
    assert [(one["pairs"], round(one["confidence"], 3), one["accuracy"]) for one in bins] == [
        (1, 0.5, 0.5), (2, 0.628, 1.0), (1, 0.731, 0.0), (1, 0.881, 1.0), (1, 0.953, 0.0),
    ]  # fmt: skip
    assert sum(one["pairs"] for one in bins) == told["pairs"]
    error = sum(one["pairs"] * abs(one["confidence"] - one["accuracy"]) for one in bins) / told["pairs"]
    assert told["calibration"]["error"] == pytest.approx(error)
    assert error == pytest.approx((0 + 2 * 0.37180 + 0.73106 + 0.11920 + 0.95257) / 6, abs=1e-4)


def test_certain_and_right_is_calibrated() -> None:
    assert module._calibration(np.full(5, 40.0)) == {
        "error": 0.0,
        "bins": [{"pairs": 5, "confidence": 1.0, "accuracy": 1.0}],
    }


def test_no_pairs_no_verdict() -> None:
    pupil = Learner(config(), {}, None, None, tokenizer())  # type: ignore[arg-type]
    assert verdicts(pupil, {}, {}, TuneSettings(**tuned())) == {}


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(8, 10, 0.4901625, 0.9433178), (0, 10, 0.0, 0.2775328), (10, 10, 0.7224672, 1.0), (50, 100, 0.4038315, 0.5961685)],
)
def test_the_interval_is_wilsons(right: float, count: int, low: float, high: float) -> None:
    """As R's `prop.test(correct = FALSE)` gives it."""
    assert interval(right, count) == pytest.approx((low, high), abs=1e-6)


def test_of_nothing_the_interval_is_everything() -> None:
    assert interval(0, 0) == (0.0, 1.0)


def test_verdicts_in_shared_rows_are_those_of_each_alone(whole: Run, tmp_path: Path) -> None:
    """The real scores: pairs that share a row, and rows of one pair each."""
    settings = TuneSettings(**tuned())
    pupil = learner(settings, config(), params(), tokenizer(), seed=0, base="", score=True)
    some = pairs(tmp_path / "some", UNSEEN[:3])
    together = verdicts(pupil, whole.ended.state.params, {"x": some}, settings)
    margins = []
    for asked, better, worse in UNSEEN[:3]:
        scores = [
            Rollout(prompt(asked), (*tokenizer().encode(text), tokenizer().end_of_turn), (), text, True)  # type: ignore[arg-type]
            for text in (better, worse)
        ]
        found = score_answers(
            whole.ended.state.params, pupil.config, scores, dtype=jnp.float32, length=LENGTH, pad=0, rows=4
        )
        margins.append(found[0] - found[1])
    assert together["loss"] == pytest.approx(np.logaddexp(0, -np.array(margins)).mean(), rel=1e-4)


# --- What is refused --------------------------------------------------------------------------------------------------


def test_a_pair_longer_than_a_row_is_refused(tmp_path: Path) -> None:
    some: Pairs = pairs(tmp_path / "some", SEEN)
    with pytest.raises(GemmaryError, match=r"the source likes has 3\d tokens in one piece, and a row takes 24"):
        reward(
            TuneSettings(**tuned() | {"length": 24}), config(), params(), tokenizer(), {"likes": some}, {}, tmp_path / "run",
            weights={"likes": 1.0},
        )  # fmt: skip
