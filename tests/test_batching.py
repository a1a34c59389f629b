"""Continuous batching: the tokens of each request are those of the engine alone, whoever else is there."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from models import small

from gemmary.errors import GemmaryError
from gemmary.infer.batching import Batcher, Closing, Overloaded, Request
from gemmary.infer.drafting import Drafts, Guessers, LookUps
from gemmary.infer.engine import Engine, Token
from gemmary.infer.sampling import Sampling
from gemmary.model.pages import PAGE, page_bytes

KINDS = ["gemma1-mqa", "gemma2", "gemma3"]


def engine(kind: str) -> Engine:
    config, params = small(kind)[2:]
    return Engine(params, config)


class Caller:
    """Waits for what is delivered to it."""

    def __init__(self, batcher: Batcher, request: Request) -> None:
        self.got: list[Token | Exception] = []
        self.ended = threading.Event()
        self.ticket = batcher.submit(request, self.deliver)

    def deliver(self, what: Token | Exception) -> None:
        self.got.append(what)
        if isinstance(what, Exception) or what.finish:
            self.ended.set()

    def ids(self) -> list[int]:
        assert self.ended.wait(60)
        for what in self.got:
            if isinstance(what, Exception):
                raise what
        return [what.id for what in self.got if isinstance(what, Token)]


def prompt(length: int, seed: int = 0) -> list[int]:
    return list(map(int, np.random.default_rng(seed).integers(1, 60, length)))


def together(engine: Engine, requests: list[Request]) -> list[list[int]]:
    """The engine's answers to all, in one batch: a row does not depend on the others (tests/test_engine.py)."""
    rows: list[list[int]] = [[] for _ in requests]
    prompts, settings = [list(one.prompt) for one in requests], [one.sampling for one in requests]
    for step in engine.generate(prompts, max_new_tokens=max(one.max_new_tokens for one in requests), sampling=settings):
        for token in step:
            rows[token.row].append(token.id)
    return [row[: request.max_new_tokens] for row, request in zip(rows, requests, strict=True)]


@pytest.fixture
def batcher() -> Iterator[Batcher]:
    one = Batcher(engine("gemma3"), slots=4, queue=6)
    yield one
    one.close()


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_each_alone(kind: str) -> None:
    model = engine(kind)
    batcher = Batcher(model, slots=4)
    shared = prompt(130, 9)
    requests = [
        Request(prompt(length, length), 20, Sampling(temperature, top_p=0.95, seed=length))
        for length, temperature in (
            (1, 0.0),
            (5, 1.0),
            (64, 0.0),
            (65, 0.8),
            (200, 0.0),
            (17, 1.0),
            (90, 0.7),
            (600, 0.0),
        )
    ]
    requests += [Request(shared + prompt(3, seed), 20) for seed in range(3)]  # found in the cache
    requests += [Request(prompt(20, 3), 20, Sampling(0.0, repetition_penalty=1.5)), Request(prompt(20, 3), 1)]
    callers = [Caller(batcher, request) for request in requests]
    assert [caller.ids() for caller in callers] == together(model, requests)
    assert batcher.stats().cached_tokens >= 256
    assert batcher.stats().busy == 0
    batcher.close()


def guessers(kind: str, model: Engine) -> Guessers:
    """Guesses that are right now and then, nearly always, or never."""
    if kind == "look-up":
        return LookUps()
    config, params = model.config, model.params
    if kind == "another":
        params = params | {"embed": params["embed"][::-1]}
    return Drafts(Engine(params, config), 4)


@pytest.mark.parametrize("kind", ["look-up", "itself", "another"])
def test_guesses_change_no_answer(kind: str) -> None:
    model = engine("gemma3")
    batcher = Batcher(model, slots=4, guessers=guessers(kind, model))
    requests = [
        Request(prompt(length, length % 3), 40, Sampling(temperature, seed=length), client=str(length))
        for length in (1, 30, 63, 200, 600)
        for temperature in (0.0, 0.9)
    ]
    requests += [Request(prompt(20, 3), 30, Sampling(0.0, repetition_penalty=1.5)), Request([5, 6] * 30, 90)]
    callers = [Caller(batcher, request) for request in requests]
    assert [caller.ids() for caller in callers] == together(model, requests)
    stats = batcher.stats()
    assert stats.new_tokens == sum(request.max_new_tokens for request in requests)
    assert 0 < stats.guessed_tokens >= stats.right_tokens
    if kind == "itself":
        assert stats.right_tokens > stats.guessed_tokens * 0.4  # greedy guesses; half of the answers are drawn at 0.9
    alone = Caller(batcher, Request([5, 6] * 30, 90))
    assert alone.ids() == together(model, [Request([5, 6] * 30, 90)])[0]
    assert batcher.stats().right_tokens > (stats.right_tokens if kind != "another" else -1)
    batcher.close()


