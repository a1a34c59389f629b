"""A passage stays its first times, in order, and is cut out of its documents after."""

from __future__ import annotations

import numpy as np

from gemmary.data.recitation import PASSAGES, passages, surplus, without_passages
from gemmary.data.words import Words

LINE = "one two three four five six seven eight nine ten"


def test_passages_of_prose_are_long_lines_whatever_their_case_and_punctuation() -> None:
    text = f"short line\n{LINE}\n\nOne, two, three -- four five; six seven (eight) nine TEN!\nother {LINE}"
    starts, ends, hashes = passages(Words(text), False, 10)
    assert [text[a:b] for a, b in zip(starts, ends, strict=True)] == [text.split("\n")[i] for i in (1, 3, 4)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_passages_of_code_are_blocks() -> None:
    block = "def f(one, two):\n    three = four\n    return five"
    text = f"import six\n\n\n{block}\n\n{block.replace('    ', '  ')}\n"
    starts, ends, hashes = passages(Words(text), True, 7)
    assert text[starts[0] : ends[0]].strip() == block
    assert len(hashes) == 2
    assert hashes[0] == hashes[1]


def test_the_first_stay_in_the_order_of_shards_and_documents() -> None:
    def rows(*found: tuple[int, int, int]) -> np.ndarray:
        return np.array(sorted(found), PASSAGES)

    cuts = surplus([rows((9, 0, 0), (9, 4, 1), (7, 1, 0)), rows((9, 0, 5), (8, 0, 0), (9, 0, 2))], 2)
    assert sorted(cuts.tolist()) == [(1, 0, 2), (1, 0, 5)]
    assert surplus([rows((9, 0, 0))], 1).size == 0
    assert surplus([], 1).size == 0


def test_cut() -> None:
    text = f"Begin.\n{LINE}\nMiddle.\n{LINE}"
    assert without_passages(Words(text), False, 10, {0}) == f"Begin.\nMiddle.\n{LINE}"
    assert without_passages(Words(text), False, 10, {0, 1}) == "Begin.\nMiddle.\n"
