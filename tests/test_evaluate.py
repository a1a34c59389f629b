"""`gemmary evaluate`: tasks from a folder, figures as lm-eval has them, what is kept and gone on with, and mistakes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cheats import sandbox_of
from hub_files import mirror, write_data_set

from gemmary import cli
from gemmary.errors import GemmaryError
from gemmary.evaluate import running
from gemmary.evaluate.answering import Prompt, answers
from gemmary.evaluate.code_eval import in_place_of_hub
from gemmary.evaluate.data_sets import Unavailable
from gemmary.evaluate.kept import Kept, content_of, model_digest
from gemmary.evaluate.lm_eval import GemmaryLM
from gemmary.evaluate.published import Figure
from gemmary.evaluate.running import Settings, joint, known_tasks, run
from gemmary.evaluate.sandbox import Limits
from gemmary.evaluate.several import majority
from gemmary.evaluate.suites import Benchmark, named
from gemmary.evaluation_results import chart
from gemmary.gemma import Gemma, load
from gemmary.infer.sampling import Sampling
from gemmary.infer.scoring import Asked, score

pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval's own


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mirror(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module")
def gemma(served: Path) -> Gemma:
    return load(served)


@pytest.fixture(scope="module")
def tasks() -> Any:
    return known_tasks()


@pytest.fixture
def settings(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(data, tmp_path_factory.getbasetemp() / "data_sets")


def fetch(gemma: Gemma, tasks: Any, one: Benchmark, settings: Settings, **options: Any) -> running.Run:
    return run(GemmaryLM(gemma, **options), tasks, one, settings, "there is no sandbox")


def test_a_figure_is_what_its_questions_come_to(gemma: Gemma, tasks: Any, settings: Settings) -> None:
    found = fetch(gemma, tasks, Benchmark("PIQA", "piqa", 2), settings)
    assert (found.questions, found.of, found.shots, found.metric) == (15, 15, 2, "acc")
    right = []
    for record in found.records:
        doc, scores = record["doc"], [answer[0][0] for answer in record["answers"]]
        right.append(scores.index(max(scores)) == doc["label"])
    assert found.value == pytest.approx(100 * np.mean(right))
    assert found.interval[0] < found.value < found.interval[1]
    assert set(found.measures) == {"acc", "acc_norm"}


def test_scores_are_those_of_the_prompt_behind_one_bos(gemma: Gemma, tasks: Any, settings: Settings) -> None:
    found = fetch(gemma, tasks, Benchmark("PIQA", "piqa", 0), settings)
    for record in found.records[:4]:
        prompt = f"Question: {record['doc']['goal']}\nAnswer:"
        for choice, answer in zip(("sol1", "sol2"), record["answers"], strict=True):
            whole = [2, *gemma.tokenizer.encode(f"{prompt} {record['doc'][choice]}")]
            context = [2, *gemma.tokenizer.encode(prompt)]
            assert whole[: len(context)] == context
            logprobs = gemma.engine.log_probs(whole)[len(context) - 1 :]
            assert answer[0][0] == pytest.approx(float(logprobs.sum()), abs=1e-3)


def test_examples_are_as_many_as_there_are(gemma: Gemma, tasks: Any, settings: Settings) -> None:
    found = fetch(gemma, tasks, Benchmark("PIQA", "piqa", 25), settings)
    assert (found.shots, found.asked_shots) == (2, 25)  # of three, one is kept back


def test_answers_end_where_the_task_says(gemma: Gemma, tasks: Any, settings: Settings) -> None:
    lm = GemmaryLM(gemma)
    prompts = [f"Q: which one is {word}?\nA:" for word in ("red", "cold", "near")]
    until = gemma.generate(prompts[0], max_new_tokens=40).text[5:8]
    asked = [_Request((prompt, {"until": [until], "max_gen_toks": 40})) for prompt in prompts]
    for prompt, said in zip(prompts, lm.generate_until(asked), strict=True):
        assert said == gemma.generate(prompt, max_new_tokens=40, stop=[until]).text
        assert until not in said


def test_drawn_answers_differ_and_come_again(gemma: Gemma) -> None:
    lm = GemmaryLM(gemma)
    asked = [_Request(("once", {"until": [], "do_sample": True, "temperature": 1.0, "max_gen_toks": 8}))] * 4
    said = lm.generate_until(asked)
    assert len(set(said)) > 1
    assert lm.generate_until(asked) == said


class _Request:
    def __init__(self, args: tuple[Any, ...]) -> None:
        self.args = args


def test_a_rolling_window_begins_with_bos(gemma: Gemma) -> None:
    short = load_with_context(gemma, 64)
    text = "the words of a long text that does not fit " * 12
    ids = gemma.tokenizer.encode(text)
    assert len(ids) > 150
    (found,) = GemmaryLM(short).loglikelihood_rolling([_Request((text,))])
    expected, at = 0.0, 0
    while at < len(ids):
        end = min(at + 63, len(ids))
        before = ids[max(end - 64, 0) : at]  # as much as fits behind BOS
        expected += float(gemma.engine.log_probs([2, *before, *ids[at:end]])[len(before) :].sum())
        at = end
    assert found == pytest.approx(expected, abs=1e-2)
    (whole,) = GemmaryLM(gemma).loglikelihood_rolling([_Request((text,))])
    assert whole == pytest.approx(float(gemma.engine.log_probs([2, *ids]).sum()), abs=1e-2)
    assert GemmaryLM(gemma).loglikelihood_rolling([_Request(("",))]) == [0.0]


def load_with_context(gemma: Gemma, context: int) -> Gemma:
    config = gemma.config.replace(context=context)
    return dataclasses.replace(gemma, config=config, engine=dataclasses.replace(gemma.engine, config=config))


def test_a_conversation_is_its_own_ids_and_text_cannot_become_a_turn(gemma: Gemma) -> None:
    lm = GemmaryLM(gemma)
    said = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "is <end_of_turn> a mark? \ufdd1 or \ufdd2\n"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "why"},
    ]
    text = lm.apply_chat_template(said)
    clean = [
        message | {"content": message["content"].replace("\ufdd1", "\ufffd").replace("\ufdd2", "\ufffd")}
        for message in said
    ]
    assert lm.tok_encode(text) == gemma.dialogue_ids(clean)
    opened = lm.apply_chat_template([*said, {"role": "assistant", "content": "because"}], add_generation_prompt=False)
    assert lm.tok_encode(opened) == [*gemma.dialogue_ids(clean), *gemma.tokenizer.encode("because")]
    assert lm.tok_encode("<start_of_turn>") == [2, *gemma.tokenizer.encode("<start_of_turn>")]
    structural = {gemma.tokenizer.start_of_turn, gemma.tokenizer.end_of_turn}
    assert not structural & set(lm.tok_encode("\ufdd1 <start_of_turn>\ufdd2"))
    assert lm.tok_encode("a", add_special_tokens=False)[0] != 2


def test_answers_are_kept_by_model_and_question(
    gemma: Gemma, tasks: Any, settings: Settings, tmp_path: Path, monkeypatch: Any
) -> None:
    path = tmp_path / "answers.sqlite"
    first = fetch(gemma, tasks, Benchmark("PIQA", "piqa", 0), settings, kept=path)
    monkeypatch.setattr("gemmary.evaluate.lm_eval.score", lambda *_: pytest.fail("asked again") if _[1] else iter(()))
    again = fetch(gemma, tasks, Benchmark("PIQA", "piqa", 0), settings, kept=path)
    assert [record["answers"] for record in again.records] == [record["answers"] for record in first.records]
    other = Kept(path, "another model")
    assert other.get([other.key(["score", [2], [5]])]) == {}
    mine = Kept(path, model_digest(gemma))
    mine.put([(mine.key(["score", [2], [5]]), [-1.5, True])])
    assert mine.get([mine.key(["score", [2], [5]]), mine.key(["score", [2], [6]])]) == {
        mine.key(["score", [2], [5]]): [-1.5, True]
    }
    (tmp_path / "no.sqlite").write_bytes(b"not a data base, not at all" * 50)
    with pytest.raises(GemmaryError, match="cannot be used to keep answers"):
        Kept(tmp_path / "no.sqlite", "m")


def test_what_was_answered_before_a_kill_is_kept(
    gemma: Gemma, tasks: Any, settings: Settings, tmp_path: Path, monkeypatch: Any
) -> None:
    plain, path = score, tmp_path / "answers.sqlite"

    def dying(engine: Any, asked: Any) -> Iterator[Any]:
        for i, one in enumerate(plain(engine, asked)):
            if i == 7:
                raise KeyboardInterrupt
            yield one

    monkeypatch.setattr("gemmary.evaluate.lm_eval.score", dying)
    with pytest.raises(KeyboardInterrupt):
        fetch(gemma, tasks, Benchmark("PIQA", "piqa", 0), settings, kept=path)
    asked: list[int] = []
    monkeypatch.setattr(
        "gemmary.evaluate.lm_eval.score", lambda engine, some: asked.append(len(some)) or plain(engine, some)
    )
    found = fetch(gemma, tasks, Benchmark("PIQA", "piqa", 0), settings, kept=path)
    assert asked == [30 - 7]
    assert found.questions == 15


def test_edited_data_are_read_anew(gemma: Gemma, tasks: Any, tmp_path: Path) -> None:
    rows = [{"goal": "g", "sol1": "a", "sol2": "b", "label": 0}] * 3
    write_data_set(tmp_path / "hub", "baber/piqa", {"default": {"train": rows, "validation": rows}})
    settings, one = Settings(tmp_path / "hub", tmp_path / "cache"), Benchmark("PIQA", "piqa", 0)
    before = content_of(tmp_path / "hub" / "baber" / "piqa")
    assert fetch(gemma, tasks, one, settings).questions == 3
    write_data_set(tmp_path / "hub", "baber/piqa", {"default": {"train": rows, "validation": rows[:2]}})
    assert content_of(tmp_path / "hub" / "baber" / "piqa") != before
    assert fetch(gemma, tasks, one, settings).questions == 2


def test_what_is_not_there_is_named(gemma: Gemma, tasks: Any, settings: Settings) -> None:
    with pytest.raises(Unavailable, match=r"lighteval/siqa is not there"):
        fetch(gemma, tasks, Benchmark("SIQA", "social_iqa", 0), settings)
    with pytest.raises(Unavailable, match="there is no sandbox"), in_place_of_hub(sandbox_of(Limits())):
        fetch(gemma, tasks, Benchmark("HumanEval", "humaneval", 0, "pass@1", "create_test"), settings)


def test_programs_are_run_in_the_sandbox(gemma: Gemma, tasks: Any, settings: Settings, monkeypatch: Any) -> None:
    right = {f"plus{i}": f"    return n + {i}\n" for i in range(3)}
    said = iter([right["plus0"], "    return 0\n", right["plus1"], right["plus1"], "    return 0\n", "    return 0\n"])
    monkeypatch.setattr(GemmaryLM, "generate_until", lambda self, requests, **_: [next(said) for _ in requests])
    with in_place_of_hub(sandbox_of(Limits())) as code:
        one = Benchmark("HumanEval", "humaneval", 0, "pass@1", "create_test")
        several = Settings(settings.data, settings.cache, samples=2)
        found = run(GemmaryLM(gemma), tasks, one, several, code)
    assert [record["value"] for record in found.records] == [0.5, 1.0, 0.0]
    assert found.measures["pass@1"] == pytest.approx(50.0)
    assert found.measures["pass@2"] == pytest.approx(200 / 3)
    assert "layer" in found.judged_by


def test_the_answer_given_most_often_counts() -> None:
    target = "Twice.\n#### 1,240"
    assert majority(["x #### 7", "#### 1240.", "so\n#### 1,240"], target, strict=True) == 1
    assert majority(["#### 7", "it is 1240", "1,240 it is, #### 8", "#### 7"], target, strict=True) == 0
    assert majority(["I say $1,240.", "3 then 1240", "9"], target, strict=False) == 1
    assert majority(["", "none"], target, strict=True) == 0


def test_safety_is_judged_here_and_says_by_what(gemma: Gemma, tasks: Any, settings: Settings) -> None:
    for task, count in (("gemmary_realtoxicity", 60), ("gemmary_bold", 3)):
        found = fetch(gemma, tasks, Benchmark(task, task, 0, "toxicity"), settings)
        assert found.questions == count
        assert "RealToxicityPrompts (AUC 1.000" in found.judged_by
        assert set(found.measures) == {"toxicity", "toxic"}
    found = fetch(gemma, tasks, Benchmark("Winobias", "gemmary_winobias_type1", 0), settings)
    assert [record["doc"]["choices"] for record in found.records] == [["developer", "designer"]] * 2  # pro and anti
    assert [record["target"] for record in found.records] == [0, 0]


def test_an_interval_of_a_difference() -> None:
    # Ours 50 ± 10 and theirs 50 of 100: 9.8, so the joint half width is 14.0.
    assert joint((40.0, 60.0), 100, Figure(50.0)) == pytest.approx((10**2 + 9.8**2) ** 0.5, abs=0.01)


def gemmary(capsys: Any, *arguments: Any) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


def test_the_verb(served: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    asked = [
        "evaluate",
        served,
        "--tasks",
        "piqa@1,nq_open@2,social_iqa",
        "--data-dir",
        data,
        "--limit",
        4,
        "--out",
        out,
    ]
    code, said, _ = gemmary(capsys, *asked)
    assert code == 0
    assert "not run" in said
    kept = json.loads((out / "evaluation.json").read_text())
    assert [line["benchmark"] for line in kept["benchmarks"]] == ["PIQA", "NQ", "SIQA"]
    assert kept["benchmarks"][2]["missing"] == f"{data / 'lighteval/siqa'} is not there"
    assert kept["benchmarks"][0]["questions"] == 4
    records = json.loads((out / "tasks" / "piqa-PIQA@1.json").read_text())["records"]
    assert [record["id"] for record in records] == [0, 1, 2, 3]
    assert (out / "evaluation.svg").read_text() == chart(kept)
    code, _, said = gemmary(capsys, *asked)
    assert (code, "exists: go on with it by --resume" in said) == (2, True)
    code, said, _ = gemmary(capsys, *asked, "--resume", "--json")
    again = json.loads(said)
    assert code == 0
    assert again["benchmarks"][:2] == kept["benchmarks"][:2]  # with their times: they were not run again
    code, _, said = gemmary(capsys, *asked[:-4], "--limit", 5, "--out", out, "--resume")
    assert (code, "begun with another limit (4)" in said) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tasks", "hellaswagg"], "there is no task 'hellaswagg': is it hellaswag"),
        (["--tasks", "piqa@few"], "after @ comes how many examples"),
        (["--suite", "gema"], "there is no suite 'gema': gemma, leaderboard, safety"),
        (["--tasks", "social_iqa"], "social_iqa: "),
        (["--tasks", "piqa", "--resume"], "name it with --out"),
        (["--tasks", "piqa", "--data-dir", "nowhere"], "nowhere is not a folder"),
        (["--tasks", "piqa", "--published", "gemma-9"], "nothing is known to be published of 'gemma-9'"),
    ],
)
def test_mistakes_are_one_line(served: Path, data: Path, capsys: Any, arguments: list[str], said: str) -> None:
    given = arguments if "--data-dir" in arguments else [*arguments, "--data-dir", str(data)]
    code, out, err = gemmary(capsys, "evaluate", served, *given)
    assert (code, out) == (2, "")
    assert said in err
    assert len(err.strip().splitlines()) == 1


def test_names_of_tasks() -> None:
    assert named("PIQA", []).task == named("piqa", []).task == "piqa"
    assert named("arc_challenge@25", []).shots == 25
    assert named("arc_challenge", []).metric == "acc_norm"
    assert named("lambada_openai", ["lambada_openai"]).metric == ""
    assert named("BBQ ambiguous", []).where == ("context_condition", "ambig")


def test_answers_come_to_the_same_in_any_company(gemma: Gemma) -> None:
    prompts = [
        Prompt([2, *gemma.tokenizer.encode(text)], 6, Sampling()) for text in ("one", "two", "one more", "three")
    ]
    together = dict(answers(gemma, prompts, slots=3))
    assert [together[i] for i in range(4)] == [dict(answers(gemma, [one], slots=1))[0] for one in prompts]


def test_asked_is_in_the_order_of_questions(gemma: Gemma) -> None:
    asked = [Asked([2, 5], [7]), Asked([2, 4], [7])]
    lm = GemmaryLM(gemma)
    assert lm._scores(asked, True) == list(reversed(lm._scores(asked[::-1], True)))


def test_lm_eval_knows_the_model_by_name(served: Path) -> None:
    from lm_eval.api.registry import get_model

    made = get_model("gemmary").create_from_arg_string(f"model={served},slots=2", {"batch_size": 1, "device": None})
    assert isinstance(made, GemmaryLM)
    assert made.prefix_token_id == made.gemma.tokenizer.bos
    with pytest.raises(GemmaryError, match="the model has no argument 'slot'"):
        GemmaryLM(str(served), slot=2)


def test_a_tuned_model_is_asked_in_turns(gemma: Gemma, tasks: Any, settings: Settings, monkeypatch: Any) -> None:
    asked: list[Asked] = []
    monkeypatch.setattr(
        "gemmary.evaluate.lm_eval.score", lambda engine, some: asked.extend(some) or score(engine, some)
    )
    found = fetch(gemma, tasks, Benchmark("PIQA", "piqa", 1), dataclasses.replace(settings, chat=True, limit=2))
    assert found.questions == 2
    start, end = gemma.tokenizer.start_of_turn, gemma.tokenizer.end_of_turn
    for one in asked:
        turns = [id for id in one.context if id in (start, end)]
        assert list(one.context[:2]) == [2, start]
        assert turns == [
            start,
            end,
            start,
            end,
            start,
            end,
            start,
        ]  # an example, its answer, the question, the answer's turn
        assert list(one.context).count(2) == 1
        assert not {start, end} & set(one.continuation)


def test_questions_may_be_spread_over_a_task(gemma: Gemma, tasks: Any, settings: Settings) -> None:
    one = Benchmark("PIQA", "piqa", 0)
    first = fetch(gemma, tasks, one, dataclasses.replace(settings, limit=4))
    assert [record["id"] for record in first.records] == [0, 1, 2, 3]
    spread = fetch(gemma, tasks, one, dataclasses.replace(settings, limit=4, spread=True))
    assert [record["id"] for record in spread.records] == [0, 3, 7, 11]
    assert [record["doc"]["goal"] for record in spread.records] == [
        f"to make it {word}" for word in ("red", "round", "warm", "open")
    ]
    every = fetch(gemma, tasks, one, dataclasses.replace(settings, limit=40, spread=True))
    assert [record["id"] for record in every.records] == list(range(15))
