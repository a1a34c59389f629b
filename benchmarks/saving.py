"""What saving costs: a nano run with and without checkpoints, in turns.

    python benchmarks/saving.py [--steps 60] [--every 20] [--repeats 3] [--json OUT]

Each turn is a run of so many steps of `runs/nano.toml`'s model and batch on Python's own library, from its first step on; one
saves every `--every` steps, the other only after the last. The difference over the extra saves is what one save costs; its share
is of the default's `save_every` steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from gemmary.data.mixture import MixtureSettings, Stage
from gemmary.data.tokens import Tokens, write_tokens
from gemmary.recipe import load_recipe
from gemmary.text.training import train_tokenizer
from gemmary.train.pretrain import PretrainSettings, pretrain

MIXTURE = MixtureSettings(stage=(Stage(weights={"text": 1.0}),))


class Trial:
    """The recipe's model on the sources of the standard library."""

    def __init__(self, recipe: Path, folder: Path) -> None:
        self.recipe, self.folder = load_recipe(recipe), folder
        texts = [
            path.read_text(encoding="utf-8", errors="replace") for path in sorted(Path(os.__file__).parent.glob("*.py"))
        ]
        self.tokenizer = train_tokenizer(texts, self.recipe.tokenizer)
        write_tokens(folder / "tokens", texts, self.tokenizer)
        self.tokens, self.runs = Tokens(folder / "tokens"), 0

    def seconds(self, steps: int, every: int) -> float:
        """Of the steps, from the first report to the end of the last save."""
        settings = dataclasses.replace(
            self.recipe.model.scaled(self.recipe.pretrain), steps=steps, save_every=every, log_every=1, prompt=()
        )
        config = self.recipe.model.config(self.tokenizer.size, settings.length)
        started: list[float] = []

        def report(entry: dict[str, Any]) -> None:
            started.append(time.perf_counter())

        self.runs += 1
        pretrain(
            settings, config, self.tokenizer, MIXTURE, {"text": self.tokens}, {}, self.folder / f"run{self.runs}",
            report=report,
        )  # fmt: skip
        return time.perf_counter() - started[0]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--recipe", type=Path, default=Path(__file__).parent.parent / "runs" / "nano.toml")
    parser.add_argument("--json", type=Path, metavar="OUT")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(arguments.recipe, Path(folder))
        trial.seconds(5, 0)  # the tokens' pages, and what is compiled once
        pairs = [
            (trial.seconds(arguments.steps, arguments.every), trial.seconds(arguments.steps, 0))
            for _ in range(arguments.repeats)
        ]
    extra = -(-arguments.steps // arguments.every) - 1  # the last step is saved in both
    step = statistics.median(without / (arguments.steps - 1) for _, without in pairs)
    save = statistics.median((with_ - without) / extra for with_, without in pairs)
    default = PretrainSettings(steps=1).save_every
    result = {
        "seconds_per_step": step, "seconds_per_save": save, "default_save_every": default,
        "share_of_step_time": save / (default * step), "pairs": pairs, "cores": os.cpu_count(),
    }  # fmt: skip
    print(
        f"a step takes {step:.3f} s and a save {save:+.3f} s: {save / (default * step):+.2%} of the time at one in {default} steps"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
