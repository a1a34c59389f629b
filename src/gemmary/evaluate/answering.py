"""Answers to many prompts, several at a time, in whatever order they are done."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from gemmary.gemma import Gemma
from gemmary.infer.batching import Batcher, Request, Ticket
from gemmary.infer.engine import Token
from gemmary.infer.sampling import Sampling
from gemmary.text.answers import Answer

__all__ = ["Prompt", "Said", "answers"]


class Prompt(NamedTuple):
    """Ids, how many tokens may follow, how they are drawn, and the strings that end an answer."""

    ids: Sequence[int]
    most: int
    sampling: Sampling
    stops: Sequence[str] = ()


class Said(NamedTuple):
    """An answer's text, without what ended it, and whether the model ended it itself (a stop string is the asker's)."""

    text: str
    itself: bool


def answers(gemma: Gemma, prompts: Sequence[Prompt], *, slots: int = 8) -> Iterator[tuple[int, Said]]:
    """Yield each prompt's number and its answer. What one comes to does not depend on the others.

    Prompts that begin alike are read once as far as that goes, so they are taken in that order. Raises GemmaryError for a prompt that cannot be answered.
    """
    if not prompts:
        return
    batcher = Batcher(gemma.engine, slots=slots, queue=2 * slots)
    done: queue.Queue[tuple[int, Said | Exception]] = queue.Queue()
    tickets: dict[int, Ticket] = {}

    def submit(number: int) -> None:
        ids, most, sampling, stops = prompts[number]
        answer, said = Answer(gemma.tokenizer, stops), list[str]()

        def deliver(what: Token | Exception) -> None:
            if answer.stopped:  # and cancelled soon
                return
            if isinstance(what, Exception):
                done.put((number, what))
                return
            said.append(answer.push(what.id, last=what.finish is not None))
            if answer.stopped or what.finish is not None:
                done.put((number, Said("".join(said), what.finish == "stop" and not answer.stopped)))

        request = Request(ids, most, sampling, stop_ids=gemma.tokenizer.stop_ids)
        tickets[number] = batcher.submit(request, deliver)

    def finished() -> tuple[int, Said]:
        number, what = done.get()
        tickets.pop(number).cancel()
        if isinstance(what, Exception):
            raise what
        return number, what

    try:
        for number in sorted(range(len(prompts)), key=lambda i: list(prompts[i].ids)):
            if len(tickets) >= 2 * slots:
                yield finished()
            submit(number)
        while tickets:
            yield finished()
    finally:
        batcher.close()
