"""T1, T3 and T4 in full: 500 kills (--kills), 200 faults of disk and signals, and 2000 damaged files.

A kill costs two to four seconds on two cores, a full disk needs the right to mount one (root, on Linux).
"""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from disks import Disk
from test_faults import (
    ERRNOS,
    ORBAX_LEAVES,
    asked_runs,
    damages,
    frozen_runs,
    in_two_lanes,
    inputs,
    killed_runs,
    operations,
    survives,
    unbroken,
)
from test_saving import DATA, make, make_state, names, same_state

pytestmark = [pytest.mark.release, ORBAX_LEAVES]
__all__ = ["inputs", "unbroken"]  # fixtures


def test_killed_it_goes_on_to_the_same_end(
    inputs: Path, unbroken: tuple[str, float], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    kills = request.config.getoption("--kills")
    share = min(10, kills)
    seeds = list(range(100, 100 + kills // share))

    def work(seed: int) -> Counter[str]:
        folder = tmp_path / str(seed)
        counts = killed_runs(inputs, folder, unbroken, share, seed)
        shutil.rmtree(folder)
        return counts

    counts = in_two_lanes(work, seeds)
    print(f"\nT1 {dict(counts)}, seeds {seeds[0]} to {seeds[-1]}, 0 mismatches")
    assert counts["kills"] == share * len(seeds) >= kills - share
    assert counts["inside a save"] >= kills // 10


def test_asked_to_stop_and_frozen(inputs: Path, unbroken: tuple[str, float], tmp_path: Path) -> None:
    def work(seed: int) -> Counter[str]:
        return (frozen_runs if seed % 2 else asked_runs)(inputs, tmp_path / str(seed), unbroken, 10, seed)

    counts = in_two_lanes(work, [200, 201, 202, 203])
    print(f"\nT3 {dict(counts)}, seeds 200 to 203")
    assert counts["SIGTERM"] == counts["SIGSTOP"] == 20


def test_the_disk_fails_at_every_operation(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    said = operations(folder)
    tried = failed = 0
    for error in ERRNOS:
        for place in range(len(said)):
            disk = Disk(folder, place, error)
            failed += survives(folder, disk.watched(), 3)
            tried += 1
    print(f"\nT3 {tried} errors, at each of {len(said)} operations, {failed} saves failed, 0 checkpoints lost")
    assert tried >= 100
    assert failed >= 0.8 * tried


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a small disk")
def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """A real one, with less and less room beside a good checkpoint."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"may not mount a disk: {mounted.stderr.decode().strip()}")
    try:
        counts: Counter[str] = Counter()
        for room in range(300_000, 1_100_000, 20_000):  # the state takes 0.6 MB
            folder = disk / "run"
            folder.mkdir()
            said: list[str] = []
            checkpoints = make(folder, keep=1, say=said.append)
            checkpoints.save(make_state(2), DATA)
            checkpoints.finish()
            filler = disk / "filler"
            filler.write_bytes(bytes(max(0, shutil.disk_usage(disk).free - room)))
            checkpoints.save(make_state(3), DATA)
            checkpoints.wait()
            restored = make(folder).restore(make_state(0))
            assert restored is not None
            assert same_state(restored.state, make_state(2 if said else 3))
            assert names(folder) == [restored.path.name]
            counts["refused" if said and "GB free" in said[0] else "cut off" if said else "written"] += 1
            shutil.rmtree(folder)
            filler.unlink()
        print(f"\nT3 full disk ({errno.errorcode[errno.ENOSPC]}): {dict(counts)}, 0 checkpoints lost")
        assert min(counts["refused"], counts["cut off"], counts["written"]) >= 1
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("seed", range(10))
def test_damage_is_found_or_harmless(tmp_path: Path, seed: int) -> None:
    counts = damages(tmp_path, 200, 300 + seed)
    print(f"\nT4 200 damages: {dict(counts)}, seed {300 + seed}, 0 misses")
