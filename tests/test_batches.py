"""T5 in short: batches go on from every index, whatever makes them, without gap or repeat; and refuse another order.

The whole of it is in tests/release/test_mixture_release.py.
"""

from __future__ import annotations

import builtins
import json
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from token_files import EOS, IDS, numbered, same, tokens_of

from gemmary.data.batches import Batches, mixture_batches
from gemmary.data.mixture import MixtureSettings, Stage
from gemmary.data.packing import Batch
from gemmary.data.tokens import Tokens
from gemmary.errors import GemmaryError

STEPS = 1000
SETTINGS = MixtureSettings(
    stage=(
        Stage(until=0.6, weights={"books": 0.5, "web": 0.3, "code": 0.2}),
        Stage(weights={"books": 0.1, "web": 0.2, "code": 0.3, "maths": 0.4}),
    ),
    ramp=0.2,
)


def make_sources(path: Path, seed: int) -> dict[str, Tokens]:
    """Long documents, short ones, and a source so small that it goes round many times."""
    rng = np.random.default_rng(seed)
    lengths = {
        "books": [2000, 3000, 1500],
        "web": rng.integers(0, 60, 200).tolist(),
        "code": rng.integers(1, 200, 30).tolist(),
        "maths": [9, 40],
    }
    return {name: numbered(path / name, sizes, 10 + 100_000 * i) for i, (name, sizes) in enumerate(lengths.items())}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokens]:
    return make_sources(tmp_path_factory.mktemp("sources"), 0)


def make(sources: dict[str, Tokens], settings: MixtureSettings = SETTINGS, **changes: Any) -> Batches:
    return mixture_batches(settings, sources, **{"length": 16, "batch": 4, "steps": STEPS, "seed": 5, **IDS, **changes})


@pytest.fixture(scope="module")
def whole(sources: dict[str, Tokens]) -> list[Batch]:
    """The run from beginning to end."""
    return list(make(sources))


def continues(batches: Batches, whole: Sequence[Batch], index: int, most: int = STEPS) -> None:
    """What comes is the whole from `index` on, at most so many, to the end where there are fewer."""
    for expected in whole[index : index + most]:
        assert same(next(batches), expected)
    if index + most >= len(whole):
        with pytest.raises(StopIteration):
            next(batches)


def test_goes_on_from_every_index(sources: dict[str, Tokens], whole: list[Batch]) -> None:
    assert len(whole) == STEPS
    batches = make(sources)
    for index in range(STEPS + 1):
        batches.restore({"next": index, "order": batches.state()["order"]})
        continues(batches, whole, index, 6)  # beyond what is made ahead
    for index in (0, 1, 499, 997):
        batches.restore({"next": index, "order": batches.state()["order"]})
        continues(batches, whole, index)


@pytest.mark.parametrize(("workers", "index"), [(1, 1), (2, 998), (4, 501)])
def test_goes_on_with_workers(sources: dict[str, Tokens], whole: list[Batch], workers: int, index: int) -> None:
    batches = make(sources, workers=workers)
    batches.restore({"next": index, "order": batches.state()["order"]})
    continues(batches, whole, index, 40)
    batches.close()


def test_a_state_is_json_and_says_what_comes_next(sources: dict[str, Tokens], whole: list[Batch]) -> None:
    batches = make(sources)
    for index in range(3):
        state = json.loads(json.dumps(batches.state()))
        assert state["next"] == index
        assert same(next(batches), whole[index])
        other = make(sources)
        other.restore(state)
        assert other.state() == state
        continues(other, whole, index, 2)
    state = batches.state()
    next(batches)
    assert state["next"] == 3  # a state is not changed by going on


def test_every_epoch_of_every_source_is_whole(sources: dict[str, Tokens], whole: list[Batch]) -> None:
    """Read through the mixture, all of a source's epochs have every token once; the last one's have some at most once."""
    had: Counter[int] = Counter()
    for batch in whole:
        had.update(batch.targets[batch.mask > 0].tolist())
    ends = had.pop(EOS)
    epochs = make(sources).epochs()
    for i, (name, tokens) in enumerate(sources.items()):
        counts = [had[token] for token in range(10 + 100_000 * i, 10 + 100_000 * i + tokens.info.tokens)]
        assert int(epochs[name]) <= min(counts)
        assert max(counts) <= int(epochs[name]) + 1
    assert set(had) <= {t for tokens in sources.values() for i in range(len(tokens)) for t in tokens[i].tolist()}
    assert ends > 0
    assert epochs["maths"] > 100


