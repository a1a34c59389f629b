"""A document's words, found once and shared by all rules, as arrays instead of strings.

A *word* is a run of letters, digits and underscores, with apostrophes between them: as a regular expression, `PATTERN`. Hashes of words and of n consecutive words come from one running sum over the characters:

    P[i] = sum over j < i of mix(c[j]) · b^j            hash of characters s … e = (P[e] - P[s]) · b^-s     (mod 2^64)

so that equal strings have equal hashes wherever they stand, in every process and on every machine.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache, cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["PATTERN", "Flags", "Hashes", "Places", "Words", "characters_where", "repeated"]

Hashes = npt.NDArray[np.uint64]
Places = npt.NDArray[np.integer[Any]]
Flags = npt.NDArray[np.bool_]

PATTERN = re.compile(r"\w+(?:['’]\w+)*")

_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 1 << 64)
_MULTIPLIER = np.uint64(0xD6E8FEB86659FD93)
_PLANES = 0x20000  # characters beyond the first two planes are told apart by plane alone


def characters_where(holds: Callable[[str], bool]) -> Flags:
    """Of each character whether this holds, to be indexed with `Words.characters`."""
    planes = [holds(chr(max(plane << 16, 1))) for plane in range(17)]
    return np.array([holds(chr(code)) for code in range(_PLANES)] + planes, np.bool_)


@cache
def _letters() -> Flags:
    return characters_where(lambda c: c.isalnum() or c == "_")


@cache
def _lower() -> npt.NDArray[np.uint32]:
    lowered = (c if len(c := chr(code).lower()) == 1 else chr(code) for code in range(_PLANES))
    return np.array([*map(ord, lowered)], np.uint32)


_powers: tuple[Hashes, Hashes] = (np.ones(1, np.uint64), np.ones(1, np.uint64))


def _powers_to(size: int) -> tuple[Hashes, Hashes]:
    """b^0 … b^size and their inverses; a table that grows."""
    global _powers
    if len(_powers[0]) <= size:
        grown = 1 << max(16, size.bit_length())

        def table(base: int) -> Hashes:
            steps = np.full(grown, base, np.uint64)
            steps[0] = 1
            return np.cumprod(steps, dtype=np.uint64)

        _powers = table(_BASE), table(_INVERSE)
    return _powers


def _prefix(values: npt.NDArray[np.unsignedinteger[Any]]) -> Hashes:
    mixed = (values.astype(np.uint64) + np.uint64(1)) * _MULTIPLIER
    mixed ^= mixed >> np.uint64(29)
    mixed *= _powers_to(len(mixed))[0][: len(mixed)]
    sums = np.zeros(len(mixed) + 1, np.uint64)
    np.cumsum(mixed, out=sums[1:])
    return sums


def _between(prefix: Hashes, starts: Places, ends: Places) -> Hashes:
    hashes = (prefix[ends] - prefix[starts]) * _powers_to(len(prefix))[1][starts]
    hashes ^= hashes >> np.uint64(32)
    hashes *= _MULTIPLIER  # so that high bits depend on all characters
    hashes ^= hashes >> np.uint64(29)
    return hashes


def repeated(hashes: Hashes) -> Places:
    """Where those stand that occur more than once, in order."""
    ordered = np.sort(hashes)
    twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if not twice.size:
        return np.zeros(0, np.int64)
    nearest = np.minimum(np.searchsorted(twice, hashes), len(twice) - 1)
    return np.flatnonzero(twice[nearest] == hashes)


class Words:
    """One text's words. Arrays are made when first asked for, and kept."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.codes: npt.NDArray[np.uint32] = np.frombuffer(text.encode("utf-32-le"), np.uint32)

    def __len__(self) -> int:
        return len(self.starts)

    @cached_property
    def characters(self) -> npt.NDArray[Any]:
        """The text's characters, as places in what `characters_where` gives."""
        beyond = self.codes >= _PLANES
        return np.where(beyond, _PLANES + (self.codes >> 16), self.codes) if beyond.any() else self.codes

    @cached_property
    def _runs(self) -> tuple[Flags, Places, Places]:
        """Which characters are in words; where words start and end."""
        inside = _letters()[self.characters]
        if inside.size > 2:
            between = (self.codes == 0x27) | (self.codes == 0x2019)
            between[1:-1] &= inside[:-2] & inside[2:]
            between[[0, -1]] = False
            inside |= between
        turns = np.flatnonzero(np.diff(inside, prepend=False, append=False))
        return inside, turns[::2], turns[1::2]

    @property
    def starts(self) -> Places:
        """Where each word's first character stands in the text."""
        return self._runs[1]

    @property
    def ends(self) -> Places:
        """Where each word has ended in the text."""
        return self._runs[2]

    @cached_property
    def lengths(self) -> Places:
        """Characters of each word."""
        return self.ends - self.starts

    @cached_property
    def hashes(self) -> Hashes:
        """A hash of each word."""
        return _between(_prefix(self.codes), self.starts, self.ends)

    @cached_property
    def normalised(self) -> Hashes:
        """A hash of each word in lower case."""
        lower = _lower()
        codes = lower[np.minimum(self.codes, _PLANES - 1)]
        codes = np.where(self.codes < _PLANES, codes, self.codes)
        return _between(_prefix(codes), self.starts, self.ends)

    @cached_property
    def _sequence(self) -> Hashes:
        return _prefix(self.normalised)

    def sequences(self, starts: Places, ends: Places) -> Hashes:
        """A hash of the words, in lower case, of each range of them."""
        return _between(self._sequence, starts, ends)

    def shingles(self, n: int) -> Hashes:
        """A hash of every n consecutive words in lower case."""
        starts = np.arange(max(0, len(self) - n + 1))
        return self.sequences(starts, starts + n)

    @cached_property
    def _exact_sequence(self) -> Hashes:
        return _prefix(self.hashes)

    def ngrams(self, n: int) -> Hashes:
        """A hash of every n consecutive words."""
        starts = np.arange(max(0, len(self) - n + 1))
        return _between(self._exact_sequence, starts, starts + n)

    @cached_property
    def _joined(self) -> tuple[Hashes, Places]:
        """The running sum over all words put together without spaces, and where each ends there."""
        ends = np.zeros(len(self) + 1, np.int64)
        np.cumsum(self.lengths, out=ends[1:])
        return _prefix(self.codes[self._runs[0]]), ends

    def joined(self, n: int) -> tuple[Hashes, Places]:
        """Of every n consecutive words put together without spaces: a hash, and the number of characters."""
        prefix, ends = self._joined
        starts, ends = ends[:-n], ends[n:]
        return _between(prefix, starts, ends), ends - starts
