"""Who owns which page of the cache, and what pages hold: long and short texts share memory, equal beginnings are kept once.

Layers that see everything have a page for every 64 positions of a text; layers with a window have those that the window
still reaches. A page whose 64 tokens are complete is known by a digest of all tokens up to its end, so that a text that begins
alike finds it; pages that nobody holds keep their content until they are needed, the longest unused first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from gemmary.config import Config
from gemmary.errors import GemmaryError
from gemmary.model.pages import PAGE, page_bytes

__all__ = ["Holding", "Memory", "plan_pages"]


class _Pages:
    """The pages of one kind of layer."""

    def __init__(self, count: int) -> None:
        self._free = list(range(count - 1, -1, -1))
        self._holders = [0] * count
        self._by_digest: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self.count, self.promised = count, 0

    @property
    def available(self) -> int:
        """Pages that nobody holds and nobody was promised."""
        return len(self._free) + len(self._idle) - self.promised

    def take(self) -> int:
        """A page for new content, out of those promised."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            del self._by_digest[self._digests.pop(page)]
        self._holders[page] = 1
        self.promised -= 1
        return page

    def find(self, digest: bytes) -> int | None:
        return self._by_digest.get(digest)

    def hold(self, page: int) -> None:
        self._idle.pop(page, None)
        self._holders[page] += 1

    def is_idle(self, page: int) -> bool:
        return page in self._idle

    def name(self, page: int, digest: bytes) -> None:
        """Its content is complete. Where another page has the same, that one stays known."""
        if page not in self._digests and digest not in self._by_digest:
            self._by_digest[digest], self._digests[page] = page, digest

    def release(self, page: int) -> None:
        self._holders[page] -= 1
        if self._holders[page] == 0:
            if page in self._digests:
                self._idle[page] = None
            else:
                self._free.append(page)


@dataclass
class Holding:
    """What one text holds. `far` and `near` name its pages, place by place (-1: none); `cached` tokens were there already."""

    far: list[int]
    near: list[int]
    cached: int
    digests: list[bytes] = field(default_factory=list)
    owed: int = 0
    """Near pages that it was promised and has not taken."""


