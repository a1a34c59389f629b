"""Learning from rewards: leave-one-out REINFORCE with a KL penalty towards the model it began from.

Each step samples several answers to each of its prompts from the policy, and rewards them. An answer's value is its reward less
`beta` times log(p / p of the reference); its advantage is that less the mean of the other answers' to the same prompt (RLOO:
Ahmadian et al., arXiv 2402.14740; Kool et al. 2019). One step is taken on each batch of samples.

The policy is watched on held-out prompts, answered greedily: true success where it can be told, reward, length, repetition, and
how often it does better than the reference. Where success has fallen while the reward rose, the reward is being gamed and the run
stops; the parameters of the highest success are kept.

On a mesh each process answers its share of the prompts with a copy of the parameters of its own, and judges what it answered; then
all know all, and the update is one step of all devices. One process watches.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh

from gemmary import processes
from gemmary.config import Config
from gemmary.data.batches import row_batches
from gemmary.data.instructions import OnError
from gemmary.data.packing import Batch
from gemmary.data.turns import PromptBatch, Prompts
from gemmary.errors import GemmaryError, check_bounds
from gemmary.mesh import using
from gemmary.params import Params, undivided
from gemmary.text.tokenizer import Tokenizer
from gemmary.train.finetune import Learner, TuneSettings, describe, learner
from gemmary.train.head import Head
from gemmary.train.journal import read_entries
from gemmary.train.loop import Hook, LoopSettings, Report
from gemmary.train.meshed import check_rows, fed, made
from gemmary.train.objectives import policy_loss, target_log_probs
from gemmary.train.optimizer import optimizer
from gemmary.train.rewards import Reward, rewarded
from gemmary.train.rollouts import Prompt, Rollout, as_batch, roll, seeds
from gemmary.train.run import Ended, Say, keep_best, run
from gemmary.train.step import TrainState, init_state, make_step
from gemmary.train.watching import gamed, watch_answers, win_rate

__all__ = ["RlhfSettings", "advantages", "rlhf"]

Float = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class RlhfSettings(TuneSettings):
    """A run of learning from rewards. `batch` is what the number of rows that answers fill is rounded up to."""

    batch: int = 4
    evaluate_every: int = 25
    prompts: int = 16
    """Of a step."""
    answers: int = 4
    """To each prompt; at least 2, for each is measured by the others."""
    max_new_tokens: int = 64
    beta: float = 0.05
    """Of the KL penalty."""
    unfinished: float = 1.0
    """Taken from the reward of an answer that does not end."""
    watched: int = 200
    """Held-out prompts that the policy is watched on, at most."""
    tolerance: float = 0.05
    patience: int = 2
    """Stop where success was lower than its best by more than `tolerance`, and the reward higher than then, so often in a row."""
    on_error: OnError = "skip"
    """An answer that the reward cannot judge is left out and counted, or ends the run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(
            self, "rlhf.", prompts=(1, None), answers=(2, 1024), max_new_tokens=(1, None), beta=(0, 1e3), unfinished=(0, 1e6),
            watched=(0, None), tolerance=(0, 1), patience=(1, None),
        )  # fmt: skip
        if self.accumulate != 1:
            raise GemmaryError(
                "rlhf.accumulate: answers fill rows of their own number, which parts cannot divide; leave it at 1"
            )

    def decisive(self) -> dict[str, Any]:
        """The settings that the result depends on."""
        return {name: value for name, value in super().decisive().items() if name not in ("watched", "on_error")}

    def loop(self, steps: int) -> LoopSettings:
        """For `fit`; a policy's loss goes up and down with the samples' advantages, and no leap of it means anything."""
        return dataclasses.replace(super().loop(steps), spike=math.inf)


