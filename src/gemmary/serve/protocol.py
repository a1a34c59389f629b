"""What may be asked, as OpenAI's API has it: the fields, their bounds, and one shape for every refusal.

A field is served, or changes nothing that we do and is ignored, or is refused by name: an answer never silently differs
from what was asked for. Source: OpenAI's API reference for chat completions and completions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from gemmary.errors import GemmaryError

__all__ = ["LIMITS", "ApiError", "Chat", "Common", "Completions", "Limits", "parse"]


@dataclass(frozen=True)
class Limits:
    """What one request may bring: bytes of body and headers, answers, stop strings and their bytes, seconds to send or read."""

    body: int = 1 << 20
    headers: int = 16 << 10
    choices: int = 16
    stops: int = 16
    stop_bytes: int = 256
    biased: int = 1024
    read_seconds: float = 10.0
    write_seconds: float = 30.0


LIMITS = Limits()
_KINDS = {
    401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 500: "server_error", 503: "unavailable_error"
}  # fmt: skip


@dataclass(eq=False)  # not frozen: whoever raises an exception writes its traceback
class ApiError(Exception):
    """A request that gets no answer: the HTTP status, and OpenAI's error object around a line that says what to do."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """The reply's JSON."""
        kind = _KINDS.get(self.status, "invalid_request_error")
        message = str(GemmaryError(self.message))  # one line, cut, nothing that a terminal would obey
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}


def _stops(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("it must be a string or a list of strings")
    if len(stops) > LIMITS.stops:
        raise ValueError(f"there are {len(stops)} stop strings; at most {LIMITS.stops} are allowed")
    if not all(0 < len(stop.encode()) <= LIMITS.stop_bytes for stop in stops):
        raise ValueError(f"each stop string has 1 to {LIMITS.stop_bytes} bytes")
    return stops


def _biases(value: Any) -> Any:
    if not isinstance(value, dict) or len(value) > LIMITS.biased:
        raise ValueError(f"it must be an object of token id to bias, with at most {LIMITS.biased} entries")
    for key, bias in value.items():
        if not key.isascii() or not key.isdigit() or len(key) > 7:
            raise ValueError("its keys must be token ids")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise ValueError("its values must be numbers from -100 to 100")
    return {int(key): float(bias) for key, bias in value.items()}


def _prompts(value: Any) -> Any:
    """A string, a list of strings, ids, or a list of lists of ids: as a list of prompts."""

    def ids(prompt: Any) -> bool:
        return isinstance(prompt, list) and all(type(id) is int and abs(id) < 1 << 31 for id in prompt)

    prompts = [value] if isinstance(value, str) or (ids(value) and value) else value
    if not isinstance(prompts, list) or not prompts:
        raise ValueError("it must be a string, a list of strings, a list of token ids, or a list of such lists")
    if not all(isinstance(prompt, str) for prompt in prompts) and not all(ids(prompt) and prompt for prompt in prompts):
        raise ValueError("it must be all strings or all lists of token ids, none of these empty")
    return prompts


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class _StreamOptions(_Model):
    """`include_usage` adds a last chunk that counts tokens."""

    include_usage: bool = False
    include_obfuscation: bool = False  # accepted: it changes no text


class _JsonSchema(_Model):
    """A named schema; always followed strictly."""

    name: str = "schema"
    schema_: dict[str, Any] = Field(alias="schema")
    description: str = ""
    strict: bool = True


class _ResponseFormat(_Model):
    """The form that an answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JsonSchema | None = None


class Common(_Model):
    """What both routes take. `top_k`, `min_p`, `repetition_penalty` and `regex` are ours."""

    model: str
    n: int = Field(1, ge=1, le=LIMITS.choices)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, le=1 << 20)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: Annotated[list[str], BeforeValidator(_stops)] = Field(default_factory=list)
    logit_bias: Annotated[dict[int, float], BeforeValidator(_biases)] = Field(default_factory=dict)
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()
    response_format: _ResponseFormat = _ResponseFormat(type="text")
    regex: str | None = Field(None, min_length=1, max_length=16384)


class Chat(Common):
    """The body of /v1/chat/completions. What a message may be, `text.dialogue` says."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)


class Completions(Common):
    """The body of /v1/completions. `echo` gives the prompt before each answer."""

    prompt: Annotated[list[str] | list[list[int]], BeforeValidator(_prompts)]
    max_tokens: int = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False


# OpenAI's fields that change nothing here.
_IGNORED = {
    "user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prediction", "parallel_tool_calls",
}  # fmt: skip
_TOOLS = "this server calls no tools"
_TEMPLATES = "how turns are written is the model's own: send messages without a template"
# Fields that would change the answer and are not served: the value that asks for nothing, and what to say of any other.
_REFUSED: dict[str, tuple[Any, str]] = {
    "tools": ([], _TOOLS), "functions": ([], _TOOLS), "tool_choice": ("none", _TOOLS), "function_call": ("none", _TOOLS),
    "modalities": (["text"], "gemmary's models write text"), "audio": (None, "gemmary's models write text"),
    "best_of": (1, "ask for n answers and choose among them"), "suffix": ("", "this model continues text; it does not fill in"),
    "web_search_options": (None, "this server searches nothing"), "reasoning_effort": ("none", "this model does not reason apart"),
    "verbosity": ("medium", "ask for it in the messages"),
    "chat_template": (None, _TEMPLATES), "chat_template_kwargs": ({}, _TEMPLATES), "add_generation_prompt": (True, _TEMPLATES),
    "continue_final_message": (False, _TEMPLATES), "add_special_tokens": (True, _TEMPLATES), "documents": (None, _TEMPLATES),
}  # fmt: skip

_Ask = TypeVar("_Ask", bound=Common)


def parse(kind: type[_Ask], body: bytes) -> _Ask:
    """A body as what it asks for. Raises ApiError, status 400, that names the field."""
    try:
        data = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ApiError(400, "the body must be a JSON object")
    known = {}
    for name, value in data.items():
        if value is None or name in _IGNORED:
            continue
        if name in _REFUSED:
            nothing, why = _REFUSED[name]
            if type(value) is not type(nothing) or value != nothing:
                raise ApiError(400, f"{name} is not served: {why}", name, "unsupported_parameter")
        elif name not in kind.model_fields:
            raise ApiError(400, f"there is no field {name[:60]!r} here", name[:60], "unknown_parameter")
        else:
            known[name] = value
    try:
        return kind.model_validate(known)
    except ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> ApiError:
    """The first mistake, as one line."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part)[:60] for part in first["loc"])
    said = first["msg"].removeprefix("Value error, ")
    given = first["input"]
    shown = (
        f", not {given!r}"
        if isinstance(given, int | float) and not (isinstance(given, float) and math.isinf(given))
        else ""
    )
    return ApiError(400, f"{where}: {said[:1].lower()}{said[1:]}{shown}", str(first["loc"][0]), "invalid_value")
