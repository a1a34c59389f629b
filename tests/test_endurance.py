"""The watch over a long run: the account of its time adds up, hangs and slow steps are noticed, and traces come when asked for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from test_run import Files, begun
from training_runs import finished, until

from gemmary.errors import GemmaryError
from gemmary.processes import EXIT_CODE
from gemmary.report import report
from gemmary.train import traces as traces_module
from gemmary.train import watchdog as watchdog_module
from gemmary.train.endurance import Watched
from gemmary.train.goodput import LOST, Goodput
from gemmary.train.loop import Hook, LoopSettings
from gemmary.train.pace import Pace, Taken
from gemmary.train.run import Ended, run
from gemmary.train.step import TrainState
from gemmary.train.watchdog import Place, Watchdog

STEPS = 12


class Clocks:
    """A wall clock and a monotonic one, which only move when told to."""

    def __init__(self) -> None:
        self.wall, self.steady = 1e9, 50.0

    def sleep(self, seconds: float) -> None:
        self.wall += seconds
        self.steady += seconds

    def open(self, path: Path, run: str = "a run", *, loaded: float = 0.0) -> Goodput:
        return Goodput(path, run, wall=lambda: self.wall, clock=lambda: self.steady, loaded=loaded)


def spent(account: Goodput, clocks: Clocks, seconds: Mapping[str, float]) -> None:
    for cause, some in seconds.items():
        account.enter(cause)
        clocks.sleep(some)


def test_goodput_over_kills(tmp_path: Path) -> None:
    """Three sittings: one that is killed after its record was written, one that is killed before it saves, and one to the end."""
    clocks, path = Clocks(), tmp_path / "goodput.json"
    account = clocks.open(path)
    account.begin(0)
    clocks.sleep(4)  # compiling
    spent(account, clocks, {"data": 1, "steps": 20, "saving": 2})
    account.mark(10)
    spent(account, clocks, {"steps": 6, "evaluation": 3})
    account.write()
    spent(account, clocks, {"steps": 5})  # which nobody hears of
    clocks.sleep(95)
    account = clocks.open(path, loaded=clocks.steady - 30)  # 30 s ago its process began
    clocks.sleep(1)
    account.begin(10)
    spent(account, clocks, {"steps": 7})
    account.write()
    clocks.sleep(10)
    account = clocks.open(path)  # of a process that was there before: it was not at work on this run
    account.begin(10)
    spent(account, clocks, {"steps": 12})
    account.mark(16)
    account.end()
    clocks.sleep(1000)  # over is over
    expected = {
        "steps": 32,
        "start": 4 + 31,
        "data": 1,
        "saving": 2,
        "evaluation": 3,
        "repeated": 6 + 7,
        "down": 70 + 10,
    }
    figures = account.figures()
    assert figures == clocks.open(path).figures()
    assert {name: figures[name] for name in expected} == expected
    assert set(expected) == {"steps", *LOST}
    assert figures["seconds"] == sum(expected.values()) == clocks.wall - 1e9 - 1000
    assert figures["of_all"] == round(32 / sum(expected.values()), 4)
    assert figures["of_running"] == round(32 / (sum(expected.values()) - 80), 4)


def test_a_run_from_an_older_checkpoint_or_from_none(tmp_path: Path) -> None:
    clocks, path = Clocks(), tmp_path / "goodput.json"
    account = clocks.open(path)
    account.begin(0)
    for step in range(1, 501):
        spent(account, clocks, {"steps": 1})
        account.mark(step)
    again = clocks.open(path)
    again.begin(450)  # the newest ones were damaged
    assert (again.figures()["steps"], again.figures()["repeated"]) == (450, 50)
    spent(again, clocks, {"steps": 20})
    again.mark(460)  # by steps that take two seconds each
    again = clocks.open(path)
    again.begin(455)
    assert (again.figures()["steps"], again.figures()["repeated"]) == (460, 60)
    assert len(path.read_bytes()) < 2000  # however many saves
    again = clocks.open(path)
    again.begin(0)  # the checkpoints are gone
    assert (again.figures()["steps"], again.figures()["repeated"]) == (0, 520)


def test_another_runs_record_and_a_damaged_one_are_forgotten(tmp_path: Path) -> None:
    clocks, path = Clocks(), tmp_path / "goodput.json"
    account = clocks.open(path)
    account.begin(0)
    spent(account, clocks, {"steps": 9})
    account.end()
    assert clocks.open(path).figures()["steps"] == 9
    assert clocks.open(path, "another run").figures() == {}
    record = path.read_text()
    for text in ("", "[]", record[:40], record.replace('"last"', '"lost"'), record.replace("9.0", '"x"')):
        path.write_text(text)
        assert clocks.open(path).figures() == {}, text
    path.unlink()
    path.mkdir()  # a disk that takes nothing
    account = clocks.open(path)
    account.begin(0)
    spent(account, clocks, {"steps": 9})
    account.end()
    assert account.figures()["steps"] == 9


class Numbers:
    """Batch i is the number i. `at` is told of each."""

    def __init__(self, at: Callable[[int], None]) -> None:
        self._next, self._at = 0, at

    def __next__(self) -> int:
        self._at(self._next)
        self._next += 1
        return self._next - 1

    def state(self) -> dict[str, Any]:
        return {"next": self._next}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._next = state["next"]

    def close(self) -> None:
        pass


def nothing(number: int) -> None:
    pass


def lived(
    folder: Path, *, at: Callable[[int], None] = nothing, stepping: Callable[[int], None] = nothing, steps: int = STEPS,
    hook: Callable[[], None] = lambda: None, **watched: Any,
) -> tuple[Ended, list[str]]:  # fmt: skip
    """A run whose batches and steps take what they are told to, and what was said. Batch i is step i + 1's."""
    said: list[str] = []
    product = jax.jit(lambda x: (x @ x).sum())

    def step(state: TrainState, batch: int) -> tuple[TrainState, dict[str, Any]]:
        stepping(batch)
        means = {"loss": product(jnp.ones((64, 64))), "gradient_norm": jnp.float32(1.0)}
        return replace(state, step=state.step + 1), means

    ended = run(
        folder, begun(), Numbers(at), lambda state: step, files=Files(), identity={"seed": 1}, say=said.append,
        settings=LoopSettings(steps=steps, save_every=4, log_every=2, watch=Watched(**watched)),
        describe=lambda means, seconds, done: {"nats": means["loss"]}, hooks=[Hook(4, lambda state: hook() or {})],
    )  # fmt: skip
    assert ended.complete
    return ended, said


