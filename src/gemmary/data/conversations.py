"""Conversations and preferences as people keep them, one JSON object a line, in the shapes that TRL's users have.

    {"messages": [{"role", "content"}, …]}                                a conversation
    {"prompt", "completion"} · {"prompt", "response"}                     texts, or lists of messages
    {"instruction", "input"?, "output"}                                   Alpaca's
    {"prompt"}                                                            a question alone: for what learns from its own answers
    {"prompt", "chosen", "rejected"}                                      a preference; texts, or lists of messages
    {"chosen": [messages], "rejected": [messages]}                        the same, the prompt being what both begin with

Beside any of them, `answer` is what an answer must end with, and `tests` is a list of assertions that its code must pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gemmary.errors import GemmaryError
from gemmary.text.dialogue import turns_of

__all__ = ["Conversation", "Message", "Preference", "conversation", "preference"]

Message = dict[str, str]
_SAID = ("completion", "response", "output")


@dataclass(frozen=True)
class Conversation:
    """Messages in turn, from a user's on; the last is the model's but where there is only a prompt."""

    messages: list[Message]
    answer: str | None = None
    tests: tuple[str, ...] = ()
    fact: str = ""
    """What is held out together; where it is empty, the first message decides."""
    where: str = ""
    """File and line."""

    @property
    def prompt(self) -> list[Message]:
        """All before the model's last turn."""
        return self.messages[:-1] if self.messages[-1]["role"] != "user" else self.messages

    @property
    def texts(self) -> list[str]:
        """What each turn says."""
        return [message["content"] for message in self.messages]

    @property
    def said(self) -> list[str]:
        """What the model says."""
        return [message["content"] for message in self.messages if message["role"] not in ("user", "system")]


@dataclass(frozen=True)
class Preference:
    """A prompt, an answer to it, and one that was liked less."""

    prompt: list[Message]
    chosen: str
    rejected: str
    fact: str = ""
    where: str = ""
    answer: str | None = field(default=None, repr=False)

    @property
    def texts(self) -> list[str]:
        """What each turn says, and then both answers."""
        return [*(message["content"] for message in self.prompt), self.chosen, self.rejected]

    @property
    def said(self) -> list[str]:
        """What a model that learns from this would say."""
        return [self.chosen]


def conversation(record: Any, system: str) -> Conversation:
    """A record as a conversation, checked as `dialogue` does (`system` is "refuse" or "prefix").

    Raises GemmaryError saying what is wrong with it.
    """
    if not isinstance(record, Mapping):
        raise GemmaryError("not an object")
    if "messages" in record:
        messages = record["messages"]
    elif "instruction" in record and "output" in record:
        more = record.get("input") or ""
        asked = _text(record["instruction"], "instruction") + (f"\n\n{_text(more, 'input')}" if more else "")
        messages = _messages(asked, "user") + _messages(record["output"], "assistant")
    elif "prompt" in record:
        messages = _messages(record["prompt"], "user")
        if said := next((key for key in _SAID if key in record), None):
            messages = messages + _messages(record[said], "assistant")
    else:
        has = ", ".join(map(str, record))[:80] or "nothing"
        raise GemmaryError(f"it has no messages, no prompt, and no instruction with its output, but {has}")
    return Conversation(_checked(messages, system), *_judged(record))


def preference(record: Any, system: str) -> Preference:
    """A record as a preference. Raises GemmaryError saying what is wrong with it, two answers that are equal included."""
    if not isinstance(record, Mapping) or "chosen" not in record or "rejected" not in record:
        raise GemmaryError("a preference has chosen and rejected, and a prompt or what both begin with")
    chosen, rejected = (_messages(record[key], "assistant") for key in ("chosen", "rejected"))
    if "prompt" in record:
        prompt = _messages(record["prompt"], "user")
    else:
        pairs = zip(chosen, rejected, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(chosen), len(rejected)))
        prompt, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
        if not prompt:
            raise GemmaryError("there is no prompt, and the two answers do not begin alike")
    if chosen == rejected:
        raise GemmaryError("its two answers are equal")
    both = []
    for name, said in (("chosen", chosen), ("rejected", rejected)):
        if len(said) != 1:
            raise GemmaryError(f"{name} has {len(said)} turns after the prompt; it has the model's one")
        whole = _checked(prompt + said, system)
        if whole[-1]["role"] == "user":
            raise GemmaryError(f"{name} ends with the user's turn, not the model's")
        both.append(whole)
    if both[0][-1] == both[1][-1]:
        raise GemmaryError("its two answers are equal")
    return Preference(both[0][:-1], both[0][-1]["content"], both[1][-1]["content"], answer=_judged(record)[0])


def _judged(record: Mapping[str, Any]) -> tuple[str | None, tuple[str, ...]]:
    answer, tests = record.get("answer"), record.get("tests") or ()
    if answer is not None and (
        isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip()
    ):
        raise GemmaryError("answer is a text or a number")
    if not isinstance(tests, Sequence) or isinstance(tests, str) or not all(isinstance(test, str) for test in tests):
        raise GemmaryError("tests is a list of assertions, each a text")
    try:
        "".join([str(answer), *tests]).encode()
    except UnicodeEncodeError:
        raise GemmaryError("answer or tests has a lone surrogate: it is not Unicode") from None
    return (None if answer is None else str(answer)), tuple(tests)


def _messages(value: Any, role: str) -> list[Any]:
    """A text as one message; a list of messages, or one message, as it is."""
    if isinstance(value, list):
        return value
    return [value] if isinstance(value, Mapping) else [{"role": role, "content": value}]


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise GemmaryError(f"{name} is not a text")
    return value


def _checked(messages: Any, system: str) -> list[Message]:
    names = {"user": "user", "model": "assistant"}
    return [{"role": names[role], "content": content} for role, content in turns_of(messages, system)]
