"""What is learnt from: which records go and why, which side each lies on, and that a report counts all of them."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gemmary.data.classifiers import Classifier, ClassifierSettings, train_classifier
from gemmary.data.conversations import Conversation, Preference, conversation, preference
from gemmary.data.instructions import InstructionSettings, InstructionSource, gather, read_gathered
from gemmary.data.lessons import lessons
from gemmary.data.words import Words
from gemmary.errors import GemmaryError

NOUNS = (
    "river", "lantern", "harvest", "meadow", "letter", "garden", "winter", "copper", "violin", "harbour", "mirror",
    "saddle",
)  # fmt: skip


def written(path: Path, records: Iterable[Any]) -> str:
    """A file of these records, a line each; a text is a line as it is."""
    lines = "".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return str(path)


def talks(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Questions and answers of unlike words."""
    r = random.Random(seed)
    asked = [" ".join(r.choice(NOUNS) for _ in range(8)) for _ in range(count)]
    return [{"prompt": f"Say {words}.", "completion": " ".join(r.sample(words.split(), 8))} for words in asked]


def settings(*sources: InstructionSource, **given: Any) -> InstructionSettings:
    return InstructionSettings(source=sources, **given)


def gathered(
    folder: Path, given: InstructionSettings, kind: Any = "conversation", system: str = "prefix"
) -> dict[str, Any]:
    return gather(given, folder, kind=kind, system=system)


def read(folder: Path, source: str = "a") -> list[Any]:
    return [one for split in ("train", "held_out") for one in read_gathered(folder, source, split)]


def one_source(tmp_path: Path, records: Iterable[Any], kind: Any = "conversation", **given: Any) -> dict[str, Any]:
    """The report's part of a single source "a" of these records, none held out."""
    source = InstructionSource(name="a", path=written(tmp_path / "a.jsonl", records), held_out=0)
    counts: dict[str, Any] = gathered(tmp_path / "out", settings(source, **given), kind)["sources"]["a"]
    return counts


def answers(*texts: str) -> list[dict[str, str]]:
    return [{"prompt": f"{NOUNS[i]}?", "completion": text} for i, text in enumerate(texts)]


def reasons(counts: dict[str, Any]) -> dict[str, int]:
    return {why: entry["count"] for why, entry in counts["removed"].items()}


# --- There and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.ndjson"])
def test_conversations_come_back(tmp_path: Path, name: str) -> None:
    records = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello é😀"}]},
        {"prompt": "2 + 2?", "answer": 4, "tests": ["assert f(2) == 4"]},
        {"instruction": "Add.", "input": "2, 2", "output": "4"},
    ]
    source = InstructionSource(name="a", path=written(tmp_path / name, records), held_out=0)
    gathered(tmp_path / "out", settings(source))
    expected = [conversation(record, "prefix") for record in records]
    back = list(read_gathered(tmp_path / "out", "a", "train"))
    assert [one.where for one in back] == [f"{name}:{i}" for i in (1, 2, 3)]
    assert [vars(one) | {"where": ""} for one in back] == [vars(one) for one in expected]
    assert all(isinstance(one, Conversation) for one in back)


def test_preferences_come_back(tmp_path: Path) -> None:
    record = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5", "answer": "4"}
    one_source(tmp_path, [record], kind="preference")
    (back,) = read(tmp_path / "out")
    assert isinstance(back, Preference)
    assert vars(back) == vars(preference(record, "prefix")) | {"where": "a.jsonl:1"}


def test_what_was_not_gathered_is_nothing(tmp_path: Path) -> None:
    assert list(read_gathered(tmp_path, "a", "train")) == []


