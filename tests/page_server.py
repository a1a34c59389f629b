"""A scripted stand-in for the model server: it serves the real page under its real policy, and answers as a test says."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import gemmary

PAGE = Path(gemmary.__file__).parent / "serve" / "chat.html"
MODEL = "nano"


def policy(page: bytes) -> str:
    """The header that the server sends with the page."""

    def hashed(tag: bytes) -> str:
        (inside,) = re.findall(rb"<%s>(.*?)</%s>" % (tag, tag), page, re.DOTALL)
        return base64.b64encode(hashlib.sha256(inside).digest()).decode()

    return (
        f"default-src 'none'; script-src 'sha256-{hashed(b'script')}'; style-src 'sha256-{hashed(b'style')}'; "
        "connect-src 'self'; img-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )


def events(*texts: str, finish: str = "stop", usage: tuple[int, int] | None = (7, 5), done: bool = True) -> list[bytes]:
    """An answer's stream, an event for each text."""
    bodies: list[dict[str, Any]] = [{"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}]
    bodies += [{"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]} for text in texts]
    bodies.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
    if usage:
        counts = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}
        bodies.append({"choices": [], "usage": counts})
    lines = [f"data: {json.dumps(body, ensure_ascii=False)}\n\n".encode() for body in bodies]
    return [*lines, b"data: [DONE]\n\n"] if done else lines


@dataclass(frozen=True)
class Reply:
    """What one request gets: pieces of a stream in turn, seconds or an event to wait for between them; or an error.

    `broken` ends the connection without the last chunk, as a lost one does.
    """

    pieces: Sequence[bytes | float | threading.Event] = ()
    status: int = 200
    error: str = ""
    retry_after: int | None = None
    broken: bool = False


@dataclass
class PageServer:
    """Replies are used up in turn; `reply_to` makes one where none is left. `asked` holds the bodies of chat requests."""

    replies: list[Reply] = field(default_factory=list)
    reply_to: Callable[[dict[str, Any]], Reply] = lambda body: Reply(events("Yes."))
    key: str | None = None
    models: list[str] = field(default_factory=lambda: [MODEL])
    loading: bool = False
    asked: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    gone: int = 0
    """Answers whose reader went away before their end."""

    def __enter__(self) -> PageServer:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.socket.close()

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/"


def _handler(server: PageServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # a piece of a stream is sent when it is there

        def do_GET(self) -> None:
            server.paths.append(self.path)
            if self.path == "/":
                page = PAGE.read_bytes()
                self._send(200, page, "text/html; charset=utf-8", {"Content-Security-Policy": policy(page)})
            elif self.path == "/favicon.ico":
                self._send(204, b"", "image/x-icon")
            elif self.path == "/v1/models" and self._may():
                if server.loading:
                    self._error(503, "the model is being loaded")
                else:
                    listed = {"object": "list", "data": [{"id": name, "object": "model"} for name in server.models]}
                    self._send(200, json.dumps(listed).encode(), "application/json")
            elif self.path != "/v1/models":
                self._error(404, "there is nothing here")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not self._may():
                return
            server.asked.append(body)
            reply = server.replies.pop(0) if server.replies else server.reply_to(body)
            if reply.status != 200:
                wait = {} if reply.retry_after is None else {"Retry-After": str(reply.retry_after)}
                self._error(reply.status, reply.error, wait)
                return
            try:
                self._stream(reply)
            except OSError:
                server.gone += 1
                self.close_connection = True

        def _may(self) -> bool:
            if server.key is None or self.headers["Authorization"] == f"Bearer {server.key}":
                return True
            self._error(401, "the API key is missing or wrong")
            return False

        def _stream(self, reply: Reply) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for piece in reply.pieces:
                if isinstance(piece, threading.Event):
                    while not piece.wait(0.02):  # a comment now and then shows whether anybody still reads
                        self._chunk(b": waiting\n\n")
                elif isinstance(piece, float):
                    time.sleep(piece)
                elif piece:
                    self._chunk(piece)
            if reply.broken:
                self.close_connection = True
            else:
                self.wfile.write(b"0\r\n\r\n")

        def _chunk(self, data: bytes) -> None:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

        def _error(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
            body = json.dumps({"error": {"message": message, "type": "error", "code": status}}).encode()
            self._send(status, body, "application/json", headers)

        def _send(self, status: int, body: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing: the test says what went wrong."""

    return Handler