def sleeps(seconds: float, *where: int) -> Callable[[int], None]:
    return lambda number: time.sleep(seconds) if number in where else None


def test_the_loop_tells_where_its_time_goes(tmp_path: Path) -> None:
    began = time.monotonic()
    ended, said = lived(tmp_path, at=sleeps(0.3, 5), stepping=sleeps(0.2, 3, 7), hook=lambda: time.sleep(0.1))
    took = time.monotonic() - began
    last = ended.entries[-1]["goodput"]
    assert 0 < ended.goodput["seconds"] - last["seconds"] < 0.3  # the last save
    figures = ended.goodput
    assert said == []
    assert took - 0.8 < figures["seconds"] < took
    assert sum(figures[name] for name in ("steps", *LOST)) == pytest.approx(figures["seconds"], abs=0.01)
    assert 0.2 < figures["data"] < 0.6
    assert 0.4 < figures["steps"] < 0.9
    assert 0.3 < figures["evaluation"] < 0.7
    assert figures["down"] == figures["repeated"] == 0
    again, _ = lived(tmp_path)  # nothing is left to do: no time is told
    assert again.goodput == figures
    assert json.loads((tmp_path / "goodput.json").read_text())["sittings"] == 1


def started(folder: Path, what: str = "steps") -> subprocess.Popen[str]:
    """The run as a program of its own, which says its steps; or another that ends with what it says."""
    here = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen([sys.executable, __file__, str(folder), what], stdout=subprocess.PIPE, text=True, env=here)


