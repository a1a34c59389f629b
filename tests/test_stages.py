"""A whole small life on documents of its own: stages run once, are skipped, go on, and refuse what was begun otherwise."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

import gemmary
from gemmary.cli import main
from gemmary.errors import GemmaryError
from gemmary.recipe import load_recipe
from gemmary.stages import Life

RECIPE = """
held_out_bytes = 4000
[curate]
workers = 1
max_recurrence = 0
[[curate.source]]
name = "letters"
kind = "jsonl"
path = "{letters}"
filters = "none"
held_out = 0.1
[[curate.source]]
name = "sums"
kind = "arithmetic"
documents = 60
held_out = 0.1
[tokenizer]
vocab_size = 700
[[mixture.stage]]
weights = {{ letters = 0.5, sums = 0.5 }}
[model]
dial = 1
[pretrain]
steps = 12
length = 64
batch = 32
log_every = 4
save_every = 4
evaluate_every = 8
prompt = ["One and"]
sample_tokens = 4
[ablate]
dial = 1
steps = 4
[[ablate.candidate]]
name = "letters"
stage = [{{ weights = {{ letters = 1.0 }} }}]
[[ablate.candidate]]
name = "both"
stage = [{{ weights = {{ letters = 0.5, sums = 0.5 }} }}]
"""


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe's path and the folder of its finished life."""
    root = tmp_path_factory.mktemp("life")
    words = [
        "one",
        "and",
        "two",
        "make",
        "three",
        "while",
        "four",
        "and",
        "five",
        "make",
        "nine",
        "but",
        "six",
        "of",
        "seven",
        "are",
        "never",
        "quite",
        "eight",
    ]
    with (root / "letters.jsonl").open("w") as out:
        for i in range(80):
            text = " ".join(words[(i * 7 + j * j) % len(words)] for j in range(120)) + f" number {i}."
            out.write(json.dumps({"id": f"letter {i}", "text": text}) + "\n")
    path = root / "small.toml"
    path.write_text(RECIPE.format(letters=root / "letters.jsonl"))
    life = Life(load_recipe(path), root / "out")
    assert life.pretrain()["results"]["complete"]
    return path, root / "out"


def test_every_stage_says_what_went_in_and_what_came_out(lived: tuple[Path, Path]) -> None:
    _, folder = lived
    records = {
        name: json.loads((folder / name / "stage.json").read_text())
        for name in ("curate", "tokenizer", "tokens", "pretrain")
    }
    assert records["tokenizer"]["begun_with"]["inputs"] == {"curate": records["curate"]["digest"]}
    assert records["tokens"]["begun_with"]["inputs"] == {"tokenizer": records["tokenizer"]["digest"]}
    assert records["pretrain"]["begun_with"]["inputs"] == {"tokens": records["tokens"]["digest"]}
    assert records["tokenizer"]["results"]["vocabulary"] == 700
    assert set(records["tokenizer"]["results"]["bytes_per_token"]["letters"]) == {"ours", "gemma3"}
    results = records["pretrain"]["results"]
    assert results["steps"] == 12
    assert set(results["held_out"]) == {"letters", "sums"} == set(results["shares"])
    assert results["shares"]["sums"] == pytest.approx(0.5, abs=0.02)
    assert results["samples"].keys() == {"One and"}
    assert (folder / "pretrain" / "curve.png").exists()


