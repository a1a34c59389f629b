"""datatrove's own filters as the rules of prose are compared with: by `curation.py`, and by tests/test_filters.py."""

from __future__ import annotations

from typing import Any

from datatrove.pipeline.filters import FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter
from datatrove.utils.text import TERMINAL_PUNCTUATION
from datatrove.utils.word_tokenizers import WordTokenizer

from gemmary.data.words import PATTERN


class OurWords(WordTokenizer):
    """Our words, for the stock filters."""

    def word_tokenize(self, text: str) -> list[str]:
        return PATTERN.findall(text)

    def sent_tokenize(self, text: str) -> list[str]:
        return [text]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [(0, len(text))]


def stock_filters(language: Any) -> list[Any]:
    """The filters, with the thresholds that are ours by default. `language` is a name, or something that splits words."""
    return [
        GopherQualityFilter(max_doc_words=None, language=language),
        GopherRepetitionFilter(language=language),
        FineWebQualityFilter(
            stop_chars=tuple({*TERMINAL_PUNCTUATION, *"\"'”’»)]"}), char_duplicates_ratio=0.1, language=language
        ),
    ]
