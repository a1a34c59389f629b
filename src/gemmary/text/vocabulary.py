"""Vocabularies as files have them, read within bounds and brought to one form: texts, scores and kinds, side by side.

Which pieces are structure is decided here, by one rule: see `kind_of`. Sources: SentencePiece's model proto, the
published Gemma tokenizers' own files, and the arrays of published GGUFs.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from gemmary.errors import GemmaryError

__all__ = ["Kind", "Piece", "Pieces", "checked", "from_arrays", "from_sentencepiece", "from_tokenizer_json", "kind_of"]

_MOST_PIECES = 1 << 20
_MOST_PIECE_BYTES = 1 << 16
_MOST_MODEL_BYTES = 64 << 20
_MOST_JSON_BYTES = 256 << 20
_REQUIRED = ("<pad>", "<eos>", "<bos>", "<unk>")

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_PADDING = re.compile(r"\[PAD\d+\]")
_LITERAL = re.compile(
    r"\n+|\t+|▁+|</?(?:a|b|bbox|blockquote|body|caption|code|div|em|footer|h[1-6]|html|i|iframe|img|li|s|span|strong|sub|sup"
    r"|table|tbody|td|tfoot|th|thead|tr|u|ul)>"
)
_MARK = re.compile(
    r"<(?:pad|eos|bos|unk|mask|2mass|unused\d+|(?:start|end)_of_\w+|\w+_soft_token)>|\[(?:@BOS@|multimodal)\]"
)
_SPARE = re.compile(r"<unused\d+>")
_ENCLOSED = re.compile(r"<\S+>|\[\S+\]")


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


@dataclass(frozen=True, eq=False)
class Pieces(Sequence[Piece]):
    """A vocabulary in columns, so that a quarter of a million entries are read at once: scores float32 [V], kinds int32 [V]."""

    texts: list[str]
    scores: np.ndarray
    kinds: np.ndarray

    @classmethod
    def of(cls, texts: Sequence[str], scores: Any, kinds: Any) -> Pieces:
        """Raises ValueError, TypeError or OverflowError for columns that do not fit together."""
        with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and refused as such
            columns = cls(list(texts), np.asarray(scores, np.float32), np.asarray(kinds))
        if columns.kinds.dtype.kind not in "iu" or not columns.scores.shape == columns.kinds.shape == (len(columns),):
            raise ValueError("the columns differ")
        if len(columns) and not (columns.kinds.min() >= 1 and columns.kinds.max() <= len(Kind)):
            raise ValueError("a kind that is none")
        return cls(columns.texts, columns.scores, columns.kinds.astype(np.int32))

    def __len__(self) -> int:
        return len(self.texts)

    @overload
    def __getitem__(self, at: int) -> Piece: ...
    @overload
    def __getitem__(self, at: slice) -> Pieces: ...
    def __getitem__(self, at: int | slice) -> Piece | Pieces:
        if isinstance(at, slice):
            return Pieces(self.texts[at], self.scores[at], self.kinds[at])
        return Piece(self.texts[at], float(self.scores[at]), Kind(self.kinds[at]))

    def __iter__(self) -> Iterator[Piece]:
        return map(Piece, self.texts, self.scores.tolist(), map(Kind, self.kinds.tolist()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pieces) and all(
            (
                self.texts == other.texts,
                np.array_equal(self.scores, other.scores),
                np.array_equal(self.kinds, other.kinds),
            )
        )

    def where(self, *kinds: Kind) -> list[int]:
        """The ids of the pieces of these kinds."""
        found: list[int] = np.flatnonzero(np.isin(self.kinds, kinds)).tolist()
        return found


def kind_of(text: str, kind: Kind) -> Kind:
    """The kind of a piece, whatever its file calls it: the rule *reserved unless literal*.

    Files disagree (a GGUF calls `[multimodal]` user-defined and `<mask>` control, a tokenizer.json has neither as
    special), so text decides first. Runs of one whitespace and HTML tags are literal: text that has its own piece.
    Every other piece that a file reserves (as control, or as user-defined and enclosed in <> or []) and every piece
    named like one of Gemma's marks is structural: control, or unknown for `<unk>`. A mark we never heard of is
    structure. A spare slot that its file does not reserve (`<unused99>` in Gemma 1's tokenizer.json) is unused, which
    no encoder emits.
    """
    if text == "<unk>":
        return Kind.UNKNOWN
    if _BYTE.fullmatch(text):
        return Kind.BYTE
    if kind in (Kind.NORMAL, Kind.UNUSED) and _SPARE.fullmatch(text):
        return Kind.UNUSED
    reserved = kind in (Kind.CONTROL, Kind.UNKNOWN, Kind.USER_DEFINED)
    if reserved and _LITERAL.fullmatch(text):
        return Kind.USER_DEFINED
    if _MARK.fullmatch(text) or (reserved and (kind is not Kind.USER_DEFINED or _ENCLOSED.fullmatch(text))):
        return Kind.CONTROL
    return Kind.NORMAL if kind is Kind.BYTE else kind


def checked(pieces: Pieces) -> Pieces:
    """The pieces with the kinds of `kind_of`. Raises GemmaryError for what no Gemma vocabulary can be."""
    texts, seen = pieces.texts, set(pieces.texts)
    if not len(_REQUIRED) < len(texts) <= _MOST_PIECES:
        raise GemmaryError(
            f"the vocabulary has {len(texts)} pieces; a tokenizer has 5 to {_MOST_PIECES}: it is damaged"
        )
    if set(map(type, texts)) != {str} or "" in seen or "\0" in "".join(texts) or not np.isfinite(pieces.scores).all():
        wrong = (not isinstance(text, str) or not text or "\0" in text for text in texts)
        i = next(
            i for i, (one, score) in enumerate(zip(wrong, pieces.scores, strict=True)) if one or not np.isfinite(score)
        )
        raise GemmaryError(f"piece {i} of the vocabulary is no text, has a NUL or no finite score: it is damaged")
    if len(seen) < len(texts):
        twice = next(text for text, count in Counter(texts).items() if count > 1)
        raise GemmaryError(f"the vocabulary has the piece {twice[:40]!r} twice: it is damaged")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise GemmaryError("a piece of the vocabulary is not Unicode (a lone surrogate): it is damaged") from None
    if (
        len(max(texts, key=len)) > _MOST_PIECE_BYTES // 4
        and max(len(text.encode()) for text in texts) > _MOST_PIECE_BYTES
    ):
        raise GemmaryError(f"a piece of the vocabulary is over {_MOST_PIECE_BYTES} bytes: it is damaged")
    missing = [text for text in (*_REQUIRED, *(f"<0x{i:02X}>" for i in range(256))) if text not in seen]
    if missing:
        raise GemmaryError(f"the vocabulary lacks {missing[0]}: it is not a Gemma tokenizer's")
    kinds = pieces.kinds.copy()
    unlike = {i for i, text in enumerate(texts) if text[0] in "<["}
    for i in unlike.union(np.flatnonzero(kinds != Kind.NORMAL).tolist()):  # all others are what their file calls them
        kinds[i] = kind_of(texts[i], Kind(kinds[i]))
    return Pieces(texts, pieces.scores, kinds)


def from_sentencepiece(model: Path | str | bytes) -> Pieces:
    """The pieces of a `tokenizer.model` file, or of its bytes."""
    where = "the tokenizer" if isinstance(model, bytes) else str(model)
    data = model if isinstance(model, bytes) else _read(Path(model), _MOST_MODEL_BYTES)
    if _pieces_in(data) > _MOST_PIECES:
        raise GemmaryError(f"{where} has over {_MOST_PIECES} pieces: it is damaged")
    pb2: Any = sentencepiece_model_pb2
    proto = pb2.ModelProto()
    try:
        proto.ParseFromString(data)
        if not proto.pieces or proto.trainer_spec.model_type != 2:
            raise GemmaryError(
                f"{where} is not a SentencePiece BPE model: take the tokenizer.model that Gemma came with"
            )
        return Pieces.of(*zip(*((piece.piece, piece.score, piece.type) for piece in proto.pieces), strict=True))
    except (DecodeError, UnicodeDecodeError):
        raise GemmaryError(f"{where} is not a SentencePiece model, or is cut short: fetch it again") from None


def _pieces_in(data: bytes) -> int:
    """How many pieces a model claims, up to the bound; read ahead of protobuf, which would allocate them all first."""
    at, count, end = 0, 0, len(data)
    while at + 1 < end and data[at] == 0x0A and count <= _MOST_PIECES:  # field 1, length-delimited: a piece
        size, at = data[at + 1], at + 2
        if size > 0x7F:  # a varint of several bytes
            size, shift = size & 0x7F, 7
            while at < end and shift < 64:
                byte, at = data[at], at + 1
                size, shift = size | (byte & 0x7F) << shift, shift + 7
                if byte < 0x80:
                    break
        at, count = at + size, count + 1
    return count


def from_arrays(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> Pieces:
    """The pieces of a GGUF's three arrays, without the rows that pad the embedding (`[PAD256000]`, …) at the end."""
    try:
        # GGUF writes literal pieces with plain spaces; everywhere else a space in a piece is ▁.
        pieces = Pieces.of([text.replace(" ", "▁") if " " in text else text for text in tokens], scores, types)
    except (TypeError, ValueError, AttributeError, OverflowError):
        raise GemmaryError("the GGUF's tokens, scores and types do not fit together: it is damaged") from None
    size = len(pieces)
    while size and _PADDING.fullmatch(pieces.texts[size - 1]):
        size -= 1
    return pieces[:size]


def from_tokenizer_json(path: Path | str) -> Pieces:
    """The pieces of a Hugging Face file. A piece's score is minus the rank of the first merge that makes it.

    SentencePiece merges what scores highest, `tokenizers` what ranks first; both take the leftmost of equals.
    """
    data = _read(Path(path), _MOST_JSON_BYTES)
    try:
        root = json.loads(data)
        model = root["model"]
        if model["type"] != "BPE" or model.get("byte_fallback") is not True:
            raise GemmaryError(f"{path} is not a BPE tokenizer with byte fallback, as Gemma's are")
        added = {_text(token["content"]): token for token in root.get("added_tokens") or []}
        places = {_place(i): text for text, i in model["vocab"].items()}
        clash = len(places) < len(model["vocab"])
        for text, token in added.items():
            clash = clash or places.setdefault(_place(token["id"]), text) != text
        ranks: dict[str, int] = {}
        for rank, merge in enumerate(model["merges"]):
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            ranks.setdefault(left + right, rank)
        if not set(map(type, ranks)) <= {str}:
            raise TypeError("merges")
    except GemmaryError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise GemmaryError(
            f"{path} is not a Hugging Face tokenizer.json ({type(error).__name__}): fetch it again"
        ) from None
    if clash or not places or places.keys() != set(range(len(places))):
        raise GemmaryError(f"{path}: its ids are not 0 to {len(places) - 1}, each once: it is damaged")
    return Pieces.of(*zip(*_from_places(places, added, ranks), strict=True))


def _from_places(places: dict[int, str], added: dict[str, Any], ranks: dict[str, int]) -> Iterator[Piece]:
    literal, special, last = Kind.USER_DEFINED, Kind.CONTROL, len(ranks)
    for i in range(len(places)):
        text = places[i]
        # Gemma 1's published tokenizer.json was given a tab where its SentencePiece model has the byte.
        if text == "\t" and text not in added and places.get(i - 1) == "<0x08>" and places.get(i + 1) == "<0x0A>":
            text = "<0x09>"
        kind = Kind.NORMAL
        if text in added:
            kind = special if added[text].get("special") is True else literal
        yield Piece(text.replace(" ", "▁"), -float(ranks.get(text, last)), kind)


def _place(value: Any) -> int:
    if type(value) is not int:
        raise TypeError("an id")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("a text")
    return value


def _read(path: Path, most: int) -> bytes:
    try:
        if not path.is_file():
            raise GemmaryError(
                f"{path} is not there, or is no file: give a model with its tokenizer.model or tokenizer.json"
            )
        if path.stat().st_size > most:
            raise GemmaryError(f"{path} is over {most >> 20} MiB: it is not a tokenizer")
        return path.read_bytes()
    except OSError as error:
        raise GemmaryError(f"{path} cannot be read: {error.strerror}") from None
