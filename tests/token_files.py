"""Tokenized documents from lists of ids, for tests that count them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from gemmary.data.tokens import Tokens, write_tokens
from gemmary.text import Tokenizer
from gemmary.text.vocabulary import Kind, Piece

PAD, EOS, BOS = 0, 1, 2
IDS = {"bos": BOS, "eos": EOS, "pad": PAD}


class Numbers:
    """Stands for a tokenizer: "17 4" is the ids 17 and 4."""

    size = 1 << 20
    pieces = (Piece("number", 0.0, Kind.NORMAL),)

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]


def tokens_of(path: Path, documents: Sequence[Sequence[int]]) -> Tokens:
    write_tokens(path, (" ".join(map(str, ids)) for ids in documents), cast("Tokenizer", Numbers()), threads=1)
    return Tokens(path)


def numbered(path: Path, lengths: Sequence[int], first: int = 10) -> Tokens:
    """Documents of these lengths in which every token of all has an id of its own, from `first` on."""
    ends = first + np.cumsum(lengths)
    return tokens_of(path, [range(end - n, end) for end, n in zip(ends.tolist(), lengths, strict=True)])


def same(a: Any, b: Any) -> bool:
    """Whether two batches are equal in every array, dtypes too."""
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b, strict=True))
