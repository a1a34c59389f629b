"""Heuristic rules of quality: for prose those of Gopher, FineWeb and C4, for code its own.

A rule says why a document goes, or None. The rules of prose decide as datatrove's `GopherQualityFilter`,
`GopherRepetitionFilter` and `FineWebQualityFilter` do when given the same words, in that order, but count over `Words`
instead of splitting and joining strings in each.
Sources: Rae et al. 2021 (Gopher), appendix A1; Penedo et al. 2024 (FineWeb); Raffel et al. 2020 (C4).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import numpy as np

from gemmary.data.words import Flags, Hashes, Words, characters_where, repeated

__all__ = ["CodeRules", "ProseRules", "code_fault", "prose_fault", "without_boilerplate"]

_STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
_CLOSING = "\"'”’»)]"  # quotations and brackets end lines as sentences do; FineWeb's own set has none of these
_PARAGRAPHS = re.compile(r"\n{2,}")
_LINES = re.compile(r"\n+")


@dataclass(frozen=True, kw_only=True)
class ProseRules:
    """Thresholds for prose; defaults are the published ones but where the docstring says otherwise."""

    min_words: int = 50
    max_words: int = 0
    """0: no limit. Gopher has 100,000, which would remove books."""
    min_mean_word: float = 3.0
    max_mean_word: float = 10.0
    max_symbols_per_word: float = 0.1
    """Hashes, and ellipses, for each word."""
    max_bullet_lines: float = 0.9
    max_ellipsis_lines: float = 0.3
    min_words_with_letters: float = 0.8
    min_stop_words: int = 2
    max_repeated_lines: float = 0.3
    max_repeated_line_characters: float = 0.2
    top_ngrams: tuple[float, ...] = (0.2, 0.18, 0.16)
    """Largest share of characters in the most frequent 2-, 3- and 4-gram."""
    repeated_ngrams: tuple[float, ...] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)
    """Largest share of characters in repeated 5- to 10-grams."""
    min_punctuated_lines: float = 0.12
    max_short_lines: float = 0.67
    short_line: int = 30
    max_duplicate_line_characters: float = 0.1
    """FineWeb has 0.01, for web pages alone: plays and reference works repeat names and headings."""
    max_newlines_per_word: float = 0.3
    min_letters: float = 0.6
    """Share of letters among visible characters; ours."""


@dataclass(frozen=True, kw_only=True)
class CodeRules:
    """Thresholds for code."""

    min_lines: int = 5
    max_line: int = 1000
    """Characters of the longest line: more is minified or data."""
    max_mean_line: float = 100.0
    min_alphanumeric: float = 0.25
    """Share of letters and digits among all characters."""
    min_words_with_letters: float = 0.25
    """Share of words that begin with a letter: less is a table of numbers."""
    max_repeated_line_characters: float = 0.6
    """Share of characters in lines that were there before."""


def prose_fault(words: Words, rules: ProseRules) -> str | None:
    """Why this is no good prose, or None."""
    if not words.text.strip():
        return "empty"
    return (
        _quality(words, rules)
        or _repetition(words, rules)
        or _lines_of_text(words, rules)
        or _few_letters(words, rules)
    )


def _few_letters(words: Words, rules: ProseRules) -> str | None:
    visible = len("".join(words.text.split()))
    letters = _tables()[1][words.characters].sum()
    return "few_letters" if letters / visible < rules.min_letters else None


def _duplicates(parts: list[str]) -> tuple[float, int]:
    """Share of the parts that were there before, and how many characters these have."""
    seen: set[str] = set()
    count = characters = 0
    for part in parts:
        if part in seen:
            count += 1
            characters += len(part)
        seen.add(part)
    return count / len(parts), characters


def _repetition(words: Words, rules: ProseRules) -> str | None:
    text, size = words.text, len(words.text)
    for name, parts in (("paragraphs", _PARAGRAPHS.split(text.strip())), ("lines", _LINES.split(text))):
        share, characters = _duplicates(parts)
        if share > rules.max_repeated_lines:
            return f"repeated_{name}"
        if characters / size > rules.max_repeated_line_characters:
            return f"repeated_{name}_characters"
    for n, most in enumerate(rules.top_ngrams, 2):
        if len(words) >= n and _top(words, n) / size > most:
            return f"top_{n}_gram"
    for n, most in enumerate(rules.repeated_ngrams, 5):
        if len(words) >= n and _repeated_characters(*words.joined(n), n) / size > most:
            return f"repeated_{n}_grams"
    return None


def _top(words: Words, n: int) -> int:
    """Characters of the most frequent n-gram, the first among equals, all times that it occurs."""
    hashes = words.ngrams(n)
    places = repeated(hashes)
    if places.size:
        _, first, counts = np.unique(hashes[places], return_index=True, return_counts=True)
        often = counts == counts.max()
        at, times = int(places[first[often].min()]), int(counts.max())
    else:
        at, times = 0, 1
    return times * (int(words.lengths[at : at + n].sum()) + n - 1)


def _repeated_characters(hashes: Hashes, sizes: np.ndarray, n: int) -> int:
    """Characters of n-grams that were there before, none counted twice: after one, the next may begin behind it."""
    seen: set[int] = set()
    characters = free = 0
    places = repeated(hashes)
    for place, ngram, size in zip(places.tolist(), hashes[places].tolist(), sizes[places].tolist(), strict=True):
        if place < free:
            continue
        if ngram in seen:
            characters += size
            free = place + n
        else:
            seen.add(ngram)
    return characters


@cache
def _tables() -> tuple[Flags, Flags, frozenset[str]]:
    """Which characters are not punctuation, which are letters, and those that end a sentence; datatrove's sets."""
    from datatrove.utils.text import PUNCTUATION_SET, TERMINAL_PUNCTUATION

    return (
        characters_where(lambda c: c not in PUNCTUATION_SET),
        characters_where(str.isalpha),
        frozenset({*TERMINAL_PUNCTUATION, *_CLOSING}),
    )


