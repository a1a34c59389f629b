"""How likely a model finds many continuations, where most of them begin alike: answers to one question, questions behind one set of examples.

Texts are put in order, laid in rows as trees (`model.attention.Marks`), and what they have in common is read once for each row.
Logits are made only where a continuation's token follows: with a vocabulary of 256,000 they are most of the work.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemmary.config import Config
from gemmary.errors import GemmaryError
from gemmary.infer.engine import Engine
from gemmary.infer.sampling import highest
from gemmary.model.attention import Marks
from gemmary.model.transformer import hidden, logits
from gemmary.params import Params

__all__ = ["Asked", "Scored", "score"]

_LEAST, _MOST = 256, 4096
"""The shortest row, and the longest that is not as long for one text alone."""
_TEXTS = 8
"""A row has room for so many of the longest texts."""
_TOGETHER, _TARGETS = 64, 4
"""Hidden states whose logits are made at once, and tokens that are looked up in those of one."""


class Asked(NamedTuple):
    """A continuation, and the tokens before it (BOS among them)."""

    context: Sequence[int]
    continuation: Sequence[int]


class Scored(NamedTuple):
    """The continuation's log-probability in nats, and whether each of its tokens is the likeliest."""

    logprob: float
    greedy: bool


@dataclass
class _Row:
    """Tokens as they are laid, each with its position and the place after the last that grew from it."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    path: list[int] = field(default_factory=list)  # places of the last text's tokens
    wanted: list[tuple[int, int, int]] = field(default_factory=list)  # a place, the token asked for, and whose

    def shared(self, text: Sequence[int]) -> int:
        """How many of a text's tokens are those of the last one."""
        pairs = zip(text, self.path, strict=False)
        return next((i for i, (id, at) in enumerate(pairs) if id != self.tokens[at]), min(len(text), len(self.path)))

    def add(self, number: int, text: Sequence[int], targets: Sequence[int]) -> None:
        """A text, and the tokens that are asked for after its last ones."""
        same = self.shared(text)
        self._end(same)
        self.path += range(len(self.tokens), len(self.tokens) + len(text) - same)
        self.tokens += text[same:]
        self.positions += range(same, len(text))
        self.ends += [0] * (len(text) - same)
        places = self.path[len(text) - len(targets) :]
        self.wanted += [(at, target, number) for at, target in zip(places, targets, strict=True)]

    def _end(self, depth: int) -> None:
        """What comes now does not grow from the last text's tokens from that depth on."""
        for at in self.path[depth:]:
            self.ends[at] = len(self.tokens)
        del self.path[depth:]

    def laid(self) -> tuple[np.ndarray, Any]:
        """Tokens [1, T] and their marks (NumPy's), T one of few lengths."""
        self._end(0)
        width = max(_LEAST, 1 << max(len(self.tokens) - 1, 0).bit_length())
        full = [np.full((1, width), fill, np.int32) for fill in (0, -1, 0)]
        for into, values in zip(full, (self.tokens, self.positions, self.ends), strict=True):
            into[0, : len(values)] = values
        tokens, positions, ends = full
        return tokens, (positions, np.arange(width, dtype=np.int32)[None], ends)


def score(engine: Engine, asked: Sequence[Asked]) -> Iterator[tuple[int, Scored]]:
    """Yield each continuation's number and score, in whatever order they are read in.

    Of a text longer than the model's context only the first token (BOS) and the last ones are read. Raises GemmaryError for an empty context or
    continuation, one that is itself longer than the context, and ids that the model does not have.
    """
    texts = [_fed(engine, one) for one in asked]
    order = sorted(range(len(texts)), key=lambda number: texts[number])
    left = [len(one.continuation) for one in asked]
    sums, greedy = np.zeros(len(asked)), np.ones(len(asked), bool)
    known = engine.num_tokens or engine.config.num_tokens
    waiting: list[tuple[np.ndarray, tuple[int, ...], tuple[int, ...]]] = []

    def settle(everything: bool) -> Iterator[tuple[int, Scored]]:
        while len(waiting) >= _TOGETHER or (everything and waiting):
            some = waiting[:_TOGETHER]
            del waiting[:_TOGETHER]
            for number, logprob, best in _looked_up(engine, known, some):
                sums[number] += logprob
                greedy[number] &= best
                left[number] -= 1
                if not left[number]:
                    yield number, Scored(float(sums[number]), bool(greedy[number]))

    for row in _rows(texts, asked, order):
        tokens, marks = row.laid()
        x = _hidden(engine.config, engine.dtype, engine.params, tokens, marks)
        waiting += _states(np.asarray(x[0]), row.wanted)
        yield from settle(False)
    yield from settle(True)


