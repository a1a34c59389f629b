"""The steps of curation, each a callable that datatrove's executors run once for each task, in any process or machine.

    filter     a shard's documents through the rules; what is kept, with what it is compared by     work/filter
    (buckets)  datatrove's MinhashDedupBuckets: pairs of near duplicates                            work/pairs
    decide     duplicates, and who is held out                                                      work/decisions
    recur      passages that recur too often                                                        work/cuts
    write      what is left, by split                                                               work/documents

A step writes each file aside and renames it, so that one that was killed can simply run again.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gemmary.checkpoints.checkpoint import write_whole
from gemmary.data import duplicates, recitation
from gemmary.data.classifiers import Classifier
from gemmary.data.curation_report import Tally
from gemmary.data.curation_settings import CurateSettings
from gemmary.data.decontamination import EvaluationIndex, without
from gemmary.data.filters import code_fault, prose_fault, without_boilerplate
from gemmary.data.language import language
from gemmary.data.privacy import masked
from gemmary.data.readers import Broken, Document
from gemmary.data.sources import Shard, read
from gemmary.data.words import Hashes, Words

__all__ = ["PARTITIONS", "Decide", "Filter", "Recur", "Write", "read_lines"]

PARTITIONS = 16
"""Tasks that passages are counted in, by the first bits of their hashes."""

_REMOVED = {duplicates.EXACT: "exact_duplicate", duplicates.NEAR: "near_duplicate"}
_SPLITS = {duplicates.TRAIN: "train", duplicates.HELD_OUT: "held_out"}
_LEAST_LEFT = 0.5  # of a document that passages were cut out of


def _save(path: Path, array: npt.NDArray[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.npy")
    np.save(aside, array, allow_pickle=False)
    aside.replace(path)


class _Lines:
    """A gzip of JSON lines, written aside; the same lines give the same bytes."""

    def __init__(self, path: Path, level: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._aside = path, path.with_name(f".{path.name}.{os.getpid()}")
        self._raw = self._aside.open("wb")
        self._file = gzip.GzipFile("", "wb", level, self._raw, 0)

    def write(self, identity: str, text: str, metadata: dict[str, Any]) -> None:
        line = json.dumps({"id": identity, "text": text, "metadata": metadata}, ensure_ascii=False)
        self._file.write(line.encode(errors="replace") + b"\n")

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        with self._raw:
            self._file.close()
        if kind is None:
            self._aside.replace(self._path)
        else:
            self._aside.unlink()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The documents of a file of these."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


@cache
def _index(work: str) -> EvaluationIndex | None:
    path = Path(work) / "evaluation.npz"
    return EvaluationIndex.load(path) if path.exists() else None


@cache
def _classifiers(work: str, names: tuple[str, ...]) -> list[Classifier]:
    return [Classifier.load(Path(work) / "classifiers" / name) for name in names]


@dataclass(frozen=True)
class _Step:
    settings: CurateSettings
    shards: tuple[Shard, ...]
    work: str
    cache: str

    @property
    def folder(self) -> Path:
        return Path(self.work)


class Filter(_Step):
    """A shard's documents through the rules."""

    def __call__(self, data: None = None, rank: int = 0, world_size: int = 1) -> None:
        """Run one task."""
        with _Lines(self.folder / "filter" / f"{rank:05d}.jsonl.gz", 1) as lines:
            self._run(rank, lines)

    def _run(self, rank: int, lines: _Lines) -> None:
        settings, shard, tally = self.settings, self.shards[rank], Tally()
        keys: list[tuple[int, int]] = []
        passages, numbers = [], list[int]()
        signatures: list[Hashes] = []
        items: set[int] = set()
        rules = shard.source.rules
        for found in read(shard, Path(self.cache)):
            if isinstance(found, Broken):
                tally.broken(found.where, found.why)
                continue
            tally.size("read", found.text)
            words = self._through(found, rules, tally, items)
            if words is None:
                continue
            number = len(keys)
            lines.write(found.id, words.text, found.metadata)
            keys.append((duplicates.fingerprint(words), duplicates.fate(found.id)))
            if settings.near_duplicates and rules != "none":
                count = settings.minhash_buckets * settings.minhash_hashes
                if (signature := duplicates.signature(words, settings.minhash_words, count)) is not None:
                    numbers.append(number)
                    signatures.append(signature)
            if settings.max_recurrence and rules != "none":
                passages.append(_passages(words, number, rules == "code", settings))
        _save(self.folder / "keys" / f"{rank:05d}.npy", np.array(keys, duplicates.KEYS))
        every = np.concatenate(passages) if passages else np.zeros(0, recitation.PASSAGES)
        _save(self.folder / "passages" / f"{rank:05d}.npy", every[np.argsort(every["hash"], kind="stable")])
        if settings.near_duplicates:
            duplicates.write_signatures(self.folder / "signatures", rank, settings.minhash_buckets, numbers, signatures)
        tally.counts["items"] = sorted(items)
        write_whole(self.folder / "tallies" / f"filter-{rank:05d}.json", json.dumps(tally.counts).encode())

    def _through(self, found: Document, rules: str, tally: Tally, items: set[int]) -> Words | None:
        """The document's words as it stays, or None where it goes."""
        text = found.text.replace("\r\n", "\n").replace("\r", "\n") if rules != "none" else found.text
        if len(text) > self.settings.max_characters:
            tally.removed("too_long", found.id, text)
            return None
        if rules == "prose":
            text = "\n".join(line.rstrip() for line in text.split("\n"))
            if (cut := without_boilerplate(text)) != text:
                tally.changed("boilerplate", found.id, text, cut, _differ(text, cut))
                text = cut
        if rules != "none":
            text = self._masked(text, found.id, tally)
        words = Words(text)
        if fault := self._fault(words, rules):
            tally.removed(fault, found.id, text)
            return None
        return self._decontaminated(words, rules, found.id, tally, items)

    def _masked(self, text: str, identity: str, tally: Tally) -> str:
        after, counts = masked(text, self.settings.mask)
        for rule, count in counts.items():
            tally.changed(rule, identity, text, after, after.find(f"[{rule}]"), count)
        return after

    def _fault(self, words: Words, rules: str) -> str | None:
        settings = self.settings
        if rules == "code":
            return code_fault(words, settings.code)
        if rules == "none":
            return None
        spoken = language(words) if settings.languages else None
        if spoken and spoken not in settings.languages:
            return f"language_{spoken}"
        if fault := prose_fault(words, settings.prose):
            return fault
        if settings.languages and not spoken:
            return "language_unknown"
        classifiers = _classifiers(self.work, tuple(wanted.name for wanted in settings.classifier))
        for wanted, classifier in zip(settings.classifier, classifiers, strict=True):
            if classifier.score(words) < wanted.threshold:
                return f"classifier_{wanted.name}"
        return None

    def _decontaminated(self, words: Words, rules: str, identity: str, tally: Tally, items: set[int]) -> Words | None:
        if (index := _index(self.work)) is None:
            return words
        spans, seen = index.find(words)
        if not spans:
            return words
        items |= seen
        left = without(words, spans, self.settings.max_contaminated) if rules == "prose" else None
        if left is None:
            tally.removed("evaluation", identity, words.text[int(words.starts[spans[0][0]]) :])
            return None
        tally.changed("evaluation", identity, words.text, left, _differ(words.text, left), len(spans))
        return Words(left)