@cache
def _stop_hashes() -> Hashes:
    return np.array([Words(word).hashes[0] for word in _STOP_WORDS], np.uint64)


def _with(flags: Flags, words: Words) -> Flags:
    """Of each word whether it has such a character."""
    sums = np.zeros(len(flags) + 1, np.int64)
    np.cumsum(flags, out=sums[1:])
    return sums[words.ends] > sums[words.starts]


def _quality(words: Words, rules: ProseRules) -> str | None:
    text, count = words.text, max(1, len(words))
    sayable, letters, _ = _tables()
    lengths = words.lengths[_with(sayable[words.characters], words)]
    if lengths.size < rules.min_words:
        return "too_few_words"
    if rules.max_words and lengths.size > rules.max_words:
        return "too_many_words"
    mean = float(lengths.mean()) if lengths.size else 0.0
    if mean < rules.min_mean_word:
        return "short_words"
    if mean > rules.max_mean_word:
        return "long_words"
    if text.count("#") / count > rules.max_symbols_per_word:
        return "hashes"
    if (text.count("...") + text.count("…")) / count > rules.max_symbols_per_word:
        return "ellipses"
    lines = text.splitlines()
    if sum(line.lstrip().startswith(("•", "-")) for line in lines) / len(lines) > rules.max_bullet_lines:
        return "bullet_lines"
    if sum(line.rstrip().endswith(("...", "…")) for line in lines) / len(lines) > rules.max_ellipsis_lines:
        return "ellipsis_lines"
    if _with(letters[words.characters], words).sum() / count < rules.min_words_with_letters:
        return "words_without_letters"
    if sum(bool((words.hashes == stop).any()) for stop in _stop_hashes()) < rules.min_stop_words:
        return "few_stop_words"
    return None


def _lines_of_text(words: Words, rules: ProseRules) -> str | None:
    lines = [line for line in words.text.split("\n") if line.strip()]
    ends = _tables()[2]
    if sum(line[-1] in ends for line in lines) / len(lines) < rules.min_punctuated_lines:
        return "unpunctuated_lines"
    if sum(len(line) <= rules.short_line for line in lines) / len(lines) > rules.max_short_lines:
        return "short_lines"
    newlines = words.text.count("\n")
    if _duplicates(lines)[1] / (len(words.text) - newlines) > rules.max_duplicate_line_characters:
        return "duplicate_lines"
    if newlines / max(1, len(words)) > rules.max_newlines_per_word:
        return "list"
    return None


_BOILERPLATE = (
    "terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies", "enable javascript",
    "lorem ipsum",
)  # fmt: skip
_LONG_BOILERPLATE = 400  # a line of a real paragraph that speaks of such things stays


def without_boilerplate(text: str) -> str:
    """The text without lines that are a site's own: C4's phrases, in lines short enough to be nothing else."""
    if not _speaks_of_itself(text):
        return text
    return "\n".join(line for line in text.split("\n") if len(line) > _LONG_BOILERPLATE or not _speaks_of_itself(line))


def _speaks_of_itself(text: str) -> bool:
    lower = text.lower()
    return any(phrase in lower for phrase in _BOILERPLATE)


_GENERATED = re.compile(
    r"(?:auto|automatically)[ -]?generated|do not edit|generated (?:by|from|with) \S+ .*(?:do not|don't) (?:edit|modify)",
    re.IGNORECASE,
)
_HEAD = 600  # characters in which a generated file says so


def code_fault(words: Words, rules: CodeRules) -> str | None:
    """Why this is no good code, or None."""
    lines = [line for line in words.text.split("\n") if line.strip()]
    if len(lines) < rules.min_lines:
        return "too_few_lines"
    sizes = [len(line) for line in lines]
    if max(sizes) > rules.max_line:
        return "long_line"
    if sum(sizes) / len(lines) > rules.max_mean_line:
        return "long_lines"
    if _GENERATED.search(words.text[:_HEAD]):
        return "generated"
    _, letters, _ = _tables()
    if words.lengths.sum() / len(words.text) < rules.min_alphanumeric:
        return "few_letters"
    if letters[words.characters[words.starts]].mean() < rules.min_words_with_letters:
        return "data"
    if _duplicates(lines)[1] / len(words.text) > rules.max_repeated_line_characters:
        return "repeated_lines_characters"
    return None
