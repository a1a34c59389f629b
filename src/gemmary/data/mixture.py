"""How much of each source at each point of a run, and which row is which: a function of the settings and a number.

Weights hold in stages and change over linearly, in a ramp about the stage's end. Shares are of rows, which are of equal
length, so of tokens. A run is cut into blocks of whole batches; at each block's end every source has had the
integral of its weight up to there, to within one row. Inside a block, rows come in an order given by the seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gemmary.data.packing import Int, shuffled
from gemmary.errors import GemmaryError

__all__ = ["Mixture", "MixtureSettings", "Stage"]

Float = npt.NDArray[np.float64]

_MOST_BLOCKS = 1 << 14
_BLOCKS = 0x626C6F636B73  # sets the orders inside blocks apart from those inside sources


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Weights of sources by name, of any positive sum, up to `until`, a share of the run."""

    weights: dict[str, float]
    until: float = 1.0


@dataclass(frozen=True, kw_only=True)
class MixtureSettings:
    """Stages in order, the last one `until` 1.0. Raises GemmaryError naming what is wrong, as `mixture.stage[1].until`."""

    stage: tuple[Stage, ...]
    ramp: float = 0.02
    """The change from a stage to the next takes this share of the run, half of it before `until`. 0: at once."""

    def __post_init__(self) -> None:
        if not self.stage:
            raise GemmaryError("mixture.stage: a mixture needs at least one stage, with the weights of its sources")
        before = 0.0
        for i, stage in enumerate(self.stage):
            where = f"mixture.stage[{i}]"
            for name, weight in stage.weights.items():
                if not (weight >= 0 and math.isfinite(weight)):
                    raise GemmaryError(f"{where}.weights.{name} is {weight}; a weight is 0 or more")
            if not sum(stage.weights.values()) > 0:
                raise GemmaryError(f"{where}.weights: at least one source needs a weight above 0")
            if not before < stage.until <= 1:
                raise GemmaryError(f"{where}.until is {stage.until}; stages end one after another, from 0 to 1.0")
            before = stage.until
        if before != 1:
            raise GemmaryError(f"mixture.stage[{len(self.stage) - 1}].until is {before}; the last stage ends at 1.0")
        if not (self.ramp >= 0 and (np.diff(self.knots) > -1e-12).all()):
            raise GemmaryError(f"mixture.ramp is {self.ramp}; it may be 0 to what the shortest stage has room for")

    @property
    def knots(self) -> Float:
        """Where the weights' slopes change, as shares of the run."""
        turns = [stage.until + side * self.ramp / 2 for stage in self.stage[:-1] for side in (-1, 1)]
        return np.array([0.0, *turns, 1.0])

    @property
    def names(self) -> tuple[str, ...]:
        """Sources that have a weight anywhere, sorted."""
        return tuple(sorted({name for stage in self.stage for name, weight in stage.weights.items() if weight}))

    def check_sources(self, known: Iterable[str]) -> None:
        """Raises GemmaryError for a weight of a source that is not among the known."""
        known = sorted(known)
        for i, stage in enumerate(self.stage):
            for name in stage.weights:
                if name not in known:
                    raise GemmaryError(
                        f"mixture.stage[{i}].weights.{name}: no such source; there are {', '.join(known)}"
                    )

    def weights(self, progress: float) -> dict[str, float]:
        """The shares at a point of the run, 0 to 1; their sum is 1."""
        shares = [np.interp(progress, self.knots, column) for column in self._at_knots().T]
        return dict(zip(self.names, map(float, shares), strict=True))

    def integral(self, progress: Float) -> Float:
        """The weights [S] summed from the run's beginning to each progress [P]: [P, S], with rows that sum to it."""
        knots, at = self.knots, self._at_knots()
        widths = np.diff(knots)[:, None]
        whole = np.concatenate([np.zeros((1, at.shape[1])), np.cumsum(widths * (at[1:] + at[:-1]) / 2, axis=0)])
        slopes = np.diff(at, axis=0) / np.where(widths > 0, widths, 1)
        part = np.clip(np.searchsorted(knots, progress, side="right") - 1, 0, len(widths) - 1)
        past = (progress - knots[part])[:, None]
        return np.asarray(whole[part] + past * at[part] + past**2 * slopes[part] / 2)

    def _at_knots(self) -> Float:
        """Shares [knots, S]: each stage's, at its beginning and at its end."""
        rows = [[stage.weights.get(name, 0.0) for name in self.names] for stage in self.stage for _ in range(2)]
        shares = np.array(rows)
        return np.asarray(shares / shares.sum(axis=1, keepdims=True))


class Mixture:
    """Source and row number of every row of a run of `steps` batches."""

    def __init__(self, settings: MixtureSettings, *, batch: int, steps: int, seed: int) -> None:
        self.names: Sequence[str] = settings.names
        self._batch, self._seed = batch, seed
        # As small as a table of blocks allows: in runs of up to 16,384 steps, every batch has its exact mixture.
        self._per_block = -(-steps // _MOST_BLOCKS)
        ends = np.minimum(np.arange(-(-steps // self._per_block) + 1) * self._per_block, steps) * batch
        self._counts = _counts(settings.integral(ends / ends[-1]) * ends[-1], ends)

    def rows(self, index: int) -> tuple[Int, Int]:
        """Of each row [B] of a batch: its source, as a place in `names`, and its number in that source."""
        sources, numbers = self._block(index // self._per_block)
        at = index % self._per_block * self._batch
        return sources[at : at + self._batch], numbers[at : at + self._batch]

    def before(self, index: int) -> Int:
        """How many rows [S] of each source come before a batch; at `steps`, in the whole run."""
        block, at = divmod(index, self._per_block)
        counts: Int = self._counts[block]
        if at:
            counts = counts + np.bincount(self._block(block)[0][: at * self._batch], minlength=len(self.names))
        return counts

    def _block(self, block: int) -> tuple[Int, Int]:
        first, last = self._counts[block : block + 2]
        sources = np.repeat(np.arange(len(self.names)), last - first)
        sources = sources[shuffled(len(sources), self._seed, _BLOCKS, block)]
        numbers = np.empty_like(sources)
        for source in range(len(self.names)):  # numbers rise as rows come
            numbers[sources == source] = np.arange(first[source], last[source])
        return sources, numbers


def _counts(ideal: Float, ends: Int) -> Int:
    """Whole numbers [blocks + 1, S] below or above the ideal ones by less than 1, never falling, rows summing to `ends`.

    That such numbers exist is the integrality of flows; a source's next row is due where its ideal reaches it, and
    giving what is free to those due earliest finds them (Steiner and Yeomans 1993, doi 10.1287/mnsc.39.6.728).
    """
    ideal = np.round(ideal, 6)  # so that a whole number is one
    least, most = np.floor(ideal).astype(np.int64), np.ceil(ideal).astype(np.int64)
    due = np.stack([np.searchsorted(x, low + 1) for x, low in zip(ideal.T, least.T, strict=True)], axis=1)
    counts = np.zeros(least.shape, np.int64)
    for block in range(1, len(ends)):
        now = np.maximum(counts[block - 1], least[block])
        free = np.flatnonzero(now < most[block])
        now[free[np.argsort(due[block, free], kind="stable")[: ends[block] - now.sum()]]] += 1
        counts[block] = now
    assert (counts.sum(axis=1) == ends).all()
    return counts