def _differ(before: str, after: str) -> int:
    """Where the texts begin to differ."""
    return next((i for i, (x, y) in enumerate(zip(before, after, strict=False)) if x != y), len(after))


def _passages(words: Words, number: int, code: bool, settings: CurateSettings) -> npt.NDArray[np.void]:
    _, _, hashes = recitation.passages(words, code, settings.passage_words(code))
    found = np.zeros(len(hashes), recitation.PASSAGES)
    found["hash"], found["document"], found["passage"] = hashes, number, np.arange(len(hashes))
    return found


class Decide(_Step):
    """What becomes of each document that passed the rules."""

    def __call__(self, data: None = None, rank: int = 0, world_size: int = 1) -> None:
        """Run the one task."""
        keys = [np.load(self.folder / "keys" / f"{i:05d}.npy") for i in range(len(self.shards))]
        pairs = [np.fromfile(path, "<u4").reshape(-1, 4) for path in sorted((self.folder / "pairs").glob("*.dups"))]
        sources = [shard.source.name for shard in self.shards]
        held_out = {source.name: source.held_out for source in self.settings.source}
        every = np.concatenate(pairs) if pairs else np.zeros((0, 4), np.uint32)
        for i, decided in enumerate(duplicates.decide(keys, every, sources, held_out)):
            _save(self.folder / "decisions" / f"{i:05d}.npy", decided)


