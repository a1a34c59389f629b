"""Prompts to compare models on, one JSON object a line, as people keep them.

{"question_id", "category", "turns": ["…", "…"]}      MT-Bench: each turn is asked after one's own answers to those before
{"prompt": ["…", "…"], "category", "prompt_id"}       the same, as it is found on the hub
{"prompt": "…" or [messages]}, {"messages": [...]}    and the other shapes of `data.conversations`; an answer at the end is left out
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemmary.data.conversations import conversation
from gemmary.data.readers import open_binary
from gemmary.errors import GemmaryError

__all__ = ["Question", "questions"]

_IDS = ("id", "question_id", "prompt_id")
_NO_CATEGORY = "other"


@dataclass(frozen=True)
class Question:
    """What is asked. `turns` holds, for each answer, the messages before it that are not answers of the model that is asked; the last
    of each is the user's."""

    id: str
    category: str
    turns: tuple[tuple[Mapping[str, str], ...], ...]


def questions(path: Path, most_turns: int | None = None) -> list[Question]:
    """All of a file (also .gz, .zst), in order, each cut to so many turns. System messages become the beginning of the first turn.

    Raises GemmaryError with the line for what is no prompt, for an id that comes twice, and for a file without any.
    """
    if most_turns is not None and most_turns < 1:
        raise GemmaryError(f"--turns is {most_turns}; it must be at least 1")
    found: dict[str, Question] = {}
    with open_binary(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path.name}:{number}"
            one = _question(_object(line, where), where, str(number), most_turns)
            if one.id in found:
                raise GemmaryError(f"{where}: the id {one.id[:60]!r} has come before: give each prompt its own")
            found[one.id] = one
    if not found:
        raise GemmaryError(f"{path} has no prompts: write one JSON object a line")
    return list(found.values())


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise GemmaryError(f"{where}: not JSON ({error})") from None
    if not isinstance(record, dict):
        raise GemmaryError(f"{where}: not an object")
    return record


def _question(record: Mapping[str, Any], where: str, number: str, most: int | None) -> Question:
    id = next((record[key] for key in _IDS if record.get(key) is not None), number)
    category = record.get("category")
    category = _NO_CATEGORY if category in (None, "") else category
    if isinstance(id, bool) or not isinstance(id, str | int) or not isinstance(category, str):
        raise GemmaryError(f"{where}: an id is a text or a whole number, and a category a text")
    prompt = record.get("prompt")
    texts = isinstance(prompt, list) and bool(prompt) and all(isinstance(turn, str) for turn in prompt)
    try:
        if "turns" in record or texts:
            turns = _turns(record.get("turns", prompt))
        else:
            turns = (tuple(conversation(record, "prefix").prompt),)
    except GemmaryError as error:
        raise GemmaryError(f"{where}: {error}") from None
    return Question(str(id), category, turns[:most])


def _turns(texts: Any) -> tuple[tuple[Mapping[str, str], ...], ...]:
    if not isinstance(texts, list) or not texts:
        raise GemmaryError("turns is a list of texts, and has at least one")
    return tuple(tuple(conversation({"prompt": text}, "prefix").messages) for text in texts)
