"""Training survives what machines do to it: killed, stopped, its disk full, failing or lying. T1, T3 and T4 in short.

The whole of it is in tests/release/test_faults_release.py. Counts and seeds are printed (pytest -rP).
"""

from __future__ import annotations

import errno
import gc
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from disks import Disk, small_files
from test_saving import DATA, make, make_state, names, same_state
from training_runs import STEPS, checkpoints_of, finished, make_inputs, start, until

from gemmary.checkpoints.manifest import verify_manifest
from gemmary.errors import GemmaryError

PAUSE = 0.02  # seconds after each step, so that there is a time between saves
ERRNOS = (errno.ENOSPC, errno.EIO, errno.EACCES)
# Orbax drops what it was about to await when a write fails.
ORBAX_LEAVES = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("faults") / "inputs")


@pytest.fixture(scope="session")
def unbroken(inputs: Path) -> tuple[str, float]:
    return unbroken_run(inputs, "pretrain")


def unbroken_run(inputs: Path, stage: str) -> tuple[str, float]:
    """What the run comes to when nothing happens to it, and the seconds its steps and saves take. Run twice."""
    words, seconds = [], 0.0
    for name in ("first", "second"):
        process = start(inputs, inputs.parent / f"{stage}_{name}", pause=PAUSE, stage=stage)
        until(process, "step")
        started = time.monotonic()
        words.append(finished(process))
        seconds = time.monotonic() - started
    assert words[0] == words[1]
    assert words[0].startswith("complete")
    return words[0], seconds


def killed_runs(
    inputs: Path, folder: Path, unbroken: tuple[str, float], kills: int, seed: int, stage: str = "pretrain"
) -> Counter[str]:
    """Runs, each started again until it is complete, killed so often in all; every one comes to the same.

    A kill is aimed at a save, as soon as a half-written checkpoint is seen or a little later, at any instant after a step,
    or now and then at the start-up.
    """
    rng, counts = random.Random(seed), Counter[str]()
    word, seconds = unbroken
    while counts["kills"] < kills:
        run = folder / f"run{counts['runs']}"
        while True:
            process = start(inputs, run, pause=PAUSE, core=seed, stage=stage)
            if counts["kills"] >= kills:
                break
            if not _killed(process, run, rng, seconds):  # it was done before, and what it said is read: ask it again
                if not process.stdout.closed:  # type: ignore[union-attr]
                    until(process, "never")
                    process.stdout.close()  # type: ignore[union-attr]
                process.wait()
                process = start(inputs, run, core=seed, stage=stage)
                break
            counts["kills"] += 1
            counts["inside a save"] += any((run / "checkpoints").glob(".step_*.partial"))
            if checkpoints_of(run):
                counts["with a checkpoint to go on from"] += 1
                verify_manifest(checkpoints_of(run)[-1])
        assert finished(process) == word, f"seed {seed}, run {counts['runs']}"
        counts["runs"] += 1
    return counts


def _killed(process: Any, run: Path, rng: random.Random, seconds: float) -> bool:
    """Kill it at an instant of chance; False where it was done before."""
    aim = rng.choices(("save", "steps", "start"), (6, 5, 1))[0]
    wait = {"save": rng.uniform(0, 0.1), "steps": rng.uniform(0, seconds / 2), "start": rng.uniform(0, 3)}[aim]
    if aim != "start":
        until(process, "step")
    if aim == "save":
        passed = {path.name for path in _half_written(run)}  # a save that a killed one left may still lie there
        while process.poll() is None and not {path.name for path in _half_written(run)} - passed:
            time.sleep(0.001)
    time.sleep(wait)
    if process.poll() is not None:
        return False
    process.kill()
    until(process, "never")
    process.stdout.close()
    return bool(process.wait() == -signal.SIGKILL)


def _half_written(run: Path) -> list[Path]:
    return list((run / "checkpoints").glob(".step_*.partial"))


def in_two_lanes(work: Callable[[int], Counter[str]], seeds: list[int]) -> Counter[str]:
    """The work for each seed, two at a time, each on a core of its own."""
    with ThreadPoolExecutor(2) as pool:
        return sum(pool.map(work, seeds), Counter[str]())


