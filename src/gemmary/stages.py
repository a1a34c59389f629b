"""A model's life, stage after stage, each in a folder of its own with a `stage.json` of what went in and what came out.

A stage whose settings and inputs are those of its `stage.json` is not run again; one that was cut off goes on where it was.
Curation, tokenizer and tokens are made again when what they depend on has changed; a pre-training that was begun with
something else is never thrown away, but refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from gemmary import processes
from gemmary.checkpoints import open_model
from gemmary.config import Config
from gemmary.data.curate import curate, read_documents
from gemmary.data.mixture import MixtureSettings
from gemmary.data.tokens import Tokens, write_tokens
from gemmary.errors import GemmaryError
from gemmary.gemma import Gemma
from gemmary.infer.engine import Engine
from gemmary.params import is_stacked, unstack
from gemmary.records import Records, write_record
from gemmary.text.tokenizer import Tokenizer
from gemmary.text.training import compression, train_tokenizer
from gemmary.train.held_out import xz_bits_per_byte
from gemmary.train.loop import Hook
from gemmary.train.meshed import MeshSettings, check_rows, local
from gemmary.train.pretrain import PretrainSettings, pretrain
from gemmary.train.step import TrainState

__all__ = ["Life"]

_BYTES_REPORTED = 1 << 20  # of each source, for bytes per token


class Life(Records):
    """A recipe being lived in `folder`, up to a pre-trained model."""

    def given(self, section: str) -> Any:
        """A section of the recipe. Raises GemmaryError where it has none."""
        found = getattr(self.recipe, section)
        if found is None:
            raise GemmaryError(f"the recipe has no [{section}]")
        return found

    @cached_property
    def mesh(self) -> Mesh | None:
        """What stages that learn lie on. Raises GemmaryError for a mesh that devices or batches do not fit."""
        settings = self.recipe.mesh
        if settings is None and processes.count() == 1:
            return None
        mesh = (settings or MeshSettings()).mesh()
        for name in ("pretrain", "sft", "reward", "rlhf", "dpo"):
            stage = getattr(self.recipe, name)
            if isinstance(stage, PretrainSettings):
                stage = self.recipe.model.scaled(stage)
            if stage is not None:
                check_rows(name, stage.batch, stage.accumulate, mesh)
        return mesh

    def ready(self) -> None:
        """Before anything long begins: raises as `mesh` does, and says which devices nothing is left for."""
        used, have = self.mesh.size if self.mesh is not None else 1, len(jax.devices())
        if used < have:
            self.say(f"{have - used} of {have} devices are idle: --set mesh.model=1 has all of them share the batches")

    def curate(self) -> dict[str, Any]:
        """Documents from sources: see `data.curate`."""
        settings = self.given("curate")

        def work(folder: Path) -> dict[str, Any]:
            found = curate(settings, folder, on_progress=self.progress)
            return {"digest": found["digest"], "sources": found["sources"]}

        # Curation knows by itself whether its files changed, and goes on where it was cut off.
        return self.stage("curate", settings.decisive(), {}, work, always=True)

    def tokenizer(self) -> dict[str, Any]:
        """A vocabulary for the training documents, in `tokenizer/tokenizer.model`."""
        curated = self.curate()
        settings = self.recipe.tokenizer

        def work(folder: Path) -> dict[str, Any]:
            names = [source.name for source in self.given("curate").source]
            tokenizer = train_tokenizer((text for name in names for text in self._texts(name, "train")), settings)
            others = {"ours": tokenizer, **_sample_tokenizer()}
            texts = {name: _some(self._texts(name, "train"), _BYTES_REPORTED) for name in names}
            (folder / "tokenizer.model").write_bytes(tokenizer.to_sentencepiece())
            return {"vocabulary": tokenizer.size, "bytes_per_token": compression(texts, others)}

        decisive = {name: value for name, value in asdict(settings).items() if name != "threads"}
        return self.stage("tokenizer", decisive, {"curate": curated["digest"]}, work)

    def tokens(self) -> dict[str, Any]:
        """The documents' ids: `tokens/<source>/train` and `…/held_out`."""
        made = self.tokenizer()
        most = self.recipe.held_out_bytes

        def work(folder: Path) -> dict[str, Any]:
            tokenizer, results = self._tokenizer(), dict[str, dict[str, Any]]()
            for source in self.given("curate").source:
                train = write_tokens(folder / source.name / "train", self._texts(source.name, "train"), tokenizer)
                results[source.name] = {"train": asdict(train)}
                held_out = list(_some(self._texts(source.name, "held_out"), most))
                if held_out:
                    info = write_tokens(folder / source.name / "held_out", held_out, tokenizer)
                    results[source.name] |= {"held_out": asdict(info), "xz_bits_per_byte": xz_bits_per_byte(held_out)}
            return {"sources": results}

        return self.stage("tokens", {"held_out_bytes": most}, {"tokenizer": made["digest"]}, work)

    def pretrain(self) -> dict[str, Any]:
        """A model, in `pretrain/checkpoints`; `results.complete` is false where it was asked to stop."""
        tokens = self.tokens()
        settings = self.recipe.model.scaled(self.given("pretrain"))
        tokenizer = self._tokenizer()
        config = self.recipe.model.config(tokenizer.size, settings.length)
        return self._pretrained("pretrain", settings, config, tokenizer, self.given("mixture"), tokens)

    def ablate(self) -> dict[str, Any]:
        """Small models on candidate mixtures; `ranking` is from the fewest held-out bits per byte to the most."""
        wanted = self.recipe.ablate
        if wanted is None:
            raise GemmaryError("the recipe has no [ablate] with candidates to choose from")
        tokens = self.tokens()
        model = dataclasses.replace(self.recipe.model, preset=None, dial=wanted.dial)
        settings = model.scaled(dataclasses.replace(self.given("pretrain"), steps=wanted.steps, evaluate_every=0))
        tokenizer = self._tokenizer()
        config = model.config(tokenizer.size, settings.length)
        found = []
        for candidate in wanted.candidate:
            self.say(f"ablate: {candidate.name}")
            name = f"ablate/{candidate.name}"
            record = self._pretrained(name, settings, config, tokenizer, candidate.mixture(), tokens)
            if not record["results"]["complete"]:
                return {"complete": False, "ranking": []}
            held_out = record["results"].get("held_out", {})
            if not held_out:
                raise GemmaryError("no source has held-out documents to rank by: give held_out to some")
            mean = sum(held_out.values()) / len(held_out)
            shares = record["results"]["shares"]
            found.append({"name": candidate.name, "mean": mean, "held_out": held_out, "shares": shares})
        found.sort(key=lambda one: one["mean"])
        result: dict[str, Any] = {
            "complete": True,
            "dial": wanted.dial,
            "tokens": settings.steps * settings.batch * settings.length,
        }
        if processes.is_first():
            write_record(self.folder / "ablate" / "ranking.json", result | {"ranking": found})
        return result | {"ranking": found}

    def _pretrained(
        self,
        name: str,
        settings: PretrainSettings,
        config: Config,
        tokenizer: Tokenizer,
        mixture: MixtureSettings,
        tokens: Mapping[str, Any],
    ) -> dict[str, Any]:
        sources = self._sources("train", mixture.names)
        held_out = self._sources("held_out", [s.name for s in self.given("curate").source])

        def work(folder: Path) -> dict[str, Any]:
            sample = Hook(settings.sample_every, lambda state: _sample(state, settings, config, tokenizer, self.mesh))
            done = pretrain(
                settings, config, tokenizer, mixture, sources, held_out, folder, mesh=self.mesh, seed=self.recipe.seed,
                hooks=[sample] if settings.prompt else [], report=self.report, say=self.say,
            )  # fmt: skip
            return {"complete": done.complete, **done.results}

        decisive: dict[str, Any] = {"seed": self.recipe.seed, "mixture": asdict(mixture)}
        decisive |= {"model": asdict(config), "pretrain": settings.decisive()}
        return self.stage(name, decisive, {"tokens": tokens["digest"]}, work, keep=True)

    def _texts(self, source: str, split: str) -> Iterator[str]:
        return (document["text"] for document in read_documents(self.folder / "curate", source, split))

    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.from_sentencepiece(self.folder / "tokenizer" / "tokenizer.model")

    def _sources(self, split: str, names: Any) -> dict[str, Tokens]:
        paths = {name: self.folder / "tokens" / name / split for name in names}
        return {name: Tokens(path) for name, path in paths.items() if split == "train" or path.is_dir()}


