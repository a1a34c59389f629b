"""Rules of prose decide as datatrove's own filters on the same words; each rule of either kind can fire."""

from __future__ import annotations

import random

import pytest
from datatrove.data import Document
from datatrove.pipeline.filters import FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter
from datatrove.utils.text import TERMINAL_PUNCTUATION
from datatrove.utils.word_tokenizers import WordTokenizer

from gemmary.data.filters import CodeRules, ProseRules, code_fault, prose_fault, without_boilerplate
from gemmary.data.words import PATTERN, Words

SAME = ProseRules(min_letters=0)
NAMES = {  # ours: datatrove's
    "too_few_words": "gopher_short_doc", "short_words": "gopher_below_avg_threshold", "long_words": "gopher_above_avg_threshold",
    "hashes": "gopher_too_many_hashes", "ellipses": "gopher_too_many_ellipsis", "bullet_lines": "gopher_too_many_bullets",
    "ellipsis_lines": "gopher_too_many_end_ellipsis", "words_without_letters": "gopher_below_alpha_threshold",
    "few_stop_words": "gopher_enough_stop_words", "repeated_paragraphs": "dup_para_frac",
    "repeated_paragraphs_characters": "dup_para_char_frac", "repeated_lines": "dup_line_frac",
    "repeated_lines_characters": "dup_line_char_frac", "unpunctuated_lines": "line_punct_ratio", "short_lines": "short_line_ratio",
    "duplicate_lines": "char_dup_ratio", "list": "list_ratio",
    **{f"top_{n}_gram": f"top_{n}_gram" for n in (2, 3, 4)},
    **{f"repeated_{n}_grams": f"duplicated_{n}_n_grams" for n in range(5, 11)},
}  # fmt: skip


class Splitter(WordTokenizer):
    """Our words for datatrove's filters."""

    def word_tokenize(self, text: str) -> list[str]:
        return PATTERN.findall(text)

    def sent_tokenize(self, text: str) -> list[str]:
        return [text]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [(0, len(text))]


@pytest.fixture(scope="module")
def stock() -> list[object]:
    splitter, closing = Splitter(), set("\"'”’»)]")
    return [
        GopherQualityFilter(max_doc_words=None, language=splitter),
        GopherRepetitionFilter(language=splitter),
        FineWebQualityFilter(
            language=splitter, stop_chars=tuple(TERMINAL_PUNCTUATION | closing), char_duplicates_ratio=0.1
        ),
    ]


def _stock_fault(stock: list[object], text: str) -> str | None:
    for rule in stock:
        result = rule.filter(Document(text=text, id="x"))  # type: ignore[attr-defined]
        if result is not True:
            return str(result[1])
    return None


def _documents() -> list[str]:
    """Texts around every threshold: real sentences, mixed with repetition, numbers, symbols, lists."""
    words = [
        "the",
        "be",
        "to",
        "of",
        "and",
        "that",
        "have",
        "with",
        "river",
        "stone",
        "walked",
        "under",
        "quietly",
        "seventeen",
        "bridges",
        "morning",
        "light",
        "12",
        "3.5",
    ]
    made = []
    for seed in range(400):
        r = random.Random(seed)
        lines = []
        for _ in range(r.randint(1, 30)):
            kind, said = r.random(), " ".join(r.choice(words) for _ in range(r.randint(1, 14)))
            if kind < 0.15 and lines:
                said = r.choice(lines)
            elif kind < 0.2:
                said = f"- {said}..." if seed % 2 else f"# # {said} …"
            elif kind < 0.25:
                said = " ".join(str(r.randrange(10**6)) for _ in range(8))
            elif kind < 0.3:
                said = "a b c d e f g h i j"
            elif kind < 0.33:
                said = "incomprehensibilities" * 2 + " counterrevolutionaries" * 3
            lines.append(said + r.choice([".", ".", ".", "", "?\n", ' "', "\n\n"]))
        made.append("\n".join(lines))
    repeated = [". ".join(line for line in text.splitlines() if line) for text in made[::4]]
    return [*made, *repeated, "…\n" * 80 + made[0], "- x\n" * 99, *(text * 2 for text in made[::7])]


def test_prose_decides_as_datatrove_does(stock: list[object]) -> None:
    seen = set()
    for text in _documents():
        ours = prose_fault(Words(text), SAME)
        seen.add(ours)
        assert (NAMES[ours] if ours else None) == _stock_fault(stock, text), text
    assert {None, "too_few_words", "words_without_letters", "top_2_gram", "repeated_5_grams"} <= seen
    assert len(seen) > 12


GOOD = (
    "It was a cold morning, and the streets of the town were quiet. Nobody had yet opened the shutters, but the baker "
    "was awake and his chimney smoked. A boy ran past with letters for the mill; he would have to be quick, because the "
    "river rose and the bridge might not stand until noon. His mother had told him to stay at home with the others."
)


def test_good_prose_stays_and_symbols_go() -> None:
    assert prose_fault(Words(GOOD), ProseRules()) is None
    symbols = GOOD.replace(" ", " =+%$*/|~ ")
    assert prose_fault(Words(symbols), ProseRules()) == "few_letters"
    assert prose_fault(Words(" \n "), ProseRules()) == "empty"
    assert prose_fault(Words("!!! ??? " * 50), ProseRules()) is not None


def test_a_limit_of_words() -> None:
    assert prose_fault(Words(GOOD), ProseRules(max_words=60)) == "too_many_words"


CODE = "import os\n\n\ndef size(path):\n    total = 0\n    for name in os.listdir(path):\n        total += len(name)\n    return total\n"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (CODE, None),
        ("x = 1\n", "too_few_lines"),
        (CODE + "data = '" + "ab" * 600 + "'\n", "long_line"),
        (
            "\n".join("value = compute(" + ", ".join(f"name{i}" for i in range(20)) + ")" for _ in range(9)),
            "long_lines",
        ),
        ("# This file is automatically generated. Do not edit.\n" + CODE, "generated"),
        ("\n".join("0x1f, 17, 99, 4, 6," for _ in range(40)), "data"),
        ("\n".join("[[{{(;;;)}}]] = a" for _ in range(40)), "few_letters"),
        (CODE + "print(total_number)\n" * 60, "repeated_lines_characters"),
    ],
)
def test_code(text: str, fault: str | None) -> None:
    assert code_fault(Words(text), CodeRules()) == fault


def test_boilerplate_lines_go_and_paragraphs_about_them_stay() -> None:
    about = "A privacy policy is a statement that says how data are used. " * 8
    assert without_boilerplate(f"First.\nRead our Privacy Policy\n{about}\nLast.") == f"First.\n{about}\nLast."
    assert without_boilerplate(GOOD) is GOOD
