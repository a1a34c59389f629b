"""Classifiers learn from examples, come back from disk as they were, and refuse what was altered."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from gemmary.data.classifiers import Classifier, ClassifierSettings, train_classifier
from gemmary.data.words import Words
from gemmary.errors import GemmaryError

KEEP = ["meadow", "river", "gentle", "evening", "walked", "letter", "garden", "quiet", "lantern", "harvest"]
REMOVE = ["casino", "jackpot", "winner", "click", "bonus", "cheap", "pills", "free", "offer", "prize"]
BOTH = ["the", "a", "and", "of", "it", "to", "was", "on", "in", "then"]


def _examples(path: Path, words: list[str], count: int = 60) -> str:
    r = random.Random(words[0])
    lines = [" ".join(r.choice(words if r.random() < 0.3 else BOTH) for _ in range(40)) for _ in range(count)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    return str(path)


@pytest.fixture
def settings(tmp_path: Path) -> ClassifierSettings:
    keep, remove = _examples(tmp_path / "keep.jsonl", KEEP), _examples(tmp_path / "remove.jsonl", REMOVE)
    return ClassifierSettings(name="quality", keep=keep, remove=remove)


def test_learns_and_comes_back(settings: ClassifierSettings, tmp_path: Path) -> None:
    trained = train_classifier(settings)
    good, bad = Words("the lantern in the garden was on"), Words("the jackpot of the casino was free")
    assert trained.score(good) > 0.8 > 0.2 > trained.score(bad)
    assert trained.about["unseen"]["roc_auc"] > 0.9
    trained.save(tmp_path / "saved")
    loaded = Classifier.load(tmp_path / "saved")
    assert loaded.score(good) == trained.score(good)
    assert train_classifier(settings).score(good) == trained.score(good)


@pytest.mark.parametrize("damage", ["weights", "version", "json", "missing"])
def test_refuses_what_was_altered(settings: ClassifierSettings, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "saved"
    train_classifier(settings).save(folder)
    if damage == "weights":
        data = bytearray((folder / "weights.safetensors").read_bytes())
        data[-1] ^= 1
        (folder / "weights.safetensors").write_bytes(data)
    elif damage == "missing":
        (folder / "weights.safetensors").unlink()
    else:
        about = json.loads((folder / "classifier.json").read_text()) | {"version": 99}
        (folder / "classifier.json").write_text(json.dumps(about) if damage == "version" else "[")
    with pytest.raises(GemmaryError, match=r"not what|version 99|not a saved"):
        Classifier.load(folder)


def test_too_few_examples(tmp_path: Path) -> None:
    keep, remove = _examples(tmp_path / "keep.jsonl", KEEP), _examples(tmp_path / "remove.jsonl", REMOVE, 3)
    with pytest.raises(GemmaryError, match="3 examples; at least 20"):
        train_classifier(ClassifierSettings(name="quality", keep=keep, remove=remove))


@pytest.mark.parametrize(
    "given", [{}, {"keep": "a"}, {"path": "a", "keep": "b", "remove": "c"}, {"path": "a", "threshold": 2}]
)
def test_settings_that_make_no_sense(given: dict[str, object]) -> None:
    with pytest.raises(GemmaryError, match="classifier x"):
        ClassifierSettings(name="x", **given)  # type: ignore[arg-type]
