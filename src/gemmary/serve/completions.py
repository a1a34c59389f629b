"""One request, from the batcher to the client: answers put together, streamed or whole, and given up when nobody waits.

Everything that happens to a request comes through one queue: tokens and faults from the batcher's thread, and that the
client has left from the connection. So there is one place that waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gemmary.errors import GemmaryError
from gemmary.gemma import Gemma
from gemmary.infer.batching import Closing, Overloaded, Request, Ticket
from gemmary.infer.engine import Token
from gemmary.serve.asking import Prepared
from gemmary.serve.grammar import Matcher
from gemmary.serve.guards import Note
from gemmary.serve.metrics import Metrics
from gemmary.serve.protocol import ApiError, Chat, Completions
from gemmary.serve.replies import Part, Reply, Scored, Usage
from gemmary.text.answers import Answer
from gemmary.text.tokenizer import Tokenizer

__all__ = ["Run"]

_Event = tuple[int, Token | Exception]


@dataclass
class _Choice:
    """One answer on its way. Tokens wait in `held` until the text that they are is shown."""

    tokenizer: Tokenizer
    answer: Answer
    offset: int
    held: list[tuple[Token, int, int]] = field(default_factory=list)
    new_tokens: int = 0
    finish: str | None = None

    def push(self, token: Token) -> Part:
        """Take a token."""
        start = self.answer.decoded
        text = self.answer.push(token.id, last=token.finish is not None)
        self.new_tokens += 1
        self.finish = "stop" if self.answer.stopped else token.finish
        if token.id not in self.tokenizer.stop_ids:
            self.held.append((token, start, self.answer.decoded))
        return Part(text, self._release(), self.finish)

    def _release(self) -> list[Scored]:
        """The tokens whose text has been shown. Where a stop string ended it, they end there too, the last one cut."""
        shown, scored = self.answer.shown, []
        while self.held:
            token, start, end = self.held[0]
            if start >= shown if self.answer.stopped else end > shown and self.finish is None:
                break
            data = self.tokenizer.token_bytes(token.id)
            if self.answer.stopped and end > shown:
                unseen = data.decode(errors="replace")[shown - end :]
                data = data[: max(len(data) - len(unseen.encode()), 0)]
            scored.append(Scored(token.id, data, self.offset + start, token.logprob, token.top_logprobs))
            self.held.pop(0)
        return scored


class Run:
    """A request being answered. Whoever makes one calls `begin`, then `whole` or `response`, which clean up after themselves."""

    def __init__(self, gemma: Gemma, ask: Chat | Completions, model: str, note: Note, metrics: Metrics) -> None:
        self._tokenizer, self._ask, self._note, self._metrics = gemma.tokenizer, ask, note, metrics
        self._reply = Reply(ask, gemma.tokenizer, model)
        self._events: asyncio.Queue[_Event] = asyncio.Queue()
        self._tickets: list[Ticket] = []
        self._choices: list[_Choice] = []
        self._echoes: list[Part] = []
        self._forms: list[Matcher | None] = []
        self._usage = Usage()
        self._started = time.perf_counter()
        self._watch: asyncio.Task[None] | None = None
        self._ended = False

    async def begin(
        self,
        prepare: Callable[[], Prepared],
        submit: Callable[[Request, Callable[[Token | Exception], None]], Ticket],
        receive: Receive,
    ) -> None:
        """Make ready and queue, on another thread: a long prompt holds nobody up. Raises ApiError."""
        loop = asyncio.get_running_loop()

        def start() -> None:
            prepared = prepare()
            self._usage.prompt_tokens = prepared.prompt_tokens
            self._echoes, self._forms = prepared.echoes, prepared.forms
            for i, request in enumerate(prepared.requests):
                offset = len(prepared.echoes[i].text) if prepared.echoes else 0
                self._choices.append(_Choice(self._tokenizer, Answer(self._tokenizer, self._ask.stop), offset))
                self._tickets.append(submit(request, functools.partial(deliver, i)))
                if self._ended:  # who waited was cancelled; this thread was not
                    self._tickets[-1].cancel()

        def deliver(i: int, item: Token | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to be told
                loop.call_soon_threadsafe(self._events.put_nowait, (i, item))

        self._watch = asyncio.create_task(self._wait_for_leaving(receive))
        try:
            with _told():
                await asyncio.to_thread(start)
        except BaseException:
            self._end()
            raise

    async def whole(self) -> dict[str, Any]:
        """The reply, once it is complete. Raises ApiError, or ClientDisconnect where nobody waits for it."""
        texts = [[self._echoes[i].text] if self._echoes else [] for i in range(len(self._choices))]
        scored = [[*self._echoes[i].scored] if self._echoes else [] for i in range(len(self._choices))]
        try:
            with _told():
                async for i, part in self._parts():
                    texts[i].append(part.text)
                    scored[i] += part.scored
        finally:
            self._end()
        choices = [
            self._reply.choice(i, "".join(texts[i]), scored[i], choice.finish) for i, choice in enumerate(self._choices)
        ]
        return self._reply.whole(choices, self._usage)

    async def response(self) -> Response:
        """A stream, once its first token has come: what goes wrong before is an HTTP status. Raises as `whole` does."""
        parts = self._parts()
        try:
            with _told():
                first = await anext(parts)
        except BaseException:
            self._end()
            raise
        return _Stream(self, parts, first)

    async def _lines(self, parts: AsyncIterator[tuple[int, Part]], first: tuple[int, Part]) -> AsyncIterator[bytes]:
        """Server-sent events."""
        for i in range(len(self._choices)):
            if isinstance(self._ask, Chat):
                yield _event(self._reply.opening(i))
            elif self._echoes:
                yield _event(self._reply.chunk(i, self._echoes[i].text, self._echoes[i].scored, None))
        try:
            with _told():
                async for i, part in _chained(first, parts):
                    if part.text or part.scored or part.finish:
                        yield _event(self._reply.chunk(i, part.text, part.scored, part.finish))
        except ClientDisconnect:
            self._note.more["left"] = True
            return
        except ApiError as refusal:
            self._note.more["error"] = refusal.code
            yield _event(refusal.body())
            return
        if self._ask.stream_options.include_usage:
            yield _event(self._reply.counted(self._usage))
        yield b"data: [DONE]\n\n"

    async def _parts(self) -> AsyncIterator[tuple[int, Part]]:
        """What each token adds, until every answer is finished. Raises what the batcher or the connection reports."""
        left, first, last = len(self._choices), 0.0, 0.0
        while left:
            i, item = await self._events.get()
            if isinstance(item, Exception):
                raise item
            choice = self._choices[i]
            if choice.finish is not None:
                continue  # tokens that came after a stop string, before the batcher knew of it
            last = time.perf_counter()
            if not first:
                first = last
                self._metrics.first_token_seconds.observe(first - self._started)
            part = choice.push(item)
            self._usage.completion_tokens += 1
            if part.finish:
                left -= 1
                if (form := self._forms[i]) is not None and form.failure:
                    raise GemmaryError(f"the form asked for could not be followed to its end: {form.failure}")
                if choice.answer.stopped:
                    self._tickets[i].cancel()
            yield i, part
        if (rest := max(choice.new_tokens for choice in self._choices) - 1) > 0:
            self._metrics.token_seconds.observe((last - first) / rest)

    async def _wait_for_leaving(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._events.put_nowait((0, ClientDisconnect()))

    def _end(self) -> None:
        """Nothing more is wanted: slots are freed, and the log is told."""
        self._ended = True
        for ticket in self._tickets:
            ticket.cancel()
        if self._watch is not None:
            self._watch.cancel()
        usage = self._usage
        self._note.more.update(prompt_tokens=usage.prompt_tokens, new_tokens=usage.completion_tokens)


class _Stream(Response):
    """The lines of a run as a response; however it ends, the run ends."""

    def __init__(self, run: Run, parts: AsyncIterator[tuple[int, Part]], first: tuple[int, Part]) -> None:
        super().__init__(media_type="text/event-stream", headers={"x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._run, self._parts, self._first = run, parts, first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for line in self._run._lines(self._parts, self._first):
                await send({"type": "http.response.body", "body": line, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except asyncio.CancelledError:  # so some servers say that the client has left
            self._run._note.more["left"] = True
            raise
        finally:
            self._run._end()


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What the batcher refuses, as the client is told of it."""
    try:
        yield
    except Overloaded as error:
        wait = str(max(math.ceil(error.retry_after), 1))
        raise ApiError(429, str(error), code="queue_full", headers={"retry-after": wait}) from None
    except Closing as error:
        raise ApiError(503, str(error), code="closing", headers={"retry-after": "10"}) from None
    except GemmaryError as error:
        raise ApiError(400, str(error), code="invalid_value") from None


async def _chained(first: tuple[int, Part], rest: AsyncIterator[tuple[int, Part]]) -> AsyncIterator[tuple[int, Part]]:
    yield first
    async for one in rest:
        yield one


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
