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
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)
        self._bar.reset(self._task, description=line.split(":")[0], total=None, line="")

    def progress(self, done: int, total: int) -> None:
        """So many of so many tasks."""
        self._bar.update(self._task, completed=done, total=total)

    def report(self, entry: dict[str, Any]) -> None:
        """A journal entry of training."""
        line = _line(entry)
        self._bar.update(self._task, completed=entry["step"], total=entry["total_steps"], line=line)
        stays = bool(_extras(entry))
        if not self._quiet and (stays or (not self._console.is_terminal and time.monotonic() - self._said > _PAUSE)):
            self._said = time.monotonic()
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)
            for extra in _extras(entry):
                self._console.print(f"    {extra}", highlight=False, markup=False, soft_wrap=True)


def _line(entry: dict[str, Any]) -> str:
    eta = int(entry["eta_seconds"])
    parts = [f"step {entry['step']}/{entry['total_steps']}"]
    if "reward" in entry:  # of samples: their loss says nothing
        parts.append(
            f"reward {entry['reward']:.3f}  KL {entry['kl']:.3f}  {entry['answer_tokens']:.0f} tokens an answer"
        )
    else:
        parts.append(f"loss {entry['loss']:.3f}")
        parts += [f"{entry['bits_per_byte']:.3f} bits/byte"] if "bits_per_byte" in entry else []
        parts += [f"accuracy {entry['accuracy']:.1%}"] if "accuracy" in entry else []
        parts.append(f"{entry['tokens_per_second']:,.0f} tokens/s")
    parts += [f"MFU {entry['mfu']:.0%}"] if "mfu" in entry else []
    return "  ".join([*parts, f"ETA {eta // 60}:{eta % 60:02d}"])


def _extras(entry: dict[str, Any]) -> list[str]:
    held_out = "  ".join(f"{name} {bits:.3f}" for name, bits in entry.get("held_out", {}).items())
    samples = [f"{prompt!r} → {text!r}"[:200] for prompt, text in entry.get("samples", {}).items()]
    found = [f"held-out bits/byte: {held_out}"] if held_out else []
    if losses := entry.get("held_out_loss"):
        found.append(f"held-out loss: {'  '.join(f'{name} {loss:.3f}' for name, loss in losses.items())}")
    if pairs := entry.get("held_out_pairs"):
        found.append(f"held-out pairs: {pairs['accuracy']:.1%} of {pairs['pairs']} right, loss {pairs['loss']:.3f}")
    if watched := entry.get("watched"):
        found.append(f"held-out answers: {_watched(watched)}")
    return found + samples + ([entry["stop"]] if "stop" in entry else [])


def _watched(found: dict[str, Any]) -> str:
    shares = {"success": found["success"], "better than before": found["win_rate"], "repetition": found["repetition"]}
    said = [f"{name} {share:.1%}" for name, share in shares.items() if share is not None]
    return "  ".join([*said, f"reward {found['reward'] or 0:.3f}", f"{found['answer_tokens']:.0f} tokens"])


def summary(verb: str, record: dict[str, Any], folder: Path) -> RenderableType:
    """What a verb came to, for people."""
    if verb == "curate":
        return report_table(read_json(folder / "curate" / "report.json"))
    if verb == "tokenizer":
        return _bytes_per_token(record["results"])
    if verb == "ablate":
        return _ranking(record)
    if not record["results"]["complete"]:
        return Text(
            f"{record['stage']} was stopped at step {record['results']['steps']}; the same command goes on from there"
        )
    if record["stage"] == "pretrain":
        return _pretrained(record["results"], folder)
    if record["stage"] == "evaluate":
        return _evaluated(record["results"], folder)
    return _tuned(record, folder)


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
    tokens = read_json(folder / "tokens" / "stage.json")["results"]["sources"]
    table = _table("held-out source", "bits per byte", "xz -9", title=f"{results['parameters']:,} parameters")
    for name, bits in results.get("held_out", {}).items():
        table.add_row(name, f"{bits:.3f}", f"{tokens[name]['xz_bits_per_byte']:.3f}")
    rest = f'curve: {folder / "pretrain" / "curve.png"}\nmodel: {model}\n  gemmary generate {model} "Once upon a time"'
    return Group(table, Text(rest))


def _tuned(record: dict[str, Any], folder: Path) -> RenderableType:
    stage, results = record["stage"], record["results"]
    before, table = (
        results["before"],
        _table("held out", "before", "after", title=f"{results['learnt']:,} parameters learnt"),
    )
    for name, loss in results.get("held_out_loss", {}).items():
        table.add_row(f"loss: {name}", f"{before['held_out_loss'][name]:.3f}", f"{loss:.3f}")
    if pairs := results.get("held_out_pairs"):
        table.add_row("pairs judged right", f"{before['held_out_pairs']['accuracy']:.1%}", f"{pairs['accuracy']:.1%}")
        for name, found in pairs.get("by_length", {}).items():
            title = {
                "longer": "the better is longer",
                "shorter": "the better is shorter",
                "as_long": "both are as long",
            }[name]
            table.add_row(f"  {title} ({found['pairs']})", "", f"{found['accuracy']:.1%}")
    if watched := results.get("watched"):
        for name in ("success", "reward", "answer_tokens", "repetition", "win_rate"):
            old, new = (found[name] for found in (before["watched"], watched))
            table.add_row(name.replace("_", " "), *("" if value is None else f"{value:.3f}" for value in (old, new)))
    model = folder / stage / Path(results["parameters"]).name
    rest = f"curve: {folder / stage / 'curve.png'}\nmodel: {model}"
    if stage != "reward":
        rest += f"\n  gemmary chat {model}"
    return Group(table, Text(rest))


def _evaluated(results: dict[str, Any], folder: Path) -> RenderableType:
    models = results["models"]
    columns = [(name, how) for name in models for how in models[name]]
    heads = [f"{name}, {how}" if how != "greedy" else name for name, how in columns]
    count = next(iter(models.values()))["greedy"]["tasks"].get("all", {}).get("prompts", 0)
    table = _table(
        "held-out task", *heads, title=f"answers that are right, of {count} prompts; the likeliest ones, and sampled"
    )
    for task in next(iter(models.values()))["greedy"]["tasks"]:
        shares = (models[name][how]["tasks"][task]["success"] for name, how in columns)
        table.add_row("mean of tasks" if task == "all" else task, *(f"{share:.1%}" for share in shares))
    last = [name for name in models if name != "base"][-1:]
    rest = f"answers side by side: {folder / 'evaluate' / 'results.json'}"
    return Group(table, Text(rest + "".join(f"\n  gemmary chat {folder / name / 'model'}" for name in last)))
