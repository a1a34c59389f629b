"""What a person sees of a recipe's life: a bar where stderr is a terminal, lines where it is not, and a summary at the end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

from gemmary.checkpoints.checkpoint import read_json
from gemmary.data.curation_report import report_table

__all__ = ["Watch", "summary"]

_PAUSE = 10.0  # seconds between lines, where there is no terminal


class Watch:
    """Shows progress on a console; its methods are what `Life` calls."""

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self._console, self._quiet = console, quiet
        columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[line]}")
        self._bar = Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal)
        self._task = self._bar.add_task("", total=None, line="")
        self._said = 0.0

    def __enter__(self) -> Watch:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, line: str) -> None:
        """A line that stays."""
        if not self._quiet:
            self._console.print(line, highlight=False, markup=False)
        self._bar.reset(self._task, description=line.split(":")[0], total=None, line="")

    def progress(self, done: int, total: int) -> None:
        """So many of so many tasks."""
        self._bar.update(self._task, completed=done, total=total)

    def report(self, entry: dict[str, Any]) -> None:
        """A journal entry of training."""
        line = _line(entry)
        self._bar.update(self._task, completed=entry["step"], total=entry["total_steps"], line=line)
        stays = "held_out" in entry or "samples" in entry
        if not self._quiet and (stays or (not self._console.is_terminal and time.monotonic() - self._said > _PAUSE)):
            self._said = time.monotonic()
            self._console.print(line, highlight=False, markup=False)
            for extra in _extras(entry):
                self._console.print(f"    {extra}", highlight=False, markup=False)


def _line(entry: dict[str, Any]) -> str:
    eta = int(entry["eta_seconds"])
    pace = f"{entry['tokens_per_second']:,.0f} tokens/s  MFU {entry['mfu']:.0%}  ETA {eta // 60}:{eta % 60:02d}"
    loss = f"loss {entry['loss']:.3f}  {entry['bits_per_byte']:.3f} bits/byte"
    return f"step {entry['step']}/{entry['total_steps']}  {loss}  {pace}"


def _extras(entry: dict[str, Any]) -> list[str]:
    held_out = "  ".join(f"{name} {bits:.3f}" for name, bits in entry.get("held_out", {}).items())
    samples = [f"{prompt!r} → {text!r}"[:200] for prompt, text in entry.get("samples", {}).items()]
    return ([f"held-out bits/byte: {held_out}"] if held_out else []) + samples


def summary(verb: str, record: dict[str, Any], folder: Path) -> RenderableType:
    """What a verb came to, for people."""
    if verb == "curate":
        return report_table(read_json(folder / "curate" / "report.json"))
    if verb == "tokenizer":
        return _bytes_per_token(record["results"])
    if verb == "ablate":
        return _ranking(record)
    return _pretrained(record["results"], folder)


def _table(*columns: str, title: str) -> Table:
    table = Table(*columns, box=None, header_style="bold", title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _bytes_per_token(results: dict[str, Any]) -> Table:
    found = results["bytes_per_token"]
    names = list(next(iter(found.values())))
    table = _table("source", *names, title=f"bytes per token, {results['vocabulary']:,} pieces; more is better")
    for source, values in found.items():
        table.add_row(source, *(f"{values[name]:.2f}" for name in names))
    return table


def _ranking(record: dict[str, Any]) -> RenderableType:
    if not record["complete"]:
        return Text("stopped; the same command goes on")
    sources = list(record["ranking"][0]["held_out"])
    title = f"held-out bits per byte after {record['tokens']:,} tokens, dial {record['dial']}; the best first"
    table = _table("candidate", "mean", *sources, title=title)
    for one in record["ranking"]:
        table.add_row(one["name"], f"{one['mean']:.3f}", *(f"{one['held_out'][name]:.3f}" for name in sources))
    return table


def _pretrained(results: dict[str, Any], folder: Path) -> RenderableType:
    model = folder / "pretrain" / "model"
    if not results["complete"]:
        return Text(f"stopped at step {results['steps']}; the same command goes on from there")
    tokens = read_json(folder / "tokens" / "stage.json")["results"]["sources"]
    table = _table("held-out source", "bits per byte", "xz -9", title=f"{results['parameters']:,} parameters")
    for name, bits in results.get("held_out", {}).items():
        table.add_row(name, f"{bits:.3f}", f"{tokens[name]['xz_bits_per_byte']:.3f}")
    rest = f'curve: {folder / "pretrain" / "curve.png"}\nmodel: {model}\n  gemmary generate {model} "Once upon a time"'
    return Group(table, Text(rest))
