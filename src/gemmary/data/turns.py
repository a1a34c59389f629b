"""Conversations and pairs of answers in rows of equal length, whole: none is cut, and none sees another.

What is packed once goes round in an order that changes from epoch to epoch. A row is filled with the longest that fit, so that
little is padding. In a row of pairs, a preferred answer and the other one lie in the same row, each behind its prompt.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Sequence
from hashlib import sha256
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from gemmary.data.packing import Batch, blank_row, shuffled
from gemmary.data.tokens import Tokens
from gemmary.errors import GemmaryError

__all__ = ["PackedDialogues", "PackedPairs", "PairBatch", "PromptBatch", "Prompts", "Rows", "lay_out", "pack"]

Int = npt.NDArray[np.int64]


class Rows(Protocol):
    """Rows of a source, numbered on from epoch to epoch: what a mixture draws from."""

    rows: int
    """Of one epoch."""

    def __getitem__(self, number: int) -> Any: ...

    def padding(self, rows: int) -> int:
        """Slots of padding in the first so many rows."""
        ...


class PairBatch(NamedTuple):
    """Rows of pairs: a `Batch`'s arrays, and for each pair, at the last slot of its preferred answer, where the other's is.

    `partner` int32 [B, T] is -1 everywhere else.
    """

    tokens: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int32]
    mask: npt.NDArray[np.float32]
    positions: npt.NDArray[np.int32]
    segments: npt.NDArray[np.int32]
    partner: npt.NDArray[np.int32]


class PromptBatch(NamedTuple):
    """Which prompts: of which source, by its place among the names, and which of that source. int32 [B]."""

    source: npt.NDArray[np.int32]
    prompt: npt.NDArray[np.int32]


def pack(lengths: Sequence[int], length: int) -> list[list[int]]:
    """Which items share a row of `length`: each goes where it leaves the least room, the longest first."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (left, row), in order
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        size = lengths[item]
        at = bisect_right(room, (size - 1, len(rows)))
        if at < len(room):
            left, row = room.pop(at)
        else:
            left, row = length, len(rows)
            rows.append([])
        rows[row].append(item)
        if left > size:
            insort(room, (left - size, row))
    return rows


def lay_out(pieces: Sequence[tuple[Int, Int]], length: int, pad: int) -> Batch:
    """One row of (ids, which of them are learnt): each id but its last predicts the next.

    A piece takes as many slots as it has ids; its last has nothing to predict.
    """
    row = blank_row(length, pad)
    start = 0
    for number, (ids, learnt) in enumerate(pieces):
        end = start + len(ids)
        row.tokens[start:end] = ids
        row.targets[start : end - 1] = ids[1:]
        row.mask[start : end - 1] = learnt[1:]
        row.positions[start:end] = np.arange(len(ids))
        row.segments[start:end] = number
        start = end
    return row


class _Cycle:
    """Rows made once, gone through in another order each epoch."""

    def __init__(self, packed: list[list[int]], used: Sequence[int], name: str, length: int, seed: int) -> None:
        self._packed, self._length = packed, length
        self._used = np.array(used, np.int64)
        self._key = seed, int.from_bytes(sha256(name.encode()).digest()[:8], "big")
        self._order: tuple[int, Int] = (-1, np.zeros(0, np.int64))
        self.rows = len(packed)

    def _items(self, number: int) -> list[int]:
        epoch, row = divmod(number, self.rows)
        return self._packed[int(self._epoch(epoch)[row])]

    def _epoch(self, epoch: int) -> Int:
        known = self._order  # read once: another thread may be at another epoch
        if known[0] != epoch:
            self._order = known = epoch, shuffled(self.rows, *self._key, epoch)
        return known[1]

    def padding(self, rows: int) -> int:
        """Slots of padding in the first so many rows."""
        epochs, rest = divmod(rows, self.rows)
        free = self._length - self._used
        return int(epochs * free.sum() + (free[self._epoch(epochs)[:rest]].sum() if rest else 0))


class PackedDialogues(_Cycle):
    """A source of conversations in rows of `length`, each a `Batch` [T]."""

    def __init__(self, tokens: Tokens, name: str, *, length: int, seed: int, pad: int) -> None:
        """Raises GemmaryError where a conversation is longer than a row."""
        sizes = tokens.lengths.tolist()
        _fits(name, sizes, length)
        packed = pack(sizes, length)
        super().__init__(packed, [sum(sizes[i] for i in row) for row in packed], name, length, seed)
        self._tokens, self._pad = tokens, pad

    def __getitem__(self, number: int) -> Batch:
        items = self._items(number)
        return lay_out([(self._tokens[i], self._tokens.learnt(i)) for i in items], self._length, self._pad)  # type: ignore[misc]


class PackedPairs(_Cycle):
    """A source of preferences: conversations that end with the preferred answer, and the same with the other."""

    def __init__(self, chosen: Tokens, rejected: Tokens, name: str, *, length: int, seed: int, pad: int) -> None:
        """Raises GemmaryError where a pair is longer than a row."""
        sizes = (chosen.lengths + rejected.lengths).tolist()
        _fits(name, sizes, length)
        packed = pack(sizes, length)
        super().__init__(packed, [sum(sizes[i] for i in row) for row in packed], name, length, seed)
        self._both, self._pad = (chosen, rejected), pad

    def __getitem__(self, number: int) -> PairBatch:
        return self.row(self._items(number))

    def row(self, items: Sequence[int]) -> PairBatch:
        """One row of these pairs."""
        pieces = [(tokens[i], tokens.learnt(i)) for i in items for tokens in self._both]
        batch = lay_out(pieces, self._length, self._pad)  # type: ignore[arg-type]
        partner = np.full(self._length, -1, np.int32)
        ends = np.cumsum([len(ids) for ids, _ in pieces], dtype=np.int64) - 1
        partner[ends[::2]] = ends[1::2]
        return PairBatch(*batch, partner)

    def in_order(self) -> list[list[int]]:
        """The pairs of each row, for going through all of them once."""
        return self._packed


class Prompts(_Cycle):
    """A source of prompts, one a row."""

    def __init__(self, count: int, source: int, name: str, seed: int) -> None:
        super().__init__([[i] for i in range(count)], [1] * count, name, 1, seed)
        self._source = source

    def __getitem__(self, number: int) -> PromptBatch:
        return PromptBatch(np.int32(self._source), np.int32(self._items(number)[0]))  # type: ignore[arg-type]


def _fits(name: str, sizes: list[int], length: int) -> None:
    if not sizes:
        raise GemmaryError(f"the source {name} has nothing to learn from")
    if max(sizes) > length:
        raise GemmaryError(f"the source {name} has {max(sizes)} tokens in one piece, and a row takes {length}")
