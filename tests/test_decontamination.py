"""Items of evaluation sets are found wherever n of their words stand in a row, and cut out or removed."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from gemmary.data.decontamination import EvaluationIndex, EvaluationSet, without
from gemmary.data.words import Words
from gemmary.errors import GemmaryError

QUESTION = "A farmer has seventeen sheep and all but nine of them run away during the night; how many are left?"
SHORT = "Which gas do green plants take from the air?"
ITEMS = [
    {"question": QUESTION, "choices": {"text": ["eight", "nine"]}, "answer": 1},
    {"question": SHORT, "choices": {"text": ["oxygen", "carbon dioxide"]}, "answer": 1},
    {"question": "Why?", "choices": {"text": ["because the sun is hot", "because the moon is cold"]}, "answer": 0},
    {"question": "Why?", "choices": {"text": ["so"]}, "answer": 0},
]


@pytest.fixture
def index(tmp_path: Path) -> EvaluationIndex:
    with gzip.open(tmp_path / "test.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(item) + "\n" for item in ITEMS)
    built = EvaluationIndex((EvaluationSet(name="farm", path=str(tmp_path)),), 13)
    built.save(tmp_path / "index.npz")
    return EvaluationIndex.load(tmp_path / "index.npz")


def test_what_is_found(index: EvaluationIndex) -> None:
    assert index.too_short == {"farm": 1}
    assert index.names == ["farm"] * 4
    part = "He said: a farmer has SEVENTEEN sheep, and all but nine of them run away -- at dawn."
    spans, items = index.find(Words(part))
    assert items == {0}
    assert spans[0][1] - spans[0][0] == 13
    assert index.find(Words(f"Once more. {SHORT} Nobody knew."))[1] == {1}
    assert index.find(Words("why because the sun is hot because the moon is cold"))[1] == {2}
    assert index.find(Words("A farmer has seventeen sheep and all but nine of them stay at home.")) == ([], set())
    assert index.find(Words("")) == ([], set())


def test_only_the_keys_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps({"q": QUESTION, "passage": "word " * 20}) + "\n", encoding="utf-8")
    index = EvaluationIndex((EvaluationSet(name="x", path=str(path), keys=("q",)),), 13)
    assert index.find(Words("word " * 20))[1] == set()
    with pytest.raises(GemmaryError, match="has no 'question'; it has q, passage"):
        EvaluationIndex((EvaluationSet(name="x", path=str(path), keys=("question",)),), 13)


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "empty"), ('{"a": 1}\n', "no item with text"), ("[\n", "not JSON"), ("[1]\n", "not an object")],
)
def test_sets_that_cannot_be_used(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(GemmaryError, match=message):
        EvaluationIndex((EvaluationSet(name="x", path=str(path)),), 13)


def test_a_long_text_loses_the_match_and_a_short_one_goes(index: EvaluationIndex) -> None:
    story = "The road went on between hedges, and nobody met them on it. " * 40
    text = f"{story}{QUESTION} {story}"
    words = Words(text)
    spans, _ = index.find(words)
    left = without(words, spans, 0.2)
    assert left is not None
    assert index.find(Words(left))[0] == []
    assert len(text) - 700 < len(left) < len(text) - 400
    assert left.startswith(story[:500])
    assert without(words, spans, 0.05) is None
    assert without(Words(QUESTION), index.find(Words(QUESTION))[0], 0.2) is None
