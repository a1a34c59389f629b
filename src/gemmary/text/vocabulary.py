"""Vocabularies as files have them, read within bounds and brought to one form: a list of (text, score, type).

Sources of a rule here: SentencePiece's model proto, and the published Gemma tokenizers' own files.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from gemmary.errors import GemmaryError

__all__ = ["Kind", "Piece", "checked", "from_arrays", "from_sentencepiece", "from_tokenizer_json", "to_tokenizer_json"]

_MOST_PIECES = 1 << 20
_MOST_PIECE_BYTES = 1 << 16
_MOST_FILE_BYTES = 256 << 20

# What a model reads as structure: the named specials, the reserved slots and the marks of turns and images. Everything else
# that a vocabulary lists as a literal (whitespace runs, HTML tags) is text.
_STRUCTURAL = re.compile(
    r"<(pad|eos|bos|unk|mask|2mass|unused\d+|(start|end)_of_\w+|image_soft_token)>|\[(@BOS@|multimodal)\]"
)
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_REQUIRED = ("<pad>", "<eos>", "<bos>", "<unk>")


class Kind(IntEnum):
    """A piece's type, numbered as in SentencePiece and GGUF."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Piece(NamedTuple):
    """One entry of a vocabulary; its id is its place."""

    text: str
    score: float
    kind: Kind


def checked(pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces, types set right. Raises GemmaryError for what no Gemma vocabulary can be.

    Files disagree on types (a GGUF may call `<unused7>` normal, a tokenizer.model calls `<start_of_turn>` user-defined), so
    structural pieces and bytes are told by their text.
    """
    if not len(_REQUIRED) < len(pieces) <= _MOST_PIECES:
        raise GemmaryError(f"the vocabulary has {len(pieces)} pieces; it may have up to {_MOST_PIECES}")
    seen: set[str] = set()
    for i, (text, score, _) in enumerate(pieces):
        if not text or len(text) > _MOST_PIECE_BYTES or not math.isfinite(score):
            raise GemmaryError(f"piece {i} of the vocabulary is empty, over-long or without a finite score")
        if text in seen:
            raise GemmaryError(f"the vocabulary has the piece {text[:40]!r} twice")
        seen.add(text)
    missing = [text for text in _REQUIRED if text not in seen]
    if missing:
        raise GemmaryError(f"the vocabulary lacks {', '.join(missing)}: it is not a Gemma tokenizer's")
    # Gemma 1 has a tab where the byte 09 would be.
    bare = [f"<0x{i:02X}>" for i in range(256) if f"<0x{i:02X}>" not in seen and not (i < 128 and chr(i) in seen)]
    if bare:
        raise GemmaryError(f"the vocabulary lacks {bare[0]}: Gemma's can fall back to any byte")
    return [Piece(text, score, _kind(text, kind)) for text, score, kind in pieces]


def _kind(text: str, kind: Kind) -> Kind:
    if text == "<unk>":
        return Kind.UNKNOWN
    if _STRUCTURAL.fullmatch(text):
        return Kind.CONTROL
    if _BYTE.fullmatch(text):
        return Kind.BYTE
    return kind if kind in (Kind.USER_DEFINED, Kind.UNUSED) else Kind.NORMAL


def from_sentencepiece(model: Path | bytes) -> list[Piece]:
    """The pieces of a `tokenizer.model`."""
    where = "the tokenizer" if isinstance(model, bytes) else str(model)
    data = model if isinstance(model, bytes) else _read(model)
    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(data)
    except (DecodeError, UnicodeDecodeError):
        raise GemmaryError(f"{where} is not a SentencePiece model, or is cut short") from None
    if not proto.pieces or proto.trainer_spec.model_type != 2:
        raise GemmaryError(f"{where} is not a SentencePiece BPE model")
    return [Piece(piece.piece, piece.score, Kind(piece.type)) for piece in proto.pieces]


def from_arrays(tokens: Sequence[str], scores: Iterable[float], types: Iterable[int]) -> list[Piece]:
    """The pieces of a GGUF. Rows that only pad the embedding (`[PAD256000]`, …) at the end are left out."""
    try:
        rows = list(zip(tokens, map(float, scores), map(int, types), strict=True))
        # GGUF writes literal pieces with plain spaces; everywhere else a space in a piece is ▁.
        pieces = [
            Piece(str(text).replace(" ", "▁"), score, Kind(kind)) for text, score, kind in rows
        ]
    except (TypeError, ValueError):
        raise GemmaryError("the GGUF's tokens, scores and types do not fit together") from None
    while pieces and re.fullmatch(r"\[PAD\d+\]", pieces[-1].text):
        pieces.pop()
    return pieces


def from_tokenizer_json(path: Path) -> list[Piece]:
    """The pieces of a Hugging Face file. A piece's score is minus the rank of the first merge that makes it."""
    try:
        data = json.loads(_read(path))
        model = data["model"]
        if model["type"] != "BPE" or not model.get("byte_fallback"):
            raise GemmaryError(f"{path} is not a BPE tokenizer with byte fallback, as Gemma's are")
        ids = {text: int(i) for text, i in model["vocab"].items()}
        added = {entry["content"]: int(entry["id"]) for entry in data.get("added_tokens", [])}
        ranks: dict[str, int] = {}
        for merge in model["merges"]:
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            ranks.setdefault(left + right, len(ranks))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, GemmaryError):
            raise
        raise GemmaryError(f"{path} is not a Hugging Face tokenizer.json ({type(error).__name__}: {error})") from None
    places = {i: text for text, i in {**ids, **added}.items()}
    if len(places) > _MOST_PIECES or sorted(places) != list(range(len(places))):
        raise GemmaryError(f"{path}: ids are not 0 to {len(places) - 1}, each once")
    literal = Kind.USER_DEFINED
    order = [places[i] for i in range(len(places))]
    return [
        Piece(text.replace(" ", "▁") if text in added else text, -float(ranks.get(text, 0)), _added(text, added, literal))
        for text in order
    ]


