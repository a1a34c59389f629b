"""Documents and conversations as token ids on disk, memory-mapped: a directory written aside and renamed when whole.

    tokens.bin     ids of all documents one after the other, without BOS and EOS: uint16, or uint32 above 65,536 ids
    documents.bin  int64 [documents + 1]: where each document begins, then where the last ends
    learnt.bin     of conversations only: a byte for each id, 1 where it is to be learnt
    info.json      counts, dtype, the tokenizer's digest, and SHA-256 of the other files, one after the other

A conversation's ids are all of its own, with BOS and the marks of turns.

Numbers are little-endian. Nothing is loaded before it is asked for, and a worker process gets a `Tokens` as its path.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gemmary.checkpoints.checkpoint import read_json, staged
from gemmary.errors import GemmaryError
from gemmary.text.dialogue import Dialogue
from gemmary.text.tokenizer import Tokenizer

__all__ = ["TokenInfo", "Tokens", "tokenizer_digest", "write_dialogues", "write_tokens"]

Ids = npt.NDArray[np.integer[Any]]
_Encoded = tuple[Ids, list[int], int]

_FILES = ("tokens.bin", "documents.bin")
_LEARNT = "learnt.bin"
_DTYPES = ("<u2", "<u4")
_BATCH = 1 << 20  # characters that a thread encodes at once


@dataclass(frozen=True, kw_only=True)
class TokenInfo:
    """What `info.json` holds."""

    documents: int
    tokens: int
    bytes: int
    """UTF-8 bytes of the documents: what bits per byte are counted by."""
    vocab_size: int
    dtype: str
    tokenizer: str
    """The tokenizer's digest."""
    digest: str
    """SHA-256 of tokens.bin followed by documents.bin, and by learnt.bin where there is one."""

    def __post_init__(self) -> None:
        counts, digests = (self.documents, self.tokens, self.bytes, self.vocab_size), (self.tokenizer, self.digest)
        whole = all(type(n) is int and 0 < n < 1 << 48 for n in counts) and all(isinstance(d, str) for d in digests)
        if not whole or self.dtype not in _DTYPES:
            raise GemmaryError("info.json is not that of tokenized documents: it is damaged; write them again")


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """SHA-256 of every piece with its score and kind: equal for tokenizers that are the same."""
    pieces = [(text, score, int(kind)) for text, score, kind in tokenizer.pieces]
    return hashlib.sha256(json.dumps(pieces).encode()).hexdigest()


def write_tokens(path: Path | str, documents: Iterable[str], tokenizer: Tokenizer, *, threads: int = 0) -> TokenInfo:
    """The documents' ids as a new directory; memory for some batches of a megabyte. `threads` 0: one for each core.

    Raises GemmaryError where the path exists, where there is no text, and for text that is not Unicode.
    """
    count = tokens = size = 0
    dtype = _DTYPES[tokenizer.size > 1 << 16]
    with staged(Path(path), 0) as stage:
        with (stage / "tokens.bin").open("wb") as ids, (stage / "documents.bin").open("wb") as starts:
            starts.write(bytes(8))
            for batch, lengths, batch_bytes in _encoded(documents, tokenizer, dtype, threads or os.cpu_count() or 1):
                ids.write(batch.data)
                starts.write((tokens + np.cumsum(lengths, dtype="<i8")).data)
                count, tokens, size = count + len(lengths), tokens + len(batch), size + batch_bytes
        if not tokens:
            raise GemmaryError(f"there is no text to write to {path}: it has {count} documents, all empty")
        return _write_info(stage, count, tokens, size, dtype, tokenizer)


def write_dialogues(path: Path | str, dialogues: Iterable[Dialogue], tokenizer: Tokenizer) -> TokenInfo:
    """Conversations' ids, and which of them are to be learnt, as a new directory; `bytes` are those of what is learnt.

    Raises GemmaryError where the path exists and where there is no conversation.
    """
    dtype = _DTYPES[tokenizer.size > 1 << 16]
    count = tokens = size = 0
    with staged(Path(path), 0) as stage:
        with (
            (stage / "tokens.bin").open("wb") as ids,
            (stage / "documents.bin").open("wb") as starts,
            (stage / _LEARNT).open("wb") as learnt,
        ):
            starts.write(bytes(8))
            for dialogue in dialogues:
                ids.write(np.array(dialogue.ids, dtype).data)
                learnt.write(bytes(dialogue.loss_mask))
                count, tokens = count + 1, tokens + len(dialogue.ids)
                said = (i for i, learns in zip(dialogue.ids, dialogue.loss_mask, strict=True) if learns)
                size += sum(len(tokenizer.token_bytes(i)) for i in said)
                starts.write(np.array([tokens], "<i8").data)
        if not count:
            raise GemmaryError(f"there is no conversation to write to {path}")
        return _write_info(stage, count, tokens, max(size, 1), dtype, tokenizer)


