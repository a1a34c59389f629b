"""Adapters in PEFT's layout: there and back, by PEFT's own names, and refused where they would be computed wrongly."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import hostile
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_models import CONFIGS

from gemmary.adapters import merge
from gemmary.checkpoints.names import join, layout
from gemmary.checkpoints.peft import Adapter, adapter_base, is_adapter, read_adapter, write_adapter
from gemmary.config import Config
from gemmary.errors import GemmaryError
from gemmary.params import TABLE, shape_of
from gemmary.weights import LoRA

RECORDED: dict[str, Any] = json.loads(
    (Path(__file__).parent / "golden" / "peft_small.json").read_text(encoding="utf-8")
)
RANK, SCALE = 5, 2.0
MUTATIONS = 60
# As in tests/golden/record_peft.py: all sizes and their products differ, so that what is transposed does not fit.
SIZES: dict[str, Any] = {
    "embed_dim": 24, "num_layers": 4, "num_heads": 6, "num_kv_heads": 3, "head_dim": 10, "ffw_dim": 56,
    "vocab_size": 100, "num_tokens": 100,
}  # fmt: skip
SMALL = {name: CONFIGS[name].replace(**SIZES) for name in ("gemma1-mha", "gemma2", "gemma3")}
CONFIG = SMALL["gemma3"]
ROWS = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
Q = "base_model.model.model.layers.2.self_attn.q_proj"
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"


def _stacked(config: Config, rows: tuple[str, ...] = ROWS, rank: int = RANK, scale: float = SCALE) -> dict[str, LoRA]:
    rng, out = np.random.default_rng(0), {}
    for name in rows:
        spec = TABLE[name]
        sizes = dict(zip(spec.axes, shape_of(config, spec), strict=True))
        writes = [axis for axis in spec.axes if axis not in (*spec.reads, "layers")]
        a = rng.normal(size=(config.num_layers, *(sizes[axis] for axis in spec.reads), rank))
        b = rng.normal(size=(config.num_layers, rank, *(sizes[axis] for axis in writes)))
        out[name] = LoRA(np.zeros(shape_of(config, spec)), a.astype(np.float32), b.astype(np.float32), scale)
    return out


def _unstacked(stacked: dict[str, LoRA]) -> dict[str, Any]:
    return {
        name: tuple(LoRA(w.base[i], w.a[i], w.b[i], w.scale) for i in range(len(w.a))) for name, w in stacked.items()
    }


def _write(directory: Path, config: Config, weights: Any) -> Path:
    directory.mkdir()
    write_adapter(directory, config, weights, base="google/gemma-3-1b-it")
    return directory


def _same(adapter: Adapter, stacked: dict[str, LoRA]) -> None:
    assert list(adapter.weights) == list(stacked)
    for name, w in stacked.items():
        assert len(adapter.weights[name]) == len(w.a)
        for i, found in enumerate(adapter.weights[name]):
            assert found.base is None
            assert found.scale == w.scale
            assert found.a.dtype == found.b.dtype == np.float32
            np.testing.assert_array_equal(found.a, w.a[i])
            np.testing.assert_array_equal(found.b, w.b[i])


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """An adapter of the small Gemma 3, with a score."""
    return _write(tmp_path / "adapter", CONFIG, {**_stacked(CONFIG), "score": np.arange(24, dtype=np.float32)})


def _edit(directory: Path, **changes: Any) -> None:
    path = directory / SETTINGS
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _change(directory: Path, change: Any) -> None:
    """The same file with what `change` makes of its tensors."""
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS)


@pytest.mark.parametrize("form", ["stacked", "unstacked", "on the device"])
@pytest.mark.parametrize("name", SMALL)
def test_there_and_back(tmp_path: Path, name: str, form: str) -> None:
    stacked = _stacked(SMALL[name])
    weights = _unstacked(stacked) if form == "unstacked" else stacked
    if form == "on the device":
        weights = jax.tree.map(jnp.asarray, stacked)
    directory = _write(tmp_path / "adapter", SMALL[name], weights)
    assert is_adapter(directory)
    assert not is_adapter(tmp_path)
    assert adapter_base(directory) == "google/gemma-3-1b-it"
    adapter = read_adapter(directory, SMALL[name])
    _same(adapter, stacked)
    assert (adapter.base, adapter.rank, adapter.alpha) == ("google/gemma-3-1b-it", RANK, RANK * SCALE)
    assert adapter.extra == {}


def test_what_is_read_can_be_written(directory: Path, tmp_path: Path) -> None:
    adapter = read_adapter(directory, CONFIG)
    again = _write(tmp_path / "again", CONFIG, {**adapter.weights, **adapter.extra})
    for name in (WEIGHTS, SETTINGS):
        assert (again / name).read_bytes() == (directory / name).read_bytes()


def test_a_score_goes_along(directory: Path) -> None:
    adapter = read_adapter(directory, CONFIG)
    _same(adapter, _stacked(CONFIG))
    np.testing.assert_array_equal(adapter.extra["score"], np.arange(24, dtype=np.float32))
    assert adapter.extra["score"].dtype == np.float32


@pytest.mark.parametrize("rank", [1, 3, 7, 64])
@pytest.mark.parametrize("alpha", [1, 16, 0.1])
def test_a_scale_comes_back_exactly(tmp_path: Path, rank: int, alpha: float) -> None:
    stacked = _stacked(CONFIG, ("mlp.up",), rank, alpha / rank)
    directory = _write(tmp_path / "adapter", CONFIG, stacked)
    assert json.loads((directory / SETTINGS).read_text())["lora_alpha"] == pytest.approx(alpha, rel=1e-15)
    assert read_adapter(directory, CONFIG).weights["mlp.up"][0].scale == pytest.approx(alpha / rank, rel=1e-15)


@pytest.mark.parametrize("kind", ["language", "reward"])
def test_the_files_are_those_that_peft_saves(tmp_path: Path, kind: str) -> None:
    weights: dict[str, Any] = dict(_stacked(CONFIG, ROWS if kind == "language" else ("attn.q", "attn.o")))
    if kind == "reward":
        weights["score"] = np.zeros(24, np.float32)
    directory = _write(tmp_path / "adapter", CONFIG, weights)
    tensors = {name: list(array.shape) for name, array in load_file(directory / WEIGHTS).items()}
    assert tensors == RECORDED[kind]["tensors"]
    ours, theirs = json.loads((directory / SETTINGS).read_text()), dict(RECORDED[kind]["config"])
    # PEFT lists two names that a head may have, and finds one.
    assert ours.pop("modules_to_save") == {"language": None, "reward": ["score"]}[kind]
    assert ours.pop("base_model_name_or_path") == "google/gemma-3-1b-it"
    assert ours == {name: theirs[name] for name in ours}


@pytest.mark.parametrize("kind", ["language", "reward"])
def test_settings_and_names_that_peft_saves_are_read(tmp_path: Path, kind: str) -> None:
    tensors = {name: np.ones(shape, np.float32) for name, shape in RECORDED[kind]["tensors"].items()}
    save_file(tensors, tmp_path / WEIGHTS)
    (tmp_path / SETTINGS).write_text(json.dumps(RECORDED[kind]["config"]))
    adapter = read_adapter(tmp_path, CONFIG)
    assert list(adapter.weights) == (list(ROWS) if kind == "language" else ["attn.q", "attn.o"])
    assert list(adapter.extra) == ([] if kind == "language" else ["score"])
    assert (adapter.base, adapter.rank, adapter.alpha) == ("base", 5, 10)


@pytest.mark.parametrize("name", SMALL)
def test_a_merge_by_hand_in_their_layout_is_ours(tmp_path: Path, name: str) -> None:
    config = SMALL[name]
    directory = _write(tmp_path / "adapter", config, _stacked(config))
    tensors, adapter, rng = load_file(directory / WEIGHTS), read_adapter(directory, config), np.random.default_rng(1)
    for row in layout("hf", config):
        ours = row.members[0]
        if ours not in ROWS:
            continue
        for i, lora in enumerate(adapter.weights[ours]):
            base = rng.normal(size=shape_of(config, TABLE[ours])[1:]).astype(np.float32)
            at = f"base_model.model.{row.at(i).removesuffix('.weight')}"
            a, b = tensors[f"{at}.lora_A.weight"], tensors[f"{at}.lora_B.weight"]
            by_hand = join(row, config, {ours: base}) + SCALE * b @ a
            merged = merge({ours: LoRA(*map(jnp.asarray, (base, lora.a, lora.b)), lora.scale)})[ours]
            np.testing.assert_allclose(join(row, config, {ours: np.asarray(merged)}), by_hand, atol=1e-4, rtol=0)


def test_layers_left_alone_are_zero(directory: Path) -> None:
    def only_one(tensors: dict[str, np.ndarray]) -> None:
        kept = {name: array for name, array in tensors.items() if name.startswith(Q)}
        tensors.clear()
        tensors.update(kept)

    _change(directory, only_one)
    adapter = read_adapter(directory, CONFIG)
    assert list(adapter.weights) == ["attn.q"]
    wanted = _stacked(CONFIG)["attn.q"]
    for i, lora in enumerate(adapter.weights["attn.q"]):
        np.testing.assert_array_equal(lora.a, wanted.a[i] if i == 2 else np.zeros_like(wanted.a[i]))
        np.testing.assert_array_equal(lora.b, wanted.b[i] if i == 2 else np.zeros_like(wanted.b[i]))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_tensors_are_widened(directory: Path, dtype: Any) -> None:
    narrow = {name: array.astype(dtype) for name, array in load_file(directory / WEIGHTS).items()}
    save_file(narrow, directory / WEIGHTS)
    wanted = {
        name: LoRA(w.base, w.a.astype(dtype).astype(np.float32), w.b.astype(dtype).astype(np.float32), w.scale)
        for name, w in _stacked(CONFIG).items()
    }
    _same(read_adapter(directory, CONFIG), wanted)


def test_narrow_leaves_are_written(tmp_path: Path) -> None:
    narrow = {
        name: LoRA(w.base, jnp.asarray(w.a, jnp.bfloat16), jnp.asarray(w.b, jnp.bfloat16), w.scale)
        for name, w in _stacked(CONFIG).items()
    }
    directory = _write(tmp_path / "adapter", CONFIG, narrow)
    wide = {name: LoRA(w.base, *(np.asarray(x, np.float32) for x in (w.a, w.b)), w.scale) for name, w in narrow.items()}
    _same(read_adapter(directory, CONFIG), wide)


@pytest.mark.parametrize("prefix", ["language_model.model.layers", "model.language_model.layers"])
def test_an_adapter_of_a_multimodal_model_is_read_for_its_text(directory: Path, prefix: str) -> None:
    def nest(tensors: dict[str, np.ndarray]) -> None:
        for name in list(tensors):
            tensors[name.replace("base_model.model.model.layers", f"base_model.model.{prefix}")] = tensors.pop(name)
        tensors["base_model.model.model.vision_tower.x.q_proj.lora_A.weight"] = np.zeros((RANK, 3), np.float32)

    _change(directory, nest)
    _same(read_adapter(directory, CONFIG), _stacked(CONFIG))
    _change(directory, lambda tensors: tensors.update({f"{Q}.lora_A.weight": np.zeros((RANK, 24), np.float32)}))
    with pytest.raises(GemmaryError, match=r"holds .*layers\.2\.self_attn\.q_proj\.lora_A\.weight twice"):
        read_adapter(directory, CONFIG)


def test_rank_stabilized_scales(directory: Path) -> None:
    _edit(directory, use_rslora=True)
    adapter = read_adapter(directory, CONFIG)
    scale = adapter.weights["attn.q"][0].scale
    assert scale == pytest.approx(RANK * SCALE / RANK**0.5)
    assert scale == adapter.alpha / adapter.rank


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"use_dora": True}, "sets use_dora, which"),
        ({"rank_pattern": {"q_proj": 8}}, "sets rank_pattern"),
        ({"alpha_pattern": {"q_proj": 8}, "lora_bias": True}, "sets alpha_pattern, lora_bias|sets lora_bias, alpha_pattern"),
        ({"bias": "all"}, "sets bias"),
        ({"bias": ["none"]}, "sets bias"),
        ({"fan_in_fan_out": True}, "sets fan_in_fan_out"),
        ({"layer_replication": [[0, 4]]}, "sets layer_replication"),
        ({"trainable_token_indices": [1, 2]}, "sets trainable_token_indices"),
        ({"of_tomorrow": {"x": 1}}, "sets of_tomorrow"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4' changes the base"),
        ({"init_lora_weights": ["x"]}, "init_lora_weights"),
        ({"r": 0}, "r is 0"),
        ({"r": True}, "r is True"),
        ({"r": "5"}, "r is '5'"),
        ({"r": 10**30}, "r is 1000"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"lora_alpha": -1}, "lora_alpha is -1"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path is 3"),
        ({"r": 4}, r"misshapen tensors: base_model.*lora_A.weight \[5, \d+\] instead of \[4, \d+\].* and 5\d more; is it"),
    ],
)  # fmt: skip
def test_settings_that_we_would_compute_wrongly_are_refused(
    directory: Path, changes: dict[str, Any], message: str
) -> None:
    _edit(directory, **changes)
    with pytest.raises(GemmaryError, match=message) as caught:
        read_adapter(directory, CONFIG)
    assert "\n" not in str(caught.value)


WIDE = np.zeros((RANK, 25), np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{Q}.lora_A.weight": WIDE}, r"misshapen tensors: .*lora_A\.weight \[5, 25\] instead of \[5, 24\]; is it"),
        ({f"{Q}.lora_B.weight": None}, r"unpaired tensors: .*layers\.2\.self_attn\.q_proj\.lora_A\.weight; a LoRA"),
        ({f"{Q}.lora_A.weight": None}, r"unpaired tensors: .*layers\.2\.self_attn\.q_proj\.lora_B\.weight; a LoRA"),
        ({f"{Q}.lora_A.weight": WIDE[:, :24].astype(np.int8)}, r"unreadable tensors: .*lora_A\.weight \(int8\)"),
        ({f"{Q}.lora_magnitude_vector": WIDE}, r"unknown tensors: .*lora_magnitude_vector; gemmary reads"),
        ({f"{Q}.lora_B.bias": WIDE}, r"unknown tensors: .*lora_B\.bias"),
        ({Q.replace("2", "4") + ".lora_A.weight": WIDE}, r"unknown tensors: .*layers\.4"),
        ({Q.removeprefix("base_model.model.") + ".lora_A.weight": WIDE}, r"unknown tensors: model\.layers\.2"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": WIDE}, r"unknown tensors: .*lora_embedding_A"),
        ({"base_model.model.lm_head.weight": WIDE}, r"unknown tensors: .*lm_head"),
        ({"base_model.model.score.weight": WIDE[:2]}, r"score\.weight \[2, 25\] instead of \[1, 24\]"),
        ({f"x.{i}": WIDE for i in range(9)}, r"unknown tensors: x\.0, x\.1, x\.2, x\.3 and 5 more;"),
    ],
)
def test_tensors_that_do_not_fit_are_listed(directory: Path, change: dict[str, Any], message: str) -> None:
    def apply(tensors: dict[str, np.ndarray]) -> None:
        for name, array in change.items():
            tensors.pop(name, None)
            if array is not None:
                tensors[name] = array

    _change(directory, apply)
    with pytest.raises(GemmaryError, match=message) as caught:
        read_adapter(directory, CONFIG)
    assert "\n" not in str(caught.value)


def test_an_adapter_of_another_generation_is_read_where_it_fits_and_else_refused(directory: Path) -> None:
    _same(read_adapter(directory, SMALL["gemma2"]), _stacked(CONFIG))
    with pytest.raises(GemmaryError, match=r"unknown tensors: .*layers\.3"):
        read_adapter(directory, CONFIG.replace(num_layers=3))
    with pytest.raises(GemmaryError, match="misshapen tensors"):
        read_adapter(directory, CONFIG.replace(ffw_dim=57))


def test_directories_that_are_not_whole(directory: Path, tmp_path: Path) -> None:
    whole = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(whole[:-4])
    with pytest.raises(GemmaryError, match="not a whole safetensors file"):
        read_adapter(directory, CONFIG)
    (directory / WEIGHTS).unlink()
    with pytest.raises(GemmaryError, match=r"adapter_model\.safetensors is missing"):
        read_adapter(directory, CONFIG)
    (directory / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(GemmaryError, match=r"adapter_model\.bin is a pickle"):
        read_adapter(directory, CONFIG)
    save_file({"base_model.model.score.weight": np.zeros((1, 24), np.float32)}, directory / WEIGHTS)
    with pytest.raises(GemmaryError, match="holds no LoRA"):
        read_adapter(directory, CONFIG)
    for base in (None, ""):
        _edit(directory, base_model_name_or_path=base)
        with pytest.raises(GemmaryError, match="names no base model"):
            adapter_base(directory)
    for text, message in (("[]", "peft_type is None"), ("{", "cannot be read as JSON")):
        (directory / SETTINGS).write_text(text)
        with pytest.raises(GemmaryError, match=message):
            read_adapter(directory, CONFIG)
    with pytest.raises(GemmaryError, match=r"adapter_config\.json is missing"):
        adapter_base(tmp_path)


@pytest.mark.parametrize("name", [WEIGHTS, SETTINGS])
def test_mutated_files_are_read_or_refused(directory: Path, name: str) -> None:
    good, rng, said = (directory / name).read_bytes(), random.Random(name), []
    for _ in range(MUTATIONS):
        (directory / name).write_bytes(hostile.mutated(good, rng))
        try:
            read_adapter(directory, CONFIG)
        except GemmaryError as error:
            said.append(str(error))
    assert len(said) > MUTATIONS // 4
    assert not any("\n" in line for line in said)


def _bad(kind: str) -> dict[str, Any]:
    stacked = _stacked(CONFIG)
    q, o = stacked["attn.q"], stacked["attn.o"]
    return {
        "the embedding": {"embed": q},
        "a norm": {"final_norm": np.zeros(24)},
        "no LoRA": {"score": np.zeros(24, np.float32)},
        "a whole matrix": {"attn.q": q.a},
        "two ranks": {"attn.q": q, "attn.o": _stacked(CONFIG, ("attn.o",), 3)["attn.o"]},
        "two scales": {"attn.q": q, "attn.o": _stacked(CONFIG, ("attn.o",), RANK, 0.5)["attn.o"]},
        "a layer too few": {"attn.q": _unstacked(stacked)["attn.q"][:3]},
        "another row's leaf": {"attn.q": o},
        "two ranks in one": {"attn.q": LoRA(q.base, q.a, q.b[:, :4], SCALE)},
        "one layer, not stacked": {"attn.q": _unstacked(stacked)["attn.q"][0]},
        "a score of two": {"attn.q": q, "score": np.zeros((2, 24))},
    }[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("the embedding", "embed is Gemma's output too"),
        ("a norm", "cannot hold final_norm"),
        ("no LoRA", "this has no LoRA"),
        ("a whole matrix", "attn.q is not adapted"),
        ("two ranks", "this has rank 3 with scale 2, rank 5 with scale 2"),
        ("two scales", "this has rank 5 with scale 0.5, rank 5 with scale 2"),
        ("a layer too few", "attn.q has 3 layers of LoRA and the config 4"),
        ("another row's leaf", r"attn.q, layer 0: a \[6, 10, 5\] and b \[5, 24\] are not factors"),
        ("two ranks in one", r"a \[24, 5\] and b \[4, 6, 10\] are not factors"),
        ("one layer, not stacked", "attn.q has 5 layers of LoRA"),
        ("a score of two", r"score is \[2, 24\] instead of \[24\]"),
    ],
)
def test_what_an_adapter_cannot_hold_is_refused(tmp_path: Path, kind: str, message: str) -> None:
    with pytest.raises(GemmaryError, match=message):
        _write(tmp_path / "adapter", CONFIG, _bad(kind))
    assert not list((tmp_path / "adapter").iterdir())
