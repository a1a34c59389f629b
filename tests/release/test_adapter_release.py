"""PEFT, live: it computes with the adapters that we write what we do, and we with those that it saves.

pytest tests/release/test_adapter_release.py --peers PEERS/bin/python
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import CONFIGS, values_of, write_native

from gemmary.adapters import PROJECTIONS, adapt
from gemmary.checkpoints import convert, open_model
from gemmary.checkpoints.peft import Adapter, read_adapter, write_adapter
from gemmary.config import Config
from gemmary.model.transformer import forward, hidden
from gemmary.params import Params
from gemmary.weights import LoRA

pytestmark = pytest.mark.release

IDS = [2, *np.random.default_rng(3).integers(4, 900, 40).tolist()]
TOKENS = jnp.asarray([IDS])


class Model(NamedTuple):
    config: Config
    params: Params
    huggingface: Path


@pytest.fixture(scope="module", params=["gemma1-mqa", "gemma2", "gemma3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A small random model and its export."""
    config, root = CONFIGS[request.param], tmp_path_factory.mktemp(request.param)
    with open_model(write_native(root / "native", config, None, values_of(config, np.float32))) as checkpoint:
        convert(checkpoint, root / "hf", "hf")
        return Model(config, checkpoint.params(jnp.float32), root / "hf")


def _ask(python: str, directory: Path, model: Model, adapter: Path, **task: Any) -> np.ndarray:
    (directory / "task.json").write_text(
        json.dumps({"model": str(model.huggingface), "adapter": str(adapter), "ids": IDS, **task})
    )
    script = Path(__file__).with_name("ask_peft.py")
    subprocess.run([python, str(script), "task.json", "out.npy"], cwd=directory, check=True)
    return np.asarray(np.load(directory / "out.npy"))


def _adapted(model: Model, adapter: Adapter) -> Params:
    changed = {
        name: tuple(dataclasses.replace(lora, base=base) for lora, base in zip(loras, model.params[name], strict=True))
        for name, loras in adapter.weights.items()
    }
    return {**model.params, **changed}


def _random(model: Model) -> dict[str, Any]:
    """Random adapters of every projection."""
    rng = np.random.default_rng(5)

    def filled(w: LoRA) -> LoRA:
        return dataclasses.replace(w, b=jnp.asarray(0.1 * rng.normal(size=w.b.shape), jnp.float32))

    params = adapt(model.params, jax.random.key(1), 5, alpha=12)
    return {name: tuple(filled(w) for w in params[name]) for name in PROJECTIONS}


def _agree(ours: Any, theirs: np.ndarray, without: Any) -> None:
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
    assert np.abs(np.asarray(without) - theirs).max() > 0.05  # the adapter has its say


def test_peft_computes_the_same_with_what_we_write(peers: str, model: Model, tmp_path: Path) -> None:
    weights, adapter = _random(model), tmp_path / "adapter"
    adapter.mkdir()
    write_adapter(adapter, model.config, weights, base=str(model.huggingface))
    theirs = _ask(peers, tmp_path, model, adapter)
    ours = forward({**model.params, **weights}, model.config, TOKENS)[0]
    _agree(ours, theirs, forward(model.params, model.config, TOKENS)[0])


@pytest.mark.parametrize("rslora", [False, True])
def test_we_compute_the_same_with_what_peft_saves(peers: str, model: Model, tmp_path: Path, rslora: bool) -> None:
    settings = {
        "task_type": "CAUSAL_LM",
        "r": 3,
        "lora_alpha": 7,
        "target_modules": ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"],
        "layers_to_transform": [0, 2],
        "use_rslora": rslora,
    }
    theirs = _ask(peers, tmp_path, model, tmp_path / "adapter", settings=settings)
    adapter = read_adapter(tmp_path / "adapter", model.config)
    assert (adapter.base, adapter.rank) == (str(model.huggingface), 3)
    ours = forward(_adapted(model, adapter), model.config, TOKENS)[0]
    _agree(ours, theirs, forward(model.params, model.config, TOKENS)[0])


@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_a_reward_model_scores_the_same(peers: str, model: Model, tmp_path: Path, whose: str) -> None:
    directory, settings = tmp_path / "adapter", {}
    if whose == "ours":
        directory.mkdir()
        score = np.random.default_rng(8).normal(size=model.config.embed_dim).astype(np.float32)
        write_adapter(directory, model.config, {**_random(model), "score": score}, base=str(model.huggingface))
    else:
        settings = {"settings": {"task_type": "SEQ_CLS", "r": 3, "target_modules": ["q_proj", "up_proj"]}}
    theirs = _ask(peers, tmp_path, model, directory, **settings)
    adapter = read_adapter(directory, model.config)

    def scored(params: Params) -> np.ndarray:
        last = np.asarray(hidden(params, model.config, TOKENS)[0][0, -1:])
        return np.asarray(last @ adapter.extra["score"])

    _agree(scored(_adapted(model, adapter)), theirs, scored(model.params))
