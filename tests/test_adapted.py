"""Adapters in a directory, opened as the model that they make of their base: read, run, converted, and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from models import run
from small_models import CONFIGS, same_weights, values_of, write_native

import gemmary
from gemmary.adapters import merge
from gemmary.checkpoints import convert, open_model
from gemmary.checkpoints.peft import write_adapter
from gemmary.errors import GemmaryError
from gemmary.params import TABLE, shape_of
from gemmary.text import Tokenizer
from gemmary.weights import LoRA

CONFIG = CONFIGS["gemma3"].replace(num_layers=2, window_pattern=(True, False), embed_dim=32, ffw_dim=48, head_dim=16)
ROWS = ("attn.q", "attn.o", "mlp.down")
SCALE = 1.5
PROMPT = "def f(x):\n    return"


def drawn(seed: int = 0) -> dict[str, Any]:
    """Adapters of rank 3 on some rows, no longer zero."""
    rng, found = np.random.default_rng(seed), {}
    for name in ROWS:
        spec = TABLE[name]
        sizes = dict(zip(spec.axes, shape_of(CONFIG, spec), strict=True))
        writes = [axis for axis in spec.axes if axis not in (*spec.reads, "layers")]
        a = rng.normal(size=(2, *(sizes[axis] for axis in spec.reads), 3)).astype(np.float32)
        b = 0.3 * rng.normal(size=(2, 3, *(sizes[axis] for axis in writes))).astype(np.float32)
        found[name] = tuple(LoRA(None, a[i], b[i], SCALE) for i in range(2))
    return found


def written(directory: Path, base: str, weights: dict[str, Any] | None = None) -> Path:
    directory.mkdir(parents=True)
    write_adapter(directory, CONFIG, weights or drawn(), base=base)
    return directory


def whole(values: dict[Any, np.ndarray]) -> dict[Any, np.ndarray]:
    """Base plus update, plainly, in float32."""
    found = dict(values)
    for name, loras in drawn().items():
        for i, w in enumerate(loras):
            update = np.tensordot(np.asarray(w.a), np.asarray(w.b), 1)
            found[name, i] = values[name, i].astype(np.float32) + np.float32(SCALE) * update
    return found


@pytest.fixture(scope="module")
def values() -> dict[tuple[str, int], np.ndarray]:
    return values_of(CONFIG, np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny: Tokenizer, values: dict[Any, np.ndarray]) -> Path:
    """`base`, and `adapter` over it by its whole path."""
    root = tmp_path_factory.mktemp("adapted")
    write_native(root / "base", CONFIG, tiny, values)
    written(root / "adapter", str(root / "base"))
    return root


# --- Opened -----------------------------------------------------------------------------------------------------------


def test_it_opens_as_a_model(folder: Path, tiny: Tokenizer) -> None:
    with open_model(folder / "adapter") as checkpoint:
        assert checkpoint.format == "peft"
        assert checkpoint.where == str(folder / "adapter")
        assert checkpoint.config == CONFIG
        tokenizer = checkpoint.tokenizer()
        assert tokenizer is not None
        assert tokenizer.pieces == tiny.pieces


def test_adapted_rows_are_lora_over_the_bases_weights(folder: Path, values: dict[Any, np.ndarray]) -> None:
    with open_model(folder / "adapter") as checkpoint:
        for (name, layer), value in values.items():
            found = checkpoint.weight(name, layer)
            assert isinstance(found, LoRA) == (name in ROWS)
            if isinstance(found, LoRA):
                one = drawn()[name][layer]
                np.testing.assert_array_equal(found.a, one.a)
                np.testing.assert_array_equal(found.b, one.b)
                assert found.scale == SCALE
                found = found.base
            np.testing.assert_array_equal(found, value)


def test_what_is_stored_is_said(folder: Path) -> None:
    with open_model(folder / "base") as base, open_model(folder / "adapter") as checkpoint:
        assert checkpoint.dtype("attn.q") == "LoRA over float32"
        assert checkpoint.dtype("attn.k") == base.dtype("attn.k") == "float32"
        beside = sum(w.a.nbytes + w.b.nbytes for w in drawn()["attn.q"])
        assert checkpoint.stored_bytes("attn.q") == base.stored_bytes("attn.q") + beside
        assert checkpoint.stored_bytes("embed") == base.stored_bytes("embed")


def test_a_relative_base_is_of_the_working_directory_or_of_the_adapters(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder / "base", tmp_path / "models" / "base")
    beside = written(tmp_path / "models" / "beside", "../base")
    inside = written(tmp_path / "models" / "here", "models/base")
    monkeypatch.chdir(tmp_path)
    for path in (inside, beside, Path("models/here"), Path("models/beside")):
        with open_model(path) as checkpoint:
            assert isinstance(checkpoint.weight("attn.q"), LoRA)
    monkeypatch.chdir(folder)
    with open_model(beside):  # from anywhere
        pass
    with pytest.raises(GemmaryError, match="adapts the model models/base, which cannot be opened"):
        open_model(inside)


def test_a_base_of_another_format_serves_too(folder: Path, tmp_path: Path, values: dict[Any, np.ndarray]) -> None:
    with open_model(folder / "base") as checkpoint:
        convert(checkpoint, tmp_path / "base.gguf", "gguf")
    with open_model(written(tmp_path / "adapter", str(tmp_path / "base.gguf"))) as checkpoint:
        found = checkpoint.weight("mlp.down", 1)
        assert isinstance(found, LoRA)
        np.testing.assert_array_equal(found.base, values["mlp.down", 1])


def test_a_bases_own_dtype_gives_way_to_the_one_asked_for(tmp_path: Path, tiny: Tokenizer) -> None:
    """Beneath adapters as anywhere: what is merged in float32 is not rounded to what lay on disk."""
    narrow = values_of(CONFIG, ml_dtypes.bfloat16)
    write_native(tmp_path / "base", CONFIG, tiny, narrow)
    with open_model(written(tmp_path / "adapter", str(tmp_path / "base"))) as checkpoint:
        params = checkpoint.params(jnp.float32)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
        merged = merge(params)
        convert(checkpoint, tmp_path / "merged", "native", dtype="float32")
    wanted = whole(narrow)
    with open_model(tmp_path / "merged") as checkpoint:
        for name in ROWS:
            for i in range(2):
                np.testing.assert_allclose(merged[name][i], wanted[name, i], atol=1e-5)
                np.testing.assert_allclose(checkpoint.weight(name, i), wanted[name, i], atol=1e-5)


# --- Run and converted ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def merged(folder: Path) -> Path:
    """As `gemmary convert --dtype float32` makes one model of both."""
    with open_model(folder / "adapter") as checkpoint:
        convert(checkpoint, folder / "merged", "native", dtype="float32")
    return folder / "merged"


def test_it_says_what_its_merged_conversion_says(folder: Path, merged: Path) -> None:
    adapted, one, base = (gemmary.load(path) for path in (folder / "adapter", merged, folder / "base"))
    answers = [model.generate(PROMPT, max_new_tokens=12) for model in (adapted, one, base)]
    assert answers[0].token_ids == answers[1].token_ids != answers[2].token_ids
    np.testing.assert_allclose(answers[0].logprobs, answers[1].logprobs, atol=1e-4)


def test_its_logits_are_those_of_its_merged_conversion(folder: Path, merged: Path) -> None:
    ids, found = jnp.arange(20)[None], []
    for path in (folder / "adapter", merged):
        with open_model(path) as checkpoint:
            found.append(run(checkpoint.params(jnp.float32), CONFIG, ids))
    np.testing.assert_allclose(found[0], found[1], atol=2e-4)


@pytest.mark.parametrize("to", ["native", "hf", "gguf", "kaggle"])
def test_a_conversion_is_base_and_update(folder: Path, tmp_path: Path, values: dict[Any, np.ndarray], to: str) -> None:
    with open_model(folder / "adapter") as checkpoint:
        convert(checkpoint, tmp_path / ("m.gguf" if to == "gguf" else "m"), to, dtype="float32")
    wanted = whole(values)
    with open_model(next(tmp_path.iterdir())) as checkpoint:
        assert checkpoint.format == to
        same_weights(checkpoint, {at: value for at, value in values.items() if at[0] not in ROWS})
        for name in ROWS:
            for i in range(2):
                np.testing.assert_allclose(checkpoint.weight(name, i), wanted[name, i], atol=1e-5)


def test_without_a_dtype_a_native_copy_stays_adapted(folder: Path, tmp_path: Path) -> None:
    with open_model(folder / "adapter") as checkpoint:
        convert(checkpoint, tmp_path / "copy", "native")
    with open_model(tmp_path / "copy") as copy, open_model(folder / "adapter") as checkpoint:
        for name in ("attn.q", "embed"):
            a, b = copy.weight(name), checkpoint.weight(name)
            assert jax.tree.structure(a) == jax.tree.structure(b)
            assert jax.tree.all(jax.tree.map(np.array_equal, a, b))


# --- A reward model's ------------------------------------------------------------------------------------------------


def test_a_reward_models_adapters_carry_its_score(folder: Path, tmp_path: Path) -> None:
    score = np.arange(32, dtype=np.float32)
    path = written(tmp_path / "adapter", str(folder / "base"), {**drawn(), "score": score})
    with open_model(path) as checkpoint:
        assert checkpoint.config == CONFIG.replace(score_head=True)
        np.testing.assert_array_equal(checkpoint.weight("score"), score)
        assert checkpoint.dtype("score") == "float32"
        assert checkpoint.stored_bytes("score") == 128
        np.testing.assert_array_equal(checkpoint.params(jnp.float32)["score"], score)
        convert(checkpoint, tmp_path / "hf", "hf", dtype="float32")
        with pytest.raises(GemmaryError, match="gguf has no place for a reward model's score"):
            convert(checkpoint, tmp_path / "m.gguf", "gguf")
    with open_model(tmp_path / "hf") as checkpoint:
        np.testing.assert_array_equal(checkpoint.weight("score"), score)


def test_a_score_of_the_adapters_takes_the_place_of_the_bases(folder: Path, tmp_path: Path, tiny: Tokenizer) -> None:
    scorer = CONFIG.replace(score_head=True)
    write_native(tmp_path / "base", scorer, tiny, values_of(scorer, np.float32))
    own = written(tmp_path / "own", str(tmp_path / "base"), {**drawn(), "score": np.full(32, 7.0)})
    none = written(tmp_path / "none", str(tmp_path / "base"))
    with open_model(own) as a, open_model(none) as b, open_model(tmp_path / "base") as base:
        np.testing.assert_array_equal(a.weight("score"), np.full(32, 7.0))
        np.testing.assert_array_equal(b.weight("score"), base.weight("score"))
        assert a.config == b.config == scorer


# --- Refused ----------------------------------------------------------------------------------------------------------


def test_a_base_that_is_missing_is_named(folder: Path, tmp_path: Path) -> None:
    gone = written(tmp_path / "gone", str(tmp_path / "never"))
    with pytest.raises(GemmaryError, match=r"gone adapts the model .*never, which cannot be opened: there is no model"):
        open_model(gone)
    hub = written(tmp_path / "hub", "google/gemma-3-1b-it")
    with pytest.raises(GemmaryError, match=r"adapts the model google/gemma-3-1b-it, .* allow fetching it with --hub"):
        open_model(hub)
    none = written(tmp_path / "none", str(folder / "base"))
    settings = json.loads((none / "adapter_config.json").read_text())
    (none / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": None}))
    with pytest.raises(GemmaryError, match="names no base model"):
        open_model(none)


def test_adapters_over_adapters_are_refused(folder: Path, tmp_path: Path) -> None:
    over = written(tmp_path / "over", str(folder / "adapter"))
    with pytest.raises(GemmaryError, match=r"which is adapters itself: merge that first"):
        open_model(over)
    own = written(tmp_path / "own", str(tmp_path / "own"))
    with pytest.raises(GemmaryError, match="which is adapters itself"):
        open_model(own)
    with open_model(folder / "adapter") as checkpoint:
        convert(checkpoint, tmp_path / "copy", "native")  # adapted inside
    with (
        open_model(written(tmp_path / "twice", str(tmp_path / "copy"))) as checkpoint,
        pytest.raises(GemmaryError, match="is adapted already: merge it first"),
    ):
        checkpoint.params(jnp.float32)


def test_adapters_of_another_model_are_refused_and_its_base_is_closed(
    tmp_path: Path, tiny: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = CONFIG.replace(num_heads=2)
    write_native(tmp_path / "base", other, tiny, values_of(other))
    path = written(tmp_path / "adapter", str(tmp_path / "base"))
    closed = []
    monkeypatch.setattr("gemmary.checkpoints.native.NativeCheckpoint.close", lambda self: closed.append(self.where))
    with pytest.raises(GemmaryError, match="misshapen tensors"):
        open_model(path)
    assert closed == [str(tmp_path / "base")]
