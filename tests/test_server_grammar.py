"""Answers of a given form: JSON, schemas, regular expressions."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest
from servers import NAME, Server, ask

from gemmary.serve.grammar import Grammars
from gemmary.serve.protocol import Chat, parse
from gemmary.text import Tokenizer

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["ä", "b", None]},
        "list": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "count", "kind", "list"],
    "additionalProperties": False,
}  # fmt: skip


def answered(server: Server, **fields: Any) -> str:
    choice = ask(server, max_tokens=300, **fields).json["choices"][0]
    assert choice["finish_reason"] == "stop"
    return str(choice["message"]["content"])


@pytest.mark.parametrize("seed", range(6))
def test_a_schema_is_followed(server: Server, seed: int) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
    found = json.loads(answered(server, response_format=form, seed=seed))
    assert list(found) == ["name", "count", "kind", "list"]
    assert isinstance(found["name"], str)
    assert len(found["name"]) <= 8
    assert 0 <= found["count"] <= 99
    assert found["kind"] in ("ä", "b", None)
    assert all(isinstance(item, bool) for item in found["list"])
    assert len(found["list"]) <= 3


def test_a_json_object_is_one(server: Server) -> None:
    text = ask(server, max_tokens=40, response_format={"type": "json_object"}).json["choices"][0]["message"]["content"]
    assert text.startswith("{")
    assert ask(server, response_format={"type": "text"}).status == 200


@pytest.mark.parametrize("regex", ["(yes|no)", "[0-9]{3}-[a-f]{2}", "(😀|é|漢){4}", "a\\.b\n"])
def test_a_regular_expression_is_followed(server: Server, regex: str) -> None:
    for seed in range(3):
        assert re.fullmatch(regex, answered(server, regex=regex, seed=seed))


@pytest.mark.parametrize(
    "fields",
    [
        {"regex": "(("},
        {"regex": "a" * 20000},
        {"regex": ""},
        {"regex": "a", "response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "http://evil.example/schema"}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "file:///etc/passwd"}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "string", "pattern": "(("}}}},
    ],
)  # fmt: skip
def test_forms_that_are_none_or_too_large_are_400(server: Server, fields: dict[str, Any]) -> None:
    answer = ask(server, **fields)
    assert answer.status == 400
    assert answer.message
    assert ask(server).status == 200


def test_a_form_that_explodes_is_answered_or_refused_soon(server: Server) -> None:
    many = {
        "type": "object",
        "properties": {f"p{i}": {"type": "string", "pattern": "(a|b)*a(a|b){12}"} for i in range(200)},
    }
    for fields in (
        {"regex": "((((a{1,1000}){1,1000}){1,1000}){1,1000})"},
        {"regex": "(a|b)*a(a|b){18}"},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": many}}},
    ):
        started = time.monotonic()
        assert ask(server, **fields).status in (200, 400)
        assert time.monotonic() - started < 5


def test_structure_is_never_allowed_but_at_the_end(tiny: Tokenizer) -> None:
    body = {"model": NAME, "messages": [{"role": "user", "content": "Hi"}], "regex": "<start_of_turn>(ab)?"}
    matcher = Grammars(tiny, 1064).matcher(parse(Chat, json.dumps(body).encode()))
    assert matcher is not None
    for id in tiny.encode("<start_of_turn>"):
        assert not allowed(matcher.mask()) & tiny.structural_ids
        assert len(matcher.mask()) == 34
        other = matcher.copy()
        matcher.accept(id)
    assert allowed(matcher.mask()) & tiny.structural_ids == set(tiny.stop_ids)
    assert not allowed(other.mask()) & set(tiny.stop_ids)
    assert not matcher.done()
    for id in tiny.encode("ab"):
        matcher.accept(id)
    assert matcher.done()


def allowed(mask: Any) -> set[int]:
    return {32 * word + bit for word, bits in enumerate(mask.tolist()) for bit in range(32) if bits >> bit & 1}
