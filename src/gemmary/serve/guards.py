"""Before and around every route: whose page, which host, which key, how much; one log line and one count for each request.

Host names are checked where the server is on a loopback address: a page elsewhere may point a name of its own at this
machine, and its scripts would then be of the same origin. Other origins' pages are let in by name only.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gemmary.serve.metrics import Metrics
from gemmary.serve.protocol import LIMITS, ApiError
from gemmary.serve.settings import Settings

__all__ = ["FAULT", "Guards", "Note", "body_of", "log", "refused"]

_OPEN = {"/", "/health", "/favicon.ico"}
_ROUTES = {*_OPEN, "/metrics", "/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/embeddings"}
_ALWAYS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


_writing = threading.Lock()
FAULT = ApiError(500, "this is a fault of the server's; its log says more")


@dataclass
class Note:
    """What a route tells the log: counts, never text. `client` is whom the fair queue takes the request to be from."""

    id: str
    client: str
    more: dict[str, Any] = field(default_factory=dict)


def log(event: str, **more: Any) -> None:
    """One JSON line on stderr; threads do not write into each other's."""
    time_ = datetime.now(UTC).isoformat(timespec="milliseconds")
    line = json.dumps({"time": time_, "event": event, **more}, ensure_ascii=False)
    with _writing:
        print(line, file=sys.stderr, flush=True)


class Guards:
    """The outermost layer: refuses, logs, counts, and turns what nobody foresaw into a 500 without a word of code."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._keys = [_digest(key) for key in settings.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status, complete = time.perf_counter(), 0, False
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        note = Note(uuid.uuid4().hex, (scope.get("client") or ("",))[0])
        scope.setdefault("state", {})["note"] = note
        added = self._added(headers, note)

        async def answer(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                given = {name for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *(pair for pair in added if pair[0] not in given)]
            else:
                complete = not message.get("more_body", False)
            await send(message)

        try:
            try:
                response = self._check(scope, headers, note)
                await (response or self._app)(scope, receive, answer)
            except ApiError as refusal:
                await refused(refusal)(scope, receive, answer)
            except Exception as error:
                note.more["error"] = _where(error)
                if status and not complete:
                    raise _BrokenOffError from None  # the answer has begun: only closing the connection says that it is not whole
                if not status:
                    await refused(FAULT)(scope, receive, answer)
        finally:
            self._record(scope, note, status or 499, time.perf_counter() - started)

    def _check(self, scope: Scope, headers: Mapping[str, str], note: Note) -> Response | None:
        """Raises ApiError; gives an answer where that is all there is to say; else None."""
        size = len(scope["raw_path"]) + len(scope["query_string"])
        if size + sum(len(name) + len(value) for name, value in scope["headers"]) > LIMITS.headers:
            raise ApiError(431, f"the headers are over the limit of {LIMITS.headers} bytes")
        host = headers.get("host", "localhost")
        if self._settings.loopback and _name_of(host) not in {"localhost", "127.0.0.1", "[::1]", self._settings.host}:
            raise ApiError(403, f"this server is on a loopback address and is not called {host[:80]!r}: use 127.0.0.1")
        origin = headers.get("origin")
        if scope["method"] == "OPTIONS" and origin is not None and "access-control-request-method" in headers:
            if origin != self._settings.allow_origin:
                raise ApiError(403, "pages of other origins may not use this server; --allow-origin lets one in")
            return Response(status_code=204)
        if self._keys and scope["path"] not in _OPEN:
            note.client = self._client(headers.get("authorization", ""))
        length = headers.get("content-length", "0")
        if not length.isdigit() or len(length) > 15 or int(length) > LIMITS.body:
            raise ApiError(413, f"the body is over the limit of {LIMITS.body} bytes", code="body_too_large")
        return None

    def _client(self, authorization: str) -> str:
        """Which key this is. Every key is compared, each in constant time."""
        kind, _, key = authorization.partition(" ")
        digest = _digest(key.strip())
        same = [hmac.compare_digest(digest, known) for known in self._keys]
        if kind.lower() != "bearer" or not any(same):
            message = (
                "the API key is wrong" if authorization else "this server wants an API key: Authorization: Bearer …"
            )
            raise ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        return f"key {same.index(True) + 1}"

    def _added(self, headers: Mapping[str, str], note: Note) -> list[tuple[bytes, bytes]]:
        """What every answer's head has."""
        added = {**_ALWAYS, "x-request-id": note.id}
        if self._settings.allow_origin is not None:
            added["vary"] = "Origin"
            if headers.get("origin") == self._settings.allow_origin:
                added["access-control-allow-origin"] = self._settings.allow_origin
                added["access-control-allow-methods"] = "GET, POST"
                added["access-control-allow-headers"] = "authorization, content-type"
                added["access-control-expose-headers"] = "retry-after, x-request-id"
                added["cross-origin-resource-policy"] = "cross-origin"
        return [(name.encode(), value.encode()) for name, value in added.items()]

    def _record(self, scope: Scope, note: Note, status: int, seconds: float) -> None:
        path = scope["path"]
        route = path if path in _ROUTES else "/v1/models/{id}" if path.startswith("/v1/models/") else "other"
        self._metrics.requests.labels(route, str(status)).inc()
        if route.startswith("/v1/"):
            self._metrics.seconds.observe(seconds)
        about = {"id": note.id, "client": note.client, "method": scope["method"][:16], "route": route, "status": status}
        log("request", **about, ms=round(seconds * 1000, 1), **note.more)


class _BrokenOffError(Exception):
    """An answer that broke off; uvicorn closes the connection."""


def refused(refusal: ApiError) -> Response:
    """A refusal as a response."""
    return JSONResponse(refusal.body(), refusal.status, headers=dict(refusal.headers))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _name_of(host: str) -> str:
    """A Host header without its port."""
    name = host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]
    return name.lower().rstrip(".")


def _where(error: Exception) -> str:
    """What broke and where, without the message, which may quote a prompt."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    return " < ".join([type(error).__name__, *(f"{frame.filename}:{frame.lineno}" for frame in reversed(frames))])


async def body_of(request: Request, most: int) -> bytes:
    """The body. Raises ApiError for more than `most` bytes, and for what does not say that it is JSON: a form of another page's cannot say so."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "send JSON, with the header Content-Type: application/json")
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > most:
            raise ApiError(413, f"the body is over the limit of {most} bytes", code="body_too_large")
    return bytes(body)
