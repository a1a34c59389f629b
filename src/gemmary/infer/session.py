"""A conversation's cache, kept from turn to turn: what a text has in common with the one before it is not read again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gemmary.model.cache import Cache, LayerCache

__all__ = ["Session"]


class Session:
    """For `Engine.generate`, one text at a time, always of the same engine."""

    def __init__(self) -> None:
        self.room = 0
        self._cache: Cache | None = None
        self._tokens: list[int] = []

    def take(self, prompt: Sequence[int], room: int, most_back: int) -> tuple[Cache | None, int]:
        """The cache, if it has the room and what is new is at most `most_back` tokens before its end, and how many of the prompt's
        tokens are in it: never all. Whoever takes it gives it back with `keep`."""
        cache, tokens = self._cache, self._tokens
        self.clear()
        pairs = zip(tokens, prompt[:-1], strict=False)
        same = next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(tokens), len(prompt) - 1))
        if cache is None or same == 0 or room > self.room or len(tokens) - same > most_back:
            return None, 0
        return _forget(cache, same), same

    def clear(self) -> None:
        """Nothing is kept."""
        self._cache, self._tokens = None, []

    def keep(self, cache: Cache, tokens: Sequence[int]) -> None:
        """These tokens, at least, are in the cache."""
        self._cache, self._tokens = cache, list(tokens)


@jax.jit
def _forget(cache: Cache, end: Any) -> Cache:
    """Only positions before `end`; what was guessed, cut off or said otherwise is gone."""
    return tuple(LayerCache(one.k, one.v, jnp.where(one.positions < end, one.positions, -1)) for one in cache)
