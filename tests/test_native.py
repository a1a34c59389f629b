"""Our own format: what its manifest catches, and what it keeps."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest
from small_models import CONFIGS, same_weights, values_of, write_native

from gemmary.checkpoints import open_model
from gemmary.checkpoints.native import open_native
from gemmary.errors import GemmaryError
from gemmary.text import Tokenizer

CONFIG = CONFIGS["gemma3"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny: Tokenizer) -> Path:
    return write_native(tmp_path_factory.mktemp("native") / "m", CONFIG, tiny, values_of(CONFIG))


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "m")
    return tmp_path / "m"


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file() and path.name != "manifest.json")


def test_every_flipped_byte_is_caught(copy: Path) -> None:
    rng = random.Random(0)
    for path in _files(copy):
        data = path.read_bytes()
        if not data:
            continue
        at = rng.randrange(len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])
        with pytest.raises(GemmaryError, match="damaged") as caught:
            open_model(copy)
        assert path.name in str(caught.value)
        assert "\n" not in str(caught.value)
        path.write_bytes(data)
    open_model(copy).close()


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no manifest": (lambda m: (m / "manifest.json").unlink(), "never finished"),
    "no tokenizer": (lambda m: (m / "tokenizer.model").unlink(), r"tokenizer\.model is missing from"),
    "a file more": (lambda m: (m / "params" / "extra").write_text("x"), "extra was added"),
    "cut short": (lambda m: os.truncate(m / "tokenizer.model", 10), r"tokenizer\.model differs"),
    "manifest of another kind": (lambda m: (m / "manifest.json").write_text('{"files": [1]}'), "not a manifest"),
    "manifest that is no JSON": (lambda m: (m / "manifest.json").write_text("{"), "cannot be read as JSON"),
    "no weights": (lambda m: shutil.rmtree(m / "params"), "is missing from"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(copy: Path, kind: str) -> None:
    damage, message = DAMAGE[kind]
    damage(copy)
    with pytest.raises(GemmaryError, match=message) as caught:
        open_model(copy)
    assert "\n" not in str(caught.value)


def test_a_config_of_another_model(copy: Path) -> None:
    path = copy / "gemmary.json"
    model = json.loads(path.read_text())

    def attempt(changed: Any, message: str) -> None:
        path.write_text(json.dumps(changed))
        with pytest.raises(GemmaryError, match=message):
            open_native(copy, verify=False)

    config = model["config"]
    attempt({**model, "config": {**config, "ffw_dim": 97}}, r"mlp\.(gate|up|down)\.\d\d is \[")
    attempt({**model, "config": {**config, "num_layers": 5}}, "not those of its config")
    attempt({**model, "config": {**config, "qk_norm": False}}, "not those of its config")
    attempt({**model, "config": {**config, "new_field": 1}}, "newer gemmary")
    attempt({**model, "config": {"generation": 3}}, "incomplete")
    attempt({**model, "config": {**config, "head_dim": "x"}}, "head_dim is 'x'")
    attempt({**model, "format": 2}, "update gemmary")
    attempt([1], "update gemmary")


def test_weights_are_an_orbax_tree_that_orbax_reads(whole: Path) -> None:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.restore(whole / "params")
    values = values_of(CONFIG)
    assert len(tree) == len(values)
    np.testing.assert_array_equal(np.asarray(tree["attn.q.01"]), values["attn.q", 1])
    np.testing.assert_array_equal(np.asarray(tree["embed"]), values["embed", 0])


def test_a_copy_elsewhere_opens(copy: Path) -> None:
    with open_model(str(copy)) as checkpoint:
        assert checkpoint.config == CONFIG
        same_weights(checkpoint, values_of(CONFIG))