def _fed(engine: Engine, one: Asked) -> list[int]:
    """What is read: all but the continuation's last token."""
    if not len(one.context) or not len(one.continuation):
        raise GemmaryError("a context and its continuation have at least one token each")
    text = [*one.context, *one.continuation][:-1]
    most = engine.config.context
    if len(one.continuation) >= most:
        raise GemmaryError(f"a continuation of {len(one.continuation)} tokens does not fit in the context of {most}")
    if len(text) > most:
        text = [text[0], *text[len(text) - most + 1 :]]
    engine.check([[*text, one.continuation[-1]][1:]], 0, 0)
    return text


def _rows(texts: Sequence[list[int]], asked: Sequence[Asked], order: Sequence[int]) -> Iterator[_Row]:
    """The texts, in that order, in rows."""
    longest = max(map(len, texts), default=0)
    room = max(min(1 << (_TEXTS * longest - 1).bit_length(), _MOST), longest)
    row = _Row()
    for number in order:
        if len(row.tokens) + len(texts[number]) - row.shared(texts[number]) > room:
            yield row
            row = _Row()
        row.add(number, texts[number], asked[number].continuation)
    if row.tokens:
        yield row


def _states(
    x: np.ndarray, wanted: Sequence[tuple[int, int, int]]
) -> Iterator[tuple[np.ndarray, tuple[int, ...], tuple[int, ...]]]:
    """Hidden states with the tokens that are asked for after them, a few at a time, and whose these are."""
    places: dict[int, list[tuple[int, int]]] = {}
    for at, target, number in wanted:
        places.setdefault(at, []).append((target, number))
    for at, pairs in places.items():
        for start in range(0, len(pairs), _TARGETS):
            targets, numbers = zip(*pairs[start : start + _TARGETS], strict=True)
            yield x[at], targets, numbers


def _looked_up(
    engine: Engine, known: int, some: Sequence[tuple[np.ndarray, tuple[int, ...], tuple[int, ...]]]
) -> Iterator[tuple[int, float, bool]]:
    """Of each token that is asked for: whose it is, its log-probability, and whether it is the likeliest."""
    states = np.zeros((_TOGETHER, engine.config.embed_dim), some[0][0].dtype)
    targets = np.zeros((_TOGETHER, _TARGETS), np.int32)
    for i, (state, asked, _) in enumerate(some):
        states[i], targets[i, : len(asked)] = state, asked
    found = _chosen(engine.config, known, engine.params, states, targets)
    logprobs, best = (np.asarray(part) for part in found)
    for i, (_, asked, numbers) in enumerate(some):
        for j, (target, number) in enumerate(zip(asked, numbers, strict=True)):
            yield number, float(logprobs[i, j]), bool(target == best[i])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _hidden(config: Config, dtype: Any, params: Params, tokens: Any, marks: Any) -> jax.Array:
    return hidden(params, config, tokens, Marks(*marks), dtype=dtype)[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _chosen(config: Config, known: int, params: Params, x: Any, targets: Any) -> tuple[jax.Array, jax.Array]:
    found = logits(params, config, x[None])[0]
    best, _, total = highest(found, known, 1)
    return jnp.take_along_axis(found, targets, axis=1) - total[:, None], best[:, 0]
