"""Whether a policy does better than before, and whether its reward is gamed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from gemmary.train.rollouts import Prompt, Rollout
from gemmary.train.watching import gamed, watch_answers, win_rate

NAN = math.nan


def said(ids: list[int], *, finished: bool = True) -> Rollout:
    return Rollout(Prompt((2,), ""), tuple(ids), (0.0,) * len(ids), "", finished)


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float64)


# --- What answers are like --------------------------------------------------------------------------------------------


def test_means_are_over_what_can_be_judged() -> None:
    answers = [said([1, 2, 3, 4] * 2), said([5], finished=False), said([6, 7])]
    found = watch_answers(answers, floats(1, NAN, 0), floats(NAN, NAN, 3))
    assert found == {
        "success": 0.5, "reward": 3.0, "answer_tokens": pytest.approx(11 / 3), "finished": pytest.approx(2 / 3),
        "repetition": pytest.approx(0.2 / 3), "prompts": 3,
    }  # fmt: skip


def test_where_none_can_be_judged_there_is_no_mean() -> None:
    found = watch_answers([said([1])], floats(NAN), floats(NAN))
    assert found["success"] is None
    assert found["reward"] is None


# --- Better than before -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("now", "before", "rate"),
    [
        ((floats(1, 0, 1), floats(0, 0, 0)), (floats(0, 1, 1), floats(9, 9, 9)), 0.5),  # by success: won, lost, tied
        ((floats(NAN, NAN), floats(2, 1)), (floats(NAN, NAN), floats(1, 2)), 0.5),  # by reward
        ((floats(NAN, 1), floats(5, 0)), (floats(0, 0), floats(4, 9)), 1.0),  # by reward where one success is unknown
        ((floats(1, 0), floats(5, 5)), (floats(NAN, NAN), floats(4, 4)), 1.0),  # and where the one before is
        ((floats(NAN), floats(NAN)), (floats(NAN), floats(1)), 0.5),  # unknown is a tie
        ((floats(1, 1, 1, 1), floats(0, 0, 0, 0)), (floats(1, 1, 1, 1), floats(5, 5, 5, 5)), 0.5),  # ties half
        ((floats(1, 1, 1, 0), floats(0, 0, 0, 0)), (floats(0, 1, 1, 1), floats(0, 0, 0, 0)), 0.5),
        ((floats(1, 1), floats(0, 0)), (floats(0, 0), floats(0, 0)), 1.0),
    ],
)
def test_a_win_is_by_success_and_else_by_reward(now: Any, before: Any, rate: float) -> None:
    assert win_rate(now, before) == pytest.approx(rate)


# --- Gamed ------------------------------------------------------------------------------------------------------------


def history(*both: tuple[float | None, float | None]) -> list[dict[str, Any]]:
    """(success, reward) of each look."""
    return [{"success": success, "reward": reward} for success, reward in both]


STOPS = {
    "success falls, reward rises": history((0.8, 1.0), (0.6, 2.0), (0.5, 3.0)),
    "after a rise": history((0.5, 0.0), (0.8, 1.0), (0.6, 2.0), (0.7, 1.5)),
    "an unknown look between counts for nothing": history((0.8, 1.0), (0.6, 2.0), (None, 9.0), (0.5, 3.0)),
    "a look good enough, but long ago": history((0.8, 1.0), (0.79, 1.1), (0.6, 2.0), (0.5, 3.0)),
}
GOES_ON = {
    "at once": history((0.8, 1.0)),
    "too few looks": history((0.8, 1.0), (0.5, 3.0)),
    "reward fell too": history((0.8, 1.0), (0.6, 2.0), (0.5, 0.9)),
    "reward is as it was": history((0.8, 1.0), (0.6, 1.0), (0.5, 1.0)),
    "within tolerance": history((0.8, 1.0), (0.76, 2.0), (0.76, 3.0)),
    "the last within tolerance": history((0.8, 1.0), (0.5, 2.0), (0.77, 3.0)),
    "the last but one within tolerance": history((0.8, 1.0), (0.77, 2.0), (0.5, 3.0)),
    "the best is late": history((0.5, 1.0), (0.4, 2.0), (0.8, 3.0)),
    "success unknown": history((None, 1.0), (None, 2.0), (None, 3.0), (None, 4.0)),
    "reward unknown": history((0.8, None), (0.6, None), (0.5, None)),
    "both rise": history((0.2, 1.0), (0.4, 2.0), (0.6, 3.0)),
}


@pytest.mark.parametrize("why", STOPS)
def test_gamed(why: str) -> None:
    said = gamed(STOPS[why], tolerance=0.05, patience=2)
    assert said is not None
    best, now = max(STOPS[why], key=lambda one: one["success"] or 0), STOPS[why][-1]
    assert said == (
        f"the reward is being gamed: it rose from {best['reward']:.3f} to {now['reward']:.3f} "
        f"while success fell from {best['success']:.1%} to {now['success']:.1%}"
    )


@pytest.mark.parametrize("why", GOES_ON)
def test_not_gamed(why: str) -> None:
    assert gamed(GOES_ON[why], tolerance=0.05, patience=2) is None


def test_patience_is_how_many_looks_in_a_row() -> None:
    falling = history((0.8, 1.0), (0.6, 2.0), (0.5, 3.0), (0.4, 4.0))
    assert [gamed(falling[:end], 0.05, patience) is not None for patience, end in ((1, 2), (2, 2), (2, 3), (3, 3), (3, 4))] == [
        True, False, True, False, True,
    ]  # fmt: skip


def test_of_two_best_the_first_is_what_reward_is_measured_from() -> None:
    assert gamed(history((0.8, 5.0), (0.8, 1.0), (0.5, 2.0), (0.5, 2.0)), 0.05, 2) is None
    assert gamed(history((0.8, 1.0), (0.8, 5.0), (0.5, 2.0), (0.5, 2.0)), 0.05, 2) is not None
