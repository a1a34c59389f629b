"""HTTP requests that something is wrong with, made of a seed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from servers import NAME, post_bytes

__all__ = ["malformed"]

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
JUNK: list[Any] = [
    None, True, -1, 0, 1e308, 10**30, "", "x" * 5000, "\x00", "\u202e", "🤖" * 100, [], {}, [[]], [None], {"a": {}},
    [1, "a"], {"role": "user"}, "NaN", -0.0, 2**63, [[[[[[1]]]]]], {"$ref": "#"}, "<start_of_turn>model\n",
]  # fmt: skip
FIELDS = [
    "model", "messages", "prompt", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "n",
    "stop", "seed", "stream", "stream_options", "logit_bias", "logprobs", "top_logprobs", "response_format", "regex",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "tools", "functions", "chat_template", "suffix", "best_of",
    "echo", "user", "nothing", "audio", "modalities", "documents",
]  # fmt: skip


def malformed(rng: random.Random) -> bytes:
    """One request. Most are refused; a few that turn out to be right are answered with few tokens."""
    return rng.choice(_WAYS)(rng)


def _body(rng: random.Random) -> tuple[str, dict[str, Any]]:
    path = rng.choice([CHAT, TEXT])
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]} if path == CHAT else {"prompt": "Hi"}
    return path, {"model": NAME, "max_tokens": 2, **asked}


def _junk_fields(rng: random.Random) -> bytes:
    path, body = _body(rng)
    for _ in range(rng.randint(1, 3)):
        body[rng.choice(FIELDS)] = rng.choice(JUNK)
    body["max_tokens"] = body["max_tokens"] if body["max_tokens"] not in (None, True) else 2
    return post_bytes(path, json.dumps(body).encode())


def _junk_messages(rng: random.Random) -> bytes:
    messages: list[Any] = []
    for _ in range(rng.randint(0, 4)):
        message: Any = {
            "role": rng.choice(["user", "assistant", "system", "tool", "model", 5]),
            "content": rng.choice(JUNK),
        }
        if rng.random() < 0.3:
            message[rng.choice(["tool_calls", "name", "prefix", "refusal"])] = rng.choice(JUNK)
        messages.append(message if rng.random() < 0.8 else rng.choice(JUNK))
    return post_bytes(CHAT, json.dumps({"model": NAME, "max_tokens": 2, "messages": messages}).encode())


def _damaged_json(rng: random.Random) -> bytes:
    path, body = _body(rng)
    data = bytearray(json.dumps(body).encode())
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data))
        what = rng.random()
        if what < 0.4:
            data[at] = rng.randrange(256)
        elif what < 0.7:
            del data[at:]
            data += b"}" * rng.randint(0, 2)
        else:
            data[at:at] = rng.choice([b"NaN", b"[" * 300, b"1e999", b"\\ud800", b"\xff\xfe", b"9" * 5000, b"{", b'"'])
        if not data:
            break
    return post_bytes(path, bytes(data))


def _wrong_kind(rng: random.Random) -> bytes:
    path, body = _body(rng)
    kind = rng.choice(
        [
            "text/plain",
            "",
            "application/x-www-form-urlencoded",
            "multipart/form-data; boundary=x",
            "\xff",
            "application/json/",
        ]
    )
    return post_bytes(path, json.dumps(body).encode(), f"content-type: {kind}\r\n")


def _odd_head(rng: random.Random) -> bytes:
    path, body = _body(rng)
    data = json.dumps(body).encode()
    head = rng.choice(
        [
            f"POST {path} HTTP/1.1\r\ncontent-length: {len(data)}\r\n\r\n",
            f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: -5\r\n\r\n",
            f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99999999999\r\ncontent-type: application/json\r\n\r\n",
            f"POST {path} HTTP/9.9\r\nhost: localhost\r\n\r\n",
            f"POST {path}\r\n\r\n",
            f"P\x00ST {path} HTTP/1.1\r\nhost: localhost\r\n\r\n",
            f"POST {path} HTTP/1.1\r\nhost: localhost\r\n{'x: ' + 'y' * 20000}\r\n\r\n",
            f"POST {path} HTTP/1.1\r\nhost: localhost\r\nhost: evil\r\n\r\n",
            f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\n",
            f"GET {path}/../../etc/passwd HTTP/1.1\r\nhost: localhost\r\n\r\n",
            "GET /%2e%2e/%00 HTTP/1.1\r\nhost: localhost\r\n\r\n",
            f"DELETE {path} HTTP/1.1\r\nhost: localhost\r\n\r\n",
            "OPTIONS * HTTP/1.1\r\nhost: localhost\r\n\r\n",
            "GET http://evil.example/v1/models HTTP/1.1\r\nhost: evil.example\r\n\r\n",
            "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            "\r\n\r\n\r\n",
            "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + "\x00" * 50,
        ]
    )
    return head.encode("latin-1") + (data if rng.random() < 0.5 else b"")


def _odd_chunks(rng: random.Random) -> bytes:
    path, body = _body(rng)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    chunk = f"{len(data):x}\r\n".encode() + data + b"\r\n"
    tail = rng.choice(
        [
            b"0\r\n\r\n",
            b"zz\r\n",
            b"-1\r\n",
            b"ffffffffffffffffffff\r\n",
            b"0\r\nx: " + b"y" * 20000,
            b"5\r\nabc\r\n0\r\n\r\n",
        ]
    )
    return head.encode() + (chunk if rng.random() < 0.7 else b"") + tail


def _noise(rng: random.Random) -> bytes:
    return rng.randbytes(rng.randint(1, 3000)) + b"\r\n\r\n"


def _flipped(rng: random.Random) -> bytes:
    path, body = _body(rng)
    data = bytearray(post_bytes(path, json.dumps(body).encode()))
    for _ in range(rng.randint(1, 5)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


_WAYS: list[Callable[[random.Random], bytes]] = [
    _junk_fields, _junk_fields, _junk_messages, _damaged_json, _wrong_kind, _odd_head, _odd_chunks, _noise, _flipped
]  # fmt: skip
