"""One run in its folder, from its newest checkpoint to its end: what every stage that learns has in common.

checkpoints/     see `saving`
best/            where a run keeps its best: the parameters of that step, and `best.json` with the step and the value
metrics.jsonl    a line each `log_every` steps
goodput.json     where the run's time went, over all its sittings; see `goodput`
hang_N.txt       every thread's stack, where step N hung; see `watchdog`
traces/          of steps that were asked for; see `traces`
curve.png        training loss and held-out figures
whole/           of several processes: the parameters of the newest checkpoint, put together (see `Checkpoints.export`)
model            (or adapter) a link to the best parameters, or else to the newest checkpoint's
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from gemmary import processes
from gemmary.checkpoints.checkpoint import read_json
from gemmary.train.endurance import Endurance
from gemmary.train.journal import Journal
from gemmary.train.loop import Describe, Hook, LoopSettings, Report, Stream, fit, is_over
from gemmary.train.model_files import ModelFiles, write_parameters
from gemmary.train.saving import Checkpoints
from gemmary.train.step import Step, TrainState

__all__ = ["Ended", "Restorable", "Say", "keep_best", "run"]

Say = Callable[[str], None]


class Restorable(Stream, Protocol):
    """A stream that goes on from a place."""

    def restore(self, state: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Ended:
    """How a run ended: its last state, whether it is complete or was asked to stop, where its parameters are, its journal, and
    where its time went (see `Goodput.figures`).
    """

    state: TrainState
    complete: bool
    parameters: Path
    entries: list[dict[str, Any]]
    goodput: dict[str, float]

    @property
    def last(self) -> dict[str, Any]:
        """The last journal entry, without its step and what it says of the run's time."""
        entry = self.entries[-1] if self.entries else {}
        return {k: v for k, v in entry.items() if k not in ("step", "goodput", "slow_steps")}


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

    Of several processes, all call it alike; the first has the word, and what hooks find is what it finds. `before` is asked for a first entry, of step 0. Raises GemmaryError where the folder's run was begun with something else
    (`identity`), and as `fit` does.
    """
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    if not processes.is_first():
        report, say = _unheard, _unheard
    watch = Endurance(folder, settings.watch, run=_digest(identity), say=say)
    checkpoints = Checkpoints(folder / "checkpoints", files, identity, keep=settings.keep, say=say)
    restored = checkpoints.restore(state)
    processes.from_first("best", lambda: _tidy(folder / "best", anew=restored is None))
    if restored is not None:
        for line in restored.damaged:
            say(f"passed over a checkpoint: {line}")
        batches.restore(restored.data)
        state = restored.state
        say(f"going on from {restored.path.name}")
    journal = Journal(folder, tensorboard=settings.tensorboard, say=say, kept=processes.is_first())
    done = int(state.step)
    journal.go_on_from(done if restored else -1)
    try:
        with nullcontext() if is_over(done, settings, journal) else watch.sitting(done):
            if before is not None and restored is None:
                with watch.at("evaluation"):
                    journal.write({"step": 0, **_told(before, state)})
            with processes.last_words(lambda: _way_out(checkpoints.newest())):
                state, complete = fit(
                    program(state), state, batches, settings, journal=journal, checkpoints=checkpoints, watch=watch,
                    describe=describe, hooks=[Hook(one.every, partial(_told, one.run)) for one in hooks], report=report,
                )  # fmt: skip
    finally:
        batches.close()
        journal.close()

    def pointed() -> str:
        best = _best(folder)
        parameters = best / files.name if best else checkpoints.export(state.params)
        _point(folder / files.name, parameters)
        return parameters.relative_to(folder).as_posix()

    parameters = folder / processes.from_first("ended", pointed)
    return Ended(state, complete, parameters, journal.entries, watch.figures())


def keep_best(hook: Hook, folder: Path, files: ModelFiles, value: Callable[[dict[str, Any]], float]) -> Hook:
    """The hook, which also keeps in `folder` the parameters for which `value` of what it finds is the least.

    After a kill the best may be of a step yet to come again: the same step then finds the same value, and is kept as it is.
    """

    def run(state: TrainState) -> dict[str, Any]:
        found, step = _told(hook.run, state), int(state.step)
        new = value(found)
        if processes.from_first("better", lambda: _is_better(new, _best(folder))):
            name = folder / "best" / f"step_{step:08d}"
            about = json.dumps({"step": step, "value": new}) + "\n"
            write_parameters(name, files, state.params, {"best.json": about})
            if processes.is_first():
                for other in _bests(folder):
                    if other != name:
                        shutil.rmtree(other, ignore_errors=True)
        return found

    return Hook(hook.every, run)


def _told(find: Callable[[TrainState], dict[str, Any]], state: TrainState) -> dict[str, Any]:
    """What the first process finds; the others take part in finding it."""
    found: dict[str, Any] = processes.agreed("found", lambda: find(state))[0]
    return found


def _tidy(best: Path, *, anew: bool) -> None:
    """Nothing is left of a run that was killed half-way, nor, where it begins anew, of the one before."""
    if anew:
        shutil.rmtree(best, ignore_errors=True)
    for left in best.glob(".step_*.partial"):
        shutil.rmtree(left, ignore_errors=True)


def _way_out(newest: Path | None) -> str:
    return f"start all of them again, and the run goes on from {newest.name if newest else 'its beginning'}"


def _unheard(what: Any) -> None:
    """Of several processes one speaks."""


def _digest(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _bests(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "best").glob("step_*") if (path / "best.json").is_file())


def _best(folder: Path) -> Path | None:
    """Two are there where a run was killed between writing one and removing the other."""
    return min(_bests(folder), key=lambda path: float(read_json(path / "best.json")["value"]), default=None)


def _is_better(new: float, best: Path | None) -> bool:
    return math.isfinite(new) and (best is None or new < read_json(best / "best.json")["value"])


def _point(link: Path, target: Path) -> None:
    """A link to the parameters, which never is not there while it is changed."""
    aside = link.with_name(f".{link.name}")
    aside.unlink(missing_ok=True)
    aside.symlink_to(target.relative_to(link.parent))
    aside.replace(link)
