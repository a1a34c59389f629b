"""The loop: how a run stops, what it leaves, and that it goes on to the same end."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from test_saving import make, make_state, names
from training_runs import came_to, make_inputs, run

from gemmary.errors import GemmaryError
from gemmary.train import pretrain as pretrain_module
from gemmary.train.endurance import Endurance
from gemmary.train.journal import Journal
from gemmary.train.loop import Hook, LoopSettings, fit
from gemmary.train.step import TrainState


class Numbers:
    """Batch i is the number i. `at` is told of each."""

    def __init__(self, place: int, at: Callable[[int], None]) -> None:
        self._next, self._at = place, at

    def __next__(self) -> int:
        self._at(self._next)
        self._next += 1
        return self._next - 1

    def state(self) -> dict[str, Any]:
        return {"next": self._next}


def lived(
    folder: Path, *, at: Any = lambda step: None, loss: Any = lambda step: 2.0, norm: float = 1.0, **options: Any
) -> tuple[bool, list[str]]:
    """A run whose losses are given, gone on with from the newest checkpoint: is it complete, and what was said."""
    said: list[str] = []
    checkpoints = make(folder, say=said.append)
    restored = checkpoints.restore(make_state(0))
    state, place = (restored.state, restored.data["next"]) if restored else (make_state(0), 0)
    assert place == int(state.step)
    journal = Journal(folder, say=said.append)
    journal.go_on_from(place)

    def step(state: TrainState, batch: int) -> tuple[TrainState, dict[str, Any]]:
        means = {"loss": jnp.float32(loss(batch + 1)), "gradient_norm": jnp.float32(norm)}
        return replace(state, step=state.step + 1), means

    call = {name: options.pop(name) for name in ("hooks", "report") if name in options}
    settings = LoopSettings(**{"steps": 20, "save_every": 6, "log_every": 5, **options})
    ended, complete = fit(
        step, state, Numbers(place, at), settings, journal=journal, checkpoints=checkpoints,
        watch=Endurance(folder, settings.watch, say=said.append), describe=lambda means, seconds, done: {"loss": means["loss"]},
        **call,
    )  # fmt: skip
    assert complete == (int(ended.step) == settings.steps)
    return complete, said


def steps_written(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def newest(folder: Path) -> str:
    return max(name for name in names(folder) if name.startswith("step_"))


def sends(number: signal.Signals, where: int) -> Callable[[int], None]:
    return lambda step: os.kill(os.getpid(), number) if step == where else None


def test_a_run_logs_and_saves(tmp_path: Path) -> None:
    complete, said = lived(tmp_path)
    assert complete
    assert said == []
    assert steps_written(tmp_path) == [5, 6, 10, 12, 15, 18, 20]
    assert newest(tmp_path) == "step_00000020"
    assert lived(tmp_path, at=lambda step: pytest.fail("there is nothing left to do"))[0]


def test_hooks_run_in_time_and_at_the_end(tmp_path: Path) -> None:
    seen: dict[str, list[int]] = {"often": [], "last": []}
    hooks = [Hook(10, lambda s: {"often": seen["often"].append(int(s.step))}),
             Hook(0, lambda s: {"last": seen["last"].append(int(s.step))})]  # fmt: skip
    lived(tmp_path, hooks=hooks)
    assert seen == {"often": [10, 20], "last": [20]}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("where", [0, 6, 9, 12])
def test_asked_to_stop_it_saves_that_very_step(tmp_path: Path, number: signal.Signals, where: int) -> None:
    before = signal.getsignal(number)
    complete, said = lived(tmp_path, at=sends(number, where))
    assert not complete
    assert said == []
    assert signal.getsignal(number) is before
    assert newest(tmp_path) == f"step_{where + 1:08d}"  # the step whose batch was being taken is taken
    assert lived(tmp_path)[0]
    assert steps_written(tmp_path) == sorted({5, 6, 10, 12, 15, 18, 20, where + 1})


@pytest.mark.parametrize("where", [5, 6])
def test_asked_while_it_reports(tmp_path: Path, where: int) -> None:
    """Behind the last look at whether it was asked: after step 5, which is not saved otherwise, and after 6, which is."""
    complete, _ = lived(tmp_path, report=lambda entry: sends(signal.SIGTERM, where)(entry["step"]))
    assert not complete
    assert newest(tmp_path) == f"step_{where:08d}"
    assert lived(tmp_path)[0]
    assert steps_written(tmp_path) == [5, 6, 10, 12, 15, 18, 20]


def test_a_second_interrupt_is_obeyed_at_once(tmp_path: Path) -> None:
    def twice(step: int) -> None:
        if step == 8:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        lived(tmp_path, at=twice)
    assert newest(tmp_path) == "step_00000006"
    assert lived(tmp_path)[0]


def test_what_breaks_a_run_leaves_no_save_half_written(tmp_path: Path) -> None:
    def breaks(step: int) -> None:
        if step == 6:  # the first batch after a save was begun
            raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        lived(tmp_path, at=breaks)
    assert not [one for one in threading.enumerate() if one.name == "checkpoint"]
    assert newest(tmp_path) == "step_00000006"


def test_it_runs_in_a_thread_of_somebody(tmp_path: Path) -> None:
    ended: list[bool] = []
    thread = threading.Thread(target=lambda: ended.append(lived(tmp_path)[0]))
    thread.start()
    thread.join()
    assert ended == [True]


@pytest.mark.parametrize(
    ("loss", "norm", "said"),
    [
        (lambda step: math.nan if step == 9 else 2.0, 1.0, "stopped at step 9: the loss is nan; the last good checkpoint is .*06"),
        (lambda step: math.inf if step == 6 else 2.0, 1.0, "stopped at step 6: the loss is inf; no checkpoint"),
        (lambda step: 2.0, math.inf, "stopped at step 1: the loss is 2.00 with a gradient of length inf; no checkpoint"),
    ],
)  # fmt: skip
def test_a_loss_that_is_no_number_is_never_saved(tmp_path: Path, loss: Any, norm: float, said: str) -> None:
    with pytest.raises(GemmaryError, match=said):
        lived(tmp_path, loss=loss, norm=norm)
    assert [name for name in names(tmp_path) if name > "step_00000006"] == []


@pytest.mark.parametrize(("height", "stops"), [(4.9, False), (5.1, True)])
def test_a_leap_stops_it(tmp_path: Path, height: float, stops: bool) -> None:
    """Three nats above the median of fifty steps, no sooner."""
    options: dict[str, Any] = {"steps": 60, "log_every": 7, "save_every": 0, "spike": 3.0}

    def loss(step: int) -> float:
        return height if step == 52 else 20.0 if step == 3 else 2.0

    if stops:
        with pytest.raises(
            GemmaryError, match=r"stopped at step 52: the loss leapt to 5\.10 from 2\.00; no checkpoint"
        ):
            lived(tmp_path, loss=loss, **options)
    else:
        assert lived(tmp_path, loss=loss, **options)[0]


def test_a_full_disk_stops_no_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that could not be written are written when there is room again, in order and once."""
    full: list[int] = []
    opened, replaced = Path.open, Path.replace

    def refuses(real: Any) -> Any:
        def call(self: Path, *arguments: Any, **more: Any) -> Any:
            if full and self.name in ("metrics.jsonl", ".metrics.jsonl"):
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(self, *arguments, **more)

        return call

    monkeypatch.setattr(Path, "open", refuses(opened))
    monkeypatch.setattr(Path, "replace", refuses(replaced))
    changes = {7: lambda: full.append(1), 13: full.clear}
    complete, said = lived(tmp_path, at=lambda step: changes.get(step, int)())
    assert complete
    assert said == [f"{tmp_path} takes no more lines for now: No space left on device"]
    assert steps_written(tmp_path) == [5, 6, 10, 12, 15, 18, 20]


