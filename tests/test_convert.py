"""There and back in every format, bit for bit; what conversions refuse, and that they leave nothing half-written."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import run
from small_models import CONFIGS, same_weights, values_of, write_native

from gemmary.adapters import adapt, merge
from gemmary.checkpoints import convert, open_model, quantize_model
from gemmary.errors import GemmaryError
from gemmary.params import TABLE, Params
from gemmary.quantization import quantize_weight
from gemmary.text import Tokenizer
from gemmary.weights import Int4, Int8, LoRA, dequantize

Made = dict[str, tuple[Path, dict[tuple[str, int], np.ndarray]]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny: Tokenizer) -> Iterator[Made]:
    """A native bf16 checkpoint of each small model, and its weights."""
    root = tmp_path_factory.mktemp("native")
    models = {}
    for kind, config in CONFIGS.items():
        values = values_of(config)
        models[kind] = write_native(root / kind, config, tiny, values), values
    yield models
    shutil.rmtree(root)


def _convert(source: Path, destination: Path, to: str, **options: Any) -> Path:
    with open_model(source) as checkpoint:
        convert(checkpoint, destination, to, **options)
    return destination


def _params(path: Path) -> Params:
    with open_model(path) as checkpoint:
        return checkpoint.params(jnp.float32)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("to", ["hf", "gguf", "kaggle", "native"])
def test_there_and_back_is_bit_identical(made: Made, tmp_path: Path, kind: str, to: str) -> None:
    path, values = made[kind]
    config = CONFIGS[kind]
    if to == "hf":  # config.json has no word for rows without a token; the published sizes are known by heart
        config = config.replace(num_tokens=config.vocab_size)
    there = _convert(path, tmp_path / ("there.gguf" if to == "gguf" else "there"), to)
    with open_model(there) as checkpoint:
        assert checkpoint.format == to
        assert checkpoint.config == config
        same_weights(checkpoint, values)
        tokenizer = checkpoint.tokenizer()
    assert tokenizer is not None
    assert tokenizer.encode("def f(x):\n    return x  # <b>9</b>") == _tokenizer(path).encode(
        "def f(x):\n    return x  # <b>9</b>"
    )
    back = _convert(there, tmp_path / "back", "native")
    with open_model(back) as checkpoint:
        assert checkpoint.config == config
        same_weights(checkpoint, values)


def _tokenizer(path: Path) -> Tokenizer:
    with open_model(path) as checkpoint:
        tokenizer = checkpoint.tokenizer()
    assert tokenizer is not None
    return tokenizer


def test_a_round_through_all_formats(made: Made, tmp_path: Path) -> None:
    path, values = made["gemma2"]
    for i, to in enumerate(["hf", "gguf", "kaggle", "gguf", "hf", "native"]):
        path = _convert(path, tmp_path / f"{i}{'.gguf' if to == 'gguf' else ''}", to)
    with open_model(path) as checkpoint:
        same_weights(checkpoint, values)


def test_float32_stays_float32(tmp_path: Path, tiny: Tokenizer) -> None:
    config = CONFIGS["gemma3"]
    values = values_of(config, np.float32)
    path = write_native(tmp_path / "native", config, tiny, values)
    for to in ("hf", "gguf", "kaggle"):
        with open_model(_convert(path, tmp_path / f"{to}.gguf" if to == "gguf" else tmp_path / to, to)) as checkpoint:
            same_weights(checkpoint, values)


def test_another_dtype_only_where_asked(made: Made, tmp_path: Path) -> None:
    path, values = made["gemma1-mqa"]
    wide = _convert(path, tmp_path / "wide", "hf", dtype="float32")
    with open_model(wide) as checkpoint:
        same_weights(checkpoint, {at: value.astype(np.float32) for at, value in values.items()})
    narrow = _convert(wide, tmp_path / "narrow", "native", dtype="bfloat16")
    with open_model(narrow) as checkpoint:
        same_weights(checkpoint, values)


def test_q4_0_keeps_the_embedding_at_eight_bits(made: Made, tmp_path: Path) -> None:
    path, _ = made["gemma3"]
    with open_model(_convert(path, tmp_path / "q4.gguf", "gguf", gguf_type="Q4_0")) as checkpoint:
        assert checkpoint.dtype("mlp.down") == "Q4_0"
        assert checkpoint.dtype("embed") == "Q8_0"  # it is also the output
        whole, run = checkpoint.params(jnp.float32), checkpoint.params(jnp.float32, to_run=True)
    for name in ("embed", "attn.q", "attn.o", "mlp.down"):  # what is run is what is stored
        for stored, packed in zip(_each(whole[name]), _each(run[name]), strict=True):
            np.testing.assert_allclose(dequantize(packed), stored, rtol=1e-6, atol=1e-7)


def _each(weight: Any) -> tuple[Any, ...]:
    return weight if isinstance(weight, tuple) else (weight,)


def test_q8_0_is_close_and_says_so(made: Made, tmp_path: Path) -> None:
    path, values = made["gemma3"]
    with open_model(_convert(path, tmp_path / "q.gguf", "gguf", gguf_type="Q8_0")) as checkpoint:
        assert checkpoint.dtype("attn.q") == "Q8_0"
        for (name, layer), value in values.items():
            found, wide = checkpoint.weight(name, layer).astype(np.float32), value.astype(np.float32)
            # Half a step of a 127th of the largest, rounded by an fp16 scale; norms are fp32 and exact.
            assert np.abs(found - wide).max() <= (np.abs(wide).max() / 250 if TABLE[name].reads else 0)


@pytest.mark.parametrize("to", ["hf", "gguf", "kaggle"])
def test_quantized_and_adapted_weights_are_merged_on_the_way_out(tmp_path: Path, tiny: Tokenizer, to: str) -> None:
    config = CONFIGS["gemma3"]
    values: dict[Any, Any] = values_of(config, np.float32)
    values["attn.q", 1] = jax.tree.map(np.asarray, quantize_weight("attn.q", jnp.asarray(values["attn.q", 1]), 8))
    values["mlp.up", 0] = jax.tree.map(np.asarray, quantize_weight("mlp.up", jnp.asarray(values["mlp.up", 0]), 4))
    w = jnp.asarray(values["mlp.down", 2])
    adapter = adapt({"mlp.down": w}, jax.random.key(0), 4, targets=["mlp.down"])["mlp.down"]
    adapter = LoRA(adapter.base, adapter.a, adapter.b + 0.5, 0.25)
    values["mlp.down", 2] = adapter
    path = write_native(tmp_path / "native", config, tiny, values)
    with open_model(path) as checkpoint:
        assert isinstance(checkpoint.weight("attn.q", 1), Int8)
        assert isinstance(checkpoint.weight("mlp.up", 0), Int4)
        assert isinstance(checkpoint.weight("mlp.down", 2), LoRA)
        assert checkpoint.weight("mlp.down", 2).scale == 0.25
        kept = checkpoint.params(jnp.float32)
    with open_model(_convert(path, tmp_path / ("o.gguf" if to == "gguf" else "o"), to)) as checkpoint:
        np.testing.assert_array_equal(checkpoint.weight("attn.q", 1), dequantize(values["attn.q", 1]))
        np.testing.assert_array_equal(checkpoint.weight("mlp.up", 0), dequantize(values["mlp.up", 0]))
        merged = merge({"mlp.down": adapter})["mlp.down"]
        np.testing.assert_allclose(checkpoint.weight("mlp.down", 2), merged, atol=1e-6)
        plain = checkpoint.params(jnp.float32)
    ids = jnp.arange(12)[None]
    np.testing.assert_allclose(run(kept, config, ids), run(plain, config, ids), atol=1e-4)


@pytest.mark.parametrize(("bits", "distance"), [(8, 0.02), (4, 0.3)])
def test_quantizing_a_checkpoint(made: Made, tmp_path: Path, bits: int, distance: float) -> None:
    path, _ = made["gemma1-mha"]
    with open_model(path) as checkpoint:
        quantize_model(checkpoint, tmp_path / "q", bits)
    with open_model(tmp_path / "q") as checkpoint:
        assert isinstance(checkpoint.weight("embed"), Int8)
        assert isinstance(checkpoint.weight("mlp.gate", 2), Int8 if bits == 8 else Int4)
        assert checkpoint.dtype("mlp.gate") == ("int8" if bits == 8 else "int4, groups of 32")
    ids = jnp.arange(16)[None]
    full, quantized = (jax.nn.softmax(run(_params(p), CONFIGS["gemma1-mha"], ids)) for p in (path, tmp_path / "q"))
    assert float(jnp.abs(full - quantized).sum(axis=-1).mean()) < distance


def test_progress_counts_every_parameter_once(made: Made, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    _convert(made["gemma3"][0], tmp_path / "o", "hf", on_progress=lambda *at: seen.append(at))
    assert seen[-1][0] == seen[-1][1] == sum(value.size for value in made["gemma3"][1].values())
    assert seen == sorted(seen)


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        ("onnx", {}, "there is no format 'onnx': choose among native, hf, gguf, kaggle"),
        ("hf", {"dtype": "float16"}, "no dtype 'float16'"),
        ("gguf", {"gguf_type": "Q2_K"}, "no GGUF type 'Q2_K'"),
        ("hf", {"gguf_type": "F32"}, "is for --to gguf"),
    ],
)
def test_unknown_choices(made: Made, tmp_path: Path, to: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(GemmaryError, match=message):
        _convert(made["gemma3"][0], tmp_path / "o", to, **options)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_destination_is_kept(made: Made, tmp_path: Path) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "precious").write_text("1")
    with pytest.raises(GemmaryError, match="exists already"):
        _convert(made["gemma3"][0], tmp_path / "o", "hf")
    assert [p.name for p in tmp_path.rglob("*")] == ["o", "precious"]


@pytest.mark.parametrize("to", ["hf", "gguf", "native", "kaggle"])
def test_a_conversion_that_dies_leaves_nothing(made: Made, tmp_path: Path, to: str) -> None:
    calls = iter(range(10**6))

    def dies(done: int, total: int) -> None:
        if next(calls) == 9:
            raise OSError(28, "No space left on device")

    with pytest.raises(GemmaryError, match="No space left on device; nothing was left behind"):
        _convert(made["gemma3"][0], tmp_path / "o", to, on_progress=dies)
    assert list(tmp_path.iterdir()) == []


def test_too_little_disk_is_said_before_writing(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(GemmaryError, match=r"0\.0 GB free"):
        _convert(made["gemma3"][0], tmp_path / "o", "hf")
    assert list(tmp_path.iterdir()) == []


def test_int4_that_does_not_fit_is_refused(tmp_path: Path, tiny: Tokenizer) -> None:
    config = CONFIGS["gemma1-mqa"].replace(ffw_dim=80)
    path = write_native(tmp_path / "m", config, tiny, values_of(config))
    with open_model(path) as checkpoint, pytest.raises(GemmaryError, match="use 8 bits"):
        quantize_model(checkpoint, tmp_path / "q", 4)
    with open_model(path) as checkpoint, pytest.raises(GemmaryError, match="8 or 4 bits, not 3"):
        quantize_model(checkpoint, tmp_path / "q", 3)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_gemma_1_with_a_window_has_no_gguf(tmp_path: Path, tiny: Tokenizer) -> None:
    config = CONFIGS["gemma1-mqa"].replace(window=16, window_pattern=(True, False))
    path = write_native(tmp_path / "m", config, tiny, values_of(config))
    with pytest.raises(GemmaryError, match="cannot be written"):
        _convert(path, tmp_path / "o.gguf", "gguf")
