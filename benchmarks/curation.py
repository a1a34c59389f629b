"""How fast rules of quality and all of curation are, beside datatrove's stock chain, and what they do to real text.

    python benchmarks/curation.py --data FOLDER [--repeats 3] [--json benchmarks/results/curation.json]

FOLDER has `documents/books.jsonl.gz` and `documents/web.jsonl.gz` ({"id", "text"} a line). On one core, in turns, medians:

    stock             GopherQuality, GopherRepetition and FineWebQuality as they come, with spaCy's words (if it is installed)
    stock, our words  the same filters, given the words of gemmary.data.words
    gemmary           our rules: they must keep exactly the documents that "stock, our words" keeps, else this fails

Then the offline default (Python's prose and code, and arithmetic) and FOLDER's documents are curated with all cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from datatrove.data import Document
from rich.console import Console
from rich.table import Table
from stock_filters import OurWords, stock_filters

from gemmary.data.curate import curate
from gemmary.data.curation_report import report_table
from gemmary.data.curation_settings import CurateSettings
from gemmary.data.curation_steps import read_lines
from gemmary.data.filters import ProseRules, prose_fault
from gemmary.data.sources import Source
from gemmary.data.words import Words

Texts = dict[str, str]


def stock(language: Any) -> Callable[[Texts], list[str]]:
    """The stock chain, with the thresholds that are ours by default."""
    chain = stock_filters(language)

    def kept(texts: Texts) -> list[str]:
        documents = (Document(text=text, id=name) for name, text in texts.items())
        return [d.id for d in documents if all(rule.filter(d) is True for rule in chain)]

    return kept


def ours(texts: Texts) -> list[str]:
    rules = ProseRules(min_letters=0)  # which the stock chain has not
    return [name for name, text in texts.items() if prose_fault(Words(text), rules) is None]


def chains(texts: Texts, repeats: int) -> dict[str, Any]:
    """Seconds of each chain in turns, and whether they keep the same."""
    candidates = {"gemmary": ours, "stock, our words": stock(OurWords())}
    if find_spec("spacy"):
        candidates["stock"] = stock("en")
    few = dict(list(texts.items())[:3])
    for kept in candidates.values():
        kept(few)  # tables and models are made once
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    result: dict[str, list[str]] = {}
    for _ in range(max(3, repeats)):
        for name, kept in candidates.items():
            started = time.perf_counter()
            result[name] = kept(texts)
            seconds[name].append(time.perf_counter() - started)
    if result["gemmary"] != result["stock, our words"]:
        raise SystemExit("gemmary keeps other documents than the stock chain does with the same words")
    size = sum(len(text.encode()) for text in texts.values()) / 1e6
    return {
        "documents": len(texts), "megabytes": round(size, 3), "kept": {name: len(ids) for name, ids in result.items()},
        "other_decisions_with_spacy": len(set(result["gemmary"]) ^ set(result["stock"])) if "stock" in result else None,
        "seconds": {name: [round(t, 4) for t in taken] for name, taken in seconds.items()},
        "megabytes_per_second": {name: round(size / statistics.median(t), 3) for name, t in seconds.items()},
        "documents_per_second": {name: round(len(texts) / statistics.median(t), 1) for name, t in seconds.items()},
    }  # fmt: skip


def curated(settings: CurateSettings) -> dict[str, Any]:
    """One whole run: its report."""
    with tempfile.TemporaryDirectory() as folder:
        return curate(settings, Path(folder))


def summary(report: dict[str, Any]) -> dict[str, Any]:
    sources = {
        name: {"documents": source["read"]["documents"], "bytes": source["read"]["bytes"]}
        | {
            "kept_share_of_characters": round(
                (source["train"]["characters"] + source["held_out"]["characters"]) / source["read"]["characters"], 4
            ),
            "removed_documents": {rule: entry["documents"] for rule, entry in source["removed"].items()},
        }
        for name, source in report["sources"].items()
    }
    return {"run": report["run"], "sources": sources}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "curation.json", metavar="OUT")
    arguments = parser.parse_args()
    documents = arguments.data / "documents"
    files = {name: documents / f"{name}.jsonl.gz" for name in ("books", "web")}
    console, result = Console(), {"chains": {}}
    for name, path in files.items():
        texts = {d["id"]: "\n".join(line.rstrip() for line in d["text"].split("\n")) for d in read_lines(path)}
        texts = dict(list(texts.items())[:50]) if name == "books" else texts
        found = chains(texts, arguments.repeats)
        result["chains"][name] = found
        title = f"{name}: {found['documents']} documents, {found['megabytes']:.1f} MB, one core, medians of {max(3, arguments.repeats)}"
        table = Table("chain", "MB/s", "documents/s", "kept", title=title)
        for chain, speed in found["megabytes_per_second"].items():
            table.add_row(
                chain, f"{speed:.2f}", f"{found['documents_per_second'][chain]:.0f}", str(found["kept"][chain])
            )
        console.print(table)
    offline = (
        Source(name="python-prose", kind="python"),
        Source(name="python-code", kind="python", part="code"),
        Source(name="arithmetic", kind="arithmetic"),
    )
    given = tuple(Source(name=name, kind="jsonl", path=str(path)) for name, path in files.items())
    for name, sources in {"offline": offline, "data": given}.items():
        report = curated(CurateSettings(source=sources))
        console.print(report_table(report))
        result[name] = summary(report)
    result["machine"] = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    result["peak_memory_gb"] = {
        "this process": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
        "largest worker": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6, 2),
    }
    packages = [name for name in ("datatrove", "spacy", "numpy") if find_spec(name)]
    result["versions"] = {"python": platform.python_version()} | {name: version(name) for name in packages}
    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
