"""Rows of equal length from documents, each of which can be made alone.

A document takes as many slots as there is to predict in it: its tokens and EOS. An epoch lays its documents end to end,
in an order of its own, and cuts the line into rows. What a row has of one document is a piece: the piece's targets are
those tokens, its inputs BOS and the same tokens but the last.

    documents abcde and fg, in rows of 4     tokens    BOS a b c   BOS e   BOS f   BOS
                                             targets    a  b c d    e EOS   f  g   EOS
                                             piece      0  0 0 0    0  0    1  1    0

So every token is a target exactly once in an epoch, nothing is padding but the end of the last row, a document is cut
only where a row ends, and none sees another: positions begin again at each piece, and segments number the pieces. Rows
then come in an order of their own, so that the rows of one book do not follow one another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import sha256
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from gemmary.data.tokens import Tokens
from gemmary.errors import GemmaryError

__all__ = ["Batch", "Packed", "Piece", "Plan", "blank_row", "held_out_batches", "shuffled", "stacked"]

Int = npt.NDArray[np.int64]
Row = TypeVar("Row", bound=tuple[Any, ...])


class Batch(NamedTuple):
    """Rows for a model: arrays [B, T], or [T] for one row. At padding, mask is 0 and position and segment are -1."""

    tokens: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int32]
    """The token after each; where `mask` is 0 it means nothing."""
    mask: npt.NDArray[np.float32]
    positions: npt.NDArray[np.int32]
    segments: npt.NDArray[np.int32]


class Piece(NamedTuple):
    """Slots of a document that lie in one row; the slot after the last token is EOS."""

    document: int
    start: int
    stop: int


def stacked(rows: Sequence[Row]) -> Row:
    """Rows [T] as a batch [B, T]; a row is a named tuple of arrays."""
    return type(rows[0])(*(np.stack(arrays) for arrays in zip(*rows, strict=True)))


def shuffled(count: int, *key: int) -> Int:
    """A permutation that depends on the key alone, in any version of NumPy.

    NumPy promises the words of a bit generator, not what its `permutation` makes of them.
    """
    words: Any = np.random.PCG64(np.random.SeedSequence(key)).random_raw(count)
    return np.argsort(words, kind="stable")


def blank_row(length: int, pad: int) -> Batch:
    """A row of padding."""
    return Batch(
        tokens=np.full(length, pad, np.int32),
        targets=np.full(length, pad, np.int32),
        mask=np.zeros(length, np.float32),
        positions=np.full(length, -1, np.int32),
        segments=np.full(length, -1, np.int32),
    )


def _row(tokens: Tokens, pieces: Sequence[Piece], length: int, bos: int, eos: int, pad: int) -> Batch:
    sizes = np.array([piece.stop - piece.start for piece in pieces], np.int64)
    ends = np.cumsum(sizes)
    starts, used = ends - sizes, int(sizes.sum())
    row = blank_row(length, pad)
    for piece, start, end in zip(pieces, starts.tolist(), ends.tolist(), strict=True):
        ids = tokens[piece.document][piece.start : piece.stop]
        row.targets[start:end] = eos
        row.targets[start : start + len(ids)] = ids
    row.tokens[1:] = row.targets[:-1]
    row.tokens[starts], row.tokens[used:] = bos, pad
    row.mask[:used] = 1
    row.positions[:used] = np.arange(used) - np.repeat(starts, sizes)
    row.segments[:used] = np.repeat(np.arange(len(pieces)), sizes)
    return row


class Plan:
    """One epoch of a source: which pieces every row holds. 16 bytes of memory for a document, and 8 for a row."""

    def __init__(self, lengths: Int, length: int, *key: int) -> None:
        documents = np.flatnonzero(lengths)  # an empty one has nothing to predict but EOS
        self._documents = documents[shuffled(len(documents), *key, 0)]
        self._ends = np.cumsum(lengths[self._documents] + 1)
        self._length, self._slots = length, int(self._ends[-1]) if len(documents) else 0
        self._rows = shuffled(-(-self._slots // length), *key, 1)

    def __len__(self) -> int:
        return len(self._rows)

    def pieces(self, row: int) -> list[Piece]:
        """The pieces of one row, in order."""
        begin = int(self._rows[row]) * self._length
        end = min(begin + self._length, self._slots)
        first, last = np.searchsorted(self._ends, (begin, end - 1), side="right")
        ends = self._ends[first : last + 1].tolist()
        starts = [int(self._ends[first - 1]) if first else 0, *ends]
        documents = self._documents[first : last + 1].tolist()
        return [
            Piece(document, max(begin - start, 0), min(end, stop) - start)
            for document, start, stop in zip(documents, starts, ends, strict=False)
        ]

    def padding(self, rows: int) -> int:
        """Slots of padding in the first so many rows."""
        last = int(np.flatnonzero(self._rows == len(self) - 1)[0])
        return len(self) * self._length - self._slots if last < rows else 0


class Packed:
    """A source in rows of `length`, numbered on from epoch to epoch. Row n is a function of n, the seed and the name."""

    def __init__(self, tokens: Tokens, name: str, *, length: int, seed: int, bos: int, eos: int, pad: int) -> None:
        """Raises GemmaryError for a source without one full row."""
        self._tokens, self._length, self._ids = tokens, length, (bos, eos, pad)
        self._key = seed, int.from_bytes(sha256(name.encode()).digest()[:8], "big")
        self._plans: dict[int, Plan] = {}
        lengths = tokens.lengths
        self.slots = int(lengths.sum() + np.count_nonzero(lengths))
        if self.slots < length:
            raise GemmaryError(f"the source {name} has {self.slots} tokens, not one row of {length}: give it more text")
        self.rows = -(-self.slots // length)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plans": {}}  # a worker makes its own

    def __getitem__(self, number: int) -> Batch:
        """Row `number`, which is in epoch `number // rows`."""
        epoch, row = divmod(number, self.rows)
        return _row(self._tokens, self._plan(epoch).pieces(row), self._length, *self._ids)

    def padding(self, rows: int) -> int:
        """Slots of padding in the first so many rows."""
        epochs, rest = divmod(rows, self.rows)
        return epochs * (self.rows * self._length - self.slots) + (self._plan(epochs).padding(rest) if rest else 0)

    def _plan(self, epoch: int) -> Plan:
        plans = self._plans
        if (plan := plans.get(epoch)) is None:
            plan = Plan(self._tokens.lengths, self._length, *self._key, epoch)
            # And the one made before it: where epochs meet, and for shares so far, which lie behind.
            self._plans = dict([*plans.items()][-1:]) | {epoch: plan}
        return plan


def held_out_batches(tokens: Tokens, *, length: int, batch: int, bos: int, eos: int, pad: int) -> Iterator[Batch]:
    """Every token of every document once, in the documents' order: sum(-log2 p · mask) / tokens.bytes is bits per byte.

    Documents are cut into windows of `length`, each beginning with BOS; windows share rows and are never cut, so the
    result does not depend on a document's neighbours. EOS is not predicted, for it is no byte of the text. The last
    batch is filled up with padding.
    """
    rows: list[Batch] = []
    for pieces in _windows(tokens, length):
        rows.append(_row(tokens, pieces, length, bos, eos, pad))
        if len(rows) == batch:
            yield stacked(rows)
            rows = []
    if rows:
        yield stacked([*rows, *[_row(tokens, [], length, bos, eos, pad)] * (batch - len(rows))])


def _windows(tokens: Tokens, length: int) -> Iterator[list[Piece]]:
    """Rows of windows: each goes into the row before it if it fits."""
    row: list[Piece] = []
    room = length
    for document, size in enumerate(tokens.lengths.tolist()):
        for start in range(0, size, length):
            piece = Piece(document, start, min(start + length, size))
            if piece.stop - start > room:
                yield row
                row, room = [], length
            row.append(piece)
            room -= piece.stop - start
    if row:
        yield row
