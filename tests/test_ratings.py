"""Ratings in SQLite: nothing is lost on a kill, orders are as good as random and stay, the last word counts and can be taken back."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from gemmary.errors import GemmaryError
from gemmary.evaluate.ratings import Ratings


@pytest.fixture
def ratings(tmp_path: Path) -> Iterator[Ratings]:
    with closing(Ratings(tmp_path / "ratings.sqlite")) as opened:
        yield opened


def test_what_was_rated_is_there_again(tmp_path: Path) -> None:
    path = tmp_path / "ratings.sqlite"
    with closing(Ratings(path)) as first:
        first.rate("Anna", "p1", 1.0)
        first.rate("Anna", "p2", None)
        first.rate("Ben", "p1", 0.5)
        sides = {pair: first.first("Anna", pair) for pair in map(str, range(50))}
        order = first.order("Anna", list(sides))
    with closing(Ratings(path)) as again:
        assert again.by_pair() == {"p1": {"Anna": 1.0, "Ben": 0.5}}
        assert again.seen("Anna") == {"p1", "p2"}
        assert again.seen("Ben") == {"p1"}
        assert again.seen("anna") == set()
        assert {pair: again.first("Anna", pair) for pair in sides} == sides
        assert again.order("Anna", list(reversed(sides))) == order


def test_the_last_word_counts_and_can_be_taken_back(ratings: Ratings) -> None:
    for pair, value in (("p1", 1.0), ("p2", 0.0), ("p1", 0.0), ("elsewhere", 1.0)):
        ratings.rate("Anna", pair, value)
    ratings.rate("Ben", "p2", 1.0)
    here = {"p1", "p2"}
    assert ratings.by_pair()["p1"] == {"Anna": 0.0}
    assert ratings.undo("Anna", here) == "p1"  # it was rated again after p2
    assert ratings.undo("Anna", here) == "p2"
    assert ratings.undo("Anna", here) is None
    assert ratings.by_pair() == {"elsewhere": {"Anna": 1.0}, "p2": {"Ben": 1.0}}


def test_orders_are_as_good_as_random(ratings: Ratings) -> None:
    pairs = [f"p{i}" for i in range(400)]
    for rater in ("Anna", "Ben"):
        first = sum(ratings.first(rater, pair) == "a" for pair in pairs)
        assert 140 < first < 260
    differ = sum(ratings.first("Anna", pair) != ratings.first("Ben", pair) for pair in pairs)
    assert 140 < differ < 260
    orders = [ratings.order(rater, pairs) for rater in ("Anna", "Ben")]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(pairs)
    assert orders[0] != orders[1]


def test_another_comparison_has_other_orders(tmp_path: Path) -> None:
    """Who knows the program still does not know who is first."""
    pairs = [f"p{i}" for i in range(100)]
    with closing(Ratings(tmp_path / "1")) as one, closing(Ratings(tmp_path / "2")) as other:
        assert [one.first("A", pair) for pair in pairs] != [other.first("A", pair) for pair in pairs]


def test_names_and_pairs_are_data(ratings: Ratings) -> None:
    name = "Robert'); DROP TABLE ratings;--\u202e💥"
    ratings.rate(name, "p'1", 0.5)
    assert ratings.by_pair() == {"p'1": {name: 0.5}}


def test_several_at_once(tmp_path: Path) -> None:
    """Threads of one server, and another process's connection beside it."""
    path = tmp_path / "ratings.sqlite"
    with closing(Ratings(path)) as one, closing(Ratings(path)) as other:

        def rate(who: int) -> None:
            for i in range(20):
                (one, other)[who % 2].rate(f"r{who}", f"p{i}", 1.0)

        threads = [threading.Thread(target=rate, args=(who,)) for who in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {pair: len(by) for pair, by in one.by_pair().items()} == {f"p{i}": 4 for i in range(20)}


def test_a_kill_loses_nothing_that_was_said(tmp_path: Path) -> None:
    path = tmp_path / "ratings.sqlite"
    script = (
        "import sys; from pathlib import Path; from gemmary.evaluate.ratings import Ratings\n"
        "ratings = Ratings(Path(sys.argv[1]))\n"
        "for i in range(10 ** 6):\n"
        "    ratings.rate('Anna', f'p{i}', 1.0)\n"
        "    print(i, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = [int(process.stdout.readline()) for _ in range(30)]
        os.kill(process.pid, signal.SIGKILL)
        told += [int(line) for line in process.stdout.read().split("\n")[:-1] if line]
    with closing(Ratings(path)) as again:
        kept = again.by_pair()
    assert {f"p{i}" for i in told} <= set(kept)
    assert len(kept) <= len(told) + 1


def test_it_is_a_write_ahead_log(ratings: Ratings, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "ratings.sqlite")) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_another_file_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "ratings.sqlite"
    path.write_bytes(b"not a database at all, but long enough to be looked at " * 20)
    before = path.read_bytes()
    with pytest.raises(GemmaryError, match=r"cannot be used for ratings"):
        Ratings(path)
    assert path.read_bytes() == before
    with pytest.raises(GemmaryError, match=r"cannot be used for ratings"):
        Ratings(tmp_path / "gone" / "ratings.sqlite")