def test_a_killed_run_adds_up(tmp_path: Path) -> None:
    """kill -9 and on: all seconds since the first beginning are told, and those in which nothing ran are `down`."""
    process = started(tmp_path)
    while not (tmp_path / "goodput.json").exists():
        time.sleep(0.01)
    began = time.time()
    until(process, "step 11")
    process.kill()
    killed = time.time()
    process.stdout.close()  # type: ignore[union-attr]
    process.wait()
    time.sleep(1.0)
    assert finished(started(tmp_path)) == f"step {STEPS}"
    ended = time.time()
    record = json.loads((tmp_path / "goodput.json").read_text())
    seconds, total = record["seconds"], sum(record["seconds"].values())
    assert record["sittings"] == 2
    assert record["last"] - began == pytest.approx(total, rel=0.02, abs=0.05)
    assert 1.0 < total < ended - began + 0.05
    away = seconds["down"] + seconds["start"] + seconds["repeated"]
    assert 1.0 < away < ended - killed + 0.8  # and the first start, and steps 9 to 11, which no save had
    assert seconds["down"] > 1.0
    assert 0.1 * STEPS < seconds["steps"] < 0.2 * STEPS  # each once


def test_compiling_counts_as_start_wherever_it_happens(tmp_path: Path) -> None:
    def compiles(number: int) -> None:
        if number == 6:
            jax.jit(lambda x: [jnp.sin(x * i) @ x for i in range(40)])(jnp.ones((8, 8)))

    plain, compiled = (
        lived(tmp_path / name, stepping=stepping)[0].goodput for name, stepping in (("a", nothing), ("b", compiles))
    )
    assert compiled["start"] - plain["start"] > 0.05


def test_the_report_says_where_the_time_went(tmp_path: Path) -> None:
    ended, _ = lived(tmp_path / "dpo", at=sleeps(0.4, 10))
    record = json.loads((tmp_path / "dpo" / "goodput.json").read_text())
    seconds = {**dict.fromkeys(LOST, 0.0), "steps": 35.04, "data": 4.96, "down": 30.0}
    (tmp_path / "dpo" / "goodput.json").write_text(json.dumps({**record, "seconds": seconds}))
    stage = {"stage": "dpo", "digest": "d", "begun_with": {}, "seconds": 3.0, "results": {}}
    (tmp_path / "dpo" / "stage.json").write_text(json.dumps(stage))
    tables = [one for part in report(tmp_path)["sections"] for one in part["tables"]]
    (table,) = (one for one in tables if "goodput" in one["columns"])
    said = dict(zip(table["columns"], table["rows"][0], strict=True))
    assert (said["stage"], said["goodput"], said["without down"]) == ("dpo", "50.1 %", "87.6 %")
    assert (said["steps"], said["data"], said["down"], said["repeated"]) == ("35.0", "5.0", "30.0", "0.0")
    assert (
        int(said["slow steps"])
        == sum(entry["slow_steps"]["count"] for entry in ended.entries if "slow_steps" in entry)
        > 0
    )


class Device:
    """A step's loss, there when it is said to be."""

    def __init__(self) -> None:
        self._there = threading.Event()

    def block_until_ready(self) -> None:
        self._there.wait(10)

    def comes(self) -> None:
        self._there.set()


def test_a_wait_that_the_device_does_not_notice_is_none() -> None:
    hidden: list[float] = []
    pace = Pace(hidden.append)
    now, devices = time.monotonic(), [Device(), Device(), Device()]
    pace.sent(Taken(1, now - 5, now - 4, 0.0, devices[0]))  # the device had nothing to do meanwhile
    pace.sent(Taken(2, now - 3, now - 1, 0.0, devices[1]))  # it was at step 1 all the while
    assert pace.busy()
    for device in devices[:2]:
        device.comes()
    assert pace.slow() is None
    assert not pace.busy()
    assert hidden == [pytest.approx(2.0)]
    later = time.monotonic()
    pace.sent(Taken(3, now - 3, later + 4, 0.0, devices[2]))  # half of it
    devices[2].comes()
    pace.slow()
    assert hidden[1] == pytest.approx(later - now + 3, abs=0.05)
    pace.close()


