"""Clients that are slow, that leave, that send too early: each costs the server nothing for long. T7."""

from __future__ import annotations

import json
import random
import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import openai
import pytest
from servers import NAME, Answer, Server, ask, exchange, post_bytes, read_answer, until

from gemmary.text import Tokenizer

CHAT = "/v1/chat/completions"


@contextmanager
def connected(server: Server, timeout: float = 20) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=timeout) as connection:
        yield connection


def long_request(tiny: Tokenizer, **fields: Any) -> bytes:
    """An answer that takes long: it never ends by itself."""
    never_ends = {str(id): -100 for id in tiny.stop_ids}
    body = {
        "model": NAME,
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 1900,
        "logit_bias": never_ends,
    }
    return post_bytes(CHAT, json.dumps({**body, **fields}).encode())


@pytest.fixture(scope="module", autouse=True)
def warm(server: Server, tiny: Tokenizer) -> None:
    """Steps of one answer and of two are compiled, with and without biases."""
    for fields in ({}, {"logit_bias": {str(tiny.eos): -100}}):
        for n in (1, 2):
            assert ask(server, n=n, **fields).status == 200


def busy(server: Server) -> tuple[float, float]:
    stats = server.stats()
    return stats["gemmary_busy"], stats["gemmary_queued"]


def free_within_a_second(server: Server) -> float:
    """Seconds until no answer is made and none waits."""
    started = time.monotonic()
    until(lambda: busy(server) == (0, 0), 1)
    return time.monotonic() - started


def test_slow_clients_are_dropped(server: Server) -> None:
    request = post_bytes(CHAT, b'{"model":"nano"}')
    head = request.index(b"\r\n\r\n")

    def dropped(sent: int, drips: bytes) -> tuple[float, Answer | None]:
        started = time.monotonic()
        with connected(server) as connection:
            connection.sendall(request[:sent])
            connection.settimeout(1)
            while time.monotonic() - started < 15:
                with suppress(TimeoutError):
                    answer = read_answer(connection)
                    return time.monotonic() - started, answer
                if drips and time.monotonic() - started < 8.5:
                    connection.sendall(drips)  # a byte now and then is no excuse
        raise AssertionError("still connected")

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(dropped, (0, 20, head + 4, head + 9), (b"", b"x", b" ", b"")))
    assert all(9 < seconds < 12 for seconds, _ in found), found
    assert found[0][1] is None
    for _, answer in found[1:]:
        assert answer is not None
        assert answer.status == 408
        assert "within 10 seconds" in answer.message
    assert ask(server).status == 200


def test_a_connection_is_used_again(server: Server) -> None:
    with connected(server) as connection:
        for _ in range(3):
            connection.sendall(post_bytes(CHAT, b'{"model":"other","messages":[{"role":"user","content":"Hi"}]}'))
            answer = read_answer(connection)
            assert answer is not None
            assert answer.status == 404


