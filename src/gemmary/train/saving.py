"""Checkpoints of a run: written in the background, sealed last, and resumed from the newest one that verifies.

    step_00000400/
      model/                   a native checkpoint: `gemmary generate …/step_00000400/model "…"` runs it; or adapter/
      optimizer.safetensors    the optimizer's arrays, in the order of its tree
      state.json               step, key, place in the data, and what the run was begun with
      manifest.json            size and SHA-256 of every other file

A checkpoint is written aside and renamed when it is whole, so a name that is there is a whole checkpoint or a damaged one;
a damaged one is passed over. A save that fails (a full disk, an error of the device) leaves the older ones as they are.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from gemmary.checkpoints.checkpoint import read_json, staged
from gemmary.checkpoints.manifest import to_disk, verify_manifest, write_manifest
from gemmary.checkpoints.native import NativeWriter, open_native
from gemmary.checkpoints.peft import read_adapter, write_adapter
from gemmary.config import Config
from gemmary.errors import GemmaryError
from gemmary.params import TABLE, Params, is_stacked, layered_names, stack
from gemmary.text.tokenizer import Tokenizer
from gemmary.train.step import TrainState

__all__ = ["AdapterFiles", "Checkpoints", "ModelFiles", "NativeFiles", "Restored"]

_OPTIMIZER, _STATE = "optimizer.safetensors", "state.json"
_VERSION = 1


@dataclass(frozen=True)
class Restored:
    """A checkpoint read back: the state of a run, its place in the data, and what was wrong with newer ones."""

    state: TrainState
    data: dict[str, Any]
    path: Path
    damaged: list[str]


class ModelFiles(Protocol):
    """How a run's parameters lie on disk."""

    @property
    def name(self) -> str:
        """The folder's."""
        ...

    def write(self, path: Path, params: Params) -> None:
        """Write them into a new folder at `path`."""
        ...

    def read(self, path: Path, like: Params) -> Params:
        """What was written, in the form of `like`."""
        ...


@dataclass(frozen=True)
class NativeFiles:
    """A whole model, with its tokenizer."""

    config: Config
    tokenizer: Tokenizer | None
    name: str = "model"

    def write(self, path: Path, params: Params) -> None:
        """As a native checkpoint."""
        path.mkdir()
        writer = NativeWriter(path, self.config, self.tokenizer)
        weights = {}
        for name, layer in layered_names(self.config):
            weight = params[name]
            weights[name, layer] = weight[layer] if TABLE[name].layered else weight
        writer.write(weights)
        writer.close()

    def read(self, path: Path, like: Params) -> Params:
        """In fp32; the files are taken to be verified."""
        with open_native(path, verify=False) as checkpoint:
            params = checkpoint.params(jnp.float32)
        return stack(params) if is_stacked(like) else params


@dataclass(frozen=True)
class AdapterFiles:
    """Adapters alone, as PEFT keeps them; `base` names what they adapt."""

    config: Config
    base: str
    name: str = "adapter"

    def write(self, path: Path, params: Params) -> None:
        """As PEFT's two files."""
        path.mkdir()
        write_adapter(path, self.config, params, base=self.base)

    def read(self, path: Path, like: Params) -> Params:
        """In fp32; the files are taken to be verified."""
        found = read_adapter(path, self.config)
        params: Params = {**found.weights, **found.extra}
        learnt = {name: jax.tree.map(jnp.asarray, params[name]) for name in like}
        stacked = {name for name in like if TABLE[name].layered and not isinstance(like[name], tuple)}
        return {name: jax.tree.map(lambda *x: jnp.stack(x), *w) if name in stacked else w for name, w in learnt.items()}


