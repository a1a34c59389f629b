"""Answers in OpenAI's shapes, whole or in chunks. Nothing here waits or decides."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gemmary.serve.protocol import Chat, Completions
from gemmary.text.tokenizer import Tokenizer

__all__ = ["Part", "Reply", "Scored", "Usage"]

_LEAST_LOGPROB = -9999.0  # as OpenAI writes what is as good as impossible


@dataclass(frozen=True)
class Scored:
    """A token shown: its bytes in the text, from which character, and its log-probability (None: nothing came before it)."""

    id: int
    data: bytes
    offset: int
    logprob: float | None
    top: Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Part:
    """What is added to an answer: text, the tokens that it is, and why the answer ends here, if it does."""

    text: str
    scored: list[Scored]
    finish: str | None


@dataclass
class Usage:
    """Tokens, counted."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    def to_json(self) -> dict[str, int]:
        """As the API has it."""
        both = self.prompt_tokens + self.completion_tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens, "total_tokens": both}


class Reply:
    """The shapes of one reply."""

    def __init__(self, ask: Chat | Completions, tokenizer: Tokenizer, model: str) -> None:
        self._chat, self._tokenizer = isinstance(ask, Chat), tokenizer
        self._scored = bool(ask.logprobs) if isinstance(ask, Chat) else ask.logprobs is not None
        self._usage = ask.stream_options.include_usage
        kind, prefix = ("chat.completion", "chatcmpl") if self._chat else ("text_completion", "cmpl")
        self._kind = kind
        self._head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, choices: Sequence[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        """Everything at once."""
        return {**self._head, "object": self._kind, "choices": choices, "usage": usage.to_json()}

    def choice(self, index: int, text: str, scored: Sequence[Scored], finish: str | None) -> dict[str, Any]:
        """One answer, whole."""
        said: dict[str, Any] = (
            {"message": {"role": "assistant", "content": text, "refusal": None}} if self._chat else {"text": text}
        )
        return {"index": index, **said, "logprobs": self._logprobs(scored), "finish_reason": finish}

    def chunk(self, index: int, text: str, scored: Sequence[Scored], finish: str | None) -> dict[str, Any]:
        """A piece of one answer."""
        if not self._chat:
            return self._part([self.choice(index, text, scored, finish)])
        logprobs = self._logprobs(scored) if scored else None
        delta = {"content": text} if text or not finish or scored else {}
        return self._part([{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}])

    def opening(self, index: int) -> dict[str, Any]:
        """The chunk that says who speaks, and only it does."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return self._part([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def counted(self, usage: Usage) -> dict[str, Any]:
        """The last chunk, where it was asked for."""
        return {**self._part([]), "usage": usage.to_json()}

    def _part(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = f"{self._kind}.chunk" if self._chat else self._kind
        return {**self._head, "object": kind, "choices": choices, **({"usage": None} if self._usage else {})}

    def _logprobs(self, scored: Sequence[Scored]) -> dict[str, Any] | None:
        if not self._scored:
            return None
        if self._chat:
            return {"content": [self._entry(token) for token in scored], "refusal": None}
        return {
            "tokens": [self._name(token.id, token.data) for token in scored],
            "token_logprobs": [None if token.logprob is None else _bounded(token.logprob) for token in scored],
            # Ids of the same text are one entry: the likelier, which comes last.
            "top_logprobs": [
                None
                if token.logprob is None
                else {
                    self._name(id): _bounded(logprob)
                    for id, logprob in reversed([(token.id, token.logprob), *token.top])
                }
                for token in scored
            ],
            "text_offset": [token.offset for token in scored],
        }

    def _entry(self, token: Scored) -> dict[str, Any]:
        top = [self._likely(id, self._tokenizer.token_bytes(id), logprob) for id, logprob in token.top]
        return {**self._likely(token.id, token.data, token.logprob or 0.0), "top_logprobs": top}

    def _likely(self, id: int, data: bytes, logprob: float) -> dict[str, Any]:
        return {"token": self._name(id, data), "logprob": _bounded(logprob), "bytes": list(data)}

    def _name(self, id: int, data: bytes | None = None) -> str:
        """A token as a string: structure by its name, a part of a character by its bytes."""
        if id in self._tokenizer.structural_ids:
            return self._tokenizer.token_bytes(id, structure=True).decode()
        data = self._tokenizer.token_bytes(id) if data is None else data
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _bounded(logprob: float) -> float:
    return max(float(logprob), _LEAST_LOGPROB)
