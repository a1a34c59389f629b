"""Direct preference optimization: the policy learns from pairs at once, with no reward model and no samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemmary.adapters import join
from gemmary.config import Config
from gemmary.data.batches import row_batches
from gemmary.data.packing import Batch, stacked
from gemmary.data.turns import PackedPairs, PairBatch
from gemmary.errors import check_bounds
from gemmary.params import Params
from gemmary.text.tokenizer import Tokenizer
from gemmary.train.finetune import TuneSettings, compiled, describe, learner
from gemmary.train.loop import Hook, Report
from gemmary.train.losses import Head
from gemmary.train.objectives import dpo_loss, sequence_log_probs
from gemmary.train.optimizer import optimizer
from gemmary.train.reward import Pairs
from gemmary.train.run import Ended, Say, keep_best, run
from gemmary.train.step import TrainState, init_state, make_step

__all__ = ["DpoSettings", "dpo"]


@dataclass(frozen=True, kw_only=True)
class DpoSettings(TuneSettings):
    """A run on pairs."""

    beta: float = 0.1
    """How strongly the policy is held to the model it began from."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self, "dpo.", beta=(0, 1e3))


@partial(jax.jit, static_argnames=("config", "head", "dtype"))
def _log_probs(params: Params, batch: PairBatch, config: Config, head: Head, dtype: Any) -> jax.Array:
    return sequence_log_probs(params, config, Batch(*batch[:5]), head, dtype=dtype)


def _verdicts(unseen: Sequence[PackedPairs], reward: Callable[[PairBatch], Any]) -> dict[str, Any]:
    """How often the policy's own reward is higher for the preferred answer."""
    margins: list[float] = []
    for rows in unseen:
        for items in rows.in_order():
            batch = stacked([rows.row(items)])
            found = np.asarray(reward(batch))
            at, slot = np.nonzero(batch.partner >= 0)
            margins += (found[at, slot] - found[at, batch.partner[at, slot]]).tolist()
    if not margins:
        return {}
    every = np.array(margins)
    right = float(np.mean((every > 0) + 0.5 * (every == 0)))
    return {"pairs": len(every), "accuracy": right, "loss": float(np.logaddexp(0, -every).mean())}


def dpo(
    settings: DpoSettings,
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
    report: Report = lambda entry: None,
    say: Say = lambda line: None,
) -> Ended:
    """Run, or go on; the parameters of the least held-out loss are kept. Raises GemmaryError as `sft` does."""
    pupil = learner(settings, config, params, tokenizer, seed=seed, base=base)
    start = jax.tree.map(jnp.array, pupil.learnt)
    reference = start if pupil.rest is None else join(start, pupil.rest)
    given = {"length": settings.length, "seed": seed, "pad": tokenizer.pad}
    packed = {n: PackedPairs(p.chosen, p.rejected, n, **given) for n, p in sources.items() if weights[n]}
    steps = settings.total(sum(rows.rows * weights[name] for name, rows in packed.items()))
    order = {f"source {name}": [sources[name].chosen.digest, sources[name].rejected.digest] for name in packed}
    batches = row_batches(packed, weights, order, length=settings.length, batch=settings.batch, steps=steps, seed=seed)
    rule = optimizer(settings.optimizer, steps)
    head, dtype = settings.head(config), jnp.dtype(settings.dtype)
    loss = dpo_loss(config, beta=settings.beta, head=head, dtype=dtype, remat=settings.remat)
    step = make_step(loss, rule, accumulate=settings.accumulate)
    example = stacked([next(iter(packed.values()))[0]] * settings.batch)
    log_probs = partial(_log_probs, config=config, head=head, dtype=dtype)
    unseen = [PackedPairs(p.chosen, p.rejected, n, **given) for n, p in held_out.items()]

    def evaluate(state: TrainState) -> dict[str, Any]:
        policy = state.params if pupil.rest is None else join(state.params, pupil.rest)
        found = _verdicts(
            unseen, lambda batch: settings.beta * (log_probs(policy, batch) - log_probs(reference, batch))
        )
        return {"held_out_pairs": found} if found else {}

    def program(state: TrainState) -> Any:
        update = compiled(step, pupil, state, (example, log_probs(reference, example)), say)
        return lambda state, batch: update(state, (batch, log_probs(reference, batch)))

    watch = Hook(settings.evaluate_every, evaluate)
    kept = keep_best(watch, folder, pupil.files, lambda found: found["held_out_pairs"]["loss"]) if unseen else watch
    return run(
        folder, init_state(pupil.learnt, rule, jax.random.key(seed)), batches, program, files=pupil.files,
        identity=pupil.identity(seed=seed, dpo=settings.decisive(), start=digest), settings=settings.loop(steps),
        describe=describe(settings, steps, settings.batch * settings.length, shares=batches.shares), before=evaluate,
        hooks=[kept], report=report, say=say,
    )  # fmt: skip
