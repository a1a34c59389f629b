"""Text as tokens come: joined it is the text, characters are whole, and stop strings are never seen."""

from __future__ import annotations

import random

import pytest

from gemmary.errors import GemmaryError
from gemmary.text import Tokenizer
from gemmary.text.answers import Answer

TEXT = "def wonderful(self): return 'ünï 漢字 😀😀' # and more text, wonder\n\n\n"


def pieces(tokenizer: Tokenizer, text: str, stops: list[str]) -> tuple[list[str], Answer]:
    answer, shown = Answer(tokenizer, stops), []
    ids = tokenizer.encode(text)
    for i, id in enumerate(ids):
        shown.append(answer.push(id, last=i == len(ids) - 1))
        if answer.stopped:
            break
    return shown, answer


@pytest.mark.parametrize("seed", range(50))
def test_a_stop_string_is_never_seen_not_even_in_part(tiny: Tokenizer, seed: int) -> None:
    rng = random.Random(seed)
    start = rng.randrange(len(TEXT) - 1)
    stop = TEXT[start : start + rng.randint(1, 12)]
    shown, answer = pieces(tiny, TEXT, ["never", stop])
    assert "".join(shown) == TEXT[: TEXT.index(stop)]
    assert answer.stopped
    assert answer.shown == TEXT.index(stop)


def test_characters_are_whole_and_all_comes(tiny: Tokenizer) -> None:
    for stops in ([], [TEXT + "!"], ["#?", "more texts", "\n" * 4]):
        shown, answer = pieces(tiny, TEXT, stops)
        assert "".join(shown) == TEXT
        assert not answer.stopped
        assert answer.shown == answer.decoded == len(TEXT)
        assert "\ufffd" not in "".join(shown)


def test_stop_ids_are_no_text_and_half_a_character_ends_as_a_replacement(tiny: Tokenizer) -> None:
    answer = Answer(tiny)
    first = tiny.encode("😀")[0]
    assert [answer.push(first), answer.push(tiny.eos, last=True)] == ["", "\ufffd"]
    with pytest.raises(GemmaryError, match="stop string is empty"):
        Answer(tiny, ["a", ""])
