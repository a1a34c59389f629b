"""Trained tokenizers: Gemma's ids and options, the same for the same text, and errors that say what would be possible."""

from __future__ import annotations

import argparse
import random
import re
import textwrap
from pathlib import Path

import pytest
from test_tokenizer import random_texts

from gemmary.errors import GemmaryError
from gemmary.text import Tokenizer, encode_dialogue
from gemmary.text.training import TokenizerSettings, _sample, _sentences, bytes_per_token, compression, train_tokenizer
from gemmary.text.vocabulary import Kind

TEXTS = [Path(str(module.__file__)).read_text(encoding="utf-8") for module in (argparse, random, textwrap)]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer(TEXTS, TokenizerSettings(vocab_size=1500))


def test_ids_are_those_of_the_published_vocabularies(trained: Tokenizer, gemma3: Tokenizer) -> None:
    assert trained.size == 1500
    # GEMMA 1, as published: pad, eos, bos, unk; the turns; and ids recorded in tests/golden/tokenizer_gemma1.json.
    assert (trained.pad, trained.eos, trained.bos, trained.unk) == (0, 1, 2, 3)
    assert (trained.start_of_turn, trained.end_of_turn) == (106, 107)
    marks = ["<mask>", "<2mass>", "[@BOS@]", "<unused0>", "<unused98>"]
    assert [trained.piece_id(text) for text in marks] == [4, 5, 6, 7, 105]
    assert trained.encode("\n<b></b><i></i><table><tr><td></td></tr></table>") == [
        108, 201, 210, 202, 211, 169, 174, 176, 184, 182, 177,
    ]  # fmt: skip
    # Gemma 3 has the same literals, one id lower, and its tabs at 255968.
    texts = [piece.text for piece in trained.pieces]
    published = [piece.text for piece in gemma3.pieces]
    assert texts[108:217] == published[107:216]
    assert texts[217:248] == published[255968:255999]
    assert texts[248:504] == [f"<0x{i:02X}>" for i in range(256)]
    kinds = [piece.kind for piece in trained.pieces]
    assert set(kinds[4:108]) == {Kind.CONTROL}
    assert set(kinds[108:248]) == {Kind.USER_DEFINED}
    assert set(kinds[504:]) == {Kind.NORMAL}


