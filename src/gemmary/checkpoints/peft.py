"""LoRA adapters alone, as Hugging Face's PEFT keeps them: adapter_config.json and adapter_model.safetensors.

This is also how we keep them: what we write, PEFT opens over a Hugging Face export of the base. A projection goes by the
name of its module in transformers and is a matrix [out, in] there; its factors are A [R, in] and B [out, R], axes folded
as in the matrix itself. Names and folding both follow from the table in `names`.

An adapter half applied is a wrong model: a setting that we do not know is an error where it is on, and so is a tensor.

Source: peft 0.21, tuners/lora/config.py, tuners/lora/layer.py and utils/save_and_load.py.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from gemmary.checkpoints.checkpoint import read_json
from gemmary.checkpoints.names import IGNORED, Stored, join, layout, split, stored_shape
from gemmary.checkpoints.safetensors_file import Entry, SafetensorsReader
from gemmary.config import Config
from gemmary.errors import GemmaryError
from gemmary.params import TABLE, shape_of
from gemmary.weights import LoRA

__all__ = ["Adapter", "adapter_base", "is_adapter", "read_adapter", "write_adapter"]

_CONFIG, _WEIGHTS, _PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = "base_model.model."  # a PeftModel holds a LoraModel, and that the model itself
_A, _B = ".lora_A.weight", ".lora_B.weight"
_SCORE = "score"
_APART: Any = None  # the base of a LoRA that is kept apart from it
_FLOATS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
_MOST_RANK, _MOST_ALPHA = 1 << 16, 1 << 20

# Settings that say where an adapter came from, how it was trained, or what its tensors say themselves. Any other is a
# variant that gemmary does not compute (DoRA, ranks by pattern, biases, …) where it is neither null, false nor empty.
_INERT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save", "peft_type", "peft_version",
    "qalora_group_size", "r", "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
# First values that leave the base as it is; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change it, and again when they are loaded.
_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class Adapter:
    """An adapter read.

    `weights` has, by row of the table, one LoRA per layer without its base: float32 `a` and `b`, zero in layers that the
    adapter leaves alone, and scale = alpha / rank. `extra` has whole arrays trained beside them: `score` [D], or nothing.
    `base` is the base model's name as it was written; empty where none was.
    """

    weights: dict[str, tuple[LoRA, ...]]
    extra: dict[str, np.ndarray]
    base: str
    rank: int
    alpha: float


class _Row:
    """A projection in both layouts: `reads` and `writes` are our order of its axes, `columns` and `rows` PEFT's."""

    def __init__(self, stored: Stored, config: Config) -> None:
        self.stored, self.name = stored, stored.members[0]
        spec = TABLE[self.name]
        self.sizes = dict(zip(spec.axes, shape_of(config, spec), strict=True))
        self.reads = spec.reads
        self.writes = tuple(axis for axis in spec.axes if axis not in (*spec.reads, "layers"))
        folded = re.findall(r"\w+", stored.axes[0])
        self.columns = [axis for axis in folded if axis in self.reads]
        self.rows = [axis for axis in folded if axis in self.writes]

    @property
    def module(self) -> str:
        """The last part of its name, such as q_proj."""
        return self.stored.name.split(".")[-2]

    def at(self, layer: int) -> str:
        return _PREFIX + self.stored.at(layer).removesuffix(".weight")

    def shape(self, axes: tuple[str, ...] | list[str]) -> tuple[int, ...]:
        return tuple(self.sizes[axis] for axis in axes)

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """PEFT's shapes, by suffix."""
        return {_A: (rank, math.prod(self.shape(self.columns))), _B: (math.prod(self.shape(self.rows)), rank)}

    def fold(self, a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
        """Our factors as PEFT's, by suffix."""
        rank = len(b)
        left = a.transpose([len(self.reads), *(self.reads.index(axis) for axis in self.columns)]).reshape(rank, -1)
        right = b.transpose([*(1 + self.writes.index(axis) for axis in self.rows), 0]).reshape(-1, rank)
        return {_A: np.ascontiguousarray(left), _B: np.ascontiguousarray(right)}

    def unfold(self, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The inverse."""
        a = left.reshape(-1, *self.shape(self.columns))
        b = right.reshape(*self.shape(self.rows), -1)
        a = a.transpose([*(1 + self.columns.index(axis) for axis in self.reads), 0])
        b = b.transpose([len(self.rows), *(self.rows.index(axis) for axis in self.writes)])
        return np.ascontiguousarray(a), np.ascontiguousarray(b)


def _rows(config: Config) -> list[_Row]:
    """Every projection of a layer."""
    return [_Row(row, config) for row in layout("hf", config) if row.layered and TABLE[row.members[0]].reads]


def _score(config: Config) -> Stored:
    return next(row for row in layout("hf", config.replace(score_head=True)) if row.members == (_SCORE,))


def is_adapter(path: Path) -> bool:
    """Whether that is a directory with an adapter."""
    return (path / _CONFIG).is_file()


def adapter_base(directory: Path) -> str:
    """The name of the model that an adapter is for, as it was written. Raises GemmaryError where it names none."""
    base = _settings(directory)[0]
    if not base:
        raise GemmaryError(f"{directory / _CONFIG} names no base model: give base_model_name_or_path there")
    return base


def write_adapter(directory: Path, config: Config, weights: Mapping[str, Any], *, base: str) -> None:
    """Write what was trained into an empty directory: rows of LoRA leaves, stacked or unstacked, and perhaps `score` [D].

    Their own bases are not looked at; `base` names the model that they are for. Values are kept in float32. Raises
    GemmaryError for a row that PEFT cannot adapt, a misshapen leaf, and leaves that differ in rank or scale.
    """
    rows = {row.name: row for row in _rows(config)}
    layers: dict[str, list[LoRA]] = {}
    for name, weight in weights.items():
        if name == "embed":
            raise GemmaryError("embed is Gemma's output too and PEFT adapts only one of the two: merge this adapter")
        if name not in rows and name != _SCORE:
            raise GemmaryError(f"an adapter cannot hold {name}: only LoRA of {', '.join(rows)}, and score")
        if name != _SCORE:
            layers[name] = _unstacked(rows[name], weight, config.num_layers)
    kinds = {(lora.a.shape[-1], lora.scale) for loras in layers.values() for lora in loras}
    if len(kinds) != 1:
        said = ", ".join(f"rank {rank} with scale {scale:g}" for rank, scale in sorted(kinds)) or "no LoRA"
        raise GemmaryError(f"an adapter has one rank and one scale, this has {said}")
    tensors = {}
    for name, loras in layers.items():
        for i, lora in enumerate(loras):
            factors = rows[name].fold(np.asarray(lora.a, np.float32), np.asarray(lora.b, np.float32))
            tensors.update({rows[name].at(i) + suffix: factor for suffix, factor in factors.items()})
    if _SCORE in weights:
        score = np.asarray(weights[_SCORE], np.float32)
        if score.shape != (config.embed_dim,):
            raise GemmaryError(f"score is {list(score.shape)} instead of [{config.embed_dim}]")
        tensors[_PREFIX + _score(config).name] = join(_score(config), config, {_SCORE: score})
    save_file(tensors, directory / _WEIGHTS, {"format": "pt"})
    settings = _peft_config(base, *kinds.pop(), sorted(rows[name].module for name in layers), _SCORE in weights)
    (directory / _CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _unstacked(row: _Row, weight: Any, layers: int) -> list[LoRA]:
    """One LoRA per layer, shapes checked."""
    if isinstance(weight, LoRA):  # stacked: both factors lead with L
        pairs = zip(np.asarray(weight.a), np.asarray(weight.b), strict=False)
        each = [LoRA(_APART, a, b, weight.scale) for a, b in pairs]
    else:
        each = list(weight) if isinstance(weight, (tuple, list)) else [weight]
    if not all(isinstance(lora, LoRA) for lora in each):
        raise GemmaryError(f"{row.name} is not adapted: an adapter holds LoRA alone")
    if len(each) != layers:
        raise GemmaryError(f"{row.name} has {len(each)} layers of LoRA and the config {layers}")
    for i, lora in enumerate(each):
        wanted = [*row.shape(row.reads), *lora.b.shape[:1]], [*lora.a.shape[-1:], *row.shape(row.writes)]
        if (list(lora.a.shape), list(lora.b.shape)) != wanted:
            raise GemmaryError(
                f"{row.name}, layer {i}: a {list(lora.a.shape)} and b {list(lora.b.shape)} are not factors of this config"
            )
    return each


def _peft_config(base: str, rank: int, scale: float, modules: list[str], score: bool) -> dict[str, Any]:
    alpha = round(scale * rank) if round(scale * rank) / rank == scale else scale * rank
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": [_SCORE] if score else None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": modules,
        "task_type": "SEQ_CLS" if score else "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def read_adapter(directory: Path, config: Config) -> Adapter:
    """Read an adapter for a model of that config; one of a multimodal Gemma 3 is read for its text half.

    Only what it names is adapted; float16 and bfloat16 become float32. Rank-stabilized LoRA (rsLoRA) is read: its scale is
    lora_alpha / sqrt(r). Raises GemmaryError for another method than LoRA, for a variant of it that we would compute wrongly,
    and for tensors that are unknown, misshapen, not floating or lack their pair.
    """
    base, rank, alpha = _settings(directory)
    rows, score = _rows(config), _score(config)
    head = _PREFIX + score.name
    shapes = {
        row.at(i) + suffix: shape
        for row in rows
        for i in range(config.num_layers)
        for suffix, shape in row.shapes(rank).items()
    }
    shapes[head] = stored_shape(score, config)
    file = _open(directory)
    names = _names(file, directory / _WEIGHTS)
    _check(directory / _WEIGHTS, shapes, {name: file.entries[names[name]] for name in names})

    def tensor(name: str) -> np.ndarray:
        return file.read(names[name]).astype(np.float32) if name in names else np.zeros(shapes[name], np.float32)

    def lora(row: _Row, layer: int) -> LoRA:
        a, b = row.unfold(tensor(row.at(layer) + _A), tensor(row.at(layer) + _B))
        return LoRA(_APART, a, b, alpha / rank)

    adapted = [row for row in rows if any(row.at(i) + _A in names for i in range(config.num_layers))]
    if not adapted:
        raise GemmaryError(f"{directory / _WEIGHTS} holds no LoRA")
    weights = {row.name: tuple(lora(row, i) for i in range(config.num_layers)) for row in adapted}
    extra = split(score, config, tensor(head)) if head in names else {}
    return Adapter(weights, extra, base, rank, alpha)


def _settings(directory: Path) -> tuple[str, int, float]:
    """The base's name, the rank, and the alpha of which the scale is alpha / rank."""
    where = directory / _CONFIG
    data = read_json(where)
    kind = data.get("peft_type") if isinstance(data, dict) else None
    if kind != "LORA":
        raise GemmaryError(f"{where}: peft_type is {kind!r}; gemmary reads LORA")
    base, rank, alpha = (data.get(name) for name in ("base_model_name_or_path", "r", "lora_alpha"))
    on = [name for name, value in data.items() if value and name not in _INERT and (name, value) != ("bias", "none")]
    if on:
        raise GemmaryError(f"{where} sets {', '.join(on[:4])}, which gemmary does not compute: merge with PEFT instead")
    init = data.get("init_lora_weights")
    if init not in _INITS:
        raise GemmaryError(f"{where}: init_lora_weights {init!r} changes the base: save a plain LoRA with PEFT")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= _MOST_RANK:
        raise GemmaryError(f"{where}: r is {rank!r}; it must be a whole number from 1 to {_MOST_RANK}")
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not 0 < alpha <= _MOST_ALPHA:
        raise GemmaryError(f"{where}: lora_alpha is {alpha!r}; it must be a number above 0, at most {_MOST_ALPHA}")
    if not isinstance(base, (str, type(None))):
        raise GemmaryError(f"{where}: base_model_name_or_path is {base!r}; it must be a name")
    return base or "", rank, alpha * math.sqrt(rank) if data.get("use_rslora") else float(alpha)


def _open(directory: Path) -> SafetensorsReader:
    if (directory / _WEIGHTS).is_file():
        return SafetensorsReader(directory / _WEIGHTS)
    if (directory / _PICKLE).is_file():
        raise GemmaryError(f"{directory / _PICKLE} is a pickle, which can hold code: save it as safetensors with PEFT")
    raise GemmaryError(f"{directory / _WEIGHTS} is missing: give a directory that holds a whole adapter")


def _names(file: SafetensorsReader, where: Path) -> dict[str, str]:
    """The text model's names to those in the file, which differ where the adapter was trained on a multimodal model."""
    names: dict[str, str] = {}
    for name in file.entries:
        inner = name.removeprefix(_PREFIX)
        if inner.startswith(IGNORED["hf"]):
            continue
        plain = inner.removeprefix("language_model.").replace("model.language_model.", "model.", 1)
        plain = name[: len(name) - len(inner)] + plain
        if plain in names:
            raise GemmaryError(f"{where} holds {plain} twice: as {names[plain]} and as {name}")
        names[plain] = name
    return names


def _check(where: Path, shapes: Mapping[str, tuple[int, ...]], found: Mapping[str, Entry]) -> None:
    """Every tensor is one of `shapes` and floating, and no factor is alone; else GemmaryError listing them."""
    unknown = [name for name in found if name not in shapes]
    misshapen = [
        f"{name} {list(entry.shape)} instead of {list(shapes[name])}"
        for name, entry in found.items()
        if name in shapes and entry.shape != shapes[name]
    ]
    odd = [f"{name} ({entry.dtype})" for name, entry in found.items() if entry.dtype not in _FLOATS]
    pairs = [(name, name.removesuffix(a) + b) for a, b in ((_A, _B), (_B, _A)) for name in found if name.endswith(a)]
    lone = [name for name, other in pairs if other not in found]
    for what, names, advice in (
        ("unknown", unknown, "gemmary reads LoRA of the layers' projections, and a score: merge the rest with PEFT"),
        ("misshapen", misshapen, "is it an adapter of this model?"),
        ("unreadable", odd, "gemmary reads float32, float16 and bfloat16"),
        ("unpaired", lone, "a LoRA has both lora_A and lora_B"),
    ):
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            raise GemmaryError(f"{where} has {what} tensors: {', '.join(names[:4])}{more}; {advice}")
