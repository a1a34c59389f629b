"""examples/ray_serve.py on a cluster of two nodes: the answers of one server, a killed replica, keys, an end in good order."""

from __future__ import annotations

import contextlib
import gc
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from servers import NAME, Server, until

# Ray leaves files and processes to the garbage collector, which warns of them.
pytestmark = [pytest.mark.release, pytest.mark.filterwarnings("default")]

EXAMPLE = Path(__file__).parents[2] / "examples" / "ray_serve.py"
KEY = "a-key-of-the-tests"
GREEDY: dict[str, Any] = {"max_tokens": 1900, "temperature": 0}  # seconds of answering; this model ends none itself
XLA_FLAGS = "--xla_backend_optimization_level=1"


class Replicas:
    """The example as a process, and what it and its replicas say."""

    def __init__(self, model: Path, address: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        arguments = ["--name", NAME, "--port", str(self.port), "--slots", "4", "--queue", "40", "--address", address]
        self.process = subprocess.Popen(
            [sys.executable, str(EXAMPLE), str(model), "--replicas", "2", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "GEMMARY_API_KEY": KEY, "RAY_DEDUP_LOGS": "0", "PYTHONUNBUFFERED": "1"},
        )
        self.said: list[str] = []
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=KEY, max_retries=0)

    def _listen(self) -> None:
        assert self.process.stdout is not None
        self.said.extend(iter(self.process.stdout.readline, ""))

    def ready(self) -> Replicas:
        """Once they answer."""
        until(lambda: any("answer at" in line for line in self.said) or self.process.poll() is not None, 180)
        assert self.process.poll() is None, "".join(self.said)
        return self

    def logged(self, event: str) -> list[tuple[int, str]]:
        """Who said so: the process of a replica, and its line."""
        found = [re.search(r"pid=(\d+).*?(\{.*\})", line) for line in list(self.said) if f'"event": "{event}"' in line]
        return [(int(one[1]), one[2]) for one in found if one]

    def answered(self, ids: set[str]) -> set[int]:
        """The processes that answered requests with these ids, once all of them are in the log."""

        def who() -> list[int]:
            return [pid for pid, line in self.logged("request") if any(f'"{one}"' in line for one in ids)]

        until(lambda: len(who()) == len(ids), 10)
        return set(who())

    def stop(self) -> None:
        """SIGTERM, where it still runs."""
        self.process.terminate()
        try:
            self.process.wait(60)
        finally:
            self.process.kill()
            self._listener.join()
            self.client.close()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster of two nodes, each with room for one replica."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", XLA_FLAGS)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        try:
            cluster.add_node(num_cpus=1)
            yield cluster.address
        finally:
            cluster.shutdown()
            del cluster
            gc.collect()


@pytest.fixture(scope="module")
def replicas(served: Path, address: str) -> Iterator[Replicas]:
    """Two of them; the last test ends them."""
    running = Replicas(served, address)
    try:
        yield running.ready()
    finally:
        running.stop()


def _chat(client: openai.OpenAI, text: str, **options: Any) -> Any:
    """An answer's id, its text, and why it ended."""
    asked: dict[str, Any] = {"model": NAME, "messages": [{"role": "user", "content": text}], **options}
    raw = client.chat.completions.with_raw_response.create(**asked)
    id_ = raw.headers["x-request-id"].partition(",")[0]
    if not options.get("stream"):
        choice = raw.parse().choices[0]
        return id_, choice.message.content, choice.finish_reason
    chunks = list(raw.parse())
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    return id_, text, chunks[-1].choices[0].finish_reason


def _long(client: openai.OpenAI, i: int, begun: threading.Semaphore) -> tuple[str, str, bool]:
    """A long stream's id, its text, and whether it came to its end. Says when it has begun."""
    asked: dict[str, Any] = {"model": NAME, "prompt": f"{i} and", "stream": True}
    raw = client.completions.with_raw_response.create(**asked, **GREEDY)
    id_, text = raw.headers["x-request-id"].partition(",")[0], ""
    try:
        for n, chunk in enumerate(raw.parse()):
            text += chunk.choices[0].text
            if n == 5:
                begun.release()
            if chunk.choices[0].finish_reason:
                return id_, text, True
    except Exception:  # whatever the client's HTTP library makes of a connection that broke
        pass
    return id_, text, False


