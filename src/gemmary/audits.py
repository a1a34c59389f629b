"""The verb `gemmary memorization`: corpora from paths and runs, a table, a chart, and a record of every document."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from gemmary.checkpoints.checkpoint import staged
from gemmary.errors import GemmaryError
from gemmary.gemma import Gemma

__all__ = ["COLUMNS", "add_memorization", "chart", "corpora_of", "rows", "write_audit"]

_SUFFIXES = (".jsonl", ".parquet", ".txt", ".md")
_TABLE_WIDTH = 120  # so that intervals stay whole where output is piped
_SHARES = ("exact", "approximate", "personal", "secret")

Progress = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]


def add_memorization(app: typer.Typer, load: Callable[..., Gemma], progress: Progress) -> None:
    """Register the verb. `load` opens a model, `progress` shows a bar with a title."""

    @app.command("memorization")
    def memorization_(
        model: Annotated[str, typer.Argument(help="A directory, a file, 'sample', or with --hub a hub id.")],
        corpus: Annotated[
            list[str] | None,
            typer.Option(
                help="[NAME=]PATH of documents that the model was trained on, or a run's folder; may be repeated."
            ),
        ] = None,
        unseen: Annotated[
            list[str] | None, typer.Option(help="[NAME=]PATH of documents that it never saw, as a control.")
        ] = None,
        documents: Annotated[int, typer.Option(help="Sampled from each corpus.")] = 10_000,
        seed: Annotated[int, typer.Option(help="Which documents.")] = 0,
        out: Annotated[Path | None, typer.Option(help="A new folder for the results, records and a chart.")] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
        dtype: Annotated[
            str | None, typer.Option(help="float32 or bfloat16; by default what suits the device.")
        ] = None,
        hub: Annotated[bool, typer.Option("--hub", help="Allow fetching MODEL from the Hugging Face hub.")] = False,
    ) -> None:
        """Ask what a model recites of its corpora: the first 50 tokens of documents, and whether the next 50 come."""
        try:
            from gemmary.evaluate.memorization import audit
        except ImportError as error:
            raise GemmaryError(f"this needs an extra ({error}): pip install 'gemmary[data,evaluate]'") from None
        if out is not None and out.exists():
            raise GemmaryError(f"{out} exists: name a new folder")
        asked = corpora_of(corpus or [], unseen or [])
        gemma = load(model, dtype, hub)
        found: dict[str, Any] = {"model": model}
        records: dict[str, Any] = {}
        for part, corpora in asked.items():
            if not corpora:
                continue
            with progress(f"reciting, {part}") as bar:
                found[part], some = audit(
                    gemma.engine,
                    gemma.tokenizer,
                    corpora,
                    documents=documents,
                    seed=seed,
                    on_progress=lambda _, done, total: bar(done, total),
                )
            records |= {f"{part}/{name}": lines for name, lines in some.items()}
        if out is not None:
            write_audit(out, found, records)
        if as_json:
            print(json.dumps(found))
        else:
            shown = Console()
            shown.width = max(shown.width, _TABLE_WIDTH)
            shown.print(_table(found))


def corpora_of(seen: list[str], unseen: list[str]) -> dict[str, dict[str, Iterator[Any]]]:
    """The documents that were named, by part and name. A run's folder is all that it trained on, and what it held out.

    Raises GemmaryError for what is not there or has no documents.
    """
    found: dict[str, dict[str, Iterator[Any]]] = {"seen": {}, "unseen": {}}
    for part, named in (("seen", seen), ("unseen", unseen)):
        for one in named:
            name, _, path = one.rpartition("=")
            run = Path(path) / "curate" / "documents"
            corpora = _run(run) if run.is_dir() else {part: {name or Path(path).name.split(".")[0]: _file(Path(path))}}
            if run.is_dir() and part == "unseen":
                raise GemmaryError(f"{path} is a run: give it as --corpus, and what it held out is the control")
            for where, some in corpora.items():
                if twice := found[where].keys() & some:
                    raise GemmaryError(f"there are two corpora {min(twice)!r}: give them names, NAME=PATH")
                found[where] |= some
    if not found["seen"] and not found["unseen"]:
        raise GemmaryError("there is nothing to audit: give --corpus, --unseen or both")
    return found


def _run(below: Path) -> dict[str, dict[str, Iterator[Any]]]:
    from gemmary.data import read_documents
    from gemmary.data.readers import Document

    def documents(source: str, split: str) -> Iterator[Any]:
        for one in read_documents(below.parent, source, split):
            yield Document(str(one["id"]), one["text"], {})

    names = sorted(path.name for path in below.iterdir() if path.is_dir())
    return {
        "seen": {name: documents(name, "train") for name in names},
        "unseen": {name: documents(name, "held_out") for name in names if any((below / name / "held_out").glob("*"))},
    }


def _file(path: Path) -> Iterator[Any]:
    from gemmary.data.sources import documents_at

    if not path.is_file():
        raise GemmaryError(f"{path} is not there: give a file of documents, or a run's folder")
    if not set(path.suffixes) & set(_SUFFIXES):
        raise GemmaryError(f"{path} is not {', '.join(_SUFFIXES)} (or one of these with .gz or .zst)")
    return documents_at("corpus", str(path))


def _rows(found: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for part in ("seen", "unseen"):
        if part in found:
            yield from ((part, name, one) for name, one in found[part]["corpora"].items())
            if len(found[part]["corpora"]) > 1:
                yield part, "all", found[part]["all"]


COLUMNS = ["", "corpus", "documents", *_SHARES]


def rows(found: Mapping[str, Any]) -> list[list[str]]:
    """A row for each corpus, as `COLUMNS`: shares of its documents in percent, with their 95 % intervals."""
    made = []
    for part, name, one in _rows(found):
        cells = []
        for share in _SHARES:
            low, high = (100 * bound for bound in one[share]["interval"])
            cells.append(f"{100 * one[share]['share']:.2f} [{low:.2f}, {high:.2f}]")
        made.append([part, name, f"{one['documents']:,}", *cells])
    return made


def _table(found: Mapping[str, Any]) -> Table:
    table = Table(*COLUMNS, title="recited, percent of documents [95 % interval]")
    for row in rows(found):
        table.add_row(*row)
    return table


def chart(found: Mapping[str, Any]) -> str:
    """Exact and approximate shares of every corpus, on a logarithmic scale as in the report: an SVG."""
    from gemmary.evaluate.drawing import figure, svg

    rows = list(_rows(found))
    made, axes = figure(height=1.1 + 0.42 * len(rows))
    least = min(0.5 / one["documents"] for _, _, one in rows)
    for offset, share, color in ((-0.18, "exact", "tab:blue"), (0.18, "approximate", "tab:orange")):
        values = [100 * one[share]["share"] for _, _, one in rows]
        bounds = [[100 * bound for bound in one[share]["interval"]] for _, _, one in rows]
        below = [max(value - low, 0) for value, (low, _) in zip(values, bounds, strict=True)]
        above = [max(high - value, 0) for value, (_, high) in zip(values, bounds, strict=True)]
        at = [i + offset for i in range(len(rows))]
        axes.barh(at, values, height=0.34, color=color, label=share, xerr=(below, above), ecolor="0.4", capsize=2)
        for y, (_, _, one), (_, high) in zip(at, rows, bounds, strict=True):
            if not one[share]["count"]:
                axes.text(1.15 * high, y, "none", va="center", fontsize=8, color="0.4")
    axes.set_yticks(range(len(rows)), [name if part == "seen" else f"{name} (unseen)" for part, name, _ in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(100 * least, 100)
    axes.set_xlabel("percent of documents recited")
    axes.spines["right"].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return svg(made)


def write_audit(out: Path, found: Mapping[str, Any], records: Mapping[str, Any]) -> None:
    """`memorization.json`, `records.jsonl` and `memorization.svg` in a new folder, whole or not at all."""
    lines = [{"corpus": name, **line} for name, some in records.items() for line in some]
    files = {
        "memorization.json": json.dumps(found, indent=1) + "\n",
        "records.jsonl": "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines),
        "memorization.svg": chart(found),
    }
    with staged(out, sum(map(len, files.values()))) as folder:
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
