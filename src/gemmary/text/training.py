"""A tokenizer of one's own: SentencePiece BPE with Gemma's options and Gemma 1's ids, and how well it compresses.

    0 <pad>  1 <eos>  2 <bos>  3 <unk>  4 <mask>  5 <2mass>  6 [@BOS@]  7 <unused0> … 105 <unused98>
    106 <start_of_turn>  107 <end_of_turn>  108 … runs of 1-31 newlines  139 … of 2-31 spaces  169 … 48 HTML tags
    217 … of 1-31 tabs (pieces in Gemma 3, learnt in Gemma 1)  248 … the 256 bytes  504 … what is learnt

These 504 ids are there at every size, so that ids and structure are Gemma's in the smallest model too. The same text
gives the same tokenizer, whatever the number of threads and the order of the texts.
Source: the published tokenizers of Gemma 1 and Gemma 3.
"""

from __future__ import annotations

import heapq
import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b

import sentencepiece

from gemmary.errors import GemmaryError, check_bounds
from gemmary.text.tokenizer import END_OF_TURN, START_OF_TURN, Tokenizer

__all__ = ["TokenizerSettings", "bytes_per_token", "compression", "train_tokenizer"]

_MARKS = ["<mask>", "<2mass>", "[@BOS@]", *(f"<unused{i}>" for i in range(99)), START_OF_TURN, END_OF_TURN]
_TABLE = ["table", "caption", "thead", "tbody", "tfoot", "tr", "th", "td"]
_BLOCK = ["h1", "h2", "h3", "h4", "h5", "h6", "blockquote"]
_INLINE = ["strong", "em", "b", "i", "u", "s", "sub", "sup", "code"]
_TAGS = [f"<{end}{name}>" for group in (_TABLE, _BLOCK, _INLINE) for end in ("", "/") for name in group]
_LITERALS = (
    ["\n" * n for n in range(1, 32)] + ["▁" * n for n in range(2, 32)] + _TAGS + ["\t" * n for n in range(1, 32)]
)
_FIXED = 4 + len(_MARKS) + len(_LITERALS) + 256
_MOST = 262_144

_SENTENCE = 4096  # characters; a cut costs at most the one word it goes through
_LARGEST = re.compile(r"set it to a value <= (\d+)")
_SMALLEST = re.compile(r"smaller than required_chars. \d+ vs (\d+)")


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """How a tokenizer is trained."""

    vocab_size: int = 8192
    """Ids in all, 504 of them fixed; at most 262,144."""
    max_bytes: int = 100_000_000
    """Train on at most so many bytes of the texts, an even sample. SentencePiece needs some ten times that memory."""
    character_coverage: float = 0.9999
    """Characters that make up this share of the text get an id; the rest are spelled in bytes."""
    seed: int = 0
    """Which sample, where there are more than `max_bytes`."""
    threads: int = 0
    """0: one for each core. The result does not depend on it."""

    def __post_init__(self) -> None:
        check_bounds(
            self, "tokenizer.", vocab_size=(_FIXED + 1, _MOST), max_bytes=(1, 1 << 40), character_coverage=(0.9, 1.0),
            seed=(0, (1 << 63) - 1), threads=(0, 1024),
        )  # fmt: skip


def train_tokenizer(texts: Iterable[str], settings: TokenizerSettings) -> Tokenizer:
    """A tokenizer for these texts, read once.

    Raises GemmaryError where there is no text, or where it allows only a smaller vocabulary, and says which.
    """
    model = io.BytesIO()
    sentences = _sample(texts, settings.max_bytes, settings.seed)
    if not sentences:
        raise GemmaryError("there is no text to train a tokenizer on")
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=settings.vocab_size,
            character_coverage=settings.character_coverage,
            byte_fallback=True,
            split_digits=True,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            user_defined_symbols=[*_MARKS, *_LITERALS],
            pad_id=0,
            eos_id=1,
            bos_id=2,
            unk_id=3,
            pad_piece="<pad>",
            eos_piece="<eos>",
            bos_piece="<bos>",
            unk_piece="<unk>",
            max_sentence_length=4 * _SENTENCE,
            num_threads=settings.threads or os.cpu_count() or 1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise _explained(str(error), settings) from None
    return Tokenizer.from_sentencepiece(model.getvalue())


def _explained(message: str, settings: TokenizerSettings) -> GemmaryError:
    what = f"tokenizer.vocab_size is {settings.vocab_size}"
    if found := _LARGEST.search(message):
        return GemmaryError(f"{what}, and these texts have pieces for at most {found[1]}: lower it, or give more text")
    if found := _SMALLEST.search(message):
        return GemmaryError(
            f"{what}, and the texts' characters alone need {found[1]}: raise it, or lower character_coverage"
        )
    return GemmaryError(f"SentencePiece could not train on these texts: {message}")


def _sample(texts: Iterable[str], most: int, seed: int) -> list[bytes]:
    """Sentences of at most `most` bytes together: those of the smallest keyed hash, in any order of the texts."""
    kept: list[tuple[int, bytes]] = []
    size, limit, key = 0, 1 << 64, seed.to_bytes(8, "big")
    for sentence in (sentence for text in texts for sentence in _sentences(text)):
        rank = int.from_bytes(blake2b(sentence, digest_size=8, key=key).digest(), "big")
        if rank < limit:
            heapq.heappush(kept, (-rank, sentence))
            size += len(sentence)
        while size > most:  # what comes later must not take the place of what had to go
            rank, gone = heapq.heappop(kept)
            size, limit = size - len(gone), -rank
    return [sentence for _, sentence in kept]


def _sentences(text: str) -> Iterator[bytes]:
    """What SentencePiece reads at once. No piece crosses a newline or ends in a space, so cuts before these are free."""
    at = 0
    while at < len(text):
        end = at + _SENTENCE
        if end < len(text):
            end = max(text.rfind("\n", at + 1, end), text.rfind(" ", at + 1, end))
            end = end if end > at else at + _SENTENCE  # a text without spaces
        try:
            yield text[at:end].encode()
        except UnicodeEncodeError:
            raise GemmaryError("a text to train on has a lone surrogate: it is not Unicode") from None
        at = end


def bytes_per_token(tokenizer: Tokenizer, texts: Iterable[str]) -> float:
    """UTF-8 bytes for each token, without BOS and EOS; more is better. Raises GemmaryError where there is no text."""
    return compression({"texts": texts}, {"tokenizer": tokenizer})["texts"]["tokenizer"]


def compression(
    sources: Mapping[str, Iterable[str]], tokenizers: Mapping[str, Tokenizer]
) -> dict[str, dict[str, float]]:
    """Bytes per token of each source with each tokenizer. Every text is read once."""
    report = {}
    for source, texts in sources.items():
        size, tokens = 0, dict.fromkeys(tokenizers, 0)
        for text in texts:
            size += len(text.encode(errors="replace"))
            for name, tokenizer in tokenizers.items():
                tokens[name] += len(tokenizer.encode(text))
        if not size:
            raise GemmaryError(f"{source} has no text to measure a tokenizer on")
        report[source] = {name: size / count for name, count in tokens.items()}
    return report
