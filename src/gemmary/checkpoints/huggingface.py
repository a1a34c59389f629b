"""Hugging Face directories: config.json, safetensors (sharded or not), tokenizer files.

What we write, transformers and vLLM open: `__metadata__.format = "pt"`, generation_config.json, tokenizer.json,
tokenizer.model and, for a vocabulary with turns, a chat template. Only text models; a multimodal Gemma 3 directory is read
for its text half. config.json is data within bounds: `auto_map` and remote code do not exist here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemmary.checkpoints.checkpoint import StoredCheckpoint, known_tokens, read_json
from gemmary.checkpoints.names import IGNORED
from gemmary.checkpoints.safetensors_file import SafetensorsReader
from gemmary.config import Config
from gemmary.errors import GemmaryError
from gemmary.text.dialogue import chat_template
from gemmary.text.tokenizer import Tokenizer

__all__ = ["HuggingFaceCheckpoint", "config_from_hf", "config_to_hf", "open_huggingface", "write_side_files"]

_TYPES = {"gemma": 1, "gemma2": 2, "gemma3_text": 3}
_ARCHITECTURES = {1: "GemmaForCausalLM", 2: "Gemma2ForCausalLM", 3: "Gemma3ForCausalLM"}
_SCORERS = {
    1: "GemmaForSequenceClassification",
    2: "Gemma2ForSequenceClassification",
    3: "Gemma3TextForSequenceClassification",
}
_TANH_GELU = ("gelu", "gelu_pytorch_tanh")  # `gelu` in a Gemma config means the tanh approximation too


class HuggingFaceCheckpoint(StoredCheckpoint):
    """An opened directory."""

    def __init__(self, directory: Path, config: Config, file: SafetensorsReader, files: Mapping[str, str]) -> None:
        super().__init__(str(directory), "hf", config, file, files)
        self._directory = directory

    def tokenizer(self) -> Tokenizer | None:
        names = ("tokenizer.model", "tokenizer.json")
        return Tokenizer.from_directory(self._directory) if any((self._directory / n).exists() for n in names) else None


def open_huggingface(directory: Path) -> HuggingFaceCheckpoint:
    """Open a directory. Raises GemmaryError for a config we do not know, and for missing, unknown or misshapen tensors."""
    config = config_from_hf(read_json(directory / "config.json"), str(directory / "config.json"))
    file = SafetensorsReader(directory)
    files = {}
    for name in file.entries:
        if name.startswith(IGNORED["hf"]):
            continue
        # Multimodal directories nest the text model: language_model.model.… before transformers 4.52, then the reverse.
        plain = name.removeprefix("language_model.").replace("model.language_model.", "model.", 1)
        files[plain] = name
    if "lm_head.weight" in files:
        _check_tied(file, files.pop("lm_head.weight"), files.get("model.embed_tokens.weight"), directory)
    return HuggingFaceCheckpoint(directory, config, file, files)


def _check_tied(file: SafetensorsReader, head: str, embed: str | None, directory: Path) -> None:
    """Gemma's output is its embedding: a second copy is read only to see that it is one."""
    if embed is None or not np.array_equal(file.read(head).view(np.uint8), file.read(embed).view(np.uint8)):
        raise GemmaryError(f"{directory}: lm_head.weight differs from the embedding; Gemma's output is tied to it")


def config_from_hf(data: Any, where: str) -> Config:
    """A config.json's values as ours. Raises GemmaryError for another model or for a variant that we would run wrongly."""
    if isinstance(data, dict) and data.get("model_type") == "gemma3":
        data = {**data.get("text_config", {}), "model_type": "gemma3_text"}
    kind = data.get("model_type") if isinstance(data, dict) else None
    if kind not in _TYPES:
        raise GemmaryError(f"{where}: model_type is {kind!r}; gemmary reads {', '.join(_TYPES)} and gemma3's text half")
    if data.get("use_bidirectional_attention"):
        raise GemmaryError(f"{where}: bidirectional attention is another model than Gemma")
    activation = data.get("hidden_activation") or data.get("hidden_act") or "gelu_pytorch_tanh"
    if activation not in _TANH_GELU:
        raise GemmaryError(f"{where}: activation {activation!r} is not Gemma's GELU")
    if data.get("tie_word_embeddings") is False:
        raise GemmaryError(f"{where}: an untied output is not Gemma's")
    try:
        return _config(_TYPES[kind], data)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, GemmaryError):
            raise GemmaryError(f"{where}: {error}") from None
        raise GemmaryError(f"{where}: missing or malformed field {error}") from None


def _config(generation: int, data: Mapping[str, Any]) -> Config:
    layers, head_dim = data["num_hidden_layers"], data["head_dim"]
    scalar = data.get("query_pre_attn_scalar") if generation > 1 else None
    base, local, factor = _rope(generation, data)
    pattern = _pattern(generation, data, layers)
    return Config(
        generation=generation,
        vocab_size=data["vocab_size"],
        num_tokens=known_tokens(data["vocab_size"]),
        embed_dim=data["hidden_size"],
        num_layers=layers,
        num_heads=data["num_attention_heads"],
        num_kv_heads=data["num_key_value_heads"],
        head_dim=head_dim,
        ffw_dim=data["intermediate_size"],
        context=data.get("max_position_embeddings", 8192),
        query_scale=float(scalar or head_dim) ** -0.5,
        window=data.get("sliding_window") if any(pattern) else None,
        window_pattern=pattern,
        rope_base=base,
        rope_base_local=local,
        rope_factor=factor,
        qk_norm=generation == 3,
        post_norms=generation > 1,
        attn_softcap=_cap(data, "attn_logit_softcapping") if generation > 1 else None,
        final_softcap=_cap(data, "final_logit_softcapping") if generation > 1 else None,
        norm_eps=float(data.get("rms_norm_eps", 1e-6)),
        score_head=_SCORERS[generation] in (data.get("architectures") or ()),
    )


