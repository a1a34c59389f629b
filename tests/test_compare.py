"""`gemmary compare`: one command from questions to a comparison, which goes on where it was stopped, with all that was done."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai_endpoint import Body, OpenAIEndpoint, Refusal, judged_by
from small_models import CONFIGS, values_of, write_native

from gemmary import cli, comparison
from gemmary.data.conversations import preference
from gemmary.data.instructions import InstructionSettings, InstructionSource, gather, read_gathered
from gemmary.errors import GemmaryError
from gemmary.evaluate import speakers
from gemmary.evaluate.pairs import Lines, Pair
from gemmary.evaluate.questions import Question, questions
from gemmary.evaluate.ratings import Ratings
from gemmary.evaluate.speakers import Said
from gemmary.text import Tokenizer

MT_BENCH: list[Any] = [
    {"question_id": 81, "category": "writing", "turns": ["Write about Hawaii.", "Now begin each sentence with A."]},
    {"question_id": 82, "category": "writing", "turns": ["Draft an email.", "Criticize it."]},
    {"question_id": 101, "category": "math", "turns": ["What is 7 + 5?", "Double it."]},
    {"question_id": 102, "category": "math", "turns": ["What is 9 * 9?", "Halve it."]},
]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speakers, "_RETRIES", 0)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def speaks(body: Body) -> str:
    """The model "long" says more than "short", each more in every turn; both say what they were asked last."""
    asked = body["messages"][-1]["content"]
    return f"{asked} " + ("indeed " * 5 if body["model"] == "long" else "yes") + str(len(body["messages"]))


def longer(first: str, second: str) -> str:
    return "tie" if len(first) == len(second) else "first" if len(first) > len(second) else "second"


def all_of(judge: Callable[[Body], str]) -> Callable[[Body], str]:
    """Speakers and a judge behind one address."""
    return lambda body: judge(body) if body["model"] == "judge" else speaks(body)


class Desk:
    """A folder with questions, and the command line run on them."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capsys = folder, capsys
        self.out = folder / "out"
        self.prompts = self.write(MT_BENCH)

    def write(self, records: list[Any], name: str = "question.jsonl") -> Path:
        path = self.folder / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return path

    def run(self, *arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["compare", *map(str, arguments)])
        out, err = self._capsys.readouterr()
        return int(ended.value.code or 0), out, err

    def compare(self, url: str, *more: str | Path, a: str = "long", b: str = "short") -> Any:
        sides = [f"{url}#{a}", f"{url}#{b}", "--prompts", self.prompts, "--judge", f"{url}#judge", "--out", self.out]
        code, out, err = self.run(*sides, *more, "--json")
        assert code == 0, err
        return json.loads(out)

    def lines(self, name: str) -> list[Any]:
        return [json.loads(line) for line in (self.out / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def desk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Desk:
    return Desk(tmp_path, capsys)


# ---- One command ----


def test_questions_become_a_comparison(desk: Desk) -> None:
    with OpenAIEndpoint(all_of(judged_by(longer))) as endpoint:
        found = desk.compare(endpoint.url)
        sides = [f"{endpoint.url}#long", f"{endpoint.url}#short", "--prompts", str(desk.prompts)]
        code, table, _ = desk.run(*sides, "--judge", f"{endpoint.url}#judge", "--out", str(desk.out))
    assert code == 0
    every = found["judge"]["all"]
    assert [every[key] for key in ("pairs", "wins", "ties", "losses", "invalid", "rate")] == [4, 4, 0, 0, 0, 1.0]
    assert every["interval"] == [pytest.approx(0.025**0.25, abs=1e-6), 1.0]
    assert {name: one["wins"] for name, one in found["judge"]["categories"].items()} == {"writing": 2, "math": 2}
    assert found["judge"]["bias"]["consistent"]["share"] == 1
    assert json.loads((desk.out / "comparison.json").read_text(encoding="utf-8")) == found
    for word in ("writing", "math", "all", "100 [39.8, 100]", "in both orders", "A wins"):
        assert word in table
    drawn = (desk.out / "comparison.svg").read_text(encoding="utf-8")
    assert drawn.startswith("<svg")
    assert all(word in drawn for word in ("writing", "math", "100 [39.8, 100]", "A wins", "B wins", "tie"))
    # 4 questions, 2 turns, 2 sides; 4 pairs in 2 orders; the second command asked nothing.
    assert Counter(body["model"] for body in endpoint.asked) == {"long": 8, "short": 8, "judge": 8}
    first = desk.lines("pairs.jsonl")[0]
    assert (first["id"], first["category"], first["judge"]) == ("81", "writing", 1.0)
    assert [len(first["a"]), len(first["b"]), sorted(first["verdicts"])] == [2, 2, ["a_first", "b_first"]]
    assert first["verdicts"]["b_first"]["said"].startswith("I have read both.")


def test_the_second_turn_comes_after_ones_own_first_answer(desk: Desk) -> None:
    with OpenAIEndpoint(all_of(judged_by(longer))) as endpoint:
        desk.compare(endpoint.url)
    for name in ("long", "short"):
        second = [body["messages"] for body in endpoint.asked if body["model"] == name and len(body["messages"]) > 1]
        assert len(second) == 4
        for messages in second:
            assert [message["role"] for message in messages] == ["user", "assistant", "user"]
            assert messages[1]["content"] == speaks({"model": name, "messages": messages[:1]})
    judged = [body["messages"][0]["content"] for body in endpoint.asked if body["model"] == "judge"]
    assert all(text.count(" PERSON\n") == 2 and text.count(" FIRST\n") == 2 for text in judged)


def test_turns_can_be_cut(desk: Desk) -> None:
    with OpenAIEndpoint(all_of(judged_by(longer))) as endpoint:
        desk.compare(endpoint.url, "--turns", "1")
    assert Counter(body["model"] for body in endpoint.asked) == {"long": 4, "short": 4, "judge": 8}


def test_how_answers_are_drawn(desk: Desk) -> None:
    options = ["--temperature", "0.7", "--top-p", "0.9", "--seed", "5", "--max-new-tokens", "33"]
    with OpenAIEndpoint(all_of(judged_by(longer)), finish="length") as endpoint:
        found = desk.compare(endpoint.url, *options)
    names = ("temperature", "top_p", "seed", "max_tokens")
    sent = {body["model"]: [body[name] for name in names] for body in endpoint.asked}
    assert sent["long"] == sent["short"] == [0.7, 0.9, 5, 33]
    assert sent["judge"] == [0, 1, 5, 2048]
    assert found["cut"] == {"a": 8, "b": 8}


# ---- Judges ----


@pytest.mark.parametrize(
    ("prefers", "rate", "places"),
    [
        (lambda first, second: "first", 0.5, (1, 0, 0)),
        (lambda first, second: "second", 0.5, (0, 1, 0)),
        (lambda first, second: "tie", 0.5, (0, 0, 1)),
        (lambda first, second: "first" if len(first) > len(second) else "tie", 0.75, (0, 0, 0)),
    ],
)
def test_a_place_is_no_merit(desk: Desk, prefers: Callable[[str, str], str], rate: float, places: Any) -> None:
    with OpenAIEndpoint(all_of(judged_by(prefers))) as endpoint:
        found = desk.compare(endpoint.url)["judge"]
    assert found["all"]["rate"] == rate
    assert tuple(found["bias"][key]["share"] for key in ("first", "second", "consistent")) == places


def test_nonsense_is_retried_then_invalid_and_stays_so(desk: Desk) -> None:
    decide = judged_by(longer)

    def judge(body: Body) -> str:
        return "Hm." if "Hawaii" in body["messages"][0]["content"] else decide(body)

    with OpenAIEndpoint(all_of(judge)) as endpoint:
        found = desk.compare(endpoint.url)
        tries = [body for body in endpoint.asked if "Hawaii" in body["messages"][0]["content"]][-6:]
        assert sorted((body["seed"], body["temperature"]) for body in tries) == [
            (0, 0), (0, 0), (1, 0.7), (1, 0.7), (2, 0.7), (2, 0.7),
        ]  # fmt: skip
        asked = len(endpoint.asked)
        assert desk.compare(endpoint.url) == found
        assert len(endpoint.asked) == asked
    every = found["judge"]["all"]
    assert [every[key] for key in ("pairs", "wins", "invalid", "rate")] == [4, 3, 1, 1.0]
    assert found["judge"]["bias"]["pairs"] == 3
    assert desk.lines("pairs.jsonl")[0]["verdicts"]["a_first"] == {"value": None, "said": "Hm.", "tries": 3}


def test_one_order_without_a_verdict_is_no_half_verdict(desk: Desk) -> None:
    decide = judged_by(longer)

    def judge(body: Body) -> str:
        said = decide(body)
        return said if said.endswith("first") else "Hm."

    with OpenAIEndpoint(all_of(judge)) as endpoint:
        every = desk.compare(endpoint.url)["judge"]["all"]
    assert (every["invalid"], every["rate"]) == (4, None)


def test_equal_answers_are_ties_and_nobody_is_asked(desk: Desk) -> None:
    with OpenAIEndpoint(all_of(judged_by(longer))) as endpoint:
        found = desk.compare(endpoint.url, b="long")
    assert Counter(body["model"] for body in endpoint.asked) == {"long": 16}
    assert (found["equal"], found["judge"]["all"]["ties"], found["judge"]["bias"]["pairs"]) == (4, 4, 0)


def test_rules_of_ones_own(desk: Desk) -> None:
    (desk.folder / "rubric.txt").write_text("Count the sheep.", encoding="utf-8")
    (desk.folder / "constitution.txt").write_text("Sheep are good.", encoding="utf-8")
    with OpenAIEndpoint(all_of(judged_by(longer))) as endpoint:
        desk.compare(endpoint.url)
        files = ["--rubric", desk.folder / "rubric.txt", "--constitution", desk.folder / "constitution.txt"]
        desk.compare(endpoint.url, *files)
    judged = [body["messages"][0]["content"] for body in endpoint.asked if body["model"] == "judge"]
    assert ["Count the sheep." in text and "Sheep are good." in text for text in judged] == [False] * 8 + [True] * 8
    assert sum(body["model"] == "long" for body in endpoint.asked) == 8  # other rules, other verdicts, the same answers


# ---- Nothing is lost ----


@pytest.mark.parametrize("lives", [0, 5, 13, 20])
def test_an_endpoint_dies_and_the_same_command_goes_on(desk: Desk, lives: int) -> None:
    with OpenAIEndpoint(all_of(judged_by(longer)), lives=lives) as endpoint:
        sides = [f"{endpoint.url}#long", f"{endpoint.url}#short", "--prompts", desk.prompts, "--out", desk.out]
        code, out, err = desk.run(*sides, "--judge", f"{endpoint.url}#judge", "--at-once", "3", "--json")
        assert (code, out) == (2, "")
        said = err.strip().splitlines()[-1]
        assert said.startswith(f"error: {endpoint.url} does not answer")
        assert f"kept in {desk.out}: the same command goes on" in said
        assert len(desk.lines("answers.jsonl")) + len(desk.lines("verdicts.jsonl")) == lives
        assert not (desk.out / "comparison.json").exists()
        endpoint.lives = None
        found = desk.compare(endpoint.url)
        asked = [json.dumps(body, sort_keys=True) for body in endpoint.asked]
        assert len(asked) == len(set(asked)) == 24  # nothing twice
    assert found["judge"]["all"]["wins"] == 4


@pytest.mark.parametrize("name", ["answers.jsonl", "verdicts.jsonl"])
def test_a_torn_line_is_made_again_alone(desk: Desk, name: str) -> None:
    with OpenAIEndpoint(all_of(judged_by(longer))) as endpoint:
        found = desk.compare(endpoint.url, "--at-once", "1")
        whole = (desk.out / name).read_bytes()
        lines = whole.splitlines(keepends=True)
        (desk.out / name).write_bytes(whole[: -len(lines[-1]) // 2])
        asked = len(endpoint.asked)
        assert desk.compare(endpoint.url) == found
        assert len(endpoint.asked) == asked + 1
    assert (desk.out / name).read_bytes() == whole
    (desk.out / name).write_bytes(b"".join([lines[0], b"{no JSON\n", b"[]\n", *lines[1:]]))
    with closing(Lines(desk.out / name)) as again:
        assert all(again.get(json.loads(line)["key"]) for line in lines)


def test_a_kill_loses_no_line(desk: Desk) -> None:
    script = (
        "import sys; from pathlib import Path; from gemmary.evaluate.pairs import Lines\n"
        "lines = Lines(Path(sys.argv[1]))\n"
        "for i in range(10 ** 6):\n"
        "    lines.add(f'key{i}', {'text': 'x' * 100})\n"
        "    print(i, flush=True)\n"
    )
    path = desk.folder / "answers.jsonl"
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = [int(process.stdout.readline()) for _ in range(30)]
        process.kill()
        told += [int(line) for line in process.stdout.read().split("\n")[:-1] if line]
    with closing(Lines(path)) as again:
        assert all(again.get(f"key{i}") for i in told)


def test_two_do_not_write_one_folder(desk: Desk) -> None:
    desk.out.mkdir()
    with OpenAIEndpoint(all_of(judged_by(longer))) as endpoint, closing(Lines(desk.out / "answers.jsonl")):
        sides = [f"{endpoint.url}#long", f"{endpoint.url}#short", "--prompts", desk.prompts, "--out", desk.out]
        code, _, err = desk.run(*sides, "--judge", f"{endpoint.url}#judge")
    assert code == 2
    assert "another comparison is at work" in err


def test_a_changed_prompt_asks_for_that_one_alone(desk: Desk) -> None:
    with OpenAIEndpoint(all_of(judged_by(longer))) as endpoint:
        desk.compare(endpoint.url)
        desk.write([{**MT_BENCH[0], "turns": ["Write about Fiji.", "Again."]}, *MT_BENCH[1:]])
        asked = len(endpoint.asked)
        assert desk.compare(endpoint.url)["pairs"] == 4
        assert Counter(body["model"] for body in endpoint.asked[asked:]) == {"long": 2, "short": 2, "judge": 2}


# ---- Endpoints ----


def test_keys_come_from_the_environment(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("A", "JUDGE"):
        monkeypatch.setenv(f"GEMMARY_KEY_{name}", f"key-{name}")
    monkeypatch.setenv("OPENAI_API_KEY", "for OpenAI alone")
    with OpenAIEndpoint(all_of(judged_by(longer))) as endpoint:
        desk.compare(endpoint.url)
    sent = {body["model"]: key for body, key in zip(endpoint.asked, endpoint.keys, strict=True)}
    assert sent == {"long": "Bearer key-A", "short": "Bearer none", "judge": "Bearer key-JUDGE"}
    for path in desk.out.iterdir():
        assert b"key-" not in path.read_bytes().replace(b'"key": ', b"")


def test_a_model_that_is_alone_needs_no_name(desk: Desk) -> None:
    with OpenAIEndpoint(speaks, models=["long"]) as one, OpenAIEndpoint(all_of(judged_by(longer))) as other:
        sides = [one.url, f"{other.url}#short", "--judge", f"{other.url}#judge"]
        code, out, _ = desk.run(*sides, "--prompts", desk.prompts, "--out", desk.out, "--json")
        assert (code, json.loads(out)["judge"]["all"]["wins"]) == (0, 4)
        assert {body["model"] for body in one.asked} == {"long"}
        one.models += ["another"]
        code, _, err = desk.run(*sides, "--prompts", desk.prompts, "--out", desk.folder / "new")
        assert code == 2
        assert "has 2 models (long, another): name one" in err


def test_what_an_endpoint_does_not_take_is_left_out_and_said(desk: Desk) -> None:
    refused = {"max_tokens": "unsupported_parameter", "temperature": "unsupported_value"}

    def answer(body: Body) -> str | Refusal:
        for name, code in refused.items():
            if name in body:
                return Refusal(400, f"{name} is not supported", code, name)
        return all_of(judged_by(longer))(body)

    with OpenAIEndpoint(answer) as endpoint:
        sides = [f"{endpoint.url}#long", f"{endpoint.url}#short", "--prompts", desk.prompts, "--out", desk.out]
        code, _, err = desk.run(*sides, "--judge", f"{endpoint.url}#judge", "--max-new-tokens", "7")
    assert code == 0
    assert err.count("does not take temperature") == 3
    assert all("temperature" not in body and "max_tokens" not in body for body in endpoint.asked)
    assert {body["max_completion_tokens"] for body in endpoint.asked} == {7, 2048}


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        (Refusal(401, "who are you"), "its key goes into GEMMARY_KEY_A"),
        (Refusal(404, "what model"), "does its address end with /v1?"),
        (Refusal(400, "too long", "context_length_exceeded", "messages"), "answers 400 "),
        (Refusal(400, "strange", "unsupported_value", "messages"), "strange"),
        (Refusal(400, "not this", "unsupported_value", "stop"), "not this"),
        (Refusal(500, "out of order"), "answers 500 "),
    ],
)
def test_refusals_are_one_line(desk: Desk, refusal: Refusal, message: str) -> None:
    with OpenAIEndpoint(lambda body: refusal) as endpoint:
        code, _, err = desk.run(f"{endpoint.url}#a", f"{endpoint.url}#b", "--prompts", desk.prompts, "--out", desk.out)
    assert code == 2
    (line,) = err.strip().splitlines()
    assert message in line
    assert "at prompt " in line


# ---- Models here ----


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, tiny: Tokenizer) -> tuple[Path, Path]:
    """Two random nano models of one shape, so that both are compiled once."""
    config = CONFIGS["gemma1-mqa"].replace(num_layers=1, context=2048)
    values = values_of(config)
    others = {name: np.roll(value, 1, axis=-1) for name, value in values.items()}
    folder = tmp_path_factory.mktemp("two")
    return write_native(folder / "a", config, tiny, values), write_native(folder / "b", config, tiny, others)


def test_models_answer_here(desk: Desk, two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [
        *MT_BENCH[:2],
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]},
    ]
    prompts = desk.write(asked, "some.jsonl")
    with OpenAIEndpoint(judged_by(longer)) as judge:
        command = [
            *two,
            "--prompts",
            prompts,
            "--judge",
            judge.url,
            "--max-new-tokens",
            "8",
            "--at-once",
            "2",
            "--out",
            desk.out,
        ]
        code, out, err = desk.run(*command, "--json")
        assert code == 0, err
        found = json.loads(out)
        monkeypatch.setattr(cli, "load", lambda *_, **__: pytest.fail("there is nothing left to answer"))
        assert desk.run(*command, "--json") == (0, out, "")
    assert found["pairs"] == 3
    assert found["judge"]["all"]["invalid"] == 0
    answers = desk.lines("answers.jsonl")
    assert Counter(line["side"] for line in answers) == {"a": 5, "b": 5}
    assert found["cut"]["a"] == sum(line["cut"] for line in answers if line["side"] == "a")


def test_answers_made_together_are_those_made_alone(two: tuple[Path, Path]) -> None:
    from gemmary.evaluate.speakers import Draw, Local
    from gemmary.gemma import load

    gemma = load(two[0])
    asked = [[{"role": "user", "content": text}] for text in ("Hi", "def f(x):")]
    draw = Draw(max_new_tokens=12)
    with closing(Local(gemma.engine, gemma.tokenizer, 2)) as local:
        found: dict[int, Said] = {}
        threads = [
            threading.Thread(target=lambda i=i: found.__setitem__(i, local.say(asked[i], draw))) for i in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with pytest.raises(GemmaryError, match="the model has room for 2048"):
            local.say([{"role": "user", "content": "x" * 9000}], draw)
    for i, messages in enumerate(asked):
        alone = gemma.chat(messages, max_new_tokens=12)
        assert found[i] == Said(alone.text, alone.finish_reason == "length")


def test_a_model_that_has_changed_answers_anew(desk: Desk, two: tuple[Path, Path]) -> None:
    model = desk.folder / "model"
    shutil.copytree(two[0], model)
    with OpenAIEndpoint(all_of(judged_by(longer))) as endpoint:
        sides = [model, f"{endpoint.url}#short", "--judge", f"{endpoint.url}#judge", "--max-new-tokens", "4"]
        command = [*sides, "--prompts", desk.write(MT_BENCH[:1], "one.jsonl"), "--at-once", "2", "--out", desk.out]
        for count in (2, 2):
            assert desk.run(*command)[0] == 0
            assert sum(line["side"] == "a" for line in desk.lines("answers.jsonl")) == count
        os.utime(model / "gemmary.json", (2e9, 2e9))
        assert desk.run(*command)[0] == 0
        assert sum(line["side"] == "a" for line in desk.lines("answers.jsonl")) == 4


def test_the_judge_may_be_a_model_here(desk: Desk, two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A random one says nonsense, which is counted and no crash."""
    monkeypatch.setattr(comparison, "_JUDGE_TOKENS", 8)
    for name in ("rubric", "constitution"):
        (desk.folder / f"{name}.txt").write_text("Be fair.", encoding="utf-8")
    files = ["--rubric", desk.folder / "rubric.txt", "--constitution", desk.folder / "constitution.txt"]
    with OpenAIEndpoint(speaks) as endpoint:
        sides = [f"{endpoint.url}#long", f"{endpoint.url}#short", "--prompts", desk.write(MT_BENCH[:1], "one.jsonl")]
        code, out, err = desk.run(
            *sides, "--judge", two[1], *files, "--turns", "1", "--at-once", "2", "--out", desk.out, "--json"
        )
    assert code == 0, err
    assert json.loads(out)["judge"]["all"]["invalid"] == 1


# ---- People ----


def _rate(port: int, choices: dict[str, str], failures: list[str]) -> None:
    """Raters on the page's routes, as its script would ask; then Ctrl-C."""

    def ask(route: str, **body: str) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/{route}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    try:
        for _ in range(200):
            try:
                ask("next", rater="Anna")
                break
            except OSError:
                time.sleep(0.05)
        for rater, likes in choices.items():
            view = ask("next", rater=rater)
            while "pair" in view:
                longest = max(("first", "second"), key=lambda side: len(view["turns"][-1][side]))
                other = {"first": "second", "second": "first"}[longest]
                choice = {"long": longest, "short": other}.get(likes, likes)
                view = ask("rate", rater=rater, pair=view["pair"], choice=choice)
            if view != {"done": 4, "total": 4}:
                failures.append(str(view))
    except Exception as error:
        failures.append(repr(error))
    os.kill(os.getpid(), signal.SIGINT)


def test_people_rate_and_the_tally_comes_at_the_end(desk: Desk) -> None:
    failures: list[str] = []
    choices = {"Anna": "long", "Ben": "long", "Cleo": "short", "Dan": "skip"}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    raters = threading.Thread(target=_rate, args=(port, choices, failures))
    with OpenAIEndpoint(all_of(judged_by(longer))) as endpoint:
        sides = [f"{endpoint.url}#long", f"{endpoint.url}#short", "--prompts", desk.prompts, "--out", desk.out]
        raters.start()
        code, out, err = desk.run(*sides, "--port", str(port), "--json")  # without a judge, people are asked
        raters.join()
        assert (code, failures) == (0, []), err
        assert f"http://127.0.0.1:{port}/" in err
        found = json.loads(out)
        both = desk.compare(endpoint.url)
        table = desk.run(*sides, "--judge", f"{endpoint.url}#judge")[1]
    human = found["human"]
    assert human["raters"] == {"Anna": 4, "Ben": 4, "Cleo": 4}
    assert (human["all"]["rate"], human["all"]["wins"], human["unrated"]) == (2 / 3, 4, 0)
    assert human["agreement"]["pairs"] == 4
    assert human["agreement"]["alpha"] == pytest.approx(1 - (1 / 3 * 2) / (2 * (12 * (2 / 3) * (1 / 3)) / 11))
    assert both["human"] == human
    assert both["judge"]["all"]["wins"] == 4
    assert "Krippendorff's alpha -0.3" in table
    assert desk.lines("pairs.jsonl")[0]["ratings"] == {"Anna": 1.0, "Ben": 1.0, "Cleo": 0.0}


# ---- Preferences ----


def test_pairs_become_preferences_that_reward_reads(desk: Desk) -> None:
    asked = [
        *MT_BENCH,
        {"id": "system", "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]},
    ]
    asked[3] = {"id": "empty", "prompt": "Say nothing."}
    desk.write(asked)

    def answer(body: Body) -> str:
        if body["model"] == "short" and "nothing" in body["messages"][-1]["content"]:
            return ""
        return all_of(judged_by(longer))(body)

    wanted = desk.folder / "pairs.jsonl"
    with OpenAIEndpoint(answer) as endpoint:
        desk.compare(endpoint.url, "--turns", "1", "--export", wanted)
        records = [json.loads(line) for line in wanted.read_text(encoding="utf-8").splitlines()]
        assert [one["id"] for one in records] == ["81", "82", "101", "system"]
        for record in records:
            found = preference(record, "refuse")
            assert found.chosen == speaks({"model": "long", "messages": found.prompt})
            assert found.rejected == speaks({"model": "short", "messages": found.prompt})
        assert records[3]["prompt"] == [{"role": "user", "content": "Be brief.\n\nHi"}]
        assert {one["by"] for one in records} == {"judge"}
        # A person's word counts before the judge's; a tie of theirs is no preference.
        with closing(Ratings(desk.out / "ratings.sqlite")) as ratings:
            pairs = _pairs(desk)
            ratings.rate("Anna", pairs[0].key, 0.0)
            ratings.rate("Anna", pairs[1].key, 0.5)
        desk.compare(endpoint.url, "--turns", "1", "--export", wanted)
    records = [json.loads(line) for line in wanted.read_text(encoding="utf-8").splitlines()]
    assert [(one["id"], one["by"]) for one in records] == [("81", "human"), ("101", "judge"), ("system", "judge")]
    assert len(records[0]["chosen"][0]["content"]) < len(records[0]["rejected"][0]["content"])
    settings = InstructionSettings(source=(InstructionSource(name="mine", path=str(wanted), held_out=0.0),))
    report = gather(settings, desk.folder / "gathered", kind="preference", system="refuse")
    assert report["sources"]["mine"]["train"] == 3
    assert len(list(read_gathered(desk.folder / "gathered", "mine", "train"))) == 3


def _pairs(desk: Desk) -> list[Pair]:
    answers: dict[tuple[str, str], Said] = {}
    for line in desk.lines("answers.jsonl"):
        answers[line["side"], line["prompt"]] = Said(line["text"], line["cut"])
    return [Pair(one, (answers["a", one.id],), (answers["b", one.id],)) for one in questions(desk.prompts, 1)]


def test_turns_after_different_answers_are_no_preference(desk: Desk) -> None:
    wanted = desk.folder / "pairs.jsonl"

    def answer(body: Body) -> str:
        """To Hawaii both begin alike; only their last answers differ."""
        if body["model"] != "judge" and "Hawaii" in body["messages"][-1]["content"]:
            return "Aloha."
        return all_of(judged_by(longer))(body)

    with OpenAIEndpoint(answer) as endpoint:
        sides = [f"{endpoint.url}#long", f"{endpoint.url}#short", "--prompts", desk.prompts, "--out", desk.out]
        code, _, err = desk.run(*sides, "--judge", f"{endpoint.url}#judge", "--export", wanted)
    assert code == 0
    assert "wrote 1 preferences" in err
    assert "the other 3 pairs are none" in err
    (record,) = [json.loads(line) for line in wanted.read_text(encoding="utf-8").splitlines()]
    assert [message["content"] for message in record["prompt"]] == [
        MT_BENCH[0]["turns"][0],
        "Aloha.",
        MT_BENCH[0]["turns"][1],
    ]


# ---- Prompts ----


def test_the_shapes_that_people_have(desk: Desk) -> None:
    hi = {"role": "user", "content": "Hi"}
    path = desk.write(
        [
            {"messages": [hi, {"role": "assistant", "content": "Hello."}]},
            {"prompt": "Hi", "id": "p", "category": "chat"},
            {"prompt": [{"role": "system", "content": "Be kind."}, hi]},
            {"prompt": ["Hi", "Bye"], "prompt_id": 7, "category": "hub", "reference": []},
            {"question_id": 81, "category": "writing", "turns": ["Hi", "Bye"], "reference": ["x", "y"]},
            {"instruction": "Greet.", "output": "Hi."},
        ],
        "shapes.jsonl",
    )
    with path.open("a", encoding="utf-8") as file:
        file.write("\n")
    found = questions(path)
    user, bye = ({"role": "user", "content": "Hi"},), ({"role": "user", "content": "Bye"},)
    assert found == [
        Question("1", "other", (user,)),
        Question("p", "chat", (user,)),
        Question("3", "other", (({"role": "user", "content": "Be kind.\n\nHi"},),)),
        Question("7", "hub", (user, bye)),
        Question("81", "writing", (user, bye)),
        Question("6", "other", (({"role": "user", "content": "Greet."},),)),
    ]
    assert [len(one.turns) for one in questions(path, 1)] == [1] * 6


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "has no prompts"),
        ("no JSON", "bad.jsonl:1: not JSON"),
        ("[1]", "bad.jsonl:1: not an object"),
        ('{"text": "x"}', "bad.jsonl:1: it has no messages, no prompt"),
        ('{"prompt": " "}', "its content is empty"),
        ('{"turns": []}', "turns is a list of texts"),
        ('{"turns": ["a", 5]}', "its content must be text"),
        ('{"turns": ["a", " "]}', "its content is empty"),
        ('{"prompt": "a", "id": [1]}', "an id is a text or a whole number"),
        ('{"prompt": "a", "category": 5}', "a category a text"),
        ('{"prompt": "a", "id": 5}\n{"prompt": "b", "id": "5"}', "bad.jsonl:2: the id '5' has come before"),
    ],
)
def test_prompts_that_are_none(desk: Desk, line: str, message: str) -> None:
    path = desk.folder / "bad.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(GemmaryError) as raised:
        questions(path)
    assert message in str(raised.value)


BAD: list[tuple[list[str], str]] = [
    (["http://h/v1#a", "gone", "--prompts", "P"], "gone"),
    (["http://h/v1#a", "http://h/v1#b", "--prompts", "gone.jsonl"], "gone.jsonl cannot be read"),
    (["http://h/v1#a", "http://h/v1#b", "--prompts", "P", "--turns", "0"], "--turns is 0"),
    (["http://h/v1#a", "http://h/v1#b", "--prompts", "P", "--at-once", "0"], "at least 1"),
    (["http://h/v1#a", "http://h/v1#b", "--prompts", "P", "--top-p", "0"], "top_p"),
    (["http://h/v1#a", "http://h/v1#b", "--prompts", "P", "--export", "P"], "would overwrite the prompts"),
    (["http://h/v1#a", "http://h/v1#b", "--prompts", "P", "--rubric", "P"], "for a judge: give --judge"),
    (["http://h/v1#a", "http://h/v1#b", "--prompts", "P", "--judge", "http://h/v1", "--rubric", "gone"], "cannot be read"),
    (["http://me:secret@h/v1#a", "http://h/v1#b", "--prompts", "P"], "its key goes into GEMMARY_KEY_A"),
    (["http:///v1#a", "http://h/v1#b", "--prompts", "P"], "an endpoint is http://host:port/v1#model"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_mistakes(desk: Desk, arguments: list[str], message: str) -> None:
    code, out, err = desk.run(*(str(desk.prompts) if one == "P" else one for one in arguments), "--out", desk.out)
    assert (code, out) == (2, "")
    said = err.strip().splitlines()[-1]
    assert said.startswith("error: ")
    assert message in said
    assert "secret" not in said


def test_what_is_no_unicode_is_made_so(desk: Desk) -> None:
    """An endpoint may send a lone surrogate, which no other could be sent then."""
    with OpenAIEndpoint(lambda body: "\ud800 and more " + speaks(body).replace("\ud800", "?")) as endpoint:
        sides = [f"{endpoint.url}#long", f"{endpoint.url}#short", "--prompts", desk.prompts, "--out", desk.out]
        code, out, err = desk.run(*sides, "--judge", f"{endpoint.url}#judge", "--json")
    assert code == 0, err
    assert json.loads(out)["judge"]["all"]["invalid"] == 4
    assert desk.lines("pairs.jsonl")[0]["a"][0].startswith("? and more")
