"""How learning from rewards is watched: what answers are like, whether they are better than before, and whether the reward is gamed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gemmary.train.rollouts import Rollout, repetition

__all__ = ["gamed", "manner", "watch_answers", "win_rate"]

Float = npt.NDArray[np.float64]


def watch_answers(rollouts: Sequence[Rollout], success: Float, reward: Float) -> dict[str, Any]:
    """Means over answers; `success` and `reward` are of those that can be judged, and None where none can."""
    return {
        "success": float(np.nanmean(success)) if not np.isnan(success).all() else None,
        "reward": float(np.nanmean(reward)) if not np.isnan(reward).all() else None,
        **manner(rollouts),
        "prompts": len(rollouts),
    }


def manner(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """What answers are like, whether right or wrong: means of their tokens, endings and repeated 4-grams; 0 of none."""
    count = max(len(rollouts), 1)
    return {
        "answer_tokens": sum(len(one.ids) for one in rollouts) / count,
        "finished": sum(one.finished for one in rollouts) / count,
        "repetition": sum(repetition(one.ids) for one in rollouts) / count,
    }


def win_rate(now: Sequence[Float], before: Sequence[Float]) -> float:
    """How often an answer is better than the one before, ties half: by success where both are known, else by reward."""
    by_success = ~np.isnan(now[0]) & ~np.isnan(before[0])
    margin = np.nan_to_num(np.where(by_success, now[0] - before[0], now[1] - before[1]))
    return float(np.mean((margin > 0) + 0.5 * (margin == 0)))


def gamed(watched: Sequence[Mapping[str, Any]], tolerance: float, patience: int) -> str | None:
    """Why to stop: success has stayed below its best while the reward stayed above what it was then; None where it has not."""
    known = [one for one in watched if one["success"] is not None and one["reward"] is not None]
    if len(known) <= patience:
        return None
    best = max(known, key=lambda one: float(one["success"]))
    late = known[-patience:]
    if best in late or any(e["success"] >= best["success"] - tolerance or e["reward"] <= best["reward"] for e in late):
        return None
    now = late[-1]
    return (
        f"the reward is being gamed: it rose from {best['reward']:.3f} to {now['reward']:.3f} "
        f"while success fell from {best['success']:.1%} to {now['success']:.1%}"
    )