def test_the_journal_has_an_entry_each_time(lived: tuple[Path, Path]) -> None:
    entries = [json.loads(line) for line in (lived[1] / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [4, 8, 12]
    assert ["held_out" in entry for entry in entries] == [False, True, True]
    for entry in entries:
        assert entry["tokens"] == entry["step"] * 512
        assert 0 < entry["mfu"] < 2
        assert entry["bits_per_byte"] < entry["loss"] / math.log(2)  # a token is more than a byte


def test_the_model_answers(lived: tuple[Path, Path]) -> None:
    _, folder = lived
    model = gemmary.load(folder / "pretrain" / "model")
    assert model.generate("One and two", max_new_tokens=3).timing.new_tokens <= 3
    kept = sorted(path.name for path in (folder / "pretrain" / "checkpoints").iterdir())
    assert kept == ["step_00000008", "step_00000012"]


def test_what_is_unchanged_is_not_done_again(lived: tuple[Path, Path]) -> None:
    path, folder = lived
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
    said: list[str] = []
    Life(load_recipe(path, ["curate.workers=2", "pretrain.log_every=2"]), folder, say=said.append).pretrain()
    assert [line for line in said if line.endswith("unchanged")] == [
        f"{name}: unchanged" for name in ("curate", "tokenizer", "tokens", "pretrain")
    ]
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()} == before


def test_what_was_begun_otherwise_is_refused_by_name(lived: tuple[Path, Path]) -> None:
    path, folder = lived
    for change, name in (
        ("pretrain.batch=16", "pretrain.batch"),
        ("model.dial=2", "model.embed_dim"),
        ("seed=1", "seed"),
    ):
        with pytest.raises(GemmaryError, match=name):
            Life(load_recipe(path, [change]), folder).pretrain()
    with pytest.raises(GemmaryError, match="mixture"):
        Life(load_recipe(path, ["mixture.stage.0.weights={letters=1.0}"]), folder).pretrain()


def test_a_run_that_was_stopped_goes_on_to_the_same_model(lived: tuple[Path, Path], tmp_path: Path) -> None:
    path, folder = lived
    recipe = load_recipe(path)
    for name in ("curate", "tokenizer", "tokens"):
        (tmp_path / name).symlink_to(folder / name)

    class StoppedError(Exception):
        pass

    def stop(entry: dict[str, object]) -> None:
        if entry["step"] == 8:
            raise StoppedError

    with pytest.raises(StoppedError):
        Life(recipe, tmp_path, report=stop).pretrain()
    said: list[str] = []
    results = Life(recipe, tmp_path, say=said.append).pretrain()["results"]
    assert "going on from step_00000004" in said
    whole = json.loads((folder / "pretrain" / "stage.json").read_text())["results"]
    assert results["held_out"] == pytest.approx(whole["held_out"], rel=1e-4)


def test_a_journal_that_cannot_be_written_is_said_and_ends_no_run(lived: tuple[Path, Path], tmp_path: Path) -> None:
    path, folder = lived
    for name in ("curate", "tokenizer", "tokens"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "pretrain" / "metrics.jsonl").mkdir(parents=True)
    said: list[str] = []
    assert Life(load_recipe(path), tmp_path, say=said.append).pretrain()["results"]["complete"]
    assert len([line for line in said if "takes no more lines for now" in line]) == 1


def test_mixtures_are_ranked(lived: tuple[Path, Path]) -> None:
    path, folder = lived
    found = Life(load_recipe(path), folder).ablate()
    assert [one["mean"] for one in found["ranking"]] == sorted(one["mean"] for one in found["ranking"])
    assert {one["name"]: one["shares"] for one in found["ranking"]}["letters"] == {"letters": 1.0}
    assert found["tokens"] == 4 * 512  # dial 1 takes a quarter of the batch
    assert json.loads((folder / "ablate" / "ranking.json").read_text()) == found
    recipe = dataclasses.replace(load_recipe(path), ablate=None)
    with pytest.raises(GemmaryError, match=r"no \[ablate\]"):
        Life(recipe, folder).ablate()


def test_the_verbs(lived: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    path, folder = lived
    for verb, words in (
        ("curate", ["letters read", "sums read", "held_out"]),
        ("tokenizer", ["bytes per token", "gemma3"]),
        ("run", ["bits per byte", "xz -9", "curve.png", "gemmary generate"]),
        ("ablate", ["candidate", "both"]),
    ):
        with pytest.raises(SystemExit) as ended:
            main([verb, str(path), "--out", str(folder)])
        shown = capsys.readouterr()
        assert ended.value.code == 0, shown.err
        for word in words:
            assert word in shown.out, verb
    with pytest.raises(SystemExit):
        main(["run", str(path), "--out", str(folder), "--json", "--quiet"])
    shown = capsys.readouterr()
    assert json.loads(shown.out)["results"]["complete"] is True
    assert shown.err == ""


def test_a_mistake_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "wrong.toml"
    recipe.write_text(RECIPE.format(letters=tmp_path / "none.jsonl"))
    with pytest.raises(SystemExit) as ended:
        main(["run", str(recipe), "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.splitlines()[-1].startswith("error: ")
    assert "none.jsonl" in error
    assert not (tmp_path / "out" / "tokenizer").exists()


def test_a_vocabulary_that_the_data_do_not_have(lived: tuple[Path, Path], tmp_path: Path) -> None:
    path, folder = lived
    (tmp_path / "curate").symlink_to(folder / "curate")
    with pytest.raises(GemmaryError, match=r"tokenizer\.vocab_size is 50000"):
        Life(load_recipe(path, ["tokenizer.vocab_size=50000"]), tmp_path).tokenizer()
    assert not (tmp_path / "tokenizer" / "stage.json").exists()
