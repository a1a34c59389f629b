"""The stages of tuning, each from the model before it.

sft/  reward/  rlhf/  dpo/      runs (see `train.run`)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gemmary import processes
from gemmary.adapters import merge
from gemmary.checkpoints import SAMPLE, convert, open_model
from gemmary.config import Config
from gemmary.data.conversations import Conversation
from gemmary.data.instructions import InstructionSettings, read_gathered
from gemmary.errors import GemmaryError
from gemmary.evaluate.sandbox import Sandbox
from gemmary.evaluate.tasks import passing_tests, success
from gemmary.params import Params
from gemmary.recipe import RlhfStage
from gemmary.teaching import Teaching, digest_of, sha
from gemmary.text.dialogue import encode_dialogue
from gemmary.text.tokenizer import Tokenizer
from gemmary.train.dpo import dpo
from gemmary.train.meshed import on_host
from gemmary.train.reward import reward
from gemmary.train.rewards import Reward, exact_answer, model_reward
from gemmary.train.rlhf import rlhf
from gemmary.train.rollouts import Prompt
from gemmary.train.run import Ended
from gemmary.train.sft import sft

__all__ = ["Model", "Tuning"]

_SHOWN = 20


class Model(NamedTuple):
    """A model to begin from; `name` is for those who load adapters over it."""

    config: Config
    params: Params
    tokenizer: Tokenizer
    name: str


class Tuning(Teaching):
    """A life up to a model that answers. Each method gives its stage's record, as those of `Life` do."""

    def sft(self) -> dict[str, Any]:
        """An instruction-tuned model (or adapters): `sft/model`."""
        learns = self.given("instructions")
        return self._learnt("sft", sft, learns, self.dialogues, lambda split: self._tokens("dialogues", learns, split))

    def reward(self) -> dict[str, Any]:
        """A reward model: `reward/model`."""
        learns = self.given("preferences")
        return self._learnt("reward", reward, learns, self.pairs, lambda split: self._pairs(learns, split))

    def dpo(self) -> dict[str, Any]:
        """A model that learnt from the pairs themselves: `dpo/model`."""
        learns = self.given("preferences")
        return self._learnt("dpo", dpo, learns, self.pairs, lambda split: self._pairs(learns, split))

    def _learnt(
        self,
        stage: str,
        learn: Callable[..., Ended],
        learns: InstructionSettings,
        rows: Callable[[], dict[str, Any]],
        data: Callable[[str], Any],
    ) -> dict[str, Any]:
        settings, made, before = self.given(stage), rows(), self._before(stage)
        digest = self._digest_of_model(before)

        def work(folder: Path) -> dict[str, Any]:
            with on_host(self.mesh):
                model = self._opened(before)
            ended = learn(
                settings, model.config, model.params, model.tokenizer, data("train"), data("held_out"), folder,
                weights=learns.weights, seed=self.recipe.seed, base=model.name, digest=digest, mesh=self.mesh,
                report=self.report, say=self.say,
            )  # fmt: skip
            return self._ended(folder, ended)

        inputs = {made["stage"]: made["digest"], "model": digest}
        return self.stage(stage, {**settings.decisive(), **self._common(learns)}, inputs, work, keep=True)

    def rlhf(self) -> dict[str, Any]:
        """A model that learnt from rewards: `rlhf/model`."""
        settings: RlhfStage = self.given("rlhf")
        learns, gathered = self.given("instructions"), self.instructions()
        before, judge = self._before("rlhf"), dict[str, str](kind=settings.reward)
        digest = self._digest_of_model(before)
        if settings.reward == "model":
            judge["digest"] = digest_of(settings.reward_path) if settings.reward_path else self.reward()["digest"]
            if not settings.reward_path and not self.reward()["results"]["complete"]:
                return self.reward()

        def work(folder: Path) -> dict[str, Any]:
            with on_host(self.mesh):
                model = self._opened(before)
            wanted = settings.sources or tuple(learns.weights)
            prompts, left = self._prompts(wanted, "train", model, settings)
            held_out, _ = self._prompts(wanted, "held_out", model, settings)
            sandbox = self._sandbox(needed=settings.reward == "tests")
            ended = rlhf(
                settings, model.config, model.params, model.tokenizer, prompts, _turn_by_turn(held_out),
                self._reward(settings, model, sandbox), success(sandbox), folder,
                weights={name: 1 / len(some) for name, some in prompts.items()},
                digest=sha([gathered["digest"], judge]), seed=self.recipe.seed, base=model.name, start=digest, mesh=self.mesh,
                report=self.report, say=self.say,
            )  # fmt: skip
            return self._ended(folder, ended) | {
                "prompts": {n: len(some) for n, some in prompts.items()},
                "too_long": left,
            }

        decisive = {**settings.decisive(), **self._common(learns), "evaluate": self.recipe.evaluate.allow_unsandboxed}
        inputs = {"instructions": gathered["digest"], "model": digest, "reward": sha(judge)}
        return self.stage("rlhf", decisive, inputs, work, keep=True)

    def _reward(self, settings: RlhfStage, model: Model, sandbox: Sandbox | None) -> Reward:
        if settings.reward == "answer":
            return exact_answer
        if settings.reward == "tests":
            assert sandbox is not None
            return passing_tests(sandbox)
        path = settings.reward_path or str(self._parameters("reward"))
        with open_model(path) as checkpoint:
            tokenizer = checkpoint.own_tokenizer()
            params = merge(checkpoint.params(jnp.float32))
            return model_reward(
                params, checkpoint.config, tokenizer, model.tokenizer, dtype=jnp.float32, length=settings.length
            )

    def _prompts(
        self, sources: Iterable[str], split: str, model: Model, settings: Any
    ) -> tuple[dict[str, list[Prompt]], list[str]]:
        """By source; and where those are that leave no room for an answer."""
        length = min(getattr(settings, "length", model.config.context), model.config.context)
        found: dict[str, list[Prompt]] = {}
        left: list[str] = []
        for source in sources:
            for one in read_gathered(self.folder / "instructions", source, split):
                assert isinstance(one, Conversation)
                ids = encode_dialogue(
                    model.tokenizer, one.prompt, generation=model.config.generation, open_turn=True
                ).ids
                if len(ids) + settings.max_new_tokens > length:
                    left.append(one.where)
                    continue
                prompt = Prompt(tuple(ids), one.prompt[-1]["content"], one.answer, one.tests, one.where, source)
                found.setdefault(source, []).append(prompt)
        return found, left[:_SHOWN]

    def _sandbox(self, *, needed: bool = False) -> Sandbox | None:
        """Where code is run; None, which is said, where there is none and it can be done without."""
        try:
            return Sandbox(allow_unsandboxed=self.recipe.evaluate.allow_unsandboxed)
        except GemmaryError as error:
            if needed:
                raise
            self.say(f"code is not judged: {error}")
            return None

    def _before(self, stage: str) -> str:
        """Which model a stage begins from."""
        return "sft" if stage != "sft" and self.recipe.sft is not None else "base"

    def _digest_of_model(self, name: str) -> str:
        """Of the base model or a stage's, which is lived first; nothing is loaded."""
        if name == "base":
            return self._start_digest()
        record = getattr(self, name)()
        if not record["results"]["complete"]:
            raise GemmaryError(f"{name} is not complete: the same command goes on with it")
        return str(record["digest"])

    def _opened(self, name: str) -> Model:
        path = self._start() if name == "base" else self._whole(name)
        with open_model(path) as checkpoint:
            shown = str(path) if str(path) == SAMPLE else str(Path(path).absolute())
            return Model(checkpoint.config, checkpoint.params(jnp.float32), checkpoint.own_tokenizer(), shown)

    def _whole(self, stage: str) -> Path:
        """The stage's model; that of adapters is merged once, so that others can go over it."""
        path = self._parameters(stage)
        merged = self.folder / stage / "merged" / path.resolve().parent.name
        if path.name != "adapter":
            return path

        def merge_once() -> None:
            if not merged.exists():
                with open_model(path) as checkpoint:
                    convert(checkpoint, merged, "native", dtype="float32")

        processes.from_first("merged", merge_once)
        return merged

    def _parameters(self, stage: str) -> Path:
        lora = getattr(self.recipe, stage).lora is not None
        return self.folder / stage / ("adapter" if lora else "model")

    def _ended(self, folder: Path, ended: Ended) -> dict[str, Any]:
        watched = [entry for entry in ended.entries if {"held_out_loss", "held_out_pairs", "watched"} & set(entry)]
        first = watched[0] if watched else {}
        return {
            "complete": ended.complete, "steps": int(ended.state.step),
            "parameters": ended.parameters.resolve().relative_to(folder.resolve()).as_posix(),
            "learnt": int(sum(leaf.size for leaf in jax.tree.leaves(ended.state.params))), **ended.last,
            "goodput": ended.goodput,
            "before": {k: v for k, v in first.items() if k in ("held_out_loss", "held_out_pairs", "watched")},
        }  # fmt: skip


def _turn_by_turn(prompts: Mapping[str, list[Prompt]]) -> list[Prompt]:
    """One of each source after the other, so that the first so many are of all."""
    most = max(map(len, prompts.values()), default=0)
    return [some[i] for i in range(most) for some in prompts.values() if i < len(some)]
