"""Google's own formats: Flax trees as Kaggle has them, and .ckpt files with fp and int8 weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch_files
from small_models import CONFIGS, same_weights, values_of

from gemmary.checkpoints import open_model
from gemmary.checkpoints.checkpoint import config_to_json
from gemmary.checkpoints.orbax_file import OrbaxWriter
from gemmary.config import Config
from gemmary.errors import GemmaryError
from gemmary.presets import PRESETS
from gemmary.text import Tokenizer

Values = dict[tuple[str, int], np.ndarray]


def _flax(config: Config, values: Values, i: int) -> dict[str, dict[str, np.ndarray]]:
    """A layer as google-deepmind/gemma keeps it, written here from that library's einsums."""
    q, k, v, o = (values[f"attn.{part}", i] for part in "qkvo")
    gate, up = values["mlp.gate", i], values["mlp.up", i]  # [D, F]
    heads = lambda w: w.transpose(1, 0, 2)  # noqa: E731  [D, N, H] to [N, D, H]
    if config.num_heads == config.num_kv_heads:
        attention = {"attn/qkv_einsum": {"w": np.stack([heads(q), heads(k), heads(v)])}}
    else:
        attention = {"attn/q_einsum": {"w": heads(q)}, "attn/kv_einsum": {"w": np.stack([heads(k), heads(v)])}}
    gating = np.stack([gate.T, up.T] if config.generation == 3 else [gate, up])
    layer = {
        **attention,
        "attn/attn_vec_einsum": {"w": o},
        "mlp/gating_einsum": {"w": gating},
        "mlp/linear": {"w": values["mlp.down", i]},
        "pre_attention_norm": {"scale": values["pre_attn_norm", i]},
        "pre_ffw_norm": {"scale": values["pre_ffw_norm", i]},
    }
    if config.post_norms:
        layer["post_attention_norm"] = {"scale": values["post_attn_norm", i]}
        layer["post_ffw_norm"] = {"scale": values["post_ffw_norm", i]}
    if config.qk_norm:
        layer["attn/_query_norm"] = {"scale": values["attn.q_norm", i]}
        layer["attn/_key_norm"] = {"scale": values["attn.k_norm", i]}
    return {f"transformer/layer_{i}/{name}": leaf for name, leaf in layer.items()}


def _tree(config: Config, values: Values) -> dict[str, dict[str, np.ndarray]]:
    tree = {
        "transformer/embedder": {"input_embedding": values["embed", 0]},
        "transformer/final_norm": {"scale": values["final_norm", 0]},
    }
    for i in range(config.num_layers):
        tree |= _flax(config, values, i)
    return tree


def _nested(tree: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for path, leaf in tree.items():
        *parts, last = path.removeprefix("transformer/").split("/")
        at = out
        for part in parts:
            at = at.setdefault(part, {})
        at[last] = leaf
    return out


def _write(directory: Path, tree: dict[str, Any], config: Config | None) -> Path:
    writer = OrbaxWriter(directory / "flax")
    writer.write(tree)
    writer.close()
    if config is not None:
        (directory / "flax" / "gemmary.json").write_text(json.dumps({"config": config_to_json(config)}))
    return directory


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["gemma1-mqa", "gemma1-mha", "gemma3"])
def test_a_flax_tree(tmp_path: Path, tiny: Tokenizer, kind: str, nested: bool) -> None:
    config = CONFIGS[kind]
    values = values_of(config)
    tree = _tree(config, values)
    tree["SigLiPFromPatches_0/x"] = {"kernel": np.zeros(3, np.float32)}
    _write(tmp_path, _nested(tree) if nested else tree, config)
    (tmp_path / "tokenizer.model").write_bytes(tiny.to_sentencepiece())
    for path in (tmp_path, tmp_path / "flax"):
        with open_model(path) as checkpoint:
            assert (checkpoint.format, checkpoint.config) == ("kaggle", config)
            same_weights(checkpoint, values)
            assert checkpoint.tokenizer() is not None


def test_the_newest_flax_layout_has_no_w_in_its_feed_forward(tmp_path: Path) -> None:
    config = CONFIGS["gemma3"]
    values = values_of(config)
    tree = _nested(_tree(config, values))
    for i in range(config.num_layers):
        mlp = tree[f"layer_{i}"]["mlp"]
        tree[f"layer_{i}"]["mlp"] = {name: leaf["w"] for name, leaf in mlp.items()}
    with open_model(_write(tmp_path, tree, config) / "flax") as checkpoint:
        same_weights(checkpoint, values)


def test_a_flax_tree_of_no_published_shape(tmp_path: Path) -> None:
    config = CONFIGS["gemma1-mqa"]
    _write(tmp_path, _tree(config, values_of(config)), None)
    with pytest.raises(GemmaryError, match=r"no published Gemma .* put a gemmary\.json"):
        open_model(tmp_path / "flax")


