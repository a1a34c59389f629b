"""T5 in full: 1000 batches, shuffled, mixed and packed, restored at every index with 0, 1, 2 and 4 workers.

With a thread, all that follows every index is compared. With workers, whose processes start anew at every restore (one to
six seconds on two cores, so hours in all), the whole run, and from every index more batches than are made ahead.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from test_batches import STEPS, continues, make, make_sources
from token_files import same

from gemmary.data.packing import Batch

pytestmark = pytest.mark.release

_BEYOND = 6  # batches compared for each worker; four are made ahead


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_all_that_follows_every_index(tmp_path: Path, seed: int) -> None:
    sources = make_sources(tmp_path, seed)
    batches = make(sources, seed=seed)
    order = batches.state()["order"]
    whole = list(batches)
    assert len(whole) == STEPS
    compared = 0
    for index in range(STEPS + 1):
        batches.restore({"next": index, "order": order})
        continues(batches, whole, index)
        compared += STEPS - index
    print(f"\nT5 workers 0 seed {seed}: {STEPS + 1} restores, {compared} batches compared, 0 differ")


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_every_index_with_workers(tmp_path: Path, workers: int) -> None:
    seed = workers
    sources = make_sources(tmp_path, seed)
    whole = list(make(sources, seed=seed))
    batches = make(sources, seed=seed, workers=workers)
    order = batches.state()["order"]
    continues(batches, whole, 0)
    compared = STEPS
    for index in range(STEPS + 1):
        batches.restore({"next": index, "order": order})
        continues(batches, whole, index, _BEYOND * workers)
        compared += min(STEPS - index, _BEYOND * workers)
    batches.close()
    print(f"\nT5 workers {workers} seed {seed}: {STEPS + 1} restores, {compared} batches compared, 0 differ")


@pytest.mark.parametrize("seed", range(20))
def test_every_epoch_has_every_token_once(tmp_path: Path, seed: int) -> None:
    """Many seeds of the order, each source's rows counted over three epochs."""
    for name, packed in make(make_sources(tmp_path, seed), seed=seed)._packed.items():
        for epoch in range(3):
            rows: list[Batch] = [packed[epoch * packed.rows + i] for i in range(packed.rows)]
            said = sorted(token for row in rows for token in row.targets[row.mask > 0].tolist() if token >= 10)
            assert said == list(range(said[0], said[0] + len(said))), (name, seed, epoch)
        if packed.rows > 100:  # the few rows of a small source may come in the same order twice
            assert not same(packed[0], packed[packed.rows])
