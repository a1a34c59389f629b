"""Batches of a mixture, delivered by Grain ahead of need: by threads, or by worker processes.

A batch is a function of its index, so the position of a run is one number: batches go on from any index, with any number
of workers, and every process of a large run can take its own rows. What else the order depends on is written into the
state, and a state of another order is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from gemmary.data.mixture import Mixture, MixtureSettings, Stage
from gemmary.data.packing import Packed, stacked
from gemmary.data.tokens import Tokens
from gemmary.data.turns import Rows
from gemmary.errors import GemmaryError

__all__ = ["BatchSource", "Batches", "mixture_batches", "row_batches"]

_AHEAD = 4  # batches that are made before they are asked for, by each worker


class BatchSource:
    """Batch i of a run, made when asked for: all of its rows, or those that are asked of this process."""

    def __init__(
        self, mixture: Mixture, packed: Mapping[str, Rows], steps: int, rows: Sequence[int] | None = None
    ) -> None:
        self._mixture, self._steps = mixture, steps
        self._rows = slice(None) if rows is None else list(rows)
        self._packed = [packed[name] for name in mixture.names]

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, index: int) -> Any:
        sources, numbers = (array[self._rows].tolist() for array in self._mixture.rows(index))
        return stacked([self._packed[source][number] for source, number in zip(sources, numbers, strict=True)])


class Batches(Iterator[Any]):
    """The batches of a run from the first to the last, or from where `restore` puts it: named tuples of arrays."""

    def __init__(
        self, mixture: Mixture, packed: Mapping[str, Rows], source: BatchSource, order: dict[str, Any], workers: int
    ) -> None:
        self._mixture, self._packed, self._source = mixture, packed, source
        self._workers, self._next = workers, 0
        self._running: Any = None
        text = json.dumps(order, sort_keys=True)
        self._order: dict[str, Any] = json.loads(text)  # as a state is that went through a file
        self.digest = hashlib.sha256(text.encode()).hexdigest()
        """SHA-256 of all that the order of the batches depends on."""

    def __next__(self) -> Any:
        if self._next == len(self._source):
            self.close()
            raise StopIteration
        if self._running is None:
            self._running = _deliver(self._source, self._next, self._workers)
        try:
            batch = next(self._running)
        except BaseException:
            self.close()  # Grain would go on behind the batch that failed; we ask for it again
            raise
        self._next += 1
        return batch

    def state(self) -> dict[str, Any]:
        """Where the next batch is, as data for JSON."""
        return {"next": self._next, "order": self._order}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state. Raises GemmaryError, naming what differs, for one of another order."""
        index, order = state.get("next"), state.get("order")
        if type(index) is not int or not 0 <= index <= len(self._source) or not isinstance(order, Mapping):
            raise GemmaryError(
                f"the data position {index!r} is not one of these {len(self._source)} batches: it is damaged"
            )
        names = {*self._order, *order}
        if other := sorted(name for name in names if self._order.get(name) != order.get(name)):
            raise GemmaryError(
                f"the data are not those that this run began with ({', '.join(other)} differ): "
                "put them back as they were, or begin a new run"
            )
        self.close()
        self._next = index

    def shares(self) -> dict[str, float]:
        """The share of each source in the tokens so far, padding left out."""
        slots, padding = self._slots()
        total = max(sum(slots.values()) - sum(padding.values()), 1)
        return {name: (slots[name] - padding[name]) / total for name in slots}

    def padding(self) -> float:
        """The share of padding in the slots so far."""
        slots, padding = self._slots()
        return sum(padding.values()) / max(sum(slots.values()), 1)

    def epochs(self) -> dict[str, float]:
        """How often the whole run goes through each source."""
        rows = self._mixture.before(len(self._source)).tolist()
        return {name: count / self._packed[name].rows for name, count in zip(self._mixture.names, rows, strict=True)}

    def close(self) -> None:
        """Ends the workers; they start again when a batch is asked for."""
        if self._running is not None:
            self._running.close()
            self._running = None

    def _slots(self) -> tuple[dict[str, int], dict[str, int]]:
        """Of each source so far: slots, and those of them that are padding."""
        rows = dict(zip(self._mixture.names, self._mixture.before(self._next).tolist(), strict=True))
        slots: dict[str, int] = {name: n * self._order["length"] for name, n in rows.items()}
        return slots, {name: self._packed[name].padding(n) for name, n in rows.items()}


