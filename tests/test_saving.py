"""Checkpoints of a run: the same bits back, only whole ones resumed, and a good one kept whatever fails."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gemmary
from gemmary.checkpoints import open_model
from gemmary.errors import GemmaryError
from gemmary.params import init, is_stacked, unstack
from gemmary.presets import nano
from gemmary.text import Tokenizer
from gemmary.train import saving
from gemmary.train.model_files import NativeFiles
from gemmary.train.optimizer import OptimizerSettings, optimizer
from gemmary.train.saving import Checkpoints
from gemmary.train.step import TrainState, init_state

CONFIG = nano(1, 1000).replace(num_layers=2, embed_dim=32, ffw_dim=64, head_dim=16, context=64)
IDENTITY = {"seed": 1, "pretrain": {"batch": 8, "optimizer": {"kind": "muon"}}}
DATA = {"next": 7, "order": {"seed": 1}}


def make_state(step: int, *, stacked: bool = False, kind: Any = "adamw", seed: int = 0) -> TrainState:
    """A state with random numbers in every array."""
    params = init(CONFIG, jax.random.key(seed))
    params = params if stacked else unstack(params)
    state = init_state(params, optimizer(OptimizerSettings(kind=kind), 10), jax.random.key(seed + 1))
    rng = np.random.default_rng([seed, step])

    def filled(x: Any) -> jax.Array:
        draw = rng.normal(size=x.shape) if jnp.issubdtype(x.dtype, jnp.floating) else rng.integers(0, 99, x.shape)
        return jnp.asarray(draw, x.dtype)

    params, opt_state = jax.tree.map(filled, (state.params, state.opt_state))
    return replace(state, params=params, opt_state=opt_state, step=jnp.asarray(step, jnp.int32))


def same_state(a: TrainState, b: TrainState) -> bool:
    """Equal in every bit, and in form."""
    a, b = (replace(s, rng=jax.random.key_data(s.rng)) for s in (a, b))
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and x.shape == y.shape and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in leaves
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make(folder: Path, **changes: Any) -> Checkpoints:
    return Checkpoints(folder, NativeFiles(CONFIG, None), changes.pop("identity", IDENTITY), **changes)


def saved(folder: Path, *steps: int, **changes: Any) -> Checkpoints:
    """Checkpoints of these steps, written."""
    checkpoints = make(folder, **changes)
    for step in steps:
        checkpoints.save(make_state(step), DATA)
    checkpoints.finish()
    return checkpoints


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("stacked", [False, True])
def test_every_bit_comes_back(tmp_path: Path, stacked: bool, kind: str) -> None:
    state = make_state(12, stacked=stacked, kind=kind)
    special = np.array([np.nan, -np.inf, -0.0, 1e-45], np.float32)
    state.params["final_norm"] = state.params["final_norm"].at[:4].set(special)
    checkpoints = make(tmp_path)
    checkpoints.save(state, DATA)
    checkpoints.finish()
    restored = _restored(make(tmp_path), make_state(0, stacked=stacked, kind=kind, seed=5))
    assert same_state(restored.state, state)
    assert is_stacked(restored.state.params) == stacked
    assert (restored.data, restored.path.name, restored.damaged) == (DATA, "step_00000012", [])
    assert not same_state(make_state(12, stacked=stacked, kind=kind, seed=1), state)


def _restored(checkpoints: Checkpoints, like: TrainState | None = None) -> saving.Restored:
    restored = checkpoints.restore(make_state(0) if like is None else like)
    assert restored is not None
    return restored


def test_a_save_is_of_the_moment(tmp_path: Path) -> None:
    """What the next step does to the arrays' memory does not reach the file."""
    state = make_state(1)
    copy = jax.tree.map(jnp.copy, replace(state, rng=jax.random.key_data(state.rng)))
    checkpoints = make(tmp_path)
    checkpoints.save(state, DATA)
    jax.tree.map(lambda x: x.delete(), (state.params, state.opt_state))  # as donation does
    checkpoints.finish()
    found = _restored(checkpoints).state
    assert same_state(found, replace(copy, rng=jax.random.wrap_key_data(copy.rng)))


def test_a_fresh_folder_has_none(tmp_path: Path) -> None:
    checkpoints = make(tmp_path / "none")
    assert checkpoints.restore(make_state(0)) is None
    assert checkpoints.newest() is None
    checkpoints.finish()


def test_the_newest_are_kept(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 2, 4, 6, 10, keep=2)
    assert names(tmp_path) == ["step_00000006", "step_00000010"]
    assert checkpoints.newest() == tmp_path / "step_00000010"
    assert same_state(_restored(checkpoints).state, make_state(10))


def test_a_checkpoint_is_a_model(tmp_path: Path, tiny: Tokenizer) -> None:
    config = CONFIG.replace(vocab_size=tiny.size, num_tokens=tiny.size)
    params = unstack(init(config, jax.random.key(0)))
    state = init_state(params, optimizer(OptimizerSettings(), 10), jax.random.key(0))
    checkpoints = Checkpoints(tmp_path, NativeFiles(config, tiny), IDENTITY)
    checkpoints.save(state, DATA)
    checkpoints.finish()
    model = tmp_path / "step_00000000" / "model"
    assert gemmary.load(model).config == config
    with open_model(model) as checkpoint:
        assert checkpoint.config == config
        assert np.array_equal(checkpoint.weight("embed"), params["embed"])


