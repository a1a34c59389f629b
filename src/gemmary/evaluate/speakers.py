"""Who answers: a model that runs here, or an endpoint that speaks OpenAI's API. Either is asked from several threads at once."""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol
from urllib.parse import urldefrag, urlsplit

from gemmary.data.readers import needed
from gemmary.errors import GemmaryError
from gemmary.infer.batching import Batcher, Request
from gemmary.infer.engine import Engine, Token
from gemmary.infer.sampling import Sampling
from gemmary.text.answers import Answer
from gemmary.text.dialogue import encode_dialogue
from gemmary.text.tokenizer import Tokenizer

__all__ = ["Draw", "Endpoint", "Local", "Said", "Speaker", "is_endpoint"]

_RETRIES = 4
"""After a failed request; the client waits longer each time, or as long as the endpoint asks."""
_UNSUPPORTED = ("unsupported_parameter", "unsupported_value")
Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Draw:
    """How an answer is drawn; a temperature of 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int = 1024


@dataclass(frozen=True)
class Said:
    """An answer, and whether it was cut off at the most tokens that it might have."""

    text: str
    cut: bool


class Speaker(Protocol):
    """Answers a conversation whose last message is the user's."""

    def say(self, messages: Messages, draw: Draw) -> Said:
        """Raises GemmaryError, in one line, where there will be no answer."""

    def close(self) -> None:
        """End what is being answered, and let go of everything."""


class Local:
    """A model in this process. What is asked at once is answered together, in one batch."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, at_once: int) -> None:
        self._batcher = Batcher(engine, slots=at_once, queue=at_once)
        self._tokenizer, self._generation = tokenizer, engine.config.generation
        self._room = min(engine.config.context, self._batcher.longest)

    def say(self, messages: Messages, draw: Draw) -> Said:
        """At most as many tokens as there is room for. Raises GemmaryError where the prompt alone has no room."""
        ids = encode_dialogue(
            self._tokenizer, messages, generation=self._generation, open_turn=True, system="prefix"
        ).ids
        if len(ids) >= self._room:
            raise GemmaryError(f"the conversation has {len(ids)} tokens and the model has room for {self._room}")
        sampling = Sampling(draw.temperature, top_p=draw.top_p, seed=draw.seed)
        most = min(draw.max_new_tokens, self._room - len(ids))
        came: queue.SimpleQueue[Token | Exception] = queue.SimpleQueue()
        self._batcher.submit(Request(ids, most, sampling, self._tokenizer.stop_ids), came.put)
        answer, text = Answer(self._tokenizer), ""
        while True:
            token = came.get()
            if isinstance(token, Exception):
                raise token if isinstance(token, GemmaryError) else GemmaryError(f"the model failed: {token}")
            text += answer.push(token.id, last=token.finish is not None)
            if token.finish is not None:
                return Said(text, token.finish == "length")

    def close(self) -> None:
        """What is being answered ends without an answer."""
        self._batcher.close()


def is_endpoint(model: str) -> bool:
    """Whether this is an address and not a model's place."""
    return model.startswith(("http://", "https://"))


class Endpoint:
    """`http://host:port/v1#name`. Without a name the endpoint's only model; `key_from` is the variable that its key was looked for in.

    What an endpoint refuses by name of how answers are drawn is left out from then on, and `warn` is told. Raises GemmaryError where
    the address is none, or the name is missing and must be there.
    """

    def __init__(
        self, address: str, key: str | None, key_from: str, *, warn: Callable[[str], None] = lambda line: None
    ) -> None:
        with needed("openai", "evaluate"):
            import openai
        self._where, name = urldefrag(address)
        parts = urlsplit(self._where)
        if not parts.hostname or parts.username is not None:
            raise GemmaryError(f"an endpoint is http://host:port/v1#model; its key goes into {key_from}")
        self._errors, self._key_from, self._warn = openai, key_from, warn
        self._client = openai.OpenAI(base_url=self._where, api_key=key or "none", max_retries=_RETRIES)
        self._names = {"max_new_tokens": "max_tokens"}
        self._left_out: set[str] = set()
        self._name = name or self._only_model()

    def say(self, messages: Messages, draw: Draw) -> Said:
        """Raises GemmaryError where the endpoint refuses, or does not answer after some tries."""
        while True:
            asked = asdict(draw)
            fields = {self._names.get(name, name): value for name, value in asked.items() if name not in self._left_out}
            try:
                return self._said(messages, fields)
            except self._errors.BadRequestError as error:
                if not self._do_without(error, fields):
                    raise self._gone(error) from None
            except self._errors.OpenAIError as error:
                raise self._gone(error) from None

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _said(self, messages: Messages, fields: Mapping[str, Any]) -> Said:
        sent: Any = [dict(message) for message in messages]
        reply = self._client.chat.completions.create(model=self._name, messages=sent, **fields)
        if not getattr(reply, "choices", None):
            raise GemmaryError(f"{self._where} answered without a choice: is it an OpenAI-compatible endpoint?")
        choice = reply.choices[0]
        text = (choice.message.content or "").encode(errors="replace").decode()  # a lone surrogate is no Unicode
        return Said(text, choice.finish_reason == "length")

    def _do_without(self, error: Any, sent: Mapping[str, Any]) -> bool:
        """Whether a field that was refused can be named otherwise or left out. Another thread may have seen to it already."""
        if error.code not in _UNSUPPORTED or error.param not in sent:
            return False
        if error.param == "max_tokens":
            self._names["max_new_tokens"] = "max_completion_tokens"
            return True
        if error.param not in ("temperature", "top_p", "seed"):
            return False
        if error.param not in self._left_out:
            self._left_out.add(error.param)
            self._warn(f"{self._where} does not take {error.param}: it draws as it likes")
        return True

    def _only_model(self) -> str:
        try:
            names = [model.id for model in self._client.models.list()]
        except self._errors.OpenAIError as error:
            raise self._gone(error) from None
        if len(names) != 1:
            some = ", ".join(names[:5])
            raise GemmaryError(f"{self._where} has {len(names)} models ({some}): name one, {self._where}#NAME")
        return names[0]

    def _gone(self, error: Exception) -> GemmaryError:
        status = getattr(error, "status_code", None)
        if status is None:
            return GemmaryError(f"{self._where} does not answer ({error})")
        more = f"; its key goes into {self._key_from}" if status in (401, 403) else ""
        more = "; does its address end with /v1?" if status == 404 else more
        return GemmaryError(f"{self._where} answers {status} ({str(error)[:300]}{more})")