class Checkpoints:
    """The checkpoints of one run, in `folder`; the newest `keep` are kept.

    `identity` says what the run was begun with, name by name; a checkpoint of another is refused, never resumed.
    `say` is told, in one line, of a save that failed.
    """

    def __init__(
        self,
        folder: Path,
        files: ModelFiles,
        identity: Mapping[str, Any],
        *,
        keep: int = 3,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._folder, self._files = folder, files
        self._identity: dict[str, Any] = json.loads(json.dumps(identity, sort_keys=True))
        self._keep, self._say = keep, say
        self._writing: threading.Thread | None = None
        self._failed: str | None = None
        self._damaged: set[Path] = set()
        for left in folder.glob(".step_*.partial"):  # a save that was killed
            shutil.rmtree(left, ignore_errors=True)

    def newest(self) -> Path | None:
        """The newest whole checkpoint that this run knows of."""
        return max(self._whole(), key=_step, default=None)

    def save(self, state: TrainState, data: Mapping[str, Any]) -> None:
        """Take a copy of the state and write it in the background, after the save before it is done.

        Never raises for the disk's sake: what fails is said, and the run goes on.
        """
        self.wait()
        arrays = jax.tree.map(lambda x: np.array(x, copy=True), (state.params, state.opt_state))
        key = np.asarray(jax.random.key_data(state.rng)).tolist()
        about = {
            "format": _VERSION,
            "step": int(state.step),
            "rng": key,
            "data": dict(data),
            "begun_with": self._identity,
        }
        self._writing = threading.Thread(target=self._write, args=(*arrays, about), name="checkpoint")
        self._writing.start()

    def wait(self) -> None:
        """Return when nothing is being written."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None

    def finish(self) -> None:
        """Wait; raises GemmaryError where the last save failed, naming the newest checkpoint there is."""
        self.wait()
        if self._failed:
            newest = self.newest()
            kept = f"the newest checkpoint is {newest}" if newest else "there is no checkpoint"
            raise GemmaryError(f"the last save failed: {self._failed}; {kept}")

    def _write(self, params: Params, opt_state: Any, about: dict[str, Any]) -> None:
        path = self._folder / f"step_{about['step']:08d}"
        size = sum(leaf.nbytes for leaf in jax.tree.leaves((params, opt_state)))
        try:
            if path in self._damaged:
                shutil.rmtree(path, ignore_errors=True)
                self._damaged.discard(path)
            with staged(path, int(1.05 * size)) as stage:
                self._files.write(stage / self._files.name, params)
                leaves = {f"{i:05d}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(opt_state))}
                safetensors.numpy.save_file(leaves, stage / _OPTIMIZER)
                (stage / _STATE).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
                write_manifest(stage)
            to_disk(self._folder)  # before older ones go
            self._failed = None
        except Exception as error:  # of the disk's and Orbax's many kinds none may end a run that has good checkpoints
            line = str(error).strip().splitlines()
            self._failed = line[0][:300] if line else type(error).__name__
            self._say(f"checkpoint of step {about['step']} failed: {self._failed}")
            return
        kept = self._whole()[-self._keep :]
        for old in self._all():
            if old not in kept and _step(old) < about["step"]:
                shutil.rmtree(old, ignore_errors=True)

    def _all(self) -> list[Path]:
        """Every checkpoint there is, whole or damaged, the oldest first."""
        return sorted((path for path in self._folder.glob("step_*") if path.name[5:].isdecimal()), key=_step)

    def _whole(self) -> list[Path]:
        """Those that were not found damaged: newer ones are there where a run was resumed from before them."""
        return [path for path in self._all() if path not in self._damaged]

    def restore(self, like: TrainState) -> Restored | None:
        """The newest checkpoint that verifies; None where there is none at all. `like` gives the state's form.

        Raises GemmaryError where all are damaged, or where the run was begun with something else, by name.
        """
        damaged: list[str] = []
        for path in reversed(self._all()):
            try:
                verify_manifest(path)
                about = read_json(path / _STATE)
            except (GemmaryError, OSError) as error:  # OSError: what cannot be read
                damaged.append(str(error))
                self._damaged.add(path)
                continue
            self._check(path, about)
            return Restored(self._read(path, about, like), about["data"], path, damaged)
        if damaged:
            raise GemmaryError(f"no checkpoint in {self._folder} verifies ({damaged[0]}): remove it to begin anew")
        return None

    def _check(self, path: Path, about: Any) -> None:
        if not isinstance(about, dict) or about.get("format") != _VERSION:
            raise GemmaryError(f"{path} was written by another gemmary: resume it with that one")
        other = _differences(about["begun_with"], self._identity)
        if other:
            raise GemmaryError(
                f"{path} was begun with other settings ({'; '.join(other[:5])}): "
                "put them back to resume it, or give another --out to begin anew"
            )

    def _read(self, path: Path, about: dict[str, Any], like: TrainState) -> TrainState:
        params = self._files.read(path / self._files.name, like.params)
        leaves, form = jax.tree.flatten(like.opt_state)
        with safetensors.safe_open(path / _OPTIMIZER, "numpy") as file:
            names = sorted(file.keys())
            if len(names) != len(leaves):
                raise GemmaryError(f"{path}: its optimizer is another one")
            stored = [jnp.array(file.get_tensor(name)) for name in names]
        rng = jax.random.wrap_key_data(jnp.asarray(about["rng"], jnp.uint32))
        return TrainState(params, jax.tree.unflatten(form, stored), jnp.asarray(about["step"], jnp.int32), rng)


def _step(path: Path) -> int:
    return int(path.name[5:])


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    """What differs between two trees of plain data, as `path was x and is y`."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted({*old, *new}):
            found += _differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        return found
    return [] if old == new else [f"{path} was {str(old)[:60]} and is {str(new)[:60]}"]
