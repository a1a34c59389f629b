"""Phases of tasks, run by datatrove's executors: in this machine's processes, on Ray, or on Slurm.

An executor marks each task that is done in the phase's folder of logs, and skips it the next time.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemmary.data.curation_settings import CurateSettings
from gemmary.data.readers import needed
from gemmary.errors import GemmaryError

__all__ = ["Phase", "Progress", "bucket_step", "run_phases", "workers"]

Progress = Callable[[int, int], None]

_POLL = 0.25  # seconds


@dataclass(frozen=True)
class Phase:
    """A step, and how many tasks it has."""

    name: str
    step: Any
    """A callable of (data, rank, world_size), or one of datatrove's steps."""
    tasks: int


class _Quiet:
    """Comes first in each pipeline: where it is unpickled, datatrove's own log is off. What matters is raised."""

    def __call__(self, data: None = None, rank: int = 0, world_size: int = 1) -> None:
        _quiet()

    def __setstate__(self, state: object) -> None:
        _quiet()

    def __getstate__(self) -> int:
        return 1


def _quiet() -> None:
    from loguru import logger

    logger.disable("datatrove")


def workers(settings: CurateSettings) -> int:
    """How many tasks run at once."""
    return settings.workers or len(os.sched_getaffinity(0))


def bucket_step(settings: CurateSettings, work: Path) -> Any:
    """The step that compares signatures bucket by bucket."""
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets

    config = MinhashConfig(
        n_grams=settings.minhash_words, num_buckets=settings.minhash_buckets, hashes_per_bucket=settings.minhash_hashes
    )
    return MinhashDedupBuckets(str(work / "signatures"), str(work / "pairs"), config=config, lines_to_buffer=1000)


def run_phases(phases: list[Phase], settings: CurateSettings, logs: Path, on_progress: Progress) -> dict[str, float]:
    """Run them one after the other; the seconds that each took. Raises where a task could not be done."""
    from loguru import logger

    seconds = {}
    total = sum(phase.tasks for phase in phases)
    _quiet()
    try:
        with _counting(logs, total, on_progress), _started(settings):
            for phase in phases:
                begun = time.perf_counter()
                _run(phase, settings, logs / phase.name)
                seconds[phase.name] = round(time.perf_counter() - begun, 3)
    finally:
        logger.enable("datatrove")
    on_progress(total, total)
    return seconds


def _run(phase: Phase, settings: CurateSettings, logs: Path) -> None:
    executor = _executor(phase, settings, logs)
    executor.run()
    if settings.executor == "slurm":  # which only submits
        while executor.get_incomplete_ranks():
            time.sleep(_POLL)
    if left := len(executor.get_incomplete_ranks()):
        raise GemmaryError(
            f"{left} of {phase.tasks} tasks of {phase.name} failed: their logs are in {logs}. What is done is kept; run again"
        )


def _executor(phase: Phase, settings: CurateSettings, logs: Path) -> Any:
    pipeline = [_Quiet(), phase.step]
    common = {"pipeline": pipeline, "tasks": phase.tasks, "logging_dir": str(logs)}
    most = min(workers(settings), phase.tasks)
    if settings.executor == "ray":
        from datatrove.executor.ray import RayPipelineExecutor

        return RayPipelineExecutor(**common, workers=most, mem_per_cpu_gb=0.5)
    if settings.executor == "slurm":
        from datatrove.executor.slurm import SlurmPipelineExecutor

        slurm = settings.slurm
        return SlurmPipelineExecutor(
            **common, workers=settings.workers or -1, job_name=f"gemmary-{phase.name}", partition=slurm.partition,
            time=slurm.time, qos=slurm.qos, mem_per_cpu_gb=slurm.memory_per_task, env_command=slurm.environment or None,
        )  # fmt: skip
    from datatrove.executor.local import LocalPipelineExecutor

    return LocalPipelineExecutor(**common, workers=most, start_method="forkserver")


@contextmanager
def _started(settings: CurateSettings) -> Iterator[None]:
    """What an executor needs beside it."""
    if settings.executor == "ray":
        with needed("ray", "ray"):
            import ray
        if not ray.is_initialized():
            ray.init(log_to_driver=False, include_dashboard=False)
        yield
        return
    import multiprocess

    # A fork of a process in which JAX has threads may hang; and modules are imported once, not in each worker.
    before = multiprocess.get_start_method(allow_none=True)
    multiprocess.set_start_method("forkserver", force=True)
    multiprocess.set_forkserver_preload(["gemmary.data.curation_steps", "datatrove.pipeline.dedup.minhash"])
    try:
        yield
    finally:
        multiprocess.set_start_method(before, force=True)


@contextmanager
def _counting(logs: Path, total: int, on_progress: Progress) -> Iterator[None]:
    """Say how many tasks are done while they run."""
    stop = threading.Event()

    def count() -> None:
        said = -1
        while not stop.wait(_POLL):
            if (done := sum(1 for _ in logs.glob("*/completions/*"))) != said:
                on_progress(done, total)
                said = done

    thread = threading.Thread(target=count, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
