"""Checkpoints of a run: written in the background, sealed last, and resumed from the newest one that verifies.

    step_00000400/
      model/                   a native checkpoint: `gemmary generate …/step_00000400/model "…"` runs it; or adapter/
      optimizer.safetensors    the optimizer's arrays, in the order of its tree
      state.json               step, key, place in the data, and what the run was begun with
      manifest.json            size and SHA-256 of every other file

Of a run of several processes it has `parts/` (see `parts`) in the place of the first two: each process writes what its devices hold.

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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax.sharding import NamedSharding

from gemmary import processes
from gemmary.checkpoints.checkpoint import read_json, staged
from gemmary.checkpoints.manifest import to_disk, verify_manifest, write_manifest
from gemmary.errors import GemmaryError
from gemmary.params import Params
from gemmary.processes import Lost
from gemmary.train.model_files import PARAMS, ModelFiles
from gemmary.train.parts import in_parts, opened, pieces_here, write_together
from gemmary.train.step import TrainState

__all__ = ["Checkpoints", "Restored"]

_OPTIMIZER, _STATE = "optimizer.safetensors", "state.json"
_OPT_STATE = "opt_state"
_VERSION = 1


@dataclass(frozen=True)
class Restored:
    """A checkpoint read back: the state of a run, its place in the data, and what was wrong with newer ones."""

    state: TrainState
    data: dict[str, Any]
    path: Path
    damaged: list[str]


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
        self._lost: Lost | None = None
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
        key = np.asarray(jax.random.key_data(state.rng)).tolist()
        about = {
            "format": _VERSION,
            "step": int(state.step),
            "rng": key,
            "data": dict(data),
            "begun_with": self._identity,
        }
        path = self._folder / f"step_{about['step']:08d}"
        put = self._whole_state(path, state, about) if processes.count() == 1 else _parts_of_state(path, state, about)
        self._writing = threading.Thread(target=self._write, args=(path, put), name="checkpoint")
        self._writing.start()

    def wait(self) -> None:
        """Return when nothing is being written."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        if self._lost is not None:
            raise self._lost

    def finish(self) -> None:
        """Wait; raises GemmaryError where the last save failed, naming the newest checkpoint there is."""
        self.wait()
        if self._failed:
            newest = self.newest()
            kept = f"the newest checkpoint is {newest}" if newest else "there is no checkpoint"
            raise GemmaryError(f"the last save failed: {self._failed}; {kept}")

    def _whole_state(self, path: Path, state: TrainState, about: dict[str, Any]) -> Callable[[], None]:
        """What writes it, as it is now, from one process."""
        params, opt_state = jax.tree.map(lambda x: np.array(x, copy=True), (state.params, state.opt_state))
        size = sum(leaf.nbytes for leaf in jax.tree.leaves((params, opt_state)))

        def put() -> None:
            with staged(path, int(1.05 * size)) as stage:
                self._files.write(stage / self._files.name, params)
                leaves = {f"{i:05d}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(opt_state))}
                safetensors.numpy.save_file(leaves, stage / _OPTIMIZER)
                (stage / _STATE).write_text(_as_text(about), encoding="utf-8")
                write_manifest(stage)
            to_disk(self._folder)  # before older ones go

        return put

    def _write(self, path: Path, put: Callable[[], None]) -> None:
        try:
            if path in self._damaged:
                if processes.is_first():
                    shutil.rmtree(path, ignore_errors=True)
                self._damaged.discard(path)
            put()
            self._failed = None
        except Lost as error:
            self._lost = error
            return
        except Exception as error:  # of the disk's and Orbax's many kinds none may end a run that has good checkpoints
            line = str(error).strip().splitlines()
            self._failed = line[0][:300] if line else type(error).__name__
            self._say(f"checkpoint of step {_step(path)} failed: {self._failed}")
            return
        if not processes.is_first():
            return
        kept = self._whole()[-self._keep :]
        for old in self._all():
            if old not in kept and _step(old) < _step(path):
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
        every: list[str] = processes.from_first("checkpoints", lambda: [path.name for path in self._all()])
        share = processes.index(), processes.count()
        for path in (self._folder / name for name in reversed(every)):
            try:
                processes.agreed("verify", lambda path=path: verify_manifest(path, share))  # type: ignore[misc]
                about = read_json(path / _STATE)
            except Lost:
                raise
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

    def export(self, like: Params) -> Path:
        """The newest checkpoint's parameters as `ModelFiles` writes them: its own, or made of its parts, in `whole/` beside."""
        newest = self.newest()
        assert newest is not None
        if not in_parts(newest):
            return newest / self._files.name
        whole = self._folder.parent / "whole"
        made = whole / newest.name
        if not (made / self._files.name).is_dir():
            shutil.rmtree(made, ignore_errors=True)
            with opened(newest) as pieces, staged(made, 0) as stage:
                self._files.write_parts(stage / self._files.name, pieces, like)
        for other in whole.iterdir():
            if other != made:
                shutil.rmtree(other, ignore_errors=True)
        return made / self._files.name

    def _read(self, path: Path, about: dict[str, Any], like: TrainState) -> TrainState:
        step = _laid(np.asarray(about["step"], np.int32), like.step)
        key = _laid(np.asarray(about["rng"], np.uint32), like.step)
        rng = jax.random.wrap_key_data(key)
        if in_parts(path):
            with opened(path) as pieces:
                return TrainState(pieces.fill(PARAMS, like.params), pieces.fill(_OPT_STATE, like.opt_state), step, rng)
        params = self._files.read(path / self._files.name, like.params)
        leaves, form = jax.tree.flatten(like.opt_state)
        with safetensors.safe_open(path / _OPTIMIZER, "numpy") as file:
            names = sorted(file.keys())
            if len(names) != len(leaves):
                raise GemmaryError(f"{path}: its optimizer is another one")
            stored = [_laid(file.get_tensor(name), leaf) for name, leaf in zip(names, leaves, strict=True)]
        return TrainState(jax.tree.map(_laid, params, like.params), jax.tree.unflatten(form, stored), step, rng)


def _as_text(about: dict[str, Any]) -> str:
    return json.dumps(about, indent=1) + "\n"


def _parts_of_state(path: Path, state: TrainState, about: dict[str, Any]) -> Callable[[], None]:
    """What writes it, as it is now, with the other processes."""
    pieces = pieces_here(PARAMS, state.params) + pieces_here(_OPT_STATE, state.opt_state)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.opt_state)))
    return lambda: write_together(path, pieces, {_STATE: _as_text(about)}, int(1.05 * size))


def _laid(array: Any, like: jax.Array) -> jax.Array:
    """An array where another one lies."""
    if isinstance(like.sharding, NamedSharding):
        whole = np.asarray(array)
        return jax.make_array_from_callback(whole.shape, like.sharding, lambda at: whole[at])
    return jnp.array(array)


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
