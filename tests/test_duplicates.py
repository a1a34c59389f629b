"""Signatures agree as texts do, datatrove's own step reads them, and of a cluster the first document stays."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets

from gemmary.data.duplicates import (
    EXACT,
    HELD_OUT,
    KEYS,
    NEAR,
    TRAIN,
    decide,
    fate,
    fingerprint,
    signature,
    write_signatures,
)  # fmt: skip
from gemmary.data.words import Words

NONE = np.zeros((0, 4), np.uint32)


def _text(seed: int, words: int = 400) -> list[str]:
    r = random.Random(seed)
    return ["".join(r.choice("abcdefgh") for _ in range(r.randint(2, 7))) for _ in range(words)]


def test_signatures_estimate_jaccard() -> None:
    """The share of equal minima is the Jaccard similarity of shingles, within its standard error."""
    one, other = _text(1), _text(1)
    other[100:140] = _text(2, 40)
    a, b = (Words(" ".join(text)) for text in (one, other))
    sets = [set(words.shingles(5).tolist()) for words in (a, b)]
    jaccard = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
    x, y = (signature(words, 5, 2000) for words in (a, b))
    assert x is not None
    assert y is not None
    assert float((x == y).mean()) == pytest.approx(jaccard, abs=4 * (jaccard * (1 - jaccard) / 2000) ** 0.5)
    assert signature(Words("one two three"), 5, 10) is None


def test_a_long_text_is_taken_in_blocks() -> None:
    words = Words(" ".join(_text(3, 10_000)))
    whole = signature(words, 5, 8)
    assert whole is not None
    halves = [signature(Words(" ".join(_text(3, 10_000)[part])), 5, 8) for part in (slice(0, 6000), slice(5996, None))]
    assert halves[0] is not None
    assert halves[1] is not None
    assert whole.tolist() == np.minimum(halves[0], halves[1]).tolist()


def test_datatrove_reads_them(tmp_path: Path) -> None:
    texts = [_text(seed) for seed in range(6)]
    texts[4] = [*texts[1][:397], "x", "y", "z"]
    numbers = [[0, 1, 3], [0, 1, 2]]  # document 2 of shard 0 had too few words
    for shard, at in enumerate((0, 3)):
        signatures = [signature(Words(" ".join(text)), 5, 112) for text in texts[at : at + 3]]
        write_signatures(tmp_path / "signatures", shard, 14, numbers[shard], [s for s in signatures if s is not None])
    step = MinhashDedupBuckets(str(tmp_path / "signatures"), str(tmp_path / "pairs"), config=MinhashConfig())
    for bucket in range(14):
        step.run(None, bucket, 14)
    pairs = np.concatenate([np.fromfile(p, "<u4").reshape(-1, 4) for p in (tmp_path / "pairs").iterdir()])
    assert {tuple(row) for row in pairs.tolist()} == {(0, 1, 1, 1)}


def _keys(*prints: int) -> np.ndarray:
    return np.array([(p, fate(f"{p}/{i}")) for i, p in enumerate(prints)], KEYS)


def test_the_first_of_a_cluster_stays() -> None:
    keys = [_keys(1, 2, 3), _keys(2, 4, 5)]
    pairs = np.array([[1, 1, 0, 2], [1, 0, 1, 2]], np.uint32)  # 4 like 3; the second 2 like 5
    decided = decide(keys, pairs, ["a", "a"], {"a": 0.0})
    assert [part.tolist() for part in decided] == [[TRAIN, TRAIN, TRAIN], [EXACT, NEAR, NEAR]]


def test_fingerprints_see_words_alone() -> None:
    assert fingerprint(Words("Hello, World")) == fingerprint(Words("hello   world!"))
    assert fingerprint(Words("hello world")) != fingerprint(Words("world hello"))
    assert fingerprint(Words("!!")) != fingerprint(Words("??"))


def test_held_out_is_an_exact_share_by_id() -> None:
    keys = [np.array([(i, fate(f"id{i}")) for i in range(at, at + 50)], KEYS) for at in (0, 50)]
    decided = np.concatenate(decide(keys, NONE, ["a", "a"], {"a": 0.1}))
    assert int((decided == HELD_OUT).sum()) == 10
    turned = np.concatenate(decide(keys[::-1], NONE, ["a", "a"], {"a": 0.1}))
    assert np.flatnonzero(decided == HELD_OUT).tolist() == sorted((np.flatnonzero(turned == HELD_OUT) + 50) % 100)
    few = decide([_keys(1, 2), _keys(3)], NONE, ["a", "b"], {"a": 0.01, "b": 0.9})
    assert sorted(few[0].tolist()) == [TRAIN, HELD_OUT]
    assert few[1].tolist() == [TRAIN]  # a source's only document trains


def test_nothing_at_all() -> None:
    assert [part.tolist() for part in decide([_keys(), _keys()], NONE, ["a", "b"], {"a": 0.5, "b": 0.5})] == [[], []]
