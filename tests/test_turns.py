"""Rows of conversations, pairs and prompts: each whole, once an epoch, in an order that a seed and a name decide."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from token_files import PAD, Numbers, same

from gemmary.data.batches import Batches, row_batches
from gemmary.data.packing import Batch
from gemmary.data.tokens import Tokens, write_dialogues
from gemmary.data.turns import PackedDialogues, PackedPairs, PairBatch, PromptBatch, Prompts, lay_out, pack
from gemmary.errors import GemmaryError
from gemmary.text import Dialogue, Tokenizer


class Spoken(Numbers):
    """Numbers of one byte each."""

    def token_bytes(self, id: int) -> bytes:
        return b"x"


def conversations(path: Path, sizes: Sequence[int], first: int = 10) -> Tokens:
    """Conversations of these sizes in which every token of all has an id of its own, about half of them learnt."""
    rng = np.random.default_rng(len(sizes))
    ends = first + np.cumsum(sizes)
    said = (
        Dialogue(list(range(end - n, end)), [False, *(rng.random(n - 1) < 0.5).tolist()])
        for end, n in zip(ends.tolist(), sizes, strict=True)
    )
    write_dialogues(path, said, cast("Tokenizer", Spoken()))
    return Tokens(path)


def sizes_of(seed: int, count: int = 40, most: int = 50) -> list[int]:
    return [int(n) for n in np.exp(np.random.default_rng(seed).uniform(0, np.log(most), count)).round()]


def pieces(row: Batch | PairBatch) -> list[tuple[list[int], list[int]]]:
    """(ids, which of them are learnt) of each segment, having checked what every row promises."""
    used = int((row.segments >= 0).sum())
    for array, fill in ((row.tokens, PAD), (row.targets, PAD), (row.positions, -1), (row.segments, -1)):
        assert (array[used:] == fill).all()
        assert array.dtype == np.int32
    assert row.mask.dtype == np.float32
    assert not row.mask[used:].any()
    assert (np.diff(row.segments[:used]) >= 0).all()
    found = []
    for segment in range(int(row.segments.max()) + 1):
        at = np.flatnonzero(row.segments == segment)
        ids = row.tokens[at].tolist()
        assert row.positions[at].tolist() == list(range(len(at)))
        assert row.targets[at[:-1]].tolist() == ids[1:]
        assert row.mask[at[-1]] == 0
        found.append((ids, [0, *row.mask[at[:-1]].astype(int).tolist()]))
    return found


# --- pack -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_every_item_is_packed_once_and_no_row_is_too_long(seed: int) -> None:
    lengths = sizes_of(seed, 200)
    rows = pack(lengths, 50)
    assert sorted(item for row in rows for item in row) == list(range(200))
    assert max(sum(lengths[item] for item in row) for row in rows) <= 50


@pytest.mark.parametrize("seed", range(5))
def test_no_two_rows_would_fit_into_one(seed: int) -> None:
    lengths = sizes_of(seed, 200)
    used = [sum(lengths[item] for item in row) for row in pack(lengths, 50)]
    assert min(a + b for a, b in combinations(used, 2)) > 50


def test_rows_are_full_where_there_are_small_items() -> None:
    lengths = sizes_of(0, 1000)
    assert len(pack(lengths, 50)) <= 1.02 * sum(lengths) / 50 + 1


def test_an_item_goes_where_it_leaves_the_least_room() -> None:
    assert pack([12, 9, 9, 2], 20) == [[0], [1, 2, 3]]  # where it fits first would be with 12
    assert pack([2, 3, 4, 5, 6], 10) == [[4, 2], [3, 1, 0]]


def test_what_is_equally_long_is_packed_in_order() -> None:
    assert pack([5] * 5, 10) == [[0, 1], [2, 3], [4]]
    assert pack([], 10) == []


# --- lay_out ----------------------------------------------------------------------------------------------------------


def test_a_row_slot_by_slot() -> None:
    row = lay_out([(np.array([5, 6, 7]), np.array([0, 1, 1])), (np.array([8, 9]), np.array([1, 0]))], 7, 4)
    assert row.tokens.tolist() == [5, 6, 7, 8, 9, 4, 4]
    assert row.targets.tolist() == [6, 7, 4, 9, 4, 4, 4]
    assert row.mask.tolist() == [1, 1, 0, 0, 0, 0, 0]  # that 8 is learnt is for no slot to predict
    assert row.positions.tolist() == [0, 1, 2, 0, 1, -1, -1]
    assert row.segments.tolist() == [0, 0, 0, 1, 1, -1, -1]


def test_a_row_of_nothing_is_padding() -> None:
    assert pieces(lay_out([], 3, PAD)) == []


# --- Conversations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("length", [50, 64])
def test_each_conversation_is_whole_and_once_an_epoch(tmp_path: Path, seed: int, length: int) -> None:
    tokens = conversations(tmp_path / "a", sizes_of(seed))
    packed = PackedDialogues(tokens, "a", length=length, seed=seed, pad=PAD)
    expected = sorted((tokens[i].tolist(), tokens.learnt(i).tolist()) for i in range(len(tokens)))
    for epoch in range(3):
        rows = [packed[epoch * packed.rows + i] for i in range(packed.rows)]
        assert sorted(piece for row in rows for piece in pieces(row)) == expected


def test_rows_are_a_function_of_number_seed_and_name(tmp_path: Path) -> None:
    tokens = conversations(tmp_path / "a", sizes_of(1, 200))

    def make(name: str, seed: int) -> PackedDialogues:
        return PackedDialogues(tokens, name, length=50, seed=seed, pad=PAD)

    packed = make("a", 3)
    numbers = range(3 * packed.rows)
    rows = [packed[i] for i in numbers]
    again = make("a", 3)
    for i in np.random.default_rng(0).permutation(numbers).tolist():
        assert same(again[i], rows[i])
    for other in (make("a", 4), make("b", 3)):
        assert sum(same(other[i], rows[i]) for i in numbers) < len(rows) / 5


def test_epochs_have_orders_of_their_own(tmp_path: Path) -> None:
    packed = PackedDialogues(conversations(tmp_path / "a", [30] * 50), "a", length=50, seed=0, pad=PAD)
    orders = [[int(packed[50 * epoch + i].tokens[0]) for i in range(50)] for epoch in range(3)]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    for one, other in combinations([*orders, sorted(orders[0])], 2):
        assert sum(a == b for a, b in zip(one, other, strict=True)) < 10


def test_padding_so_far_is_that_of_the_rows_so_far(tmp_path: Path) -> None:
    packed = PackedDialogues(conversations(tmp_path / "a", sizes_of(2)), "a", length=60, seed=1, pad=PAD)
    padding = 0
    for number in range(3 * packed.rows + 1):
        assert packed.padding(number) == padding
        padding += int((packed[number].segments < 0).sum())
    assert padding > 0


def test_what_is_longer_than_a_row_is_refused_by_name(tmp_path: Path) -> None:
    tokens, other = conversations(tmp_path / "a", [5, 21, 8]), conversations(tmp_path / "b", [5, 3, 8])
    assert PackedDialogues(tokens, "talk", length=21, seed=0, pad=PAD).rows == 2
    with pytest.raises(GemmaryError, match="the source talk has 21 tokens in one piece, and a row takes 20"):
        PackedDialogues(tokens, "talk", length=20, seed=0, pad=PAD)
    with pytest.raises(GemmaryError, match="the source likes has 24 tokens in one piece, and a row takes 23"):
        PackedPairs(tokens, other, "likes", length=23, seed=0, pad=PAD)


# --- Pairs ------------------------------------------------------------------------------------------------------------


def pairs(path: Path, seed: int) -> tuple[Tokens, Tokens]:
    chosen, rejected = sizes_of(seed), sizes_of(seed + 100)
    return conversations(path / "chosen", chosen), conversations(path / "rejected", rejected, 10_000)


@pytest.mark.parametrize("seed", range(3))
def test_both_answers_lie_in_one_row_and_the_partner_is_the_end_of_the_other(tmp_path: Path, seed: int) -> None:
    chosen, rejected = pairs(tmp_path, seed)
    packed = PackedPairs(chosen, rejected, "a", length=110, seed=seed, pad=PAD)
    index = {int(chosen[i][-1]): i for i in range(len(chosen))}
    for epoch in range(2):
        had = []
        for number in range(packed.rows):
            row = packed[epoch * packed.rows + number]
            found = pieces(row)
            assert row.partner.dtype == np.int32
            ends = np.flatnonzero(row.partner >= 0)
            assert len(found) == 2 * len(ends)
            assert (row.partner[row.partner < 0] == -1).all()
            for end in ends.tolist():
                i = index[int(row.tokens[end])]
                assert row.tokens[row.partner[end]] == rejected[i][-1]
                assert row.segments[row.partner[end]] == row.segments[end] + 1
                for tokens, at in ((chosen, end), (rejected, int(row.partner[end]))):
                    assert found[int(row.segments[at])] == (tokens[i].tolist(), tokens.learnt(i).tolist())
                had.append(i)
        assert sorted(had) == list(range(len(chosen)))


def test_rows_in_order_have_every_pair_once(tmp_path: Path) -> None:
    chosen, rejected = pairs(tmp_path, 0)
    packed = PackedPairs(chosen, rejected, "a", length=110, seed=0, pad=PAD)
    rows = packed.in_order()
    assert sorted(i for row in rows for i in row) == list(range(len(chosen)))
    for row in rows:
        said = [ids for ids, _ in pieces(packed.row(row))]
        assert said == [tokens[i].tolist() for i in row for tokens in (chosen, rejected)]


def test_an_empty_row_has_no_pair(tmp_path: Path) -> None:
    chosen, rejected = pairs(tmp_path, 0)
    row = PackedPairs(chosen, rejected, "a", length=110, seed=0, pad=PAD).row([])
    assert pieces(row) == []
    assert row.partner.tolist() == [-1] * 110


# --- Prompts ----------------------------------------------------------------------------------------------------------


def test_each_prompt_comes_once_an_epoch_with_its_source() -> None:
    prompts = Prompts(20, 3, "asked", seed=1)
    epochs = [[prompts[20 * epoch + i] for i in range(20)] for epoch in range(3)]
    for rows in epochs:
        assert sorted(int(row.prompt) for row in rows) == list(range(20))
        assert {int(row.source) for row in rows} == {3}
    assert epochs[0] != epochs[1] != epochs[2]
    assert prompts.padding(50) == 0


# --- Batches of rows --------------------------------------------------------------------------------------------------

ORDER = {"source a": "0f", "source b": "1e"}


def asked(
    a: int = 30, b: int = 30, weights: tuple[float, float] = (1, 1), order: dict[str, str] = ORDER, **changes: int
) -> Batches:
    sources = {"a": Prompts(a, 0, "a", seed=1), "b": Prompts(b, 1, "b", seed=1)}
    settings = {"length": 1, "batch": 4, "steps": 60, "seed": 5, **changes}
    return row_batches(sources, dict(zip("ab", weights, strict=True)), order, **settings)


def counts(batches: Batches) -> list[int]:
    came = np.concatenate([batch.source for batch in batches])
    return [int((came == source).sum()) for source in (0, 1)]


def test_without_weights_every_row_of_every_source_comes_equally_often() -> None:
    batches = asked(12, 48)
    assert counts(batches) == [48, 192]
    assert batches.epochs() == {"a": 4, "b": 4}


def test_a_weight_multiplies_a_source_s_share() -> None:
    batches = asked(30, 30, (2, 1))
    assert counts(batches) == [160, 80]
    assert batches.shares() == pytest.approx({"a": 2 / 3, "b": 1 / 3})
    assert counts(asked(12, 48, (2, 1))) == [80, 160]
    assert counts(asked(30, 30, (0, 1))) == [0, 240]


def test_whole_epochs_of_a_batch_have_every_prompt() -> None:
    came = [(int(s), int(p)) for batch in asked(20, 40, steps=15) for s, p in zip(*batch, strict=True)]
    assert sorted(came) == sorted([(0, i) for i in range(20)] + [(1, i) for i in range(40)])


def test_a_batch_is_rows_below_each_other(tmp_path: Path) -> None:
    chosen, rejected = pairs(tmp_path, 0)
    packed = PackedPairs(chosen, rejected, "a", length=110, seed=0, pad=PAD)
    batch = next(row_batches({"a": packed}, {"a": 1}, {}, length=110, batch=3, steps=2, seed=0))
    assert isinstance(batch, PairBatch)
    assert batch.partner.shape == batch.mask.shape == (3, 110)
    rows = [PairBatch(*(array[i] for array in batch)) for i in range(3)]
    assert all(same(row, packed[i]) for i, row in enumerate(rows))


def test_shares_and_padding_are_of_tokens(tmp_path: Path) -> None:
    tokens = {"a": conversations(tmp_path / "a", [40] * 6), "b": conversations(tmp_path / "b", [25] * 12)}
    packed = {name: PackedDialogues(one, name, length=50, seed=0, pad=PAD) for name, one in tokens.items()}
    batches = row_batches(packed, {"a": 1, "b": 1}, {}, length=50, batch=2, steps=6, seed=0)
    assert sum((batch.segments < 0).sum() for batch in batches) == 60
    assert batches.padding() == pytest.approx(60 / 600)
    assert batches.shares() == pytest.approx({"a": 240 / 540, "b": 300 / 540})


@pytest.mark.parametrize("index", [0, 1, 17, 59, 60])
def test_goes_on_from_a_state(index: int) -> None:
    whole = list(asked())
    first, again = asked(), asked()
    for _ in range(index):
        next(first)
    again.restore(json.loads(json.dumps(first.state())))
    rest = list(again)
    assert len(rest) == 60 - index
    assert all(same(one, other) for one, other in zip(rest, whole[index:], strict=True))
    first.close()


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("seed", lambda: asked(seed=6)),
        ("batch", lambda: asked(batch=5)),
        ("length", lambda: asked(length=2)),
        ("steps", lambda: asked(steps=61)),
        ("mixture", lambda: asked(weights=(2, 1))),
        ("source b", lambda: asked(order={**ORDER, "source b": "2d"})),
        ("source c", lambda: asked(order={**ORDER, "source c": "2d"})),
    ],
)
def test_a_state_of_another_order_is_refused_by_name(name: str, other: Callable[[], Batches]) -> None:
    with pytest.raises(GemmaryError, match=rf"\({name} differ\)"):
        other().restore(asked().state())
    assert other().digest != asked().digest == asked().digest


@pytest.mark.parametrize("changes", [{"batch": 0}, {"steps": 0}, {"seed": -1}])
def test_what_cannot_be_is_refused(changes: dict[str, Any]) -> None:
    (name,) = changes
    with pytest.raises(GemmaryError, match=f"^{name} is"):
        asked(**changes)


def test_no_weight_at_all_is_refused() -> None:
    with pytest.raises(GemmaryError, match="at least one source needs a weight above 0"):
        asked(weights=(0, 0))


def test_a_prompt_s_batch_names_source_and_prompt() -> None:
    batch = next(asked())
    assert isinstance(batch, PromptBatch)
    assert batch.source.shape == batch.prompt.shape == (4,)
    assert batch.source.dtype == batch.prompt.dtype == np.int32