def _cap(data: Mapping[str, Any], name: str) -> float | None:
    return float(data[name]) if data.get(name) is not None else None


def _rope(generation: int, data: Mapping[str, Any]) -> tuple[float, float, float]:
    """Base of the layers that see everything, base of the local ones, factor of the former."""
    rope = data.get("rope_parameters") or {}
    if "full_attention" in rope:  # transformers 5 keeps one set for each type of layer
        full, local = rope["full_attention"], rope.get("sliding_attention", {})
        scaling, base, local_base = full, full.get("rope_theta"), local.get("rope_theta")
    else:
        scaling = data.get("rope_scaling") or rope
        base, local_base = rope.get("rope_theta", data.get("rope_theta")), data.get("rope_local_base_freq")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "linear"):
        raise GemmaryError(f"rope scaling {kind!r} is not one of Gemma's (default, linear)")
    base = float(base or (1e6 if generation == 3 else 1e4))
    local_base = float(local_base or 1e4) if generation == 3 else base
    return base, local_base, float(scaling.get("factor") or 1.0) if kind == "linear" else 1.0


def _pattern(generation: int, data: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
    if generation == 1:
        return (False,)
    types = data.get("layer_types")
    if types is None:
        every = data.get("sliding_window_pattern", 2 if generation == 2 else 6)
        return tuple((i + 1) % every != 0 for i in range(every))
    if len(types) != layers or not set(types) <= {"sliding_attention", "full_attention"}:
        raise GemmaryError("layer_types does not name sliding_attention or full_attention for each layer")
    pattern = tuple(kind == "sliding_attention" for kind in types)
    for length in range(1, layers + 1):  # the shortest pattern that repeats to it
        if all(pattern[i] == pattern[i % length] for i in range(layers)):
            return pattern[:length]
    return pattern


def config_to_hf(config: Config, dtype: str) -> dict[str, Any]:
    """Our config as config.json's values, for transformers 4 and 5."""
    kind = next(name for name, generation in _TYPES.items() if generation == config.generation)
    data: dict[str, Any] = {
        "architectures": [(_SCORERS if config.score_head else _ARCHITECTURES)[config.generation]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffw_dim,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "rope_theta": config.rope_base,
        "torch_dtype": dtype,
        "dtype": dtype,
    }
    if config.score_head:  # one label; without it transformers would expect two
        data |= {"num_labels": 1, "id2label": {"0": "score"}, "label2id": {"score": 0}}
    if config.generation > 1:
        kinds = config.layer_kinds()
        data |= {
            "query_pre_attn_scalar": _scalar(config.query_scale),
            "sliding_window": config.window or config.context,  # transformers wants one, also where no layer slides
            "layer_types": ["full_attention" if k.window is None else "sliding_attention" for k in kinds],
            "attn_logit_softcapping": config.attn_softcap,
            "final_logit_softcapping": config.final_softcap,
        }
    if config.generation == 3:
        scaling = {"rope_type": "linear", "factor": config.rope_factor} if config.rope_factor != 1 else None
        data |= {
            "rope_local_base_freq": config.rope_base_local,
            "rope_scaling": scaling,
            "sliding_window_pattern": len(config.window_pattern),
        }
    return data


def _scalar(query_scale: float) -> int | float:
    """The number whose inverse root is the scale: 256, 144, 168. Whole where the scale says so exactly."""
    scalar = query_scale**-2
    return round(scalar) if round(scalar) ** -0.5 == query_scale else scalar


def write_side_files(directory: Path, config: Config, dtype: str, tokenizer: Tokenizer | None) -> None:
    """Everything but the weights."""
    _write_json(directory / "config.json", config_to_hf(config, dtype))
    generation: dict[str, Any] = {"_from_model_config": True, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    if tokenizer is not None:
        generation["eos_token_id"] = list(tokenizer.stop_ids)
        (directory / "tokenizer.model").write_bytes(tokenizer.to_sentencepiece())
        _write_json(directory / "tokenizer.json", tokenizer.to_tokenizer_json(), indent=None)
        _write_json(directory / "tokenizer_config.json", _tokenizer_config(config, tokenizer))
    _write_json(directory / "generation_config.json", generation)


def _tokenizer_config(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    data: dict[str, Any] = {
        "tokenizer_class": "GemmaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.context,
        "spaces_between_special_tokens": False,
    }
    if tokenizer.start_of_turn is not None:
        data["chat_template"] = chat_template(config.generation)
    return data


def _write_json(path: Path, data: Any, indent: int | None = 2) -> None:
    path.write_text(json.dumps(data, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
