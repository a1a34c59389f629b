"""Answers faster, by guessing several tokens and checking them in one step: the same tokens as without.

A draw depends on logits, seed and position alone (`infer.sampling`), so a guess is right exactly where it is what would have been drawn
there: at any temperature the answer is the one that single steps give (up to rounding), and not only alike in distribution as with the
rejection of Leviathan et al. (arXiv 2211.17192). What a wrong guess has left in the cache is written over before it is seen.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from gemmary.config import Config
from gemmary.errors import GemmaryError
from gemmary.infer.engine import Engine, Token
from gemmary.infer.sampling import GREEDY, Drawn, Rows, Sampling, rows_of, sample
from gemmary.model.attention import Marks
from gemmary.model.cache import Cache, init_cache
from gemmary.model.transformer import hidden, logits
from gemmary.params import Params

__all__ = ["Draft", "Guesser", "LookUp", "speculate"]

_READ = 16
"""Tokens that a draft model reads at once, besides a prompt."""


@runtime_checkable
class Guesser(Protocol):
    """Knows what may come next. One for each answer."""

    def guess(self, tokens: Sequence[int], most: int) -> list[int]:
        """At most so many tokens that may follow; `tokens` begin as they did before."""


class LookUp:
    """What followed the last few tokens when they last came (prompt look-up; Saxena, 2023)."""

    def __init__(self, longest: int = 3) -> None:
        self._longest, self._read = longest, 0
        self._after: dict[tuple[int, ...], int] = {}

    def guess(self, tokens: Sequence[int], most: int) -> list[int]:
        """As `Guesser` says. A longer run of equal tokens counts more, then a later one."""
        end = len(tokens)
        for at in range(self._read + 1, end):  # runs that end before the last token: something follows them
            for length in range(1, min(self._longest, at) + 1):
                self._after[tuple(tokens[at - length : at])] = at
        self._read = max(end - 1, 0)
        for length in range(min(self._longest, end), 0, -1):
            found = self._after.get(tuple(tokens[end - length :]))
            if found is not None:
                return list(tokens[found : found + most])
        return []


class Draft:
    """A smaller model of the same vocabulary says what it would say, greedily. `room`: tokens of the longest text."""

    def __init__(self, engine: Engine, room: int) -> None:
        self._engine, self._room, self._read = engine, min(room + 2 * _READ, engine.config.context), 0
        self._cache: Cache | None = None

    def guess(self, tokens: Sequence[int], most: int) -> list[int]:
        """As `Guesser` says."""
        if most < 1 or len(tokens) + most > self._room:
            return []
        engine = self._engine
        if self._cache is None:
            self._read = len(tokens) - 1
            self._cache = engine.prefill([tokens[:-1]], self._room)[0] if self._read else self._empty()
        while True:
            piece = list(tokens[self._read : self._read + _READ])
            ids, positions = np.zeros((1, _READ), np.int32), np.full((1, _READ), -1, np.int32)
            ids[0, : len(piece)] = piece
            positions[0, : len(piece)] = np.arange(self._read, self._read + len(piece))
            static = (engine.config, engine.dtype, engine.num_tokens or engine.config.num_tokens, most)
            found, self._cache = _propose(*static, engine.params, self._cache, ids, positions, np.int32(len(piece) - 1))
            self._read += len(piece)
            if self._read == len(tokens):
                return list(map(int, np.asarray(found)))

    def _empty(self) -> Cache:
        return init_cache(self._engine.config, 1, self._room, self._engine.chunk, self._engine.dtype)


def speculate(
    engine: Engine,
    prompt: Sequence[int],
    guesser: Guesser,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop_ids: Sequence[int] = (),
    top_logprobs: int = 0,
    guesses: int = 3,
) -> Iterator[Token]:
    """The tokens of `engine.generate` for one prompt, up to `guesses` + 1 of them a step.

    Raises GemmaryError as `generate` does, and for penalties: what they count changes with every token.
    """
    engine.check([prompt], max_new_tokens, top_logprobs)
    if sampling.penalized:
        raise GemmaryError("penalties count every token before the next is drawn: they cannot go with speculation")
    if not 1 <= guesses < _READ:
        raise GemmaryError(f"guesses is {guesses}; it must be from 1 to {_READ - 1}")
    room = min(len(prompt) + max_new_tokens, engine.config.context)
    cache, last = engine.prefill([prompt], room + guesses)
    known = engine.num_tokens or engine.config.num_tokens
    drawn = _first(
        engine.config, known, top_logprobs, engine.params, last, np.int32(len(prompt) - 1), rows_of([sampling])
    )
    tokens, rows = list(prompt), rows_of([sampling] * (guesses + 1))
    guess: list[int] = []
    while True:
        for token in _accepted(drawn, guess):
            tokens.append(token.id)
            finish = "stop" if token.id in stop_ids else "length" if len(tokens) >= room else None
            yield token._replace(finish=finish)
            if finish:
                return
        guess = guesser.guess(tokens, min(guesses, room - len(tokens) - 1))
        ids, positions = np.zeros((1, guesses + 1), np.int32), np.full((1, guesses + 1), -1, np.int32)
        fed = [tokens[-1], *guess]
        ids[0, : len(fed)] = fed
        positions[0, : len(fed)] = np.arange(len(tokens) - 1, len(tokens) - 1 + len(fed))
        width = guesses + 1 if guess else 1
        drawn, cache = _check(
            engine.config, engine.dtype, known, top_logprobs, engine.params, cache, ids[:, :width], positions[:, :width],
            Rows(*(part[:width] for part in rows)),
        )  # fmt: skip


def _accepted(drawn: Drawn, guess: Sequence[int]) -> Iterator[Token]:
    """The tokens that were drawn after the right guesses, and the one that was drawn after the last of these."""
    ids, logprobs, top_ids, top = (np.asarray(part) for part in drawn)
    for row in range(len(guess) + 1):
        best = tuple(zip(top_ids[row].tolist(), top[row].tolist(), strict=True))
        yield Token(0, int(ids[row]), float(logprobs[row]), best, None)
        if row < len(guess) and int(ids[row]) != guess[row]:
            return


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _first(config: Config, known: int, top: int, params: Params, last: jax.Array, at: Any, rows: Rows) -> Drawn:
    return _draw(config, known, top, params, last, at[None], rows)


def _draw(config: Config, known: int, top: int, params: Params, x: jax.Array, at: Any, rows: Rows) -> Drawn:
    """One draw for each hidden state [T, D]."""
    found = logits(params, config, x[None])[0]
    return sample(found, rows, lambda: jnp.zeros(found.shape, jnp.int32), at, known, top=top)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=(5,))
def _check(
    config: Config, dtype: Any, known: int, top: int, params: Params, cache: Cache, ids: Any, positions: Any, rows: Rows
) -> tuple[Drawn, Cache]:
    """What would be drawn after each of these tokens."""
    x, written = hidden(params, config, jnp.asarray(ids), Marks(jnp.asarray(positions)), cache, dtype=dtype)
    return _draw(config, known, top, params, x[0], jnp.asarray(positions)[0], rows), written


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=(5,))
def _propose(
    config: Config, dtype: Any, known: int, most: int, params: Params, cache: Cache, ids: Any, positions: Any, last: Any
) -> tuple[jax.Array, Cache]:
    """Read some tokens, then say the likeliest ones."""
    x, cache = hidden(params, config, jnp.asarray(ids), Marks(jnp.asarray(positions)), cache, dtype=dtype)
    at = jnp.asarray(positions)[0, last]

    def likeliest(x: jax.Array) -> jax.Array:
        return jnp.argmax(logits(params, config, x[None, None])[0, 0, :known]).astype(jnp.int32)

    def step(state: Any, _: None) -> tuple[Any, jax.Array]:
        cache, token, at = state
        x, cache = hidden(params, config, token[None, None], Marks(at[None, None]), cache, dtype=dtype)
        following = likeliest(x[0, 0])
        return (cache, following, at + 1), following

    first = likeliest(x[0, last])
    state: Any = (cache, first, at + 1)
    (cache, *_), rest = jax.lax.scan(step, state, None, length=most - 1)
    return jnp.concatenate([first[None], rest]), cache
