"""What curation is asked for, as plain values, checked once."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from gemmary.data.classifiers import ClassifierSettings
from gemmary.data.decontamination import EvaluationSet
from gemmary.data.filters import CodeRules, ProseRules
from gemmary.data.language import LANGUAGES
from gemmary.data.sources import Source
from gemmary.errors import GemmaryError, check_bounds

__all__ = ["CurateSettings", "Slurm"]


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """How tasks are submitted with `executor = "slurm"`."""

    partition: str = ""
    time: str = "24:00:00"
    qos: str = "normal"
    memory_per_task: int = 4
    """GiB."""
    environment: str = ""
    """A shell command that activates the environment on a node."""


@dataclass(frozen=True, kw_only=True)
class CurateSettings:
    """Sources and what they are held to. The output does not depend on `workers`, `executor` and `slurm`."""

    source: tuple[Source, ...]
    workers: int = 0
    """Tasks at once; 0: one for each core."""
    executor: Literal["local", "ray", "slurm"] = "local"
    slurm: Slurm = field(default_factory=Slurm)
    task_bytes: int = 0
    """About so many bytes of text make a task; 0: a 256th of the corpus, between 2 and 128 MiB."""
    max_characters: int = 5_000_000
    """A longer document goes: memory follows the longest, at about 150 bytes for each character."""
    prose: ProseRules = field(default_factory=ProseRules)
    code: CodeRules = field(default_factory=CodeRules)
    languages: tuple[str, ...] = ("en",)
    """Languages of prose that stay; none given: all."""
    mask: tuple[Literal["personal", "secret"], ...] = ("personal", "secret")
    """What is masked."""
    classifier: tuple[ClassifierSettings, ...] = ()
    """Classifiers that prose is held to."""
    evaluation: tuple[EvaluationSet, ...] = ()
    """Evaluation sets to keep out."""
    evaluation_words: int = 13
    """So many consecutive words shared with an item are a match."""
    max_contaminated: float = 0.2
    """Prose that matches is cut around the match, and goes where that is more than this share of it; all else goes."""
    near_duplicates: bool = True
    """Whether near duplicates of prose and code go; exact ones always do."""
    minhash_words: int = 5
    minhash_buckets: int = 14
    minhash_hashes: int = 8
    max_recurrence: int = 10
    """A passage stays so many times in the corpus; 0: always."""
    prose_passage_words: int = 10
    """A line of prose of at least so many words is a passage."""
    code_passage_words: int = 30
    """The same of a block of code between blank lines."""

    def __post_init__(self) -> None:
        if not self.source:
            raise GemmaryError("curation needs at least one source")
        for kind in ("source", "classifier", "evaluation"):
            names = [item.name for item in getattr(self, kind)]
            if twice := {name for name in names if names.count(name) > 1}:
                raise GemmaryError(f"two of {kind} are named {min(twice)!r}: a name is given once")
        if unknown := set(self.languages) - set(LANGUAGES):
            raise GemmaryError(f"no such language as {min(unknown)!r}; there are {', '.join(LANGUAGES)}")
        check_bounds(
            self, workers=(0, 1 << 16), task_bytes=(0, 1 << 40), max_characters=(1, 100_000_000), evaluation_words=(8, 1000),
            max_contaminated=(0, 1), minhash_words=(1, 100), minhash_buckets=(1, 256), minhash_hashes=(1, 64),
            max_recurrence=(0, (1 << 31) - 1), prose_passage_words=(1, 1 << 20), code_passage_words=(1, 1 << 20),
        )  # fmt: skip

    def passage_words(self, code: bool) -> int:
        """Words that make a line or a block a passage."""
        return self.code_passage_words if code else self.prose_passage_words

    def decisive(self) -> dict[str, Any]:
        """The settings that the output depends on, as plain data."""
        return {k: v for k, v in asdict(self).items() if k not in ("workers", "executor", "slurm")}
