"""Requests that are refused: by name, with a status that says whose mistake it is, and the next one is answered. T6."""

from __future__ import annotations

import json
import random
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from malformed import malformed
from servers import NAME, Server, ask, exchange, post, read_answer

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": NAME, "max_tokens": 2, "messages": [{"role": "user", "content": "Hi"}]}


def refused(server: Server, status: int = 400, **fields: Any) -> str:
    answer = post(server, CHAT, {key: value for key, value in {**BODY, **fields}.items() if value is not ...})
    assert answer.status == status, answer.text
    assert ask(server).status == 200
    return answer.message


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [-0.1, 2.1, "1", True, 1e308]),
        ("top_p", [0, 1.1, -1, "1"]),
        ("top_k", [-1, 1.5, 2**40]),
        ("min_p", [-0.1, 1.1]),
        ("repetition_penalty", [0, -1, 101]),
        ("presence_penalty", [-2.1, 2.1]),
        ("frequency_penalty", [-2.1, 2.1]),
        ("n", [0, -1, 17, 1.5, "2"]),
        ("seed", [1.5, 2**63, "1"]),
        ("max_tokens", [0, -1, 1.5, "5", True]),
        ("stream", [1, "true"]),
        ("stream_options", [True, {"a": 1}]),
        ("logprobs", [1, "yes"]),
        ("model", [5, ...]),
        ("messages", [..., [], {}, "Hi", [5], [[]]]),
        (
            "response_format",
            ["json", {"type": "xml"}, {"type": "json_schema"}, {"type": "json_object", "json_schema": {"schema": {}}}],
        ),
    ],
)
def test_parameters_have_bounds(server: Server, field: str, values: list[Any]) -> None:
    for value in values:
        assert field in refused(server, **{field: value}), value


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_numbers_that_are_none_are_refused(server: Server, literal: str) -> None:
    for field in ("temperature", "seed", "user"):
        body = json.dumps(BODY)[:-1] + f', "{field}": {literal}' + "}"
        answer = post(server, CHAT, body.encode())
        assert answer.status == 400 or (field == "user" and "e999" in literal)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"nonsense", b"[]", b"5", b'"text"', b"null", b'{"a":1}{', b"\xff\xfe{}", b"[" * 100_000, b'{"a":' * 5000,
     b'{"seed": ' + b"9" * 100_000 + b"}", b'{"user": "\\ud800"}', b'{"model": "\xc3"}'],
)  # fmt: skip
def test_a_body_that_is_no_json_object_is_400(server: Server, body: bytes) -> None:
    answer = post(server, CHAT, body)
    assert answer.status == 400
    assert "body" in answer.message


def test_json_must_say_that_it_is(server: Server) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = post(server, CHAT, BODY, headers=f"content-type: {kind}\r\n")
        assert answer.status == 415
        assert "application/json" in answer.message
    assert post(server, CHAT, BODY, headers="content-type: Application/JSON; charset=utf-8\r\n").status == 200


def test_a_body_over_the_limit_is_413_before_it_is_parsed(server: Server) -> None:
    big = json.dumps({**BODY, "user": "x" * (1 << 20)}).encode()
    answer = post(server, CHAT, big)
    assert answer.status == 413
    assert "1048576" in answer.message
    with socket.create_connection(
        ("127.0.0.1", server.port), timeout=10
    ) as connection:  # said, not sent: no wait for it
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1048577\r\n\r\n")
        said = read_answer(connection)
        assert said is not None
        assert said.status == 413
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    answer = exchange(server, head + b"10000\r\n%s\r\n" % (b" " * 0x10000) * 17 + b"0\r\n\r\n")
    assert answer.status == 413
    fits = json.dumps({**BODY, "user": "x" * ((1 << 20) - 200)}).encode()
    assert post(server, CHAT, fits).status == 200


