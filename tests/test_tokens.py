"""Tokenized documents and conversations on disk: what goes in comes out, whole or not at all."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from token_files import numbered, tokens_of

from gemmary.data.tokens import Tokens, tokenizer_digest, write_dialogues, write_tokens
from gemmary.errors import GemmaryError
from gemmary.text import Dialogue, Tokenizer, encode_dialogue


def texts(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    letters = "abc é😀\n\t<>"
    return ["".join(rng.choice(letters) for _ in range(rng.choice([0, 1, 30, 3000]))) for _ in range(count)]


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_documents_come_back(
    tmp_path: Path, tiny: Tokenizer, seed: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gemmary.data.tokens._BATCH", 20_000)  # several batches
    documents = texts(seed, 300)
    info = write_tokens(tmp_path / "a", iter(documents), tiny, threads=threads)
    tokens = Tokens(tmp_path / "a")
    tokens.verify()
    assert tokens.info == info
    assert len(tokens) == info.documents == 300
    assert [tokens[i].tolist() for i in range(300)] == [tiny.encode(text) for text in documents]
    assert tokens.lengths.tolist() == [len(tiny.encode(text)) for text in documents]
    assert tokens.bytes == sum(len(text.encode()) for text in documents)
    assert info.tokens == tokens.lengths.sum()
    assert tokens[0].dtype == np.uint16
    assert not tokens[0].flags.writeable
    assert info.vocab_size == tiny.size
    assert info.tokenizer == tokenizer_digest(tiny)
    with pytest.raises(IndexError):
        tokens[300]
    with pytest.raises(IndexError):
        tokens[-1]


def test_a_digest_is_of_ids_and_of_where_documents_begin(tmp_path: Path) -> None:
    documents = {"a": [[5, 6], [7]], "b": [[5], [6, 7]], "c": [[5, 6], [8]], "d": [[5, 6], [7]]}
    digests = {name: tokens_of(tmp_path / name, ids).digest for name, ids in documents.items()}
    assert digests["a"] == digests["d"]
    assert len(set(digests.values())) == 3


def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path, gemma3: Tokenizer) -> None:
    write_tokens(tmp_path / "a", ["\t<unused99>"], gemma3)
    tokens = Tokens(tmp_path / "a")
    assert tokens[0].dtype == np.uint32
    assert tokens[0].tolist() == gemma3.encode("\t<unused99>")
    assert tokens[0].max() > 65535


def test_tokenizers_that_differ_have_another_digest(tiny: Tokenizer, gemma3: Tokenizer) -> None:
    again = Tokenizer.from_sentencepiece(tiny.to_sentencepiece())
    swapped = list(tiny.pieces)
    swapped[-1], swapped[-2] = swapped[-2], swapped[-1]
    assert tokenizer_digest(again) == tokenizer_digest(tiny)
    assert len({tokenizer_digest(t) for t in (tiny, gemma3, Tokenizer.from_pieces(*zip(*swapped, strict=True)))}) == 3


def test_a_worker_gets_the_path(tmp_path: Path) -> None:
    tokens = numbered(tmp_path / "a", [50_000])
    data = pickle.dumps(tokens)
    assert len(data) < 1000
    assert pickle.loads(data)[0].tolist() == tokens[0].tolist()


def test_what_fails_leaves_nothing(tmp_path: Path, tiny: Tokenizer) -> None:
    def broken() -> Iterator[str]:
        yield from ["text"] * 100
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        write_tokens(tmp_path / "a", broken(), tiny)
    with pytest.raises(GemmaryError, match="surrogate"):
        write_tokens(tmp_path / "a", ["\ud800"], tiny)
    for empty in ([], ["", ""]):
        with pytest.raises(GemmaryError, match="no text"):
            write_tokens(tmp_path / "a", empty, tiny)
    assert list(tmp_path.iterdir()) == []
    write_tokens(tmp_path / "a", ["text"], tiny)
    with pytest.raises(GemmaryError, match="exists already"):
        write_tokens(tmp_path / "a", ["other"], tiny)
    assert Tokens(tmp_path / "a")[0].tolist() == tiny.encode("text")


def test_only_what_is_needed_is_read_ahead(tmp_path: Path, tiny: Tokenizer) -> None:
    """A source as large as a disk must not be drawn into memory."""
    drawn, encoded = 0, 0

    class Counting:
        size, pieces = tiny.size, tiny.pieces

        def encode(self, text: str) -> list[int]:
            nonlocal encoded
            encoded += 1
            return [5]

    def documents() -> Iterator[str]:
        nonlocal drawn
        for _ in range(40):
            drawn += 1
            assert drawn - encoded <= 8, "documents are drawn faster than they are encoded"
            yield "x" * (1 << 20)

    write_tokens(tmp_path / "a", documents(), Counting(), threads=2)  # type: ignore[arg-type]
    assert encoded == 40


def test_damage_is_found(tmp_path: Path) -> None:
    tokens = numbered(tmp_path / "a", [5, 0, 7])
    path = tokens.path
    kept = {name: (path / name).read_bytes() for name in ("tokens.bin", "documents.bin", "info.json")}
    info = json.loads(kept["info.json"])
    starts = np.array([0, 7, 5, 12], "<i8")
    damage = {
        "tokens.bin": [kept["tokens.bin"][:-1], b""],
        "documents.bin": [kept["documents.bin"] + bytes(8), starts.tobytes(), (starts + 1).tobytes()],
        "info.json": [
            b"", b"[]", b"{}", b"null", json.dumps(info | {"dtype": "object"}).encode(),
            json.dumps(info | {"tokens": -1}).encode(), json.dumps(info | {"documents": 1 << 60}).encode(),
            json.dumps(info | {"more": 1}).encode(), json.dumps(info | {"digest": 1}).encode(),
        ],
    }  # fmt: skip
    for name, cases in damage.items():
        for data in cases:
            (path / name).write_bytes(data)
            with pytest.raises(GemmaryError):
                Tokens(path)
        (path / name).unlink()
        with pytest.raises(GemmaryError):
            Tokens(path)
        (path / name).write_bytes(kept[name])
    Tokens(path).verify()
    for name in ("tokens.bin", "documents.bin"):
        flipped = bytearray(kept[name])
        flipped[8] ^= 1
        (path / name).write_bytes(flipped)
        with pytest.raises(GemmaryError, match="not as it was written"):
            Tokens(path).verify()
        (path / name).write_bytes(kept[name])


# --- Conversations ----------------------------------------------------------------------------------------------------

ANSWERS = ["Hello!", "déjà vu", "😀", "x = 1\n" * 40]


def talk(tokenizer: Tokenizer, answers: list[str]) -> Dialogue:
    """What the user says, and these answers."""
    said = [
        message
        for answer in answers
        for message in ({"role": "user", "content": "And then?"}, {"role": "assistant", "content": answer})
    ]
    return encode_dialogue(tokenizer, said, generation=3, open_turn=False)


@pytest.fixture
def talks(tiny: Tokenizer) -> list[Dialogue]:
    return [talk(tiny, ANSWERS[:n]) for n in (1, 4, 2)]


def test_conversations_come_back_with_what_is_learnt(tmp_path: Path, tiny: Tokenizer, talks: list[Dialogue]) -> None:
    info = write_dialogues(tmp_path / "a", iter(talks), tiny)
    tokens = Tokens(tmp_path / "a")
    tokens.verify()
    assert tokens.info == info
    assert len(tokens) == info.documents == 3
    assert [tokens[i].tolist() for i in range(3)] == [one.ids for one in talks]
    assert [tokens.learnt(i).tolist() for i in range(3)] == [one.loss_mask for one in talks]
    assert info.tokens == tokens.lengths.sum() == sum(len(one.ids) for one in talks)
    assert (info.vocab_size, info.tokenizer) == (tiny.size, tokenizer_digest(tiny))
    assert pickle.loads(pickle.dumps(tokens)).learnt(1).tolist() == talks[1].loss_mask


def test_bytes_of_conversations_are_those_of_what_is_learnt(tmp_path: Path, tiny: Tokenizer) -> None:
    said = [ANSWERS[:1], ANSWERS[:3]]
    write_dialogues(tmp_path / "a", (talk(tiny, answers) for answers in said), tiny)
    assert Tokens(tmp_path / "a").bytes == sum(len(text.strip().encode()) for answers in said for text in answers)
    unlearnt = Dialogue(talk(tiny, ["Hi"]).ids, [False] * len(talk(tiny, ["Hi"]).ids))
    assert write_dialogues(tmp_path / "b", [unlearnt], tiny).bytes == 1  # what bits are divided by


def test_ids_of_conversations_take_as_many_bytes_as_those_of_documents(tmp_path: Path, gemma3: Tokenizer) -> None:
    one = talk(gemma3, ["\t<unused99>"])
    write_dialogues(tmp_path / "a", [one], gemma3)
    assert Tokens(tmp_path / "a")[0].dtype == np.uint32
    assert Tokens(tmp_path / "a")[0].tolist() == one.ids


def test_a_digest_is_of_what_is_learnt_too(tmp_path: Path, tiny: Tokenizer, talks: list[Dialogue]) -> None:
    flipped = [*talks[:2], Dialogue(talks[2].ids, [False, *talks[2].loss_mask[:-1]])]
    written = {"a": talks, "b": flipped, "c": talks}
    digests = {name: write_dialogues(tmp_path / name, one, tiny).digest for name, one in written.items()}
    assert digests["a"] == digests["c"] != digests["b"]


def test_damage_of_what_is_learnt_is_found(tmp_path: Path, tiny: Tokenizer, talks: list[Dialogue]) -> None:
    write_dialogues(tmp_path / "a", talks, tiny)
    path = tmp_path / "a" / "learnt.bin"
    kept = path.read_bytes()
    for damaged in (kept[:-1], kept + b"\0", b""):
        path.write_bytes(damaged)
        with pytest.raises(GemmaryError, match=rf"learnt.bin is {len(damaged)} bytes and should be {len(kept)}"):
            Tokens(tmp_path / "a")
    for at in (0, len(kept) - 1):
        flipped = bytearray(kept)
        flipped[at] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(GemmaryError, match="not as it was written"):
            Tokens(tmp_path / "a").verify()
    path.unlink()
    with pytest.raises(GemmaryError, match="not as it was written"):
        Tokens(tmp_path / "a").verify()


def test_documents_have_nothing_marked_as_learnt(tmp_path: Path) -> None:
    with pytest.raises(GemmaryError, match="holds documents, not conversations: write_dialogues makes them"):
        numbered(tmp_path / "a", [5]).learnt(0)


def test_conversations_that_fail_leave_nothing(tmp_path: Path, tiny: Tokenizer, talks: list[Dialogue]) -> None:
    def broken() -> Iterator[Dialogue]:
        yield from talks
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        write_dialogues(tmp_path / "a", broken(), tiny)
    with pytest.raises(GemmaryError, match="no conversation to write"):
        write_dialogues(tmp_path / "a", [], tiny)
    assert list(tmp_path.iterdir()) == []
    write_dialogues(tmp_path / "a", talks, tiny)
    with pytest.raises(GemmaryError, match="exists already"):
        write_dialogues(tmp_path / "a", talks[:1], tiny)
    assert len(Tokens(tmp_path / "a")) == 3
