"""Text in and text out on the real weights: answers recorded from transformers and llama.cpp, stop strings, the chat."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemmary import Gemma, GemmaryError, Sampling, load
from gemmary.chat import converse
from gemmary.text import Tokenizer

RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "sample.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("at", range(len(RECORDED["greedy"])))
def test_greedy_answers_are_those_of_transformers(sample: Gemma, at: int) -> None:
    recorded = RECORDED["greedy"][at]
    assert sample.prompt_ids(recorded["prompt"]) == recorded["prompt_ids"]
    steps = sample.engine.generate([recorded["prompt_ids"]], max_new_tokens=len(recorded["ids"]))
    assert [step[0].id for step in steps] == recorded["ids"]


def test_likelihood_is_that_of_transformers_and_near_llama_cpps(sample: Gemma) -> None:
    ids = RECORDED["likelihood"]["ids"]
    nats = -sample.engine.log_probs(ids)
    np.testing.assert_allclose(nats, RECORDED["likelihood"]["transformers"], atol=2e-3)
    # llama.cpp multiplies in the file's own types, activations rounded to 8 bits.
    assert nats.mean() == pytest.approx(np.mean(RECORDED["likelihood"]["llama.cpp"]), rel=0.01)


def test_a_completion(sample: Gemma) -> None:
    answer = sample.generate("The capital of France is", max_new_tokens=16)
    assert answer.prompt_token_ids == [2, 818, 5279, 529, 7001, 563]
    assert answer.text == sample.tokenizer.decode(answer.token_ids)
    assert "France" in answer.text
    assert answer.finish_reason == "length"
    assert len(answer.token_ids) == len(answer.logprobs) == answer.timing.new_tokens == 16
    data = json.loads(json.dumps(answer.to_json()))
    assert {"text", "token_ids", "prompt_token_ids", "finish_reason", "timing"} <= data.keys()
    assert data["timing"]["decode_tokens_per_second"] > 0


def test_a_stop_string_cuts_the_text_wherever_tokens_end(sample: Gemma) -> None:
    whole = sample.generate("The capital of France is", max_new_tokens=12).text
    for stop in (whole[5:9], whole[10:11], whole[:3]):
        answer = sample.generate("The capital of France is", max_new_tokens=12, stop=["never this", stop])
        assert answer.text == whole[: whole.index(stop)]
        assert answer.finish_reason == "stop"
    pieces = list(sample.stream("The capital of France is", max_new_tokens=12, stop=[whole + "!"]))
    assert "".join(piece.text for piece in pieces) == whole  # held back, and given at the end


def test_what_is_refused(sample: Gemma) -> None:
    with pytest.raises(GemmaryError, match="stop string is empty"):
        sample.generate("a", stop=[""])
    with pytest.raises(GemmaryError, match="at least 1"):
        sample.generate("a", max_new_tokens=0)
    with pytest.raises(GemmaryError, match=r"context is 32768: shorten it"):
        sample.generate([2] * 32768, max_new_tokens=1)
    with pytest.raises(GemmaryError, match="float16 overflows"):
        load("sample", dtype="float16")


def test_a_conversation_is_one_prompt(sample: Gemma) -> None:
    ids = sample.dialogue_ids([{"role": "user", "content": "Hi"}])
    assert sample.tokenizer.decode(ids, structure=True) == (
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"
    )
    answer = sample.chat([{"role": "user", "content": "Hi"}], max_new_tokens=2)
    assert answer.prompt_token_ids == ids


# --- The chat in the terminal -----------------------------------------------------------------------------------------


def _converse(sample: Gemma, lines: str, monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, Any]]]:
    """Converse over stdin; the conversations that the model was asked to continue."""
    asked: list[list[dict[str, Any]]] = []
    real = type(sample).dialogue_ids
    monkeypatch.setattr(type(sample), "dialogue_ids", lambda self, m: (asked.append(list(m)), real(self, m))[1])
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    converse(sample, Sampling(), 3)
    return asked[1:]


def test_the_chat_keeps_and_resets_its_conversation(
    sample: Gemma, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = _converse(sample, "One\n\n/nonsense\nTwo\n/reset\nThree\n/exit\nFour\n", monkeypatch)
    roles = [[message["role"] for message in messages] for messages in asked]
    assert roles[0] == ["user"]
    assert asked[1][-1]["content"] == "Two"
    assert len(asked[1]) in (1, 3)  # an answer of nothing is not kept
    assert asked[-1] == [{"role": "user", "content": "Three"}]
    assert len(asked) == 3
    said = capsys.readouterr()
    assert "there is no command /nonsense" in said.err
    assert "a new conversation" in said.err


def test_ctrl_c_stops_an_answer_and_not_the_chat(
    sample: Gemma, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = type(sample).stream, iter(range(99))

    def interrupted(self: Gemma, *args: Any, **options: Any) -> Iterator[Any]:
        for i, piece in enumerate(real(self, *args, **options)):
            yield piece
            if i == 1 and next(calls) == 0:
                raise KeyboardInterrupt

    monkeypatch.setattr(type(sample), "stream", interrupted)
    asked = _converse(sample, "One\nTwo\n", monkeypatch)
    assert len(asked) == 2
    assert "(stopped)" in capsys.readouterr().err


def test_guessing_gives_the_same_text_and_wants_the_same_tokenizer(sample: Gemma, tiny: Tokenizer) -> None:
    asked = "def add(a, b):\n    return a + b\n\ndef add(a, b):\n"
    plain = sample.generate(asked, max_new_tokens=12)
    assert sample.generate(asked, max_new_tokens=12, look_up=True).token_ids == plain.token_ids
    assert sample.generate(asked, max_new_tokens=12, draft=sample).token_ids == plain.token_ids
    with pytest.raises(GemmaryError, match="the draft model has another tokenizer"):
        sample.generate(asked, draft=dataclasses.replace(sample, tokenizer=tiny))
