"""How a run's parameters lie on disk: a whole model, or adapters alone; from one process's arrays, or from the parts of many."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp

from gemmary import processes
from gemmary.checkpoints.checkpoint import staged
from gemmary.checkpoints.native import NativeWriter, open_native
from gemmary.checkpoints.peft import read_adapter, write_adapter
from gemmary.config import Config
from gemmary.params import TABLE, Params, is_stacked, layered_names, stack
from gemmary.text.tokenizer import Tokenizer
from gemmary.train.parts import Pieces, opened, pieces_here, write_pieces

__all__ = ["PARAMS", "AdapterFiles", "ModelFiles", "NativeFiles", "write_parameters"]

PARAMS = "params"
"""What the names of parameters' pieces begin with."""


class ModelFiles(Protocol):
    """How a run's parameters lie on disk."""

    @property
    def name(self) -> str:
        """The folder's."""
        ...

    def write(self, path: Path, params: Params) -> None:
        """Write them into a new folder at `path`."""
        ...

    def write_parts(self, path: Path, pieces: Pieces, like: Params) -> None:
        """The same of pieces, whose form is that of `like`."""
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

    def write_parts(self, path: Path, pieces: Pieces, like: Params) -> None:
        """The same, with one weight in memory at a time."""
        path.mkdir()
        writer = NativeWriter(path, self.config, self.tokenizer)
        for name, layer in layered_names(self.config):
            whole, layered = f"{PARAMS}['{name}']", TABLE[name].layered
            stacked = not isinstance(like[name], tuple)
            box = [slice(layer, layer + 1)] if layered and stacked else []
            weight = pieces.read(whole if stacked else f"{whole}[{layer}]", box)
            writer.write({(name, layer): weight[0] if box else weight})
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

    def write_parts(self, path: Path, pieces: Pieces, like: Params) -> None:
        """The same."""
        self.write(path, pieces.tree(PARAMS, like))

    def read(self, path: Path, like: Params) -> Params:
        """In fp32; the files are taken to be verified."""
        found = read_adapter(path, self.config)
        params: Params = {**found.weights, **found.extra}
        learnt = {name: jax.tree.map(jnp.asarray, params[name]) for name in like}
        stacked = {name for name in like if TABLE[name].layered and not isinstance(like[name], tuple)}
        return {name: jax.tree.map(lambda *x: jnp.stack(x), *w) if name in stacked else w for name, w in learnt.items()}


def write_parameters(folder: Path, files: ModelFiles, params: Params, texts: Mapping[str, str]) -> None:
    """Parameters, and `texts` by name, as a new folder, whole or not at all. All processes call it alike; one puts it together."""

    def write(put: Callable[[Path], None]) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        with staged(folder, 0) as stage:
            put(stage / files.name)
            for name, text in texts.items():
                (stage / name).write_text(text, encoding="utf-8")

    if processes.count() == 1:
        write(lambda path: files.write(path, params))
        return
    aside = folder.with_name(f".{folder.name}.parts.partial")

    def join() -> None:
        with opened(aside) as pieces:
            write(lambda path: files.write_parts(path, pieces, params))
        shutil.rmtree(aside, ignore_errors=True)

    processes.from_first("best.begin", lambda: shutil.rmtree(aside, ignore_errors=True))
    here = pieces_here(PARAMS, params)
    processes.agreed("best.write", lambda: bool(write_pieces(aside / "parts", processes.index(), here)))
    processes.from_first("best", join)