def test_the_one_before_a_damaged_one(tmp_path: Path) -> None:
    saved(tmp_path, 2, 4, 6)
    flip(tmp_path / "step_00000006" / "optimizer.safetensors")
    shutil.rmtree(tmp_path / "step_00000004" / "model" / "params" / "d")
    checkpoints = make(tmp_path)
    restored = _restored(checkpoints)
    assert restored.path == checkpoints.newest() == tmp_path / "step_00000002"
    assert same_state(restored.state, make_state(2))
    assert [line.split(": ")[0] for line in restored.damaged] == [str(tmp_path / f"step_0000000{n}") for n in (6, 4)]
    assert "optimizer.safetensors differs" in restored.damaged[0]


def test_damaged_ones_push_out_no_good_one(tmp_path: Path) -> None:
    saved(tmp_path, 2, 4, 6, keep=3)
    for step in (4, 6):
        flip(tmp_path / f"step_0000000{step}" / "state.json")
    checkpoints = make(tmp_path, keep=1)
    _restored(checkpoints)
    checkpoints.save(make_state(3), DATA)
    checkpoints.finish()
    assert checkpoints.newest() == tmp_path / "step_00000003"
    assert same_state(_restored(make(tmp_path)).state, make_state(3))
    checkpoints.save(make_state(6), DATA)  # in the place of a damaged one
    checkpoints.finish()
    assert names(tmp_path) == ["step_00000006"]
    assert same_state(_restored(make(tmp_path)).state, make_state(6))


def test_a_good_one_is_not_overwritten(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 2)
    checkpoints.save(make_state(2, seed=9), DATA)
    with pytest.raises(GemmaryError, match="exists already"):
        checkpoints.finish()
    assert same_state(_restored(checkpoints).state, make_state(2))


def test_nothing_good_is_an_error(tmp_path: Path) -> None:
    saved(tmp_path, 2, 4)
    for step in (2, 4):
        flip(tmp_path / f"step_0000000{step}" / "state.json")
    with pytest.raises(
        GemmaryError, match=r"no checkpoint in .* verifies .*state.json differs.*remove it to begin anew"
    ):
        make(tmp_path).restore(make_state(0))
    assert names(tmp_path) == ["step_00000002", "step_00000004"]  # for people to look at


def test_what_cannot_be_read_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 2, 4)
    opened = Path.open

    def broken(self: Path, *arguments: Any, **more: Any) -> Any:
        if "step_00000004" in self.parts and self.name == "_METADATA":
            raise OSError(errno.EIO, "Input/output error", str(self))
        return opened(self, *arguments, **more)

    monkeypatch.setattr(Path, "open", broken)
    restored = _restored(make(tmp_path))
    assert restored.path.name == "step_00000002"
    assert "Input/output error" in restored.damaged[0]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({**IDENTITY, "seed": 2}, "seed was 1 and is 2"),
        ({**IDENTITY, "pretrain": {"batch": 8, "optimizer": {"kind": "adamw"}}}, "pretrain.optimizer.kind was muon and is adamw"),
        ({"seed": 1}, r"pretrain was .* and is None"),
        ({**IDENTITY, "more": True}, "more was None and is True"),
    ],
)  # fmt: skip
def test_another_run_is_refused(tmp_path: Path, other: dict[str, Any], said: str) -> None:
    saved(tmp_path, 2)
    with pytest.raises(GemmaryError, match=rf"begun with other settings \({said}\): put them back"):
        make(tmp_path, identity=other).restore(make_state(0))
    assert _restored(make(tmp_path, identity=json.loads(json.dumps(IDENTITY)))).path.name == "step_00000002"


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    with pytest.raises(GemmaryError, match="its optimizer is another one"):
        make(tmp_path).restore(make_state(0, kind="muon"))


def test_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "_VERSION", 2)
    saved(tmp_path, 2)
    monkeypatch.undo()
    with pytest.raises(GemmaryError, match="written by another gemmary"):
        make(tmp_path).restore(make_state(0))


def test_what_a_killed_save_left_is_removed(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    (tmp_path / ".step_00000004.abc.partial" / "step_00000004" / "model").mkdir(parents=True)
    (tmp_path / "mine.partial").mkdir()
    make(tmp_path)
    assert names(tmp_path) == ["mine.partial", "step_00000002"]


def test_a_failed_save_is_said_and_the_next_one_mends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    checkpoints = saved(tmp_path, 2, keep=1, say=lines.append)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_manifest", full)
        checkpoints.save(make_state(4), DATA)
        with pytest.raises(
            GemmaryError, match=r"the last save failed: .*No space left.*newest checkpoint is .*step_00000002"
        ):
            checkpoints.finish()
    assert len(lines) == 1
    assert lines[0].startswith("checkpoint of step 4 failed: writing ")
    assert names(tmp_path) == ["step_00000002"]
    checkpoints.save(make_state(5), DATA)
    checkpoints.finish()
    assert names(tmp_path) == ["step_00000005"]
    assert len(lines) == 1


def test_no_room_is_known_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    checkpoints = make(tmp_path)
    checkpoints.save(make_state(1), DATA)
    with pytest.raises(GemmaryError, match=r"has 0.0 GB free .*; there is no checkpoint"):
        checkpoints.finish()
    assert names(tmp_path) == []