def plan_pages(config: Config, dtype: object, memory: int, slots: int, chunk: int) -> tuple[int, int]:
    """How many pages the layers without a window have, and those with one, in `memory` bytes.

    Windows get what `slots` texts need at once, and as much again for beginnings that are kept. Raises GemmaryError where not even
    one text of one page has room.
    """
    windows = [kind.window for kind in config.layer_kinds()]
    far_layers, near_layers = windows.count(None), len(windows) - windows.count(None)
    one = page_bytes(config, dtype)
    longest = -(-config.context // PAGE)
    most_near = 2 * slots * min(_near_need(config, chunk), longest) if near_layers else 0
    near_bytes = near_layers * one
    near = min(most_near, memory // (2 * near_bytes) if far_layers else memory // near_bytes) if near_layers else 0
    far = min((memory - near * near_bytes) // (far_layers * one), slots * longest) if far_layers else 0
    if (far_layers and far < 1) or (near_layers and near < min(_near_need(config, chunk), longest)):
        least = far_layers * one + 2 * near_layers * one * min(_near_need(config, chunk), longest)
        raise GemmaryError(
            f"the cache has {memory / 1e6:.0f} MB and needs at least {least / 1e6:.0f}: give it more memory"
        )
    return int(far), int(near)


def _near_need(config: Config, chunk: int) -> int:
    """Pages that a window layer needs while a text is read in chunks."""
    return ((config.window or 0) + chunk) // PAGE + 2


class Memory:
    """The pages of a model. Not for several threads at once."""

    def __init__(self, config: Config, far: int, near: int, chunk: int) -> None:
        windows = [kind.window for kind in config.layer_kinds()]
        self._has_far, self._has_near = None in windows, any(window is not None for window in windows)
        self._window, self._need = config.window or 0, _near_need(config, chunk)
        self._far, self._near = _Pages(far), _Pages(near)
        self.longest = min(config.context, far * PAGE) if self._has_far else config.context
        """Tokens of the longest text that there is room for."""

    def begin(self, prompt: Sequence[int], length: int) -> Holding | None:
        """Pages for a text that begins with `prompt` and may grow to `length`; None where there is no room now.

        `length` is at most `longest`. The last token of the prompt is never taken from what is kept: it must be read.
        """
        digests = _digests(prompt[: (len(prompt) - 1) // PAGE * PAGE])
        found = self._known(digests)
        total = -(-length // PAGE)
        shared_far = [self._far.find(d) for d in digests[:found]] if self._has_far else []
        shared_near = self._near_pages(digests, found)
        kept = [page for page in shared_far if page is not None]
        near_kept = [page for page in shared_near if page >= 0]
        need_far = total - found if self._has_far else 0
        need_near = max(min(total, self._need) - len(near_kept), 0) if self._has_near else 0
        # Idle pages that are shared are no longer there for others to take.
        room_far = self._far.available - sum(map(self._far.is_idle, kept))
        room_near = self._near.available - sum(map(self._near.is_idle, near_kept))
        if need_far > room_far or need_near > room_near:
            return None
        for page in kept:
            self._far.hold(page)
        for page in near_kept:
            self._near.hold(page)
        self._far.promised += need_far
        self._near.promised += need_near
        far = kept + [self._far.take() for _ in range(need_far)]
        near = shared_near + [-1] * (total - found) if self._has_near else []
        return Holding(far, near, found * PAGE, list(digests[:found]), need_near)

    def _known(self, digests: Sequence[bytes]) -> int:
        """How many pages of a beginning can be taken as they are."""
        count = len(digests)
        if self._has_far:
            count = next((i for i, digest in enumerate(digests) if self._far.find(digest) is None), count)
        while count and self._has_near and -1 in self._near_pages(digests, count)[self._first_near(count * PAGE) :]:
            count -= 1
        return count

    def _first_near(self, position: int) -> int:
        """The first page that a window still reaches from that position on."""
        return max(position - self._window + 1, 0) // PAGE

    def _near_pages(self, digests: Sequence[bytes], count: int) -> list[int]:
        if not self._has_near:
            return []
        first = self._first_near(count * PAGE)
        found = [self._near.find(digest) for digest in digests[first:count]]
        return [-1] * first + [-1 if page is None else page for page in found]

    def advance(self, holding: Holding, start: int, end: int) -> None:
        """Before positions from `start` up to `end` are written: take the window's pages for them, give back those out of reach."""
        if not self._has_near:
            return
        for i in range(self._first_near(start)):
            if holding.near[i] >= 0:
                self._near.release(holding.near[i])
                holding.near[i] = -1
                self._near.promised += 1
                holding.owed += 1
        for i in range(start // PAGE, -(-end // PAGE)):
            if holding.near[i] < 0:
                holding.near[i] = self._near.take()
                holding.owed -= 1

    def record(self, holding: Holding, tokens: Sequence[int]) -> None:
        """The first tokens of the text are in the cache: pages that they complete can be found from now on."""
        for i in range(len(holding.digests), len(tokens) // PAGE):
            digest = _digest(holding.digests[-1] if i else b"", tokens[i * PAGE : (i + 1) * PAGE])
            holding.digests.append(digest)
            if self._has_far:
                self._far.name(holding.far[i], digest)
            if self._has_near and holding.near[i] >= 0:
                self._near.name(holding.near[i], digest)

    def end(self, holding: Holding) -> None:
        """Give everything back."""
        for page in reversed(holding.far):  # a beginning is of use without its end, an end is not
            self._far.release(page)
        for page in reversed(holding.near):
            if page >= 0:
                self._near.release(page)
        self._near.promised -= holding.owed
        holding.far, holding.near, holding.owed = [], [], 0

    def tables(self, holdings: Sequence[Holding | None], width: int) -> tuple[np.ndarray, np.ndarray]:
        """The pages of each row, int32 [B, width], of layers without and with a window."""
        far, near = (np.full((len(holdings), width), -1, np.int32) for _ in range(2))
        for row, holding in enumerate(holdings):
            if holding is not None:
                far[row, : len(holding.far)] = holding.far[:width]
                near[row, : len(holding.near)] = holding.near[:width]
        return far, near


def _digest(before: bytes, tokens: Sequence[int]) -> bytes:
    return hashlib.blake2b(before + np.asarray(tokens, np.int32).tobytes(), digest_size=16).digest()


def _digests(tokens: Sequence[int]) -> list[bytes]:
    digests = list[bytes]()
    for start in range(0, len(tokens), PAGE):
        digests.append(_digest(digests[-1] if digests else b"", tokens[start : start + PAGE]))
    return digests