def test_options_are_gemmas(trained: Tokenizer) -> None:
    def pieces(text: str) -> list[str]:
        return [trained.pieces[i].text for i in trained.encode(text)]

    assert pieces("2024") == ["2", "0", "2", "4"]  # digits are split
    assert pieces("self")[0][0] != "▁"  # no dummy prefix
    assert pieces("    return\n\n\tx")[0] == "▁▁▁▁"
    assert pieces("a\n\n\n\t\tb")[1:3] == ["\n\n\n", "\t\t"]
    assert pieces("\U0001f600") == ["<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]  # not in the text: bytes
    assert pieces("ﬁ") != pieces("fi")  # no normalization
    assert any(piece.text == "▁self" for piece in trained.pieces)


def test_training_sees_the_text_as_it_is() -> None:
    learnt = [
        p.text for p in train_tokenizer(["ﬁne in 2024 and 1999 "] * 50, TokenizerSettings(vocab_size=526)).pieces[504:]
    ]
    assert "ﬁ" in learnt
    assert {"2", "▁in"} <= set(learnt)
    assert not any(len(piece) > 1 and any(map(str.isdigit, piece)) for piece in learnt)


def test_every_text_comes_back(trained: Tokenizer) -> None:
    for text in (*TEXTS, *random_texts(1, 1500, [piece.text for piece in trained.pieces])):
        assert trained.decode(trained.encode(text), structure=False) == text


def test_text_never_becomes_structure(trained: Tokenizer) -> None:
    names = [trained.pieces[i].text for i in sorted(trained.structural_ids)]
    assert len(names) == 108
    rng = random.Random(2)
    for i in range(1000):
        text = names[i % len(names)].join(rng.choice(["", " ", "<", "a", "\n"]) for _ in range(3))
        ids = trained.encode(text)
        assert not trained.structural_ids & set(ids)
        assert trained.decode(ids) == text
    talk = encode_dialogue(trained, [{"role": "user", "content": "<end_of_turn>"}], generation=1, open_turn=True)
    assert talk.ids.count(107) == 1


def test_the_same_text_gives_the_same_tokenizer(trained: Tokenizer) -> None:
    for threads, texts in ((1, TEXTS), (3, TEXTS[::-1])):
        assert train_tokenizer(texts, TokenizerSettings(vocab_size=1500, threads=threads)).pieces == trained.pieces
    assert train_tokenizer(TEXTS[:2], TokenizerSettings(vocab_size=1500)).pieces != trained.pieces


def test_files_of_a_trained_tokenizer_are_read_back(trained: Tokenizer) -> None:
    assert Tokenizer.from_sentencepiece(trained.to_sentencepiece()).pieces == trained.pieces


@pytest.mark.parametrize(("size", "answer"), [(60_000, r"at most (\d+)"), (505, r"alone need (\d+)")])
def test_the_error_says_which_size_is_possible(size: int, answer: str) -> None:
    texts = TEXTS[2:]
    with pytest.raises(GemmaryError, match=r"tokenizer\.vocab_size is") as error:
        train_tokenizer(texts, TokenizerSettings(vocab_size=size))
    found = re.search(answer, str(error.value))
    assert found
    assert train_tokenizer(texts, TokenizerSettings(vocab_size=int(found[1]))).size == int(found[1])


@pytest.mark.parametrize(
    ("wrong", "named"),
    [({"vocab_size": 504}, "tokenizer.vocab_size"), ({"vocab_size": 300_000}, "tokenizer.vocab_size"),
     ({"max_bytes": 0}, "tokenizer.max_bytes"), ({"character_coverage": float("nan")}, "tokenizer.character_coverage"),
     ({"seed": -1}, "tokenizer.seed"), ({"threads": -1}, "tokenizer.threads")],
)  # fmt: skip
def test_settings_are_checked(wrong: dict[str, float], named: str) -> None:
    with pytest.raises(GemmaryError, match=named):
        TokenizerSettings(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("texts", [[], [""], ["a\ud800b"]])
def test_no_text_is_an_error(texts: list[str]) -> None:
    with pytest.raises(GemmaryError):
        train_tokenizer(texts, TokenizerSettings())


def test_training_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    train_tokenizer(TEXTS, TokenizerSettings(vocab_size=700))
    with pytest.raises(GemmaryError):
        train_tokenizer(TEXTS, TokenizerSettings(vocab_size=200_000))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "text", ["", "a", "word " * 5000, "x" * 20_000, "\n" * 9000, TEXTS[0], "é\n" * 5000 + " " * 9000]
)
def test_sentences_are_the_whole_text(text: str) -> None:
    sentences = list(_sentences(text))
    assert b"".join(sentences).decode() == text
    assert all(0 < len(sentence) <= 16384 for sentence in sentences)
    if text in (TEXTS[0], "word " * 5000):
        assert len(sentences) > 5
        assert all(sentence[:1] in (b" ", b"\n") for sentence in sentences[1:])


def test_a_sample_depends_on_the_texts_and_the_seed_alone() -> None:
    texts = [f"document {i} " * (1 + i % 7) for i in range(500)]
    whole = sum(map(len, texts))
    once = _sample(texts, whole // 3, seed=1)
    assert whole // 4 < sum(map(len, once)) <= whole // 3
    shuffled = random.Random(0).sample(texts, len(texts))
    assert sorted(_sample(shuffled, whole // 3, seed=1)) == sorted(once)
    assert sorted(_sample(texts, whole // 3, seed=2)) != sorted(once)
    assert len(_sample(texts, whole, seed=1)) == 500
    positions = [int(sentence.split()[1]) for sentence in once]  # and it is even
    assert 0.35 < sum(i < 250 for i in positions) / len(positions) < 0.65


def test_compression_of_each_source_beside_another_tokenizer(trained: Tokenizer, gemma3: Tokenizer) -> None:
    sources = {"code": TEXTS[:1], "digits": ["0123456789"]}
    report = compression(sources, {"trained": trained, "gemma3": gemma3})
    assert report["digits"] == {"trained": 1.0, "gemma3": 1.0}
    size = len(TEXTS[0].encode())
    assert report["code"]["gemma3"] == size / len(gemma3.encode(TEXTS[0]))
    assert report["code"]["trained"] == bytes_per_token(trained, TEXTS[:1]) > 2
    with pytest.raises(GemmaryError, match="code"):
        compression({"code": []}, {"trained": trained})
