"""One run in its folder, from its newest checkpoint to its end: what every stage that learns has in common.

checkpoints/     see `saving`
best/            where a run keeps its best: the parameters of that step, and `best.json` with the step and the value
metrics.jsonl    a line each `log_every` steps
curve.png        training loss and held-out figures
model            (or adapter) a link to the best parameters, or else to the newest checkpoint's
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from gemmary.checkpoints.checkpoint import read_json, staged
from gemmary.train.journal import Journal
from gemmary.train.loop import Describe, Hook, LoopSettings, Report, Stream, fit
from gemmary.train.saving import Checkpoints, ModelFiles
from gemmary.train.step import Step, TrainState

__all__ = ["Ended", "Restorable", "Say", "keep_best", "run"]

Say = Callable[[str], None]


class Restorable(Stream, Protocol):
    """A stream that goes on from a place."""

    def restore(self, state: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Ended:
    """How a run ended: its last state, whether it is complete or was asked to stop, where its parameters are, and its journal."""

    state: TrainState
    complete: bool
    parameters: Path
    entries: list[dict[str, Any]]

    @property
    def last(self) -> dict[str, Any]:
        """The last journal entry, without its step."""
        return {k: v for k, v in self.entries[-1].items() if k != "step"} if self.entries else {}


def run(
    folder: Path,
    state: TrainState,
    batches: Restorable,
    program: Callable[[TrainState], Step],
    *,
    files: ModelFiles,
    identity: Mapping[str, Any],
    settings: LoopSettings,
    describe: Describe,
    before: Callable[[TrainState], dict[str, Any]] | None = None,
    hooks: Sequence[Hook] = (),
    report: Report = lambda entry: None,
    say: Say = lambda line: None,
) -> Ended:
    """Begin, or go on from the newest checkpoint that verifies. `program` compiles the step for the state to begin with.

    `before` is asked for a first entry, of step 0. Raises GemmaryError where the folder's run was begun with something else
    (`identity`), and as `fit` does.
    """
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(folder / "checkpoints", files, identity, keep=settings.keep, say=say)
    restored = checkpoints.restore(state)
    if restored is None:
        shutil.rmtree(folder / "best", ignore_errors=True)
    else:
        for left in (folder / "best").glob(".step_*.partial"):  # of a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        for line in restored.damaged:
            say(f"passed over a checkpoint: {line}")
        batches.restore(restored.data)
        state = restored.state
        say(f"going on from {restored.path.name}")
    journal = Journal(folder, tensorboard=settings.tensorboard, say=say)
    journal.go_on_from(int(state.step) if restored else -1)
    try:
        if before is not None and restored is None:
            journal.write({"step": 0, **before(state)})
        state, complete = fit(
            program(state), state, batches, settings, journal=journal, checkpoints=checkpoints, describe=describe,
            hooks=hooks, report=report,
        )  # fmt: skip
    finally:
        batches.close()
        journal.close()
    newest = checkpoints.newest()
    assert newest is not None
    parameters = (_best(folder) or newest) / files.name
    _point(folder / files.name, parameters)
    return Ended(state, complete, parameters, journal.entries)


def keep_best(hook: Hook, folder: Path, files: ModelFiles, value: Callable[[dict[str, Any]], float]) -> Hook:
    """The hook, which also keeps in `folder` the parameters for which `value` of what it finds is the least.

    After a kill the best may be of a step yet to come again: the same step then finds the same value, and is kept as it is.
    """

    def run(state: TrainState) -> dict[str, Any]:
        found, step = hook.run(state), int(state.step)
        new, old = value(found), _best(folder)
        if math.isfinite(new) and (old is None or new < read_json(old / "best.json")["value"]):
            name = folder / "best" / f"step_{step:08d}"
            shutil.rmtree(name, ignore_errors=True)
            with staged(name, 0) as stage:
                files.write(stage / files.name, state.params)
                (stage / "best.json").write_text(json.dumps({"step": step, "value": new}) + "\n", encoding="utf-8")
            for other in _bests(folder):
                if other != name:
                    shutil.rmtree(other, ignore_errors=True)
        return found

    return Hook(hook.every, run)


def _bests(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "best").glob("step_*") if (path / "best.json").is_file())


def _best(folder: Path) -> Path | None:
    """Two are there where a run was killed between writing one and removing the other."""
    return min(_bests(folder), key=lambda path: float(read_json(path / "best.json")["value"]), default=None)


def _point(link: Path, target: Path) -> None:
    """A link to the parameters, which never is not there while it is changed."""
    aside = link.with_name(f".{link.name}")
    aside.unlink(missing_ok=True)
    aside.symlink_to(target.relative_to(link.parent))
    aside.replace(link)