def test_a_head_over_the_limit_is_431(server: Server) -> None:
    for size in (16 << 10, 100_000):
        answer = exchange(server, b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * size + b"\r\n\r\n")
        assert answer.status == 431
        assert "16384" in answer.message
    assert exchange(server, b"GET /" + b"y" * 17000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n").status == 431


def test_what_is_no_http_is_refused_in_the_same_shape(server: Server) -> None:
    answer = exchange(server, b"nonsense\r\n\r\n")
    assert answer.status == 400
    assert "not a valid HTTP" in answer.message


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("tools", [{"type": "function"}], "calls no tools"),
        ("functions", [{}], "calls no tools"),
        ("tool_choice", "auto", "calls no tools"),
        ("audio", {"voice": "x"}, "write text"),
        ("modalities", ["audio"], "write text"),
        ("best_of", 2, "ask for n answers"),
        ("suffix", "x", "does not fill in"),
        ("chat_template", "{{ x }}", "without a template"),
        ("chat_template_kwargs", {"a": 1}, "without a template"),
        ("reasoning_effort", "high", "does not reason apart"),
        ("web_search_options", {}, "searches nothing"),
        ("temprature", 1, "no field 'temprature'"),
        ("guided_json", {}, "no field 'guided_json'"),
    ],
)
def test_what_would_change_the_answer_and_is_not_served_is_refused(
    server: Server, field: str, value: Any, says: str
) -> None:
    assert says in refused(server, **{field: value})


@pytest.mark.parametrize(
    ("roles", "says"),
    [
        (["user", "user"], "message 1"),
        (["assistant"], "message 0"),
        (["user", "assistant"], "message 1, the last, is the model's"),
        (["user", "system", "user"], "message 1"),
        (["system"], "add what the user says"),
        (["tool"], "roles are"),
        (["system", "system", "user"], "message 1"),
    ],
)
def test_roles_that_do_not_alternate_are_400_and_the_next_request_answers(
    server: Server, roles: list[str], says: str
) -> None:
    assert says in refused(server, messages=[{"role": role, "content": "Hi"} for role in roles])


def test_content_must_be_text(server: Server) -> None:
    image = [{"type": "image_url", "image_url": {"url": "http://evil.example/a.png"}}]
    for content in (image, 5, "", "  ", {"text": "a"}, [{"type": "text"}]):
        assert "content" in refused(server, messages=[{"role": "user", "content": content}])
    assert "tool_calls" in refused(server, messages=[{"role": "user", "content": "a", "tool_calls": [{}]}])


def test_an_over_long_prompt_is_400_with_both_lengths(server: Server) -> None:
    message = refused(server, messages=[{"role": "user", "content": "a b c d e f g h " * 500}])
    assert "2048" in message
    assert int(message.split("has ")[1].split()[0]) > 2048
    assert "2048" in refused(server, max_tokens=2040)
    code = post(server, CHAT, {**BODY, "max_tokens": 2048}).json["error"]
    assert code["code"] == "context_length_exceeded"


def test_malformed_requests(server: Server) -> None:
    counts = attacked(server, 1000, seed=6)
    print(f"\nT6 {dict(counts)}, seed 6")
    assert counts["refused"] > 700


def attacked(server: Server, requests: int, seed: int) -> Counter[str]:
    """No crash, no unplanned 5xx, no hang over 5 s; every 50th request is a golden one that must match."""
    golden = ask(server, max_tokens=6, temperature=0).json["choices"]

    def fifty(block: int) -> Counter[str]:
        rng = random.Random(f"{seed} {block}")
        assert ask(server, max_tokens=6, temperature=0).json["choices"] == golden
        counts = Counter(golden=1)
        for i in range(49):
            data = malformed(rng)
            started = time.monotonic()
            status = thrown(server, data)
            assert time.monotonic() - started < 5, (block, i, data)
            assert status is None or status < 500, (block, i, status, data)
            counts["closed" if status is None else "refused" if status >= 400 else "answered"] += 1
        return counts

    with ThreadPoolExecutor(4) as pool:
        counts = sum(pool.map(fifty, range(requests // 50)), Counter[str]())
    assert server.process.poll() is None
    assert not server.said, server.said
    return counts


def thrown(server: Server, data: bytes) -> int | None:
    """The status that a request gets; None where the server closes, also as it waits for more and we leave."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=0.4) as connection, suppress(ConnectionError):
        try:
            connection.sendall(data)
            answer = read_answer(connection)
        except TimeoutError:
            connection.settimeout(5)
            connection.shutdown(socket.SHUT_WR)
            answer = read_answer(connection)
        return None if answer is None else answer.status
    return None
