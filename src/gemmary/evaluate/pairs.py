"""Pairs of answers and verdicts on them, made by several at once and kept as they come.

    folder/answers.jsonl     an answer a line: whose, to which prompt and turn, its text
    folder/verdicts.jsonl    a verdict a line: on which prompt, in which order, its value, and all that the judge said

A line is appended and flushed when it is there. It carries a digest of all that went into it, by which it is found again: whoever
does the same again goes on from there, and a change makes anew what it concerns, and only that.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from gemmary.errors import GemmaryError
from gemmary.evaluate.judge import EMPTY, TRIES, Rules, Verdict, judge, judge_prompt
from gemmary.evaluate.questions import Question
from gemmary.evaluate.side_by_side import Outcome, from_orders
from gemmary.evaluate.speakers import Draw, Said, Speaker

__all__ = ["Lines", "Pair", "Party", "answered", "judged", "preferences", "recorded"]

_T = TypeVar("_T")
_R = TypeVar("_R")
Tick = Callable[[int, int], None]
_AGAIN = 0.7
"""The temperature of a judge's later tries: what it said greedily it would only say again."""


@dataclass(frozen=True)
class Party:
    """Who answers or judges. `identity` is what its lines are known by; it is opened only where something is left to do."""

    identity: str
    open: Callable[[], Speaker]


@dataclass(frozen=True)
class Pair:
    """A prompt and what A and B made of it, an answer for each turn."""

    question: Question
    a: tuple[Said, ...]
    b: tuple[Said, ...]

    @property
    def texts(self) -> tuple[list[str], list[str]]:
        """A's answers and B's."""
        return [one.text for one in self.a], [one.text for one in self.b]

    @property
    def equal(self) -> bool:
        """Whether both said the same: a tie, and nobody is asked."""
        a, b = self.texts
        return [text.strip() for text in a] == [text.strip() for text in b]

    @property
    def key(self) -> str:
        """What ratings of it are kept under."""
        return _digest("pair", self.question.id, self.question.turns, self.texts)


class Lines:
    """Lines of JSON by their digests, from several threads. A last line that was torn is dropped.

    Raises GemmaryError where another process writes the file, and where it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._lines: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise GemmaryError(
                f"another comparison is at work in {path.parent}: wait for it, or name another --out"
            ) from None
        self._file.seek(0)
        whole = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                self._file.truncate(whole)
                break
            whole += len(line)
            try:
                record = json.loads(line)
                self._lines[record["key"]] = record
            except (ValueError, TypeError, KeyError):
                continue  # what it was is made again

    def get(self, key: str) -> dict[str, Any] | None:
        """The line of this digest."""
        return self._lines.get(key)

    def add(self, key: str, record: dict[str, Any]) -> None:
        """Append a line; it has left the process when this returns."""
        line = json.dumps({"key": key, **record}) + "\n"  # ASCII: also a lone surrogate of an endpoint's can be written
        with self._lock:
            try:
                self._file.write(line.encode())
                self._file.flush()
            except OSError as error:
                raise GemmaryError(f"writing {self._file.name} failed: {error.strerror}") from None
            self._lines[key] = record

    def close(self) -> None:
        """Let others write."""
        with suppress(OSError):  # what could not be written has been said
            self._file.close()


@contextmanager
def recorded(folder: Path) -> Iterator[tuple[Lines, Lines]]:
    """Answers and verdicts of this folder, which is made. Raises GemmaryError where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        answers = Lines(folder / "answers.jsonl")
    except OSError as error:
        raise GemmaryError(f"cannot write to {folder}: {error.strerror}") from None
    try:
        verdicts = Lines(folder / "verdicts.jsonl")
        try:
            yield answers, verdicts
        finally:
            verdicts.close()
    finally:
        answers.close()


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def answered(
    answers: Lines, side: str, party: Party, some: Sequence[Question], draw: Draw, at_once: int, tick: Tick
) -> list[tuple[Said, ...]]:
    """What this side says to each question, turn after turn. Raises GemmaryError, naming the prompt, where an answer does not come."""

    def answer(question: Question, speaker: Speaker | None) -> tuple[Said, ...] | None:
        history: list[dict[str, str]] = []
        found = []
        for number, turn in enumerate(question.turns):
            history += map(dict, turn)
            key = _digest("answer", side, party.identity, history, asdict(draw))
            line = answers.get(key)
            if line is None and speaker is None:
                return None
            if line is None:
                assert speaker is not None
                said = speaker.say(history, draw)
                line = {"side": side, "prompt": question.id, "turn": number, **asdict(said)}
                answers.add(key, line)
            found.append(Said(line["text"], line["cut"]))
            history.append({"role": "assistant", "content": found[-1].text.strip() or EMPTY})
        return tuple(found)

    return _all(answer, party, some, lambda question: question.id, at_once, tick)