def _deliver(source: BatchSource, start: int, workers: int) -> Any:
    """Grain's iterator over the batches from `start` on."""
    try:
        import grain
        from absl import flags
    except ImportError:
        raise GemmaryError("batches come through Grain, which is not installed: pip install 'gemmary[data]'") from None
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain's workers ask for a flag, and we take none from the command line
    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_AHEAD)
    batches = grain.MapDataset.source(source)[start:].to_iter_dataset(ahead)
    if workers:
        options = grain.multiprocessing.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=_AHEAD)
        batches = batches.mp_prefetch(options)
    return iter(batches)


def mixture_batches(
    settings: MixtureSettings,
    sources: Mapping[str, Tokens],
    *,
    length: int,
    batch: int,
    steps: int,
    seed: int,
    bos: int,
    eos: int,
    pad: int,
    workers: int = 0,
    rows: Sequence[int] | None = None,
) -> Batches:
    """`steps` batches [batch, length] of the sources, by name; or `rows` of each, in that order, as one process of many needs them.

    `workers` processes make batches ahead; 0 leaves it to a thread. A source goes round again as often as its weight
    wants (see `Batches.epochs`). Raises GemmaryError, naming the setting or the source, for what cannot be.
    """
    _check(length=(length, 2), batch=(batch, 1), steps=(steps, 1), seed=(seed, 0), workers=(workers, 0))
    _check_rows(rows, batch)
    settings.check_sources(sources)
    used = {name: sources[name] for name in settings.names}
    tokenizers = {tokens.info.tokenizer for tokens in used.values()}
    if len(tokenizers) > 1:
        raise GemmaryError(f"{', '.join(used)} were tokenized by different tokenizers: write their tokens again")
    ids = {"bos": bos, "eos": eos, "pad": pad}
    order = {"length": length, "batch": batch, "steps": steps, "seed": seed, "mixture": asdict(settings), **ids}
    order |= {"tokenizer": tokenizers.pop(), **{f"source {name}": tokens.digest for name, tokens in used.items()}}
    mixture = Mixture(settings, batch=batch, steps=steps, seed=seed)
    packed = {name: Packed(tokens, name, length=length, seed=seed, **ids) for name, tokens in used.items()}
    return Batches(mixture, packed, BatchSource(mixture, packed, steps, rows), order, workers)


def row_batches(
    packed: Mapping[str, Rows],
    weights: Mapping[str, float],
    order: Mapping[str, Any],
    *,
    length: int,
    batch: int,
    steps: int,
    seed: int,
    rows: Sequence[int] | None = None,
) -> Batches:
    """`steps` batches of rows that are made already (or `rows` of each); a source's share is its rows times its weight.

    `order` is what else their order depends on, the digests of what is packed above all.
    """
    _check(batch=(batch, 1), steps=(steps, 1), seed=(seed, 0))
    _check_rows(rows, batch)
    shares = {name: one.rows * weights[name] for name, one in packed.items()}
    settings = MixtureSettings(stage=(Stage(weights=shares),))
    used = {name: packed[name] for name in settings.names}
    mixture = Mixture(settings, batch=batch, steps=steps, seed=seed)
    whole = {"length": length, "batch": batch, "steps": steps, "seed": seed, "mixture": asdict(settings), **order}
    return Batches(mixture, used, BatchSource(mixture, used, steps, rows), whole, 0)


def _check(**settings: tuple[int, int]) -> None:
    for name, (value, least) in settings.items():
        if value < least:
            raise GemmaryError(f"{name} is {value}; it is at least {least}")


def _check_rows(rows: Sequence[int] | None, batch: int) -> None:
    if rows is not None and not (rows and 0 <= min(rows) <= max(rows) < batch):
        raise GemmaryError(f"rows {list(rows)[:8]} are not some of a batch of {batch}")
