"""What a model is taught by: conversations and preferences, filtered, and as ids; and the model that all begins from.

instructions/  preferences/     what is learnt from, filtered (see `data.instructions`)
dialogues/  pairs/              the same as ids
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gemmary.checkpoints import open_model
from gemmary.data.conversations import Conversation, Preference
from gemmary.data.instructions import InstructionSettings, gather, read_gathered
from gemmary.data.tokens import Tokens, write_dialogues
from gemmary.errors import GemmaryError
from gemmary.stages import Life
from gemmary.text.dialogue import Dialogue, encode_dialogue
from gemmary.text.tokenizer import Tokenizer
from gemmary.train.reward import Pairs

__all__ = ["Teaching", "digest_of", "sha"]

_SHOWN = 20


class Teaching(Life):
    """A life up to what is learnt from after pre-training."""

    def instructions(self) -> dict[str, Any]:
        """Conversations, filtered and split."""
        return self._gathered("instructions", "conversation")

    def preferences(self) -> dict[str, Any]:
        """Pairs of answers, filtered and split."""
        return self._gathered("preferences", "preference")

    def _gathered(self, name: str, kind: Any) -> dict[str, Any]:
        settings: InstructionSettings = self.given(name)
        system = "refuse" if self._generation() < 3 else "prefix"

        def work(folder: Path) -> dict[str, Any]:
            report = gather(settings, folder, kind=kind, system=system)
            return {"sources": {source: _counted(counts) for source, counts in report["sources"].items()}}

        paths = [path for s in settings.source if (path := s.path)]
        paths += [path for c in settings.classifier for path in (c.path, c.keep, c.remove) if path]
        return self.stage(name, {**asdict(settings), "system": system}, {path: digest_of(path) for path in paths}, work)

    def dialogues(self) -> dict[str, Any]:
        """The conversations as ids: `dialogues/<source>/<split>`."""
        gathered, settings, length = self.instructions(), self.given("instructions"), self.given("sft").length

        def work(folder: Path) -> dict[str, Any]:
            tokenizer, generation = self._start_tokenizer(), self._generation()
            return _written(folder, settings, length, lambda source, split: (
                (one.where, (_ids(one.messages, tokenizer, generation),))
                for one in read_gathered(self.folder / "instructions", source, split)
                if isinstance(one, Conversation) and one.messages[-1]["role"] != "user"
            ), ("",), tokenizer)  # fmt: skip

        inputs = {"instructions": gathered["digest"], "model": self._start_digest()}
        return self.stage("dialogues", {"length": length, "on_error": settings.on_error}, inputs, work)

    def pairs(self) -> dict[str, Any]:
        """The preferences as ids: `pairs/<source>/<split>/chosen` and `…/rejected`."""
        gathered, settings = self.preferences(), self.given("preferences")
        length = min(one.length for one in (self.recipe.reward, self.recipe.dpo) if one is not None)

        def work(folder: Path) -> dict[str, Any]:
            tokenizer, generation = self._start_tokenizer(), self._generation()

            def both(one: Preference) -> tuple[Dialogue, Dialogue]:
                said = ([*one.prompt, {"role": "assistant", "content": text}] for text in (one.chosen, one.rejected))
                first, second = (_ids(messages, tokenizer, generation) for messages in said)
                return first, second

            return _written(folder, settings, length, lambda source, split: (
                (one.where, both(one)) for one in read_gathered(self.folder / "preferences", source, split)
                if isinstance(one, Preference)
            ), ("chosen", "rejected"), tokenizer)  # fmt: skip

        inputs = {"preferences": gathered["digest"], "model": self._start_digest()}
        return self.stage("pairs", {"length": length, "on_error": settings.on_error}, inputs, work)

    def _start(self) -> str | Path:
        return self.recipe.model.path or self.folder / "pretrain" / "model"

    def _start_digest(self) -> str:
        if self.recipe.model.path is not None:
            return digest_of(self.recipe.model.path)
        record = self.pretrain()
        if not record["results"]["complete"]:
            raise GemmaryError("pretrain is not complete: the same command goes on with it")
        return str(record["digest"])

    def _start_tokenizer(self) -> Tokenizer:
        if self.recipe.model.path is None:
            self.tokenizer()
            return self._tokenizer()
        with open_model(self.recipe.model.path) as checkpoint:
            return checkpoint.own_tokenizer()

    def _generation(self) -> int:
        model = self.recipe.model
        if model.path is not None:
            with open_model(model.path) as checkpoint:
                return checkpoint.config.generation
        return model.config(8192, 512).generation

    def _common(self, learns: InstructionSettings) -> dict[str, Any]:
        return {"seed": self.recipe.seed, "weights": learns.weights}

    def _tokens(self, stage: str, learns: InstructionSettings, split: str, part: str = "") -> dict[str, Tokens]:
        paths = {source.name: self.folder / stage / source.name / split / part for source in learns.source}
        return {name: Tokens(path) for name, path in paths.items() if path.is_dir()}

    def _pairs(self, learns: InstructionSettings, split: str) -> dict[str, Pairs]:
        chosen, rejected = (self._tokens("pairs", learns, split, part) for part in ("chosen", "rejected"))
        return {name: Pairs(tokens, rejected[name]) for name, tokens in chosen.items()}


def _ids(messages: list[dict[str, str]], tokenizer: Tokenizer, generation: int) -> Dialogue:
    """A conversation up to the mark that ends it; the newline behind it is never generated."""
    whole = encode_dialogue(tokenizer, messages, generation=generation, open_turn=False)
    end = max(i for i, learnt in enumerate(whole.loss_mask) if learnt) + 1
    return Dialogue(whole.ids[:end], whole.loss_mask[:end])


def _written(
    folder: Path, settings: InstructionSettings, length: int,
    read: Callable[[str, str], Iterator[tuple[str, tuple[Dialogue, ...]]]], parts: tuple[str, ...], tokenizer: Tokenizer,
) -> dict[str, Any]:  # fmt: skip
    """Each source's and split's dialogues as ids, by part; those that do not fit a row are named and counted, or refused."""
    results: dict[str, Any] = {}
    for source in settings.source:
        results[source.name] = {"too_long": {"count": 0, "first": []}}
        for split in ("train", "held_out"):
            kept: list[tuple[Dialogue, ...]] = []
            for where, dialogues in read(source.name, split):
                size = sum(len(one.ids) for one in dialogues)
                if size <= length:
                    kept.append(dialogues)
                    continue
                line = f"{where}: {size} tokens, and a row takes {length}"
                if settings.on_error == "refuse":
                    raise GemmaryError(f'source {source.name}: {line} (on_error = "skip" would leave it out)')
                left = results[source.name]["too_long"]
                left["count"] += 1
                left["first"] = [*left["first"], line][:_SHOWN]
            for i, part in enumerate(parts if kept else ()):
                info = write_dialogues(folder / source.name / split / part, (one[i] for one in kept), tokenizer)
                results[source.name].setdefault(split, {})[part or "dialogues"] = asdict(info)
    return {"sources": results}


def _counted(counts: Mapping[str, Any]) -> dict[str, Any]:
    removed = {rule: entry["count"] for rule, entry in counts["removed"].items()}
    return {
        "read": counts["read"],
        "train": counts["train"],
        "held_out": counts["held_out"],
        "broken": counts["broken"]["count"],
        "removed": removed,
    }


def digest_of(path: str) -> str:
    """SHA-256 of a file, a folder or what a pattern finds: sizes and bytes, of a file above 64 MB its first and last megabyte."""
    found = hashlib.sha256()
    given = Path(path).expanduser()
    some = given.rglob("*") if given.is_dir() else given.parent.glob(given.name) if "*" in given.name else [given]
    files = sorted(file for file in some if file.is_file())
    for file in files:
        size = file.stat().st_size
        found.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as data:
            found.update(data.read(size if size <= 64 << 20 else 1 << 20))
            data.seek(max(size - (1 << 20), 0))
            found.update(data.read())
    return found.hexdigest() if files else hashlib.sha256(path.encode()).hexdigest()


def sha(data: Any) -> str:
    """SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
