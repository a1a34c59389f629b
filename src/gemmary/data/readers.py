"""How each kind of file gives its documents, piece by piece.

A piece is a part of a source that can be read alone: a range of bytes, a row group, a range of rows, some modules.
Optional libraries are imported where they are used.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from gemmary.errors import GemmaryError

__all__ = [
    "Broken", "Document", "Piece", "document", "file_pieces", "huggingface_pieces", "needed", "open_binary",
    "read_huggingface", "read_jsonl", "read_parquet", "read_text", "read_warc",
]  # fmt: skip

_LONGEST_LINE = 1 << 27  # bytes of a JSON line; a longer one is broken
_TEXT_DOCUMENT = 1 << 20  # bytes above which a text file is cut
_EXPANDS = {".gz": 4, ".zst": 4, ".parquet": 3}  # about so many bytes from one
_ROWS = 20_000  # of a data set in a piece


@dataclass(frozen=True)
class Document:
    """One document as it is read."""

    id: str
    text: str
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Broken:
    """What could not be read: where (file and line or record), and why."""

    where: str
    why: str


@dataclass(frozen=True)
class Piece:
    """Part of a source: bytes, rows or numbers `start` to `end` (-1: all) of `path`, or some `names` below it."""

    path: str
    bytes: int = field(compare=False)
    start: int = 0
    end: int = -1
    names: tuple[str, ...] = ()


@contextmanager
def needed(library: str, extra: str = "data") -> Iterator[None]:
    """A missing library becomes a GemmaryError that says how to get it."""
    try:
        yield
    except ImportError as error:
        raise GemmaryError(
            f"this needs {library}, and it is not there ({error}): pip install 'gemmary[{extra}]'"
        ) from None


def document(where: str, record: Any, text_key: str, id_key: str) -> Document | Broken:
    """A record as a document."""
    if isinstance(record, Broken):
        return record
    if not isinstance(record, dict):
        return Broken(where, "not an object")
    text = record.get(text_key)
    if not isinstance(text, str) or not text:
        return Broken(where, f"no text at {text_key!r}" + ("" if text is None or text == "" else ", but another type"))
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return Broken(where, "a lone surrogate: not Unicode")
    metadata = record.get("metadata")
    name = record.get(id_key)
    identity = str(name) if isinstance(name, str | int) and str(name).isprintable() else where
    return Document(identity, text, metadata if isinstance(metadata, dict) else {})


def file_pieces(kind: str, path: Path, most: int) -> list[Piece]:
    """A file, cut where that can be done without reading it."""
    size = path.stat().st_size
    if kind == "parquet":
        with needed("pyarrow"):
            import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                sizes = [file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups)]
        except (OSError, pyarrow.ArrowException) as error:
            raise GemmaryError(f"{path} cannot be read as Parquet: {error}") from None
        return [Piece(str(path), size, i, i + 1) for i, size in enumerate(sizes)]
    if kind == "jsonl" and path.suffix not in (".gz", ".zst"):
        return [Piece(str(path), min(most, size - at), at, min(at + most, size)) for at in range(0, size, most)]
    return [Piece(str(path), size * _EXPANDS.get(path.suffix, 1))]


@contextmanager
def open_binary(path: Path) -> Iterator[IO[bytes]]:
    """A file, plain or compressed. Damage met while reading is a GemmaryError."""
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                yield file  # type: ignore[misc]
        elif path.suffix == ".zst":
            with needed("zstandard"):
                import zstandard

            try:
                with (
                    path.open("rb") as raw,
                    zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True) as stream,
                ):
                    yield io.BufferedReader(stream, 1 << 18)
            except zstandard.ZstdError as error:
                raise GemmaryError(f"{path} is damaged: {error}") from None
        else:
            with path.open("rb") as file:
                yield file
    except (OSError, EOFError, zlib.error) as error:
        raise GemmaryError(f"{path} cannot be read: {error}") from None


def read_jsonl(piece: Piece) -> Iterator[tuple[str, Any]]:
    """(where, object or Broken) of each line that begins in the piece."""
    path = Path(piece.path)
    with open_binary(path) as file:
        at, number, exact = 0, 0, piece.start == 0
        if piece.start:
            file.seek(piece.start - 1)
            at = (
                piece.start - 1 + len(file.readline())
            )  # the line that reaches into the piece belongs to the one before
        while piece.end < 0 or at < piece.end:
            line = file.readline(_LONGEST_LINE)
            if not line:
                return
            begun, number = at, number + 1
            at += len(line)
            try:
                if len(line) == _LONGEST_LINE and not line.endswith(b"\n"):
                    while (
                        (rest := file.readline(_LONGEST_LINE)) and (at := at + len(rest)) and not rest.endswith(b"\n")
                    ):
                        pass
                    raise ValueError(f"a line above {_LONGEST_LINE >> 20} MiB")
                if line.strip():
                    yield f"{path.name}@{begun}", json.loads(line.decode("utf-8-sig" if begun == 0 else "utf-8"))
            except (ValueError, RecursionError) as error:
                why = "not UTF-8" if isinstance(error, UnicodeDecodeError) else f"not JSON: {error}"
                place = number if exact else _lines_before(path, begun) + 1
                yield "", Broken(f"{path.name}:{place}", why)


def _lines_before(path: Path, end: int) -> int:
    count = 0
    with path.open("rb") as file:
        while end > 0 and (block := file.read(min(1 << 20, end))):
            count, end = count + block.count(b"\n"), end - len(block)
    return count


def read_parquet(piece: Piece, keys: tuple[str, ...] | None) -> Iterator[tuple[str, Any]]:
    """(where, row) of the piece's row groups; only these keys and the metadata, or all columns."""
    import pyarrow.parquet

    path, row = Path(piece.path), 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if keys is not None:
                columns = [name for name in (*keys, "metadata") if name in columns]
            groups = range(piece.start, piece.end)
            for batch in file.iter_batches(batch_size=256, row_groups=list(groups), columns=columns):
                for record in batch.to_pylist():
                    yield f"{path.name}@{piece.start}.{row}", record
                    row += 1
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise GemmaryError(f"{path} cannot be read as Parquet: {error}") from None


