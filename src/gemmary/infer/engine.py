"""The engine: a batch of prompts as token ids in, token ids out, one step at a time.

Prompts go through the model in chunks of a few fixed shapes, so that little is compiled; each decoding step is one
dispatch, from the last token to the next, with the cache donated and sampling inside. Rows may have any lengths: each
keeps its own positions. The cache is allocated for what was asked, not for the model's longest context.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemmary.config import Config
from gemmary.errors import GemmaryError
from gemmary.infer.sampling import GREEDY, Drawn, Rows, Sampling, highest, recorded, rows_of, sample, seen_in
from gemmary.infer.session import Session
from gemmary.model.attention import Marks
from gemmary.model.cache import Cache, init_cache
from gemmary.model.transformer import hidden, logits
from gemmary.params import Params, is_stacked, unstack

__all__ = ["Engine", "Token"]

_CHUNK = 512
_AT_ONCE = 4
_ROUND = 64


class Token(NamedTuple):
    """One generated token of one row. `finish` is set on the row's last: "stop" or "length"."""

    row: int
    id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...]
    finish: str | None


@dataclass(frozen=True)
class Engine:
    """A model ready to run. `num_tokens` (default: the config's) bounds what may be sampled; `chunk` what is read at once."""

    params: Params
    config: Config
    dtype: Any = jnp.float32
    num_tokens: int | None = None
    chunk: int = _CHUNK

    def __post_init__(self) -> None:
        if is_stacked(self.params):
            object.__setattr__(self, "params", unstack(self.params))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        stop_ids: Sequence[int] = (),
        top_logprobs: int = 0,
        session: Session | None = None,
    ) -> Iterator[list[Token]]:
        """Yield the tokens of each step, one for every row still going. With a `session`, which takes one prompt, what it has read
        before is not read again.

        A row ends at a stop id (which is yielded, with finish "stop"), after `max_new_tokens`, or when the context is full
        (finish "length"). Closing the iterator ends the run. Raises GemmaryError for an empty or over-long prompt and for
        ids that the model does not have.
        """
        settings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        if len(settings) != len(prompts):
            raise GemmaryError(
                f"{len(prompts)} prompts and {len(settings)} sampling settings: give one for each, or one"
            )
        self.check(prompts, max_new_tokens, top_logprobs)
        if session is not None and len(prompts) > 1:
            raise GemmaryError(f"a session holds one text: {len(prompts)} prompts need no session")
        lengths = np.array([len(prompt) for prompt in prompts])
        room = np.minimum(lengths + max_new_tokens, self.config.context)
        rows = rows_of(settings)
        cache, last = self.prefill(prompts, int(room.max()), session)
        said = list(prompts[0])
        seen = np.stack([seen_in(prompt, self.config.vocab_size) for prompt in prompts])
        static = (self.config, self.dtype, self.num_tokens or self.config.num_tokens, top_logprobs)
        ids, seen, drawn = _first(*static, self.params, last, seen, (lengths - 1).astype(np.int32), rows)
        steps = [tuple(np.asarray(part) for part in drawn)]
        position = lengths.copy()  # of the token just drawn, once it is fed back
        alive = np.ones(len(prompts), bool)
        while True:
            for token_ids, chosen, top_ids, top in steps:
                step = []
                for row in np.flatnonzero(alive).tolist():
                    finish = self._finish(int(token_ids[row]), int(position[row]) + 1 >= int(room[row]), stop_ids)
                    best = tuple(zip(top_ids[row].tolist(), top[row].tolist(), strict=True))
                    step.append(Token(row, int(token_ids[row]), float(chosen[row]), best, finish))
                    alive[row] = finish is None
                if session is not None:
                    session.keep(cache, said)
                    said.append(int(token_ids[0]))
                yield step
                if not alive.any():
                    return
                position += 1
            at = np.where(alive, position - 1, -1).astype(np.int32)
            if session is not None:
                session.clear()
            ids, seen, cache, drawn = _next(*static, self.params, cache, ids, seen, at, rows)
            steps = list(zip(*(np.asarray(part) for part in drawn), strict=True))

    @staticmethod
    def _finish(token: int, full: bool, stop_ids: Sequence[int]) -> str | None:
        return "stop" if token in stop_ids else "length" if full else None

    def log_probs(self, ids: Sequence[int]) -> np.ndarray:
        """Log-probability of every id given those before it, float32 [T - 1]; the text is read in chunks."""
        return np.array([logprob for logprob, _ in self.prompt_scores(ids)], np.float32)

    def prompt_scores(self, ids: Sequence[int], top: int = 0) -> list[tuple[float, tuple[tuple[int, float], ...]]]:
        """Of every id but the first its log-probability given those before it, and the `top` likeliest with theirs."""
        self.check([ids], 0, top)
        cache = init_cache(self.config, 1, _rounded(len(ids)), self.chunk, self.dtype)
        scores: list[tuple[float, tuple[tuple[int, float], ...]]] = []
        known = self.num_tokens or self.config.num_tokens
        for start in range(0, len(ids) - 1, self.chunk):
            tokens, positions = _padded([ids], start, min(self.chunk, _rounded(len(ids) - start)))
            targets, _ = _padded([ids], start + 1, tokens.shape[1])
            static = (self.config, self.dtype, known, top, start == 0)
            out, cache = _score(*static, self.params, cache, tokens, positions, targets)
            chosen, best_ids, best = (np.asarray(part)[: len(ids) - 1 - start] for part in out)
            tops = zip(best_ids.tolist(), best.tolist(), strict=True)
            scores += [(one, tuple(zip(*pair, strict=True))) for one, pair in zip(chosen.tolist(), tops, strict=True)]
        return scores

    def prefill(
        self, prompts: Sequence[Sequence[int]], room: int, session: Session | None = None
    ) -> tuple[Cache, jax.Array]:
        """The cache with every prompt in it, and each row's last hidden state [B, D]."""
        longest, begin = max(len(prompt) for prompt in prompts), 0
        cache: Cache | None = None
        if session is not None:
            cache, begin = session.take(prompts[0], room, self.chunk - _AT_ONCE)
        if cache is None:
            if session is not None:  # twice the room, so that few turns need a larger cache, and all is read again
                session.room = room = min(2 * room, self.config.context)
            cache = init_cache(self.config, len(prompts), _rounded(room), self.chunk, self.dtype)
        last: Any = np.zeros((len(prompts), self.config.embed_dim), self.dtype)
        ends = np.array([len(prompt) - 1 for prompt in prompts], np.int32)
        for start in range(begin, longest, self.chunk):
            tokens, positions = _padded(prompts, start, min(self.chunk, _rounded(longest - start)))
            last, cache = _read(self.config, self.dtype, start == 0, self.params, cache, tokens, positions, last, ends)
        return cache, last

    def check(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, top: int) -> None:
        """Raises GemmaryError for what cannot be run; `max_new_tokens` is 0 where a text is only scored."""
        if not prompts:
            raise GemmaryError("there is no prompt")
        if max_new_tokens < 0 or not 0 <= top <= 20:
            raise GemmaryError("max_new_tokens is at least 1 and top_logprobs from 0 to 20")
        for prompt in prompts:
            if not len(prompt):
                raise GemmaryError("the prompt has no tokens: it needs at least <bos>")
            if len(prompt) >= self.config.context + (max_new_tokens == 0):
                raise GemmaryError(
                    f"the prompt has {len(prompt)} tokens and the model's context is {self.config.context}: shorten it"
                )
            if min(prompt) < 0 or max(prompt) >= self.config.vocab_size:
                raise GemmaryError(f"token ids go from 0 to {self.config.vocab_size - 1} in this model")


