"""What OpenAI's own client sees of the server, behaviour by behaviour."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from servers import NAME, Server, ask, exchange, post, until

from gemmary.text import Tokenizer

FORCED = "hello wonderful world, and more"


def chat(server: Server, text: str = "Hi", **options: Any) -> Any:
    options = {"max_tokens": 8, "temperature": 0, **options}
    messages: Any = [{"role": "user", "content": text}]
    return server.client().chat.completions.create(model=NAME, messages=messages, **options)


def complete(server: Server, prompt: Any, **options: Any) -> Any:
    return server.client().completions.create(
        model=NAME, prompt=prompt, **{"max_tokens": 8, "temperature": 0, **options}
    )


def forced(server: Server, regex: str = FORCED, **options: Any) -> Any:
    """A chat completion of a text that is known beforehand."""
    return chat(server, **{"max_tokens": 100, "extra_body": {"regex": regex}, **options})


def test_models_are_listed_and_an_unknown_one_is_404(server: Server) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).object == "model"
    with pytest.raises(openai.NotFoundError, match="no model 'other' here"):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4' here"):
        client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "Hi"}])


def test_health_and_other_routes(server: Server) -> None:
    assert exchange(server, "GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n").json == {"status": "ready"}
    assert exchange(server, "GET /v2 HTTP/1.1\r\nhost: localhost\r\n\r\n").status == 404
    assert exchange(server, "GET /v1/completions HTTP/1.1\r\nhost: localhost\r\n\r\n").status == 405
    assert exchange(server, "GET /favicon.ico HTTP/1.1\r\nhost: localhost\r\n\r\n").status == 204
    with pytest.raises(openai.BadRequestError, match="makes no embeddings"):
        server.client().embeddings.create(model=NAME, input="Hi")


def test_an_answer_has_ids_and_a_usage_that_adds_up(server: Server) -> None:
    first, second = chat(server), complete(server, "Once")
    assert re.fullmatch(r"chatcmpl-\w{32}", first.id)
    assert re.fullmatch(r"cmpl-\w{32}", second.id)
    assert (first.object, second.object) == ("chat.completion", "text_completion")
    assert first.created > 1_700_000_000
    assert first.model == second.model == NAME
    assert first.choices[0].message.role == "assistant"
    for usage in (first.usage, second.usage):
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert chat(server, "Hi " * 9).usage.prompt_tokens > first.usage.prompt_tokens


def test_content_is_a_string_or_text_parts(server: Server) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    options: Any = {"model": NAME, "max_tokens": 8, "temperature": 0}
    whole = server.client().chat.completions.create(messages=[{"role": "user", "content": "Hello"}], **options)
    cut = server.client().chat.completions.create(messages=[{"role": "user", "content": parts}], **options)
    assert cut.choices[0].message.content == whole.choices[0].message.content
    assert cut.usage.prompt_tokens == whole.usage.prompt_tokens


def test_system_and_developer_messages_are_one(server: Server) -> None:
    tokens = []
    for role in ("system", "developer"):
        messages: Any = [{"role": role, "content": "Be brief."}, {"role": "user", "content": "Hi", "name": "Ann"}]
        tokens.append(server.client().chat.completions.create(model=NAME, messages=messages, max_tokens=1).usage)
    assert tokens[0].prompt_tokens == tokens[1].prompt_tokens > chat(server).usage.prompt_tokens


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_max_tokens_are_exact(server: Server, tiny: Tokenizer, field: str) -> None:
    never_ends = {str(id): -100 for id in tiny.stop_ids}
    for most in (1, 2, 7):
        answer = chat(server, **{"max_tokens": openai.NOT_GIVEN, field: most}, logit_bias=never_ends)
        assert answer.usage.completion_tokens == most
        assert answer.choices[0].finish_reason == "length"
    for wrong in (0, -1, 1 << 40, 100_000):
        with pytest.raises(openai.BadRequestError, match="max"):
            chat(server, **{"max_tokens": openai.NOT_GIVEN, field: wrong})


def test_a_prompt_is_a_string_a_list_or_ids(server: Server, tiny: Tokenizer) -> None:
    ids = [tiny.bos, *tiny.encode("Once upon")]
    single = complete(server, "Once upon").choices[0].text
    for prompt in ("Once upon", ["Once upon"], ids, [ids]):
        answer = complete(server, prompt)
        assert answer.choices[0].text == single
        assert answer.usage.prompt_tokens == len(ids)
    both = complete(server, ["Once upon", "import"])
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.choices[0].text == single
    assert both.choices[1].text == complete(server, "import").choices[0].text
    for prompt in ([tiny.size], [-1], [[2, 1 << 30]]):
        with pytest.raises(openai.BadRequestError, match="token ids go from 0 to 999"):
            complete(server, prompt)
    for prompt in ([], [[]], [1.5], ["a", 1], {"a": 1}, 5, True):
        with pytest.raises(openai.BadRequestError, match="prompt"):
            complete(server, prompt)


def test_n_choices_differ_and_each_has_its_seed(server: Server) -> None:
    answer = chat(server, n=4, temperature=1, seed=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) == 4
    assert chat(server, n=4, temperature=1, seed=5).choices == answer.choices
    assert chat(server, temperature=1, seed=5).choices[0].message.content == texts[0]
    assert len({choice.message.content for choice in chat(server, n=2, temperature=0).choices}) == 1


def test_echo_gives_the_prompt_and_its_scores(server: Server, tiny: Tokenizer) -> None:
    plain = complete(server, "Once upon").choices[0]
    answer = complete(server, "Once upon", echo=True, logprobs=2).choices[0]
    assert answer.text == "Once upon" + plain.text
    logprobs = answer.logprobs
    assert "".join(logprobs.tokens) == answer.text
    assert logprobs.text_offset == [len("".join(logprobs.tokens[:i])) for i in range(len(logprobs.tokens))]
    assert all(logprob <= 0 for logprob in logprobs.token_logprobs)
    ids = [tiny.bos, *tiny.encode("Once upon")]
    by_ids = complete(server, ids, echo=True, logprobs=2).choices[0].logprobs
    assert by_ids.tokens[0] == "<bos>"
    assert by_ids.token_logprobs[0] is None
    assert by_ids.token_logprobs[1 : len(ids)] == pytest.approx(logprobs.token_logprobs[: len(ids) - 1], abs=1e-3)
    assert complete(server, ["a", "b"], echo=True, n=2, temperature=1).choices[3].text.startswith("b")


def test_a_stream_is_the_whole_answer_in_pieces(server: Server) -> None:
    whole = chat(server, max_tokens=20)
    for usage in (False, True):
        chunks = list(chat(server, max_tokens=20, stream=True, stream_options={"include_usage": usage}))
        last = chunks.pop() if usage else None
        assert len({chunk.id for chunk in chunks}) == 1
        deltas = [chunk.choices[0].delta for chunk in chunks]
        assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
        assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
        reasons = [chunk.choices[0].finish_reason for chunk in chunks]
        assert reasons == [None] * (len(reasons) - 1) + [whole.choices[0].finish_reason]
        assert all(chunk.usage is None for chunk in chunks)
        if last is not None:
            assert last.choices == []
            assert last.usage == whole.usage


def test_a_completions_stream_is_the_whole_answer_too(server: Server) -> None:
    whole = complete(server, ["Once", "import"], echo=True, logprobs=1)
    texts: dict[int, str] = {0: "", 1: ""}
    tokens: dict[int, list[str]] = {0: [], 1: []}
    for chunk in complete(server, ["Once", "import"], echo=True, logprobs=1, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens
    for choice in whole.choices:
        assert texts[choice.index] == choice.text
        assert tokens[choice.index] == choice.logprobs.tokens


def test_a_stream_ends_with_done(server: Server) -> None:
    text = ask(server, stream=True).text
    events = [line for line in text.replace("\r\n", "\n").split("\n") if line.startswith("data: ")]
    assert events[-1] == "data: [DONE]"
    assert all(json.loads(event[6:])["object"] == "chat.completion.chunk" for event in events[:-1])
    assert ask(server, stream=True).headers["content-type"].startswith("text/event-stream")


def test_streams_of_several_choices_run_side_by_side(server: Server) -> None:
    def collect(seed: int) -> dict[int, str]:
        texts: dict[int, str] = {}
        for chunk in chat(server, n=3, temperature=1, seed=seed, stream=True, max_tokens=12):
            choice = chunk.choices[0]
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
        return texts

    with ThreadPoolExecutor(4) as pool:
        streams = list(pool.map(collect, [1, 2, 1, 2]))
    assert streams[0] == streams[2]
    assert streams[1] == streams[3]
    assert [streams[0][i] for i in range(3)] == [
        choice.message.content for choice in chat(server, n=3, temperature=1, seed=1, max_tokens=12).choices
    ]


def test_characters_are_never_split(server: Server) -> None:
    chunks = list(forced(server, "(?:😀|漢字|é|🏳️‍🌈){6}", temperature=1, seed=3, stream=True, logprobs=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert len(text) >= 6
    assert "\ufffd" not in text
    tokens = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert bytes(byte for token in tokens for byte in token.bytes).decode() == text
    assert len(tokens) > len(text)


def test_an_error_before_the_first_token_is_a_status(server: Server) -> None:
    with pytest.raises(openai.BadRequestError):
        chat(server, stream=True, extra_body={"regex": "((("})
    with pytest.raises(openai.BadRequestError):
        chat(server, "Hi " * 3000, stream=True)


@pytest.mark.parametrize("stop", ["wonder", "w", "o w", ["never", "l w", "rld"], "lo wonderful world, a", FORCED])
def test_stop_strings_are_never_shown(server: Server, stop: Any) -> None:
    stops = [stop] if isinstance(stop, str) else stop
    expected = FORCED[: min(at for text in stops if (at := FORCED.find(text)) >= 0)]
    answer = forced(server, stop=stop, logprobs=True).choices[0]
    assert answer.message.content == expected
    assert answer.finish_reason == "stop"
    assert b"".join(bytes(token.bytes) for token in answer.logprobs.content).decode() == expected
    chunks = list(forced(server, stop=stop, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected


def test_forms_and_stop_strings_beside_one_another(server: Server) -> None:
    """An answer ends at its stop string while the batcher still asks its grammar for more."""

    def ask(_: int) -> set[str]:
        streams = [forced(server, stop="w", stream=True) for _ in range(25)]
        return {"".join(chunk.choices[0].delta.content or "" for chunk in stream) for stream in streams}

    with ThreadPoolExecutor(3) as pool:
        assert set().union(*pool.map(ask, range(3))) == {"hello "}


def test_what_only_looked_like_a_stop_string_is_shown(server: Server) -> None:
    answer = forced(server, stop=[FORCED + "!", "world, or"])
    assert answer.choices[0].message.content == FORCED
    assert answer.choices[0].finish_reason == "stop"  # the grammar's end


def test_stop_strings_are_bounded(server: Server) -> None:
    for wrong in ("", [""], ["a"] * 17, "a" * 257, "ü" * 129, 5, [5]):
        with pytest.raises(openai.BadRequestError, match="stop"):
            chat(server, stop=wrong)
    assert chat(server, stop=["a" * 256] * 16).choices[0].message.content


def test_the_same_seed_draws_the_same_text_also_under_load(server: Server) -> None:
    def draw(seed: int) -> str:
        return str(chat(server, temperature=1, seed=seed, max_tokens=16).choices[0].message.content)

    alone = {seed: draw(seed) for seed in (1, 2, 3, -7, 2**62)}
    assert len(set(alone.values())) == len(alone)
    seeds = list(alone) * 4
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(draw, seeds)) == [alone[seed] for seed in seeds]
    assert len({draw_without_seed(server) for _ in range(3)}) > 1


def draw_without_seed(server: Server) -> str:
    return str(chat(server, temperature=1, max_tokens=16).choices[0].message.content)


def test_logit_bias_bans_and_forces(server: Server, tiny: Tokenizer) -> None:
    plain = complete(server, "Once", max_tokens=1, logprobs=1).choices[0].logprobs.tokens[0]
    id = tiny.piece_id(plain.replace(" ", "▁"))
    banned = complete(server, "Once", max_tokens=1, logit_bias={str(id): -100}, logprobs=1)
    assert banned.choices[0].logprobs.tokens[0] != plain
    forced_id = tiny.encode("x")[0]
    answer = complete(server, "Once", max_tokens=5, logit_bias={str(forced_id): 100})
    assert answer.choices[0].text == "x" * 5
    for wrong in ({"5": 101}, {"a": 1}, {"-1": 1}, {"1000": 1}, {"5": True}, {"5": "1"}, [5], {"9" * 30: 1}):
        with pytest.raises(openai.BadRequestError, match="logit_bias"):
            complete(server, "Once", logit_bias=wrong)


def test_temperature_zero_is_greedy(server: Server) -> None:
    answers = [complete(server, "Once", seed=seed, top_p=0.3, logprobs=1).choices[0] for seed in (1, 2)]
    assert answers[0].text == answers[1].text
    for token, top in zip(answers[0].logprobs.tokens, answers[0].logprobs.top_logprobs, strict=True):
        assert top[token] == max(top.values())


def test_logprobs_are_of_so_many_tokens_and_their_bytes_are_the_text(server: Server) -> None:
    for top in (0, 1, 5, 20):
        answer = chat(server, logprobs=True, top_logprobs=top, temperature=1, seed=top).choices[0]
        content = answer.logprobs.content
        joined = b"".join(bytes(token.bytes) for token in content)
        assert joined.decode(errors="replace") == answer.message.content
        assert all(len(token.top_logprobs) == top for token in content)
        for token in content:
            best = [entry.logprob for entry in token.top_logprobs]
            assert best == sorted(best, reverse=True)
    assert chat(server).choices[0].logprobs is None
    with pytest.raises(openai.BadRequestError, match="top_logprobs"):
        chat(server, logprobs=True, top_logprobs=21)
    with pytest.raises(openai.BadRequestError, match="needs logprobs"):
        chat(server, top_logprobs=2)
    with pytest.raises(openai.BadRequestError, match="logprobs"):
        complete(server, "Once", logprobs=21)


def test_our_own_fields(server: Server) -> None:
    greedy = chat(server).choices[0].message.content
    assert chat(server, temperature=2, extra_body={"top_k": 1}).choices[0].message.content == greedy
    assert chat(server, temperature=2, extra_body={"min_p": 1.0}).choices[0].message.content == greedy
    free = chat(server, extra_body={"repetition_penalty": 50.0}, max_tokens=20, logprobs=True).choices[0]
    tokens = [token.token for token in free.logprobs.content]
    assert len(set(tokens)) == len(tokens)


def test_fields_that_change_nothing_are_accepted(server: Server) -> None:
    answer = chat(
        server, user="me", store=False, metadata={"a": "b"}, service_tier="auto", parallel_tool_calls=True, tool_choice="none",
        modalities=["text"], extra_body={"safety_identifier": "x", "tools": [], "functions": None, "prompt_cache_key": "k"},
    )  # fmt: skip
    assert answer.choices[0].message.content == chat(server).choices[0].message.content


def test_the_log_has_counts_and_no_text(server: Server) -> None:
    id = ask(server, "a secret question", max_tokens=3).headers["x-request-id"]
    (line,) = until(lambda: [line for line in server.events("request") if line["id"] == id], 5)
    assert line["route"] == "/v1/chat/completions"
    assert (line["status"], line["method"], line["client"]) == (200, "POST", "127.0.0.1")
    assert line["new_tokens"] <= 3
    assert line["prompt_tokens"] > 5
    assert line["ms"] > 0
    assert "secret" not in json.dumps(server.lines) + "".join(server.said)


def test_metrics_count(server: Server) -> None:
    before = server.stats()
    answer = post(server, "/v1/completions", {"model": NAME, "prompt": "Once", "max_tokens": 5, "temperature": 0}).json
    after = server.stats()
    assert (
        after["gemmary_new_tokens_total"] - before["gemmary_new_tokens_total"] == answer["usage"]["completion_tokens"]
    )
    assert (
        after["gemmary_prompt_tokens_total"] - before["gemmary_prompt_tokens_total"] == answer["usage"]["prompt_tokens"]
    )
    assert after["gemmary_first_token_seconds_count"] == before["gemmary_first_token_seconds_count"] + 1
    assert (after["gemmary_slots"], after["gemmary_queued"]) == (2, 0)
    until(lambda: server.stats()["gemmary_busy"] == 0, 1)  # the slot is let go of right after the last token is out
