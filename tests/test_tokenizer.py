"""The tokenizer against golden ids of the published ones, against its own promises, and under hostile files."""

from __future__ import annotations

import json
import random
import string
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from gemmary.errors import GemmaryError
from gemmary.text import Decoder, Tokenizer, writers
from gemmary.text.vocabulary import Kind, kind_of

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> Any:
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def random_texts(seed: int, count: int, pieces: list[str]) -> Iterator[str]:
    """Mixed hard texts: any Unicode, code-like, whitespace-heavy, pieces run together, short loops. No U+2581."""
    rng = random.Random(seed)
    words = [piece.replace("▁", " ") for piece in pieces]
    letters = string.ascii_letters + string.digits + string.punctuation

    def character() -> str:
        spans = [(0x20, 0x7F), (0xA0, 0x3000), (0x3000, 0xD800), (0xE000, 0x30000), (0x1F300, 0x1FB00), (0x300, 0x370)]
        return chr(rng.randrange(*rng.choice(spans)))

    makers = [
        lambda: character(),
        lambda: rng.choice(letters) if rng.random() < 0.8 else rng.choice(" \n"),
        lambda: rng.choice(" \n\t\r") * rng.randrange(1, 9) if rng.random() < 0.6 else rng.choice(letters),
        lambda: rng.choice(words),
        lambda: rng.choice("ab.") * rng.randrange(1, 9),
        lambda: rng.choice(["<", ">", "[", "]", "@", "</", "<b", "bos", "unused", "7", "start_of_turn", "<bos>", " "]),
    ]
    for i in range(count):
        make = makers[i % len(makers)]
        text = "".join(make() for _ in range(rng.randrange(24)))
        yield text.replace("▁", " ")


# --- Fidelity ---------------------------------------------------------------------------------------------------------


def test_golden_ids_of_the_published_gemma3(gemma3: Tokenizer) -> None:
    recorded = golden("tokenizer_gemma3.json")
    assert len(recorded["text"]) > 200
    for text, ids in recorded["text"]:
        assert gemma3.encode(text, structure=True) == ids, text
        assert gemma3.encode(text) == ids, text
    for text, ids in recorded["structure"]:
        if "soft_token" not in text:  # id 262144 lies beyond the 262144 rows of the text models
            assert gemma3.encode(text, structure=True) == ids, text


def test_ids_that_models_rely_on(gemma3: Tokenizer, tiny: Tokenizer) -> None:
    for tokenizer, turn_ids in ((gemma3, (105, 106)), (tiny, (106, 107))):
        assert (tokenizer.pad, tokenizer.eos, tokenizer.bos, tokenizer.unk) == (0, 1, 2, 3)
        assert (tokenizer.start_of_turn, tokenizer.end_of_turn) == turn_ids
        assert tokenizer.stop_ids == (1, turn_ids[1])
        assert tokenizer.piece_id("<bos>") == 2
        assert tokenizer.piece_id("no such piece") is None
    assert gemma3.size == 262144


def test_structural_ids_of_gemma3(gemma3: Tokenizer) -> None:
    named = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "[multimodal]", "<start_of_turn>", "<end_of_turn>"]
    named += ["<start_of_image>", "<end_of_image>", *(f"<unused{i}>" for i in range(6242))]
    assert {gemma3.pieces[i].text for i in gemma3.structural_ids} == set(named)
    literal = [piece.text for piece in gemma3.pieces if piece.kind is Kind.USER_DEFINED]
    assert len(literal) == 162  # 31 of \n, 30 of ▁ (2 to 31), 31 of \t, 70 tags
    assert sum(piece.kind is Kind.BYTE for piece in gemma3.pieces) == 256


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        ("<start_of_turn>", Kind.NORMAL, Kind.CONTROL),
        ("<unused12>", Kind.USER_DEFINED, Kind.CONTROL),
        ("<unused99>", Kind.NORMAL, Kind.UNUSED),
        ("<|tool|>", Kind.USER_DEFINED, Kind.CONTROL),
        ("[INST]", Kind.USER_DEFINED, Kind.CONTROL),
        ("endoftext", Kind.CONTROL, Kind.CONTROL),
        ("<b>", Kind.CONTROL, Kind.USER_DEFINED),
        ("\n\n", Kind.USER_DEFINED, Kind.USER_DEFINED),
        ("word", Kind.USER_DEFINED, Kind.USER_DEFINED),
        ("<0x41>", Kind.NORMAL, Kind.BYTE),
        ("<unk>", Kind.CONTROL, Kind.UNKNOWN),
        ("<word", Kind.NORMAL, Kind.NORMAL),
        ("x", Kind.UNUSED, Kind.UNUSED),
    ],
)
def test_rule_of_structure(text: str, kind: Kind, expected: Kind) -> None:
    assert kind_of(text, kind) is expected


