"""How fast a tokenizer.json encodes: gemmary beside Hugging Face's `tokenizers`, on one thread, in the same run.

    python benchmarks/tokenizer.py TOKENIZER_JSON [--data FILE ...] [--megabytes 4] [--repeats 5] [--json OUT]

Both get the same documents one by one and must give the same ids, else it fails (but for documents with runs of over 31
spaces where Gemma 1's tokenizer.json cuts those otherwise: they are left out). They take turns; the median is reported. Without --data the text is the
sources of Python's standard library. Needs `tokenizers` (any version; the one used is written down).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import sentencepiece
import tokenizers
from rich.console import Console
from rich.table import Table

from gemmary.text import Tokenizer


def documents(paths: list[Path], most: int) -> list[str]:
    """The files' texts in order of name, until there are `most` bytes."""
    found: list[str] = []
    for path in sorted(paths):
        text = path.read_text(encoding="utf-8", errors="ignore")
        found.append(text)
        most -= len(text.encode())
        if most <= 0:
            break
    return found


def seconds(encode: Callable[[str], list[int]], texts: list[str]) -> float:
    started = time.perf_counter()
    for text in texts:
        encode(text)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path, metavar="TOKENIZER_JSON")
    parser.add_argument("--data", type=Path, nargs="+", default=[], metavar="FILE")
    parser.add_argument("--megabytes", type=float, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="OUT")
    arguments = parser.parse_args()
    texts = documents(
        arguments.data or list(Path(json.__file__).parents[1].glob("*.py")), int(arguments.megabytes * 1e6)
    )
    ours = Tokenizer.from_tokenizer_json(arguments.tokenizer)
    published = tokenizers.Tokenizer.from_file(str(arguments.tokenizer))

    def theirs(text: str) -> list[int]:
        ids: list[int] = published.encode(text, add_special_tokens=False).ids
        return ids

    different = [text for text in texts if ours.encode(text, structure=True) != theirs(text)]
    unexplained = [text for text in different if " " * 32 not in text]
    if unexplained:
        raise SystemExit(
            f"{len(unexplained)} of {len(texts)} documents have other ids, such as {unexplained[0][:60]!r}"
        )
    texts = [text for text in texts if text not in different]
    size = sum(len(text.encode()) for text in texts)
    encoders = {
        f"gemmary (sentencepiece {sentencepiece.__version__})": ours.encode,
        f"tokenizers {tokenizers.__version__}": theirs,
    }
    times: dict[str, list[float]] = {name: [] for name in encoders}
    for _ in range(max(5, arguments.repeats)):
        for name, encode in encoders.items():
            times[name].append(seconds(encode, texts))
    speeds = {name: size / 1e6 / statistics.median(taken) for name, taken in times.items()}
    table = Table("encoder", "MB/s", "best", "worst", title=f"{len(texts)} documents, {size / 1e6:.1f} MB, one thread")
    for name, taken in times.items():
        table.add_row(
            name, *(f"{speed:.2f}" for speed in (speeds[name], size / 1e6 / min(taken), size / 1e6 / max(taken)))
        )
    Console().print(table)
    if arguments.json:
        result = {
            "what": "encoding speed on one thread, megabytes a second, medians of alternating runs",
            "documents": len(texts), "bytes": size, "megabytes_per_second": speeds, "seconds": times,
            "tokenizer": arguments.tokenizer.parts[-3:-2] or [arguments.tokenizer.name],
            "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
            "python": platform.python_version(),
        }  # fmt: skip
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
