"""A whole life: all stages, and at its end held-out tasks, answered by every model it has.

evaluate/results.json      of each model and task: prompts, the share answered right; and answers side by side
evaluate/records.jsonl     every question with every model's answers
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gemmary import kernels
from gemmary.checkpoints.checkpoint import write_whole
from gemmary.evaluate.held_out import HeldOut, by_task
from gemmary.evaluate.lm_eval import GemmaryLM
from gemmary.evaluate.running import Run, Settings, Unjudged, run
from gemmary.evaluate.sandbox import Sandbox
from gemmary.evaluate.suites import Benchmark
from gemmary.evaluate.tasks import success
from gemmary.gemma import Gemma
from gemmary.infer.engine import Engine
from gemmary.records import write_record
from gemmary.train.rollouts import Rollout
from gemmary.train.watching import manner
from gemmary.tuning import Model, Tuning

__all__ = ["STAGES", "WHOLE", "Whole"]

_SAMPLES = 3  # of each source, side by side
_AT_ONCE = 32  # prompts answered at once


class Whole(Tuning):
    """A life with all its stages."""

    def sign(self, command: list[str], recipe: Path) -> None:
        """Write down what made this: `run.json`, and the recipe as it was."""
        about = {
            "command": command, "gemmary": version("gemmary"), "python": platform.python_version(), "jax": jax.__version__,
            "kernels": kernels.instructions() or "none", "device": jax.devices()[0].device_kind, "cores": os.cpu_count() or 1,
            "machine": platform.machine(), "ended": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        }  # fmt: skip
        write_record(self.folder / "run.json", about)
        write_whole(self.folder / "recipe.toml", recipe.read_bytes())

    def whole(self) -> dict[str, Any]:
        """All stages that the recipe has, in order; the last one's record, or that of the first which was asked to stop."""
        stages = [name for name in WHOLE if name in ("pretrain", "evaluate") or getattr(self.recipe, name) is not None]
        if self.recipe.model.path is not None:
            stages.remove("pretrain")
        if self.recipe.instructions is None:
            stages.remove("evaluate")
        record: dict[str, Any] = {}
        for name in stages:
            record = STAGES[name](self)
            if not record["results"].get("complete", True):
                break
        return record

    def evaluate(self) -> dict[str, Any]:
        """Held-out tasks, answered by each of the life's models."""
        settings, gathered = self.recipe.evaluate, self.instructions()
        there = {
            "base": None,
            **{name: getattr(self, name)() for name in ("sft", "rlhf", "dpo") if getattr(self.recipe, name)},
        }
        if not all(record["results"]["complete"] for record in there.values() if record):
            return next(record for record in there.values() if record and not record["results"]["complete"])
        models = {name: self._start_digest() if record is None else record["digest"] for name, record in there.items()}

        def work(folder: Path) -> dict[str, Any]:
            sandbox = self._sandbox()
            results: dict[str, Any] = {"sandbox": sandbox.layer if sandbox else None, "models": {}, "complete": True}
            samples: dict[str, dict[str, Any]] = {}
            records: list[dict[str, Any]] = []
            for i, name in enumerate(models):
                self.progress(i, len(models))
                model = self._opened(name)
                for how in ("greedy", "sampled"):
                    runs, rollouts = self._answered(model, sandbox, sampled=how == "sampled")
                    results["models"].setdefault(name, {})[how] = {"tasks": by_task(runs), **manner(rollouts)}
                    records += [{"model": name, "how": how, **one} for run in runs for one in run.records]
                    if how == "greedy":
                        _side_by_side(samples, name, rollouts)
            lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records)
            write_whole(folder / "records.jsonl", lines.encode())
            write_record(folder / "results.json", results | {"samples": list(samples.values())})
            return results

        return self.stage("evaluate", asdict(settings), {"instructions": gathered["digest"], **models}, work)

    def _answered(self, model: Model, sandbox: Sandbox | None, *, sampled: bool) -> tuple[list[Run], list[Rollout]]:
        """What each source's held-out prompts come to, and every answer: the likeliest ones, or drawn ones."""
        settings, learns = self.recipe.evaluate, self.given("instructions")
        found, _ = self._prompts(tuple(learns.weights), "held_out", model, settings)
        asked = {source: some[: settings.prompts] for source, some in found.items()}
        engine = Engine(model.params, model.config, jnp.float32, min(model.config.num_tokens, model.tokenizer.size))
        lm = GemmaryLM(Gemma(model.config, model.params, model.tokenizer, engine), slots=_AT_ONCE, on_progress=_unseen)
        tasks = HeldOut(lm, asked, success(sandbox), max_new_tokens=settings.max_new_tokens, sampled=sampled)
        runs = []
        for source in asked:
            with suppress(Unjudged):  # what has no answer and no tests is answered all the same
                one = Benchmark(source, source, metric="success")
                runs.append(run(lm, tasks, one, Settings(None, self.folder), "tests are run by the task itself"))
        return runs, tasks.rollouts


STAGES: dict[str, Callable[[Whole], dict[str, Any]]] = {
    "curate": Whole.curate,
    "tokenizer": Whole.tokenizer,
    "pretrain": Whole.pretrain,
    "ablate": Whole.ablate,
    "sft": Whole.sft,
    "reward": Whole.reward,
    "rlhf": Whole.rlhf,
    "dpo": Whole.dpo,
    "evaluate": Whole.evaluate,
}
"""Verbs of the command line; each does first what it builds on."""

WHOLE = ("pretrain", "sft", "reward", "rlhf", "dpo", "evaluate")
"""A whole life's stages, those that the recipe has."""


def _unseen(done: int, total: int) -> None:
    """The life has a bar of its own."""


def _side_by_side(samples: dict[str, dict[str, Any]], model: str, rollouts: list[Rollout]) -> None:
    seen: dict[str, int] = {}
    for one in rollouts:
        seen[one.prompt.source] = seen.get(one.prompt.source, 0) + 1
        if seen[one.prompt.source] <= _SAMPLES:
            key = f"{one.prompt.source} {one.prompt.where}"
            entry = samples.setdefault(
                key, {"source": one.prompt.source, "prompt": one.prompt.text, "answer": one.prompt.answer, "models": {}}
            )
            entry["models"][model] = one.text