def test_a_damaged_journal_stops_no_run(tmp_path: Path) -> None:
    lived(tmp_path, at=sends(signal.SIGTERM, 13))
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    lines[1:3] = [b'{"step": 6, "loss": \xff\xfe', b"[]"]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([*lines, b'{"step": 1']))
    assert lived(tmp_path)[0]
    assert steps_written(tmp_path) == [5, 12, 14, 15, 18, 20]


def test_stopped_and_gone_on_with_is_unbroken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real training: 7 steps, a stop, and on to 20, against 20; params, optimizer, key and place in the data are the same."""
    monkeypatch.setattr(pretrain_module, "peak_flops", lambda: 1e9)
    inputs = make_inputs(tmp_path / "inputs")

    def at(step: int) -> Callable[[dict[str, Any]], None]:
        return lambda entry: sends(signal.SIGTERM, step)(entry["step"])

    options: dict[str, Any] = {"steps": 20, "save_every": 0, "kind": "adamw"}
    assert run(inputs, tmp_path / "whole", **options).complete
    assert not run(inputs, tmp_path / "parts", report=at(7), **options).complete
    seven = came_to(tmp_path / "parts")
    assert newest(tmp_path / "parts" / "checkpoints") == "step_00000007"
    said: list[str] = []
    assert run(inputs, tmp_path / "parts", say=said.append, **options).complete
    assert said[0] == "going on from step_00000007"
    assert came_to(tmp_path / "parts") == came_to(tmp_path / "whole") != seven
    losses = [[entry["loss"] for entry in Journal(tmp_path / name).entries] for name in ("parts", "whole")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 20
