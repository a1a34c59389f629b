"""The verbs that take a recipe: all of a life, or one of its stages with what that builds on; by one process or by several.

What only training needs is imported when such a verb runs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gemmary import processes
from gemmary.evaluate.data_sets import quiet as hushed

__all__ = ["add_lives"]

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML file, such as runs/nano.toml.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; may be repeated.")
]
Out = Annotated[Path | None, typer.Option(help="The run's folder; by default out/ and the recipe's name.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Say nothing of progress.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Coordinator = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="Of several processes: an address of process 0's machine.")
]
ProcessId = Annotated[int | None, typer.Option(help="Which of the processes this one is, from 0.")]
Processes = Annotated[int | None, typer.Option("--processes", help="How many processes there are.")]
Distributed = Annotated[
    bool, typer.Option("--distributed", help="Let JAX find the cluster: a TPU pod, Slurm, a GPU cluster.")
]
LostAfter = Annotated[int, typer.Option(help="Seconds without a sign of life, and a process is lost.")]

_VERBS = {
    "run": "Live a recipe from its first stage to its last; what is unchanged is not done again.",
    "curate": "Make documents of a recipe's sources: filtered, masked, deduplicated, decontaminated.",
    "tokenizer": "Train a recipe's vocabulary on its curated documents.",
    "pretrain": "Pre-train a recipe's model, or go on where it was stopped.",
    "ablate": "Train small models on a recipe's candidate mixtures and rank them.",
    "sft": "Fine-tune a recipe's model on its conversations, whole or by adapters.",
    "reward": "Train a recipe's reward model on its preferences.",
    "rlhf": "Have a recipe's model learn from rewards for its own answers.",
    "dpo": "Have a recipe's model learn from its preferences, without a reward model.",
}
_LEARNS = ("run", "pretrain", "ablate", "sft", "reward", "rlhf", "dpo")


def add_lives(app: typer.Typer, console: Console, keep_compiled: Callable[[], None]) -> None:
    """Register the verbs; those that learn may be of several processes. `console` shows progress."""
    for verb, what in _VERBS.items():
        app.command(verb, help=what)(_verb(verb, console, keep_compiled))


def _verb(verb: str, console: Console, keep_compiled: Callable[[], None]) -> Callable[..., None]:
    def alone(
        recipe: RecipeFile, sets: Sets = None, out: Out = None, as_json: Json = False, quiet: Quiet = False
    ) -> None:
        keep_compiled()
        _live(verb, recipe, sets, out, as_json, quiet, console)

    def together(
        recipe: RecipeFile,
        sets: Sets = None,
        out: Out = None,
        as_json: Json = False,
        quiet: Quiet = False,
        coordinator: Coordinator = None,
        process_id: ProcessId = None,
        processes_: Processes = None,
        distributed: Distributed = False,
        lost_after: LostAfter = 60,
    ) -> None:
        with processes.joined(coordinator, process_id, processes_, detect=distributed, lost_after=lost_after):
            alone(recipe, sets, out, as_json, quiet)

    return together if verb in _LEARNS else alone


def _live(
    verb: str, recipe: Path, sets: list[str] | None, out: Path | None, as_json: bool, quiet: bool, console: Console
) -> None:
    """A verb that takes a recipe. Of several processes the first speaks."""
    first = processes.is_first()
    with hushed(network=True):
        from gemmary.recipe import load_recipe
        from gemmary.report import report
        from gemmary.watch import Watch, summary
        from gemmary.whole import STAGES, Whole

        settings = load_recipe(recipe, sets or [])
        folder = out or Path("out") / recipe.stem
        with Watch(console, quiet=quiet or not first) as watch:
            life = Whole(settings, folder, say=watch.say, progress=watch.progress, report=watch.report)
            if verb in _LEARNS:
                life.ready()
            record = life.whole() if verb == "run" else STAGES[verb](life)
    if not first:
        return
    life.sign(["gemmary", *sys.argv[1:]], recipe)
    if verb == "run":
        report(folder)
    if as_json:
        print(json.dumps(record))
    else:
        Console().print(summary(verb, record, folder))
