"""What is seen of a batcher from outside: a fair queue, in which clients take turns, tickets, and where things stand."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gemmary.errors import GemmaryError
from gemmary.infer.engine import Token
from gemmary.infer.steps import Request

__all__ = ["Closing", "Deliver", "Overloaded", "Queue", "Stats", "Ticket"]

Deliver = Callable[[Token | Exception], None]


class Overloaded(GemmaryError):
    """The queue is full; `retry_after` seconds may help."""

    def __init__(self, waiting: int, retry_after: float) -> None:
        super().__init__(f"{waiting} requests are waiting already: try again in {retry_after:.0f} s")
        self.retry_after = retry_after


class Closing(GemmaryError):
    """No more requests are taken."""


@dataclass(eq=False)
class Ticket:
    """A request on its way."""

    request: Request
    deliver: Deliver
    cancelled: bool = False
    ended: bool = False
    _wake: Callable[[], None] = lambda: None

    def cancel(self) -> None:
        """Nothing more is delivered; what it holds is free within a step."""
        self.cancelled = True
        self._wake()


@dataclass(frozen=True)
class Stats:
    """Where things stand, and counts since the start: `cached_tokens` of the prompts were not read again, `right_tokens` of
    the `guessed_tokens` were what was drawn."""

    slots: int
    busy: int
    queued: int
    requests: int
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    guessed_tokens: int
    right_tokens: int


class Queue:
    """At most so many tickets. Whoever uses it from several threads locks."""

    def __init__(self, most: int, slots: int) -> None:
        self._most, self._slots = most, slots
        self._lines: OrderedDict[str, deque[Ticket]] = OrderedDict()

    def __len__(self) -> int:
        return sum(not ticket.cancelled for ticket in self)

    def __iter__(self) -> Iterator[Ticket]:
        return (ticket for line in self._lines.values() for ticket in line)

    def put(self, ticket: Ticket) -> None:
        """At the end of its client's line. Raises Overloaded."""
        waiting = len(self)
        if waiting >= self._most:
            raise Overloaded(waiting, max(1.0, waiting / self._slots))
        self._lines.setdefault(ticket.request.client, deque()).append(ticket)

    def peek(self) -> Ticket | None:
        """Whose turn it is. Those that were cancelled are forgotten."""
        for client, line in list(self._lines.items()):
            self._lines[client] = deque(ticket for ticket in line if not ticket.cancelled)
            if not self._lines[client]:
                del self._lines[client]
        return next(iter(self._lines.values()))[0] if self._lines else None

    def pop(self) -> None:
        """Take the ticket of `peek` out; its client is the last to have another turn."""
        client, line = next(iter(self._lines.items()))
        line.popleft()
        self._lines.move_to_end(client)
        if not line:
            del self._lines[client]

    def clear(self) -> None:
        """Forget all."""
        self._lines.clear()