def test_killed_it_goes_on_to_the_same_end(inputs: Path, unbroken: tuple[str, float], tmp_path: Path) -> None:
    seeds = [0, 1]
    counts = in_two_lanes(lambda seed: killed_runs(inputs, tmp_path / str(seed), unbroken, 10, seed), seeds)
    print(f"\nT1 {dict(counts)}, seeds {seeds}, 0 mismatches")
    assert counts["kills"] == 20
    assert counts["inside a save"] >= 3


@pytest.mark.parametrize("stage", ["sft", "reward", "rlhf"])
def test_killed_in_tuning_it_goes_on_to_the_same_end(inputs: Path, stage: str, tmp_path: Path) -> None:
    expected, seeds = unbroken_run(inputs, stage), [10, 11]
    counts = in_two_lanes(lambda seed: killed_runs(inputs, tmp_path / str(seed), expected, 5, seed, stage), seeds)
    print(f"\nT2 {stage} {dict(counts)}, seeds {seeds}, 0 mismatches")
    assert counts["kills"] == 10


def asked_to_end(process: Any, said: str, run: Path) -> str:
    """The last line, `said` being those before; nothing where the signal came when all was done and saved, and met no handler."""
    said += until(process, "never")
    process.stdout.close()
    if process.wait() == -signal.SIGTERM:
        assert checkpoints_of(run)[-1].name == f"step_{STEPS:08d}"
        return ""
    assert process.returncode == 0, said
    return said.splitlines()[-1]


def asked_runs(inputs: Path, folder: Path, unbroken: tuple[str, float], times: int, seed: int) -> Counter[str]:
    """SIGTERM at an instant of chance: exit code 0 within 30 s, a checkpoint of that instant, and the same end."""
    rng, counts = random.Random(seed), Counter[str]()
    word, seconds = unbroken
    while counts["SIGTERM"] < times:
        run = folder / f"run{counts['runs']}"
        last = ""
        while not last.startswith("complete"):
            process = start(inputs, run, pause=2 * PAUSE, core=seed, save_every=1000)
            said = until(process, "step")  # or to its end, where an earlier one had taken all steps but not said so
            if counts["SIGTERM"] < times:
                time.sleep(rng.uniform(0, seconds / 2))
                done = len(checkpoints_of(run))
                process.send_signal(signal.SIGTERM)
                asked = time.monotonic()
                last = asked_to_end(process, said, run)
                assert time.monotonic() - asked < 30
                if last.startswith("stopped"):
                    counts["SIGTERM"] += 1
                    assert len(checkpoints_of(run)) == min(done + 1, 2)
                continue
            last = finished(process, said)
        assert last == word, f"seed {seed}, run {counts['runs']}"
        counts["runs"] += 1
    return counts


def frozen_runs(inputs: Path, folder: Path, unbroken: tuple[str, float], times: int, seed: int) -> Counter[str]:
    """SIGSTOP and SIGCONT at instants of chance: nothing but time is lost."""
    rng, counts = random.Random(seed), Counter[str]()
    while counts["SIGSTOP"] < times:
        process = start(inputs, folder / f"run{counts['runs']}", pause=PAUSE, core=seed)
        until(process, "step")
        for _ in range(min(5, times - counts["SIGSTOP"])):
            process.send_signal(signal.SIGSTOP)
            time.sleep(rng.uniform(0, 0.2))
            process.send_signal(signal.SIGCONT)
            counts["SIGSTOP"] += process.poll() is None
            time.sleep(rng.uniform(0, unbroken[1] / 6))
        assert finished(process) == unbroken[0]
        counts["runs"] += 1
    return counts


def test_asked_to_stop_and_frozen(inputs: Path, unbroken: tuple[str, float], tmp_path: Path) -> None:
    def work(seed: int) -> Counter[str]:
        return (frozen_runs if seed else asked_runs)(inputs, tmp_path / str(seed), unbroken, 5, seed)

    counts = in_two_lanes(work, [0, 1])
    print(f"\nT3 {dict(counts)}, seeds 0 and 1")
    assert counts["SIGTERM"] == counts["SIGSTOP"] == 5


