"""Vocabularies written as others read them: SentencePiece's `tokenizer.model` and Hugging Face's `tokenizer.json`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from sentencepiece import sentencepiece_model_pb2

from gemmary.text.vocabulary import Kind, Piece, Pieces

__all__ = ["to_sentencepiece", "to_tokenizer_json"]

_BASIC = {"pad": "<pad>", "eos": "<eos>", "bos": "<bos>", "unk": "<unk>"}


def to_sentencepiece(pieces: Pieces, *, structure: bool) -> bytes:
    """A `tokenizer.model`, BPE with Gemma's options: no dummy prefix, whitespace kept, digits split, byte fallback.

    With `structure`, marks such as those of turns are user-defined as in the published file, so SentencePiece gives
    their ids where it meets them in a text; without it they are control pieces, which SentencePiece cannot emit.
    """
    pb2: Any = sentencepiece_model_pb2
    model = pb2.ModelProto()
    ids = {text: pieces.texts.index(text) for text in _BASIC.values()}
    kinds = pieces.kinds.copy()
    if structure:
        kinds[[i for i in pieces.where(Kind.CONTROL) if i not in ids.values()]] = Kind.USER_DEFINED
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = pb2.TrainerSpec.BPE
    trainer.vocab_size = len(pieces)
    trainer.byte_fallback = trainer.split_digits = True
    for name, text in _BASIC.items():
        setattr(trainer, f"{name}_id", ids[text])
        setattr(trainer, f"{name}_piece", text)
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = normalizer.remove_extra_whitespaces = False
    return _pieces(pieces.texts, pieces.scores, kinds) + bytes(model.SerializeToString())


def _pieces(texts: list[str], scores: np.ndarray, kinds: np.ndarray) -> bytes:
    """The pieces as protobuf has them on the wire: it takes much longer to make an object of each."""
    # Field 1 of a piece is its text, 2 its score (32 bits), 3 its type; a piece is field 1 of the model.
    rest = np.zeros(len(texts), np.dtype([("two", "u1"), ("score", "<f4"), ("three", "u1"), ("kind", "u1")]))
    rest["two"], rest["score"], rest["three"], rest["kind"] = 0x15, scores, 0x18, kinds
    tails, size = rest.tobytes(), rest.itemsize
    parts = list[bytes]()
    for i, text in enumerate(texts):
        data, tail = text.encode(), tails[i * size : i * size + size]
        if len(data) < 0x80 - 2 - size:  # nearly all: each length is one byte
            parts.append(b"\n%c\n%c%b%b" % (len(data) + 2 + size, len(data), data, tail))
        else:
            one = b"\n%b%b%b" % (_varint(len(data)), data, tail)
            parts.append(b"\n%b%b" % (_varint(len(one)), one))
    return b"".join(parts)


def _varint(number: int) -> bytes:
    return bytes((number,)) if number < 0x80 else bytes((number & 0x7F | 0x80,)) + _varint(number >> 7)


def to_tokenizer_json(pieces: Sequence[Piece]) -> dict[str, Any]:
    """A Hugging Face `tokenizer.json`, as data: `tokenizers` gives the same ids with it as with the published one."""
    ids = {text: i for i, (text, _, _) in enumerate(_with_tab(pieces))}
    space, mark = {"String": " "}, {"String": "▁"}
    bos = [{"SpecialToken": {"id": "<bos>", "type_id": i}} for i in range(2)]
    text, other = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(i, piece) for i, piece in enumerate(pieces) if _is_added(piece)],
        "normalizer": {"type": "Replace", "pattern": space, "content": "▁"},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos[0], text],
            "pair": [bos[0], text, bos[1], other],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [ids["<bos>"]], "tokens": ["<bos>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": mark, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": ids,
            "merges": list(_merges(_with_tab(pieces))),
        },
    }


def _with_tab(pieces: Sequence[Piece]) -> Sequence[Piece]:
    """As published for Gemma 1, whose vocabulary has runs of tabs but no tab: there the tab takes the place of its byte.

    SentencePiece merges two characters that it does not know, `tokenizers` falls back to bytes first.
    """
    if not any(piece.text == "\t\t" and piece.kind is Kind.NORMAL for piece in pieces):
        return pieces
    return [Piece("\t", piece.score, Kind.NORMAL) if piece.text == "<0x09>" else piece for piece in pieces]


def _is_added(piece: Piece) -> bool:
    return piece.kind in (Kind.CONTROL, Kind.UNKNOWN, Kind.USER_DEFINED)


def _added(i: int, piece: Piece) -> dict[str, Any]:
    special = piece.kind is not Kind.USER_DEFINED
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": piece.text, **flags, "special": special}


def _merges(pieces: Sequence[Piece]) -> Iterator[list[str]]:
    """All ways to cut a piece in two pieces, pieces by falling score.

    Runs of spaces come first, the longest foremost: `tokenizers` looks for added tokens before spaces become ▁, so it
    does not find these and must merge them.
    """
    parts = {text: i for i, (text, _, kind) in enumerate(pieces) if kind in (Kind.NORMAL, Kind.USER_DEFINED)}
    runs = sorted((text for text in parts if len(text) > 1 and not text.strip("▁")), key=len, reverse=True)
    normal = sorted((p for p in pieces if p.kind is Kind.NORMAL and len(p.text) > 1), key=lambda p: -p.score)
    for text in (*runs, *(piece.text for piece in normal if piece.text.strip("▁"))):
        cuts = [at for at in range(1, len(text)) if text[:at] in parts and text[at:] in parts]
        if len(cuts) > 1:
            cuts.sort(key=lambda at: (parts[text[:at]], parts[text[at:]]))
        yield from ([text[:at], text[at:]] for at in cuts)