def test_both_replicas_answer_as_one_server_does(replicas: Replicas, server: Server) -> None:
    ids = set()
    for i in range(12):
        asked = {"text": f"What is {i}?", "max_tokens": 24, "temperature": i % 2, "seed": i, "stream": i % 3 == 0}
        id_, *answer = _chat(replicas.client, **asked)
        assert answer == list(_chat(server.client(), **asked)[1:])
        ids.add(id_)
    assert len(replicas.answered(ids)) == 2


def test_only_who_has_a_key_is_answered(replicas: Replicas, served: Path) -> None:
    for key, status in ((KEY, 200), ("another", 401)):
        with openai.OpenAI(base_url=replicas.client.base_url, api_key=key, max_retries=0) as client:
            if status == 200:
                assert [model.id for model in client.models.list()] == [NAME]
                continue
            with pytest.raises(openai.AuthenticationError, match="the API key is wrong"):
                client.models.list()
    without = {name: value for name, value in os.environ.items() if name != "GEMMARY_API_KEY"}
    command = [sys.executable, str(EXAMPLE), str(served), "--host", "0.0.0.0"]
    refused = subprocess.run(command, env=without, capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 2
    assert "can be reached from other machines" in refused.stderr


def test_a_client_that_leaves_is_no_longer_answered(replicas: Replicas) -> None:
    with replicas.client.completions.create(model=NAME, prompt="Go", stream=True, **GREEDY) as stream:
        next(iter(stream))
    until(lambda: [line for _, line in replicas.logged("request") if '"left": true' in line], 5)


def test_a_killed_replica_takes_only_its_own_answers_with_it(replicas: Replicas, server: Server) -> None:
    begun, count = threading.Semaphore(0), 4
    with ThreadPoolExecutor(count) as pool:
        expected = list(pool.map(lambda i: _long(server.client(), i, threading.Semaphore(0))[1], range(count)))
        streams = []
        for i in range(count):
            streams.append(pool.submit(_long, replicas.client, i, begun))
            assert begun.acquire(timeout=30)
        killed, other = {pid for pid, _ in replicas.logged("ready")}
        os.kill(killed, signal.SIGKILL)
        # Nobody waits for the next replica.
        ids = {_chat(replicas.client, f"And {i}?", max_tokens=4)[0] for i in range(8)}
        found = [stream.result() for stream in streams]
    assert replicas.answered(ids) == {other}
    lost = {id_ for id_, _, complete in found if not complete}
    assert len(lost) == count // 2
    assert not [line for pid, line in replicas.logged("request") if pid == other and any(one in line for one in lost)]
    for (_, text, complete), wanted in zip(found, expected, strict=True):
        assert text == wanted if complete else wanted.startswith(text)

    until(lambda: len(replicas.logged("ready")) == 3, 120)
    new = replicas.logged("ready")[-1][0]
    until(lambda: new in replicas.answered({_chat(replicas.client, "Again?", max_tokens=4)[0]}), 30)


def test_the_end_lets_a_running_answer_finish(replicas: Replicas, server: Server) -> None:
    _, expected, _ = _long(server.client(), 7, threading.Semaphore(0))
    body = json.dumps({"model": NAME, "prompt": "7 and", **GREEDY, "stream": True})
    head = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", replicas.port, timeout=60)) as connection:
        connection.request("POST", "/v1/completions", body, head)
        answer = connection.getresponse()
        lines = [answer.readline() for _ in range(11)]
        replicas.process.terminate()
        until(lambda: _refused(replicas.client), 10)
        lines += answer.read().splitlines(keepends=True)
    events = [line.removeprefix(b"data: ").strip() for line in lines if line.strip()]
    assert events.pop() == b"[DONE]"
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == expected
    assert replicas.process.wait(60) == 0


def _refused(client: openai.OpenAI) -> bool:
    """Whether nothing new is taken any more."""
    try:
        client.models.list()
    except openai.NotFoundError:
        return True
    return False
