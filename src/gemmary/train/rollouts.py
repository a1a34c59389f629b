"""Answers sampled from the policy as it is, several to a prompt, laid out as a batch to learn from.

A draw depends on the run's seed, the step, the prompt's place in the batch and the number of the answer alone, so a run that is
gone on with samples what an unbroken one would have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gemmary.config import Config
from gemmary.data.packing import Batch, stacked
from gemmary.data.turns import lay_out, pack
from gemmary.infer.engine import Engine
from gemmary.infer.sampling import GREEDY, Sampling
from gemmary.params import Params
from gemmary.text.tokenizer import Tokenizer

__all__ = ["Prompt", "Rollout", "as_batch", "repetition", "roll", "seeds"]


@dataclass(frozen=True)
class Prompt:
    """A conversation up to the model's next turn, as ids, and what tells whether an answer is right, if anything does."""

    ids: tuple[int, ...]
    text: str
    """What the user said last."""
    answer: str | None = None
    tests: tuple[str, ...] = ()
    where: str = ""
    source: str = ""


@dataclass(frozen=True)
class Rollout:
    """One answer: its ids (the one that ends it included), their log-probabilities as sampled, and its text."""

    prompt: Prompt
    ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    text: str
    finished: bool


def seeds(seed: int, step: int, count: int) -> list[int]:
    """So many seeds of a step, in any version of NumPy."""
    words: Any = np.random.PCG64(np.random.SeedSequence((seed, step))).random_raw(count)
    return [int(word >> np.uint64(32)) for word in words]


def roll(
    params: Params,
    config: Config,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    dtype: Any,
    seeds: Sequence[int] | None,
) -> list[Rollout]:
    """An answer to each prompt: sampled at temperature 1 with its seed, or greedy without seeds."""
    engine = Engine(params, config, dtype, min(config.num_tokens, tokenizer.size))
    settings = [GREEDY] * len(prompts) if seeds is None else [Sampling(temperature=1.0, seed=seed) for seed in seeds]
    ids = [list[int]() for _ in prompts]
    log_probs = [list[float]() for _ in prompts]
    finished = [False] * len(prompts)
    steps = engine.generate(
        [prompt.ids for prompt in prompts],
        max_new_tokens=max_new_tokens,
        sampling=settings,
        stop_ids=tokenizer.stop_ids,
    )
    for step in steps:
        for token in step:
            ids[token.row].append(token.id)
            log_probs[token.row].append(token.logprob)
            finished[token.row] = token.finish == "stop"
    texts = [tokenizer.decode(row[:-1] if end else row) for row, end in zip(ids, finished, strict=True)]
    return [
        Rollout(prompt, tuple(row), tuple(scores), text, end)
        for prompt, row, scores, text, end in zip(prompts, ids, log_probs, texts, finished, strict=True)
    ]


def as_batch(
    rollouts: Sequence[Rollout], values: Sequence[float], length: int, pad: int, rows: int
) -> tuple[Batch, list[int]]:
    """Rows of `length` with each rollout's value as the mask of its answer's tokens; and the rollouts in the rows' order.

    The number of rows is a multiple of `rows`, so that few shapes are compiled.
    """
    sizes = [len(one.prompt.ids) + len(one.ids) for one in rollouts]
    packed = pack(sizes, length)
    packed += [[]] * (-len(packed) % rows)

    def piece(i: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        prompt, answer = rollouts[i].prompt.ids, rollouts[i].ids
        ids = np.array([*prompt, *answer], np.int64)
        return ids, np.where(np.arange(len(ids)) < len(prompt), 0.0, values[i])

    batch = stacked([lay_out([piece(i) for i in row], length, pad) for row in packed])
    return batch, [i for row in packed for i in row]


def repetition(ids: Sequence[int], n: int = 4) -> float:
    """The share of an answer's n-grams that were there before; 0 where it is shorter."""
    grams = Counter(zip(*(ids[i:] for i in range(n)), strict=False))
    total = sum(grams.values())
    return 1 - len(grams) / total if total else 0.0
