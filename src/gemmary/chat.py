"""A conversation in the terminal: answers stream, the conversation is kept, Ctrl-C stops an answer and nothing else."""

from __future__ import annotations

import sys
from typing import Any

from gemmary.errors import GemmaryError
from gemmary.gemma import Gemma
from gemmary.infer.sampling import Sampling
from gemmary.infer.session import Session

__all__ = ["converse"]


def converse(gemma: Gemma, sampling: Sampling, max_new_tokens: int) -> None:
    """Read lines from stdin and answer until /exit or end of file. Raises GemmaryError for a model without turns."""
    gemma.dialogue_ids([{"role": "user", "content": "?"}])  # a model that cannot chat says so before the first question
    messages: list[dict[str, Any]] = []
    session = Session()
    if sys.stdin.isatty():
        print("/reset begins anew, /exit ends, Ctrl-C stops an answer", file=sys.stderr)
    while (line := _read_line()) is not None:
        text = line.strip()
        if text == "/exit":
            return
        if text == "/reset":
            messages = []
            print("(a new conversation)", file=sys.stderr)
        elif text.startswith("/"):
            print(f"error: there is no command {text.split()[0]}: /reset and /exit are all", file=sys.stderr)
        elif text:
            asked = [*messages, {"role": "user", "content": text}]
            try:
                answer = _answer(gemma, asked, session, sampling, max_new_tokens)
            except GemmaryError as error:
                print(f"error: {error}; /reset begins anew", file=sys.stderr)
                continue
            # An answer cut off before its first word is not kept: the next question would follow an empty turn.
            messages = [*asked, {"role": "assistant", "content": answer}] if answer.strip() else messages


def _read_line() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return ""


def _answer(
    gemma: Gemma, messages: list[dict[str, Any]], session: Session, sampling: Sampling, max_new_tokens: int
) -> str:
    """Print the answer as it comes; Ctrl-C ends it and keeps what was said."""
    said = ""
    try:
        ids = gemma.dialogue_ids(messages)
        for piece in gemma.stream(ids, max_new_tokens=max_new_tokens, sampling=sampling, session=session):
            said += piece.text
            print(piece.text, end="", flush=True)
    except KeyboardInterrupt:
        print(" (stopped)", end="", file=sys.stderr)
    print(flush=True)
    return said