def test_guesses_end_where_an_answer_ends() -> None:
    model = engine("gemma3")
    whole = together(model, [Request(prompt(30), 40)])[0]
    batcher = Batcher(model, slots=2, guessers=Drafts(engine("gemma3"), 2))
    for at in range(1, 12):
        stop = whole[at]
        wanted = whole[: whole.index(stop) + 1]
        assert Caller(batcher, Request(prompt(30), 40, stop_ids=(stop,))).ids() == wanted
        assert Caller(batcher, Request(prompt(30), at)).ids() == whole[:at]
    cancelled = Caller(batcher, Request(prompt(30), 40))
    cancelled.ticket.cancel()
    assert Caller(batcher, Request(prompt(30), 40)).ids() == whole
    assert batcher.stats().busy == 0
    batcher.close()


def different_in_company(count: int) -> int:
    """How many of `count` requests, among others that come at any time, are answered otherwise than alone."""
    rng = np.random.default_rng(11)
    model = engine("gemma3")
    batcher = Batcher(model, slots=8, queue=count)
    few = [
        Request(
            prompt(int(rng.integers(1, 150)), i),
            int(rng.integers(1, 30)),
            Sampling(float(rng.choice([0.0, 0.8, 1.2])), top_k=int(rng.choice([0, 20])), seed=i),
        )
        for i in range(25)
    ]
    wanted = [Caller(batcher, request).ids() for request in few]  # one at a time
    chosen = rng.integers(0, len(few), count)
    callers = []
    for which in chosen:
        callers.append(Caller(batcher, few[which]))
        if rng.random() < 0.3:
            time.sleep(float(rng.random()) * 0.01)
    different = sum(caller.ids() != wanted[which] for caller, which in zip(callers, chosen, strict=True))
    print(f"{count} requests, {different} different")
    batcher.close()
    return different


def test_an_answer_does_not_depend_on_its_neighbours() -> None:
    assert different_in_company(500) == 0


def test_tokens_carry_log_probabilities_and_the_reason_of_the_end(batcher: Batcher) -> None:
    request = Request(prompt(12), 6, top_logprobs=3)
    caller = Caller(batcher, request)
    ids = caller.ids()
    model = engine("gemma3")
    scores = model.prompt_scores([*request.prompt, *ids], 3)[len(request.prompt) - 1 :]
    for token, (logprob, top) in zip(caller.got, scores, strict=True):
        assert isinstance(token, Token)
        assert token.logprob == pytest.approx(logprob, abs=1e-4)
        assert [i for i, _ in token.top_logprobs] == [i for i, _ in top]
    assert [token.finish for token in caller.got if isinstance(token, Token)] == [None] * 5 + ["length"]
    stopped = Caller(batcher, Request(prompt(12), 6, stop_ids=(ids[2],)))
    assert stopped.ids() == ids[: ids.index(ids[2]) + 1]
    assert stopped.got[-1].finish == "stop"  # type: ignore[union-attr]


def test_a_bias_bans_and_forces(batcher: Batcher) -> None:
    free = Caller(batcher, Request(prompt(12), 5)).ids()
    banned = Caller(batcher, Request(prompt(12), 5, bias={free[0]: -100.0})).ids()
    assert banned[0] != free[0]
    assert Caller(batcher, Request(prompt(12), 5, bias={7: 100.0})).ids() == [7] * 5
    assert Caller(batcher, Request(prompt(12), 5)).ids() == free  # the slot's next one has none


