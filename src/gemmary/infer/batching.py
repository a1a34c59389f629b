"""Continuous batching: requests come and go while others are answered, a token for each in every step.

One thread owns the device. It reads prompts a chunk at a time, between steps, and each step serves all that are being answered; what
a request comes to does not depend on its neighbours. Requests of different clients take turns. The cache is shared in pages
(`infer.memory`), so a prompt that begins like an earlier text is read from where they part.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gemmary.errors import GemmaryError
from gemmary.infer.drafting import GUESSES, Guessers, Text
from gemmary.infer.engine import Engine, Token
from gemmary.infer.memory import Holding, Memory
from gemmary.infer.steps import Entry, Grammar, Pending, Request, Steps
from gemmary.infer.waiting import Closing, Deliver, Overloaded, Queue, Stats, Ticket

__all__ = ["Batcher", "Closing", "Grammar", "Overloaded", "Request", "Stats", "Ticket"]

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Running:
    """A request that has a slot. `tokens` are the prompt and what was drawn; `read` of them are in the cache, or on the way.

    Guesses are on the way behind them.
    """

    ticket: Ticket
    slot: int
    holding: Holding
    tokens: list[int]
    room: int
    read: int
    guess: list[int] = field(default_factory=list)

    @property
    def guessable(self) -> bool:
        """Whether tokens may be guessed: penalties and grammars must hear of each before the next is drawn."""
        request = self.ticket.request
        return request.grammar is None and not request.sampling.penalized

    @property
    def prompt_length(self) -> int:
        return len(self.ticket.request.prompt)


class Batcher:
    """Serves requests on a thread of its own.

    `slots` are answered at once, `queue` may wait, and the cache takes `memory` bytes (default: enough for every slot, of a
    moderate length). With `guessers` several tokens of a request may come in a step, the same as without. Raises GemmaryError
    where the memory is too small for the model.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        slots: int = 8,
        queue: int = 128,
        memory: int | None = None,
        guessers: Guessers | None = None,
    ) -> None:
        if slots < 1 or queue < 1:
            raise GemmaryError(f"{slots} slots and a queue of {queue}: both must be at least 1")
        self._steps = Steps(engine, slots, memory, guesses=GUESSES if guessers else 0)
        self._guessers = guessers
        self._slots = slots
        self._engine = engine
        self._waiting = Queue(queue, slots)
        self._running: dict[int, _Running] = {}
        self._reading: _Running | None = None
        self._pending: tuple[list[_Running], Pending] | None = None
        self._changed = threading.Condition()
        self._closing: float | None = None
        self._counts = dict.fromkeys(
            ("requests", "prompt_tokens", "cached_tokens", "new_tokens", "guessed_tokens", "right_tokens"), 0
        )
        self._thread = threading.Thread(target=self._serve, name="gemmary-batcher", daemon=True)
        self._thread.start()

    @property
    def _memory(self) -> Memory:
        return self._steps.memory

    @property
    def alive(self) -> bool:
        """Whether the thread that makes answers still runs."""
        return self._thread.is_alive()

    @property
    def longest(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self._memory.longest

    def submit(self, request: Request, deliver: Deliver) -> Ticket:
        """Queue a request. `deliver` is called on the batcher's thread with each token, the last of which has a `finish`
        ("stop" or "length"), or with an exception, which is the last call.

        Raises GemmaryError for what cannot be served, `Overloaded` where the queue is full, `Closing` at the end.
        """
        self._engine.check([request.prompt], request.max_new_tokens, request.top_logprobs)
        if len(request.prompt) >= self.longest:
            raise GemmaryError(
                f"the prompt has {len(request.prompt)} tokens and there is memory for {self.longest} with the answer: "
                "shorten it, or give the server more memory"
            )
        known = self._steps.num_tokens
        if wrong := next((i for i in request.bias if not 0 <= i < known), None):
            raise GemmaryError(f"a bias for token {wrong}: token ids go from 0 to {known - 1} in this model")
        ticket = Ticket(request, deliver, _wake=self._wake)
        with self._changed:
            if self._closing is not None:
                raise Closing("the server is shutting down")
            self._waiting.put(ticket)
            self._changed.notify()
        return ticket

    def stats(self) -> Stats:
        """Where things stand."""
        with self._changed:
            busy = len(self._running) + (self._reading is not None)
            return Stats(slots=self._slots, busy=busy, queued=len(self._waiting), **self._counts)

    def close(self, grace: float = 0.0) -> None:
        """Take no more; let what was taken finish for `grace` seconds, then end the rest with `Closing`. Waits for it."""
        with self._changed:
            if self._closing is None:
                self._closing = time.monotonic() + grace
            self._changed.notify()
        self._thread.join()

    def warm_up(self, on_progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Compile the shapes that requests need, before the first one comes. Not while requests are served."""
        if self._guessers is not None:
            self._guessers.warm_up()
        self._steps.warm_up(on_progress)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def _busy(self) -> bool:
        return bool(self._running or self._reading or self._pending)

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not (self._busy() or self._waiting or self._closing is not None):
                    self._changed.wait()
                over = self._closing is not None and (
                    time.monotonic() > self._closing or not (self._busy() or self._waiting)
                )
            if over:
                self._end_all(Closing("the server is shutting down"))
                return
            try:
                self._turn()
            except Exception as error:  # whatever it is, callers must hear of it, and the next ones be served
                log.exception("a step failed")
                self._end_all(error)
                self._steps.reset()
                if self._guessers is not None:
                    self._guessers.reset()

    def _turn(self) -> None:
        """One round: let go of what was cancelled, read a chunk of one prompt, and draw a token for each that is answered."""
        for one in [*self._running.values(), *([self._reading] if self._reading else [])]:
            if one.ticket.cancelled:
                self._leave(one)
        if self._reading is None:
            self._reading = self._admit()
        if self._reading is not None:
            self._read(self._reading)
        if self._running or self._pending:
            self._step()
        elif self._reading is None and self._waiting:
            time.sleep(0.001)  # no room for the next one until somebody lets go

    def _admit(self) -> _Running | None:
        """The next request, if there are a slot and pages for it. Clients take turns."""
        with self._changed:
            free = next(slot for slot in itertools.count() if slot not in self._running)
            ticket = self._waiting.peek()
            if ticket is None or free >= self._slots:
                return None
            request = ticket.request
            room = min(len(request.prompt) + request.max_new_tokens, self.longest)
            holding = self._memory.begin(request.prompt, room)
            if holding is None:
                return None
            self._waiting.pop()
            self._counts["requests"] += 1
            self._counts["prompt_tokens"] += len(request.prompt)
            self._counts["cached_tokens"] += holding.cached
        return _Running(ticket, free, holding, list(request.prompt), room, holding.cached)

    def _read(self, one: _Running) -> None:
        """A chunk of a prompt; after its last, the first token."""
        width = self._steps.chunk if not (self._running or one.read) else self._steps.small_chunk
        end = min(one.read + width, one.prompt_length)
        self._memory.advance(one.holding, one.read, end)
        self._steps.read(one.holding, one.tokens, one.read, end)
        one.read = end
        self._memory.record(one.holding, one.tokens[:end])
        if end < one.prompt_length:
            return
        request = one.ticket.request
        self._steps.begin(one.slot, request)
        self._reading, self._running[one.slot] = None, one
        if self._guessers is not None and one.guessable:
            self._guessers.begin(one.slot, request.prompt, one.room)
        self._take([one], self._steps.first(one.slot, request, one.prompt_length - 1).tokens())

    def _step(self) -> None:
        """A token or more for each that is answered: the next step is on its way while the tokens of the one before are read."""
        before, self._pending = self._pending, None
        guesses = self._guessers is not None and any(one.guessable for one in self._running.values())
        if before and (guesses or any(one.ticket.request.grammar is not None for one in self._running.values())):
            self._take(before[0], before[1].tokens())  # what is drawn next depends on them
            before = None
        those = [one for one in self._running.values() if one.read < one.room - 1]
        if guesses:
            self._guess(those)
        entries = []
        for one in those:
            self._memory.advance(one.holding, one.read, one.read + 1 + len(one.guess))
            fed = [one.tokens[one.read] if one.read < len(one.tokens) else -1, *one.guess]
            entries += [Entry(one.slot, one.ticket.request, one.holding, one.read + i, id) for i, id in enumerate(fed)]
        if those:
            self._pending = those, self._steps.next(entries)
        for one in those:
            one.read += 1
        if before:
            self._take(before[0], before[1].tokens())

    def _guess(self, those: Sequence[_Running]) -> None:
        """Have tokens guessed, as many as the widest step has rows for."""
        assert self._guessers is not None
        each = min(GUESSES, self._steps.widest // max(len(those), 1) - 1)
        guessed = [one for one in those if one.guessable and each > 0]
        texts = [Text(one.slot, one.tokens, min(each, one.room - len(one.tokens) - 1)) for one in guessed]
        for one, guess in zip(guessed, self._guessers.guess(texts), strict=True):
            one.guess = guess
            self._counts["guessed_tokens"] += len(guess)

    def _take(self, those: Sequence[_Running], drawn: Sequence[Token]) -> None:
        """Deliver tokens, and let go of the requests that they end."""
        rows = iter(drawn)
        for one in those:
            guess, one.guess = one.guess, []
            mine = list(itertools.islice(rows, 1 + len(guess)))
            for i, token in enumerate(mine):
                if one.ticket.ended:  # while its last step was on the way, or by the token before
                    break
                self._accept(one, token)
                if i == len(guess) or token.id != guess[i] or one.ticket.ended:
                    break
                one.read += 1
                self._counts["right_tokens"] += 1

    def _accept(self, one: _Running, token: Token) -> None:
        """The next token of a request."""
        request = one.ticket.request
        one.tokens.append(token.id)
        if request.grammar is not None and token.id not in request.stop_ids:
            request.grammar.accept(token.id)
        finish = self._finish(one, token.id)
        with self._changed:
            self._counts["new_tokens"] += 1
        if not one.ticket.cancelled:
            self._deliver(one.ticket, token._replace(row=0, finish=finish))
        if finish is not None:
            self._leave(one)

    @staticmethod
    def _finish(one: _Running, token: int) -> str | None:
        request = one.ticket.request
        if token in request.stop_ids or (request.grammar is not None and request.grammar.done()):
            return "stop"
        return "length" if len(one.tokens) >= one.room else None

    @staticmethod
    def _deliver(ticket: Ticket, what: Token | Exception) -> None:
        try:
            ticket.deliver(what)
        except Exception:
            log.exception("a listener failed: its request is cancelled")
            ticket.cancelled = True

    def _leave(self, one: _Running) -> None:
        """Free what a request holds; what it has read stays known until the pages are needed."""
        self._memory.record(one.holding, one.tokens[: min(one.read, len(one.tokens) - 1)])
        self._memory.end(one.holding)
        one.ticket.ended = True
        if self._guessers is not None:
            self._guessers.end(one.slot)
        with self._changed:
            if one is self._reading:
                self._reading = None
            self._running.pop(one.slot, None)

    def _end_all(self, why: Exception) -> None:
        with self._changed:
            tickets = [one.ticket for one in self._running.values()]
            tickets += [self._reading.ticket] if self._reading else []
            tickets += list(self._waiting)
            self._running, self._reading, self._pending = {}, None, None
            self._waiting.clear()
        for ticket in tickets:
            if not ticket.cancelled:
                self._deliver(ticket, why)
