"""One tokenizer for every generation: SentencePiece behind all files that a vocabulary comes in.

A vocabulary is pieces with scores and kinds. It is read from `tokenizer.model`, rebuilt from a Hugging Face
`tokenizer.json` or from a GGUF's arrays (see `vocabulary`), and given to SentencePiece's own BPE encoder with Gemma's
options: no dummy prefix, no change to whitespace, byte fallback.

*Structural* pieces (`<bos>`, `<unused7>`, the marks of turns) are what a model reads as structure and not as text. The
encoder has them as control pieces, which it cannot emit: whatever a user types becomes ordinary pieces. Trusted text
may ask for them with `structure=True`. Literal pieces (runs of spaces, tabs and newlines, HTML tags) are text, in both.

One character does not survive: U+2581 (▁) stands for a space inside the published tokenizers, and is decoded as one.
One published file differs: the tokenizer.json of Gemma 1 and 2, a conversion, cuts runs of over 31 spaces otherwise
than SentencePiece (32 are 16 + 16 there, 31 + 1 here). Gemma's tokenizer is SentencePiece; Gemma 3's file agrees.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from gemmary.errors import GemmaryError
from gemmary.text import vocabulary, writers
from gemmary.text.vocabulary import Kind, Pieces

__all__ = ["END_OF_TURN", "START_OF_TURN", "Decoder", "Tokenizer"]

START_OF_TURN, END_OF_TURN = "<start_of_turn>", "<end_of_turn>"
_SPACE = "▁"
_STRUCTURAL = (Kind.CONTROL, Kind.UNKNOWN)
# All of Gemma's own marks look like this; a class is quicker to search for than 6,000 names.
_MARK = r"<\w+>|\[@?\w+@?\]"


class Tokenizer:
    """Text to token ids and back. Immutable; made by one of the `from_…` functions.

    `pieces` has text, score and kind of every id, kinds numbered as in SentencePiece and GGUF.
    Every constructor raises GemmaryError for a vocabulary that is missing, damaged or not Gemma's.
    """

    def __init__(self, pieces: Pieces) -> None:
        self.pieces = vocabulary.checked(pieces)
        texts = self.pieces.texts
        self._ids = dict(zip(texts, range(len(texts)), strict=True))
        self._structural = {texts[i]: i for i in self.pieces.where(*_STRUCTURAL)}
        self._silent = frozenset(self._structural.values())
        self._structural_ids = self._silent.union(self.pieces.where(Kind.UNUSED))
        self._bytes = {i: bytes([int(texts[i][3:5], 16)]) for i in self.pieces.where(Kind.BYTE)}
        self._marks = _finder(self._structural)
        self._runs = re.compile(_longest_run(self._ids))
        try:
            model = writers.to_sentencepiece(self.pieces, structure=False)
            self._encoder = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError) as error:
            raise GemmaryError(f"SentencePiece refuses this vocabulary: {str(error).splitlines()[0]}") from None

    @classmethod
    def from_sentencepiece(cls, model: Path | str | bytes) -> Tokenizer:
        """From a `tokenizer.model` file or its bytes."""
        return cls(vocabulary.from_sentencepiece(model))

    @classmethod
    def from_tokenizer_json(cls, path: Path | str) -> Tokenizer:
        """From a Hugging Face `tokenizer.json` of BPE with byte fallback, as Gemma's are."""
        return cls(vocabulary.from_tokenizer_json(path))

    @classmethod
    def from_pieces(cls, tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> Tokenizer:
        """From a GGUF's three arrays."""
        return cls(vocabulary.from_arrays(tokens, scores, types))

    @classmethod
    def from_directory(cls, directory: Path | str) -> Tokenizer:
        """From a directory's `tokenizer.model`, or else its `tokenizer.json`."""
        for name, read in (("tokenizer.model", cls.from_sentencepiece), ("tokenizer.json", cls.from_tokenizer_json)):
            if (Path(directory) / name).is_file():
                return read(Path(directory) / name)
        raise GemmaryError(f"{directory} has no tokenizer: put the model's tokenizer.model or tokenizer.json there")

    @property
    def size(self) -> int:
        """How many ids there are."""
        return len(self.pieces)

    @property
    def pad(self) -> int:
        """The id of `<pad>`, 0 in every Gemma."""
        return self._ids["<pad>"]

    @property
    def eos(self) -> int:
        """The id of `<eos>`, 1 in every Gemma."""
        return self._ids["<eos>"]

    @property
    def bos(self) -> int:
        """The id of `<bos>`, 2 in every Gemma."""
        return self._ids["<bos>"]

    @property
    def unk(self) -> int:
        """The id of `<unk>`, 3 in every Gemma; byte fallback leaves it unused."""
        return self._ids["<unk>"]

    @property
    def start_of_turn(self) -> int | None:
        """106 in Gemma 1 and 2, 105 in Gemma 3; None in a vocabulary without turns."""
        return self._ids.get(START_OF_TURN)

    @property
    def end_of_turn(self) -> int | None:
        """107 in Gemma 1 and 2, 106 in Gemma 3; None in a vocabulary without turns."""
        return self._ids.get(END_OF_TURN)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """What ends an answer: eos, and the end of a turn where there are turns."""
        return (self.eos,) if self.end_of_turn is None else (self.eos, self.end_of_turn)

    @property
    def structural_ids(self) -> frozenset[int]:
        """Ids that `encode` never gives for untrusted text; `vocabulary.kind_of` has the rule."""
        return self._structural_ids

    def piece_id(self, text: str) -> int | None:
        """The id of the piece with exactly this text (▁ for spaces), or None."""
        return self._ids.get(text)

    def encode(self, text: str, *, structure: bool = False) -> list[int]:
        """Ids of a text, without BOS. Untrusted text never yields a structural id; with `structure` their names do.

        With `structure` the ids are those of the published tokenizers. Raises GemmaryError for lone surrogates.
        """
        if not structure:
            return self._encode(text)
        ids: list[int] = []
        done = 0
        for found in self._marks.finditer(text):
            if (mark := self._structural.get(found[0])) is not None:
                ids += self._encode(text[done : found.start()])
                ids.append(mark)
                done = found.end()
        return ids + self._encode(text[done:])

    def _encode(self, text: str) -> list[int]:
        """Ordinary pieces. A typed run of ▁ is cut out first: it is a literal to the published files, as typed."""
        if _SPACE * 2 in text:
            parts = self._runs.split(text)
            return [i for part in parts for i in self._plain(part)]
        return self._plain(text)

    def _plain(self, text: str) -> list[int]:
        try:
            ids: list[int] = self._encoder.encode(text.encode())
        except UnicodeEncodeError as error:
            raise GemmaryError(f"the text has a lone surrogate at character {error.start}: it is not Unicode") from None
        return ids

    def decode(self, ids: Iterable[int], *, structure: bool = False) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD. Structural pieces show only with `structure`.

        Raises GemmaryError for ids outside the vocabulary.
        """
        return b"".join(self.token_bytes(i, structure=structure) for i in ids).decode("utf-8", errors="replace")

    def token_bytes(self, id: int, *, structure: bool = False) -> bytes:
        """What one id adds to the text, as UTF-8 that may be cut inside a character."""
        if not 0 <= id < self.size:
            raise GemmaryError(f"token id {id} is outside the vocabulary of {self.size}")
        text = self.pieces.texts[id]
        if structure and id in self._structural_ids:
            return text.encode()
        if id in self._silent:
            return b""
        return self._bytes.get(id) or text.replace(_SPACE, " ").encode()

    def stream(self) -> Decoder:
        """A decoder for ids that come one by one."""
        return Decoder(self)

    def to_sentencepiece(self) -> bytes:
        """A `tokenizer.model`: SentencePiece gives structural ids for their names with it, as with Google's."""
        return writers.to_sentencepiece(self.pieces, structure=True)

    def to_tokenizer_json(self) -> dict[str, object]:
        """A Hugging Face `tokenizer.json`, as data."""
        return writers.to_tokenizer_json(self.pieces)


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


def _finder(structural: Iterable[str]) -> re.Pattern[str]:
    """Finds wherever a structural name may stand; longest first among those that are not built like Gemma's."""
    like = re.compile(_MARK)
    others = sorted((text for text in structural if not like.fullmatch(text)), key=len, reverse=True)
    return re.compile("|".join([*map(re.escape, others), _MARK]))


def _longest_run(ids: dict[str, int]) -> str:
    """A pattern that cuts out the runs of ▁ that are pieces (2 to 31 of them in Gemma's)."""
    longest = 2
    while _SPACE * (longest + 1) in ids:
        longest += 1
    return f"({_SPACE}{{2,{longest}}})"
