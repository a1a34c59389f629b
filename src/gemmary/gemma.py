"""A loaded model, text in and text out: what `gemmary.load` returns.

This is where ids and strings meet: the tokenizer below knows no model, the engine below knows no text. A prompt is
tokenized once, with exactly one BOS; a conversation becomes ids once, in `text.dialogue`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gemmary.checkpoints import Checkpoint, open_model
from gemmary.config import Config
from gemmary.errors import GemmaryError
from gemmary.infer.engine import Engine, Token
from gemmary.infer.sampling import GREEDY, Sampling
from gemmary.infer.session import Session
from gemmary.infer.speculation import Draft, LookUp, speculate
from gemmary.params import Params, layered_names
from gemmary.text.answers import Answer
from gemmary.text.dialogue import encode_dialogue
from gemmary.text.tokenizer import Tokenizer

__all__ = ["Completion", "Gemma", "Piece", "Timing", "load"]


@dataclass(frozen=True)
class Timing:
    """Seconds and token counts of one answer. `prefill_seconds` runs to the first token; both include compiling new shapes."""

    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first over the time they took."""
        return (self.new_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class Completion:
    """An answer. `finish_reason` is "stop" (a stop id or string) or "length"; ids include the stop id, the text does not."""

    text: str
    token_ids: list[int]
    prompt_token_ids: list[int]
    finish_reason: str
    timing: Timing
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self) | {
            "timing": asdict(self.timing) | {"decode_tokens_per_second": self.timing.decode_tokens_per_second}
        }


@dataclass(frozen=True)
class Piece:
    """What one step added: text that is safe to show (it may be empty) and the token behind it."""

    text: str
    token: Token


@dataclass(frozen=True)
class Gemma:
    """A model, its tokenizer and an engine to run it."""

    config: Config
    params: Params
    tokenizer: Tokenizer
    engine: Engine

    def generate(self, prompt: str | Sequence[int], **options: Any) -> Completion:
        """The model's continuation of a text (or of token ids, taken as they are). Options are those of `stream`."""
        ids = self.prompt_ids(prompt)
        started = time.perf_counter()
        pieces: list[Piece] = []
        first = started
        for piece in self.stream(ids, **options):
            if not pieces:
                first = time.perf_counter()
            pieces.append(piece)
        tokens = [piece.token for piece in pieces]
        timing = Timing(len(ids), len(tokens), first - started, time.perf_counter() - first)
        return Completion(
            text="".join(piece.text for piece in pieces),
            token_ids=[token.id for token in tokens],
            prompt_token_ids=ids,
            finish_reason=tokens[-1].finish or "length",
            timing=timing,
            logprobs=[token.logprob for token in tokens],
            top_logprobs=[list(token.top_logprobs) for token in tokens if token.top_logprobs],
        )

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Completion:
        """The model's next turn in a conversation (`role` and `content`)."""
        return self.generate(self.dialogue_ids(messages), **options)

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 256,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
        top_logprobs: int = 0,
        look_up: bool = False,
        draft: Gemma | None = None,
        session: Session | None = None,
    ) -> Iterator[Piece]:
        """Yield an answer piece by piece; texts joined are the answer's text.

        Text that might begin a stop string is held back until it is known not to. With `look_up`, or a `draft` model of the same
        tokenizer, the same tokens come several at a time (`infer.speculation`); a `session` remembers what it has read. Raises GemmaryError as the engine does.
        """
        answer = Answer(self.tokenizer, stop)
        if max_new_tokens < 1:
            raise GemmaryError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        ids = self.prompt_ids(prompt)
        options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens, "sampling": sampling, "stop_ids": self.tokenizer.stop_ids,
            "top_logprobs": top_logprobs,
        }  # fmt: skip
        if draft is not None or look_up:
            guesser = LookUp() if draft is None else self._draft(draft, len(ids) + max_new_tokens)
            tokens: Iterator[Token] = speculate(self.engine, ids, guesser, **options)
        else:
            tokens = (token for (token,) in self.engine.generate([ids], session=session, **options))
        for token in tokens:
            text = answer.push(token.id, last=token.finish is not None)
            if answer.stopped:
                yield Piece(text, token._replace(finish="stop"))
                return
            yield Piece(text, token)

    def check_draft(self, model: Gemma) -> None:
        """Raises GemmaryError for a model that cannot guess for this one."""
        if model.tokenizer.pieces != self.tokenizer.pieces:
            raise GemmaryError("the draft model has another tokenizer: its guesses would mean other tokens")

    def _draft(self, model: Gemma, room: int) -> Draft:
        self.check_draft(model)
        return Draft(model.engine, room)

    def prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        """A text's ids behind one BOS; ids are taken as they are."""
        if isinstance(prompt, str):
            return [self.tokenizer.bos, *self.tokenizer.encode(prompt)]
        return list(prompt)

    def dialogue_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """A conversation's ids, the model's turn opened."""
        if self.tokenizer.start_of_turn is None:
            raise GemmaryError("this model's vocabulary has no turns: it cannot chat, but it can generate")
        dialogue = encode_dialogue(self.tokenizer, messages, generation=self.config.generation, open_turn=True)
        return list(dialogue.ids)


def load(
    model: str | Path,
    *,
    dtype: str | None = None,
    hub: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Gemma:
    """Open a model in any format and make it ready to run.

    `model` is a directory, a file, `"sample"`, or with `hub` a hub id. `dtype` is that of activations and of weights that
    are not quantized: float32 or bfloat16 (default: float32 on a CPU, bfloat16 elsewhere). `on_progress` is called with
    weights loaded and their number. Raises GemmaryError where the model cannot be opened or has no tokenizer.
    """
    chosen = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    if chosen not in ("float32", "bfloat16"):
        raise GemmaryError(
            f"there is no dtype {chosen!r} here: choose float32 or bfloat16 (float16 overflows in Gemma)"
        )
    with open_model(model, hub=hub) as checkpoint, ThreadPoolExecutor(1) as pool:
        config, done = checkpoint.config, 0
        tokenizers = pool.submit(_tokenizer_of, checkpoint)  # while weights are read, which leaves Python free

        def tick(_: str) -> None:
            nonlocal done
            done += 1
            if tokenizers.done():
                tokenizers.result()  # what is wrong with it need not wait for the rest
            on_progress(done, total)

        total = len(layered_names(config))
        params = checkpoint.params(jnp.dtype(chosen), tick, to_run=True)
        tokenizer = tokenizers.result()
    engine = Engine(params, config, jnp.dtype(chosen), min(config.num_tokens, tokenizer.size))
    return Gemma(config, params, tokenizer, engine)


def _tokenizer_of(checkpoint: Checkpoint) -> Tokenizer:
    tokenizer, rows = checkpoint.own_tokenizer(), checkpoint.config.vocab_size
    if tokenizer.size > rows:
        raise GemmaryError(
            f"{checkpoint.where}: the tokenizer has {tokenizer.size} pieces and the embedding {rows} rows"
        )
    return tokenizer
