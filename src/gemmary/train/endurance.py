"""What keeps watch over a long run: where its time goes, whether it hangs, which steps are slow, and traces when asked for.

The loop says what it is at; `goodput`, `pace`, `watchdog` and `traces` do the rest, in threads that wait nearly all of the time.
Nothing of it changes what a run comes to.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from gemmary.errors import GemmaryError, check_bounds
from gemmary.train.goodput import Goodput
from gemmary.train.pace import Pace, Taken
from gemmary.train.step import Step, TrainState
from gemmary.train.traces import Traces
from gemmary.train.watchdog import Place, Watchdog

__all__ = ["Endurance", "Watched"]

_COMPILED = "/jax/core/compile/backend_compile_duration"
_LOOK, _WRITE = 1.0, 5  # seconds between looks for a file that asks for a trace; looks between writings of goodput


@dataclass(frozen=True, kw_only=True)
class Watched:
    """How a long run is watched."""

    hang_seconds: float | None = None
    """Without the end of a step, and it hangs; None: 20 times the usual step, at least 300. 0: nobody looks."""
    hang_exits: bool = False
    """A process that hangs ends with exit code 75, so that what manages it starts it again."""
    profile_at: tuple[int, ...] = ()
    """Steps from which five are traced."""

    def __post_init__(self) -> None:
        check_bounds(self, "watch.", **({} if self.hang_seconds is None else {"hang_seconds": (0, None)}))
        if self.profile_at and min(self.profile_at) < 1:
            raise GemmaryError(f"watch.profile_at has {min(self.profile_at)}: the first step is 1")


class Endurance:
    """The watch over one run in its folder. Outside of `sitting` it keeps no account and lets the loop's calls through.

    `run` names what is run (see `Goodput`). Of many processes the first keeps the account.
    """

    def __init__(self, folder: Path, settings: Watched, *, run: str | None = None, say: Callable[[str], None]) -> None:
        self._folder, self._settings, self._say = folder, settings, say
        self._goodput = Goodput(folder / "goodput.json" if jax.process_index() == 0 else None, run)
        self._traces = Traces(folder, settings.profile_at, say)
        self._pace: Pace | None = None
        self._begun = self._done = self._turn = 0
        self._asked = self._compiling = 0.0

    @contextmanager
    def sitting(self, done: int) -> Iterator[None]:
        """From the start, `done` steps being done before, to the end of the loop, however it ends."""
        self._begun = self._done = done
        self._goodput.begin(done)
        with ExitStack() as stack:
            stack.callback(self._goodput.end)
            self._pace = pace = Pace(lambda seconds: self._goodput.move(seconds, "data", "steps"))
            stack.callback(self._close, pace)
            if self._settings.hang_seconds != 0:
                stack.callback(self._watchdog().close)
            stack.enter_context(self._kept())
            stack.enter_context(self._compiling_heard())
            stack.enter_context(_on_signal(self._traces.ask))
            stack.callback(lambda: self._traces.close(self._done))
            yield

    @contextmanager
    def at(self, cause: str) -> Iterator[None]:
        """The loop is at this (see `goodput`) while it lasts."""
        before = self._goodput.at
        self._enter(cause)
        try:
            yield
        finally:
            self._enter(before)

    def fetched(self, batches: Any) -> Any:
        """The next batch; from the first one on, the loop is at its steps."""
        self._asked = time.monotonic()
        self._enter("data")
        batch = next(batches)
        self._enter("steps")
        return batch

    def taken(self, step: Step, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        """What the step gives, which is on its way."""
        if self._pace is None:
            return step(state, batch)
        number, there, compiled = self._done + 1, time.monotonic(), self._compiling
        self._traces.before(number)
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            state, means = step(state, batch)
        self._done = number
        self._pace.sent(Taken(number, self._asked, there, self._compiling - compiled, means["loss"]))
        if self._traces.complete(number):
            jax.block_until_ready(means["loss"])
            with self.at("evaluation"):
                self._traces.close(number)
        return state, means

    def saved(self, step: int) -> None:
        """A checkpoint of this step is on its way to disk."""
        if self._pace is not None:
            self._goodput.mark(step)

    def entry(self) -> dict[str, Any]:
        """For the journal, when the device has no work left: `goodput`, and `slow_steps` where there were some."""
        if self._pace is None:
            return {}
        slow = self._pace.slow()
        return {"goodput": self.figures()} | ({"slow_steps": slow} if slow else {})

    def figures(self) -> dict[str, float]:
        """See `Goodput.figures`."""
        return self._goodput.figures()

    def _enter(self, cause: str | None) -> None:
        if self._pace is None or cause is None:
            return
        if not {cause, self._goodput.at} <= {"data", "steps"}:
            self._turn += 1
        self._goodput.enter(cause)

    def _close(self, pace: Pace) -> None:
        self._pace = None
        pace.close()

    def _place(self) -> Place | None:
        at, pace = self._goodput.at, self._pace
        if at is None or pace is None:
            return None
        if at == "data" and pace.busy():  # nobody waits for a batch while the device has work
            at = "steps"
        step = self._begun + pace.ended + 1 if at in ("data", "steps") else self._done
        return Place(at, step, (self._turn, pace.ended), pace.median())

    def _watchdog(self) -> Watchdog:
        return Watchdog(
            self._place, self._folder, seconds=self._settings.hang_seconds, exits=self._settings.hang_exits, say=self._say,
            process=jax.process_index(), processes=jax.process_count(),
        )  # fmt: skip

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """Goodput is written down now and then, and a file that asks for a trace is looked for."""
        over = threading.Event()
        first = jax.process_index() == 0

        def keep() -> None:
            looks = 0
            while not over.wait(_LOOK):
                looks += 1
                if first:
                    self._traces.look()
                if looks % _WRITE == 0:
                    self._goodput.write()

        thread = threading.Thread(target=keep, name="endurance", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(1.0)

    @contextmanager
    def _compiling_heard(self) -> Iterator[None]:
        """Whatever the loop's thread compiles at any time counts as start."""
        loop = threading.get_ident()

        def hear(event: str, duration_secs: float, **_: Any) -> None:
            at = self._goodput.at
            if event == _COMPILED and at is not None and threading.get_ident() == loop:
                self._compiling += duration_secs
                self._goodput.move(duration_secs, at, "start")

        jax.monitoring.register_event_duration_secs_listener(hear)
        try:
            yield
        finally:
            jax.monitoring.unregister_event_duration_listener(hear)


@contextmanager
def _on_signal(ask: Callable[[], None]) -> Iterator[None]:
    """SIGUSR1 asks, where there is one and this is the main thread."""
    if not hasattr(signal, "SIGUSR1") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGUSR1, lambda number, frame: ask())
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)
