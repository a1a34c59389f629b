"""One connection: HTTP as uvicorn reads it, with what it lacks against the slow, the broken and the vanished.

A request's head and body must come within the read timeout, from its first byte; a client that does not read its answer
is dropped; what is no HTTP is refused in the API's own shape. uvicorn stops reading when a client sends more while its
answer is made, and then does not see it leave: here what comes early is kept aside, and reading goes on.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from gemmary.errors import GemmaryError
from gemmary.serve.protocol import LIMITS, ApiError

__all__ = ["Connection", "listening"]

_MOST_EARLY = 64 << 10
_MOST_DRAINED = 64 << 20
_MOST_CONNECTIONS = 4096


class Connection(H11Protocol):
    """uvicorn's protocol, guarded."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come; it has so many seconds for its first request."""
        super().connection_made(transport)
        self._early, self._received = b"", 0
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None
        if len(self.connections) > _MOST_CONNECTIONS:
            transport.abort()
        else:
            self._await_rest()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has left: nothing is awaited any more."""
        for timer in (self._reading, self._writing):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of a request; those that come before the last answer is out wait for it."""
        if self._answering():
            self._early += data
            if len(self._early) > _MOST_EARLY:
                self.transport.abort()
            return
        self._received += len(data)
        if self._received > _MOST_DRAINED:  # refused for its size already, and still sending
            self.transport.abort()
            return
        super().data_received(data)
        self._await_rest()

    def on_response_complete(self) -> None:
        """The answer is out: now what came early."""
        super().on_response_complete()
        if self.transport.is_closing():
            return
        early, self._early = self._early, b""
        if early:
            self.data_received(early)
        elif self.conn.trailing_data[0]:
            self._await_rest()

    def pause_writing(self) -> None:
        """The client does not read: it has so many seconds to."""
        super().pause_writing()
        self._writing = self.loop.call_later(LIMITS.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """It reads again."""
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP request."""
        error = sys.exc_info()[1]
        status = getattr(error, "error_status_hint", 400)
        if status == 431:
            self._refuse(ApiError(431, f"the headers are over the limit of {LIMITS.headers} bytes"))
        else:
            self._refuse(ApiError(400, "this is not a valid HTTP/1.1 request"))

    def _answering(self) -> bool:
        """A whole request has come, and its answer is not out."""
        cycle: Any = self.cycle
        return cycle is not None and not cycle.response_complete and not cycle.more_body

    def _idle(self) -> bool:
        """Nothing of a next request has come."""
        return self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]

    def _await_rest(self) -> None:
        """Set the clock where a request has begun and is not whole; stop it where one is."""
        if self._answering() or (self._received and self._idle()):
            self._received = 0
            if self._reading is not None:
                self._reading.cancel()
                self._reading = None
        elif self._reading is None and not self.transport.is_closing():
            self._reading = self.loop.call_later(LIMITS.read_seconds, self._too_slow)

    def _too_slow(self) -> None:
        if self._idle():
            self.transport.close()
            return
        self._refuse(ApiError(408, f"the request did not come within {LIMITS.read_seconds:g} seconds"))

    def _refuse(self, refusal: ApiError) -> None:
        """Say so where nothing has been said yet, and close."""
        if not self.transport.is_closing() and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(refusal.body()).encode()
            headers = [
                ("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")
            ]  # fmt: skip
            head = h11.Response(status_code=refusal.status, headers=headers, reason=STATUS_PHRASES[refusal.status])
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
        if self.cycle is not None:  # whoever waits for the body, or would answer, learns that nobody is there
            self.cycle.disconnected = True
            self.cycle.message_event.set()


def listening(host: str, port: int) -> tuple[socket.socket, str]:
    """A socket on this address, and the URL of what answers there; port 0 leaves the choice to the system.

    Raises GemmaryError where the address cannot be had.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.create_server(address[:2], family=family)
    except OSError as error:
        why = (error.strerror or str(error)).partition(" (while")[0]
        raise GemmaryError(f"cannot listen on {host} port {port}: {why}; choose another with --port") from None
    name, chosen = made.getsockname()[:2]
    return made, f"http://{f'[{name}]' if ':' in name else name}:{chosen}"
