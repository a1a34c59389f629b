"""Hugging Face directories as they are in the wild: configs old and new, shards, multimodal prefixes, second copies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_models import CONFIGS, same_weights, values_of, write_native

from gemmary.checkpoints import convert, open_model
from gemmary.checkpoints.huggingface import config_from_hf, config_to_hf
from gemmary.checkpoints.safetensors_file import SafetensorsWriter
from gemmary.config import Config
from gemmary.errors import GemmaryError
from gemmary.presets import PRESETS, nano
from gemmary.text import Tokenizer

WEIGHTS = "model.safetensors"


@pytest.fixture
def directory(tmp_path: Path, tiny: Tokenizer) -> Path:
    """A Hugging Face directory of the small Gemma 3."""
    config = CONFIGS["gemma3"]
    with open_model(write_native(tmp_path / "native", config, tiny, values_of(config))) as checkpoint:
        convert(checkpoint, tmp_path / "hf", "hf")
    return tmp_path / "hf"


def _rename(directory: Path, change: Any) -> None:
    tensors = {change(name): array for name, array in load_file(directory / WEIGHTS).items()}
    save_file({name: array for name, array in tensors.items() if name}, directory / WEIGHTS)


def _edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _opens(directory: Path) -> None:
    with open_model(directory) as checkpoint:
        same_weights(checkpoint, values_of(CONFIGS["gemma3"]))


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_a_multimodal_directory_is_read_for_its_text(directory: Path, prefix: str) -> None:
    _rename(directory, lambda name: name.replace("model.", prefix, 1))
    tensors = load_file(directory / WEIGHTS)
    tensors["vision_tower.x"] = tensors["model.vision_tower.y"] = np.zeros(3, np.float32)
    tensors["multi_modal_projector.mm_input_projection_weight"] = np.zeros(3, np.float32)
    save_file(tensors, directory / WEIGHTS)
    text = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    _opens(directory)


def test_shards_and_a_tied_head(directory: Path) -> None:
    tensors = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    plan = [(name, array.shape, array.dtype) for name, array in tensors.items()]
    with SafetensorsWriter(directory, plan, shard_bytes=50_000) as writer:
        for name, array in tensors.items():
            writer.write(name, array)
    assert len(list(directory.glob("*.safetensors"))) > 3
    _opens(directory)


def test_another_head_is_refused(directory: Path) -> None:
    tensors = load_file(directory / WEIGHTS)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * ml_dtypes.bfloat16(2)
    save_file(tensors, directory / WEIGHTS)
    with pytest.raises(GemmaryError, match=r"lm_head\.weight differs from the embedding"):
        open_model(directory)


def test_missing_unknown_and_misshapen_tensors_are_named(directory: Path) -> None:
    q = "model.layers.2.self_attn.q_proj.weight"
    _rename(directory, lambda name: name if name != q else "")
    with pytest.raises(GemmaryError, match=rf"lacks tensors: {q}; is it a Gemma 3 checkpoint\?"):
        open_model(directory)
    tensors = load_file(directory / WEIGHTS)
    tensors[q] = np.zeros((2, 2), np.float32)
    save_file(tensors, directory / WEIGHTS)
    with pytest.raises(GemmaryError, match=r"misshapen tensors: .*q_proj.weight \[2, 2\] instead of \[128, 64\]"):
        open_model(directory)
    tensors[q] = np.zeros((128, 64), np.float32)
    tensors["model.layers.2.self_attn.q_proj.bias"] = np.zeros(128, np.float32)
    save_file(tensors, directory / WEIGHTS)
    with pytest.raises(GemmaryError, match=r"has unknown tensors: .*q_proj\.bias"):
        open_model(directory)


def test_directories_that_are_not_whole(directory: Path) -> None:
    (directory / WEIGHTS).rename(directory / "x")
    with pytest.raises(GemmaryError, match="the weights are missing"):
        open_model(directory)
    (directory / "x").rename(directory / WEIGHTS)
    for name in ("tokenizer.model", "tokenizer.json"):
        (directory / name).unlink()
    with open_model(directory) as checkpoint:
        assert checkpoint.tokenizer() is None
    (directory / "config.json").write_text("{")
    with pytest.raises(GemmaryError, match=r"config\.json cannot be read as JSON"):
        open_model(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"hidden_activation": "silu", "hidden_act": "silu"}, "activation 'silu'"),
        ({"use_bidirectional_attention": True}, "bidirectional"),
        ({"tie_word_embeddings": False}, "untied"),
        ({"hidden_size": None}, "embed_dim is None"),
        ({"hidden_size": -1}, "embed_dim is -1"),
        ({"num_hidden_layers": 10**9, "layer_types": None}, "num_layers is 1000000000"),
        ({"num_key_value_heads": 3}, "do not divide"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "rope scaling 'yarn'"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"sliding_window": "x"}, "window is 'x'"),
        ({"query_pre_attn_scalar": -4}, "malformed|query_scale"),
        ({"rms_norm_eps": "small"}, "malformed"),
        ({"auto_map": {"AutoModel": "evil.py"}, "model_type": "custom"}, "model_type is 'custom'"),
    ],
)
def test_configs_that_we_would_run_wrongly_are_refused(directory: Path, changes: dict[str, Any], message: str) -> None:
    _edit_config(directory, **changes)
    with pytest.raises(GemmaryError, match=message) as caught:
        open_model(directory)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "nano"])
def test_every_preset_survives_its_config_json(name: str) -> None:
    config = PRESETS[name].config
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config, "bfloat16"))), "config.json") == config


# What google's repositories publish, said again from their config.json files: only what these name.
PUBLISHED: dict[str, dict[str, Any]] = {
    "gemma-2b-256000": {
        "model_type": "gemma", "hidden_act": "gelu", "hidden_size": 2048, "intermediate_size": 16384, "head_dim": 256,
        "num_attention_heads": 8, "num_hidden_layers": 18, "num_key_value_heads": 1, "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0, "vocab_size": 256000, "max_position_embeddings": 8192,
    },
    "gemma2-2b": {
        "model_type": "gemma2", "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "intermediate_size": 9216,
        "max_position_embeddings": 8192, "num_attention_heads": 8, "num_hidden_layers": 26, "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096,
        "vocab_size": 256000,
    },
    "gemma3-1b": {
        "model_type": "gemma3_text", "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152,
        "intermediate_size": 6912, "max_position_embeddings": 32768, "num_attention_heads": 4, "num_hidden_layers": 26,
        "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
        "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
        "vocab_size": 262144,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_the_presets(name: str) -> None:
    # The report counts Gemma 2 with 256128 rows; its files have 256000.
    rows = PUBLISHED[name]["vocab_size"]
    assert config_from_hf(PUBLISHED[name], "config.json") == PRESETS[name].config.replace(vocab_size=rows)


def test_configs_of_transformers_5() -> None:
    """Rope parameters by the type of layer, and layers named one by one."""
    data = config_to_hf(PRESETS["gemma3-4b"].config, "bfloat16")
    for old in ("rope_theta", "rope_local_base_freq", "rope_scaling", "sliding_window_pattern"):
        data.pop(old)
    data["rope_parameters"] = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    assert config_from_hf(data, "config.json") == PRESETS["gemma3-4b"].config


def test_both_vocabulary_sizes_of_gemma_1() -> None:
    small = config_from_hf(PUBLISHED["gemma-2b-256000"], "config.json")
    large = config_from_hf({**PUBLISHED["gemma-2b-256000"], "vocab_size": 256128}, "config.json")
    assert (small.vocab_size, small.num_tokens) == (256000, 256000)
    assert (large.vocab_size, large.num_tokens) == (256128, 256000)
    assert isinstance(large, Config)


# --- A reward model ---------------------------------------------------------------------------------------------------

SCORERS = {
    "gemma1-mqa": "GemmaForSequenceClassification", "gemma2": "Gemma2ForSequenceClassification",
    "gemma3": "Gemma3TextForSequenceClassification",
}  # fmt: skip


@pytest.mark.parametrize("kind", SCORERS)
def test_a_reward_model_goes_there_and_back(tmp_path: Path, tiny: Tokenizer, kind: str) -> None:
    """As transformers has it: one label, and its score a matrix of one row."""
    small = CONFIGS[kind]
    config = small.replace(score_head=True, num_tokens=small.vocab_size)
    values = values_of(config)
    assert np.asarray(values["score", 0]).any()
    with open_model(write_native(tmp_path / "native", config, tiny, values)) as checkpoint:
        convert(checkpoint, tmp_path / "hf", "hf")
    about = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert about["architectures"] == [SCORERS[kind]]
    assert (about["num_labels"], about["id2label"], about["label2id"]) == (1, {"0": "score"}, {"score": 0})
    score = load_file(tmp_path / "hf" / WEIGHTS)["score.weight"]
    assert score.shape == (1, config.embed_dim)
    np.testing.assert_array_equal(score[0].view(np.uint16), values["score", 0].view(np.uint16))
    with open_model(tmp_path / "hf") as checkpoint:
        assert checkpoint.config == config
        same_weights(checkpoint, values)
        convert(checkpoint, tmp_path / "back", "native")
    with open_model(tmp_path / "back") as checkpoint:
        assert checkpoint.config == config
        same_weights(checkpoint, values)


@pytest.mark.parametrize("to", ["gguf", "kaggle"])
def test_a_reward_model_has_no_place_elsewhere(tmp_path: Path, tiny: Tokenizer, to: str) -> None:
    config = CONFIGS["gemma3"].replace(score_head=True)
    with (
        open_model(write_native(tmp_path / "native", config, tiny, values_of(config))) as checkpoint,
        pytest.raises(GemmaryError, match=f"{to} has no place for a reward model's score: choose native or hf"),
    ):
        convert(checkpoint, tmp_path / "there", to)
    assert [path.name for path in tmp_path.iterdir()] == ["native"]


def test_a_score_without_its_architecture_is_an_unknown_tensor(tmp_path: Path, tiny: Tokenizer) -> None:
    """And the other way round, a missing one: neither is a language model by chance."""
    config = CONFIGS["gemma3"].replace(score_head=True)
    with open_model(write_native(tmp_path / "native", config, tiny, values_of(config))) as checkpoint:
        convert(checkpoint, tmp_path / "hf", "hf")
    tensors = load_file(tmp_path / "hf" / WEIGHTS)
    score = tensors.pop("score.weight")
    save_file(tensors, tmp_path / "hf" / WEIGHTS)
    with pytest.raises(GemmaryError, match=r"lacks tensors: score\.weight"):
        open_model(tmp_path / "hf")
    save_file({**tensors, "score.weight": score}, tmp_path / "hf" / WEIGHTS)
    _edit_config(tmp_path / "hf", architectures=["Gemma3ForCausalLM"])
    with pytest.raises(GemmaryError, match=r"unknown tensors: score\.weight"):
        open_model(tmp_path / "hf")


def test_a_gemma_3_without_windows_goes_and_comes_back() -> None:
    config = nano(2, 600, 3)
    data = config_to_hf(config, "float32")
    assert data["sliding_window"] == config.context  # transformers makes its mask in any case
    assert config_from_hf(data, "config.json") == config