def read_text(piece: Piece) -> Iterator[Document | Broken]:
    """A file's documents."""
    path = Path(piece.path)
    with open_binary(path) as file:
        number, lines, size = 1, list[bytes](), 0
        while True:
            line = file.readline(_TEXT_DOCUMENT)
            full = size >= _TEXT_DOCUMENT and (not line.strip() or size >= 2 * _TEXT_DOCUMENT)
            if lines and (full or not line):
                where = path.name if number == 1 and not line else f"{path.name}#{number}"
                try:
                    text = b"".join(lines).decode("utf-8-sig" if number == 1 else "utf-8")
                    yield Document(where, text, {}) if text.strip() else Broken(where, "no text")
                except UnicodeDecodeError as error:
                    yield Broken(where, f"not UTF-8: {error.reason} at byte {error.start}")
                number, lines, size = number + 1, [], 0
            if not line:
                return
            lines.append(line)
            size += len(line)


def read_warc(piece: Piece) -> Iterator[Document | Broken]:
    """The pages of an archive that are HTML or plain text."""
    with needed("warcio and trafilatura"):
        import trafilatura
        import warcio
        from warcio.exceptions import ArchiveLoadFailed
    path = Path(piece.path)
    try:
        with path.open("rb") as file:
            for number, record in enumerate(warcio.ArchiveIterator(file), 1):
                if record.rec_type not in ("response", "conversion"):
                    continue
                kind = (record.http_headers or record.rec_headers).get_header("Content-Type") or ""
                if record.rec_type == "response" and "html" not in kind.lower():
                    continue
                content = record.content_stream().read()
                address = record.rec_headers.get_header("WARC-Target-URI") or ""
                if record.rec_type == "response":
                    text = trafilatura.extract(content, include_comments=False, favor_precision=True) or ""
                else:
                    text = content.decode("utf-8", errors="replace")
                where = f"{path.name}:record {number}"
                if not text.strip():
                    yield Broken(where, "no text after extraction")
                    continue
                name = record.rec_headers.get_header("WARC-Record-ID") or f"{path.name}@{number}"
                yield document(where, {"text": text, "id": name, "metadata": {"url": address}}, "text", "id")
    except (OSError, EOFError, ArchiveLoadFailed, zlib.error) as error:
        raise GemmaryError(f"{path} cannot be read as WARC: {error}") from None


def _load(path: str, subset: str | None, split: str, cache: str) -> Any:
    with needed("datasets"):
        import datasets
    try:
        return datasets.load_dataset(path, subset, split=split, cache_dir=cache)
    except Exception as error:  # the library raises errors of many kinds, from several libraries below it
        raise GemmaryError(f"datasets cannot load {path} (subset {subset}, split {split}): {error}") from None


def huggingface_pieces(path: str, subset: str | None, split: str, cache: str) -> list[Piece]:
    """Ranges of rows."""
    loaded = _load(path, subset, split, cache)
    size = max(1, int(loaded.data.nbytes) // max(1, len(loaded)))
    if not len(loaded):
        raise GemmaryError(f"{path}, split {split}, has no rows")
    starts = range(0, len(loaded), _ROWS)
    return [Piece(path, size * min(_ROWS, len(loaded) - at), at, min(at + _ROWS, len(loaded))) for at in starts]


def read_huggingface(piece: Piece, subset: str | None, split: str, cache: str) -> Iterator[tuple[str, Any]]:
    """(where, row) of a range of rows."""
    loaded = _load(piece.path, subset, split, cache)
    for row in range(piece.start, piece.end):
        yield f"{Path(piece.path).name}@{row}", loaded[row]