def test_a_damaged_flax_tree(tmp_path: Path) -> None:
    config = CONFIGS["gemma1-mqa"]
    tree = _tree(config, values_of(config))
    del tree["transformer/layer_1/attn/q_einsum"]
    _write(tmp_path, tree, config)
    with pytest.raises(GemmaryError, match="lacks tensors: transformer/layer_1/attn/q_einsum/w"):
        open_model(tmp_path / "flax")
    (tmp_path / "flax" / "_METADATA").write_text("{")
    with pytest.raises(GemmaryError, match="cannot be read as an Orbax checkpoint") as caught:
        open_model(tmp_path / "flax")
    assert "\n" not in str(caught.value)


def _torch(config: Config, values: Values) -> dict[str, np.ndarray]:
    """The state dict of google/gemma_pytorch, written here from that library's shapes."""
    tensors = {"embedder.weight": values["embed", 0], "model.norm.weight": values["final_norm", 0]}
    rows = lambda w: w.transpose(1, 2, 0).reshape(-1, w.shape[0])  # noqa: E731  [D, N, H] to [N H, D]
    for i in range(config.num_layers):
        at = f"model.layers.{i}."
        tensors |= {
            at + "self_attn.qkv_proj.weight": np.concatenate([rows(values[f"attn.{part}", i]) for part in "qkv"]),
            at + "self_attn.o_proj.weight": values["attn.o", i].reshape(-1, config.embed_dim).T,
            at + "mlp.gate_proj.weight": values["mlp.gate", i].T,
            at + "mlp.up_proj.weight": values["mlp.up", i].T,
            at + "mlp.down_proj.weight": values["mlp.down", i].T,
            at + "input_layernorm.weight": values["pre_attn_norm", i],
        }
        if not config.post_norms:
            tensors[at + "post_attention_layernorm.weight"] = values["pre_ffw_norm", i]
            continue
        tensors |= {
            at + "post_attention_layernorm.weight": values["post_attn_norm", i],
            at + "pre_feedforward_layernorm.weight": values["pre_ffw_norm", i],
            at + "post_feedforward_layernorm.weight": values["post_ffw_norm", i],
        }
        if config.qk_norm:
            tensors[at + "self_attn.query_norm.weight"] = values["attn.q_norm", i]
            tensors[at + "self_attn.key_norm.weight"] = values["attn.k_norm", i]
    return tensors


def _ckpt(directory: Path, config: Config, tensors: dict[str, np.ndarray]) -> Path:
    (directory / "gemmary.json").write_text(json.dumps({"config": config_to_json(config)}))
    return torch_files.save(directory / "model.ckpt", tensors)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_ckpt(tmp_path: Path, tiny: Tokenizer, kind: str) -> None:
    config = CONFIGS[kind]
    values = values_of(config)
    tensors = {**_torch(config, values), "freqs_cis": np.zeros((4, 2), np.complex64)}
    path = _ckpt(tmp_path, config, tensors)
    (tmp_path / "tokenizer.model").write_bytes(tiny.to_sentencepiece())
    with open_model(path) as checkpoint:
        assert (checkpoint.format, checkpoint.config) == ("torch", config)
        same_weights(checkpoint, values)
        assert checkpoint.tokenizer() is not None


def test_an_int8_ckpt_is_multiplied_by_its_scales(tmp_path: Path) -> None:
    config = CONFIGS["gemma1-mha"]
    values = values_of(config, np.float32)
    tensors: dict[str, np.ndarray] = {}
    for name, w in _torch(config, values).items():
        if w.ndim == 1:
            tensors[name] = w
            continue
        scale = (np.abs(w).max(axis=1) / 127).astype(np.float32)
        tensors[name], tensors[name + "_scaler"] = np.round(w / scale[:, None]).astype(np.int8), scale
    with open_model(_ckpt(tmp_path, config, tensors)) as checkpoint:
        assert checkpoint.dtype("attn.q") == "int8"
        for (name, layer), w in values.items():
            found = checkpoint.weight(name, layer)
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, w, atol=np.abs(w).max() / 200 if w.ndim > 1 else 0)
    del tensors["model.layers.0.mlp.up_proj.weight_scaler"]
    with pytest.raises(GemmaryError, match=r"up_proj\.weight is int8 and has no scale"):
        open_model(_ckpt(tmp_path, config, tensors))


def test_a_published_shape_needs_no_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIGS["gemma1-mqa"].replace(vocab_size=1000)
    monkeypatch.setitem(PRESETS, "gemma-2b", dataclasses.replace(PRESETS["gemma-2b"], config=config))
    for rows in (1000, 1064):  # 256000 and 256128 in the published ones
        values = values_of(config.replace(vocab_size=rows), ml_dtypes.bfloat16)
        path = torch_files.save(tmp_path / f"{rows}.ckpt", _torch(config, values))
        with open_model(path) as checkpoint:
            assert checkpoint.config == config.replace(vocab_size=rows)
            same_weights(checkpoint, values)
