"""The server beside llama.cpp's, on the same weights and the same requests: 1, 4 and 16 clients, prompts and answers of mixed lengths.

    python benchmarks/serving.py --peers PEERS/bin/python [--clients 1,4,16] [--requests 24] [--json OUT]

Each client sends its next request when the last is answered, streamed, through the official `openai` package. Both serve the packaged
Gemma 3 270M (Q4_K_M) with two threads; llama.cpp's is `llama_cpp.server`, which answers one request at a time (PEERS needs
`llama-cpp-python[server]`). Servers are started once and take turns, level by level. Shown: tokens a second of all answers, and the time to
the first token, its median and its 95th percentile.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import openai
from fidelity import whole_gguf
from rich.console import Console
from rich.table import Table


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(command: list[str], port: int, ready: str) -> Iterator[str]:
    """A server's address, once it answers."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            time.sleep(0.5)
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}{ready}") as answer:
                    if answer.status == 200:
                        break
            except OSError:
                continue
        else:
            raise SystemExit(f"{command[0]} did not answer")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()


def requests_of(count: int, seed: int) -> list[tuple[str, int]]:
    """Prompts of 20 to 400 words, of Python's reference, and how many tokens to answer with. No two begin alike."""
    rng, words = np.random.default_rng(seed), " ".join(topics[name] for name in sorted(topics)).split()
    found = []
    for _ in range(count):
        at, length = int(rng.integers(len(words) - 400)), int(rng.integers(20, 400))
        found.append((" ".join(words[at : at + length]), int(rng.integers(16, 128))))
    return found


def level(address: str, model: str, clients: int, work: list[tuple[str, int]]) -> dict[str, float]:
    """All requests, by so many clients at once."""
    queue, lock, firsts, tokens = list(work), threading.Lock(), list[float](), [0]

    def client() -> None:
        api = openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=600)
        while True:
            with lock:
                if not queue:
                    return
                prompt, count = queue.pop()
            started, first, got = time.perf_counter(), 0.0, 0
            # A bias keeps both from ending early, so that both give as many tokens as were asked for.
            stream = api.completions.create(
                model=model,
                prompt=prompt,
                max_tokens=count,
                temperature=0,
                stream=True,
                logit_bias={"1": -100, "106": -100},
            )
            for chunk in stream:
                if chunk.choices and not first:
                    first = time.perf_counter() - started
                got += bool(chunk.choices)
            with lock:
                firsts.append(first)
                tokens[0] += count

    threads = [threading.Thread(target=client) for _ in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    return {
        "tokens_per_second": tokens[0] / seconds,
        "first_token_median": statistics.median(firsts),
        "first_token_95": float(np.percentile(firsts, 95)),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", metavar="PYTHON", required=True)
    parser.add_argument("--clients", default="1,4,16")
    parser.add_argument("--requests", type=int, default=24, help="at each level")
    parser.add_argument("--json", type=Path, metavar="OUT")
    arguments = parser.parse_args()
    levels = [int(count) for count in arguments.clients.split(",")]
    results: dict[str, Any] = {"requests": arguments.requests, "levels": {count: {} for count in levels}}
    with tempfile.TemporaryDirectory() as name:
        model, ours, theirs = whole_gguf(Path(name)), free_port(), free_port()
        gemmary = [
            str(Path(sys.executable).with_name("gemmary")),
            "serve",
            "sample",
            "--port",
            str(ours),
            "--slots",
            "16",
        ]
        llama = [
            arguments.peers, "-m", "llama_cpp.server", "--model", model, "--port", str(theirs), "--n_ctx", "2048",
            "--n_threads", str(os.cpu_count()), "--n_threads_batch", str(os.cpu_count()), "--n_batch", "512",
        ]  # fmt: skip
        with serving(gemmary, ours, "/health") as first, serving(llama, theirs, "/v1/models") as second:
            for address, served in ((first, "sample"), (second, model)):
                level(address, served, 1, requests_of(2, 99))  # whatever the first ones compile
            for count in levels:
                for who, address, served in (("gemmary", first, "sample"), ("llama.cpp", second, model)):
                    work = requests_of(arguments.requests, count)
                    results["levels"][count][who] = level(address, served, count, work)
    table = Table("clients", "", "tokens/s", "first token, median", "95 %", title="the same requests to both servers")
    for count, found in results["levels"].items():
        for who, one in found.items():
            cells = (
                f"{one['tokens_per_second']:.1f}",
                f"{one['first_token_median']:.2f} s",
                f"{one['first_token_95']:.2f} s",
            )
            table.add_row(str(count), who, *cells)
    Console(width=100).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