def test_matches_sentencepiece_itself(tiny: Tokenizer, tiny_model: bytes) -> None:
    peer = sentencepiece.SentencePieceProcessor(model_proto=tiny_model)
    basic = ("<pad>", "<eos>", "<bos>", "<unk>")
    for text in random_texts(1, 3000, [piece.text for piece in tiny.pieces if piece.text not in basic]):
        if not any(mark in text for mark in basic):  # SentencePiece reads these four as text
            assert tiny.encode(text, structure=True) == peer.encode(text), text


def test_all_readers_agree(tiny: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(tiny.to_tokenizer_json()), encoding="utf-8")
    (tmp_path / "tokenizer.model").write_bytes(tiny.to_sentencepiece())
    rows = [
        (text.replace("▁", " ") if kind is Kind.USER_DEFINED else text, score, kind)
        for text, score, kind in tiny.pieces
    ]
    readers = [
        Tokenizer.from_tokenizer_json(tmp_path / "tokenizer.json"),
        Tokenizer.from_sentencepiece(tmp_path / "tokenizer.model"),
        Tokenizer.from_directory(tmp_path),
        Tokenizer.from_pieces(*zip(*rows, ("[PAD1000]", 0.0, 5), strict=True)),
    ]
    for reader in readers:
        assert [(p.text, p.kind) for p in reader.pieces] == [(p.text, p.kind) for p in tiny.pieces]
    for text in random_texts(2, 1500, [piece.text for piece in tiny.pieces]):
        expected = [tiny.encode(text, structure=mode) for mode in (False, True)]
        for reader in readers:
            assert [reader.encode(text, structure=mode) for mode in (False, True)] == expected, text


def test_a_written_model_is_as_protobuf_writes_it(tiny: Tokenizer) -> None:
    longer = [("ä" * n, -1e6 - n, Kind.NORMAL) for n in (50, 58, 59, 60, 63, 64, 65, 100, 150)]
    rows = [*tiny.pieces, *longer]
    for structure in (False, True):
        written = writers.to_sentencepiece(Tokenizer.from_pieces(*zip(*rows, strict=True)).pieces, structure=structure)
        proto: Any = sentencepiece_model_pb2.ModelProto()
        proto.ParseFromString(written)
        assert proto.SerializeToString() == written
        assert [(piece.piece, piece.score) for piece in proto.pieces] == [(text, score) for text, score, _ in rows]
        turn = proto.pieces[tiny.start_of_turn]
        assert (turn.type == turn.USER_DEFINED, turn.type == turn.CONTROL) == (structure, not structure)


def test_the_tab_that_gemma1s_json_has_for_a_byte(tiny: Tokenizer, tmp_path: Path) -> None:
    data: Any = tiny.to_tokenizer_json()
    vocab = data["model"]["vocab"]
    vocab["\t"] = vocab.pop("<0x09>")
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    reader = Tokenizer.from_tokenizer_json(tmp_path / "tokenizer.json")
    assert reader.encode("a\tb") == tiny.encode("a\tb")
    assert reader.decode(reader.encode("a\tb")) == "a\tb"


# --- Text survives, and never becomes structure -----------------------------------------------------------------------


