"""What continuous batching asks of the device: read a chunk of a prompt, draw a token for each of some slots.

Shapes are few: steps of 1, 2, 4, … slots, chunks of a few widths. The cache and the histories are donated from call to call.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from gemmary.config import Config
from gemmary.infer.engine import Engine, Token
from gemmary.infer.memory import Holding, Memory, plan_pages
from gemmary.infer.sampling import GREEDY, Drawn, Rows, Sampling, recorded, rows_of, sample, seen_in
from gemmary.model.attention import Marks
from gemmary.model.pages import PAGE, PagedLayer, Pool, init_pool, page_bytes
from gemmary.model.transformer import hidden, logits
from gemmary.params import Params

__all__ = ["Entry", "Grammar", "Pending", "Request", "Steps"]

_WIDTHS = (16, 64, 256, 512)
_PAGES = 32
_TOP = 20
_MODERATE = 8192
"""Tokens that every slot has room for where no memory was named."""


class Grammar(Protocol):
    """What an answer may be, token by token."""

    def mask(self) -> np.ndarray:
        """Which tokens may come next: one bit each, uint32, from the lowest bit up."""

    def accept(self, token: int) -> None:
        """That token came."""

    def done(self) -> bool:
        """Whether the answer is complete and nothing may follow."""


@dataclass(frozen=True)
class Request:
    """A prompt to continue. `bias` is added to logits; requests of different `client`s take turns."""

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = GREEDY
    stop_ids: tuple[int, ...] = ()
    top_logprobs: int = 0
    bias: Mapping[int, float] = field(default_factory=dict)
    grammar: Grammar | None = None
    client: str = ""


class Entry(NamedTuple):
    """One row of a step: its slot, request and pages, the position that is fed, and the token: -1 is what was drawn last.

    A slot may have several rows, of consecutive positions: each sees those before it.
    """

    slot: int
    request: Request
    holding: Holding
    position: int
    token: int = -1


class Pending(NamedTuple):
    """A step on its way: what it draws, and for whom."""

    drawn: Drawn
    requests: Sequence[Request]

    def tokens(self) -> list[Token]:
        """Wait for it."""
        ids, logprobs, top_ids, top = (np.asarray(part) for part in self.drawn)
        found = []
        for row, request in enumerate(self.requests):
            count = request.top_logprobs
            best = tuple(zip(top_ids[row, :count].tolist(), top[row, :count].tolist(), strict=True))
            found.append(Token(row, int(ids[row]), float(logprobs[row]), best, None))
        return found


class Steps:
    """The device's side of a batcher with `slots`: pages of `memory` bytes, and what was drawn in each slot.

    A step has at most `widest` rows: one for each slot, or one slot's with `guesses` behind it.
    """

    def __init__(self, engine: Engine, slots: int, memory: int | None, *, guesses: int = 0) -> None:
        self._engine, self._slots = engine, slots
        self.widest = max(slots, guesses + 1)
        self.chunk, self.small_chunk = min(engine.chunk, _WIDTHS[-1]), _WIDTHS[-2]
        self.num_tokens = engine.num_tokens or engine.config.num_tokens
        if memory is None:
            length = min(engine.config.context, _MODERATE)
            layers = [kind.window for kind in engine.config.layer_kinds()]
            window = (engine.config.window or 0) + self.chunk
            one = page_bytes(engine.config, engine.dtype)
            near = sum(2 * (min(window, length) // PAGE + 2) * one for w in layers if w is not None)
            memory = slots * (near + layers.count(None) * math.ceil(length / PAGE) * one)
        self._counts = plan_pages(engine.config, engine.dtype, memory, slots, self.chunk)
        self._width = math.ceil(engine.config.context / PAGE)
        self.reset()

    def reset(self) -> None:
        """Begin with an empty cache."""
        config, dtype = self._engine.config, self._engine.dtype
        far, near = self._counts
        self.memory = Memory(config, far, near, self.chunk)
        self._pools = tuple(init_pool(config, far if k.window is None else near, dtype) for k in config.layer_kinds())
        self._history = jnp.zeros((self._slots, config.vocab_size), jnp.int32)
        self._hidden = jnp.zeros(config.embed_dim, dtype)
        self._last = jnp.zeros(self._slots, jnp.int32)

    def read(self, holding: Holding | None, tokens: Sequence[int], start: int, end: int) -> None:
        """Tokens [start, end) of a text, into its pages; the hidden state of the last stays at hand for `first`."""
        count = end - start
        width = next(width for width in _WIDTHS if width >= count)
        ids = np.zeros((1, width), np.int32)
        positions = np.full((1, width), -1, np.int32)
        ids[0, :count], positions[0, :count] = tokens[start:end], np.arange(start, end)
        first = start == 0 and width > _WIDTHS[0]  # the narrowest sees the pages as they lie, first or not
        table_width = self._width if first or width <= _WIDTHS[0] else self._side_by_side(end)
        tables = self.memory.tables([holding], table_width)
        self._hidden, self._pools = _read(
            self._engine.config, self._engine.dtype, first, self._engine.params, self._pools, tables, ids, positions,
            np.int32(count - 1),
        )  # fmt: skip

    def _side_by_side(self, end: int) -> int:
        """How many pages are laid side by side for a chunk that ends there and sees earlier ones: one of few numbers."""
        return next(width for width in self._tables() if width * PAGE >= end)

    def _tables(self) -> list[int]:
        most, found = min(self._width, -(-self.memory.longest // PAGE)), [_PAGES]
        while found[-1] < most:
            found.append(4 * found[-1])
        return [min(width, self._width) for width in found]

    def begin(self, slot: int, request: Request) -> None:
        """A slot's history is that of a new request."""
        vocabulary = self._engine.config.vocab_size
        self._history = _put(self._history, np.int32(slot), seen_in(request.prompt, vocabulary))

    def first(self, slot: int, request: Request, position: int) -> Pending:
        """The first token after the prompt that was read last."""
        return self._draw(self._hidden[None], [request], np.array([slot], np.int32), np.array([position], np.int32))

    def next(self, entries: Sequence[Entry]) -> Pending:
        """A step for each: a token is fed at its position, and the next one drawn.

        After several rows of a slot its next token must be named: what was drawn last is that of any of them.
        """
        idle = min(_power(len(entries)), self.widest) - len(entries)
        slots = np.array([entry.slot for entry in entries] + [self._slots] * idle, np.int32)  # past the last: nobody's
        at = np.array([entry.position for entry in entries] + [-1] * idle, np.int32)
        fed = np.array([entry.token for entry in entries] + [-1] * idle, np.int32)
        tables = self.memory.tables([entry.holding for entry in entries] + [None] * idle, self._width)
        x, self._pools = _feed(
            self._engine.config,
            self._engine.dtype,
            self._engine.params,
            self._pools,
            self._last,
            tables,
            slots,
            at,
            fed,
        )
        return self._draw(x, [entry.request for entry in entries], slots, at)

    def _draw(self, x: jax.Array, requests: Sequence[Request], slots: np.ndarray, at: np.ndarray) -> Pending:
        """A token for each hidden state [B, D]. It is apart from the model, whose step need not be compiled for every way to draw."""
        rows = rows_of([request.sampling for request in requests] + [GREEDY] * (len(slots) - len(requests)))
        bias = self._biases(requests, len(slots))
        top = _TOP if any(request.top_logprobs for request in requests) else 0
        drawn, self._history, self._last = _drawn(
            self._engine.config, self.num_tokens, top, self._engine.params, x, self._history, self._last, slots, at, rows, bias
        )  # fmt: skip
        return Pending(drawn, requests)

    def _biases(self, requests: Sequence[Request], size: int) -> np.ndarray | None:
        """What is added to the logits of each row, where any has something to add."""
        if not any(request.bias or request.grammar is not None for request in requests):
            return None
        bias = np.zeros((size, self._engine.config.vocab_size), np.float32)
        for row, request in enumerate(requests):
            for token, value in request.bias.items():
                bias[row, token] = value
            if request.grammar is not None:
                bits = np.unpackbits(request.grammar.mask().view(np.uint8), bitorder="little")[: bias.shape[1]]
                bias[row, : len(bits)][bits == 0] = -np.inf
                bias[row, len(bits) :] = -np.inf
        return bias

    def warm_up(self, on_progress: Callable[[int, int], None]) -> None:
        """Compile: every size of step and way to draw, and every width of a chunk, at a text's beginning and later."""
        sizes = [1 << i for i in range((self.widest - 1).bit_length())] + [self.widest]
        ways = [Request([0], 1, top_logprobs=top, bias=bias) for top in (0, 1) for bias in ({}, {0: 0.0})]
        chunks = [(0, width) for width in _WIDTHS if width <= self.chunk]
        wide = [width for _, width in chunks if _WIDTHS[0] < width <= self.small_chunk]
        chunks += [(pages * PAGE - width, width) for pages in self._tables() for width in wide if pages * PAGE > width]
        total = len(sizes) * len(ways) + len(chunks)
        done = itertools.count(1)
        for start, width in chunks:
            self.read(None, [0] * (start + width), start, start + width)
            on_progress(next(done), total)
        for size in sizes:
            for way in ways:
                self.next([Entry(self._slots, way, Holding([], [], 0), -1)] * size).tokens()
                on_progress(next(done), total)


