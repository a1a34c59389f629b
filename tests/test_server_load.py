"""More clients than can be served, and the end of a server. T8."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from servers import NAME, Server, ask, exchange, post, started, until
from test_server_connections import connected, long_request

from gemmary.text import Tokenizer

HEALTH = "GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"

WATCH = """
import json, sys, time, urllib.request
waits, end = [], time.monotonic() + float(sys.argv[2])
while time.monotonic() < end:
    begun = time.monotonic()
    assert urllib.request.urlopen(sys.argv[1] + "/health").status == 200
    waits.append(time.monotonic() - begun)
    time.sleep(0.05)
print(json.dumps(waits))
"""


def test_a_full_queue_is_429_with_retry_after(served: Path, tiny: Tokenizer) -> None:
    with started(served, "--slots", "1", "--queue", "1") as server:
        with connected(server) as first, connected(server) as second:
            first.sendall(long_request(tiny))
            until(lambda: server.stats()["gemmary_busy"] == 1, 20)
            second.sendall(long_request(tiny))
            until(lambda: (server.stats()["gemmary_busy"], server.stats()["gemmary_queued"]) == (1, 1), 20)
            answer = ask(server)
            assert answer.status == 429
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json["error"]["type"] == "rate_limit_error"
            with pytest.raises(openai.RateLimitError):
                server.client().completions.create(model=NAME, prompt="Hi", stream=True)
        until(lambda: ask(server).status == 200, 5)
        answer = ask(server, n=2)
        assert answer.status == 400
        assert "at most 1 at once" in answer.message


def test_200_cancelled_and_the_next_answers_within_5_seconds(server: Server, tiny: Tokenizer) -> None:
    for _ in range(8):
        connections = [connected(server) for _ in range(25)]
        for connection in connections:
            connection.__enter__().sendall(long_request(tiny))
        for connection in connections:
            connection.__exit__(None, None, None)
    begun = time.monotonic()
    assert until(lambda: ask(server).status == 200, 5)
    assert time.monotonic() - begun < 5


def test_overload(served: Path) -> None:
    with started(served, "--slots", "2", "--queue", "8") as server:
        said = overloaded(server, clients=100, seconds=10)
    print(f"\nT8 {said}")


def overloaded(server: Server, clients: int, seconds: float) -> dict[str, Any]:
    """Ten times as many clients as there are places: only 200, 429 and 503, a quick /health, and no growth."""
    statuses: Counter[int] = Counter()
    lock, end = threading.Lock(), time.monotonic() + seconds
    for length in (1, 20, 40):  # what compiles does so before
        ask(server, "word " * length, max_tokens=24)

    def client(number: int) -> None:
        while time.monotonic() < end:
            status = ask(
                server, "word " * (1 + number % 40), max_tokens=24, temperature=1, stream=number % 2 == 0
            ).status
            with lock:
                statuses[status] += 1
            if status != 200:
                time.sleep(0.5 + random.random())  # less than Retry-After says, and not all at once

    memory: list[int] = []
    watch = subprocess.Popen(
        [sys.executable, "-c", WATCH, server.address, str(seconds)], stdout=subprocess.PIPE, text=True
    )
    with ThreadPoolExecutor(clients) as pool:
        tasks = [pool.submit(client, i) for i in range(clients)]
        for _ in range(10):
            time.sleep(seconds / 10)
            memory.append(server.memory())
        for task in tasks:
            task.result()
    waits = json.loads(watch.communicate(timeout=60)[0])
    p99 = sorted(waits)[int(len(waits) * 0.99)]
    growth = memory[-1] / memory[4] - 1
    said = {"statuses": dict(statuses), "health_p99_ms": round(p99 * 1000, 1), "growth": round(growth, 4)}
    assert set(statuses) <= {200, 429, 503}, said
    assert statuses[200] > 10, said
    assert statuses[429] > 10, said
    assert p99 < 0.1, said
    assert growth < 0.05, said
    return said


def test_sigterm_lets_answers_finish_and_refuses_new_ones(served: Path, tiny: Tokenizer) -> None:
    with started(served, "--slots", "1") as server:
        whole: dict[str, Any] = {}
        never_ends = {str(id): -100 for id in tiny.stop_ids}

        def answer(stream: bool) -> None:
            whole[str(stream)] = ask(server, max_tokens=300, logit_bias=never_ends, stream=stream)

        threads = [threading.Thread(target=answer, args=(stream,)) for stream in (True, False)]
        for thread in threads:
            thread.start()
        until(lambda: (server.stats()["gemmary_busy"], server.stats()["gemmary_queued"]) == (1, 1), 20)
        server.process.terminate()
        until(lambda: server.events("closing"), 5)
        late = ask(server)
        assert late.status == 503
        assert "retry-after" in late.headers
        assert exchange(server, HEALTH).status == 503
        for thread in threads:
            thread.join()
        assert whole["True"].text.endswith("data: [DONE]\n\n0\r\n\r\n") or "[DONE]" in whole["True"].text
        assert whole["False"].json["usage"]["completion_tokens"] == 300
        assert server.process.wait(10) == 0
        assert server.events("closed")


def test_what_outlasts_the_grace_is_told_so(served: Path, tiny: Tokenizer) -> None:
    with started(served, "--grace", "0.5") as server, connected(server) as connection:
        connection.sendall(long_request(tiny, stream=True))
        until(lambda: b"content" in connection.recv(65536), 20)
        begun = time.monotonic()
        server.process.terminate()
        text = b""
        while more := connection.recv(65536):
            text += more
        assert b'"error"' in text
        assert b"shutting down" in text or b"closing" in text
        assert b"[DONE]" not in text
        assert server.process.wait(10) == 0
        assert time.monotonic() - begun < 8


def test_a_signal_while_loading_ends_it(served: Path) -> None:
    with started(served, ready=False) as server:
        answer = exchange(server, HEALTH)
        assert (answer.status, answer.json) == (503, {"status": "loading"})
        said = post(server, "/v1/completions", {"model": NAME, "prompt": "Hi"})
        assert said.status == 503
        assert "loading" in said.message
        assert server.stop(20) == 0


def test_a_model_that_cannot_be_loaded_ends_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "other"}))
    with started(tmp_path, ready=False) as server:
        assert server.process.wait(60) == 2
        until(lambda: server.said, 5)
        assert server.said[-1].startswith("error: ")
        assert len(server.said) == 1