class Counting:
    """Only 3, 4, 5, in that order, and then no more."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def mask(self) -> np.ndarray:
        return np.array([1 << (3 + len(self.taken))], np.uint32)

    def accept(self, token: int) -> None:
        self.taken.append(token)

    def done(self) -> bool:
        return len(self.taken) == 3


def test_a_grammar_decides_what_may_come(batcher: Batcher) -> None:
    beside = Caller(batcher, Request(prompt(12), 10))
    caller = Caller(batcher, Request(prompt(12), 10, Sampling(1.0, seed=2), grammar=Counting()))
    assert caller.ids() == [3, 4, 5]
    assert caller.got[-1].finish == "stop"  # type: ignore[union-attr]
    assert beside.ids() == together(engine("gemma3"), [Request(prompt(12), 10)])[0]


def test_what_is_cancelled_is_let_go_and_the_next_is_served(batcher: Batcher) -> None:
    running = [Caller(batcher, Request(prompt(20, i), 3000)) for i in range(4)]
    while batcher.stats().busy < 4:
        time.sleep(0.01)
    waiting = [Caller(batcher, Request(prompt(20, i), 3000)) for i in range(4, 8)]
    for caller in (*running, *waiting):
        caller.ticket.cancel()
    assert batcher.stats().queued == 0
    began = time.monotonic()
    assert len(Caller(batcher, Request(prompt(5), 4)).ids()) == 4
    assert time.monotonic() - began < 5
    assert batcher.stats().busy == 0
    assert not any(caller.ended.is_set() for caller in (*running, *waiting))


def test_a_full_queue_says_when_to_come_again(batcher: Batcher) -> None:
    callers = list[Caller]()

    def flood() -> None:
        while True:
            callers.append(Caller(batcher, Request(prompt(20), 3000)))

    with pytest.raises(Overloaded, match="6 requests are waiting already: try again in") as caught:
        flood()
    assert caught.value.retry_after >= 1
    assert len(callers) <= 6 + 4 + 1  # in the queue, in the slots, and one that is read
    for caller in callers:
        caller.ticket.cancel()


def test_clients_take_turns() -> None:
    one = Batcher(engine("gemma1-mqa"), slots=1, queue=20)
    order: list[str] = []

    def ask(client: str) -> threading.Event:
        ended = threading.Event()

        def deliver(what: Any) -> None:
            if what.finish:
                order.append(client)
                ended.set()

        one.submit(Request(prompt(8), 4, client=client), deliver)
        return ended

    waits = [ask("greedy") for _ in range(6)] + [ask("modest")]
    for wait in waits:
        assert wait.wait(60)
    assert order.index("modest") <= 2
    one.close()


def test_long_and_short_share_the_memory() -> None:
    """Memory for one long text, or for several short ones: all are served in the end, none at the cost of another."""
    model = engine("gemma1-mqa")
    layers, one = model.config.num_layers, page_bytes(model.config, model.dtype)
    batcher = Batcher(model, slots=4, memory=12 * layers * one)
    assert batcher.longest == 12 * PAGE
    requests = [Request(prompt(length, length), 30) for length in (batcher.longest - 40, 10, 20, 250, 30, 400)]
    callers = [Caller(batcher, request) for request in requests]
    assert [caller.ids() for caller in callers] == together(model, requests)
    with pytest.raises(GemmaryError, match=f"there is memory for {batcher.longest} with the answer"):
        Caller(batcher, Request(prompt(batcher.longest), 5))
    batcher.close()


def test_what_cannot_be_served_is_refused_at_once(batcher: Batcher) -> None:
    for request, says in (
        (Request([], 5), "at least <bos>"),
        (Request([1, 10**6], 5), "token ids go from 0 to"),
        (Request([1], 5, bias={10**6: 1.0}), "a bias for token 1000000"),
        (Request(prompt(5000), 5), "context is 4096: shorten it"),
    ):
        with pytest.raises(GemmaryError, match=says):
            Caller(batcher, request)


def test_a_listener_that_fails_harms_nobody(batcher: Batcher) -> None:
    def fail(what: Any) -> None:
        raise RuntimeError("gone")

    batcher.submit(Request(prompt(9), 50), fail)
    assert len(Caller(batcher, Request(prompt(9), 5)).ids()) == 5


def test_a_step_that_fails_is_told_to_callers_and_the_next_are_served(
    batcher: Batcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = Caller(batcher, Request(prompt(9), 5)).ids()
    with monkeypatch.context() as patch:
        patch.setattr(batcher._steps, "next", lambda entries: (_ for _ in ()).throw(MemoryError("no more")))
        with pytest.raises(MemoryError):
            Caller(batcher, Request(prompt(9), 5)).ids()
    assert Caller(batcher, Request(prompt(9), 5)).ids() == wanted


def test_closing_lets_what_runs_finish_and_ends_the_rest() -> None:
    one = Batcher(engine("gemma1-mqa"), slots=2)
    Caller(one, Request(prompt(5), 2)).ids()  # what is compiled by now takes no time below
    short, endless = Caller(one, Request(prompt(5), 20)), Caller(one, Request(prompt(5), 4000))
    one.close(grace=5.0)
    assert len(short.ids()) == 20
    assert isinstance(endless.got[-1], Closing)
    with pytest.raises(Closing, match="shutting down"):
        Caller(one, Request(prompt(5), 20))


def test_warm_up_compiles_and_changes_nothing() -> None:
    model = engine("gemma3")
    batcher, seen = Batcher(model, slots=3), list[tuple[int, int]]()
    batcher.warm_up(lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1]
    request = Request(prompt(30), 12)
    assert Caller(batcher, request).ids() == together(model, [request])[0]
    batcher.close()


def test_slots_and_queue_are_at_least_one() -> None:
    with pytest.raises(GemmaryError, match="both must be at least 1"):
        Batcher(engine("gemma1-mqa"), slots=0)