def _write_info(stage: Path, count: int, tokens: int, size: int, dtype: str, tokenizer: Tokenizer) -> TokenInfo:
    info = TokenInfo(
        documents=count,
        tokens=tokens,
        bytes=size,
        vocab_size=tokenizer.size,
        dtype=dtype,
        tokenizer=tokenizer_digest(tokenizer),
        digest=_digest(stage),
    )
    (stage / "info.json").write_text(json.dumps(asdict(info), indent=2) + "\n", encoding="utf-8")
    return info


def _digest(directory: Path) -> str:
    digest = hashlib.sha256()
    for name in (*_FILES, *([_LEARNT] if (directory / _LEARNT).exists() else [])):
        with (directory / name).open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def _encoded(documents: Iterable[str], tokenizer: Tokenizer, dtype: str, threads: int) -> Iterator[_Encoded]:
    """Batches in order: ids, the documents' lengths, UTF-8 bytes. SentencePiece works outside Python's lock."""

    def encode(texts: list[str]) -> _Encoded:
        ids = [np.array(tokenizer.encode(text), dtype) for text in texts]
        return np.concatenate(ids), [len(row) for row in ids], sum(len(text.encode()) for text in texts)

    pending: deque[Future[_Encoded]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for texts in _batches(documents):
            pending.append(pool.submit(encode, texts))
            if len(pending) > threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in documents:
        batch.append(text)
        size += len(text) + 64  # many empty documents are work as well
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class Tokens:
    """Tokenized documents, opened. `tokens[i]` is document i as ids, a view of the file."""

    def __init__(self, path: Path | str) -> None:
        """Raises GemmaryError where the files are not there or do not fit together; `verify` reads every byte."""
        self.path = Path(path).absolute()
        if not (self.path / "info.json").is_file():
            raise GemmaryError(f"{self.path} holds no tokenized documents: write_tokens makes them")
        try:
            self.info = TokenInfo(**read_json(self.path / "info.json"))
        except TypeError:
            raise GemmaryError(f"{self.path}/info.json is not that of tokenized documents") from None
        self._ids: Ids = self._mapped("tokens.bin", self.info.dtype, self.info.tokens)
        self._starts: npt.NDArray[np.int64] = self._mapped("documents.bin", "<i8", self.info.documents + 1)
        masked = (self.path / _LEARNT).is_file()
        self._learnt: Any = self._mapped(_LEARNT, "u1", self.info.tokens) if masked else None
        if self._starts[0] != 0 or self._starts[-1] != self.info.tokens or (self.lengths < 0).any():
            raise GemmaryError(f"{self.path}/documents.bin is damaged: write the tokens again")

    def _mapped(self, name: str, dtype: str, count: int) -> Any:
        path, size = self.path / name, count * np.dtype(dtype).itemsize
        try:
            if path.stat().st_size != size:
                raise GemmaryError(
                    f"{path} is {path.stat().st_size} bytes and should be {size}: write the tokens again"
                )
            # As a plain array: each slice of a memmap costs the making of a subclass's object.
            return np.memmap(path, dtype, mode="r").view(np.ndarray)
        except OSError as error:
            raise GemmaryError(f"{path} cannot be read: {error.strerror}") from None

    def __reduce__(self) -> tuple[type[Tokens], tuple[Path]]:
        return Tokens, (self.path,)

    def __len__(self) -> int:
        return self.info.documents

    def __getitem__(self, index: int) -> Ids:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        return self._ids[self._starts[index] : self._starts[index + 1]]

    def learnt(self, index: int) -> npt.NDArray[np.uint8]:
        """Of each id of conversation i: 1 where it is to be learnt."""
        if self._learnt is None:
            raise GemmaryError(f"{self.path} holds documents, not conversations: write_dialogues makes them")
        found: npt.NDArray[np.uint8] = self._learnt[self._starts[index] : self._starts[index + 1]]
        return found

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """How many tokens each document has."""
        return np.diff(self._starts)

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of all documents."""
        return self.info.bytes

    @property
    def digest(self) -> str:
        """SHA-256 of all tokens and of where documents begin, as they were written."""
        return self.info.digest

    def verify(self) -> None:
        """Reads every byte. Raises GemmaryError where they are not those that were written."""
        if _digest(self.path) != self.digest:
            raise GemmaryError(f"{self.path} is not as it was written: write the tokens again")
