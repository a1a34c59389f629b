"""Answers of a given form: JSON, a JSON schema, a regular expression, as masks over token ids, through llguidance.

The vocabulary goes over byte for byte: a mask is exact wherever tokens cut a character. Structural ids are never allowed,
but for those that end an answer, where the form is complete.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import numpy as np

from gemmary.errors import GemmaryError
from gemmary.serve.protocol import Common
from gemmary.text.tokenizer import Tokenizer

__all__ = ["Grammars", "Matcher"]

# One space after a comma and a colon, and none elsewhere: else a model may write white space without end.
_SPACING: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Matcher:
    """One answer's place in its grammar; what the batcher asks of a grammar.

    llguidance's own object is the batcher's thread's alone: it refuses a second thread, even one that would only read. `failure`
    is why the form could not be followed to its end, empty where it could; any thread may read it.
    """

    def __init__(self, matcher: Any, words: int) -> None:
        self._matcher, self._words, self.failure = matcher, words, ""

    def copy(self) -> Matcher:
        """Another answer's, at the same place."""
        return Matcher(self._matcher.deep_copy(), self._words)

    def mask(self) -> np.ndarray:
        """What may come next: one bit a token id, uint32. After a failure only an end may: other answers go on beside it."""
        allowed = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        self._note_failure()
        whole = np.zeros(self._words, np.uint32)
        whole[: len(allowed)] = allowed[: self._words]
        return whole

    def accept(self, token_id: int) -> None:
        """Go on past this token."""
        self._matcher.consume_token(token_id)
        self._note_failure()

    def done(self) -> bool:
        """Nothing but an end may come."""
        return bool(self._matcher.is_stopped())

    def _note_failure(self) -> None:
        if self._matcher.is_error():
            self.failure = str(self._matcher.get_error())


class Grammars:
    """Makes matchers for a tokenizer; `vocab_size` is the model's, which may be larger."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self._words = tokenizer, -(-vocab_size // 32)

    def matcher(self, ask: Common) -> Matcher | None:
        """A new matcher for the form that is asked for; None where any text will do.

        Raises GemmaryError where the form is not valid or too large, or llguidance is not installed.
        """
        form = ask.response_format
        if form.type == "text" and ask.regex is None:
            return None
        if form.type != "text" and ask.regex is not None:
            raise GemmaryError("response_format and regex exclude each other: give one")
        try:
            import llguidance
        except ImportError:
            raise GemmaryError(
                "answers of a given form need an extra on the server: pip install 'gemmary[grammar]'"
            ) from None
        if ask.regex is not None:
            grammar = llguidance.LLMatcher.grammar_from_regex(ask.regex)
        else:
            if (form.json_schema is None) != (form.type == "json_object"):
                raise GemmaryError("response_format has a json_schema where its type is json_schema, and only there")
            schema = form.json_schema.schema_ if form.json_schema else {"type": "object"}
            try:
                grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_SPACING)
            except ValueError as error:
                raise GemmaryError(f"response_format: {error}") from None
        limits = llguidance.LLParserLimits(
            initial_lexer_fuel=500_000, max_lexer_states=50_000, max_grammar_size=100_000, verbose_errors=False
        )
        matcher = llguidance.LLMatcher(self._vocabulary, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise GemmaryError(f"the form asked for is not valid: {matcher.get_error()}")
        return Matcher(matcher, self._words)

    @functools.cached_property
    def _vocabulary(self) -> Any:
        import llguidance

        wrapped = llguidance.TokenizerWrapper(_Wrapped(self._tokenizer))
        return llguidance.LLTokenizer(wrapped, eos_token=list(self._tokenizer.stop_ids))


class _Wrapped:
    """The tokenizer as llguidance wants one: bytes of every id, and text to ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        structural = tokenizer.structural_ids
        self.eos_token_id, self.bos_token_id = tokenizer.eos, tokenizer.bos
        # A leading 0xff byte, which no text has, marks what is not text.
        self.tokens = [
            b"\xff" + piece.text.encode() if id in structural else tokenizer.token_bytes(id)
            for id, piece in enumerate(tokenizer.pieces)
        ]
        self.special_token_ids = sorted(structural)
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode(text if isinstance(text, str) else text.decode(errors="replace"))
