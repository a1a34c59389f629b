"""Recipes: what they say is checked whole, by path, before anything runs."""

from pathlib import Path

import pytest

from gemmary.errors import GemmaryError
from gemmary.recipe import ModelSettings, load_recipe
from gemmary.train.pretrain import PretrainSettings

RUNS = Path(__file__).parent.parent / "runs"
SMALL = """
seed = 3
[[curate.source]]
name = "text"
kind = "text"
path = "there.txt"
[[mixture.stage]]
weights = { text = 1.0 }
[model]
dial = 2
[pretrain]
steps = 7
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


def test_a_recipe_is_read_with_defaults(small: Path) -> None:
    recipe = load_recipe(small)
    assert (recipe.seed, recipe.pretrain.steps, recipe.model.dial) == (3, 7, 2)
    assert recipe.curate.source[0].path == "there.txt"
    assert recipe.pretrain == PretrainSettings(steps=7)
    assert recipe.ablate is None


def test_settings_are_changed_by_path(small: Path) -> None:
    sets = [
        "pretrain.steps=9",
        "pretrain.optimizer.kind=muon",
        "curate.source.0.path=elsewhere.txt",
        "model.generation=3",
    ]
    recipe = load_recipe(small, sets)
    assert recipe.pretrain.steps == 9
    assert recipe.pretrain.optimizer.kind == "muon"
    assert recipe.curate.source[0].path == "elsewhere.txt"
    assert recipe.model.generation == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("pretrain.stps=3", r"unknown key pretrain\.stps: did you mean steps"),
        ("pretrain.optimizer.lr=3", r"unknown key pretrain\.optimizer\.lr"),
        ("curate.source.0.pth=3", r"unknown key curate\.source\[0\]\.pth: did you mean path"),
        ("curat.workers=3", "unknown key curat: did you mean curate"),
        ("pretrain.steps=many", r"pretrain\.steps: .*integer"),
        ("pretrain.steps=0", "steps is 0; it is at least 1"),
        ("pretrain.optimizer.kind=sgd", r"pretrain\.optimizer\.kind: .*'adamw' or 'muon'"),
        ("mixture.stage.0.until=0.5", r"mixture\.stage\[0\]\.until"),
        ("mixture.stage.0.weights={web = 1.0}", "no source is called 'web'; there are text"),
        ("model.preset=gemma-2b", "either a path"),
        ("model.dial=99", "dial is 99"),
        ("model.generation=2", "generation 2"),
        ("curate.source.3.path=x", "no '3'"),
        ("pretrain.steps", "write key=value"),
        ("pretrain.accumulate=3", "batch is 8"),
    ],
)
def test_a_mistake_is_named_by_its_path(small: Path, change: str, message: str) -> None:
    with pytest.raises(GemmaryError, match=message):
        load_recipe(small, [change])


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(GemmaryError, match="cannot be read"):
        load_recipe(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = [")
    with pytest.raises(GemmaryError, match="is not TOML"):
        load_recipe(tmp_path / "bad.toml")


def test_the_dial_scales_batch_and_learning_rates() -> None:
    settings = PretrainSettings(steps=1, batch=8)
    assert ModelSettings(dial=4).scaled(settings) == settings
    assert ModelSettings(preset="gemma-2b").scaled(settings) == settings
    wide = ModelSettings(dial=16).scaled(settings)
    assert wide.batch == 32
    assert wide.optimizer.learning_rate == pytest.approx(settings.optimizer.learning_rate / 2)
    assert wide.optimizer.matrix_learning_rate == pytest.approx(settings.optimizer.matrix_learning_rate / 2)
    assert ModelSettings(dial=1).scaled(settings).batch == 2
    config = ModelSettings(dial=3, generation=3).config(1000, 640)
    assert (config.num_layers, config.num_heads, config.embed_dim, config.context) == (3, 3, 192, 640)
    assert config.qk_norm


# arXiv 2403.08295: 3T tokens for the 2B (2T in its first version) and 6T for the 7B, context 8192.
@pytest.mark.parametrize(("name", "preset", "tokens"), [("gemma_2b", "gemma-2b", 3e12), ("gemma_7b", "gemma-7b", 6e12)])
def test_the_report_s_runs_have_the_report_s_tokens_and_context(name: str, preset: str, tokens: float) -> None:
    recipe = load_recipe(RUNS / f"{name}.toml")
    settings = recipe.pretrain
    assert recipe.model.preset == preset
    assert settings.length == 8192
    assert settings.dtype == "bfloat16"
    assert settings.steps * settings.batch * settings.length == pytest.approx(tokens, rel=1e-3)
    assert len(recipe.mixture.stage) > 1
    assert recipe.tokenizer.vocab_size == 256_000


@pytest.mark.parametrize("path", sorted(RUNS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_run_file_says_its_command_and_hardware(path: Path) -> None:
    load_recipe(path)
    header = path.read_text().split("\n\n[")[0].split("\n\n#")[0]
    assert f"runs/{path.name}" in path.read_text()
    assert "Hardware:" in path.read_text(), header
