"""How often one passage may recur across the corpus: what a model reads often it learns to recite.

A passage is a line of prose, or a block of code between blank lines, of enough words. Its first occurrences stay, in the
order of sources and documents; further ones are cut out of their documents.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gemmary.data.words import Hashes, Words

__all__ = ["CUTS", "PASSAGES", "passages", "surplus", "without_passages"]

PASSAGES = np.dtype([("hash", "<u8"), ("document", "<u4"), ("passage", "<u4")])
"""A passage: its hash, the number of its document in the shard, its own number in the document."""
CUTS = np.dtype([("shard", "<u4"), ("document", "<u4"), ("passage", "<u4")])
"""A passage to be cut."""


def passages(words: Words, code: bool, least: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Hashes]:
    """Where in the text each passage starts and ends, and its hash."""
    breaks = np.flatnonzero(words.codes == 10)
    if code:  # blocks: only newlines that another follows
        breaks = breaks[:-1][np.diff(breaks) == 1] if len(breaks) > 1 else breaks[:0]
    starts = np.concatenate([[0], breaks + 1])
    ends = np.concatenate([breaks, [len(words.codes)]])
    first, last = np.searchsorted(words.starts, starts), np.searchsorted(words.starts, ends)
    long = last - first >= least
    return starts[long], ends[long], words.sequences(first[long], last[long])


def surplus(found: list[npt.NDArray[np.void]], most: int) -> npt.NDArray[np.void]:
    """Of the shards' passages (all of some hashes) those beyond the first `most` of each hash."""
    shard = np.repeat(np.arange(len(found), dtype=np.uint32), [*map(len, found)])
    every = np.concatenate(found) if found else np.zeros(0, PASSAGES)
    order = np.lexsort((every["passage"], every["document"], shard, every["hash"]))
    every, shard = every[order], shard[order]
    new = np.ones(len(every), np.bool_)
    new[1:] = every["hash"][1:] != every["hash"][:-1]
    begun = np.maximum.accumulate(np.where(new, np.arange(len(every)), 0))
    over = np.arange(len(every)) - begun >= most
    cuts = np.zeros(int(over.sum()), CUTS)
    cuts["shard"], cuts["document"], cuts["passage"] = shard[over], every["document"][over], every["passage"][over]
    return cuts


def without_passages(words: Words, code: bool, least: int, numbers: set[int]) -> str:
    """The text without these passages."""
    starts, ends, _ = passages(words, code, least)
    kept, behind = [], 0
    for number in sorted(numbers):
        kept.append(words.text[behind : starts[number]])
        behind = int(ends[number]) + 1  # its newline too
    return "".join([*kept, words.text[behind:]])
