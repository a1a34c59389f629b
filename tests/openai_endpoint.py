"""A scripted endpoint of OpenAI's API: it answers as a test says, counts, and dies when it is told to."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["OpenAIEndpoint", "Refusal", "judged_by"]

Body = dict[str, Any]


@dataclass(frozen=True)
class Refusal:
    """An error of the API's."""

    status: int
    message: str = "no"
    code: str | None = None
    param: str | None = None


@dataclass
class OpenAIEndpoint:
    """`answer` gives a request's text, or a refusal. After `lives` answers (None: for ever) connections are closed without a word.

    `asked` has the bodies of requests that were answered, `keys` their keys.
    """

    answer: Callable[[Body], str | Refusal]
    models: list[str] = field(default_factory=lambda: ["only"])
    lives: int | None = None
    finish: str = "stop"
    asked: list[Body] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> OpenAIEndpoint:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.socket.close()

    @property
    def url(self) -> str:
        """What goes before #NAME."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def take(self, body: Body, key: str | None) -> str | Refusal | None:
        """An answer, or None where it is dead."""
        with self._lock:
            if self.lives is not None and len(self.asked) >= self.lives:
                return None
            found = self.answer(body)
            if isinstance(found, str):
                self.asked.append(body)
                self.keys.append(key)
            return found


def _handler(endpoint: OpenAIEndpoint) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            models = [{"id": name, "object": "model", "created": 0, "owned_by": "me"} for name in endpoint.models]
            self._send(200, {"object": "list", "data": models})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/v1/chat/completions":
                self._send(404, {"error": {"message": "no such route"}})
                return
            found = endpoint.take(body, self.headers["Authorization"])
            if found is None:
                self.close_connection = True
            elif isinstance(found, Refusal):
                error = {"message": found.message, "type": "invalid", "code": found.code, "param": found.param}
                self._send(found.status, {"error": error})
            else:
                message = {"role": "assistant", "content": found}
                choice = {"index": 0, "message": message, "finish_reason": endpoint.finish}
                about = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"]}
                self._send(200, {**about, "choices": [choice]})

        def _send(self, status: int, data: Body) -> None:
            body = json.dumps(data).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing: the test says what went wrong."""

    return Handler


def judged_by(prefers: Callable[[str, str], str]) -> Callable[[Body], str]:
    """A judge that reads both last answers and decides as `prefers` says: first, second or tie."""

    def answer(body: Body) -> str:
        prompt = body["messages"][0]["content"]
        code = re.findall(r"^Verdict (\w{8}): tie$", prompt, re.MULTILINE)[0]
        texts = dict(re.findall(rf"^<<< {code} ([A-Z, ]+)\n(.*?)\n>>> {code}$", prompt, re.DOTALL | re.MULTILINE))
        return f"I have read both.\nVerdict {code}: {prefers(texts['FIRST'], texts['SECOND'])}"

    return answer
