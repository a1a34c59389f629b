"""One tokenizer for every generation: SentencePiece behind all files that a vocabulary comes in.

A vocabulary is a list of pieces with scores and types. It is read from `tokenizer.model`, rebuilt from a Hugging Face
`tokenizer.json` or from a GGUF's arrays (see `vocabulary`), and given to SentencePiece's own BPE encoder with Gemma's
options: no dummy prefix, no change to whitespace, byte fallback.

*Structural* pieces (`<bos>`, `<start_of_turn>`, `<unused7>`, …) are what a model reads as structure and not as text. The
encoder has them as control pieces, which it cannot emit: whatever a user types becomes ordinary pieces. Trusted text may
ask for them with `structure=True`. Literal pieces (runs of spaces, tabs and newlines, HTML tags) are text, in both.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from gemmary.errors import GemmaryError
from gemmary.text import vocabulary
from gemmary.text.vocabulary import Kind, Piece

__all__ = ["Decoder", "Tokenizer"]

_SPACE = "▁"
_CANDIDATE = re.compile(r"(<\w+>|\[@?\w+@?\])")
_TURN = "<start_of_turn>", "<end_of_turn>"


class Tokenizer:
    """Text to token ids and back. Immutable; made by one of the `from_…` functions.

    `pieces` holds (text, score, type) for every id, types numbered as in SentencePiece and GGUF.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces: list[Piece] = vocabulary.checked(pieces)
        self._ids = {text: i for i, (text, _, _) in enumerate(self.pieces)}
        self._structural = {t: i for i, (t, _, kind) in enumerate(self.pieces) if kind in (Kind.CONTROL, Kind.UNKNOWN)}
        self._bytes = [_as_bytes(text, kind) for text, _, kind in self.pieces]
        try:
            self._encoder = sentencepiece.SentencePieceProcessor(model_proto=self.to_sentencepiece())
        except (RuntimeError, OSError) as error:
            raise GemmaryError(f"SentencePiece refuses this vocabulary: {error}") from None

    @classmethod
    def from_sentencepiece(cls, model: Path | bytes) -> Tokenizer:
        """From a `tokenizer.model` file or its bytes."""
        return cls(vocabulary.from_sentencepiece(model))

    @classmethod
    def from_tokenizer_json(cls, path: Path) -> Tokenizer:
        """From a Hugging Face `tokenizer.json` of BPE with byte fallback, as Gemma's are."""
        return cls(vocabulary.from_tokenizer_json(path))

    @classmethod
    def from_pieces(cls, tokens: Sequence[str], scores: Iterable[float], types: Iterable[int]) -> Tokenizer:
        """From a GGUF's three arrays."""
        return cls(vocabulary.from_arrays(tokens, scores, types))

    @classmethod
    def from_directory(cls, directory: Path) -> Tokenizer:
        """From a directory's `tokenizer.model`, or else its `tokenizer.json`."""
        if (directory / "tokenizer.model").is_file():
            return cls.from_sentencepiece(directory / "tokenizer.model")
        return cls.from_tokenizer_json(directory / "tokenizer.json")

    @property
    def size(self) -> int:
        return len(self.pieces)

    @property
    def pad(self) -> int:
        return self._ids["<pad>"]

    @property
    def eos(self) -> int:
        return self._ids["<eos>"]

    @property
    def bos(self) -> int:
        return self._ids["<bos>"]

    @property
    def unk(self) -> int:
        return self._ids["<unk>"]

    @property
    def start_of_turn(self) -> int | None:
        """106 in Gemma 1 and 2, 105 in Gemma 3; None in a vocabulary without turns."""
        return self._ids.get(_TURN[0])

    @property
    def end_of_turn(self) -> int | None:
        """107 in Gemma 1 and 2, 106 in Gemma 3; None in a vocabulary without turns."""
        return self._ids.get(_TURN[1])

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """What ends an answer: eos, and the end of a turn where there are turns."""
        return (self.eos,) if self.end_of_turn is None else (self.eos, self.end_of_turn)

    @property
    def structural_ids(self) -> frozenset[int]:
        """Ids that `encode` never gives for untrusted text."""
        return frozenset(self._structural.values())

    def encode(self, text: str, *, structure: bool = False) -> list[int]:
        """Ids of a text, without BOS. Untrusted text never yields a structural id; with `structure` their names do.

        With `structure` the ids are those of the published tokenizers. Raises GemmaryError for lone surrogates.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise GemmaryError(f"the text has a lone surrogate at character {error.start}: it is not Unicode") from None
        if not structure:
            return list(self._encoder.encode(text))
        ids: list[int] = []
        plain = ""
        for part in _CANDIDATE.split(text):
            if part in self._structural:
                ids += [*self._encoder.encode(plain), self._structural[part]]
                plain = ""
            else:
                plain += part
        return ids + list(self._encoder.encode(plain))

    def decode(self, ids: Iterable[int], *, structure: bool = False) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD. Structural pieces show only with `structure`.

        Raises GemmaryError for ids outside the vocabulary.
        """
        return b"".join(self.token_bytes(i, structure=structure) for i in ids).decode("utf-8", errors="replace")

    def token_bytes(self, id: int, *, structure: bool = False) -> bytes:
        """What one id adds to the text, as UTF-8 that may be cut inside a character."""
        if not 0 <= id < len(self.pieces):
            raise GemmaryError(f"token id {id} is outside the vocabulary of {len(self.pieces)}")
        return self.pieces[id][0].encode() if structure and id in self.structural_ids else self._bytes[id]

    def to_sentencepiece(self) -> bytes:
        """A `tokenizer.model`."""
        pb2: Any = sentencepiece_model_pb2
        model = pb2.ModelProto()
        for text, score, kind in self.pieces:
            model.pieces.add(piece=text, score=score, type=int(kind))
        model.trainer_spec.model_type = pb2.TrainerSpec.BPE
        model.trainer_spec.vocab_size = len(self.pieces)
        model.trainer_spec.byte_fallback = True
        model.trainer_spec.split_digits = True
        model.trainer_spec.pad_id, model.trainer_spec.eos_id = self.pad, self.eos
        model.trainer_spec.bos_id, model.trainer_spec.unk_id = self.bos, self.unk
        model.trainer_spec.pad_piece, model.trainer_spec.eos_piece = "<pad>", "<eos>"
        model.trainer_spec.bos_piece, model.trainer_spec.unk_piece = "<bos>", "<unk>"
        model.normalizer_spec.name = "identity"
        model.normalizer_spec.add_dummy_prefix = False
        model.normalizer_spec.remove_extra_whitespaces = False
        return bytes(model.SerializeToString())

    def to_tokenizer_json(self) -> dict[str, Any]:
        """A Hugging Face `tokenizer.json`, as data."""
        return vocabulary.to_tokenizer_json(self.pieces)


class Decoder:
    """Decoding as tokens come: the texts of `push` and `finish`, joined, are the text of `decode`.

    Text is given once its last character is whole, so a character of several tokens is never shown in halves.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        """The text that this token completes."""
        return self._utf8.decode(self._tokenizer.token_bytes(id))

    def finish(self) -> str:
        """What is left at the end: U+FFFD for a character cut short."""
        return self._utf8.decode(b"", final=True)


def _as_bytes(text: str, kind: Kind) -> bytes:
    if kind is Kind.BYTE:
        return bytes([int(text[3:5], 16)])
    if kind in (Kind.CONTROL, Kind.UNKNOWN):
        return b""
    return text.replace(_SPACE, " ").encode()
