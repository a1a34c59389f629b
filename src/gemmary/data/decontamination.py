"""Evaluation sets kept out of the corpus: text that shares n consecutive words with one of their items.

What is compared are lower-case words without punctuation, 13 of them. A text of an item that is shorter, but has at least
8 words, is looked for whole; where an item has no such text, all its texts in a row are. Shorter items cannot be told from
ordinary language and are counted as too short.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemmary.data import readers
from gemmary.data.sources import Source, files
from gemmary.data.words import Hashes, Words
from gemmary.errors import GemmaryError

__all__ = ["EvaluationIndex", "EvaluationSet", "without"]

_LEAST = 8
_AROUND = 200  # characters on each side that go too: what surrounds a question is its answer
_BITS = 22


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """One evaluation set: files of JSON lines (also .gz, .zst) or Parquet."""

    name: str
    path: str
    """A file, a directory, or a pattern with `*`."""
    keys: tuple[str, ...] = ()
    """Where an item's texts are; a list or object there is walked. None given: every string of the item."""


class EvaluationIndex:
    """Hashes of the sequences of words to look for, and the items they are from."""

    def __init__(self, sets: tuple[EvaluationSet, ...], words: int) -> None:
        self.words = words
        self.names: list[str] = []
        """Of each item its set."""
        self.too_short: dict[str, int] = {}
        grams: dict[int, list[tuple[Hashes, int]]] = defaultdict(list)
        for wanted in sets:
            self.too_short[wanted.name] = 0
            before = len(self.names)
            for texts in _items(wanted):
                item, found = len(self.names), False
                for split in (Words(text) for text in texts):
                    found |= _add(grams, split, words, item)
                found = found or _add(grams, Words(" ".join(texts)), words, item)
                self.names.append(wanted.name)
                self.too_short[wanted.name] += not found
            if len(self.names) == before:
                raise GemmaryError(f"evaluation set {wanted.name}: {wanted.path} has no item with text")
        self._tables = {n: _table(found) for n, found in sorted(grams.items())}

    def save(self, path: Path) -> None:
        """Write it as arrays."""
        arrays: dict[str, Any] = {
            f"{kind}{n}": table[i] for n, table in self._tables.items() for i, kind in ((1, "hashes"), (2, "items"))
        }
        np.savez(
            path,
            words=np.array(self.words),
            names=np.array(self.names),
            short=np.array([*self.too_short.items()]),
            **arrays,
        )

    @classmethod
    def load(cls, path: Path) -> EvaluationIndex:
        """Read what `save` wrote."""
        index = cls((), 0)
        with np.load(path) as arrays:
            index.words, index.names = int(arrays["words"]), arrays["names"].tolist()
            index.too_short = {name: int(count) for name, count in arrays["short"].tolist()}
            lengths = sorted(int(name.removeprefix("hashes")) for name in arrays if name.startswith("hashes"))
            index._tables = {n: (_bits(h := arrays[f"hashes{n}"]), h, arrays[f"items{n}"]) for n in lengths}
        return index

    def find(self, words: Words) -> tuple[list[tuple[int, int]], set[int]]:
        """(first, behind last) word of each match, and the items that matched."""
        spans: list[tuple[int, int]] = []
        items: set[int] = set()
        for n, (bits, hashes, owners) in self._tables.items():
            if len(words) < n:
                continue
            shingles = words.shingles(n)
            for place in np.flatnonzero(bits[shingles >> np.uint64(64 - _BITS)]).tolist():
                low, high = (int(np.searchsorted(hashes, shingles[place], side)) for side in ("left", "right"))
                if low < high:
                    spans.append((place, place + n))
                    items.update(owners[low:high].tolist())
        return sorted(spans), items


def _add(grams: dict[int, list[tuple[Hashes, int]]], split: Words, most: int, item: int) -> bool:
    if len(split) < _LEAST:
        return False
    n = min(len(split), most)
    grams[n].append((split.shingles(n), item))
    return True


def _table(found: list[tuple[Hashes, int]]) -> tuple[np.ndarray, Hashes, np.ndarray]:
    """A coarse bitmap that answers most questions, all hashes in order, and the item of each."""
    hashes = np.concatenate([h for h, _ in found])
    items = np.concatenate([np.full(len(h), item, np.int64) for h, item in found])
    order = np.lexsort((items, hashes))
    return _bits(hashes), hashes[order], items[order]


def _bits(hashes: Hashes) -> np.ndarray:
    bits = np.zeros(1 << _BITS, np.bool_)
    bits[hashes >> np.uint64(64 - _BITS)] = True
    return bits


def without(words: Words, spans: list[tuple[int, int]], most: float) -> str | None:
    """The text without the matches and 200 characters around each; None where that is more than this share of it."""
    text, kept, behind, lost = words.text, list[str](), 0, 0
    cuts: list[list[int]] = []
    for first, last in spans:
        start = max(0, int(words.starts[first]) - _AROUND)
        end = min(len(text), int(words.ends[last - 1]) + _AROUND)
        start = text.rfind(" ", 0, start) + 1
        end = at if (at := text.find(" ", end)) >= 0 else len(text)
        if cuts and start <= cuts[-1][1]:
            cuts[-1][1] = max(end, cuts[-1][1])
        else:
            cuts.append([start, end])
    for start, end in cuts:
        kept.append(text[behind:start].strip())
        lost += end - start
        behind = end
    kept.append(text[behind:].strip())
    return None if lost > most * len(text) else "\n\n".join(part for part in kept if part) + "\n"


def _items(wanted: EvaluationSet) -> Iterator[list[str]]:
    """The texts of each item."""
    suffixes = Path(wanted.path).suffixes
    kind = "parquet" if ".parquet" in suffixes or any(Path(wanted.path).glob("**/*.parquet")) else "jsonl"
    source = Source(name="evaluation", kind=kind, path=wanted.path)  # type: ignore[arg-type]
    for path in files(source):
        for piece in readers.file_pieces(kind, path, 1 << 62):
            records = readers.read_jsonl(piece) if kind == "jsonl" else readers.read_parquet(piece, None)
            for where, record in records:
                if isinstance(record, readers.Broken):
                    raise GemmaryError(f"evaluation set {wanted.name}: {record.where}: {record.why}")
                if not isinstance(record, dict):
                    raise GemmaryError(f"evaluation set {wanted.name}: {where} is not an object")
                if absent := [key for key in wanted.keys if key not in record]:
                    raise GemmaryError(
                        f"evaluation set {wanted.name}: {where} has no {absent[0]!r}; it has {', '.join(record)}"
                    )
                if texts := list(_strings([record[key] for key in wanted.keys] if wanted.keys else record)):
                    yield texts


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if value.strip():
            yield value.encode(errors="replace").decode()
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)
