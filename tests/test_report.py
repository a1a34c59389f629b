"""A report says what the files say, lets nothing that a model said become markup, and needs no stage to be there."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

from gemmary import evaluation_results
from gemmary.errors import GemmaryError
from gemmary.report import report
from gemmary.report_figures import curve, watched_curve
from gemmary.report_judgements import judgements
from gemmary.report_pages import Samples, Section, Table, html_page, markdown_page

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> `*|_ </pre></table>"
ALLOWED = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "nav", "a", "section", "p", "div", "table", "caption", "thead", "tbody",
    "tr", "th", "td", "figure", "figcaption", "b", "pre", "svg", "g", "path", "defs", "use", "text", "tspan", "rect", "clippath",
}  # fmt: skip


class Tags(HTMLParser):
    """What tags, attributes and texts a page has."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[tuple[str, str]] = set()
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {(name, value or "") for name, value in attrs}

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def run_of(folder: Path) -> Path:
    """A run's files, as stages leave them, with hostile text wherever a model or a file's author writes."""
    for name in ("sft", "reward", "rlhf", "evaluate", "instructions"):
        (folder / name).mkdir(parents=True)
    pairs = {
        "pairs": 10, "accuracy": 0.8, "interval": [0.5, 0.94], "loss": 0.4,
        "by_length": {"longer": {"pairs": 10, "accuracy": 0.8}}, "by_source": {"s": 0.8},
        "calibration": {"error": 0.031, "bins": [{"pairs": 10, "confidence": 0.9, "accuracy": 0.8}]},
    }  # fmt: skip
    losses = {"all": 1.25, "s": 1.25}
    watched = {
        "success": 0.625,
        "reward": 1.5,
        "answer_tokens": 9.0,
        "finished": 1.0,
        "repetition": 0.0,
        "win_rate": 0.5,
    }
    stages = {
        "sft": {"learnt": 5, "steps": 7, "before": {"held_out_loss": {"all": 3.5, "s": 3.5}}, "held_out_loss": losses},
        "reward": {"held_out_pairs": pairs, "before": {}},
        "rlhf": {"stop": "the reward is being gamed: it rose", "before": {}},
        "evaluate": {},
    }
    for name, found in stages.items():
        record = {"stage": name, "digest": f"digest of {name}", "results": found, "seconds": 30.0, "begun_with": {}}
        (folder / name / "stage.json").write_text(json.dumps(record))
    entries = [{"step": step, "loss": 2.0 - step / 10, "held_out_loss": {"all": 2.0}} for step in range(3)]
    (folder / "sft" / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in entries))
    seen = [{"step": step, "kl": 0.1, "watched": {**watched, "success": 0.625 - step / 10}} for step in range(3)]
    (folder / "rlhf" / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in seen) + "{half")
    model = {
        "tasks": {
            "sums": {"prompts": 8, "success": 0.375, "interval": [0.1, 0.7]},
            "all": {"prompts": 8, "success": 0.375},
        }
    }
    model |= {"answer_tokens": 4.5, "finished": 1.0, "repetition": 0.25}
    samples = [{"source": "sums", "prompt": HOSTILE, "answer": HOSTILE, "models": {"base": HOSTILE}}]
    results = {"sandbox": None, "models": {"base": {"greedy": model, "sampled": model}}, "samples": samples}
    (folder / "evaluate" / "results.json").write_text(json.dumps(results))
    counts = {"read": 9, "train": 5, "held_out": 2, "broken": {"count": 1, "first": [f"a.jsonl:3: {HOSTILE}"]}}
    counts["removed"] = {"identity": {"count": 1, "examples": []}}
    (folder / "instructions" / "report.json").write_text(json.dumps({"sources": {"s": counts}}))
    (folder / "run.json").write_text(json.dumps({"command": ["gemmary", "run", HOSTILE], "cores": 2}))
    return folder


def test_the_page_says_what_the_files_say(tmp_path: Path) -> None:
    report(run_of(tmp_path))
    text = " ".join(Tags((tmp_path / "report.html").read_text()).texts)
    for said in (
        "37.5 % [10, 70]", "3.500", "1.250", "80.0 % [50.0, 94.0]", "calibration error 3.1 points", "62.5 %", "Stopped: the reward is being gamed",
        "Code was not judged", "digest of sft", "identity", "About 0.5 Wh, if each of 2 cores took 8 W",
    ):  # fmt: skip
        assert said in text, said