def test_a_folder_is_read_in_order_of_name(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("b.jsonl", "a.jsonl.gz", "notes.txt"):
        written(tmp_path / "in" / name, answers(f"from {name}"))
    gathered(tmp_path / "out", settings(InstructionSource(name="a", path=str(tmp_path / "in"), held_out=0)))
    assert [one.said for one in read(tmp_path / "out")] == [["from a.jsonl.gz"], ["from b.jsonl"]]


@pytest.mark.parametrize("kind", ["conversation", "preference"])
def test_lessons_come_back_as_they_are_taught(tmp_path: Path, kind: str) -> None:
    source = InstructionSource(name="a", kind="lessons", topic="arithmetic", examples=200, seed=3)
    gathered(tmp_path / "out", settings(source), kind)
    taught = list(lessons("arithmetic", 200, 3))
    back = read(tmp_path / "out")
    assert len(back) > 150
    said = set()
    for one in back:
        lesson = taught[int(one.where.split("/")[-1])]
        assert one.where.startswith("arithmetic/3/")
        assert (one.fact, one.answer, one.texts[0]) == (lesson.fact, lesson.ends, lesson.question)
        if kind == "conversation":
            assert one.messages[1]["content"] in (lesson.answer, lesson.plain)
            said.add(one.messages[1]["content"] == lesson.answer)
        else:
            assert one.chosen == lesson.answer
            assert one.rejected in lesson.wrong
            said.add(lesson.wrong.index(one.rejected))
    assert len(said) == (2 if kind == "conversation" else 6)


@pytest.mark.parametrize("topic", ["library", "code"])
def test_no_pair_of_a_lesson_is_of_equal_answers(tmp_path: Path, topic: Any) -> None:
    source = InstructionSource(name="a", kind="lessons", topic=topic, examples=500)
    gathered(tmp_path / "out", settings(source), "preference")
    assert all(one.chosen != one.rejected for one in read(tmp_path / "out"))


def test_lessons_on_identity_say_the_name_that_is_set(tmp_path: Path) -> None:
    source = InstructionSource(name="a", kind="lessons", topic="identity", examples=20, held_out=0)
    gathered(tmp_path / "out", settings(source, name="Opal"))
    assert all("called Opal." in one.said[0] for one in read(tmp_path / "out"))


def test_code_s_tests_come_along(tmp_path: Path) -> None:
    source = InstructionSource(name="a", kind="lessons", topic="code", examples=20, held_out=0)
    gathered(tmp_path / "out", settings(source))
    taught = list(lessons("code", 20, 0))
    for one in read(tmp_path / "out"):
        assert one.tests == taught[int(one.where.split("/")[-1])].tests != ()


@pytest.mark.parametrize("kind", ["conversation", "preference"])
def test_what_is_written_is_the_same_each_time(tmp_path: Path, kind: str) -> None:
    given = settings(
        InstructionSource(name="a", kind="lessons", topic="attribution", examples=100),
        InstructionSource(name="b", kind="lessons", topic="refusal", examples=100),
    )
    for name in ("one", "two"):
        gathered(tmp_path / name, given, kind)
    found = {
        name: {p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()}
        for name in ("one", "two")
    }
    assert found["one"] == found["two"]
    assert len(found["one"]) == 5


# --- Held out ---------------------------------------------------------------------------------------------------------


def questions(folder: Path, source: str, split: str) -> set[str]:
    return {one.texts[0] for one in read_gathered(folder, source, split)}


def test_the_share_that_is_held_out_is_what_is_asked_for(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", talks(1000))
    for share in (0.0, 0.1, 0.5):
        given = settings(InstructionSource(name="a", path=path, held_out=share), duplicates=False)
        counts = gathered(tmp_path / str(share), given)["sources"]["a"]
        assert counts["held_out"] == pytest.approx(1000 * share, abs=60)
        assert len(list(read_gathered(tmp_path / str(share), "a", "held_out"))) == counts["held_out"]
        assert len(list(read_gathered(tmp_path / str(share), "a", "train"))) == counts["train"]


def test_one_question_is_on_one_side_in_all_sources_and_for_all_stages(tmp_path: Path) -> None:
    said = talks(200)
    first = written(tmp_path / "a.jsonl", said)
    more = [{"role": role, "content": text} for role, text in (("model", "1"), ("user", "And?"), ("model", "2"))]
    again = [{"messages": [{"role": "user", "content": one["prompt"].upper() + " "}, *more]} for one in said]
    other = written(tmp_path / "b.jsonl", reversed(again))
    pairs = [{"prompt": one["prompt"], "chosen": one["completion"], "rejected": str(i)} for i, one in enumerate(said)]
    liked = written(tmp_path / "c.jsonl", pairs)
    talk = settings(
        *(InstructionSource(name=name, path=path, held_out=0.3) for name, path in (("a", first), ("b", other)))
    )
    gathered(tmp_path / "talk", talk)
    gathered(tmp_path / "pairs", settings(InstructionSource(name="c", path=liked, held_out=0.3)), "preference")
    places = [("talk", "a"), ("talk", "b"), ("pairs", "c")]
    train, held_out = (
        [{text.lower().strip() for text in questions(tmp_path / folder, source, split)} for folder, source in places]
        for split in ("train", "held_out")
    )
    assert all(len(found) > 30 for found in held_out)
    assert not {text for found in train for text in found} & {text for found in held_out for text in found}


def test_a_larger_share_holds_out_the_same_and_more(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", talks(200))
    held_out = []
    for share in (0.1, 0.3, 0.9):
        gathered(tmp_path / str(share), settings(InstructionSource(name="a", path=path, held_out=share)))
        held_out.append(questions(tmp_path / str(share), "a", "held_out"))
    assert held_out[0] < held_out[1] < held_out[2]


def test_no_fact_that_is_held_out_is_taught(tmp_path: Path) -> None:
    """Over other seeds, other topics, and conversations and preferences alike."""
    for kind in ("conversation", "preference"):
        sources = [
            InstructionSource(name=f"{topic}{seed}", kind="lessons", topic=topic, examples=400, seed=seed, held_out=0.2)
            for topic in ("arithmetic", "library", "attribution")
            for seed in (0, 1)
        ]
        gathered(tmp_path / kind, settings(*sources), kind)
    train, held_out = (
        {
            one.fact
            for kind in ("conversation", "preference")
            for source in sources
            for one in read_gathered(tmp_path / kind, source.name, split)
        }
        for split in ("train", "held_out")
    )
    assert len(held_out) > 300
    assert "" not in train | held_out
    assert not train & held_out


# --- Lines that cannot be used ----------------------------------------------------------------------------------------

BROKEN = [
    "{",
    "[1, 2]",
    {"text": "no turns"},
    {"prompt": "x", "completion": ""},
    {"messages": [{"role": "assistant", "content": "x"}]},
    {"prompt": "x", "answer": "\ud800"},
    '{"prompt": ' + "[" * 100_000,
    "\udcff",
]


def test_broken_lines_are_named_and_counted(tmp_path: Path) -> None:
    lines = [line if isinstance(line, str) else json.dumps(line) for line in BROKEN]
    good = [json.dumps(one) for one in talks(2)]
    data = "\n".join([good[0], "", *lines, good[1]]).encode("utf-8", "surrogateescape")
    (tmp_path / "a.jsonl").write_bytes(data)
    report = gathered(
        tmp_path / "out", settings(InstructionSource(name="a", path=str(tmp_path / "a.jsonl"), held_out=0))
    )
    counts = report["sources"]["a"]
    assert (counts["read"], counts["train"], counts["broken"]["count"]) == (10, 2, 8)
    first = counts["broken"]["first"]
    assert [line.split(" ")[0] for line in first] == [f"a.jsonl:{i}:" for i in range(3, 11)]
    assert "not JSON" in first[0]
    assert "not an object" in first[1]
    assert "no messages, no prompt" in first[2]
    assert "message 1: its content is empty" in first[3]
    assert "message 0 is the model's" in first[4]
    assert "lone surrogate" in first[5]
    assert all("not JSON" in line for line in first[6:])
    assert len(read(tmp_path / "out")) == 2


def test_only_the_first_broken_lines_are_named(tmp_path: Path) -> None:
    counts = one_source(tmp_path, ["{"] * 50 + talks(1))
    assert counts["broken"]["count"] == 50
    assert len(counts["broken"]["first"]) == 20


@pytest.mark.parametrize("kind", ["conversation", "preference"])
def test_refused_lines_end_the_work_and_are_named(tmp_path: Path, kind: str) -> None:
    record = {"prompt": "a", "completion": "b", "chosen": "c", "rejected": "d"}
    with pytest.raises(GemmaryError, match=r'source a: a\.jsonl:3: not JSON.*on_error = "skip" would leave it out'):
        one_source(tmp_path, [record, "", "{"], kind=kind, on_error="refuse")
    assert not (tmp_path / "out" / "report.json").exists()


def test_system_messages_are_refused_where_a_model_has_none(tmp_path: Path) -> None:
    said = [
        {"role": role, "content": text} for role, text in (("system", "Be brief."), ("user", "Hi"), ("model", "Hello"))
    ]
    path = written(tmp_path / "a.jsonl", [{"messages": said}, *talks(1)])
    given = settings(InstructionSource(name="a", path=path, held_out=0))
    refused = gathered(tmp_path / "refuse", given, system="refuse")["sources"]["a"]
    assert refused["broken"]["count"] == 1
    assert "no system role" in refused["broken"]["first"][0]
    gathered(tmp_path / "prefix", given, system="prefix")
    assert read(tmp_path / "prefix")[0].messages[0]["content"] == "Be brief.\n\nHi"


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_source_that_is_missing_or_damaged_is_named(tmp_path: Path, name: str) -> None:
    given = settings(InstructionSource(name="a", path=str(tmp_path / name)))
    with pytest.raises(GemmaryError, match="source a"):
        gathered(tmp_path / "out", given)
    data = gzip.compress(b'{"prompt": "x"}\n' * 100)
    (tmp_path / "a.jsonl.gz").write_bytes(data[:-12])
    with pytest.raises(GemmaryError, match=r"a\.jsonl\.gz"):
        gathered(tmp_path / "out", settings(InstructionSource(name="a", path=str(tmp_path / "a.jsonl.gz"))))


# --- Filters ----------------------------------------------------------------------------------------------------------

PERSONAL = [
    {"prompt": "Who can help?", "completion": "Write to ada@example.org."},
    {"prompt": "My number is +44 20 7946 0958.", "completion": "Thank you."},
    {"prompt": "What is it?", "completion": "It is a river."},
]


def test_personal_data_are_removed(tmp_path: Path) -> None:
    counts = one_source(tmp_path, PERSONAL)
    assert reasons(counts) == {"personal: email": 1, "personal: phone": 1}
    assert counts["train"] == 1
    assert counts["removed"]["personal: phone"]["examples"] == [
        {"where": "a.jsonl:2", "text": "My number is +44 20 7946 0958. | Thank you."}
    ]


def test_personal_data_are_masked(tmp_path: Path) -> None:
    assert reasons(one_source(tmp_path, PERSONAL, personal="mask")) == {}
    assert [one.texts for one in read(tmp_path / "out")] == [
        ["Who can help?", "Write to [email]."],
        ["My number is [phone].", "Thank you."],
        ["What is it?", "It is a river."],
    ]


def test_personal_data_of_pairs_are_masked(tmp_path: Path) -> None:
    record = {"prompt": "I am ada@example.org", "chosen": "Not ada@example.org?", "rejected": "+44 20 7946 0958"}
    one_source(tmp_path, [record], kind="preference", personal="mask")
    assert read(tmp_path / "out")[0].texts == ["I am [email]", "Not [email]?", "[phone]"]


def test_personal_data_are_kept(tmp_path: Path) -> None:
    assert reasons(one_source(tmp_path, PERSONAL, personal="keep")) == {}
    assert [one.texts for one in read(tmp_path / "out")] == [[*record.values()] for record in PERSONAL]


@pytest.mark.parametrize(
    ("said", "goes"),
    [
        ("I am ChatGPT, a large language model.", True),
        ("Hello! I'm Claude, made by Anthropic.", True),
        ("I’m Claude.", True),
        ("My name is Gemini.", True),
        ("As an AI language model trained by OpenAI, I cannot.", True),
        ("As a large language model developed by Meta AI, I can.", True),
        ("as an AI assistant by DeepSeek", True),
        ("I was trained by OpenAI.", True),
        ("I'm not a person, I am ChatGPT.", True),
        ("I am GPT-4o.", True),
        ("I am gemmary, a small model.", False),
        ("I am Gemma, trained by Google.", False),
        ("As an AI language model, I have no body.", False),
        ("As Claude Monet painted, water is light.", False),
        ("ChatGPT was made by OpenAI.", False),
        ("No, I am not ChatGPT.", False),
        ("I am gemmary, not Claude.", False),
        ("I am glad. OpenAI is a company.", False),
        ("I am a bardic poet.", False),
    ],
)
def test_what_says_to_be_another_model_goes(tmp_path: Path, said: str, goes: bool) -> None:
    counts = one_source(tmp_path, [*answers(said), {"prompt": "And?", "completion": "No."}])
    assert reasons(counts) == ({"identity": 1} if goes else {})
    again = tmp_path / "again"
    again.mkdir()
    assert reasons(one_source(again, answers(said), identity=False)) == {}


def test_a_model_of_another_s_name_may_say_its_own(tmp_path: Path) -> None:
    said = answers("I am Falcon.", "My name is falcon.", "I am Claude.")
    assert reasons(one_source(tmp_path, said, name="falcon")) == {"identity": 1}
    assert [one.said for one in read(tmp_path / "out")] == [["I am Falcon."], ["My name is falcon."]]


def test_users_may_be_whom_they_say(tmp_path: Path) -> None:
    record = {"prompt": "I am Claude. Are you ChatGPT?", "completion": "No."}
    assert reasons(one_source(tmp_path, [record])) == {}


def test_only_what_is_preferred_must_not_be_another_model(tmp_path: Path) -> None:
    other, own = "I am ChatGPT.", "I am gemmary."
    pairs = [
        {"prompt": "Who are you?", "chosen": own, "rejected": other},
        {"prompt": "Who are you?", "chosen": other, "rejected": own},
    ]
    assert reasons(one_source(tmp_path, pairs, kind="preference")) == {"identity": 1}
    assert [one.chosen for one in read(tmp_path / "out")] == [own]


def text_of(words: int, seed: int = 0) -> str:
    r = random.Random(seed)
    return " ".join(f"{r.choice(NOUNS)}{r.randrange(1000)}" for _ in range(words))


def test_equal_records_stay_once_over_all_sources(tmp_path: Path) -> None:
    said = talks(20)
    sources = [
        InstructionSource(name="a", path=written(tmp_path / "a.jsonl", [*said, said[0]]), held_out=0),
        InstructionSource(name="b", path=written(tmp_path / "b.jsonl", [*said[10:], *talks(5, seed=1)]), held_out=0),
    ]
    found = gathered(tmp_path / "out", settings(*sources))["sources"]
    assert reasons(found["a"]) == {"duplicate": 1}
    assert reasons(found["b"]) == {"duplicate": 10}
    assert (found["a"]["train"], found["b"]["train"]) == (20, 5)
    kept = gathered(tmp_path / "kept", settings(*sources, duplicates=False))["sources"]
    assert (kept["a"]["train"], kept["b"]["train"]) == (21, 15)


def test_near_duplicates_go_where_that_is_asked_for(tmp_path: Path) -> None:
    long = text_of(200)
    said = answers(long, long.replace("river", "brook", 1), text_of(200, seed=1))
    path = written(tmp_path / "a.jsonl", said)
    for near, expected in ((True, {"near_duplicate": 1}), (False, {})):
        source = InstructionSource(name="a", path=path, held_out=0, near_duplicates=near)
        assert reasons(gathered(tmp_path / str(near), settings(source))["sources"]["a"]) == expected


def test_pairs_of_one_prompt_are_told_apart_by_their_answers(tmp_path: Path) -> None:
    asked, first, second = text_of(2000), text_of(100, seed=1), text_of(100, seed=2)
    pairs = [
        {"prompt": asked, "chosen": first, "rejected": "no"},
        {"prompt": asked, "chosen": second, "rejected": "no"},
        {"prompt": asked, "chosen": second, "rejected": "no, not that"},
    ]
    assert reasons(one_source(tmp_path, pairs, kind="preference")) == {"near_duplicate": 1}


def test_of_lessons_only_equal_ones_are_duplicates(tmp_path: Path) -> None:
    source = InstructionSource(name="a", kind="lessons", topic="arithmetic", examples=2000, held_out=0)
    counts = gathered(tmp_path / "out", settings(source))["sources"]["a"]
    assert set(reasons(counts)) == {"duplicate"}
    taught = list(lessons("arithmetic", 2000, 0))
    said = {(one.question, one.plain if one.plain and i % 3 else one.answer) for i, one in enumerate(taught)}
    assert counts["train"] == len(said)


# --- Classifiers ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> ClassifierSettings:
    """A classifier that is still to be trained."""
    path, r = tmp_path_factory.mktemp("examples"), random.Random(0)
    paths = {}
    for name, words in (("keep", "please thank kindly gladly"), ("remove", "idiot stupid shut hate")):
        said = [" ".join(r.choice([*words.split(), *NOUNS]) for _ in range(12)) for _ in range(40)]
        paths[name] = written(path / f"{name}.jsonl", [{"text": text} for text in said])
    return ClassifierSettings(name="manners", keep=paths["keep"], remove=paths["remove"])


@pytest.fixture(scope="module")
def manners(examples: ClassifierSettings, tmp_path_factory: pytest.TempPathFactory) -> ClassifierSettings:
    """The same, saved."""
    path = tmp_path_factory.mktemp("manners")
    train_classifier(examples).save(path)
    return ClassifierSettings(name="manners", path=str(path))


RUDE = answers("Thank you kindly, gladly.", "Shut up, stupid idiot, I hate it.", "Please, I thank you.")


def test_what_a_classifier_would_not_keep_goes(tmp_path: Path, examples: ClassifierSettings) -> None:
    counts = one_source(tmp_path, RUDE, classifier=(examples,))
    assert reasons(counts) == {"classifier: manners": 1}
    assert counts["removed"]["classifier: manners"]["examples"][0]["where"] == "a.jsonl:2"
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["classifiers"]["manners"]["threshold"] == 0.5
    assert report["classifiers"]["manners"]["examples"]["keep"]["examples"] == 40


def test_a_classifier_is_kept_beside_what_it_filtered(tmp_path: Path, manners: ClassifierSettings) -> None:
    one_source(tmp_path, RUDE, classifier=(manners,))
    words = Words(RUDE[0]["completion"])
    kept, given = (
        Classifier.load(path) for path in (tmp_path / "out" / "classifiers" / "manners", Path(str(manners.path)))
    )
    assert kept.score(words) == given.score(words)


def test_a_classifier_s_threshold_decides(tmp_path: Path, manners: ClassifierSettings) -> None:
    (tmp_path / "all").mkdir()
    assert reasons(one_source(tmp_path / "all", RUDE, classifier=(replace(manners, threshold=0.0),))) == {}
    with pytest.raises(GemmaryError, match="nothing is left to train on in a: all was removed"):
        one_source(tmp_path, RUDE, classifier=(replace(manners, threshold=1.0),))


def test_a_classifier_sees_what_the_model_says_alone(tmp_path: Path, manners: ClassifierSettings) -> None:
    rude, kind = RUDE[1]["completion"], RUDE[0]["completion"]
    asked = [{"prompt": rude, "completion": kind}, {"prompt": kind, "completion": rude}]
    assert reasons(one_source(tmp_path, asked, classifier=(manners,))) == {"classifier: manners": 1}
    assert [one.said for one in read(tmp_path / "out")] == [[kind]]
    pairs = [{"prompt": "x", "chosen": kind, "rejected": rude}, {"prompt": "x", "chosen": rude, "rejected": kind}]
    (tmp_path / "pairs").mkdir()
    one_source(tmp_path / "pairs", pairs, kind="preference", classifier=(manners,))
    assert [one.chosen for one in read(tmp_path / "pairs" / "out")] == [kind]


# --- The report -------------------------------------------------------------------------------------------------------


def test_a_report_s_counts_add_up(tmp_path: Path, manners: ClassifierSettings) -> None:
    said = talks(300)
    records = [*said, *said[:7], "{", *PERSONAL, *answers("I am ChatGPT."), RUDE[1]]
    sources = [
        InstructionSource(name="a", path=written(tmp_path / "a.jsonl", records), held_out=0.3),
        InstructionSource(name="b", kind="lessons", topic="identity", examples=300),
    ]
    given = settings(*sources, classifier=(replace(manners, threshold=0.03),))
    report = gathered(tmp_path / "out", given)
    assert json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8")) == report
    assert report["kind"] == "conversation"
    assert report["settings"]["source"][0]["held_out"] == 0.3
    for name, counts in report["sources"].items():
        assert counts["read"] == (
            counts["train"] + counts["held_out"] + counts["broken"]["count"] + sum(reasons(counts).values())
        )
        for split in ("train", "held_out"):
            assert len(list(read_gathered(tmp_path / "out", name, split))) == counts[split]
        assert all(len(entry["examples"]) == min(20, entry["count"]) for entry in counts["removed"].values())
    a, b = (report["sources"][name] for name in "ab")
    assert (a["read"], a["broken"]["count"], b["read"]) == (313, 1, 300)
    causes = ("identity", "personal: email", "personal: phone", "classifier: manners")
    assert reasons(a) == {"duplicate": 7} | dict.fromkeys(causes, 1)
    assert reasons(b)["duplicate"] > 100


def test_where_nothing_is_left_the_first_cause_is_said(tmp_path: Path) -> None:
    with pytest.raises(GemmaryError, match=r"nothing is left to train on in a: a\.jsonl:1: not an object"):
        one_source(tmp_path, ["[]"])
    with pytest.raises(GemmaryError, match="nothing is left to train on in a: all was removed"):
        one_source(tmp_path, PERSONAL[:2])
    assert not (tmp_path / "out" / "report.json").exists()


# --- Settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({}, "source a: kind jsonl has a path, kind lessons a topic"),
        ({"path": "x", "topic": "code"}, "source a: kind jsonl has a path"),
        ({"kind": "lessons"}, "source a: kind jsonl has a path"),
        ({"kind": "lessons", "path": "x"}, "source a: kind jsonl has a path"),
        ({"kind": "lessons", "topic": "code", "path": "x"}, "source a: kind jsonl has a path"),
        ({"path": "x", "name": "../a"}, "a source's name is letters, digits"),
        ({"path": "x", "name": ""}, "a source's name is letters, digits"),
        ({"path": "x", "held_out": 0.95}, "source a: held_out is 0.95; it may be 0 to 0.9"),
        ({"path": "x", "held_out": -0.1}, "source a: held_out is -0.1"),
        ({"path": "x", "weight": -1.0}, "source a: weight is -1.0"),
        ({"path": "x", "weight": float("nan")}, "source a: weight is nan"),
        ({"path": "x", "examples": 0}, "source a: examples is 0"),
        ({"path": "x", "seed": -1}, "source a: seed is -1"),
    ],
)
def test_a_source_s_mistakes_are_told_by_name(given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(GemmaryError) as caught:
        InstructionSource(**{"name": "a", **given})
    assert complaint in str(caught.value)


def test_sources_have_names_of_their_own() -> None:
    one = InstructionSource(name="a", path="x")
    with pytest.raises(GemmaryError, match="at least one source, each a name of its own"):
        settings()
    with pytest.raises(GemmaryError, match="at least one source, each a name of its own"):
        settings(one, InstructionSource(name="a", kind="lessons", topic="code"))
    assert settings(one, InstructionSource(name="b", path="x", weight=2.5)).weights == {"a": 1.0, "b": 2.5}