def test_slow_steps_are_told_in_the_journal(tmp_path: Path) -> None:
    ended, _ = lived(tmp_path, at=sleeps(0.4, 20), stepping=sleeps(0.5, 25), steps=30)
    slow = {entry["step"]: entry["slow_steps"] for entry in ended.entries if "slow_steps" in entry}
    assert slow[22] == {"count": 1, "worst_step": 21, "worst_seconds": pytest.approx(0.4, abs=0.2), "cause": "data"}
    assert slow[26] == {"count": 1, "worst_step": 26, "worst_seconds": pytest.approx(0.5, abs=0.2), "cause": "device"}
    assert len(slow) <= 4  # saves, evaluations and compiling make no step slow; what else goes on here may


@pytest.mark.parametrize(
    ("changes", "what", "frame"),
    [({"at": sleeps(1.0, 7)}, "the next batch", "__next__"), ({"stepping": sleeps(1.0, 7)}, "the device", "stepping(batch)")],
)  # fmt: skip
def test_a_hang_is_said_with_every_stack(tmp_path: Path, changes: dict[str, Any], what: str, frame: str) -> None:
    _, said = lived(tmp_path, hang_seconds=0.4, hook=lambda: time.sleep(0.2), **changes)  # after which somebody looks
    file = tmp_path / "hang_00000008.txt"
    assert len(said) == 2
    assert said[0].startswith("step 8 hangs: no step has ended for 0.")
    assert said[0].endswith(f"; it waits for {what}; every thread's stack: {file}")
    assert said[1].startswith("it goes on, at step ")
    text = file.read_text()
    assert said[0].split(";")[0] in text
    assert "test_endurance.py" in text  # the loop's thread
    assert "_tell" in text  # and the watchdog's own
    assert frame.split("(")[0] in text or "<lambda>" in text


