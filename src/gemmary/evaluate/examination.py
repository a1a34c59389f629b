"""Many benchmarks one after another, each beside what was published, and kept as it is done: a run that was killed goes on from there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager

from gemmary.checkpoints.checkpoint import read_json, write_whole
from gemmary.errors import GemmaryError
from gemmary.evaluate.code_eval import CodeEval, in_place_of_hub
from gemmary.evaluate.data_sets import Unavailable
from gemmary.evaluate.kept import Kept, model_digest
from gemmary.evaluate.lm_eval import GemmaryLM
from gemmary.evaluate.published import Card, card_of
from gemmary.evaluate.running import Settings, joint, known_tasks, run
from gemmary.evaluate.sandbox import Sandbox
from gemmary.evaluate.suites import Benchmark, named, suite

__all__ = [
    "GemmaryLM",
    "Settings",
    "Wanted",
    "begin",
    "card_of",
    "examine",
    "known_tasks",
    "sandboxed",
    "wanted",
]

Wanted = tuple[str, Benchmark]
"""A benchmark, and the suite that asks for it ("" where it was named)."""

_TASKS, _SETTINGS = "tasks", "settings.json"


def wanted(suites: Sequence[str], tasks: Sequence[str], known: Collection[str], card: Card | None) -> list[Wanted]:
    """Every benchmark of the suites, with the examples that the card's figure was published with, and every named one.

    Raises GemmaryError for an unknown suite or task.
    """
    found: list[Wanted] = []
    for name in suites:
        figures = card.suites.get(name, {}) if card else {}
        for one in suite(name):
            shots = figures[one.name].shots if one.name in figures else None
            found.append((name, one if shots is None else replace(one, shots=shots)))
    return found + [("", named(task.strip(), known)) for task in tasks]


def begin(out: Path, asked: Mapping[str, Any], *, resume: bool) -> None:
    """A folder for a run as it was asked for. Raises GemmaryError where there is another's, or one that was not to be gone on with."""
    settings = out / _SETTINGS
    if settings.is_file() and resume:
        before = read_json(settings)
        if changed := sorted(key for key in {*before, *asked} if before.get(key) != asked.get(key)):
            raise GemmaryError(
                f"{out} was begun with another {changed[0]} ({before.get(changed[0])!r}): ask for the same, or name a new folder"
            )
        return
    if out.exists() and any(out.iterdir()):
        what = "has no run to go on with" if resume else "exists: go on with it by --resume"
        raise GemmaryError(f"{out} {what}, or name a new folder")
    write_whole(settings, (json.dumps(asked, indent=1) + "\n").encode())


@contextmanager
def sandboxed(allow_unsandboxed: bool) -> Iterator[CodeEval | str]:
    """What runs generated code, in place of the hub's metric; or why there is nothing that does."""
    try:
        sandbox = Sandbox(allow_unsandboxed=allow_unsandboxed)
    except GemmaryError as error:
        yield str(error)
        return
    with in_place_of_hub(sandbox) as code:
        yield code


def examine(
    lm: GemmaryLM,
    tasks: TaskManager,
    some: Sequence[Wanted],
    settings: Settings,
    code: CodeEval | str,
    card: Card | None,
    out: Path | None,
    progress: Callable[[str], AbstractContextManager[Callable[[int, int], None]]],
) -> Iterator[dict[str, Any]]:
    """Yield a line for each benchmark: what `Run` says but for its records, and what was published; or `missing`, what is not there.

    In `out` every benchmark that is done is written down, and one that was is not done again.
    """
    digest = ""
    if out is not None:  # of every weight: seconds for a large model
        digest = model_digest(lm.gemma)
        lm.kept = Kept(out / "answers.sqlite", digest)
    for i, (suite_name, one) in enumerate(some):
        path = out / _TASKS / f"{_file_name(suite_name, one)}.json" if out is not None else None
        done = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else None
        if done is None or done.get("model") != digest:
            with progress(f"{i + 1}/{len(some)} {one.name}") as bar:
                lm.on_progress = bar
                try:
                    done = run(lm, tasks, one, settings, code).to_json()
                except Unavailable as error:
                    yield {"suite": suite_name, "benchmark": one.name, "task": one.task, "missing": str(error)}
                    continue
            if path is not None:
                write_whole(path, (json.dumps({"model": digest, **done}, default=str) + "\n").encode())
        line = {key: value for key, value in done.items() if key not in ("records", "model")}
        yield {"suite": suite_name, **line, **_beside(line, one, suite_name, card)}


def _beside(line: Mapping[str, Any], one: Benchmark, suite_name: str, card: Card | None) -> dict[str, Any]:
    """What was published of it, and whether the two agree within the 95 % interval of their difference."""
    figures = card.suites.get(suite_name, {}) if card else {}
    if not suite_name and card:  # named alone: as the card's suites have it
        figures = {name: figure for some in reversed(list(card.suites.values())) for name, figure in some.items()}
    if one.name not in figures:
        return {"published": None}
    figure = figures[one.name]
    same = figure.shots is None or figure.shots == line["shots"]
    difference, half = line["value"] - figure.value, joint(line["interval"], line["of"], figure)
    agrees = abs(difference) <= half if one.comparable and same else None
    return {
        "published": figure.value, "published_shots": figure.shots, "comparable": one.comparable and same,
        "difference": difference, "joint": half, "reproduced": agrees,
    }  # fmt: skip


def _file_name(suite_name: str, one: Benchmark) -> str:
    return re.sub(r"[^\w@.-]+", "_", f"{suite_name or one.task}-{one.name}@{'' if one.shots is None else one.shots}")
