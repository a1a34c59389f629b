"""Exact and near duplicates across the whole corpus, and which documents are held out.

Signatures are MinHash over 5 consecutive lower-case words, 14 buckets of 8 hashes, written as datatrove writes them and
compared by its `MinhashDedupBuckets`; documents that share a bucket are near duplicates: two of Jaccard similarity s are
found with probability 1 - (1 - s^8)^14, half of them at 0.72. Of each cluster the first document stays, in the order of
sources and of documents in them (datatrove's own cluster step keeps any).
"""

from __future__ import annotations

from functools import cache
from hashlib import blake2b
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gemmary.data.words import Hashes, Words

__all__ = [
    "EXACT",
    "HELD_OUT",
    "KEYS",
    "NEAR",
    "TRAIN",
    "decide",
    "fate",
    "fingerprint",
    "signature",
    "write_signatures",
]

TRAIN, HELD_OUT, EXACT, NEAR = range(4)
"""What becomes of a document."""

KEYS = np.dtype([("fingerprint", "<u8"), ("fate", "<u8")])
"""What is kept of each document to compare it by."""

_BLOCK = 4096  # shingles permuted at once, so that a book needs no more memory than a page


def _digest(data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def fingerprint(words: Words) -> int:
    """Equal where two texts have the same words, whatever their case, spaces and punctuation."""
    return _digest(words.normalised.tobytes() if len(words) else words.text.encode())


def fate(identity: str) -> int:
    """A number that decides whether a document is held out; it depends on its id alone."""
    return _digest(identity.encode(errors="replace"))


@cache
def _permutations(count: int) -> tuple[Hashes, Hashes]:
    drawn = np.random.Generator(np.random.Philox(1)).integers(0, 1 << 63, size=(2, count), dtype=np.uint64)
    return drawn[0] * np.uint64(2) + np.uint64(1), drawn[1]


def signature(words: Words, ngram: int, count: int) -> Hashes | None:
    """`count` minima over permutations of the hashes of every `ngram` words; None where there are fewer."""
    shingles = np.unique(words.shingles(ngram))
    if not shingles.size:
        return None
    factors, offsets = _permutations(count)
    lowest = np.full(count, np.iinfo(np.uint64).max, np.uint64)
    for at in range(0, len(shingles), _BLOCK):
        permuted = shingles[at : at + _BLOCK, None] * factors
        permuted += offsets
        np.minimum(lowest, permuted.min(axis=0), out=lowest)
    return lowest >> np.uint64(4)  # datatrove reads hashes up to 2^61


def write_signatures(folder: Path, shard: int, buckets: int, numbers: list[int], signatures: list[Hashes]) -> None:
    """Signatures of a shard's documents, as `MinhashDedupSignature` leaves them: a sorted file for each bucket."""
    rows = len(signatures[0]) // buckets if signatures else 0
    dtype = np.dtype([(f"hash{i}", "<u8") for i in range(rows)] + [("document", "<u4")])
    for bucket in range(buckets):
        path = folder / f"bucket_{bucket:03d}" / f"{shard:05d}.minhash.sig"
        path.parent.mkdir(parents=True, exist_ok=True)
        records = np.zeros(len(numbers), dtype)
        if signatures:
            records["document"] = numbers
            for i in range(rows):
                records[f"hash{i}"] = [signature[bucket * rows + i] for signature in signatures]
            records.sort(order=dtype.names)
        path.write_bytes(records.tobytes())


def decide(
    keys: list[npt.NDArray[np.void]], pairs: npt.NDArray[np.uint32], sources: list[str], held_out: dict[str, float]
) -> list[npt.NDArray[np.uint8]]:
    """What becomes of each document of each shard.

    `keys` are the shards' documents, `pairs` rows of (shard, document, shard, document), `sources` the shards' sources.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    starts = np.cumsum([0, *map(len, keys)])
    every = np.concatenate(keys) if keys else np.zeros(0, KEYS)
    count = len(every)
    _, first, same = np.unique(every["fingerprint"], return_index=True, return_inverse=True)
    original = first[same]  # the first document with these words
    decided = np.full(count, TRAIN, np.uint8)
    left = np.concatenate([starts[pairs[:, 0]] + pairs[:, 1], np.arange(count)])
    right = np.concatenate([starts[pairs[:, 2]] + pairs[:, 3], original])
    graph = coo_array((np.ones(len(left), np.bool_), (left, right)), shape=(count, count))
    _, cluster = connected_components(graph, directed=False)
    _, head = np.unique(cluster, return_index=True)
    decided[np.arange(count) != head[cluster]] = NEAR
    decided[np.arange(count) != original] = EXACT
    shard_source = np.repeat(np.arange(len(keys)), [*map(len, keys)])
    for name, share in held_out.items():
        mine = np.isin(shard_source, [i for i, source in enumerate(sources) if source == name])
        stays = np.flatnonzero(mine & (decided == TRAIN))
        wanted = min(len(stays) - 1, max(1, round(share * len(stays)))) if share and len(stays) > 1 else 0
        ranked = np.lexsort((stays, every["fate"][stays]))
        decided[stays[ranked[:wanted]]] = HELD_OUT
    return np.split(decided, starts[1:-1])