def survives(folder: Path, fault: AbstractContextManager[Any], step: int) -> bool:
    """A save of `step` under a fault, above a good one of `step` - 1, which is all there is; whether the save failed.

    Whatever comes of it: nothing half-written is left, and the newest that verifies has the bits it was given.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    said: list[str] = []
    checkpoints = make(folder, keep=1, say=said.append)
    checkpoints.save(make_state(step - 1), DATA)
    checkpoints.finish()
    with fault:
        checkpoints.save(make_state(step), DATA)
        checkpoints.wait()
    failed = bool(said)
    if failed:
        with pytest.raises(GemmaryError, match=f"the last save failed: .*newest checkpoint is {folder}"):
            checkpoints.finish()
    else:
        checkpoints.finish()
    restored = make(folder, keep=1).restore(make_state(0))
    assert restored is not None
    assert restored.damaged == []
    assert same_state(restored.state, make_state(int(restored.state.step)))
    assert int(restored.state.step) == step or failed
    assert [name for name in names(folder) if name.endswith(".partial")] == []
    if failed:
        gc.collect()  # here, not in the midst of another test
    return failed


def operations(folder: Path) -> list[str]:
    """What a save does to the disk, as far as it says."""
    disk = Disk(folder)
    assert not survives(folder, disk.watched(), 3)
    return disk.operations


@ORBAX_LEAVES
def test_the_disk_fails_at_any_operation(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    said = operations(folder)
    kinds = {line.split()[0] for line in said}
    assert {"open", "os.mkdir", "os.rename"} <= kinds
    # Orbax does a few operations more or fewer each time: none is aimed at the last.
    places = [round(i * 0.9 * (len(said) - 1) / 23) for i in range(24)]
    failed = 0
    for i, place in enumerate(places):
        disk = Disk(folder, place, ERRNOS[i % 3])
        failed += survives(folder, disk.watched(), 3)
        assert len(disk.operations) > place
    print(f"\nT3 {len(places)} errors in {len(said)} operations of a save, {failed} saves failed, 0 checkpoints lost")
    assert failed >= 20


@ORBAX_LEAVES
@pytest.mark.parametrize("most", [0, 100, 1000, 5000, 20_000, 60_000])
def test_files_that_cannot_grow(tmp_path: Path, most: int) -> None:
    """The kernel's own refusal, which also meets what TensorStore and safetensors write."""
    assert survives(tmp_path / "checkpoints", small_files(most), 3)
    assert not survives(tmp_path / "checkpoints", small_files(1 << 30), 3)


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Another file: a bit flipped, three times of four, or the end cut off."""
    at = rng.randrange(len(data))
    if rng.random() < 0.25:
        return data[:at]
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def damages(folder: Path, times: int, seed: int) -> Counter[str]:
    """Every file of the newest checkpoint damaged in turn: it is passed over for the one before, or its bits are all there."""
    rng, counts = random.Random(seed), Counter[str]()
    checkpoints = make(folder)
    for step in (3, 4):
        checkpoints.save(make_state(step), DATA)
    checkpoints.finish()
    files = sorted(path for path in (folder / "step_00000004").rglob("*") if path.is_file())
    counts["files"] = len(files)
    like, states = make_state(0), {step: make_state(step) for step in (3, 4)}
    for i in range(times):
        path = files[i % len(files)]
        data = path.read_bytes()
        path.write_bytes(damaged(rng, data))
        if i % 5 and not _verifies(folder / "step_00000004"):  # the way past it is gone every fifth time
            counts["found"] += 1
            path.write_bytes(data)
            continue
        restored = make(folder).restore(like)
        assert restored is not None
        step = int(restored.state.step)
        assert same_state(restored.state, states[step]), f"{path}, number {i}, seed {seed}"
        assert restored.data == DATA
        assert (step == 3) == bool(restored.damaged)
        counts["found" if step == 3 else "harmless"] += 1
        counts["passed over"] += step == 3
        path.write_bytes(data)
    assert counts["found"] + counts["harmless"] == times
    return counts


def _verifies(path: Path) -> bool:
    try:
        verify_manifest(path)
    except GemmaryError:
        return False
    return True


def test_damage_is_found_or_harmless(tmp_path: Path) -> None:
    counts = damages(tmp_path, 200, 0)
    print(f"\nT4 200 damages: {dict(counts)}, seed 0, 0 misses")
    assert counts["harmless"] < 10