def test_what_is_slow_by_nature_hangs_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation of ten limits is none too long; where it is longer, and an hour is over, it is."""
    _, said = lived(tmp_path / "a", hang_seconds=0.1, hook=lambda: time.sleep(0.4))
    assert said == []
    monkeypatch.setattr(watchdog_module, "_PATIENT", 0.0)
    _, said = lived(tmp_path / "b", hang_seconds=0.1, steps=4, hook=lambda: time.sleep(1.2))
    assert said[0].startswith("step 4 hangs")
    assert "it waits for an evaluation" in said[0]
    assert (tmp_path / "b" / "hang_00000004.txt").is_file()


def watched(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    place: Callable[[], Place | None],
    *,
    lasts: float = 0.4,
    **changes: Any,
) -> Any:
    """What a watchdog says in so many seconds, and the codes that it ends the process with."""
    codes: list[int] = []
    said: list[str] = []
    monkeypatch.setattr(watchdog_module.os, "_exit", codes.append)
    dog = Watchdog(place, folder, **{"seconds": 0.1, "exits": False, "say": said.append, **changes})
    time.sleep(lasts)
    dog.close()
    return said, codes


def test_a_hung_process_ends_if_it_is_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stuck = Place("steps", 7, (1, 6), 0.01)
    said, codes = watched(monkeypatch, tmp_path, lambda: stuck, exits=True, process=3, processes=16)
    assert codes == [EXIT_CODE] == [75]
    assert "of 16 processes another may be lost" in said[0]
    assert said[1] == "the process ends with exit code 75 (hang_exits)"
    assert (tmp_path / "hang_00000007_3.txt").is_file()
    said, codes = watched(monkeypatch, tmp_path / "no such folder", lambda: stuck)
    assert codes == []
    assert said[1].endswith("cannot be written: No such file or directory")


def test_who_moves_or_was_stopped_does_not_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = iter(range(10**6))
    assert watched(monkeypatch, tmp_path, lambda: Place("steps", 7, (1, next(ends)), 0.01)) == ([], [])
    assert watched(monkeypatch, tmp_path, lambda: Place("steps", 1, (1, 0), None)) == ([], [])  # the first may compile
    assert watched(monkeypatch, tmp_path, lambda: None) == ([], [])  # the loop is over
    usual = Place("steps", 7, (1, 6), 0.01)
    assert watched(monkeypatch, tmp_path, lambda: usual, seconds=None) == ([], [])  # 300 s at least

    calls: list[float] = []

    def stopped() -> Place:  # the process, by SIGSTOP, between two looks
        calls.append(0)
        if len(calls) == 2:
            time.sleep(0.4)
        return usual

    assert watched(monkeypatch, tmp_path, stopped, seconds=0.3, lasts=0.6) == ([], [])


def test_nobody_looks_where_the_limit_is_none(tmp_path: Path) -> None:
    names: list[str] = []
    lived(tmp_path, hang_seconds=0, hook=lambda: names.extend(one.name for one in threading.enumerate()))
    assert "pace" in names
    assert "watchdog" not in names
    assert not {"pace", "endurance"} & {one.name for one in threading.enumerate()}


def test_traces_when_asked_for(tmp_path: Path) -> None:
    """By a setting, a file and a signal. In a program of its own: libtpu, which other tests load, may make the profiler crash."""
    process = started(tmp_path, "traced")
    last, said = finished(process), (tmp_path / "said").read_text().splitlines()
    assert last == "handler as before"
    for line, first in zip(said, (2, 10, 20), strict=True):
        folder = tmp_path / "traces" / f"step_{first:08d}"
        assert line == f"trace of steps {first} to {first + 4}: {folder}"
        assert len(list(folder.rglob("*.xplane.pb"))) == 1
    assert not (tmp_path / "profile").exists()


def traced(folder: Path) -> None:
    """The program."""
    handler = signal.getsignal(signal.SIGUSR1)

    def asks(number: int) -> None:  # the next step is number + 1
        if number == 9:
            (folder / "profile").touch()
            while (folder / "profile").exists():
                time.sleep(0.01)
            time.sleep(0.1)
        if number == 19:
            os.kill(os.getpid(), signal.SIGUSR1)

    _, said = lived(folder, at=asks, steps=30, profile_at=(2, 4))
    (folder / "said").write_text("\n".join(said))
    print("handler", "as before" if signal.getsignal(signal.SIGUSR1) is handler else "lost")


def test_a_trace_that_fails_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("the disk is full\nand so on")

    began: list[str] = []
    monkeypatch.setattr(jax.profiler, "start_trace", fails)
    monkeypatch.setattr(traces_module, "_would_crash", lambda: None)
    assert lived(tmp_path / "a", profile_at=(3,))[1] == ["no trace of step 3: the disk is full"]
    monkeypatch.setattr(jax.profiler, "start_trace", began.append)
    monkeypatch.setattr(jax.profiler, "stop_trace", fails)
    assert lived(tmp_path / "b", profile_at=(3,))[1] == ["no trace of step 3: the disk is full"]
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: None)
    folder = tmp_path / "c" / "traces" / "step_00000011"
    assert lived(tmp_path / "c", profile_at=(STEPS - 1,))[1] == [
        f"trace of steps 11 to 12: {folder}"
    ]  # it ends before five
    assert len(began) == 2
    monkeypatch.setattr(traces_module, "_would_crash", lambda: "it would crash")
    assert lived(tmp_path / "d", profile_at=(3,))[1] == ["no trace of step 3: it would crash"]
    assert len(began) == 2


@pytest.mark.parametrize(
    ("maps", "version", "crashes"),
    [("libtpu.so", "9.9.9", True), ("libtpu.so", "0.0.42.1", False), ("libm.so", "9.9.9", False)],
)
def test_a_profiler_of_another_version_is_not_asked(
    monkeypatch: pytest.MonkeyPatch, maps: str, version: str, crashes: bool
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self: maps)
    monkeypatch.setattr(traces_module.metadata, "requires", lambda name: ["numpy", 'libtpu==0.0.42.*; extra == "tpu"'])
    monkeypatch.setattr(traces_module.metadata, "version", lambda name: version)
    why = traces_module._would_crash()
    assert (why is not None and "pip install 'libtpu==0.0.42.*'" in why) == crashes


def test_settings_are_checked() -> None:
    with pytest.raises(GemmaryError, match=r"watch\.hang_seconds is -1; it is at least 0"):
        Watched(hang_seconds=-1)
    with pytest.raises(GemmaryError, match=r"watch\.profile_at has 0: the first step is 1"):
        Watched(profile_at=(5, 0))


if __name__ == "__main__":
    if sys.argv[2] == "traced":
        traced(Path(sys.argv[1]))
    else:
        lived(
            Path(sys.argv[1]), at=lambda number: print("step", number, flush=True), stepping=sleeps(0.1, *range(STEPS))
        )
        print("step", STEPS)
