"""Where documents come from, and how each is cut into shards: a fixed function of the input, so that output never depends
on the number of workers.

    jsonl         one object a line, plain or .gz or .zst; plain files are cut into ranges of bytes at newlines
    parquet       row groups
    text          one document a file; a file above a megabyte is cut at a blank line, or at any line
    warc          archived pages through extraction (trafilatura); plain text of "conversion" records as it is
    huggingface   a local directory through `datasets`; a hub id only with `hub = true`
    python        the corpus every Python carries: `part = "prose"` (reference topics, docstrings) or `"code"` (sources)
    arithmetic    generated worked mathematics

Broken lines and records are given as `Broken` among the documents, and reading goes on. A source that is missing, empty
or damaged as a whole raises GemmaryError. Memory: one document at a time, one row group's batch, one WARC record.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gemmary.data import readers
from gemmary.data.arithmetic import arithmetic_pieces, read_arithmetic
from gemmary.data.readers import Broken, Document, Piece
from gemmary.data.standard_library import python_pieces, read_python
from gemmary.errors import GemmaryError

__all__ = ["Shard", "Source", "documents_at", "files", "read", "shards"]

_SUFFIXES = {
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet",),
    "text": (".txt", ".md", ".rst", ".text"),
    "warc": (".warc", ".wet"),
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source of documents, and what happens to them."""

    name: str
    """The name of its folder in the output."""
    kind: Literal["jsonl", "parquet", "text", "warc", "huggingface", "python", "arithmetic"]
    path: str | None = None
    """A file, a directory (files of the kind's suffixes in it and below), or a pattern with `*`."""
    filters: Literal["auto", "prose", "code", "none"] = "auto"
    """Which rules apply; auto: none for arithmetic, code for Python's code, else prose."""
    held_out: float = 0.01
    """Share of documents that never enter training: those of the smallest hash of id, at least one where above 0."""
    part: Literal["prose", "code"] = "prose"
    """python: which half."""
    documents: int = 10_000
    """arithmetic: how many; about 750 bytes each."""
    seed: int = 0
    """arithmetic: which."""
    text_key: str = "text"
    """jsonl, parquet, huggingface: where the text is."""
    id_key: str = "id"
    """The same: where the id is; without one, the file and the place in it are the id."""
    subset: str | None = None
    """huggingface: which configuration."""
    split: str = "train"
    """huggingface: which split."""
    hub: bool = False
    """huggingface: `path` is a hub id, to be downloaded."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise GemmaryError(f"a source's name is letters, digits, and . _ - (at most 64), not {self.name!r}")
        generated = self.kind in ("python", "arithmetic")
        if generated == (self.path is not None):
            wants = "has no path: it needs none" if generated else "needs a path"
            raise GemmaryError(f"source {self.name}: kind {self.kind} {wants}")
        if not 0 <= self.held_out < 1:
            raise GemmaryError(f"source {self.name}: held_out is {self.held_out}; it may be 0 to below 1")
        if not 1 <= self.documents <= 1 << 40:
            raise GemmaryError(f"source {self.name}: documents is {self.documents}; it must be at least 1")
        if self.hub and self.kind != "huggingface":
            raise GemmaryError(f"source {self.name}: hub = true is for kind huggingface")

    @property
    def rules(self) -> Literal["prose", "code", "none"]:
        """Which rules apply, decided."""
        if self.filters != "auto":
            return self.filters
        if self.kind == "arithmetic":
            return "none"
        return "code" if self.kind == "python" and self.part == "code" else "prose"


@dataclass(frozen=True)
class Shard:
    """A part of one source: what one task reads."""

    source: Source
    number: int
    pieces: tuple[Piece, ...]
    bytes: int = field(compare=False)
    """About so many bytes of text."""


def shards(source: Source, task_bytes: int, cache: Path) -> list[Shard]:
    """The source, cut. `cache` is where `datasets` may keep what it makes.

    Raises GemmaryError where there is nothing to read.
    """
    if source.kind == "arithmetic":
        pieces = arithmetic_pieces(source.documents)
    elif source.kind == "python":
        pieces = python_pieces(source.part)
    elif source.kind == "huggingface":
        pieces = readers.huggingface_pieces(_dataset(source), source.subset, source.split, str(cache))
    else:
        pieces = [p for path in files(source) for p in readers.file_pieces(source.kind, path, task_bytes)]
    made: list[Shard] = []
    group: list[Piece] = []
    for i, piece in enumerate(pieces):
        group.append(piece)
        size = sum(p.bytes for p in group)
        if i + 1 == len(pieces) or size + pieces[i + 1].bytes > task_bytes:
            made.append(Shard(source, len(made), tuple(group), size))
            group = []
    return made


def read(shard: Shard, cache: Path) -> Iterator[Document | Broken]:
    """The shard's documents, in the source's order."""
    source = shard.source
    for piece in shard.pieces:
        if source.kind == "arithmetic":
            yield from read_arithmetic(piece, source.seed)
        elif source.kind == "python":
            yield from read_python(piece, source.part)
        elif source.kind == "text":
            yield from readers.read_text(piece)
        elif source.kind == "warc":
            yield from readers.read_warc(piece)
        else:
            keys = (source.text_key, source.id_key)
            records: Iterator[tuple[str, Any]]
            if source.kind == "jsonl":
                records = readers.read_jsonl(piece)
            elif source.kind == "parquet":
                records = readers.read_parquet(piece, keys)
            else:
                records = readers.read_huggingface(piece, source.subset, source.split, str(cache))
            yield from (readers.document(where, record, *keys) for where, record in records)


def documents_at(name: str, path: str) -> Iterator[Document | Broken]:
    """Every document of a file or folder, of the kind that its suffixes say (text where they say nothing)."""
    suffixes = "".join(Path(path).suffixes)
    kind = "jsonl" if "json" in suffixes else "parquet" if "parquet" in suffixes else "text"
    if Path(path).is_dir():
        kind = next((k for k in ("jsonl", "parquet") if any(Path(path).rglob(f"*.{k}*"))), "text")
    source = Source(name=name, kind=kind, path=path)  # type: ignore[arg-type]  # one of three literals
    return (document for shard in shards(source, 1 << 62, Path()) for document in read(shard, Path()))


def _dataset(source: Source) -> str:
    assert source.path is not None
    if not source.hub and not Path(source.path).is_dir():
        raise GemmaryError(
            f"source {source.name}: {source.path} is not a directory; for a hub id say hub = true, which downloads it"
        )
    return source.path


def files(source: Source) -> list[Path]:
    """The source's files that are not empty, in order of name."""
    assert source.path is not None
    path = Path(source.path).expanduser()
    try:
        if path.is_dir():
            wanted = _SUFFIXES[source.kind]
            found = sorted(
                p
                for p in path.rglob("*")
                if p.is_file() and p.name.removesuffix(".gz").removesuffix(".zst").endswith(wanted)
            )
        elif "*" in path.name:
            found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        else:
            found = [path] if path.is_file() else []
        empty = not any(p.stat().st_size for p in found)
    except OSError as error:
        raise GemmaryError(f"source {source.name}: cannot read {path}: {error.strerror}") from None
    if not found:
        raise GemmaryError(
            f"source {source.name}: there is no {source.kind} file at {path}: give a file, folder or pattern"
        )
    if empty:
        raise GemmaryError(f"source {source.name}: {path} is empty")
    return [p for p in found if p.stat().st_size]