def test_nothing_that_was_said_becomes_markup(tmp_path: Path) -> None:
    report(run_of(tmp_path))
    page = (tmp_path / "report.html").read_text()
    found = Tags(page)
    assert found.tags <= ALLOWED, found.tags - ALLOWED
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert not [value for name, value in found.attributes if name in ("src", "href", "xlink:href") and value[:1] != "#"]
    assert "default-src 'none'" in page
    assert HOSTILE in found.texts
    card = (tmp_path / "README.md").read_text()
    rows = [line for line in card.splitlines() if line.startswith("|")]
    assert not [row for row in rows if "<script" in row.replace("\\<", "")]
    assert {row.replace("\\|", "").count("|") for row in rows} <= {3, 4, 5, 6, 7, 8}


def test_code_in_a_card_ends_where_it_should() -> None:
    section = Section("S", "", [], samples=[Samples("s", "a `` b", None, {"m": "```"})])
    card = markdown_page("T", [section])
    assert "s: ``` a `` b ```" in card
    assert "- m: ```` ``` ````" in card


def test_numbers_stand_to_the_right() -> None:
    page = html_page("T", [Section("S", "", [Table("t", ["name", "share"], [["x", "1.5 % [0, 3]"]])])])
    assert "<td>x</td><td class=n>1.5 % [0, 3]</td>" in page


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GemmaryError, match="holds no run"):
        report(tmp_path)
    with pytest.raises(GemmaryError, match="watts is 0"):
        report(run_of(tmp_path / "run"), watts=0)


def test_curves_are_drawn_from_what_there_is() -> None:
    assert curve([], "held_out", "x") == ""
    assert watched_curve([{"step": 1, "kl": 0.1}]) == ""
    drawn = curve([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "held_out": {"prose": 1.5}}], "held_out", "bits")
    assert drawn.startswith("<svg")
    assert ">bits</text>" in drawn
    assert drawn == curve(
        [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "held_out": {"prose": 1.5}}], "held_out", "bits"
    )


def test_judgements_in_folders_of_the_run_are_shown(tmp_path: Path) -> None:
    line = {
        "suite": "gemma", "benchmark": "PIQA", "task": "piqa", "shots": 0, "asked_shots": 0, "metric": "acc", "value": 68.9,
        "interval": [66.0, 71.7], "questions": 1000, "of": 1838, "seconds": 9.4, "published": 67.7, "published_shots": 0,
        "comparable": True, "reproduced": True, "difference": 1.2, "joint": 3.6,
    }  # fmt: skip
    missing = {"suite": "gemma", "benchmark": "SIQA", "task": "social_iqa", "missing": "hub/siqa is not there"}
    card = SimpleNamespace(name="gemma-3-270m", source="its card")
    share = {"share": 0.1, "count": 1, "interval": [0.02, 0.4]}
    shares = dict.fromkeys(("exact", "approximate", "personal", "secret"), share)
    tally = {"pairs": 4, "wins": 2, "ties": 1, "losses": 1, "invalid": 0, "rate": 0.625, "interval": [0.2, 0.9]}
    written = {
        "suites/evaluation.json": evaluation_results.summary("sample", card, [line, missing]),
        "audit/memorization.json": {"model": "m", "seen": {"corpora": {"web": {"documents": 10, **shares}}, "all": {}}},
        "duel/comparison.json": {
            "about": {"a": "<b>one</b>", "b": "two", "folder": "duel"}, "pairs": 4, "equal": 0, "cut": {"a": 0, "b": 0},
            "judge": {"all": tally, "categories": {"x": tally}},
        },
    }  # fmt: skip
    for name, value in written.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(json.dumps(value))
    sections = judgements(tmp_path)
    assert [section.title for section in sections] == ["Benchmarks", "What it recites", "Side by side"]
    assert all(len(section.figures) == 1 for section in sections)
    evaluated = sections[0].tables[0].rows
    assert evaluated[0][4:7] == ["68.9 [66.0, 71.7] acc", "67.7", "yes, +1.2 ± 3.6"]
    assert evaluated[1][4] == "not run: hub/siqa is not there"
    assert evaluated[2][1:5] == ["mean of 1", "", "", "68.9"]
    assert sections[1].tables[0].rows[0][:4] == ["seen", "web", "10", "10.00 [2.00, 40.00]"]
    assert sections[2].tables[0].rows[0][-1] == "62.5 [20, 90]"
    assert "<b>one" not in html_page("t", sections)
    assert judgements(tmp_path / "duel") == []
