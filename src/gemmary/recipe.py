"""What a recipe says: a model's life as one TOML file, checked whole before anything runs.

A recipe has the stages' sections `curate`, `tokenizer`, `model`, `mixture`, `pretrain` and, for choosing a mixture, `ablate`; then
`instructions`, `sft`, `preferences`, `reward`, `rlhf`, `dpo` and `evaluate`. One that begins from a model that is there already
(`model.path`) has none of the first. `mesh` says how the stages that learn lie on many devices.
Each section's settings are a dataclass of the room that obeys them, so their docstrings are the reference.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from gemmary.config import Config
from gemmary.data.curation_settings import CurateSettings
from gemmary.data.instructions import InstructionSettings
from gemmary.data.mixture import MixtureSettings, Stage
from gemmary.errors import GemmaryError, check_bounds
from gemmary.presets import nano, preset
from gemmary.text.training import TokenizerSettings
from gemmary.train.dpo import DpoSettings
from gemmary.train.finetune import TuneSettings
from gemmary.train.meshed import MeshSettings
from gemmary.train.pretrain import PretrainSettings
from gemmary.train.rlhf import RlhfSettings

__all__ = ["AblateSettings", "Candidate", "EvaluateSettings", "ModelSettings", "Recipe", "RlhfStage", "load_recipe"]

_DIAL = 4  # what batch and learning rates of a recipe are meant for, where its model is given by the dial


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which model: one that is there (`path`), a published size's shape, or a nano one by the dial (layers and heads; width
    is 64 times it).

    With the dial, the recipe's batch and learning rates are those of dial 4: the batch grows with the dial, learning rates
    fall with the square root of the width.
    """

    path: str | None = None
    """A directory, a file, or "sample": tuning begins from it."""
    preset: str | None = None
    dial: int | None = None
    generation: int = 1
    """1 or 3: of a nano model."""

    def __post_init__(self) -> None:
        if sum(one is not None for one in (self.path, self.preset, self.dial)) != 1:
            raise GemmaryError("model: give either a path (sample), a preset (gemma-2b) or a dial (4)")
        if self.preset is not None:
            preset(self.preset)
        elif self.dial is not None:
            nano(self.dial, generation=self.generation)

    def config(self, vocab_size: int, length: int) -> Config:
        """The model's config; a nano one takes its vocabulary and context from the run."""
        if self.preset is not None:
            return preset(self.preset).config
        return nano(self.dial or 0, vocab_size, self.generation).replace(context=max(length, 512))

    def scaled(self, settings: PretrainSettings) -> PretrainSettings:
        """The settings for this dial."""
        if self.dial is None or self.dial == _DIAL:
            return settings
        ratio, rate = self.dial / _DIAL, (_DIAL / self.dial) ** 0.5
        parts = settings.accumulate
        rule = dataclasses.replace(
            settings.optimizer,
            learning_rate=settings.optimizer.learning_rate * rate,
            matrix_learning_rate=settings.optimizer.matrix_learning_rate * rate,
        )
        return dataclasses.replace(
            settings, batch=max(1, round(settings.batch * ratio / parts)) * parts, optimizer=rule
        )


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A mixture to be tried."""

    name: str
    stage: tuple[Stage, ...]
    ramp: float = 0.02

    def __post_init__(self) -> None:
        self.mixture()  # says what is wrong with the weights

    def mixture(self) -> MixtureSettings:
        """The candidate as a mixture."""
        return MixtureSettings(stage=self.stage, ramp=self.ramp)


@dataclass(frozen=True, kw_only=True)
class AblateSettings:
    """Small models, one for each candidate mixture, on equally many tokens."""

    candidate: tuple[Candidate, ...]
    dial: int = 2
    steps: int = 200

    def __post_init__(self) -> None:
        names = [candidate.name for candidate in self.candidate]
        if len(names) < 2 or len(set(names)) < len(names):
            raise GemmaryError("ablate: give at least two candidates, each a name of its own")


@dataclass(frozen=True, kw_only=True)
class RlhfStage(RlhfSettings):
    """Learning from rewards, and what they are."""

    reward: Literal["model", "answer", "tests"] = "model"
    """The reward model; or whether an answer ends as it should; or whether its code passes its tests."""
    reward_path: str | None = None
    """A reward model, where it is not the recipe's own."""
    sources: tuple[str, ...] = ()
    """Which of the instructions' sources give prompts; by default all."""


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Held-out tasks at the end."""

    prompts: int = 100
    """Of each source, at most."""
    max_new_tokens: int = 64
    allow_unsandboxed: bool = False
    """Run generated code under resource limits alone, where there is no sandbox."""

    def __post_init__(self) -> None:
        check_bounds(self, "evaluate.", prompts=(1, None), max_new_tokens=(1, None))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A model's life. `seed` is all runs' seed."""

    model: ModelSettings
    curate: CurateSettings | None = None
    mixture: MixtureSettings | None = None
    pretrain: PretrainSettings | None = None
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)
    ablate: AblateSettings | None = None
    instructions: InstructionSettings | None = None
    sft: TuneSettings | None = None
    preferences: InstructionSettings | None = None
    reward: TuneSettings | None = None
    rlhf: RlhfStage | None = None
    dpo: DpoSettings | None = None
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    mesh: MeshSettings | None = None
    """How devices share a model; without it one device does all, or, of several processes, their devices share the batches."""
    seed: int = 0
    held_out_bytes: int = 1 << 20
    """Of each source, so many bytes of held-out text at most are what bits per byte are taken on."""

    def __post_init__(self) -> None:
        if self.seed < 0 or self.held_out_bytes < 1:
            raise GemmaryError("seed is at least 0 and held_out_bytes at least 1")
        if self.model.path is None:
            absent = [name for name in ("curate", "mixture", "pretrain") if getattr(self, name) is None]
            if absent:
                raise GemmaryError(f"the recipe has no [{absent[0]}]: it needs one, or a model.path to begin from")
        self._check_mixtures()
        self._check_tuning()

    def _check_tuning(self) -> None:
        for stage, needs in (
            ("sft", "instructions"),
            ("rlhf", "instructions"),
            ("reward", "preferences"),
            ("dpo", "preferences"),
        ):
            if getattr(self, stage) is not None and getattr(self, needs) is None:
                raise GemmaryError(f"[{stage}] needs [[{needs}.source]]: say what it learns from")
        if self.rlhf is None or self.instructions is None:
            return
        if self.rlhf.reward == "model" and self.reward is None and self.rlhf.reward_path is None:
            raise GemmaryError("rlhf.reward is a model, and the recipe has neither [reward] nor rlhf.reward_path")
        known = [source.name for source in self.instructions.source]
        if unknown := sorted(set(self.rlhf.sources) - set(known)):
            raise GemmaryError(f"rlhf.sources: no source is called {unknown[0]!r}; there are {', '.join(known)}")

    def _check_mixtures(self) -> None:
        if self.curate is None or self.mixture is None:
            return
        known = {source.name for source in self.curate.source}
        mixtures = {"mixture": self.mixture}
        mixtures |= {f"ablate.{one.name}": one.mixture() for one in (self.ablate.candidate if self.ablate else ())}
        for where, mixture in mixtures.items():
            if unknown := sorted(set(mixture.names) - known):
                raise GemmaryError(f"{where}: no source is called {unknown[0]!r}; there are {', '.join(sorted(known))}")