def _added(text: str, added: dict[str, int], literal: Kind) -> Kind:
    return literal if text in added else Kind.NORMAL


def to_tokenizer_json(pieces: Sequence[Piece]) -> dict[str, Any]:
    """The inverse: merges are all ways to cut a piece into two others, in the order of scores, as SentencePiece would."""
    special = {kind for kind in Kind if kind in (Kind.CONTROL, Kind.UNKNOWN)}
    ids = {text: i for i, (text, _, _) in enumerate(pieces)}
    added = [
        {
            "id": i,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind in special,
        }
        for i, (text, _, kind) in enumerate(pieces)
        if kind in special or kind is Kind.USER_DEFINED
    ]
    bos = ids["<bos>"]
    space = {"String": " "}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": space, "content": "▁"},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                {"SpecialToken": {"id": "<bos>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "<bos>", "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [bos], "tokens": ["<bos>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
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
            "merges": list(_merges(pieces, ids)),
        },
    }


def _merges(pieces: Sequence[Piece], ids: dict[str, int]) -> Iterator[list[str]]:
    mergeable = (piece for piece in pieces if piece.kind is Kind.NORMAL and len(piece.text) > 1)
    for text, _, _ in sorted(mergeable, key=lambda piece: -piece.score):
        cuts = [(text[:at], text[at:]) for at in range(1, len(text)) if text[:at] in ids and text[at:] in ids]
        yield from ([left, right] for left, right in sorted(cuts, key=lambda cut: (ids[cut[0]], ids[cut[1]])))


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MOST_FILE_BYTES:
            raise GemmaryError(f"{path} is over {_MOST_FILE_BYTES >> 20} MiB: not a tokenizer")
        return path.read_bytes()
    except OSError as error:
        raise GemmaryError(f"{path} cannot be read: {error.strerror}") from None
