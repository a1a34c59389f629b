"""Guesses for requests that are answered together: what a text said before, or what a smaller model says.

They make an answer faster and not another one: a guess is fed beside the last token, in a row of its own, and counts only where it is
what was drawn (`infer.speculation`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

from gemmary.infer.engine import Engine
from gemmary.infer.memory import Holding
from gemmary.infer.speculation import LookUp
from gemmary.infer.steps import Entry, Request, Steps

__all__ = ["GUESSES", "Drafts", "Guessers", "LookUps", "Text"]

GUESSES = 3
"""Tokens guessed for a request at most: a step of four rows takes twice as long as one of a single row (CPU kernels, 270M)."""

_GREEDY = Request([0], 1)


class Text(NamedTuple):
    """A request's slot, its tokens so far, and how many guesses it can take."""

    slot: int
    tokens: Sequence[int]
    most: int


@runtime_checkable
class Guessers(Protocol):
    """Guesses for the requests in some slots."""

    def begin(self, slot: int, prompt: Sequence[int], room: int) -> None:
        """A request came into a slot; with its answer it has at most `room` tokens."""

    def guess(self, texts: Sequence[Text]) -> list[list[int]]:
        """For each at most so many tokens as it can take, or none."""

    def end(self, slot: int) -> None:
        """A request left its slot; one that never began may be named."""

    def reset(self) -> None:
        """Forget every text: something failed."""

    def warm_up(self) -> None:
        """Compile what guessing needs."""


class LookUps:
    """What followed the last tokens of each text when they last came in it."""

    def __init__(self) -> None:
        self._of: dict[int, LookUp] = {}

    def begin(self, slot: int, prompt: Sequence[int], room: int) -> None:
        """As `Guessers` says."""
        self._of[slot] = LookUp()

    def guess(self, texts: Sequence[Text]) -> list[list[int]]:
        """As `Guessers` says."""
        return [self._of[text.slot].guess(text.tokens, text.most) for text in texts]

    def end(self, slot: int) -> None:
        """As `Guessers` says."""
        self._of.pop(slot, None)

    def reset(self) -> None:
        """As `Guessers` says."""
        self._of.clear()

    def warm_up(self) -> None:
        """Nothing is compiled."""


@dataclass(eq=False)
class _Draft:
    """What the draft model has read of a text: its tokens, guesses among them."""

    holding: Holding
    fed: list[int] = field(default_factory=list)

    def agree(self, tokens: Sequence[int]) -> int:
        """How many of the text's tokens need not be read again: all but the last at most."""
        agreed, most = 0, min(len(self.fed), len(tokens) - 1)
        while agreed < most and self.fed[agreed] == tokens[agreed]:
            agreed += 1
        return agreed


class Drafts:
    """A smaller model of the same vocabulary says, greedily, what each text may go on with. Its cache is its own: `memory` bytes."""

    def __init__(self, engine: Engine, slots: int, memory: int | None = None) -> None:
        self._steps = Steps(engine, slots, memory, guesses=GUESSES)
        self._context = engine.config.context
        self._of: dict[int, _Draft] = {}

    def begin(self, slot: int, prompt: Sequence[int], room: int) -> None:
        """As `Guessers` says. A text that its cache has no room for goes without guesses."""
        if room > min(self._context, self._steps.memory.longest):
            return
        holding = self._steps.memory.begin(prompt, room)
        if holding is not None:
            self._of[slot] = _Draft(holding, list(prompt[: holding.cached]))

    def guess(self, texts: Sequence[Text]) -> list[list[int]]:
        """As `Guessers` says. A long text is read a chunk at a time, so that nobody waits for long."""
        found: dict[int, list[int]] = {text.slot: [] for text in texts}
        going = [text for text in texts if text.slot in self._of and text.most > 0 and self._caught_up(text)]
        entries: list[Entry] = []
        for text in going:
            draft = self._of[text.slot]
            start = len(draft.fed)
            self._steps.memory.advance(draft.holding, start, len(text.tokens))
            entries += [
                Entry(text.slot, _GREEDY, draft.holding, at, text.tokens[at]) for at in range(start, len(text.tokens))
            ]
            draft.fed += text.tokens[start:]
        while going:
            drawn = dict(zip((entry.slot for entry in entries), self._steps.next(entries).tokens(), strict=True))
            entries = []
            for text in going:
                found[text.slot].append(drawn[text.slot].id)
            going = [text for text in going if len(found[text.slot]) < text.most]
            for text in going:
                draft, token = self._of[text.slot], found[text.slot][-1]
                at = len(draft.fed)
                self._steps.memory.advance(draft.holding, at, at + 1)
                entries.append(Entry(text.slot, _GREEDY, draft.holding, at, token))
                draft.fed.append(token)
        return [found[text.slot] for text in texts]

    def _caught_up(self, text: Text) -> bool:
        """Whether only the last few tokens are unread; otherwise some of the others are read now."""
        draft, end = self._of[text.slot], len(text.tokens) - 1
        del draft.fed[draft.agree(text.tokens) :]
        start = len(draft.fed)
        if end - start < 2:
            return True
        end = min(end, start + self._steps.small_chunk)
        self._steps.memory.advance(draft.holding, start, end)
        self._steps.read(draft.holding, text.tokens, start, end)
        draft.fed += text.tokens[start:end]
        self._steps.memory.record(draft.holding, text.tokens[:end])
        return end == len(text.tokens) - 1

    def end(self, slot: int) -> None:
        """As `Guessers` says."""
        if (draft := self._of.pop(slot, None)) is not None:
            self._steps.memory.end(draft.holding)

    def reset(self) -> None:
        """As `Guessers` says."""
        self._of.clear()
        self._steps.reset()

    def warm_up(self) -> None:
        """As `Guessers` says."""
        self._steps.warm_up(lambda done, total: None)