def test_requests_sent_at_once_are_answered_in_turn(server: Server) -> None:
    one = post_bytes("/v1/completions", json.dumps({"model": NAME, "prompt": "Hi", "max_tokens": 2}).encode())
    with connected(server) as connection:
        connection.sendall(one + b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n" + one[:30])
        time.sleep(0.05)
        connection.sendall(one[30:])
        data = b""
        while data.count(b"text_completion") < 2:
            data += connection.recv(65536)
    assert data.index(b"text_completion") < data.index(b'"ready"') < data.rindex(b"text_completion")


def left(server: Server, seen: int) -> list[Any]:
    """What the log says, after so many lines, of clients that left."""
    return [line for line in server.lines[seen:] if line.get("status") == 499 or line.get("left")]


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_frees_the_slot(server: Server, tiny: Tokenizer, stream: bool) -> None:
    seen = len(server.lines)
    with connected(server) as connection:
        connection.sendall(long_request(tiny, stream=stream))
        until(lambda: busy(server)[0] == 1, 10)
    free_within_a_second(server)
    (line,) = until(lambda: left(server, seen), 5)
    assert line["new_tokens"] < 1900
    assert line["status"] == (200 if line.get("left") else 499)


def test_leaving_with_more_sent_than_was_asked_frees_the_slot(server: Server, tiny: Tokenizer) -> None:
    with connected(server) as connection:
        connection.sendall(long_request(tiny) + b"GET /health HTTP/1.1\r\n")
        until(lambda: busy(server)[0] == 1, 10)
        for _ in range(3):
            connection.sendall(b"x: y\r\n")
            time.sleep(0.02)
    free_within_a_second(server)


def test_leaving_while_queued_frees_the_place(server: Server, tiny: Tokenizer) -> None:
    with connected(server) as first, connected(server) as second, connected(server) as third:
        for connection in (first, second, third):
            connection.sendall(long_request(tiny))
        until(lambda: busy(server) == (2, 1), 10)
        third.close()
        until(lambda: busy(server)[1] == 0, 1)
        assert busy(server)[0] == 2
    free_within_a_second(server)


def test_every_choice_of_a_request_is_given_up(server: Server, tiny: Tokenizer) -> None:
    with connected(server) as connection:
        connection.sendall(long_request(tiny, n=8, stream=True))
        until(lambda: busy(server) == (2, 6), 10)
    free_within_a_second(server)


def test_the_clients_own_way_of_leaving(server: Server) -> None:
    stream = server.client().chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": "Hi"}], stream=True, max_tokens=1900, logit_bias={"1": -100}
    )
    next(iter(stream))
    stream.close()
    free_within_a_second(server)


def test_disconnects_at_random_bytes(server: Server, tiny: Tokenizer) -> None:
    slowest = disconnected(server, tiny, 200, seed=7)
    print(f"\nT7 200 disconnects, seed 7, slot free after {slowest:.3f} s at most")


def disconnected(server: Server, tiny: Tokenizer, times: int, seed: int) -> float:
    """Leave after so many bytes sent or received, orderly or not; the slot is free within a second. The longest it took."""
    rng, slowest = random.Random(seed), 0.0
    for _ in range(times):
        request = long_request(tiny, stream=rng.random() < 0.5, n=rng.choice([1, 1, 3]))
        with connected(server) as connection:
            if rng.random() < 0.4:
                connection.sendall(request[: rng.randrange(len(request))])
            else:
                connection.sendall(request)
                wanted = rng.choice([0, rng.randrange(2000)])
                connection.settimeout(0.2)
                try:
                    while wanted > 0 and (got := connection.recv(wanted)):
                        wanted -= len(got)
                except TimeoutError:
                    pass
            if rng.random() < 0.5:  # a reset, not a farewell
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        slowest = max(slowest, free_within_a_second(server))
    started = time.monotonic()
    assert ask(server).status == 200
    assert time.monotonic() - started < 5
    return slowest


def test_a_client_that_does_not_read_does_not_stop_the_others(server: Server, tiny: Tokenizer) -> None:
    with connected(server) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(long_request(tiny, stream=True, logprobs=True, top_logprobs=20))
        until(lambda: busy(server)[0] == 1, 10)
        assert ask(server).status == 200
    free_within_a_second(server)


def test_expect_100_continue(server: Server) -> None:
    body = json.dumps({"model": NAME, "prompt": "Hi", "max_tokens": 1}).encode()
    head = post_bytes("/v1/completions", body, "content-type: application/json\r\nexpect: 100-continue\r\n")[
        : -len(body)
    ]
    with connected(server) as connection:
        connection.sendall(head)
        assert connection.recv(100).startswith(b"HTTP/1.1 100")
        connection.sendall(body)
        answer = read_answer(connection)
        assert answer is not None
        assert answer.status == 200


def test_an_upgrade_is_not_made(server: Server) -> None:
    request = "GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n"
    assert exchange(server, request).status == 200


def test_nothing_is_left_over(server: Server) -> None:
    assert free_within_a_second(server) < 1
    with pytest.raises(openai.NotFoundError):
        server.client().models.retrieve("gone")
