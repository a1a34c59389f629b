"""Words as arrays are the words of the regular expression, and their hashes are equal exactly where words are."""

from __future__ import annotations

import random

import numpy as np
import pytest

from gemmary.data.words import PATTERN, Words, characters_where, repeated

ALPHABET = "ab Z'’\n\t.,-_19é中ßİ\u0301😀𠀀\u2028\x1f\x00"


@pytest.fixture(params=range(40))
def text(request: pytest.FixtureRequest) -> str:
    r = random.Random(request.param)
    return "".join(r.choice(ALPHABET) for _ in range(r.randrange(200)))


def test_words_are_those_of_the_pattern(text: str) -> None:
    words = Words(text)
    assert [text[a:b] for a, b in zip(words.starts, words.ends, strict=True)] == PATTERN.findall(text)
    assert len(words) == len(PATTERN.findall(text))


def _same_classes(hashes: list[int], values: list[object]) -> bool:
    return len(set(hashes)) == len(set(values)) == len(set(zip(hashes, values, strict=True)))


def test_hashes_are_equal_exactly_where_words_are(text: str) -> None:
    words, strings = Words(text), PATTERN.findall(text)
    assert _same_classes(words.hashes.tolist(), strings)
    for n in (1, 2, 3):
        count = max(0, len(strings) - n + 1)
        grams = [tuple(strings[i : i + n]) for i in range(count)]
        assert _same_classes(words.ngrams(n).tolist(), grams)
        if count:
            hashes, sizes = words.joined(n)
            joined = ["".join(gram) for gram in grams]
            assert _same_classes(hashes.tolist(), joined)
            assert sizes.tolist() == [len(gram) for gram in joined]


def test_case_and_punctuation_do_not_matter_to_shingles() -> None:
    one, other = Words("The QUICK brown-fox, jumps!"), Words("the quick\n  Brown fox (jumps)")
    assert one.shingles(3).tolist() == other.shingles(3).tolist()
    assert one.ngrams(3).tolist() != other.ngrams(3).tolist()
    assert one.shingles(3).tolist() != Words("the quick brown fox leaps").shingles(3).tolist()


def test_hashes_are_the_same_in_every_process() -> None:
    """They are written to disk by one process and read by others: these numbers may only change with the file format."""
    assert Words("Hello, world").normalised.tolist() == Words("x hello WORLD").normalised.tolist()[1:]
    assert [int(h) for h in Words("hello world").shingles(2)] == GOLDEN


GOLDEN = [11296527182041091437]


def test_repeated() -> None:
    hashes = np.array([5, 7, 5, 9, 7, 7, 1], np.uint64)
    assert repeated(hashes).tolist() == [0, 1, 2, 4, 5]
    assert repeated(hashes[-2:]).tolist() == []
    assert repeated(hashes[:0]).tolist() == []


def test_characters_where() -> None:
    table = characters_where(str.isdigit)
    assert table[Words("a1٣😀9").characters].tolist() == [False, True, True, False, True]


def test_empty_text() -> None:
    words = Words("")
    assert (len(words), words.shingles(5).size, words.ngrams(2).size) == (0, 0, 0)
