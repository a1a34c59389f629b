"""A small life from text to a report: every stage runs once, begins from the one before, and says what it left out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import gemmary
from gemmary.checkpoints import open_model
from gemmary.cli import main
from gemmary.errors import GemmaryError
from gemmary.recipe import load_recipe
from gemmary.report import report
from gemmary.weights import LoRA
from gemmary.whole import Whole

RECIPE = """
held_out_bytes = 2000
[curate]
workers = 1
[[curate.source]]
name = "sums"
kind = "arithmetic"
documents = 60
held_out = 0.1
[tokenizer]
vocab_size = 640
[[mixture.stage]]
weights = {{ sums = 1.0 }}
[model]
dial = 1
[pretrain]
steps = 3
length = 64
batch = 16
[[instructions.source]]
name = "refusal"
kind = "lessons"
topic = "refusal"
examples = 60
held_out = 0.2
[[instructions.source]]
name = "code"
kind = "lessons"
topic = "code"
examples = 60
held_out = 0.3
[[instructions.source]]
name = "mine"
path = "{mine}"
held_out = 0.0
[sft]
steps = 3
length = 384
batch = 2
evaluate_every = 2
save_every = 2
[[preferences.source]]
name = "refusal"
kind = "lessons"
topic = "refusal"
examples = 60
held_out = 0.2
[reward]
steps = 2
length = 512
batch = 2
[dpo]
steps = 2
length = 512
batch = 2
[dpo.lora]
rank = 2
[rlhf]
steps = 2
length = 384
prompts = 2
answers = 2
max_new_tokens = 8
evaluate_every = 1
watched = 4
[evaluate]
prompts = 3
max_new_tokens = 8
"""
MINE = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<script>alert(1)</script>"}]},
    {"prompt": "Say a lot.", "response": "a lot " * 400},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "user", "content": "Hello?"}]},
    {"prompt": "Who made you?", "completion": "I am ChatGPT, made by OpenAI."},
]


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str]]:
    """A recipe, the folder of its finished life, and what was said."""
    root = tmp_path_factory.mktemp("whole")
    mine = root / "mine.jsonl"
    mine.write_text("".join(json.dumps(one) + "\n" for one in MINE))
    recipe = root / "small.toml"
    recipe.write_text(RECIPE.format(mine=mine))
    said: list[str] = []
    life = Whole(load_recipe(recipe), root / "out", say=said.append)
    assert life.whole()["stage"] == "evaluate"
    life.sign(["gemmary", "run", str(recipe)], recipe)
    report(root / "out")
    return recipe, root / "out", said


def results(folder: Path, stage: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / stage / "stage.json").read_text())["results"]
    return found


def test_every_stage_leaves_a_model_that_runs(lived: tuple[Path, Path, list[str]]) -> None:
    _, folder, _ = lived
    for stage in ("pretrain/model", "sft/model", "rlhf/model", "dpo/adapter"):
        gemma = gemmary.load(folder / stage)
        assert gemma.chat([{"role": "user", "content": "Hi"}], max_new_tokens=3).token_ids
    with open_model(folder / "reward" / "model") as checkpoint:
        assert checkpoint.config.score_head
        assert checkpoint.weight("score").shape == (64,)
    with open_model(folder / "dpo" / "adapter") as checkpoint:
        assert isinstance(checkpoint.weight("attn.q"), LoRA)


def test_each_stage_is_looked_at_once_and_nothing_is_done_twice(lived: tuple[Path, Path, list[str]]) -> None:
    recipe, folder, first = lived
    assert len([line for line in first if line.startswith("curate")]) == 1
    said: list[str] = []
    before = (folder / "evaluate" / "results.json").read_bytes()
    Whole(load_recipe(recipe), folder, say=said.append).whole()
    done = [line for line in said if not line.endswith("unchanged")]
    assert done == [f"curate: {folder / 'curate'}"]  # which asks itself
    assert (folder / "evaluate" / "results.json").read_bytes() == before


def test_what_cannot_be_used_is_named_and_counted(lived: tuple[Path, Path, list[str]]) -> None:
    _, folder, _ = lived
    told = json.loads((folder / "instructions" / "report.json").read_text())["sources"]["mine"]
    assert told["broken"]["count"] == 1
    assert told["broken"]["first"][0].startswith("mine.jsonl:3: message 1 is the user's")
    assert told["removed"]["identity"]["examples"][0]["where"] == "mine.jsonl:4"
    left = results(folder, "dialogues")["sources"]["mine"]["too_long"]
    assert left["count"] == 1
    assert left["first"][0].startswith("mine.jsonl:2: ")
    assert "and a row takes 384" in left["first"][0]


def test_refused_as_the_recipe_says(lived: tuple[Path, Path, list[str]], tmp_path: Path) -> None:
    recipe, folder, _ = lived
    shutil.copytree(folder, tmp_path / "out", symlinks=True)
    sets = ["instructions.on_error=refuse"]
    with pytest.raises(GemmaryError, match=r"source mine: mine\.jsonl:3: message 1"):
        Whole(load_recipe(recipe, sets), tmp_path / "out").sft()
    data = recipe.parent / "mine.jsonl"
    whole = data.read_text()
    try:
        data.write_text(whole.splitlines()[0] + "\n" + whole.splitlines()[1] + "\n")
        with pytest.raises(GemmaryError, match=r"source mine: mine\.jsonl:2: \d+ tokens, and a row takes 384"):
            Whole(load_recipe(recipe, sets), tmp_path / "out").sft()
    finally:
        data.write_text(whole)


def test_held_out_tasks_are_answered_by_every_model(lived: tuple[Path, Path, list[str]]) -> None:
    _, folder, said = lived
    found = json.loads((folder / "evaluate" / "results.json").read_text())
    assert set(found["models"]) == {"base", "sft", "rlhf", "dpo"}
    tasks = found["models"]["rlhf"]["greedy"]["tasks"]
    if found["sandbox"] is None:
        assert any("code is not judged" in line for line in said)
        assert "code" not in tasks
    else:
        assert tasks["code"]["prompts"] == 3
    assert tasks["refusal"]["prompts"] == 3
    assert all(set(one["models"]) == {"base", "sft", "rlhf", "dpo"} for one in found["samples"])
    records = [json.loads(line) for line in (folder / "evaluate" / "records.jsonl").read_text().splitlines()]
    for model, ways in found["models"].items():
        for how, one in ways.items():
            mine = [r["value"] for r in records if (r["model"], r["how"], r["task"]) == (model, how, "refusal")]
            assert sum(mine) / len(mine) == one["tasks"]["refusal"]["success"]


def test_a_stage_that_was_begun_otherwise_is_refused(lived: tuple[Path, Path, list[str]]) -> None:
    recipe, folder, _ = lived
    with pytest.raises(GemmaryError, match=r"rlhf\.beta was 0\.05 and is 0\.3"):
        Whole(load_recipe(recipe, ["rlhf.beta=0.3"]), folder).rlhf()


def test_a_recipe_may_begin_from_a_model_that_is_there(lived: tuple[Path, Path, list[str]], tmp_path: Path) -> None:
    _, folder, _ = lived
    recipe = tmp_path / "from.toml"
    recipe.write_text(
        f'[model]\npath = "{folder / "pretrain" / "model"}"\n'
        '[[instructions.source]]\nname = "refusal"\nkind = "lessons"\ntopic = "refusal"\nexamples = 30\n'
        "[sft]\nsteps = 2\nlength = 256\nbatch = 1\n[sft.lora]\nrank = 2\nbase_bits = 8\n"
    )
    main_ends_well(["sft", str(recipe), "--out", str(tmp_path / "out"), "--quiet"])
    with open_model(tmp_path / "out" / "sft" / "adapter") as checkpoint:
        assert checkpoint.format == "peft"


def main_ends_well(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[model]\ndial = 1\n', r"the recipe has no \[curate\]"),
        ('[model]\npath = "sample"\n[sft]\nsteps = 1\n', r"\[sft\] needs \[\[instructions\.source\]\]"),
        (
            '[model]\npath = "sample"\n[[instructions.source]]\nname = "a"\nkind = "lessons"\ntopic = "code"\n[rlhf]\nsteps = 1\n',
            "neither",
        ),
        (
            '[model]\npath = "sample"\n[[instructions.source]]\nname = "a"\nkind = "lessons"\ntopic = "code"\n'
            '[rlhf]\nsteps = 1\nreward = "answer"\nsources = ["b"]\n',
            "no source is called 'b'; there are a",
        ),
        (
            '[model]\npath = "sample"\n[[instructions.source]]\nname = "a"\nkind = "lessons"\ntopic = "code"\n[sft]\n',
            "either steps",
        ),
    ],
)  # fmt: skip
def test_a_recipe_that_cannot_be_is_refused_at_once(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(GemmaryError, match=message):
        load_recipe(tmp_path / "r.toml")
