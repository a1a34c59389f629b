"""What whoever embeds the server relies on: a request that is cancelled leaves nothing behind, and a dead server says so."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from servers import Server, ask, started
from test_batching import engine, prompt

from gemmary.errors import GemmaryError
from gemmary.gemma import Gemma
from gemmary.infer.batching import Batcher, Request, Ticket
from gemmary.serve.app import Service
from gemmary.serve.asking import Prepared
from gemmary.serve.completions import Run
from gemmary.serve.guards import Note
from gemmary.serve.metrics import Metrics
from gemmary.serve.protocol import Completions, parse
from gemmary.serve.settings import Settings
from gemmary.text import Tokenizer


def test_a_request_cancelled_while_it_is_made_ready_is_cancelled_in_the_queue_too(tiny: Tokenizer) -> None:
    made = engine("gemma3")
    gemma = Gemma(made.config, made.params, tiny, made)
    run = Run(gemma, parse(Completions, b'{"model": "m", "prompt": "a"}'), "m", Note("1", "c"), Metrics(lambda: None))
    begun, cancelled = threading.Event(), threading.Event()
    tickets: list[Ticket] = []

    def prepare() -> Prepared:
        begun.set()
        assert cancelled.wait(30)
        return Prepared([Request(prompt(3), 4), Request(prompt(5), 4)], [None, None], [], 8)

    def submit(request: Request, deliver: Callable[[Any], None]) -> Ticket:
        tickets.append(Ticket(request, deliver))
        return tickets[-1]

    async def nobody_leaves() -> Any:
        await asyncio.Event().wait()

    async def cancel() -> None:
        task = asyncio.create_task(run.begin(prepare, submit, nobody_leaves))
        await asyncio.to_thread(begun.wait, 30)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        cancelled.set()

    asyncio.run(cancel())  # which ends when the thread has
    assert [ticket.cancelled for ticket in tickets] == [True, True]


def test_a_service_lives_as_long_as_the_thread_that_makes_answers() -> None:
    service = Service(Settings("none", "none", grace=0))
    assert not service.alive()
    service.batcher = Batcher(engine("gemma3"), slots=1)
    assert (service.alive(), service.state()) == (True, "ready")
    service.close()
    assert not service.alive()
    assert service.state() == "closing"


@pytest.mark.parametrize("how", ["--look-up", "--draft"])
def test_a_server_that_guesses_gives_the_same_answers(server: Server, served: Path, how: str) -> None:
    arguments = [how] if how == "--look-up" else [how, str(served)]
    with started(served, "--slots", "2", "--memory", "64MB", *arguments) as guessing:
        for text, temperature in (("Hi", 0.0), ("Hi hi hi hi", 0.0), ("Why?", 0.8)):
            asked = {"max_tokens": 60, "temperature": temperature, "seed": 3}
            answers = [ask(one, text, **asked).json["choices"] for one in (guessing, server)]
            assert answers[0] == answers[1]
        stats = guessing.stats()
        assert stats["gemmary_guessed_tokens_total"] >= stats["gemmary_right_tokens_total"] > 0


def test_there_is_one_way_to_guess() -> None:
    with pytest.raises(GemmaryError, match="give one of them"):
        Settings("none", "none", look_up=True, draft="other")