def load_recipe(path: Path, sets: Sequence[str] = ()) -> Recipe:
    """Read a recipe. Each of `sets` is `key.path=value`, the value as in TOML (or a bare string).

    Raises GemmaryError for a file that is not there or not TOML, and naming by path an unknown key or a value that cannot be.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GemmaryError(f"the recipe {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise GemmaryError(f"the recipe {path} is not TOML: {error}") from None
    for one in sets:
        _set(tree, one)
    _known(Recipe, tree, "")
    try:
        return TypeAdapter(Recipe).validate_python(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"[{at}]" if isinstance(at, int) else f".{at}" for at in first["loc"]).lstrip(".")
        what = first["msg"].removeprefix("Value error, ")
        named = not where or what.startswith(where)
        raise GemmaryError(f"{path}: {what}" if named else f"{path}: {where}: {what}") from None


def _set(tree: dict[str, Any], one: str) -> None:
    """Put `key.path=value` into the tree; a number in the path is a place in a list."""
    key, equals, text = one.partition("=")
    if not equals or not key.strip():
        raise GemmaryError(f"--set {one!r}: write key=value, such as pretrain.steps=200")
    try:
        value: Any = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *folders, last = key.strip().split(".")
    here: Any = tree
    for name in folders:
        here = _inside(here, name, key)
    if isinstance(here, list):
        _inside(here, last, key)  # it is there
        here[int(last)] = value
    else:
        here[last] = value


def _inside(here: Any, name: str, key: str) -> Any:
    if isinstance(here, list) and name.isdecimal() and int(name) < len(here):
        return here[int(name)]
    if isinstance(here, dict):
        return here.setdefault(name, {})
    raise GemmaryError(f"--set {key}: there is no {name!r} to set something in")


def _known(kind: Any, value: Any, where: str) -> None:
    """Every key of the tree is a field; else GemmaryError with the nearest ones. Pydantic lets unknown keys pass here."""
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = get_type_hints(kind)
        for key, inner in value.items():
            path = f"{where}.{key}" if where else key
            if key not in hints:
                near = difflib.get_close_matches(key, hints, n=2, cutoff=0.5)
                hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(hints)}"
                raise GemmaryError(f"the recipe has an unknown key {path}: {hint}")
            _known(hints[key], inner, path)
    elif isinstance(value, list):
        for inner_kind in get_args(kind):
            for i, inner in enumerate(value):
                _known(inner_kind, inner, f"{where}[{i}]")
    else:
        for inner_kind in get_args(kind):  # X | None
            if dataclasses.is_dataclass(inner_kind):
                _known(inner_kind, value, where)