def rlhf(
    settings: RlhfSettings,
    config: Config,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Mapping[str, Sequence[Prompt]],
    held_out: Sequence[Prompt],
    reward: Reward,
    success: Reward,
    folder: Path,
    *,
    weights: Mapping[str, float],
    digest: str,
    seed: int = 0,
    base: str = "",
    start: str = "",
    mesh: Mesh | None = None,
    report: Report = lambda entry: None,
    say: Say = lambda line: None,
) -> Ended:
    """Run, or go on. `success` tells on held-out prompts what `reward` should stand for; `digest` is of prompts and reward.

    Raises GemmaryError as `learner` and `run` do, for prompts that leave no room for an answer, and where a reward cannot judge
    and the settings refuse that.
    """
    pupil = learner(settings, config, params, tokenizer, seed=seed, base=base, mesh=mesh)
    check_rows("rlhf", settings.batch, 1, mesh)
    for line in undivided(config, mesh):
        say(line)
    prompts = {name: some for name, some in prompts.items() if some and weights[name] > 0}
    _room(settings, config, [*(p for some in prompts.values() for p in some), *held_out])
    names = sorted(prompts)
    rows = {name: Prompts(len(prompts[name]), i, name, seed) for i, name in enumerate(names)}
    steps = settings.steps or max(1, round((settings.epochs or 1) * sum(map(len, prompts.values())) / settings.prompts))
    batches = row_batches(rows, weights, {"prompts": digest}, length=1, batch=settings.prompts, steps=steps, seed=seed)
    rule = optimizer(settings.optimizer, steps)
    head, dtype = settings.head(config), jnp.dtype(settings.dtype)
    update = make_step(policy_loss(config, head=head, dtype=dtype, remat=settings.remat), rule, mesh=mesh)
    learning = _Learning(
        settings, pupil, _reference(pupil), reward, [prompts[n] for n in names], seed, update, head, say
    )
    watched = list(held_out[: settings.watched])
    watch = Hook(settings.evaluate_every, _Watch(learning, watched, success, folder)) if watched else None
    kept = [keep_best(watch, folder, pupil.files, _regret)] if watch else []
    tokens = settings.prompts * settings.answers * settings.max_new_tokens

    def begun(params: Params) -> TrainState:
        return init_state(params, rule, jax.random.key(seed))

    return run(
        folder, made(mesh, begun, pupil.learnt), batches, lambda state: learning.step, files=pupil.files,
        identity=pupil.identity(seed=seed, rlhf=settings.decisive(), prompts=digest, start=start), settings=settings.loop(steps),
        describe=describe(settings, steps, tokens, shares=batches.shares), before=watch.run if watch else None, hooks=kept,
        report=report, say=say,
    )  # fmt: skip


def _room(settings: RlhfSettings, config: Config, prompts: Sequence[Prompt]) -> None:
    for prompt in prompts:
        size = len(prompt.ids) + settings.max_new_tokens
        if size > min(settings.length, config.context):
            raise GemmaryError(
                f"{prompt.where}: a prompt of {len(prompt.ids)} tokens and an answer of {settings.max_new_tokens} do not fit "
                f"rows of {settings.length} in a context of {config.context}"
            )


def _reference(pupil: Learner) -> Params:
    """What the penalty pulls towards. Copied, since a step takes the memory of what it changes."""
    return pupil.whole(jax.tree.map(jnp.array, pupil.learnt))


