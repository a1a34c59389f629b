"""The verb `gemmary evaluate`: suites and tasks, a table beside the published figures, and what is kept of a run.

OUT/settings.json          what was asked: a run is only gone on with as it was begun
OUT/answers.sqlite         what the model said, so that nothing is asked twice
OUT/tasks/NAME.json        one benchmark: its figure, and a record of every question
OUT/evaluation.json        all figures, without records; and evaluation.svg, the chart
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from gemmary.checkpoints.checkpoint import write_whole
from gemmary.errors import GemmaryError
from gemmary.evaluate.data_sets import quiet
from gemmary.evaluation_results import chart, summary, table
from gemmary.gemma import Gemma

__all__ = ["add_evaluate"]

_TABLE_WIDTH = 130  # so that intervals stay whole where output is piped

Progress = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]

Suites = Annotated[list[str] | None, typer.Option(help="gemma, leaderboard or safety; may be repeated.")]
Tasks = Annotated[str | None, typer.Option(metavar="TASK,…", help="lm-eval's tasks, each as TASK or TASK@SHOTS.")]
Data = Annotated[Path | None, typer.Option(help="A folder that mirrors the hub's data sets: <org>/<name> below it.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Questions of each task at most: the first ones.")]
Spread = Annotated[bool, typer.Option("--spread", help="With --limit, questions evenly from the whole task.")]
Out = Annotated[Path | None, typer.Option(help="A folder for the results and the model's answers.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")]
Chat = Annotated[bool, typer.Option("--chat", help="Ask in turns, as an instruction-tuned model is.")]
Samples = Annotated[int, typer.Option(min=1, help="Answers to each question: pass@k of code, maj@k of GSM8K.")]
Temperature = Annotated[float, typer.Option(help="At which several answers are drawn.")]
Published = Annotated[str | None, typer.Option(help="Whose published figures stand beside; else those of its shape.")]
Unsandboxed = Annotated[bool, typer.Option("--allow-unsandboxed", help="Run generated code without bubblewrap.")]


def add_evaluate(app: typer.Typer, load: Callable[..., Gemma], progress: Progress) -> None:
    """Register the verb. `load` opens a model, `progress` shows a bar with a title."""

    @app.command("evaluate")
    def evaluate_(
        model: Annotated[str, typer.Argument(help="A directory, a file, 'sample', or with --hub a hub id.")],
        suite: Suites = None,
        tasks: Tasks = None,
        data_dir: Data = None,
        limit: Limit = None,
        spread: Spread = False,
        out: Out = None,
        resume: Resume = False,
        chat: Chat = False,
        samples: Samples = 1,
        temperature: Temperature = 0.8,
        published: Published = None,
        allow_unsandboxed: Unsandboxed = False,
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
        dtype: Annotated[
            str | None, typer.Option(help="float32 or bfloat16; by default what suits the device.")
        ] = None,
        hub: Annotated[bool, typer.Option("--hub", help="Allow fetching MODEL and data from the hub.")] = False,
    ) -> None:
        """Judge a model on the report's tasks, or any of lm-eval's, beside what was published."""
        if resume and out is None:
            raise GemmaryError("--resume goes on with a run in a folder: name it with --out")
        if data_dir is not None and not data_dir.is_dir():
            raise GemmaryError(f"{data_dir} is not a folder: give one with data sets as <org>/<name> below it")
        suites, named = suite or ([] if tasks else ["gemma"]), tasks.split(",") if tasks else []
        asked: dict[str, Any] = {
            "model": model, "suites": suites, "tasks": named, "data_dir": str(data_dir) if data_dir else None,
            "limit": limit, "spread": spread, "chat": chat, "samples": samples, "temperature": temperature, "dtype": dtype,
        }  # fmt: skip
        with quiet(network=hub):
            e = _examination()
            known = e.known_tasks()
            e.wanted(suites, named, known.all_tasks, None)  # a wrong name need not wait for the weights
            gemma = load(model, dtype, hub)
            card = e.card_of(gemma.config, tuned=chat, name=published)
            some = e.wanted(suites, named, known.all_tasks, card)
            if out is not None:
                e.begin(out, asked, resume=resume)
            settings = e.Settings(data_dir, _cache(), limit, chat, samples, temperature, spread)
            lines: list[dict[str, Any]] = []
            with e.sandboxed(allow_unsandboxed) as code:
                for line in e.examine(e.GemmaryLM(gemma), known, some, settings, code, card, out, progress):
                    lines.append(line)
                    if out is not None:
                        _write(out, summary(model, card, lines))
        found = summary(model, card, lines)
        if all("missing" in line for line in lines):
            raise GemmaryError("; ".join(f"{line['task']}: {line['missing']}" for line in lines))
        if as_json:
            print(json.dumps(found))
        else:
            shown = Console()
            shown.width = max(shown.width, _TABLE_WIDTH)
            shown.print(table(found))


def _examination() -> Any:
    try:
        from gemmary.evaluate import examination
    except ImportError as error:
        raise GemmaryError(f"this needs an extra ({error}): pip install 'gemmary[data,evaluate]'") from None
    return examination


def _write(out: Path, found: dict[str, Any]) -> None:
    write_whole(out / "evaluation.json", (json.dumps(found, indent=1) + "\n").encode())
    if any("value" in line for line in found["benchmarks"]):
        write_whole(out / "evaluation.svg", chart(found).encode())


def _cache() -> Path:
    """Where data sets are kept in the form that they are read in."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "gemmary" / "data_sets"
