"""Pages of the cache: who holds them, what is found again, and that none is ever lost."""

from __future__ import annotations

import random

import pytest
from models import small

from gemmary.errors import GemmaryError
from gemmary.infer.memory import Holding, Memory, plan_pages
from gemmary.model.pages import PAGE, page_bytes

CHUNK = 64


def memory(kind: str, far: int, near: int) -> Memory:
    return Memory(small(kind)[2], far, near, CHUNK)


def read(of: Memory, prompt: list[int], length: int) -> Holding:
    """Begin a text and read its prompt, in chunks."""
    holding = of.begin(prompt, length)
    assert holding is not None
    for start in range(holding.cached, len(prompt), CHUNK):
        end = min(start + CHUNK, len(prompt))
        of.advance(holding, start, end)
        of.record(holding, prompt[:end])
    return holding


def text(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(100), k=length)


@pytest.mark.parametrize("kind", ["gemma1-mqa", "gemma2", "gemma3"])
def test_a_text_that_begins_alike_finds_the_pages(kind: str) -> None:
    pages = memory(kind, 40, 40)
    prompt = text(0, 3 * PAGE + 10)
    first = read(pages, prompt, 300)
    assert first.cached == 0
    again = read(pages, prompt, 300)  # while the first one runs
    assert again.cached == 3 * PAGE
    other = read(pages, prompt[: 2 * PAGE] + text(1, 90), 300)
    assert other.cached == 2 * PAGE
    for one in (first, again, other):
        pages.end(one)
    assert read(pages, prompt, 300).cached == 3 * PAGE  # and after all have ended
    assert read(pages, text(2, 200), 300).cached == 0


def test_the_last_token_of_a_prompt_is_always_read() -> None:
    pages = memory("gemma1-mqa", 20, 0)
    prompt = text(0, 2 * PAGE)
    pages.end(read(pages, prompt, 200))
    assert read(pages, prompt, 200).cached == PAGE


def test_what_was_answered_is_found_too() -> None:
    pages = memory("gemma3", 20, 20)
    prompt, answer = text(0, PAGE - 5), text(1, 70)
    holding = read(pages, prompt, 200)
    for i in range(len(answer)):
        pages.advance(holding, len(prompt) + i, len(prompt) + i + 1)
    pages.record(holding, prompt + answer)
    pages.end(holding)
    assert read(pages, prompt + answer + text(2, 10), 200).cached == 2 * PAGE


def test_a_page_out_of_the_windows_reach_is_given_back() -> None:
    """Of a long text a window layer holds what the window and a chunk need, and no more."""
    pages = memory("gemma2", 200, 8)
    holding = read(pages, text(0, 50 * PAGE), 60 * PAGE)
    assert sum(page >= 0 for page in holding.near) <= 4  # a window of 8, a chunk of 64
    assert holding.near[0] == -1
    pages.end(holding)
    assert read(pages, text(1, 50 * PAGE), 60 * PAGE).far  # all came back


@pytest.mark.parametrize(("seed", "known"), [(0, 2), (1, 0), (2, 2)])
def test_the_longest_unused_goes_first(seed: int, known: int) -> None:
    pages = memory("gemma1-mqa", 7, 0)
    for one in (0, 1, 2, 0):  # two pages of each stay known, and one is free
        pages.end(read(pages, text(one, 2 * PAGE + 1), 2 * PAGE + 2))
    pages.end(read(pages, text(9, 3 * PAGE), 3 * PAGE))  # takes the free one and two more
    holding = pages.begin(text(seed, 2 * PAGE + 1), 2 * PAGE + 2)
    assert holding is not None
    assert holding.cached == known * PAGE


def test_of_a_text_the_end_goes_before_the_beginning() -> None:
    pages = memory("gemma1-mqa", 4, 0)
    prompt = text(0, 3 * PAGE + 1)
    pages.end(read(pages, prompt, 3 * PAGE + 1))
    pages.end(read(pages, text(1, PAGE + 1), 2 * PAGE))  # the free one, and one of the three
    assert read(pages, prompt, 3 * PAGE + 1).cached == 2 * PAGE


def test_no_room_now_is_none_and_not_an_error() -> None:
    pages = memory("gemma1-mqa", 4, 0)
    first = pages.begin(text(0, 10), 3 * PAGE)
    assert first is not None
    assert pages.begin(text(1, 10), 2 * PAGE) is None
    pages.end(first)
    assert pages.begin(text(1, 10), 4 * PAGE) is not None


@pytest.mark.parametrize("kind", ["gemma1-mqa", "gemma2", "gemma3"])
def test_no_page_is_lost_or_given_twice(kind: str) -> None:
    """A thousand texts that come, grow, share and go in any order."""
    r = random.Random(7)
    pages = memory(kind, 30, 30)
    held: list[tuple[Holding, list[int], int]] = []
    for _ in range(1000):
        if held and r.random() < 0.5:
            holding, tokens, length = held.pop(r.randrange(len(held)))
            grown = tokens + text(r.randrange(10**9), r.randrange(length - len(tokens) + 1))
            for at in range(len(tokens), len(grown)):
                pages.advance(holding, at, at + 1)
            pages.record(holding, grown)
            pages.end(holding)
        else:
            prompt = text(r.randrange(4), 200)[: r.randrange(1, 200)] + text(r.randrange(10**9), r.randrange(50))
            length = len(prompt) + r.randrange(1, 100)
            holding_or_none = pages.begin(prompt, length)
            if holding_or_none is None:
                assert held
                continue
            for start in range(holding_or_none.cached, len(prompt), CHUNK):
                pages.advance(holding_or_none, start, min(start + CHUNK, len(prompt)))
                pages.record(holding_or_none, prompt[: start + CHUNK])
            held.append((holding_or_none, prompt, length))
        for which in ("far", "near"):  # a page that two hold has the same tokens up to its end
            owners: dict[int, list[int]] = {}
            for holding, tokens, _ in held:
                for i, page in enumerate(getattr(holding, which)):
                    if page >= 0 and (i + 1) * PAGE <= len(tokens):
                        assert owners.setdefault(page, tokens[: (i + 1) * PAGE]) == tokens[: (i + 1) * PAGE]
    for holding, _, _ in held:
        pages.end(holding)
    config = small(kind)[2]
    whole = pages.begin(text(99, 10), 30 * PAGE if None in [k.window for k in config.layer_kinds()] else PAGE)
    assert whole is not None  # every page is there again


def test_memory_is_shared_out_and_too_little_is_said() -> None:
    config = small("gemma3")[2]
    one = page_bytes(config, "float32")
    far, near = plan_pages(config, "float32", 64 << 20, 4, CHUNK)
    windows = [kind.window for kind in config.layer_kinds()]
    used = far * windows.count(None) * one + near * (len(windows) - windows.count(None)) * one
    assert used <= 64 << 20
    assert near >= 4 * 3  # every slot's windows fit at once
    with pytest.raises(GemmaryError, match="the cache has 0 MB and needs at least"):
        plan_pages(config, "float32", 10_000, 4, CHUNK)