def judged(
    verdicts: Lines, party: Party, pairs: Sequence[Pair], by: Rules, draw: Draw, at_once: int, tick: Tick
) -> tuple[list[Outcome], list[dict[str, Any]]]:
    """What the judge makes of each pair, in both orders; and for each pair the two verdicts as they are kept, none where the answers are equal.

    Raises GemmaryError, naming the prompt, where the judge cannot be asked.
    """
    orders = [(pair, first) for pair in pairs if not pair.equal for first in ("a", "b")]

    def verdict(one: tuple[Pair, str], speaker: Speaker | None) -> dict[str, Any] | None:
        pair, first = one
        a, b = pair.texts
        texts = (a, b) if first == "a" else (b, a)
        prompt, _ = judge_prompt(pair.question.turns, *texts, by)
        key = _digest("verdict", party.identity, prompt, asdict(draw), TRIES)
        line = verdicts.get(key)
        if line is None and speaker is not None:

            def ask(messages: list[dict[str, str]], number: int) -> str:
                assert speaker is not None
                again = replace(draw, temperature=_AGAIN, seed=(draw.seed + number) % (1 << 32)) if number else draw
                return speaker.say(messages, again).text

            found: Verdict = judge(pair.question.turns, *texts, by, ask)
            line = {"prompt": pair.question.id, "first": first, **asdict(found)}
            verdicts.add(key, line)
        return line

    lines = iter(_all(verdict, party, orders, lambda one: one[0].question.id, at_once, tick))
    outcomes: list[Outcome] = []
    records: list[dict[str, Any]] = []
    for pair in pairs:
        if pair.equal:
            outcomes.append(Outcome(pair.question.id, pair.question.category, 0.5))
            records.append({})
            continue
        as_first, as_second = next(lines), next(lines)
        got = None if as_second["value"] is None else 1 - as_second["value"]
        outcomes.append(from_orders(pair.question.id, pair.question.category, as_first["value"], got))
        records.append(
            {
                name: {"value": line["value"], "said": line["said"], "tries": line["tries"]}
                for name, line in (("a_first", as_first), ("b_first", as_second))
            }
        )
    return outcomes, records


def _all(
    work: Callable[[_T, Speaker | None], _R | None], party: Party, items: Sequence[_T], name: Callable[[_T], str], at_once: int, tick: Tick,
) -> list[_R]:  # fmt: skip
    """The work on every item. Without a speaker it gives what is known already; only the rest is asked for, several at a time."""
    found = {i: result for i, item in enumerate(items) if (result := work(item, None)) is not None}
    left = [i for i in range(len(items)) if i not in found]
    tick(len(found), len(items))
    if not left:
        return [found[i] for i in range(len(items))]
    speaker = party.open()

    def one(i: int) -> None:
        try:
            result = work(items[i], speaker)
        except GemmaryError as error:
            raise GemmaryError(f"{error}, at prompt {name(items[i])[:60]}") from None
        assert result is not None
        found[i] = result

    try:
        _threads(one, left, speaker, at_once, lambda: tick(len(found), len(items)))
    finally:
        speaker.close()
    return [found[i] for i in range(len(items))]


def _threads(
    work: Callable[[int], None], left: Sequence[int], speaker: Speaker, at_once: int, tick: Callable[[], None]
) -> None:
    """At the first error no more is begun; what is on its way may end, and is kept."""
    with ThreadPoolExecutor(at_once) as pool:
        futures = [pool.submit(work, i) for i in left]
        try:
            for future in as_completed(futures):
                future.result()
                tick()
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if not isinstance(error, GemmaryError):
                speaker.close()  # who pressed Ctrl-C does not wait for long answers
            raise


def preferences(
    pairs: Sequence[Pair], ruled: Sequence[tuple[str, Sequence[Outcome]]]
) -> tuple[list[dict[str, Any]], int]:
    """Pairs as `gemmary reward` reads them, and how many of those with a verdict, or a tie, are left out.

    `ruled` names who ruled, whose word counts first coming first. A preference has one prompt for both answers, so a pair of several turns is
    one only where all but the last answers are equal; an empty answer is none.
    """
    found: list[dict[str, Any]] = []
    for number, pair in enumerate(pairs):
        values = [(by, value) for by, outcomes in ruled if (value := outcomes[number].value) is not None]
        a, b = ([text.strip() for text in texts] for texts in pair.texts)
        if not values or values[0][1] == 0.5 or a[:-1] != b[:-1] or not all([*a, *b]):
            continue
        by, value = values[0]
        prompt = [dict(message) for message in pair.question.turns[0]]
        for said, turn in zip(a, pair.question.turns[1:], strict=False):
            prompt += [{"role": "assistant", "content": said}, *map(dict, turn)]
        chosen, rejected = (
            [{"role": "assistant", "content": text[-1]}] for text in ((a, b) if value > 0.5 else (b, a))
        )
        found.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "by": by, "id": pair.question.id})
    return found, len(pairs) - len(found)
