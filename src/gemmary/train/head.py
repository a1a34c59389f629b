"""How logits are made of hidden states for a loss: how many at once, and what is done to them."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Head", "chunk_size"]


class Head(NamedTuple):
    """How logits become a loss: their soft-cap, and the weight of log²(Z), which keeps the sum Z of a softmax near 1.

    `chunk` positions of every row of the batch are taken at once. `sparse` says that many positions count for nothing, as
    a user's turns do: those that count are then put first in each row, and no logits are made of the rest.
    """

    chunk: int
    softcap: float | None = None
    z_loss: float = 0.0
    sparse: bool = False


def chunk_size(rows: int, vocab: int, most_bytes: int) -> int:
    """Positions of `rows` rows whose fp32 logits take at most so many bytes; a power of two, at least 16."""
    return int(max(16, 1 << max(0, (most_bytes // (4 * rows * vocab)).bit_length() - 1)))