def _power(count: int) -> int:
    """The next power of two."""
    return 1 << max(count - 1, 0).bit_length()


def _caches(config: Config, pools: tuple[Pool, ...], tables: tuple[Any, Any]) -> tuple[PagedLayer, ...]:
    far, near = (jnp.asarray(table) for table in tables)
    kinds = config.layer_kinds()
    return tuple(
        PagedLayer(pool, far if kind.window is None else near) for pool, kind in zip(pools, kinds, strict=True)
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(4,))
def _read(
    config: Config, dtype: Any, first: bool, params: Params, pools: tuple[Pool, ...], tables: Any, ids: Any,
    positions: Any, last: Any,
) -> tuple[jax.Array, tuple[Pool, ...]]:  # fmt: skip
    x, written = hidden(params, config, ids, Marks(positions), _caches(config, pools, tables), first=first, dtype=dtype)
    return x[0, last], tuple(layer.pool for layer in written)


@functools.partial(jax.jit, donate_argnums=(0,))
def _put(histories: jax.Array, slot: Any, history: Any) -> jax.Array:
    return histories.at[slot].set(history)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3,))
def _feed(
    config: Config, dtype: Any, params: Params, pools: tuple[Pool, ...], last: jax.Array, tables: Any, slots: Any, at: Any,
    fed: Any,
) -> tuple[jax.Array, tuple[Pool, ...]]:  # fmt: skip
    ids = jnp.where(fed < 0, last.at[slots].get(mode="clip"), fed)[:, None]
    x, written = hidden(params, config, ids, Marks(at[:, None]), _caches(config, pools, tables), dtype=dtype)
    return x[:, 0], tuple(layer.pool for layer in written)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(5, 6))
def _drawn(
    config: Config, num_tokens: int, top: int, params: Params, x: jax.Array, history: jax.Array, last: jax.Array,
    slots: Any, at: Any, rows: Rows, bias: Any,
) -> tuple[Drawn, jax.Array, jax.Array]:  # fmt: skip
    found = logits(params, config, x[:, None])[:, 0]
    drawn = sample(found, rows, lambda: history.at[slots].get(mode="clip"), at, num_tokens, top=top, bias=bias)
    return drawn, recorded(history, drawn.ids, slots), last.at[slots].set(drawn.ids, mode="drop")
