"""Servers as processes, and clients that speak to them as bytes."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai

__all__ = ["NAME", "Answer", "Server", "ask", "exchange", "post", "post_bytes", "read_answer", "started", "until"]

NAME = "nano"


class Server:
    """`gemmary serve` in a process of its own."""

    def __init__(self, model: Path, *arguments: str, key: str = "", ready: bool = True) -> None:
        environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=1"}
        environment |= {"GEMMARY_API_KEY": key} if key else {}
        command = [sys.executable, "-m", "gemmary.cli", "serve", str(model), "--name", NAME, "--port", "0", *arguments]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.key, self.lines, self.address = key, list[dict[str, Any]](), ""
        self.said: list[str] = []
        self._client: openai.OpenAI | None = None
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        wanted = "ready" if ready else "listening"
        until(lambda: self.events(wanted) or self.process.poll() is not None, 120)
        if not self.events(wanted):
            self.stop()
            raise AssertionError(self.said)

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if not line.startswith("{"):
                self.said.append(line)
                continue
            found = json.loads(line)
            self.lines.append(found)
            self.address = self.address or found.get("address", "")

    def events(self, event: str) -> list[dict[str, Any]]:
        """Lines of the log."""
        return [line for line in list(self.lines) if line["event"] == event]

    @property
    def port(self) -> int:
        return urlsplit(self.address).port or 0

    def client(self) -> openai.OpenAI:
        """The official client, which does not try again; closed with the server."""
        if self._client is None:
            self._client = openai.OpenAI(base_url=f"{self.address}/v1", api_key=self.key or "none", max_retries=0)
        return self._client

    def stats(self) -> dict[str, float]:
        """Prometheus's samples, without those of histograms' buckets."""
        text = exchange(
            self, f"GET /metrics HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {self.key}\r\n\r\n"
        ).text
        return {name: float(value) for name, value in re.findall(r"^(gemmary_\w+) (\S+)$", text, re.MULTILINE)}

    def memory(self) -> int:
        """Resident bytes."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def stop(self, wait: float = 30) -> int:
        """SIGTERM, and the exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(wait)
        finally:
            self.process.kill()
            self._listener.join()
            if self.process.stderr is not None:
                self.process.stderr.close()
            if self._client is not None:
                self._client.close()


@contextmanager
def started(model: Path, *arguments: str, **options: Any) -> Iterator[Server]:
    """A server that ends with the block."""
    server = Server(model, *arguments, **options)
    try:
        yield server
    finally:
        server.stop()


def until(what: Any, seconds: float, every: float = 0.02) -> Any:
    """Wait for something to be true; it comes back. Fails after so many seconds."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, f"not within {seconds} seconds"
        time.sleep(every)
    return found


class Answer:
    """An HTTP answer, read to its end."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def message(self) -> str:
        """What an error says; its shape is checked."""
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}, error
        assert "Traceback" not in error["message"]
        return str(error["message"])


def read_answer(connection: socket.socket) -> Answer | None:
    """An answer, or None where the server closed without one."""
    data = b""
    while b"\r\n\r\n" not in data:
        if not (more := connection.recv(65536)):
            assert not data, data
            return None
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {line.partition(":")[0].lower(): line.partition(":")[2].strip() for line in lines}
    if headers.get("transfer-encoding") == "chunked":
        while not body.endswith(b"0\r\n\r\n") and (more := connection.recv(65536)):
            body += more
    else:
        while len(body) < int(headers.get("content-length", "0")) and (more := connection.recv(65536)):
            body += more
    return Answer(int(first.split()[1]), headers, body)


def exchange(server: Server, request: str | bytes, timeout: float = 60) -> Answer:
    """Send bytes, read one answer."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=timeout) as connection:
        connection.sendall(request if isinstance(request, bytes) else request.encode())
        answer = read_answer(connection)
        assert answer is not None
        return answer


def post_bytes(path: str, body: bytes, headers: str = "content-type: application/json\r\n") -> bytes:
    """A POST request."""
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\n{headers}content-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def post(server: Server, path: str, body: Any, **options: Any) -> Answer:
    """POST JSON (or bytes as they are)."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return exchange(server, post_bytes(path, data, **options))


def ask(server: Server, text: str = "Hi", **fields: Any) -> Answer:
    """One chat completion."""
    body = {"model": NAME, "messages": [{"role": "user", "content": text}], "max_tokens": 4, **fields}
    return post(server, "/v1/chat/completions", body)
