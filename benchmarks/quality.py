"""Quality for compute: a nano Gemma trained for so many minutes, and its held-out bits per byte against them.

    python benchmarks/quality.py --data books.jsonl.gz [--held-out novels.jsonl.gz] --minutes 5
        [--recipe runs/nano.toml] [--set pretrain.batch=4 …] [--name TRIED] [--json OUT]

Documents are JSON lines with a `text`, or plain text files; without --held-out every tenth document is held out. They are cut
into pieces of 4000 characters. The model, tokenizer and training are the recipe's; its steps are set so that training, without
compiling, evaluating and saving, takes the minutes asked for. With --json the result is added to those already there, by
name, so that what was tried stays on record. `--steps N` trains N steps instead, whatever they take.
"""

from __future__ import annotations

import argparse
import bz2
import dataclasses
import gzip
import json
import lzma
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gemmary.data.mixture import MixtureSettings, Stage
from gemmary.data.tokens import Tokens, write_tokens
from gemmary.recipe import Recipe, load_recipe
from gemmary.text.training import train_tokenizer
from gemmary.train.pretrain import PretrainSettings, pretrain

PIECE = 4000  # characters
MIXTURE = MixtureSettings(stage=(Stage(weights={"text": 1.0}),))


def documents(path: Path) -> list[str]:
    """The texts of a file, or of all files of a folder."""
    if path.is_dir():
        return [text for file in sorted(path.iterdir()) if file.is_file() for text in documents(file)]
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if ".jsonl" not in path.name:
        return [data.decode(errors="replace")]
    return [json.loads(line)["text"] for line in data.decode().split("\n") if line.strip()]


def pieces(texts: list[str]) -> Iterator[str]:
    """Texts in pieces."""
    return (text[at : at + PIECE] for text in texts for at in range(0, len(text), PIECE))


class Trial:
    """One recipe on one set of documents, in a folder of its own."""

    def __init__(self, recipe: Recipe, train: list[str], held_out: list[str], folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        self.tokenizer = train_tokenizer(pieces(train), recipe.tokenizer)
        write_tokens(folder / "train", pieces(train), self.tokenizer)
        write_tokens(folder / "held_out", held_out, self.tokenizer)
        self.train, self.held_out = Tokens(folder / "train"), Tokens(folder / "held_out")
        settings = recipe.model.scaled(recipe.pretrain)
        self.settings = dataclasses.replace(settings, prompt=(), evaluate_every=0, save_every=0, log_every=5)
        self.config = recipe.model.config(self.tokenizer.size, settings.length)

    def run(self, name: str, settings: PretrainSettings) -> list[dict[str, Any]]:
        """The journal of a run."""
        folder = self.folder / name
        pretrain(
            settings, self.config, self.tokenizer, MIXTURE, {"text": self.train}, {"books": self.held_out}, folder,
            seed=self.recipe.seed, report=lambda entry: print(_line(entry), flush=True) if "held_out" in entry else None,
        )  # fmt: skip
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    def seconds_per_step(self) -> float:
        """Of the recipe's step, after the first few."""
        entries = self.run("pace", dataclasses.replace(self.settings, steps=25))
        return self.tokens_per_step / max(entry["tokens_per_second"] for entry in entries)

    @property
    def tokens_per_step(self) -> int:
        return self.settings.batch * self.settings.length


def _line(entry: dict[str, Any]) -> str:
    return f"step {entry['step']}  {entry['tokens']:,} tokens  held-out {entry['held_out']['books']:.3f} bits per byte"


def against_time(trial: Trial, steps: int, points: int = 8) -> list[dict[str, float]]:
    """Held-out bits per byte at some points of a run, with the minutes of training before each."""
    settings = dataclasses.replace(trial.settings, steps=steps, evaluate_every=max(5, steps // points // 5 * 5))
    seconds, curve, last = 0.0, [], 0
    for entry in trial.run("run", settings):
        seconds += (entry["step"] - last) * trial.tokens_per_step / entry["tokens_per_second"]
        last = entry["step"]
        if "held_out" in entry:
            bits = entry["held_out"]["books"]
            curve.append({"minutes": seconds / 60, "tokens": entry["tokens"], "bits_per_byte": bits})
    return curve


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--held-out", type=Path)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--recipe", type=Path, default=Path(__file__).parent.parent / "runs" / "nano.toml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--name", default="the recipe's")
    parser.add_argument("--json", type=Path, metavar="OUT")
    arguments = parser.parse_args()
    train = documents(arguments.data)
    if arguments.held_out:
        held_out = documents(arguments.held_out)
    else:
        train, held_out = [t for i, t in enumerate(train) if i % 10 != 9], train[9::10]
    recipe = load_recipe(arguments.recipe, arguments.set)
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(recipe, train, held_out, Path(folder))
        started = time.perf_counter()
        steps = arguments.steps or round(arguments.minutes * 60 / trial.seconds_per_step())
        curve = against_time(trial, steps)
        took = time.perf_counter() - started
    raw = "\n".join(held_out).encode()
    marks = {"xz -9e": lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME), "bzip2 -9": bz2.compress(raw, 9)}
    packed = {name: 8 * len(data) / len(raw) for name, data in marks.items()}
    table = Table(
        "minutes of training", "tokens", "bits per byte", title=f"{arguments.name}: {steps} steps, {took:.0f} s in all"
    )
    for point in curve:
        table.add_row(f"{point['minutes']:.2f}", f"{point['tokens']:,}", f"{point['bits_per_byte']:.3f}")
    Console(width=100).print(table)
    print("  ".join(f"{name} {bits:.3f}" for name, bits in packed.items()))
    if arguments.json:
        known = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
        known[arguments.name] = {
            "set": arguments.set,
            "steps": steps,
            "curve": curve,
            **packed,
            "cores": os.cpu_count(),
        }
        arguments.json.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
