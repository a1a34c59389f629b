"""The whole of curation on a small corpus with plants: what goes, what stays, and that nothing but the input decides it."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gemmary.data.classifiers import ClassifierSettings
from gemmary.data.curate import curate, read_documents
from gemmary.data.curation_report import report_table
from gemmary.data.curation_settings import CurateSettings
from gemmary.data.decontamination import EvaluationSet
from gemmary.data.sources import Source
from gemmary.errors import GemmaryError

SYLLABLES = [
    "ba",
    "ke",
    "li",
    "mo",
    "nu",
    "sha",
    "tre",
    "fol",
    "gri",
    "dan",
    "pel",
    "wick",
    "stor",
    "min",
    "hal",
    "ver",
    "cro",
    "den",
]
NAMES = ["".join(random.Random(i).sample(SYLLABLES, 2)) for i in range(300)]
SMALL = [
    "the",
    "of",
    "and",
    "to",
    "a",
    "in",
    "that",
    "was",
    "with",
    "he",
    "she",
    "it",
    "for",
    "on",
    "but",
    "not",
    "by",
    "his",
    "her",
    "had",
    "be",
    "have",
]
QUESTION = "A farmer has seventeen sheep and all but nine of them run away during the night; how many are left?"
RECURRING = "Subscribe to our newsletter and receive ten splendid stories about lighthouses every single week."


def _story(seed: int, sentences: int = 60) -> str:
    r = random.Random(seed)
    said = [
        " ".join(r.choice(NAMES if i % 2 else SMALL) for i in range(r.randint(8, 20))).capitalize() + "."
        for _ in range(sentences)
    ]
    return "\n".join(" ".join(said[i : i + 4]) for i in range(0, sentences, 4))


def _planted() -> dict[str, str]:
    """id: text; what begins with "story" is clean."""
    texts = {f"story{i}": _story(i) for i in range(60)}
    near = texts["story5"].split(" ")
    near[100], near[300] = "moonlit", "candle"
    r = random.Random(0)
    texts |= {
        "exact": texts["story3"].replace(".", "!"),
        "near": " ".join(near),
        "leak-short": f"{QUESTION} The answer is nine. {_story(700, 3)}",
        "leak-long": f"{_story(701, 90)}\n{QUESTION}\n{_story(702, 90)}",
        "email": _story(703).replace(". ", ". Write to jane.doe@mail.example.org or (415) 555-2671. ", 1),
        "key": _story(704) + "\nMy key is " + "AKIA" + "IOSFODNN7EXAMPLE, keep it.",
        "gibberish": " ".join("".join(r.choice("bcdfghjklmnpqrstvwxz") for _ in range(r.randint(2, 9))) for _ in range(200)),
        "german": "Der Müller ging mit dem Korb durch die Stadt und sah den Hafen, der nicht weit von der Brücke ist. "
        + " ".join(f"{r.choice(NAMES)} {r.choice(['der', 'die', 'und', 'in', 'den', 'von', 'zu', 'das', 'mit', 'sich', 'ist', 'nicht'])}" for _ in range(150)) + ".",
        "short": "Only a few words, and no more.",
    }  # fmt: skip
    for i in range(12):
        texts[f"recurring{i:02d}"] = f"{_story(800 + i, 20)}\n{RECURRING}\n{_story(900 + i, 20)}"
    return texts


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    lines = [json.dumps({"id": name, "text": text}) for name, text in _planted().items()]
    (folder / "web.jsonl").write_text("\n".join([*lines[:40], "{broken", *lines[40:]]) + "\n", encoding="utf-8")
    (folder / "test.jsonl").write_text(
        json.dumps({"question": QUESTION}) + "\n" + json.dumps({"question": "Who?"}) + "\n"
    )
    return folder


def _settings(corpus: Path, **given: Any) -> CurateSettings:
    values: dict[str, Any] = {
        "source": (
            Source(name="web", kind="jsonl", path=str(corpus / "web.jsonl"), held_out=0.1),
            Source(name="sums", kind="arithmetic", documents=50),
        ),
        "evaluation": (EvaluationSet(name="riddles", path=str(corpus / "test.jsonl")),),
        "workers": 1,
        "task_bytes": 40_000,
    }
    return CurateSettings(**values | given)


@pytest.fixture(scope="module")
def curated(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("curated")
    return folder, curate(_settings(corpus), folder)


def _texts(folder: Path, source: str = "web") -> dict[str, str]:
    return {d["id"]: d["text"] for split in ("train", "held_out") for d in read_documents(folder, source, split)}


def test_every_plant_is_found_and_clean_documents_stay(curated: tuple[Path, dict[str, Any]]) -> None:
    folder, report = curated
    texts = _texts(folder)
    gone = {rule: {e["id"] for e in entry["examples"]} for rule, entry in report["sources"]["web"]["removed"].items()}
    assert gone == {
        "exact_duplicate": {"exact"}, "near_duplicate": {"near"}, "evaluation": {"leak-short"}, "few_stop_words": {"gibberish"},
        "language_de": {"german"}, "too_few_words": {"short"},
    }  # fmt: skip
    assert {name for name in texts if name.startswith("story")} == {f"story{i}" for i in range(60)}
    planted = _planted()
    assert all(texts[name] == text for name, text in planted.items() if name.startswith("story"))
    assert "seventeen sheep" not in texts["leak-long"]
    assert len(texts["leak-long"]) > len(planted["leak-long"]) - 600
    assert "Write to [email] or [phone]. " in texts["email"]
    assert "My key is [api_key], keep" in texts["key"]
    assert [RECURRING in texts[f"recurring{i:02d}"] for i in range(12)] == [True] * 10 + [False] * 2


def test_the_report_counts_and_shows(curated: tuple[Path, dict[str, Any]]) -> None:
    folder, report = curated
    assert json.loads((folder / "report.json").read_text(encoding="utf-8")) == report
    web = report["sources"]["web"]
    assert web["read"]["documents"] == len(_planted())
    assert web["broken"]["count"] == 1
    assert web["broken"]["first"][0].startswith("web.jsonl:41: not JSON")
    assert {rule: entry["found"] for rule, entry in web["changed"].items()} == {
        "email": 1, "phone": 1, "api_key": 1, "evaluation": 8, "recurring_passages": 2,
    }  # fmt: skip
    left = web["train"]["documents"] + web["held_out"]["documents"]
    assert left == len(_planted()) - 6 == len(_texts(folder))
    assert web["held_out"]["documents"] == round(0.1 * left)
    assert web["removed"]["evaluation"]["share_of_documents"] == pytest.approx(1 / len(_planted()), abs=1e-6)
    assert report["evaluations"] == {"riddles": {"items": 2, "too_short": 1, "seen": 1, "share": 0.5}}
    everything = json.dumps(report)
    assert "jane.doe" not in everything  # a report that quotes what was masked would leak it
    assert "AKIA" not in everything
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(report_table(report))
    console.file.close()
    shown = console.export_text()
    assert "- near_duplicate" in shown
    assert "riddles" in shown


def test_held_out_documents_are_not_in_train(curated: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = curated
    train, held_out = (list(read_documents(folder, "web", split)) for split in ("train", "held_out"))
    assert not {d["id"] for d in train} & {d["id"] for d in held_out}
    assert not {d["text"] for d in train} & {d["text"] for d in held_out}
    with pytest.raises(GemmaryError, match="no curated source 'absent'"):
        list(read_documents(folder, "absent", "train"))


def _digests(folder: Path) -> dict[str, str]:
    files = sorted((folder / "documents").rglob("*.gz"))
    digests = {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    del report["run"]
    return digests | {"report": json.dumps(report)}


def test_workers_do_not_change_a_byte(corpus: Path, curated: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    counted: list[tuple[int, int]] = []
    curate(
        _settings(corpus, workers=3), tmp_path / "out", on_progress=lambda done, total: counted.append((done, total))
    )
    assert _digests(tmp_path / "out") == _digests(curated[0])
    assert counted[-1][0] == counted[-1][1] > 30
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["documents", "report.json"]


def _curate_slowly(corpus: str, folder: str) -> None:
    """A process to be killed: each task waits before it counts as done."""
    from datatrove.executor.local import LocalPipelineExecutor

    done = LocalPipelineExecutor.mark_rank_as_completed

    def mark(self: Any, rank: int) -> None:
        done(self, rank)
        time.sleep(0.2)

    LocalPipelineExecutor.mark_rank_as_completed = mark
    curate(_settings(Path(corpus)), Path(folder))


@pytest.mark.parametrize("after", [2, 10])
def test_a_killed_run_is_continued(
    corpus: Path, curated: tuple[Path, dict[str, Any]], tmp_path: Path, after: int
) -> None:
    folder = tmp_path / "out"
    process = get_context("forkserver").Process(target=_curate_slowly, args=(str(corpus), str(folder)))
    process.start()
    deadline = time.monotonic() + 60
    while len(done := list(folder.glob("work/logs/*/completions/*"))) < after:
        assert time.monotonic() < deadline
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert not (folder / "documents").exists()
    first = {path: path.stat().st_mtime_ns for path in done}
    remove, kept = shutil.rmtree, {}

    def looked(path: Path, **given: Any) -> None:
        kept.update({p: p.stat().st_mtime_ns for p in first if p.exists()})
        remove(path, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", looked)
        curate(_settings(corpus), folder)
    assert kept == first  # what was done was not done again
    assert _digests(folder) == _digests(curated[0])


def test_a_finished_folder_gives_its_report_and_refuses_other_settings(
    corpus: Path, curated: tuple[Path, dict[str, Any]]
) -> None:
    folder, report = curated
    assert curate(_settings(corpus, workers=7), folder) == report
    with pytest.raises(GemmaryError, match="other settings or sources"):
        curate(_settings(corpus, max_recurrence=3), folder)


def test_other_settings_begin_anew(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "work" / "logs" / "filter" / "completions").mkdir(parents=True)
    (tmp_path / "work" / "logs" / "filter" / "completions" / "00000").touch()
    (tmp_path / "work" / "plan").write_text("another")
    settings = _settings(corpus, near_duplicates=False, max_recurrence=0, languages=(), mask=(), evaluation=())
    report = curate(settings, tmp_path)
    assert set(report["sources"]["web"]["removed"]) == {"exact_duplicate", "few_stop_words", "too_few_words"}
    assert report["sources"]["web"]["changed"] == {}
    assert "jane.doe@mail.example.org" in _texts(tmp_path)["email"]


def test_what_is_not_its_own_is_left_alone(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "a" / "work").mkdir(parents=True)
    (tmp_path / "a" / "work" / "thesis.txt").write_text("mine")
    (tmp_path / "b" / "documents").mkdir(parents=True)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "report.json").write_text("[]")
    for name, message in (
        ("a", "is not of curation"),
        ("b", "documents and no report"),
        ("c", "not a report of curation"),
    ):
        with pytest.raises(GemmaryError, match=message):
            curate(_settings(corpus), tmp_path / name)
    assert (tmp_path / "a" / "work" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("moved", [0, 1])
def test_a_run_killed_while_moving_is_finished(
    corpus: Path, curated: tuple[Path, dict[str, Any]], tmp_path: Path, moved: int
) -> None:
    replace, calls = Path.replace, []

    def dying(self: Path, target: Path) -> Path:
        if self.parent.name == "work" and self.name in ("documents", "report.json"):
            calls.append(self)
            if len(calls) > moved:
                raise KeyboardInterrupt
        return replace(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", dying)
        with pytest.raises(KeyboardInterrupt):
            curate(_settings(corpus), tmp_path)
    assert not (tmp_path / "report.json").exists()
    curate(_settings(corpus), tmp_path)
    assert _digests(tmp_path) == _digests(curated[0])


def test_classifiers_decide_and_are_kept(corpus: Path, tmp_path: Path) -> None:
    for name, words in (("keep", ["garden", "letter"]), ("remove", ["casino", "bonus", "jackpot"])):
        r = random.Random(1)
        lines = [json.dumps({"text": " ".join(r.choice([*words, *SMALL]) for _ in range(60))}) for _ in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    bad = _story(1).replace(" the ", " casino the jackpot bonus ")
    (tmp_path / "web.jsonl").write_text(
        "\n".join(json.dumps({"id": i, "text": t}) for i, t in (("good", _story(2)), ("bad", bad)))
    )
    classifier = ClassifierSettings(
        name="spam", keep=str(tmp_path / "keep.jsonl"), remove=str(tmp_path / "remove.jsonl")
    )
    source = (Source(name="web", kind="jsonl", path=str(tmp_path / "web.jsonl"), held_out=0),)
    report = curate(CurateSettings(source=source, classifier=(classifier,), workers=1), tmp_path / "a")
    assert list(_texts(tmp_path / "a")) == ["good"]
    assert report["sources"]["web"]["removed"]["classifier_spam"]["documents"] == 1
    assert report["classifiers"]["spam"]["examples"]["keep"]["examples"] == 40
    saved = ClassifierSettings(name="spam", path=str(tmp_path / "a" / "classifiers" / "spam"))
    curate(CurateSettings(source=source, classifier=(saved,), workers=1), tmp_path / "b")
    assert _texts(tmp_path / "b") == _texts(tmp_path / "a")


def test_a_source_without_a_document(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{\n[]\n")
    source = (Source(name="web", kind="jsonl", path=str(tmp_path / "a.jsonl")),)
    with pytest.raises(GemmaryError, match=r"source web has no document.*a.jsonl:1: not JSON"):
        curate(CurateSettings(source=source, workers=1), tmp_path / "out")


def test_damage_met_by_a_worker_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(b"\x1f\x8bnothing")
    (tmp_path / "b.jsonl.gz").write_bytes(b"\x1f\x8bnothing")
    source = (Source(name="web", kind="jsonl", path=str(tmp_path)),)
    for workers in (1, 2):
        with pytest.raises(GemmaryError, match=r"a\.jsonl\.gz cannot be read|b\.jsonl\.gz cannot be read"):
            curate(CurateSettings(source=source, workers=workers, task_bytes=1), tmp_path / "out")


def test_too_little_disk(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    with pytest.raises(GemmaryError, match=r"GB free, and curating these sources may take"):
        curate(_settings(corpus), tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"source": ()}, "at least one source"),
        ({"source": (Source(name="a", kind="arithmetic"),) * 2}, "two of source are named 'a'"),
        ({"languages": ("tlh",)}, "no such language as 'tlh'"),
        ({"max_contaminated": 2.0}, "max_contaminated is 2.0"),
        ({"workers": -1}, "workers is -1"),
    ],
)
def test_settings_that_make_no_sense(given: dict[str, Any], message: str) -> None:
    with pytest.raises(GemmaryError, match=message):
        CurateSettings(**{"source": (Source(name="a", kind="arithmetic"),), **given})


def test_without_datatrove_it_says_how_to_get_it(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datatrove", None)
    with pytest.raises(GemmaryError, match=r"pip install 'gemmary\[data\]'"):
        curate(_settings(corpus), tmp_path)