class Recur(_Step):
    """Passages of one range of hashes that recur too often."""

    def __call__(self, data: None = None, rank: int = 0, world_size: int = 1) -> None:
        """Run one task."""
        found = []
        width = (1 << 64) // PARTITIONS
        for i in range(len(self.shards)):
            every = np.load(self.folder / "passages" / f"{i:05d}.npy", mmap_mode="r")
            decided = np.load(self.folder / "decisions" / f"{i:05d}.npy")
            last = np.uint64((rank + 1) * width - 1)
            low, high = (
                np.searchsorted(every["hash"], np.uint64(rank * width)),
                np.searchsorted(every["hash"], last, "right"),
            )
            mine = np.array(every[low:high])
            found.append(mine[decided[mine["document"]] <= duplicates.HELD_OUT])
        _save(self.folder / "cuts" / f"{rank:05d}.npy", recitation.surplus(found, self.settings.max_recurrence))


class Write(_Step):
    """A shard's documents that stay, by split."""

    def __call__(self, data: None = None, rank: int = 0, world_size: int = 1) -> None:
        """Run one task."""
        tally = Tally()
        with ExitStack() as stack:
            self._run(rank, tally, stack)
        write_whole(self.folder / "tallies" / f"write-{rank:05d}.json", json.dumps(tally.counts).encode())

    def _run(self, rank: int, tally: Tally, stack: ExitStack) -> None:
        shard = self.shards[rank]
        decided = np.load(self.folder / "decisions" / f"{rank:05d}.npy")
        cuts, code = self._cuts(rank), shard.source.rules == "code"
        lines: dict[str, _Lines] = {}
        for number, found in enumerate(read_lines(self.folder / "filter" / f"{rank:05d}.jsonl.gz")):
            fate, identity, text = int(decided[number]), found["id"], found["text"]
            if fate in _REMOVED:
                tally.removed(_REMOVED[fate], identity, text)
                continue
            if number in cuts:
                left = recitation.without_passages(Words(text), code, self.settings.passage_words(code), cuts[number])
                if len(left.strip()) < _LEAST_LEFT * len(text):
                    tally.removed("recurring_passages", identity, text)
                    continue
                tally.changed("recurring_passages", identity, text, left, _differ(text, left), len(cuts[number]))
                text = left
            split = _SPLITS[fate]
            if split not in lines:
                path = self.folder / "documents" / shard.source.name / split / f"{shard.number:05d}.jsonl.gz"
                lines[split] = stack.enter_context(_Lines(path, 6))
            lines[split].write(identity, text, found["metadata"])
            tally.size(split, text)

    def _cuts(self, rank: int) -> dict[int, set[int]]:
        cuts: dict[int, set[int]] = {}
        for path in sorted((self.folder / "cuts").glob("*.npy")):
            every = np.load(path)
            for _, document, passage in every[every["shard"] == rank].tolist():
                cuts.setdefault(document, set()).add(passage)
        return cuts
