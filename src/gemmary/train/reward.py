"""A reward model: the policy's architecture with a scalar head, trained on preferences under Bradley and Terry's model.

An answer's score is read at its last token, `<end_of_turn>`; the probability that one is preferred to another is the sigmoid of
the difference of their scores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh

from gemmary.adapters import join
from gemmary.config import Config
from gemmary.data.packing import Batch, stacked
from gemmary.data.tokens import Tokens
from gemmary.data.turns import PackedPairs, PairBatch
from gemmary.mesh import using
from gemmary.params import Params
from gemmary.text.tokenizer import Tokenizer
from gemmary.train.finetune import Learner, TuneSettings, learner, tune
from gemmary.train.loop import Report
from gemmary.train.meshed import fed, host
from gemmary.train.objectives import preference_loss, scores
from gemmary.train.run import Ended, Say
from gemmary.train.step import TrainState

__all__ = ["Pairs", "interval", "judged", "margins", "packed_pairs", "pair_digests", "reward", "verdicts"]

Float = npt.NDArray[np.float64]
_BINS = 10


@dataclass(frozen=True)
class Pairs:
    """Preferences of one source: each prompt with its preferred answer, and with the other, in the same order."""

    chosen: Tokens
    rejected: Tokens


def reward(
    settings: TuneSettings,
    config: Config,
    params: Params,
    tokenizer: Tokenizer,
    sources: Mapping[str, Pairs],
    held_out: Mapping[str, Pairs],
    folder: Path,
    *,
    weights: Mapping[str, float],
    seed: int = 0,
    base: str = "",
    digest: str = "",
    mesh: Mesh | None = None,
    report: Report = lambda entry: None,
    say: Say = lambda line: None,
) -> Ended:
    """Run, or go on; the parameters of the least held-out loss are kept. Raises GemmaryError as `sft` does."""
    pupil = learner(settings, config, params, tokenizer, seed=seed, base=base, score=True, mesh=mesh)

    def evaluate(state: TrainState) -> dict[str, Any]:
        found = verdicts(pupil, state.params, held_out, settings)
        return {"held_out_pairs": found} if found else {}

    return tune(
        "reward", settings, pupil, packed_pairs(sources, weights, settings, seed, tokenizer), pair_digests(sources),
        preference_loss(pupil.config, dtype=jnp.dtype(settings.dtype), remat=settings.remat), folder, weights=weights, seed=seed,
        start=digest, evaluate=evaluate, value=(lambda found: found["held_out_pairs"]["loss"]) if held_out else None,
        report=report, say=say,
    )  # fmt: skip


def packed_pairs(
    pairs: Mapping[str, Pairs], weights: Mapping[str, float], settings: TuneSettings, seed: int, tokenizer: Tokenizer
) -> dict[str, PackedPairs]:
    """Those of a weight, in rows."""
    return {name: _packed(one, name, settings, seed, tokenizer) for name, one in pairs.items() if weights[name] > 0}


def pair_digests(pairs: Mapping[str, Pairs]) -> dict[str, list[str]]:
    """What the order of rows depends on, by source."""
    return {name: [one.chosen.digest, one.rejected.digest] for name, one in pairs.items()}


def margins(found: npt.NDArray[np.floating[Any]], partner: npt.NDArray[np.int32]) -> list[float]:
    """How much more each preferred answer has of `found` [B, T] than the other, pair by pair."""
    row, slot = np.nonzero(partner >= 0)
    difference: list[float] = (found[row, slot] - found[row, partner[row, slot]]).tolist()
    return difference


def judged(every: Float) -> dict[str, Any]:
    """What margins come to: how many pairs are right, and their loss."""
    return {
        "pairs": len(every), "accuracy": float(_right(every).mean()), "loss": float(np.logaddexp(0, -every).mean()),
    }  # fmt: skip


def _packed(pairs: Pairs, name: str, settings: TuneSettings, seed: int, tokenizer: Tokenizer) -> PackedPairs:
    return PackedPairs(pairs.chosen, pairs.rejected, name, length=settings.length, seed=seed, pad=tokenizer.pad)


@partial(jax.jit, static_argnames=("config", "dtype"))
def _scores(learnt: Params, rest: Params | None, batch: PairBatch, config: Config, dtype: Any) -> jax.Array:
    return scores(join(learnt, rest), config, Batch(*batch[:5]), dtype=dtype)


def verdicts(pupil: Learner, learnt: Params, held_out: Mapping[str, Pairs], settings: TuneSettings) -> dict[str, Any]:
    """How the model judges pairs that it has not seen.

    `accuracy` with its 95 % interval, `loss`, `calibration` (the expected calibration error over ten bins of confidence, and
    the bins), and accuracy where the preferred answer is the longer one, the shorter one, or as long: a model that only counts
    words is right in one of these and wrong in another.
    """
    sources, longer = dict[str, list[float]](), list[int]()
    rows = min(settings.batch, 4)
    for name, pairs in held_out.items():
        packed = _packed(pairs, name, settings, 0, pupil.tokenizer)
        order = packed.in_order()
        for at in range(0, len(order), rows):
            made = [packed.row(items) for items in order[at : at + rows]]
            batch = stacked(made + [packed.row([])] * (rows - len(made)))
            with using(pupil.mesh):
                given = fed(pupil.mesh, batch, rows)
                found = host(_scores(learnt, pupil.rest, given, pupil.config, jnp.dtype(settings.dtype)))
            sources.setdefault(name, []).extend(margins(found, batch.partner))
            items = [i for row_items in order[at : at + rows] for i in row_items]
            longer += [int(pairs.chosen.lengths[i] - pairs.rejected.lengths[i]) for i in items]
    every, length = np.array([margin for found in sources.values() for margin in found]), np.array(longer)
    if not len(every):
        return {}
    right = _right(every)
    split = {"longer": length > 0, "shorter": length < 0, "as_long": length == 0}
    return {
        **judged(every),
        "interval": interval(float(right.sum()), len(right)),
        "calibration": _calibration(every),
        "by_length": {
            name: {"pairs": int(here.sum()), "accuracy": float(right[here].mean())}
            for name, here in split.items()
            if here.any()
        },
        "by_source": {name: float(_right(np.array(found)).mean()) for name, found in sources.items()},
    }


def _right(margins: Float) -> Float:
    return np.where(margins > 0, 1.0, np.where(margins == 0, 0.5, 0.0))


def _calibration(margins: Float) -> dict[str, Any]:
    """Confidence is the probability of the answer that the model prefers, from one half on."""
    confidence, right = 1 / (1 + np.exp(-np.abs(margins))), _right(margins)
    place = np.minimum(((confidence - 0.5) * 2 * _BINS).astype(int), _BINS - 1)
    bins, error = [], 0.0
    for i in range(_BINS):
        here = place == i
        if here.any():
            said, was = float(confidence[here].mean()), float(right[here].mean())
            bins.append({"pairs": int(here.sum()), "confidence": said, "accuracy": was})
            error += here.mean() * abs(said - was)
    return {"error": float(error), "bins": bins}


def interval(right: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927)."""
    if not count:
        return 0.0, 1.0
    z, share = 1.959964, right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)
