"""The loop: batches go in, steps are taken, and what people and the next run need is written down on the way.

A run can end in five ways: all steps done; a hook that says why to stop; asked to stop (SIGTERM, Ctrl-C), which saves first; a
loss that is no number or leaps, which names the last good checkpoint; or killed, after which it goes on from the newest checkpoint
to the same bits.
"""

from __future__ import annotations

import math
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import numpy as np

from gemmary.errors import GemmaryError
from gemmary.stopping import Stopping
from gemmary.train.endurance import Endurance, Watched
from gemmary.train.journal import Journal
from gemmary.train.saving import Checkpoints
from gemmary.train.step import Step, TrainState

__all__ = ["Hook", "LoopSettings", "Report", "Stream", "fit", "is_over"]


class Stream(Protocol):
    """Batches with a place that can be written down and gone back to."""

    def __next__(self) -> Any: ...
    def state(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Hook:
    """Something done every so many steps and after the last: what it returns is written into the journal.

    Where that has a `stop`, the reason of it, the run is saved and complete.
    """

    every: int
    run: Callable[[TrainState], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """How a run keeps itself. Steps between things; 0 is never."""

    steps: int
    log_every: int = 10
    save_every: int = 200
    keep: int = 2
    """Checkpoints."""
    spike: float = 3.0
    """Stop where the loss is so many nats above the median of the last 50 steps'."""
    tensorboard: bool = False
    watch: Watched = field(default_factory=Watched)
    """Of what is not in a step: see `endurance`."""


_RECENT = 50

Describe = Callable[[dict[str, float], float, int], dict[str, Any]]
Report = Callable[[dict[str, Any]], None]


def fit(
    step: Step,
    state: TrainState,
    batches: Stream,
    settings: LoopSettings,
    *,
    journal: Journal,
    checkpoints: Checkpoints,
    watch: Endurance,
    describe: Describe,
    hooks: Sequence[Hook] = (),
    report: Report = lambda entry: None,
) -> tuple[TrainState, bool]:
    """Take the steps that are left; returns the last state, and whether the run is complete or was asked to stop.

    `describe` makes a journal entry of the means over the last steps, the seconds that one took, and the steps done. `report` shows it.
    Raises GemmaryError where the loss is no number or leaps, and where the last save failed.
    """
    done = int(state.step)
    recent: deque[float] = deque(maxlen=_RECENT)
    since: list[dict[str, jax.Array]] = []
    saved = done if checkpoints.newest() else -1
    with _asked_to_stop() as asked, _nothing_half_written(checkpoints):
        started = time.perf_counter()
        stopped = is_over(done, settings, journal)
        while not stopped and not asked.due(done):
            state, means = watch.taken(step, state, watch.fetched(batches))
            done += 1
            since.append(means)
            last = done == settings.steps
            due = [hook for hook in hooks if last or (hook.every and done % hook.every == 0)]
            saves = last or asked.due(done) or (settings.save_every and done % settings.save_every == 0)
            if saves or due or done % settings.log_every == 0:
                _check(since, recent, done, settings.spike, checkpoints)
                seconds = (time.perf_counter() - started) / len(since)
                entry = {"step": done, **describe(_means(since), seconds, done)}
                with watch.at("evaluation"):
                    for hook in due:
                        entry |= hook.run(state)
                    journal.write(entry | watch.entry())
                    report(journal.entries[-1])
                stopped = last or "stop" in entry
                since = []
                if saves or stopped:
                    _save(state, batches, checkpoints, watch)
                    saved = done
                started = time.perf_counter()
        if done != saved:  # asked between two saves, or before the first step: the place to go on from is this one
            _check(since, recent, done, settings.spike, checkpoints)
            _save(state, batches, checkpoints, watch)
        with watch.at("saving"):
            checkpoints.finish()
    return state, stopped


def is_over(done: int, settings: LoopSettings, journal: Journal) -> bool:
    """Are all steps done, or did a hook say why to stop?"""
    return done >= settings.steps or (bool(journal.entries) and "stop" in journal.entries[-1])


def _save(state: TrainState, batches: Stream, checkpoints: Checkpoints, watch: Endurance) -> None:
    with watch.at("saving"):
        checkpoints.save(state, batches.state())
    watch.saved(int(state.step))


def _means(since: list[dict[str, jax.Array]]) -> dict[str, float]:
    return {name: float(np.mean([float(means[name]) for means in since])) for name in since[0]}


def _check(
    since: list[dict[str, jax.Array]], recent: deque[float], done: int, spike: float, checkpoints: Checkpoints
) -> None:
    """Every loss since the last look is a number, and none leaps."""
    for number, means in enumerate(since, done - len(since) + 1):
        loss, length = float(means["loss"]), float(means["gradient_norm"])
        usual = statistics.median(recent) if len(recent) == _RECENT else math.inf
        if math.isfinite(loss) and math.isfinite(length) and loss <= usual + spike:
            recent.append(loss)
            continue
        checkpoints.wait()
        newest = checkpoints.newest()
        where = f"the last good checkpoint is {newest}" if newest else "no checkpoint was written yet"
        leapt = math.isfinite(loss) and loss > usual + spike
        what = f"leapt to {loss:.2f} from {usual:.2f}" if leapt else f"is {loss:.2f}"
        if not math.isfinite(length):
            what += f" with a gradient of length {length}"
        raise GemmaryError(
            f"stopped at step {number}: the loss {what}; {where}. "
            "A lower learning rate, a longer warm-up or other data from there on may carry it over"
        )


@contextmanager
def _nothing_half_written(checkpoints: Checkpoints) -> Iterator[None]:
    """Whatever ends it, a save that was begun is done: threads that an ending interpreter leaves can start none of Orbax's."""
    try:
        yield
    finally:
        checkpoints.wait()


@contextmanager
def _asked_to_stop() -> Iterator[Stopping]:
    """By SIGTERM and Ctrl-C while it lasts; a second Ctrl-C is obeyed at once."""
    asked = Stopping()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def on_signal(number: int, _: Any) -> None:
        if asked.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.ask()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
        asked.close()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
