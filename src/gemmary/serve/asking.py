"""From what a client asks for to what the batcher is asked for: texts become ids, once, and every bound is checked here."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemmary.errors import GemmaryError
from gemmary.gemma import Gemma
from gemmary.infer.batching import Request
from gemmary.infer.sampling import Sampling
from gemmary.serve.grammar import Grammars, Matcher
from gemmary.serve.protocol import ApiError, Chat, Common, Completions
from gemmary.serve.replies import Part, Scored
from gemmary.text.tokenizer import Decoder

__all__ = ["Prepared", "prepare"]

_DEFAULT_CHAT_TOKENS = 1024


@dataclass(frozen=True)
class Prepared:
    """What is to be answered: requests for the batcher; for each the form that it must have; where that is asked for, how it begins."""

    requests: list[Request]
    forms: list[Matcher | None]
    echoes: list[Part]
    prompt_tokens: int


def prepare(
    gemma: Gemma, grammars: Grammars, ask: Chat | Completions, client: str, *, most: int, longest: int
) -> Prepared:
    """Everything that comes before the first step; it may take a while. At most so many answers are made of one request,
    and there is room for so many tokens, of a prompt and its answer.

    Raises ApiError, and GemmaryError where a grammar or a setting is not valid.
    """
    prompts = _prompts_of(gemma, ask)
    if len(prompts) * ask.n > most:
        raise ApiError(
            400, f"{len(prompts)} prompts, {ask.n} answers each: this server gives at most {most} at once", "n"
        )
    lengths = [_most_tokens(ask, len(prompt), gemma.config.context, longest) for prompt in prompts]
    form = grammars.matcher(ask)
    forms = [form.copy() if form else None for _ in range(len(prompts) * ask.n)]
    requests = _requests_of(gemma, ask, list(zip(prompts, lengths, strict=True)), forms, client)
    echoes = []
    if isinstance(ask, Completions) and ask.echo:
        for prompt, ids in zip(ask.prompt, prompts, strict=True):
            echoes += [_echo(gemma, ask, prompt if isinstance(prompt, str) else None, ids)] * ask.n
    return Prepared(requests, forms, echoes, sum(map(len, prompts)))


def _prompts_of(gemma: Gemma, ask: Chat | Completions) -> list[list[int]]:
    """The prompts' ids. Raises ApiError for messages that are no conversation, and for ids that the model does not have."""
    if isinstance(ask, Chat):
        messages = [_message(i, message) for i, message in enumerate(ask.messages)]
        try:
            return [gemma.dialogue_ids(messages)]
        except GemmaryError as error:
            raise ApiError(400, str(error), "messages", "invalid_value") from None
    prompts = [gemma.prompt_ids(prompt) for prompt in ask.prompt]
    for prompt in prompts:
        _check_ids(gemma, prompt, "prompt")
    return prompts


def _requests_of(
    gemma: Gemma,
    ask: Chat | Completions,
    prompts: Sequence[tuple[list[int], int]],
    forms: Sequence[Matcher | None],
    client: str,
) -> list[Request]:
    """One request for each answer: `n` for each prompt and its answers' length, with seeds of their own. Raises ApiError."""
    _check_ids(gemma, list(ask.logit_bias), "logit_bias")
    top = (ask.top_logprobs if ask.logprobs else 0) if isinstance(ask, Chat) else ask.logprobs or 0
    if isinstance(ask, Chat) and ask.top_logprobs and not ask.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs", "invalid_value")
    if isinstance(ask, Chat) and None not in (ask.max_tokens, ask.max_completion_tokens):
        raise ApiError(400, "max_tokens and max_completion_tokens are one: give either", "max_tokens", "invalid_value")
    seed = secrets.randbits(32) if ask.seed is None else ask.seed
    return [
        Request(
            prompt=prompt,
            max_new_tokens=most,
            sampling=_sampling(ask, _seed(seed, i)),
            stop_ids=gemma.tokenizer.stop_ids,
            top_logprobs=top,
            bias=ask.logit_bias,
            grammar=forms[at * ask.n + i],
            client=client,
        )
        for at, (prompt, most) in enumerate(prompts)
        for i in range(ask.n)
    ]


def _echo(gemma: Gemma, ask: Completions, text: str | None, ids: list[int]) -> Part:
    """The prompt, given as a text or as ids, as the answer's beginning. The BOS that was put before a text is no part of it."""
    scored: list[Scored] = []
    if ask.logprobs is not None:
        scores: list[Any] = [(None, ()), *gemma.engine.prompt_scores(ids, ask.logprobs)]
        decoder, offset = Decoder(gemma.tokenizer), 0
        for id, (logprob, top) in zip(ids, scores, strict=True):
            scored.append(Scored(id, gemma.tokenizer.token_bytes(id), offset, logprob, top))
            offset += len(decoder.push(id))
    return Part(gemma.tokenizer.decode(ids), scored, None) if text is None else Part(text, scored[1:], None)


def _message(i: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as `text.dialogue` reads it. Fields without a value are none; a name changes nothing."""
    given = {key: value for key, value in message.items() if value not in (None, []) and key != "name"}
    if strange := given.keys() - {"role", "content"}:
        key = min(strange)[:60]
        raise ApiError(400, f"message {i}: {key!r} is not served: a message has a role and a content", "messages")
    return given | {"role": "system"} if given.get("role") == "developer" else given


def _check_ids(gemma: Gemma, ids: Sequence[int], param: str) -> None:
    size = gemma.tokenizer.size
    if ids and not 0 <= min(ids) <= max(ids) < size:
        raise ApiError(400, f"{param}: token ids go from 0 to {size - 1} in this model", param, "invalid_value")


def _most_tokens(ask: Chat | Completions, length: int, context: int, longest: int) -> int:
    """How many tokens an answer may have; what is asked for by number is given exactly or refused."""
    param, room = "messages" if isinstance(ask, Chat) else "prompt", min(context, longest)
    limit = f"the model's context is {context}" if room == context else f"this server has memory for {room}"
    wanted = ask.max_completion_tokens or ask.max_tokens if isinstance(ask, Chat) else ask.max_tokens
    if length >= room:
        message = f"the prompt has {length} tokens and {limit}: shorten it"
        raise ApiError(400, message, param, "context_length_exceeded")
    if wanted is not None and length + wanted > room:
        message = f"the prompt has {length} tokens and max_tokens asks for {wanted} more; {limit}"
        raise ApiError(400, message, "max_tokens", "context_length_exceeded")
    return wanted or min(_DEFAULT_CHAT_TOKENS, room - length)


def _sampling(ask: Common, seed: int) -> Sampling:
    return Sampling(
        temperature=ask.temperature,
        top_k=ask.top_k,
        top_p=ask.top_p,
        min_p=ask.min_p,
        repetition_penalty=ask.repetition_penalty,
        seed=seed,
        presence_penalty=ask.presence_penalty,
        frequency_penalty=ask.frequency_penalty,
    )


def _seed(seed: int, choice: int) -> int:
    """The first choice draws with the seed itself, as `gemmary generate` would; others with numbers made of it."""
    if choice == 0:
        return seed % (1 << 32)
    return int.from_bytes(hashlib.blake2b(f"{seed}:{choice}".encode(), digest_size=4).digest(), "big")