def _some(texts: Iterator[str], most: int) -> Iterator[str]:
    """Texts of at most so many UTF-8 bytes together; the last is cut."""
    for text in texts:
        data = text.encode()
        yield data[:most].decode(errors="ignore")
        most -= len(data)
        if most <= 0:
            return


def _sample_tokenizer() -> dict[str, Tokenizer]:
    """Gemma 3's own tokenizer, where the sample weights are installed."""
    try:
        with open_model("sample") as checkpoint:
            tokenizer = checkpoint.tokenizer()
    except GemmaryError:
        return {}
    return {"gemma3": tokenizer} if tokenizer else {}


def _sample(
    state: TrainState, settings: PretrainSettings, config: Config, tokenizer: Tokenizer, mesh: Mesh | None
) -> dict[str, Any]:
    """Greedy continuations of the prompts, by the first process."""
    whole = local(mesh, state.params)

    def samples() -> dict[str, str]:
        params = unstack(whole) if is_stacked(whole) else whole
        engine = Engine(params, config, jax.numpy.dtype(settings.dtype), tokenizer.size)
        gemma = Gemma(config, params, tokenizer, engine)
        return {p: gemma.generate(p, max_new_tokens=settings.sample_tokens).text for p in settings.prompt}

    return {"samples": processes.from_first("samples", samples)}