def _rounded(length: int) -> int:
    """The next of the lengths that get compiled: powers of two up to 64, then multiples of it."""
    if length <= _ROUND:
        return 1 << max(length - 1, 0).bit_length()
    return -(-length // _ROUND) * _ROUND


def _padded(prompts: Sequence[Sequence[int]], start: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids [B, width] from `start` on and their positions; past a row's end the position is -1."""
    tokens = np.zeros((len(prompts), width), np.int32)
    positions = np.full((len(prompts), width), -1, np.int32)
    for row, prompt in enumerate(prompts):
        piece = np.asarray(prompt[start : start + width], np.int32)
        tokens[row, : len(piece)] = piece
        positions[row, : len(piece)] = np.arange(start, start + len(piece))
    return tokens, positions


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(4,))
def _read(
    config: Config,
    dtype: Any,
    first: bool,
    params: Params,
    cache: Cache,
    tokens: Any,
    positions: Any,
    last: Any,
    ends: Any,
) -> tuple[jax.Array, Cache]:
    """Read a chunk; rows whose prompt ends in it give their last hidden state."""
    x, written = hidden(params, config, tokens, Marks(positions), cache, first=first, dtype=dtype)
    assert written is not None
    index = jnp.argmax(positions == ends[:, None], axis=1)
    here = (positions == ends[:, None]).any(axis=1)
    picked = jnp.take_along_axis(x, index[:, None, None], axis=1)[:, 0]
    return jnp.where(here[:, None], picked, last), written


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=(6,))
def _first(
    config: Config,
    dtype: Any,
    num_tokens: int,
    top: int,
    params: Params,
    last: Any,
    seen: Any,
    at: Any,
    rows: Rows,
) -> tuple[jax.Array, jax.Array, Drawn]:
    """The first token of each row, from the prompt's last hidden state."""
    found = logits(params, config, last.astype(dtype)[:, None])[:, 0]
    drawn = sample(found, rows, lambda: seen, at, num_tokens, top=top)
    return drawn.ids, recorded(seen, drawn.ids), drawn


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=(5, 6, 7))
def _next(
    config: Config,
    dtype: Any,
    num_tokens: int,
    top: int,
    params: Params,
    cache: Cache,
    ids: jax.Array,
    seen: jax.Array,
    at: jax.Array,
    rows: Rows,
) -> tuple[jax.Array, jax.Array, Cache, Drawn]:
    """`_AT_ONCE` decoding steps: feed the last tokens at their positions (-1: the row is done), draw the next.

    What comes after a row's last token is for nobody: one dispatch costs more than a few tokens too many.
    """

    def step(state: tuple[Any, ...], _: None) -> tuple[tuple[Any, ...], Drawn]:
        cache, ids, seen, at = state
        x, written = hidden(params, config, ids[:, None], Marks(at[:, None]), cache, dtype=dtype)
        found = logits(params, config, x)[:, 0]
        drawn = sample(found, rows, lambda: seen, at, num_tokens, top=top)
        return (written, drawn.ids, recorded(seen, drawn.ids), jnp.where(at < 0, at, at + 1)), drawn

    (cache, ids, seen, _), drawn = jax.lax.scan(step, (cache, ids, seen, at), None, length=_AT_ONCE)
    return ids, seen, cache, drawn


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4), donate_argnums=(6,))
def _score(
    config: Config,
    dtype: Any,
    known: int,
    top: int,
    first: bool,
    params: Params,
    cache: Cache,
    tokens: Any,
    positions: Any,
    targets: Any,
) -> tuple[tuple[jax.Array, ...], Cache]:
    """Log-probabilities of the targets after each token of a chunk, and the likeliest ones, 64 positions at a time."""
    x, written = hidden(params, config, tokens, Marks(positions), cache, first=first, dtype=dtype)
    assert written is not None
    width = math.gcd(64, x.shape[1])

    def piece(at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        found = logits(params, config, at[0][None])[0]
        best_ids, best, total = highest(found, known, max(top, 1))
        chosen = jnp.take_along_axis(found, at[1][:, None], axis=1)[:, 0] - total
        return chosen, best_ids[:, :top], best[:, :top] - total[:, None]

    cut = x.reshape(-1, width, x.shape[-1]), targets.reshape(-1, width)
    return tuple(part.reshape(x.shape[1], *part.shape[2:]) for part in jax.lax.map(piece, cut)), written