def test_shares_are_those_of_the_tokens_so_far(sources: dict[str, Tokens], whole: list[Batch]) -> None:
    batches = make(sources)
    assert batches.shares() == {"books": 0, "code": 0, "maths": 0, "web": 0}
    had, slots = np.zeros(4), 0
    for index, batch in enumerate(whole):
        if index % 90 == 0 and index:
            batches.restore({"next": index, "order": batches.state()["order"]})
            shares = batches.shares()
            names = sorted(sources, key=list(sources).index)
            assert [shares[name] for name in names] == pytest.approx((had / had.sum()).tolist())
            assert batches.padding() == pytest.approx(1 - had.sum() / slots)
        slots += batch.mask.size
        for row in range(4):  # a row is of one source: its tokens say which
            real = batch.targets[row][(batch.mask[row] > 0) & (batch.targets[row] != EOS)]
            of = int(real[0] // 100_000) if len(real) else 3
            had[of] += batch.mask[row].sum()
            assert (real // 100_000 == of).all()


def test_processes_share_the_rows(sources: dict[str, Tokens], whole: list[Batch]) -> None:
    parts = [make(sources, rows=rows) for rows in ([0, 1], [2, 3])]
    assert parts[0].digest == parts[1].digest == make(sources).digest
    for index in range(5):
        both = [next(part) for part in parts]
        assert all(part.tokens.shape == (2, 16) for part in both)
        joined = Batch(*(np.concatenate(arrays) for arrays in zip(*both, strict=True)))
        assert same(joined, whole[index])


def test_a_state_of_another_order_is_refused_by_name(tmp_path: Path, sources: dict[str, Tokens]) -> None:
    state = make(sources).state()
    other = {**sources, "web": numbered(tmp_path / "web", [5, 50])}
    changes: list[tuple[str, Batches]] = [
        ("seed", make(sources, seed=6)),
        ("batch", make(sources, batch=8)),
        ("length", make(sources, length=15)),
        ("steps", make(sources, steps=STEPS + 1)),
        ("eos", make(sources, eos=3)),
        ("mixture", make(sources, replace(SETTINGS, ramp=0.1))),
        ("source web", make(other)),
    ]
    for name, batches in changes:
        with pytest.raises(GemmaryError, match=rf"\({name} differ\)"):
            batches.restore(state)
        assert batches.state()["next"] == 0
        assert batches.digest != make(sources).digest
    make(dict(reversed(sources.items())), workers=2).restore(state)  # neither the order of names nor workers matter
    for damaged in (
        {},
        {"next": -1},
        {"next": STEPS + 1},
        {"next": True},
        {"next": "1"},
        {"order": None},
        {"order": 1},
    ):
        with pytest.raises(GemmaryError):
            make(sources).restore(damaged if not damaged else {**state, **damaged})


def test_what_cannot_be_is_refused(tmp_path: Path, sources: dict[str, Tokens]) -> None:
    with pytest.raises(GemmaryError, match=r"mixture\.stage\[1\]\.weights\.maths"):
        make({name: tokens for name, tokens in sources.items() if name != "maths"})
    with pytest.raises(GemmaryError, match="the source maths has 51 tokens, not one row of 52"):
        make(sources, length=52)
    for name, value in (("length", 1), ("batch", 0), ("steps", 0), ("seed", -1), ("workers", -1)):
        with pytest.raises(GemmaryError, match=f"^{name} is {value}"):
            make(sources, **{name: value})
    for rows in ([], [0, 4], [-1]):
        with pytest.raises(GemmaryError, match="are not some of a batch of 4"):
            make(sources, rows=rows)
    other = tokens_of(tmp_path / "other", [range(100)])
    other.info = replace(other.info, tokenizer="another")
    with pytest.raises(GemmaryError, match="different tokenizers"):
        make({**sources, "maths": other})


def test_without_grain_the_error_says_what_to_install(
    sources: dict[str, Tokens], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name == "grain":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(GemmaryError, match=r"gemmary\[data\]"):
        next(make(sources))


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_after_an_error_comes_the_batch_that_failed(
    sources: dict[str, Tokens], whole: list[Batch], monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    batches = make(sources)
    continues(batches, whole, 0, 3)

    def broken(*_: object) -> None:
        raise error("the disk is gone")

    with monkeypatch.context() as patched:
        patched.setattr(Tokens, "__getitem__", broken)
        with pytest.raises(error, match="the disk is gone"):
            list(batches)
    came = batches.state()["next"]
    assert came < 10
    continues(batches, whole, came, 20)


def test_no_thread_is_left_behind(sources: dict[str, Tokens]) -> None:
    before = threading.active_count()
    batches = make(sources)
    for _ in range(20):
        next(batches)
        batches.restore(batches.state())
    assert threading.active_count() < before + 10  # the last ones may still be ending
