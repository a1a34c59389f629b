"""The door, as people knock on it: what is printed where, and one line with exit code 2 for every mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_models import CONFIGS, values_of, write_native

from gemmary import kernels
from gemmary.cli import main
from gemmary.text import Tokenizer


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, tiny: Tokenizer) -> str:
    config = CONFIGS["gemma3"]
    return str(write_native(tmp_path_factory.mktemp("cli") / "m", config, tiny, values_of(config)))


class Shell:
    """Runs the command line in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def run(self, *arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            main([*arguments])
        out, err = self._capsys.readouterr()
        return int(exit_.value.code or 0), out, err

    def json(self, *arguments: str) -> Any:
        code, out, err = self.run(*arguments, "--json")
        assert (code, err) == (0, ""), err
        return json.loads(out)


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


@pytest.mark.parametrize(
    ("preset", "embedding", "non_embedding"),
    [("gemma-2b", 524_550_144, 1_981_884_416), ("gemma-7b", 786_825_216, 7_751_248_896)],
)
def test_inspect_shows_the_reports_numbers(shell: Shell, preset: str, embedding: int, non_embedding: int) -> None:
    data = shell.json("inspect", preset)
    total = embedding + non_embedding
    assert data["parameters"] == {"embedding": embedding, "non_embedding": non_embedding, "total": total}
    assert sum(tensor["count"] for tensor in data["tensors"]) == total
    layer = [tensor for tensor in data["tensors"] if ".layers.0." in tensor["name"]]
    assert len(layer) == 9
    code, out, _ = shell.run("inspect", preset)
    assert code == 0
    assert f"{embedding:,} + non-embedding {non_embedding:,}" in out


def test_inspect_of_gemma_2b_is_the_reports_table(shell: Shell) -> None:
    shapes = {tensor["name"]: tensor["shape"] for tensor in shell.json("inspect", "gemma-2b")["tensors"]}
    at = "model.layers.17."
    assert {name.removeprefix(at): shape for name, shape in shapes.items() if name.startswith(at)} == {
        "self_attn.q_proj.weight": [2048, 2048],
        "self_attn.k_proj.weight": [256, 2048],
        "self_attn.v_proj.weight": [256, 2048],
        "self_attn.o_proj.weight": [2048, 2048],
        "mlp.gate_proj.weight": [16384, 2048],
        "mlp.up_proj.weight": [16384, 2048],
        "mlp.down_proj.weight": [2048, 16384],
        "input_layernorm.weight": [2048],
        "post_attention_layernorm.weight": [2048],
    }
    assert shapes["model.embed_tokens.weight"] == [256128, 2048]


def test_inspect_of_a_model_counts_its_files(shell: Shell, small: str) -> None:
    data = shell.json("inspect", small)
    values = values_of(CONFIGS["gemma3"])
    assert data["format"] == "native"
    assert data["parameters"]["total"] == sum(value.size for value in values.values())
    assert data["bytes"] == 2 * data["parameters"]["total"]
    assert len(data["tensors"]) == len(values)


def test_convert_quantize_generate(shell: Shell, small: str, tmp_path: Path) -> None:
    code, out, err = shell.run("convert", small, str(tmp_path / "m.gguf"), "--to", "gguf")
    assert (code, out) == (0, "")
    assert "wrote" in err
    assert shell.run("quantize", small, str(tmp_path / "q"), "--bits", "4")[0] == 0
    assert shell.json("inspect", str(tmp_path / "q"))["tensors"][1]["dtype"] == "int4, groups of 32"
    arguments = ("generate", "x = 1", "--max-new-tokens", "5", "--temperature", "1", "--seed", "3", "--logprobs", "2")
    answers = [shell.json(arguments[0], model, *arguments[1:]) for model in (small, str(tmp_path / "m.gguf"))]
    assert answers[0]["token_ids"] == answers[1]["token_ids"]
    assert len(answers[0]["token_ids"]) == 5
    assert [len(step) for step in answers[0]["top_logprobs"]] == [2] * 5
    code, out, _ = shell.run("generate", small, "x = 1", "--max-new-tokens", "5", "--temperature", "1", "--seed", "3")
    assert (code, out) == (0, "x = 1" + answers[0]["text"] + "\n")


def test_version(shell: Shell) -> None:
    assert shell.run("--version")[:2] == (0, f"gemmary 0.1.0, CPU kernels: {kernels.instructions()}\n")


def test_version_says_where_plain_xla_serves(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "instructions", lambda: None)
    assert shell.run("--version")[1] == "gemmary 0.1.0, CPU kernels: none, plain XLA serves\n"


MISTAKES: list[tuple[tuple[str, ...], str]] = [
    (("inspect", "gema-2b"), "did you mean gemma-2b"),
    (("inspect", "none/at/all"), "there is no model at"),
    (("inspect", "google/gemma-2b"), "--hub"),
    (("inspect",), "Missing argument"),
    (("nonsense",), "No such command"),
    (("inspect", "nano", "--nonsense"), "No such option"),
    (("convert", "SMALL", "OUT", "--to", "onnx"), "there is no format 'onnx'"),
    (("convert", "SMALL", "OUT"), "Missing option '--to'"),
    (("convert", "SMALL", "OUT", "--to", "hf", "--dtype", "float16"), "there is no dtype 'float16'"),
    (("convert", "SMALL", "SMALL", "--to", "hf"), "exists already"),
    (("quantize", "SMALL", "OUT", "--bits", "5"), "8 or 4 bits, not 5"),
    (("quantize", "SMALL", "OUT", "--bits", "x"), "Invalid value for '--bits'"),
    (("generate", "nano", "x"), "there is no model at nano"),
    (("generate", "SMALL", "x", "--temperature", "-1"), "temperature is -1.0"),
    (("generate", "SMALL", "x", "--top-p", "2"), "top_p is 2.0"),
    (("generate", "SMALL", "x", "--seed", "-3"), "seed is -3"),
    (("generate", "SMALL", "x", "--max-new-tokens", "0"), "at least 1"),
    (("generate", "SMALL", "x " * 300), "shorten it"),
    (("generate", "SMALL", "x", "--dtype", "float16"), "float16 overflows"),
    (("generate", "SMALL", "x", "--logprobs", "99", "--json"), "from 0 to 20"),
    (("generate", "SMALL", "x", "--stop", ""), "stop string is empty"),
    (("generate", "SMALL", "a\udcffb"), "lone surrogate"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(a)[:50] for a, _ in MISTAKES])
def test_mistakes_get_one_line_and_exit_code_2(
    shell: Shell, small: str, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    places = {"SMALL": small, "OUT": str(tmp_path / "out")}
    code, out, err = shell.run(*(places.get(argument, argument) for argument in arguments))
    assert code == 2
    assert out in ("", arguments[2] if len(arguments) > 2 else "")
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
