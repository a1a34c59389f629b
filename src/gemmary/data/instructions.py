"""Conversations and preferences to learn from: read, filtered, split, and a report of what went and why.

    folder/<source>/<split>.jsonl.gz    one conversation or preference a line; splits are train and held_out
    folder/report.json                  of each source: read, broken (with file and line), removed by rule, kept

Filters are the report's for synthetic data (Gemma technical report, 4.1): personal information, unsafe or toxic text (by
classifiers), wrong self-identification, duplicates. What is held out depends on what a record asks alone, so that the same
question is on the same side in every source and for every stage.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from gemmary.checkpoints.checkpoint import write_whole
from gemmary.data.classifiers import Classifier, ClassifierSettings, train_classifier
from gemmary.data.conversations import Conversation, Preference, conversation, preference
from gemmary.data.duplicates import fate, fingerprint, signature
from gemmary.data.lessons import Topic, lessons
from gemmary.data.privacy import masked
from gemmary.data.readers import Broken, open_binary
from gemmary.data.sources import Source, files
from gemmary.data.words import Words
from gemmary.errors import GemmaryError, check_bounds

__all__ = ["InstructionSettings", "InstructionSource", "OnError", "gather", "read_gathered"]

OnError = Literal["skip", "refuse"]
_SHOWN, _EXCERPT = 20, 160
_BUCKETS, _HASHES, _WORDS = 14, 8, 5
_BETTER = 3  # of so many lessons one has the better answer, the rest the plain one, where there are both
_OTHERS = (
    r"ChatGPT|GPT-?\d\w*|OpenAI|Claude|Anthropic|L[Ll]a[Mm][Aa]|Meta AI|Mistral|Mixtral|Bard|Gemini|PaLM|LaMDA|Qwen|Tongyi|Alibaba"
    r"|DeepSeek|Vicuna|Alpaca|Cohere|Copilot|Grok|xAI|Siri|Alexa|Ernie|ChatGLM|Falcon|Phi-?\d"
)
_SELF = re.compile(
    rf"\b(?:[Ii] am|[Ii]'m|[Ii]’m|[Mm]y name is|[Ii] was (?:made|created|trained|developed)|[Aa]s an? (?:AI|assistant|(?:large )?language model))\b(?:(?!\bnot\b)[^.!?\n]){{0,60}}\b(?P<name>{_OTHERS})\b"
)


@dataclass(frozen=True, kw_only=True)
class InstructionSource:
    """One source: a file or folder of JSON lines in the shapes of `conversations`, or lessons on a topic."""

    name: str
    kind: Literal["jsonl", "lessons"] = "jsonl"
    path: str | None = None
    topic: Topic | None = None
    """lessons: which, see `lessons`."""
    examples: int = 1000
    """lessons: how many are drawn; equal ones are then removed."""
    seed: int = 0
    """lessons: which are drawn."""
    weight: float = 1.0
    """How often the source is gone through, beside the others."""
    held_out: float = 0.1
    """Share of what is asked that never enters training."""
    near_duplicates: bool = True
    """jsonl: remove them too (of lessons only equal ones are: two sums differ by a digit)."""

    def __post_init__(self) -> None:
        where = f"source {self.name}"
        Source(name=self.name, kind="arithmetic")  # checks the name
        if (self.kind == "jsonl") != (self.path is not None) or (self.kind == "lessons") != (self.topic is not None):
            raise GemmaryError(f"{where}: kind jsonl has a path, kind lessons a topic")
        check_bounds(self, f"{where}: ", examples=(1, 1 << 32), weight=(0, 1e6), held_out=(0, 0.9), seed=(0, None))


@dataclass(frozen=True, kw_only=True)
class InstructionSettings:
    """Sources, and what is done with them."""

    source: tuple[InstructionSource, ...]
    on_error: OnError = "skip"
    """A line that cannot be used is named and counted, or ends the work."""
    personal: Literal["remove", "mask", "keep"] = "remove"
    """Personal data and secrets, as `privacy` finds them."""
    identity: bool = True
    """Remove what says to be another model."""
    name: str = "gemmary"
    """What the model calls itself, in lessons on identity."""
    duplicates: bool = True
    classifier: tuple[ClassifierSettings, ...] = field(default=())
    """What a classifier is shown is what the model says; below its threshold a record is removed."""

    def __post_init__(self) -> None:
        names = [source.name for source in self.source]
        if not names or len(set(names)) < len(names):
            raise GemmaryError("give at least one source, each a name of its own")

    @property
    def weights(self) -> dict[str, float]:
        """By source."""
        return {source.name: source.weight for source in self.source}


Record = Conversation | Preference
Parse = Callable[[Any, str], Record]


def gather(
    settings: InstructionSettings, folder: Path, *, kind: Literal["conversation", "preference"], system: str
) -> dict[str, Any]:
    """Read, filter, split and write into this folder; the report. `system` says what becomes of system messages.

    Raises GemmaryError for a source that is missing, where a record cannot be used and the settings refuse that, and where
    nothing is left to train on.
    """
    keep = _Filters(settings, folder)
    report: dict[str, Any] = {"kind": kind, "settings": _plain(settings), "sources": {}}
    for source in settings.source:
        counts: dict[str, Any] = {
            "read": 0,
            "train": 0,
            "held_out": 0,
            "broken": {"count": 0, "first": []},
            "removed": {},
        }
        kept: dict[str, list[Record]] = {"train": [], "held_out": []}
        for record in _records(source, settings.name, kind, system):
            counts["read"] += 1
            if isinstance(record, Broken):
                _broken(counts, record, settings.on_error, source.name)
                continue
            record, why = keep(record, near=source.kind == "jsonl" and source.near_duplicates)
            if why:
                entry = counts["removed"].setdefault(why, {"count": 0, "examples": []})
                entry["count"] += 1
                if len(entry["examples"]) < _SHOWN:
                    entry["examples"].append({"where": record.where, "text": " | ".join(record.texts)[:_EXCERPT]})
                continue
            split = "held_out" if _held_out(record, source.held_out) else "train"
            kept[split].append(record)
            counts[split] += 1
        for split, records in kept.items():
            _write(folder / source.name / f"{split}.jsonl.gz", records)
        report["sources"][source.name] = counts
    if not any(counts["train"] for counts in report["sources"].values()):
        first = next(
            (line for counts in report["sources"].values() for line in counts["broken"]["first"]), "all was removed"
        )
        raise GemmaryError(f"nothing is left to train on in {', '.join(report['sources'])}: {first}")
    report["classifiers"] = keep.about
    write_whole(folder / "report.json", json.dumps(report, indent=1, ensure_ascii=False).encode() + b"\n")
    return report


def read_gathered(folder: Path, source: str, split: str) -> Iterator[Record]:
    """The records of one source and split, in order; none where there is no file of it."""
    path = folder / source / f"{split}.jsonl.gz"
    if not path.is_file():
        return
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            data = json.loads(line)
            if "chosen" in data:
                yield Preference(**data)
            else:
                yield Conversation(**{**data, "tests": tuple(data["tests"])})


def _records(source: InstructionSource, name: str, kind: str, system: str) -> Iterator[Record | Broken]:
    if source.kind == "lessons":
        assert source.topic is not None
        yield from _taught(source, name, kind)
        return
    parse: Parse = conversation if kind == "conversation" else preference
    for path in files(Source(name=source.name, kind="jsonl", path=source.path)):
        with open_binary(path) as lines:
            for number, line in enumerate(lines, 1):
                where = f"{path.name}:{number}"
                try:
                    if line.strip():
                        yield dataclasses.replace(parse(json.loads(line), system), where=where)
                except GemmaryError as error:
                    yield Broken(where, str(error))
                except (ValueError, RecursionError) as error:
                    yield Broken(where, f"not JSON: {error}")


def _taught(source: InstructionSource, name: str, kind: str) -> Iterator[Record]:
    assert source.topic is not None
    for number, lesson in enumerate(lessons(source.topic, source.examples, source.seed, name)):
        where, asked = f"{source.topic}/{source.seed}/{number}", [{"role": "user", "content": lesson.question}]
        if kind == "conversation":
            answer = lesson.plain if lesson.plain and number % _BETTER else lesson.answer
            messages = [*asked, {"role": "assistant", "content": answer}]
            yield Conversation(messages, lesson.ends, lesson.tests, lesson.fact, where)
        else:
            rejected = lesson.wrong[number % len(lesson.wrong)]
            yield Preference(asked, lesson.answer, rejected, lesson.fact, where, lesson.ends)


def _broken(counts: dict[str, Any], record: Broken, on_error: OnError, source: str) -> None:
    line = f"{record.where}: {record.why}"
    if on_error == "refuse":
        raise GemmaryError(f'source {source}: {line} (on_error = "skip" would leave it out)')
    counts["broken"]["count"] += 1
    if len(counts["broken"]["first"]) < _SHOWN:
        counts["broken"]["first"].append(line)


def _held_out(record: Record, share: float) -> bool:
    first = record.messages[0] if isinstance(record, Conversation) else record.prompt[0]
    fact = record.fact or str(fingerprint(Words(first["content"])))
    return fate(fact) < share * 2**64


class _Filters:
    """Says of each record why it goes, or gives it back, masked where that is asked for."""

    def __init__(self, settings: InstructionSettings, folder: Path) -> None:
        self._settings = settings
        self._seen: set[int] = set()
        self._buckets: set[bytes] = set()
        self._classifiers = []
        self.about: dict[str, Any] = {}
        for wanted in settings.classifier:
            one = Classifier.load(Path(wanted.path)) if wanted.path else train_classifier(wanted)
            one.save(folder / "classifiers" / wanted.name)
            self._classifiers.append((wanted, one))
            self.about[wanted.name] = one.about | {"threshold": wanted.threshold}
        self._own = {name.lower() for name in (settings.name, "gemma", "gemmary")}

    def __call__(self, record: Record, *, near: bool) -> tuple[Record, str | None]:
        settings = self._settings
        if settings.personal != "keep":
            hidden = [masked(text) for text in record.texts]
            found = [name for _, names in hidden for name in names]
            if found and settings.personal == "remove":
                return record, f"personal: {found[0]}"
            if found:
                record = _with_texts(record, [text for text, _ in hidden])
        if settings.identity and any(self._another(text) for text in record.said):
            return record, "identity"
        for wanted, classifier in self._classifiers:
            if any(classifier.score(Words(text)) < wanted.threshold for text in record.said):
                return record, f"classifier: {wanted.name}"
        return record, self._duplicate(record, near) if settings.duplicates else None

    def _another(self, text: str) -> bool:
        return any(found["name"].lower() not in self._own for found in _SELF.finditer(text))

    def _duplicate(self, record: Record, near: bool) -> str | None:
        # One prompt has many pairs; what tells them apart is their answers.
        compared = record.texts if isinstance(record, Conversation) else record.texts[-2:]
        words = Words("\n".join(compared))
        # Figures alone tell one sum from another, and a word's case one function: equal means to the letter.
        key = int.from_bytes(hashlib.blake2b("\0".join(record.texts).encode(), digest_size=8).digest(), "big")
        if key in self._seen:
            return "duplicate"
        self._seen.add(key)
        found = signature(words, _WORDS, _BUCKETS * _HASHES) if near else None
        if found is None:
            return None
        buckets = {bytes([i]) + found[i * _HASHES : (i + 1) * _HASHES].tobytes() for i in range(_BUCKETS)}
        if buckets & self._buckets:
            return "near_duplicate"
        self._buckets |= buckets
        return None


def _with_texts(record: Record, texts: list[str]) -> Record:
    if isinstance(record, Preference):
        *asked, chosen, rejected = texts
        prompt = [{**message, "content": text} for message, text in zip(record.prompt, asked, strict=True)]
        return dataclasses.replace(record, prompt=prompt, chosen=chosen, rejected=rejected)
    pairs = zip(record.messages, texts, strict=True)
    return dataclasses.replace(record, messages=[{**message, "content": text} for message, text in pairs])


def _write(path: Path, records: list[Record]) -> None:
    lines = "".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records)
    write_whole(path, gzip.compress(lines.encode(), mtime=0))


def _plain(settings: InstructionSettings) -> Any:
    return json.loads(json.dumps(asdict(settings)))
