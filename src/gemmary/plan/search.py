"""Layouts of one model on the same chips, tried and ranked: how the mesh is split, what is made again, how a step is taken in parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

from gemmary.errors import GemmaryError
from gemmary.model.transformer import Remat
from gemmary.plan.arithmetic import memory_estimate
from gemmary.plan.job import Job
from gemmary.plan.planned import Plan, estimated, plan

__all__ = ["candidates", "nearest", "search"]

_REMATS: tuple[Remat, ...] = ("dots", "ffw", "layers")
_SLACK = 1.3  # an estimate of memory that is over by so much may still be wrong


def candidates(job: Job) -> list[Job]:
    """The layouts whose rows divide and whose memory is not out of the question, the most promising by arithmetic first."""
    chips = job.topology.chips
    splits = [n for n in (1, 2, 4, 8, 16, 32) if chips % n == 0 and n <= chips]
    found = []
    for model, remat, parts in product(splits, _REMATS, (1, 2, 4)):
        data = chips // model
        if job.rows % (job.slices * data * parts):
            continue
        one = replace(job, data=data, model=model, remat=remat, accumulate=parts)
        if sum(memory_estimate(one).values()) < _SLACK * float(job.topology.chip.memory):
            found.append(one)
    return sorted(found, key=lambda one: estimated(one).time.total)


def search(
    job: Job,
    *,
    most: int,
    tokens: float | None = None,
    grid: str = "us",
    compiling: bool = True,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Plan]:
    """Plans of the `most` most promising layouts, the quickest that fits first, those that do not fit last.

    Raises GemmaryError where no layout divides the step.
    """
    tried = candidates(job)[:most]
    if not tried:
        raise GemmaryError(
            f"no layout of {job.topology} takes {job.rows} rows over {job.slices} slices: take more tokens a step, or shorter rows"
        )
    made = []
    for i, one in enumerate(tried):
        progress(i, len(tried))
        made.append(plan(one, tokens=tokens, grid=grid, compiling=compiling, say=say))
    progress(len(tried), len(tried))
    return sorted(made, key=lambda found: (not found.fits, found.time.total))


def nearest(job: Job) -> str:
    """What to change so that the step fits, by arithmetic, in a few words."""
    if not job.trains:
        return "fewer rows, a shorter context or more chips along model would do"
    room = float(job.topology.chip.memory) * 0.9
    fitting = [one for one in candidates(job) if sum(memory_estimate(one).values()) < room and _far(one, job)]
    if not fitting:
        return "take more chips, shorter rows, or fewer tokens a step"
    found = min(fitting, key=lambda one: _far(one, job))
    changed = [
        f"--remat {found.remat}" if found.remat != job.remat else "",
        f"--accumulate {found.accumulate}" if found.accumulate != job.accumulate else "",
        f"--mesh data={found.data},model={found.model}" if found.model != job.model else "",
    ]
    return f"{' '.join(part for part in changed if part)} would do"


def _far(one: Job, other: Job) -> int:
    """How many of an option's choices are others; the mesh counts most, for it changes what a run is."""
    return (one.remat != other.remat) + (one.accumulate != other.accumulate) + 3 * (one.model != other.model)