def test_round_trip_and_no_structure(gemma3: Tokenizer, tiny: Tokenizer) -> None:
    for tokenizer in (gemma3, tiny):
        for text in random_texts(3, 4000, [piece.text for piece in tokenizer.pieces]):
            ids = tokenizer.encode(text)
            assert tokenizer.structural_ids.isdisjoint(ids), text
            assert tokenizer.decode(ids) == text
            assert tokenizer.decode(tokenizer.encode(text, structure=True), structure=True) == text


def test_every_structural_name_is_text_to_a_user(gemma3: Tokenizer) -> None:
    for i in gemma3.structural_ids:
        name = gemma3.pieces[i].text
        ids = gemma3.encode(name)
        assert gemma3.structural_ids.isdisjoint(ids)
        assert gemma3.decode(ids) == name
        assert gemma3.encode(name, structure=True) == [i]
        assert (gemma3.decode([i]), gemma3.decode([i], structure=True)) == ("", name)


def test_marks_not_built_like_gemmas(tiny: Tokenizer) -> None:
    marks = ["<|im_start|>", "<|im|>", "stop here"]
    rows = [*tiny.pieces, *((mark, -1.0, 3) for mark in marks)]
    tokenizer = Tokenizer.from_pieces(*zip(*rows, strict=True))
    text = "a<|im_start|>b<|im|>stop here<unused1>"
    assert set(tokenizer.encode(text, structure=True)) >= {tiny.size, tiny.size + 1, tiny.piece_id("<unused1>")}
    assert tokenizer.structural_ids.isdisjoint(tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_one_character_that_does_not_survive(gemma3: Tokenizer) -> None:
    assert gemma3.decode(gemma3.encode("a▁b")) == "a b"


def test_streamed_text_is_the_decoded_text(gemma3: Tokenizer) -> None:
    rng = random.Random(4)
    for text in random_texts(5, 1000, [piece.text for piece in gemma3.pieces]):
        decoder, ids = gemma3.stream(), gemma3.encode(text)
        shown = [decoder.push(i) for i in ids]
        assert not any("\ufffd" in part for part in shown) or "\ufffd" in text
        assert "".join(shown) + decoder.finish() == text
        noise = [rng.randrange(gemma3.size) if rng.random() < 0.5 else rng.randrange(238, 494) for _ in ids]
        decoder = Decoder(gemma3)
        assert "".join(map(decoder.push, noise)) + decoder.finish() == gemma3.decode(noise)


def test_bytes_of_one_token(gemma3: Tokenizer) -> None:
    assert [gemma3.token_bytes(i) for i in (0, 138, 238 + 0xF0, 107)] == [b"", b"  ", b"\xf0", b"\n"]
    for i in (-1, gemma3.size):
        with pytest.raises(GemmaryError, match="outside the vocabulary"):
            gemma3.decode([i])


def test_lone_surrogates_are_refused(gemma3: Tokenizer) -> None:
    for structure in (False, True):
        with pytest.raises(GemmaryError, match="lone surrogate"):
            gemma3.encode("a\ud800b", structure=structure)


def test_long_text_takes_time_in_proportion(gemma3: Tokenizer) -> None:
    for unit in ("a", "ab", " ", "<", "[@", "<unused1>", "é"):
        started = time.perf_counter()
        ids = gemma3.encode(unit * 200_000, structure=True)
        assert time.perf_counter() - started < 10, unit
        assert gemma3.decode(ids, structure=True) == unit * 200_000


# --- Hostile and broken files -----------------------------------------------------------------------------------------


def broken_models(model: bytes) -> Iterator[tuple[str, bytes]]:
    pb2: Any = sentencepiece_model_pb2
    yield "empty", b""
    yield "garbage", b"\x00\xff" * 1000
    yield "cut short", model[: len(model) // 2]
    yield "text", b"this is no model at all\n" * 100
    for name in ("unigram", "twice", "no bytes", "no bos", "nan", "over-long", "empty piece", "NUL"):
        proto = pb2.ModelProto.FromString(model)
        if name == "unigram":
            proto.trainer_spec.model_type = 1
        elif name == "twice":
            proto.pieces[700].piece = proto.pieces[701].piece
        elif name == "no bytes":
            proto.pieces[next(i for i, p in enumerate(proto.pieces) if p.piece == "<0x41>")].piece = "zzzz"
        elif name == "no bos":
            proto.pieces[2].piece = "zzzz"
        elif name == "nan":
            proto.pieces[700].score = float("nan")
        else:
            proto.pieces[700].piece = {"over-long": "x" * 70_000, "empty piece": "", "NUL": "a\0b"}[name]
        yield name, proto.SerializeToString()
    yield "many pieces", b"\x0a\x00" * (2 << 20)


def test_broken_sentencepiece_models(tiny_model: bytes) -> None:
    for name, data in broken_models(tiny_model):
        started = time.perf_counter()
        with pytest.raises(GemmaryError) as caught:
            pytest.fail(f"{name}: read as {Tokenizer.from_sentencepiece(data)}")
        assert "\n" not in str(caught.value), name
        assert time.perf_counter() - started < 1, name


def broken_jsons(good: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    def with_model(**changes: Any) -> bytes:
        return json.dumps({**good, "model": {**good["model"], **changes}}).encode()

    vocab, merges = good["model"]["vocab"], good["model"]["merges"]
    yield "empty", b""
    yield "no object", b"[1, 2]"
    yield "not UTF-8", b'{"model": "\xff"}'
    yield "deep", b"[" * 1_000_000
    yield "huge number", b"[" + b"1" * 100_000 + b"]"
    yield "cut short", with_model()[:5000]
    yield "word pieces", with_model(type="WordPiece")
    yield "no byte fallback", with_model(byte_fallback=False)
    yield "gap", with_model(vocab={**vocab, "zzzz": 10**9})
    yield "fraction", with_model(vocab={**vocab, "zzzz": 1000.5})
    yield "ids that are true", with_model(vocab={**vocab, "zzzz": True})
    yield "shared id", with_model(vocab={**vocab, "zzzz": 700})
    yield "bad merge", with_model(merges=[*merges, "a b c"])
    yield "merge of numbers", with_model(merges=[*merges, [1, 2]])
    yield "merges is a number", with_model(merges=7)
    yield "surrogate", with_model(vocab={**vocab, "\ud800": len(vocab)})
    yield "added over another", json.dumps({**good, "added_tokens": [{"id": 700, "content": "zzzz"}]}).encode()
    yield "added tokens", json.dumps({**good, "added_tokens": [{"id": 1}]}).encode()


def test_broken_tokenizer_jsons(tiny: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    for name, data in broken_jsons(tiny.to_tokenizer_json()):
        path.write_bytes(data)
        started = time.perf_counter()
        with pytest.raises(GemmaryError) as caught:
            pytest.fail(f"{name}: read as {Tokenizer.from_tokenizer_json(path)}")
        assert "\n" not in str(caught.value), name
        assert time.perf_counter() - started < 1, name


def test_mutated_models_never_crash(tiny_model: bytes) -> None:
    rng = random.Random(6)
    for _ in range(150):
        data = bytearray(tiny_model)
        for _ in range(rng.randrange(1, 8)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            tokenizer = Tokenizer.from_sentencepiece(bytes(data[: rng.choice((len(data), rng.randrange(len(data))))]))
        except GemmaryError:
            continue
        text = "if x<start_of_turn>: return <bos>"
        assert tokenizer.structural_ids.isdisjoint(tokenizer.encode(text))


def test_broken_arrays(tiny: Tokenizer) -> None:
    texts, scores, kinds = (list(column) for column in zip(*tiny.pieces, strict=True))
    for broken in (
        (texts[:-1], scores, kinds),
        (texts, scores, [99, *kinds[1:]]),
        ([7, *texts[1:]], scores, kinds),
        ([], [], []),
    ):
        with pytest.raises(GemmaryError):
            Tokenizer.from_pieces(*broken)


def test_missing_files_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(GemmaryError, match=r"has no tokenizer: put"):
        Tokenizer.from_directory(tmp_path)
    for read in (Tokenizer.from_sentencepiece, Tokenizer.from_tokenizer_json):
        for path in (tmp_path / "none", tmp_path):
            with pytest.raises(GemmaryError, match="not there"):
                read(path)
