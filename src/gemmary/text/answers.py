"""An answer's text as its tokens come: what may be shown already, and where a stop string ends it."""

from __future__ import annotations

from collections.abc import Sequence

from gemmary.errors import GemmaryError
from gemmary.text.tokenizer import Decoder, Tokenizer

__all__ = ["Answer"]


class Answer:
    """Tokens in, text out: what `push` gives, joined, is the answer's text.

    A character is given once it is whole, and text that might begin a stop string once it is known not to. `decoded` and
    `shown` count characters: those that tokens have made so far, and those given. `stopped` says that a stop string came;
    the text ended before it. Raises GemmaryError for an empty stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        if any(not stop for stop in stops):
            raise GemmaryError("a stop string is empty")
        self._decoder, self._stops, self._stop_ids = Decoder(tokenizer), stops, tokenizer.stop_ids
        self._held = ""
        self.decoded = self.shown = 0
        self.stopped = False

    def push(self, id: int, *, last: bool = False) -> str:
        """The text that may be shown after this token; after the `last` nothing is held back. A stop id is no text."""
        new = "" if id in self._stop_ids else self._decoder.push(id)
        if last:
            new += self._decoder.finish()
        self._held += new
        self.decoded += len(new)
        end, safe = _cut(self._held, self._stops)
        self.stopped = end is not None
        if last and not self.stopped:
            safe = len(self._held)
        text, self._held = self._held[:safe], self._held[safe:]
        self.shown += len(text)
        return text


def _cut(text: str, stops: Sequence[str]) -> tuple[int | None, int]:
    """Where the first stop string begins, if one is there; and how much of the text cannot be the beginning of one."""
    found = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    if found:
        return min(found), min(found)
    for start in range(max(len(text) - max(map(len, stops), default=0) + 1, 0), len(text)):
        if any(stop.startswith(text[start:]) for stop in stops):
            return None, start
    return None, len(text)