class _Learning:
    """A step: answers, rewards, advantages, and the policy's gradient."""

    def __init__(
        self, settings: RlhfSettings, pupil: Learner, reference: Params, reward: Reward, prompts: list[Sequence[Prompt]],
        seed: int, update: Any, head: Head, say: Say,
    ) -> None:  # fmt: skip
        self.settings, self.pupil, self.reference, self.reward = settings, pupil, reference, reward
        self._prompts, self._seed, self._update, self._head, self._say = prompts, seed, update, head, say
        self._told = False

    def answers(self, params: Params, prompts: Sequence[Prompt], seeds: Sequence[int] | None) -> list[Rollout]:
        """See `roll`."""
        return roll(
            params, self.pupil.config, self.pupil.tokenizer, prompts, max_new_tokens=self.settings.max_new_tokens,
            dtype=jnp.dtype(self.settings.dtype), seeds=seeds,
        )  # fmt: skip

    def step(self, state: TrainState, batch: PromptBatch) -> tuple[TrainState, dict[str, Any]]:
        settings, count = self.settings, self.settings.answers
        chosen = zip(batch.source.tolist(), batch.prompt.tolist(), strict=True)
        asked = [self._prompts[source][i] for source, i in chosen for _ in range(count)]
        rollouts, found, reference = self._judged(state, asked)
        known = np.array([value is not None for value in found])
        if not known.all():
            self._unjudged([one for one, value in zip(rollouts, found, strict=True) if value is None])
        worth = np.array([value or 0.0 for value in found])
        ratio = np.array([sum(one.log_probs) for one in rollouts]) - reference
        ended = np.array([one.finished for one in rollouts])
        values = worth - settings.unfinished * ~ended - settings.beta * ratio
        gain = advantages(values.reshape(-1, count), known.reshape(-1, count)).ravel()
        rows, _ = as_batch(rollouts, gain.tolist(), settings.length, self.pupil.tokenizer.pad, settings.batch)
        mesh = self.pupil.mesh
        with using(mesh):
            state, means = self._update(state, fed(mesh, rows, len(rows.tokens)), self.pupil.rest)
        about = {
            "reward": float(worth[known].mean()) if known.any() else 0.0,
            "kl": float(ratio.mean()),
            "answer_tokens": float(np.mean([len(one.ids) for one in rollouts])),
            "finished": float(ended.mean()),
            "unjudged": float((~known).mean()),
        }
        return state, {**means, **about}

    def _judged(self, state: TrainState, asked: list[Prompt]) -> tuple[list[Rollout], list[float | None], Float]:
        """An answer to each, with its reward and its log-probability under the reference: of several processes each makes some."""
        drawn = seeds(self._seed, int(state.step), len(asked))
        mine = range(processes.index(), len(asked), processes.count())
        params = self.pupil.whole(state.params)
        rollouts = self.answers(params, [asked[i] for i in mine], [drawn[i] for i in mine]) if mine else []
        found = rewarded(self.reward, rollouts) if mine else []
        reference = self._reference_log_probs(rollouts) if mine else np.zeros(0)
        if processes.count() == 1:
            return rollouts, found, reference
        told = [
            (one.ids, one.log_probs, one.text, one.finished, value, log_prob)
            for one, value, log_prob in zip(rollouts, found, reference.tolist(), strict=True)
        ]
        shares = [json.loads(data) for data in processes.gathered(json.dumps(told).encode())]
        every = [shares[i % len(shares)][i // len(shares)] for i in range(len(asked))]
        all_rollouts = [
            Rollout(prompt, tuple(ids), tuple(log_probs), text, finished)
            for prompt, (ids, log_probs, text, finished, *_) in zip(asked, every, strict=True)
        ]
        return all_rollouts, [one[4] for one in every], np.array([one[5] for one in every])

    def _reference_log_probs(self, rollouts: list[Rollout]) -> Float:
        """Of each answer, under the reference."""
        batch, order = as_batch(
            rollouts, [1.0] * len(rollouts), self.settings.length, self.pupil.tokenizer.pad, self.settings.batch
        )
        found = np.asarray(
            _log_probs(self.reference, batch, self.pupil.config, self._head, jnp.dtype(self.settings.dtype))
        )
        result, place = np.zeros(len(rollouts)), iter(order)
        for row in range(len(found)):
            for segment in range(int(batch.segments[row].max()) + 1):
                here = (batch.segments[row] == segment) & (batch.mask[row] != 0)
                result[next(place)] = float(found[row][here].sum(dtype=np.float64))
        return result

    def _unjudged(self, rollouts: list[Rollout]) -> None:
        first = rollouts[0]
        what = f"the reward cannot judge {len(rollouts)} of a step's answers, the first to {first.prompt.where or first.prompt.text!r}"
        if self.settings.on_error == "refuse":
            raise GemmaryError(f'{what}; on_error = "skip" would leave them out')
        if not self._told:
            self._say(f"{what}; they are left out and counted as `unjudged`")
            self._told = True


@partial(jax.jit, static_argnames=("config", "head", "dtype"))
def _log_probs(params: Params, batch: Batch, config: Config, head: Head, dtype: Any) -> jax.Array:
    return target_log_probs(params, config, batch, head, dtype=dtype)


def advantages(values: Float, known: npt.NDArray[np.bool_]) -> Float:
    """Each value [prompts, answers] less the mean of the other known ones of its row; 0 where it or all others are unknown."""
    count = known.sum(axis=1, keepdims=True)
    total = (values * known).sum(axis=1, keepdims=True)
    others = (total - values) / np.maximum(count - 1, 1)
    result: Float = np.where(known & (count > 1), values - others, 0.0)
    return result


class _Watch:
    """What the policy does on held-out prompts, beside the reference."""

    def __init__(self, learning: _Learning, prompts: list[Prompt], success: Reward, folder: Path) -> None:
        self._learning, self._prompts, self._success, self._folder = learning, prompts, success, folder
        self._before: list[Float] | None = None

    def __call__(self, state: TrainState) -> dict[str, Any]:
        params, step = self._learning.pupil.whole(state.params), int(state.step)
        found: dict[str, Any] = processes.from_first("watched", lambda: self._watched(params, step))
        return found

    def _watched(self, params: Params, step: int) -> dict[str, Any]:
        learning = self._learning
        if self._before is None:
            self._before = self._judged(learning.answers(learning.reference, self._prompts, None))
        rollouts = learning.answers(params, self._prompts, None)
        now = self._judged(rollouts)
        found = watch_answers(rollouts, *now) | {"win_rate": win_rate(now, self._before)}
        past = [
            e["watched"] for e in read_entries(self._folder / "metrics.jsonl") if "watched" in e and e["step"] < step
        ]
        why = gamed([*past, found], learning.settings.tolerance, learning.settings.patience)
        return {"watched": found} | ({"stop": why} if why else {})

    def _judged(self, rollouts: list[Rollout]) -> list[Float]:
        """Success and reward of each, nan where unknown."""
        both = (rewarded(self._success, rollouts), rewarded(self._learning.reward, rollouts))
        return [np.array([np.nan if value is None else value for value in found]) for found in both]


def _regret(found: dict[str, Any]) -> float:
    watched = found["watched"]
    return -float(watched["success"] if watched["success"] is not None else watched["reward"] or 0.0)
