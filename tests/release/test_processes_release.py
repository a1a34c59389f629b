"""Runs of four processes, one of which is killed: 20 kills (--kills says otherwise); and adapters over Int8 on a mesh.

A kill costs half a minute on two cores: ten seconds of it until the others know.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from test_processes import alone, four, inputs, killed_runs, test_adapters_and_pairs_on_a_mesh

pytestmark = pytest.mark.release
__all__ = ["alone", "four", "inputs"]  # fixtures


def test_lost_processes_end_the_others_and_all_start_again(
    inputs: Path, four: tuple[Path, str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    kills = min(20, request.config.getoption("--kills"))
    counts = killed_runs(inputs, tmp_path / "run", four[1], kills, 400)
    print(f"\nkilled {dict(counts)}, seed 400, 0 mismatches")
    assert counts["kills"] == kills
    assert counts["with a checkpoint to go on from"] >= kills // 4


def test_adapters_over_int8_on_a_mesh(tmp_path: Path) -> None:
    test_adapters_and_pairs_on_a_mesh(tmp_path, "int8")
